"""Replicas of one model, with vLLM's scheduler and prefix cache as a model: what choosing between them is worth.

An engine batches continuously and fills prompts in pieces. A step takes a constant, something for each request, and
what its tokens take, with attention over what is there already. Freed blocks stay until their room is needed, least
recently used first, the last ones of a prompt before the first. A policy sees what the daemon sees: bytes, of which a
token has four, and how many requests it has in flight at each engine; that of the daemon is the daemon's own.
"""

import heapq
import itertools
import random
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from vllm_proxy.domain.balance import LENGTHS, MOST, Memory, least_loaded

ENGINES = 4
BLOCK = 64  # tokens
BYTES = 4  # of a token
STEP, PER_REQUEST, PER_TOKEN, PER_PAIR = 0.018, 0.00012, 1 / 9000, 2e-9  # seconds; a pair: a token and one before it
MOST_REQUESTS, MOST_TOKENS = 128, 2048  # of a step
CAPACITY = 120_000 // BLOCK  # blocks of an engine
SECONDS, WARM = 60.0, 20.0  # of a run, and after which it is looked at
HEAD = ("load", "policy", "found in caches", "first token, mean", "p90", "a token", "requests a second")


@dataclass(slots=True, eq=False)
class Asked:
    """A request. A block stands for the text up to its end."""

    at: float
    blocks: Sequence[int]
    output: int
    chat: "Chat"
    marks: Sequence[int] = ()
    size: int = 0
    sessions: Sequence[int] = ()
    found: int = 0  # blocks in the cache
    left: int = 0  # tokens of the prompt that are still to be computed
    there: int = 0  # that are
    made: int = 0  # tokens of its answer
    first: float = 0.0  # when it had its first one
    end: float = 0.0

    def __post_init__(self) -> None:
        self.size = min(len(self.blocks) * BLOCK * BYTES, MOST)
        lengths = [length for length in LENGTHS[1:] if length <= self.size]
        self.marks = [self.blocks[length // (BLOCK * BYTES) - 1] for length in reversed(lengths)]


@dataclass(slots=True, eq=False)
class Chat:
    """Its turns, each behind all before it."""

    blocks: Sequence[int]
    turns: int
    rng: random.Random  # of its own: it is the same under every policy


class Engine:
    """One replica."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.in_flight = self.bit = 0
        self.busy = False
        self.waiting: deque[Asked] = deque()
        self.running: list[Asked] = []
        self._free: OrderedDict[int, None] = OrderedDict()  # blocks that nobody uses and that still hold something
        self._used: Counter[int] = Counter()
        self._private = 0  # blocks of answers

    def _admit(self) -> None:
        while self.waiting and len(self.running) < MOST_REQUESTS:
            asked = self.waiting[0]
            room = CAPACITY - len(self._used) - self._private
            if self.running and len(asked.blocks) + _answer(asked) > room:
                return
            self.waiting.popleft()
            held = itertools.takewhile(lambda block: block in self._used or block in self._free, asked.blocks[:-1])
            asked.found = sum(1 for _ in held)
            asked.there = asked.found * BLOCK
            asked.left = len(asked.blocks) * BLOCK - asked.there
            for block in asked.blocks:
                self._used[block] += 1
                self._free.pop(block, None)
            self._private += _answer(asked)
            self._evict()
            self.running.append(asked)

    def _evict(self) -> None:
        while self._free and len(self._used) + self._private + len(self._free) > CAPACITY:
            self._free.popitem(last=False)

    def leave(self, asked: Asked, kept: Sequence[int]) -> None:
        """It has ended; `kept`: blocks of its answer, which the next turn begins with."""
        self.running.remove(asked)
        self.in_flight -= 1
        self._private -= _answer(asked)
        for block in (*reversed(kept), *reversed(asked.blocks)):
            self._used[block] -= block not in kept
            if self._used[block] <= 0:
                del self._used[block]
                self._free[block] = None
                self._free.move_to_end(block)
        self._evict()

    def step(self) -> tuple[float, list[Asked], list[Asked]]:
        """(seconds, whose first token it made, who is done); 0 seconds: there was nothing to do."""
        self._admit()
        if not self.running:
            return 0.0, [], []
        seconds, firsts = STEP + PER_REQUEST * len(self.running), []
        budget = MOST_TOKENS - sum(not asked.left for asked in self.running)
        for asked in self.running:
            if not asked.left:
                asked.made += 1
            elif count := min(asked.left, max(budget, 0)):
                budget -= count
                seconds += count * PER_TOKEN + PER_PAIR * count * (asked.there + count / 2)
                asked.left -= count
                asked.there += count
                if not asked.left:
                    asked.made = 1
                    firsts.append(asked)
        return seconds, firsts, [asked for asked in self.running if asked.made >= asked.output]


def _answer(asked: Asked) -> int:
    return asked.output // BLOCK + 1


# Policies


class Policy(Protocol):
    """Which engine gets a request."""

    def choose(self, asked: Asked, engines: Sequence[Engine], chance: float) -> Engine:
        """One of them."""


class Load:
    """The fewest requests in flight."""

    def choose(self, asked: Asked, engines: Sequence[Engine], chance: float) -> Engine:  # noqa: ARG002 - of all policies
        """One of them."""
        return least_loaded(engines, chance)


class Prefix:
    """The daemon's own."""

    def __init__(self) -> None:
        self._memory: Memory[Engine] = Memory()

    def choose(self, asked: Asked, engines: Sequence[Engine], chance: float) -> Engine:
        """One of them."""
        self._memory.follow(engines)
        engine, _, _ = self._memory.choose(asked, engines, chance)
        self._memory.learn(asked, engine)
        return engine


class Hashed:
    """The first 2 KiB say which, and the next ones where that is busier than 1.25 times the mean."""

    def choose(self, asked: Asked, engines: Sequence[Engine], chance: float) -> Engine:  # noqa: ARG002 - as above
        """One of them."""
        begin = asked.blocks[min(2048 // (BLOCK * BYTES), len(asked.blocks)) - 1]
        order = sorted(engines, key=lambda one: hash((begin, one.number, 77)))
        room = 1.25 * (sum(one.in_flight for one in engines) + 1) / len(engines)
        return next((one for one in order if one.in_flight <= room), order[0])


POLICIES: Mapping[str, Callable[[], Policy]] = {"least-loaded": Load, "hash of 2 KiB": Hashed, "prefix": Prefix}


# Loads


@dataclass(slots=True)
class Crowd:
    """Chats that come at random, each behind one of some system prompts; lengths in tokens."""

    rate: float  # new chats a second
    prompts: int
    system: int
    question: int
    answer: int
    turns: int
    think: float  # seconds between two turns
    equal: bool = False  # whether each prompt is as likely as any other
    _blocks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def more(self, blocks: Sequence[int], tokens: float) -> list[int]:
        """So much new text behind these blocks."""
        return [*blocks, *itertools.islice(self._blocks, max(1, round(tokens / BLOCK)))]

    def arrivals(self, seed: int) -> Iterator[Asked]:
        """First turns, in time."""
        rng, now = random.Random(seed), 0.0
        systems = [self.more([], self.system) for _ in range(self.prompts)]
        weights = [1.0 if self.equal else 1 / (number + 1) for number in range(self.prompts)]
        while (now := now + rng.expovariate(self.rate)) < SECONDS:
            own = random.Random(rng.random())
            turns = 1 if self.turns == 1 else max(1, int(own.expovariate(1 / self.turns)))
            yield self._turn(now, Chat(rng.choices(systems, weights)[0], turns, own))

    def _turn(self, at: float, chat: Chat) -> Asked:
        chat.blocks = self.more(chat.blocks, chat.rng.gammavariate(2, self.question / 2))
        chat.turns -= 1
        return Asked(at, chat.blocks, max(16, int(chat.rng.gammavariate(2, self.answer / 2))), chat)

    def next(self, asked: Asked, now: float) -> tuple[Sequence[int], Asked | None]:
        """(the blocks of its answer that the next turn holds, that turn)."""
        chat = asked.chat
        if not chat.turns:
            return (), None
        chat.blocks = self.more(chat.blocks, asked.output)
        kept = chat.blocks[len(asked.blocks) :]
        return kept, self._turn(now + chat.rng.expovariate(1 / self.think), chat)


LOADS: Mapping[str, Callable[[], Crowd]] = {
    "chats of people": partial(Crowd, 7.6, 20, 600, 120, 200, 6, 15.0),
    "agents, long contexts": partial(Crowd, 1.7, 4, 3008, 600, 80, 15, 2.0),
    "questions about 60 documents": partial(Crowd, 12.8, 60, 6000, 64, 100, 1, 1.0),
    "one prompt for all": partial(Crowd, 44.0, 1, 3008, 64, 100, 1, 1.0),
    "nothing in common": partial(Crowd, 14.4, 10_000, 64, 1500, 150, 1, 1.0, equal=True),
}


class Run:
    """One crowd under one policy."""

    def __init__(self, crowd: Crowd, policy: Policy, seed: int) -> None:
        self.done: list[Asked] = []
        self._crowd, self._policy = crowd, policy
        self._rng = random.Random(seed)
        self._engines = [Engine(number) for number in range(ENGINES)]
        self._arrivals = crowd.arrivals(seed + 1)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()  # of two events at one time the first one that was expected comes first

    def play(self) -> None:
        """Until all that came in time are answered, or as long again has passed."""
        self._expect()
        while self._events and self._events[0][0] < 2 * SECONDS:
            now, _, happens = heapq.heappop(self._events)
            happens(now)

    def _at(self, when: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happens))

    def _expect(self) -> None:
        if (asked := next(self._arrivals, None)) is not None:
            self._at(asked.at, partial(self._arrives, asked))

    def _arrives(self, asked: Asked, now: float) -> None:
        self._comes(asked, now)
        self._expect()

    def _comes(self, asked: Asked, now: float) -> None:
        engine = self._policy.choose(asked, self._engines, self._rng.random())
        engine.in_flight += 1
        engine.waiting.append(asked)
        if not engine.busy:
            engine.busy = True
            self._works(engine, now)

    def _works(self, engine: Engine, now: float) -> None:
        seconds, firsts, ended = engine.step()
        if seconds:
            self._at(now + seconds, partial(self._has_worked, engine, firsts, ended))
        else:
            engine.busy = False

    def _has_worked(self, engine: Engine, firsts: Sequence[Asked], ended: Sequence[Asked], now: float) -> None:
        for asked in firsts:
            asked.first = now
        for asked in ended:
            asked.end = now
            kept, turn = self._crowd.next(asked, now)
            engine.leave(asked, kept)
            self.done.append(asked)
            if turn is not None and turn.at < SECONDS:
                self._at(turn.at, partial(self._comes, turn))
        self._works(engine, now)


def run(crowd: Crowd, policy: Policy, seed: int = 1) -> tuple[str, ...]:
    """What became of it, as the cells of a table."""
    found = Run(crowd, policy, seed)
    found.play()
    return _cells([asked for asked in found.done if WARM < asked.at < SECONDS])


def _cells(found: Sequence[Asked]) -> tuple[str, ...]:
    waits = sorted(asked.first - asked.at for asked in found)
    tokens = [(asked.end - asked.first) / (asked.made - 1) for asked in found if asked.made > 1]
    hits = sum(asked.found for asked in found) / sum(len(asked.blocks) for asked in found)
    return (
        f"{hits:.0%}",
        f"{statistics.mean(waits) * 1000:,.0f} ms",
        f"{waits[len(waits) * 9 // 10] * 1000:,.0f} ms",
        f"{statistics.mean(tokens) * 1000:.0f} ms",
        f"{sum(asked.end < SECONDS for asked in found) / (SECONDS - WARM):.1f}",
    )


def rows() -> list[tuple[str, ...]]:
    """One for each load and policy."""
    return [(name, kind, *run(crowd(), policy())) for name, crowd in LOADS.items() for kind, policy in POLICIES.items()]
