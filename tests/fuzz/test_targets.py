"""The targets of the coverage-led fuzzing, fed with their seeds, broken in a few ways."""

import random

import pytest

from tests.fuzz.targets import TARGETS

PIECES = [
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"}",
    b"{",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\n",
    b" ",
    b"model",
    b"keys",
    b"=",
    b"#",
]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_what_becomes_of_them(name: str) -> None:
    """Whatever is cut out of them or put into them."""
    function, seeds = TARGETS[name]
    chance = random.Random(name)
    for seed in seeds:
        function(seed)
        for _ in range(100):
            start, end = sorted(chance.choices(range(len(seed) + 1), k=2))
            function(seed[:start] + chance.choice(PIECES) * chance.randrange(3) + seed[min(end, start + 4) :])
