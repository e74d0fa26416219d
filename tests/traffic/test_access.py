"""Who may see and change models."""

from types import SimpleNamespace

import pytest
from aiohttp.test_utils import make_mocked_request

from vllm_proxy.domain.config import Server
from vllm_proxy.domain.hosts import is_loopback
from vllm_proxy.domain.listener import CONTROL, Listener
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.access import Access

LOCAL = ("127.0.0.1",)
_READ = ("ssl_context", "peername", "sockname")  # by a request, of its connection


def answer(
    server: Server,
    addresses: tuple[str, ...],
    *,
    public: bool = False,
    by: Listener | None = None,
    **headers: str,
) -> str | None:
    """The code of the refusal, which is always a 403; None where the request may pass."""
    connection = SimpleNamespace(listener=by or Listener.at(addresses[0]), **dict.fromkeys(_READ))
    request = make_mocked_request("GET", "/models", headers=headers, protocol=connection)
    try:
        Access(lambda: server, addresses).check(request, public=public)
    except RequestError as error:
        return error.code if error.status == 403 else f"{error.code}, yet {error.status}"
    return None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("chat.localhost", True),
        ("ip6-localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Addresses of 127/8, ::1 and the names that mean them; nothing that only looks so."""
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LocalHost", "[::1]:8000", "x.localhost:1", "proxy.lan:8000"],
)
def test_a_loopback_listener_answers_to_loopback_names_and_allowed_hosts(host: str) -> None:
    """With or without a port, in any case."""
    assert answer(Server(allowed_hosts=("Proxy.LAN",)), LOCAL, Host=host) is None


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1@evil.example", "[::1", "10.0.0.1"],
)
@pytest.mark.parametrize("public", [True, False])
def test_a_loopback_listener_refuses_any_other_host(host: str, public: bool) -> None:  # noqa: FBT001 - a parameter
    """A page that points its own name at this machine gets nothing, the public routes included."""
    assert answer(Server(), LOCAL, public=public, Host=host) == "host_not_allowed"


def test_a_request_without_a_host_is_refused() -> None:
    """HTTP/1.0 need not send one; then nothing says that the request was meant for this machine."""
    assert answer(Server(), LOCAL) == "host_not_allowed"


def test_the_listen_address_is_an_allowed_host() -> None:
    """The name in the file, and the address that it became."""
    server = Server(host="workstation")
    assert answer(server, ("127.0.1.1",), Host="workstation:8000") is None
    assert answer(server, ("127.0.1.1",), Host="127.0.1.1:8000") is None


def test_the_daemons_own_pages_may_ask() -> None:
    """Swagger UI sends an Origin that equals the address it was loaded from."""
    assert answer(Server(), LOCAL, Host="localhost:8000", Origin="http://localhost:8000") is None


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://localhost:3000", "https://localhost:8000", "http://127.0.0.1:8000", "null"],
)
def test_any_other_page_is_refused(origin: str) -> None:
    """Another host, port or scheme is another origin, and so is a sandboxed page's "null"."""
    assert answer(Server(), LOCAL, Host="localhost:8000", Origin=origin) == "origin_not_allowed"


@pytest.mark.parametrize(
    ("cors_origins", "code"),
    [
        (("http://ui.lan",), None),
        (("*",), None),
        (("http://ui.lan:81",), "origin_not_allowed"),
        (("http://ui.lan.evil.example",), "origin_not_allowed"),
    ],
)
def test_an_origin_is_allowed_by_its_exact_name(cors_origins: tuple[str, ...], code: str | None) -> None:
    """Or by "*", which means every page."""
    assert answer(Server(cors_origins=cors_origins), LOCAL, Host="localhost", Origin="http://ui.lan") == code


def test_an_allowed_origin_does_not_excuse_the_host() -> None:
    """Both rules hold."""
    server = Server(cors_origins=("*",))
    assert answer(server, LOCAL, Host="evil.example", Origin="http://evil.example") == "host_not_allowed"


@pytest.mark.parametrize("addresses", [("0.0.0.0",), ("::",), ("10.0.0.1",), ("127.0.0.1", "10.0.0.1")])
def test_a_listener_that_others_reach_refuses_administration(addresses: tuple[str, ...]) -> None:
    """One socket elsewhere is enough, and a loopback Host header is no excuse."""
    assert answer(Server(host=addresses[-1]), addresses, Host="localhost") == "remote_admin_disabled"


def test_public_routes_answer_from_everywhere() -> None:
    """Health checks and metrics come from other machines, by any name."""
    assert answer(Server(), ("0.0.0.0",), public=True, Host="node-7:8000", Origin="http://x") is None


def test_remote_administration_can_be_allowed() -> None:
    """Then the names in the requests are whatever the network calls this machine."""
    assert answer(Server(allow_remote_admin=True), ("0.0.0.0",), Host="node-7:8000") is None


def test_allowing_remote_administration_does_not_open_a_loopback_listener_to_other_names() -> None:
    """The key is about other machines, not about pages in this one's browser."""
    assert answer(Server(allow_remote_admin=True), LOCAL, Host="evil.example") == "host_not_allowed"


@pytest.mark.parametrize("addresses", [LOCAL, ("0.0.0.0",)])
def test_the_control_socket_is_exempt(addresses: tuple[str, ...]) -> None:
    """Whoever may open its file may administer, wherever the daemon listens besides."""
    assert answer(Server(), addresses, by=CONTROL, Host="evil.example", Origin="http://evil.example") is None


def test_another_unix_socket_is_as_loopback_is() -> None:
    """It may be a web server's way to the daemon, for pages and strangers."""
    other = Listener()
    assert answer(Server(), (), by=other, Host="localhost") is None
    assert answer(Server(), (), by=other, Host="evil.example") == "host_not_allowed"
    assert answer(Server(), ("0.0.0.0",), by=other, Host="localhost") == "remote_admin_disabled"
