"""Where an engine listens, in every way in which that is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.address import Address, TcpAddress, UnixAddress, parse_address

WRITTEN: dict[str, tuple[Address, str, list[str]]] = {  # with what stands in URLs, and what vLLM is told
    "127.0.0.1:8001": (TcpAddress("127.0.0.1", 8001), "127.0.0.1:8001", ["--host=127.0.0.1", "--port=8001"]),
    "gpu-1.lan:80": (TcpAddress("gpu-1.lan", 80), "gpu-1.lan:80", ["--host=gpu-1.lan", "--port=80"]),
    "[::1]:65535": (TcpAddress("::1", 65535), "[::1]:65535", ["--host=::1", "--port=65535"]),
    "unix:/run/a b/x.sock": (UnixAddress("/run/a b/x.sock"), "localhost", ["--uds=/run/a b/x.sock"]),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_an_address_is_read_as_it_is_written(text: str) -> None:
    """And knows how URLs and vLLM have it; equal ones are equal."""
    address, authority, options = WRITTEN[text]
    assert (str(address), parse_address(text)) == (text, address)
    assert (address.authority, address.options()) == (authority, options)


def test_only_a_tcp_address_has_a_port() -> None:
    """Who shows one shows none for a Unix socket."""
    assert (TcpAddress("::1", 8001).port, UnixAddress("/x").port) == (8001, None)


@pytest.mark.parametrize(
    "text",
    [
        "", "8001", ":8001", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:08001", "a b:1",
        "127.0.0.1:8001\r\nX: y", "::1:8001", "[]:1", "[x]:1", "[127.0.0.1]:1", "[::1]", "unix:", "unix:x", "unix:/",
        "unix:/x\0y", "http://127.0.0.1:8001", "127.0.0.1:٣",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    """Nothing that could end up in a header, a URL or a command line as something else."""
    with pytest.raises(ValueError, match="expected HOST:PORT or unix:/PATH"):
        parse_address(text)


@given(st.text())
def test_whatever_is_read_is_written_the_same(text: str) -> None:
    """There is one way to write an address."""
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert str(address) == text
