"""The keys in force: which caller a key makes, by its digest. Changed as a whole, when a configuration is adopted.

A key is looked up by its SHA-256 alone, so nothing of a key that was never issued can be learnt from how long a look
takes, and no key is held in memory. What a key means is in `domain/keys.py`; what it may do here, in `access`.
"""

import hmac
import math
import os
from collections.abc import Callable, Iterable, Mapping

from vllm_proxy.domain.config import Config
from vllm_proxy.domain.keys import ALL, ANONYMOUS, Key, Scope, closure

_SALT = os.urandom(32)  # of this process: nobody outside can compute the `cache_salt` of a key
_LOCAL_WITHOUT_KEYS = closure([Scope.INFERENCE, Scope.READ])
_NOBODY = Key(ANONYMOUS, (), frozenset())


class Caller:
    """Who sends a request, and what that may do. One for each hash of a key; as long as nothing changes, the same."""

    __slots__ = ("digest", "expires_at", "is_bounded", "isolation", "key", "models", "scopes")

    def __init__(self, key: Key, digest: bytes, models: frozenset[str] | None) -> None:
        self.key = key
        self.digest = digest  # b"" of who sent no key
        self.scopes = key.scopes
        self.models = models  # names that it may use, aliases included; None: all
        self.expires_at = -math.inf if not key.enabled else math.inf if key.expires_at is None else key.expires_at
        self.is_bounded = self.expires_at != math.inf
        self.isolation = b""  # the `cache_salt` of its prompts
        if key.isolate_cache:
            self.isolation = hmac.digest(_SALT, key.name.encode(), "sha256").hex().encode()

    @property
    def name(self) -> str:
        """Of the key."""
        return self.key.name

    @property
    def is_anonymous(self) -> bool:
        """Whether no key of this daemon was sent."""
        return not self.digest

    def may_use(self, model: str) -> bool:
        """Whether a model's id or alias is among those that it may use."""
        return self.models is None or model in self.models

    def may_use_some(self, model_id: str, aliases: Iterable[str]) -> bool:
        """Whether it may use a model by one of its names at least."""
        return self.models is None or model_id in self.models or any(alias in self.models for alias in aliases)


NOBODY = Caller(_NOBODY, b"", frozenset())  # who may do nothing, and was not let in


class Keyring:
    """All callers of one daemon."""

    find: Callable[[bytes], Caller | None]  # who has the key of a digest, be it disabled or expired

    def __init__(self, config: Config) -> None:
        self.config = config  # whose keys these are
        self._by_digest: dict[bytes, Caller] = {}
        self._anonymous: dict[bool, Caller] = {}  # by whether the listener is on loopback
        self._names: Mapping[str, tuple[str, ...]] = {}  # what else leads to a model, by its id
        self._listeners: list[Callable[[], None]] = []
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Follow a configuration; whose key is gone or narrowed is to be refused from here on."""
        self.config = config
        models = config.ids
        self._names = {name: spec.other_names for name, spec in config.models.items()}
        self._by_digest = {
            digest: Caller(key, digest, key.allowed(models)) for key in config.keys.values() for digest in key.digests
        }
        self.find = self._by_digest.get
        self._anonymous = {
            local: Caller(key, b"", key.allowed(models))
            for local, key in ((local, _anonymous(config, local=local)) for local in (True, False))
        }
        for listener in self._listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change."""
        self._listeners.append(listener)

    def anonymous(self, *, local: bool) -> Caller:
        """Who sends no key. `local`: to a listener on loopback."""
        return self._anonymous[local]

    def now(self, caller: Caller, *, local: bool) -> Caller | None:
        """What has become of a caller; None: its hash is gone."""
        return self._anonymous[local] if caller.is_anonymous else self._by_digest.get(caller.digest)

    def may_go_on(self, caller: Caller, model_id: str) -> bool:
        """Whether a request that has begun may still use a model, by whichever of its names; it may be gone by now."""
        return caller.key.matches(model_id) or caller.may_use_some(model_id, self._names.get(model_id, ()))

    def opens_nothing(self) -> bool:
        """Whether nobody can do anything on an address that is not loopback: no keys, and nothing for strangers."""
        return not self._by_digest and not self._anonymous[False].scopes


def _anonymous(config: Config, *, local: bool) -> Key:
    if config.server.allow_remote_admin:
        return Key(ANONYMOUS, (), ALL)
    if ANONYMOUS in config.keys:
        return config.keys[ANONYMOUS]
    if local and not config.keys:
        return Key(ANONYMOUS, (), _LOCAL_WITHOUT_KEYS)
    return _NOBODY
