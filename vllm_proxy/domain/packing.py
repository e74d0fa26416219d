"""Whether parts of given sizes can stand on devices together, and where: an exact search that may give up.

For `fit` and `leftover`, which ask of the models of a file. In doubt everything fits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from vllm_proxy.domain.ledger import Device, Where

MOST_STEPS = 10_000  # of one search


@dataclass(frozen=True, slots=True)
class Part:
    """One instance, which stays: `count` of the devices in `needs` (bytes of each), or exactly `named`."""

    needs: Mapping[str, int]
    count: int
    named: Where | None


def placed(parts: Sequence[Part], devices: Mapping[str, Device], most: int | None = None) -> list[Where] | None:
    """Where each may be so that all stand together; None: nowhere. All () where more than `most` steps were needed.

    The largest is placed first.
    """
    room = {name: device.room for name, device in devices.items()}
    if sum(min(part.needs.values()) * part.count for part in parts) > sum(room.values()):
        return None
    order = sorted(range(len(parts)), key=lambda index: -min(parts[index].needs.values()) * parts[index].count)
    named = {name for part in parts for name in part.named or ()}
    open_: list[tuple[Iterator[Where], Where]] = []  # where each may be, and where it is
    steps, limit = 0, MOST_STEPS if most is None else most
    while len(open_) < len(order):
        open_.append((_places(parts[order[len(open_)]], room, devices, named), ()))
        while (where := next(open_[-1][0], None)) is None:
            open_.pop()
            if not open_:
                return None
            choices, there = open_.pop()
            _take(room, parts[order[len(open_)]], there, -1)
            open_.append((choices, ()))
        steps += 1
        if steps > limit:
            return [()] * len(parts)
        open_[-1] = (open_[-1][0], where)
        _take(room, parts[order[len(open_) - 1]], where, 1)
    found = dict(zip(order, (there for _, there in open_), strict=True))
    return [found[index] for index in range(len(parts))]


def _take(room: dict[str, float], part: Part, where: Where, sign: int) -> None:
    for name in where:
        room[name] -= sign * part.needs[name]


def _places(part: Part, room: Mapping[str, float], devices: Mapping[str, Device], named: set[str]) -> Iterator[Where]:
    """Where it fits; of sets that nobody can tell apart, one."""
    able = [name for name, need in part.needs.items() if need <= room[name]]
    if part.named is not None:
        yield from [part.named] if len(able) == len(part.named) else []
        return
    seen = set()
    for where in combinations(able, part.count):
        if len({devices[name].total for name in where}) > 1:
            continue
        looks = tuple(sorted((devices[name].total, room[name], name if name in named else "") for name in where))
        if looks not in seen:
            seen.add(looks)
            yield where
