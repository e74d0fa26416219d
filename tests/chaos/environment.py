"""What befalls a daemon from outside of its engines: outputs, descriptors, files, clocks, clients that are half there.

Each fault is taken back by whoever made it, so that at rest nothing stands in the way of what the file asks for.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from tests.bench.build import compiler
from tests.chaos.trouble import Fleet, Trouble
from tests.harness import request, running_command
from vllm_proxy.engine.proc import look_up

OPEN_FILES = 320  # of the daemon: few enough to be taken
CLIENTS = 400  # that come at once to take them
DAY_SECONDS = 86_400
SESSION = (
    b"GET /v1/realtime?model=a HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
HERE = Path(__file__).parent
OUTPUTS = ("read", "read", "full", "gone")
ESCAPES = "args = { fake_shm = true, fake_grandchildren = 1, fake_escape = true }"


class Output:
    """Where the daemon writes: a pipe into `log`, which may stand still or lose its reader; or a full device."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._reading: int | None = None

    def open(self, kind: str) -> int:
        """A new one of this kind; the descriptor is the daemon's."""
        self.close()
        if kind == "full":
            return os.open("/dev/full", os.O_WRONLY)
        reading, writing = os.pipe()
        self._reading = reading
        if kind == "gone":
            self.close()
        else:
            self.flow()
        return writing

    def flow(self) -> None:
        """It is read."""
        if self._reading is not None:
            asyncio.get_running_loop().add_reader(self._reading, self._copy)

    def stand_still(self) -> None:
        """Nobody reads it."""
        if self._reading is not None:
            asyncio.get_running_loop().remove_reader(self._reading)

    def close(self) -> None:
        """Nobody will."""
        if self._reading is not None:
            self.stand_still()
            os.close(self._reading)
            self._reading = None

    def _copy(self) -> None:
        assert self._reading is not None
        data = os.read(self._reading, 2**16)
        with self._log.open("ab") as log:
            log.write(data)
        if not data:
            self.close()


class Surrounded(Fleet):
    """A fleet whose daemon has few descriptors, a clock that can be set, and an output that may fail."""

    def __init__(self, folder: Path, port_start: int) -> None:
        super().__init__(folder, port_start)
        file = folder / "models.toml"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("args = { fake_shm = true, fake_grandchildren = 1 }", ESCAPES), encoding="utf-8")
        assert ESCAPES in file.read_text(encoding="utf-8")
        self.output = Output(folder / "daemon.log")
        self.kind = "read"
        self._clock = folder / "clock"
        self.set_clock(0)
        self._library = folder / "clock.so"
        subprocess.run(
            [compiler() or "cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(HERE / "clock.c")], check=True
        )

    def set_clock(self, seconds: int) -> None:
        """Move the daemon's wall clock so far from the machine's."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))

    async def start(self) -> None:
        """A new daemon, once it listens."""
        flags = ("--config", str(self.folder / "models.toml"), "--log-level", "info")
        env = {
            **self.places,
            "LD_PRELOAD": str(self._library),
            "CLOCK_FILE": str(self._clock),
        }
        below = ("prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}")
        writing = self.output.open(self.kind)
        try:
            running = running_command(
                self.folder, "serve", *flags, env=env, port=self.port, below=below, output=writing
            )
            self._daemon = await self._stack.enter_async_context(running)
        finally:
            os.close(writing)

    async def end(self, number: signal.Signals) -> None:
        """End the daemon by a signal; its engines live on."""
        self.output.flow()
        await super().end(number)
        self.output.close()


class Environment(Trouble):
    """One fault after another, of engines and of what is around the daemon."""

    def __init__(self, fleet: Surrounded, seed: int) -> None:
        super().__init__(fleet, seed)
        self._around = fleet

    def kinds(self) -> dict[Callable[[], Awaitable[None]], int]:
        """What happens, and how often."""
        return {
            self.kill_server: 3, self.kill_core: 2, self.kill_daemon: 1, self.end_daemon: 1, self.restart: 2,
            self.block_output: 3, self.another_output: 2, self.take_descriptors: 3, self.swap_file: 3,
            self.set_clock: 3, self.freeze: 2, self.half_open_clients: 3, self.remove_logs: 2, self.fill_disk: 2,
        }  # fmt: skip

    async def block_output(self) -> None:
        """Nobody reads what the daemon writes for a while."""
        self._around.output.stand_still()
        await asyncio.sleep(self._choose.uniform(0.2, 2))
        self._around.output.flow()

    async def another_output(self) -> None:
        """The next daemon writes to a full device, or to a pipe whose reader has gone."""
        self._around.kind = self._choose.choice(OUTPUTS)
        await self.end_daemon()

    async def take_descriptors(self) -> None:
        """More clients come than the daemon has descriptors for, say nothing, and leave."""
        clients = []
        try:
            for _ in range(CLIENTS):
                client = socket.socket()
                clients.append(client)
                client.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    client.connect(("127.0.0.1", self._around.port))
            await asyncio.sleep(self._choose.random())
        finally:
            for client in clients:
                client.close()

    async def swap_file(self) -> None:
        """The configuration is something else for a moment: a FIFO, a folder, a broken link, a link to a device."""
        file = self._around.folder / "models.toml"
        aside = file.with_name("aside.toml")
        file.rename(aside)
        kind = self._choose.choice(["fifo", "folder", "nowhere", "device", "rubbish"])
        try:
            if kind == "fifo":
                os.mkfifo(file)
            elif kind == "folder":
                file.mkdir()
            elif kind == "rubbish":
                file.write_bytes(os.urandom(1000))
            else:
                file.symlink_to("/dev/zero" if kind == "device" else "nowhere.toml")
            await asyncio.sleep(self._choose.uniform(0.1, 3))
        finally:
            if kind == "folder":
                file.rmdir()
            aside.replace(file)

    async def set_clock(self) -> None:
        """The wall clock jumps, by days, back or forth; it stays there."""
        self._around.set_clock(self._choose.randrange(-3 * DAY_SECONDS, 3 * DAY_SECONDS))

    async def freeze(self) -> None:
        """The machine stands still for longer than any timeout of an engine, and goes on."""
        pids = [self._around.daemon.process.pid, *self._around.strays(set())]
        with _stopped(pids):
            await asyncio.sleep(self._choose.uniform(0.5, 3))

    async def half_open_clients(self) -> None:
        """Clients that begin a head, a body or a session, or read nothing of a stream, and are never heard of again."""
        body = b'{"model": "a", "stream": true, "messages": [], "fake": {"chunks": 200, "size": 5000}}'
        whole = request("/v1/chat/completions", body)
        begun = [
            b"POST /v1/chat/completions HT",
            whole[:-20],
            whole,
            SESSION,
        ]
        clients = []
        try:
            for data in begun * 3:
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                clients.append(client)
                client.settimeout(1)
                with contextlib.suppress(OSError):
                    client.connect(("127.0.0.1", self._around.port))
                    client.sendall(data)
            await asyncio.sleep(self._choose.uniform(0.1, 2))
        finally:
            for client in clients:
                client.close()

    async def remove_logs(self) -> None:
        """Somebody tidies up the logs of engines that run."""
        shutil.rmtree(self._around.folder / "state" / "logs", ignore_errors=True)

    async def fill_disk(self) -> None:
        """The disk of the state directory is full for a moment."""
        state = self._around.folder / "state"
        if not state.is_mount():  # the disk is everybody's
            return
        ballast = state / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
            await asyncio.sleep(self._choose.uniform(0.1, 1))
        finally:
            ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def _stopped(pids: list[int]) -> Iterator[None]:
    there = [(pid, found.started) for pid in pids if (found := look_up(pid))]

    def send(number: signal.Signals) -> None:
        for pid, started in there:
            found = look_up(pid)
            if found and found.started == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A small file system of its own for a state directory, where this process may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and sys.platform == "linux"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
