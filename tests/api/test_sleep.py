"""What is shown of models that sleep, as JSON, as metrics, and what a hand does to them. In virtual time."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.virtual import Stage, passes, virtual
from tests.fleet.test_giving_way import GIB, Gpus, answered, model
from tests.fleet.test_model import begun, serving
from tests.fleet.test_reconciler import reconciler_of
from vllm_proxy.api import models, room_metrics, sleep_metrics
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.exposition import Exposition
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.status import sentence

LEVEL_1: dict[str, object] = {"sleep": 1}


def instance(stage: Stage, one: Model) -> Any:  # noqa: ANN401 - JSON
    """Its only instance, as REST shows it."""
    (shown,) = models.resource(one, stage.registry, stage.loop.room.held())["status"]["instances"]
    return shown


async def naps(stage: Stage, one: Model, *failures: str) -> None:
    """A request comes, and the model falls asleep behind it, or ends; the next steps of that fail that are named."""
    stage.nap.failures.extend(failures)  # type: ignore[arg-type]
    with await answered(stage, one.name):
        pass
    await stage.until(lambda: one.state in {State.SLEEPING, State.STOPPED})


def series(add: Callable[[Exposition], None]) -> dict[str, float]:
    """Value by series, of what is added to an exposition."""
    exposition = Exposition()
    add(exposition)
    families = text_string_to_metric_families(exposition.text().decode())
    return {f"{one.name}{json.dumps(one.labels)}": one.value for family in families for one in family.samples}


def of_room(stage: Stage) -> Callable[[Exposition], None]:
    """What is shown of devices."""

    def add(exposition: Exposition) -> None:
        for family, line in room_metrics.lines(stage.loop.room, {"chat", "code"}, 0.0):
            exposition.add(family, line)

    return add


def of_sleep(one: Model) -> Callable[[Exposition], None]:
    """What is shown of a model's sleep."""
    return lambda exposition: sleep_metrics.by_model().add_to(exposition, one.name, one)


@virtual
async def test_a_sleeper_is_shown_with_its_level_what_it_keeps_and_why_it_gave_way() -> None:
    """State and phase are its own; a model that may not sleep has null."""
    stage = Stage(Gpus(gib=12))
    stage.kept.residues["chat"] = GIB
    chat, code = begun(stage, model("chat", 8, LEVEL_1)), begun(stage, model("code", 8))
    assert (instance(stage, chat)["sleep"], instance(stage, code)["sleep"]) == ("level 1", None)
    for name in ("chat", "code"):
        with await answered(stage, name):
            pass
    shown = instance(stage, chat)
    assert (shown["state"], shown["phase"], shown["memory_bytes"]) == ("sleeping", "sleeping", GIB)
    status = models.resource(chat, stage.registry, {})["status"]
    assert (status["state"], status["reason"]) == ("sleeping", "gave_way")
    assert status["message"] is not None
    assert status["message"].startswith("gave way to code at ")
    with await answered(stage, "chat"):
        assert models.resource(chat, stage.registry, {})["status"]["reason"] is None


@virtual
async def test_a_sleeper_that_waits_for_its_room_says_for_whom_and_for_how_long() -> None:
    """As a start does; what it takes then is a wake, and not a start."""
    stage = Stage(Gpus(gib=12))
    stage.kept.seconds = {"chat": [100.0] * 9, "code": [100.0] * 9}
    chat, _ = begun(stage, model("chat", 8, LEVEL_1, queue_size=1)), begun(stage, model("code", 8, LEVEL_1))
    for name in ("chat", "code"):
        with await answered(stage, name):
            pass
    waiting = asyncio.create_task(stage.registry.acquire("chat"))
    await passes(1)
    shown, status = instance(stage, chat), models.resource(chat, stage.registry, {})["status"]
    assert (shown["state"], shown["phase"]) == ("loading", "queued")
    assert shown["message"] == "waits for 8.0 GiB on GPU 0: code gives way within 10 s"
    assert (status["message"], shown["ready_in_seconds"]) == (shown["message"], None)
    assert status["room"] == {"needs": pytest.approx(8 * GIB, rel=1e-5), "waits_for": ["code/0"], "behind": []}
    with pytest.raises(RequestError) as refused:
        await stage.registry.acquire("chat")
    assert (refused.value.code, refused.value.retry_after) == ("queue_full", 12)
    with await waiting:
        assert models.resource(chat, stage.registry, {})["status"]["room"] is None


@virtual
async def test_two_naps_that_fail_in_a_row_turn_sleep_off_and_say_why() -> None:
    """A sleep that is followed by no good wake is none; once off, an idle model stops, and a hand is told why."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys=LEVEL_1, idle_timeout=100))
    await naps(stage, chat, "sleep")
    await naps(stage, chat)
    await naps(stage, chat)
    assert instance(stage, chat)["sleep"] == "level 1", "the second one was good"
    await naps(stage, chat, "wake")
    await naps(stage, chat, "wake")
    off = instance(stage, chat)["sleep"]
    assert off.startswith("off: cannot wake the engine: as the test says; until its keys change")
    assert chat.state is State.STOPPED
    with await answered(stage, "chat"), pytest.raises(RequestError) as refused:
        models.sleep(chat)
    assert (refused.value.code, refused.value.status) == ("sleep_not_enabled", 409)
    assert refused.value.message == f"cannot put chat to sleep: {off.removeprefix('off: ')}"


@virtual
async def test_a_model_whose_keys_or_machine_do_not_let_it_sleep_refuses_a_hand() -> None:
    """Of what is too large for `host_memory` its resource says so too."""
    gpus = Gpus()
    gpus.host_bytes = GIB
    stage = Stage(gpus)
    chat, code = begun(stage, model("chat", 3)), begun(stage, model("code", 3, LEVEL_1))
    whys = {
        "chat": "its keys have no `sleep`, which may be 1 or 2 (`vllm-proxy help sleep_not_enabled`)",
        "code": "`devices.host_memory` is less than what level 1 would move there",
    }
    for one in (chat, code):
        with await answered(stage, one.name), pytest.raises(RequestError) as refused:
            models.sleep(one)
        assert refused.value.message == f"cannot put {one.name} to sleep: {whys[one.name]}"
    assert instance(stage, code)["sleep"] == f"off: {whys['code']}"
    assert {chat.state, code.state} == {State.READY}


async def always_on(stage: Stage, folder: Path, spec: ModelSpec) -> tuple[Reconciler, Model]:
    """A model that is ready."""
    reconciler = reconciler_of(stage, folder, spec)
    one = reconciler.model(spec.id)
    await serving(stage, one)
    return reconciler, one


async def is_ready(reconciler: Reconciler) -> Any:  # noqa: ANN401 - JSON
    """The answer of `GET /ready`."""
    reply = await models.ready(reconciler)(cast("Any", None))
    return reply.value


@virtual
async def test_who_a_hand_put_to_sleep_is_not_waited_for_and_the_sentence_names_it(tmp_path: Path) -> None:
    """Once it is woken it is waited for again."""
    stage = Stage(Gpus())
    reconciler, chat = await always_on(stage, tmp_path, model("chat", keys=LEVEL_1, start="always"))
    assert sentence(reconciler) == "1 of 1 models ready"
    models.sleep(chat)
    await stage.until(lambda: chat.state is State.SLEEPING)
    assert await is_ready(reconciler) == {"status": "ready", "not_ready": {}}
    assert sentence(reconciler) == "0 of 0 models ready; sleeping: chat"
    chat.start()
    await stage.until(lambda: chat.state is State.LOADING)
    assert await is_ready(reconciler) == {"status": "waiting", "not_ready": {"chat": State.LOADING}}
    await stage.until(lambda: chat.state is State.READY)
    assert await is_ready(reconciler) == {"status": "ready", "not_ready": {}}


@pytest.mark.parametrize(
    ("act", "state", "engines"),
    [(Model.start, State.READY, 1), (Model.stop, State.STOPPED, 1), (Model.restart, State.READY, 2)],
)
@virtual
async def test_a_hand_starts_stops_and_restarts_a_sleeper(
    act: Callable[[Model], asyncio.Future[None]], state: State, engines: int
) -> None:
    """A start wakes it, with the engine that it has; a restart takes another one, whose requests it serves."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys=LEVEL_1, start="warm"))
    await serving(stage, chat)
    chat.sleep()
    await stage.until(lambda: chat.state is State.SLEEPING)
    await act(chat)
    if state is State.READY:
        with await answered(stage, "chat"):
            pass
    await stage.until(lambda: chat.state is state)
    assert (len(stage.launcher.engines), chat.stopped_by_hand) == (engines, state is State.STOPPED)


@virtual
async def test_what_sleep_took_failed_and_costs_is_counted() -> None:
    """By model, level and operation; a model that never slept has no series."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", 4, LEVEL_1, idle_timeout=100))
    assert series(of_sleep(chat)) == {}
    stage.nap.seconds = 3
    for failures in ((), ("wake",), ("sleep",)):
        await naps(stage, chat, *failures)
    await naps(stage, chat)
    found = series(of_sleep(chat))
    of_chat = '{"model": "chat"}'
    assert found[f"vllm_proxy_sleep_seconds_count{of_chat}"] == 3
    assert found[f"vllm_proxy_sleep_seconds_sum{of_chat}"] == pytest.approx(9)
    operations = {one: found[f'vllm_proxy_sleep_failures_total{{"model": "chat", "operation": "{one}"}}']
                  for one in ("sleep", "wake")}  # fmt: skip
    assert operations == {"sleep": 1, "wake": 1}
    assert found[f"vllm_proxy_host_memory_bytes{of_chat}"] == pytest.approx(4 * GIB * 1.3, rel=0.01)
    with await answered(stage, "chat"):
        found = series(of_sleep(chat))
    level = '{"level": "1", "model": "chat"}'
    assert found[f"vllm_proxy_wake_seconds_count{level}"] == 2
    assert found[f"vllm_proxy_wake_seconds_sum{level}"] == pytest.approx(6)


@virtual
async def test_the_sleepers_of_each_device_are_counted() -> None:
    """Those that sleep now."""
    stage = Stage(Gpus(count=2))
    chat, _ = begun(stage, model("chat", keys=LEVEL_1, idle_timeout=100)), begun(stage, model("code"))
    await naps(stage, chat)
    await passes(1)

    def sleepers() -> list[float]:
        found = series(of_room(stage))
        return [found[f'vllm_proxy_sleepers{{"device": "{name}"}}'] for name in ("0", "1")]

    assert sleepers() == [1, 0]
    with await answered(stage, "chat"):
        assert sleepers() == [0, 0]


@virtual
async def test_what_loads_is_ended_by_a_hand_that_wants_it_asleep_and_its_next_request_starts_it() -> None:
    """It has nothing yet that could sleep."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys=LEVEL_1, start="warm"))
    await stage.engine()
    models.sleep(chat)
    await stage.until(lambda: chat.state is State.STOPPED)
    assert not chat.stopped_by_hand
    with await answered(stage, "chat"):
        assert len(stage.launcher.engines) == 2
