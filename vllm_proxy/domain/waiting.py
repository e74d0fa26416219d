"""Why an ask of the room waits, can never come, or is refused: in sentences for people.

For the message of an instance that is `queued`, and for requests that fail for want of room. What is decided is in
`room`. A sentence stays true while time passes, so nobody has to make it anew at every look.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_proxy.domain.fit import ONE, called, gib
from vllm_proxy.domain.ledger import Ask, Device, Hold, Kind, Standing
from vllm_proxy.domain.room import Wait

_MOST_NAMES = 3
_UNEXPLAINED = 0.05  # of a device: less is the driver's own, or kept back
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)  # seconds that are said: the next of these
_LEAVES = frozenset({Standing.YIELDS, Standing.GOES})
_MANY = {Kind.GPU: "GPUs", Kind.MIG: "MIG devices"}

type Holds = Mapping[str, Hold]  # by instance


@dataclass(frozen=True, slots=True)
class Situation:
    """What is, once what was decided has begun."""

    now: float  # of the clock of `Wait.at`
    devices: Mapping[str, Device]
    holds: Holds
    in_flight: Mapping[str, int] = field(default_factory=dict)  # requests, by instance
    foreign: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)  # by device: other programs, bytes


def sentence(ask: Ask, wait: Wait, what_is: Situation) -> str:
    """Why it waits: "waits for 12.0 GiB on GPU 0: chat gives way, 2 requests in flight"."""
    devices, holds = what_is.devices, what_is.holds
    where = [name for name in wait.where or ask.only or ask.needs if name in devices]
    if all(devices[name].room == math.inf for name in where):
        return f"waits: {_turn(wait, holds)}"
    if not wait.where and wait.waits_for:  # wherever that is
        return f"waits: {_former(wait, holds)}"
    begun = f"waits for {_wanted(ask, where, devices)}"
    if wait.behind:
        begun += f", behind {_listed(map(_called, wait.behind))}"
    if reasons := list(_reasons(wait, what_is)):
        return f"{begun}: {'; '.join(reasons)}"
    if wait.behind:
        return begun
    if len(where) == ask.count and (sums := list(_sums(ask, where, what_is))):
        return f"{begun}: {'; '.join(sums)}"
    return begun if ask.pressing else f"{begun}, until there is room that nobody waits for"


def stuck_sentence(ask: Ask, what_is: Situation) -> str:
    """Why it would not fit if all had gone that ever may.

    "cannot serve code: it needs 60.0 GiB on a GPU and 38.6 can be had: chat (always) has 40.0 of 79.2".
    """
    begun, devices = f"cannot serve {ask.model}: it needs", what_is.devices
    there = [name for name in ask.only or ask.needs if name in devices and name in ask.needs]
    if len(there) < (count := len(ask.only) or ask.count):
        missing = [_name(name, devices) for name in ask.only if name not in there]
        has = _listed(_name(name, devices) for name in devices) or "no device"
        return f"{begun} {_listed(missing) or f'{count} device{"s" if count > 1 else ""}'}, and this machine has {has}"
    stay = {name: [hold for hold in _others(ask, name, what_is.holds) if hold.always] for name in there}
    had = {name: devices[name].room - sum(hold.takes[name] for hold in stay[name]) for name in there}
    last = sorted(there, key=lambda name: ask.needs[name] - had[name])[count - 1]
    wants = _wanted(ask, ask.only, devices) if ask.only else f"{gib(ask.needs[last])} GiB {_any(ask, [last], devices)}"
    if ask.needs[last] <= had[last]:
        return f"{begun} {wants}, all of one size, and this machine has not so many"
    of = f" of {_name(last, devices)}" if count > 1 else ""
    why = f": {_taken(stay[last], last, ' (always)')} of {gib(devices[last].total)}" if stay[last] else ""
    return f"{begun} {wants} and {gib(max(had[last], 0))} can be had{of}{why}"


def refusal(ask: Ask, wait: Wait, what_is: Situation) -> str:
    """Why it is refused though the ledger has room, or would have without other programs.

    "it needs 12.0 GiB on GPU 0, and 5.0 of 24.0 are free: chat has 8.0, other programs have 11.0 (python 11.0)".
    """
    where = [name for name in wait.where if name in what_is.devices]
    sums = list(_sums(ask, where, what_is)) or ["less is free there"]
    return f"it needs {_wanted(ask, where, what_is.devices)}, and {'; '.join(sums)}"


# Who is in the way


def _turn(wait: Wait, holds: Holds) -> str:
    """Where nothing is known of the devices, and engines take turns: the one that is waited for, as logs name it."""
    untried = next((name for name in wait.waits_for if name in holds and holds[name].untried), None)
    if untried is not None:
        return f"{untried}, which an earlier daemon left, is being ended"
    if wait.not_ended is not None:
        return f"{_not_ended(wait, holds)} could not be ended: {wait.not_ended}"
    for name in wait.waits_for:
        leaves = name in holds and holds[name].standing in _LEAVES
        return f"{name} {'is leaving' if leaves else 'loads on'} what it needs"
    for name in wait.behind:
        return f"{name} waits for what it needs"
    return "its turn has not come"


def _former(wait: Wait, holds: Holds) -> str:
    """An engine that has to be gone before, wherever it is: its own former one, or one of an earlier daemon."""
    if untried := [_called(name) for name in wait.waits_for if name in holds and holds[name].untried]:
        are = "is" if len(untried) == 1 else "are"
        return f"{_listed(untried)}, which an earlier daemon left, {are} being ended"
    if wait.not_ended is not None:
        return f"its former engine could not be ended: {wait.not_ended}"
    return "its former engine is leaving"


def _reasons(wait: Wait, what_is: Situation) -> Iterator[str]:
    """What those do or are to do who are waited for, one phrase for all that do the same."""
    holds = what_is.holds
    stuck = _not_ended(wait, holds) if wait.not_ended is not None else None
    if stuck is not None:
        yield f"{_called(stuck)} could not be ended: {wait.not_ended}"
    names = [name for name in wait.waits_for if name != stuck]
    is_to_go = [name for name in names if name in holds and holds[name].standing not in _LEAVES | {Standing.COMES}]
    yields = [name for name in names if name in holds and holds[name].standing is Standing.YIELDS]
    goes = [name for name in names if name in holds and holds[name].standing is Standing.GOES]
    comes = [name for name in names if name not in {*is_to_go, *yields, *goes}]
    requests = sum(what_is.in_flight.get(name, 0) for name in yields)
    running = f", {requests} request{'s' if requests > 1 else ''} in flight" if requests else ""
    yield from _phrase(yields, "gives way", "give way", running)
    yield from _phrase(is_to_go, "gives way", "give way", _within(wait.at - what_is.now))
    yield from _phrase(goes, "is leaving", "are leaving")
    yield from _phrase(comes, "loads there", "load there")


def _phrase(names: Sequence[str], one: str, many: str, more: str = "") -> Iterator[str]:
    if names:
        yield f"{_listed(map(_called, names))} {one if len(names) == 1 else many}{more}"


def _within(seconds: float) -> str:
    """Rounded up, so it stays true, and the same for a while."""
    if seconds <= 0:
        return ""
    if seconds == math.inf:
        return " when it is time"
    step = next((step for step in _STEPS if seconds <= step), math.ceil(seconds / _STEPS[-1]) * _STEPS[-1])
    return f" within {step} s"


def _not_ended(wait: Wait, holds: Holds) -> str:
    found = [name for name, hold in holds.items() if hold.not_ended == wait.not_ended]
    return next((name for name in found if name in wait.waits_for), found[0] if found else wait.waits_for[0])


# Memory


def _wanted(ask: Ask, where: Sequence[str], devices: Mapping[str, Device]) -> str:
    """What it needs on these devices, or on as many of them as it wants."""
    sizes: dict[int, list[str]] = {}
    for name in where:
        sizes.setdefault(ask.needs[name], []).append(name)
    if len(where) == ask.count:
        return " and ".join(f"{gib(size)} GiB {_on(names, devices)}" for size, names in sizes.items())
    least, most = gib(min(sizes)), gib(max(sizes))
    return f"{least if least == most else f'{least} to {most}'} GiB {_any(ask, where, devices)}"


def _on(names: Sequence[str], devices: Mapping[str, Device]) -> str:
    """As "on GPU 0", "on each of GPU 0 and GPU 1"."""
    if devices[names[0]].kind is Kind.MEMORY:
        return f"of {ONE[Kind.MEMORY]}"
    return f"on {'each of ' if len(names) > 1 else ''}{_listed(_name(name, devices) for name in names)}"


def _any(ask: Ask, among: Sequence[str], devices: Mapping[str, Device]) -> str:
    """As "on a GPU", "on one of 8 GPUs", "on each of 2 of 8 GPUs"."""
    kind = devices[among[0]].kind
    if kind is Kind.MEMORY:
        return f"of {ONE[kind]}"
    of = f" of {len(among)}" if len(among) > ask.count else ""
    if ask.count == 1:
        return f"on one{of} {_MANY[kind]}" if of else f"on {ONE[kind]}"
    return f"on each of {ask.count}{of} {_MANY[kind]}"


def _sums(ask: Ask, where: Sequence[str], what_is: Situation) -> Iterator[str]:
    """Who has what of each device that is short of what it needs, though nobody of ours is to go."""
    for name in where:
        device, others = what_is.devices[name], list(_others(ask, name, what_is.holds))
        held, need = sum(hold.takes[name] for hold in others), ask.needs[name]
        own = sum(hold.takes.get(name, 0) for hold in what_is.holds.values() if hold.name == ask.name)  # asleep
        left = device.room - held
        is_foreign = device.foreign > 0 and left - device.foreign < need and (ask.pressing or left >= need)
        if not is_foreign and (device.free >= need or (left < need and not ask.pressing)):
            continue
        free = min(device.free, max(left - device.foreign, 0))
        on = f" on {_name(name, what_is.devices)}" if len(where) > 1 else ""
        has = [_taken(others, name)] if others else []
        if device.foreign:
            has.append(f"other programs have {gib(device.foreign)}{_programs(what_is.foreign.get(name, ()))}")
        elif device.free < need and (rest := device.total - device.free - held - own) > _UNEXPLAINED * device.total:
            has.append(f"{gib(rest)} are not back yet, or others have them")
        yield f"{gib(free)} of {gib(device.total)} are free{on}{': ' if has else ''}{', '.join(has)}"


def _programs(programs: Sequence[tuple[str, int]]) -> str:
    largest = sorted(programs, key=lambda program: -program[1])
    return f" ({_listed(f'{name} {gib(size)}' for name, size in largest)})" if programs else ""


def _others(ask: Ask, device: str, holds: Holds) -> Iterator[Hold]:
    return (hold for name, hold in holds.items() if name != ask.name and device in hold.takes)


def _taken(holds: Sequence[Hold], device: str, mark: str = "") -> str:
    """What they have of it: "chat (always) has 40.0", largest first."""
    largest = sorted(holds, key=lambda hold: -hold.takes[device])
    shown = [f"{_called(hold.name)}{mark} has {gib(hold.takes[device])}" for hold in largest[:_MOST_NAMES]]
    rest = largest[_MOST_NAMES:]
    if rest:
        shown.append(f"{len(rest)} more have {gib(sum(hold.takes[device] for hold in rest))}")
    return " and ".join(shown)


# Names


def _called(instance: str) -> str:
    """The model's name for the first of its instances, which is the only one of most."""
    return instance.removesuffix("/0")


def _name(device: str, devices: Mapping[str, Device]) -> str:
    return called(device, devices[device].kind if device in devices else Kind.GPU)


def _listed(names: Iterable[str]) -> str:
    """As "a", "a and b", "a, b, c and 2 more"."""
    shown = list(names)
    if len(shown) > _MOST_NAMES:
        shown[_MOST_NAMES:] = [f"{len(shown) - _MOST_NAMES} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
