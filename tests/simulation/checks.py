"""What holds of every decision of `domain/room.py`, whatever the fleet is.

For the properties of one decision, and for the simulation, which checks each of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Standing
from vllm_proxy.domain.room import Moves, decide

MOVES = frozenset({Standing.COMES, Standing.GOES})


def verify(devices: Mapping[str, Device], holds: Sequence[Hold], asks: Sequence[Ask], moves: Moves) -> None:
    """Capacity, comers alone, whole gangs; `always` stays; only who presses makes others go; nobody does both."""
    by_name = {ask.name: ask for ask in asks}
    _verify_capacity(devices, holds, by_name, moves)
    assert not moves.admit.keys() & moves.go.keys()
    assert not moves.admit.keys() & moves.place.keys()
    assert moves.admit.keys() | moves.wait.keys() | moves.go.keys() >= by_name.keys(), "each is answered"
    assert not moves.admit.keys() & moves.wait.keys()
    for hold in holds:
        if hold.name in moves.go:
            moves_itself = moves.go_for[hold.name] == hold.name
            assert not hold.always or moves_itself
            assert not moves_itself or hold.standing is Standing.SLEEPS
            assert hold.to is None
            assert hold.standing in {Standing.SERVES, Standing.SLEEPS}
            asleep = moves.go[hold.name] is Depth.SLEEP
            assert not asleep or (hold.keeps is not None and hold.standing is Standing.SERVES)
            asker = by_name[moves.go_for[hold.name]]
            assert asker.pressing or moves_itself
            assert asker.model != hold.model or moves_itself


def _verify_capacity(
    devices: Mapping[str, Device], holds: Sequence[Hold], asks: Mapping[str, Ask], moves: Moves
) -> None:
    used = {name: device.foreign + sum(hold.takes.get(name, 0) for hold in holds) for name, device in devices.items()}
    before = dict(used)
    held = {hold.name: hold for hold in holds}
    moving = {name: [hold.name for hold in holds if name in hold.takes and hold.standing in MOVES] for name in devices}
    for name, where in moves.admit.items():
        ask = asks[name]
        asleep = held[name].takes if name in held else {}
        assert len(set(where)) == len(where)
        assert len(where) == (len(asleep) or len(ask.only) or ask.count)
        assert set(where) == (set(asleep) or set(ask.only) or set(where))
        assert ask.only or asleep or len({devices[one].total for one in where}) <= 1
        for one in where:
            wants = ask.needs[one] - asleep.get(one, 0)
            used[one] += wants
            assert not moving[one], "a comer is alone on its devices"
            assert wants <= devices[one].free
            moving[one].append(name)
    for name, device in devices.items():
        assert used[name] <= max(device.room, before[name])


def carried_out(holds: Sequence[Hold], asks: Sequence[Ask], moves: Moves) -> tuple[list[Hold], list[Ask]]:
    """The fleet when a decision has been followed, and nothing else has happened."""
    by_name = {ask.name: ask for ask in asks}
    after = []
    for hold in holds:
        if hold.name in moves.go:
            after.append(replace(hold, to=moves.go[hold.name], standing=Standing.YIELDS))
        elif hold.name not in moves.admit:
            after.append(hold)
    for name, where in moves.admit.items():
        ask = by_name[name]
        takes = {one: ask.needs[one] for one in where}
        after.append(Hold(name, ask.model, takes, Standing.COMES, always=ask.always, priority=ask.priority))
    waiting = [
        replace(ask, place=moves.place.get(ask.name, ()), short=moves.short.get(ask.name))
        for ask in asks
        if ask.name not in moves.admit and ask.name not in moves.refuse
    ]
    return after, waiting


def settled(
    now: float, devices: Mapping[str, Device], holds: Sequence[Hold], asks: Sequence[Ask], rules: Rules
) -> Moves:
    """Decide, and make sure that a second decision says nothing new."""
    moves = decide(now, devices, holds, asks, rules)
    verify(devices, holds, asks, moves)
    if moves.admit or moves.go:
        again = decide(now, devices, *carried_out(holds, asks, moves), rules)
        assert not again.admit
        assert not again.go
    return moves
