"""API keys: their form, their hashes, what their scopes and globs allow. Values alone; no key stands in them.

A key is `vp-`, 43 characters base64url (256 random bits), and six of a checksum: scanners find it, and a mistyped one
is told from one that was revoked. What is kept of it is its SHA-256: no more is needed for 256 bits that were drawn at
random, and it costs a request less than a microsecond. Looking a caller up is in `traffic/keyring.py`.
"""

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

from vllm_proxy.domain.limits import Limits

CONTROL_SOCKET = "control"  # who uses the control socket
ANONYMOUS = "anonymous"  # who sends no key
HASH_PREFIX = "sha256:"
LEAST_CHARACTERS = 32  # of a key that somebody brings along
MOST_HASHES = 4
_PREFIX = "vp-"
RANDOM_BYTES = 32
_CHECKED = 6  # characters of the checksum
_LENGTH = len(_PREFIX) + 43 + _CHECKED
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{32,}")  # a key in the place of a name, as `openssl rand -hex` makes it
_USABLE = re.compile(r"[!-~]+")  # what a header can carry
RESERVED = {"env": "VLLM_PROXY_API_KEY", "env-admin": "VLLM_PROXY_ADMIN_KEY"}  # keys that the environment gives


type Source = Literal["file", "keys_file", "environment"]


class Scope(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    METRICS = "metrics"
    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"


ALL = frozenset(Scope)
_INCLUDED = {
    Scope.INFERENCE: frozenset({Scope.INFERENCE}),
    Scope.METRICS: frozenset({Scope.METRICS}),
    Scope.READ: frozenset({Scope.READ, Scope.METRICS}),
    Scope.OPERATE: frozenset({Scope.OPERATE, Scope.READ, Scope.METRICS}),
    Scope.ADMIN: ALL,
}


def closure(scopes: Iterable[str]) -> frozenset[Scope]:
    """These scopes and those that they include."""
    return frozenset().union(*(_INCLUDED[Scope(scope)] for scope in scopes))


def without_included(scopes: Iterable[Scope]) -> list[Scope]:
    """These scopes but for those that others of them include, in the order of `Scope`: as people write them."""
    found = set(scopes)
    return [one for one in Scope if one in found and not any(one in _INCLUDED[other] for other in found - {one})]


def new_key(random: bytes) -> str:
    """A key made of 32 random bytes."""
    assert len(random) == RANDOM_BYTES
    key = _PREFIX + base64.urlsafe_b64encode(random).rstrip(b"=").decode()
    return key + _checksum(key)


def _checksum(text: str) -> str:
    rest, found = zlib.crc32(text.encode("ascii")), ""
    while rest or len(found) < _CHECKED:
        rest, digit = divmod(rest, 62)
        found = _DIGITS[digit] + found
    return found


def is_mistyped(key: str) -> bool:
    """Whether it was meant as a key of this daemon's making, and is none."""
    if not key.startswith(_PREFIX):
        return False
    return len(key) != _LENGTH or not key.isascii() or _checksum(key[:-_CHECKED]) != key[-_CHECKED:]


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def hash_of(key: str) -> str:
    """As it stands in the file: `sha256:` and 64 hex digits."""
    return HASH_PREFIX + digest(key.encode()).hex()


def own_key_problem(key: str) -> str | None:
    """Why a key that somebody brings along cannot be one."""
    if len(key) < LEAST_CHARACTERS:
        return f"expected a key of at least {LEAST_CHARACTERS} characters, got {len(key)}"
    if not _USABLE.fullmatch(key):
        return "expected a key of letters, digits and punctuation of ASCII, which is what a header can carry"
    if is_mistyped(key):
        return "it begins as a key of vllm-proxy does, and its checksum is wrong: a character is missing or mistyped"
    return None


def name_problem(name: str) -> str | None:
    """Why no key can be called so."""
    if name == CONTROL_SOCKET:
        return "this name is kept for who uses the control socket"
    if name in RESERVED:
        return f"this name is kept for the key that {RESERVED[name]} gives"
    if _HEX.fullmatch(name):
        return "expected a name, and this may be a key itself"
    if not _NAME.fullmatch(name):
        return "expected a name of 1 to 64 lower-case letters, digits and . _ -, which begins with a letter or a digit"
    return None


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of `[keys]`, or a key that the environment gives."""

    name: str
    digests: tuple[bytes, ...]  # the newest one last; none of `anonymous`
    scopes: frozenset[Scope]  # those that others include are in it
    models: tuple[str, ...] = ("*",)  # globs over ids and aliases
    enabled: bool = True
    expires_at: float | None = None  # seconds since the epoch
    isolate_cache: bool = False
    description: str = field(default="", compare=False)
    source: Source = field(default="file", compare=False)  # where it can be changed
    file: str | None = field(default=None, compare=False)  # the reference that names the file which holds it
    limits: Limits = field(default_factory=Limits)

    def allows_all(self) -> bool:
        """Whether it may use every model."""
        return "*" in self.models

    def allowed(self, models: Mapping[str, Iterable[str]]) -> frozenset[str] | None:
        """The names that it may use, of the aliases by model id; None: all. An id brings its aliases along."""
        if self.allows_all():
            return None
        found: set[str] = set()
        for model_id, aliases in models.items():
            if self.matches(model_id):
                found |= {model_id, *aliases}
            else:
                found |= {alias for alias in aliases if self.matches(alias)}
        return frozenset(found)

    def matches(self, name: str) -> bool:
        """Whether one of its globs allows a name."""
        return any(fnmatchcase(name, glob) for glob in self.models)


class KeyChanges(TypedDict):
    """What a change of the file did to its keys, by their names."""

    added: list[str]
    changed: list[str]
    removed: list[str]


def changes(before: Mapping[str, Key], after: Mapping[str, Key]) -> KeyChanges:
    """Which keys are new, mean something else or are described otherwise, or are gone."""
    return {
        "added": [name for name in after if name not in before],
        "changed": [name for name, key in after.items() if name in before and _differ(before[name], key)],
        "removed": [name for name in before if name not in after],
    }


def _differ(one: Key, other: Key) -> bool:
    return one != other or one.description != other.description


def told(found: KeyChanges) -> str:
    """Changes of keys in words, "" where there are none: `added ci, ada; removed old`."""
    parts = (("added", found["added"]), ("changed", found["changed"]), ("removed", found["removed"]))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names)


def warnings(keys: Mapping[str, Key], models: Mapping[str, Iterable[str]], *, all_open: bool) -> list[str]:
    """What is valid, and dangerous or useless. `models`: aliases by id; `all_open`: `server.allow_remote_admin`."""
    found = []
    if all_open:
        found.append("server.allow_remote_admin is set: whoever can connect may change models, and so run code")
    for name, key in keys.items():
        if name == ANONYMOUS and key.enabled and (may := key.scopes & {Scope.OPERATE, Scope.ADMIN}):
            what = "change models, and so run code" if Scope.ADMIN in may else "stop models and read their logs"
            found.append(f"[keys.{name}] has the scope {max(may, key=_rank)}: whoever can connect may {what}")
        if not key.scopes:
            found.append(f"[keys.{name}] may do nothing: its scopes are empty")
        elif Scope.INFERENCE in key.scopes and key.allowed(models) == frozenset():
            found.append(f"[keys.{name}] may use no model: its globs match none")
        found += _of_limits(f"[keys.{name}", key.limits, models)
    return found


def _of_limits(key: str, limits: Limits, models: Iterable[str]) -> Iterator[str]:
    """What of them is useless, or refuses more than was meant. `key`: the beginning of its table's name."""
    if limit := limits.below_an_answer(limits.rate):
        yield f"{key}] has max_output_tokens of no less than its {limit}: {_NEVER_FITS}"
    for glob, rate in limits.models:
        shown = glob if len(glob) < LEAST_CHARACTERS else "***"  # somebody may have pasted a key there
        matched = [model_id for model_id in models if fnmatchcase(model_id, glob)]
        if not matched:
            yield f"{key}.limits] has a glob {shown!r}, which matches no model"
        elif not rate.is_limited:
            if not limits.has_another(glob, matched):  # else it takes these models out of that one
                yield f"{key}.limits] has a glob {shown!r} without a limit"
        elif limit := limits.below_an_answer(rate):
            yield f"{key}] has max_output_tokens of no less than {limit} for {shown!r}: {_NEVER_FITS}"


_NEVER_FITS = "a request that asks for no shorter answer is always refused"


def _rank(scope: Scope) -> int:
    return len(_INCLUDED[scope])
