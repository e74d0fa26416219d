"""References: texts in the file that name another file, whose content does not stand in the configuration.

"credential:NAME" is a systemd credential, `$CREDENTIALS_DIRECTORY/NAME`; everything else is a path, a relative one
from the folder of the configuration file. Which file is meant is decided here; reading it is up to the caller.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_CREDENTIAL = "credential:"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")  # systemd.exec(5): a file's name


def reference(text: str) -> str:
    """The text of a reference, once it is known to be one.

    Raises:
        ValueError: it is none, with what was expected.

    """
    if not text or "\0" in text:
        raise ValueError("expected the path of a file")
    if text.startswith(_CREDENTIAL):
        name = text.removeprefix(_CREDENTIAL)
        if not _NAME.fullmatch(name) or name in {".", ".."}:
            raise ValueError(
                "expected the name of a systemd credential: letters, digits and . _ -"
            )  # it may be the key
    return text


def is_credential(text: str) -> bool:
    """Whether a reference names a credential, which nobody can write."""
    return text.startswith(_CREDENTIAL)


def resolve(text: str, folder: Path, credentials: str | None) -> Path:
    """The file that a reference means. `folder`: of the configuration file; `credentials`: $CREDENTIALS_DIRECTORY.

    Raises:
        FileNotFoundError: there are no credentials.

    """
    if not is_credential(text):
        return folder / text
    if not credentials:
        raise FileNotFoundError(2, f"the service has no credentials: {text} needs LoadCredential= in its unit")
    return Path(credentials, text.removeprefix(_CREDENTIAL))


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """What is in the folder of a LoRA adapter."""

    revision: str = ""  # of the names, sizes and times of its files; "": there is no folder
    config: bytes | None = None  # its `adapter_config.json`; None: it cannot be read
    problem: str | None = None  # why that is so, for people
    has_place: bool = False  # whether the folder is there in which it would be

    @property
    def is_there(self) -> bool:
        """Whether there is a folder at all."""
        return bool(self.revision)


class Files(Protocol):
    """What reads references."""

    def read(self, text: str) -> bytes:
        """The content of the file that a reference names.

        Raises:
            OSError: as it comes, with a `strerror` for people.

        """

    def place(self, text: str) -> str:
        """Which file that is, for people."""

    def is_elsewhere(self, text: str) -> bool:
        """Whether it is not read here and that is no problem, as of a credential, which the service alone has."""

    def adapter(self, text: str) -> AdapterFolder:
        """What is in the folder that a path names."""

    def may_lack(self, text: str) -> bool:
        """Whether that an adapter cannot be read is up to its model, and no problem of the configuration."""


class NoFiles:
    """Where a text is parsed for itself: no file can be read."""

    def read(self, text: str) -> bytes:
        """Nothing.

        Raises:
            FileNotFoundError: always.

        """
        raise FileNotFoundError(2, f"{text} is not there")

    def place(self, text: str) -> str:
        """The reference itself."""
        return text

    def is_elsewhere(self, _text: str) -> bool:
        """Nothing is."""
        return False

    def adapter(self, _text: str) -> AdapterFolder:
        """There is none."""
        return AdapterFolder()

    def may_lack(self, _text: str) -> bool:
        """Nobody knows what there is."""
        return True
