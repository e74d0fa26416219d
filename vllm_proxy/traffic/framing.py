"""What a request's head says of its body: framings that are not taken, and a client that waits to be asked for it.

aiohttp's parser accepts framings that allow request smuggling through a proxy, and its router asks for a body
(100 Continue) before anybody has looked at who sends it. Here a body is asked for by whoever is about to read it.
"""

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from vllm_proxy.errors import RequestError

EXPECTATION = "vllm_proxy.expectation"  # in a request for the router: what its header Expect says


def without_expectation(message: RawRequestMessage) -> tuple[str | None, RawRequestMessage]:
    """What a head expects, None for nothing; and the head without that, so that aiohttp's router does not act on it."""
    expected = message.headers.get("Expect")
    if expected is None:
        return None, message
    headers = CIMultiDict(message.headers)
    headers.popall("Expect")
    return expected, message._replace(headers=CIMultiDictProxy(headers))


def check(request: web.BaseRequest) -> None:
    """Refuse a request for the router, before anything of it is looked at.

    Raises:
        RequestError: as `check_codings` and `check_expectation`.

    """
    head = request.headers
    if request.method == "CONNECT" and ("Content-Length" in head or "Transfer-Encoding" in head):
        raise RequestError("bad_request", "cannot read a CONNECT with a body")  # aiohttp's parser takes it for requests
    check_codings(head.get("Transfer-Encoding", "chunked"), head.get("Content-Encoding", "identity"))
    if EXPECTATION in request:
        check_expectation(request, request[EXPECTATION])


def check_codings(transfer: str, content: str) -> None:
    """Refuse framings that the engine could read differently (request smuggling), and compressed bodies.

    Raises:
        RequestError: `bad_request` or `unsupported_media_type`.

    """
    if transfer.strip().lower() != "chunked":
        raise RequestError("bad_request", f"cannot read a body of transfer-encoding {transfer!r}: only chunked")
    if content.strip().lower() not in {"", "identity"}:
        raise RequestError(
            "unsupported_media_type", f"cannot take a body of content-encoding {content!r}: send it plain"
        )


def check_expectation(request: web.BaseRequest, expectation: str) -> bool:
    """Whether the client waits for 100 Continue before it sends its body. Clients of HTTP/1.0 do not know that.

    Raises:
        RequestError: `expectation_failed`.

    """
    if request.version < (1, 1):
        return False
    if expectation.strip().lower() != "100-continue":
        msg = "cannot meet what the header Expect asks for: 100-continue is all that is known"
        raise RequestError("expectation_failed", msg)
    return True


def send_continue(request: web.BaseRequest) -> None:
    """Answer 100 Continue to a client that sent `Expect`."""
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def ask_for_body(request: web.Request) -> None:
    """Answer 100 Continue where the client of a request for the router waits for that."""
    if EXPECTATION in request and check_expectation(request, request[EXPECTATION]):
        send_continue(request)
