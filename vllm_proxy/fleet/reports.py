"""Says to those who wait for room why, after each decision; once for each change.

The sentences are in `domain/waiting.py`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from vllm_proxy.domain import waiting
from vllm_proxy.domain.decide import RoomNow
from vllm_proxy.domain.ledger import Ask, Standing, admitted
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.placement import Machine
from vllm_proxy.domain.room import Moves, Wait
from vllm_proxy.domain.waiting import Situation
from vllm_proxy.fleet.claims import Claim, Waits

_MOST_TOLD = 100  # waiting starts in one turn of the loop: each notification has listeners


class Reports:
    """Says why they wait to those who wait, after one decision."""

    def __init__(
        self, now: RoomNow, moves: Moves, time: float, claims: Iterable[Claim], machine: Machine | None
    ) -> None:
        self._moves = moves
        self._asks = {ask.name: ask for ask in now.asks}
        holds = {hold.name: hold for hold in now.holds}
        for name in moves.go:
            holds[name] = replace(holds[name], standing=Standing.YIELDS)
        for name, where in moves.admit.items():
            holds[name] = admitted(self._asks[name], where)
        awaited = {name for wait in moves.wait.values() for name in wait.waits_for}
        in_flight = {claim.name: claim.tenant.in_flight() for claim in claims if claim.name in awaited}
        seen = {} if machine is None else machine.seen
        foreign = {name: [(other.name, other.bytes) for other in one.foreign] for name, one in seen.items()}
        self._what_is = Situation(time, now.devices, holds, in_flight, foreign)

    def refusal(self, name: str) -> str:
        """Why one is refused."""
        return waiting.refusal(self._asks[name], self._moves.wait[name], self._what_is)

    def tell(self, claims: Mapping[str, Claim]) -> bool:
        """Tell each, once for each change; whether that was all of them."""
        told = 0
        for name, claim in claims.items():
            if told == _MOST_TOLD:
                return False
            if (wait := self._moves.wait.get(name)) is not None:
                told += claim.tell(self._waits(claim, self._asks[name], wait))
        return True

    def _waits(self, claim: Claim, ask: Ask, wait: Wait) -> Waits:
        sizes = [ask.needs[name] for name in wait.where if name in ask.needs] or ask.needs.values()
        needs, waits_for, behind = max(sizes, default=0) or None, wait.waits_for, wait.behind
        if ask.name in self._moves.stuck:
            why = waiting.stuck_sentence(ask, self._what_is)
            return Waits(why, Reason.DOES_NOT_FIT, no_room=why, needs=needs, waits_for=waits_for, behind=behind)
        why = waiting.sentence(ask, wait, self._what_is)
        if wait.not_ended is not None:
            return Waits(why, Reason.NOT_ENDED, needs=needs, waits_for=waits_for, behind=behind)
        left = wait.at - self._what_is.now
        ready_in = None if wait.at == math.inf else max(left, 0.0) + claim.return_seconds
        return Waits(why, ready_in=ready_in, needs=needs, waits_for=waits_for, behind=behind)
