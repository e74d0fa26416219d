"""Reads the files that references of the configuration name: key files, credentials of systemd."""

from pathlib import Path

from vllm_proxy.domain import references
from vllm_proxy.runtime.regular_file import read_regular_file


class ReferencedFiles:
    """References from one configuration file."""

    def __init__(self, folder: Path, credentials: str | None) -> None:
        """`folder`: of the configuration file; `credentials`: $CREDENTIALS_DIRECTORY."""
        self._folder = folder
        self._credentials = credentials

    def path(self, text: str) -> Path:
        """Which file is meant.

        Raises:
            FileNotFoundError: it names a credential, and the service has none.

        """
        return references.resolve(text, self._folder, self._credentials)

    def read(self, text: str) -> bytes:
        """Its content.

        Raises:
            OSError: as it comes, with a `strerror` for people.

        """
        return read_regular_file(self.path(text))

    def place(self, text: str) -> str:
        """Which file that is, for people."""
        try:
            return str(self.path(text))
        except OSError:
            return text
