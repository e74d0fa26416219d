"""What others see of a running engine: its supervisor, the check for readiness, the watch for stalls.

`launch.LaunchedEngine` is the one that runs as processes of this machine; an engine elsewhere would be another one.
Nothing is done here.
"""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Protocol

from vllm_proxy.domain.canary import Canary
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.diagnose import Exit
from vllm_proxy.domain.progress import Progress


class EngineOutput(Protocol):
    """The output of an engine, for those who observe it."""

    @property
    def activity(self) -> int:
        """Grows whenever the engine does something that can be seen."""

    @property
    def progress(self) -> Progress:
        """How far its start is."""

    @property
    def weights_bytes(self) -> int:
        """Of each device, as it says; 0: it has not said so."""

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines that it wrote. For a thread."""


class Log(Protocol):
    """The log of an engine, for those who observe it."""

    @property
    def path(self) -> Path:
        """Where it can be read while the engine's block lasts."""

    @property
    def problem(self) -> str | None:
        """Why it is not kept on disk, as last seen."""

    def check(self) -> str | None:
        """Check again."""


class Engine(Protocol):
    """A running engine, as its supervisor sees it."""

    @property
    def started_at(self) -> datetime:
        """UTC."""

    @property
    def was_ready(self) -> bool:
        """Whether an earlier daemon has seen it serve."""

    @property
    def memory_bytes(self) -> int:
        """Of its processes; 0: not known."""

    @property
    def pid(self) -> int:
        """Of its first process."""

    @property
    def place(self) -> Place:
        """Where it runs."""

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """How its first process ended, once it did."""

    @property
    def output(self) -> EngineOutput:
        """What it writes."""

    @property
    def log(self) -> Log:
        """Where that goes."""

    async def holds_address(self) -> bool:
        """Whether all that listens at its address is provably its own: nobody else is to get its credential."""

    def age_seconds(self) -> float:
        """Since its first process started; the wall clock has no part in it."""

    def mark_ready(self) -> None:
        """It is ready: record that."""

    @property
    def asleep(self) -> int:
        """The level that it was to sleep at last, by whichever daemon; 0: it was to serve."""

    @property
    def canary(self) -> Canary | None:
        """What it answered before it slept; None: it has no route to be asked on."""

    @property
    def before_sleep(self) -> int | None:
        """Bytes of its processes before it first slept at level 1, 0 where that is not known; None: it never has."""

    def note_sleep(self, level: int, canary: Canary | None) -> None:
        """Record that it is to sleep at this level, before it does, with what it answers awake; 0: that it serves."""

    def keep(self) -> None:
        """Leave it to the next daemon where the block ends."""
