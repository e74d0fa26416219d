"""Which engine gets a prompt, by what each was sent: marks, what is remembered of them, and the choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.balance import FIRST, LENGTHS, MOST, REMEMBERED, Memory, least_loaded, marks_of


@dataclass(eq=False)
class One:
    """An engine."""

    in_flight: int = 0
    bit: int = 0


@dataclass(eq=False)
class Asked:
    """A prompt."""

    text: bytes = b""
    sessions: Sequence[int] = ()
    marks: Sequence[int] = ()
    size: int = 0

    def __post_init__(self) -> None:
        self.marks, self.size = marks_of(self.text), min(len(self.text), MOST)


def engines(*in_flight: int) -> list[One]:
    """Some, with so many requests each."""
    return [One(count) for count in in_flight]


def memory_of(there: list[One]) -> Memory[One]:
    """What is known of them: nothing yet."""
    memory: Memory[One] = Memory()
    memory.follow(there)
    return memory


def text(seed: int, size: int) -> bytes:
    """Bytes that have nothing in common with those of another seed."""
    return (b"%d." % seed * (size // 2 + 1))[:size]


texts = st.builds(text, st.integers(0, 9), st.integers(0, 3000))


def test_there_is_a_mark_for_each_of_some_forty_lengths() -> None:
    """From 256 bytes on, each a quarter longer, to 1 MiB; of what is longer only that much counts."""
    assert LENGTHS[:4] == (0, FIRST, 320, 400)
    assert LENGTHS[-1] == MOST
    assert all(1.2 < after / before <= 1.25 for before, after in pairwise(LENGTHS[1:-1]))
    assert 20 <= len(LENGTHS) - 1 <= 40
    for size, count in (
        (255, 0),
        (256, 1),
        (1024, 7),
        (40_960, 23),
        (MOST, len(LENGTHS) - 1),
        (2 * MOST, len(LENGTHS) - 1),
    ):
        assert len(marks_of(bytes(size))) == count
    spans = [after - before for before, after in pairwise(LENGTHS)]
    assert len(set(spans)) == len(spans)  # else what is the same in another order had the same sum


@given(texts, texts, texts)
def test_marks_are_shared_up_to_where_texts_are_equal(common: bytes, one: bytes, other: bytes) -> None:
    """And no further: each mark stands for all of the text in front of it."""
    one, other = common + b"1" + one, common + b"2" + other
    mine, theirs = marks_of(one)[::-1], marks_of(other)[::-1]
    shared = sum(length <= len(common) for length in LENGTHS[1:])
    assert mine[:shared] == theirs[:shared]
    assert not set(mine[shared:]) & set(theirs)


@given(st.permutations(range(6)))
def test_marks_tell_the_order_of_what_stands_in_a_text(order: list[int]) -> None:
    """The same pieces in another order are another text."""
    pieces = [text(number, 320) for number in range(6)]
    shuffled = b"".join(pieces[number] for number in order)
    assert (marks_of(shuffled)[0] == marks_of(b"".join(pieces))[0]) == (order == [*range(6)])


def test_who_was_sent_the_beginning_gets_the_rest() -> None:
    """Though others have less in flight, and whatever chance says."""
    there = engines(2, 0, 0)
    memory = memory_of(there)
    first = text(1, 1000)
    memory.learn(Asked(first), there[0])
    for chance in (0.0, 0.5, 0.99):
        assert memory.choose(Asked(first + text(2, 1000)), there, chance) == (there[0], 7, True)


def test_the_longest_beginning_counts() -> None:
    """All have the first part, one has more of it."""
    there = engines(0, 0, 0)
    memory = memory_of(there)
    for one in there:
        memory.learn(Asked(text(1, 600)), one)
    longer = text(1, 600) + text(2, 600)
    memory.learn(Asked(longer), there[1])
    assert memory.choose(Asked(longer + text(3, 10)), there, 0.9)[::2] == (there[1], True)


def test_less_than_a_quarter_of_a_prompt_is_no_reason() -> None:
    """Then it goes where the fewest requests are in flight; what is known there is told all the same."""
    there = engines(1, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 400)), there[0])
    assert memory.choose(Asked(text(1, 400) + text(2, 1200)), there, 0.0) == (there[0], 3, True)
    assert memory.choose(Asked(text(1, 400) + text(2, 1201)), there, 0.0) == (there[1], 0, False)
    there[1].in_flight = 2
    assert memory.choose(Asked(text(1, 400) + text(2, 1201)), there, 0.0) == (there[0], 3, False)


@pytest.mark.parametrize(
    ("flights", "stays"),
    [([4, 1, 1, 1], True), ([5, 1, 1, 1], False), ([4, 1, 1, 1, 0], True), ([5, 1, 1, 1, 0], False)],
)
@pytest.mark.parametrize("there_is_another", [False, True])
def test_who_is_much_busier_than_the_rest_is_passed_over(
    flights: list[int], *, stays: bool, there_is_another: bool
) -> None:
    """At most 1.25 times the mean of those that are free, and two more, with the request that is to be sent.

    Of 4, 1, 1, 1 that is 4.5, of 4, 1, 1, 1, 0 it is 4.
    """
    free = engines(*flights)
    memory = memory_of([*free, *engines(*[9] * there_is_another)])
    memory.learn(Asked(text(1, 1000)), free[0])
    chosen, _, by_prefix = memory.choose(Asked(text(1, 1000)), free, 0.0)
    assert ((chosen is free[0]), by_prefix) == (stays, stays)


def test_of_several_that_know_it_the_least_loaded_gets_it() -> None:
    """And of equals chance decides; others do not count."""
    there = engines(0, 2, 1, 1)
    memory = memory_of(there)
    for one in there[1:]:
        memory.learn(Asked(text(1, 1000)), one)
    assert [memory.choose(Asked(text(1, 1000)), there, chance)[0] for chance in (0.0, 0.49, 0.5, 0.99)] == [
        there[2], there[2], there[3], there[3],
    ]  # fmt: skip


def test_where_one_is_too_busy_another_that_knows_it_is_next() -> None:
    """With less of it, where that is enough."""
    there = engines(9, 1, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 1000)), there[0])
    memory.learn(Asked(text(1, 500)), there[1])
    assert memory.choose(Asked(text(1, 1000)), there, 0.0) == (there[1], 4, True)


def test_a_session_comes_first() -> None:
    """Before a longer beginning elsewhere, and without one; not where its engine is much busier."""
    there = engines(0, 0, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 1000)), there[0])
    memory.learn(Asked(b"", (7,)), there[1])
    assert memory.choose(Asked(text(1, 1000), (7,)), there, 0.0) == (there[1], 0, True)
    assert memory.choose(Asked(b"short", (8, 7)), there, 0.0) == (there[1], 0, True)
    there[1].in_flight = 9
    assert memory.choose(Asked(text(1, 1000), (7,)), there, 0.0) == (there[0], 7, True)


def test_who_is_not_free_does_not_count() -> None:
    """Whatever it was sent."""
    there = engines(0, 0, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 1000), (7,)), there[2])
    assert memory.choose(Asked(text(1, 1000), (7,)), there[:2], 0.0) == (there[0], 0, False)


def test_what_one_has_forgotten_is_not_known_of_it() -> None:
    """A new engine in its place has another bit; one more that comes and goes changes nothing for the others."""
    there = engines(0, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 1000)), there[0])
    memory.learn(Asked(text(2, 1000)), there[1])
    there[0].bit = 0
    memory.follow(there)
    assert memory.choose(Asked(text(1, 1000)), there, 0.99) == (there[1], 0, False)
    assert memory.choose(Asked(text(2, 1000)), there, 0.0) == (there[1], 7, True)
    memory.clear()
    assert not memory
    assert memory.choose(Asked(text(2, 1000)), there, 0.0) == (there[0], 0, False)


def test_engines_may_come_and_go_for_ever() -> None:
    """Their bits stay small; once in many times what is known is lost, and never is anything known of the wrong one."""
    there = engines(0, 0)
    memory = memory_of(there)
    kept = 0
    for number in range(200):
        memory.learn(Asked(text(number, 300)), there[1])
        there[1].bit = 0
        memory.follow(there)
        for gone in range(number + 1):
            assert memory.known(marks_of(text(gone, 300)), there[0].bit | there[1].bit) == (0, 0)
        assert 0 < there[0].bit != there[1].bit < 2**64
        kept += memory.known(marks_of(b"kept" + text(1, 300)), there[0].bit)[0]
        memory.learn(Asked(b"kept" + text(1, 300)), there[0])
    assert kept > 190


def test_a_request_that_moves_takes_its_marks_along() -> None:
    """What the engine had before it keeps."""
    there = engines(0, 0)
    memory = memory_of(there)
    memory.learn(Asked(text(1, 500)), there[0])
    longer = Asked(text(1, 500) + text(2, 500), (7,))
    assert memory.choose(longer, there, 0.0) == (there[0], 4, True)
    memory.learn(longer, there[0])
    memory.forget(longer, there[0], 4)
    memory.learn(longer, there[1])
    assert memory.known(longer.marks, there[0].bit) == (4, there[0].bit)
    assert memory.choose(longer, there, 0.0) == (there[1], 7, True)


def test_it_is_bounded_and_forgets_what_was_not_seen_for_long() -> None:
    """20,000 marks for each engine; the last 10,000 of them are there whatever comes."""
    there = engines(0, 0)
    memory = memory_of(there)
    often = Asked(b"often" + text(1, 1000))
    for number in range(60_000 // 7):
        memory.learn(Asked(text(number, 1000)), there[number % 2])
        assert len(memory) <= REMEMBERED * len(there)
        if number % 500 == 0:
            assert number == 0 or memory.known(often.marks, -1)[0] == 7
            memory.learn(often, there[0])
    assert memory.known(marks_of(text(0, 1000)), -1) == (0, 0)
    for last in range(number - 1000, number):
        assert memory.known(marks_of(text(last, 1000)), -1) == (7, there[last % 2].bit)


steps = st.lists(st.tuples(texts, texts, st.integers(0, 3), st.sampled_from(["learn", "move", "new"])), max_size=40)


@given(steps, texts, st.lists(st.integers(0, 12), min_size=4, max_size=4), st.floats(0, 1, exclude_max=True))
def test_the_choice_is_what_the_policy_says(
    history: list[tuple[bytes, bytes, int, str]], prompt: bytes, flights: list[int], chance: float
) -> None:
    """Against the plain form of it: all that each engine was sent is kept, and looked through."""
    there = engines(*flights)
    memory = memory_of(there)
    sent: list[set[int]] = [set() for _ in there]
    for begin, end, number, what in history:
        asked = Asked(begin + end)
        if what == "new":
            there[number].bit, sent[number] = 0, set()
            memory.follow(there)
            continue
        known = memory.known(asked.marks, there[number].bit)[0]
        if what == "learn":
            memory.learn(asked, there[number])
            sent[number] |= set(asked.marks)
        elif known:
            memory.forget(asked, there[number], known)  # changes nothing: it was not told of the rest
    asked = Asked(prompt)
    knows = [sum(mark in marks for mark in asked.marks) for marks in sent]
    mean = (sum(flights) + 1) / len(there)
    fits = [number for number in range(4) if flights[number] <= 1.25 * mean + 2]
    most = max(knows[number] for number in fits)
    best = [number for number in fits if knows[number] == most]
    chosen, known, by_prefix = memory.choose(asked, there, chance)
    assert known == knows[there.index(chosen)]
    assert by_prefix == (most > 0 and LENGTHS[most] * 4 >= len(prompt))
    assert there.index(chosen) in (best if by_prefix else range(4))
    assert chosen.in_flight == min(flights[number] for number in (best if by_prefix else range(4)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
def test_of_equals_chance_decides(flights: list[int], chance: float) -> None:
    """Each of those with the fewest requests has the same part of it."""
    there = engines(*flights)
    least = [one for one in there if one.in_flight == min(flights)]
    assert least_loaded(there, chance) is least[int(chance * len(least))]
