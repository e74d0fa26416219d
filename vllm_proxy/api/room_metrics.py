"""The series of devices and of who waits for them, a part of `/metrics`.

What is now is asked of the room when somebody scrapes; what became of those who waited is counted in
`fleet/room_history.py`. Labels are models of the file and devices of the machine alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vllm_proxy.domain.ledger import Device, Hold, Standing
from vllm_proxy.fleet.room import Room
from vllm_proxy.fleet.room_history import Counted


def families(room: Room, models: AbstractSet[str], time: float) -> Iterator[Metric]:
    """All of them. `models`: those of the file; `time`: of the loop's clock."""
    devices, holds = room.memory()
    yield _memory(devices, holds)
    yield _sleepers(devices, holds)
    yield from _counts(room.history.counted(time, models, devices.keys()))


def _memory(devices: Mapping[str, Device], holds: Sequence[Hold]) -> Metric:
    memory = GaugeMetricFamily(
        "vllm_proxy_device_memory_bytes",
        "Memory of a device: as vLLM counts it, free as measured, what engines count for, what other programs have.",
        labels=["device", "kind"],
    )
    for name, one in devices.items():
        memory.add_metric([name, "total"], one.total)
        if one.free < math.inf:
            memory.add_metric([name, "free"], one.free)
        memory.add_metric([name, "held"], sum(hold.takes.get(name, 0) for hold in holds))
        memory.add_metric([name, "foreign"], one.foreign)
    return memory


def _sleepers(devices: Iterable[str], holds: Sequence[Hold]) -> Metric:
    sleepers = GaugeMetricFamily(
        "vllm_proxy_sleepers", "Engines that sleep on a device, of which each keeps a part.", labels=["device"]
    )
    for name in devices:
        sleepers.add_metric([name], sum(hold.standing is Standing.SLEEPS and name in hold.takes for hold in holds))
    return sleepers


def _counts(counted: Counted) -> Iterable[Metric]:
    evictions = CounterMetricFamily(
        "vllm_proxy_evictions",
        "Engines that gave way, how far they went, and for which model.",
        labels=["model", "depth", "for"],
    )
    for (model, depth, whom), count in counted.evictions.items():
        evictions.add_metric([model, depth, whom], count)
    swaps = CounterMetricFamily(
        "vllm_proxy_swaps",
        "Starts and wakes for which others had to give way, once they served.",
        labels=["model", "how"],
    )
    for (model, how), count in counted.swaps.items():
        swaps.add_metric([model, how], count)
    seconds = HistogramMetricFamily("vllm_proxy_swap_seconds", "From the wish to run until it serves.", labels=["how"])
    overhead = HistogramMetricFamily(
        "vllm_proxy_swap_overhead_seconds",
        "Of that, what neither its own start or wake took, nor those who gave way, nor those before it.",
        labels=["how"],
    )
    for how, times in counted.swap_seconds.items():
        seconds.add_metric([how], times.buckets(), times.total)
    for how, times in counted.overhead_seconds.items():
        overhead.add_metric([how], times.buckets(), times.total)
    waits = HistogramMetricFamily(
        "vllm_proxy_room_wait_seconds", "Waiting of engines for room, until they may start.", labels=["model"]
    )
    for model, times in counted.waits.items():
        waits.add_metric([model], times.buckets(), times.total)
    wanted = CounterMetricFamily(
        "vllm_proxy_wanted_seconds",
        "What a device does while somebody waits for its memory; idle is time that is lost.",
        labels=["device", "doing"],
    )
    for (device, doing), lasted in counted.wanted.items():
        wanted.add_metric([device, doing], lasted)
    return evictions, swaps, seconds, overhead, waits, wanted
