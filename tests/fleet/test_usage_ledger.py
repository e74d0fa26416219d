"""The ledger on real disks: full, locked, damaged, slow, and the daemon killed."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.daemon.test_disk import mounted
from vllm_proxy.domain.usage import DAY, HOUR, Bucket, Counts, Query, Spent
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet import usage_file, usage_ledger
from vllm_proxy.fleet.usage_file import KEPT_DAYS, UsageFile, UsageFileError
from vllm_proxy.fleet.usage_ledger import UsageLedger
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.runtime.threads import Disk
from vllm_proxy.traffic.usage import Usage

NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC).timestamp()
NOON = int(NOW) // HOUR * HOUR
ALL = Query(0, NOON + DAY, ("key",))


class Clock:
    """Seconds since the epoch."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time."""
        return self.now


class Stage:
    """A ledger with its thread, and a clock that stands still."""

    def __init__(self, folder: Path, now: float = NOW) -> None:
        self.clock = Clock(now)
        self.usage = Usage(self.clock)
        self.disk = Disk("test", 1)
        self.ledger = UsageLedger(folder, self.usage, self.disk, self.clock)
        self.file = folder / usage_ledger.FILE

    def used(self, prompt: int = 1, key: str = "ci") -> None:
        """One request of a key."""
        self.usage.counts(key, "chat").add(Counts(requests=1, prompt=prompt))

    async def prompt(self) -> int:
        """Of all keys, as it is reported."""
        return sum(counts.prompt for counts in (await self.ledger.report(ALL)).values())

    async def on_disk(self) -> int:
        """As another program reads it."""
        with contextlib.closing(sqlite3.connect(self.file)) as file:
            return int(file.execute("SELECT coalesce(sum(prompt), 0) FROM usage").fetchone()[0])


@contextlib.asynccontextmanager
async def stage(folder: Path, now: float = NOW) -> AsyncIterator[Stage]:
    """One, closed in the end as the daemon does."""
    found = Stage(folder, now)
    await found.ledger.load()
    try:
        yield found
    finally:
        await found.ledger.close(5.0)
        found.disk.close()


async def test_what_is_counted_is_on_disk_after_a_flush_and_reported_before(tmp_path: Path) -> None:
    """A report has what is in memory and what is on disk, each once."""
    async with stage(tmp_path) as here:
        here.used(10)
        assert await here.prompt() == 10
        await here.ledger.flush()
        assert await here.on_disk() == await here.prompt() == 10
        here.used(5)
        await here.ledger.flush()
        here.used(1)
        assert await here.prompt() == 16
    assert await here.on_disk() == 16  # written at the end


async def test_nothing_is_made_where_nothing_is_counted(tmp_path: Path) -> None:
    """A daemon without keys leaves no file, and its reports are empty."""
    async with stage(tmp_path) as here:
        await here.ledger.flush()
        assert await here.ledger.report(ALL) == {}
        assert here.ledger.spent("ci") == Spent(0, 0)
    assert list(tmp_path.iterdir()) == []


async def test_it_writes_by_itself_and_sleeps_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So long after the first count, and again after the next."""
    monkeypatch.setattr(usage_ledger, "FLUSH_SECONDS", 0.001)
    async with stage(tmp_path) as here:
        written, add = asyncio.Event(), here.ledger._file.add
        loop = asyncio.get_running_loop()

        def told(*arguments: object) -> None:
            add(*arguments)  # type: ignore[arg-type]
            loop.call_soon_threadsafe(written.set)

        monkeypatch.setattr(here.ledger._file, "add", told)
        running = keep_running(here.ledger.run, "test")
        for total in (1, 2):
            here.used()
            await written.wait()
            written.clear()
            assert await here.on_disk() == total
        running.cancel()


async def test_quotas_of_the_next_daemon_begin_with_what_was_charged_today_and_this_month(tmp_path: Path) -> None:
    """In UTC, by key, estimated tokens too; what came before the month counts no more."""
    async with stage(tmp_path) as here:
        for days, tokens in ((0, 1), (1, 10), (23, 100), (24, 1000)):  # the 24th is the last of the month before
            here.clock.now = NOW - days * DAY
            here.usage.counts("ci", "chat").add(
                Counts(prompt=tokens, completion=tokens, estimated=tokens, cached=tokens)
            )
            await here.ledger.flush()
        here.used(7, "web")
        here.clock.now = NOW
    async with stage(tmp_path) as later:
        assert later.ledger.spent("ci") == Spent(3, 333)
        later.usage.counts("ci", "embed").add(Counts(completion=2))
        assert later.ledger.spent("ci") == Spent(5, 335)
        await later.ledger.flush()
        assert later.ledger.spent("ci") == Spent(5, 335)
        assert later.ledger.spent("nobody") == Spent(0, 0)
        later.clock.now = NOW + 7 * DAY  # the first of December
        later.used(1)
        assert later.ledger.spent("ci") == Spent(1, 1)


JUMPS = [-500 * DAY, -DAY, DAY, 400 * DAY, 3000 * DAY]


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("is_used", [True, False])
async def test_a_clock_that_goes_there_and_back_forgets_nothing_that_was_charged(
    tmp_path: Path, jump: int, *, is_used: bool
) -> None:
    """Neither this daemon, whether it writes meanwhile or not, nor the next one."""
    async with stage(tmp_path) as here:
        for at in (NOW - DAY, NOW):
            here.clock.now = at
            here.used(10)
            await here.ledger.flush()
        here.clock.now = NOW + jump
        assert here.ledger.spent("ci").day == (10 if jump == -DAY else 0)
        if is_used:
            here.used(1)
            await here.ledger.flush()
            assert here.ledger.spent("ci").day == (11 if jump == -DAY else 1)
        here.clock.now = NOW
        month = 20 + (is_used and abs(jump) == DAY)
        assert here.ledger.spent("ci") == Spent(10, month)
        await here.ledger.flush()
        assert here.ledger.spent("ci") == Spent(10, month)
    async with stage(tmp_path) as later:
        assert later.ledger.spent("ci") == Spent(10, month)


@pytest.mark.parametrize("jump", [-20_000 * DAY, *JUMPS])
async def test_a_daemon_whose_clock_is_set_after_its_start_knows_what_was_charged(tmp_path: Path, jump: int) -> None:
    """A machine without a battery is in 1970 until it has the time."""
    async with stage(tmp_path) as before:
        before.used(10)
    async with stage(tmp_path, NOW + jump) as here:
        here.used(1)
        await here.ledger.flush()
        here.clock.now = NOW
        assert here.ledger.spent("ci").day == 10


async def test_each_month_has_its_own_and_a_few_are_held(tmp_path: Path) -> None:
    """However many months go by; one that comes back later than that is read again."""
    async with stage(tmp_path) as here:
        for month in range(5):
            here.clock.now = NOW + month * 31 * DAY
            here.used(month + 1)
            await here.ledger.flush()
            assert here.ledger.spent("ci") == Spent(month + 1, month + 1)
        assert len(here.ledger._charged) == 3
        here.clock.now = NOW
        here.used(1)
        await here.ledger.flush()
        assert here.ledger.spent("ci") == Spent(2, 2)


class Rows:
    """A file that is written day by day, and a clock that nobody sets."""

    def __init__(self, folder: Path) -> None:
        self.elapsed = 0.0
        self.file = UsageFile(folder / "usage.sqlite", lambda: self.elapsed)

    def write(self, now: float) -> None:
        """One request, at this time by the wall clock."""
        self.file.add({Bucket(int(now) // HOUR * HOUR, "ci", "chat"): Counts(1)}, now)

    def days(self) -> list[int]:
        """That have rows, from the present one."""
        return [int((int(day) - NOON // DAY * DAY) // DAY) for (day,) in self.file.sums(Query(0, 2**40, ("day",)))]

    def go_on(self, *, days: int, jump: float = 0.0) -> None:
        """One write a day by a clock that goes right from there."""
        for _ in range(days):
            self.write(NOW + self.elapsed + jump)
            self.elapsed += DAY


def test_what_is_older_than_400_days_goes(tmp_path: Path) -> None:
    """A day for each day, and what has piled up meanwhile two at a time."""
    rows = Rows(tmp_path)
    for days in range(KEPT_DAYS + 2, KEPT_DAYS - 4, -1):
        rows.write(NOW - days * DAY)
    rows.elapsed += DAY
    first = []
    for _ in range(5):
        rows.go_on(days=1)
        first.append(rows.days()[0])
    assert first == [-KEPT_DAYS - 2, -KEPT_DAYS, -KEPT_DAYS + 2, -KEPT_DAYS + 3, 1]  # at first the clock may be wrong
    rows.file.close()


@pytest.mark.parametrize("jump", [401 * DAY, 500 * DAY, 10_000 * DAY, -401 * DAY, -20_000 * DAY])
def test_a_clock_that_is_wrong_removes_next_to_nothing(tmp_path: Path, jump: int) -> None:
    """Nothing at once; while it is wrong for days, or daemons restart meanwhile, two days of a whole year each time."""
    rows = Rows(tmp_path)
    year = list(range(-364, 1))
    for day in year:
        rows.write(NOW + day * DAY)
    rows.elapsed += DAY
    rows.go_on(days=1, jump=jump)
    assert set(rows.days()) >= set(year)
    rows.go_on(days=3, jump=jump)
    assert len(set(rows.days()) & set(year)) >= len(year) - 6
    rows.file.close()


def test_what_a_clock_that_was_ahead_has_left_goes_and_the_rest_stays(tmp_path: Path) -> None:
    """Once there are rows of a week by the clock that is right."""
    rows = Rows(tmp_path)
    rows.go_on(days=3)
    rows.write(NOW + 3000 * DAY)
    rows.write(NOW + 3001 * DAY)
    rows.write(NOW + 3002 * DAY)
    rows.go_on(days=4)
    assert rows.days() == [*range(7), 3000, 3001, 3002]
    rows.go_on(days=1)
    assert rows.days() == [*range(8), 3000]
    rows.go_on(days=1)
    assert rows.days() == [*range(9)]
    rows.file.close()


def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    """Its neighbours too, whatever the umask is."""
    before = os.umask(0)
    try:
        file = UsageFile(tmp_path / "usage.sqlite")
        file.add({Bucket(NOON, "ci", "chat"): Counts(1)}, NOW)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o600}
    file.close()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """Another file is not written into."""
    (tmp_path / "usage.sqlite").symlink_to(tmp_path / "other")
    with pytest.raises(UsageFileError):
        UsageFile(tmp_path / "usage.sqlite").add({Bucket(NOON, "ci", "chat"): Counts(1)}, NOW)
    assert not (tmp_path / "other").exists()


async def test_a_locked_file_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program writes in it: what is counted stays in memory, is reported, and is written once it can be."""
    monkeypatch.setattr(usage_file, "_BUSY_SECONDS", 0.001)
    async with stage(tmp_path) as here:
        here.used(1)
        await here.ledger.flush()
        with contextlib.closing(sqlite3.connect(here.file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            here.used(10)
            with capture_logs() as logged:
                await here.ledger.flush()
                await here.ledger.flush()
            assert here.ledger.problem == "database is locked"
            assert [line["log_level"] for line in logged] == ["error"]  # once
            here.used(100)
            assert await here.prompt() == 111
            assert here.ledger.spent("ci") == Spent(111, 111)
        await here.ledger.flush()
        assert here.ledger.problem is None
        assert await here.on_disk() == await here.prompt() == 111


async def test_a_file_that_is_locked_at_the_start_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotas do not begin anew since another program was in the way; what was counted meanwhile is in them."""
    monkeypatch.setattr(usage_file, "_BUSY_SECONDS", 0.001)
    async with stage(tmp_path) as before:
        before.used(5)
    with contextlib.closing(sqlite3.connect(before.file, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        here = Stage(tmp_path)
        await here.ledger.load()
        assert here.ledger.problem == "database is locked"
        assert here.ledger.spent("ci") == Spent(0, 0)
        here.used(1)
        await here.ledger.flush()
    here.used(1)
    await here.ledger.flush()
    assert here.ledger.problem is None
    assert here.ledger.spent("ci") == Spent(7, 7)
    await here.ledger.close(5.0)
    here.disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_full_disk_loses_nothing_and_says_so(tmp_path: Path) -> None:
    """It is tried again, and all of it is there once something was removed."""
    state = tmp_path / "state"
    state.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=200k", "tmpfs", at=state):
        async with stage(state) as here:
            here.used(1)
            await here.ledger.flush()
            ballast = state / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for number in range(500):
                here.used(1, f"key-{number}")
            await here.ledger.flush()
            assert here.ledger.problem == "database or disk is full"
            assert await here.prompt() == 501
            ballast.unlink()
            await here.ledger.flush()
            assert here.ledger.problem is None
            assert await here.on_disk() == 501


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(4000)])
async def test_a_damaged_file_is_set_aside_and_another_begun(tmp_path: Path, damage: bytes) -> None:
    """What is counted from then on is kept; the old one is left for who wants it."""
    (tmp_path / "usage.sqlite").write_bytes(damage)
    with capture_logs() as logged:
        async with stage(tmp_path) as here:
            here.used(3)
            await here.ledger.flush()
            await here.ledger.flush()
            assert here.ledger.problem is None
            assert await here.on_disk() == 3
    assert (tmp_path / "usage.sqlite.unreadable").read_bytes() == damage
    assert any(line.get("kept_as") == "usage.sqlite.unreadable" for line in logged)


async def test_a_file_that_is_damaged_while_it_is_open_is_set_aside(tmp_path: Path) -> None:
    """The counts of this daemon are not lost with it: what cannot be written is kept for the new one."""
    async with stage(tmp_path) as here:
        here.used(1)
        await here.ledger.flush()
        await here.disk(here.ledger._file.close)
        with here.file.open("r+b") as file:
            file.write(b"x" * 200)
        here.used(2)
        await here.ledger.flush()
        assert here.ledger.problem is not None
        await here.ledger.flush()
        assert here.ledger.problem is None
        assert await here.on_disk() == 2
        assert here.ledger.spent("ci").day == 3


async def test_a_file_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    """It is not written, and that is said."""
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.sqlite")) as file:
        file.execute("PRAGMA user_version = 99")
        file.commit()
    async with stage(tmp_path) as here:
        here.used()
        await here.ledger.flush()
        assert here.ledger.problem == "a newer vllm-proxy has written it"
        with pytest.raises(RequestError, match="newer vllm-proxy") as caught:
            await here.ledger.report(ALL)
        assert caught.value.code == "usage_unavailable"


async def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    """What is counted from then on is not written into what nobody can open any more."""
    async with stage(tmp_path) as here:
        here.used(1)
        await here.ledger.flush()
        here.file.unlink()
        here.used(2)
        await here.ledger.flush()
        assert await here.on_disk() == 2


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened in the end, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_disk_that_does_not_answer_holds_up_neither_requests_nor_the_end(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report says so after a while, what was counted stays, and the daemon ends in its time."""
    monkeypatch.setattr(usage_ledger, "_ANSWER_SECONDS", 0.01)
    here = Stage(tmp_path)
    monkeypatch.setattr(here.ledger._file, "add", lambda *_: gate.wait())
    here.used(1)
    await here.ledger.flush()
    assert here.ledger.problem == "its disk does not answer"
    here.used(2)
    with pytest.raises(RequestError, match="does not answer"):
        await here.ledger.report(ALL)
    with capture_logs() as logged:
        await here.ledger.close(0.01)
    assert any("is lost" in line["event"] for line in logged)
    gate.set()
    here.disk.close()


async def test_what_cannot_be_written_for_weeks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first."""
    monkeypatch.setattr(usage_ledger, "_MOST_WAITING", 2)
    (tmp_path / "usage.sqlite").mkdir()
    async with stage(tmp_path) as here:
        for hours in range(4):
            here.clock.now = NOW + hours * HOUR
            here.used(10**hours)
            await here.ledger.flush()
        assert [counts.prompt for counts in here.ledger._waiting.values()] == [100, 1000]
        (tmp_path / "usage.sqlite").rmdir()


async def test_a_report_that_would_be_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to ask for instead; nothing is cut off silently."""
    monkeypatch.setattr(usage_ledger, "MOST_ROWS", 2)
    async with stage(tmp_path) as here:
        for key in ("a", "b", "c"):
            here.used(1, key)
        with pytest.raises(RequestError, match="a shorter time"):
            await here.ledger.report(ALL)


KILLED = """
import asyncio, os, sys
from pathlib import Path
from vllm_proxy.domain.usage import Counts
from vllm_proxy.fleet import usage_file, usage_ledger
from vllm_proxy.runtime.threads import DaemonThreads, Disk
from vllm_proxy.traffic.usage import Usage

async def main():
    usage = Usage()
    ledger = usage_ledger.UsageLedger(Path(sys.argv[1]), usage, Disk("test", 1))
    await ledger.load()
    total = 0
    while True:
        usage.counts("ci", "chat").add(Counts(requests=1, prompt=1))
        await ledger.flush()
        assert ledger.problem is None, ledger.problem
        total += 1
        print(total, flush=True)

asyncio.run(main())
"""


async def test_a_daemon_that_is_killed_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """Whatever it does at that moment, the file is whole, and the next daemon goes on with it."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - nothing else runs here
    assert killed.stdout is not None
    try:
        while int(killed.stdout.readline()) < 30:
            pass
    finally:
        killed.send_signal(signal.SIGKILL)
    said = [int(line) for line in killed.stdout.read().split()]
    killed.stdout.close()
    killed.wait()
    async with stage(tmp_path, datetime.now(UTC).timestamp()) as here:
        found = (await here.ledger.report(Query(0, 2**40, ())))[()]
        assert found.requests - max([30, *said]) in {0, 1}  # one more may have been written, and not told
        here.used()
        await here.ledger.flush()
        assert here.ledger.problem is None


@pytest.mark.parametrize("by", [(), ("key",), ("model", "day"), ("key", "model", "hour"), ("day",)])
async def test_sums_on_disk_are_those_in_memory(tmp_path: Path, by: tuple[str, ...]) -> None:
    """One report, half of it written: the same rows as if nothing were, and as if all were."""
    asked = Query(NOON - 2 * DAY, NOON + HOUR, by)  # type: ignore[arg-type]
    async with stage(tmp_path) as here:
        for number in reversed(range(60)):
            here.clock.now = NOW - number * HOUR
            here.usage.counts(f"k{number % 3}", f"m{number % 2}").add(
                Counts(requests=1, prompt=number, limited=number % 2)
            )
        in_memory = await here.ledger.report(asked)
        await here.ledger.flush()
        on_disk = await here.ledger.report(asked)
        here.usage.counts("k1", "m1").add(Counts(prompt=1))
        assert in_memory == on_disk
        assert sum(counts.prompt for counts in on_disk.values()) == sum(range(49))
        one = await here.ledger.report(Query(asked.first, asked.last, asked.by, "k1"))
        assert sum(counts.requests for counts in one.values()) == 16


async def test_quotas_begin_with_all_that_was_charged_however_long_a_report_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where keys and days are more than a report has rows; and what no column holds is a problem that is told."""
    monkeypatch.setattr(usage_file, "MOST_ROWS", 1)
    async with stage(tmp_path) as here:
        for key in ("a", "b", "c", "d"):
            here.used(7, key)
        await here.ledger.flush()
    async with stage(tmp_path) as later:
        assert later.ledger.spent("d") == Spent(7, 7)
        later.usage.counts("d", "chat").add(Counts(prompt=2**70))
        await later.ledger.flush()
        assert later.ledger.problem is not None
        later.ledger._waiting.clear()
