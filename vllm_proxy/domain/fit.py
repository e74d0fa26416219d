"""What an engine needs of each device, in vLLM's own arithmetic, and which models of a file can never have it.

For `room`, which is asked with these sizes, for `check`, and for writes of the file. In doubt everything fits. Source:
`request_memory` of vLLM 0.32, which wants `ceil(total x share)` free on each device, after the CUDA context was made.
"""

import math
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_proxy.domain import args
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.domain.ledger import Device, Kind
from vllm_proxy.domain.packing import Part, placed

DEFAULT_SHARE = 0.92  # vLLM's own, where its option table does not say
CUDA_CONTEXT_BYTES = int(0.6 * 2**30)  # of each GPU, before vLLM looks at what is free; until it was learned
_NO_KV_CACHE = 0.6  # of what it needs: an engine that has less of it has no KV cache
_MORE, _MORE_BYTES = 1.25, 512 * 2**20  # than was measured: what such an engine may come to
_MOST_SHOWN = 6
ONE = {Kind.GPU: "a GPU", Kind.MIG: "a MIG device", Kind.MEMORY: "the machine's memory"}
TOGETHER = "start"  # the key of a misfit of all that are always to run

_PARALLEL = {
    "prefill-context-parallel-size": "prefill_context_parallel_size",
    "data-parallel-size": "data_parallel_size",
}


@dataclass(frozen=True, slots=True)
class Demand:
    """What each instance of a model wants. `named`: of these devices; None: of any. `count` 0: of none."""

    model: str
    sizes: tuple[tuple[str, int], ...]  # what makes the world size: ("tensor_parallel_size", 2)
    count: int
    memory: int | None = None  # bytes of each device; None: `share` of its total
    share: float = DEFAULT_SHARE
    named: tuple[str, ...] | None = None
    always: bool = False
    replicas: int = 1
    elsewhere: bool = False  # other machines may have a part of its devices, or they are not known
    sleep: int | None = None  # how deeply it may sleep: vLLM's level


@dataclass(frozen=True, slots=True)
class Misfit:
    """A model that can never have what it needs. `key`: of the model's table; "start": that it is always to run."""

    model: str
    key: str
    message: str
    lacks: float  # how much is missing, bytes or devices: whether another one of this key is worse


def demand_of(model: ModelSpec, memory: int | None = None, default_share: float | None = None) -> Demand:
    """What a model asks for. `default_share`: of the vLLM that is installed, where its option table says it."""
    spec = model.engine
    sizes = tuple((name, size) for name, size in _sizes(spec) if size > 1)
    world = math.prod(size for _, size in sizes)
    named = _named(spec)
    none = memory == 0 or named == ()
    return Demand(
        model.id,
        sizes,
        0 if none else world,
        memory,
        spec.gpu_memory_utilization or default_share or DEFAULT_SHARE,
        None if none or named is None else named[:world],
        model.policy.start == "always" and model.policy.enabled,
        model.policy.replicas,
        _is_elsewhere(spec),
        spec.sleep,
    )


def share_of(memory: int, total: int) -> float:
    """The `gpu_memory_utilization` that is so many bytes of a device."""
    return math.floor(memory / total * 1e6) / 1e6


def requested(total: int, share: float) -> int:
    """The bytes that vLLM wants to find free on a device."""
    return math.ceil(total * share)


def needs(demand: Demand, devices: Mapping[str, Device], measured: int | None = None) -> dict[str, int]:
    """Bytes that a start needs of each device where it may run. `measured`: what its last engine had of each.

    Devices that it names get the share of the smallest of them; else those of one total are used together.
    """
    where = [name for name in (devices if demand.named is None else demand.named) if name in devices]
    if not demand.count or not where:
        return {}
    smallest = min(devices[name].total for name in where)
    found = {}
    for name in where:
        total = devices[name].total
        share = demand.share
        if demand.memory is not None:
            share = share_of(demand.memory, total if demand.named is None else smallest)
        wants = requested(total, share)
        context = 0 if devices[name].kind is Kind.MEMORY else CUDA_CONTEXT_BYTES
        # On a larger device it had more than this one has, so that tells nothing.
        learned = measured if measured is not None and measured <= total else 0
        found[name] = learned if learned > wants else wants + context
    return found


def held(need: int, measured: int | None) -> int:
    """What an engine counts for once it is ready: what it needed, or less where it has no KV cache."""
    if measured is None or measured >= _NO_KV_CACHE * need:
        return need
    return min(need, int(measured * _MORE) + _MORE_BYTES)


def misfits(
    demands: Sequence[Demand], devices: Mapping[str, Device], measured: Mapping[str, int] | None = None
) -> list[Misfit]:
    """Each model that can never run here, and the first that cannot stand beside the `always` ones before it.

    Of one that can never run nothing more is said: the others stand together without it. Memory of other programs is
    not counted: it may go. `measured`: by model, what its last engine had of each device.
    """
    known = measured or {}
    here = [one for one in demands if one.count and not one.elsewhere]
    alone = {one.model: _alone(one, devices, needs(one, devices, known.get(one.model))) for one in here}
    found = [misfit for misfit in alone.values() if misfit is not None]
    if (together := _together([one for one in here if alone[one.model] is None], devices, known)) is not None:
        found.append(together)
    return found


def unsized(demands: Iterable[Demand]) -> list[Misfit]:
    """Each that wants bytes, where nobody knows how large devices are: vLLM is told a share."""
    message = (
        "needs a device of known size, and none is known: give it gpu_memory_utilization, "
        "or say in [devices] source where sizes come from"
    )
    return [Misfit(one.model, "memory", message, 0) for one in demands if one.memory and one.count]


def worse(after: Iterable[Misfit], before: Iterable[Misfit], unchanged: Container[str]) -> list[Misfit]:
    """Those that speak against going from one file to another: what was so before is no reason to refuse it.

    `unchanged`: models that want what they wanted. One that was changed has to fit now; of those that are always to
    run, which are one sum, it is enough that less is missing than before.
    """
    lacked = {(one.key, _whose(one)): one.lacks for one in before}
    return [
        one
        for one in after
        if one.lacks > lacked.get((one.key, _whose(one)), -math.inf)
        or not (one.key == TOGETHER or one.model in unchanged)
    ]


def _whose(misfit: Misfit) -> str | None:
    return None if misfit.key == TOGETHER else misfit.model


def _sizes(spec: EngineSpec) -> Iterator[tuple[str, int]]:
    yield "tensor_parallel_size", spec.tensor_parallel_size or 1
    yield "pipeline_parallel_size", spec.pipeline_parallel_size or 1
    options = {args.option_name(key): value for key, value in spec.args.items()}
    local = options.get("data-parallel-size-local")
    for option, name in _PARALLEL.items():
        size = local if option == "data-parallel-size" and local is not None else options.get(option)
        yield name, size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 1


def _named(spec: EngineSpec) -> tuple[str, ...] | None:
    if spec.devices is not None:
        return tuple(str(device) for device in spec.devices)
    visible = spec.variables.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return tuple(name.strip() for name in visible.split(",") if name.strip())


def _is_elsewhere(spec: EngineSpec) -> bool:
    options = {args.option_name(key): value for key, value in spec.args.items()}
    others = options.get("nnodes", 1) != 1 or options.get("distributed-executor-backend") == "ray"
    return others or "CUDA_VISIBLE_DEVICES" in spec.references


# One model


def _alone(one: Demand, devices: Mapping[str, Device], need: Mapping[str, int]) -> Misfit | None:
    here = ", ".join(called(name, device.kind) for name, device in devices.items())
    if one.named is not None:
        if unknown := [name for name in one.named if name not in devices]:
            message = f"names {' and '.join(unknown)}, and there is {here or 'none'}"
            return Misfit(one.model, "devices", message, len(unknown))
        if len(one.named) < one.count:
            message = f"needs {_counted(one)}, and names {len(one.named)}"
            return Misfit(one.model, "devices", message, one.count - len(one.named))
    elif len(devices) < one.count:
        message = f"needs {_counted(one)}, and there are {len(devices)}: {here or 'none'}"
        return Misfit(one.model, _largest(one), message, one.count - len(devices))
    able = [name for name, size in need.items() if size <= devices[name].room]
    if len(able) < one.count:
        key = "memory" if one.memory is not None else "gpu_memory_utilization"
        short = sorted(size - devices[name].room for name, size in need.items())[one.count - 1]
        return Misfit(one.model, key, _too_much(one, devices, need, len(able)), short)
    totals = [devices[name].total for name in able]
    if one.named is None and max(map(totals.count, totals)) < one.count:
        sizes = " + ".join(f"{totals.count(total)} of {gib(total)}" for total in sorted(set(totals), reverse=True))
        message = f"needs {_counted(one)} of one size, and there are {sizes} GiB"
        return Misfit(one.model, _largest(one), message, one.count - max(map(totals.count, totals)))
    return _wakes_nowhere(one, devices, able)


def _wakes_nowhere(one: Demand, devices: Mapping[str, Device], able: Sequence[str]) -> Misfit | None:
    """Level 1 where it would move weights from the machine's memory to the machine's memory."""
    unified = [name for name in able if devices[name].unified]
    lacks = one.count - (len(able) - len(unified))
    if one.sleep != 1 or lacks <= 0 or not unified:
        return None
    names = " and ".join(called(name, devices[name].kind) for name in unified)
    message = (
        f"keeps weights in the machine's memory, and the memory of {names} is just that: nothing would be free, and "
        "waking has taken whole machines down; write sleep = 2, or leave it out"
    )
    return Misfit(one.model, "sleep", message, lacks)


def _too_much(one: Demand, devices: Mapping[str, Device], need: Mapping[str, int], able: int) -> str:
    best = max(need, key=lambda name: devices[name].room - need[name])
    device = devices[best]
    kept = f" ({gib(device.total)} without what is kept back)" if device.room < device.total else ""
    on = ONE[device.kind] if one.count == 1 else f"each of {_counted(one)}"
    enough = f"; enough is on {able}" if able else ""
    there = f"{gib(device.room)} of {called(best, device.kind)}"
    return f"needs {gib(need[best])} GiB on {on}, and engines may have {there}{kept}{enough}"


def _counted(one: Demand) -> str:
    product = " x ".join(f"{name} {size}" for name, size in one.sizes)
    devices = "1 device" if one.count == 1 else f"{one.count} devices"
    return f"{devices} ({product})" if product else devices


def _largest(one: Demand) -> str:
    name = max(one.sizes, key=lambda size: size[1])[0] if one.sizes else "tensor_parallel_size"
    return f"args.{name}" if name in _PARALLEL.values() else name


def called(device: str, kind: Kind) -> str:
    """The name of a device, as messages have it: "GPU 0"; a UUID begins with its kind."""
    if kind is Kind.MEMORY:
        return ONE[kind]
    return f"GPU {device}" if device.isdigit() else device


def gib(size: float) -> str:
    """Bytes as messages have them: "38.5", in GiB."""
    return f"{size / 2**30:.1f}"


# All that are always to run


def _together(demands: Sequence[Demand], devices: Mapping[str, Device], measured: Mapping[str, int]) -> Misfit | None:
    resident = [one for one in demands if one.always]
    sizes = [_kept(one, devices, measured.get(one.model)) for one in resident]

    def too_many(number: int) -> bool:
        return placed(parts_of(resident[:number], devices, measured), devices) is None

    first = bisect_left(range(len(resident) + 1), x=True, key=too_many)
    if first > len(resident):
        return None
    total = sum(min(size.values()) * one.count * one.replicas for one, size in zip(resident, sizes, strict=True))
    lacks = total - sum(device.room for device in devices.values())
    shown = len(resident) if lacks > 0 else first
    message = _sum(resident[:shown], sizes[:shown], devices)
    return Misfit(resident[first - 1].model, TOGETHER, message, lacks)


def parts_of(demands: Iterable[Demand], devices: Mapping[str, Device], measured: Mapping[str, int]) -> list[Part]:
    """Every instance of these models, with what it counts for once it is ready."""
    return [
        Part(_kept(one, devices, measured.get(one.model)), one.count, one.named)
        for one in demands
        for _ in range(one.replicas)
    ]


def _kept(one: Demand, devices: Mapping[str, Device], measured: int | None) -> dict[str, int]:
    return {name: held(need, measured) for name, need in needs(one, devices, measured).items()}


def _sum(resident: Sequence[Demand], sizes: Sequence[Mapping[str, int]], devices: Mapping[str, Device]) -> str:
    rows = []
    for one, size in zip(resident, sizes, strict=True):
        least, times = min(size.values()), one.replicas * one.count
        rows.append((least * times, f"{f'{times} x ' if times > 1 else ''}{gib(least)} ({one.model})"))
    shown = [text for _, text in rows[-_MOST_SHOWN:]]
    others = len(rows) - len(shown)
    before = [f"{others} more"] if others else []
    rooms = [f"{gib(device.room)} ({called(name, device.kind)})" for name, device in devices.items()]
    total, room = sum(bytes_ for bytes_, _ in rows), sum(device.room for device in devices.values())
    there = f"{' + '.join(rooms)} = {gib(room)}" if len(rooms) > 1 else rooms[0]
    divided = "" if total > room else ", which cannot be divided so that each has its own"
    return (
        f"what is always to run needs {' + '.join([*before, *shown])} = {gib(total)} GiB, and engines may have "
        f'{there}{divided}: give less memory, or start = "warm" or "on-demand"'
    )
