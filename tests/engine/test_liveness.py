"""An engine that hangs is found out, and one that merely takes long is not. In virtual time."""

import asyncio

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import FakeEngine, Stage, model, now, passes, settle, virtual
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.traffic.wire import EngineConnection


async def ready(stage: Stage, **policy: object) -> tuple[Supervisor, FakeEngine]:
    """A model with a ready engine."""
    chat = stage.supervisor(model(**policy))  # type: ignore[arg-type]
    chat.start()
    return chat, await stage.serving(chat)


class Wire(asyncio.Transport):
    """What a connection writes to, when nobody reads."""

    def is_closing(self) -> bool:
        """It stays open."""
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Into nowhere."""

    def abort(self) -> None:
        """Nobody minds."""


class Waiting:
    """A request that waits for bytes of an engine."""

    def __init__(self, chat: Supervisor) -> None:
        assert chat.endpoint is not None
        pool = chat.endpoint.pool
        connection = EngineConnection(pool)
        connection.connection_made(Wire())
        pool.keep(connection)
        taken = pool.take()
        assert taken is not None
        taken.start(b"POST", self)
        self._connection = taken
        self._bytes: asyncio.Task[None] | None = None

    def feed(self, data: bytes) -> None:
        """Bytes of its answer."""

    def lost(self, error: Exception | None) -> None:
        """The connection ended."""

    def bytes_every(self, seconds: float) -> None:
        """An answer's bytes come so often."""

        async def come() -> None:
            while True:
                await asyncio.sleep(seconds)
                self._connection.data_received(b"data: x")

        self._bytes = asyncio.create_task(come())

    def nothing_more(self) -> None:
        """It hangs."""
        assert self._bytes is not None
        self._bytes.cancel()


@virtual
async def test_an_engine_in_which_nothing_moves_while_a_request_waits_is_ended_and_started_again() -> None:
    """`/health` says 200 all the while, as vLLM's does. Routing stops first."""
    stage = Stage()
    chat, engine = await ready(stage, stall_timeout=300)
    await passes(10_000)
    assert chat.state is State.READY, "nobody waits for it"
    Waiting(chat)
    since, shown = now(), len(stage.shown)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert engine.reaped_at == pytest.approx(since + 300, abs=20)
    assert stage.shown[shown] == (State.LOADING, Phase.STOPPING, 0)
    assert chat.last_exit is not None
    assert chat.last_exit.diagnosis.reason is Reason.STALLED
    await stage.serving(chat)


@virtual
async def test_an_engine_that_sends_bytes_now_and_then_is_alive() -> None:
    """As long as any byte of any answer comes within the timeout."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=300)
    waiting = Waiting(chat)
    waiting.bytes_every(200)
    await passes(10_000)
    assert chat.state is State.READY
    waiting.nothing_more()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)


@virtual
async def test_an_engine_whose_counters_move_is_busy_and_not_stalled() -> None:
    """A long answer that is not streamed sends nothing for minutes."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=300)
    Waiting(chat)
    for tokens in range(50):
        stage.probe.work = str(tokens)
        await passes(200)
    assert chat.state is State.READY


@virtual
async def test_an_engine_without_counters_is_never_judged_by_its_silence() -> None:
    """With `disable_log_stats` nobody can tell a long answer from a hang."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=300)
    stage.probe.work = ""
    Waiting(chat)
    await passes(10_000)
    assert chat.state is State.READY


@virtual
async def test_an_engine_that_does_not_even_answer_for_its_counters_is_stalled() -> None:
    """A server that hangs as well moves nothing."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=300)
    stage.probe.work = None
    Waiting(chat)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert now() == pytest.approx(300, abs=20)


@virtual
async def test_an_engine_whose_health_stays_bad_is_ended_without_any_request() -> None:
    """A single bad answer means nothing; bad ones for as long as stall_timeout do."""
    stage = Stage()
    chat, engine = await ready(stage, stall_timeout=300)
    stage.probe.health = False
    await passes(200)
    stage.probe.health = True
    await passes(200)
    assert chat.state is State.READY
    stage.probe.health = False
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert engine.reaped_at == pytest.approx(700, abs=30)


@virtual
async def test_a_stall_timeout_of_zero_never_ends_an_engine() -> None:
    """Who turns it off has a monitor of his own."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=0)
    stage.probe.health = False
    Waiting(chat)
    await passes(20_000)
    assert chat.state is State.READY


@virtual
async def test_a_death_is_not_waited_out_as_a_stall() -> None:
    """The watch ends with the engine, and no verdict on the old engine reaches the new one."""
    stage = Stage()
    chat, engine = await ready(stage, stall_timeout=300)
    Waiting(chat)
    await passes(290)
    engine.die()
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
    assert chat.diagnosis is not None
    assert chat.diagnosis.reason is Reason.CRASHED
    await stage.serving(chat)
    await passes(1000)
    await settle()
    assert (chat.state, chat.restarts) == (State.READY, 1)


@virtual
async def test_a_bug_in_the_watch_for_stalls_costs_no_engine_and_no_watch() -> None:
    """It is logged, and the watch goes on: the engine that hangs afterwards is found."""
    stage = Stage()
    chat, engine = await ready(stage, stall_timeout=300)
    stage.probe.bugs.append(RuntimeError("a bug"))
    with capture_logs() as logs:
        await passes(1000)
    assert [entry["task"] for entry in logs if "task" in entry] == ["stall watch of chat/0"]
    assert (chat.state, engine.reaped_at) == (State.READY, None)
    Waiting(chat)
    await stage.until(lambda: chat.phase is Phase.BACKOFF)
