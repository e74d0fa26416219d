"""Engines that an earlier daemon left (orphans): which of them are adopted, and the end of all others.

For `reconciler` when a daemon starts, and for `vllm-proxy stop --all`. Only processes that are provably an orphan's are
signalled (`engine/ownership.py`).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import structlog

from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.config import EngineSpec, ModelSpec
from vllm_proxy.engine.ending import end_engine
from vllm_proxy.engine.process import end_processes, is_alive
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.fleet.claims import Leftover

log = structlog.get_logger()

_GRACE_SECONDS = 10.0

type Adoptable = dict[str, dict[int, EngineRecord]]  # by model and instance


def classify(
    records: Iterable[EngineRecord], models: Mapping[str, ModelSpec], fingerprint: Callable[[EngineSpec], str]
) -> tuple[Adoptable, list[EngineRecord]]:
    """What an earlier daemon left: engines that are what the file asks for and live, and all others.

    An index is a name: after a replacement that put new beside old, the only instance may be number 1.
    """
    adoptable: Adoptable = {}
    others: list[EngineRecord] = []
    # Of two engines of one instance, the one that has served; of too many, those in front.
    for record in sorted(records, key=lambda record: (not record.ready, record.instance)):
        model_id, _, number = record.instance.rpartition("/")
        model = models.get(model_id)
        wanted = (
            model is not None
            and model.policy.enabled
            and len(adoptable.get(model_id, {})) < model.policy.replicas
            and fingerprint(model.engine) == record.spec
            and is_alive(record.identity)
        )
        mine = adoptable.setdefault(model_id, {})
        if wanted and int(number) not in mine:
            mine[int(number)] = record
        else:
            others.append(record)
    return adoptable, others


def loras(
    records: Iterable[EngineRecord], models: Mapping[str, ModelSpec], fingerprint: Callable[[EngineSpec], str]
) -> dict[str, Lora]:
    """What the engines of models can hold of adapters that an earlier daemon left, where they are what is wanted."""
    found: dict[str, Lora] = {}
    for record in sorted(records, key=lambda record: (not record.ready, record.instance)):
        model_id = record.instance.rpartition("/")[0]
        if record.lora is None or model_id not in models or model_id in found:
            continue
        if fingerprint(models[model_id].with_lora(record.lora).engine) == record.spec and is_alive(record.identity):
            found[model_id] = record.lora
    return found


async def end_orphans(records: Iterable[EngineRecord], state: StateDirectory) -> bool:
    """End engines that an earlier daemon left: each process that is provably theirs. True when nothing is left."""

    async def end(record: EngineRecord) -> bool:
        log.warning("ending an engine that an earlier daemon left", instance=record.instance, pid=record.pid)
        end = partial(end_processes, record.identity)
        if (why := await end_engine(record, end, state, _GRACE_SECONDS)) is not None:
            log.error("an engine cannot be ended", instance=record.instance, why=why)
        return why is None

    return all(await asyncio.gather(*(end(record) for record in records)))


class Orphan:
    """An orphan that is being ended. `changed` is called when that failed, and when it is gone."""

    def __init__(self, leftover: Leftover, changed: Callable[[], None]) -> None:
        self._leftover = leftover
        self._changed = changed

    def stop_timeout(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return _GRACE_SECONDS

    def waits_for_port(self, why: str | None) -> None:
        """Not called: it does not start."""

    def not_ended(self, why: str) -> None:
        """Starts that need its devices keep waiting."""
        self._leftover.failed(why)
        self._changed()

    def gone(self) -> None:
        """Starts wait until all that it left is removed, too: it may be the same instance's."""

    def ended(self) -> None:
        """Its claim is withdrawn."""
        self._leftover.done()
        self._changed()
