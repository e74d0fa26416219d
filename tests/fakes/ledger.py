"""Devices whose memory fakes share, for the tests: made for a block, kept true while it runs, looked into, taken from.

A daemon reads the file of a ledger without its lock and never asks anybody, so what a dead engine had must come back
there although no fake looks: a thread here waits for the death of every holder, and for the time after it.
"""

import contextlib
import os
import select
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tests.fakes.fake_ledger import Ledger, is_process

GIB = 2**30


class Devices:
    """Devices of these totals, in bytes by name, while the block runs."""

    def __init__(self, file: Path, totals: Mapping[str, int]) -> None:
        self.file = file
        self._ledger = Ledger(str(file))
        self._wake = Path(f"{file}.wake")
        lines = [f'"{name}" = {{total = {total}, free = {total}}}\n' for name, total in totals.items()]
        file.write_text("".join(lines), encoding="utf-8")
        self._thread = threading.Thread(target=self._keep, name="memory of the fakes")
        self._woken = self._ended = -1
        self._over = False

    def __enter__(self) -> Self:
        os.mkfifo(self._wake)
        self._woken = os.open(self._wake, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.unlink()
        self._over = True
        os.write(self._woken, b"!")
        self._thread.join()
        os.close(self._woken)

    def _keep(self) -> None:
        """Take back what the dead had, each time at once or as long after their death as they said."""
        dying: dict[str, int] = {}  # a descriptor of each process that has something
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        due: float | None = 0.0
        while not self._over:
            poll.poll(None if due is None else due * 1000)
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 2**16)
            with self._ledger.changed(wakes=False) as state:
                due = state.settle()
                alive = {key for key, holder in state.holders.items() if is_process(key) and not holder["died"]}
            for key in dying.keys() - alive:
                poll.unregister(dying[key])
                os.close(dying.pop(key))
            for key in alive - dying.keys():
                try:
                    dying[key] = os.pidfd_open(int(key.partition(":")[0]))
                    poll.register(dying[key], select.POLLIN)
                except ProcessLookupError:
                    due = 0.0
        for descriptor in dying.values():
            os.close(descriptor)

    # What they are

    @property
    def config(self) -> str:
        """The `[devices]` table of a daemon that has them."""
        return f'[devices]\nsource = "{self.file}"\n'

    def free(self) -> dict[str, int]:
        """What is free of each."""
        with self._ledger.changed(wakes=False) as state:
            return {name: state.free(name) for name in state.totals}

    def holders(self) -> list[tuple[str, dict[str, dict[str, int]]]]:
        """Who has something: its model, and what it has of each device, by part: "context", "weights", "kv".

        Who may sleep has a "rest" as well: what it keeps beside its context while it does.
        """
        with self._ledger.changed(wakes=False) as state:
            return [(holder["model"], holder["has"]) for holder in state.holders.values() if holder["has"]]

    def host(self) -> dict[str, int]:
        """What engines of each model have of the host's memory, for weights that they have put there once."""
        found: dict[str, int] = {}
        with self._ledger.changed(wakes=False) as state:
            for holder in state.holders.values():
                found[holder["model"]] = found.get(holder["model"], 0) + holder["host"]
        return {model: size for model, size in found.items() if size}

    def most(self) -> dict[str, int]:
        """What was ever held of each at once."""
        with self._ledger.changed(wakes=False) as state:
            return state.most

    def starts(self) -> dict[str, int]:
        """How many engines of each model found what they wanted."""
        with self._ledger.changed(wakes=False) as state:
            return state.starts

    def events(self) -> list[dict[str, Any]]:
        """`what` went wrong, for which `model`, on which `device`, by how many `bytes`.

        "refused": too little was free; "shrunk": its KV cache, by what another took; "disturbed": by what another set
        free; "out of memory": it took more than there was.
        """
        with self._ledger.changed(wakes=False) as state:
            return state.events

    # What another program does

    @contextlib.contextmanager
    def taken(self, device: str, size: int, name: str = "another program") -> Iterator[None]:
        """Another program has so much of a device while the block runs."""
        with self._ledger.changed() as state:
            state.hold(name, name)
            state.take(name, device, "other", size)
        try:
            yield
        finally:
            with self._ledger.changed() as state:
                state.release(name)
