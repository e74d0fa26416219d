"""The variables of engines whose values stand elsewhere: read from their files at each start of an engine.

Also tells the masking which values are secrets in use, before anything can write them into a log.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import partial

from vllm_proxy.domain import secrets
from vllm_proxy.domain.config import Config, EngineSpec, ModelSpec
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.proc import KERNEL
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.runtime.background import run_once
from vllm_proxy.runtime.masking import Masking
from vllm_proxy.runtime.referenced import ReferencedFiles
from vllm_proxy.runtime.threads import Offload

_DISK_SECONDS = 10.0
_MOST_BYTES = 100_000  # Linux takes 128 KiB for a variable, its name included


class Variables:
    """Of all engines of one daemon."""

    def __init__(
        self,
        files: ReferencedFiles,
        masking: Masking,
        inherited: Mapping[str, str],
        offload: Offload = asyncio.to_thread,
    ) -> None:
        """`inherited`: the daemon's own environment. `offload`: runs what reads files in a thread."""
        self.masking = masking
        self._files = files
        self._inherited = [*_own_secrets(inherited)]
        self._offload = offload
        self._public: set[str] = set()
        self._reading: asyncio.Task[None] | None = None

    async def follow(self, config: Config) -> None:
        """Hide the secrets of a configuration from here on; those that stand elsewhere a moment later."""
        await asyncio.to_thread(self._configure, config)
        references = {text for model in config.models.values() for text in model.engine.references.values()}
        if self._reading is not None:
            self._reading.cancel()
        self._reading = run_once(partial(self._note, references), "secrets that the configuration refers to")

    def close(self) -> None:
        """End what still runs."""
        if self._reading is not None:
            self._reading.cancel()

    async def read(self, spec: EngineSpec) -> dict[str, str]:
        """All variables of an engine that is about to start.

        Raises:
            LaunchError: when one cannot be read; the message says which, and where it was looked for.

        """
        if not spec.references:
            return spec.variables
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                found = await self._offload(self._read_all, spec.references)
        except TimeoutError:
            msg = f"cannot read what env refers to: its disk has not answered for {_DISK_SECONDS:g} s"
            raise LaunchError(Reason.SECRET_UNAVAILABLE, msg) from None
        return {**spec.variables, **found}

    @contextlib.asynccontextmanager
    async def hidden(self, variables: Mapping[str, str], credential: str) -> AsyncIterator[None]:
        """Nothing shows these values of an engine while the block lasts."""
        with self.masking.held([*self._not_public(variables.values()), credential]):
            await asyncio.to_thread(self.masking.learn)
            yield

    def of_running(self, pid: int, spec: EngineSpec) -> dict[str, str]:
        """Those that an engine was started with, by an earlier daemon; of what stands elsewhere the values then."""
        entries = (entry.partition("=") for entry in KERNEL.environment(pid).decode(errors="replace").split("\0"))
        return {**spec.variables, **{name: value for name, _, value in entries if name in spec.references}}

    def _configure(self, config: Config) -> None:
        found = {value for model in config.models.values() for value in _secrets_of(model)}
        self._public = {*config.ids, *(alias for aliases in config.ids.values() for alias in aliases)}
        self.masking.configure([*self._not_public(found), *self._inherited])

    def _not_public(self, values: Iterable[str]) -> list[str]:
        """Everybody may see how models are called, and nobody could tell them apart without."""
        return [value for value in values if value not in self._public]

    async def _note(self, references: Iterable[str]) -> None:
        """Old lines of a log may hold them, though no engine has been started by this daemon."""
        for text in references:
            with contextlib.suppress(OSError, ValueError):  # a start will report that
                async with asyncio.timeout(_DISK_SECONDS):
                    value = await self._offload(self._value, text)
                await asyncio.to_thread(self.masking.note, [value])

    def _read_all(self, references: Mapping[str, str]) -> dict[str, str]:
        found = {}
        for name, text in references.items():
            try:
                found[name] = self._value(text)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                msg = f"cannot read env.{name} from {self._files.place(text)}: {why}"
                raise LaunchError(Reason.SECRET_UNAVAILABLE, msg) from None
        return found

    def _value(self, text: str) -> str:
        """The whole file but for the end of its last line.

        Raises:
            OSError: as it comes, with a `strerror` for people.
            ValueError: it cannot be a variable; says why, never what stands there.

        """
        data = self._files.read(text)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"expected at most {_MOST_BYTES} bytes, which is what a variable can hold")
        try:
            value = data.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError("expected UTF-8, got other bytes") from None
        if not value or "\0" in value:
            raise ValueError("expected text without NUL characters" if value else "it is empty")
        return value


def _secrets_of(model: ModelSpec) -> Iterator[str]:
    engine = model.engine
    return secrets.values_of({
        "env": engine.env,
        "args": engine.args,
        "metadata": model.policy.metadata,
        "command": engine.command or (),
    })  # fmt: skip


def _own_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Of the daemon's own environment, which engines inherit; where something stands is none."""
    for name, value in environment.items():
        if secrets.is_secret_name(name) and not value.startswith(("/", "credential:")):
            yield value
