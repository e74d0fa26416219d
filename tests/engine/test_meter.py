"""The tokens that engines count themselves, and when they are asked for them. In virtual time."""

import asyncio
import itertools

import pytest

from tests.engine.virtual import FakeEngine, Stage, model, now, passes, place_of, settle, virtual
from tests.fleet import test_giving_way as giving_way
from tests.fleet.test_giving_way import Gpus
from tests.fleet.test_model import begun
from vllm_proxy.domain.address import Address
from vllm_proxy.domain.devices import NO_DEVICES
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.meter import Meter
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.fleet.supervisor import Supervisor


def counters(prompt: float, generation: float, cached: float | None = None, core: int = 0) -> str:
    """What an engine says, as the lines that matter."""
    label = f'engine="{core}",model_name="chat"'
    lines = [
        f"vllm:kv_cache_usage_perc{{{label}}} 0.25",
        f"vllm:prompt_tokens_total{{{label}}} {prompt}",
        f"vllm:generation_tokens_total{{{label}}} {generation}",
        f"vllm:iteration_tokens_total_count{{{label}}} 17.0",
    ]
    if cached is not None:
        lines.append(f"vllm:prompt_tokens_cached_total{{{label}}} {cached}")
    return "\n".join(lines)


async def ready(stage: Stage, **policy: object) -> tuple[Supervisor, FakeEngine]:
    """A model with a ready engine, which has been looked at."""
    chat = stage.supervisor(model(**policy))  # type: ignore[arg-type]
    chat.start()
    engine = await stage.serving(chat)
    await passes(25)
    stage.probe.looks.clear()
    return chat, engine


async def request(stage: Stage) -> None:
    """One that begins and ends at once."""
    with await stage.registry.acquire("chat"):
        pass


def tokens(chat: Supervisor) -> dict[str, int]:
    """What is known of the model's engines, by kind."""
    return dict(chat._history.tokens)


def pauses(stage: Stage) -> list[float]:
    """Seconds between the looks."""
    return [later - earlier for earlier, later in itertools.pairwise(stage.probe.looks)]


# What is counted


@virtual
async def test_tokens_are_what_the_engine_counts_by_kind() -> None:
    """Over all its cores; cached ones are a part of the prompt."""
    stage = Stage()
    stage.probe.work = counters(100.0, 7.0, 60.0) + "\n" + counters(1000.0, 1.0, 0.0, core=1)
    chat, _ = await ready(stage)
    assert tokens(chat) == {"prompt": 1100, "cached": 60, "generation": 8}
    stage.probe.work = counters(150.0, 9.0, 80.0) + "\n" + counters(1000.0, 1.0, 0.0, core=1)
    await request(stage)
    await passes(20)
    assert tokens(chat) == {"prompt": 1150, "cached": 80, "generation": 10}


@virtual
async def test_how_full_its_cache_is_stands_beside_them() -> None:
    """Of several cores the fullest; not known where the engine does not say, as when it has no answer."""
    stage = Stage()
    full = counters(100.0, 7.0, core=1).replace("0.25", "7.5e-01")
    stage.probe.work = counters(100.0, 7.0) + "\n" + full
    chat, _ = await ready(stage)
    assert chat.meter is not None
    assert chat.meter.kv_usage == 0.75
    stage.probe.work = ""
    await request(stage)
    await passes(20)
    assert chat.meter.kv_usage is None


@virtual
async def test_a_large_count_is_exact() -> None:
    """prometheus-client writes from a million on with an exponent."""
    stage = Stage()
    stage.probe.work = 'vllm:prompt_tokens_total{engine="0"} 9.007199254740991e+15'
    chat, _ = await ready(stage)
    assert tokens(chat) == {"prompt": 9_007_199_254_740_991}


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1.0", "1e+999", "9" * 400, "1.2.3", "0x10", "5 1700000000", ""])
def test_a_value_that_is_no_count_is_none(value: str) -> None:
    """Whatever stands there, nothing is counted and nothing fails."""

    @virtual
    async def run() -> None:
        stage = Stage()
        stage.probe.work = f'vllm:prompt_tokens_total{{engine="0"}} {value}'
        chat, _ = await ready(stage)
        assert tokens(chat) == {}
        assert chat.state is State.READY

    run()


@virtual
async def test_an_engine_that_keeps_no_counters_has_no_tokens() -> None:
    """With `disable_log_stats`: none is not zero."""
    stage = Stage()
    stage.probe.work = ""
    chat, _ = await ready(stage)
    assert tokens(chat) == {}


@virtual
async def test_a_look_without_an_answer_loses_nothing() -> None:
    """The next one has it."""
    stage = Stage()
    stage.probe.work = counters(10.0, 1.0)
    chat, _ = await ready(stage)
    with await stage.registry.acquire("chat"):
        stage.probe.work = None
        await passes(30)
        assert tokens(chat) == {"prompt": 10, "generation": 1}
        stage.probe.work = counters(25.0, 2.0)
        await passes(20)
    assert tokens(chat) == {"prompt": 25, "generation": 2}


@virtual
async def test_the_tokens_of_a_new_engine_are_added_to_those_of_the_last() -> None:
    """Its counters begin at 0, and those of the model go on."""
    stage = Stage()
    stage.probe.work = counters(10.0, 1.0)
    chat, engine = await ready(stage)
    engine.die()
    stage.probe.work = counters(300.0, 30.0)
    await stage.engine(2)
    await stage.serving(chat)
    await passes(20)
    assert tokens(chat) == {"prompt": 310, "generation": 31}


@virtual
async def test_a_counter_that_is_smaller_than_before_has_begun_anew() -> None:
    """All of it is new, and those that grew are not affected."""
    stage = Stage()
    stage.probe.work = counters(10.0, 1.0)
    chat, _ = await ready(stage)
    stage.probe.work = counters(4.0, 3.0)
    await request(stage)
    await passes(20)
    assert tokens(chat) == {"prompt": 14, "generation": 3}


@pytest.mark.parametrize("says", [True, False])
def test_what_an_adopted_engine_has_counted_for_an_earlier_daemon_is_not_ours(*, says: bool) -> None:
    """It is known before the first request, or, where it does not say so then, from its first answer."""

    @virtual
    async def run() -> None:
        stage = Stage()
        stage.probe.work = counters(1000.0, 100.0) if says else None
        chat = stage.supervisor(model())
        chat.start(record_of("chat/0"))
        await stage.until(lambda: chat.state is State.READY)
        if says:
            assert len(stage.probe.looks) == 1, "before requests are routed to it"
        stage.probe.work = counters(1000.0, 100.0)
        await passes(20)
        stage.probe.work = counters(1005.0, 103.0)
        await request(stage)
        await passes(20)
        assert tokens(chat) == {"prompt": 5, "generation": 3}

    run()


def record_of(instance: str) -> EngineRecord:
    """What an earlier daemon left of a ready engine."""
    place = place_of(instance, 0, NO_DEVICES)
    return EngineRecord(
        place.instance, place.own_name, 4242, 1, str(place.address), place.credential, place.folder, "", "f", 0,
        "2026-01-01T00:00:00+00:00", ready=True,
    )  # fmt: skip


# When it is asked


@virtual
async def test_an_engine_without_requests_is_left_alone() -> None:
    """It has nothing new to say."""
    stage = Stage()
    await ready(stage)
    await passes(10_000)
    assert stage.probe.looks == []


@virtual
async def test_an_engine_that_works_is_asked_every_ten_seconds() -> None:
    """And every two while somebody watches, who need not wait for the end of a long pause."""
    stage = Stage()
    await ready(stage, stall_timeout=0)
    with await stage.registry.acquire("chat"):
        await passes(101)
        assert len(stage.probe.looks) == 10
        assert pauses(stage) == pytest.approx([10] * 9)
        stage.probe.looks.clear()
        with stage.shared.watchers, stage.shared.watchers:
            await passes(20.5)
            assert len(stage.probe.looks) == pytest.approx(10, abs=1)
            assert pauses(stage) == pytest.approx([2] * (len(stage.probe.looks) - 1))
        await passes(10)
        stage.probe.looks.clear()
        await passes(100)
        assert len(stage.probe.looks) == pytest.approx(10, abs=1)


@virtual
async def test_a_request_between_two_looks_is_seen() -> None:
    """Once it has ended the engine is asked once more, and no more after that."""
    stage = Stage()
    chat, _ = await ready(stage)
    stage.probe.work = counters(5.0, 2.0)
    await request(stage)
    await passes(1000)
    assert len(stage.probe.looks) == 1
    assert tokens(chat) == {"prompt": 5, "generation": 2}


@virtual
async def test_tokens_that_are_counted_a_moment_after_the_answer_are_seen() -> None:
    """A look at the very end of a request is not the last one."""
    stage = Stage()
    chat, _ = await ready(stage)
    stage.probe.work = counters(5.0, 2.0)
    with await stage.registry.acquire("chat"):
        while not stage.probe.looks:
            await passes(0.01)
    stage.probe.work = counters(5.0, 3.0)
    await passes(100)
    assert tokens(chat) == {"prompt": 5, "generation": 3}
    assert len(stage.probe.looks) == 2


@virtual
async def test_an_engine_is_asked_once_more_before_it_is_ended() -> None:
    """After its last request, and before SIGTERM: no token of a drained engine is lost."""
    stage = Stage()
    chat, engine = await ready(stage)
    lease = await stage.registry.acquire("chat")
    with lease:
        leaving = chat.stop()
        await passes(3)
        assert not engine.exited.done()
        stage.probe.work = counters(50.0, 5.0)
    await settle()
    await leaving
    assert tokens(chat) == {"prompt": 50, "generation": 5}
    assert engine.reaped_at is not None
    assert stage.probe.looks[-1] <= engine.reaped_at


@virtual
async def test_an_engine_that_was_idle_ends_without_another_look() -> None:
    """What it has counted is known; who waits for its room waits for nothing."""
    stage = Stage()
    chat, engine = await ready(stage)
    began = now()
    await chat.stop()
    assert (stage.probe.looks, engine.reaped_at) == ([], began)


@virtual
async def test_an_engine_that_does_not_answer_is_ended_all_the_same() -> None:
    """A second later at most."""
    stage = Stage()
    chat, engine = await ready(stage)
    await request(stage)
    stage.probe.hangs = True
    began = now()
    await chat.stop()
    assert engine.reaped_at == pytest.approx(began + 1)


@virtual
async def test_a_daemon_that_stops_asks_nobody() -> None:
    """Nobody can ask it for its figures any more."""
    stage = Stage()
    chat, _ = await ready(stage)
    await request(stage)
    stage.shared.stopping.set()
    await chat.stop()
    assert stage.probe.looks == []


@virtual
async def test_the_watch_for_stalls_and_the_meter_ask_once() -> None:
    """One answer serves both, however the two have drifted apart."""
    stage = Stage()
    chat, _ = await ready(stage, stall_timeout=0)

    async def slowly(address: Address) -> bool:  # noqa: ARG001 - as the protocol has it
        await asyncio.sleep(0.7)  # the watch asks for that first
        return True

    stage.probe.healthy = slowly  # type: ignore[method-assign]
    assert chat.endpoint is not None
    chat.endpoint.pool._busy.add(Busy())  # type: ignore[arg-type]
    with await stage.registry.acquire("chat"):
        await passes(1000)
    assert len(stage.probe.looks) == pytest.approx(100, abs=10)


class Busy:
    """A connection whose request waits."""

    _paused = False
    _transport = None


@virtual
async def test_two_who_ask_at_once_get_one_answer() -> None:
    """And who wants a newer one than there is asks again."""
    stage = Stage()
    stage.probe.work = counters(5.0, 2.0)
    meter = Meter(place_of("chat/0", 0, NO_DEVICES).address, stage.probe, lambda _: None)
    assert set(await asyncio.gather(meter.counters(1.0), meter.counters(1.0))) == {stage.probe.work}
    assert len(stage.probe.looks) == 1
    await passes(0.5)
    await meter.counters(0.6)
    assert len(stage.probe.looks) == 1
    await meter.counters(0.4)
    assert len(stage.probe.looks) == 2


@virtual
async def test_an_engine_that_slept_and_woke_goes_on_counting() -> None:
    """It is the same one: nothing is counted twice, and what it did before it slept is known."""
    stage = Stage(Gpus())
    chat = begun(stage, giving_way.model("chat", keys={"sleep": 1}, idle_timeout=100))
    with await giving_way.answered(stage, "chat"):
        stage.probe.work = counters(30.0, 3.0)
    await stage.until(lambda: chat.state is State.SLEEPING)
    assert dict(chat.history.tokens) == {"prompt": 30, "generation": 3}
    with await giving_way.answered(stage, "chat"):
        stage.probe.work = counters(31.0, 4.0)
    await passes(20)
    assert (dict(chat.history.tokens), len(stage.launcher.engines)) == ({"prompt": 31, "generation": 4}, 1)


@virtual
async def test_one_that_falls_asleep_at_once_has_been_looked_at() -> None:
    """Its last request ended just now."""
    stage = Stage()
    chat, _ = await ready(stage)
    await request(stage)
    stage.probe.work = counters(9.0, 9.0)
    await chat.sleep()
    assert tokens(chat) == {"prompt": 9, "generation": 9}
