"""`GET /events`: the fleet as it is and what changes of it, and what has happened, also before somebody listened."""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, port_block, until

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
MODELS = '[models.chat]\nmodel = "org/chat"\ndescription = "talks"\naliases = ["gpt"]\n# More.\n'


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon whose only model is ready."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("feed")) as found:
        await found.all_ready()
        yield found


class Stream:
    """Events as they come: (name, data, id)."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def next(self) -> tuple[str, Any, str]:
        """The next one."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(60):
            while (line := (await self._answer.content.readline()).decode().rstrip("\n")) or "event" not in fields:
                name, _, value = line.partition(": ")
                fields[name] = value
        return fields["event"], json.loads(fields["data"]), fields.get("id", "")

    async def until(self, holds: Callable[[str, Any], bool]) -> list[tuple[str, Any, str]]:
        """All up to the one that is waited for."""
        found = [await self.next()]
        while not holds(*found[-1][:2]):
            found.append(await self.next())
        return found


@contextlib.asynccontextmanager
async def following(running: Daemon, query: str = "?fleet=1", **headers: str) -> AsyncIterator[Stream]:
    """A reader."""
    async with running.admin.get(f"/events{query}", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        yield Stream(answer)


def is_config(kind: str, _: object) -> bool:
    """What is told at the beginning ends with it."""
    return kind == "config"


async def test_it_begins_with_all_models_and_the_file(running: Daemon) -> None:
    """What a table of models shows, in the file's order; nothing is replayed where nobody asked."""
    async with following(running) as stream:
        (fleet, told, _), (config, state, _) = await stream.until(is_config)
    assert (fleet, config) == ("fleet", "config")
    assert (told["order"], told["gone"]) == (["chat"], [])
    (chat,) = told["models"]
    pid, port = (await running.pids("chat"))[0], (await running.ports("chat"))[0]
    (one,) = chat.pop("replicas")
    assert {key: one[key] for key in ("index", "state", "pid", "port", "progress")} == {
        "index": 0, "state": "ready", "pid": pid, "port": port, "progress": 1.0,
    }  # fmt: skip
    assert one["since"].endswith("Z")
    assert chat | {"rps": 0, "tps": 0} == {
        "id": "chat", "state": "ready", "reason": None, "message": None, "change": None, "description": "talks",
        "aliases": ["gpt"], "source": "org/chat", "start": "always", "enabled": True,
        "in_flight": 0, "queued": 0, "rps": 0, "tps": 0,
    }  # fmt: skip
    assert state == {"revision": await running.revision(), "problems": [], "pending_restart": []}


async def test_a_request_in_flight_changes_its_model_for_all_readers(running: Daemon, tmp_path: Path) -> None:
    """Nobody is notified of one: it is looked at. Two readers are told the same, once."""
    go = tmp_path / "go"
    async with following(running) as stream, following(running) as second:
        await stream.until(is_config)
        await second.until(is_config)
        body = {"model": "chat", "messages": HI, "stream": True, "fake": {"hold": str(go), "hold_at": 1, "chunks": 2}}
        async with running.session.post(CHAT, json=body) as answer:
            await answer.content.readline()

            def busy(kind: str, data: Any) -> bool:  # noqa: ANN401 - JSON
                return kind == "fleet" and data["models"][0]["in_flight"] == 1

            *_, (_, told, _) = await stream.until(busy)
            assert told["models"][0]["replicas"][0]["in_flight"] == 1
            assert (told["order"], told["gone"]) == (None, [])
            *_, (_, same, _) = await second.until(busy)
            assert same == told
            go.touch()
            await answer.read()
        await stream.until(lambda kind, data: kind == "fleet" and data["models"][0]["in_flight"] == 0)


async def test_models_come_and_go_and_the_file_is_told(running: Daemon) -> None:
    """A model that is new, one that is gone, a file that is refused and mended: each is an event."""
    async with following(running) as stream:
        await stream.until(is_config)
        running.edit("# More.", '[models.more]\nmodel = "x"\nstart = "on-demand"\n# More.')
        came = await stream.until(lambda kind, data: kind == "fleet" and data["order"] == ["chat", "more"])
        assert came[-1][1]["models"][-1]["id"] == "more"
        running.edit("# More.", "replicas = 0\n# More.")
        refused = await stream.until(lambda kind, data: kind == "config" and data["problems"])
        assert refused[-1][1]["problems"][0]["path"] == "models.more.replicas"
        running.edit("replicas = 0\n", "")
        await stream.until(lambda kind, data: kind == "config" and not data["problems"])
        running.edit('[models.more]\nmodel = "x"\nstart = "on-demand"\n', "")
        went = await stream.until(lambda kind, data: kind == "fleet" and data["gone"] == ["more"])
        assert went[-1][1]["order"] == ["chat"]


async def test_what_happened_before_somebody_listened_is_replayed(running: Daemon) -> None:
    """With `since=0` all of it: the model was loading, then ready. With the last id, what came after that."""
    async with following(running, "?fleet=1&since=0") as stream:
        first, *replayed, _ = await stream.until(is_config)
    assert first[0] == "fleet"
    assert {kind for kind, _, _ in replayed} == {"happened"}
    assert all(number == data["id"] for _, data, number in replayed)
    states = [data["state"] for _, data, _ in replayed if data["kind"] == "instance" and data["instance"] == "chat/0"]
    assert states[:2] == ["loading", "ready"]
    last = replayed[-1][2]
    await running.write("POST", "/models/chat/start", status=202)
    async with following(running, **{"Last-Event-ID": last}) as stream:
        _, *missed, _ = await stream.until(is_config)
    assert [(data["kind"], data["what"]) for _, data, _ in missed] == [("write", "POST /models/chat/start")]
    async with following(running, f"?fleet=1&since={missed[-1][2]}") as stream:
        assert [kind for kind, _, _ in await stream.until(is_config)] == ["fleet", "config"]


async def test_what_happens_comes_at_once_with_an_id(running: Daemon) -> None:
    """As an event of its own."""
    async with following(running) as stream:
        await stream.until(is_config)
        await running.write("POST", "/models/chat/start", status=202)
        *_, (_, data, number) = await stream.until(lambda kind, _: kind == "happened")
    assert (data["kind"], data["id"]) == ("write", number)


@pytest.mark.parametrize("query", ["?fleet=1", "?"])
async def test_an_id_of_another_run_resets(running: Daemon, query: str) -> None:
    """The reader is told to forget what it has, and gets all that is kept."""
    async with following(running, query, **{"Last-Event-ID": "00000000-3"}) as stream:
        found = await stream.until(lambda kind, _: kind != "fleet")
        assert found[-1][0] == "reset"
        kind, _, number = await stream.next()
        assert kind == ("happened" if "fleet" in query else "model")
        assert number.startswith(found[-1][1]["boot"])


async def test_the_plain_stream_has_ids_and_replays(running: Daemon) -> None:
    """The events of the contract, of the time before somebody listened."""
    async with following(running, "?since=0") as stream:
        found = await stream.until(lambda kind, data: kind == "model" and data["state"] == "ready")
    assert all(number for _, _, number in found)
    kinds = [kind for kind, _, _ in found]
    assert "model" in kinds
    assert set(kinds) <= {"model", "config", "plan", "write"}


async def test_a_reader_that_left_leaves_nothing_behind(running: Daemon) -> None:
    """The next one begins as the first did."""
    tasks = (await running.metrics())["vllm_proxy_tasks"]
    for _ in range(5):
        async with following(running) as stream:
            await stream.until(is_config)
    await until(running.metrics, lambda found: found["vllm_proxy_tasks"] <= tasks)


@pytest.mark.parametrize("more", [{}, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}])
async def test_the_tokens_of_who_is_not_metered_are_those_of_its_answer(running: Daemon, more: dict[str, Any]) -> None:
    """Of a stream too, where its client asked for them; where the answer tells none, none are told."""
    name = uuid.uuid4().hex
    body = {"model": "chat", "messages": HI, "max_tokens": 3, **more}
    async with running.session.post(CHAT, json=body, headers={"X-Request-Id": name}) as answer:
        usage = re.findall(r'"usage":\s*(\{[^{}]*(?:\{[^{}]*\})?[^{}]*\})', await answer.text())

    async def ended() -> Any:  # noqa: ANN401 - JSON
        return await running.get(f"/requests/{name}")

    found = await until(ended, lambda found: found["state"] == "ended")
    told = json.loads(usage[-1]) if usage else {}
    assert bool(told) == (more != {"stream": True})
    for kind in ("prompt_tokens", "completion_tokens"):
        assert found[kind] == told.get(kind)


async def test_rates_of_the_past_are_told_for_models_that_had_requests(running: Daemon) -> None:
    """A point each ten seconds; the minutes are bounded."""
    await running.post(CHAT, {"model": "chat", "messages": HI})

    async def stats() -> Any:  # noqa: ANN401 - JSON
        return await running.get("/stats?minutes=60")

    found = await until(stats, lambda found: bool(found["models"]))
    assert found["step"] == 10
    (chat,) = found["models"]
    assert chat["id"] == "chat"
    assert len(chat["rps"]) == len(chat["tps"]) <= 360
    assert max(chat["rps"]) > 0
    assert (await running.get("/stats?minutes=1&model=chat"))["models"] in ([], [chat | {
        "rps": chat["rps"][-6:], "tps": chat["tps"][-6:],
    }])  # fmt: skip
    for wrong in ("0", "61", "x", "-1"):
        assert (await running.get(f"/stats?minutes={wrong}", 400))["error"]["code"] == "bad_request"
    assert (await running.get("/stats?model=nobody", 404))["error"]["code"] == "model_not_found"
