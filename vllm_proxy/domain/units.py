"""Durations, sizes and times, parsed and shown as people write them.

Everywhere else a duration is a float of seconds and a size an int of bytes; only this module converts.
"""

import contextlib
import json
import math
import re
import sys
from datetime import UTC, datetime
from fractions import Fraction

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,30})?)\s*%")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_SIZE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_WHOLE = 100  # percent
# For a class in a pattern: what a terminal or a browser obeys and does not show, but the tab. The last ones of it end
# lines, and turn the text behind them around.
NO_TEXT = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_FIRST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
_LAST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()


def parse_duration(value: object) -> float:
    """Seconds, from a number of seconds or a string such as "90s", "5m", "1h30m", "250ms"."""
    seconds: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) if abs(value) <= sys.float_info.max else math.inf
    elif isinstance(value, str) and value and (match := _DURATION.fullmatch(value)):
        hours, minutes, secs, millis = (float(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + secs + millis / 1000
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        msg = f'expected a duration such as 90, "90s", "5m" or "1h30m", got {show(value)}'
        raise ValueError(msg)
    return seconds


def parse_size(value: object) -> int:
    """Bytes, from a whole number of bytes or a string such as "64MiB" or "10GB"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(Fraction(match[1]) * _SIZE_UNITS[match[2] or "B"])
    msg = f'expected a size such as 1048576 or "64MiB", got {show(value)}'
    raise ValueError(msg)


def parse_size_or_percent(value: object) -> int | str:
    """Bytes as `parse_size` reads them, or a percentage such as "50%", which is left as it is: see `bytes_of`."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)) and Fraction(match[1]) <= _WHOLE:
        return value
    with contextlib.suppress(ValueError):
        return parse_size(value)
    msg = f'expected a size such as "64GiB", or a percentage such as "50%", got {show(value)}'
    raise ValueError(msg)


def bytes_of(size: int | str, total: int) -> int:
    """What `parse_size_or_percent` has read, in bytes. `total`: what a percentage is of."""
    return size if isinstance(size, int) else int(Fraction(size.removesuffix("%").strip()) * total / _WHOLE)


def parse_time(text: str) -> datetime:
    """A moment, from a date and a time with its offset, as RFC 3339 writes them."""
    if _TIME.fullmatch(text):
        with contextlib.suppress(ValueError):  # no such day, hour or offset
            return datetime.fromisoformat(text.upper())
    msg = 'expected a time with its offset, such as "2027-01-01T00:00:00Z"'
    raise ValueError(msg)


def show_time(seconds: float) -> str:
    """A moment in UTC, from seconds since the epoch: "2027-01-01T00:00:00Z". One that no calendar has is the last."""
    moment = datetime.fromtimestamp(min(max(seconds, _FIRST), _LAST), UTC)
    return moment.isoformat().replace("+00:00", "Z")


def show_duration(seconds: float) -> str:
    """As people write it: "15m", "1h30m", "1.5s", "250ms"; different ones look different."""
    whole = round(seconds)
    if seconds == whole:
        parts = [(whole // 3600, "h"), (whole % 3600 // 60, "m"), (whole % 60, "s")]
        return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"
    millis = round(seconds * 1000)
    return f"{millis}ms" if seconds < 1 and millis / 1000 == seconds else f"{seconds!r}s"


def show_size(size: int) -> str:
    """As people write it, in the largest unit of which it is a multiple: "64MiB", "1000000B"."""
    units = ("TiB", "GiB", "MiB", "KiB")
    return next(
        (f"{size // _SIZE_UNITS[unit]}{unit}" for unit in units if size and size % _SIZE_UNITS[unit] == 0), f"{size}B"
    )


def show(value: object) -> str:
    """A value as TOML would spell it, short enough for a message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    quoted = isinstance(value, str | list | dict)
    text = json.dumps(value, ensure_ascii=False, default=str) if quoted else str(value)  # one line, whatever it holds
    return text if len(text) <= 80 else text[:77] + "..."
