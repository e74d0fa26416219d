"""Access checks for all routes but inference: who may see and change models.

A daemon on loopback is protected against web pages: against DNS rebinding by the `Host` header, against cross-site
requests by `Origin` and the type of the body. A daemon that listens on a network refuses administration unless
`allow_remote_admin` is set. Inference is open to whoever can connect. Described in docs/api.md.
"""

from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from aiohttp import web

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.hosts import is_loopback
from vllm_proxy.domain.listener import Kind
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.front import client_of

_DECLARED = frozenset({"application/json", "application/merge-patch+json", "text/toml", "application/toml"})


class Access:
    """The rules for one set of listening addresses."""

    def __init__(self, server: Callable[[], Server], addresses: Collection[str]) -> None:
        """`server`: the `[server]` table now; `addresses`: those listened on."""
        self._server = server
        self._local = all(is_loopback(address) for address in addresses)
        self._addresses = {host.lower() for host in (server().host, *addresses)}

    def check(self, request: web.Request, *, public: bool) -> None:
        """Let a request pass that is not for inference. `public`: one of the routes that answer everywhere.

        Raises:
            RequestError: `remote_admin_disabled`, `host_not_allowed`, `origin_not_allowed`, `unsupported_media_type`.

        """
        server = self._server()
        if client_of(request).listener.kind is Kind.CONTROL:
            return  # the control socket: its file has an owner
        if not self._local:
            if public:
                return
            if not server.allow_remote_admin:
                msg = "cannot administer over the network: set server.allow_remote_admin, or listen on 127.0.0.1"
                raise RequestError("remote_admin_disabled", msg)
        else:
            self._check_host(_host_of(request.headers.get("Host", "")), server)
        origin = request.headers.get("Origin")
        if origin and origin not in server.cors_origins and "*" not in server.cors_origins:
            own = f"{request.scheme}://{request.headers.get('Host', '')}"
            if origin != own:
                msg = f"cannot answer a page of {origin!r}: add it to server.cors_origins"
                raise RequestError("origin_not_allowed", msg)
        if (
            request.body_exists and request.content_type not in _DECLARED
        ):  # a page may send other types without a preflight (cross-site request forgery)
            msg = f"cannot take a body of type {request.content_type}: declare it as application/json or text/toml"
            raise RequestError("unsupported_media_type", msg)

    def _check_host(self, host: str, server: Server) -> None:
        allowed = {name.lower() for name in server.allowed_hosts}
        if not is_loopback(host) and host not in self._addresses | allowed:
            # DNS rebinding: a web page that points its own name at this machine.
            msg = f"cannot answer for host {host!r}: add it to server.allowed_hosts"
            raise RequestError("host_not_allowed", msg)


def _host_of(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
