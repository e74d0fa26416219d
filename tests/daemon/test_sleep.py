"""Models that take turns asleep: whole daemons, and engines whose memory is accounted for."""

import asyncio
import contextlib
import os
import signal
import tomllib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests import mixed_load
from tests.daemon.test_room import SAY, fleet_config, once, says
from tests.daemon.test_room import fleet as fleet_of
from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, session_of

CONTEXT = int(0.6 * GIB)
RESIDUE = CONTEXT + int(0.67 * GIB)
NEAR = 64 * 2**20
# Nobody waits for long; and what the fakes say of weights on the host is not there.
RULES_OF_SLEEP = 'min_residency = 0\nmax_wait = "200ms"\nhost_memory = "1TiB"\n'
fleet = partial(fleet_of, rules=RULES_OF_SLEEP)
ENDED = "an engine is ended that cannot be trusted any more"


def sleepers(level: int = 1, **tables: str) -> str:
    """Models of 6 GiB of a GPU each that sleep, with more options of the fake, and after `;` more keys."""
    found = []
    for name, text in tables.items():
        args, _, keys = text.partition(";")
        found.append(
            f'[models.{name}]\nmodel = "{name}"\nmemory = "6GiB"\nstart = "on-demand"\nsleep = {level}\n{keys}'
        )
        found.append(f"[models.{name}.args]\n{args}")
    return "\n".join(found) + "\n"


async def state_of(running: Daemon, model: str) -> Any:  # noqa: ANN401 - JSON
    """What the only engine of a model tells of itself."""
    records = tomllib.loads((running.state_dir / "engines.toml").read_text(encoding="utf-8"))["engines"]
    (address,) = (one["address"] for one in records if one["instance"] == f"{model}/0")
    connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
    async with (
        aiohttp.ClientSession("http://localhost", connector=connector) as session,
        session.get("/fake/state") as answer,
    ):
        return await answer.json()


async def moved(running: Daemon, model: str) -> tuple[int, int, int]:
    """How often the engine of a model fell asleep, woke, and read its weights again."""
    state = await state_of(running, model)
    return state["sleeps"], state["wakes"], state["reloads"]


async def booked(running: Daemon) -> dict[str, int]:
    """What each instance counts for."""
    (device,) = (await running.get("/devices"))["devices"]
    return {hold["instance"].removesuffix("/0"): hold["bytes"] for hold in device["holds"]}


def measured(devices: Devices) -> dict[str, int]:
    """What each model has."""
    return {name: sum(parts["0"].values()) for name, parts in devices.holders()}


async def asleep(running: Daemon, *models: str) -> None:
    """Wait until these sleep."""
    for model in models:
        await once(running, model, state="sleeping", phase="sleeping")


# Turns


@pytest.mark.parametrize("level", [1, 2])
async def test_models_take_turns_asleep_and_no_engine_is_started_again(tmp_path: Path, level: int) -> None:
    """One start of each, whatever else is asked for; level 2 reads weights again, level 1 never does."""
    async with fleet(tmp_path, sleepers(level, chat="", code="")) as (running, devices):
        for _ in range(4):
            for name in ("chat", "code"):
                await says(running, name)
        together = await asyncio.gather(*(says(running, name) for name in ("chat", "code") * 5))
        assert len(together) == 10
        assert devices.starts() == {"chat": 1, "code": 1}
        assert devices.most()["0"] <= 10 * GIB
        for name in ("chat", "code"):
            sleeps, wakes, reloads = await moved(running, name)
            assert wakes >= 3 * level  # level 2 is woken in two calls
            assert sleeps - wakes // level == ((await once(running, name))["state"] == "sleeping")
            assert reloads == (0 if level == 1 else wakes // 2)


async def test_what_a_sleeper_counts_for_is_what_it_has(tmp_path: Path) -> None:
    """As measured, whatever its residue: within 64 MiB; beside those that sleep there is room for what remains."""
    config = sleepers(chat="", code=f"fake_residue = {2 * GIB}", third="")
    async with fleet(tmp_path, config, size=13 * GIB) as (running, devices):
        for name in ("chat", "code", "third"):
            await says(running, name)
        await asleep(running, "chat", "code")
        counted, has = await booked(running), measured(devices)
        assert has == {"chat": RESIDUE, "code": 2 * GIB, "third": has["third"]}
        assert all(abs(counted[name] - has[name]) <= NEAR for name in ("chat", "code")), (counted, has)
        assert (await running.instance("chat"))["memory_bytes"] == counted["chat"]


async def test_an_idle_model_sleeps_and_its_next_request_wakes_it(tmp_path: Path) -> None:
    """Though nobody waits for its room."""
    async with fleet(tmp_path, sleepers(chat="; idle_timeout = 1")) as (running, devices):
        for number in (1, 2):
            await says(running, "chat")
            await asleep(running, "chat")
            assert await moved(running, "chat") == (number, number - 1, 0)
        assert devices.starts() == {"chat": 1}


async def test_a_request_in_flight_ends_before_its_engine_sleeps(tmp_path: Path) -> None:
    """A stream goes on to its last event."""
    async with fleet(tmp_path, sleepers(chat="", code="")) as (running, devices):
        gate = tmp_path / "gate"
        slow = asyncio.create_task(says(running, "chat", fake={"hold": str(gate)}))
        await running.eventually("/models/chat", lambda found: found["status"]["in_flight"] == 1)
        waits = asyncio.create_task(says(running, "code"))
        await once(running, "chat", state="unloading", phase="draining")
        again = asyncio.create_task(says(running, "chat"))
        gate.touch()
        assert all(answer["choices"] for answer in await asyncio.gather(slow, waits, again))
        assert devices.starts() == {"chat": 1, "code": 1}


async def test_hundreds_of_requests_for_three_models_that_sleep(tmp_path: Path) -> None:
    """None fails, streams and whole answers, and never is more taken than there is."""
    config = sleepers(chat="", code="", third="")
    async with fleet(tmp_path, config, size=12 * GIB) as (running, devices):
        plans = mixed_load.wandering(["chat", "code", "third"], clients=8, requests=200, seed=3, stays=0.9)
        assert await mixed_load.run(running.url, plans) == []
        assert devices.most()["0"] <= 12 * GIB
        assert all(count <= 2 for count in devices.starts().values()), devices.starts()


# Faults


def pairs(folder: Path, level: int, options: dict[str, str]) -> str:
    """On a GPU each: a model whose engine has a fault, once, and one for which it gives way. `options`: by model."""
    return "".join(
        sleepers(
            level,
            **{
                name: f'{option}\nfake_once = "{folder}/once-{name}"\n;devices = [{gpu}]\n',
                f"beside_{name}": f";devices = [{gpu}]\n",
            },
        )
        for gpu, (name, option) in enumerate(options.items())
    )


async def in_turns(running: Daemon, name: str, *, times: int) -> None:
    """Ask for one of such a pair, for the other one, and so on, until it has answered so often."""
    for number in range(times):
        if number:
            await says(running, f"beside_{name}")
        await says(running, name)


async def test_a_sleep_that_fails_costs_one_cold_start(tmp_path: Path) -> None:
    """And no request: the engine that nobody can trust is ended, and its room is that of who waits."""
    faults = {"lies": "lies", "fails": "fails-after-freeing", "dies": "dies"}
    config = pairs(tmp_path, 1, {name: f'fake_sleep = "{fault}"' for name, fault in faults.items()})
    async with fleet(tmp_path, config, gpus=len(faults)) as (running, devices):
        await asyncio.gather(*(in_turns(running, name, times=3) for name in faults))
        assert devices.starts() == dict.fromkeys(faults, 2) | {f"beside_{name}": 1 for name in faults}
        await running.logged(ENDED, len(faults))
        assert [(await moved(running, name))[1] for name in faults] == [1, 1, 1]


@pytest.mark.parametrize("level", [1, 2])
async def test_a_wake_that_fails_costs_one_cold_start(tmp_path: Path, level: int) -> None:
    """Under the same admission, without a pause; the request that woke it is served by the next engine."""
    faults = ("oom", "dies", "garbage")
    config = pairs(tmp_path, level, {name: f'fake_wake = "{name}"' for name in faults})
    async with fleet(tmp_path, config, gpus=len(faults)) as (running, devices):
        await asyncio.gather(*(in_turns(running, name, times=2) for name in faults))
        for name in faults:
            instance = await running.instance(name)
            assert (instance["state"], instance["last_exit"]["reason"]) == ("ready", "wake_failed")
        await asyncio.gather(*(says(running, f"beside_{name}") for name in faults))
        await asyncio.gather(*(says(running, name) for name in faults))
        assert devices.starts() == dict.fromkeys(faults, 2) | {f"beside_{name}": 1 for name in faults}
        await running.logged(ENDED, len(faults))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_call_that_hangs_costs_one_cold_start(tmp_path: Path) -> None:
    """Of both kinds, at once, on a GPU each: after the time that vLLM is given for it."""
    config = pairs(tmp_path, 1, {"lull": 'fake_sleep = "slow"', "dawn": 'fake_wake = "hangs"'})
    async with fleet(tmp_path, config, gpus=2) as (running, devices):
        await asyncio.gather(*(in_turns(running, name, times=3) for name in ("lull", "dawn")))
        assert devices.starts() == {"lull": 2, "beside_lull": 1, "dawn": 2, "beside_dawn": 1}


@pytest.mark.parametrize("option", ['fake_sleep = "fails-after-freeing"', 'fake_wake = "garbage"'])
async def test_after_two_failures_in_a_row_a_model_is_stopped_in_place_of_put_to_sleep(
    tmp_path: Path, option: str
) -> None:
    """Nobody is put to sleep a third time whose engine does not stand it; the other one is."""
    async with fleet(tmp_path, sleepers(chat=option, code="")) as (running, devices):
        for _ in range(5):
            for name in ("chat", "code"):
                await says(running, name)
        assert devices.starts()["code"] == 1
        await running.logged(ENDED, 2)
        assert (await once(running, "chat", state="stopped"))["reason"] == "gave_way"


async def test_a_sleeper_that_dies_is_gone_and_its_next_request_starts_another(tmp_path: Path) -> None:
    """Nothing is started for it before."""
    async with fleet(tmp_path, sleepers(chat="", code="")) as (running, devices):
        for name in ("chat", "code"):
            await says(running, name)
        await asleep(running, "chat")
        (pid,) = await running.pids("chat")
        core = (await state_of(running, "chat"))["core"]
        for process in (core, pid):
            os.kill(process, signal.SIGKILL)
        await once(running, "chat", state="stopped")
        assert devices.starts() == {"chat": 1, "code": 1}
        await says(running, "chat")
        assert devices.starts() == {"chat": 2, "code": 1}


# Another daemon


KEEP = '[server]\non_exit = "keep"\n'


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_sleepers_sleep_on_under_the_next_daemon(tmp_path: Path, end: signal.Signals) -> None:
    """However the first one ended: nobody is woken or started, what they count for is what they have."""
    with Devices(tmp_path / "gpus.toml", {"0": 12 * GIB}) as devices:
        config = KEEP + fleet_config(devices, sleepers(chat="", code="", third="", last=""), RULES_OF_SLEEP)
        names = ("chat", "code", "third", "last")
        async with daemon(config, tmp_path) as running:
            for name in names:
                await says(running, name)
            await asleep(running, *names[:3])
            pids = {name: await running.pids(name) for name in names}
            await running.stop(end)
        async with daemon(config, tmp_path) as running:
            await asleep(running, *names[:3])
            await once(running, "last", state="ready")
            assert {name: await running.pids(name) for name in names} == pids
            assert [await moved(running, name) for name in names] == [(1, 0, 0)] * 3 + [(0, 0, 0)]
            counted, has = await booked(running), measured(devices)
            assert all(abs(counted[name] - has[name]) <= NEAR for name in names[:3]), (counted, has)
            for name in names:
                await says(running, name)
            assert devices.starts() == dict.fromkeys(names, 1)
            running.save(config.removeprefix(KEEP))
            await running.adopts()
            assert await running.stop() == 0
        assert devices.free() == {"0": 12 * GIB}
        assert not devices.events()


async def test_a_sleeper_takes_its_weights_of_the_machines_memory_under_the_next_daemon_too(tmp_path: Path) -> None:
    """As its log named them, 0.25 GiB, and names them no more; for what it had of its GPU it would be ended."""
    rules = RULES_OF_SLEEP.replace("1TiB", "2GiB")
    with Devices(tmp_path / "gpus.toml", {"0": 10 * GIB}) as devices:
        config = KEEP + fleet_config(devices, sleepers(chat="", code=""), rules)
        async with daemon(config, tmp_path) as running:
            for name in ("chat", "code"):
                await says(running, name)
            await asleep(running, "chat")
            await running.stop(signal.SIGKILL)
        os.truncate(running.state_dir / "logs" / "chat%2F0.log", 0)
        async with daemon(config, tmp_path) as running:
            for name in ("chat", "code", "chat"):
                await says(running, name)
            assert devices.starts() == {"chat": 1, "code": 1}
            counted = (await running.metrics())['vllm_proxy_host_memory_bytes{model="chat"}']
            assert counted == pytest.approx(1.3 * 0.75 * GIB)
            running.save(config.removeprefix(KEEP))
            await running.adopts()
        assert not devices.events()


async def test_a_daemon_that_was_killed_amid_a_nap_or_a_wake_leaves_nothing_half_done(tmp_path: Path) -> None:
    """The next one has the engine answer, or ends it; whatever it was, the next request is served."""
    with Devices(tmp_path / "gpus.toml", {"0": 10 * GIB}) as devices:
        gates = tmp_path / "sleep", tmp_path / "wake"
        options = f'fake_sleep_until = "{gates[0]}"\nfake_wake_until = "{gates[1]}"\n'
        config = fleet_config(devices, sleepers(chat=options, code=""), RULES_OF_SLEEP)
        async with daemon(config, tmp_path) as running:
            await says(running, "chat")
            waits = asyncio.create_task(says(running, "code"))
            await once(running, "chat", state="unloading", phase="falling_asleep")
            await running.stop(signal.SIGKILL)
            await asyncio.gather(waits, return_exceptions=True)
        gates[0].touch()
        async with daemon(config, tmp_path) as running:
            await says(running, "code")
            await asleep(running, "chat")
            waits = asyncio.create_task(says(running, "chat"))
            await once(running, "chat", state="loading", phase="waking")
            await running.stop(signal.SIGKILL)
            await asyncio.gather(waits, return_exceptions=True)
        gates[1].touch()
        async with daemon(config, tmp_path) as running:
            for name in ("chat", "code", "chat"):
                await says(running, name)
        assert not devices.events()


# By hand


PHASES = pytest.mark.parametrize("phase", ["falling_asleep", "sleeping", "waking"])


@dataclass(frozen=True)
class Moment:
    """A model `chat` that is just there. `waits`: requests that are not answered yet, one for `code` at most."""

    running: Daemon
    devices: Devices
    pid: int
    gates: list[Path]
    waits: list[asyncio.Task[int]]

    async def gone(self) -> None:
        """Wait until nothing is left of its engine."""
        async with asyncio.timeout(30):
            while session_of(self.pid):
                await asyncio.sleep(0.01)

    async def statuses(self) -> list[int]:
        """What those got who waited."""
        return await asyncio.gather(*self.waits)

    def go_on(self) -> None:
        """Nothing is held up any more."""
        for gate in self.gates:
            gate.touch()


@contextlib.asynccontextmanager
async def just(phase: str, folder: Path) -> AsyncIterator[Moment]:
    """A model that falls asleep, sleeps or wakes, for which it takes until it is to `go_on`."""
    gates = {"falling_asleep": folder / "sleep", "waking": folder / "wake"}
    for name, gate in gates.items():
        if name != phase:
            gate.touch()
    options = f'fake_sleep_until = "{gates["falling_asleep"]}"\nfake_wake_until = "{gates["waking"]}"\n'
    async with fleet(folder, sleepers(chat=options, code="")) as (running, devices):
        await says(running, "chat")
        (pid,) = await running.pids("chat")
        waits = [asyncio.create_task(status_of(running, "code"))]
        if phase != "falling_asleep":
            await waits[0]
            await asleep(running, "chat")
        if phase == "waking":
            waits.append(asyncio.create_task(status_of(running, "chat")))
        await once(running, "chat", phase=phase)
        yield Moment(running, devices, pid, list(gates.values()), waits)


async def status_of(running: Daemon, model: str, ask: Mapping[str, object] = SAY) -> int:
    """The status of the answer to one more request; 0: there was none."""
    body = {"model": model, **ask}
    try:
        async with running.session.post("/v1/chat/completions", json=body) as answer:
            return answer.status
    except aiohttp.ClientConnectionError:
        return 0


@PHASES
async def test_whoever_stops_a_model_ends_its_engine_whether_it_sleeps_or_not(tmp_path: Path, phase: str) -> None:
    """At once, also amid a call that does not end; until somebody starts it."""
    async with just(phase, tmp_path) as now:
        await now.running.post("/models/chat/stop", {}, 202)
        await now.gone()
        assert (await once(now.running, "chat", state="stopped"))["reason"] == "stopped_by_hand"
        assert (await now.statuses())[0] == 200
        now.go_on()
        await now.running.post("/models/chat/start", {}, 202)
        await once(now.running, "chat", state="ready")
        for name in ("chat", "code", "chat"):
            await says(now.running, name)


@PHASES
async def test_a_model_that_is_deleted_leaves_nothing_that_sleeps(tmp_path: Path, phase: str) -> None:
    """Nor does anything of its memory stay taken."""
    async with just(phase, tmp_path) as now:
        await now.running.write("DELETE", "/models/chat", status=202)
        await now.gone()
        await now.running.eventually("/models", lambda found: [one["id"] for one in found["models"]] == ["code"])
        assert (await now.statuses())[0] == 200
        await says(now.running, "code")
        assert "chat" not in await booked(now.running)


@PHASES
async def test_a_sleeper_that_is_changed_comes_back_as_it_was_asked_for(tmp_path: Path, phase: str) -> None:
    """What was put to sleep is of the old file: it ends, and the next request starts a new one; none fails."""
    async with just(phase, tmp_path) as now:
        await now.running.write("PATCH", "/models/chat", {"max_model_len": 512})
        now.go_on()
        assert set(await now.statuses()) == {200}
        await says(now.running, "chat")
        assert await now.running.pids("chat") != [now.pid]
        await now.gone()
        for name in ("code", "chat"):
            await says(now.running, name)
        assert now.devices.starts()["chat"] == 2


@PHASES
async def test_a_daemon_that_is_told_to_end_ends_who_sleeps(tmp_path: Path, phase: str) -> None:
    """And who is about to, or wakes: at once."""
    async with just(phase, tmp_path) as now:
        assert await now.running.stop() == 0
        assert session_of(now.pid) == set()
        assert now.devices.free() == {"0": 10 * GIB}
        await now.statuses()


async def test_a_hand_gives_requests_drain_timeout_and_a_client_that_leaves_no_engine_is_ended_for(
    tmp_path: Path,
) -> None:
    """A request in flight is cut then, and told so; who waits for a busy one's room and gives up leaves it asleep."""
    config = sleepers(chat='; drain_timeout = "200ms"', code="")
    async with fleet(tmp_path, config, rules=RULES_OF_SLEEP.replace("200ms", "1h")) as (running, devices):
        held = {**SAY, "fake": {"hold": str(tmp_path / "gate")}}
        body = asyncio.create_task(status_of(running, "chat", held))
        await running.eventually("/models/chat", lambda found: found["status"]["in_flight"] == 1)
        await running.post("/models/chat/sleep", {}, 202)
        assert await body == HTTPStatus.BAD_GATEWAY
        await asleep(running, "chat")
        busy = asyncio.create_task(status_of(running, "code", held))
        await running.eventually("/models/code", lambda found: found["status"]["in_flight"] == 1)
        waits = asyncio.create_task(status_of(running, "chat"))
        await once(running, "chat", state="loading", phase="queued")
        waits.cancel()
        await running.post("/models/chat/sleep", {}, 202)
        await asleep(running, "chat")
        (tmp_path / "gate").touch()
        assert await busy == HTTPStatus.OK
        await says(running, "chat")
        assert devices.starts() == {"chat": 1, "code": 1}


async def test_what_no_engine_notices_leaves_a_sleeper_alone(tmp_path: Path) -> None:
    """As a change of its policy."""
    async with fleet(tmp_path, sleepers(chat="", code="")) as (running, devices):
        for name in ("chat", "code"):
            await says(running, name)
        await asleep(running, "chat")
        await running.write("PATCH", "/models/chat", {"idle_timeout": "1h"})
        await says(running, "chat")
        assert devices.starts() == {"chat": 1, "code": 1}
