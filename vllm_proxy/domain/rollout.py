"""What runs and what is wanted of one model -> which instances to stop and which to start, now.

Its one rule: it looks at what is, never at what it said before. So it can be asked again after every change, and a
change of mind in the middle of a replacement needs no special case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_proxy.domain.lifecycle import State


class Strategy(StrEnum):
    """How instances that run something else than what is wanted make room for those that do."""

    ONE_BY_ONE = "one by one"  # old away, new there, then the next one
    SURGE = "surge"  # new beside old; old goes when new is ready
    DRAIN = "drain"  # all old ones away first


@dataclass(frozen=True, slots=True)
class Seat:
    """One instance. `fits`: it runs what is wanted."""

    index: int
    state: State
    fits: bool

    @property
    def active(self) -> bool:
        """Whether it runs or tries to, and nobody has asked it to stop."""
        return self.state not in {State.STOPPED, State.UNLOADING}


@dataclass(frozen=True, slots=True)
class Steps:
    """Indices of the instances to stop, and of those to start: both at once."""

    stop: tuple[int, ...] = ()
    start: tuple[int, ...] = ()


def steps(seats: Sequence[Seat], replicas: int, strategy: Strategy) -> Steps:
    """What can be done now; nothing when all is as wanted, or something must end or become ready before."""
    fitting = sorted((seat for seat in seats if seat.active and seat.fits), key=lambda seat: seat.index)
    others = [seat for seat in seats if seat.active and not seat.fits]
    serving = sorted((seat for seat in others if seat.state is State.READY), key=lambda seat: seat.index)
    leaving = sum(seat.state is State.UNLOADING for seat in seats)
    surplus, fitting = fitting[replicas:], fitting[:replicas]
    # Who serves nobody and is not what is wanted goes in any case.
    stop = [*surplus, *(seat for seat in others if seat.state is not State.READY)]
    room = replicas - len(fitting) - len(serving) - leaving - len(stop)
    match strategy:
        case Strategy.DRAIN:
            stop += serving
        case Strategy.SURGE:
            ready = sum(seat.state is State.READY for seat in fitting)
            stop += serving[max(0, replicas - ready) :]
            room += bool(serving)
        case Strategy.ONE_BY_ONE:
            too_many = max(0, len(fitting) + len(serving) - replicas)
            waits = stop or leaving or room > 0 or any(seat.state is State.LOADING for seat in fitting)
            stop += serving[len(serving) - too_many :] if too_many or waits else serving[:1]
    missing = min(room, replicas - len(fitting))
    free = _free(seats)
    return Steps(tuple(sorted(seat.index for seat in stop)), tuple(next(free) for _ in range(missing)))


def _free(seats: Sequence[Seat]) -> Iterator[int]:
    """Indices that nobody has: those of stopped instances first."""
    yield from sorted(seat.index for seat in seats if seat.state is State.STOPPED)
    taken = {seat.index for seat in seats}
    index = 0
    while True:
        if index not in taken:
            yield index
        index += 1
