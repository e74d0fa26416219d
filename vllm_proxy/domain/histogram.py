"""A histogram with fixed upper bounds, as Prometheus defines it.

Adding a value is cheap enough for every request; `domain/exposition.py` writes it as text.
"""

from bisect import bisect_left


class Histogram:
    """Counts by upper bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more observation, in seconds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
