"""The series of devices and of who waits for them, a part of `/metrics`.

What is now is asked of the room when somebody scrapes; what became of those who waited is counted in
`fleet/room_history.py`. Labels are models of the file and devices of the machine alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from vllm_proxy.api.by_model import Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.domain.ledger import Device, Hold, Standing
from vllm_proxy.fleet.room import Room
from vllm_proxy.fleet.room_history import Counted

MEMORY = Family(
    "vllm_proxy_device_memory_bytes",
    "gauge",
    "Memory of a device: as vLLM counts it, free as measured, what engines count for, what other programs have.",
    ("device", "kind"),
)
SLEEPERS = Family(
    "vllm_proxy_sleepers", "gauge", "Engines that sleep on a device, of which each keeps a part.", ("device",)
)
EVICTIONS = Family(
    "vllm_proxy_evictions_total",
    "counter",
    "Engines that gave way, how far they went, and for which model.",
    ("depth", "for", "model"),
)
SWAPS = Family(
    "vllm_proxy_swaps_total",
    "counter",
    "Starts and wakes for which others had to give way, once they served.",
    ("how", "model"),
)
SECONDS = Family("vllm_proxy_swap_seconds", "histogram", "From the wish to run until it serves.", ("how",))
OVERHEAD = Family(
    "vllm_proxy_swap_overhead_seconds",
    "histogram",
    "Of that, what neither its own start or wake took, nor those who gave way, nor those before it.",
    ("how",),
)
WAITS = Family(
    "vllm_proxy_room_wait_seconds", "histogram", "Waiting of engines for room, until they may start.", ("model",)
)
WANTED = Family(
    "vllm_proxy_wanted_seconds_total",
    "counter",
    "What a device does while somebody waits for its memory; idle is time that is lost.",
    ("device", "doing"),
)
FAMILIES = (MEMORY, SLEEPERS, EVICTIONS, SWAPS, SECONDS, OVERHEAD, WAITS, WANTED)


def lines(room: Room, models: AbstractSet[str], time: float) -> Iterator[tuple[Family, str]]:
    """All of them. `models`: those of the file; `time`: of the loop's clock."""
    devices, holds = room.memory()
    yield from _memory(devices, holds)
    yield from _counts(room.history.counted(time, models, devices.keys()))


def _memory(devices: Mapping[str, Device], holds: Sequence[Hold]) -> Lines:
    for name, one in devices.items():
        yield MEMORY, MEMORY.line(one.total, name, "total")
        if one.free < math.inf:
            yield MEMORY, MEMORY.line(one.free, name, "free")
        yield MEMORY, MEMORY.line(sum(hold.takes.get(name, 0) for hold in holds), name, "held")
        yield MEMORY, MEMORY.line(one.foreign, name, "foreign")
        asleep = sum(hold.standing is Standing.SLEEPS and name in hold.takes for hold in holds)
        yield SLEEPERS, SLEEPERS.line(asleep, name)


def _counts(counted: Counted) -> Lines:
    for (model, depth, whom), count in counted.evictions.items():
        yield EVICTIONS, EVICTIONS.line(count, depth, whom, model)
    for (model, how), count in counted.swaps.items():
        yield SWAPS, SWAPS.line(count, how, model)
    for how, times in counted.swap_seconds.items():
        yield SECONDS, SECONDS.lines(times, how)
    for how, times in counted.overhead_seconds.items():
        yield OVERHEAD, OVERHEAD.lines(times, how)
    for model, times in counted.waits.items():
        yield WAITS, WAITS.lines(times, model)
    for (device, doing), lasted in counted.wanted.items():
        yield WANTED, WANTED.line(lasted, device, doing)
