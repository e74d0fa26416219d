"""Fair queueing: who is next among several keys, in a queue that takes the lowest number as vLLM's does."""

import heapq
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_proxy.domain.fair import FairShare, Place
from vllm_proxy.domain.tokens import Estimate, Tokens

type Waiting = tuple[int, int, str, Place, int]  # number, arrival, key, its place, tokens


class Queue:
    """One model that works on one request at a time."""

    def __init__(self, keys: dict[str, tuple[int, float]]) -> None:
        self.fair, self.keys = FairShare(), keys
        self.waiting: list[Waiting] = []
        self.arrivals = 0

    def ask(self, key: str, tokens: int, expected: int | None = None) -> None:
        """One more request of a key, that takes so many; None: as many are expected."""
        self.arrivals += 1
        place = self.fair.place(key, *self.keys[key], tokens if expected is None else expected)
        heapq.heappush(self.waiting, (place.number, self.arrivals, key, place, tokens))

    def serve(self) -> tuple[str, int]:
        """The next one, from its first byte to its end."""
        _, _, key, place, tokens = heapq.heappop(self.waiting)
        place.began()
        place.ended(tokens)
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
    places = [fair.place("a", 0, 1.0, 500), fair.place("a", 0, 1.0, 500)]
    places[0].ended(500)
    places.append(fair.place("a", 0, 1.0, 500))
    assert [place.number for place in places] == [0, 500, 1000]
    for place in places[1:]:
        place.ended(500)
    assert fair.place("a", 0, 1.0, 500).number == 0


def test_a_crowd_that_gives_up_does_not_put_its_key_behind() -> None:
    """What was never answered is not counted; else the key would wait for as long as all of it had taken."""
    fair = FairShare()
    fair.place("other", 0, 1.0, 100)
    for place in [fair.place("crowd", 0, 2.0, 100) for _ in range(1000)]:
        place.ended(0)
    assert fair.place("crowd", 0, 2.0, 100).number == 0


def test_who_stays_of_a_crowd_that_gives_up_is_followed_by_the_next() -> None:
    """The place of the next request is behind those that wait still, not behind those that have gone."""
    fair = FairShare()
    crowd = [fair.place("crowd", 0, 1.0, 100) for _ in range(1000)]
    for place in crowd[1:]:
        place.ended(0)
    assert fair.place("crowd", 0, 1.0, 100).number == 100


def test_a_key_is_charged_what_its_request_used_and_not_what_was_expected() -> None:
    """Who seems to want long answers and gets short ones is as who wants short ones; a longer one counts whole."""
    fair = FairShare()
    fair.place("other", 0, 1.0, 1)
    for key, expected in (("a", 4000), ("b", 20)):
        fair.place(key, 0, 1.0, expected).ended(100)
    assert fair.place("a", 0, 1.0, 1).number == fair.place("b", 0, 1.0, 1).number == 100


def test_a_start_never_crosses_into_another_priority() -> None:
    """Not after years without a pause either: then a class is in the order of arrival."""
    fair = FairShare()
    last = 0
    for _ in range(3):
        place = fair.place("a", 3, 0.001, 10**12)
        place.began()
        last = place.number
    assert last == 2**40 - 1 - 3 * 2**40
    assert fair.place("b", 2, 1.0, 1).number == -2 * 2**40
    assert fair.place("c", -1000, 1.0, 1).number == 1000 * 2**40 < 2**63


def test_a_request_is_expected_to_take_what_others_of_its_key_took() -> None:
    """On average, and no more than it allows: not as many as it allows. Of a new key, what other keys' took."""
    fair, mine = FairShare(), Estimate()
    assert fair.tokens(mine, 10, 30_000) == 10 + 256, "nobody has had an answer"
    for tokens in (10, 30):
        fair.estimate.learn(Tokens(5, tokens), 20, binary=False)
    assert fair.tokens(mine, 10, 30_000) == 10 + 20
    for tokens in (100, 100, 100, 500):
        mine.learn(Tokens(5, tokens), 20, binary=False)
    assert fair.tokens(mine, 10, 30_000) == 10 + 200
    assert fair.tokens(mine, 10, 16) == 10 + 16
    assert fair.tokens(mine, 10, 0) == 10


def test_keys_that_allow_much_and_little_get_the_same() -> None:
    """Hundreds of requests at once, of answers that differ much: while both wait, each gets half of the tokens."""
    queue = Queue({"open": (0, 1.0), "short": (0, 1.0)})
    mine = {key: Estimate() for key in queue.keys}
    for key, long, most in (("open", 500, 30_000), ("short", 60, 100)):
        answers = [long if number % 5 == 4 else 20 for number in range(500)]
        for tokens in answers[:40]:
            mine[key].learn(Tokens(5, tokens), 20, binary=False)
        for tokens in answers:
            queue.ask(key, tokens, queue.fair.tokens(mine[key], 0, most))
    got: Counter[str] = Counter()
    while {key for _, _, key, _, _ in queue.waiting} == {"open", "short"}:
        key, tokens = queue.serve()
        got[key] += tokens
    assert abs(got["open"] - got["short"]) <= 500 + 100


@example([("a", 0, 20, 0), ("a", 0, 1, 0), ("a", 3, 1, 0), ("a", 0, 1, 0)])
@given(
    st.lists(
        st.tuples(st.sampled_from("aab"), st.integers(0, 3), st.integers(1, 500), st.integers(0, 500)), max_size=80
    )
)
def test_a_key_never_overtakes_itself(steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever was expected and used: a request is not before an earlier one of its key that waits."""
    fair, waiting, running = FairShare(), dict[str, list[Place]](a=[], b=[]), list[Place]()
    for key, step, expected, used in steps:
        mine = waiting[key]
        if step <= 1:
            place = fair.place(key, 0, 2.0, expected)
            assert all(place.number >= earlier.number for earlier in mine)
            mine.append(place)
        elif step == 2 and mine:
            running.append(mine.pop(0))
            running[-1].began()
        elif running:
            running.pop(used % len(running)).ended(used)
        elif mine:  # it gives up
            mine.pop(used % len(mine)).ended(0)


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
        waiting = {key for _, _, key, _, _ in queue.waiting}
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
