"""What the daemon tells systemd, through the `sdnotify` package. Without `NOTIFY_SOCKET` all of it is silence."""

import sdnotify


class Systemd:
    """The notification socket."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        self._status = ""

    def ready(self) -> None:
        """The sockets listen and a configuration is accepted."""
        self._notifier.notify("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to stop."""
        self._notifier.notify("STOPPING=1")

    def status(self, sentence: str) -> None:
        """What `systemctl status` shows; told only when it changes."""
        if sentence != self._status:
            self._status = sentence
            self._notifier.notify(f"STATUS={sentence}")
