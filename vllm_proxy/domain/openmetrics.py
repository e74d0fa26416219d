"""OpenMetrics 1.0, the format in which Prometheus takes exemplars: what differs from its own text (`exposition`).

Series, values and their order are the same, made by the same functions: only heads, exemplars and the end are other
ones, so neither format can lack what the other has (tests/domain/test_openmetrics.py).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, override

from vllm_proxy.domain.exposition import Exposition, Family, number

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_NAME = "application/openmetrics-text"
_VERSIONS = {"", "0.0.1", "1.0.0"}  # who reads the draft reads this
_PLAIN = ("text/plain", "text/*", "*/*")  # the most specific one counts
_QUALITY = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Exemplar(NamedTuple):
    """One observation of a histogram. `trace_id`: 32 hex digits; `at`: seconds since the epoch."""

    trace_id: str
    seconds: float
    at: float


class OpenMetrics(Exposition):
    """A text in this format, whose samples may have exemplars."""

    _END = b"# EOF\n"

    @override
    def _head(self, family: Family) -> bytes:
        name, meaning = family.name.removesuffix("_total"), family.meaning.translate(_ESCAPES)
        return f"# HELP {name} {meaning}\n# TYPE {name} {family.kind}\n".encode()


def with_exemplars(lines: str, exemplars: Mapping[int, Exemplar]) -> str:
    """The samples of one histogram, with the exemplars of its buckets by their index."""
    if not exemplars:
        return lines
    each = lines.split("\n")  # the buckets come first
    for index, (trace_id, seconds, at) in exemplars.items():
        each[index] += f' # {{trace_id="{trace_id}"}} {number(seconds)} {at:.3f}'
    return "\n".join(each)


def is_preferred(accept: str) -> bool:
    """Whether an `Accept` names this format, and wants the plain text no more than it. A `*` does not name it."""
    qualities: dict[str, float] = {}
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        said = {name.strip(): value.strip(' \t"') for name, _, value in (one.partition("=") for one in parameters)}
        quality = said.get("q", "1")
        if _QUALITY.fullmatch(quality) and (kind != _NAME or said.get("version", "") in _VERSIONS):
            qualities[kind] = max(float(quality), qualities.get(kind, 0.0))
    plain = next((qualities[kind] for kind in _PLAIN if kind in qualities), 0.0)
    return 0.0 < qualities.get(_NAME, 0.0) >= plain
