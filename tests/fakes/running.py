"""A fake that runs as a process of its own, for the tests that look at it from outside.

Without the harness and the daemon: this is what their tests stand on. Nothing here waits for time to pass.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAKE = Path(__file__).parent / "fake_vllm.py"
LISTENS = b"INFO:     Application startup complete.\n"  # its last line before it does
GONE = "ZX"  # states of a process that is none any more


class Engine:
    """A fake that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, uds: Path | None) -> None:
        assert process.stdout is not None
        self.process = process
        self.pid = process.pid
        self.port = port
        self.uds = uds  # it listens there, and not on its port
        self.out = process.stdout.fileno()
        self.output = b""

    def until(self, wanted: bytes) -> None:
        """Read its output until this is in it."""
        while wanted not in self.output:
            data = os.read(self.out, 2**16)
            assert data, self.output[-2000:]
            self.output += data

    def rest(self) -> bytes:
        """Its output to the end, which comes when its last process has ended."""
        while data := os.read(self.out, 2**16):
            self.output += data
        return self.output

    def unsaid(self) -> bytes:
        """What it has written by now, and nobody has read."""
        os.set_blocking(self.out, False)
        try:
            return os.read(self.out, 2**16)
        except BlockingIOError:
            return b""
        finally:
            os.set_blocking(self.out, True)

    def code(self) -> int:
        """How its first process ended, once it has. It stays unburied, so that its number is not given away."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def connect(self) -> socket.socket:
        """A connection, once it listens."""
        self.until(LISTENS)
        while True:  # the line comes first, as in vLLM
            assert os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
            connection = socket.socket(socket.AF_INET if self.uds is None else socket.AF_UNIX)
            try:
                connection.connect(("127.0.0.1", self.port) if self.uds is None else str(self.uds))
            except ConnectionRefusedError:
                connection.close()
            else:
                return connection

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> tuple[int, str]:
        """Status and body of one answer."""
        with self.connect() as connection:
            connection.sendall(request(path, body, method))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.read().decode()

    def state(self) -> dict[str, Any]:
        """What it tells of its processes."""
        found: dict[str, Any] = json.loads(self.ask("/fake/state")[1])
        return found

    def counters(self) -> dict[str, float]:
        """What vLLM counts."""
        lines = re.findall(r'^vllm:(\w+)\{engine="0",model_name="chat"\} (\S+)$', self.ask("/metrics")[1], re.MULTILINE)
        return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def engine(
    *flags: str, port: int | None = None, env: dict[str, str] | None = None, uds: Path | None = None
) -> Iterator[Engine]:
    """A fake with these options, as the daemon would start it; nothing of it is left behind the block."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    names = ["--served-model-name", "chat", "own"]
    place = [f"--port={port}", "--host=127.0.0.1", *([] if uds is None else [f"--uds={uds}"])]
    command = [sys.executable, "-S", str(FAKE), "serve", "org/chat", *place, *names]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env or {}, start_new_session=True
    )
    running = Engine(process, port, uds)
    try:
        yield running
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        while os.read(running.out, 2**20):  # until the last of them is dead
            pass
        process.communicate()


def meanwhile() -> None:
    """Time enough for anything that is not held up: a whole other engine starts, and answers."""
    with engine() as other:
        assert other.ask("/health")[0] == 200


def request(path: str, body: dict[str, Any] | None = None, method: str | None = None) -> bytes:
    """One request in bytes. `method`: POST where there is a body, else GET."""
    data = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def chat(*, stream: bool = False, **fault: object) -> dict[str, Any]:
    """A request's body."""
    return {"model": "chat", "stream": stream, "fake": fault}


def come(connection: socket.socket) -> bytes:
    """What has come over a connection by now."""
    data = b""
    connection.settimeout(0)
    try:
        while piece := connection.recv(2**20):
            data += piece
    except BlockingIOError:
        pass
    finally:
        connection.settimeout(None)
    return data


def state(pid: int) -> str:
    """The state of a process in one letter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process ignores a signal."""
    found = re.search(r"^SigIgn:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return bool(int(found[1], 16) >> (number - 1) & 1)


def core_of(output: bytes) -> int:
    """The pid of the engine core, as the log tells it."""
    found = re.search(rb"\(EngineCore pid=(\d+)\)", output)
    assert found
    return int(found[1])
