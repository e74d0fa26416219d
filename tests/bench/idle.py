"""Idle connections: what each costs in memory, and how soon a request beside thousands of them is answered."""

import contextlib
import http.client
import socket
import ssl
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import certificates
from tests.bench import build, client, peers, proc

KINDS = ("silent", "used", "TLS")  # nothing was ever sent; a request was answered; the same, over TLS
_REQUESTS = 300  # beside them
_PAUSE_SECONDS = 0.01  # between two of those: some fall into each look at all connections, once a second
_SETTLED_SECONDS = 2.0
_SPARE_FILES = 1000  # of the daemon, beside the half of the rest that is for clients
_MOST_TLS = 2000  # each handshake takes this process some milliseconds


@dataclass(frozen=True, slots=True)
class Idle:
    """Connections that do nothing: how many, PSS before and with them, and the delays of requests beside them in ms."""

    connections: int
    base_kib: int
    open_kib: int
    p50_ms: float
    p95_ms: float
    most_ms: float

    @property
    def kib_per_connection(self) -> float:
        """What each of them takes."""
        return (self.open_kib - self.base_kib) / max(1, self.connections)


def measure(programs: build.Programs, folder: Path, count: int, say: Callable[[str], None]) -> dict[str, Idle]:
    """Every kind, each with a daemon of its own."""
    found = {}
    most = (proc.open_files_limit() - _SPARE_FILES) // 2
    for kind in KINDS:
        place = folder / kind
        place.mkdir(parents=True)
        pair = certificates.make(place) if kind == "TLS" else None
        wanted = min(count, most, _MOST_TLS if pair else count)
        with peers.ours(programs, place, pair=pair) as peer:
            found[kind] = one = _idle(peer, wanted, used=kind != "silent", tls=pair.trust() if pair else None)
        say(f"idle, {kind}: {one.kib_per_connection:.1f} KiB each, p95 {one.p95_ms:.2f} ms at {one.connections}")
    return found


def _idle(peer: peers.Peer, count: int, *, used: bool, tls: ssl.SSLContext | None) -> Idle:
    for _ in _delays(peer, tls):  # what is allocated once
        pass
    time.sleep(_SETTLED_SECONDS)
    base = proc.pss_kib(peer.pids)
    request = client.request(peer.port, client.body())
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(_connect(peer, tls))
            if used:
                connection.sendall(request)
                connection.recv(2**16)
        time.sleep(_SETTLED_SECONDS)
        after = proc.pss_kib(peer.pids)
        delays = sorted(_delays(peer, tls))
    p95 = statistics.quantiles(delays, n=20)[-1]
    return Idle(count, base, after, statistics.median(delays), p95, delays[-1])


def _connect(peer: peers.Peer, tls: ssl.SSLContext | None) -> socket.socket:
    connection = client.connect(peer.port)
    return tls.wrap_socket(connection, server_hostname="localhost") if tls else connection


def _delays(peer: peers.Peer, tls: ssl.SSLContext | None) -> Iterator[float]:
    """How many ms requests take, one after another, on a connection of their own."""
    plain = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=30)
    asking = http.client.HTTPSConnection("127.0.0.1", peer.port, timeout=30, context=tls) if tls else plain
    with contextlib.closing(asking):
        for _ in range(_REQUESTS):
            time.sleep(_PAUSE_SECONDS)
            began = time.monotonic()
            asking.request("POST", "/v1/chat/completions", client.body(), {"Content-Type": "application/json"})
            answer = asking.getresponse()
            answer.read()
            assert answer.status == 200
            yield (time.monotonic() - began) * 1000
