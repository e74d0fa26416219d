"""A client of a running daemon, through its control socket; for the commands in `control`.

A request may take as long as the daemon works on it. `/health` is polled meanwhile, so a daemon that hangs is a timeout
and one that died an error, each with a sentence for the user. Nothing is printed here.
"""

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from vllm_proxy.domain.resources import Problem
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.runtime.background import spawn
from vllm_proxy.settings import Settings, short_name

_ANSWER_SECONDS = 10.0  # longest for `/health`
_POLL_SECONDS = 2.0  # between two polls of a daemon that works on something
_LONGEST_LINE = 16 * 2**20  # of a text; more comes as the next line


class NoDaemonError(VllmProxyError):
    """No daemon listens."""


class LostError(VllmProxyError):
    """The daemon was there, and is gone."""


class CommandError(VllmProxyError):
    """The daemon refused, could not do it, or does not answer."""


class RefusedError(CommandError):
    """The daemon refuses its configuration file; `problems` as REST has them."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


class Connection:
    """A running daemon."""

    def __init__(self, session: aiohttp.ClientSession, place: Path) -> None:
        """`place`: of its socket, for messages."""
        self._session = session
        self._place = place

    async def verify(self) -> None:
        """Make sure that it is a daemon of ours, and answers.

        Raises:
            OSError: it cannot be connected to.
            CommandError: it does not answer, or is something else.

        """
        try:
            with self._translated_errors():
                await self._poll()
        except LostError as error:
            if isinstance(error.__cause__, aiohttp.ClientConnectorError):
                raise error.__cause__.os_error from error
            raise

    async def request(
        self, method: str, path: str, toml: bytes | None = None, *, json: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - JSON
        """The JSON answer to a request, without a body or with one in TOML or JSON.

        Raises:
            CommandError: with the daemon's own words; a `RefusedError` where it lists problems.
            LostError: it ended meanwhile.

        """
        body: dict[str, Any] = {}
        if toml is not None:
            body = {"data": toml, "headers": {"Content-Type": "application/toml"}}
        elif json is not None:
            body = {"json": json}
        with self._translated_errors():
            return await self._while_it_lives(self._request(method, path, body))

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of a text answer as they come, without their ends.

        Raises:
            CommandError: with the daemon's own words.
            LostError: it ended in the middle.

        """
        with self._translated_errors():
            answer = await self._while_it_lives(self._session.get(path))
        async with answer:
            with self._translated_errors():
                if answer.status >= 400:
                    raise _error(answer.status, await self._while_it_lives(answer.read()))
            rest = b""
            while True:
                with self._translated_errors():
                    chunk = await self._while_it_lives(answer.content.readany())
                if not chunk:
                    break
                *ended, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
                for line in ended:
                    yield line
                if len(rest) > _LONGEST_LINE:
                    yield rest
                    rest = b""
            if rest:
                yield rest

    async def _request(self, method: str, path: str, body: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
        async with self._session.request(method, path, **body) as answer:
            data = await answer.read()
            if answer.status >= 400:
                raise _error(answer.status, data)
            return json.loads(data)

    async def _poll(self) -> None:
        async with asyncio.timeout(_ANSWER_SECONDS), self._session.get("/health") as answer:
            health = json.loads(await answer.read())
        if not isinstance(health, dict) or not {"version", "models"} <= health.keys():
            raise ValueError("it is no health of a daemon")

    async def _while_it_lives[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which may take long; for as long as the daemon answers at all."""
        working = spawn(work, "an answer of the daemon")
        polling = spawn(self._keep_polling(), "whether the daemon lives")
        try:
            await asyncio.wait({working, polling}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                polling.result()  # raises
            return await working
        finally:
            working.cancel()
            polling.cancel()
            await asyncio.gather(working, polling, return_exceptions=True)

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._poll()

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translate errors of a connection into sentences for the user."""
        try:
            yield
        except TimeoutError as error:
            msg = (
                f"cannot get an answer of the daemon at {self._place} within {_ANSWER_SECONDS:g} s:"
                " it is stopped, hangs or is overloaded; see its log, or restart it"
            )
            raise CommandError(msg) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            msg = f"cannot go on: the daemon at {self._place} has ended meanwhile; its log says why"
            raise LostError(msg) from error
        except (aiohttp.ClientError, ValueError) as error:
            msg = f"cannot understand what answers at {self._place}: it is no vllm-proxy; end it, or remove its socket"
            raise CommandError(msg) from error


def _error(status: int, data: bytes) -> CommandError:
    """What an answer with an error says; a `ValueError` is raised where it is none of the daemon's."""
    try:
        error = json.loads(data)["error"]
        message, problems = str(error["message"]), error.get("problems")
    except (LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"an error of another kind, {status}") from problem
    return RefusedError(message, problems) if problems else CommandError(message)


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    """The daemon of these settings.

    Raises:
        NoDaemonError: when none listens.
        CommandError: when one may, and this user may not ask it, or it does not answer.

    """
    denied: list[Path] = []
    for place in settings.sockets:
        async with contextlib.AsyncExitStack() as stack:
            try:
                connection = await _connect(place, stack)
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
    msg = f"cannot reach a daemon: none listens on {settings.control_socket}; is --state-dir the daemon's?"
    raise NoDaemonError(msg)


def _is_socket(place: Path) -> bool:
    return stat.S_ISSOCK(place.stat().st_mode)


async def _connect(place: Path, stack: contextlib.AsyncExitStack) -> Connection | None:
    """The daemon that listens on a socket; None where there is none, or a daemon that was killed has left it."""
    try:
        if not _is_socket(place):
            return None
        name = stack.enter_context(short_name(place))
    except (FileNotFoundError, NotADirectoryError):
        return None
    session = aiohttp.ClientSession(
        "http://localhost", connector=aiohttp.UnixConnector(name), timeout=aiohttp.ClientTimeout(total=None)
    )
    connection = Connection(await stack.enter_async_context(session), place)
    try:
        await connection.verify()
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    return connection
