"""Is an engine truly ready? Alive is the supervisor's business; here: healthy, and the one that we started."""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=5)


# Moved by vLLM's engine core alone, never by its server: what stands still in a hung engine that takes new requests.
_COUNTERS = re.compile(
    r"^vllm:(?:prompt_tokens_total|generation_tokens_total|iteration_tokens_total_count|kv_cache_usage_perc)\{.*$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a ready engine says of itself. `max_model_len` in tokens, None where it does not say."""

    max_model_len: int | None


class Probe(Protocol):
    """What asks engines how they are."""

    async def ready(self, port: int, own_name: str, credential: str) -> Ready | None:
        """What the engine on this port says of itself, None while it is not ready or not ours."""

    async def healthy(self, port: int) -> bool:
        """Whether `/health` answers 200."""

    async def counters(self, port: int) -> str | None:
        """What changes while the engine works; "" where it keeps no counters, None where it does not answer."""


class HttpProbe:
    """Asks engines over HTTP. The session must not share its connections with requests."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def healthy(self, port: int) -> bool:
        """Whether `/health` answers 200."""
        try:
            async with self._session.get(f"http://127.0.0.1:{port}/health", timeout=_TIMEOUT) as answer:
                return answer.status == HTTPStatus.OK
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def counters(self, port: int) -> str | None:
        """The lines of `/metrics` that change while the engine works; "" where it keeps none, None for no answer."""
        try:
            async with self._session.get(f"http://127.0.0.1:{port}/metrics", timeout=_TIMEOUT) as answer:
                text = await answer.text() if answer.status == HTTPStatus.OK else ""
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        return "\n".join(_COUNTERS.findall(text))

    async def ready(self, port: int, own_name: str, credential: str) -> Ready | None:
        """`Ready` when `/health` answers 200 and the model list holds `own_name`, which no foreign server can know."""
        if not await self.healthy(port):
            return None
        base = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {credential}"}
        try:
            async with self._session.get(f"{base}/v1/models", headers=headers, timeout=_TIMEOUT) as answer:
                cards = (await answer.json())["data"] if answer.status == 200 else []
            mine = next((card for card in cards if card["id"] == own_name), None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError, RecursionError):
            return None  # not listening yet, or something that is no vLLM
        if mine is None:
            return None
        length = mine.get("max_model_len")
        return Ready(length if isinstance(length, int) else None)
