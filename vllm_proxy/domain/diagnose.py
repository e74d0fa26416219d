"""How an engine ended -> a stable reason and a sentence that says what to do."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_proxy.domain.lifecycle import Reason

_ARGPARSE_EXIT = 2
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # what a shell answers for a command it cannot run
_PORT_TAKEN = "address already in use"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine is not there. `message` is for people."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How the first process of an engine ended: exit code or signal; both None when it cannot be known."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"signal {signal.Signals(self.signal).name}" if self.signal in set(signal.Signals) else "a signal"
        return "exit code unknown" if self.code is None else f"exit code {self.code}"


def diagnose(ended: Exit, tail: Sequence[str], *, was_ready: bool) -> Diagnosis:
    """Read exit status and last lines. Any exit that nobody asked for is a failure: vLLM exits 0 when it dies."""
    last = next((line.strip() for line in reversed(tail) if line.strip()), "")
    if ended.code in {_NOT_EXECUTABLE, _NOT_FOUND} and not was_ready:
        return Diagnosis(Reason.COMMAND_NOT_FOUND, f"cannot run the engine's command: {last or ended}")
    if ended.code == _ARGPARSE_EXIT and not was_ready:
        return Diagnosis(Reason.INVALID_ARGUMENTS, f"vLLM refuses its options: {last or ended}")
    if any(_PORT_TAKEN in line.lower() for line in tail):
        return Diagnosis(Reason.PORT_IN_USE, "another program took the engine's port while it loaded")
    when = "while it served" if was_ready else "before it was ready"
    if ended.signal == signal.SIGKILL:
        return Diagnosis(Reason.KILLED, f"killed {when}, perhaps by the kernel for want of memory: see dmesg")
    cause = next((line.strip() for line in reversed(tail) if "Error" in line), last)
    return Diagnosis(Reason.CRASHED, f"the engine ended {when} ({ended}){': ' if cause else ''}{cause}")
