"""Edits keys in the two texts where they may stand: the configuration, and the file that `server.keys_file` names.

A key is changed where it stands; a new one goes into the keys file where there is one. What a table may say is checked
by whoever parses the result. No key and no hash stands in a message.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_proxy.domain.file import edit
from vllm_proxy.domain.file.edit import Table, tables_in
from vllm_proxy.domain.keys import ANONYMOUS, MOST_HASHES, RESERVED, hash_of, new_key
from vllm_proxy.domain.toml import dotted
from vllm_proxy.domain.units import parse_time, show
from vllm_proxy.errors import InvalidError, Problem, RequestError

_KIND = "keys"


@dataclass(frozen=True, slots=True)
class KeyTexts:
    """Both texts. `keys_file`: None where the configuration names none, "" where it is not there yet."""

    config: str
    keys_file: str | None = None

    def where(self, name: str) -> Literal["config", "keys_file"] | None:
        """Which of them has the key."""
        if name in tables_in(self.config, _KIND):
            return "config"
        return "keys_file" if self.keys_file is not None and name in tables_in(self.keys_file, _KIND) else None

    def table(self, name: str) -> Table:
        """A key's table as it stands there.

        Raises:
            RequestError: `key_not_found`, or `key_conflict` where the environment gives the key.

        """
        found = tables_in(self._of(self._found(name)), _KIND)[name]
        return found if isinstance(found, Mapping) else {}  # what that means instead, whoever parses it says

    def edited(self, name: str, how: Callable[[str, edit.TableName], str]) -> "KeyTexts":
        """With the text changed that has the key.

        Raises:
            RequestError: as `table`; `invalid_key` when it cannot be written there.

        """
        return self._with(self._found(name), name, how)

    def appended(self, name: str, how: Callable[[str, edit.TableName], str]) -> "KeyTexts":
        """With the text changed that takes new keys.

        Raises:
            RequestError: `invalid_key` when it cannot be written there.

        """
        return self._with("config" if self.keys_file is None else "keys_file", name, how)

    def _with(
        self, which: Literal["config", "keys_file"], name: str, how: Callable[[str, edit.TableName], str]
    ) -> "KeyTexts":
        try:
            return replace(self, **{which: how(self._of(which), (_KIND, name))})
        except edit.EditError as error:
            raise _invalid("", str(error)) from None

    def _of(self, which: Literal["config", "keys_file"]) -> str:
        text = self.config if which == "config" else self.keys_file
        assert text is not None, "nothing was found in it"
        return text

    def _found(self, name: str) -> Literal["config", "keys_file"]:
        if (which := self.where(name)) is not None:
            return which
        if name in RESERVED:
            msg = f"cannot change key {show(name)}: {RESERVED[name]} gives it; change that variable, restart the daemon"
            raise RequestError("key_conflict", msg)
        raise RequestError("key_not_found", f"cannot find key {show(name)}: `vllm-proxy keys list` shows them")


def issued(name: str, keys: Table, random: bytes) -> tuple[str | None, Table]:
    """The key that is made for a new entry, and its table: none where that has a hash or a file, nor for `anonymous`.

    `random`: 32 bytes.
    """
    if name == ANONYMOUS or keys.get("hash") is not None or keys.get("file") is not None:
        return None, keys
    key = new_key(random)
    return key, {"hash": hash_of(key), **{other: value for other, value in keys.items() if other != "hash"}}


def create(texts: KeyTexts, name: str, keys: Table) -> KeyTexts:
    """With a new key.

    Raises:
        RequestError: `key_exists`; `invalid_key` when it cannot be written.

    """
    if texts.where(name) is not None:
        msg = f"cannot create key {show(name)}: there is one; rotate or change it, or choose another name"
        raise RequestError("key_exists", msg)
    written = _as_toml(name, keys)
    return texts.appended(name, lambda text, at: edit.create(text, at, written))


def patch(texts: KeyTexts, name: str, change: Table) -> KeyTexts:
    """With a JSON merge patch (RFC 7396) applied to a key.

    Raises:
        RequestError: `key_not_found`, `key_conflict`; `invalid_key` when the result cannot be written.

    """
    written = _as_toml(name, change)
    return texts.edited(name, lambda text, at: edit.patch(text, at, written))


def delete(texts: KeyTexts, name: str) -> KeyTexts:
    """Without a key.

    Raises:
        RequestError: `key_not_found`, `key_conflict`.

    """
    return texts.edited(name, edit.delete)


def rotate(texts: KeyTexts, name: str, new: str) -> KeyTexts:
    """With one more hash, behind the others: the last one is the newest. All of them are good until `finish`.

    Of a key that is disabled the new hash alone is left: enabled again, it must not bring back what was revoked.

    Raises:
        RequestError: `key_not_found`; `key_conflict` where the key stands elsewhere, or has as many as there may be.

    """
    hashes = _hashes(texts, name)
    if _is_disabled(texts, name):
        return patch(texts, name, {"hash": new})
    if len(hashes) >= MOST_HASHES:
        msg = (
            f"cannot rotate key {show(name)}: it has {MOST_HASHES} hashes, which is the most; "
            f"`vllm-proxy keys rotate {name} --finish` keeps only the newest"
        )
        raise RequestError("key_conflict", msg)
    return patch(texts, name, {"hash": [*hashes, new]})


def _is_disabled(texts: KeyTexts, name: str) -> bool:
    return texts.table(name).get("enabled") is False


def finish(texts: KeyTexts, name: str) -> KeyTexts:
    """With the newest hash alone; unchanged where there is no other.

    Raises:
        RequestError: `key_not_found`, `key_conflict`.

    """
    hashes = _hashes(texts, name)
    return patch(texts, name, {"hash": hashes[-1]}) if len(hashes) > 1 else texts


def _hashes(texts: KeyTexts, name: str) -> list[Any]:
    """Those in the table of a key that can be rotated."""
    found = texts.table(name).get("hash")
    if found is not None:
        return list(found) if isinstance(found, list) else [found]
    if name == ANONYMOUS:
        why = "it is for who sends no key; `vllm-proxy keys new` makes one"
    else:
        why = "it is what a file holds, which its table names; put another key into that file"
    raise RequestError("key_conflict", f"cannot rotate key {show(name)}: {why}")


def _as_toml(name: str, keys: Table) -> Table:
    """JSON has no times: there `expires_at` is a text."""
    expires_at = keys.get("expires_at") if isinstance(keys, Mapping) else None
    if not isinstance(expires_at, str):
        return keys
    try:
        return {**keys, "expires_at": parse_time(expires_at)}
    except ValueError as error:
        raise _invalid(dotted((_KIND, name, "expires_at")), str(error)) from None


def _invalid(path: str, message: str) -> InvalidError:
    return InvalidError("invalid_key", [Problem(0, path, message)])
