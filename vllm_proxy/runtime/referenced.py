"""Reads the files that references of the configuration name: key files, credentials of systemd."""

from collections.abc import Container
from pathlib import Path

from vllm_proxy.domain import references
from vllm_proxy.runtime.regular_file import read_regular_file


class ReferencedFiles:
    """References from one configuration file."""

    def __init__(
        self,
        folder: Path,
        credentials: str | None,
        *,
        in_service: bool = True,
        only: Container[str] | None = None,
    ) -> None:
        """`folder`: of the configuration file; `credentials`: $CREDENTIALS_DIRECTORY.

        `in_service`: credentials must be there. A command in somebody's shell has none, and can do without. `only`:
        the references that are followed, None: all.
        """
        self._folder = folder
        self._credentials = credentials
        self._in_service = in_service
        self._only = only

    def outside_service(self) -> "ReferencedFiles":
        """The same, for a command in somebody's shell."""
        return ReferencedFiles(self._folder, self._credentials, in_service=False)

    def limited_to(self, references: Container[str]) -> "ReferencedFiles":
        """The same, for a text of somebody who may not have any other file looked at."""
        return ReferencedFiles(self._folder, self._credentials, in_service=self._in_service, only=references)

    def is_elsewhere(self, text: str) -> bool:
        """Whether it is a credential, which the service has and this process has not; or not to be looked at."""
        if self._only is not None and text not in self._only:
            return True
        return not self._in_service and not self._credentials and references.is_credential(text)

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
