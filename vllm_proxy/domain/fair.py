"""Numbers requests so that keys share a model fairly: whoever has used less for its weight is next.

Start-time fair queueing, by tokens. The number goes to vLLM as a request's priority, and orders the daemon's own queue;
the lowest is next, equal ones go as they came. No request is held back for it, so engines batch as much as they can.

A number cannot be changed once an engine has it, so requests that wait stand as far apart as they were expected to
take. What they are numbered by is therefore the mean of what was used, and not what they may use at most: who allows
long answers and gets short ones would else wait for tokens that nobody ever takes.
"""

from dataclasses import dataclass, field

from vllm_proxy.domain.tokens import Estimate

_BITS = 40  # of a start; above them is the priority
_LAST = (1 << _BITS) - 1  # no start is later, else it would cross into the next priority


@dataclass(slots=True)
class _Class:
    """The keys of one priority: they share what those of higher ones leave."""

    now: int = 0  # the latest start of a request that had its first byte
    keys: "dict[str, _Key]" = field(default_factory=dict)


@dataclass(slots=True)
class _Key:
    last: float = 0.0  # the virtual time when its latest request ends
    waiting: "dict[Place, None]" = field(default_factory=dict)  # those without a byte of an answer; the latest is last


@dataclass(slots=True, eq=False)
class Place:
    """Of one request, from its number to its end."""

    share: "FairShare"
    number: int
    start: float
    _weight: float
    _tokens: int
    _key: _Key
    _class: _Class

    def began(self) -> None:
        """It had the first byte of its answer: whoever comes from now on starts no earlier than it did."""
        self._key.waiting.pop(self, None)
        if (start := self.number & _LAST) > self._class.now:
            self._class.now = start

    def ended(self, used: int) -> None:
        """It is over, to be called once: its key is charged the tokens that it `used`, not those that were expected.

        None, where it had no answer: whoever gave up waiting for many requests would else be last for as long as
        they had taken.
        """
        self._key.waiting.pop(self, None)
        self._key.last += (used - self._tokens) / self._weight
        self.share.is_over()


class FairShare:
    """The requests of one model: waiting ones, and those in flight. It begins anew whenever there are none."""

    def __init__(self) -> None:
        self.estimate = Estimate()  # of all keys: it orders, and is neither told nor held against a limit
        self._classes: dict[int, _Class] = {}
        self._in_flight = 0

    def tokens(self, mine: Estimate, prompt: int, most: int) -> int:
        """What a request is numbered by, with at most so many tokens of an answer.

        `mine`: of its key. Before the first answer to that, what others use is the best guess: a burst of a new key
        would else stand behind, or before, what it really takes.
        """
        return prompt + min(most, (mine if mine.has_learned else self.estimate).mean_output)

    def place(self, key: str, priority: int, weight: float, tokens: int) -> Place:
        """Of one more request; its number: `-priority * 2**40` and its virtual start. It is in flight until `ended`.

        `tokens`: what it is expected to take; `weight`: above 0. It is never before one of the same key that waits,
        though its key was given back what earlier ones did not use: of a key, the first to ask is the first.
        """
        self._in_flight += 1
        among = self._classes.get(priority)
        if among is None:
            among = self._classes[priority] = _Class()
        mine = among.keys.get(key)
        if mine is None:
            mine = among.keys[key] = _Key()
        start = mine.last
        if start < among.now:
            start = float(among.now)
        if mine.waiting and (latest := next(reversed(mine.waiting)).start) > start:
            start = latest
        tokens = max(tokens, 1)
        mine.last = start + tokens / weight
        place = Place(self, min(int(start), _LAST) - (priority << _BITS), start, weight, tokens, mine, among)
        mine.waiting[place] = None
        return place

    def is_over(self) -> None:
        """One request less."""
        self._in_flight -= 1
        if not self._in_flight:
            self._classes.clear()
