"""Starts the daemon as a real process, the way systemd does, and waits for what it says instead of sleeping."""

import asyncio
import collections
import contextlib
import itertools
import os
import random
import signal
import socket
import ssl
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from yarl import URL

from tests import certificates, forks, slow_turns
from vllm_proxy.domain.address import UnixAddress
from vllm_proxy.domain.config import revision_of
from vllm_proxy.engine.proc import look_up
from vllm_proxy.traffic.routes import is_inference

FAKE = Path(__file__).parent / "fakes" / "fake_vllm.py"
WAYS = {"direct": b"", "by the parser": b"\r\n"}  # of requests through the daemon, and what a connection begins with
WATCHED = (sys.executable, slow_turns.__file__)  # the command line, its event loop watched
PLAIN = (sys.executable, "-m", "vllm_proxy")  # as users run it
FORKED = (WATCHED, PLAIN)
WAIT_SECONDS = 60.0
OPEN = '[keys.anonymous]\nscopes = ["admin"]\n'  # for what is not about access: nobody needs a key
NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=30)  # a request may wait for vLLM to load
PAUSE_SECONDS = 0.01  # between two questions: who asks without one takes the processor from whoever is to answer
# Root is exempt from the limit of processes; whoever may read and write everything is not (`access` too, by its bits).
NOBODY = 54321
AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY}", "--clear-groups", "--securebits=+no_setuid_fixup",
    "--inh-caps=-all,+dac_override", "--ambient-caps=+dac_override", "--bounding-set=-all,+dac_override",
)  # fmt: skip


# Below the kernel's ephemeral ports. Who has a block holds a name for it, so that no test beside this one takes it.
_blocks = itertools.cycle(range(12_000, 32_600, 200))
for _ in range(random.randrange(99)):  # those who ended a moment ago may have left connections
    next(_blocks)
_held: collections.deque[socket.socket] = collections.deque()
_MOST_HELD = 8  # for a session, a module and a test at once, each more than it needs


def port_block() -> int:
    """The first of two hundred ports for the engines of one daemon."""
    if len(_held) == _MOST_HELD:
        _held.popleft().close()
    first, name = _own_block()
    _held.append(name)
    return first


def _own_block() -> tuple[int, socket.socket]:
    for first in itertools.islice(_blocks, 200):
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                name.bind(f"\0vllm-proxy tests, ports from {first}")
                probe.bind(("127.0.0.1", first))
            except OSError:  # another process has it, or the engine of one that was killed
                name.close()
                continue
        return first, name
    message = "cannot find two hundred ports for a daemon's engines: other tests have them all"
    raise RuntimeError(message)


_for_servers: list[socket.socket] = []  # the name of this process's own block
_server_ports: collections.deque[int] = collections.deque()


def free_port() -> int:
    """A port that nothing listens on now, and that no other test is given soon."""
    if not _for_servers:
        first, name = _own_block()
        _for_servers.append(name)
        _server_ports.extend(range(first, first + 200))
    while True:
        _server_ports.rotate(-1)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", _server_ports[0]))
            return _server_ports[0]


def fake_engines(port_start: int) -> str:
    """An `[engine]` table that starts the fake. Two hundred ports are its own."""
    command = [sys.executable, "-S", str(FAKE), "serve"]
    return f"{real_engines(port_start)}command = {command!r}\n"


def real_engines(port_start: int) -> str:
    """An `[engine]` table that starts vLLM, on ports that no daemon beside it gives to its engines while they load."""
    return f"[engine]\nport_start = {port_start}\nport_end = {port_start + 199}\n"


def loading_until(port_start: int, gate: Path) -> str:
    """A configuration whose only model, `chat`, loads until there is a file."""
    args = f'args = {{ fake_phase_until = "weights={gate}" }}'
    return f'{fake_engines(port_start)}[models.chat]\nmodel = "x"\n{args}\n'


class Running(Protocol):
    """A process, however it was started."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> int | None:
        """Its exit status, once somebody has waited for it."""

    async def wait(self) -> int:
        """Wait for its end; returns its exit status, negative for a signal."""

    def send_signal(self, number: signal.Signals, /) -> None:
        """Send a signal."""


class Daemon:
    """A running `vllm-proxy`."""

    def __init__(
        self, process: Running, port: int, folder: Path, notes: "Notes", tls: ssl.SSLContext | None = None
    ) -> None:
        """`tls`: how clients speak to its port, None: without."""
        self.process = process
        self.tls = tls
        self.unix: Path | None = None  # a socket for clients, where `connected` is to go there
        self.first = b""  # what `connected` sends at first
        self.port = port
        self.folder = folder
        self.notes = notes
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        connector = aiohttp.TCPConnector(ssl=tls) if tls else None
        # Its URLs are normalised, those of get and post are not.
        self.session = aiohttp.ClientSession(self.url, connector=connector, timeout=NO_LIMIT)
        self.runtime_dir = folder / "state"  # where its control socket lies
        self._runtime = -1  # a descriptor of that, whose path may be too long for a socket's name
        self._admin: aiohttp.ClientSession | None = None

    @property
    def admin(self) -> aiohttp.ClientSession:
        """A client at the control socket, which may do everything."""
        if self._admin is None:
            self._runtime = os.open(self.runtime_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            connector = aiohttp.UnixConnector(f"/proc/self/fd/{self._runtime}/control.sock")
            self._admin = aiohttp.ClientSession("http://localhost", connector=connector, timeout=NO_LIMIT)
        return self._admin

    async def close(self) -> None:
        """Close its clients."""
        await self.session.close()
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.close()
            os.close(self._runtime)

    def _client(self, path: str) -> tuple[aiohttp.ClientSession, URL]:
        """Who may ask for a path without a key, and where: the fleet is for the control socket."""
        if is_inference(path.partition("?")[0]):
            return self.session, URL(self.url + path, encoded=True)
        return self.admin, URL("http://localhost" + path, encoded=True)

    @property
    def state_dir(self) -> Path:
        """Where it keeps its state."""
        return self.folder / "state"

    def log(self) -> str:
        """What it logged so far."""
        return (self.folder / "daemon.log").read_text(encoding="utf-8")

    async def logged(self, words: str, times: int | None = None) -> None:
        """Wait until these words stand in its log: at all, or exactly so many `times`.

        It is written by a thread of its own, a moment after what it tells of.
        """
        async with asyncio.timeout(WAIT_SECONDS):
            while (found := self.log().count(words)) < (times or 1):
                await asyncio.sleep(PAUSE_SECONDS)
        assert times in {None, found}

    async def until(self, wanted: str | Callable[[str], bool], seconds: float = WAIT_SECONDS) -> None:
        """Wait until its STATUS is, or fulfils, what is wanted."""
        await self.notes.until(wanted, self.process, seconds)

    async def get(self, path: str, status: int = 200) -> Any:  # noqa: ANN401 - JSON
        """A JSON answer, its status checked."""
        client, url = self._client(path)
        async with client.get(url) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()

    async def post(self, path: str, body: object, status: int = 200) -> Any:  # noqa: ANN401 - JSON
        """The JSON answer to a JSON body (bytes: sent as they are), its status checked."""
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        client, url = self._client(path)
        async with client.post(url, headers={"Content-Type": "application/json"}, **data) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()

    async def write(
        self, method: str, path: str, body: object = None, status: int = 200, *, if_match: str | None = None
    ) -> Any:  # noqa: ANN401 - JSON
        """The JSON answer to a write (text: TOML), None where there is none; its status checked."""
        headers = {"If-Match": if_match} if if_match else {}
        if isinstance(body, str):
            headers["Content-Type"] = "application/toml"
        data = {"data": body} if isinstance(body, str) else {} if body is None else {"json": body}
        client, url = self._client(path)
        async with client.request(method, url, headers=headers, **data) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json() if answer.content_length != 0 and status != 204 else None

    @property
    def file(self) -> Path:
        """Its configuration."""
        return self.folder / "models.toml"

    def edit(self, old: str, new: str) -> None:
        """Save the file with something in it changed, as an editor does."""
        text = self.file.read_text(encoding="utf-8")
        assert old in text, text
        self.save(text.replace(old, new))

    def save(self, text: str) -> None:
        """Save the file whole: a half of it would be followed too."""
        beside = self.file.with_suffix(".new")
        beside.write_text(text, encoding="utf-8")
        beside.rename(self.file)

    async def revision(self) -> str:
        """Of the configuration that it follows."""
        return str((await self.get("/health"))["config"]["revision"])

    async def adopts(self) -> None:
        """Wait until it follows what is in the file now."""
        wanted = revision_of(self.file.read_bytes())
        await self.eventually("/health", lambda health: health["config"]["revision"] == wanted)

    async def eventually(self, path: str, holds: Callable[[Any], bool], status: int = 200) -> Any:  # noqa: ANN401 - JSON
        """Ask again and again, until the answer fulfils what is wanted; returns it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds(answer := await self.get(path, status)):
                await asyncio.sleep(PAUSE_SECONDS)
        return answer

    async def all_ready(self) -> None:
        """Wait until every instance of every model serves."""

        def ready(found: Any) -> bool:  # noqa: ANN401 - JSON
            return all(one["state"] == "ready" for model in found["models"] for one in model["status"]["instances"])

        await self.eventually("/models", ready)

    async def ports(self, model: str) -> list[int]:
        """The ports of a model's engines."""
        resource = await self.get(f"/models/{model}")
        return [instance["port"] for instance in resource["status"]["instances"]]

    async def seen(self, request_id: str, model: str = "chat") -> list[dict[str, Any]]:
        """What the fake engines of a model tell of the requests that clients sent with this id, in no order."""
        return [seen for port in await self.ports(model) for seen in await self.seen_at(port, request_id)]

    async def seen_at(self, port: int, request_id: str) -> list[dict[str, Any]]:
        """As `seen`, of the engine on this port."""

        def is_of(seen: dict[str, Any]) -> bool:
            ids = [value for name, value in seen["headers"] if name == "X-Request-Id"]
            return any(value == request_id or value.startswith(request_id + ".") for value in ids)

        async with self.session.get(f"http://127.0.0.1:{port}/fake/seen") as answer:
            return [seen for seen in await answer.json() if is_of(seen)]

    async def metrics(self) -> dict[str, float]:
        """The exposition: value by series, labels as they are written."""
        async with self.admin.get("/metrics") as answer:
            lines = [line for line in (await answer.text()).splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    async def instance(self, model: str, index: int = 0) -> Any:  # noqa: ANN401 - JSON
        """What an instance is now."""
        return (await self.get(f"/models/{model}"))["status"]["instances"][index]

    async def once(self, model: str, holds: Callable[[Any], bool], index: int = 0) -> Any:  # noqa: ANN401 - JSON
        """Wait until an instance fulfils what is wanted; returns it."""
        found = await self.eventually(f"/models/{model}", lambda model: holds(model["status"]["instances"][index]))
        return found["status"]["instances"][index]

    async def pids(self, model: str) -> list[int]:
        """The first processes of a model's engines."""
        resource = await self.get(f"/models/{model}")
        return [instance["pid"] for instance in resource["status"]["instances"]]

    async def counters_read(self, times: int, model: str = "chat") -> None:
        """Wait until the daemon has asked for the counters of a model's only engine so many times more."""
        (port,) = await self.ports(model)

        async def so_far() -> int:
            async with self.session.get(f"http://127.0.0.1:{port}/fake/seen") as answer:
                return sum(seen["path"] == "/metrics" for seen in await answer.json())

        before = await so_far()
        await until(so_far, lambda found: found >= before + times)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.process.wait()


class Notes(asyncio.DatagramProtocol):
    """What the daemon tells systemd."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.changed = asyncio.Event()

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Remember one message."""
        self.messages.append(data.decode())
        self.changed.set()

    @property
    def status(self) -> str:
        """The last STATUS."""
        found = [message for message in self.messages if message.startswith("STATUS=")]
        return found[-1].removeprefix("STATUS=") if found else ""

    async def until(self, wanted: str | Callable[[str], bool], process: Running, seconds: float) -> None:
        """Wait for a STATUS, or for READY=1 itself; an early end of the daemon is an error."""
        ended = asyncio.ensure_future(process.wait())
        try:
            async with asyncio.timeout(seconds):
                while not self._holds(wanted):
                    self.changed.clear()
                    change = asyncio.ensure_future(self.changed.wait())
                    await asyncio.wait({change, ended}, return_when=asyncio.FIRST_COMPLETED)
                    change.cancel()
                    assert not ended.done() or self._holds(wanted), f"the daemon ended with {ended.result()}"
        except TimeoutError:
            message = f"no {wanted} within {seconds} s, but {self.messages[-3:]}"
            raise AssertionError(message) from None
        finally:
            ended.cancel()

    def _holds(self, wanted: str | Callable[[str], bool]) -> bool:
        if callable(wanted):
            return wanted(self.status)
        return self.status == wanted or wanted in self.messages


def daemon(
    config: str,
    folder: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    below: Sequence[str] = (),
    pair: certificates.Pair | None = None,
    listens_on: int | None = None,
) -> contextlib.AbstractAsyncContextManager[Daemon]:
    """`vllm-proxy serve` with this configuration, ready for requests. `below`: a command that becomes it.

    `pair`: it speaks TLS, with this certificate. `listens_on`: one of its ports, where the configuration says them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.toml").write_text(textwrap.dedent(config), encoding="utf-8")
    return running_command(
        folder, "serve", "--config", str(folder / "models.toml"), *flags, env=env, below=below, pair=pair,
        listens_on=listens_on,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def running_command(
    folder: Path,
    command: str,
    *flags: str,
    env: dict[str, str] | None = None,
    seconds: float = WAIT_SECONDS,
    port: int | None = None,
    below: Sequence[str] = (),
    program: Sequence[str] = WATCHED,
    output: int | None = None,
    pair: certificates.Pair | None = None,
    listens_on: int | None = None,
) -> AsyncIterator[Daemon]:
    """A command that is a daemon, once it listens; it is stopped when the block ends. `program` runs the command.

    `below`: a command that becomes it. `output`: where it writes, a descriptor; None: to `daemon.log`. Where it is
    `serve` as all run it, and nothing is asked of its interpreter, it is forked from one that has imported all.
    `pair`, `listens_on`: as of `daemon`. The end fails where a callback held its event loop for longer than allowed.
    """
    port = listens_on or port or free_port()
    slow = folder / "slow_turns.txt"
    with tempfile.TemporaryDirectory() as short:
        loop = asyncio.get_running_loop()
        notes = Notes()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: notes, family=socket.AF_UNIX, local_addr=f"{short}/notify"
        )
        place = () if listens_on else ("--port", str(port))
        arguments = (command, *place, "--state-dir", str(folder / "state"), *flags)
        places = {"NOTIFY_SOCKET": f"{short}/notify", slow_turns.FILE: str(slow)}
        if pair is not None:
            places |= {"VLLM_PROXY_TLS_CERT": str(pair.certificate), "VLLM_PROXY_TLS_KEY": str(pair.key)}
        environment = {**clean_environment(), **places, **(env or {})}
        process: Running
        with (folder / "daemon.log").open("ab") as log:
            out = log.fileno() if output is None else output
            if command == "serve" and program in FORKED and not below and not _is_for_an_interpreter(env or {}):
                run = forks.Run(arguments, str(folder), environment, watched=program == WATCHED)
                process = forks.shared().start(run, out, out)
            else:
                process = await asyncio.create_subprocess_exec(
                    *below, *program, *arguments, env=environment, cwd=folder, stdout=out, stderr=out
                )
        running = Daemon(process, port, folder, notes, pair.trust() if pair else None)
        running.runtime_dir = Path(environment.get("RUNTIME_DIRECTORY", running.state_dir))
        try:
            await running.until("READY=1", seconds)
            yield running
        finally:
            await running.close()
            await running.stop()
            transport.close()
    assert not slow.exists(), f"a callback held the event loop for too long:\n{slow.read_text(encoding='utf-8')}"


async def vllm_proxy(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command beside the daemon of this folder; (exit status, stdout, stderr)."""
    run = forks.Run(
        [*arguments, "--state-dir", str(folder / "state")], str(folder), {**clean_environment(), **(env or {})}
    )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = forks.shared().start(run, out.fileno(), err.fileno())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                status = await process.wait()
        finally:
            process.send_signal(signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        return status, out.read().decode(), err.read().decode()


def _is_for_an_interpreter(env: Mapping[str, str]) -> bool:
    """Whether a process must have this environment from its very start."""
    return any(name.startswith(("PYTHON", "LD_", "LC_", "LANG")) for name in env)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would configure a daemon."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "APP_PORT", "STATE_DIR"))}


def lives(pid: int) -> bool:
    """Whether a process lives: what another process started, and is dead, stays a zombie where nobody reaps it."""
    found = look_up(pid)
    return found is not None and found.alive


def session_of(pid: int) -> set[int]:
    """The live processes of the session that `pid` leads or led."""
    found = (look_up(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {process.pid for process in found if process and process.session == pid and process.alive}


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came over the wire. `whole` is False where the connection ended inside it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool

    def all(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Client:
    """A client that sends what it is told to, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def peek(self, wanted: bytes) -> None:
        """Wait until this has come, and leave it there."""
        found = await self.reader.readuntil(wanted)
        self.reader._buffer[:0] = found  # type: ignore[attr-defined] # what a second reader would do

    async def answer(self, *, head: bool = False) -> Answer:
        """The next answer; `head`: to a HEAD request."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:] if line)]
        found = {name.lower(): value for name, value in headers}
        status = int(lines[0].split(" ")[1])
        body, whole = b"", True
        if not head and status >= 200 and status not in {204, 304}:
            body, whole = await self._body(found)
        return Answer(status, headers, body, whole)

    async def _body(self, headers: dict[str, str]) -> tuple[bytes, bool]:
        parts: list[bytes] = []
        try:
            if "chunked" in headers.get("transfer-encoding", ""):
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    parts.append(await self.reader.readexactly(size))
                    assert await self.reader.readexactly(2) == b"\r\n"
                await self.reader.readexactly(2)
            elif "content-length" in headers:
                parts.append(await self.reader.readexactly(int(headers["content-length"])))
            else:
                parts.append(await self.reader.read())
        except (asyncio.IncompleteReadError, ConnectionResetError) as error:
            partial = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
            return b"".join([*parts, partial]), False
        return b"".join(parts), True

    async def closed(self) -> bool:
        """Whether the daemon ends the connection, with nothing more in it."""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                return await self.reader.read(1) == b""
            except ConnectionResetError:
                return True

    def leave(self) -> None:
        """Be gone at once."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(
    place: int | Daemon, *, receive_buffer: int | None = None, limit: int = 2**26
) -> AsyncIterator[Client]:
    """A connection to a port, or to a daemon as its clients speak to it.

    `receive_buffer`, `limit`: bytes that are taken in without being asked for.
    """
    port, tls, unix = (place.port, place.tls, place.unix) if isinstance(place, Daemon) else (place, None, None)
    connection = socket.socket(socket.AF_INET if unix is None else socket.AF_UNIX)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(0)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port) if unix is None else str(unix))
    reader, writer = await asyncio.open_connection(
        sock=connection, limit=limit, ssl=tls, server_hostname="localhost" if tls else None
    )
    if isinstance(place, Daemon):
        writer.write(place.first)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def at_unix_socket(app: web.Application, path: Path) -> AsyncIterator[UnixAddress]:
    """A real HTTP server that listens at a Unix socket."""
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield UnixAddress(str(path))
    finally:
        await runner.cleanup()


def request(path: str, body: bytes, *lines: str, method: str = "POST", version: str = "1.1") -> bytes:
    """A request in bytes, with a length unless `lines` (more headers) say how the body is framed."""
    framed = any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines)
    head = [f"{method} {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json", *lines]
    if not framed:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


async def until[T](ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool]) -> T:
    """Ask again and again, until the answer fulfils what is wanted; returns it."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not holds(answer := await ask()):
            await asyncio.sleep(PAUSE_SECONDS)
    return answer


def memory(pid: int, field: str = "VmRSS") -> int:
    """A process's memory in bytes, as the kernel tells it. `VmHWM`: the most it ever was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024
