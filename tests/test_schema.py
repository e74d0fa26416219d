"""The JSON schema of the configuration, as the programs see it that editors check TOML with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import schema
from tests.daemon.test_sentences import CHAT
from tests.harness import Daemon, daemon, fake_engines
from vllm_proxy.cli import run
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.domain.schema import with_options

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OPTIONS = OptionTable.from_json((ROOT / "tests/domain/options.json").read_bytes())
GOOD = ["models.toml.example", "vllm_proxy/first_models.toml", *(f"examples/{file.name}" for file in
        sorted((ROOT / "examples").glob("*.toml")))]  # fmt: skip
BAD = """[server]
prt = 1
max_body_size = "64 apples"
[models.chat]
model = "org/chat"
replicas = 0
start = "never"
idle_timeout = "soon"
[models."a/stop"]
model = "org/chat"
"""
WRONG_LINES = {3, 4, 7, 8, 9, 10}  # of it, with a line in front


def complaints(program: str, file: Path) -> tuple[int, set[int]]:
    """Exit status of a checker, and the lines that it names."""
    check = {
        "taplo": [str(BIN / "taplo"), "lint", "--colors=never", str(file)],
        "tombi": [str(BIN / "tombi"), "lint", "--offline", str(file)],
    }[program]
    env = {"NO_COLOR": "1", "HOME": str(file.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(check, capture_output=True, text=True, check=False, cwd=file.parent, env=env)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    said = re.sub(r"^ *Warning: .*\n.*\n", "", said, flags=re.MULTILINE)  # of style: in which order tables stand
    return done.returncode, {int(line) for line in re.findall(rf"{re.escape(file.name)}:(\d+):\d+", said)}


def with_schema(folder: Path, text: str, place: Path = schema.FILE) -> Path:
    """A file that names its schema, as `init` writes it."""
    file = folder / "models.toml"
    text = re.sub(r"^#:schema .*\n", "", text)
    file.write_text(f"#:schema {place}\n{text}", encoding="utf-8")
    return file


def test_the_schema_is_as_the_types_are() -> None:
    """Names, bounds, defaults, costs; `python -m tests.pages` writes it anew."""
    assert schema.FILE.read_text(encoding="utf-8") == schema.made(), "run `python -m tests.pages`"


@pytest.mark.parametrize("program", ["taplo", "tombi"])
@pytest.mark.parametrize("name", GOOD)
def test_editors_find_nothing_in_a_good_file(tmp_path: Path, program: str, name: str) -> None:
    """The example with every key, the first file, and those of the examples."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert complaints(program, with_schema(tmp_path, text)) == (0, set())


@pytest.mark.parametrize("program", ["taplo", "tombi"])
def test_editors_find_what_is_wrong_at_its_line(tmp_path: Path, program: str) -> None:
    """An unknown key, a size, a range, a choice, a duration, an id."""
    status, lines = complaints(program, with_schema(tmp_path, BAD))
    assert status != 0
    assert lines >= WRONG_LINES


def test_every_key_says_what_it_means() -> None:
    """Editors show it beside the key, with what a change costs."""
    made = json.loads(schema.made())
    tables = [made["properties"][name] for name in ("server", "engine", "devices")]
    tables += [made["$defs"][name] for name in ("Model", "Key")]
    for table in tables:
        for key, value in table["properties"].items():
            assert value.get("description"), key
    model = made["$defs"]["Model"]["properties"]
    assert model["max_model_len"]["description"].endswith("A change replaces the engine.")
    assert model["aliases"]["description"].endswith("A change is applied live.")
    assert "null" not in json.dumps(made)


@pytest.mark.parametrize("program", ["taplo", "tombi"])
def test_options_of_vllm_are_known_with_their_types_and_choices(tmp_path: Path, program: str) -> None:
    """Not those that the daemon decides; and one that is not known may still be given."""
    whole = with_options(json.loads(schema.made()), OPTIONS)
    known = whole["$defs"]["Model"]["properties"]["args"]["properties"]
    assert not {"host", "port", "max_model_len", "headless"} & known.keys()
    place = tmp_path / "with.json"
    place.write_text(json.dumps(whole), encoding="utf-8")
    flags = [name for name, of in known.items() if of.get("type") == "boolean"]
    chosen = next(name for name, of in known.items() if "enum" in of)
    good = f'{CHAT}[models.chat.args]\n{flags[0]} = true\n{chosen} = "{known[chosen]["enum"][0]}"\nof_a_plugin = 1\n'
    assert complaints(program, with_schema(tmp_path, good, place)) == (0, set())
    bad = f'{CHAT}[models.chat.args]\n{flags[0]} = "yes"\n{chosen} = "nothing of it"\n'
    status, lines = complaints(program, with_schema(tmp_path, bad, place))
    assert status != 0
    assert lines >= {5, 6}


def test_schema_prints_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says how editors find it."""
    assert run(["schema"]) == 0
    assert capsys.readouterr().out == schema.made()
    place = tmp_path / "here.json"
    assert run(["schema", "-o", str(place)]) == 0
    assert place.read_text(encoding="utf-8") == schema.made()
    assert f"#:schema {place}" in capsys.readouterr().err
    assert run(["schema", "-o", str(tmp_path / "no/where.json")]) == 1
    assert "choose another place" in capsys.readouterr().err


def test_init_writes_where_the_schema_is(tmp_path: Path) -> None:
    """The first line of a first file; the schema of the package that wrote it."""
    assert run(["init", "-c", str(tmp_path / "models.toml")]) == 0
    first, *_ = (tmp_path / "models.toml").read_text(encoding="utf-8").splitlines()
    assert first == f"#:schema {schema.FILE}"


async def test_a_daemon_serves_it(tmp_path: Path, port_start: int) -> None:
    """Without a key; with the options of vLLM for who may read, where there is one that tells them."""
    async with daemon(fake_engines(port_start) + CHAT, tmp_path) as running:
        assert await _served(running, "") == json.loads(schema.made())
        assert await _served(running, "?vllm=1") == json.loads(schema.made()), "the fake tells none"
        async with running.session.get("/schema.json?vllm=maybe") as answer:
            assert answer.status == 400


async def _served(running: Daemon, query: str) -> object:
    async with running.admin.get(f"/schema.json{query}") as answer:
        assert (answer.status, answer.content_type) == (200, "application/schema+json")
        found: object = json.loads(await answer.read())
        return found
