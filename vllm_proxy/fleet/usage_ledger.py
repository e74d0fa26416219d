"""The ledger: what keys have used is kept on disk, five seconds after it was counted at the latest, and reported.

Nothing waits for the disk but who asks for a report. What cannot be written stays in memory and is tried again, which
`problem` says; so a full or a locked disk loses nothing while the daemon lives, and never fails a request. The file is
`fleet/usage_file.py`'s, what is counted comes from `traffic/usage.py`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.usage import DAY, MOST_ROWS, Bucket, Counts, Query, Spent, added, month_end, month_start
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.usage_file import UsageFile, UsageFileError
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import keep_running, notify
from vllm_proxy.runtime.exclusive import Exclusive, NoAnswerError
from vllm_proxy.runtime.threads import Disk, Offload
from vllm_proxy.traffic.usage import Usage

log = structlog.get_logger()

FILE = "usage.sqlite"
FLUSH_SECONDS = 5.0
_ANSWER_SECONDS = 10.0  # for a disk
_NO_ANSWER = "its disk does not answer"
_MOST_MONTHS = 3  # of which is known what was charged: a clock may go to another month and come back
_MOST_WAITING = 200_000  # buckets in memory that cannot be written: the oldest go


type _Month = dict[str, dict[int, int]]  # tokens by key and day


@contextlib.asynccontextmanager
async def keeping_usage(folder: Path, seconds: float) -> AsyncIterator["UsageLedger"]:
    """What keys use is kept in a folder inside the block; what is left at its end is written, for so long at most."""
    disk = Disk("the ledger", 1)
    ledger = UsageLedger(folder, Usage(), disk)
    await ledger.load()
    writing = keep_running(ledger.run, "the ledger")
    try:
        yield ledger
    finally:
        writing.cancel()
        await ledger.close(seconds)
        disk.close()


class UsageLedger:
    """Of one daemon, and of one state directory."""

    def __init__(self, folder: Path, usage: Usage, offload: Offload, now: Callable[[], float] = time.time) -> None:
        """`offload`: for the file alone. `now`: seconds since the epoch."""
        self.usage = usage
        self.problem: str | None = None  # why it cannot be kept on disk
        self._file = UsageFile(folder / FILE)
        self._offload = offload
        self._now = now
        self._turn = Exclusive("the ledger", _ANSWER_SECONDS)
        self._waiting: dict[Bucket, Counts] = {}  # taken, and not on disk yet
        self._charged: dict[int, _Month] = {}  # by the month's start, the one that it is last; those that wait too
        self._loaded = False  # what is charged from the file
        self._counted = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        usage.counted = self._counted.set

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when `problem` changes."""
        self._listeners.append(listener)

    async def load(self) -> None:
        """Read what the quotas begin with; what cannot be read is reported, and tried again later.

        Besides this month it is the one before and that of the newest row: the clock may not be right yet.
        """
        try:
            await self._turn.run(self._load)
        except (UsageFileError, NoAnswerError) as error:
            self._counted.set()
            self._set_problem(str(error) or _NO_ANSWER)

    def spent(self, key: str) -> Spent:
        """What was charged to a key until now, as far as it is known."""
        now = self._now()
        today, month = int(now) // DAY * DAY, month_start(now)
        tomorrow, end = today + DAY, month_end(month)
        here = self.usage.tokens_since(key)
        here += self._charged.get(month, {}).get(key, {}).items()
        return Spent(
            sum(tokens for at, tokens in here if today <= at < tomorrow),
            sum(tokens for at, tokens in here if month <= at < end),
        )

    async def run(self) -> None:
        """Write what is counted, until cancelled. Nothing is done while nothing is counted."""
        while True:
            await self._counted.wait()
            await clock.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what was counted; what cannot be written stays."""
        try:
            await self._turn.run(self._write)
        except NoAnswerError:
            self._set_problem(_NO_ANSWER)

    async def report(self, asked: Query) -> dict[tuple[str | int, ...], Counts]:
        """What was used until now, on disk or not yet: by the values of `asked.by`.

        Raises:
            RequestError: `usage_unavailable`; or `bad_request` where it would be too long.

        """
        try:
            return await self._turn.run(lambda: self._sums(asked))
        except (UsageFileError, NoAnswerError) as error:
            msg = f"cannot read what was used: {str(error) or _NO_ANSWER}; try again"
            raise RequestError("usage_unavailable", msg) from None

    async def close(self, seconds: float) -> None:
        """Write what is left, for so long at most."""
        try:
            await asyncio.wait_for(self.flush(), seconds)
        except TimeoutError:
            self._set_problem(_NO_ANSWER)
        if self._waiting:
            log.error("what keys have used since it was last written is lost",
                      file=str(self._file.path), why=self.problem,
                      requests=sum(counts.requests for counts in self._waiting.values()))  # fmt: skip
        else:
            await self._offload(self._file.close)

    async def _load(self) -> None:
        this = month_start(self._now())
        newest = await self._offload(self._file.newest)
        others = [month_start(this - 1), this if newest is None else month_start(newest)]
        charged: dict[int, _Month] = {}
        for month in _latest([*others, *self._charged, this]):
            asked = Query(month, month_end(month), ("key", "day"))
            found = await self._offload(partial(self._file.sums, asked, all_rows=True))
            days: _Month = {}
            for (key, day), counts in found.items():
                days.setdefault(str(key), {})[int(day)] = counts.tokens
            charged[month] = days
        self._loaded, self._charged = True, charged
        self._charge(self._waiting)

    async def _sums(self, asked: Query) -> dict[tuple[str | int, ...], Counts]:
        groups = await self._offload(self._file.sums, asked)
        added(groups, self._waiting.items(), asked)
        added(groups, self.usage.since().items(), asked)
        if len(groups) > MOST_ROWS:
            msg = f"cannot report more than {MOST_ROWS} rows: ask for a shorter time, or by less"
            raise RequestError("bad_request", msg)
        return groups

    async def _write(self) -> None:
        self._counted.clear()
        taken = self.usage.take()
        for bucket, counts in taken.items():
            self._waiting.setdefault(bucket, Counts()).add(counts)
        months = [*sorted({month_start(hour) for hour in {bucket.hour for bucket in taken}}), month_start(self._now())]
        if not self._charged.keys() >= set(months):
            self._loaded = False  # what the file has of them
        self._charged = {month: self._charged.get(month, {}) for month in _latest([*self._charged, *months])}
        self._charge(taken)
        try:
            if self._waiting:
                await self._offload(self._file.add, self._waiting, self._now())
                self._waiting = {}
            if not self._loaded:
                await self._load()
        except UsageFileError as error:
            self._counted.set()  # again
            self._bound()
            self._set_problem(str(error))
        else:
            self._set_problem(None)

    def _charge(self, counted: Mapping[Bucket, Counts]) -> None:
        months = {hour: self._charged.get(month_start(hour)) for hour in {bucket.hour for bucket in counted}}
        for bucket, counts in counted.items():
            if (month := months[bucket.hour]) is not None:
                days, day = month.setdefault(bucket.key, {}), bucket.hour // DAY * DAY
                days[day] = days.get(day, 0) + counts.tokens

    def _bound(self) -> None:
        excess = len(self._waiting) - _MOST_WAITING
        for bucket in sorted(self._waiting)[:excess] if excess > 0 else ():
            del self._waiting[bucket]

    def _set_problem(self, problem: str | None) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        if problem is None:
            log.info("what keys have used is written again", file=str(self._file.path))
        else:
            log.error("what keys have used cannot be written, and is held in memory meanwhile",
                      file=str(self._file.path), error=problem)  # fmt: skip
        notify(self._listeners)


def _latest(months: list[int]) -> list[int]:
    """Of those that the clock was in, one after another, the last few, each once."""
    return list(dict.fromkeys(reversed(months)))[:_MOST_MONTHS][::-1]
