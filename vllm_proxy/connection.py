"""A client of a running daemon, through its control socket; for the commands.

A request may take as long as the daemon works on it. `/health` is polled meanwhile, so a daemon that hangs is a timeout
and one that died an error, each with a sentence for the user. Nothing is printed here. Python's own HTTP client, since
aiohttp takes longer to import than most commands to run.
"""

import contextlib
import http.client
import json
import socket
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from vllm_proxy.errors import CommandError, LostError, NoDaemonError, Problem, RefusedError
from vllm_proxy.places import short_name

_ANSWER_SECONDS = 10.0  # longest for `/health`
_POLL_SECONDS = 2.0  # between two polls of a daemon that works on something
_LONGEST_LINE = 16 * 2**20  # of a text; more comes as the next line
_CHUNK = 2**16


class Reachable(Protocol):
    """Where a daemon may listen for commands: `Places`, or `Settings`."""

    @property
    def control_socket(self) -> Path:
        """Where one of these settings would."""

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Where to look, in this order."""


class _Http(http.client.HTTPConnection):
    """One request to a Unix socket. `seconds`: how long the daemon may be silent; None: for ever."""

    def __init__(self, name: str, seconds: float | None) -> None:
        super().__init__("localhost")
        self._name = name
        self._seconds = seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A connect(2) to a Unix socket ignores Python's timeout: it is refused at once where the queue is full.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_ANSWER_SECONDS), 0))
        try:
            self.sock.connect(self._name)
        except BlockingIOError:
            raise TimeoutError from None
        self.sock.settimeout(self._seconds)


class Connection:
    """A running daemon."""

    def __init__(self, name: str, place: Path) -> None:
        """`name`: of its socket; `place`: its path, for messages."""
        self._name = name
        self._place = place

    def verify(self) -> None:
        """Make sure that it is a daemon of ours, and answers.

        Raises:
            OSError: it cannot be connected to.
            CommandError: it does not answer, or is something else.
            LostError: it ended meanwhile.

        """
        connection = _Http(self._name, _ANSWER_SECONDS)
        try:
            connection.connect()
        except TimeoutError as error:
            raise self._no_answer() from error
        with self._translated_errors():
            _check_health(connection)

    def request(
        self,
        method: str,
        path: str,
        toml: bytes | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> Any:  # noqa: ANN401 - JSON
        """The JSON answer to a request, without a body or with one in TOML or JSON.

        `expected`: an error's status that is an answer here.

        Raises:
            CommandError: with the daemon's own words; a `RefusedError` where it lists problems.
            LostError: it ended meanwhile.

        """
        kind, data = ("application/toml", toml) if body is None else ("application/json", json.dumps(body).encode())
        headers = {} if data is None else {"Content-Type": kind}
        with self._answer(method, path, data, headers) as answer:
            found = answer.read()
            if answer.status >= 400 and answer.status != expected:
                raise _error(answer.status, found)
            return json.loads(found) if found else None

    def lines(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The lines of a text answer as they come, without their ends.

        Raises:
            CommandError: with the daemon's own words.
            LostError: it ended in the middle.

        """
        with self._answer("GET", path, None, headers or {}) as answer:
            if answer.status >= 400:
                raise _error(answer.status, answer.read())
            rest = b""
            while chunk := answer.read1(_CHUNK):
                *ended, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
                yield from ended
                if len(rest) > _LONGEST_LINE:
                    yield rest
                    rest = b""
            if rest:
                yield rest

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, for as long as the daemon answers at all."""
        connection = _Http(self._name, None)
        with contextlib.closing(connection), self._translated_errors():
            connection.connect()
            with self._polled(connection.sock):
                connection.request(method, path, data, {**headers, "Connection": "close"})
                with connection.getresponse() as answer:
                    yield answer

    @contextlib.contextmanager
    def _polled(self, connection: socket.socket) -> Iterator[None]:
        """End a connection once the daemon does not answer any more."""
        done = threading.Event()
        failures: list[Exception] = []

        def poll() -> None:
            while not done.wait(_POLL_SECONDS):
                try:
                    _check_health(_Http(self._name, _ANSWER_SECONDS))
                except (ConnectionError, FileNotFoundError):  # it stops in order, or has died: the answer will end
                    continue
                except Exception as error:  # noqa: BLE001 - raised below
                    failures.append(error)
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                    return

        threading.Thread(target=poll, daemon=True).start()
        try:
            yield
        except (OSError, http.client.HTTPException):
            if not failures:
                raise
        finally:
            done.set()
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translate errors of a connection into sentences for the user."""
        try:
            yield
        except TimeoutError as error:
            raise self._no_answer() from error
        except (ConnectionError, FileNotFoundError, http.client.IncompleteRead) as error:
            msg = f"cannot go on: the daemon at {self._place} has ended meanwhile; its log says why"
            raise LostError(msg) from error
        except (http.client.HTTPException, ValueError) as error:
            msg = f"cannot understand what answers at {self._place}: it is no vllm-proxy; end it, or remove its socket"
            raise CommandError(msg) from error

    def _no_answer(self) -> CommandError:
        return CommandError(
            f"cannot get an answer of the daemon at {self._place} within {_ANSWER_SECONDS:g} s:"
            " it is stopped, hangs or is overloaded; see its log, or restart it"
        )


def _check_health(connection: _Http) -> None:
    with contextlib.closing(connection):
        connection.request("GET", "/health", headers={"Connection": "close"})
        with connection.getresponse() as answer:
            health = json.loads(answer.read())
    if not isinstance(health, dict) or not {"version", "models"} <= health.keys():
        raise ValueError("it is no health of a daemon")


def _error(status: int, data: bytes) -> CommandError:
    """What an answer with an error says; a `ValueError` is raised where it is none of the daemon's."""
    try:
        error = json.loads(data)["error"]
        message, problems = str(error["message"]), error.get("problems")
        return RefusedError(message, [Problem(**each) for each in problems]) if problems else CommandError(message)
    except (LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"an error of another kind, {status}") from problem


def path_of(model_id: str) -> str:
    """The path of a model; the id may hold any bytes."""
    return f"/models/{quote(model_id, safe='', errors='surrogateescape')}"


def file_of(daemon: Connection) -> str:
    """Which configuration file a daemon follows."""
    return str(daemon.request("GET", "/health")["config"].get("file", "the daemon's file"))


@contextlib.contextmanager
def connected(places: Reachable) -> Iterator[Connection]:
    """The daemon of these places.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when one may, and this user may not ask it, or it does not answer.

    """
    denied: list[Path] = []
    for place in places.sockets:
        with contextlib.ExitStack() as stack:
            try:
                connection = _connect(place, stack)
            except PermissionError:
                denied.append(place)
                continue
            if connection is not None:
                yield connection
                return
    if denied:
        msg = (
            f"permission denied: cannot reach a daemon at {' or '.join(map(str, denied))},"
            " which its own user alone may; run it with sudo, or name another daemon's --state-dir"
        )
        raise CommandError(msg)
    looked = " nor on ".join(map(str, places.sockets))
    msg = f"cannot reach a daemon: none listens on {looked}; is it running, or does --state-dir name another?"
    raise NoDaemonError(msg)


def _is_socket(place: Path) -> bool:
    return stat.S_ISSOCK(place.stat().st_mode)


def _connect(place: Path, stack: contextlib.ExitStack) -> Connection | None:
    """The daemon that listens on a socket; None where there is none, or a daemon that was killed has left it."""
    try:
        if not _is_socket(place):
            return None
        name = stack.enter_context(short_name(place))
    except (FileNotFoundError, NotADirectoryError):
        return None
    connection = Connection(name, place)
    try:
        connection.verify()
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    return connection
