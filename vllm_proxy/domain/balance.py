"""Which engine has most of a prompt in its prefix cache, by what each was sent: the policy of `balance = "prefix"`.

No engine is asked. A prompt is its raw bytes, hashed up to each of some forty lengths: its marks. An engine is known to
have what it was sent, so two prompts that begin alike have their first marks in common, and who was sent the one is
right for the other, as long as it is not much busier than the rest. The hashes are keyed by the process, so nobody
outside can make prompts whose marks are the same.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

FIRST, MOST = 256, 2**20  # bytes: the shortest beginning that has a mark, and the longest
_GROWTH = 1.25
REMEMBERED = 20_000  # marks of one engine
_HALF = REMEMBERED // 2
_BUSIER, _SPARE = 1.25, 2  # an engine has room where it has at most so many times the mean, and so many more
_PART = 4  # of a prompt, one in so many has to be known
_MOST_BITS = 60  # then all is forgotten, and engines are numbered anew


def _lengths() -> Iterable[int]:
    yield 0
    length = FIRST
    while length < MOST:
        yield length
        length = int(length * _GROWTH)
    yield MOST


LENGTHS = (*_lengths(),)  # of the beginnings that have marks, by how many marks are of them and of shorter ones
_SPANS = [end - begin for begin, end in pairwise(LENGTHS)]
# One call for all pieces of a text: by how many lengths it has.
_CUT = [struct.Struct("".join(f"{span}s" for span in _SPANS[:count])).unpack_from for count in range(len(_SPANS) + 1)]


class Prompt(Protocol):
    """A prompt, as it is compared with others."""

    marks: Sequence[int]  # of its beginnings, the longest one first
    size: int  # bytes, at most `MOST`
    sessions: Sequence[int]  # marks of what its client says that it belongs to


_MOST_MARKS = len(LENGTHS) + 8  # of one prompt, with its sessions


def marks_of(text: bytes) -> list[int]:
    """The marks of a text, that of its longest beginning first; none of a text below `FIRST`.

    Of two texts that are equal up to one of `LENGTHS`, those of the lengths up to there are equal; others never are,
    as far as a hash of 64 bits tells.
    """
    # No two pieces have one length, so a sum tells their order too.
    marks = [*accumulate(map(hash, _CUT[bisect_right(LENGTHS, len(text)) - 1](text)))]
    marks.reverse()
    return marks


class Engine(Protocol):
    """One that requests are sent to."""

    in_flight: int  # requests
    bit: int  # by which a memory knows it; 0: by none


class Memory[E: Engine]:
    """Which engines of one model were sent which marks: the last 10,000 for each engine at least, at most 20,000.

    Two tables take turns: what is not seen again before the younger one has been full twice is forgotten. All marks of
    a prompt are learnt together, so each table has an engine for its beginnings up to some length and none behind.
    """

    __slots__ = ("_all", "_before", "_engines", "_half", "_next", "_now")

    def __init__(self) -> None:
        self._now: dict[int, int] = {}  # by mark: bits of engines
        self._before: dict[int, int] = {}
        self._half = _HALF
        self._engines: dict[int, E] = {}  # those that are there, by their bits
        self._all = 0  # their bits
        self._next = 1

    def __len__(self) -> int:
        """How many marks it has, at most."""
        return len(self._now) + len(self._before)

    def follow(self, engines: Sequence[E]) -> None:
        """These are there now. Of one without a bit nothing is known; it gets one here.

        A bit is not used again: what is known of whom it belonged to is never looked for.
        """
        self._half = _HALF * max(len(engines), 1)
        if self._next >> _MOST_BITS:
            self.clear()
            self._next = 1
            for one in engines:
                one.bit = 0
        for one in engines:
            if not one.bit:
                one.bit = self._next
                self._next <<= 1
        self._engines = {one.bit: one for one in engines}
        self._all = sum(self._engines)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._now, self._before = {}, {}

    def learn(self, prompt: Prompt, engine: E) -> None:
        """It is sent this."""
        now, bit = self._now, engine.bit
        if len(now) + _MOST_MARKS > self._half:
            self._before, self._now = now, {}
            now = self._now
        for mark in prompt.marks:
            bits = now.get(mark, 0)
            if bits & bit:
                break  # then all shorter ones are there
            now[mark] = bits | bit
        for mark in prompt.sessions:
            now[mark] = now.get(mark, 0) | bit

    def forget(self, prompt: Prompt, engine: E, known: int = 0) -> None:
        """It was not sent this after all; but it had the first `known` marks before."""
        others = ~engine.bit
        for table in (self._now, self._before):
            for mark in (*prompt.marks[: len(prompt.marks) - known], *prompt.sessions):
                if mark in table:
                    table[mark] &= others

    def known(self, marks: Sequence[int], engines: int) -> tuple[int, int]:
        """(how many of a prompt's marks one of these engines has, which ones have so many); engines as their bits."""
        table = self._now
        unknown, bits = len(marks), 0
        for mark in filter(table.__contains__, marks):
            if bits := table[mark] & engines:
                unknown = marks.index(mark)
                break
        if unknown:
            table = self._before
            for mark in filter(table.__contains__, marks[:unknown]):
                if found := table[mark] & engines:
                    unknown, bits = marks.index(mark), found
                    break
        return len(marks) - unknown, bits

    def choose(self, prompt: Prompt, free: Sequence[E], chance: float) -> tuple[E, int, bool]:
        """(who gets a prompt, how many of its marks are known to be there, whether that or a session decided).

        `free`: who can be sent it, two at least. `chance`: from 0 up to 1, decides where all else is the same.
        """
        flights = [one.in_flight for one in free]
        room = _BUSIER * (sum(flights) + 1) / len(free) + _SPARE
        if max(flights) <= room and len(free) == len(self._engines):
            fits = self._all
        else:
            fits = sum([one.bit for one in free if one.in_flight <= room])
        mine = self._having(prompt.sessions, fits) if prompt.sessions else 0
        count, bits = self.known(prompt.marks, mine or fits)
        if mine or (count and LENGTHS[count] * _PART >= prompt.size):
            bits = bits or mine
            only = self._engines.get(bits)
            return only or least_loaded([one for one in free if one.bit & bits], chance), count, True
        chosen = least_loaded(free, chance)
        return chosen, self.known(prompt.marks, chosen.bit)[0] if count else 0, False

    def _having(self, marks: Sequence[int], engines: int) -> int:
        """Which of these engines have one of these marks."""
        found = 0
        for mark in marks:
            found |= self._now.get(mark, 0) | self._before.get(mark, 0)
        return found & engines


def least_loaded[E: Engine](free: Sequence[E], chance: float) -> E:
    """The one with the fewest requests in flight; `chance` as above."""
    if len(free) == 1:
        return free[0]
    flights = [one.in_flight for one in free]
    least = min(flights)
    if flights.count(least) == 1:
        return free[flights.index(least)]
    idle = [one for one in free if one.in_flight == least]
    return idle[int(chance * len(idle))]
