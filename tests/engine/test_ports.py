"""Which engine has which port."""

import socket

import pytest

from vllm_proxy.engine.ports import NoPortError, Ports


def test_ports_are_handed_out_from_the_lowest_and_only_once(port_start: int) -> None:
    """Two engines never share a port."""
    ports = Ports(port_start, port_start + 100, [])
    taken = [ports.take() for _ in range(5)]
    assert taken == sorted(set(taken))
    assert taken[0] >= port_start


def test_a_port_given_back_is_handed_out_again(port_start: int) -> None:
    """A range does not run dry by restarts."""
    ports = Ports(port_start, port_start + 100, [])
    first = ports.take()
    ports.take()
    ports.give_back(first)
    assert ports.take() == first


def test_the_daemons_own_ports_are_never_handed_out(port_start: int) -> None:
    """A reserved port inside the range is passed over though nobody is bound to it."""
    ports = Ports(port_start, port_start + 100, [port_start, port_start + 1])
    assert ports.take() >= port_start + 2


def test_a_port_that_another_program_bound_is_not_free(port_start: int) -> None:
    """Bound is enough: a vLLM that loads is not listening yet. SO_REUSEADDR over there does not hide it."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound = Ports(port_start, port_start + 100, []).take()
        other.bind(("127.0.0.1", bound))
        with pytest.raises(NoPortError, match=rf"{bound} to {bound}: set engine.port_end"):
            Ports(bound, bound, []).take()
        assert Ports(bound, bound + 100, []).take() > bound


def test_a_port_bound_on_all_addresses_is_not_free(port_start: int) -> None:
    """A server on 0.0.0.0 would get the engine's requests."""
    with socket.socket() as other:
        bound = Ports(port_start, port_start + 100, []).take()
        other.bind(("0.0.0.0", bound))
        other.listen()
        with pytest.raises(NoPortError):
            Ports(bound, bound, []).take()


def test_an_empty_range_says_so(port_start: int) -> None:
    """When all are held, the error names the key to change."""
    ports = Ports(port_start, port_start + 100, [])
    last = ports.take()
    ports = Ports(last, last, [])
    ports.take()
    with pytest.raises(NoPortError, match="port_end"):
        ports.take()
