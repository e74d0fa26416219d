"""Fair queueing: who is next among several keys, in a queue that takes the lowest number as vLLM's does."""

import heapq
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_proxy.domain.fair import FairShare

type Waiting = tuple[int, int, str, int]  # number, arrival, key, tokens


class Queue:
    """One model that works on one request at a time."""

    def __init__(self, keys: dict[str, tuple[int, float]]) -> None:
        self.fair, self.keys = FairShare(), keys
        self.waiting: list[Waiting] = []
        self.arrivals = 0

    def ask(self, key: str, tokens: int) -> None:
        """One more request of a key."""
        self.arrivals += 1
        priority, weight = self.keys[key]
        number = self.fair.number(key, priority, weight, tokens)
        heapq.heappush(self.waiting, (number, self.arrivals, key, tokens))

    def serve(self) -> tuple[str, int]:
        """The next one, from its first byte to its end."""
        number, _, key, tokens = heapq.heappop(self.waiting)
        self.fair.began(number)
        self.fair.ended(key, *self.keys[key], tokens, tokens)
        return key, tokens


def test_one_request_of_another_key_is_next_but_one() -> None:
    """Sixteen of a key wait, and one is being answered; the other key's is not behind those."""
    queue = Queue({"heavy": (0, 1.0), "light": (0, 1.0)})
    for _ in range(17):
        queue.ask("heavy", 100)
    assert queue.serve() == ("heavy", 100)
    for _ in range(2):
        queue.ask("light", 100)
        assert "light" in {queue.serve()[0], queue.serve()[0]}


def test_a_higher_priority_is_before_all_others() -> None:
    """However much its key has used; below it the others share as if there were no such key."""
    queue = Queue({"first": (1, 1.0), "a": (0, 1.0), "b": (0, 1.0), "last": (-1, 1000.0)})
    for _ in range(3):
        for key, tokens in (("last", 1), ("a", 10**6), ("first", 10**9)):
            queue.ask(key, tokens)
    assert [queue.serve()[0] for _ in range(4)] == ["first"] * 3 + ["a"]
    queue.ask("b", 10)  # in its class nobody but the first of `a` has begun
    assert [queue.serve()[0] for _ in range(6)] == ["b", "a", "a", "last", "last", "last"]


def test_whoever_was_idle_has_saved_nothing() -> None:
    """It shares from now on, and does not first catch up with what others had meanwhile."""
    queue = Queue({"busy": (0, 1.0), "idle": (0, 1.0)})
    queue.ask("idle", 10)
    queue.serve()
    for _ in range(50):
        queue.ask("busy", 10)
    for _ in range(20):
        queue.serve()
    for _ in range(20):
        queue.ask("idle", 10)
    assert 9 <= Counter(queue.serve()[0] for _ in range(20))["idle"] <= 11


def test_numbers_begin_at_zero_whenever_nothing_is_in_flight() -> None:
    """So they do not grow for good."""
    fair = FairShare()
    assert fair.number("a", 0, 1.0, 500) == 0
    assert fair.number("a", 0, 1.0, 500) == 500
    fair.ended("a", 0, 1.0, 500, 500)
    assert fair.number("a", 0, 1.0, 500) == 1000
    fair.ended("a", 0, 1.0, 500, 500)
    fair.ended("a", 0, 1.0, 500, 500)
    assert fair.number("a", 0, 1.0, 500) == 0


def test_a_crowd_that_gives_up_does_not_put_its_key_behind() -> None:
    """What was never answered is not counted; else the key would wait for as long as all of it had taken."""
    fair = FairShare()
    fair.number("other", 0, 1.0, 100)
    for _ in range(1000):
        fair.number("crowd", 0, 2.0, 100)
    for _ in range(1000):
        fair.ended("crowd", 0, 2.0, 100, 0)
    assert fair.number("crowd", 0, 2.0, 100) == 0


def test_a_key_is_charged_what_its_request_used_and_not_what_it_held() -> None:
    """Who asks for long answers and gets short ones is as who asks for short ones; one that was longer counts whole."""
    fair = FairShare()
    fair.number("other", 0, 1.0, 1)
    for key, held in (("a", 4000), ("b", 20)):
        fair.number(key, 0, 1.0, held)
        fair.ended(key, 0, 1.0, held, 100)
    assert fair.number("a", 0, 1.0, 1) == fair.number("b", 0, 1.0, 1) == 100


def test_a_start_never_crosses_into_another_priority() -> None:
    """Not after years without a pause either: then a class is in the order of arrival."""
    fair = FairShare()
    for _ in range(3):
        last = fair.number("a", 3, 0.001, 10**12)
        fair.began(last)
    assert last == 2**40 - 1 - 3 * 2**40
    assert fair.number("b", 2, 1.0, 1) == -2 * 2**40
    assert fair.number("c", -1000, 1.0, 1) == 1000 * 2**40 < 2**63


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500)), min_size=1, max_size=60),
    st.lists(st.booleans(), max_size=80),
)
def test_keys_that_wait_get_their_shares_in_tokens(
    weights: dict[str, float], requests: list[tuple[str, int]], order: list[bool]
) -> None:
    """While two keys wait all the time, what they got by their weights differs by no more than one request of each."""
    queue = Queue({key: (0, weight) for key, weight in weights.items()})
    asked = [(key, tokens) for key, tokens in requests if key in weights]
    since: dict[frozenset[str], Counter[str]] = {}
    for ask in [*order, *[True] * len(asked), *[False] * len(asked)]:
        if ask:
            if asked:
                queue.ask(*asked.pop())
            continue
        if not queue.waiting:
            since.clear()
            continue
        waiting = {key for _, _, key, _ in queue.waiting}
        key, tokens = queue.serve()
        pairs = {frozenset((one, other)) for one in waiting for other in waiting if one < other}
        since = {pair: since.get(pair, Counter()) for pair in pairs}
        for pair, got in since.items():
            if key in pair:
                got[key] += tokens
            one, other = pair
            assert (
                abs(got[one] / weights[one] - got[other] / weights[other])
                <= 500 / weights[one] + 500 / weights[other] + 2
            )
