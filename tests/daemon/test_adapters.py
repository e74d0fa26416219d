"""Adapters under one daemon after another, as clients and people see them, with fake engines."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.fakes.adapters import voice, write_adapter
from tests.harness import Daemon, daemon, fake_engines
from vllm_proxy.domain.keys import hash_of

KEY = "k" * 40


def chat(*adapters: str, **keys: object) -> str:
    """The model with these adapters, whose folders lie beside the file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    tables = [f'[models.chat.adapters.{name}]\npath = "adapters/{name}"' for name in adapters]
    return "\n".join(['[models.chat]\nmodel = "org/chat"\naliases = ["gpt"]', *lines, *tables, ""])


@asynccontextmanager
async def serving(folder: Path, port_start: int, text: str, *made: str, head: str = "") -> AsyncIterator[Daemon]:
    """A daemon, whose models are ready; folders of these adapters are made before."""
    for name in made:
        write_adapter(folder / "adapters" / name, weights=name.encode())
    async with daemon(head + fake_engines(port_start) + text, folder) as running:
        await running.all_ready()
        yield running


async def said(running: Daemon, model: str, **headers: str) -> str:
    """The beginning of what a model answers: which adapter it comes from."""
    body = {"model": model, "prompt": "hello"}
    async with running.session.post("/v1/completions", json=body, headers=headers) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        assert answer.headers["X-Vllm-Proxy-Model"] == ("chat" if model == "gpt" else model)
        assert found["model"] == answer.headers["X-Vllm-Proxy-Model"]
        text: str = found["choices"][0]["text"]
        return text


async def says(running: Daemon, name: str) -> None:
    """An adapter answers with the files in its folder."""
    assert (await said(running, name)).startswith(voice(name, running.folder / "adapters" / name))


async def refused(running: Daemon, name: str, status: int) -> dict[str, Any]:
    """Why a request gets no answer."""
    error: dict[str, Any] = (await running.post("/v1/completions", {"model": name, "prompt": "hello"}, status))["error"]
    return error


async def until_states(running: Daemon, **states: str) -> list[dict[str, Any]]:
    """Wait until the adapters of the model are in these states; all that is shown of them."""
    found = await running.eventually(
        "/models/chat", lambda model: {one["id"]: one["state"] for one in model["status"]["adapters"]} == states
    )
    shown: list[dict[str, Any]] = found["status"]["adapters"]
    return shown


async def test_an_adapter_is_a_model_of_its_own(tmp_path: Path, port_start: int) -> None:
    """In the list with its parent, in keys' globs, metrics, usage and headers; the base does not notice."""
    keys = f'[keys.some]\nhash = "{hash_of(KEY)}"\nscopes = ["inference"]\nmodels = ["s*"]\n'
    anonymous = '[keys.anonymous]\nscopes = ["inference"]\n'
    async with serving(
        tmp_path, port_start, chat("sql", "law", replicas=2) + keys + anonymous, "sql", "law"
    ) as running:
        await says(running, "sql")
        await says(running, "law")
        assert "@" not in await said(running, "gpt")
        cards = {card["id"]: card for card in (await running.get("/v1/models"))["data"]}
        assert [*cards] == ["chat", "sql", "law", "gpt"]
        assert (cards["sql"]["parent"], cards["sql"]["root"]) == ("chat", "adapters/sql")
        assert cards["sql"]["max_model_len"] == cards["chat"]["max_model_len"]
        assert (await running.get("/v1/models/law"))["parent"] == "chat"
        mine = {"Authorization": f"Bearer {KEY}"}
        async with running.session.get("/v1/models", headers=mine) as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == ["sql"]
        await said(running, "sql", **mine)
        async with running.session.post(
            "/v1/completions", json={"model": "chat", "prompt": ""}, headers=mine
        ) as answer:
            assert answer.status == 404
        shown = (await running.get("/models/chat"))["status"]["adapters"]
        assert shown == [
            {"id": name, "state": "ready", "message": None, "instances": [0, 1]} for name in ("sql", "law")
        ]
        numbers = await running.metrics()
        assert numbers['vllm_proxy_requests_total{model="sql",route="/v1/completions",status="200"}'] == 2
        assert numbers['vllm_proxy_requests_total{model="chat",route="/v1/completions",status="200"}'] == 1
        assert numbers['vllm_proxy_key_requests_total{key="some",model="sql",outcome="ok"}'] == 1
        error = await refused(running, "nobody", 404)
        assert error["code"] == "model_not_found"


async def test_adapters_are_added_changed_and_removed_live(tmp_path: Path, port_start: int) -> None:
    """By PATCH and by their files; streams of the base go on, and no engine is started."""
    async with serving(tmp_path, port_start, chat("sql"), "sql", "law") as running:
        pids = await running.pids("chat")
        slow = {"model": "chat", "prompt": "hello", "stream": True, "max_tokens": 50}
        async with running.session.post("/v1/completions", json=slow) as stream:
            await stream.content.readline()
            found = await running.write("PATCH", "/models/chat", {"adapters": {"law": {"path": "adapters/law"}}})
            assert {one["id"] for one in found["status"]["adapters"]} == {"sql", "law"}
            await says(running, "law")
            write_adapter(tmp_path / "adapters" / "sql", weights=b"others")
            wanted = voice("sql", tmp_path / "adapters" / "sql")
            async with asyncio.timeout(20):
                while not (await said(running, "sql")).startswith(wanted):
                    await asyncio.sleep(0.02)
            await running.write("PATCH", "/models/chat", {"adapters": {"law": None}})
            assert (await refused(running, "law", 404))["code"] == "model_not_found"
            await running.write("PATCH", "/models/chat", {"adapters": {"sql": {"enabled": False}}})
            assert (await refused(running, "sql", 503))["code"] == "model_disabled"
            assert (await running.get("/models/chat"))["status"]["adapters"] == []
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert await running.pids("chat") == pids


async def test_a_broken_adapter_is_its_own_error(tmp_path: Path, port_start: int) -> None:
    """One that vLLM refuses, that hangs, or whose folder is missing; the events tell, and another file mends it."""
    write_adapter(tmp_path / "adapters" / "bad", fake="fail")
    write_adapter(tmp_path / "adapters" / "slow", fake={"until": str(tmp_path / "go")})
    text = chat("sql", "bad") + '[models.chat.adapters.lost]\npath = "./adapters/lost"\n'
    async with serving(tmp_path, port_start, text, "sql") as running:
        shown = {one["id"]: one for one in await until_states(running, sql="ready", bad="error", lost="error")}
        assert shown["bad"]["message"] == "CUDA error: out of memory"
        assert "there is no such folder" in shown["lost"]["message"]
        error = await refused(running, "bad", 503)
        assert (error["code"], error["message"]) == ("model_error", "cannot serve bad: CUDA error: out of memory")
        await says(running, "sql")
        async with running.session.get("/events") as events:
            await events.content.readline()
            await running.write("PATCH", "/models/chat", {"adapters": {"slow": {"path": "adapters/slow"}}})
            request = asyncio.create_task(said(running, "slow"))
            await until_states(running, sql="ready", bad="error", lost="error", slow="loading")
            await says(running, "sql")
            assert "@" not in await said(running, "chat")
            assert not request.done()
            write_adapter(tmp_path / "adapters" / "bad", weights=b"better")
            write_adapter(tmp_path / "adapters" / "lost")
            (tmp_path / "go").touch()
            assert (await request).startswith("slow@")
            await until_states(running, sql="ready", bad="ready", lost="ready", slow="ready")
            assert await _told(events, "slow") == ["loading", "ready"]
        for name in ("bad", "lost"):
            await says(running, name)


async def _told(events: aiohttp.ClientResponse, name: str) -> list[str]:
    """The states of an adapter that events tell, until it is ready."""
    states: list[str] = []
    kind = ""
    async for raw in events.content:
        field, _, value = raw.decode().strip().partition(": ")
        kind = value if field == "event" else kind
        if field == "data" and kind == "model":
            found = {one["id"]: one["state"] for one in json.loads(value)["adapters"]}
            if name in found and found[name] not in states[-1:]:
                states.append(found[name])
                if found[name] == "ready":
                    break
    return states


async def test_the_first_adapter_and_one_that_needs_more_replace_the_engine(tmp_path: Path, port_start: int) -> None:
    """The plan says so before; their requests wait meanwhile, and one of the base is answered throughout."""
    for name, rank in (("sql", 8), ("law", 8), ("big", 64)):
        write_adapter(tmp_path / "adapters" / name, rank)
    async with serving(tmp_path, port_start, chat(replace="surge")) as running:
        seen = [*await running.pids("chat")]
        for added, replaces in (("sql", True), ("law", False), ("big", True)):
            text = running.file.read_text() + f'[models.chat.adapters.{added}]\npath = "adapters/{added}"\n'
            (change,) = (await running.write("POST", "/config/plan", text))["changes"]
            assert change["action"] == ("replace" if replaces else "update")
            await running.write("PATCH", "/models/chat", {"adapters": {added: {"path": f"adapters/{added}"}}})
            request = asyncio.create_task(says(running, added))
            while not request.done():
                await said(running, "chat")
            await request
            await running.all_ready()
            (pid,) = await running.pids("chat")
            assert (pid not in seen) == replaces
            seen.append(pid)
        await until_states(running, sql="ready", law="ready", big="ready")


async def test_an_engine_outlives_the_files_of_its_adapters(tmp_path: Path, port_start: int) -> None:
    """One that fell out of its memory is read again, from a snapshot that nobody removes."""
    names = [f"a{number}" for number in range(4)]
    text = chat(*names) + "[models.chat.adapters_max]\nloras = 1\ncpu_loras = 2\n"
    async with serving(tmp_path, port_start, text, *names) as running:
        pids = await running.pids("chat")
        voices = [voice(name, tmp_path / "adapters" / name) for name in names]
        shutil.rmtree(tmp_path / "adapters")
        await running.eventually(
            "/models/chat", lambda model: all(one["message"] for one in model["status"]["adapters"])
        )
        for name, its in zip([*names, *names], [*voices, *voices], strict=True):
            assert (await said(running, name)).startswith(its)
        assert await running.pids("chat") == pids


async def test_a_request_for_an_adapter_starts_its_base(tmp_path: Path, port_start: int) -> None:
    """One that is started by requests; it waits in the queue of its base."""
    write_adapter(tmp_path / "adapters" / "sql")
    async with daemon(fake_engines(port_start) + chat("sql", start="on-demand"), tmp_path) as running:
        assert [one["state"] for one in (await running.get("/models/chat"))["status"]["adapters"]] == ["loading"]
        await says(running, "sql")
        assert (await running.get("/models/chat"))["status"]["state"] == "ready"


async def test_engines_of_a_killed_daemon_keep_their_adapters(tmp_path: Path, port_start: int) -> None:
    """The next one asks them, and changes what has changed meanwhile; snapshots that nobody uses go."""
    async with serving(tmp_path, port_start, chat("sql", "law", "old"), "sql", "law", "old") as first:
        pids = await first.pids("chat")
        await first.stop(signal.SIGKILL)
    write_adapter(tmp_path / "adapters" / "law", weights=b"others")
    async with serving(tmp_path, port_start, chat("sql", "law", "new"), "new") as second:
        await until_states(second, sql="ready", law="ready", new="ready")
        for name in ("sql", "law", "new"):
            await says(second, name)
        assert await second.pids("chat") == pids
        assert second.log().partition("engine adopted")[2].count("adapter loaded") == 2
        assert (await refused(second, "old", 404))["code"] == "model_not_found"
        await second.write("DELETE", "/models/chat", None, 202)
        await second.eventually("/models", lambda found: not found["models"])
        snapshots = second.state_dir / "adapters"
        async with asyncio.timeout(20):
            while [*snapshots.iterdir()]:
                await asyncio.sleep(0.05)


async def test_an_adapter_that_ends_its_engine_is_given_to_the_next_one_as_well(
    tmp_path: Path, port_start: int
) -> None:
    """Who waits for it waits on, as for any engine that crashes."""
    gate = tmp_path / "adapters" / "sql"
    async with serving(tmp_path, port_start, chat("law"), "law") as running:
        (pid,) = await running.pids("chat")
        write_adapter(gate, fake="die")
        await running.write("PATCH", "/models/chat", {"adapters": {"sql": {"path": "adapters/sql"}}})
        await running.once("chat", lambda one: one["last_exit"] is not None)
        write_adapter(gate)
        await says(running, "sql")
        await says(running, "law")
        assert await running.pids("chat") != [pid]


async def test_fine_tuning_is_not_offered_and_says_what_is(tmp_path: Path, port_start: int) -> None:
    """What was trained elsewhere is served as an adapter."""
    async with serving(tmp_path, port_start, chat()) as running:
        error = (await running.post("/v1/fine_tuning/jobs", {}, 501))["error"]
        assert error["code"] == "unsupported_endpoint"
        assert "[models.ID.adapters.NAME]" in error["message"]
