"""How many requests a second each model answers, and how many tokens it generates: now, and `GET /stats` for an hour.

Requests count for nothing here as they end: every other second, what the metrics have counted is looked at.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime

from aiohttp import web

from vllm_proxy.api.models import rfc3339
from vllm_proxy.api.reply import Answers, Reply
from vllm_proxy.domain.feed_resources import ModelRates, Stats
from vllm_proxy.domain.series import Series
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.traffic.front import caller_of

_LOOK_SECONDS = 2.0
_LOOKS = 5  # in a point
STEP = int(_LOOK_SECONDS * _LOOKS)
_MOST_MINUTES = 60
_GENERATED = "generation"

type Counted = dict[str, tuple[int, int]]  # requests and tokens since the start, by model


class Rates:
    """Of all models of one daemon."""

    def __init__(self, reconciler: Reconciler, ended: Callable[[], Mapping[str, int]]) -> None:
        """`ended`: the requests that have ended, by model."""
        self._reconciler = reconciler
        self._ended = ended
        self._looks: deque[tuple[float, Counted]] = deque(maxlen=_LOOKS + 1)  # when, on the loop's clock
        self._now: dict[str, tuple[float, float]] = {}
        self._series = Series(2)
        self._until = datetime.now(UTC)

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """They are taken inside the block."""
        task = keep_running(self._follow, "rates")
        yield
        task.cancel()

    def now(self, model: str) -> tuple[float, float | None]:
        """Requests that ended and tokens that were generated, a second; no tokens where its engines tell none."""
        requests, tokens = self._now.get(model, (0.0, 0.0))
        return requests, tokens if self._reconciler.model(model).history.tokens else None

    def stats(self) -> Answers[Stats]:
        """`GET /stats`."""

        async def handle(request: web.Request) -> Reply[Stats]:
            wanted, caller = request.query.get("model"), caller_of(request)
            if wanted and not (caller.may_use(wanted) and self._reconciler.knows(wanted)):
                raise model_not_found(wanted)
            points = _minutes(request.query.get("minutes", "")) * 60 // STEP
            models: list[ModelRates] = [
                {"id": name, "rps": rps, "tps": tps}
                for name, (rps, tps) in self._series.last(points).items()
                if (name == wanted if wanted else caller.may_use(name)) and self._reconciler.knows(name)
            ]
            answer: Stats = {"step": STEP, "until": rfc3339(self._until), "models": models}
            return Reply(answer, headers={"Cache-Control": "no-store"})

        return handle

    async def _follow(self) -> None:
        loop, looks = asyncio.get_running_loop(), 0
        self._looks.clear()
        while True:
            self.look(loop.time())
            looks += 1
            if looks > _LOOKS:
                looks = 1
                self._series.add(self._now)
                self._until = datetime.now(UTC)
            await asyncio.sleep(_LOOK_SECONDS)

    def look(self, now: float) -> None:
        """Count, at `now`."""
        counted: Counted = {}
        for name, requests in self._ended().items():
            if self._reconciler.knows(name):
                counted[name] = requests, self._reconciler.model(name).history.tokens[_GENERATED]
        self._looks.append((now, counted))
        since, before = self._looks[0]
        seconds = now - since
        if seconds > 0:
            self._now = {
                name: (
                    _rate(requests - before.get(name, (0, 0))[0], seconds),
                    _rate(tokens - before.get(name, (0, 0))[1], seconds),
                )
                for name, (requests, tokens) in counted.items()
            }


def _rate(count: int, seconds: float) -> float:
    """A second; of a model that has begun anew, nothing."""
    return round(max(count, 0) / seconds, 2)


def _minutes(text: str) -> int:
    if not text:
        return _MOST_MINUTES
    if text.isascii() and text.isdecimal() and 1 <= int(text[:4]) <= _MOST_MINUTES and len(text) <= 4:
        return int(text)
    raise RequestError("bad_request", f"cannot read minutes={text}: expected a number from 1 to {_MOST_MINUTES}")
