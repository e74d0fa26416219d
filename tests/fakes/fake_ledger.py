"""The memory of the devices that fakes share, as the driver of real ones accounts for it: who has what, what is free.

FILE, in TOML, has what can be measured, `"0" = {total = BYTES, free = BYTES}`: the daemon reads it as the source of its
devices, and takes no lock, so it is only ever replaced as a whole. Who has what is in FILE.holders, changed under the
lock on FILE.lock. What a dead process had comes back some time after its death; whoever looks sees to that, and as
nobody may look then, somebody must keep FILE true meanwhile (`ledger.Devices`), who is woken through FILE.wake.
"""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

_PINNED = 1.8  # bytes of the host for one of weights
_PIECES = 8  # in which memory is mapped
_ADVICE = "Decrease GPU memory utilization or reduce GPU memory used by other processes."


class RefusedError(Exception):
    """An engine cannot go on; the message is the last line of vLLM's traceback."""


class State:
    """The ledger, while it is locked. `holders`: by "PID:START" of a process, or by the name of other memory."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.totals: dict[str, int] = found["totals"]
        self.holders: dict[str, dict[str, Any]] = found["holders"]
        self.events: list[dict[str, Any]] = found["events"]  # what went wrong, and for whom
        self.most: dict[str, int] = found["most"]  # that was ever held of each device
        self.starts: dict[str, int] = found["starts"]  # engines of each model that found what they wanted

    def free(self, device: str) -> int:
        """What nobody has of a device."""
        return self.totals[device] - sum(sum(one["has"].get(device, {}).values()) for one in self.holders.values())

    def hold(self, key: str, model: str, delay: float = 0.0) -> None:
        """A holder, which has nothing yet if it is new. `delay`: seconds from its death until its memory is back."""
        self.holders.setdefault(
            key, {"model": model, "delay": delay, "died": None, "has": {}, "profiles": {}, "host": 0}
        )

    def take(self, key: str, device: str, part: str, size: int) -> None:
        """Give so much to a holder. Whoever profiles that device meanwhile takes it for its own consumption."""
        holder = self.holders[key]
        if size > (free := self.free(device)):
            self.tell("out of memory", key, device, size - free)
            raise RefusedError(
                f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {gib(size)} GiB. GPU {device} has a "
                f"total capacity of {gib(self.totals[device])} GiB of which {gib(free)} GiB is free."
            )
        had = holder["has"].setdefault(device, {})
        had[part] = had.get(part, 0) + size
        self.most[device] = max(self.most[device], self.totals[device] - self.free(device))
        self._disturb(key, device, "taken", size)

    def release(self, key: str) -> None:
        """All that a holder has is free again."""
        for device, parts in self.holders.pop(key)["has"].items():
            self._disturb(key, device, "released", sum(parts.values()))

    def give_back(self, key: str, device: str, part: str) -> int:
        """A part of what a holder has is free again; returns how much."""
        size: int = self.holders[key]["has"][device].pop(part, 0)
        self._disturb(key, device, "released", size)
        return size

    def _disturb(self, key: str, device: str, how: str, size: int) -> None:
        for other, holder in self.holders.items():
            if other != key and device in holder["profiles"]:
                holder["profiles"][device][how] += size

    def tell(self, what: str, key: str, device: str, size: int) -> None:
        """Note what went wrong, for tests."""
        self.events.append({"what": what, "model": self.holders[key]["model"], "device": device, "bytes": size})

    def settle(self) -> float | None:
        """Take back what the dead had, if it is time; returns the seconds until somebody should look again."""
        now, due = time.monotonic(), []
        for key, holder in list(self.holders.items()):
            if holder["died"] is None and is_process(key) and not lives(key):
                holder |= {"died": now, "profiles": {}}
            if holder["died"] is not None:
                due.append(holder["died"] + holder["delay"] - now)
                if due[-1] <= 0:
                    self.release(key)
        return min((seconds for seconds in due if seconds > 0), default=None)


class Ledger:
    """The ledger in its files."""

    def __init__(self, file: str) -> None:
        self.file = file

    @contextlib.contextmanager
    def changed(self, *, wakes: bool = True) -> Iterator[State]:
        """The state, to be changed while the block runs; a refusal changes it too. `wakes` whoever keeps FILE true."""
        lock = os.open(f"{self.file}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = State(self._read())
            state.settle()
            try:
                yield state
            finally:
                self._replace(f"{self.file}.holders", json.dumps(vars(state)))
                sizes = {name: (total, state.free(name)) for name, total in state.totals.items()}
                self._replace(
                    self.file,
                    "".join(f"{json.dumps(name)} = {{total = {t}, free = {f}}}\n" for name, (t, f) in sizes.items()),
                )
        finally:
            os.close(lock)
            if wakes:
                self.wake()

    def wake(self) -> bool:
        """Tell whoever keeps FILE true of a change; False: nobody does."""
        try:
            descriptor = os.open(f"{self.file}.wake", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        with contextlib.suppress(BlockingIOError):  # it has not come to the last ones yet
            os.write(descriptor, b"!")
        os.close(descriptor)
        return True

    def _read(self) -> dict[str, Any]:
        try:
            with open(f"{self.file}.holders") as file:  # noqa: PTH123 - imports nothing
                found: dict[str, Any] = json.load(file)
                return found
        except FileNotFoundError:
            return self._first()

    def _first(self) -> dict[str, Any]:
        """The state where nobody was before: what is not free is somebody else's."""
        import tomllib

        with open(self.file, "rb") as file:  # noqa: PTH123 - as above
            devices = tomllib.load(file)
        totals = {name: device["total"] for name, device in devices.items()}
        state = State({"totals": totals, "holders": {}, "events": [], "most": dict.fromkeys(totals, 0), "starts": {}})
        for name, device in devices.items():
            if others := device["total"] - device["free"]:
                state.hold("others", "others")
                state.take("others", name, "other", others)
        return vars(state)

    def _replace(self, path: str, text: str) -> None:
        with open(f"{path}.new", "w") as file:  # noqa: PTH123 - as above
            file.write(text)
        os.rename(f"{path}.new", path)  # noqa: PTH104 - as above


class Memory:
    """What one engine has of its devices, step by step, as vLLM 0.32 takes it.

    Each of `pids` computes on one device: the workers, or the engine core where there are none. As vLLM it counts for
    its own what anybody allocates while it profiles, which lasts from its first look at what is free to its last.
    What a sleeper keeps is a part of its own, taken out of the share; None: it never sleeps.
    """

    def __init__(
        self,
        file: str,
        model: str,
        pids: Sequence[int],
        world: int,
        *,
        share: float,
        context: int,
        residue: int | None,
        delay: float,
    ) -> None:
        self.ledger = Ledger(file)
        self.model, self.share, self.context = model, share, context
        self.rest = 0 if residue is None else residue - context  # of a sleeper, beside its context
        self.profiles = True
        self.away: dict[tuple[str, str], int] = {}  # device, part -> bytes that a sleeper has given back
        self.wanted: dict[str, int] = {}
        self.kv = 0  # bytes of the KV cache, on each device
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        with self.ledger.changed() as state:
            names = list(state.totals) if visible is None else [name.strip() for name in visible.split(",")]
            known = [name for name in names if name in state.totals]
            self.devices = known[:world]
            self.missing = (world, len(known)) if len(known) < world else None
            self.keys = {name: _key(pids[index % len(pids)]) for index, name in enumerate(self.devices)}
            for key in self.keys.values():
                state.hold(key, model, delay)

    def start(self, *, profiles: bool) -> None:
        """Make the CUDA contexts, see what is free, and end as vLLM's `request_memory` where that is too little."""
        if self.missing is not None:
            raise RefusedError(
                "ValueError: World size ({}) is larger than the number of available GPUs ({}) in this node.".format(
                    *self.missing
                )
            )
        self.profiles = profiles
        with self.ledger.changed() as state:
            for index, (name, key) in enumerate(self.keys.items()):
                state.take(key, name, "context", self.context)
                total, free = state.totals[name], state.free(name)
                self.wanted[name] = math.ceil(total * self.share)
                if free < self.wanted[name]:
                    state.tell("refused", key, name, self.wanted[name] - free)
                    raise RefusedError(
                        f"ValueError: Free memory on device cuda:{index} ({gib(free)}/{gib(total)} GiB) on startup is "
                        f"less than desired GPU memory utilization ({self.share}, {gib(self.wanted[name])} GiB). "
                        f"{_ADVICE}"
                    )
                if profiles:
                    state.holders[key]["profiles"][name] = {"free": free, "taken": 0, "released": 0}
            state.starts[self.model] = state.starts.get(self.model, 0) + 1

    def load(self, size: int | None) -> None:
        """Take the weights; None: a quarter of what it wants. Where nothing else follows, `size` is all that it has."""
        with self.ledger.changed() as state:
            for name, key in self.keys.items():
                weights = self.wanted[name] // 4 if size is None else size
                if self.rest:
                    state.take(key, name, "rest", self.rest)
                state.take(key, name, "weights", weights if self.profiles else max(0, weights - self.rest))

    def allocate(self) -> None:
        """End profiling, and take the rest as KV cache, less what others took; what others released ends the start."""
        with self.ledger.changed() as state:
            for name, key in self.keys.items():
                profile = state.holders[key]["profiles"].pop(name)
                if profile["released"]:
                    state.tell("disturbed", key, name, profile["released"])
                    before, now = gib(profile["free"]), gib(profile["free"] + profile["released"])
                    raise RefusedError(
                        f"AssertionError: Error in memory profiling. Initial free memory {before} GiB, "
                        f"current free memory {now} GiB. This happens when other "
                        "processes sharing the same container release GPU memory while vLLM is profiling during "
                        "initialization. To fix this, ensure consistent GPU memory allocation or isolate vLLM in its "
                        "own container."
                    )
                if profile["taken"]:
                    state.tell("shrunk", key, name, profile["taken"])
                had = state.holders[key]["has"][name]["weights"] + self.rest
                self.kv = self.wanted[name] - had - profile["taken"]
                if self.kv <= 0:
                    raise RefusedError("ValueError: No available memory for the cache blocks.")
                state.take(key, name, "kv", self.kv)

    def free(self) -> dict[str, int]:
        """What is free of each of its devices, whoever has the rest."""
        with self.ledger.changed(wakes=False) as state:
            return {name: state.free(name) for name in self.keys}

    def unmap(self, *, offloads: bool) -> int:
        """Give back weights and KV cache; returns how much. `offloads`: the host has the weights from then on."""
        freed = 0
        with self.ledger.changed() as state:
            for name, key in self.keys.items():
                for part in ("weights", "kv"):
                    size = state.give_back(key, name, part)
                    self.away[name, part] = self.away.get((name, part), 0) + size
                    freed += size
                if offloads:  # pinned, rounded up block by block, and kept when it wakes
                    on_host = int(self.away[name, "weights"] * _PINNED)
                    state.holders[key]["host"] = max(state.holders[key]["host"], on_host)
        return freed

    def map(self, part: str, *, stops_half_way: bool) -> bool:
        """Take "weights" or "kv" back, one piece after another; False: not all. What it took stays its own."""
        with self.ledger.changed() as state:
            for name, key in self.keys.items():
                size = self.away.get((name, part), 0)
                for number in range(_PIECES):
                    piece = size * (number + 1) // _PIECES - size * number // _PIECES
                    if stops_half_way and number == _PIECES // 2:
                        return False
                    if piece:
                        try:
                            state.take(key, name, part, piece)
                        except RefusedError:
                            return False
                        self.away[name, part] -= piece
        return True


def gib(size: int) -> str:
    """Bytes as vLLM's messages have them."""
    return f"{round(size / 2**30, 2)}"


def _key(pid: int) -> str:
    """A process as a holder, so that no later one is taken for it."""
    return f"{pid}:{_started(pid)}"


def is_process(key: str) -> bool:
    """Whether a holder is a process."""
    return ":" in key


def lives(key: str) -> bool:
    """Whether a process that is a holder has not died; a zombie has."""
    pid, _, started = key.partition(":")
    return _started(int(pid)) == started != "-"


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "-" where it lives no more."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - imports nothing
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "-"
    return "-" if fields[0] in "ZX" else fields[19]
