"""One model does what is wanted of it: by the file, by hand, by requests that wait. In virtual time."""

import asyncio
from dataclasses import replace
from typing import cast

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, VirtualLoop, model, now, passes, settle, virtual
from vllm_proxy.domain.config import EngineSpec, ModelSpec, Restart
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.model import Model
from vllm_proxy.runtime import clock


def begun(stage: Stage, spec: ModelSpec) -> Model:
    """A model that follows what is wanted, its route told of each change, as the reconciler does it."""

    def changed(found: Model) -> None:
        message, waits = found.diagnosis.message if found.diagnosis else None, found.waits
        room = (None, None, None) if waits is None else (waits.because, waits.no_room, waits.ready_in)
        stage.registry.report_room(spec.id, *room)
        stage.registry.report(spec.id, found.state, message, stopped_by_hand=found.stopped_by_hand)
        stage.moved()

    made = Model(spec, stage.shared, stage.history(), changed)
    stage.registry.declare(spec, made.request)
    made.begin({})
    return made


async def serving(stage: Stage, chat: Model) -> None:
    """Every engine that is started becomes ready, until all instances are."""

    def all_ready() -> bool:
        for engine in stage.launcher.engines:
            engine.listens = engine.reaped_at is None and not engine.exited.done()
        return bool(chat.instances) and all(one.state is State.READY for one in chat.instances)

    await stage.until(all_ready)
    await settle()


async def code_of(stage: Stage) -> str:
    """How a request is refused."""
    with pytest.raises(RequestError) as refused:
        await stage.registry.acquire("chat")
    return refused.value.code


# On demand


@virtual
async def test_an_on_demand_model_sleeps_until_its_first_request() -> None:
    """No time starts it; the first request does, and later ones join the same start."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand"))
    await passes(10_000)
    assert (chat.state, chat.stopped_by_hand, chat.diagnosis, stage.launcher.engines) == (
        State.STOPPED,
        False,
        None,
        [],
    )
    requests = [asyncio.create_task(stage.registry.acquire("chat")) for _ in range(3)]
    engine = await stage.engine()
    assert chat.state is State.LOADING
    engine.listens = True
    leases = await asyncio.gather(*requests)
    assert {lease.endpoint.address for lease in leases} == {engine.place.address}
    assert len(stage.launcher.engines) == 1


@virtual
async def test_an_on_demand_model_is_unloaded_when_nobody_asked_for_it_long_enough() -> None:
    """The time counts from the end of its last request, and the next one starts it again."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", idle_timeout=100))
    request = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine()).listens = True
    with await request:
        await passes(1000)
        assert chat.state is State.READY, "a request in flight is use"
    ended = now()
    await passes(50)
    with await stage.registry.acquire("chat"):
        pass
    await stage.until(lambda: chat.state is State.STOPPED)
    assert now() == pytest.approx(ended + 150)
    again = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine(2)).listens = True
    with await again:
        pass


@virtual
async def test_an_idle_timeout_of_zero_never_unloads() -> None:
    """Started by a request, it stays."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", idle_timeout=0))
    request = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine()).listens = True
    with await request:
        pass
    await passes(100_000)
    assert chat.state is State.READY


@virtual
async def test_a_model_that_is_always_on_has_no_idle_timeout() -> None:
    """The key is for on-demand models alone."""
    stage = Stage()
    chat = begun(stage, model(idle_timeout=10))
    await serving(stage, chat)
    await passes(1000)
    assert chat.state is State.READY


@virtual
async def test_a_request_that_comes_while_the_model_goes_to_sleep_waits_and_is_served() -> None:
    """The unloading ends, and what it unloaded is started again: nobody is refused."""
    stage = Stage()
    stage.launcher.teardown_seconds = 30
    chat = begun(stage, model(start="on-demand", idle_timeout=100))
    request = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine()).listens = True
    with await request:
        pass
    await stage.until(lambda: chat.state is State.UNLOADING)
    late = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine(2)).listens = True
    assert (await late).endpoint.address == stage.launcher.engines[1].place.address


@virtual
async def test_a_client_that_gives_up_leaves_the_start_to_the_others() -> None:
    """The start it caused goes on; unused, the model goes to sleep again."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", idle_timeout=100))
    request = asyncio.create_task(stage.registry.acquire("chat"))
    engine = await stage.engine()
    request.cancel()
    await passes(50)
    assert engine.reaped_at is None
    engine.listens = True
    await stage.until(lambda: chat.state is State.READY)
    await stage.until(lambda: chat.state is State.STOPPED)


@virtual
async def test_an_on_demand_model_that_cannot_start_tells_every_request_why() -> None:
    """It rests in error, is not unloaded into silence, and a hand starts it again."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", idle_timeout=10))
    request = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine()).die(2)
    with pytest.raises(RequestError) as refused:
        await request
    assert refused.value.code == "model_error"
    await passes(10_000)
    assert (chat.state, await code_of(stage), len(stage.launcher.engines)) == (State.ERROR, "model_error", 1)
    chat.start()
    (await stage.engine(2)).listens = True
    await stage.until(lambda: chat.state is State.READY)


# By hand


@virtual
async def test_a_model_stopped_by_hand_rests_and_says_so() -> None:
    """Requests in flight end, those that come are refused at once, and no time starts it."""
    stage = Stage()
    chat = begun(stage, model(drain_timeout=60))
    await serving(stage, chat)
    with await stage.registry.acquire("chat"):
        await chat.stop()
        assert await code_of(stage) == "model_stopped", "as soon as the hand has its answer"
        await passes(30)
        assert (chat.state, stage.launcher.engines[0].reaped_at) == (State.UNLOADING, None)
    await stage.until(lambda: chat.state is State.STOPPED)
    await passes(10_000)
    assert chat.diagnosis is not None
    assert (chat.diagnosis.reason, len(stage.launcher.engines)) == (Reason.STOPPED_BY_HAND, 1)


@virtual
async def test_an_on_demand_model_stopped_by_hand_is_not_woken() -> None:
    """A hand is stronger than a request; a start by hand lets requests in again."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand"))
    chat.stop()
    await settle()
    assert await code_of(stage) == "model_stopped"
    assert stage.launcher.engines == []
    chat.start()
    await serving(stage, chat)
    with await stage.registry.acquire("chat"):
        pass


@virtual
async def test_start_by_hand_wakes_what_rests_in_error_and_leaves_the_rest_alone() -> None:
    """The ready instance keeps its engine."""
    stage = Stage()
    chat = begun(stage, model(replicas=2, restart=Restart(max_failures=1)))
    (await stage.engine(2)).die()
    stage.launcher.engines[0].listens = True
    await stage.until(lambda: {one.state for one in chat.instances} == {State.READY, State.ERROR})
    chat.start()
    (await stage.engine(3)).listens = True
    await serving(stage, chat)
    assert (len(stage.launcher.engines), stage.launcher.engines[0].reaped_at) == (3, None)


@virtual
async def test_a_start_of_what_runs_changes_nothing() -> None:
    """Neither a ready engine nor a loading one is touched."""
    stage = Stage()
    chat = begun(stage, model())
    chat.start()
    await passes(10)
    chat.start()
    await serving(stage, chat)
    chat.start()
    await passes(10)
    assert (len(stage.launcher.engines), stage.launcher.engines[0].reaped_at) == (1, None)


@virtual
async def test_restart_takes_one_instance_after_another() -> None:
    """The second goes when the first is ready again, so that somebody always serves."""
    stage = Stage()
    chat = begun(stage, model(replicas=2))
    await serving(stage, chat)
    chat.restart()
    third = await stage.engine(3)
    await passes(100)
    assert [one.state for one in chat.instances] == [State.LOADING, State.READY]
    assert len(stage.launcher.engines) == 3
    third.listens = True
    (await stage.engine(4)).listens = True
    await serving(stage, chat)
    assert all(engine.reaped_at is not None for engine in stage.launcher.engines[:2])
    await passes(100)
    assert len(stage.launcher.engines) == 4


@virtual
async def test_restart_goes_on_with_the_next_instance_when_one_does_not_come_up() -> None:
    """What rests in error is not waited for."""
    stage = Stage()
    chat = begun(stage, model(replicas=2, restart=Restart(max_failures=1)))
    await serving(stage, chat)
    chat.restart()
    (await stage.engine(3)).die()
    (await stage.engine(4)).listens = True
    await stage.until(lambda: [one.state for one in chat.instances] == [State.ERROR, State.READY])


@virtual
async def test_a_stop_in_the_middle_of_a_restart_ends_it() -> None:
    """The last word counts: nothing is started behind it."""
    stage = Stage()
    chat = begun(stage, model(replicas=2))
    await serving(stage, chat)
    chat.restart()
    await stage.engine(3)
    chat.stop()
    await stage.until(lambda: chat.state is State.STOPPED)
    await passes(1000)
    assert (len(stage.launcher.engines), chat.stopped_by_hand) == (3, True)


@virtual
async def test_a_start_while_it_stops_starts_it_when_it_has_stopped() -> None:
    """The stop goes to its end first; nothing is lost."""
    stage = Stage()
    stage.launcher.teardown_seconds = 20
    chat = begun(stage, model())
    await serving(stage, chat)
    chat.stop()
    await stage.until(lambda: chat.state is State.UNLOADING)
    chat.start()
    second = await stage.engine(2)
    assert stage.launcher.engines[0].reaped_at is not None
    assert second.born >= stage.launcher.engines[0].reaped_at
    await serving(stage, chat)


@virtual
async def test_restart_of_a_model_that_rests_starts_it() -> None:
    """As `systemctl restart` does."""
    stage = Stage()
    chat = begun(stage, model())
    await serving(stage, chat)
    chat.stop()
    await stage.until(lambda: chat.state is State.STOPPED)
    chat.restart()
    await serving(stage, chat)
    assert len(stage.launcher.engines) == 2


# The end


@virtual
async def test_the_end_is_the_last_word() -> None:
    """What is wanted behind it is not done: nothing runs when `end` returns, and nothing starts."""
    stage = Stage()
    stage.launcher.teardown_seconds = 5
    chat = begun(stage, model())
    await serving(stage, chat)
    ending = chat.end(keep=False)
    await settle()
    chat.start()
    chat.restart()
    await ending
    await passes(1000)
    assert (chat.state, len(stage.launcher.engines)) == (State.STOPPED, 1)


@virtual
async def test_the_end_in_the_middle_of_a_drain_by_hand_waits_for_it() -> None:
    """Both want it gone, and it goes once."""
    stage = Stage()
    chat = begun(stage, model(drain_timeout=60))
    await serving(stage, chat)
    with await stage.registry.acquire("chat"):
        chat.stop()
        await passes(10)
        ending = chat.end(keep=False)
        await passes(10)
        assert not ending.done()
    await ending
    assert chat.state is State.STOPPED


@virtual
async def test_a_crash_while_it_is_restarted_is_nothing_to_the_restart() -> None:
    """A failed engine is started again by its supervisor; the restart waits until it serves."""
    stage = Stage()
    chat = begun(stage, model(replicas=2))
    await serving(stage, chat)
    chat.restart()
    (await stage.engine(3)).die()
    await stage.until(lambda: chat.instances[0].phase is Phase.BACKOFF)
    await passes(0.1)
    assert chat.instances[1].state is State.READY
    (await stage.engine(4)).listens = True
    (await stage.engine(5)).listens = True
    await serving(stage, chat)


@virtual
async def test_a_bug_while_a_model_follows_does_not_keep_it_from_later_events() -> None:
    """An engine that cannot be ended is told in the log; the model still stops and starts."""
    stage = Stage()
    chat = begun(stage, model())
    await serving(stage, chat)
    stage.launcher.teardown_error = RuntimeError("a bug")
    with capture_logs():
        chat.stop()
        await stage.until(lambda: chat.state is State.STOPPED)
    stage.launcher.teardown_error = None
    chat.start()
    await serving(stage, chat)


@virtual
async def test_a_bug_in_the_check_of_a_change_does_not_keep_a_model_from_later_events() -> None:
    """What could not be checked is tried, as if nothing were known against it; the next change is checked again."""
    stage = Stage()
    chat = begun(stage, model())
    await serving(stage, chat)
    stage.launcher.objection_error = RuntimeError("can't start new thread")
    with capture_logs() as logs:
        chat.adopt_spec(replace(chat.spec, engine=EngineSpec(model="other/model")))
        (await stage.engine(2)).listens = True
        await serving(stage, chat)
    assert stage.launcher.engines[1].spec == EngineSpec(model="other/model")
    assert [entry["task"] for entry in logs if entry["event"] == "a background task failed"] == ["check of chat"]
    stage.launcher.objection_error = None
    stage.launcher.known_objection = Diagnosis(Reason.INVALID_ARGUMENTS, "no")
    with capture_logs():
        chat.adopt_spec(replace(chat.spec, engine=EngineSpec(model="third/model")))
        await stage.until(lambda: chat.diagnosis is not None)
    assert len(stage.launcher.engines) == 2


@virtual
async def test_a_bug_in_what_counts_idle_time_does_not_end_the_model() -> None:
    """It is looked at again soon, and follows what is wanted of it as before."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", idle_timeout=100))
    route = stage.registry.find("chat")
    request = asyncio.create_task(stage.registry.acquire("chat"))
    (await stage.engine()).listens = True
    with await request:
        pass
    with capture_logs() as logs:
        route.idle_since = cast("float", None)
        stage.loop.changed(chat)
        await passes(10)
        route.idle_since = now()
        await stage.until(lambda: chat.state is State.STOPPED)
    failed = [entry["model"] for entry in logs if entry["event"] == "a model could not be looked at"]
    assert set(failed) == {"chat"}


# What the fleet loop makes of it


@virtual
async def test_a_request_that_may_not_wait_starts_its_model_all_the_same() -> None:
    """A queue of no size refuses it; the next one finds a model that loads, and then one that serves."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", queue_size=0))
    assert await code_of(stage) == "queue_full"
    await serving(stage, chat)
    with await stage.registry.acquire("chat"):
        pass


@virtual
async def test_a_stop_by_hand_beside_a_request_is_the_last_word() -> None:
    """In either order, before anything was decided: the request is refused, and nothing starts."""
    for hand_first in (True, False):
        stage = Stage()
        chat = begun(stage, model(start="on-demand"))
        await settle()
        if hand_first:
            chat.stop()
        request = asyncio.create_task(stage.registry.acquire("chat"))
        await asyncio.sleep(0)
        if not hand_first:
            chat.stop()
        with pytest.raises(RequestError) as refused:
            await request
        assert refused.value.code == "model_stopped"
        await passes(100)
        assert (stage.launcher.engines, chat.stopped_by_hand) == ([], True)


@virtual
async def test_a_machine_that_stood_still_unloads_nobody() -> None:
    """Nobody could have asked meanwhile: the time counts anew from then on."""
    stage = Stage()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    with clock.Pulse():
        chat = begun(stage, model(start="on-demand", idle_timeout=100))
        chat.start()
        await serving(stage, chat)
        await passes(50)
        with capture_logs():
            loop.jump(10_000)
            went_on = now()
            await stage.until(lambda: chat.state is State.STOPPED)
    assert now() == pytest.approx(went_on + 100, abs=1)


@virtual
async def test_a_start_that_waits_for_another_says_for_whom_as_long_as_it_waits() -> None:
    """No failure is made of it, and nothing is said any more of one that is stopped or serves."""
    stage = Stage()
    first, other = model("first", devices=(0,)), model("other", devices=(0, 1))
    begun(stage, first)
    waits = begun(stage, other)
    await stage.engine()
    await settle()
    (instance,) = waits.instances
    assert (instance.phase, instance.waiting_because) == (Phase.QUEUED, "waits: first/0 loads on what it needs")
    assert (waits.diagnosis, waits.state) == (None, State.LOADING)
    waits.stop()
    await stage.until(lambda: waits.state is State.STOPPED)
    assert instance.waiting_because is None
    waits.start()
    await settle()
    (instance,) = waits.instances
    assert instance.waiting_because is not None
    stage.launcher.engines[0].listens = True
    await stage.engine(2)
    assert instance.waiting_because is None


@virtual
async def test_a_failure_without_a_pause_is_in_the_log_too() -> None:
    """With `backoff = 0` the next start comes at once."""
    stage = Stage()
    chat = begun(stage, model(restart=Restart(backoff=0)))
    with capture_logs() as logs:
        (await stage.engine()).die()
        await serving(stage, chat)
    assert [entry["seconds"] for entry in logs if entry["event"] == "the engine failed and is started again"] == [0]


@virtual
async def test_a_model_ends_though_a_bug_keeps_it_from_being_decided_about() -> None:
    """A daemon that stops does not wait for ever, and leaves no engine behind."""
    stage = Stage()
    chat = begun(stage, model(replicas=2))
    await serving(stage, chat)
    with capture_logs():
        chat.now = None  # type: ignore[assignment,method-assign]
        await chat.end(keep=False)
    assert [engine.reaped_at is not None for engine in stage.launcher.engines] == [True, True]
    assert chat.state is State.STOPPED


@virtual
async def test_a_bug_in_what_is_carried_out_is_tried_again_and_loses_no_request() -> None:
    """Nothing else would make the loop look at that model again."""
    stage = Stage()
    chat = begun(stage, model(start="on-demand", queue_size=0))
    await settle()
    real, chat._follow = chat._follow, None  # type: ignore[assignment,method-assign]
    with capture_logs():
        assert await code_of(stage) == "queue_full"
        await passes(3)
    chat._follow = real  # type: ignore[method-assign]
    await stage.engine()


@virtual
async def test_a_model_that_ends_is_not_checked_any_more() -> None:
    """A check that comes to its end behind it would speak for a model that is gone."""
    stage = Stage()
    chat = begun(stage, model())
    await serving(stage, chat)
    checked: list[str] = []

    async def slow(model: ModelSpec) -> None:
        await passes(60)
        checked.append(model.id)

    stage.launcher.objection = slow  # type: ignore[method-assign]
    chat.adopt_spec(replace(chat.spec, engine=EngineSpec(model="other/model")))
    await passes(1)
    await chat.end(keep=False)
    await passes(100)
    assert checked == []
