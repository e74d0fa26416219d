"""Health checks of engines over HTTP: healthy, the one that was started, and whether its counters move.

Answers are not trusted: each is read up to a limit and a deadline, and the credential is sent only once the listener is
proven to be the engine (tests/engine/test_probe.py).
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import aiohttp

from vllm_proxy.domain.address import Address
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.tasks import ROUTES
from vllm_proxy.engine.http_client import FAULTS, answer_to, json_of

_SECONDS = 5.0  # for an answer
_METRICS_BYTES = 16 * 2**20
_LINE_BYTES = 2**16
_COUNTERS_BYTES = 2**20  # of the lines that are kept

# Moved by vLLM's engine core alone, never by its server: what stands still in a hung engine that takes new requests.
_COUNTERS = re.compile(
    rb"vllm:(?:(?:prompt_tokens|prompt_tokens_cached|generation_tokens)_total|iteration_tokens_total_count|"
    rb"kv_cache_usage_perc)\{.*"
)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a ready engine says of itself. `max_model_len` in tokens, None where it does not say."""

    max_model_len: int | None
    tasks: tuple[str, ...] = ()  # of `domain.tasks`; (): it does not say


class Probe(Protocol):
    """Health checks of engines."""

    async def ready(self, place: Place, is_engines: Callable[[], Awaitable[bool]]) -> Ready | None:
        """What the engine of this place says of itself, None while it is not ready or not ours.

        `is_engines`: whether who listens there is the engine, checked before the credential is sent.
        """

    async def healthy(self, address: Address) -> bool:
        """Whether `/health` answers 200."""

    async def counters(self, address: Address) -> str | None:
        """What changes while the engine works; "" where it keeps no counters, None where it does not answer."""


class HttpProbe:
    """Health checks over HTTP. The session must not share its connections with requests."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def healthy(self, address: Address) -> bool:
        """Whether `/health` answers 200."""
        try:
            async with answer_to(self._session, address, "GET", "/health", seconds=_SECONDS) as answer:
                return answer.status == HTTPStatus.OK
        except FAULTS:
            return False

    async def counters(self, address: Address) -> str | None:
        """The lines of `/metrics` that change while the engine works; "" where it keeps none, None for no answer."""
        try:
            async with answer_to(self._session, address, "GET", "/metrics", seconds=_SECONDS) as answer:
                return await _counters(answer.content) if answer.status == HTTPStatus.OK else ""
        except FAULTS:
            return None

    async def ready(self, place: Place, is_engines: Callable[[], Awaitable[bool]]) -> Ready | None:
        """`Ready` when `/health` answers 200, `is_engines` holds, and the model list holds its own name."""
        if not (await self.healthy(place.address) and await is_engines()):
            return None
        try:
            async with answer_to(
                self._session, place.address, "GET", "/v1/models", credential=place.credential, seconds=_SECONDS
            ) as answer:
                found: Any = await json_of(answer) if answer.status == HTTPStatus.OK else {"data": []}
            cards = found["data"]
            mine = next((card for card in cards if card["id"] == place.own_name), None)
        except (*FAULTS, KeyError, TypeError):
            return None  # not listening yet, or something that is no vLLM
        if mine is None:
            return None
        length = mine.get("max_model_len")
        return Ready(length if isinstance(length, int) else None, await self._tasks(place))

    async def _tasks(self, place: Place) -> tuple[str, ...]:
        """By which routes take no GET (405), and which are not there (404).

        Not by its OpenAPI document: vLLM computes for seconds until it has that, and answers nobody meanwhile.
        """
        tasks: list[str] = []
        try:
            for task, (path, *_) in ROUTES.items():
                async with answer_to(
                    self._session, place.address, "GET", path, credential=place.credential, seconds=_SECONDS
                ) as answer:
                    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
                        tasks.append(task)
                    elif answer.status != HTTPStatus.NOT_FOUND:
                        return ()
        except FAULTS:
            return ()
        return tuple(tasks)


async def _counters(stream: aiohttp.StreamReader) -> str:
    """The lines with counters, as far as the bounds reach; nothing more is held."""
    rest, read = b"", 0
    found: list[bytes] = []
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[:_LINE_BYTES]
        found += (line for line in lines if _COUNTERS.fullmatch(line))
        read += len(chunk)
        if read > _METRICS_BYTES or sum(map(len, found)) > _COUNTERS_BYTES:
            break
    found += [rest] if _COUNTERS.fullmatch(rest) else []
    return b"\n".join(found).decode(errors="replace")
