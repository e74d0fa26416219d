"""The fleet loop: what happens is applied, decided about and done, in order; what fails keeps nobody else up."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import FakeTenant, now, passes, settle, virtual
from vllm_proxy.domain.config import EngineSpec, Policy, Restart
from vllm_proxy.domain.decide import Decision, InstanceNow, ModelDecision, ModelNow, Snapshot, Wanted, decide
from vllm_proxy.domain.devices import unmanaged
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.rollback import Rollback
from vllm_proxy.fleet import loop as fleet_loop
from vllm_proxy.fleet.loop import FleetLoop

SPEC = EngineSpec(model="m")


class Member:
    """A model without anything around it, which writes down what it is told."""

    def __init__(self, loop: FleetLoop, name: str = "chat") -> None:
        self.name = name
        self.model = ModelNow(name, Policy(), Wanted.STOP, Rollback(SPEC))
        self.looks: list[float] = []
        self.decided: list[ModelDecision] = []
        self.ended = 0
        self.bugs: tuple[str, ...] = ()  # where it has them
        self.marks_itself = False  # changed, whatever it does
        self._loop = loop
        loop.add(self)

    def now(self) -> ModelNow:
        """What it is now."""
        self.looks.append(now())
        self._may_fail("now")
        return self.model

    def carry_out(self, decided: ModelDecision) -> None:
        """Begin what was decided."""
        self._may_fail("carry_out")
        self.decided.append(decided)
        if self.marks_itself:
            self._loop.changed(self)

    def force_end(self) -> None:
        """It could not be decided about."""
        self.ended += 1
        self._may_fail("force_end")

    def _may_fail(self, where: str) -> None:
        if where in self.bugs:
            msg = f"a bug of {self.name}"
            raise RuntimeError(msg)


class Word:
    """An event."""

    def __init__(self, name: str, what: Callable[[], None]) -> None:
        self.name = name
        self._what = what

    async def apply(self) -> None:
        """Do it."""
        self._what()


def begun() -> FleetLoop:
    """A loop that decides."""
    loop = FleetLoop()
    loop.start()
    return loop


def fails() -> None:
    """A bug."""
    raise RuntimeError("a bug")


# Events


@virtual
async def test_events_are_applied_in_their_order_and_done_when_what_follows_has_begun() -> None:
    """All that came together are applied before anything is decided: the last word counts."""
    loop = begun()
    member = Member(loop)
    await settle()
    member.decided.clear()
    heard: list[str] = []

    def want(wanted: Wanted) -> Callable[[], None]:
        def apply() -> None:
            heard.append(wanted.value)
            member.model = replace(member.model, wanted=wanted)
            loop.changed(member)

        return apply

    words = [loop.post(Word("start", want(Wanted.RUN))), loop.post(Word("stop", want(Wanted.STOP)))]
    assert heard == [], "who posts is not kept up by what follows"
    await asyncio.wait(words)
    assert (heard, [decided.start for decided in member.decided]) == (["run", "stop"], [()])


@virtual
async def test_who_gives_up_waiting_for_an_event_does_not_take_it_back() -> None:
    """A client that leaves has said what it wanted."""
    loop = begun()
    heard: list[str] = []
    word = loop.post(Word("start", lambda: heard.append("start")))
    other = loop.post(Word("stop", lambda: heard.append("stop")))
    word.cancel()
    await other
    assert heard == ["start", "stop"]


@virtual
async def test_what_comes_before_the_loop_begins_is_not_lost() -> None:
    """It is the first that it does."""
    loop = FleetLoop()
    member = Member(loop)
    word = loop.post(Word("start", lambda: None))
    await passes(10)
    assert not word.done()
    loop.start()
    await word
    assert len(member.decided) == 1


@virtual
async def test_what_is_posted_in_the_middle_of_a_turn_has_the_next_one() -> None:
    """No wake-up is lost."""
    loop = begun()
    heard: list[str] = []
    words: list[asyncio.Future[None]] = []
    first = loop.post(Word("first", lambda: words.append(loop.post(Word("second", lambda: heard.append("second"))))))
    await first
    await words[0]
    assert heard == ["second"]


@virtual
async def test_behind_its_end_nobody_decides_and_nobody_waits() -> None:
    """Neither for what was posted before, nor for what comes later, nor in the middle of many models."""
    loop = begun()
    for number in range(200):
        Member(loop, f"m{number}")
    in_the_middle = loop.post(Word("start", lambda: None))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    before = loop.post(Word("start", lambda: None))
    assert not in_the_middle.done(), "two hundred models take more than one step"
    await loop.close()
    behind = loop.post(Word("start", lambda: None))
    await asyncio.wait({in_the_middle, before, behind})
    assert (before.cancelled(), behind.cancelled()) == (True, True)
    await loop.close()


# Looks


@virtual
async def test_only_who_changed_is_looked_at() -> None:
    """Once, however often it was told."""
    loop = begun()
    one, other = Member(loop, "one"), Member(loop, "other")
    await settle()
    assert (len(one.looks), len(other.looks)) == (1, 1)
    loop.changed(one)
    loop.changed(one)
    await passes(10_000)
    assert (len(one.looks), len(other.looks)) == (2, 1)


@virtual
async def test_a_member_is_looked_at_again_when_it_is_time() -> None:
    """Though nothing happened: it has been idle for long enough then."""
    loop = begun()
    member = Member(loop)
    await settle()
    ready = InstanceNow(0, State.READY, SPEC)
    policy = Policy.model_validate({"start": "on-demand", "idle_timeout": 100})
    member.model = replace(member.model, wanted=Wanted.RUN, policy=policy, instances=(ready,), idle_seconds=40)
    loop.changed(member)
    await passes(59)
    assert len(member.looks) == 2
    member.model = replace(member.model, idle_seconds=100)
    await passes(2)
    assert member.looks[2:] == [pytest.approx(60)]
    assert member.decided[-1].wanted is Wanted.AWAIT


@virtual
async def test_who_is_gone_is_not_looked_at_whatever_is_told_of_it() -> None:
    """Not in the middle of a turn of many models either; its name may be another one's by then."""
    loop = begun()
    members = [Member(loop, f"m{number}") for number in range(120)]
    gone = members[-1]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert members[0].looks
    assert not gone.looks
    loop.forget(gone)
    successor = Member(loop, gone.name)
    loop.changed(gone)
    await passes(100)
    assert (gone.looks, gone.decided, len(successor.decided)) == ([], [], 1)


@virtual
async def test_a_member_that_changes_in_every_turn_lets_others_get_on() -> None:
    """It has the loop's attention, not the daemon's."""
    loop = begun()
    member = Member(loop)
    member.marks_itself = True
    await settle()
    looks = len(member.looks)
    await asyncio.sleep(0)
    assert len(member.looks) - looks <= 1
    assert looks > 1


@virtual
async def test_a_time_to_look_again_that_is_long_past_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred looks in a second at most, whatever is decided."""

    def at_once(snapshot: Snapshot, time: float) -> Decision:
        found = decide(snapshot, time)
        return replace(
            found, models={name: replace(decided, recheck_in=-5.0) for name, decided in found.models.items()}
        )

    monkeypatch.setattr(fleet_loop, "decide", at_once)
    member = Member(begun())
    await passes(1)
    assert 2 < len(member.looks) <= 102


# Bugs


@pytest.mark.parametrize("bugs", [("now",), ("carry_out",), ("carry_out", "force_end")])
@virtual
async def test_a_bug_in_one_model_keeps_no_other_up_and_is_tried_again(bugs: tuple[str, ...]) -> None:
    """Every second, until it does; it may end all the same."""
    loop = begun()
    bad, good = Member(loop, "bad"), Member(loop, "good")
    bad.bugs = bugs
    with capture_logs() as logs:
        await loop.post(Word("start", lambda: loop.changed(good)))
        await passes(10.5)
    assert len(good.decided) == 1
    assert 10 <= len(bad.looks) <= 12
    assert bad.ended == len(bad.looks)
    assert {entry["model"] for entry in logs} == {"bad"}
    bad.bugs = ()
    await passes(2)
    looks = len(bad.looks)
    await passes(100)
    assert (len(bad.decided), len(bad.looks)) == (1, looks)


@virtual
async def test_a_bug_that_stays_is_logged_once_with_its_traceback_and_then_less_and_less() -> None:
    """In an hour some sixty lines, none of which is a traceback but the first; another bug has its own."""
    loop = begun()
    member = Member(loop)
    member.bugs = ("now",)
    with capture_logs() as logs:
        await passes(3600)
        assert 60 <= len(logs) <= 80
        assert [bool(entry.get("exc_info")) for entry in logs].count(True) == 1
        assert sum(entry.get("unreported_before", 0) for entry in logs) + len(logs) == pytest.approx(3600, abs=60)
        member.bugs = ("carry_out",)
        await passes(2)
    assert [entry["event"] for entry in logs if entry.get("exc_info")] == [
        "a model could not be looked at", "a model could not follow a decision",
    ]  # fmt: skip


@virtual
async def test_a_bug_in_an_event_is_told_to_who_posted_it_and_keeps_no_other_up() -> None:
    """And it is in the log, with the event's name."""
    loop = begun()
    heard: list[str] = []
    with capture_logs() as logs:
        bad, good = loop.post(Word("start of chat", fails)), loop.post(Word("stop", lambda: heard.append("stop")))
        await asyncio.wait({bad, good})
    assert isinstance(bad.exception(), RuntimeError)
    assert heard == ["stop"]
    assert [entry["happened"] for entry in logs] == ["start of chat"]


@virtual
async def test_a_bug_in_a_decision_is_one_of_its_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the fleet is decided about alone then; starts and failures too."""

    def with_a_bug(snapshot: Snapshot, time: float) -> Decision:
        if any(one.id == "bad" for one in snapshot.models) or any(one.instance == "bad/0" for one in snapshot.retries):
            fails()
        return decide(snapshot, time)

    monkeypatch.setattr(fleet_loop, "decide", with_a_bug)
    loop = begun()
    bad, good = Member(loop, "bad"), Member(loop, "good")
    with capture_logs() as logs:
        waits = [asyncio.create_task(again(loop, f"{name}/0", Restart(backoff=5))) for name in ("bad", "good")]
        await loop.room.ask(FakeTenant("good/1", "0")).admission()
        await passes(3.7)
        assert not waits[1].done()
        await passes(1.4)
        assert (waits[0].done(), waits[1].done()) == (False, True)
    assert (len(good.decided), bad.decided) == (1, [])
    assert {entry["part"] for entry in logs if "part" in entry} == {"bad", "bad/0"}
    monkeypatch.setattr(fleet_loop, "decide", decide)
    await passes(2)
    assert waits[0].done(), "what could not be decided is tried again"
    assert len(bad.decided) == 1


@virtual
async def test_a_bug_in_who_is_told_keeps_no_start_up() -> None:
    """Neither its own nor another one's."""

    class Faulty(FakeTenant):
        def on_wait(self, why: object) -> None:  # noqa: ARG002 - whatever it is
            fails()

    loop = begun()
    loop.room.unmanaged = lambda spec: unmanaged(str(device) for device in spec.devices or ())
    with capture_logs() as logs:
        first = loop.room.ask(FakeTenant("a/0", "0"))
        waiting = asyncio.create_task(loop.room.ask(Faulty("b/0", "0")).admission())
        failed = asyncio.create_task(again(loop, "c/0", Restart(backoff=1), lambda _: fails()))
        await passes(2)
        assert (waiting.done(), failed.done()) == (False, True)
        first.done()
        await waiting
    assert {entry["event"] for entry in logs} == {"a listener failed"}


# Failures


async def again(
    loop: FleetLoop,
    instance: str,
    restart: Restart,
    told: Callable[[float], None] = lambda _: None,
    failures: int = 1,
) -> tuple[bool, float]:
    """Whether an engine that failed is started again, and when."""
    found = await loop.await_retry(instance, Diagnosis(Reason.CRASHED, "x"), failures, lambda: restart, told)
    return found, now()


@virtual
async def test_an_engine_that_failed_is_started_again_after_its_pause_which_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the loop has other things to do meanwhile."""
    monkeypatch.setattr(random, "random", lambda: 0.0)
    loop = begun()
    told: list[float] = []
    waits = asyncio.create_task(again(loop, "chat/0", Restart(backoff=8), told.append))
    for _ in range(5):
        await passes(1)
        loop.wake()
    assert await waits == (True, 8)
    assert told == [8]


@virtual
async def test_a_pause_of_nothing_is_told_too() -> None:
    """A failure is in the log, however soon the next start comes."""
    told: list[float] = []
    assert await again(begun(), "chat/0", Restart(backoff=0), told.append) == (True, 0)
    assert told == [0]


@virtual
async def test_an_engine_that_failed_too_often_is_given_up_at_once() -> None:
    """Nothing is told of a pause."""
    told: list[float] = []
    assert await again(begun(), "chat/0", Restart(max_failures=3), told.append, failures=3) == (False, 0)
    assert told == []


@virtual
async def test_a_policy_that_changes_in_the_pause_counts_from_then_on() -> None:
    """A shorter pause ends at once where it is over; fewer tries than there were give up."""
    loop = begun()
    policy = Restart(backoff=1000, max_backoff=1000)
    waits = asyncio.create_task(
        loop.await_retry("chat/0", Diagnosis(Reason.CRASHED, "x"), 2, lambda: policy, lambda _: None)
    )
    await passes(10)
    assert not waits.done()
    policy = Restart(backoff=1, max_backoff=1000)
    loop.wake()
    assert await waits is True
    assert now() == 10
    policy = Restart(backoff=1000, max_backoff=1000)
    waits = asyncio.create_task(
        loop.await_retry("chat/0", Diagnosis(Reason.CRASHED, "x"), 2, lambda: policy, lambda _: None)
    )
    await passes(10)
    policy = Restart(max_failures=2)
    loop.wake()
    assert await waits is False


@virtual
async def test_who_is_stopped_in_its_pause_leaves_nothing_behind() -> None:
    """The loop does not wait for it any more."""
    loop = begun()
    waits = asyncio.create_task(again(loop, "chat/0", Restart(backoff=1000)))
    await passes(1)
    waits.cancel()
    await passes(5000)
    assert waits.cancelled()
    assert loop._retries == []
