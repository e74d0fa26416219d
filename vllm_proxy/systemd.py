"""What the daemon tells systemd, through the `sdnotify` package. Without `NOTIFY_SOCKET` all of it is silence."""

import os
import time

import sdnotify


class Systemd:
    """The notification socket."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier() if "NOTIFY_SOCKET" in os.environ else None
        self._status = ""

    def ready(self) -> None:
        """The sockets listen and a configuration is accepted."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is read again; `ready` follows, whatever becomes of it."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._tell("STOPPING=1")

    def status(self, sentence: str) -> None:
        """What `systemctl status` shows; told only when it changes."""
        if sentence != self._status:
            self._status = sentence
            self._tell(f"STATUS={sentence}")

    def _tell(self, letter: str) -> None:
        if self._notifier is not None:
            self._notifier.notify(letter)
