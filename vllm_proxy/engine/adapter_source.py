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
from vllm_proxy.runtime.regular_file import read_regular_file
from vllm_proxy.runtime.threads import Offload

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # vLLM reads the first that is there

_DISK_SECONDS = 10.0
_DOWNLOAD_SECONDS = 3600.0
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)  # also no option of a program, and no way out of a folder
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_COMMAND, _MARK = "hf", "download"
_WANTED = "--include=adapter_*"  # a repository may hold checkpoints of many gigabytes as well


class AdapterError(VllmProxyError):
    """An adapter's files cannot be had. The message is a whole sentence."""


class Sources(Protocol):
    """Where adapters come from."""

    async def find(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> Path:
        """The folder that a path of the file means, for a model with this spec; it need not be there.

        `is_hub_id`: the configuration has decided that, so that no stranger's adapter comes where a folder went.

        Raises:
            AdapterError: the hub has none, or it cannot be had.

        """


class AdapterSources:
    """Folders of this machine, and the hub."""

    def __init__(self, programs: Programs, variables: Variables, offload: Offload = asyncio.to_thread) -> None:
        """`offload`: runs what looks at disks in a thread."""
        self._programs = programs
        self._variables = variables
        self._offload = offload
        self._downloads: dict[str, asyncio.Lock] = {}  # by id: whoever comes second finds it in the cache

    async def find(self, spec: EngineSpec, path: str, *, is_hub_id: bool) -> Path:
        """A folder, relative to the file's; of a hub id the snapshot in the cache, downloaded where there is none."""
        if not is_hub_id:
            return self._programs.folder / path
        if not _HUB_ID.fullmatch(path):
            raise AdapterError(f"cannot find adapter {path}: it is no id of the hub")
        env = await self._environment(spec)
        cache = hub_cache(env, self._programs.folder)
        async with self._downloads.setdefault(path, asyncio.Lock()):
            return await self._cached(cache, path) or await self._download(spec, path, env, cache)

    async def _cached(self, cache: Path, path: str) -> Path | None:
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                return await self._offload(cached, cache, path)
        except TimeoutError:
            msg = f"cannot find adapter {path}: the disk of {cache} has not answered for {_DISK_SECONDS:g} s"
            raise AdapterError(msg) from None
        except OSError as error:  # it may be another user's
            raise AdapterError(f"cannot look for adapter {path} in {cache}: {error.strerror or error}") from None

    async def _environment(self, spec: EngineSpec) -> dict[str, str]:
        """The engine's, as far as the hub's client is concerned."""
        try:
            return {**self._programs.environment(spec), **await self._variables.read(spec)}
        except LaunchError as error:
            raise AdapterError(str(error)) from None

    async def _download(self, spec: EngineSpec, path: str, env: Mapping[str, str], cache: Path) -> Path:
        """Have the hub's own client fetch it into the cache; it is ended with this task."""
        if env.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
            msg = f"cannot find adapter {path}: it is not in {cache}, and HF_HUB_OFFLINE is set; download it there"
            raise AdapterError(msg)
        program = self._programs.beside(spec, _COMMAND)
        if program is None:
            msg = f"cannot download adapter {path}: there is no `hf` beside vLLM; run `hf download {path}` into {cache}"
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
        if found := await self._cached(cache, path):
            return found
        raise AdapterError(f"cannot download adapter {path}: {why}")


def hub_cache(env: Mapping[str, str], base: Path) -> Path:
    """Where the hub's client keeps its files, in this environment and working directory."""

    def expanded(text: str) -> str:
        home = env.get("HOME") or str(Path.home())
        return re.sub(r"^~(?=/|$)", lambda _: home, text)

    root = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or f"{root}/huggingface"
    return base / Path(expanded(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"))


def cached(cache: Path, hub_id: str) -> Path | None:
    """The snapshot of a cache that is whole: the one that its branch `main` is at, else the newest."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    return next((folder for folder in _snapshots(repository) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether it has what vLLM reads of an adapter. A link to what is not there yet counts as missing."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def _snapshots(repository: Path) -> Iterator[Path]:
    """The best first."""
    snapshots = repository / "snapshots"
    with contextlib.suppress(OSError, ValueError):
        yield snapshots / read_regular_file(repository / "refs" / "main").decode()[:100].strip()
    try:
        yield from sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    except OSError:
        return
