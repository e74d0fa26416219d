"""More models than memory: who comes, who gives way, and what is seen of it, with engines that share real sums."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.api.test_openapi import fits
from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, fake_engines, port_block, vllm_proxy

SAY = {"messages": [{"role": "user", "content": "hi"}]}


def models(**tables: str) -> str:
    """Models that have 6 GiB of a GPU each, with more keys."""
    return "".join(f'[models.{name}]\nmodel = "{name}"\nmemory = "6GiB"\n{keys}\n' for name, keys in tables.items())


RULES = 'min_residency = 0\nmax_wait = "1s"\n'


def fleet_config(devices: Devices, config: str, rules: str = RULES) -> str:
    """The file of a daemon whose engines share these devices."""
    ledger = f'[defaults]\nargs = {{ fake_ledger = "{devices.file}" }}\n'
    return f"{fake_engines(port_block())}{devices.config}{rules}{ledger}{config}"


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, config: str, rules: str = RULES, gpus: int = 1, size: int = 10 * GIB
) -> AsyncIterator[tuple[Daemon, Devices]]:
    """A daemon whose engines share GPUs."""
    with Devices(folder / "gpus.toml", {str(number): size for number in range(gpus)}) as devices:
        async with daemon(fleet_config(devices, config, rules), folder) as running:
            yield running, devices
        assert not devices.events(), "nobody was refused, disturbed, or got less than asked for"


async def says(daemon: Daemon, model: str, status: int = 200, **more: object) -> Any:  # noqa: ANN401 - JSON
    """A chat completion."""
    return await daemon.post("/v1/chat/completions", {"model": model, **SAY, **more}, status)


async def test_two_models_that_do_not_fit_together_take_turns_and_no_request_fails(tmp_path: Path) -> None:
    """Each request brings its model, however often the other one was asked for."""
    on_demand = 'start = "on-demand"'
    async with fleet(tmp_path, models(chat=on_demand, code=on_demand)) as (running, devices):
        for _ in range(3):
            for name in ("chat", "code"):
                await says(running, name)
        together = await asyncio.gather(*(says(running, name) for name in ("chat", "code") * 5))
        assert len(together) == 10
        assert devices.most()["0"] <= 10 * GIB
        (shown,) = [
            model for model in (await running.get("/models"))["models"] if model["status"]["state"] == "stopped"
        ]
        assert shown["status"]["reason"] == "gave_way"
        assert shown["status"]["message"].startswith("gave way to ")


ON_DEMAND = 'start = "on-demand"'


async def once(running: Daemon, model: str, **wanted: object) -> Any:  # noqa: ANN401 - JSON
    """The status of a model, once it says this."""

    def holds(found: Any) -> bool:  # noqa: ANN401 - JSON
        status = {**found["status"], "phase": found["status"]["instances"][0]["phase"]}
        return all(status[key] == value for key, value in wanted.items())

    return (await running.eventually(f"/models/{model}", holds))["status"]


async def test_a_request_in_flight_ends_before_its_model_gives_way(tmp_path: Path) -> None:
    """The one that waits says for whom, and how many requests are left; nothing of a running answer is lost."""
    async with fleet(tmp_path, models(chat=ON_DEMAND, code=ON_DEMAND)) as (running, _):
        await says(running, "chat")
        gate = tmp_path / "gate"
        slow = asyncio.create_task(says(running, "chat", fake={"hold": str(gate)}))
        await running.eventually("/models/chat", lambda found: found["status"]["in_flight"] == 1)
        waits = asyncio.create_task(says(running, "code"))
        await once(running, "chat", state="unloading", phase="draining")
        status = await once(running, "code", phase="queued")
        assert status["instances"][0]["message"] == "waits for 6.6 GiB on GPU 0: chat gives way, 1 request in flight"
        gate.touch()
        assert (await slow)["choices"]
        assert (await waits)["choices"]


async def test_what_can_never_have_room_fails_its_requests_at_once(tmp_path: Path) -> None:
    """With what it needs, what can be had, and who has the rest; no time is said after which to try again."""
    config = models(chat="", code=ON_DEMAND)
    async with fleet(tmp_path, config) as (running, _):
        await running.once("chat", lambda one: one["state"] == "ready")
        error = (await says(running, "code", 503))["error"]
        assert (error["code"], error["message"]) == (
            "no_room",
            "cannot serve code: it needs 6.6 GiB on a GPU and 2.9 can be had: chat (always) has 6.6 of 10.0",
        )
        status = await once(running, "code", reason="does_not_fit")
        assert status["state"] == "loading"
        await running.write("PATCH", "/models/chat", {"start": "on-demand"})
        await says(running, "code")


async def test_a_warm_model_runs_while_nobody_waits_for_its_room_and_comes_back(tmp_path: Path) -> None:
    """It makes nobody go, and goes itself for who presses."""
    config = models(chat='start = "warm"', code=f"{ON_DEMAND}\nidle_timeout = 1")
    async with fleet(tmp_path, config) as (running, _):
        await once(running, "chat", state="ready")
        await says(running, "code")
        status = await once(running, "chat", phase="queued")
        message = "waits for 6.6 GiB on GPU 0, until there is room that nobody waits for"
        assert status["instances"][0]["message"] == message
        await once(running, "code", state="stopped")
        await once(running, "chat", state="ready")


async def test_other_programs_are_named_where_they_have_what_a_model_needs(tmp_path: Path) -> None:
    """It rests in error after a while, and starts again when somebody says so."""
    async with fleet(tmp_path, models(chat=ON_DEMAND)) as (running, devices):
        with devices.taken("0", 6 * GIB):
            error = (await says(running, "chat", 503))["error"]
            assert error["code"] == "model_error"
            assert "it needs 6.6 GiB on GPU 0, and 4.0 of 10.0 are free" in error["message"]
            await once(running, "chat", state="error", reason="does_not_fit")
        await running.post("/models/chat/start", {}, 202)
        await once(running, "chat", state="ready")


async def test_an_engine_that_is_adopted_has_its_room_before_anybody_asks(tmp_path: Path) -> None:
    """So nothing starts beside it that would not fit; it gives way as if it had been started by this daemon."""
    keep = '[server]\non_exit = "keep"\n'
    with Devices(tmp_path / "gpus.toml", {"0": 10 * GIB}) as devices:
        config = fleet_config(devices, models(chat=ON_DEMAND, code=ON_DEMAND))
        async with daemon(keep + config, tmp_path) as running:
            await says(running, "chat")
        async with daemon(config, tmp_path) as running:
            assert (await once(running, "chat", state="ready"))["instances"][0]["restarts"] == 0
            await says(running, "code")
            assert (await once(running, "chat", state="stopped"))["reason"] == "gave_way"
        assert not devices.events()


async def test_engines_on_two_gpus_go_where_fewest_are(tmp_path: Path) -> None:
    """And each is told its GPU and its share of it."""
    config = models(one="", two="") + '[models.none]\nmodel = "x"\nmemory = "0B"\n'
    async with fleet(tmp_path, config, gpus=2) as (running, devices):
        await running.all_ready()
        assert sorted(devices.free().values()) == [10 * GIB - int(6.6 * GIB)] * 2


# What is seen


def device(found: Any) -> Any:  # noqa: ANN401 - JSON
    """The only one of `GET /devices`."""
    (only,) = found["devices"]
    return only


async def test_a_device_says_who_has_it_and_who_is_next_and_its_changes_are_events(tmp_path: Path) -> None:
    """While one gives way, and behind that; the answer is as the API describes it."""
    async with fleet(tmp_path, models(chat=ON_DEMAND, code=ON_DEMAND)) as (running, _):
        await says(running, "chat")
        need = (await running.get("/models/chat"))["status"]["instances"][0]["memory_bytes"]
        assert need == pytest.approx(6.6 * GIB, abs=GIB / 100)
        gate = tmp_path / "gate"
        slow = asyncio.create_task(says(running, "chat", fake={"hold": str(gate)}))
        await running.eventually("/models/chat", lambda found: found["status"]["in_flight"] == 1)
        async with running.session.get("/events") as events:
            await events.content.readline()
            waits = asyncio.create_task(says(running, "code"))
            status = await once(running, "code", phase="queued", room={
                "needs": need, "waits_for": ["chat/0"], "behind": [],
            })  # fmt: skip
            assert status["message"].startswith("waits for 6.6 GiB on GPU 0: chat gives way")
            assert (status["instances"][0]["devices"], status["instances"][0]["memory_bytes"]) == ([], None)
            await running.eventually("/devices", lambda found: device(found)["promised_to"] == "code/0")
            found = await running.get("/devices")
            assert fits("Devices", found, closed=True) == []
            assert (found["unmanaged"], found["problem"]) == (None, None)
            assert [(hold["instance"], hold["standing"]) for hold in device(found)["holds"]] == [("chat/0", "yields")]
            gate.touch()
            await asyncio.gather(slow, waits)
            last = await running.eventually("/devices", lambda found: device(found)["holds"][0]["standing"] == "serves")
            assert (await running.instance("code"))["devices"] == ["0"]
            told = [event async for event in told_of_devices(events, device(last)["holds"])]
            assert all(fits("Device", event, closed=True) == [] for event in told)
            assert "code/0" in {event["promised_to"] for event in told}
        assert (await running.get("/models/code"))["status"]["room"] is None


async def told_of_devices(events: aiohttp.ClientResponse, until: object) -> AsyncIterator[Any]:
    """The data of the events about devices, up to the one with these holders."""
    kind = ""
    async for raw in events.content:
        name, _, value = raw.decode().strip().partition(": ")
        kind = value if name == "event" else kind
        if name == "data" and kind == "device":
            yield json.loads(value)
            if json.loads(value)["holds"] == until:
                return


async def test_a_command_waits_for_room_says_why_and_ends_where_there_can_be_none(tmp_path: Path) -> None:
    """A person reads it in one line, in `systemctl status` too. Who stops what is in the way makes it go on."""
    config = models(chat="", code=ON_DEMAND, warm='start = "warm"')
    async with fleet(tmp_path, config) as (running, _):
        await running.once("chat", lambda one: one["state"] == "ready")
        status, out, err = await vllm_proxy(tmp_path, "start", "code")
        assert status == 1
        assert "code: loading (queued): cannot serve code: it needs 6.6 GiB on a GPU and 2.9 can be had" in out
        assert "vllm-proxy help does_not_fit" in err
        await running.until(lambda status: "code (queued: cannot serve code: it needs 6.6 GiB" in status)
        await running.write("PATCH", "/models/chat", {"start": "on-demand"})
        assert (await vllm_proxy(tmp_path, "start", "code"))[0] == 0
        assert (await vllm_proxy(tmp_path, "start", "chat"))[0] == 0
        assert (await vllm_proxy(tmp_path, "stop", "chat"))[0] == 0


async def test_devices_that_nobody_can_look_at_are_a_visible_failure(tmp_path: Path) -> None:
    """In `/devices`, in `/health`, and in `systemctl status`; until they can be."""
    file = tmp_path / "gpus.toml"
    file.write_text('"0" = { total = 10, free =', encoding="utf-8")
    async with daemon(f'{fake_engines(port_block())}[devices]\nsource = "gpus.toml"\n', tmp_path) as running:
        found = await running.get("/devices")
        assert found["devices"] == []
        assert found["problem"] == found["unmanaged"] is not None
        health = await running.get("/health")
        assert (health["error"], health["devices"]) == (True, {"managed": 0, "problem": found["problem"]})
        await running.until(lambda status: "; devices: cannot look at the devices" in status)
        file.write_text('"0" = { total = 10, free = 10 }', encoding="utf-8")
        health = await running.eventually("/health", lambda found: not found["error"])
        assert health["devices"] == {"managed": 1, "problem": None}


async def test_what_somebody_stopped_is_not_waited_for(tmp_path: Path) -> None:
    """`/ready` is about what is to run."""
    async with fleet(tmp_path, models(chat="")) as (running, _):
        await running.all_ready()
        await running.post("/models/chat/stop", {}, 202)
        assert (await running.get("/ready"))["status"] == "ready"
        found = await running.get("/devices")
        assert device(found)["kind"] == "gpu"


async def test_where_nothing_is_managed_no_device_is_shown_and_the_reason_is(tmp_path: Path) -> None:
    """Engines run all the same; nothing of it is an error."""
    config = '[devices]\nsource = "none"\n[models.chat]\nmodel = "x"\n'
    async with daemon(f"{fake_engines(port_block())}{config}", tmp_path) as running:
        await running.all_ready()
        found = await running.get("/devices")
        assert found == {"devices": [], "unmanaged": 'the file says so: [devices] source = "none"', "problem": None}
        status = (await running.get("/models/chat"))["status"]
        assert (status["room"], status["instances"][0]["memory_bytes"]) == (None, None)
        assert (await running.get("/health"))["error"] is False


async def test_a_model_without_room_comes_by_itself_when_other_programs_have_gone(tmp_path: Path) -> None:
    """Nobody has to start it, nor ask for it."""
    with Devices(tmp_path / "gpus.toml", {"0": 10 * GIB}) as devices, contextlib.ExitStack() as others:
        others.enter_context(devices.taken("0", 6 * GIB))
        async with daemon(fleet_config(devices, models(chat='start = "always"')), tmp_path) as running:
            status = await once(running, "chat", state="error", reason="does_not_fit")
            assert "4.0 of 10.0 are free" in status["message"]
            others.close()
            await once(running, "chat", state="ready")


async def test_devices_that_cannot_be_looked_at_yet_are_waited_for(tmp_path: Path) -> None:
    """What `memory` says is a part of them."""
    file = tmp_path / "later.toml"
    text = (
        f'{fake_engines(port_block())}[devices]\nsource = "{file}"\n[defaults]\nargs = {{ fake_ledger = "{file}" }}\n'
    )
    async with daemon(text + models(chat=""), tmp_path) as running:
        status = await once(running, "chat", phase="queued")
        assert "later.toml" in status["instances"][0]["message"]
        with Devices(file, {"0": 10 * GIB}):
            await once(running, "chat", state="ready")
            assert await running.stop() == 0
