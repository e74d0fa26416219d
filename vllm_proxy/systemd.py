"""The protocol between systemd and the daemon: readiness, status, watchdog, stop timeout, socket activation.

Implements sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3) with the package `sdnotify`; without systemd every
call does nothing. Variables that are meant for another process are ignored, and those of socket activation are removed
once they are read. Knows nothing of models or requests.
"""

import asyncio
import math
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

import sdnotify
import structlog

from vllm_proxy.errors import StartupError

log = structlog.get_logger()

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_EXTENSION_SECONDS = 30.0
_LONGEST = 4095  # bytes; of a message that is longer systemd takes nothing
_SEND_SECONDS = 1.0  # for messages that systemd waits for, where its queue is full


class Systemd:
    """The notification socket, and the watchdog behind it."""

    def __init__(self) -> None:
        self._notifier: sdnotify.SystemdNotifier | None = None
        self._status = ""
        if address := os.environ.get("NOTIFY_SOCKET"):
            try:
                self._notifier = sdnotify.SystemdNotifier(debug=True)  # else it hides what it could not send
            except OSError as error:
                log.error("systemd cannot be told that the daemon runs", socket=address, why=str(error))

    def ready(self) -> None:
        """The sockets listen and a configuration is accepted."""
        self._send("READY=1", wait=True)

    def reloading(self) -> None:
        """The configuration is read again; `ready` follows, whatever becomes of it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", wait=True)

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._send("STOPPING=1", wait=True)

    def status(self, sentence: str) -> bool:
        """What `systemctl status` shows, on one line; sent only when it changes. False: systemd's queue is full."""
        line = "".join(one if one.isprintable() else " " for one in sentence)  # a second line would be an assignment
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line
        return line == self._status

    async def ping_watchdog(self) -> None:
        """Report that the event loop runs, twice in each period of the watchdog, until cancelled."""
        seconds = watchdog_seconds(os.environ)
        while seconds is not None:
            self._send("WATCHDOG=1")
            await asyncio.sleep(seconds / 2)

    async def extend(self, seconds: float) -> None:
        """Ask for more time to stop in, again and again, for `seconds` at most or until cancelled."""
        every = _EXTENSION_SECONDS / 3
        for _ in range(math.ceil(seconds / every)):  # counted, not timed: a freeze of the machine does not use it up
            self._send(f"EXTEND_TIMEOUT_USEC={round(_EXTENSION_SECONDS * 1_000_000)}")
            await asyncio.sleep(every)

    def _send(self, message: str, *, wait: bool = False) -> bool:
        """Send it, or drop it where systemd's queue is full, as the event loop must not block: False then."""
        if self._notifier is None:
            return True
        self._notifier.socket.settimeout(_SEND_SECONDS if wait else 0)
        try:
            encoded = message.encode(errors="replace")[:_LONGEST].decode(errors="ignore").encode()
            self._notifier.notify(encoded.decode("latin-1"))  # `sdnotify` encodes it so, where systemd takes UTF-8
        except (BlockingIOError, TimeoutError):
            if wait:
                log.error("systemd takes no messages", message=message.partition("\n")[0])
            return False
        except OSError as error:  # as it is too long, or nobody listens any more
            log.debug("systemd was not told", why=error.strerror)
        return True


def watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """The watchdog's period; None: there is no watchdog."""
    try:
        microseconds = int(environ["WATCHDOG_USEC"])
        meant = int(environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return microseconds / 1_000_000 if microseconds > 0 and meant == os.getpid() else None


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd holds for this process. Its variables are removed.

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
