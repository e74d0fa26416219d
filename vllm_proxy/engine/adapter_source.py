"""Finds the folder that an adapter's path means: one on this machine, or of the hub, downloaded where it has to be.

The cache of the hub is the engine's: whatever its environment says of it. Nothing is copied here (`adapter_store`).
Source: `constants.py` and `file_download.py` of huggingface_hub 1 and 2.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.program import LaunchError, Programs
from vllm_proxy.engine.program_output import output_of
from vllm_proxy.engine.variables import Variables
from vllm_proxy.errors import VllmProxyError
from vllm_proxy.runtime.threads import Offload

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # vLLM reads the first that is there

_DISK_SECONDS = 10.0
_DOWNLOAD_SECONDS = 3600.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_COMMAND, _MARK = "hf", "download"
_WANTED = "--include=adapter_*"  # a repository may hold checkpoints of many gigabytes as well


class AdapterError(VllmProxyError):
    """An adapter's files cannot be had. The message is a whole sentence."""


class Sources(Protocol):
    """Where adapters come from."""

    async def find(self, spec: EngineSpec, path: str) -> Path:
        """The folder that a path of the file means, for a model with this spec.

        Raises:
            AdapterError: there is none.

        """


class AdapterSources:
    """Folders of this machine, and the hub."""

    def __init__(self, programs: Programs, variables: Variables, offload: Offload = asyncio.to_thread) -> None:
        """`offload`: runs what looks at disks in a thread."""
        self._programs = programs
        self._variables = variables
        self._offload = offload
        self._downloads: dict[str, asyncio.Lock] = {}  # by id: whoever comes second finds it in the cache

    async def find(self, spec: EngineSpec, path: str) -> Path:
        """A folder, also one that is not there yet; for what can only be a hub id its snapshot."""
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                folder = await self._offload(_local, self._programs.folder, path)
        except TimeoutError:
            raise AdapterError(f"cannot look at {path}: its disk has not answered for {_DISK_SECONDS:g} s") from None
        if folder is not None:
            return folder
        env = await self._environment(spec)
        async with self._downloads.setdefault(path, asyncio.Lock()):
            return await self._offload(cached, env, path) or await self._download(spec, path, env)

    async def _environment(self, spec: EngineSpec) -> dict[str, str]:
        """The engine's, as far as the hub's client is concerned."""
        try:
            return {**self._programs.environment(spec), **await self._variables.read(spec)}
        except LaunchError as error:
            raise AdapterError(str(error)) from None

    async def _download(self, spec: EngineSpec, path: str, env: Mapping[str, str]) -> Path:
        """Have the hub's own client fetch it into the cache; it is ended with this task."""
        place = hub_cache(env)
        if env.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
            msg = f"cannot find adapter {path}: it is not in {place}, and HF_HUB_OFFLINE is set; download it there"
            raise AdapterError(msg)
        program = self._programs.beside(spec, _COMMAND)
        if program is None:
            msg = f"cannot download adapter {path}: there is no `hf` beside vLLM; run `hf download {path}` into {place}"
            raise AdapterError(msg)
        env = {**env, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
        why = "it is not whole: expected adapter_config.json and adapter_model.safetensors"
        try:
            async with asyncio.timeout(_DOWNLOAD_SECONDS):
                await output_of([str(program), "download", path, _WANTED], env, _MARK, self._programs.folder)
        except TimeoutError:
            why = f"it has taken more than {_DOWNLOAD_SECONDS:g} s"
        except (OSError, ValueError) as error:
            why = self._variables.masking.mask(str(error))
        if found := await self._offload(cached, env, path):
            return found
        raise AdapterError(f"cannot download adapter {path}: {why}")


def _local(base: Path, path: str) -> Path | None:
    """The folder that is meant; None: a hub id."""
    folder = base / Path(path).expanduser()
    return None if _HUB_ID.fullmatch(path) and not folder.is_dir() else folder


def hub_cache(env: Mapping[str, str]) -> Path:
    """Where the hub's client keeps its files, in this environment."""

    def expanded(text: str) -> str:
        home = env.get("HOME") or str(Path.home())
        return re.sub(r"^~(?=/|$)", lambda _: home, text)

    root = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or f"{root}/huggingface"
    return Path(expanded(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"))


def cached(env: Mapping[str, str], hub_id: str) -> Path | None:
    """The snapshot of a cache that is whole: the one that its branch `main` is at, else the newest."""
    repository = hub_cache(env) / f"models--{hub_id.replace('/', '--')}"
    return next((folder for folder in _snapshots(repository) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether it has what vLLM reads of an adapter. A link to what is not there yet counts as missing."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def _snapshots(repository: Path) -> Iterator[Path]:
    """The best first."""
    snapshots = repository / "snapshots"
    with contextlib.suppress(OSError, ValueError):
        yield snapshots / (repository / "refs" / "main").read_text(encoding="utf-8")[:100].strip()
    try:
        yield from sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    except OSError:
        return
