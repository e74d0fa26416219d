"""Errors as answers: the two envelopes, and what becomes of a fault behind the beginning of an answer."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import web

from tests.traffic.callers import admit, get
from vllm_proxy.errors import STATUS, RequestError
from vllm_proxy.traffic.call import Call, observed
from vllm_proxy.traffic.client import as_bytes
from vllm_proxy.traffic.envelope import as_request_error, error_response

# Source: Anthropic's API reference, "Errors".
ANTHROPIC = set(
    "invalid_request_error authentication_error permission_error not_found_error request_too_large rate_limit_error "
    "api_error timeout_error overloaded_error".split()
)


def told(error: RequestError, *, anthropic: bool = False) -> dict[str, Any]:
    """The error in the envelope."""
    body: bytes = error_response(error, anthropic=anthropic).body  # type: ignore[assignment]
    return dict(msgspec.json.decode(body)["error"])


@pytest.mark.parametrize("code", STATUS)
def test_every_error_has_a_type_that_anthropics_clients_know(code: str) -> None:
    """A client's fault never looks like the server's, or the other way round."""
    error = RequestError(code, "cannot")
    kind = told(error, anthropic=True)["type"]
    assert kind in ANTHROPIC
    assert (kind in {"api_error", "overloaded_error", "timeout_error"}) is (error.status >= 500 or error.status == 408)
    assert told(error)["type"] == ("server_error" if error.status >= 500 else "invalid_request_error")


@pytest.mark.parametrize("code", STATUS)
def test_what_no_wait_helps_against_is_not_sent_again(code: str) -> None:
    """Clients of OpenAI and Anthropic send every 5xx twice more; what is not there stays so."""
    headers = error_response(RequestError(code, "cannot")).headers
    assert ("x-should-retry" in headers) is (STATUS[code] == 501)


@pytest.mark.parametrize("anthropic", [False, True])
def test_a_message_with_bytes_that_are_no_text_is_still_an_answer(anthropic: bool) -> None:  # noqa: FBT001 - a parameter
    """They are shown as escapes."""
    error = RequestError("not_found", "cannot find /\udcff")
    assert told(error, anthropic=anthropic)["message"] == "cannot find /\\udcff"


@pytest.mark.parametrize(
    ("error", "status"),
    [(web.HTTPNotFound(), 404), (web.HTTPMethodNotAllowed("GET", ["POST"]), 405), (web.HTTPUpgradeRequired(), 400),
     (web.HTTPRequestEntityTooLarge(1, 2), 413), (web.HTTPBadRequest(text="no\n"), 400)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_aiohttp_raises_is_one_of_our_errors(error: web.HTTPException, status: int) -> None:
    """With a sentence."""
    request: Any = SimpleNamespace(path="/x", method="GET")
    found = as_request_error(request, error)
    assert found.status == status
    assert found.message.startswith("cannot ")


class Transport:
    """A client's, which remembers whether it was cut."""

    cut = False

    def abort(self) -> None:
        """The connection is cut."""
        self.cut = True


@pytest.mark.parametrize("begun", [True, False])
async def test_a_fault_behind_the_beginning_of_an_answer_cuts_it(begun: bool) -> None:  # noqa: FBT001 - a parameter
    """A second head inside a body would be read as the body's end; before the beginning it is a 500."""
    request: Any = SimpleNamespace(
        raw_path="/x",
        raw_headers=(),
        transport=Transport(),
        content=SimpleNamespace(is_eof=lambda: True),
        protocol=SimpleNamespace(),
    )
    seen: list[int] = []

    async def work(call: Call) -> web.StreamResponse:
        call.status = 200 if begun else 0
        raise ValueError("a fault")

    cors: Any = None
    handle = observed(get("/x"), work, admit, lambda call: seen.append(call.status), cors, active={})
    if begun:
        with pytest.raises(ConnectionResetError):
            await handle(request)
    else:
        assert (await handle(request)).status == 500
    assert request.transport.cut is begun
    assert seen == [200 if begun else 500]


def test_an_error_that_is_written_past_the_server_is_an_answer_like_any_other() -> None:
    """To a client that has not asked to the end, or for which there is no room: a length, an id, the envelope."""
    head, _, body = as_bytes(RequestError("headers_too_large", "cannot")).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 431 Request Header Fields Too Large"
    assert f"Content-Length: {len(body)}" in lines
    assert sum(line.startswith("X-Request-Id: ") for line in lines) == 1
    assert msgspec.json.decode(body)["error"]["code"] == "headers_too_large"
