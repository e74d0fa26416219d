"""Who may do what: the head of a request becomes its caller here, and nowhere else, before a byte of its body is read.

A key is known by its digest. Who sends none, or one that is unknown, is anonymous: what that may do depends on the
configuration and on the listener (`keyring`). Anonymous callers may be web pages, so their Host is checked against DNS
rebinding and their Origin against cross-site requests; a valid key needs neither, since no page knows it. The control
socket may do everything. Described in docs/security.md.
"""

import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from aiohttp import web

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.hosts import is_address, is_loopback
from vllm_proxy.domain.keys import ALL, CONTROL_SOCKET, Key, Scope, is_mistyped
from vllm_proxy.domain.listener import Kind
from vllm_proxy.errors import AccessError, RequestError, model_not_found
from vllm_proxy.traffic.client import Admitted, ClientConnection
from vllm_proxy.traffic.keyring import Caller, Keyring

type Head = Mapping[bytes, bytes]  # as `head.read_head` has it

CONTROL = Caller(Key(CONTROL_SOCKET, (), ALL), b"", None)  # who uses the control socket
_DECLARED = frozenset({"application/json", "application/merge-patch+json", "text/toml", "application/toml"})
_BEARER = b"bearer "
_SUBPROTOCOL = b"openai-insecure-api-key."  # how browsers send a key with a WebSocket
_BROWSERS = (b"origin", b"sec-fetch-site", b"sec-fetch-mode")  # headers that nothing but a browser sends
_SAME_ORIGIN = b"same-origin"
_REALM = 'Bearer realm="vllm-proxy"'
_INVALID = f'{_REALM}, error="invalid_token"'
_CONTROL_KIND, _LOOPBACK_KIND = Kind.CONTROL, Kind.LOOPBACK  # found quicker than in the class
_MOST_HOSTS = 64  # spellings of the Host header that are remembered


@dataclass(slots=True)
class Admission:
    """A request that is no call for inference: who sent it, and which scope it needed."""

    caller: Caller
    scope: Scope | None
    model: str = ""  # that its path names
    committed: bool = False  # what it changes is done, whatever becomes of its key meanwhile: so it gets its answer
    revoked: RequestError | None = None  # why it ends before its time

    def commit(self) -> None:
        """What it changes is done now.

        Raises:
            RequestError: its key was revoked while its body came or while it waited for its turn.

        """
        if self.revoked is not None:
            raise self.revoked
        self.committed = True


class Access:
    """The rules of one daemon."""

    def __init__(self, server: Callable[[], Server], keyring: Keyring, addresses: Collection[str] = ()) -> None:
        """`server`: the `[server]` table now; `addresses`: those listened on."""
        self._server = server
        self._keyring = keyring
        self._addresses = {host.lower() for host in (*server().hosts, *addresses)}
        self._hosts: set[bytes] = set()  # Host headers that were found good
        self.refused: dict[str, int] = {}  # how often somebody was not let in, by the code of the error
        self.listen(self._hosts.clear)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever what is allowed has changed."""
        self._keyring.listen(listener)

    def caller(self, head: Head, client: ClientConnection, scope: Scope) -> Caller:
        """Who sends a request that needs a scope.

        Raises:
            RequestError: `missing_api_key`, `invalid_api_key`, `expired_api_key`, `missing_scope`,
                `host_not_allowed` or `origin_not_allowed`.

        """
        try:
            if client.listener.kind is _CONTROL_KIND:
                return self._at_control_socket(head, client, scope)
            given, tried = head.get(b"authorization"), b""  # first as nearly all clients send it
            if given is None:
                tried = head.get(b"x-api-key", b"")
            elif given[:7] == b"Bearer ":
                tried = given[7:]
            found = self._keyring.find(sha256(tried).digest()) if tried else None
            if found is None:
                if given is not None or tried:
                    found = self._by_any_header(head, tried)
                if found is None:
                    return self._anonymous(head, client, scope)
            if found.is_bounded and time.time() >= found.expires_at:
                _check_time(found)
            if scope not in found.scopes:
                raise _too_narrow(found, scope)
        except RequestError as error:
            self._count(error)
            raise
        return found

    def of_itself(self, head: Head, client: ClientConnection, scope: Scope) -> Caller:
        """As `caller`; but whoever sends a good key is let in, whatever its scopes: to what is about that key.

        Raises:
            RequestError: as `caller`.

        """
        found = None if client.listener.kind is Kind.CONTROL else self._by_any_header(head)
        if found is None or time.time() >= found.expires_at:
            return self.caller(head, client, scope)
        return found

    def of_session(self, head: Head, client: ClientConnection, scope: Scope) -> Caller:
        """As `caller`, of a WebSocket session: browsers can send a key with it as one of its protocols alone.

        Raises:
            RequestError: as `caller`.

        """
        offered = (one.strip() for one in head.get(b"sec-websocket-protocol", b"").split(b","))
        key = next((one.removeprefix(_SUBPROTOCOL) for one in offered if one.startswith(_SUBPROTOCOL)), None)
        return self.caller(head if key is None or b"x-api-key" in head else {**head, b"x-api-key": key}, client, scope)

    def whoever(self, head: Head, client: ClientConnection) -> Caller:
        """Who sends a request that everybody may send.

        Raises:
            RequestError: `host_not_allowed` or `origin_not_allowed`.

        """
        try:
            if client.listener.kind is Kind.CONTROL:
                return self._at_control_socket(head, client, None)
            found = self._by_any_header(head)
            if found is not None and time.time() < found.expires_at:
                return found
            self._check_page(head, client, None)
        except RequestError as error:
            self._count(error)
            raise
        return self._keyring.anonymous(local=client.listener.kind is Kind.LOOPBACK)

    def refusal_of(self, admission: Admitted, client: ClientConnection) -> RequestError | None:
        """Why a request that was let in may not go on, since a key was changed or has expired; None: it may."""
        before = admission.caller
        if before is CONTROL or admission.committed:
            return None
        now = self._keyring.now(before, local=client.listener.kind is Kind.LOOPBACK)
        if now is None:
            return AccessError("invalid_api_key", "this ends here: its key was revoked", _INVALID)
        try:
            if now.is_bounded:
                _check_time(now)
        except RequestError as error:
            return error
        admission.caller = now  # it may expire at another time
        narrowed = now.key != before.key
        if narrowed and admission.scope is not None and admission.scope not in now.scopes:
            return _without_any(admission.scope) if now.is_anonymous else _too_narrow(now, admission.scope)
        if narrowed and admission.model and not self._keyring.may_go_on(now, admission.model):
            return model_not_found(admission.model)
        return None

    def _count(self, error: RequestError) -> None:
        self.refused[error.code] = self.refused.get(error.code, 0) + 1

    def _by_any_header(self, head: Head, tried: bytes = b"") -> Caller | None:
        """`tried`: what is no key."""
        for token in _tokens(head):
            if token != tried and (found := self._keyring.find(sha256(token).digest())) is not None:
                return found
        return None

    def _at_control_socket(self, head: Head, client: ClientConnection, scope: Scope | None) -> Caller:
        """Its file has an owner, and only a browser can be led to it by others: through a forwarded port.

        Browsers that GET from a page of plain HTTP send none of their headers. But such a page's name has a dot in it,
        where others may have made it mean this machine.
        """
        if b"." in head.get(b"host", b"") or any(name in head for name in _BROWSERS):
            self._check_page(head, client, scope)
        return CONTROL

    def _anonymous(self, head: Head, client: ClientConnection, scope: Scope) -> Caller:
        caller = self._keyring.anonymous(local=client.listener.kind is _LOOPBACK_KIND)
        if scope not in caller.scopes or (caller.is_bounded and time.time() >= caller.expires_at):
            raise _without_key(head, scope)
        if b"origin" in head or head.get(b"host", b"") not in self._hosts:
            self._check_page(head, client, scope)
        return caller

    def _check_page(self, head: Head, client: ClientConnection, scope: Scope | None) -> None:
        """Refuse what a web page of somebody else would send."""
        raw = head.get(b"host", b"")
        host = _host_of(raw.decode("latin-1"))
        ours = not raw or self._is_ours(host)  # no browser leaves it out
        origin = head.get(b"origin")
        if client.listener.kind is not Kind.ELSEWHERE:
            if not ours:  # DNS rebinding: a web page that points its own name at this machine
                raise RequestError("host_not_allowed", f"cannot answer for host {host!r}: {_ADD_HOST}")
            if origin is None and len(self._hosts) < _MOST_HOSTS:
                self._hosts.add(raw)
        if not origin or scope is None:  # what everybody may have, a page cannot read but by CORS
            return
        allowed = self._server().cors_origins
        if origin.decode("latin-1") in allowed or ("*" in allowed and scope is Scope.INFERENCE):
            return
        own = b"%s://%s" % (b"https" if client.ssl_context is not None else b"http", raw)
        if origin == own or head.get(b"sec-fetch-site") == _SAME_ORIGIN:
            if ours or is_address(host):
                return
            raise RequestError("host_not_allowed", f"cannot answer a page of host {host!r}: {_ADD_HOST}")
        shown = origin.decode("latin-1")
        raise RequestError("origin_not_allowed", f"cannot answer a page of {shown!r}: add it to server.cors_origins")

    def _is_ours(self, host: str) -> bool:
        return (
            is_loopback(host)
            or host in self._addresses
            or any(host == name.lower() for name in self._server().allowed_hosts)
        )


_ADD_HOST = "add it to server.allowed_hosts"


def check_body_type(request: web.Request) -> None:
    """Refuse a body that a page may send without a preflight (cross-site request forgery).

    Raises:
        RequestError: `unsupported_media_type`.

    """
    if request.body_exists and request.content_type not in _DECLARED:
        msg = f"cannot take a body of type {request.content_type}: declare it as application/json or text/toml"
        raise RequestError("unsupported_media_type", msg)


def who(caller: Caller, client: ClientConnection) -> str:
    """A caller for the log: the name of its key, or the user who connected to the control socket."""
    if caller is not CONTROL:
        return f"key {caller.name}" if not caller.is_anonymous else caller.name
    connection = client.transport.get_extra_info("socket") if client.transport is not None else None
    if connection is None:
        return "control socket"
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return f"uid {uid}"


def _tokens(head: Head) -> Iterator[bytes]:
    """Whatever may be a key."""
    given = head.get(b"authorization", b"")
    if given[:7].lower() == _BEARER and (token := given[7:].strip()):
        yield token
    if token := head.get(b"x-api-key", b"").strip():
        yield token


def _without_key(head: Head, scope: Scope) -> RequestError:
    token = next(_tokens(head), None)
    if token is None:
        return _without_any(scope)
    way = _way(scope)
    if is_mistyped(token.decode("latin-1")):
        msg = "cannot take this key: it is mistyped, a character is missing or wrong; paste it once more"
        return AccessError("invalid_api_key", msg, _INVALID)
    return AccessError("invalid_api_key", f"cannot take this key: it is unknown or revoked; {way}", _INVALID)


def _without_any(scope: Scope) -> RequestError:
    msg = f"cannot do this without a key: send one as Authorization: Bearer KEY; {_way(scope)}"
    return AccessError("missing_api_key", msg, _REALM)


def _way(scope: Scope) -> str:
    return f"`vllm-proxy keys new NAME --scope {scope}` makes one"


def _check_time(caller: Caller) -> None:
    if not caller.key.enabled:
        msg = "cannot take this key: it is disabled; whoever runs this server can enable it"
        raise AccessError("invalid_api_key", msg, _INVALID)
    if time.time() >= caller.expires_at:
        msg = "cannot take this key: it has expired; `vllm-proxy keys new NAME` makes another"
        raise AccessError("expired_api_key", msg, _INVALID)


def _too_narrow(caller: Caller, scope: Scope) -> RequestError:
    challenge = f'{_REALM}, error="insufficient_scope", scope="{scope}"'
    has = ", ".join(sorted(caller.scopes)) or "none"
    msg = (
        f"cannot do this with the key {caller.name}: it needs the scope {scope}, and this key has {has};"
        f" `vllm-proxy keys new NAME --scope {scope}` makes one"
    )
    return AccessError("missing_scope", msg, challenge)


def _host_of(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
