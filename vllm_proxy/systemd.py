"""What systemd and the daemon tell each other. Without systemd all of it is silence. It knows nothing of the rest.

The words are those of sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3); the messages go through the
`sdnotify` package. Its one rule: what this process was told is for this process, and only once.
"""

import asyncio
import math
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

import sdnotify

from vllm_proxy.errors import StartupError

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_EXTENSION_SECONDS = 30.0
_PATIENCE_SECONDS = 1.0  # with a systemd that takes no messages; for those that it waits for


class Systemd:
    """The notification socket, and the watchdog behind it."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier() if "NOTIFY_SOCKET" in os.environ else None
        self._status = ""

    def ready(self) -> None:
        """The sockets listen and a configuration is accepted."""
        self._tell("READY=1", awaited=True)

    def reloading(self) -> None:
        """The configuration is read again; `ready` follows, whatever becomes of it."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", awaited=True)

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._tell("STOPPING=1", awaited=True)

    def status(self, sentence: str) -> None:
        """What `systemctl status` shows; told only when it changes."""
        if sentence != self._status:
            self._status = sentence
            self._tell(f"STATUS={sentence}")

    async def beat(self) -> None:
        """Say that the event loop runs, twice in the time that the watchdog allows, until cancelled."""
        seconds = watchdog_seconds(os.environ)
        while seconds is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(seconds / 2)

    async def extend(self, seconds: float) -> None:
        """Ask for more time to stop in, again and again, for `seconds` at most or until cancelled."""
        every = _EXTENSION_SECONDS / 3
        for _ in range(math.ceil(seconds / every)):  # counted, not timed: a machine that stood still has not used it up
            self._tell(f"EXTEND_TIMEOUT_USEC={round(_EXTENSION_SECONDS * 1_000_000)}")
            await asyncio.sleep(every)

    def _tell(self, message: str, *, awaited: bool = False) -> None:
        """Send it. A systemd whose queue is full must not hold up the event loop: what comes again is dropped."""
        if self._notifier is not None and self._notifier.socket is not None:
            self._notifier.socket.settimeout(_PATIENCE_SECONDS if awaited else 0)
            self._notifier.notify(message)


def watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """How long the event loop may be silent; None: nobody listens."""
    try:
        microseconds = int(environ["WATCHDOG_USEC"])
        meant = int(environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return microseconds / 1_000_000 if microseconds > 0 and meant == os.getpid() else None


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd holds for this process. The variables that told of them are removed.

    Raises:
        StartupError: when one of them is no listening stream socket.

    """
    try:
        count, meant = int(environ["LISTEN_FDS"]), int(environ["LISTEN_PID"])
    except (KeyError, ValueError):
        return []
    if meant != os.getpid():  # a parent's
        return []
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    return [_listener(descriptor) for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count)]


def _listener(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        msg = f"cannot use the inherited descriptor {descriptor}: {error.strerror}"
        raise StartupError(msg) from error
    if listener.type != socket.SOCK_STREAM or listener.family not in _FAMILIES or not listens:
        listener.close()
        expected = "only listening stream sockets, TCP or Unix (ListenStream=, without Accept=)"
        msg = f"cannot use the inherited descriptor {descriptor}: {expected}"
        raise StartupError(msg)
    listener.set_inheritable(False)
    return listener
