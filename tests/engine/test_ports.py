"""Which engine has which port."""

import asyncio
import errno
import socket

import pytest

from tests.engine.virtual import now, passes, virtual
from vllm_proxy.engine import ports as ports_module
from vllm_proxy.engine.ports import NoPortError, Ports, Use, use_of
from vllm_proxy.engine.sock_diag import BOUND_ALONE, TcpSocket, tcp_sockets


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
    ports.release(first)
    assert ports.take() == first


def test_a_port_that_another_daemon_has_handed_out_is_not_free(port_start: int) -> None:
    """Though nobody has bound it yet: the engine imports for a minute, and would share the port with another one."""
    theirs, ours = Ports(port_start, port_start + 100, []), Ports(port_start, port_start + 100, [])
    assert theirs.take() == port_start
    assert ours.take() == port_start + 1
    theirs.reserve(port_start + 2)
    assert ours.take() == port_start + 3
    theirs.release(port_start)
    assert ours.take() == port_start
    with pytest.raises(NoPortError, match="cannot find a free port"):
        Ports(port_start, port_start + 3, []).take()


def test_a_port_of_an_adopted_engine_is_held_though_another_daemon_claims_it(port_start: int) -> None:
    """The engine is there; whose it is says the record."""
    theirs, ours = Ports(port_start, port_start + 100, []), Ports(port_start, port_start + 100, [])
    assert theirs.take() == port_start
    ours.reserve(port_start)
    ours.release(port_start)
    assert ours.take() == port_start + 1


def test_a_port_is_held_though_no_claim_can_be_made(port_start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no descriptor is left: an engine of an earlier daemon is adopted all the same."""
    ports = Ports(port_start, port_start + 100, [])
    with monkeypatch.context() as patched:
        patched.setattr("vllm_proxy.engine.ports._CLAIM", "/nowhere/{}")
        ports.reserve(port_start)
        assert ports.take() == port_start + 1

        def none_left(*_: object) -> None:
            raise OSError(errno.EMFILE, "no descriptor left")

        patched.setattr("vllm_proxy.engine.ports.socket.socket", none_left)
        ports.reserve(port_start + 2)
    assert ports.take() == port_start + 3
    ports.release(port_start + 2)
    assert ports.take() == port_start + 2


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


# A port whose last engine crashed


def closed_connection(port: int) -> None:
    """What a server that ends first leaves on its port: the kernel remembers the connection for a minute."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""


def loading_engine(port: int) -> socket.socket:
    """Bound with SO_REUSEADDR and not listening, as a vLLM that loads."""
    engine = socket.socket()
    engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    engine.bind(("127.0.0.1", port))
    return engine


def kernel_tells(port: int) -> bool:
    """Whether it knows sockets that are bound alone (since Linux 6.8)."""
    with loading_engine(port):
        return len(tcp_sockets(BOUND_ALONE, port)) == 1


def test_closed_connections_of_the_last_engine_do_not_take_its_port(port_start: int) -> None:
    """One instance with a range of one port comes back after a crash; a fresh port goes first where there is one."""
    closed_connection(port_start)
    assert use_of(port_start) is (Use.CLOSING if kernel_tells(port_start) else Use.UNKNOWN)
    assert Ports(port_start, port_start + 1, []).take() == port_start + 1
    if kernel_tells(port_start):
        assert Ports(port_start, port_start, []).take() == port_start
        loading_engine(port_start).close()  # and it can be bound


def test_an_engine_that_loads_keeps_its_port_beside_closed_connections(port_start: int) -> None:
    """Bound and not yet listening, on a port with a past: no bind sees it, so the kernel is asked."""
    closed_connection(port_start)
    with loading_engine(port_start):
        assert use_of(port_start) in ({Use.TAKEN} if kernel_tells(port_start + 1) else {Use.UNKNOWN})
    with loading_engine(port_start) as listening:
        listening.listen()
        assert use_of(port_start) is Use.TAKEN


@pytest.mark.parametrize("answer", [None, OSError(93, "no such protocol")])
@virtual
async def test_where_the_kernel_does_not_tell_the_start_waits_and_says_so(
    port_start: int, monkeypatch: pytest.MonkeyPatch, answer: OSError | None
) -> None:
    """An older kernel, a sandbox: once the port is free it is taken; what waits for is told once."""

    def ask(_state: int, _port: int) -> list[TcpSocket]:
        if answer is not None:
            raise answer
        return []

    monkeypatch.setattr(ports_module, "tcp_sockets", ask)
    told: list[str | None] = []
    engine = loading_engine(port_start)
    taking = asyncio.create_task(Ports(port_start, port_start, []).take_or_wait(told.append))
    await passes(60)
    assert len(told) == 1
    assert f"port {port_start} is taken" in (told[0] or "")
    engine.close()
    assert await taking == port_start
    assert told[1:] == [None]


@virtual
async def test_the_wait_for_a_port_has_an_end(port_start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed connection is forgotten after a minute: what is still there is something else."""
    monkeypatch.setattr(ports_module, "tcp_sockets", lambda _state, _port: [])
    with loading_engine(port_start), pytest.raises(NoPortError):
        await Ports(port_start, port_start, []).take_or_wait(lambda _: None)
    assert 60 < now() < 120
