"""Models that sleep: the tier between ready and stopped. In virtual time."""

import asyncio
import math
import re
from dataclasses import replace

import pytest
import structlog

from tests.engine.virtual import Stage, now, passes, virtual
from tests.fleet.test_giving_way import GIB, RULES, Gpus, answered, engine_of, model
from tests.fleet.test_model import begun
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.ledger import Depth
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.measuring import Measuring
from vllm_proxy.fleet.model import Model
from vllm_proxy.traffic.lease import Lease


@virtual
async def test_an_idle_model_that_may_sleep_sleeps_and_its_next_request_wakes_it() -> None:
    """The same engine serves again: no weights are loaded."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state is State.SLEEPING)
    assert chat.instances[0].phase is Phase.SLEEPING
    await passes(10_000)
    with await answered(stage, "chat"):
        assert (chat.state, len(stage.launcher.engines)) == (State.READY, 1)
    assert stage.nap.done == ["chat/0 sleeps", "chat/0 wakes"]


@virtual
async def test_who_gives_way_sleeps_where_that_makes_room_enough() -> None:
    """Two models take turns on one GPU without a start."""
    stage = Stage(Gpus(gib=12))
    chat, code = (begun(stage, model(name, 8, {"sleep": 1})) for name in ("chat", "code"))
    for name in ("chat", "code", "chat", "code"):
        with await answered(stage, name):
            pass
    assert (chat.state, code.state, len(stage.launcher.engines)) == (State.SLEEPING, State.READY, 2)


@virtual
async def test_eight_models_take_turns_on_a_gpu_that_holds_three_and_none_is_started_twice() -> None:
    """Who is idle sleeps, and what the others keep is left to them."""
    stage = Stage(Gpus(gib=20))
    names = [f"m{number}" for number in range(8)]
    for name in names:
        stage.kept.residues[name] = GIB
        stage.kept.seconds[name] = [20.0] * 9
        begun(stage, model(name, keys={"sleep": 1}))
    for name in (*names, *names, *reversed(names)):
        with await answered(stage, name):
            pass
    assert len(stage.launcher.engines) == 8
    assert all(engine.reaped_at is None for engine in stage.launcher.engines)


@virtual
async def test_a_wake_is_no_start() -> None:
    """Neither the log nor what is known of starts takes the age of an engine for the time that it took."""
    stage = Stage(Gpus())
    stage.nap.seconds = 3
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    starts = list(stage.kept.starts("chat"))
    await stage.until(lambda: chat.state is State.SLEEPING)
    with structlog.testing.capture_logs() as logs, await answered(stage, "chat"):
        pass
    assert [one for one in logs if one["event"] in {"engine ready", "engine awake"}] == [
        {"event": "engine awake", "log_level": "info", "instance": "chat/0", "seconds": 3.0}
    ]
    assert (stage.kept.starts("chat"), sum(chat.history.startups.counts)) == (starts, 1)
    assert chat.instances[0].wake_seconds() == 3


@virtual
async def test_nobody_looks_at_the_devices_for_one_that_sleeps() -> None:
    """Though it fell asleep before anybody had: what it had awake is not there any more."""
    gpus = Gpus()
    stage = Stage(gpus)
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    assert stage.loop.room.is_asked(), "it serves, and nobody has looked yet"
    await stage.until(lambda: chat.state is State.SLEEPING)
    assert not stage.loop.room.is_asked()
    with await answered(stage, "chat"):
        pass
    assert stage.loop.room.is_asked(), "as behind a start"


@virtual
async def test_a_sleeper_ends_where_what_it_keeps_is_wanted() -> None:
    """It gives way once more, to the end."""
    stage = Stage(Gpus(gib=12))
    chat = begun(stage, model("chat", 8, {"sleep": 1}, idle_timeout=20))
    begun(stage, model("code", 11))
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state is State.SLEEPING)
    with await answered(stage, "code"):
        assert chat.state is State.STOPPED


@pytest.mark.parametrize("operation", ["sleep", "wake"])
@virtual
async def test_a_failure_costs_one_cold_start_and_no_request(operation: str) -> None:
    """The engine that nobody can trust is ended; one that was to wake is started anew where it was admitted to."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    stage.nap.failures = [operation]  # type: ignore[list-item]
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state in {State.SLEEPING, State.STOPPED})
    assert chat.state is (State.STOPPED if operation == "sleep" else State.SLEEPING)
    with await answered(stage, "chat"):
        assert (chat.state, len(stage.launcher.engines)) == (State.READY, 2)
    assert engine_of(stage, "chat").reaped_at is None
    assert stage.launcher.engines[0].reaped_at is not None
    last = chat.instances[0].last_exit
    assert last is not None
    assert last.diagnosis.reason is (Reason.WAKE_FAILED if operation == "wake" else Reason.SLEEP_FAILED)
    await stage.until(lambda: chat.state is State.SLEEPING)


@virtual
async def test_a_hand_stops_a_sleeper_and_one_that_falls_asleep() -> None:
    """Both end."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state is State.SLEEPING)
    chat.stop()
    await stage.until(lambda: chat.state is State.STOPPED)
    assert stage.loop.room.now().holds == []
    chat.start()
    with await answered(stage, "chat"):
        pass
    stage.nap.seconds = 50
    await stage.until(lambda: chat.instances[0].phase is Phase.FALLING_ASLEEP)
    chat.stop()
    await passes(1)
    assert (chat.state, stage.loop.room.now().holds) == (State.STOPPED, [])


@virtual
async def test_a_hand_puts_a_model_to_sleep_and_a_request_wakes_it() -> None:
    """Unlike one that was stopped."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, start="always"))
    (await stage.engine()).listens = True
    await stage.until(lambda: chat.state is State.READY)
    chat.sleep()
    await stage.until(lambda: chat.state is State.SLEEPING)
    await passes(1000)
    assert chat.state is State.SLEEPING
    with await answered(stage, "chat"):
        assert len(stage.launcher.engines) == 1


@virtual
async def test_a_hand_puts_to_sleep_what_has_slept_before() -> None:
    """A nap that is over says nothing of the next one."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}))
    for _ in range(3):
        with await answered(stage, "chat"):
            pass
        chat.sleep()
        await stage.until(lambda: chat.state is State.SLEEPING)
    assert len(stage.launcher.engines) == 1


@virtual
async def test_who_twice_did_not_fall_asleep_is_stopped_from_then_on() -> None:
    """Its third engine is not asked to."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    stage.nap.failures = ["sleep"] * 3
    for _ in range(3):
        with await answered(stage, "chat"):
            pass
        await stage.until(lambda: chat.state is State.STOPPED)
    assert stage.nap.failures == ["sleep"]


@virtual
async def test_an_engine_that_dies_asleep_is_gone_and_nobody_is_started_for_it() -> None:
    """Its next request starts another one."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state is State.SLEEPING)
    engine_of(stage, "chat").die()
    await stage.until(lambda: chat.state is State.STOPPED)
    await passes(1000)
    assert len(stage.launcher.engines) == 1
    waiting = asyncio.create_task(answered(stage, "chat"))
    with await waiting:
        assert len(stage.launcher.engines) == 2


@virtual
async def test_sleepers_have_no_more_of_the_machines_memory_than_they_may() -> None:
    """The one that has slept longest ends; an engine that would take all of it by itself never sleeps."""
    gpus = Gpus(count=3)
    gpus.host_bytes = int(2.5 * 6 * 1.3 * GIB)
    stage = Stage(gpus)
    three = [begun(stage, model(name, keys={"sleep": 1}, idle_timeout=100)) for name in ("a", "b", "c")]
    for one in three:
        with await answered(stage, one.name):
            await passes(10)
    await passes(200)
    assert [one.state for one in three] == [State.STOPPED, State.SLEEPING, State.SLEEPING]
    assert three[0].message is not None
    assert re.fullmatch(
        r"ended while asleep at [0-9:]{8} UTC: \[devices\] host_memory is full, and it slept longest; "
        "its next request starts it", three[0].message
    )  # fmt: skip
    counted = stage.loop.room.history.counted(now(), {"a", "b", "c"}, set())
    assert counted.evictions == {("a", Depth.STOP, "[devices] host_memory"): 1}
    big = begun(stage, model("big", 9, {"sleep": 1, "tensor_parallel_size": 2}, idle_timeout=100))
    gpus.host_bytes = 2 * 9 * GIB
    with await answered(stage, "big"):
        pass
    await passes(200)
    assert big.state is State.STOPPED


@virtual
async def test_a_model_sleeps_whose_weights_fit_in_the_machines_memory_though_its_share_of_the_devices_does_not() -> (
    None
):
    """Its KV cache, which has most of them, is not moved; as on an H200 beside 125 GiB of memory."""
    gpus = Gpus()
    gpus.host_bytes = 4 * GIB
    stage = Stage(gpus)
    models = {name: begun(stage, model(name, keys={"sleep": 1}, idle_timeout=100)) for name in ("large", "small")}
    for name, gib in (("large", 3), ("small", 2)):
        with await answered(stage, name):
            engine_of(stage, name).output.weights_bytes = gib * GIB
        await passes(200)
    assert [one.state for one in models.values()] == [State.STOPPED, State.SLEEPING]


def record(asleep: int, before_sleep: int | None = 0) -> EngineRecord:
    """An engine of an earlier daemon that was to sleep."""
    return EngineRecord(
        "chat/0", "engine-0", 4242, 1, "unix:/tmp/vp-x/http.sock", "secret", "/tmp/vp-x", "", ready=True,
        devices=("0",), takes={"0": 6 * GIB}, visible=("0",), asleep=asleep, before_sleep=before_sleep,
    )  # fmt: skip


def adopted(stage: Stage, asleep: int, before_sleep: int | None = 0, **policy: object) -> Model:
    """A model whose engine an earlier daemon has started."""
    spec = model("chat", keys={"sleep": 1}, **policy)  # type: ignore[arg-type]
    made = Model(spec, stage.shared, stage.history(), lambda _: stage.moved())
    stage.registry.declare(spec, made.request)
    made.begin({0: record(asleep, before_sleep)})
    return made


@virtual
async def test_a_sleeper_of_an_earlier_daemon_sleeps_on_until_a_request_comes() -> None:
    """No weights are moved for that; what it has of the machine's memory counts as before."""
    stage = Stage(Gpus())
    chat = adopted(stage, 1)
    await stage.until(lambda: chat.state is State.SLEEPING)
    claim = chat.instances[0].claim
    assert claim is not None
    assert claim.host_bytes() > 6 * GIB
    await passes(1000)
    assert (chat.state, stage.nap.done) == (State.SLEEPING, [])
    with await stage.registry.acquire("chat"):
        assert (chat.state, stage.nap.done) == (State.READY, ["chat/0 wakes"])


@pytest.mark.parametrize(("says", "engines"), [(False, 1), (None, 2)])
@virtual
async def test_an_engine_that_was_to_sleep_serves_where_it_is_awake_and_ends_where_it_gives_no_clean_answer(
    *, says: bool | None, engines: int
) -> None:
    """Its canary decides."""
    stage = Stage(Gpus())
    stage.nap.sleeping = says
    chat = adopted(stage, 1, start="always")
    await stage.engine()
    while chat.state is not State.READY:
        stage.launcher.engines[-1].listens = True
        await passes(1)
    assert len(stage.launcher.engines) == engines
    assert stage.nap.done == []


@pytest.mark.parametrize("before_sleep", [None, 0, GIB])
@virtual
async def test_an_engine_that_slept_under_an_earlier_daemon_counts_for_the_machines_memory_still(
    before_sleep: int | None,
) -> None:
    """Though it is awake: it has that until it ends."""
    stage = Stage(Gpus())
    chat = adopted(stage, 0, before_sleep, start="always")
    await stage.until(lambda: chat.state is State.READY)
    claim = chat.instances[0].claim
    assert claim is not None
    assert (claim.host_bytes() > 6 * GIB) is (before_sleep is not None)


@virtual
async def test_an_adopted_sleeper_that_does_not_wake_is_started_where_it_was() -> None:
    """On the GPUs that it was admitted to: what its engine is told of them is on record."""
    stage = Stage(Gpus(count=2))
    stage.nap.failures = ["wake"]
    chat = adopted(stage, 1)
    await stage.until(lambda: chat.state is State.SLEEPING)
    with await answered(stage, "chat"):
        first, second = (one.place.allocation for one in stage.launcher.engines)
    assert first == second
    assert second.visible == ("0",)


@virtual
async def test_a_hand_puts_to_sleep_what_woke_before() -> None:
    """Again and again; that it was to stay awake for somebody is over."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}))
    for times in (1, 2, 3):
        with await answered(stage, "chat"):
            pass
        await chat.sleep()
        await stage.until(lambda: chat.state is not State.UNLOADING)
        assert (chat.state, len(stage.nap.done)) == (State.SLEEPING, 2 * times - 1)


@virtual
async def test_a_sleeper_that_wants_its_room_has_the_devices_looked_at() -> None:
    """As a start has: nobody waits for the next look."""
    gpus = Gpus()
    stage = Stage(gpus)
    chat = begun(stage, model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await answered(stage, "chat"):
        pass
    await stage.until(lambda: chat.state is State.SLEEPING)
    looks = gpus.asked
    chat.request()
    await stage.until(lambda: chat.state is State.LOADING)
    assert gpus.asked > looks


async def beside_busy(stage: Stage, code: ModelSpec) -> tuple[Model, Model, Lease]:
    """A model that sleeps, since a busy one without sleep has its room. A GPU of 10 GiB."""
    chat, busy = begun(stage, code), begun(stage, model("busy"))
    with await answered(stage, chat.name):
        pass
    lease = await answered(stage, "busy")
    await stage.until(lambda: chat.state is State.SLEEPING)
    return chat, busy, lease


@virtual
async def test_a_client_that_gives_up_leaves_a_sleeper_asleep() -> None:
    """It waited for room to wake, and is loading as long as somebody waits for it, or may ask again."""
    stage = Stage(Gpus(rules=RULES.model_copy(update={"max_wait": 1000.0})))
    chat, _, _ = await beside_busy(stage, model("chat", keys={"sleep": 1}))
    for _ in range(2):
        waits = asyncio.create_task(stage.registry.acquire("chat"))
        await passes(5)
        assert (chat.state, chat.waits is not None) == (State.LOADING, True)
        waits.cancel()
        await passes(30)
        assert (chat.state, chat.waits, engine_of(stage, "chat").reaped_at) == (State.SLEEPING, None, None)
    assert stage.loop.room.now().asks == []


@virtual
async def test_a_hand_has_what_waits_to_wake_sleep_on() -> None:
    """It was woken by hand, and did not get its room before; its engine is not ended."""
    stage = Stage(Gpus(rules=RULES.model_copy(update={"max_wait": 1000.0})))
    chat, _, _ = await beside_busy(stage, model("chat", keys={"sleep": 1}))
    await chat.start()
    await passes(30)
    assert chat.state is State.LOADING
    await chat.sleep()
    assert (chat.state, engine_of(stage, "chat").reaped_at) == (State.SLEEPING, None)
    await passes(100)
    assert stage.loop.room.now().asks == []


@virtual
async def test_a_warm_sleeper_sleeps_and_wakes_where_nobody_waits_for_its_room() -> None:
    """It is loading only where somebody waits for it; whoever waited and left leaves it asleep, and it comes back."""
    stage = Stage(Gpus(rules=RULES.model_copy(update={"max_wait": 1000.0})))
    chat, busy, lease = await beside_busy(stage, model("chat", keys={"sleep": 1}, start="warm"))
    await passes(100)
    assert (chat.state, len(stage.loop.room.now().asks)) == (State.SLEEPING, 1)
    assert chat.message is not None
    assert "gave way to busy" in chat.message
    waits = asyncio.create_task(stage.registry.acquire("chat"))
    await passes(5)
    assert chat.state is State.LOADING
    waits.cancel()
    await passes(30)
    assert (chat.state, len(stage.loop.room.now().asks)) == (State.SLEEPING, 1)
    with lease:
        pass
    busy.stop()
    await stage.until(lambda: chat.state is State.READY)
    assert engine_of(stage, "chat").reaped_at is None


@virtual
async def test_warm_sleepers_have_no_more_of_the_machines_memory_than_they_may() -> None:
    """Though they would wake where there is room; the one that slept longest ends, and waits for its room cold."""
    gpus = Gpus(gib=13)
    gpus.host_bytes = int(1.5 * 6 * 1.3 * GIB)
    stage = Stage(gpus)
    old, new = (begun(stage, model(name, keys={"sleep": 1}, start="warm")) for name in ("old", "new"))
    for one in (old, new):
        with await answered(stage, one.name):
            await passes(20)
    begun(stage, model("big", 11))
    with await answered(stage, "big"):
        await stage.until(lambda: State.SLEEPING in {old.state, new.state})
        await passes(1)
        assert sorted(one.state for one in (old, new)) == [State.LOADING, State.SLEEPING]
        (cold,) = (one for one in (old, new) if one.state is State.LOADING)
        assert engine_of(stage, cold.name).reaped_at is not None


@pytest.mark.parametrize("start", ["on-demand", "warm"])
@virtual
async def test_a_sleeper_that_dies_while_it_waits_for_room_waits_as_any_other_start(start: str) -> None:
    """Nobody finds out at the wake only: what it kept is free, and that is no failed wake."""
    stage = Stage(Gpus(rules=RULES.model_copy(update={"max_wait": 1000.0})))
    chat, _, lease = await beside_busy(stage, model("chat", keys={"sleep": 1}, start=start))
    waits = asyncio.create_task(stage.registry.acquire("chat"))
    await passes(5)
    engine_of(stage, "chat").die()
    await passes(1)
    assert [hold.name for hold in stage.loop.room.now().holds] == ["busy/0"]
    assert (chat.state, chat.instances[0].phase, chat.instances[0].restarts) == (State.LOADING, Phase.QUEUED, 0)
    assert chat.waits is not None
    last = chat.instances[0].last_exit
    assert last is not None
    assert last.diagnosis.reason is Reason.CRASHED
    assert not chat.history.sleep_failures
    with lease:
        pass
    (await stage.engine(3)).listens = True
    with await waits:
        pass


@virtual
async def test_an_engine_that_dies_asleep_leaves_its_reason() -> None:
    """The model and its instance say it until the next start, it is counted, and the log has a line."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}, start="always"))
    (await stage.engine()).listens = True
    await stage.until(lambda: chat.state is State.READY)
    await chat.sleep()
    await stage.until(lambda: chat.state is State.SLEEPING)
    with structlog.testing.capture_logs() as logs:
        engine_of(stage, "chat").die()
        await stage.until(lambda: chat.state is State.STOPPED)
    assert [one["instance"] for one in logs if one["event"] == "an engine ended by itself"] == ["chat/0"]
    assert chat.history.failures == {("chat/0", Reason.CRASHED): 1}
    last = chat.instances[0].last_exit
    assert last is not None
    assert last.diagnosis.message == "the engine ended while it slept (exit code 1)"
    assert chat.message == f"{last.diagnosis.message}; its next request starts another"
    with await answered(stage, "chat"):
        assert chat.message is None


@virtual
async def test_an_engine_that_dies_before_it_could_be_asked_to_sleep_has_not_failed_to_sleep() -> None:
    """Its last request was awaited then: that says nothing of its sleep."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", keys={"sleep": 1}))
    with await answered(stage, "chat"):
        await chat.sleep()
        await passes(1)
        assert chat.instances[0].phase is Phase.DRAINING
        engine_of(stage, "chat").die()
        await stage.until(lambda: chat.state is State.STOPPED)
    assert not chat.history.sleep_failures
    assert chat.history.failures == {("chat/0", Reason.CRASHED): 1}


@virtual
async def test_a_change_that_no_engine_notices_wakes_nobody() -> None:
    """A hand has put it to sleep; one of `start` counts as wanting it."""
    stage = Stage(Gpus())
    spec = model("chat", keys={"sleep": 1}, start="always")
    chat = begun(stage, spec)
    (await stage.engine()).listens = True
    await stage.until(lambda: chat.state is State.READY)
    await chat.sleep()
    await stage.until(lambda: chat.state is State.SLEEPING)
    spec = replace(spec, policy=spec.policy.model_copy(update={"description": "for everybody"}))
    chat.adopt_spec(spec)
    await passes(100)
    assert chat.state is State.SLEEPING
    chat.adopt_spec(replace(spec, policy=spec.policy.model_copy(update={"start": "warm"})))
    await stage.until(lambda: chat.state is State.READY)


@pytest.mark.parametrize("others_go", [False, True])
@virtual
async def test_what_a_sleeper_keeps_is_not_known_where_others_gave_back_memory_meanwhile(*, others_go: bool) -> None:
    """Where a gauge is all there is, that would be taken for its own: it would count for nothing."""
    gpus = Gpus(gib=20)
    stage = Stage(gpus)
    chat, code = (begun(stage, model(name, keys={"sleep": 1}, start="always")) for name in ("chat", "code"))
    while (chat.state, code.state) != (State.READY, State.READY):
        await passes(1)
        for engine in stage.launcher.engines:
            engine.listens = True
    mine, other = chat.instances[0].claim, code.instances[0].claim
    assert mine is not None
    assert other is not None

    def free(gib: int) -> None:
        gpus.seen["0"], gpus.seen_at = replace(gpus.seen["0"], free=gib * GIB), math.inf

    free(8)
    memory = Measuring(stage.loop.room, mine)
    await memory.begin()
    if others_go:
        other.goes()
    free(13)
    assert await memory.freed()
    keeps = memory.keeps()
    assert keeps == (None if others_go else pytest.approx(GIB, abs=1e6))


async def asleep(
    stage: Stage, name: str, gib: int = 6, keys: dict[str, object] | None = None, **policy: object
) -> Model:
    """A model that served, and was put to sleep by hand."""
    made = begun(stage, model(name, gib, {"sleep": 1, **(keys or {})}, **policy))
    with await answered(stage, name):
        pass
    await made.sleep()
    await stage.until(lambda: made.state is State.SLEEPING)
    return made


@virtual
async def test_a_sleeper_whose_gpu_is_taken_for_good_is_started_on_another_one() -> None:
    """Its request waits for a cold start, and the engine that slept is gone."""
    stage = Stage(Gpus(count=2))
    code = await asleep(stage, "code")
    begun(stage, model("big", keys={"devices": [0]}, start="always"))
    (await stage.engine(2)).listens = True
    await passes(1)
    with await answered(stage, "code"):
        assert (code.state, len(stage.launcher.engines)) == (State.READY, 3)
    assert stage.launcher.engines[0].reaped_at is not None
    assert [*engine_of(stage, "code").place.allocation.takes] == ["1"]
    assert code.message is None


@virtual
async def test_a_sleeper_that_can_never_have_room_fails_its_requests_at_once() -> None:
    """As one that does not sleep."""
    stage = Stage(Gpus())
    code = await asleep(stage, "code")
    begun(stage, model("big", start="always"))
    (await stage.engine(2)).listens = True
    await passes(1)
    asked = now()
    with pytest.raises(RequestError, match=r"code: it needs 6\.0 GiB on a GPU and 4\.0 can be had"):
        await stage.registry.acquire("code")
    assert now() - asked < 1
    await passes(60)
    assert stage.loop.room.now().asks == [], "nobody waits any more"
    assert code.state in {State.SLEEPING, State.STOPPED}


@virtual
async def test_a_sleeper_that_waits_for_its_room_ends_where_what_it_keeps_is_wanted() -> None:
    """It gives way as one that nobody waits for, and is started when it is its turn."""
    stage = Stage(Gpus(gib=12))
    code = await asleep(stage, "code", 8)
    big = begun(stage, model("big", 11, priority=1))
    busy = begun(stage, model("busy", 8, priority=-1, yield_timeout=0))
    running = await answered(stage, "busy")
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: code.state is State.LOADING)
    first = asyncio.create_task(answered(stage, "big"))
    await passes(40)
    running.__exit__()
    with await first:
        assert (code.state, busy.state) == (State.LOADING, State.STOPPED)
        assert stage.launcher.engines[0].reaped_at is not None
    with await waiting:
        assert big.state is State.STOPPED


@virtual
async def test_who_slept_waits_its_own_time_for_its_next_request() -> None:
    """A model that sleeps and wakes every few seconds has not waited since its first one: others get their turns."""
    stage = Stage(Gpus(gib=10, rules=RULES.model_copy(update={"min_residency": 0.0})))
    chat, code = (begun(stage, model(name, keys={"sleep": 1})) for name in ("chat", "code"))
    for name in ("chat", "code") * 12:
        with await answered(stage, name):
            await passes(1)
    assert now() > RULES.max_wait
    running = await answered(stage, "code")
    waiting = asyncio.create_task(answered(stage, "chat"))
    asked = now()
    await stage.until(lambda: code.state is State.UNLOADING)
    assert now() - asked == pytest.approx(RULES.max_wait, abs=1), "a busy one serves so long at least"
    running.__exit__()
    with await waiting:
        assert chat.state is State.READY


@virtual
async def test_two_hot_sleepers_do_not_starve_a_third_model() -> None:
    """It is served when it has waited for `max_wait`, and not when they have nothing to do any more."""
    stage = Stage(Gpus(gib=10, rules=RULES.model_copy(update={"min_residency": 0.0, "max_wait": 5.0})))
    for name, keys in (("a", {"sleep": 1}), ("b", {"sleep": 1}), ("cold", {})):
        begun(stage, model(name, keys=keys))
        stage.kept.seconds[name] = [1.0] * 9
        with await answered(stage, name):
            pass

    async def hot(name: str) -> None:
        while True:
            with await answered(stage, name):
                await passes(0.5)

    load = [asyncio.create_task(hot(name)) for name in ("a", "b") for _ in range(3)]
    await passes(60)
    for _ in range(3):
        asked = now()
        with await answered(stage, "cold"):
            assert now() - asked < 12
        await passes(20)
    for task in load:
        task.cancel()


@virtual
async def test_models_that_share_several_gpus_spread_over_them() -> None:
    """One that sleeps will want its GPU again."""
    stage = Stage(Gpus(count=2))
    await asleep(stage, "a")
    for name in ("b", "a", "b", "a"):
        if name == "b" and len(stage.launcher.engines) == 1:
            begun(stage, model("b", keys={"sleep": 1}))
        with await answered(stage, name):
            pass
    assert [[*engine.place.allocation.takes] for engine in stage.launcher.engines] == [["0"], ["1"]]
    assert stage.nap.done == ["a/0 sleeps", "a/0 wakes"]


@virtual
async def test_a_sleeper_behind_a_busy_model_is_started_on_a_free_gpu() -> None:
    """Where that is sooner; nobody gives way."""
    stage = Stage(Gpus(count=2))
    stage.kept.seconds["code"] = [10.0] * 9
    code = await asleep(stage, "code")
    busy = begun(stage, model("busy", keys={"devices": [0]}))
    running = await answered(stage, "busy")
    asked = now()
    with await answered(stage, "code"):
        assert now() - asked < 5
    assert (busy.state, [*engine_of(stage, "code").place.allocation.takes]) == (State.READY, ["1"])
    assert code.message is None
    running.__exit__()
