"""What every test may use."""

import functools
import os
import pkgutil
import signal
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


# What most machines lack, and what does not bear company: real vLLM, which takes every processor there is.
ALONE = ("browser", "nix", "prometheus", "systemd", "real", "gpu")
PARTS = {"unit": ("slow", *ALONE), "beside": ALONE}  # and which markers they leave out


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part`: for `packaging/dev`, beside every other selection."""
    choices = [*PARTS, "alone"]
    parser.addoption(
        "--part", choices=choices, help="unit: quick, and needs nothing; beside: may run in parallel; alone: all others"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The quick part tries fewer examples; `packaging/dev test` tries them all."""
    if config.getoption("part") == "unit" and not config.getoption("hypothesis_profile"):
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Each marker of these has a folder, whose files need not even be imported."""
    is_left_out = config.getoption("part") in PARTS and collection_path.name in ALONE and collection_path.is_dir()
    return is_left_out or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real vLLM comes behind everything that fails faster, and what stops it comes last.

    Where several processes run the tests, those of the daemon come first: they wait for much, and end the last.
    """
    part = config.getoption("part")
    left_out = [item for item in items if part and _is_marked(item, *PARTS.get(part, ALONE)) == (part in PARTS)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/daemon/"))
    items.sort(key=lambda item: (_is_marked(item, "real", "gpu"), _is_marked(item, "last")))


def _is_marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """So many processes for `-n auto`: tests wait more than they compute, and each process imports everything."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # noqa: ANN401 - xdist's, without types
    """Tests that share something run in one process; each of the others wherever there is room, in this order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # as above
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _shares(config.rootpath / file) else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@functools.cache
def _shares(file: Path) -> bool:
    """Whether the tests of a file have something in common that takes its time, or take none themselves."""
    text = file.read_text(encoding="utf-8")
    return "/daemon/" not in str(file) or 'scope="module"' in text or 'scope="session"' in text


def pytest_unconfigure() -> None:
    """What forks daemons ends with the tests."""
    forks.end_shared()
