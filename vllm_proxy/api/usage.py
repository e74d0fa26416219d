"""`GET /usage`: what keys have used, as JSON or as CSV.

Who may read sees all keys, any other key itself. Sums come from `fleet/usage_ledger.py`; large reports are made in a
thread.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
from aiohttp import web

from vllm_proxy.api.reply import Reply
from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.units import parse_time, show_time
from vllm_proxy.domain.usage import Groups, Query, as_csv, query, rows
from vllm_proxy.domain.usage_resources import Usage, UsageRow
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.usage_ledger import UsageLedger
from vllm_proxy.traffic.front import caller_of

_CSV = "text/csv"
_DATE = len("2027-01-01")


def report(ledger: UsageLedger) -> Callable[[web.Request], Awaitable[Reply[Usage] | web.StreamResponse]]:
    """`from`, `to`: whole hours, by default the last 24. `by`: some of key, model, and day or hour."""

    async def handle(request: web.Request) -> Reply[Usage] | web.StreamResponse:
        asked = _asked(request)
        groups = await ledger.report(asked)
        headers = {"Cache-Control": "no-store", "Vary": "Accept"}
        if _prefers_csv(request.headers.get("Accept", "")):
            body = await asyncio.to_thread(_csv, asked, groups)
            return web.Response(body=body, headers={**headers, "Content-Type": f"{_CSV}; charset=utf-8"})
        encoded = msgspec.Raw(await asyncio.to_thread(_json, asked, groups))
        return Reply(cast("Usage", encoded), headers=headers)

    return handle


def _asked(request: web.Request) -> Query:
    caller, given = caller_of(request), request.query
    try:
        first, last = (_moment(name, given[name]) if given.get(name) else None for name in ("from", "to"))
        return query(time.time(), first, last, given.get("by"), None if Scope.READ in caller.scopes else caller.name)
    except ValueError as error:
        raise RequestError("bad_request", f"cannot report this: {error}") from None


def _moment(name: str, text: str) -> float:
    """Seconds since the epoch, from a time, or a day at its beginning in UTC."""
    try:
        return parse_time(f"{text}T00:00:00Z" if len(text) == _DATE else text).timestamp()
    except ValueError as error:
        raise ValueError(f"{name}: {error}, or a day such as 2027-01-01") from None


def _prefers_csv(accept: str) -> bool:
    """Whether it is named, and JSON is not."""
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return _CSV in kinds and "application/json" not in kinds


def _json(asked: Query, groups: Groups) -> bytes:
    encode = msgspec.json.Encoder().encode
    found = b",".join([encode(row) for row in rows(asked, groups)])  # at once it would keep other threads from running
    answer: Usage = {
        "from": show_time(asked.first),
        "to": show_time(asked.last),
        "by": list(asked.by),
        "rows": cast("list[UsageRow]", msgspec.Raw(b"[%s]" % found)),
    }
    return encode(answer)


def _csv(asked: Query, groups: Groups) -> bytes:
    return as_csv(asked.by, rows(asked, groups)).encode()
