"""What keys use, counted in memory: by hour, key and model for the ledger, and in all for the metrics.

Requests count here as they end, without an await and without a lock. What was counted since is taken away by
`fleet/usage_ledger.py`, which keeps it on disk. Nothing here grows but by keys and models of the file.
"""

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Literal

from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.domain.usage import HOUR, Bucket, Counts

type Name = tuple[str, str]  # a key's, and a model's or an adapter's
type Outcome = Literal["ok", "client_error", "limited", "engine_error", "aborted"]
"""What became of a metered request: answered below 400 · 4xx · refused by a limit of its key · 5xx, or the answer broke
off · the client left."""


def _nobody() -> None: ...


class Usage:
    """Of all keys of one daemon."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """`now`: seconds since the epoch."""
        self.counted = _nobody  # called when something is counted of an hour, a key and a model anew
        self.outcomes: dict[tuple[str, str, Outcome], int] = {}  # by key and model
        self.refusals: dict[tuple[str, str], int] = {}  # by key, and the limit as the file calls it
        self._now = now
        self._end = 0.0  # of the hour in which it is counted; a clock that is set back is followed once that is taken
        self._in_hour: dict[Name, Counts] = {}
        self._hours: dict[int, dict[Name, Counts]] = {}  # by when they began; the present one too
        self._taken: dict[Name, Counts] = {}  # sums of what was taken
        self._gone: Counter[str] = Counter()  # tokens of keys that are gone, by model

    def settled(self, key: str, model: str, outcome: Outcome, tokens: Tokens, estimated: int) -> None:
        """A request was admitted, and is over. `estimated`: tokens that no engine reported."""
        counts = self.counts(key, model)
        counts.requests += 1
        counts.prompt += tokens.prompt
        counts.completion += tokens.completion
        counts.cached += tokens.cached
        counts.estimated += estimated
        if outcome == "engine_error":
            counts.failed += 1
        ended = key, model, outcome
        self.outcomes[ended] = self.outcomes.get(ended, 0) + 1

    def limited(self, key: str, model: str, limit: str) -> None:
        """A limit, such as `tokens_per_day`, did not let a request in."""
        self.counts(key, model).limited += 1
        ended: tuple[str, str, Outcome] = key, model, "limited"
        self.outcomes[ended] = self.outcomes.get(ended, 0) + 1
        self.refused(key, limit)

    def counts(self, key: str, model: str) -> Counts:
        """Of a key and a model in this hour: to be added to at once."""
        if self._now() >= self._end:
            self._begin_hour()
        return self._in_hour.get((key, model)) or self._new(key, model)

    def refused(self, key: str, limit: str) -> None:
        """A limit refused a request, such as `tokens_per_day`; for the metrics alone."""
        self.refusals[key, limit] = self.refusals.get((key, limit), 0) + 1

    def take(self) -> dict[Bucket, Counts]:
        """What was counted since the last time; the caller has it from now on."""
        taken = self.since()
        self._in_hour, self._hours, self._end = {}, {}, 0.0
        for bucket, counts in taken.items():
            self._taken.setdefault((bucket.key, bucket.model), Counts()).add(counts)
        return taken

    def since(self) -> dict[Bucket, Counts]:
        """What was counted since it was taken. The counts go on."""
        return {
            Bucket(hour, *name): counts for hour, counted in self._hours.items() for name, counts in counted.items()
        }

    def tokens_since(self, key: str) -> list[tuple[int, int]]:
        """What was charged to a key since it was taken: hours and tokens."""
        return [
            (hour, counts.tokens)
            for hour, counted in self._hours.items()
            for (name, _), counts in counted.items()
            if name == key
        ]

    def forget(self, keys: AbstractSet[str], models: AbstractSet[str]) -> None:
        """There are these keys and models: what others used is told no more, but to the ledger."""
        for key, model in self._taken:
            if key not in keys and model in models:
                self._gone[model] += self._taken[key, model].tokens
        for model in [model for model in self._gone if model not in models]:
            del self._gone[model]
        for forgotten in (self._taken, self.outcomes):
            for each in [each for each in forgotten if each[0] not in keys or each[1] not in models]:
                del forgotten[each]  # type: ignore[arg-type]
        for refusal in [refusal for refusal in self.refusals if refusal[0] not in keys]:
            del self.refusals[refusal]

    def totals(self, keys: AbstractSet[str], models: AbstractSet[str]) -> dict[Name, Counts]:
        """All since the daemon began, of the keys and the models that there are; the others are forgotten."""
        self.forget(keys, models)
        totals: dict[Name, Counts] = {}
        for name, counts in self._taken.items():
            totals.setdefault(name, Counts()).add(counts)
        for bucket, counts in self.since().items():
            if bucket.key in keys and bucket.model in models:
                totals.setdefault((bucket.key, bucket.model), Counts()).add(counts)
        return totals

    def charged(self) -> dict[str, int]:
        """All tokens since the daemon began, estimated ones too, by model: of keys that are gone as well."""
        charged = self._gone.copy()
        for counted in (self._taken, *self._hours.values()):
            for (_, model), counts in counted.items():
                charged[model] += counts.tokens
        return charged

    def _begin_hour(self) -> None:
        hour = int(self._now()) // HOUR * HOUR
        self._end = float(hour + HOUR)
        self._in_hour = self._hours.setdefault(hour, {})

    def _new(self, key: str, model: str) -> Counts:
        counts = self._in_hour[key, model] = Counts()
        self.counted()
        return counts
