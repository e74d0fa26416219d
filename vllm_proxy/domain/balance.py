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
from typing import NamedTuple, Protocol

FIRST, MOST = 256, 2**20  # bytes: the shortest beginning that has a mark, and the longest
_GROWTH = 1.25
REMEMBERED = 20_000  # marks of one engine
_HALF = REMEMBERED // 2
_BUSIER, _SPARE = 1.25, 2  # an engine has room where it has at most so many times the mean, and so many more
_PART = 4  # of a prompt, one in so many has to be known
_MOST_BITS = 60  # then all is forgotten, and engines are numbered anew


def _lengths() -> Iterable[int]:
    length = FIRST
    while length < MOST:
        yield length
        length = int(length * _GROWTH)
    yield MOST


LENGTHS = (*_lengths(),)
_SPANS = [end - begin for begin, end in pairwise((0, *LENGTHS))]
# One call for all pieces of a text: by how many lengths it has.
_CUT = [struct.Struct("".join(f"{span}s" for span in _SPANS[:count])).unpack_from for count in range(len(_SPANS) + 1)]


class Marks(NamedTuple):
    """A prompt, as it is compared with others."""

    marks: Sequence[int]  # of its beginnings, the longest one first
    size: int  # bytes, at most `MOST`
    sessions: Sequence[int] = ()  # of what its client says that it belongs to


NO_MARKS = Marks((), 0)


def marks_of(text: bytes) -> list[int]:
    """The marks of a text, that of its longest beginning first; none of a text below `FIRST`.

    Of two texts that are equal up to one of `LENGTHS`, those of the lengths up to there are equal; others never are,
    as far as a hash of 64 bits tells.
    """
    # No two pieces are equally long but at random, so a sum depends on their order too.
    marks = [*accumulate(map(hash, _CUT[bisect_right(LENGTHS, len(text))](text)))]
    marks.reverse()
    return marks


def bytes_known(count: int) -> int:
    """How long a beginning is whose first `count` marks are known."""
    return LENGTHS[count - 1] if count else 0


class Engine(Protocol):
    """One that requests are sent to."""

    in_flight: int  # requests
    bit: int  # by which a memory knows it; 0: by none


class Memory:
    """Which engines of one model were sent which marks: the last 10,000 for each engine at least, at most 20,000.

    Two tables take turns: what is not seen again before the younger one has been full twice is forgotten. All marks of
    a prompt are learnt together, so each table has an engine for its beginnings up to some length and none behind.
    """

    __slots__ = ("_before", "_half", "_next", "_now")

    def __init__(self) -> None:
        self._now: dict[int, int] = {}  # by mark: bits of engines
        self._before: dict[int, int] = {}
        self._half = REMEMBERED // 2
        self._next = 1

    def __len__(self) -> int:
        """How many marks it has, at most."""
        return len(self._now) + len(self._before)

    def follow(self, engines: Sequence[Engine]) -> None:
        """These are there now. Of one without a bit nothing is known; it gets one here.

        A bit is not used again: what is known of whom it belonged to is never looked for.
        """
        self._half = REMEMBERED // 2 * max(len(engines), 1)
        if self._next >> _MOST_BITS:
            self.clear()
            self._next = 1
            for one in engines:
                one.bit = 0
        for one in engines:
            if not one.bit:
                one.bit = self._next
                self._next <<= 1

    def clear(self) -> None:
        """Nothing is known any more."""
        self._now, self._before = {}, {}

    def learn(self, prompt: Marks, engine: Engine) -> None:
        """It is sent this."""
        if len(self._now) + len(prompt.marks) + len(prompt.sessions) > self._half:
            self._before, self._now = self._now, {}
        now, bit = self._now, engine.bit
        for mark in prompt.marks:
            bits = now.get(mark, 0)
            if bits & bit:
                break  # then all shorter ones are there
            now[mark] = bits | bit
        for mark in prompt.sessions:
            now[mark] = now.get(mark, 0) | bit

    def forget(self, prompt: Marks, engine: Engine, known: int = 0) -> None:
        """It was not sent this after all; but it had the first `known` marks before."""
        others = ~engine.bit
        for table in (self._now, self._before):
            for mark in (*prompt.marks[: len(prompt.marks) - known], *prompt.sessions):
                if mark in table:
                    table[mark] &= others

    def known(self, marks: Sequence[int], engines: int) -> tuple[int, int]:
        """(how many of a prompt's marks one of these engines has, which ones have so many); engines as their bits."""
        unknown, bits = len(marks), 0
        for table in (self._now, self._before):
            for mark in filter(table.__contains__, marks):
                if found := table[mark] & engines:
                    index = marks.index(mark)
                    if index < unknown:
                        unknown, bits = index, found
                    elif index == unknown:
                        bits |= found
                    break
        return len(marks) - unknown, bits

    def choose[E: Engine](self, prompt: Marks, free: Sequence[E], chance: float) -> tuple[E, int, bool]:
        """(who gets a prompt, how many of its marks are known to be there, whether that or a session decided).

        `free`: who can be sent it, two at least. `chance`: from 0 up to 1, decides where all else is the same.
        """
        marks, size, sessions = prompt
        flights = [one.in_flight for one in free]
        room = _BUSIER * (sum(flights) + 1) / len(free) + _SPARE
        fits = 0
        for one in free:
            if one.in_flight <= room:
                fits |= one.bit
        mine = 0
        for mark in sessions:
            mine |= (self._now.get(mark, 0) | self._before.get(mark, 0)) & fits
        count, bits = self.known(marks, mine or fits)
        if mine or (count and LENGTHS[count - 1] * _PART >= size):
            bits = bits or mine
            return least_loaded([one for one in free if one.bit & bits], chance), count, True
        chosen = least_loaded(free, chance)
        return chosen, self.known(marks, chosen.bit)[0] if count else 0, False


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
