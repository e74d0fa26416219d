"""What every test may use."""

import signal

import pytest
from hypothesis import settings

from tests import forks
from tests.harness import port_block

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("usual", deadline=None)  # a loaded machine says nothing about what is tested
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("usual")


@pytest.fixture
def port_start() -> int:
    """The first of two hundred ports for this test's engines."""
    return port_block()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real vLLM comes behind everything that fails faster, and what stops it comes last."""
    items.sort(
        key=lambda item: (item.get_closest_marker("real") is not None, item.get_closest_marker("last") is not None)
    )


def pytest_unconfigure() -> None:
    """What forks daemons ends with the tests."""
    forks.end_shared()
