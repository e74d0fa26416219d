"""What keys have used, as values: counts by hour, key and model, the sums that a report asks for, a report as CSV.

Hours and days are UTC. Prompt, completion and cached tokens are those that an engine reported; cached ones are part of
the prompt. Estimated tokens are those that no engine reported (a stream that ended early), and are in none of the
others: what is charged is `Counts.tokens`, and what the engines counted is `prompt + completion`.
"""

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from vllm_proxy.domain.units import show, show_time

if TYPE_CHECKING:
    from vllm_proxy.domain.usage_resources import UsageRow

HOUR = 3600  # seconds
DAY = 24 * HOUR
MOST_ROWS = 100_000  # of a report

type By = Literal["key", "model", "day", "hour"]
_BY: tuple[By, ...] = get_args(By.__value__)
BY_DEFAULT: tuple[By, ...] = ("key", "model")
FIELDS = ("requests", "prompt", "completion", "cached", "estimated", "failed", "limited")  # of `Counts`
_COLUMNS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "estimated_tokens", "failed", "limited")


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

    def values(self) -> tuple[int, ...]:
        """In the order of `FIELDS`."""
        return (
            self.requests,
            self.prompt,
            self.completion,
            self.cached,
            self.estimated,
            self.failed,
            self.limited,
        )


class Spent(NamedTuple):
    """Tokens that were charged to a key."""

    day: int  # since midnight, UTC
    month: int  # since its first day, UTC


@dataclass(frozen=True, slots=True)
class Query:
    """What a report is of: whole hours from `first` up to `last`, which is not in it; of one key or of all."""

    first: int
    last: int
    by: tuple[By, ...] = BY_DEFAULT
    key: str | None = None

    def group(self, bucket: Bucket) -> tuple[str | int, ...]:
        """What a bucket is summed up with: one value for each of `by`."""
        values: dict[By, str | int]
        values = {"key": bucket.key, "model": bucket.model, "day": bucket.hour // DAY * DAY, "hour": bucket.hour}
        return tuple(values[name] for name in self.by)

    def has(self, bucket: Bucket) -> bool:
        """Whether it is of this bucket."""
        return self.first <= bucket.hour < self.last and self.key in {None, bucket.key}


type Groups = Mapping[tuple[str | int, ...], Counts]


def query(now: float, first: float | None, last: float | None, by: str | None, key: str | None = None) -> Query:
    """What is asked for. Without `first` and `last` the last 24 hours. `by`: names with commas between them.

    Raises:
        ValueError: it cannot be answered; says why.

    """
    end = int(now) // HOUR * HOUR + HOUR if last is None else math.ceil(last / HOUR) * HOUR
    begin = math.floor((min(now, end) - DAY if first is None else first) / HOUR) * HOUR
    if begin >= end:
        raise ValueError(f"from={show_time(begin)} is not before to={show_time(end)}")
    names = BY_DEFAULT if by is None else tuple(_known(name.strip()) for name in by.split(",") if name.strip())
    if len(set(names)) < len(names) or {"day", "hour"} <= set(names):
        raise ValueError(f"by={by}: each of key, model, and day or hour, once")
    return Query(begin, end, names, key)


def _known(name: str) -> By:
    for known in _BY:
        if name == known:
            return known
    raise ValueError(f"by={show(name)}: expected some of key, model, and day or hour, with commas between them")


def rows(asked: Query, groups: Groups) -> list["UsageRow"]:
    """A report, in the order of time, then by key and model. To sort what is nearly in order takes no time."""
    found = [_row(dict(zip(asked.by, group, strict=True)), counts) for group, counts in groups.items()]
    return sorted(
        found, key=lambda row: (row.get("hour") or row.get("day") or "", row["key"] or "", row["model"] or "")
    )


def _row(group: Mapping[By, str | int], counts: Counts) -> "UsageRow":
    key, model = group.get("key"), group.get("model")
    row: UsageRow = {
        "key": None if key is None else str(key),
        "model": None if model is None else str(model),
        "requests": counts.requests,
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "cached_tokens": counts.cached,
        "estimated_tokens": counts.estimated,
        "failed": counts.failed,
        "limited": counts.limited,
    }
    if (hour := group.get("hour")) is not None:
        row["hour"] = show_time(int(hour))
    if (day := group.get("day")) is not None:
        row["day"] = show_time(int(day))[:10]
    return row


def columns(by: Collection[str]) -> tuple[str, ...]:
    """The names of the columns of a report."""
    return ("key", "model", *(name for name in ("hour", "day") if name in by), *_COLUMNS)


def as_csv(by: Collection[str], found: Iterable["UsageRow"]) -> str:
    """A report as CSV (RFC 4180), with the names of its columns in the first line."""
    text, names = io.StringIO(), columns(by)
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in found)
    return text.getvalue()


def month_start(now: float) -> int:
    """When the month of a moment began, UTC."""
    return int(datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())


def month_end(start: int) -> int:
    """When a month ends that begins then, UTC."""
    return month_start(start + 32 * DAY)


def added(groups: dict[tuple[str | int, ...], Counts], more: Iterable[tuple[Bucket, Counts]], asked: Query) -> None:
    """Add to the sums of a report what is counted elsewhere."""
    for bucket, counts in more:
        if asked.has(bucket):
            groups.setdefault(asked.group(bucket), Counts()).add(counts)
