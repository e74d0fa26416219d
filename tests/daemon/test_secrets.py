"""Planted secrets: whatever the daemon answers, logs, prints or keeps, none of them is in it.

`PLANTED` is the list; each is a text of its own. They stand in the file, in files and credentials that it names, in the
daemon's environment, in requests. Only the file itself, its exact text (`GET /config`) and the files of engines' output
(mode 0600) may hold them.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests.harness import Daemon, daemon, fake_engines, until, vllm_proxy
from vllm_proxy import cli

# Kinds of secrets. Whoever adds a way to hand one over adds it here, and uses it below.
PLANTED = {
    kind: f"planted-{number:02}-{kind}"
    for number, kind in enumerate(
        (
            "env-of-engine",
            "env-of-defaults",
            "env-of-model",
            "env-that-a-log-shows",
            "env-that-a-crash-shows",
            'env-with-"quotes"-in-it',
            "by-file",
            "by-credential",
            "by-credential-in-a-path",
            "args-below-a-name",
            "args-that-vllm-refuses",
            "args-in-a-url",
            "metadata",
            "metadata-of-defaults",
            "metadata-in-a-list",
            "metadata-env",
            "word-of-a-command",
            "daemon-environment",
            "dotenv",
            "key-of-env",
            "admin-key-of-env",
            "bearer-in-a-header",
            "x-api-key-in-a-header",
            "hash-of-a-key",
            "wrong-type",
            "wrong-syntax",
            "url-of-a-model",
            "hf-token-in-args",
            "value-written-by-rest",
            "value-before-a-change",
        )
    )
}
PLANTED["hash-in-the-file"] = hashlib.sha256(b"a key").hexdigest()
MASK = "***"
READERS = '[keys.anonymous]\nscopes = ["inference", "read"]\n'


def of(kind: str) -> str:
    """One of them."""
    return PLANTED[kind]


def found_in(text: str) -> list[str]:
    """The kinds of those that a text holds, written in whatever way."""
    written = {kind: (value, json.dumps(value)[1:-1]) for kind, value in PLANTED.items()}
    return [kind for kind, forms in written.items() if any(form in text for form in forms)]


def configuration(port_start: int) -> str:
    """A file with secrets wherever the file may hold one."""
    return f"""{fake_engines(port_start)}{READERS}
[keys.ci]
hash = "sha256:{of("hash-in-the-file")}"
[engine.env]
A = "{of("env-of-engine")}"

[defaults.env]
B = "{of("env-of-defaults")}"

[defaults.metadata]
api_key = "{of("metadata-of-defaults")}"

[models.chat]
model = "org/chat"

[models.chat.env]
C = "{of("env-of-model")}"
SHOWN = "{of("env-that-a-log-shows")}"
QUOTED = '{of('env-with-"quotes"-in-it')}'
OLD = "{of("value-before-a-change")}"
FROM_FILE = {{ file = "secret.txt" }}
FROM_CREDENTIAL = {{ credential = "token" }}
FROM_PATH = {{ file = "credential:other" }}

[models.chat.args]
hf_overrides = {{ api_key = "{of("args-below-a-name")}", url = "https://user:{of("args-in-a-url")}@host/" }}
fake_tell = ["A", "B", "C", "SHOWN", "QUOTED", "FROM_FILE", "FROM_CREDENTIAL", "FROM_PATH", "HF_TOKEN", "DOT_TOKEN"]

[models.chat.metadata]
password = "{of("metadata")}"
services = [{{ url = "x", token = "{of("metadata-in-a-list")}" }}]
service = {{ env = {{ X = "{of("metadata-env")}" }} }}

[models.crash]
model = "org/crash"
restart = {{ max_failures = 1 }}
env.SHOWN = "{of("env-that-a-crash-shows")}"
env.FROM_FILE = {{ file = "secret.txt" }}
args = {{ fake_tell = ["FROM_FILE", "SHOWN"], fake_exit_at = "load" }}

[models.refused]
model = "org/refused"
restart = {{ max_failures = 1 }}
args = {{ auth_token = "{of("args-that-vllm-refuses")}" }}

[models.worded]
model = "org/worded"
enabled = false
command = ["env", "HF_TOKEN={of("word-of-a-command")}", "vllm", "serve"]
"""


class Outputs:
    """All that is seen of a daemon, by where it was."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def see(self, where: str, text: str) -> str:
        """One more."""
        self.texts[f"{len(self.texts)} {where}"] = text
        return text

    def leaks(self) -> dict[str, list[str]]:
        """The kinds of secrets that were seen, by where."""
        return {where: kinds for where, text in self.texts.items() if (kinds := found_in(text))}


@contextlib.asynccontextmanager
async def planted(tmp_path: Path, port_start: int, *flags: str) -> AsyncIterator[Daemon]:
    """A daemon that logs all it can, with all that is planted before it starts."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "token").write_text(of("by-credential") + "\n")
    (tmp_path / "credentials" / "other").write_text(of("by-credential-in-a-path"))
    (tmp_path / "secret.txt").write_text(of("by-file") + "\n")
    (tmp_path / ".env").write_text(f"DOT_TOKEN={of('dotenv')}\n")
    env = {
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        "HF_TOKEN": of("daemon-environment"),
        "VLLM_PROXY_API_KEY": of("key-of-env") + "-" * 32,
        "VLLM_PROXY_ADMIN_KEY": of("admin-key-of-env") + "-" * 32,
    }
    async with daemon(configuration(port_start), tmp_path, "--log-level", "debug", *flags, env=env) as running:
        yield running


async def ask(
    client: aiohttp.ClientSession, outputs: Outputs, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, Any]:
    """Status and answer; the answer and its head are outputs."""
    data: dict[str, Any] = {"data": body} if isinstance(body, str) else {} if body is None else {"json": body}
    if isinstance(body, str):
        headers["Content-Type"] = "application/toml"
    async with client.request(method, URL(path, encoded=True), headers=headers, **data) as answer:
        text = await answer.text()
        if (method, path) != ("GET", "/config"):
            outputs.see(f"{method} {path}", f"{answer.headers}\n{text}")
        return answer.status, json.loads(text) if answer.content_type == "application/json" else text


@contextlib.asynccontextmanager
async def streamed(client: aiohttp.ClientSession, outputs: Outputs, path: str) -> AsyncIterator[list[bytes]]:
    """What a stream says while the block lasts."""
    parts: list[bytes] = []

    async def read() -> None:
        async with client.get(path) as answer:
            while part := await answer.content.readany():
                parts.append(part)

    reading = asyncio.create_task(read())
    await until(_returning(parts), lambda parts: len(parts) > 0)
    try:
        yield parts
    finally:
        reading.cancel()
        await asyncio.wait({reading})
        outputs.see(f"stream {path}", b"".join(parts).decode())


def _returning[T](value: T) -> Any:  # noqa: ANN401 - a coroutine function
    async def ask() -> T:
        return value

    return ask


READ = (
    "/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/models", "/models/chat", "/models/crash",
    "/models/refused", "/models/worded", "/models/chat/logs?lines=1000", "/models/crash/logs?lines=1000",
    "/models/refused/logs", "/keys", "/keys/ci",
)  # fmt: skip
WRONG = (
    f'[models.chat]\nmodel = "x"\nenv.A = ["{of("wrong-type")}"]\n',
    f'[models.chat]\nmodel = "x"\nenv = "A={of("wrong-type")}"\n',
    f'[[engine]]\nenv.A = "{of("wrong-type")}"\n',
    f'[models.chat]\nmodel = "x"\nenv.A = {of("wrong-syntax")}\n',
    f"[models.chat.env]\nA: {of('wrong-syntax')}\n",
    f'[models.chat]\nmodel = "https://user:{of("url-of-a-model")}@host/m"\n',
    f'[models.chat]\nmodel = "x"\nargs.hf_token = "{of("hf-token-in-args")}"\n',
    f'[keys.ci]\nhash = "{of("hash-of-a-key")}"\n',
)


async def test_no_output_holds_a_planted_secret(tmp_path: Path, port_start: int) -> None:
    """Answers, events, logs that are followed, the daemon's own log, what commands print, what is kept on disk."""
    outputs = Outputs()
    async with planted(tmp_path, port_start) as running:
        client = running.admin
        await running.once("chat", lambda one: one["state"] == "ready")
        for model in ("crash", "refused"):
            await running.once(model, lambda one: one["state"] == "error")
        following = streamed(client, outputs, "/models/chat/logs?follow=1&lines=1000")
        async with streamed(client, outputs, "/events"), following as log:
            await _reads_and_inference(running, client, outputs)
            await _writes(running, client, outputs)
            await _commands(tmp_path, outputs)
            assert MASK.encode() in b"".join(log)
        assert (await ask(client, outputs, "GET", "/config"))[1] == running.file.read_text()
        _see_processes(running, outputs)
        await running.stop(signal.SIGTERM)
    outputs.see("the daemon's log", running.log())
    for file in running.state_dir.rglob("*"):
        if file.is_file() and file.parent.name != "logs":
            outputs.see(str(file), file.read_text(errors="replace"))
    assert outputs.leaks() == {}
    assert f"SHOWN is {MASK}" in running.log()
    assert f"FROM_CREDENTIAL is {MASK}" in running.log()
    assert running.log().count(f"FROM_PATH is {MASK}") > 0


async def _reads_and_inference(running: Daemon, client: aiohttp.ClientSession, outputs: Outputs) -> None:
    for path in READ:
        await ask(client, outputs, "GET", path)
    keys = {"Authorization": f"Bearer {of('bearer-in-a-header')}", "x-api-key": of("x-api-key-in-a-header")}
    for path in ("/v1/chat/completions", "/v1/completions", "/models"):
        await ask(running.session, outputs, "POST", path, {"model": "chat", "messages": []}, **keys)
    for key in (of("key-of-env"), of("admin-key-of-env")):
        known = {"Authorization": f"Bearer {key}{'-' * 32}"}
        for model in ("chat", "crash"):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            await ask(running.session, outputs, "POST", "/v1/chat/completions", body, **known)
        await ask(running.session, outputs, "POST", "/models/worded/start", **known)
    protocol = {"Sec-WebSocket-Protocol": f"openai-insecure-api-key.{of('bearer-in-a-header')}"}
    await ask(running.session, outputs, "GET", "/v1/realtime?model=chat", **protocol)


async def _writes(running: Daemon, client: aiohttp.ClientSession, outputs: Outputs) -> None:
    before = running.file.read_text()
    _, chat = await ask(client, outputs, "GET", "/models/chat")
    assert chat["spec"]["env"] == {
        **dict.fromkeys(("C", "SHOWN", "QUOTED", "OLD"), MASK),
        "FROM_FILE": {"file": "secret.txt"},
        "FROM_CREDENTIAL": {"credential": "token"},
        "FROM_PATH": {"file": "credential:other"},
    }
    assert chat["effective"]["env"]["A"] == MASK
    assert (await ask(client, outputs, "PUT", "/models/chat", chat["spec"]))[0] == 200
    assert running.file.read_text() == before
    status, refused = await ask(client, outputs, "PATCH", "/models/chat", {"env": {"NEW": MASK}})
    assert (status, refused["error"]["code"], refused["error"]["problems"][0]["path"]) == (
        422, "invalid_model", "models.chat.env.NEW",
    )  # fmt: skip
    status, refused = await ask(client, outputs, "POST", "/models", {"id": "new", "model": "x", "env": {"A": MASK}})
    assert (status, refused["error"]["problems"][0]["path"]) == (422, "models.new.env.A")
    new = {"id": "new", "model": "x", "enabled": False, "env": {"A": of("value-written-by-rest")}}
    assert (await ask(client, outputs, "POST", "/models", new))[0] == 201
    assert (await ask(client, outputs, "PATCH", "/models/new", {"env": {"A": MASK, "B": "b"}}))[0] == 200
    assert of("value-written-by-rest") in running.file.read_text()
    for wrong in ({"env": {"A": [of("wrong-type")]}}, {"args": {"hf_token": of("hf-token-in-args")}}):
        assert (await ask(client, outputs, "PATCH", "/models/new", wrong))[0] == 422
    key = {"name": "pasted", "hash": of("hash-of-a-key")}
    assert (await ask(client, outputs, "POST", "/keys", key))[0] == 422
    assert (await ask(client, outputs, "PATCH", "/keys/ci", {"hash": [of("hash-of-a-key")]}))[0] == 422
    assert (await ask(client, outputs, "PATCH", "/keys/ci", {"description": "changed"}))[0] == 200
    for text in WRONG:
        assert (await ask(client, outputs, "PUT", "/config", text))[0] == 422
        assert (await ask(client, outputs, "POST", "/config/plan", text))[0] == 422
    text = running.file.read_text()
    changed = text.replace(of("value-before-a-change"), of("value-written-by-rest"))
    status, plan = await ask(client, outputs, "POST", "/config/plan", changed)
    assert (status, [change["reason"] for change in plan["changes"]]) == (200, ["env.OLD changed"])
    for wrong_text in WRONG[:4]:
        running.file.write_text(wrong_text)
        assert (await ask(client, outputs, "POST", "/config/reload"))[0] == 422
        await ask(client, outputs, "GET", "/health")
    running.file.write_text(text)
    assert (await ask(client, outputs, "POST", "/config/reload"))[0] == 200


async def _commands(folder: Path, outputs: Outputs) -> None:
    for number, text in enumerate(WRONG):
        wrong = folder / f"wrong-{number}.toml"
        wrong.write_text(text)
        for command in (("plan",), ("plan", "--json")):
            status, *said = await vllm_proxy(folder, *command, "--config", str(wrong))
            assert status == 78
            outputs.see(" ".join(command), "".join(said))
        for flags in ((), ("--json",)):
            said_by_check = io.StringIO()
            with contextlib.redirect_stdout(said_by_check):
                assert cli.run(["check", "--config", str(wrong), *flags]) == 78
            outputs.see(f"check {flags}", said_by_check.getvalue())
    file = str(folder / "models.toml")
    for arguments in ("plan", "--config", file), ("logs", "crash"), ("start", "crash"), ("start", "crash", "--json"):
        outputs.see(" ".join(arguments), "".join((await vllm_proxy(folder, *arguments))[1:]))


def _see_processes(running: Daemon, outputs: Outputs) -> None:
    """What `ps` shows of the daemon and its engines: all but what stands in `args`, where the user has put it."""
    on_purpose = [value for kind, value in PLANTED.items() if kind.startswith("args-")]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (line := _command_line(folder)) and str(running.folder) in line + _folder(folder):
            for value in on_purpose:
                line = line.replace(value, "")
            outputs.see(f"ps {folder.name}", line)


def _command_line(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _folder(process: Path) -> str:
    with contextlib.suppress(OSError):
        return str((process / "cwd").readlink())
    return ""


@pytest.mark.parametrize("form", ["json", "journal"])
async def test_no_form_of_the_log_shows_a_secret(tmp_path: Path, port_start: int, form: str) -> None:
    """With escapes, too: a value with quotes is written in another way in each."""
    async with planted(tmp_path, port_start, "--log-format", form) as running:
        await running.once("chat", lambda one: one["state"] == "ready")
        await running.once("crash", lambda one: one["state"] == "error")
        await running.once("refused", lambda one: one["state"] == "error")
        crash, refused = await running.instance("crash"), await running.instance("refused")
        await running.stop(signal.SIGTERM)
    assert f"SHOWN is {MASK}" in crash["last_exit"]["message"]
    assert crash["last_exit"]["log_tail"].count(f'ValueError: FROM_FILE is {MASK}, in JSON "{MASK}"') == 1
    assert refused["message"].startswith(f"vLLM refuses its options: unrecognized arguments: --auth-token={MASK}")
    assert found_in(running.log()) == []
    assert f"QUOTED is {MASK}" in running.log()


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries if entry)}


async def test_an_engine_gets_what_its_variables_refer_to_as_it_is_at_its_start(
    tmp_path: Path, port_start: int
) -> None:
    """The whole file but for the end of its last line; a new value with the next start, with no change of the file."""
    model = '[models.chat]\nmodel = "x"\nenv = { A = { file = "secret.txt" }, B = { credential = "b" }, C = "c" }\n'
    (tmp_path / "secret.txt").write_text("first line\nsecond line\n\n")
    (tmp_path / "b").write_text("of-credential")
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path), "VLLM_PROXY_API_KEY": "k" * 32}
    async with daemon(fake_engines(port_start) + READERS + model, tmp_path, env=env) as running:
        client = running.admin
        await running.all_ready()
        (pid,) = await running.pids("chat")
        seen = environment_of(pid)
        assert (seen["A"], seen["B"], seen["C"]) == ("first line\nsecond line\n", "of-credential", "c")
        assert not {"CREDENTIALS_DIRECTORY", "VLLM_PROXY_API_KEY"} & seen.keys()
        record = (running.state_dir / "engines.toml").read_text()
        assert "of-credential" not in record
        (tmp_path / "b").write_text("changed\n")
        await client.post("/config/reload")
        assert await running.pids("chat") == [pid]
        await client.post("/models/chat/restart")
        one = await running.once("chat", lambda one: one["state"] == "ready" and one["pid"] != pid)
        assert environment_of(one["pid"])["B"] == "changed"
        before, after = (_fingerprint(text) for text in (record, (running.state_dir / "engines.toml").read_text()))
        assert before == after


def _fingerprint(record: str) -> list[str]:
    return [line for line in record.splitlines() if line.startswith("spec = ")]


async def test_a_secret_that_cannot_be_read_is_a_reason_and_no_value(tmp_path: Path, port_start: int) -> None:
    """The message names the variable and the place; another model goes on; it is tried again as any failure is."""
    names = {
        "missing": "{ file = 'nothing' }",
        "empty": "{ file = 'empty' }",
        "bytes": "{ file = 'bytes' }",
        "folder": "{ file = '.' }",
        "none": "{ credential = 'x' }",
    }
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    models = "".join(
        f'[models.{name}]\nmodel = "x"\nenv.T = {value}\nrestart = {{ max_failures = 1 }}\n'
        for name, value in names.items()
    )
    models += (
        '[models.later]\nmodel = "x"\nenv.T = { file = "later" }\nrestart.backoff = 0.01\nrestart.max_backoff = 0.01\n'
    )
    models += 'restart.max_failures = 100000\n[models.chat]\nmodel = "x"\n'
    async with daemon(fake_engines(port_start) + models, tmp_path) as running:
        await running.once("chat", lambda one: one["state"] == "ready")
        (tmp_path / "later").write_text("there it is")
        await running.once("later", lambda one: one["state"] == "ready")
        found = {name: await running.once(name, lambda one: one["state"] == "error") for name in names}
    assert {one["reason"] for one in found.values()} == {"secret_unavailable"}
    place = f"cannot read env.T from {tmp_path}"
    assert {name: one["message"].replace(place, "…") for name, one in found.items()} == {
        "missing": "…/nothing: No such file or directory",
        "empty": "…/empty: it is empty",
        "bytes": "…/bytes: expected UTF-8, got other bytes",
        "folder": "…: it is a directory; expected a regular file, since it is read again and again",
        "none": "cannot read env.T from credential:x: the service has no credentials: credential:x needs "
        "LoadCredential= in its unit",
    }


async def test_what_refers_to_nothing_replaces_no_engine(tmp_path: Path, port_start: int) -> None:
    """It is looked for before the old engine is stopped."""
    async with daemon(fake_engines(port_start) + '[models.chat]\nmodel = "x"\n', tmp_path) as running:
        await running.all_ready()
        before = await running.pids("chat")
        running.edit('model = "x"\n', 'model = "x"\nenv.T = { file = "nothing" }\n')
        model = await running.eventually("/models/chat", lambda model: model["status"]["reason"] is not None)
        assert model["status"]["reason"] == "replacement_failed"
        assert "env.T" in model["status"]["message"]
        assert await running.pids("chat") == before


async def test_secrets_of_an_engine_that_is_adopted_are_hidden_too(tmp_path: Path, port_start: int) -> None:
    """Also where its file holds another value meanwhile: what the engine has is what its log may show."""
    model = (
        '[server]\non_exit = "keep"\n[models.chat]\nmodel = "x"\nenv.T = { file = "secret" }\nargs.fake_tell = ["T"]\n'
    )
    (tmp_path / "secret").write_text("value-of-the-start")
    config = f"{model}{fake_engines(port_start)}"
    async with daemon(config, tmp_path) as running:
        await running.all_ready()
    (tmp_path / "secret").write_text("value-of-later")
    async with daemon(config.replace("keep", "stop"), tmp_path) as running:
        client = running.admin
        await running.all_ready()
        await running.logged("engine adopted")
        async with client.get("/models/chat/logs") as answer:
            text = await answer.text()
    assert "value-of-the-start" not in text
    assert f"T is {MASK}" in text


def test_each_planted_secret_is_a_text_of_its_own() -> None:
    """Else one that is hidden would hide another one, and twenty kinds at least are tried."""
    values = list(PLANTED.values())
    assert len(values) >= 20
    assert not list(_within(values))


def _within(values: list[str]) -> Iterator[tuple[str, str]]:
    return ((one, other) for one in values for other in values if one is not other and one in other)
