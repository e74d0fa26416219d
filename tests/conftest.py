"""What every test may use."""

import itertools
import random
import signal

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("thorough", max_examples=2000, deadline=None)

_blocks = itertools.cycle(range(12_000, 31_800, 200))  # below the kernel's ephemeral ports
for _ in range(random.randrange(99)):  # two test runs at once must not share
    next(_blocks)


@pytest.fixture
def port_start() -> int:
    """The first of two hundred ports for this test's engines."""
    return next(_blocks)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real vLLM comes behind everything that fails faster, and what stops it comes last."""
    items.sort(
        key=lambda item: (item.get_closest_marker("real") is not None, item.get_closest_marker("last") is not None)
    )
