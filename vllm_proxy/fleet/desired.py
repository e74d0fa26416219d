"""The desired state: the configuration file is read, validated and adopted, or edited, written and adopted.

Everything that changes or follows the file goes through here, one after another, and sees what is on disk at that
moment; so no edit is lost between two others and none is half applied (tests/fleet/test_desired.py). A burst of writes
by an editor is debounced. Carrying out what was adopted is up to `reconciler`.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import structlog

from vllm_proxy.domain.config import Config, revision_of
from vllm_proxy.domain.keys import changes, told
from vllm_proxy.domain.plan import plan, restart_needed, settings
from vllm_proxy.domain.references import Files
from vllm_proxy.engine.ports import Ports
from vllm_proxy.errors import ConfigError, Problem, RequestError, VllmProxyError
from vllm_proxy.fleet.changes import Change, Edit, KeyEdit, KeyFiles, edited, read
from vllm_proxy.fleet.objections import Check, Hardware, Objections
from vllm_proxy.fleet.outcome import Author, Outcome, Plan, Written
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.store import Store
from vllm_proxy.fleet.watch import settled
from vllm_proxy.runtime import clock
from vllm_proxy.runtime.background import notify, spawn
from vllm_proxy.runtime.exclusive import Exclusive, NoAnswerError
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.threads import Offload
from vllm_proxy.runtime.watched_files import revision_at
from vllm_proxy.traffic.keyring import Keyring

log = structlog.get_logger()

_SETTLING_SECONDS = 1.0  # who writes to it for longer is not waited for
_DISK_SECONDS = 30.0  # the deadline for a disk, and for those who are queued for it
_AGAIN_SECONDS = 10
_TRIES = 3  # of a write, while others save the file
_NOTHING = revision_of(b"")
_IS_EMPTY = "it is empty, as a save that failed leaves it; where no {} shall {}, write a comment into it"
_UNKNOWN = Hardware()


async def _nothing(_: Config) -> None:
    """There is no log from which secrets would have to be hidden."""


class _ChangesError(VllmProxyError):
    """Somebody writes to a file that was taken for settled."""


class Desired:
    """The configuration file of one daemon."""

    def __init__(
        self,
        store: Store,
        parse: Callable[[bytes, Files], Config],
        reconciler: Reconciler,
        check: Check,
        ports: Ports,
        *,
        files: ReferencedFiles,
        key_files: KeyFiles,
        keyring: Keyring,
        offload: Offload = asyncio.to_thread,
        plans: Offload | None = None,
        hardware: Hardware = _UNKNOWN,
        hide_secrets: Callable[[Config], Awaitable[None]] = _nothing,
        address_is_given: bool = False,
    ) -> None:
        """`parse`: what bytes of the file mean; `files`: reads those that it names; `keyring`: follows its keys.

        `key_files`: where these are written. `hide_secrets`: is given each configuration before it is adopted.

        `offload`: runs what blocks in a thread; `plans`: what a client has computed, which must keep nobody's write or
        revocation from its turn. `hardware`: what models have to fit.

        `address_is_given`: the file does not say where to listen.
        """
        self.rejected: ConfigError | None = None  # why what is on disk is not what runs
        self.reloads = Counter[str]()  # by result
        self._store = store
        self.file = store.file
        self._file = str(store.file)
        self._parse_with = parse
        self._parse: Callable[[bytes], Config] = lambda data: parse(data, files.lenient())
        self._files = files
        self._key_files = key_files
        self.keyring = keyring
        self._attached: Mapping[str, str] = reconciler.config.attached  # of the last text that was read
        self.reconciler = reconciler
        self._check = check
        self.objections = Objections(check, hardware, lambda: reconciler.config, offload)
        self._ports = ports
        self.offload = offload
        self._plans = plans or offload
        self._hide_secrets = hide_secrets
        self._started_with = reconciler.config.server
        self.address_is_given = address_is_given
        self._turn = Exclusive("the configuration", _DISK_SECONDS)
        self._listeners: list[Callable[[Outcome | Written | ConfigError], None]] = []

    @property
    def fingerprint(self) -> str:
        """Of everything that the configuration that is followed was read from."""
        return self.reconciler.config.fingerprint

    @property
    def vllm(self) -> str:
        """The version of vLLM that its models run, several with commas; empty where none is known."""
        return ", ".join(sorted(self._check.versions))

    def files(self) -> list[Path]:
        """The file, and those that it names, in the order of the fingerprint: a change of any is followed."""
        found = [self.file]
        for reference in self._attached:
            with contextlib.suppress(OSError):  # a credential that cannot come while the service runs
                found.append(self._files.path(reference))
        return found

    def listen(self, listener: Callable[[Outcome | Written | ConfigError], None]) -> None:
        """Call `listener` with the outcome of each reload and write that found something new, and with each write."""
        self._listeners.append(listener)

    def record(self, author: Author, before: str | None = None, after: str | None = None) -> None:
        """Log and announce that somebody has changed something, or commanded it by hand."""
        now = self.reconciler.config.revision
        written = Written(author, before or now, after or now)
        log.info("written", who=author.who, what=author.what, before=written.before, after=written.after)
        notify(self._listeners, written)

    def pending_restart(self) -> list[str]:
        """Keys of `[server]` that the file has changed and only a restart of the daemon applies."""
        now = self.reconciler.config.server
        return restart_needed(self._started_with, now, address_is_given=self.address_is_given)

    async def text(self) -> bytes:
        """The file as it is on disk.

        Raises:
            ConfigError: when it cannot be read.

        """
        return await self._in_time(self._read)

    async def read_only(self) -> str | None:
        """Why no write can succeed, `config_read_only`'s message; None where none is known. Nothing is written.

        Raises:
            ConfigError: when its disk does not answer.

        """
        return await self._in_time(self._store.read_only)

    async def plan(self, data: bytes, *, trusted: bool) -> Plan:
        """What adopting a file with these bytes would change.

        `trusted`: they may name any file of this machine, which is read or asked for its options, and of which a
        problem may tell. Else those alone that the configuration names already.

        Raises:
            ConfigError: with every problem in it, and each option that an engine would refuse, as a write does.
            RequestError: `overloaded`, where those of others take too long.

        """
        files = self._files if trusted else self._files.limited_to(self._attached)
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                config = await self._plans(self._parse_with, data, files)
        except TimeoutError:
            msg = f"cannot plan this: it is not done within {_DISK_SECONDS:g} s, as other plans take their time"
            raise RequestError("overloaded", f"{msg}; try again", retry_after=_AGAIN_SECONDS) from None
        config = config.with_ranks(self.reconciler.specs()).with_loras(self.reconciler.loras())
        if found := await self.objections.to_options(config, data, only_known=not trusted):
            raise ConfigError(self._file, found)
        actions = await self._plans(plan, config.models, self.reconciler.specs())
        restart = restart_needed(self._started_with, config.server, address_is_given=self.address_is_given)
        prospects, now = await self.objections.prospects(config, actions), self.reconciler.config
        new = changes(now.keys, config.keys), settings(now, config, restart), config.warnings(since=now)
        return Plan(actions, prospects, restart, *new)

    async def follow(self) -> Outcome:
        """Debounce: reload once nobody writes to the file any more, and what was read is what was there before that.

        Raises:
            ConfigError: as `reload`.

        """
        until = asyncio.get_running_loop().time() + _SETTLING_SECONDS
        while True:
            seen = None
            with contextlib.suppress(ConfigError):  # its disk does not answer: the next read reports that
                seen = await settled(partial(self._in_time, self._peek), until)
            with contextlib.suppress(_ChangesError):
                return await self.reload(seen)

    async def reload(self, seen: list[str] | None = None) -> Outcome:
        """Read the file and follow it; nothing happens when its bytes are the adopted ones.

        `seen`: by `follow`, which looks again where that is out of date.

        Raises:
            ConfigError: when it is invalid, or its disk does not answer; what runs goes on.

        """
        try:
            return await self._turn.run(partial(self._reload, seen))
        except NoAnswerError as error:
            self._reject(self._unanswered())
            raise self._unanswered() from error

    async def write(self, edit: Edit, if_match: str | None, author: Author, *, blind: bool = False) -> Outcome:
        """Change what is on disk, then follow it. It goes on though the caller gives up.

        `if_match`: only if that is the revision on disk; None: in any case. `blind`: whatever is on disk is valid.

        Raises:
            ConfigError: when the file would be invalid, or is and cannot be edited.
            RequestError: `revision_mismatch`, `config_read_only`, `config_not_written`, or what `edit` raises.

        """
        return (await self._apply(author, self._edited, edit, if_match, blind=blind))[1]

    async def write_keys(self, edit: KeyEdit, if_match: str | None, author: Author) -> Config:
        """Change the keys on disk, in whichever file they stand, then follow it; returns what is followed then.

        `if_match`: only if that is the revision of both files together; None: in any case.

        Raises:
            ConfigError, RequestError: as `write`.

        """
        return (await self._apply(author, self._key_files.change, edit, if_match))[0]

    async def _apply[**P](
        self, author: Author, make: Callable[P, Change], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Config, Outcome]:
        """Write what `make` makes of what is on disk, and follow it; it is called in a thread, in turn."""
        try:
            return await self._turn.run(partial(self._write, author, make, *args, **kwargs))
        except NoAnswerError as error:
            what = "the file is the old one or the new one, look again" if error.begun else "nothing has changed"
            msg = f"cannot write {self._file}: its disk has not answered for {_DISK_SECONDS:g} s; {what}"
            raise RequestError("config_not_written", msg) from error

    async def close(self, seconds: float) -> bool:
        """Wait for what has begun, for so long at most; whether it has ended."""
        return await self._turn.close(seconds)

    async def _in_time[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function without side effects, with a deadline for a disk that hangs."""
        answer = spawn(self.offload(function, *args, **kwargs), "a read of the configuration")
        try:
            if await clock.wait({answer}, _DISK_SECONDS):
                return answer.result()
        finally:
            answer.cancel()
        raise self._unanswered()

    def _unanswered(self) -> ConfigError:
        message = f"cannot read it: its disk has not answered for {_DISK_SECONDS:g} s"
        return ConfigError(self._file, [Problem(0, "", message)])

    def _reject(self, error: ConfigError) -> None:
        self.reloads["rejected"] += 1
        if self.rejected is None or self.rejected.problems != error.problems:
            self.rejected = error
            log.error("the configuration is rejected, what runs goes on", problems=error.lines())
            notify(self._listeners, error)

    async def _reload(self, seen: list[str] | None) -> Outcome:
        try:
            config = await self._new(seen)
        except ConfigError as error:
            self._reject(error)
            raise
        self.reloads["accepted" if config else "unchanged"] += 1
        if config is None:
            if self.rejected is not None:  # it was broken, and is again what runs
                self.rejected = None
                log.info("the configuration is again what runs", revision=self.reconciler.config.revision)
                notify(self._listeners, Outcome(self.reconciler.config.revision, ()))
            return Outcome(self.reconciler.config.revision, ())
        return await self._adopt(config)

    async def _write[**P](
        self, author: Author, make: Callable[P, Change], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Config, Outcome]:
        author.commit()  # in its turn: what was adopted before may have taken its key away
        left = _TRIES
        while True:
            left -= 1
            change = await self.offload(make, *args, **kwargs)
            try:
                return await self._carry_out(author, change)
            except RequestError as error:
                if error.code != "revision_mismatch" or not left:
                    raise

    async def _carry_out(self, author: Author, change: Change) -> tuple[Config, Outcome]:
        """Write it, and follow what is written.

        Raises:
            ConfigError, RequestError: `revision_mismatch`, where an editor has saved the file since it was read.

        """
        config = change.config.with_ranks(self.reconciler.specs()).with_loras(self.reconciler.loras())
        text = change.after if change.store is self._store else b""  # the other file has no models
        found = [*await self.objections.to_options(config, text), *await self.objections.to_sizes(config, text)]
        if found:
            raise ConfigError(self._file, found)
        await self.offload(change.write)
        self.record(author, change.was, change.now)
        if config.fingerprint == self.fingerprint:
            return config, Outcome(config.revision, ())
        return config, await self._adopt(config)

    def _read(self) -> bytes:
        return read(self._store)

    def _peek(self) -> list[str]:
        """The revision of each file that is read, "" of one that is empty or cannot be read."""
        return [revision_at(file).removeprefix(_NOTHING) for file in self.files()]

    async def _new(self, seen: list[str] | None) -> Config | None:
        """What is to be adopted; None where nothing is."""
        try:
            config, text = await self.offload(self._read_new)
        finally:
            if seen is not None and seen != await self.offload(self._peek):
                raise _ChangesError
        if config is not None and (found := await self.objections.to_sizes(config, text)):
            raise ConfigError(self._file, found, config.attached)
        return config

    def _read_new(self) -> tuple[Config | None, bytes]:
        """What the file, and those that it names, say, with its text; None where that is adopted already."""
        data = self._read()
        now = self.reconciler.config
        if revision_of(data) == now.revision and not now.attached:
            self._attached = {}
            return None, data
        if not data and now.models:
            raise ConfigError(self._file, [Problem(0, "", _IS_EMPTY.format("model", "run"))])
        try:
            config = self._parse(data)
        except ConfigError as error:
            self._attached = error.attached
            raise
        self._attached = config.attached
        if lost := self._emptied_keys_file(config):
            raise ConfigError(lost, [Problem(0, "", _IS_EMPTY.format("key", "be there"))], config.attached)
        return None if config.fingerprint == now.fingerprint else config, data

    def _emptied_keys_file(self, config: Config) -> str | None:
        """The file of keys, where it is empty and keys that are followed have gone with what was in it."""
        name, now = config.server.keys_file, self.reconciler.config
        if name is None or config.attached.get(name) != _NOTHING or now.keys.keys() <= config.keys.keys():
            return None
        return self._files.place(name)

    def _edited(self, edit: Edit, if_match: str | None, *, blind: bool) -> Change:
        now = self.reconciler.config
        files = self._files.lenient(now.attached)  # an adapter that is followed already may have broken meanwhile

        def parse(text: bytes) -> Config:
            return self._parse_with(text, files)

        return edited(self._store, parse, edit, if_match, adopted=None if blind else now.revision)

    async def _adopt(self, config: Config) -> Outcome:
        config = config.with_ranks(self.reconciler.specs()).with_loras(self.reconciler.loras())
        actions = await self.offload(plan, config.models, self.reconciler.specs())  # of many models it takes a while
        await self._hide_secrets(config)
        self.rejected = None
        self._attached = config.attached
        before = self.reconciler.config
        changed, warnings = changes(before.keys, config.keys), config.warnings(since=before)
        restart = restart_needed(self._started_with, config.server, address_is_given=self.address_is_given)
        self.keyring.adopt(config)  # first: what a key may not do any more is refused from here on
        self._ports.set_range(config.engine.port_start, config.engine.port_end)
        for warning in warnings:
            log.warning(warning)
        await self.reconciler.adopt(config, actions)
        outcome = Outcome(config.revision, actions, changed, settings(before, config, restart), warnings)
        self._check.prefetch(model.engine for model in config.models.values())
        of_keys = {"keys": text} if (text := told(changed)) else {}
        log.info("the configuration is adopted", revision=config.revision, changes=len(outcome.changes), **of_keys)
        notify(self._listeners, outcome)
        return outcome
