"""One inference request: its ids, its times and its outcome, observed once, when it ends, whatever ends it.

`observed` wraps a handler: it turns exceptions into answers and reports the call to the metrics and the access log. A
`Call` is made for every request, so it must stay cheap.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Protocol

import structlog
from aiohttp import web

from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.access import Head
from vllm_proxy.traffic.client import ClientConnection
from vllm_proxy.traffic.cors import Cors
from vllm_proxy.traffic.direct import ReadRequest
from vllm_proxy.traffic.envelope import as_request_error, error_response
from vllm_proxy.traffic.front import client_of, withdraw_cancellation
from vllm_proxy.traffic.head import engine_id, read_head, request_id
from vllm_proxy.traffic.keyring import NOBODY, Caller
from vllm_proxy.traffic.prompt import Prompt
from vllm_proxy.traffic.queue import Turn
from vllm_proxy.traffic.routes import InferenceRoute
from vllm_proxy.traffic.sieve import MeteredExchange

log = structlog.get_logger()

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_SCOPE = Scope.INFERENCE
CLIENT_GONE = 499  # nginx's status for a client that left before an answer began; logged and counted, never sent


class Metered(Turn, Protocol):
    """A request that is metered, as `metering` has it."""

    def follow(self, exchange: MeteredExchange) -> None:
        """Count what this one passes on; the last one that was made is what the client gets."""

    def took(self, tokens: Tokens) -> None:
        """A part of a session is done."""

    def answered(self, tokens: Tokens) -> None:
        """An engine has answered a part of it, of which the daemon makes an answer itself."""

    def end(self) -> None:
        """It is over, and the status of its call is known."""


class Trace(Protocol):
    """The span of a request that is traced, as `traces` has it."""

    @property
    def trace_id(self) -> str:
        """Of its trace, 32 hexadecimal digits."""

    def end(self, call: "Call", /) -> None:
        """It is over."""


class Call:
    """A request for inference. `route` is the path of the route table, never what the client sent.

    Made for every request, and read all along its way: with a default on the class Python would find an attribute of an
    object by its name each time, in a table that is cold by then. So all are slots.
    """

    __slots__ = ("bytes_out", "caller", "check_seconds", "code", "committed", "cors", "ended_at", "engine_id",
                 "first_byte_at", "forwarded", "head", "held", "instance", "is_anthropic", "limit_lines", "metered",
                 "model", "peer", "prompt", "queue_seconds", "request", "request_id", "retries", "revoked", "route",
                 "salt", "scope", "sent_at", "start_line", "started_at", "status", "tokens", "trace",
                 "usage")  # fmt: skip

    def __init__(self, request: web.BaseRequest, route: str, start_line: bytes) -> None:
        self.request = request
        self.route = route
        self.start_line = start_line if request.raw_path == route else _start_line(request)
        if type(request) is ReadRequest:
            self.head: Mapping[bytes, bytes] = request.head.mine()
            self.forwarded = request.head.kept.forwarded
        else:
            self.head, self.forwarded = read_head(request.raw_headers)
        given = self.head.get(b"x-request-id")
        self.request_id = request_id(given)  # the client's
        self.engine_id = engine_id(given) if self.request_id is given else self.request_id
        self.started_at = time.monotonic()
        self.sent_at = 0.0  # when the engine was sent the request
        self.first_byte_at = 0.0
        self.queue_seconds = 0.0
        self.check_seconds = 0.0  # its guard took, where the model is moderated
        self.is_anthropic = False  # whether the client speaks Anthropic's API, which has an envelope of its own
        self.model = ""  # the configured id, once it is known
        self.instance = ""
        self.cors = _NO_HEADERS  # headers for the web page that sent it
        self.status = 0
        self.bytes_out = 0
        self.held = 0  # bytes of its body that are counted in the budget
        self.retries = 0
        self.caller = NOBODY  # who sent it, once that is known
        self.scope: Scope | None = _SCOPE
        self.committed = False
        self.salt = b""  # the `cache_salt` that its prompt gets
        self.prompt: Prompt | None = None  # where there may be a choice between engines, by what they were sent
        self.revoked: RequestError | None = None  # why it ends before its time
        self.metered: Metered | None = None  # what it holds of its key's limits, where requests are metered
        self.limit_lines = b""  # header lines of the answer: what its key's limits leave
        self.code: str | None = None  # of the daemon's own error, where it ended in one
        self.ended_at = 0.0
        self.usage = b""  # of the answer of one that is not metered: what says what it took, where that was at hand
        self.tokens: Tokens | None = None  # what it took, of one that is metered
        self.trace: Trace | None = None  # where requests are traced, and this one is sampled
        self.peer: object = None  # the client's address, once it has ended: what the socket says

    def become(self, copied: "Call") -> None:
        """Take over what became of a copy of it."""
        for name in self.__slots__:
            setattr(self, name, getattr(copied, name))

    def own_lines(self) -> bytes:
        """Header lines of the answer that this request alone has."""
        lines = b"X-Request-Id: %s\r\n" % self.request_id
        if self.is_anthropic:
            lines += b"request-id: %s\r\n" % self.request_id  # where Anthropic's clients look
        if self.cors:
            lines += "".join(f"{name}: {value}\r\n" for name, value in self.cors.items()).encode("latin-1")
        return lines + self.limit_lines


type Observer = Callable[[Call], None]
type Work = Callable[[Call], Awaitable[web.StreamResponse]]
type Admit = Callable[[Head, ClientConnection, Scope], Caller]  # raises for who may not infer


def observed(
    route: InferenceRoute,
    work: Work,
    admit: Admit,
    observe: Observer,
    cors: Cors,
    *,
    active: MutableMapping[Call, None],
    begin: Observer | None = None,
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """A handler for callers that `admit` lets in: it does `work`, and answers its errors in the envelope of the route.

    It is in `active` until its end, which, whatever it is, is reported to `observe`. `begin` is called with it first.
    """
    path = route.path
    start_line = f"{route.method} {path} HTTP/1.1\r\n".encode()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        call = Call(request, path, start_line)
        active[call] = None
        if route.anthropic:
            call.is_anthropic = True
        if b"origin" in call.head:
            call.cors = cors.headers(call.head[b"origin"].decode("latin-1"), path)
        try:
            _let_in(call, route, admit, begin)
            return await work(call)
        except RequestError as error:
            return _refuse(call, error)
        except (asyncio.CancelledError, ConnectionError):
            if call.revoked is None or call.status or not withdraw_cancellation():
                call.status = call.status or CLIENT_GONE
                raise
            return _refuse(call, call.revoked)
        except web.HTTPException as error:  # aiohttp's own
            return _refuse(call, as_request_error(request, error))
        except Exception:
            log.exception("a request failed by a fault of the daemon", path=path, request_id=call.request_id.decode())
            if call.status and request.transport is not None:  # the answer has begun: an error would be read as its end
                request.transport.abort()
                raise ConnectionResetError from None
            return _refuse(call, RequestError("internal_error", "cannot answer: a fault of the daemon, see its log"))
        finally:
            call.ended_at = time.monotonic()
            observe(call)

    return handle


def _let_in(call: Call, route: InferenceRoute, admit: Admit, begin: Observer | None) -> None:
    if begin is not None:
        begin(call)
    client = client_of(call.request)
    call.caller = caller = admit(call.head, client, route.scope)
    client.admission = call
    if caller.isolation:
        call.salt = _salt(caller, route)


def _salt(caller: Caller, route: InferenceRoute) -> bytes:
    if route.salted is False:
        msg = f"cannot do this with the key {caller.name}: it isolates its prompts, and vLLM does not offer that here"
        raise RequestError("isolation_unavailable", msg)
    return caller.isolation if route.salted else b""


def _start_line(request: web.BaseRequest) -> bytes:
    target = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
    path, mark, query = target.partition("?")
    target = f"{path.rstrip('/')}{mark}{query}"  # a slash at its end, which engines would redirect
    return f"{request.method} {target} HTTP/1.1\r\n".encode("utf-8", "surrogateescape")  # as it came


def _refuse(call: Call, error: RequestError) -> web.StreamResponse:
    call.status, call.code = error.status, error.code
    response = error_response(error, anthropic=call.is_anthropic)
    add_headers(call, response)
    if (
        error.code in {"unsupported_media_type", "bad_request", "expectation_failed"}
        or not call.request.content.is_eof()
    ):
        response.force_close()  # do not read the rest of the body
    return response


def add_headers(call: Call, response: web.StreamResponse) -> None:
    """The headers of an answer that the daemon makes itself."""
    response.headers["X-Request-Id"] = call.request_id.decode()
    if call.is_anthropic:
        response.headers["request-id"] = response.headers["X-Request-Id"]
    response.headers.update(call.cors)
    for line in call.limit_lines.decode().splitlines():
        name, _, value = line.partition(": ")
        response.headers[name] = value
    if call.model:
        response.headers["X-Vllm-Proxy-Model"] = call.model
