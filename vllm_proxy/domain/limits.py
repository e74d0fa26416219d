"""What a key may use: requests and tokens in a minute, a day, a month, at once, and how it shares with other keys.

Values alone, as `[keys.NAME]` has them; 0 is no limit. What was used of them is counted in `window`, and whose request
is next among several keys is numbered in `fair`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Rate:
    """Of any 60 seconds. 0: no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts and answers together

    @property
    def is_limited(self) -> bool:
        """Whether it can refuse anything."""
        return self.requests_per_minute > 0 or self.tokens_per_minute > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key. 0: no limit."""

    rate: Rate = field(default_factory=Rate)  # over all models
    tokens_per_day: int = 0  # of UTC
    tokens_per_month: int = 0  # as above
    max_in_flight: int = 0  # requests at once, over all models; what is above waits in the model's queue
    max_output_tokens: int = 0  # of one answer
    priority: int = 0  # whose requests come first: the higher one's
    weight: float = 1.0  # its share among keys of its priority
    models: tuple[tuple[str, Rate], ...] = ()  # beside `rate`, by globs over ids

    @property
    def is_limited(self) -> bool:
        """Whether it can refuse anything."""
        counts = self.tokens_per_day, self.tokens_per_month, self.max_in_flight, self.max_output_tokens
        return self.rate.is_limited or any(counts) or any(rate.is_limited for _, rate in self.models)

    @property
    def wants_fairness(self) -> bool:
        """Whether engines have to take requests in the order of `fair`, and not as they come."""
        return self.priority != 0 or self.weight != 1.0 or self.is_limited

    def below_an_answer(self, rate: Rate) -> str | None:
        """Which limit of tokens has no room for a prompt and an answer of `max_output_tokens`. `rate`: one of its."""
        limits = {"tokens_per_minute": rate.tokens_per_minute}
        if rate is self.rate:
            limits |= {"tokens_per_day": self.tokens_per_day, "tokens_per_month": self.tokens_per_month}
        return next((name for name, limit in limits.items() if 0 < limit <= self.max_output_tokens), None)

    def has_another(self, glob: str, model_ids: Iterable[str]) -> bool:
        """Whether an entry of `models` with a limit, other than that of `glob`, matches one of these models."""
        others = [other for other, rate in self.models if other != glob and rate.is_limited]
        return any(fnmatchcase(model_id, other) for model_id in model_ids for other in others)

    def glob_of(self, model_id: str) -> str | None:
        """Which entry of `models` counts for a model: its id as it is, else the longest glob that matches it."""
        found: str | None = None
        for glob, _ in self.models:
            if glob == model_id:
                return glob
            if fnmatchcase(model_id, glob) and (found is None or len(glob) > len(found)):
                found = glob
        return found

    def of_model(self, model_id: str) -> Rate | None:
        """What counts for a model beside `rate`; None: nothing does."""
        glob = self.glob_of(model_id)
        return None if glob is None else dict(self.models)[glob]
