"""Relays the WebSocket sessions of `/v1/realtime`, whose model comes as `?model=` or in the first `session.update`.

vLLM greets with `session.created` before it knows the model, and clients wait for that; so where the URL names no
model, the daemon greets, and drops the engine's own greeting later. A session ends when either side is gone, be it
silently: both get heartbeats (pings).
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import structlog
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.tokens import Tokens, of_event
from vllm_proxy.errors import EngineFailedError, LateRequestError, RequestError
from vllm_proxy.runtime.background import spawn
from vllm_proxy.traffic.body import with_model
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, Work
from vllm_proxy.traffic.dial import session_to
from vllm_proxy.traffic.front import client_of, withdraw_cancellation
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.moderation import refuse_unchecked
from vllm_proxy.traffic.registry import Registry

log = structlog.get_logger()

_HEARTBEAT_SECONDS = 20.0  # whoever has not answered a ping half of that later is gone
_OPEN_SECONDS = 10.0  # for an engine to take a session, and to greet
_GREETING = "session.created"
_DONE = '"transcription.done"'
_PROTOCOLS = ("realtime",)  # what browsers offer beside their key, and want to have chosen
_DATA = frozenset({WSMsgType.TEXT, WSMsgType.BINARY})


@dataclass(frozen=True, slots=True)
class Sessions:
    """What all sessions share. `engines` holds the connections to engines; messages that come in count in `budget`."""

    registry: Registry
    engines: aiohttp.ClientSession
    settings: Callable[[], Server]
    budget: Budget
    metering: Metering
    heartbeat: float = _HEARTBEAT_SECONDS


def realtime(sessions: Sessions) -> Work:
    """The route."""

    async def work(call: Call) -> web.StreamResponse:
        assert isinstance(call.request, web.Request)
        name = call.request.query.get("model")
        if name:
            _find(call, sessions, name)  # an unknown model is a 404, before anything is upgraded
        # No autoclose: aiohttp would end this handler before the close code reached the engine.
        limit = sessions.settings().max_body_size
        client = web.WebSocketResponse(
            max_msg_size=limit, compress=False, autoclose=False, heartbeat=sessions.heartbeat, protocols=_PROTOCOLS
        )
        if not _can_upgrade(client, call.request):
            raise RequestError("bad_request", "cannot speak here without a WebSocket upgrade")
        client.headers["X-Request-Id"] = call.request_id.decode()
        await client.prepare(call.request)
        call.status = 101
        client_of(call.request).on_message_bytes = _counted(call, sessions)
        try:
            await _run_session(call, sessions, client, name)
        except RequestError as error:
            await _refuse(call, client, error)
        except asyncio.CancelledError:
            if call.revoked is None or not withdraw_cancellation():
                raise
            await _refuse(call, client, call.revoked)
        return client

    return work


async def _refuse(call: Call, client: web.WebSocketResponse, error: RequestError) -> None:
    call.status, call.code = error.status, error.code
    await client.send_str(_event("error", error={"message": error.message, "code": error.code}).decode())
    await client.close(code=WSCloseCode.POLICY_VIOLATION, message=error.code.encode())


def _can_upgrade(client: web.WebSocketResponse, request: web.Request) -> bool:
    """Whether the request is a WebSocket's handshake."""
    try:
        return bool(client.can_prepare(request))
    except ValueError:  # a header of the handshake is no text
        return False


def _counted(call: Call, sessions: Sessions) -> Callable[[int], None]:
    """Counts bytes of messages that are not passed on yet."""
    request = call.request

    def count(size: int) -> None:
        try:
            sessions.budget.take(call, size, sessions.settings())
        except RequestError as error:
            if error.code == "overloaded" and request.transport is not None:  # the other has a close code
                log.info("a session was cut: no room for its message", id=call.request_id.decode())
                call.status, call.code = error.status, error.code
                request.transport.abort()

    return count


async def _run_session(call: Call, sessions: Sessions, client: web.WebSocketResponse, name: str | None) -> None:
    first: WSMessage | None = None
    if name is None:
        await client.send_str(_event(_GREETING, id=f"sess-{secrets.token_hex(8)}", created=int(time.time())).decode())
        first = await _first_message(client, sessions.settings().body_timeout)
        if first.type not in _DATA:
            return
        name = _model_of(first)
        if name is None:
            msg = "cannot route this session: name the model as ?model= or in a first session.update"
            raise RequestError("missing_model", msg, param="model")
    _find(call, sessions, name)
    if sessions.metering.is_on:
        sessions.metering.admit(call, sessions.registry.find(name).spec)
    with await sessions.registry.acquire(name, call.metered) as lease:
        call.instance = lease.endpoint.instance
        headers = {"Authorization": f"Bearer {lease.endpoint.credential}", "X-Request-Id": call.engine_id.decode()}
        address = lease.endpoint.address
        try:
            async with session_to(address, sessions.engines) as session:
                async with asyncio.timeout(_OPEN_SECONDS):
                    engine = await session.ws_connect(
                        f"http://{address.authority}/v1/realtime",
                        headers=headers,
                        max_msg_size=0,
                        heartbeat=sessions.heartbeat,
                    )
                async with engine:
                    if first is not None:
                        await _skip_greeting(engine)
                        await _pass_on(first, engine, lease)
                    sessions.budget.release(call)
                    await _pump(client, engine, lease, call, sessions.budget)
        except (aiohttp.ClientError, OSError) as error:
            msg = f"cannot open a session with {lease.endpoint.instance}: {str(error) or 'it does not answer'}"
            raise EngineFailedError(msg) from error


def _find(call: Call, sessions: Sessions, name: str) -> None:
    route = sessions.registry.find(name, call.caller.models)
    call.model = route.spec.id
    refuse_unchecked(route)


async def _first_message(client: web.WebSocketResponse, seconds: float) -> WSMessage:
    """What is to name the model."""
    try:
        return await client.receive(timeout=seconds or None)
    except TimeoutError:
        msg = f"cannot route this session: no session.update came within server.body_timeout ({seconds:g} s)"
        raise LateRequestError(msg) from None


async def _skip_greeting(engine: aiohttp.ClientWebSocketResponse) -> None:
    """Take the engine's greeting: the client has had one."""
    message = await engine.receive(timeout=_OPEN_SECONDS)
    if message.type is not WSMsgType.TEXT or _read(message).type != _GREETING:
        raise EngineFailedError("cannot open a session: the engine did not greet")


async def _pump(
    client: web.WebSocketResponse,
    engine: aiohttp.ClientWebSocketResponse,
    lease: Lease,
    call: Call,
    budget: Budget,
) -> None:
    """Pass messages until either side closes; then the other is closed the same way."""

    async def upwards() -> None:
        async for message in client:
            await _pass_on(message, engine, lease)
            budget.release(call)

    async def downwards() -> None:
        async for message in engine:
            await _pass_on(message, client, lease)
            if call.metered is not None and (tokens := _tokens_of(message)) is not None:
                call.metered.took(tokens)

    tasks = {spawn(upwards(), f"to {lease.endpoint.instance}"), spawn(downwards(), f"from {lease.endpoint.instance}")}
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


def _tokens_of(message: WSMessage) -> Tokens | None:
    """What an utterance took, behind which the engine says it."""
    if message.type is not WSMsgType.TEXT or _DONE not in message.data:
        return None
    return of_event(message.data.encode())


class _Event(msgspec.Struct):
    """The fields of an event that are needed here; the others are skipped, not decoded."""

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
