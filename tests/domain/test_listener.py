"""What a listening socket says of its clients."""

import pytest

from vllm_proxy.domain.listener import CONTROL, Kind, Listener


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
