"""Numbers requests so that keys share a model fairly: whoever has used less for its weight is next.

Start-time fair queueing, by tokens. The number goes to vLLM as a request's priority, and orders the daemon's own queue;
the lowest is next, equal ones go as they came. No request is held back for it, so engines batch as much as they can.
"""

from dataclasses import dataclass, field

_BITS = 40  # of a start; above them is the priority
_LAST = (1 << _BITS) - 1  # no start is later, else it would cross into the next priority


@dataclass(slots=True)
class _Class:
    """The keys of one priority: they share what those of higher ones leave."""

    now: int = 0  # the latest start of a request that had its first byte
    last: dict[str, float] = field(default_factory=dict)  # by key: the virtual time when its latest request ends


class FairShare:
    """The requests of one model: waiting ones, and those in flight. It begins anew whenever there are none."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._in_flight = 0

    def number(self, key: str, priority: int, weight: float, tokens: int) -> int:
        """Of one more request: `-priority * 2**40` and its virtual start. It is in flight until `ended`.

        `tokens`: what it holds; `weight`: above 0.
        """
        self._in_flight += 1
        found = self._classes.get(priority)
        if found is None:
            found = self._classes[priority] = _Class()
        start = found.last.get(key, 0.0)
        if start < found.now:
            start = float(found.now)
        found.last[key] = start + max(tokens, 1) / weight
        return min(int(start), _LAST) - (priority << _BITS)

    def began(self, number: int) -> None:
        """A request had the first byte of its answer: whoever comes from now on starts no earlier than it did."""
        found = self._classes.get(-(number >> _BITS))
        if found is not None and (start := number & _LAST) > found.now:
            found.now = start

    def ended(self, key: str, priority: int, weight: float, tokens: int, used: int) -> None:
        """A request is over, with the values that its number was made of: its key is charged what it `used` instead.

        Nothing, where it had no answer: whoever gave up waiting for many requests would else be last for as long as
        they had taken.
        """
        found = self._classes.get(priority)
        if found is not None and key in found.last:
            found.last[key] += (used - max(tokens, 1)) / weight
        self._in_flight -= 1
        if not self._in_flight:
            self._classes.clear()
