"""What every test may use."""

import functools
import os
import pkgutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Helpers, too, say what they saw where they assert; before any of them is imported.
pytest.register_assert_rewrite(
    *(f"tests.{found.name}" for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if found.name != "conftest")
)

from tests import forks  # noqa: E402
from tests.harness import port_block  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("usual", deadline=None)  # a loaded machine says nothing about what is tested
settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("usual")


@pytest.fixture
def port_start() -> int:
    """The first of two hundred ports for this test's engines."""
    return port_block()


# What most machines lack, and what takes a machine's memory or its processors.
ALONE = ("browser", "nginx", "nix", "prometheus", "systemd", "real", "gpu")
PARTS = {"unit": ("slow", "thorough", *ALONE), "beside": ("thorough", *ALONE)}  # and which markers they leave out


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part`: for `packaging/dev`, beside every other selection."""
    choices = [*PARTS, "alone"]
    parser.addoption(
        "--part", choices=choices, help="unit: quick, and needs nothing; beside: slow ones too; alone: all others"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The quick part tries fewer examples; `packaging/dev test` tries them all."""
    if config.getoption("part") == "unit" and not config.getoption("hypothesis_profile"):
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Each marker of these has a folder, whose files need not even be imported."""
    is_left_out = config.getoption("part") in PARTS and collection_path.name in ALONE and collection_path.is_dir()
    return is_left_out or None


BESIDE_VLLM_SECONDS = 600.0  # after which a test hangs, where engines that load may take every processor
# In this order two processes share out `alone`: real vLLM has one of them for itself, since an engine looks at how much
# memory is free while it starts. First of it what wants the most, and of the demo who counts all that its engines did.
SHARED_OUT = ("real/test_swap", "real/test_counters", "real/", "systemd/", "browser/", "nix/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real vLLM comes behind everything that fails faster, and what stops it comes last.

    Where several processes run the tests, what takes long comes first, then those of the daemon: they wait for much.
    """
    part = config.getoption("part")
    left_out = [item for item in items if part and _is_marked(item, *PARTS.get(part, ALONE)) == (part in PARTS)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        if _is_marked(item, "slow", "thorough"):
            item.add_marker("no_cover")  # it would take twice as long, on lines to which quick ones come too
        if _is_marked(item, *ALONE) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BESIDE_VLLM_SECONDS))
    items.sort(key=lambda item: (_is_marked(item, "real", "gpu"), _is_marked(item, "last")))
    if hasattr(config, "workerinput"):
        first = ("daemon/", *SHARED_OUT)
        items.sort(key=lambda item: (not _is_marked(item, "slow"), _place(item.nodeid.removeprefix("tests/"), first)))


def _place(name: str, first: Sequence[str]) -> int:
    return next((place for place, begin in enumerate(first) if name.startswith(begin)), len(first))


def _is_marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """So many processes for `-n auto`: tests wait more than they compute, and each process imports everything.

    An engine of real vLLM computes on one processor while it starts, and has gigabytes.
    """
    return 2 if config.getoption("part") == "alone" else min(8, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # noqa: ANN401 - xdist's, without types
    """Tests that share something run in one process; each of the others wherever there is room, in this order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # as above
        def _split_scope(self, nodeid: str) -> str:
            return _scope(config.rootpath / nodeid.partition("::")[0]) or nodeid

        def _reschedule(self, node: Any) -> None:  # noqa: ANN401 - as above
            """As xdist does, but what takes minutes does not wait behind a test when another process has none."""
            if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@functools.cache
def _scope(file: Path) -> str | None:
    """What the tests of a file share with each other, and maybe with other files; None: nothing that takes its time."""
    text = file.read_text(encoding="utf-8")
    folder = file.parent.name
    if folder in {"real", "systemd", "browser", "gpu"}:
        return folder
    shares = folder != "daemon" or 'scope="module"' in text or 'scope="session"' in text
    return str(file) if shares else None


def pytest_unconfigure() -> None:
    """What forks daemons ends with the tests."""
    forks.end_shared()
