"""Parses `[keys.*]`, of the configuration and of the file that `server.keys_file` names.

No message repeats what stands in a key's table: somebody may have pasted the key itself.
"""

from collections.abc import Iterable, Mapping

from vllm_proxy.domain import secrets
from vllm_proxy.domain.config import TomlTable, revision_of
from vllm_proxy.domain.file.locate import key_lines, line_of
from vllm_proxy.domain.file.read import read_toml, unusable
from vllm_proxy.domain.file.validate import Found, validate
from vllm_proxy.domain.key_table import KeyTable, RateTable
from vllm_proxy.domain.keys import (
    ANONYMOUS,
    HASH_PREFIX,
    RESERVED,
    Key,
    Source,
    closure,
    digest,
    name_problem,
    own_key_problem,
)
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.references import Files
from vllm_proxy.domain.secrets import kind_of
from vllm_proxy.domain.toml import dotted
from vllm_proxy.errors import ConfigError, Problem

_NEITHER = "missing: every key needs a hash, or a file that holds the key; `vllm-proxy keys new` makes one"
_BOTH = "expected either a hash, or a file that holds the key, not both"
_FIRST_LINE = "the first line of that file:"  # not its name: somebody may have pasted the key itself there
_NO_HASH = "this is for who sends no key, so it takes neither hash nor file"


class KeyTables:
    """The keys of one configuration, as they are found. `attached`: the files that were read for them."""

    def __init__(self, files: Files, given: Iterable[Key]) -> None:
        """`given`: from outside of the file."""
        self.found: dict[str, Key] = {key.name: key for key in given}
        self.attached: dict[str, str] = {}  # reference -> revision; "" where it cannot be read
        self._files = files
        self._holders = {one: key.name for key in self.found.values() for one in key.digests}
        self._in_config: set[str] = set()  # names of tables in the configuration itself

    def add(self, document: TomlTable) -> list[Found]:
        """The keys of the configuration itself; returns what is wrong with them."""
        self._in_config = set(tables) if isinstance(tables := document.get("keys", {}), Mapping) else set()
        return self._add(document, "file")

    def add_file(self, reference: str, config: str, found: list[Found]) -> list[Problem]:
        """The keys of `server.keys_file`; returns what is wrong in it, and adds to `found` that it cannot be read.

        `config`: the configuration's name.
        """
        if self._files.is_elsewhere(reference):
            return []
        place = self._files.place(reference)
        data = self._read(reference)
        if isinstance(data, OSError):
            hint = (
                "; put it back, or `vllm-proxy keys new` begins an empty one"
                if isinstance(data, FileNotFoundError)
                else ""
            )
            found.append((("server", "keys_file"), f"cannot read {place}: {data.strerror}{hint}"))
            return []
        try:
            text, document = read_toml(data, place, hides_values=True)
        except ConfigError as error:
            return [Problem(item.line, item.path, item.message, place) for item in error.problems]
        wrong: list[Found] = [
            ((key,), "expected tables [keys.NAME] alone: everything else belongs into the configuration")
            for key in document
            if key != "keys"
        ]
        if unusables := list(unusable(document)):
            wrong += unusables
        else:
            tables = document.get("keys", {})
            twice = self._in_config & set(tables) if isinstance(tables, Mapping) else set()
            wrong += [(("keys", name), f"it is in {config} too: a key stands in one of the two") for name in twice]
            wrong += self._add(document, "keys_file")
        lines = key_lines(text)
        return [
            Problem(line_of(lines, path), dotted(secrets.shown_path(path)), message, place) for path, message in wrong
        ]

    def _add(self, document: TomlTable, source: Source) -> list[Found]:
        tables = document.get("keys", {})
        if not isinstance(tables, Mapping):
            return [(("keys",), f"expected tables [keys.NAME], got {kind_of(tables)}")]
        found: list[Found] = []
        for name, table in tables.items():
            path = ("keys", name)
            if problem := name_problem(name):
                found.append((path, problem))
            elif not isinstance(table, Mapping):
                found.append((path, f"expected a table: write [{dotted(path)}]"))
            elif valid := validate(KeyTable, table, path, wrong := list[Found]()):
                self._add_one(name, valid, source, found)
            else:  # one hash without a list has no number
                one = isinstance(table.get("hash"), str)
                found += [(at[:3] if one and at[2:3] == ("hash",) else at, message) for at, message in wrong]
        return found

    def _add_one(self, name: str, table: KeyTable, source: Source, found: list[Found]) -> None:
        path = ("keys", name)
        digests: tuple[bytes, ...] = ()
        if name == ANONYMOUS:
            found += [((*path, key), _NO_HASH) for key in ("hash", "file") if getattr(table, key) is not None]
        elif table.hash is not None and table.file is not None:
            found.append(((*path, "file"), _BOTH))
        elif table.hash is not None:
            digests = tuple(bytes.fromhex(text.removeprefix(HASH_PREFIX)) for text in table.hash)
        elif table.file is not None:
            digests = self._of_file(name, table.file, found)
        else:
            found.append((path, _NEITHER))
        where = "hash" if table.hash is not None else "file"
        for one in digests:
            holder = self._holders.setdefault(one, name)
            if holder != name or digests.count(one) > 1:
                by = f"that {RESERVED[holder]} gives" if holder in RESERVED else f"of {dotted(('keys', holder))}"
                found.append(((*path, where), f"this is the key {by} already"))
        self.found[name] = Key(
            name,
            digests,
            closure(table.scopes),
            table.models,
            table.enabled,
            None if table.expires_at is None else table.expires_at.timestamp(),
            table.isolate_cache,
            table.description,
            source,
            table.file,
            _limits(table),
        )

    def _of_file(self, name: str, reference: str, found: list[Found]) -> tuple[bytes, ...]:
        """The hash of the key that a file holds in its first line."""
        path = ("keys", name, "file")
        if self._files.is_elsewhere(reference):
            return ()
        data = self._read(reference)
        if isinstance(data, OSError):
            found.append((path, f"cannot read that file: {str(data.strerror).replace(reference, 'it')}"))
            return ()
        try:
            key = data.partition(b"\n")[0].decode("ascii").strip()
        except UnicodeDecodeError:
            found.append((path, f"{_FIRST_LINE} expected a key of ASCII characters"))
            return ()
        if problem := own_key_problem(key):
            found.append((path, f"{_FIRST_LINE} {problem}"))
            return ()
        return (digest(key.encode()),)

    def _read(self, reference: str) -> bytes | OSError:
        try:
            data = self._files.read(reference)
        except OSError as error:
            self.attached[reference] = ""
            return error
        self.attached[reference] = revision_of(data)
        return data


def _limits(table: KeyTable) -> Limits:
    return Limits(
        _rate(table),
        table.tokens_per_day,
        table.tokens_per_month,
        table.max_in_flight,
        table.max_output_tokens,
        table.priority,
        table.weight,
        tuple((glob, _rate(rate)) for glob, rate in table.limits.items()),
    )


def _rate(table: KeyTable | RateTable) -> Rate:
    return Rate(table.requests_per_minute, table.tokens_per_minute)
