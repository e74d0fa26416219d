"""A question for which one instance of all has the answer. Its one rule: nobody who does not answer hides who does.

All are asked at once. The first whose status says that it knows gives the answer; the others are left then.
"""

import asyncio
import copy
from http import HTTPStatus
from typing import Any

from aiohttp import web

from vllm_proxy.errors import EngineFailedError, RequestError
from vllm_proxy.runtime import background
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.front import client_is_slow
from vllm_proxy.traffic.registry import Lease, Registry
from vllm_proxy.traffic.relay import ask, within

_HEAD_SECONDS = 10.0
_DOES_NOT_KNOW = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED})


async def ask_everybody(
    call: Call, registry: Registry, body: bytes, seconds: float = _HEAD_SECONDS
) -> web.StreamResponse:
    """The answer of the instance that knows it, if that begins within `seconds`.

    Raises:
        RequestError: `not_found` when all say so; `engine_failed` or `request_timeout` when one said nothing.
        ConnectionResetError: when the answer broke off and the client has been cut.

    """
    if client_is_slow(call.request):
        await call.request.writer.drain()
    race = _Race(call, body)
    try:
        for lease in registry.every_instance():
            race.enter(lease)
        return await race.answer(seconds)
    finally:
        await race.end()


class _Race:
    """Everybody who was asked, each with a call of its own: what the winner's became is what the request became."""

    def __init__(self, call: Call, body: bytes) -> None:
        self._call = call
        self._body = body
        self._asked: dict[asyncio.Task[web.StreamResponse | None], tuple[Call, Lease]] = {}
        self._won: asyncio.Future[Call] = asyncio.get_running_loop().create_future()

    def enter(self, lease: Lease) -> None:
        """Ask one more. Its permit is given back when that has ended, be it before it began."""
        mine = copy.copy(self._call)
        task = background.ask(self._ask(mine, lease), f"question of {lease.endpoint.instance}")
        task.add_done_callback(lambda _: lease.__exit__())
        self._asked[task] = mine, lease

    async def answer(self, seconds: float) -> web.StreamResponse:
        """Wait for who knows, leave the others, and pass the answer on to its end."""
        if self._asked:
            everybody = asyncio.gather(*self._asked, return_exceptions=True)
            either: set[asyncio.Future[Any]] = {self._won, everybody}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not self._won.done():
            raise self._why_not(seconds)
        for task, (mine, lease) in self._asked.items():
            if mine is self._won.result():
                winner, limit = task, lease.policy.request_timeout
            else:
                task.cancel()
        passed_on = _passed_on(winner)
        return await (within(limit, self._won.result(), passed_on) if limit else passed_on)

    async def end(self) -> None:
        """Leave everybody who is still being asked."""
        if not self._won.done():
            self._won.cancel()  # too late for anybody
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)
        if not self._won.cancelled():
            vars(self._call).update(vars(self._won.result()))

    async def _ask(self, mine: Call, lease: Lease) -> web.StreamResponse | None:
        seen = 0

        def wanted(status: int) -> bool:
            nonlocal seen
            seen = status
            if self._won.done() or status in _DOES_NOT_KNOW or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return False
            self._won.set_result(mine)
            return True

        answer = await ask(mine, lease, self._body, wanted)
        if answer is None and seen not in _DOES_NOT_KNOW and seen >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise EngineFailedError(f"cannot get an answer from {mine.instance}: it says {seen}")
        return answer

    def _why_not(self, seconds: float) -> RequestError:
        """Nobody knows it, as far as all have said so."""
        silent = [lease.endpoint.instance for task, (_, lease) in self._asked.items() if not task.done()]
        if silent:
            msg = f"cannot find this response: no answer from {', '.join(silent)} within {seconds:g} s"
            return RequestError("request_timeout", f"{msg}, and nobody else knows it")
        for task in self._asked:
            error = task.exception()
            if isinstance(error, EngineFailedError):
                return EngineFailedError(f"cannot find this response: {error.message}, and nobody else knows it")
            if error is not None:
                raise error
        return RequestError("not_found", "cannot find this response: no ready instance knows it")


async def _passed_on(winner: "asyncio.Task[web.StreamResponse | None]") -> web.StreamResponse:
    answer = await winner
    assert answer is not None, "it has declined nothing"
    return answer
