"""Rates of the past, one point after another, of as many names as had any: bounded, and small.

Pure: who samples says when. A point is the mean since the one before it.
"""

from array import array
from collections.abc import Mapping

POINTS = 360


class Series:
    """Some rates of each name, `POINTS` of each kept."""

    def __init__(self, kinds: int) -> None:
        """`kinds`: how many rates a point has."""
        self.taken = 0  # points since the beginning
        self._kinds = kinds
        self._points: dict[str, tuple[array[float], ...]] = {}
        self._at_rest: dict[str, int] = {}  # points in a row that were all zero

    def add(self, rates: Mapping[str, tuple[float, ...]]) -> None:
        """One more point of each name; of one that is not there it is zero."""
        self.taken += 1
        for name in [name for name, found in rates.items() if any(found) and name not in self._points]:
            self._points[name] = tuple(array("f") for _ in range(self._kinds))
        for name, points in list(self._points.items()):
            found = rates.get(name) or (0.0,) * self._kinds
            for each, rate in zip(points, found, strict=True):
                each.append(rate)
                del each[:-POINTS]
            self._at_rest[name] = 0 if any(found) else self._at_rest.get(name, 0) + 1
            if self._at_rest[name] >= POINTS:
                del self._points[name], self._at_rest[name]

    def last(self, count: int) -> dict[str, tuple[list[float], ...]]:
        """At most so many of the last points, the oldest first, of the names of which one is not zero."""
        count = min(count, self.taken, POINTS)
        found: dict[str, tuple[list[float], ...]] = {}
        for name, points in self._points.items():
            if self._at_rest[name] < count:
                found[name] = tuple([0.0] * (count - len(each)) + [round(rate, 2) for rate in each[-count:]]
                                    for each in points)  # fmt: skip
        return found
