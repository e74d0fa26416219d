"""WebSocket `/v1/realtime`: the model comes as `?model=` or in the first `session.update`.

vLLM greets with `session.created` before it knows the model, and clients wait for that greeting; so where the address
names no model, the daemon greets, and drops the engine's own greeting later.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import structlog
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from vllm_proxy.api.body import with_model
from vllm_proxy.api.call import Call, Work
from vllm_proxy.domain.config import Server
from vllm_proxy.engine.background import ask
from vllm_proxy.engine.registry import Lease, Registry
from vllm_proxy.errors import EngineFailedError, RequestError

log = structlog.get_logger()

_GREETING = "session.created"
_DATA = frozenset({WSMsgType.TEXT, WSMsgType.BINARY})


def realtime(registry: Registry, session: aiohttp.ClientSession, settings: Callable[[], Server]) -> Work:
    """The route. `session` holds the connections to engines."""

    async def work(call: Call) -> web.StreamResponse:
        assert isinstance(call.request, web.Request)
        name = call.request.query.get("model")
        if name:
            registry.find(name)  # an unknown model is a 404, before anything is upgraded
        # Closed by hand: aiohttp would cut the connection, and with it this handler, before the engine has the code.
        client = web.WebSocketResponse(max_msg_size=settings().max_body_size, compress=False, autoclose=False)
        if not _can_upgrade(client, call.request):
            raise RequestError("bad_request", "cannot speak here without a WebSocket upgrade")
        await client.prepare(call.request)
        call.status = 101
        try:
            await _converse(call, registry, session, client, name)
        except RequestError as error:
            call.status = error.status
            await client.send_str(_event("error", error={"message": error.message, "code": error.code}).decode())
            await client.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode())
        return client

    return work


def _can_upgrade(client: web.WebSocketResponse, request: web.Request) -> bool:
    """Whether the request is a WebSocket's handshake."""
    try:
        return bool(client.can_prepare(request))
    except ValueError:  # a header of the handshake is no text
        return False


async def _converse(
    call: Call, registry: Registry, session: aiohttp.ClientSession, client: web.WebSocketResponse, name: str | None
) -> None:
    first: WSMessage | None = None
    if name is None:
        await client.send_str(_event(_GREETING, id=f"sess-{secrets.token_hex(8)}", created=int(time.time())).decode())
        first = await client.receive()
        if first.type not in _DATA:
            return
        name = _model_of(first)
        if name is None:
            msg = "cannot route this session: name the model as ?model= or in a first session.update"
            raise RequestError("missing_model", msg, param="model")
    with await registry.acquire(name) as lease:
        call.model, call.instance = lease.model_id, lease.endpoint.instance
        headers = {"Authorization": f"Bearer {lease.endpoint.credential}", "X-Request-Id": call.engine_id.decode()}
        address = f"http://127.0.0.1:{lease.endpoint.port}/v1/realtime"
        try:
            async with session.ws_connect(address, headers=headers, max_msg_size=0) as engine:
                if first is not None:
                    await _greeted(engine)
                    await _pass_on(first, engine, lease)
                await _both_ways(client, engine, lease)
        except (aiohttp.ClientError, OSError) as error:
            msg = f"cannot open a session with {lease.endpoint.instance}: {error}"
            raise EngineFailedError(msg) from error


async def _greeted(engine: aiohttp.ClientWebSocketResponse) -> None:
    """Take the engine's greeting: the client has had one."""
    message = await engine.receive()
    if message.type is not WSMsgType.TEXT or _read(message).type != _GREETING:
        raise EngineFailedError("cannot open a session: the engine did not greet")


async def _both_ways(client: web.WebSocketResponse, engine: aiohttp.ClientWebSocketResponse, lease: Lease) -> None:
    """Pass messages until either side closes; then the other is closed the same way."""

    async def upwards() -> None:
        async for message in client:
            await _pass_on(message, engine, lease)

    async def downwards() -> None:
        async for message in engine:
            await _pass_on(message, client, lease)

    tasks = {ask(upwards(), f"to {lease.endpoint.instance}"), ask(downwards(), f"from {lease.endpoint.instance}")}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for fault in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(fault, Exception) and not isinstance(fault, OSError | aiohttp.ClientError):
                log.error("a session ended by a fault of the daemon", instance=lease.endpoint.instance, exc_info=fault)
    broken = engine.close_code in {None, WSCloseCode.ABNORMAL_CLOSURE} and engine.closed
    code = WSCloseCode.INTERNAL_ERROR if broken else engine.close_code or WSCloseCode.OK
    await engine.close(code=client.close_code or WSCloseCode.OK)
    await client.close(code=code)


async def _pass_on(
    message: WSMessage, to: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, lease: Lease
) -> None:
    if message.type is WSMsgType.BINARY:
        await to.send_bytes(message.data)
    elif message.type is WSMsgType.TEXT:
        named = _model_of(message) if isinstance(to, aiohttp.ClientWebSocketResponse) else None
        if named is None or named == lease.model_id:
            await to.send_str(message.data)
        else:  # an alias: the engine knows the id alone
            await to.send_str((await with_model(message.data.encode(), lease.model_id, None)).decode())


def _model_of(message: WSMessage) -> str | None:
    """The model that a `session.update` names."""
    if message.type is not WSMsgType.TEXT or "session.update" not in message.data:
        return None
    event = _read(message)
    return event.model if isinstance(event.model, str) and event.type == "session.update" else None


class _Event(msgspec.Struct):
    """The fields of an event that decide anything here; the others are skipped, not decoded."""

    type: Any = None
    model: Any = None


_decoder = msgspec.json.Decoder(_Event)


def _read(message: WSMessage) -> _Event:
    """An event; an empty one where it is none."""
    try:
        return _decoder.decode(message.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Event()


def _event(kind: str, **fields: object) -> bytes:
    return msgspec.json.encode({"type": kind, **fields})
