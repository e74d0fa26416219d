"""Fan-out: sends a request to every instance, and relays the answer of the one that has it.

For stored responses, which live in the memory of one instance. All instances are asked concurrently; the first whose
status says that it has the response wins, and the others are cancelled. One that fails or hangs must not hide the
answer of another (tests/traffic/test_fan_out.py).
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
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.relay import forward_to_one, with_deadline

_HEAD_SECONDS = 10.0
_DOES_NOT_KNOW = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED})


async def fan_out(call: Call, registry: Registry, body: bytes, seconds: float = _HEAD_SECONDS) -> web.StreamResponse:
    """The answer of the instance that knows it, if that begins within `seconds`.

    Raises:
        RequestError: `not_found` when all say so; `engine_failed` or `request_timeout` when one said nothing.
        ConnectionResetError: when the answer broke off and the client has been cut.

    """
    if client_is_slow(call.request):
        await call.request.writer.drain()
    race = _Race(call, body)
    try:
        caller = call.caller
        for lease in registry.every_instance(lambda spec: caller.may_use_some(spec.id, spec.other_names)):
            race.enter(lease)
        return await race.answer(seconds)
    finally:
        await race.end()


class _Race:
    """The concurrent requests, each with a call of its own: the winner's outcome is that of the client's request."""

    def __init__(self, call: Call, body: bytes) -> None:
        self._call = call
        self._body = body
        self._asked: dict[asyncio.Task[web.StreamResponse | None], tuple[Call, Lease]] = {}
        self._won: asyncio.Future[Call] = asyncio.get_running_loop().create_future()

    def enter(self, lease: Lease) -> None:
        """Ask one more instance. Its lease is released when that has ended, even if it never began."""
        mine = copy.copy(self._call)
        task = background.spawn(self._ask(mine, lease), f"question of {lease.endpoint.instance}")
        task.add_done_callback(lambda _: lease.__exit__())
        self._asked[task] = mine, lease

    async def answer(self, seconds: float) -> web.StreamResponse:
        """Wait for the winner, cancel the others, and relay the answer to its end."""
        if self._asked:
            everybody = asyncio.gather(*self._asked, return_exceptions=True)
            either: set[asyncio.Future[Any]] = {self._won, everybody}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not self._won.done():
            raise self._failure(seconds)
        for task, (mine, lease) in self._asked.items():
            if mine is self._won.result():
                winner, limit = task, lease.policy.request_timeout
            else:
                task.cancel()
        relayed = _relayed(winner)
        return await (with_deadline(limit, self._won.result(), relayed) if limit else relayed)

    async def end(self) -> None:
        """Cancel what is still in flight."""
        if not self._won.done():
            self._won.cancel()  # nobody may win any more
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)
        if not self._won.cancelled():
            self._call.become(self._won.result())

    async def _ask(self, mine: Call, lease: Lease) -> web.StreamResponse | None:
        seen = 0

        def wanted(status: int) -> bool:
            nonlocal seen
            seen = status
            if self._won.done() or status in _DOES_NOT_KNOW or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return False
            call = self._call  # what it may not have any more by now is not there for it
            if call.revoked is not None or not call.caller.may_use_some(lease.model_id, lease.other_names):
                return False
            call.model = mine.model  # for whoever revokes it from here on
            self._won.set_result(mine)
            return True

        answer = await forward_to_one(mine, lease, self._body, wanted)
        if answer is None and seen not in _DOES_NOT_KNOW and seen >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise EngineFailedError(f"cannot get an answer from {mine.instance}: it says {seen}")
        return answer

    def _failure(self, seconds: float) -> RequestError:
        """Why there is no answer."""
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


async def _relayed(winner: "asyncio.Task[web.StreamResponse | None]") -> web.StreamResponse:
    answer = await winner
    assert answer is not None, "it has declined nothing"
    return answer
