"""The client side: the compiled load generator, and small requests from here."""

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.bench import proc

MODEL = "bench"
_TEXT = "Tell me a short story about a proxy server that was quick and did not leak memory."


def body(*, stream: bool = False, count: int = 1, interval_us: int = 0, wait_us: int = 0) -> str:
    """A chat request; the mock reads from `user` how to answer."""
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": _TEXT}],
        "user": f"~bench n={count} us={interval_us} wait={wait_us}",
        **({"stream": True} if stream else {}),
    }
    return json.dumps(asked)


def request(port: int, text: str | bytes) -> bytes:
    """A POST of this body, as it goes over the wire."""
    data = text.encode() if isinstance(text, str) else text
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Authorization: Bearer sk-1234\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def connect(port: int) -> socket.socket:
    """A connection to a port of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def _http(port: int, tls: ssl.SSLContext | None) -> http.client.HTTPConnection:
    if tls is None:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=tls)


def get(port: int, path: str, tls: ssl.SSLContext | None = None) -> Any:  # noqa: ANN401 - JSON
    """The JSON answer to a GET, None unless its status is 200."""
    connection = _http(port, tls)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read()
        return (json.loads(text) if text else {}) if answer.status == 200 else None
    finally:
        connection.close()


def answers(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Whether a chat request gets a 200."""
    connection = _http(port, tls)
    try:
        connection.request("POST", "/v1/chat/completions", body(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return False
    else:
        return answer.status == 200
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Figures:
    """What one window of load gave: answers or events, their delays, and the proxy's processor time."""

    connections: int
    seconds: float
    count: int
    errors: int
    p50_us: float
    p99_us: float
    max_us: float
    cpu_us: float  # for each of `count`


class Load:
    """The load generator, connected and running once the block is entered; `measure` is its window."""

    def __init__(
        self, program: Path, kind: str, port: int, connections: int, seconds: float, text: str, key: str = "sk-1234"
    ) -> None:
        """`key`: "" sends none."""
        command = [str(program), kind, str(port), str(connections), str(seconds), text, key]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = 0

    def __enter__(self) -> Self:
        self.ready = int(self._line().split()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with {self._process.wait()}")
        return line

    def start(self) -> None:
        """Begin the window."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def finish(self, pids: Sequence[int], before: int) -> Figures:
        """Wait for the window's end; `before` is the processor time that `pids` had used when it began."""
        self._line()
        used = proc.cpu_ns(pids) - before
        found = json.loads(self._line())
        return Figures(cpu_us=used / 1000 / max(1, found["count"]), **found)

    def measure(self, pids: Sequence[int]) -> Figures:
        """One window."""
        before = proc.cpu_ns(pids)
        self.start()
        return self.finish(pids, before)
