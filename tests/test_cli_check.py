"""`check`, `init` and `--help`."""

import json
import os
import stat
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests import certificates
from vllm_proxy.cli import run
from vllm_proxy.domain.config import Server
from vllm_proxy.fleet import oversights

EXAMPLES = Path(__file__).parents[1] / "examples/gitops"
VALID = '[models.a]\nmodel = "x"\n[models.b]\nmodel = "y"\n'
WRONG = "[server]\nprot = 1\n[models.a]\nreplicas = 0\n"


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Commands set it up for themselves, as if nothing came after them."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no setting in the environment, and a vLLM."""
    monkeypatch.setattr(oversights, "find_vllm", lambda _env: (sys.executable, "-m", "vllm"))
    monkeypatch.chdir(tmp_path)
    for name in ["VLLM_PROXY_CONFIG", "APP_PORT", *(f"VLLM_PROXY_{key.upper()}" for key in Server.model_fields)]:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_check_says_that_a_file_is_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 and one line with the number of models."""
    file = folder / "models.toml"
    file.write_text(VALID)
    assert run(["check"]) == 0
    assert capsys.readouterr() == (f"{file}: valid, 2 models\n", "")


def test_check_warns_once_where_there_is_no_vllm(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is valid, as it may be for another machine; and so is one whose models have commands of their own."""
    monkeypatch.setattr(oversights, "find_vllm", lambda _env: None)
    file = folder / "models.toml"
    file.write_text(VALID)
    assert run(["check"]) == 0
    assert capsys.readouterr().err.count("cannot find vLLM") == 1
    file.write_text(f'[models.a]\nmodel = "x"\ncommand = ["{sys.executable}"]\n')
    assert run(["check"]) == 0
    assert capsys.readouterr().err == ""


def test_check_warns_of_a_mistyped_variable(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a daemon does."""
    (folder / "models.toml").write_text(VALID)
    monkeypatch.setenv("VLLM_PROXY_HOTS", "::")
    assert run(["check"]) == 0
    assert "VLLM_PROXY_HOTS is unknown and ignored; did you mean VLLM_PROXY_HOST?" in capsys.readouterr().err


def test_check_counts_one_model_in_the_singular(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People read it."""
    (folder / "other.toml").write_text('[models.a]\nmodel = "x"\n')
    assert run(["check", "-c", "other.toml"]) == 0
    assert capsys.readouterr().out == f"{folder}/other.toml: valid, 1 model\n"


def test_check_reads_the_folders_of_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative ones from the file's; what vLLM would refuse is a problem, with its line."""
    made = folder / "conf/adapters/support"
    made.mkdir(parents=True)
    (folder / "conf/models.toml").write_text(VALID + '[models.a.adapters.support]\npath = "adapters/support"\n')
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (made / "adapter_config.json").write_text(json.dumps(config))
    assert run(["check", "-c", "conf/models.toml"]) == 0
    (made / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert run(["check", "-c", "conf/models.toml"]) == 78
    problem = (
        'models.a.adapters.support.path: "adapters/support": vLLM cannot load it: DoRA (use_dora) is not supported'
    )
    assert f"conf/models.toml:6: {problem}" in capsys.readouterr().out


def test_check_prints_every_problem_on_a_line_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 78 and FILE:LINE: path: message for each, so that editors can jump there."""
    file = folder / "models.toml"
    file.write_text(WRONG)
    assert run(["check", "--config", str(file)]) == 78
    printed = capsys.readouterr()
    assert (printed.out + printed.err).splitlines() == [
        f"{file}:2: server.prot: unknown key; did you mean port?",
        f'{file}:3: models.a.model: missing: every model needs model = "a Hugging Face id, path or URL"',
        f"{file}:4: models.a.replicas: expected at least 1, got 0",
    ]


def test_check_looks_at_the_certificate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `serve` would refuse is a problem of the file, with the line of the key; a good pair is none."""
    pair = certificates.make(folder)
    file = folder / "models.toml"
    file.write_text('[server]\ntls_key = "server.key"\ntls_cert = "server.crt"\n')
    assert run(["check"]) == 0
    pair.certificate.write_bytes(pair.key.read_bytes())
    capsys.readouterr()
    assert run(["check"]) == 78
    printed = capsys.readouterr()
    expected = f"{file}:3: server.tls_cert: cannot use {pair.certificate}: tls_cert and tls_key may be exchanged; "
    assert (printed.out + printed.err).startswith(expected)


def test_check_answers_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A valid file: its revision and its models, and no problems."""
    (folder / "models.toml").write_text(VALID)
    assert run(["check", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("revision")
    assert answer == {"file": str(folder / "models.toml"), "models": ["a", "b"], "problems": [], "warnings": []}


def test_check_tells_problems_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same problems with the same exit status, for programs."""
    (folder / "models.toml").write_text(WRONG)
    assert run(["check", "--json"]) == 78
    answer = json.loads(capsys.readouterr().out)
    assert [(problem["line"], problem["path"]) for problem in answer["problems"]] == [
        (2, "server.prot"),
        (3, "models.a.model"),
        (4, "models.a.replicas"),
    ]
    assert answer["problems"][2]["message"] == "expected at least 1, got 0"


def test_check_in_a_shell_can_do_without_the_services_credentials(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the service alone can read is not looked at; where there are credentials, it is."""
    (folder / "models.toml").write_text(
        '[server]\nkeys_file = "credential:keys.toml"\n[keys.ci]\nfile = "credential:ci"\n' + VALID
    )
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert run(["check"]) == 0
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder / "credentials"))
    capsys.readouterr()
    assert run(["check"]) == 78
    assert [line.partition(": ")[2].partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "server.keys_file",
        "keys.ci.file",
    ]


def test_check_warns_of_what_is_valid_and_dangerous_or_useless(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, and the exit status is 0."""
    (folder / "models.toml").write_text(
        f'[keys.anonymous]\nscopes = ["admin"]\n[keys.a]\nhash = "sha256:{"a" * 64}"\nscopes = []\n'
        f'[keys.b]\nhash = "sha256:{"b" * 64}"\nmodels = ["none-*"]\n[keys.b.limits."qwen-*"]\n' + VALID
    )
    assert run(["check"]) == 0
    assert [line.partition("warning: ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "[keys.anonymous] has the scope admin: whoever can connect may change models, and so run code",
        "[keys.a] may do nothing: its scopes are empty",
        "[keys.b] may use no model: its globs match none",
        "[keys.b.limits] has a glob 'qwen-*', which matches no model",
    ]


def test_check_of_a_missing_file_says_how_to_get_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 78, the whole path and the command that writes a first file."""
    assert run(["check", "-c", "none.toml"]) == 78
    assert capsys.readouterr().out == (
        f"{folder}/none.toml: cannot read it: No such file or directory; `vllm-proxy init` writes a first one\n"
    )


def test_a_link_to_nowhere_is_told_as_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `check`, and by `init`, which cannot write a first file there."""
    (folder / "models.toml").symlink_to("../gone.toml")
    why = "it is a link to ../gone.toml, which is not there"
    assert run(["check"]) == 78
    assert capsys.readouterr().out == f"{folder}/models.toml: cannot read it: No such file or directory; {why}\n"
    assert run(["init"]) == 1
    assert capsys.readouterr().err.startswith(f"vllm-proxy: cannot write {folder}/models.toml: {why}; choose another")


def test_check_of_a_folder_is_a_problem_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read as a file is no traceback."""
    assert run(["check", "-c", str(folder)]) == 78
    assert (
        capsys.readouterr().out
        == f"{folder}: cannot read it: it is a directory; expected a regular file, since it is read again and again\n"
    )


@pytest.mark.parametrize("data", [b"\xff", b"\xef\xbb\xbf", b"\0", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000])
def test_check_of_anything_at_all_is_78(folder: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the bytes, one line says what is wrong."""
    (folder / "models.toml").write_bytes(data)
    assert run(["check"]) == 78
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_check_tells_a_wrong_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would stop the daemon is found before, by its name."""
    (folder / "models.toml").write_text(VALID)
    monkeypatch.setenv("VLLM_PROXY_PORT", "x")
    assert run(["check"]) == 78
    assert 'VLLM_PROXY_PORT: expected a whole number, got "x"' in capsys.readouterr().out


def test_check_tells_a_dotenv_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The `.env` file of the working directory is part of the configuration."""
    (folder / "models.toml").write_text(VALID)
    (folder / ".env").write_bytes(b"A=\xff")
    assert run(["check"]) == 78
    assert ".env: cannot read it" in capsys.readouterr().out


def test_check_finds_the_file_that_the_environment_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$VLLM_PROXY_CONFIG beats ./models.toml."""
    (folder / "models.toml").write_text(WRONG)
    (folder / "named.toml").write_text(VALID)
    monkeypatch.setenv("VLLM_PROXY_CONFIG", "named.toml")
    assert run(["check"]) == 0


def test_init_writes_a_file_with_comments_that_check_accepts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever starts has a valid file that explains itself."""
    assert run(["init"]) == 0
    assert capsys.readouterr().out == f"wrote {folder}/models.toml\n"
    text = (folder / "models.toml").read_text()
    assert "#" in text
    assert tomllib.loads(text)["models"]
    assert run(["check"]) == 0


def test_the_commented_part_of_the_first_file_is_valid_too(folder: Path) -> None:
    """Removing the hashes of the example at its end gives a valid file."""
    assert run(["init"]) == 0
    file = folder / "models.toml"
    head, mark, example = file.read_text().partition("# [models.")
    assert mark
    file.write_text(head + "\n".join(line.removeprefix("#").removeprefix(" ") for line in (mark + example).split("\n")))
    assert len(tomllib.loads(file.read_text())["models"]) > len(tomllib.loads(head)["models"])
    assert run(["check"]) == 0


@pytest.mark.parametrize("existing", ["mine", ""])
def test_init_never_writes_over_a_file(folder: Path, existing: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, and the file is as it was, even an empty one."""
    (folder / "models.toml").write_text(existing)
    assert run(["init"]) == 1
    assert (folder / "models.toml").read_text() == existing
    assert "it exists already" in capsys.readouterr().err


def test_init_does_not_write_through_a_link(folder: Path) -> None:
    """A link that leads nowhere yet is something that exists."""
    (folder / "models.toml").symlink_to(folder / "target")
    assert run(["init"]) == 1
    assert not (folder / "target").exists()


def test_init_where_no_file_can_be_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and the reason of the system."""
    assert run(["init", "-c", "no/such/folder/x.toml"]) == 1
    assert capsys.readouterr().err == (
        f"vllm-proxy: cannot write {folder}/no/such/folder/x.toml: No such file or directory; "
        "choose another place with --config\n"
    )


def test_init_says_in_json_where_the_file_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs; `-c` chooses the place."""
    assert run(["init", "--json", "-c", "first.toml"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(folder / "first.toml")}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["check", "--help"], ["init", "-h"], ["serve", "-h"], ["demo", "-h"]]
)
def test_help_is_printed_for_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, and the text goes to the standard output."""
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: vllm-proxy ")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with a sentence."""
    with pytest.raises(SystemExit):
        run(["--help"])
    words = capsys.readouterr().out.split()
    assert {"serve", "check", "init", "demo"} <= set(words)


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["check", "--no-such"], ["serve", "--port", "x"]])
def test_a_wrong_command_line_is_told_with_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is argparse's 2, which is none of ours."""
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vllm-proxy ")


def test_serve_without_a_file_is_78(capfd: pytest.CaptureFixture[str]) -> None:
    """The daemon does not start on a configuration that is not there."""
    assert run(["serve", "-c", "none.toml"]) == 78
    assert "cannot read it" in capfd.readouterr().err


def test_the_first_file_is_not_readable_by_all(folder: Path) -> None:
    """It may come to hold keys; umask narrows it further and widens nothing."""
    for umask, mode in (0o022, 0o640), (0o077, 0o600), (0o000, 0o640):
        before = os.umask(umask)
        try:
            assert run(["init", "-c", f"{umask}.toml"]) == 0
        finally:
            os.umask(before)
        assert stat.S_IMODE((folder / f"{umask}.toml").stat().st_mode) == mode


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*/models.toml")), ids=lambda file: file.parent.name)
def test_check_takes_the_examples_with_keys(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those in which keys are beside the file, and those in which they are in it; none needs a secret to be there."""
    assert run(["check", "-c", str(example)]) == 0, capsys.readouterr()


# What this machine cannot hold


def misfit(folder: Path) -> Path:
    """A file with a model that is too large for the one device of this machine."""
    (folder / "gpus.toml").write_text('[0]\ntotal = "80GiB"\nfree = "80GiB"\n')
    file = folder / "models.toml"
    file.write_text('[devices]\nsource = "gpus.toml"\n[models.a]\nmodel = "x"\nmemory = "90GiB"\n')
    return file


def test_check_warns_of_what_this_machine_cannot_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its line, with the sum; the file is valid, as it may be for another machine."""
    file = misfit(folder)
    assert run(["check"]) == 0
    out, err = capsys.readouterr()
    why = "needs 90.6 GiB on a GPU, and engines may have 79.5 of GPU 0 (80.0 without what is kept back)"
    assert out == f"{file}: valid, 1 model\n"
    assert err == f"vllm-proxy: warning: {file}:5: models.a.memory: on this machine: {why}\n"
    assert run(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [f"{file}:5: models.a.memory: on this machine: {why}"]


def test_check_warns_of_what_will_not_do_what_is_meant(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths that no shell completes, or not there; commands, devices, shares: at their lines, and exit status 0."""
    file = folder / "models.toml"
    (folder / "here").mkdir()
    file.write_text(
        '[devices]\nsource = "none"\n'
        '[models.a]\nmodel = "~/models/a"\nenv = { HF_HOME = "~/hf" }\n'
        '[models.b]\nmodel = "/no/such/model"\ncommand = ["no-such-vllm"]\n'
        '[models.c]\nmodel = "./here"\ntensor_parallel_size = 4\ndevices = [0, 1]\n'
        '[models.d]\nmodel = "org/d"\ndevices = [2]\ngpu_memory_utilization = 0.5\nreplicas = 2\n'
        '[models.e]\nmodel = "org/e"\ndevices = [2]\ngpu_memory_utilization = 0.1\n'
        '[models.off]\nmodel = "~/off"\nenabled = false\n'
        '[models.later]\nmodel = "org/later"\nstart = "on-demand"\ndevices = [2]\ngpu_memory_utilization = 0.9\n'
    )
    assert run(["check"]) == 0
    lines = [line.removeprefix(f"vllm-proxy: warning: {file}:") for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "4: models.a.model: on this machine: no shell replaces the ~ of ~/models/a: write the whole path",
        "5: models.a.env.HF_HOME: on this machine: no shell replaces the ~ of ~/hf: write the whole path",
        "7: models.b.model: on this machine: there is no /no/such/model",
        "8: models.b.command: on this machine: cannot run no-such-vllm: there is no such program; set engine.command",
        "12: models.c.devices: on this machine: names 2, and the model's engine wants 4",
        (
            "21: models.e.gpu_memory_utilization: on this machine: "
            "all that always run want 1.1 of device 2: together at most 1"
        ),
    ]


def test_check_warns_of_what_has_no_room_beside_what_always_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the sentence that its requests would fail with."""
    file = folder / "models.toml"
    (folder / "gpus.toml").write_text("".join(f'[{gpu}]\ntotal = "80GiB"\nfree = "80GiB"\n' for gpu in (0, 1)))
    file.write_text(
        '[devices]\nsource = "gpus.toml"\n'
        '[models.chat]\nmodel = "org/chat"\ndevices = [0]\ngpu_memory_utilization = 0.5\n'
        '[models.embed]\nmodel = "org/embed"\ndevices = [1]\ngpu_memory_utilization = 0.2\n'
        '[models.big]\nmodel = "org/big"\nstart = "on-demand"\ntensor_parallel_size = 2\ngpu_memory_utilization = 0.9\n'
    )
    assert run(["check"]) == 0
    assert capsys.readouterr().err == (
        f"vllm-proxy: warning: {file}:15: models.big.gpu_memory_utilization: on this machine: cannot serve big: "
        "it needs 72.6 GiB on each of 2 GPUs and 38.9 can be had of GPU 0: chat (always) has 40.6 of 80.0\n"
    )


def test_check_warns_of_what_has_no_effect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its line, and not as a matter of this machine; of an adapter's folder that is not there as such."""
    file = folder / "models.toml"
    file.write_text(
        '[models.chat]\nmodel = "llama3.2:latest"\nidle_timeout = "5m"\n[models.chat.adapters.sql]\npath = "./none"\n'
    )
    assert run(["check"]) == 0
    lines = [line.removeprefix(f"vllm-proxy: warning: {file}:") for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "5: models.chat.adapters.sql.path: on this machine: there is no folder ./none",
        '3: models.chat.idle_timeout: does nothing: start is "always"; write start = "on-demand"',
        (
            '2: models.chat.model: "llama3.2:latest" is no Hugging Face id and no folder; '
            'names of Ollama are not known here: write one such as "Qwen/Qwen3-8B"'
        ),
    ]


def test_check_warns_where_it_cannot_know(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source that cannot be read says nothing against the models."""
    misfit(folder)
    (folder / "gpus.toml").unlink()
    assert run(["check"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-proxy: warning: cannot look at the devices: ")


def test_a_plan_without_a_daemon_says_what_can_never_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its change; the status is that of any change."""
    misfit(folder)
    assert run(["plan", "--state-dir", str(folder / "state")]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("start a: new; it can never run on this machine: needs 90.6 GiB on a GPU, and engines")
    assert run(["plan", "--json", "--state-dir", str(folder / "state")]) == 2
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert change["misfit"].startswith("needs 90.6 GiB")
