"""The cases that look at one proxy.

Memory; clients that leave, that read nothing, that send 50 MB; many models; scrapes beside streams.
"""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import build, cases, client, peers, proc

HOUR_US = 3_600_000_000
STATES = ("prefill", "JSON", "silent stream", "blocked writer")
_GIVE_UP_SECONDS = 4.0
_BLOCKED_SECONDS = 0.7  # until all socket buffers are full
_BIG_BYTES = 50_000_000
_SPARE_FILES = 1000


@dataclass(frozen=True, slots=True)
class Memory:
    """Idle streams: how many were open, and PSS before and with them."""

    streams: int
    base_kib: int
    open_kib: int
    files_limit: int

    @property
    def kib_per_stream(self) -> float:
        """What each open stream takes."""
        return (self.open_kib - self.base_kib) / max(1, self.streams)


@dataclass(frozen=True, slots=True)
class BigBody:
    """A 50 MB body while streams run: the answer's status and time, and the longest delay of an event in ms."""

    status: int
    seconds: float
    stall_ms: float
    stall_without_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Scrapes:
    """Delays of events in ms while `/metrics` is asked again and again, and in the same window without."""

    models: int
    asked: int
    p99_ms: float
    most_ms: float
    p99_without_ms: float
    most_without_ms: float


@dataclass(slots=True)
class Departures:
    """For each state the ms from a client's close to the engine's sight of it; None: not within 4 s."""

    found: dict[str, list[float | None]] = field(default_factory=dict)

    def median(self, state: str) -> float:
        """The median of a state; infinite when most were never seen."""
        return statistics.median(float("inf") if ms is None else ms for ms in self.found[state])

    @property
    def worst(self) -> float:
        """The worst state's median."""
        return max(self.median(state) for state in self.found)


def memory(programs: build.Programs, peer: peers.Peer, streams: int) -> Memory:
    """Open streams that stay silent after their first event; fewer where the limit on open files asks for it.

    A proxy holds two files for each. The proxy should be fresh, but for the first request.
    """
    limit = proc.open_files_limit()
    streams = min(streams, (limit - _SPARE_FILES) // 2)
    base = proc.pss_kib(peer.pids)
    text = client.body(stream=True, count=10, interval_us=HOUR_US)
    with client.Load(programs.load, "stream", peer.port, streams, 0, text) as load:
        return Memory(load.ready, base, proc.pss_kib(peer.pids), limit)


def departures(peer: peers.Peer, tries: int) -> Departures:
    """Clients that leave in each state. A state in which one is never noticed is not tried again."""
    result = Departures()
    for state in STATES:
        for _ in range(tries):
            found = result.found.setdefault(state, [])
            found.append(_departure(peer, state))
            if found[-1] is None:
                break
    return result


def _departure(peer: peers.Peer, state: str) -> float | None:
    texts = {
        "prefill": client.body(stream=True, count=10, interval_us=1000, wait_us=HOUR_US),
        "JSON": client.body(wait_us=HOUR_US),
        "silent stream": client.body(stream=True, count=10, interval_us=HOUR_US),
        "blocked writer": client.body(stream=True, count=100_000_000),
    }
    before = _aborts(peer)
    connection = client.connect(peer.port)
    try:
        connection.sendall(client.request(peer.port, texts[state]))
        if state == "silent stream":
            connection.recv(4096)
        time.sleep(_BLOCKED_SECONDS if state == "blocked writer" else 0.1)
    finally:
        left = time.monotonic_ns()
        connection.close()
    if not proc.wait_until(lambda: _aborts(peer) > before, _GIVE_UP_SECONDS, 0.02):
        return None
    last: int = client.get(peer.engine, "/stats")["last_abort_ns"]
    return max(0.0, (last - left) / 1e6)


def _aborts(peer: peers.Peer) -> int:
    count: int = client.get(peer.engine, "/stats")["aborts"]
    return count


def reads_nothing(peer: peers.Peer, seconds: float) -> float:
    """The largest growth of resident memory, in MB, while a client of an endless stream reads nothing."""
    base = peak = proc.rss_kib(peer.pids)
    with client.connect(peer.port) as connection:
        connection.sendall(client.request(peer.port, client.body(stream=True, count=100_000_000)))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
            peak = max(peak, proc.rss_kib(peer.pids))
    return (peak - base) * 1024 / 1e6


def big_body(programs: build.Programs, peer: peers.Peer, seconds: float) -> BigBody:
    """Post 50 MB of chat while 64 streams with an event each 20 ms run; the same window without it goes first."""
    text = client.body(stream=True, count=100_000_000, interval_us=20_000)
    short = client.body()
    message = short.replace("Tell me", "x" * (_BIG_BYTES - len(short)) + " Tell me", 1)
    request = client.request(peer.port, message)
    answers: list[tuple[int, float]] = []
    poster = threading.Thread(target=lambda: answers.append(_post(peer.port, request)))
    with client.Load(programs.load, "stream", peer.port, 64, seconds, text) as load:
        quiet = load.measure(peer.pids)
    with client.Load(programs.load, "stream", peer.port, 64, seconds, text) as load:
        before = proc.cpu_ns(peer.pids)
        load.start()
        time.sleep(seconds / 4)
        poster.start()
        loud = load.finish(peer.pids, before)
        poster.join()
    status, took = answers[0]
    extra = (loud.cpu_us * loud.count - quiet.cpu_us * quiet.count) / 1000
    return BigBody(status, took, loud.max_us / 1000, quiet.max_us / 1000, extra)


def _post(port: int, request: bytes) -> tuple[int, float]:
    begin = time.monotonic()
    with client.connect(port) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer early
            connection.sendall(request)
        head = connection.recv(4096)
    return int(head.split(b" ")[1]) if head else 0, time.monotonic() - begin


def scrapes(programs: build.Programs, folder: Path, models: int, seconds: float) -> Scrapes:
    """Ask `/metrics` of a daemon with so many models ten times a second while 256 streams have an event each 50 ms."""
    with peers.ours(programs, folder, models=models) as peer:
        text = cases.CASES["sse256"].text
        with client.Load(programs.load, "stream", peer.port, 256, seconds, text) as load:
            quiet = load.measure(peer.pids)
        asked, ended = [0], threading.Event()
        scraper = threading.Thread(target=_scrape, args=(peer.port, asked, ended))
        with client.Load(programs.load, "stream", peer.port, 256, seconds, text) as load:
            scraper.start()
            loud = load.measure(peer.pids)
            ended.set()
        scraper.join()
    delays = (figure / 1000 for one in (loud, quiet) for figure in (one.p99_us, one.max_us))
    return Scrapes(models, asked[0], *delays)


def _scrape(port: int, asked: list[int], ended: threading.Event) -> None:
    request = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
    while not ended.wait(0.1):
        with client.connect(port) as connection:
            connection.sendall(request)
            while connection.recv(2**16):
                pass
        asked[0] += 1


def many_models(
    programs: build.Programs,
    folder: Path,
    models: int,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> cases.Results:
    """A daemon with one model against one with `models`, all but one disabled."""
    with (
        peers.ours(programs, folder, models=1, name="1 model") as few,
        peers.ours(programs, folder, models=models, name=f"{models} models") as many,
    ):
        return cases.run_rounds(programs, [few, many], ["json32", "sse256"], rounds, seconds, say)
