"""What keys cost: finding out who sends a request, metered requests and others, an upload that is refused."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bench import build, cases, client, peers, proc
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import Scope, hash_of, new_key
from vllm_proxy.domain.listener import Listener
from vllm_proxy.traffic import access
from vllm_proxy.traffic.head import read_head
from vllm_proxy.traffic.keyring import Keyring

KEYS = 200
KEY, REVOKED = new_key(bytes(32)), new_key(b"r" * 32)
WITHOUT, WITH = "no key", "a key"  # the proxies of `compared`
_CALLS, _ROUNDS = 20_000, 15
_RATE = "requests_per_minute = 1_000_000_000\ntokens_per_minute = 1_000_000_000_000\n"
COMPARED = ("json32", "sse256")
_END = "expires_at = 2999-01-01T00:00:00Z\n"


@dataclass(frozen=True, slots=True)
class Refused:
    """An upload that is refused: its answer's status, when it came, and what was sent and read by then."""

    status: int
    ms: float
    sent: int
    read: int


@dataclass(slots=True)
class Access:
    """Everything about keys."""

    caller_us: dict[str, float] = field(default_factory=dict)
    compared: cases.Results = field(default_factory=cases.Results)
    refused: list[Refused] = field(default_factory=list)


def configuration(*, expiring: bool = False) -> str:
    """Tables of so many keys with limits that nothing reaches, the first of which is `KEY`."""
    return "".join(
        f'[keys.k{n}]\nhash = "{hash_of(new_key(n.to_bytes(32)))}"\nmodels = ["bench", "m*"]\n{_END * expiring}'
        f'{_RATE}[keys.k{n}.limits."*"]\n{_RATE}'
        for n in range(KEYS)
    )


def cost() -> dict[str, float]:
    """Microseconds a call, the least of some rounds, by who calls."""
    cases: dict[str, tuple[str, dict[str, str]]] = {
        "a key": (configuration(), {"Authorization": f"Bearer {KEY}"}),
        "a key that expires": (configuration(expiring=True), {"Authorization": f"Bearer {KEY}"}),
        "a key as x-api-key": (configuration(), {"x-api-key": KEY}),
        "no key, on loopback": ("", {}),
        "an unknown key, on loopback": ("", {"Authorization": "Bearer EMPTY"}),
    }
    return {name: _least(*case) for name, case in cases.items()}


def _least(text: str, headers: dict[str, str]) -> float:
    config = parse_config(text.encode() + b'[models.bench]\nmodel = "x"\n', "models.toml")
    rules = access.Access(lambda: config.server, Keyring(config), ("127.0.0.1",))
    usual = {"Host": "127.0.0.1:8000", "User-Agent": "load", "Accept": "*/*", "Content-Type": "application/json"}
    head, _ = read_head([(name.encode(), value.encode()) for name, value in {**usual, **headers}.items()])
    client: Any = SimpleNamespace(listener=Listener.at("127.0.0.1"), ssl_context=None, transport=None)

    def work() -> None:
        for _ in range(_CALLS):
            rules.caller(head, client, Scope.INFERENCE)

    return min(_seconds(work) - _seconds(_nothing) for _ in range(_ROUNDS)) / _CALLS * 1e6


def _nothing() -> None:
    for _ in range(_CALLS):
        pass


def _seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(programs: build.Programs, folder: Path, rounds: int, seconds: float, say: Callable[[str], None]) -> Access:
    """All of it; the rounds with a key, whose requests are metered, and without take turns."""
    found = Access(cost())
    for name, us in found.caller_us.items():
        say(f"the caller, by {name}: {us:.2f} us")
    revoked = f'[keys.revoked]\nhash = "{hash_of(REVOKED)}"\nenabled = false\n'
    anybody = '[keys.anonymous]\nscopes = ["inference", "read"]\n'  # for who starts it and looks whether it answers
    with (
        peers.ours(programs, folder, name=WITHOUT, key="") as without,
        peers.ours(programs, folder, name=WITH, keys=configuration() + revoked + anybody, key=KEY) as having,
    ):
        found.compared = cases.run_rounds(programs, [without, having], COMPARED, rounds, seconds, say)
        found.refused = [_refused(having) for _ in range(max(5, rounds))]
    return found


def _refused(peer: peers.Peer) -> Refused:
    """Send 64 MiB with a key that was revoked, until it is refused."""
    size = 64 * 2**20
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {REVOKED}\r\nContent-Length: {size}\r\n\r\n"
    before, sent, piece, answer = proc.read_bytes(peer.pids), 0, b" " * 2**16, b""
    begin = time.perf_counter()
    with client.connect(peer.port) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0)
        while not answer and sent < size:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(piece)
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(4096)
        took = time.perf_counter() - begin
        read = proc.read_bytes(peer.pids) - before
    return Refused(int(answer.split(b" ")[1]), took * 1000, sent, read)
