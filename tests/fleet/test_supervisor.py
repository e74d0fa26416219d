"""The life of one instance, in virtual time, between a fake launcher and a fake probe."""

import asyncio
import errno

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import FakeTenant, Stage, model, now, passes, settle, virtual
from vllm_proxy.domain.config import Restart
from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.supervisor import Supervisor


def reason(supervisor: Supervisor) -> Reason:
    """Why it is not ready."""
    assert supervisor.diagnosis is not None
    return supervisor.diagnosis.reason


async def fail(stage: Stage, count: int) -> None:
    """Let the engines up to number `count` die as soon as they are started."""
    for number in range(1, count + 1):
        engine = await stage.engine(number)
        if not engine.exited.done():
            engine.die()


@virtual
async def test_a_started_instance_becomes_ready_and_opens_an_endpoint() -> None:
    """It is loading until the engine proves itself; then requests reach its port with its credential."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.engine()
    await passes(30)
    assert (chat.state, chat.phase, chat.ready_at) == (State.LOADING, Phase.IMPORTING, None)
    engine.listens = True
    await stage.until(lambda: chat.state is State.READY)
    await settle()
    lease = await stage.registry.acquire("chat")
    assert (lease.endpoint.instance, lease.endpoint.address.port, lease.endpoint.credential) == (
        "chat/0",
        9000,
        "secret",
    )
    assert lease.endpoint.max_model_len == 8192
    assert chat.endpoint is lease.endpoint
    assert [moment[:2] for moment in stage.shown] == [
        (State.LOADING, None), (State.LOADING, Phase.QUEUED), (State.LOADING, Phase.IMPORTING),
        (State.LOADING, Phase.IMPORTING), (State.READY, Phase.SERVING),
    ]  # fmt: skip


@virtual
async def test_a_waiting_request_is_served_when_the_engine_is_ready() -> None:
    """A request that came while the model loaded gets the endpoint as it opens."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    request = asyncio.create_task(stage.registry.acquire("chat"))
    engine = await stage.serving(chat)
    assert (await request).endpoint.address == engine.place.address


@virtual
async def test_a_death_while_serving_withdraws_the_route_before_anything_else() -> None:
    """Nobody is told of a death, and nothing is cleaned up, while the route is still open."""
    stage = Stage()
    stage.launcher.teardown_seconds = 7
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.serving(chat)
    shown = len(stage.shown)
    engine.die()
    await stage.until(lambda: chat.state is State.LOADING)
    assert set(stage.shown[shown:]) == {(State.LOADING, Phase.STOPPING, 0)}
    assert engine.reaped_at is None
    assert chat.endpoint is None


@virtual
async def test_a_death_while_serving_is_started_again_after_the_backoff() -> None:
    """A crash is told with its last lines, shown as loading in backoff, and mended by a new engine."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(backoff=8)))
    chat.start()
    first = await stage.serving(chat)
    first.output.lines += ["loading", "RuntimeError: no luck"]
    died = now()
    first.die(1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert (chat.state, reason(chat), chat.engine) == (State.LOADING, Reason.CRASHED, None)
    assert first.reaped_at == died
    assert chat.last_exit is not None
    assert (chat.last_exit.ended, chat.last_exit.log_tail[-1]) == (Exit(1, None), "RuntimeError: no luck")
    second = await stage.engine(2)
    assert died + 6 <= second.born <= died + 8
    await stage.serving(chat)
    assert chat.restarts == 1
    assert chat.last_exit.ended == Exit(1, None), "the last exit is kept for whoever looks later"


@virtual
async def test_an_exit_with_code_zero_is_a_failure_too() -> None:
    """VLLM exits 0 when it dies: nobody asked for that."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    (await stage.serving(chat)).die(0)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert reason(chat) is Reason.CRASHED


@pytest.mark.parametrize("code", [2, 127])
@virtual
async def test_an_exit_code_that_means_a_wrong_start_means_a_crash_later(code: int) -> None:
    """An engine that served once had good options: it is started again."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    (await stage.serving(chat)).die(code)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert reason(chat) is Reason.CRASHED
    await stage.serving(chat)


@virtual
async def test_the_backoff_doubles_up_to_its_maximum() -> None:
    """1, 2, 4, 8, then 10 seconds, less at most a quarter of jitter."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=8, backoff=1, max_backoff=10)))
    chat.start()
    for number, seconds in enumerate([1, 2, 4, 8, 10, 10], start=1):
        (await stage.engine(number)).die()
        died = now()
        waited = (await stage.engine(number + 1)).born - died
        assert seconds * 0.75 <= waited <= seconds


@virtual
async def test_after_max_failures_it_rests_in_error() -> None:
    """Three allowed failures are three engines, and no time brings a fourth."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=3)))
    chat.start()
    await fail(stage, 3)
    await stage.until(lambda: chat.state is State.ERROR)
    assert (chat.phase, reason(chat), chat.restarts) == (None, Reason.CRASHED, 2)
    with pytest.raises(RequestError) as refused:
        await stage.registry.acquire("chat")
    assert refused.value.code == "model_error"
    await passes(100_000)
    assert (chat.state, len(stage.launcher.engines)) == (State.ERROR, 3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(2, Reason.INVALID_ARGUMENTS), (126, Reason.COMMAND_NOT_FOUND), (127, Reason.COMMAND_NOT_FOUND)],
)
@virtual
async def test_what_no_retry_can_mend_rests_at_once(code: int, expected: Reason) -> None:
    """Options that vLLM refuses and a command that cannot run are tried once."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    (await stage.engine()).die(code)
    await stage.until(lambda: chat.state is State.ERROR)
    assert (reason(chat), chat.restarts, chat.engine) == (expected, 0, None)


@virtual
async def test_a_launch_that_finds_no_command_rests_at_once() -> None:
    """Where there is no vLLM there is no engine, no retry, and a sentence."""
    stage = Stage()
    stage.launcher.refusal = LaunchError(Reason.COMMAND_NOT_FOUND, "cannot find vLLM")
    chat = stage.supervisor(model())
    chat.start()
    await stage.until(lambda: chat.state is State.ERROR)
    assert chat.diagnosis == stage.launcher.refusal.diagnosis
    assert chat.last_exit is None


@virtual
async def test_a_launch_that_fails_for_another_reason_is_tried_again() -> None:
    """No port now may be a port later."""
    stage = Stage()
    stage.launcher.refusal = LaunchError(Reason.PORT_IN_USE, "cannot find a free port")
    chat = stage.supervisor(model())
    chat.start()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    stage.launcher.refusal = None
    await stage.serving(chat)
    assert chat.restarts == 1


@virtual
async def test_a_machine_that_lacks_something_costs_no_model_however_long_it_takes() -> None:
    """No processes, no room on a disk: it starts once there are again, and its own failures are counted apart."""
    stage = Stage()
    stage.launcher.refusal = LaunchError.of(BlockingIOError(errno.EAGAIN, "Resource unavailable"), "start a process")
    chat = stage.supervisor(model(restart=Restart(max_failures=2, backoff=1, max_backoff=10)))
    chat.start()
    await passes(100)
    assert (chat.state, chat.phase, reason(chat)) == (State.LOADING, Phase.BACKOFF, Reason.CRASHED)
    assert chat.diagnosis is not None
    assert chat.diagnosis.message.endswith("processes are limited by TasksMax= of the unit, or by ulimit -u")
    assert 10 < chat.restarts < 20, "at most ten seconds between two tries"
    stage.launcher.refusal = None
    await fail(stage, 1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    await stage.serving(chat)


@virtual
async def test_failures_are_forgiven_after_a_quiet_stretch() -> None:
    """An engine that served for longer than max_backoff starts a new row of failures."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=2, backoff=1, max_backoff=10)))
    chat.start()
    await fail(stage, 1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    engine = await stage.serving(chat)
    await passes(10.5)
    engine.die()
    died = now()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert (await stage.engine(3)).born - died <= 1, "the backoff is the first one again"


@virtual
async def test_failures_are_not_forgiven_for_a_short_stretch() -> None:
    """An engine that serves for a moment between two crashes does not make an endless row of restarts."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=2, backoff=1, max_backoff=10)))
    chat.start()
    await fail(stage, 1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    engine = await stage.serving(chat)
    await passes(9.5)
    engine.die()
    await stage.until(lambda: chat.state is State.ERROR)
    assert len(stage.launcher.engines) == 2


@virtual
async def test_startup_timeout_counts_the_time_without_output() -> None:
    """An engine that writes every minute may load for long; one that falls silent is ended and tried again."""
    stage = Stage()
    chat = stage.supervisor(model(startup_timeout=70))
    chat.start()
    engine = await stage.engine()
    for minute in range(4):
        await passes(60)
        engine.output.lines.append(f"loading {minute}")
    spoke = now()
    assert engine.reaped_at is None
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert reason(chat) is Reason.STARTUP_TIMEOUT
    assert engine.reaped_at == pytest.approx(spoke + 70, abs=0.2)


@virtual
async def test_a_start_after_an_error_has_all_its_tries_again() -> None:
    """Who starts a resting instance by hand gets max_failures tries, not one."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=2)))
    chat.start()
    await fail(stage, 2)
    await stage.until(lambda: chat.state is State.ERROR)
    chat.start()
    (await stage.engine(3)).die()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    await stage.serving(chat)


@virtual
async def test_stop_works_while_it_waits_for_its_device() -> None:
    """A queued instance leaves the line; who comes behind it is not held up."""
    stage = Stage()
    first, second, third = (stage.supervisor(model(name, devices=(0,))) for name in ("first", "second", "third"))
    for supervisor in (first, second, third):
        supervisor.start()
    await stage.engine()
    await second.stop()
    assert (second.state, second.phase) == (State.STOPPED, None)
    await stage.serving(first)
    assert (await stage.engine(2)).place.instance == "third/0"


@virtual
async def test_stop_works_before_its_task_ever_ran() -> None:
    """Start and stop in the same step leave nothing behind."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    await chat.stop()
    assert (chat.state, stage.launcher.engines) == (State.STOPPED, [])


@virtual
async def test_stop_works_while_it_loads() -> None:
    """The engine is ended and the device is free."""
    stage = Stage()
    stage.launcher.teardown_seconds = 5
    chat = stage.supervisor(model(devices=(0,)))
    chat.start()
    engine = await stage.engine()
    await chat.stop()
    assert (chat.state, engine.reaped_at, chat.engine) == (State.STOPPED, 5, None)
    await stage.loop.room.ask(FakeTenant("other/0", "0")).admission()
    assert now() == 5


@virtual
async def test_stop_works_in_the_backoff() -> None:
    """Nothing is started any more."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    await fail(stage, 1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    await chat.stop()
    await passes(1000)
    assert (chat.state, len(stage.launcher.engines)) == (State.STOPPED, 1)


@virtual
async def test_stop_works_when_it_serves() -> None:
    """With nothing in flight the engine is ended at once, behind its closed route."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.serving(chat)
    ready = now()
    await chat.stop()
    assert (chat.state, engine.reaped_at, chat.endpoint) == (State.STOPPED, ready, None)
    assert stage.shown[-1] == (State.STOPPED, None, 0)


@virtual
async def test_stop_works_in_error() -> None:
    """What rests in error becomes stopped."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    (await stage.engine()).die(2)
    await stage.until(lambda: chat.state is State.ERROR)
    await chat.stop()
    assert chat.state is State.STOPPED


@virtual
async def test_stop_waits_for_the_end_of_a_dead_engine() -> None:
    """A stop that comes while a crashed engine's leftovers are ended does not leave them alive."""
    stage = Stage()
    stage.launcher.teardown_seconds = 20
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.serving(chat)
    engine.die()
    died = now()
    await stage.until(lambda: chat.phase is Phase.STOPPING)
    await chat.stop()
    assert (chat.state, engine.reaped_at) == (State.STOPPED, died + 20)
    assert len(stage.launcher.engines) == 1


@virtual
async def test_a_stopped_instance_can_be_started_again() -> None:
    """Stop is no end: a new start gives a new engine."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    await stage.serving(chat)
    await chat.stop()
    chat.start()
    await stage.serving(chat)
    assert len(stage.launcher.engines) == 2


@virtual
async def test_drain_waits_for_the_requests_in_flight() -> None:
    """No new request gets in, the running one ends in peace, and then the engine goes."""
    stage = Stage()
    chat = stage.supervisor(model(drain_timeout=60))
    chat.start()
    engine = await stage.serving(chat)
    ready = now()
    with await stage.registry.acquire("chat"):
        stopping = chat.stop()
        await settle()
        assert (chat.state, chat.phase) == (State.UNLOADING, Phase.DRAINING)
        assert stage.registry.find("chat").endpoints == []
        assert stage.registry.counts("chat") == (1, 0), "a draining request is still in flight"
        await passes(40)
        assert engine.reaped_at is None
    await stopping
    assert engine.reaped_at == pytest.approx(ready + 40)
    assert (State.UNLOADING, Phase.STOPPING, 0) in stage.shown


@virtual
async def test_drain_ends_at_its_timeout() -> None:
    """A request that never ends holds an engine for drain_timeout and no longer."""
    stage = Stage()
    chat = stage.supervisor(model(drain_timeout=60))
    chat.start()
    engine = await stage.serving(chat)
    ready = now()
    with await stage.registry.acquire("chat"):
        await chat.stop()
    assert engine.reaped_at == pytest.approx(ready + 60)


@virtual
async def test_hurry_cuts_a_drain_short() -> None:
    """A second signal means: now."""
    stage = Stage()
    chat = stage.supervisor(model(drain_timeout=60))
    chat.start()
    engine = await stage.serving(chat)
    ready = now()
    with await stage.registry.acquire("chat"):
        stopping = chat.stop()
        await passes(3)
        stage.shared.skip_drain.set()
        await stopping
    assert engine.reaped_at == pytest.approx(ready + 3)


@virtual
async def test_nobody_drains_a_dead_engine() -> None:
    """An engine that dies while it drains is not waited for: its requests are lost already."""
    stage = Stage()
    chat = stage.supervisor(model(drain_timeout=60))
    chat.start()
    engine = await stage.serving(chat)
    ready = now()
    with await stage.registry.acquire("chat"):
        stopping = chat.stop()
        await passes(3)
        engine.die()
        await stopping
    assert chat.state is State.STOPPED
    assert engine.reaped_at == pytest.approx(ready + 3)


@virtual
async def test_the_gate_is_held_until_ready() -> None:
    """Of two engines on one GPU the second starts when the first is ready; one elsewhere starts at once."""
    stage = Stage()
    first, second = stage.supervisor(model("a", devices=(0,))), stage.supervisor(model("b", devices=(0, 1)))
    other = stage.supervisor(model("c", devices=(2,)))
    for supervisor in (first, second, other):
        supervisor.start()
    await passes(100)
    assert [engine.place.instance for engine in stage.launcher.engines] == ["a/0", "c/0"]
    assert (second.state, second.phase) == (State.LOADING, Phase.QUEUED)
    stage.launcher.engines[0].listens = True
    await stage.until(lambda: second.engine is not None)
    assert first.state is State.READY


@virtual
async def test_the_gate_is_free_when_a_start_failed_and_its_engine_is_gone() -> None:
    """The next one measures the GPU behind the last process of the failed one, not beside it."""
    stage = Stage()
    stage.launcher.teardown_seconds = 5
    first, second = stage.supervisor(model("a", devices=(0,))), stage.supervisor(model("b", devices=(0,)))
    first.start()
    second.start()
    failed = await stage.engine()
    failed.die()
    await stage.until(lambda: second.engine is not None)
    assert stage.launcher.engines[1].born == failed.reaped_at == 5


@virtual
async def test_a_bug_in_the_probe_becomes_an_error_and_touches_nobody_else() -> None:
    """The instance rests, its engine is ended, the other model serves on."""
    stage = Stage()
    chat, other_model = stage.supervisor(model()), stage.supervisor(model("embed"))
    other_model.start()
    await stage.serving(other_model)
    stage.probe.error = RuntimeError("a bug")
    chat.start()
    with capture_logs() as logs:
        await stage.until(lambda: chat.state is State.ERROR)
    assert [entry["instance"] for entry in logs if entry["event"] == "the supervisor failed"] == ["chat/0"]
    assert (reason(chat), stage.launcher.engines[1].reaped_at) == (Reason.CRASHED, now())
    assert other_model.state is State.READY
    await chat.stop()


@virtual
async def test_a_bug_in_the_clean_up_of_a_stop_does_not_keep_it_from_stopping() -> None:
    """Whatever fails while an engine is ended, stop returns and the instance is stopped."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    await stage.serving(chat)
    stage.launcher.teardown_error = RuntimeError("a bug")
    with capture_logs():
        await chat.stop()
    assert chat.state is State.STOPPED
    assert chat._task is not None
    assert chat._task.exception() is None, "the bug is in the log, and does not surface a second time"


@virtual
async def test_who_gives_up_waiting_for_a_stop_does_not_cut_it() -> None:
    """The request in flight keeps its engine, and then the engine goes."""
    stage = Stage()
    chat = stage.supervisor(model(drain_timeout=60))
    chat.start()
    engine = await stage.serving(chat)
    with await stage.registry.acquire("chat"):
        stopping = chat.stop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.shield(stopping)
        await passes(10)
        assert engine.reaped_at is None
    await stopping
    assert engine.reaped_at == now()
    assert chat.state is State.STOPPED


@virtual
async def test_a_start_waits_for_what_leaves_its_device() -> None:
    """vLLM refuses to go on when memory is set free while it measures; a start elsewhere does not wait."""
    stage = Stage()
    stage.launcher.teardown_seconds = 20
    old, new = stage.supervisor(model("old", devices=(0,))), stage.supervisor(model("new", devices=(0, 1)))
    other = stage.supervisor(model("other", devices=(2,)))
    old.start()
    await stage.serving(old)
    left = now()
    stopping = old.stop()
    new.start()
    other.start()
    await stage.until(lambda: new.engine is not None)
    await stopping
    born = {engine.place.instance: engine.born - left for engine in stage.launcher.engines}
    assert (born["new/0"], born["other/0"]) == (20, 0)


@virtual
async def test_a_refused_option_is_told_with_the_one_that_was_meant() -> None:
    """Though the options were not known when the engine was started."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.engine()
    engine.output.lines.append("vllm serve: error: unrecognized arguments: --sead 3")
    engine.die(2)
    await stage.until(lambda: chat.state is State.ERROR)
    assert chat.diagnosis is not None
    assert "did you mean seed?" in chat.diagnosis.message


# Engines that cannot be ended


@virtual
async def test_what_cannot_be_ended_keeps_its_instance_unloading_until_it_is_gone() -> None:
    """It says why, stays there as long as that takes, and stops by itself."""
    stage = Stage()
    stage.launcher.unkillable["chat/0"] = "process 7 survives"
    chat = stage.supervisor(model())
    chat.start()
    await stage.serving(chat)
    stopping = chat.stop()
    await passes(10_000)
    assert (chat.state, chat.phase, reason(chat)) == (State.UNLOADING, Phase.STOPPING, Reason.NOT_ENDED)
    assert chat.diagnosis is not None
    assert "process 7 survives" in chat.diagnosis.message
    assert not stopping.done()
    stage.launcher.unkillable.clear()
    await stopping
    assert chat.state is State.STOPPED
    assert not stage.loop.room.not_ended()


@virtual
async def test_a_crash_whose_rest_cannot_be_ended_is_no_start_until_it_is_gone() -> None:
    """It loads in phase stopping; then it says again why it crashed, and starts."""
    stage = Stage()
    stage.launcher.unkillable["chat/0"] = "process 7 survives"
    chat = stage.supervisor(model(restart=Restart(backoff=5)))
    chat.start()
    (await stage.serving(chat)).die()
    await passes(10_000)
    assert (chat.state, chat.phase, reason(chat)) == (State.LOADING, Phase.STOPPING, Reason.NOT_ENDED)
    assert len(stage.launcher.engines) == 1
    stage.launcher.unkillable.clear()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert reason(chat) is Reason.CRASHED
    await stage.serving(chat)
    assert chat.diagnosis is None


@virtual
async def test_a_stop_of_what_cannot_be_ended_after_a_crash_waits_for_it() -> None:
    """The reason stays, and the stop ends with the engine."""
    stage = Stage()
    stage.launcher.unkillable["chat/0"] = "process 7 survives"
    chat = stage.supervisor(model())
    chat.start()
    (await stage.serving(chat)).die()
    await stage.until(lambda: chat.diagnosis is not None and reason(chat) is Reason.NOT_ENDED)
    stopping = chat.stop()
    await passes(1000)
    assert (chat.state, chat.phase, reason(chat)) == (State.UNLOADING, Phase.STOPPING, Reason.NOT_ENDED)
    stage.launcher.unkillable.clear()
    await stopping
    assert chat.state is State.STOPPED


@virtual
async def test_who_needs_a_device_of_what_cannot_be_ended_waits_and_says_so() -> None:
    """Others start. When it is gone, the waiting start goes on and the reason goes."""
    stage = Stage()
    stage.launcher.unkillable["old/0"] = "process 7 survives"
    old, new = stage.supervisor(model("old", devices=(0,))), stage.supervisor(model("new", devices=(0, 1)))
    other = stage.supervisor(model("other", devices=(2,)))
    old.start()
    (await stage.serving(old)).die()
    await stage.until(lambda: old.diagnosis is not None and reason(old) is Reason.NOT_ENDED)
    new.start()
    other.start()
    await stage.until(lambda: other.engine is not None)
    await passes(1000)
    assert (new.state, new.phase, reason(new), new.failure) == (State.LOADING, Phase.QUEUED, Reason.NOT_ENDED, None)
    assert new.diagnosis is not None
    assert "old/0 could not be ended: process 7 survives" in new.diagnosis.message
    stage.launcher.unkillable.clear()
    await stage.until(lambda: new.engine is not None)
    assert new.diagnosis is None


@virtual
async def test_a_start_waits_for_what_leaves_its_device_by_a_crash() -> None:
    """The rest of a crashed engine sets memory free as a stopped one does."""
    stage = Stage()
    stage.launcher.teardown_seconds = 20
    old, new = stage.supervisor(model("old", devices=(0,))), stage.supervisor(model("new", devices=(0,)))
    old.start()
    engine = await stage.serving(old)
    engine.die()
    died = now()
    await stage.until(lambda: old.phase is Phase.STOPPING)
    new.start()
    await stage.until(lambda: new.engine is not None)
    assert stage.launcher.engines[1].born == died + 20


@virtual
async def test_a_bug_while_an_engine_is_ended_never_hides_that_it_may_live() -> None:
    """Nobody knows whether it does: the instance does not stop, says so, and nothing starts on its device."""
    stage = Stage()
    stage.launcher.end_error = RuntimeError("a bug")
    chat, new = stage.supervisor(model(devices=(0,))), stage.supervisor(model("new", devices=(0,)))
    chat.start()
    await stage.serving(chat)
    with capture_logs():
        await chat.stop()
    assert (chat.state, reason(chat)) == (State.UNLOADING, Reason.NOT_ENDED)
    assert list(stage.loop.room.not_ended()) == ["chat/0"]
    new.start()
    await passes(1000)
    assert (new.phase, len(stage.launcher.engines)) == (Phase.QUEUED, 1)


@virtual
async def test_a_daemon_that_stops_leaves_what_it_could_not_end_as_it_is() -> None:
    """The stop returns; the instance is not called stopped."""
    stage = Stage()
    stage.launcher.unkillable["chat/0"] = "process 7 survives"
    chat = stage.supervisor(model())
    chat.start()
    await stage.serving(chat)
    stopping = chat.stop()
    await passes(10)
    stage.shared.stopping.set()
    await stopping
    assert (chat.state, reason(chat)) == (State.UNLOADING, Reason.NOT_ENDED)


@virtual
async def test_a_start_that_waits_for_a_port_is_queued_and_no_failure() -> None:
    """It says what it waits for, and counts as no try; then it says again why the last engine failed."""
    stage = Stage()
    chat = stage.supervisor(model(restart=Restart(max_failures=2)))
    chat.start()
    engine = await stage.engine()
    stage.launcher.no_port = "port 8001 is taken"
    engine.die()
    await stage.until(lambda: chat.diagnosis is not None and reason(chat) is Reason.PORT_IN_USE)
    assert chat.diagnosis is not None
    assert (chat.state, chat.phase, chat.diagnosis.message) == (
        State.LOADING, Phase.QUEUED, "waits: port 8001 is taken",
    )  # fmt: skip
    await stage.until(lambda: chat.engine is not None)
    assert reason(chat) is Reason.CRASHED
    await stage.serving(chat)


@virtual
async def test_an_engine_that_dies_of_its_full_log_names_the_disk() -> None:
    """Its last words could not be written: what is known of the disk is all that there is."""
    stage = Stage()
    chat = stage.supervisor(model())
    chat.start()
    engine = await stage.engine()
    engine.log.problem = "its output is not kept on disk: No space left on device"
    engine.die(1)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert chat.diagnosis is not None
    assert "No space left on device" in chat.diagnosis.message
