"""Obtains the options that an engine's own vLLM accepts, from its argument parser: in the background, once a version.

Best effort: where the Python of a command is not certain or its vLLM prints nothing useful, there is no table and
nothing is checked. All who ask at the same time share one read (an import of vLLM takes seconds: no thundering herd),
and results are cached on disk.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from vllm_proxy.domain.options import OptionTable
from vllm_proxy.engine.find import package_folders
from vllm_proxy.engine.program_output import output_of
from vllm_proxy.runtime.background import spawn
from vllm_proxy.runtime.files import replace_file
from vllm_proxy.runtime.regular_file import open_regular_file, read_regular_file
from vllm_proxy.runtime.threads import Offload

log = structlog.get_logger()

SCRIPT = Path(__file__).with_name("read_options.py")

_NAME = "options"  # in the mark of its processes
_SECONDS = 120.0
_ROOT = Path("/")
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_COLOR": "0"}
_FILES_KEPT = 20
_HEAD = 64 * 2**10  # of a script: a wrapper's `exec` stands below all that it sets
_LEVELS = 4  # of wrappers inside each other
_METADATA = re.compile(r"vllm(_\w+)?-[0-9][^/]*\.dist-info")  # plugins, too, add options
_OTHERS = re.compile(r"vllm_proxy-")
_ITS_OWN = re.compile(r"vllm(?:_cpu)?-([0-9][^/-]*)\.dist-info")
_PYTHON = re.compile(r"(python|pypy)[0-9.]*t?")
_SERVING = re.compile(r"vllm\.(.*\.)?api_server(\.entry)?")
_TRAMPOLINE = re.compile(r"""'''exec' (?:'([^']+)'|"([^"$`]+)"|([^\s"'$`]+)) """)  # a shebang longer than Linux takes
_RELATIVE = re.compile(r"""'''exec' "\$\(dirname -- "\$\(realpath -- "\$0"\)"\)"/(?:'([^']+)'|([^\s'"$`]+)) """)
_WRAPPER = re.compile(r"""^exec (?:-a "\$0" )?"(/[^"$`]+)" """, re.MULTILINE)
_NIX_ENVIRONMENT = re.compile(r"NIX_PYTHONEXECUTABLE='(/[^']+)'")
_ELSEWHERE = re.compile(
    r"\b(?:PYTHONPATH|PYTHONHOME)=|\baddsitedir\b"
)  # its vLLM is not where the Python looks by itself
_TELLING = ("PYTHONPATH", "PYTHONHOME", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE")  # what decides on which vLLM it is


def python_of(command: Sequence[str], path: str) -> Path | None:
    """The interpreter that an engine's command runs vLLM with, links kept; None where that is not certain.

    `path` is the engine's PATH. Nothing is run.
    """
    program = _found(command[0], path)
    if program is None:
        return None
    if _PYTHON.fullmatch(program.name):
        module = command[command.index("-m") + 1 :] if "-m" in command else []
        serves = bool(module) and (_SERVING.fullmatch(module[0]) or _serves(module))
        return program if serves else None
    if "vllm" in {program.name, _resolved(program).name} and "serve" in command[1:]:
        return _interpreter_of(program, path)
    return None


def _serves(module: Sequence[str]) -> bool:
    return (module[0] == "vllm" or module[0].startswith("vllm.")) and "serve" in module[1:]


def _found(program: str, path: str) -> Path | None:
    found = shutil.which(program, path=path)
    return Path(found) if found and Path(found).is_absolute() else None


def _interpreter_of(script: Path, path: str) -> Path | None:
    """The interpreter of a script, through the wrappers that package managers put around it."""
    for _ in range(_LEVELS):
        head = _head(script)
        if _ELSEWHERE.search(head):
            return None
        if python := _named(script, head, path):
            return python
        wrapped = _WRAPPER.findall(head)
        if not wrapped:
            return None
        script = Path(wrapped[-1])
    return None


def _head(script: Path) -> str:
    """The beginning of a script; empty where it is none."""
    try:
        with open_regular_file(script) as file:
            head = file.read(_HEAD).decode("utf-8", "surrogateescape")
    except OSError:
        return ""
    return head if head.startswith("#!") else ""


def _named(script: Path, head: str, path: str) -> Path | None:
    """The interpreter that a script names itself."""
    words = head.partition("\n")[0].removeprefix("#!").split()
    interpreter = _interpreter(words, path)
    if interpreter is not None and _PYTHON.fullmatch(interpreter.name):
        return interpreter
    if match := _RELATIVE.search(head):
        return _program(_resolved(script).parent / (match[1] or match[2]))
    if match := _TRAMPOLINE.search(head):
        return _program(Path(match[1] or match[2] or match[3]))
    match = _NIX_ENVIRONMENT.search(head)
    return _program(Path(match[1])) if match else None


def _interpreter(words: Sequence[str], path: str) -> Path | None:
    if words and Path(words[0]).name == "env":
        rest = [word for word in words[1:] if word != "-S"]
        return _found(rest[0], path) if rest else None
    return _program(Path(words[0])) if words else None


def _program(file: Path) -> Path | None:
    return file if file.is_absolute() and os.access(file, os.X_OK) else None


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError):
        return file


@dataclass(frozen=True, slots=True)
class _Version:
    """One vLLM in one Python. `metadata` is empty where nothing says which version it is."""

    python: str
    real: str
    metadata: tuple[tuple[str, int], ...]  # path and time of change, ns
    env: tuple[str | None, ...]

    @property
    def name(self) -> str:
        """Of the file that keeps its options."""
        facts = json.dumps([self.python, self.real, self.metadata, self.env])
        return f"{hashlib.sha256(facts.encode() + SCRIPT.read_bytes()).hexdigest()[:24]}.json"


def _version(python: Path, env: Mapping[str, str]) -> _Version:
    """Read off the file system. A virtual environment's Python is a link: what lies beside the link counts first."""
    real = _resolved(python)
    found: dict[str, int] = {}
    for prefix in dict.fromkeys((python.parent.parent, real.parent.parent)):
        for folder in package_folders(prefix):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if _METADATA.fullmatch(entry.name) and not _OTHERS.match(entry.name):
                        found[entry.path] = entry.stat().st_mtime_ns
    return _Version(str(python), str(real), tuple(sorted(found.items())), tuple(env.get(name) for name in _TELLING))


def vllm_version(python: Path) -> str | None:
    """The version of vLLM that an interpreter would run, such as "0.32.0"; None where nothing says it. For a thread."""
    names = sorted(Path(path).name for path, _ in _version(python, {}).metadata)
    return next((found[1] for name in names if (found := _ITS_OWN.fullmatch(name))), None)


class OptionTables:
    """The tables that are known. `folder` keeps them for later daemons; it is made when first needed.

    `offload` runs what reads an installation in a thread.
    """

    def __init__(self, folder: Path, seconds: float = _SECONDS, offload: Offload = asyncio.to_thread) -> None:
        self._folder = folder
        self._seconds = seconds
        self._offload = offload
        self._tables: dict[_Version, OptionTable | None] = {}  # None: it failed, and is not tried again
        self._readings: dict[_Version, asyncio.Task[OptionTable | None]] = {}
        self._one_at_a_time = asyncio.Lock()  # an import of vLLM takes a processor and a GB for ten seconds

    def known(self, python: Path, env: Mapping[str, str] | None = None) -> OptionTable | None:
        """What is known without running anything. `env` as for `load`."""
        version = _version(python, env or {})
        if version not in self._tables and (table := self._cached(version)):
            self._tables[version] = table
        return self._tables.get(version)

    async def load(self, python: Path, env: Mapping[str, str]) -> OptionTable | None:
        """The options of the vLLM in `python`; None where it does not print them, which is logged once.

        `env` is what the engine would run with.
        """
        version = await self._offload(_version, python, env)
        if version in self._tables:
            return self._tables[version]
        reading = self._readings.get(version)
        if reading is None:
            reading = spawn(self._load(version, env), f"options of {python}")
            self._readings[version] = reading
        try:
            return await asyncio.shield(reading)  # single flight: a caller that gives up leaves it to the others
        except asyncio.CancelledError:
            if reading.cancelled():  # by `close`
                return None
            raise

    def default(self, name: str) -> float | None:
        """The number that an option has where nobody gives it, of those vLLMs that are known; the largest of theirs."""
        found = (table.default(name) for table in self._tables.values() if table is not None)
        return max((value for value in found if value is not None), default=None)

    async def close(self) -> None:
        """End what still runs."""
        readings = list(self._readings.values())
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)

    async def _load(self, version: _Version, env: Mapping[str, str]) -> OptionTable | None:
        try:
            table = self._cached(version)
            if table is None:
                async with self._one_at_a_time:
                    table = await self._read(version, env)
                if table is not None:
                    self._cache(version, table)
            self._tables[version] = table
            return table
        finally:
            self._readings.pop(version, None)

    async def _read(self, version: _Version, env: Mapping[str, str]) -> OptionTable | None:
        try:
            async with asyncio.timeout(self._seconds):
                return OptionTable.from_json(
                    await output_of([version.python, str(SCRIPT)], {**env, **_QUIET}, _NAME, _ROOT)
                )
        except TimeoutError:
            error = f"no answer within {self._seconds:g} s"
        except (OSError, ValueError) as problem:
            error = str(problem)
        log.warning("vLLM's options cannot be read; options are not checked before a start",
                    python=version.python, error=error)  # fmt: skip
        return None

    def _cached(self, version: _Version) -> OptionTable | None:
        try:
            return OptionTable.from_json(read_regular_file(self._folder / version.name))
        except (OSError, ValueError):  # never read, or no longer whole: it is read anew
            return None

    def _cache(self, version: _Version, table: OptionTable) -> None:
        if not version.metadata:  # a changed version would go unnoticed
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._folder / version.name, table.to_json())
            files = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for file in files[:-_FILES_KEPT]:
                file.unlink()
        except OSError as error:
            log.warning("vLLM's options cannot be kept; the next daemon reads them anew",
                        folder=str(self._folder), error=str(error))  # fmt: skip
