"""Changes of the configuration, and of the file that it names as `server.keys_file`: made, and shown to be valid.

What is on disk is read, edited and parsed, both files together; only then a change is there to be written. For the
daemon's own turn (`desired`), and for the commands where no daemon runs. Everything here blocks.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from vllm_proxy.domain import references
from vllm_proxy.domain.config import Config, fingerprint, revision_of
from vllm_proxy.domain.file.edit import EditError, tables_in
from vllm_proxy.domain.file.edit_keys import KeyTexts
from vllm_proxy.domain.references import AdapterFolder, Files
from vllm_proxy.errors import ConfigError, Problem, RequestError
from vllm_proxy.fleet.store import Store
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.regular_file import is_missing

type Edit = Callable[[bytes], bytes]  # called in a thread
type KeyEdit = Callable[[KeyTexts], KeyTexts]  # called in a thread


@dataclass(frozen=True, slots=True)
class Change:
    """A file as it is and as it is to be, and what the configuration means then."""

    store: Store
    before: bytes | None  # None: it is not there
    after: bytes
    config: Config
    was: str  # the revision that a writer insists on: before, and after
    now: str

    def write(self) -> None:
        """Have it on disk.

        Raises:
            RequestError: `config_read_only`, `config_not_written` or `revision_mismatch`; nothing has changed then.

        """
        if self.after != self.before:
            self.store.replace(self.after, self.before or b"")


def read(store: Store) -> bytes:
    """The bytes of the configuration.

    Raises:
        ConfigError: it cannot be read.

    """
    try:
        return store.read()
    except OSError as error:
        hint = "; let the user of the daemon read it" if isinstance(error, PermissionError) else ""
        raise ConfigError(str(store.file), [Problem(0, "", f"cannot read it: {error.strerror}{hint}")]) from None


def edited(
    store: Store, parse: Callable[[bytes], Config], edit: Edit, if_match: str | None, *, adopted: str | None
) -> Change:
    """What an edit makes of the configuration.

    `if_match`: only if that is its revision; None: in any case. `adopted`: the revision that is known to be valid;
    None: whatever is there does not matter, and it may be missing.

    Raises:
        ConfigError: when it would be invalid, or is and cannot be edited.
        RequestError: `revision_mismatch`, or what `edit` raises.

    """
    before = b"" if adopted is None and is_missing(store.file) else read(store)
    if adopted not in {None, revision_of(before)}:
        parse(before)  # what is wrong with it already is reported as such
    if if_match is not None and if_match != (revision := revision_of(before)):
        msg = f"cannot write {store.file}: it is at revision {revision} now; read it again"
        raise RequestError("revision_mismatch", msg)
    after = edit(before)
    config = parse(after)
    return Change(store, before, after, config, revision_of(before), config.revision)


class KeyFiles:
    """The files in which the keys of one configuration stand."""

    def __init__(
        self,
        store: Store,
        parse: Callable[[bytes, Files], Config],
        files: ReferencedFiles,
        keys_file: str | None = None,
    ) -> None:
        """`parse`: what bytes of the configuration mean. `keys_file`: what the environment says of it."""
        self._store = store
        self._parse = parse
        self._files = files.lenient()
        self._keys_file = keys_file

    def change(self, edit: KeyEdit, if_match: str | None = None) -> Change:
        """What an edit makes of what is on disk.

        `if_match`: only if that is the revision of both files together; None: in any case.

        Raises:
            ConfigError: when a file would be invalid, or is and cannot be edited.
            RequestError: `revision_mismatch`, `config_read_only`, or what `edit` raises.

        """
        config, reference, keys = self._read()
        there = self._with(reference, keys or b"")  # one that is missing counts as empty: a new key makes it
        revision = revision_of(config)
        if reference is not None:
            revision = fingerprint([revision, "" if keys is None else revision_of(keys)])
        if if_match not in {None, revision}:
            msg = f"cannot write keys: they are at revision {revision} now; read them again"
            raise RequestError("revision_mismatch", msg)
        try:
            before = KeyTexts(config.decode(), None if reference is None else (keys or b"").decode())
            after = edit(before)
            if after.keys_file == before.keys_file:
                text = after.config.encode()
                found = self._parse(text, self._files if keys is None else there)
                return Change(self._store, config, text, found, revision, found.keys_revision)
            assert reference is not None, "there was a text to be changed"
            assert after.keys_file is not None, "and it is still there"
            text = after.keys_file.encode()
            found = self._parse(config, self._with(reference, text))
            return Change(self._store_of(reference), keys, text, found, revision, found.keys_revision)
        except (ConfigError, RequestError, EditError, UnicodeDecodeError):
            self._parse(config, there)  # what is wrong with it already is reported as such
            raise

    def _read(self) -> tuple[bytes, str | None, bytes | None]:
        """The configuration, what it calls the keys file, and that; None where it is not there."""
        config = read(self._store)
        reference = self._keys_file
        if reference is None:
            with contextlib.suppress(EditError, UnicodeDecodeError):  # it is no TOML, which the parser says better
                reference = tables_in(config.decode(), "server").get("keys_file")
        if not isinstance(reference, str):
            return config, None, None
        try:
            return config, reference, self._files.read(references.reference(reference))
        except ValueError:  # as above
            return config, None, None
        except FileNotFoundError:
            return config, reference, None
        except OSError as error:
            place = self._files.place(reference)
            problem = Problem(0, "server.keys_file", f"cannot read {place}: {error.strerror}")
            raise ConfigError(str(self._store.file), [problem]) from None

    def _with(self, reference: str | None, data: bytes) -> Files:
        return self._files if reference is None else _Replaced(self._files, reference, data)

    def _store_of(self, reference: str) -> Store:
        if references.is_credential(reference):
            msg = f"cannot write {reference}: nobody can write a service's credential; change it where it comes from"
            raise RequestError("config_read_only", msg)
        return Store(self._files.path(reference), owner_of=self._store.file)


class _Replaced:
    """Files of which one has another content."""

    def __init__(self, files: Files, reference: str, data: bytes) -> None:
        self._files = files
        self._reference = reference
        self._data = data

    def read(self, text: str) -> bytes:
        """As they are, but for the one."""
        return self._data if text == self._reference else self._files.read(text)

    def place(self, text: str) -> str:
        """Which file that is, for people."""
        return self._files.place(text)

    def is_elsewhere(self, text: str) -> bool:
        """Whether it cannot be read here, and that is no problem."""
        return text != self._reference and self._files.is_elsewhere(text)

    def adapter(self, text: str) -> AdapterFolder:
        """As it is."""
        return self._files.adapter(text)

    def may_lack(self, text: str) -> bool:
        """As it is."""
        return self._files.may_lack(text)
