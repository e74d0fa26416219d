"""Reads what references of the configuration name: key files, credentials of systemd, folders of adapters."""

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_proxy.domain import references
from vllm_proxy.domain.references import AdapterFolder
from vllm_proxy.runtime.regular_file import read_regular_file
from vllm_proxy.runtime.watched_files import adapter_folder


@dataclass(frozen=True, slots=True)
class ReferencedFiles:
    """References from one configuration file.

    `folder`: of that file. `credentials`: $CREDENTIALS_DIRECTORY. `in_service`: credentials must be there; a command in
    somebody's shell has none, and can do without. `only`: the references that are followed, None: all. `lacks`: the
    adapters that may be missing or unreadable, None: all.
    """

    folder: Path
    credentials: str | None
    in_service: bool = True
    only: Container[str] | None = None
    lacks: Container[str] | None = ()

    def outside_service(self) -> "ReferencedFiles":
        """The same, for a command in somebody's shell."""
        return replace(self, in_service=False)

    def limited_to(self, references: Container[str]) -> "ReferencedFiles":
        """The same, for a text of somebody who may not have any other file looked at."""
        return replace(self, only=references)

    def lenient(self, known: Container[str] | None = None) -> "ReferencedFiles":
        """The same, where adapters that are known, or all of them, may be missing: a broken one costs nothing else."""
        return replace(self, lacks=known)

    def may_lack(self, text: str) -> bool:
        """Whether that an adapter cannot be read is no problem of the configuration."""
        return self.lacks is None or text in self.lacks

    def adapter(self, text: str) -> AdapterFolder:
        """What is in the folder that a path names."""
        return adapter_folder(self.folder / text)

    def is_elsewhere(self, text: str) -> bool:
        """Whether it is a credential, which the service has and this process has not; or not to be looked at."""
        if self.only is not None and text not in self.only:
            return True
        return not self.in_service and not self.credentials and references.is_credential(text)

    def path(self, text: str) -> Path:
        """Which file is meant.

        Raises:
            FileNotFoundError: it names a credential, and the service has none.

        """
        return references.resolve(text, self.folder, self.credentials)

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
