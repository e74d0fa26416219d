"""Prometheus' text format: families of series, and the lines of their samples. No clock, no state of the daemon.

`api/*_metrics.py` declare the daemon's own families as constants, so that docs/metrics.md is made of the same ones that
are served. A scrape makes thousands of lines: whatever of a line does not change is made once.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from vllm_proxy.domain.histogram import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

type Kind = Literal["counter", "gauge", "histogram"]

_MOST_TEMPLATES = 8192  # of histograms, 1.5 KB each; more are made anew each time
_MOST_LABELS = 65536
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Family:
    """Series of one name. `labels` are in the order in which they are written, alphabetical as everywhere."""

    __slots__ = ("_sample", "head", "kind", "labels", "meaning", "name")

    def __init__(self, name: str, kind: Kind, meaning: str, labels: Sequence[str] = ()) -> None:
        """`name`: as queries have it, a counter's with its `_total`."""
        assert list(labels) == sorted(labels), name
        assert name.endswith("_total") == (kind == "counter"), name
        self.name = name
        self.kind: Kind = kind
        self.meaning = meaning
        self.labels = tuple(labels)
        self.head = f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n".encode()
        written = ",".join(f'{label}="%s"' for label in labels)
        self._sample = (f"{name}{{{written}}}" if labels else name) + " %s\n"

    def without(self, label: str) -> "Family":
        """The same family, for series that lack a label."""
        return Family(self.name, self.kind, self.meaning, [one for one in self.labels if one != label])

    def line(self, value: float, *labels: str) -> str:
        """One sample of a counter or a gauge. The values of its labels, in their order."""
        return self._sample % (*map(_escaped, labels), number(value))

    def lines(self, histogram: Histogram, *labels: str) -> str:
        """The samples of one histogram."""
        cumulated = [*accumulate(histogram.counts)]
        return _template(self.name, self.labels, labels, histogram.bounds) % (
            *cumulated,
            cumulated[-1],
            number(histogram.total),
        )


class Exposition:
    """A text, of samples that come in any order: each family once, with its head; `known` ones without samples, too."""

    _END = b""

    def __init__(self, known: Iterable[Family] = ()) -> None:
        self._families = {family.name: [self._head(family)] for family in known}

    def add(self, family: Family, lines: str) -> None:
        """Some samples of a family."""
        self.add_made([(family, lines.encode())])

    def add_made(self, made: Iterable[tuple[Family, bytes]]) -> None:
        """Samples of several families, encoded."""
        families = self._families
        for family, lines in made:
            name = family.name
            if name in families:
                families[name].append(lines)
            else:
                families[name] = [self._head(family), lines]

    def text(self) -> bytes:
        """All of it."""
        return b"".join(part for parts in (*self._families.values(), (self._END,)) for part in parts)

    def _head(self, family: Family) -> bytes:
        """The lines that explain a family."""
        return family.head


def number(value: float) -> str:
    """A value as Prometheus reads it."""
    if isinstance(value, int):
        return str(int(value))  # of a bool, too
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


@lru_cache(_MOST_LABELS)
def _escaped(label: str) -> str:
    return str(label).translate(_ESCAPES)


@lru_cache(_MOST_TEMPLATES)
def _template(name: str, labels: Sequence[str], values: Sequence[str], bounds: Sequence[float]) -> str:
    """A histogram's lines, with a place for each number."""
    pairs = [f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)]
    own = ",".join(pairs).replace("%", "%%")
    before, alone = (f"{own},", f"{{{own}}}") if own else ("", "")
    buckets = [f'{name}_bucket{{{before}le="{bound}"}} %d\n' for bound in (*bounds, "+Inf")]
    return "".join([*buckets, f"{name}_count{alone} %d\n", f"{name}_sum{alone} %s\n"])
