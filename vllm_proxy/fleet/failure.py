"""How an engine ended that was not asked to: why, as its exit and its log say, and its last lines.

For supervisors, which show it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from vllm_proxy.domain.diagnose import Diagnosis, Exit, diagnose
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.engine.interface import Engine
from vllm_proxy.fleet.dependencies import Dependencies

_TAIL_LINES = 20  # shown
_SHOWN_CHARACTERS = 2000  # of each
_DIAGNOSED_LINES = 2000  # the root cause is far above the last lines of vLLM


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the engine last ended without being asked to."""

    diagnosis: Diagnosis
    ended: Exit
    at: datetime
    log_tail: tuple[str, ...]


async def last_exit(
    engine: Engine,
    verdict: Diagnosis | None,
    shared: Dependencies,
    *,
    was_ready: bool,
    known_options: Collection[str] = (),
) -> LastExit:
    """As `_inspected`, in a thread: a log may be megabytes of dumps."""
    inspect = partial(_inspected, engine, verdict, was_ready=was_ready, known_options=known_options, mask=shared.mask)
    return await shared.offload(inspect)


def _inspected(
    engine: Engine,
    verdict: Diagnosis | None,
    *,
    was_ready: bool,
    known_options: Collection[str],
    mask: Callable[[str], str],
) -> LastExit:
    """What became of an engine. `verdict` None: it ended, and its exit and its log are diagnosed."""
    ended = engine.exited.result() if verdict is None else Exit(None, None)
    tail = engine.output.tail(_TAIL_LINES if verdict else _DIAGNOSED_LINES)
    asleep = bool(engine.asleep)
    why = verdict or diagnose(ended, tail, was_ready=was_ready, asleep=asleep, known_options=known_options, mask=mask)
    if verdict is None and why.reason is Reason.CRASHED and (problem := engine.log.check()):
        why = Diagnosis(Reason.CRASHED, f"{why.message}; {problem}")
    shown = tuple(mask(line)[:_SHOWN_CHARACTERS] for line in tail[-_TAIL_LINES:])
    return LastExit(why, ended, datetime.now(UTC), shown)
