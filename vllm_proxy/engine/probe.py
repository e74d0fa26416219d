"""Is an engine truly ready? Alive is the supervisor's business; here: healthy, and the one that we started."""

from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=5)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a ready engine says of itself. `max_model_len` in tokens, None where it does not say."""

    max_model_len: int | None


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
