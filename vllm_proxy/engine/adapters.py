"""Gives an engine its LoRA adapters while it runs, takes them back, and asks which it holds.

Each is given as a folder of the daemon's own (`adapter_store`), by its full path. What vLLM refuses is that adapter's
failure alone: the engine goes on. Source: `entrypoints/serve/lora` and `entrypoints/openai/models` of vLLM 0.32.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import aiohttp

from vllm_proxy.domain.command import Place
from vllm_proxy.engine.http_client import UncleanError, answer_to, body_of, json_of, shortened, within

LOAD_SECONDS = 120.0  # gigabytes from a cold disk, between the steps of an engine that works
UNLOAD_SECONDS = LIST_SECONDS = 10.0  # its server alone answers
_LOAD, _UNLOAD, _LIST = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
_SOME_PATH = "<path>"  # what vLLM puts for most paths
_DEAD = "EngineCore encountered an issue"  # its server's last word
# How the core's word reaches the server, around the cause. With workers of its own it adds where it came from.
_CALL = re.compile(r"^Call to add_lora method failed: (?:Worker failed with error (['\"]))?")
_WORKER = re.compile(r"['\"], please check the stack trace above for the root cause$")


@dataclass(frozen=True, slots=True)
class Failed:
    """It was not done."""

    why: str  # vLLM's own sentence where it gave one
    answered: bool  # vLLM refused, and is unharmed; else nobody knows what it holds, later neither: it may still load


class Adapters(Protocol):
    """LoRA adapters of engines."""

    async def load(self, place: Place, name: str, folder: Path) -> Failed | None:
        """Have one loaded from a folder, by its full path. None: it is held, or was already from that very folder."""

    async def unload(self, place: Place, name: str) -> Failed | None:
        """Have one forgotten; requests that it answers go on. None: it is not held, or was not."""

    async def loaded(self, place: Place) -> Mapping[str, Path] | Failed:
        """Those it holds, and the folder of each."""


class HttpAdapters:
    """Over HTTP, at the engine's port or Unix socket. The session must not share its connections with requests."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def load(self, place: Place, name: str, folder: Path) -> Failed | None:
        """`POST /v1/load_lora_adapter`. Where vLLM has one of that name, its list tells which."""
        asked = {"lora_name": name, "lora_path": str(folder)}
        try:
            status, why = await self._tell(place, _LOAD, asked, LOAD_SECONDS)
        except UncleanError as error:
            return Failed(str(error), answered=False)
        if status == HTTPStatus.OK:
            return None
        if status == HTTPStatus.BAD_REQUEST:
            held = await self.loaded(place)
            if not isinstance(held, Failed) and held.get(name) == folder:
                return None
        return Failed(_plain(why).replace(str(folder), name).replace(_SOME_PATH, name), answered=True)

    async def unload(self, place: Place, name: str) -> Failed | None:
        """`POST /v1/unload_lora_adapter`; 404: there is none."""
        try:
            status, why = await self._tell(place, _UNLOAD, {"lora_name": name}, UNLOAD_SECONDS)
        except UncleanError as error:
            return Failed(str(error), answered=False)
        return None if status in {HTTPStatus.OK, HTTPStatus.NOT_FOUND} else Failed(shortened(why), answered=True)

    async def loaded(self, place: Place) -> Mapping[str, Path] | Failed:
        """Whatever `GET /v1/models` lists with a `parent`."""

        async def call() -> dict[str, Path]:
            async with answer_to(self._session, place.address, "GET", _LIST, credential=place.credential) as answer:
                if answer.status != HTTPStatus.OK:
                    raise UncleanError(f"{_LIST} answers {answer.status}")
                return _listed(await json_of(answer))

        try:
            return await within(call(), LIST_SECONDS, _LIST)
        except UncleanError as error:
            return Failed(str(error), answered=False)

    async def _tell(self, place: Place, path: str, asked: Mapping[str, object], seconds: float) -> tuple[int, str]:
        """Status of an answer, and of another than 200 its sentence.

        Raises:
            UncleanError: no answer, or one that vLLM would not give.

        """

        async def call() -> tuple[int, str]:
            async with answer_to(
                self._session, place.address, "POST", path, credential=place.credential, body=asked
            ) as answer:
                if answer.status == HTTPStatus.OK:
                    await _expect_success(answer, path)
                    return answer.status, ""
                return answer.status, _sentence(await json_of(answer), answer.status, path)

        return await within(call(), seconds, path)


async def _expect_success(answer: aiohttp.ClientResponse, path: str) -> None:
    """A clean 200 is one sentence; something else at that address may answer 200 to anything."""
    if not (await body_of(answer)).startswith(b"Success"):
        raise UncleanError(f"{path} does not say that it is done")


def _sentence(found: object, status: int, path: str) -> str:
    """The message of vLLM's error."""
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str) or not message:
        if status == HTTPStatus.NOT_FOUND:  # FastAPI's own: it was started without
            raise UncleanError(f"{path} is not there")
        raise UncleanError(f"{path} answers {status} and does not say why")
    if message.startswith(_DEAD):
        raise UncleanError(message)
    return message


def _plain(why: str) -> str:
    """A sentence without the way that it came."""
    why, wrapped = _CALL.subn("", why)
    return shortened((_WORKER.sub("", why) if wrapped else why).strip())


def _listed(found: object) -> dict[str, Path]:
    """The adapters of a model list."""
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list):
        raise UncleanError(f"{_LIST} lists no models")
    adapters = [card for card in cards if isinstance(card, dict) and card.get("parent") is not None]
    if not all(isinstance(card.get(key), str) for card in adapters for key in ("id", "root")):
        raise UncleanError(f"{_LIST} does not say where its adapters lie")
    return {card["id"]: Path(card["root"]) for card in adapters}
