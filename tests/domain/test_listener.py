"""Where clients come in: addresses as people write them, and what a listening socket says of its clients."""

import re

import pytest

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress
from vllm_proxy.domain.config import Server
from vllm_proxy.domain.file.parse import Override, parse_config
from vllm_proxy.domain.listener import CONTROL, Kind, Listener, each_once, listen_address
from vllm_proxy.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_a_socket_that_is_bound_to_loopback_is_for_this_machine(host: str) -> None:
    """Nobody else can connect to it."""
    assert Listener.at(host).kind is Kind.LOOPBACK


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1"])
def test_any_other_address_is_elsewhere(host: str) -> None:
    """Those that stand for all addresses too, loopback among them: the socket decides, not who connects."""
    assert Listener.at(host).kind is Kind.ELSEWHERE


def test_what_is_not_known_is_trusted_least() -> None:
    """A Unix socket of clients, which may be a web server's way here, and what nobody has named."""
    assert Listener().kind is Kind.ELSEWHERE
    assert CONTROL.kind is Kind.CONTROL


@pytest.mark.parametrize(
    ("listener", "url"),
    [
        (Listener.at("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (Listener.at("::1", 8443, tls=True), "https://[::1]:8443"),
        (Listener(address=UnixAddress("/run/x.sock")), "unix:/run/x.sock"),
    ],
)
def test_a_listener_has_a_url(listener: Listener, url: str) -> None:
    """With https where clients speak TLS, which they do not over a Unix socket."""
    assert listener.url == url


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", TcpAddress("127.0.0.1", 8000)),
        ("0.0.0.0:80", TcpAddress("0.0.0.0", 80)),
        ("[::1]:8000", TcpAddress("::1", 8000)),
        ("[::]:8000", TcpAddress("::", 8000)),
        ("[fe80::1%eth0]:8000", TcpAddress("fe80::1%eth0", 8000)),
        ("localhost:65535", TcpAddress("localhost", 65535)),
        ("gpu.example.org:1", TcpAddress("gpu.example.org", 1)),
        ("unix:/run/vllm-proxy/http.sock", UnixAddress("/run/vllm-proxy/http.sock")),
        ("unix:/a b/c", UnixAddress("/a b/c")),
        ("unix:http.sock", UnixAddress("http.sock")),
    ],
)
def test_an_address_is_taken_as_it_is_written(text: str, address: Address) -> None:
    """A port of a name or an address, or the path of a Unix socket."""
    assert listen_address(text) == text
    assert Server(listen=(text,)).addresses == (address,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:8000", '"127.0.0.1:8000"'),
        ("http://127.0.0.1:8000/", '"127.0.0.1:8000"'),
        ("https://gpu:8443", '"gpu:8443", with server.tls_cert and server.tls_key'),
        ("127.0.0.1", '"127.0.0.1:8000"'),
        ("gpu.example.org", '"gpu.example.org:8000"'),
        ("::1", '"[::1]:8000"'),
        ("fe80::1:8001", '"[fe80::1:8001]:8000"'),
        ("8000", '"127.0.0.1:8000" for this machine alone, or "0.0.0.0:8000" for all'),
        (":8000", '"127.0.0.1:8000" for this machine alone, or "0.0.0.0:8000" for all'),
        ("*:8000", '"127.0.0.1:8000" for this machine alone, or "0.0.0.0:8000" for all'),
        ("/run/http.sock", '"unix:/run/http.sock"'),
        ("unix:///run/http.sock", '"unix:/run/http.sock"'),
        ("unix:", 'the path of a socket, such as "unix:/run/vllm-proxy/http.sock"'),
        ("unix:/run/", 'the path of a socket, such as "unix:/run/vllm-proxy/http.sock"'),
        ("unix:/" + "x" * 5000, "the path of a socket"),
        ("127.0.0.1:0", '"127.0.0.1:8000", "[::1]:8000" or'),
        ("127.0.0.1:70000", '"127.0.0.1:8000", "[::1]:8000" or'),
        ("127.0.0.1:http", '"127.0.0.1:8000", "[::1]:8000" or'),
        ("[1:2]:8000", "an IPv6 address in the brackets"),
        ("a..b:8000", "an address or a name"),
        ("300.1.1.1:8000", "an address or a name"),
        ("\N{SNOWMAN}", '"'),
    ],
)
def test_a_wrong_address_is_refused_with_the_right_spelling(text: str, expected: str) -> None:
    """What was probably meant is in the message, ready to be copied."""
    with pytest.raises(ValueError, match=r"^expected ") as raised:
        listen_address(text)
    assert str(raised.value).startswith(f"expected {expected}")
    assert "got " in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("127.0.0.1:80", "127.0.0.1:81", "127.0.0.1:80"), 'expected each address once, got "127.0.0.1:80" twice'),
        (("unix:/a", "unix:/a"), 'expected each address once, got "unix:/a" twice'),
        (("0.0.0.0:80", "127.0.0.1:80"), '"127.0.0.1:80" is within "0.0.0.0:80": one of them is enough'),
        (("[::1]:80", "[::]:80"), '"[::1]:80" is within "[::]:80": one of them is enough'),
    ],
)
def test_no_two_addresses_are_the_same(texts: tuple[str, ...], message: str) -> None:
    """The second could not be bound: that is said before anything is."""
    with pytest.raises(ValueError, match=re.escape(message)):
        each_once(texts)


def test_addresses_that_only_look_alike_are_taken() -> None:
    """IPv6 sockets are for IPv6 alone, and what a name means is not known here."""
    texts = ("0.0.0.0:80", "[::]:80", "127.0.0.1:81", "localhost:80", "unix:/80")
    assert each_once(texts) == texts


def addresses(text: str, **overrides: object) -> list[str]:
    """Where a file says that the daemon listens, with values from outside of it."""
    given = {key: Override(value, f"--{key}") for key, value in overrides.items()}
    return [str(address) for address in parse_config(text.encode(), "f", given).server.addresses]


def test_listen_wins_over_host_and_port_of_the_file() -> None:
    """Without it they say where."""
    assert addresses('[server]\nhost = "10.0.0.1"\nport = 1') == ["10.0.0.1:1"]
    assert addresses('[server]\nhost = "10.0.0.1"\nport = 1\nlisten = ["[::1]:2"]') == ["[::1]:2"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, ["10.0.0.1:1", "unix:/a", "[::1]:2"]),
        ({"port": 9}, ["127.0.0.1:9", "unix:/a"]),
        ({"host": "::"}, ["[::]:8000", "unix:/a"]),
        ({"host": "gpu", "port": 9}, ["gpu:9", "unix:/a"]),
        ({"listen": ["unix:/b"]}, ["unix:/b"]),
        ({"listen": ["unix:/b", "10.0.0.2:1"], "port": 9}, ["127.0.0.1:9", "unix:/b"]),
    ],
)
def test_host_and_port_from_outside_replace_the_tcp_addresses(
    overrides: dict[str, object], expected: list[str]
) -> None:
    """Unix sockets stay; what is not given is the file's own, or the default."""
    assert addresses('[server]\nlisten = ["10.0.0.1:1", "unix:/a", "[::1]:2"]', **overrides) == expected


def test_host_and_port_from_outside_stand_for_a_list_without_unix_sockets() -> None:
    """Nothing of the list is left then."""
    assert addresses('[server]\nlisten = ["10.0.0.1:1", "[::1]:2"]', port=9) == ["127.0.0.1:9"]


def test_an_empty_list_is_a_problem() -> None:
    """A daemon that listens nowhere is no wish of anybody."""
    with pytest.raises(ConfigError) as raised:
        parse_config(b"[server]\nlisten = []", "f")
    assert raised.value.lines() == ["f:2: server.listen: expected at least one item, got []"]
