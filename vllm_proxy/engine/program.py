"""Resolves the command that starts vLLM for a spec, and the Python that would run it.

A relative path begins at the folder of the configuration file, which is also the working directory of engines.
"""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_proxy.domain import command
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.options import python_of
from vllm_proxy.errors import VllmProxyError

# What the machine may lack for a while, and where that is set.
_SHORTAGES = {
    errno.EAGAIN: "processes are limited by TasksMax= of the unit, or by ulimit -u",
    errno.ENOMEM: "the machine has no memory left, or ulimit -v limits it",
    errno.EMFILE: "open files are limited by LimitNOFILE= of the unit, or by ulimit -n",
    errno.ENFILE: "the machine has as many open files as fs.file-max allows",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the disk's quota",
}


class LaunchError(VllmProxyError):
    """An engine could not even be started."""

    def __init__(self, reason: Reason, message: str, *, of_machine: bool = False) -> None:
        super().__init__(message)
        self.diagnosis = Diagnosis(reason, message, of_machine=of_machine)

    @classmethod
    def of(cls, error: OSError, what: str) -> "LaunchError":
        """What could not be done, and where the machine lacks something for it, which limit that may be."""
        hint = _SHORTAGES.get(error.errno or 0)
        message = f"cannot {what}: {error}"
        return cls(Reason.CRASHED, f"{message}; {hint}" if hint else message, of_machine=hint is not None)


@dataclass(frozen=True, slots=True)
class Programs:
    """What engines are started with, as far as it is not in their specs."""

    folder: Path  # the configuration's: relative paths, and the engines' working directory
    inherited: Mapping[str, str]  # the environment that engines start from
    found_command: tuple[str, ...] | None  # vLLM, where no command is configured

    def command(self, spec: EngineSpec) -> Sequence[str]:
        """What starts vLLM for this spec.

        Raises:
            LaunchError: when there is no such program.

        """
        start = spec.command or self.found_command
        if start is None:
            raise LaunchError(Reason.COMMAND_NOT_FOUND, f"cannot find vLLM: {self._what_to_do()}")
        if shutil.which(self._program(start), path=self._path(spec)) is None:
            msg = f"cannot run {start[0]}: there is no such program; set engine.command"
            raise LaunchError(Reason.COMMAND_NOT_FOUND, msg)
        return start

    def _what_to_do(self) -> str:
        other = shutil.which("vllm", path=self.inherited.get("PATH"))  # a wrapper, say: what it runs is not known
        if other is None:
            return "install it, or set engine.command"
        return (
            f'{other} is in no installation of it; set engine.command = ["{other}", "serve"] to run that all the same'
        )

    def check_model(self, spec: EngineSpec) -> None:
        """Look whether a model that is an absolute path is there: vLLM needs a quarter of a minute to say that.

        Where the command is not known to be a vLLM of this machine, it may be elsewhere.

        Raises:
            LaunchError: when it is not there.

        """
        if spec.model.startswith("/") and self.python(spec) is not None and not os.path.lexists(spec.model):
            msg = f"cannot find {spec.model}: there is no such folder or file; set model, or put it there"
            raise LaunchError(Reason.MODEL_UNAVAILABLE, msg)

    def beside(self, spec: EngineSpec, name: str) -> Path | None:
        """Another program of the installation that the command is of; None: it has none, or there is no command."""
        start = spec.command or self.found_command
        found = shutil.which(self._program(start), path=self._path(spec)) if start else None
        if found is None:
            return None
        folders = (Path(found).parent, Path(found).resolve().parent)  # pipx and uv link into an environment
        return next((file for folder in folders if os.access(file := folder / name, os.X_OK)), None)

    def python(self, spec: EngineSpec) -> Path | None:
        """The interpreter that would run vLLM for this spec; None where that is not certain."""
        start = spec.command or self.found_command
        return python_of([self._program(start), *start[1:]], self._path(spec)) if start else None

    def environment(self, spec: EngineSpec) -> Mapping[str, str]:
        """What an engine would inherit, as far as it stands in the file."""
        return {**command.scrubbed(self.inherited), **spec.variables}

    def _program(self, start: Sequence[str]) -> str:
        """The first word of a command; a relative path begins at the configuration's folder."""
        return os.path.join(self.folder, start[0]) if "/" in start[0] else start[0]  # noqa: PTH118 - keeps absolute ones

    def _path(self, spec: EngineSpec) -> str:
        return self.environment(spec).get("PATH", os.defpath)
