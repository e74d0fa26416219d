"""What keys have used, as values: counts of an hour, of one key and one model, and sums of them.

Hours and days are UTC. Prompt, completion and cached tokens are those that an engine reported; cached ones are part of
the prompt. Estimated tokens are those that no engine reported (a stream that ended early): they stand apart, so that
what was charged is `Counts.tokens`, and what engines themselves counted is `prompt + completion`.
"""

from dataclasses import dataclass
from typing import NamedTuple

HOUR = 3600  # seconds
DAY = 24 * HOUR


class Bucket(NamedTuple):
    """What is counted together."""

    hour: int  # when it begins: seconds since the epoch, in whole hours
    key: str
    model: str  # or adapter


@dataclass(slots=True)
class Counts:
    """How much of each. `requests` were admitted, failed ones included; `limited` were refused."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    estimated: int = 0
    failed: int = 0
    limited: int = 0

    @property
    def tokens(self) -> int:
        """What is charged."""
        return self.prompt + self.completion + self.estimated

    def add(self, other: "Counts") -> None:
        """Add the counts of another."""
        self.requests += other.requests
        self.prompt += other.prompt
        self.completion += other.completion
        self.cached += other.cached
        self.estimated += other.estimated
        self.failed += other.failed
        self.limited += other.limited
