"""Decides which instances of one model to stop and to start when its spec or replicas change (a rolling update).

For `decide`. Stateless: it considers only the instances as they are. So it can be called after every change, and a spec
that changes in the middle of a replacement needs no special case (tests/domain/test_rollout.py). When a start is
admitted, and on which devices, is not decided here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_proxy.domain.lifecycle import State


class Strategy(StrEnum):
    """How instances that run something else than what is wanted make room for those that do."""

    ONE_BY_ONE = "one by one"  # stop an old one, start a new one, then the next
    SURGE = "surge"  # new beside old; old goes when new is ready
    DRAIN = "drain"  # stop all old ones first


@dataclass(frozen=True, slots=True)
class Replica:
    """One instance. `up_to_date`: it runs what is wanted."""

    index: int
    state: State
    up_to_date: bool

    @property
    def active(self) -> bool:
        """Whether it runs or tries to, and nobody has asked it to stop."""
        return self.state not in {State.STOPPED, State.UNLOADING}


@dataclass(frozen=True, slots=True)
class Steps:
    """Indices of the instances to stop, to start, and to wake where they sleep: all at once."""

    stop: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    wake: tuple[int, ...] = ()


def steps(present: Sequence[Replica], replicas: int, strategy: Strategy) -> Steps:
    """What can be done now; nothing when all is as wanted, or something must end or become ready before."""
    current = sorted((one for one in present if one.active and one.up_to_date), key=lambda one: one.index)
    others = [one for one in present if one.active and not one.up_to_date]
    outdated = sorted((one for one in others if one.state is State.READY), key=lambda one: one.index)
    leaving = sum(one.state is State.UNLOADING for one in present)
    surplus, current = current[replicas:], current[:replicas]
    # Who serves nobody and is not what is wanted goes in any case.
    stop = [*surplus, *(one for one in others if one.state is not State.READY)]
    room = replicas - len(current) - len(outdated) - leaving - len(stop)
    match strategy:
        case Strategy.DRAIN:
            stop += outdated
        case Strategy.SURGE:
            ready = sum(one.state is State.READY for one in current)
            stop += outdated[max(0, replicas - ready) :]
            room += bool(outdated)
        case Strategy.ONE_BY_ONE:
            too_many = max(0, len(current) + len(outdated) - replicas)
            waits = stop or leaving or room > 0 or any(one.state is State.LOADING for one in current)
            stop += outdated[len(outdated) - too_many :] if too_many or waits else outdated[:1]
    missing = min(room, replicas - len(current))
    free = _free(present)
    return Steps(
        tuple(sorted(one.index for one in stop)),
        tuple(next(free) for _ in range(missing)),
        tuple(one.index for one in current if one.state is State.SLEEPING),
    )


def _free(present: Sequence[Replica]) -> Iterator[int]:
    """Indices that nobody has: those of stopped instances first."""
    yield from sorted(one.index for one in present if one.state is State.STOPPED)
    taken = {one.index for one in present}
    index = 0
    while True:
        if index not in taken:
            yield index
        index += 1
