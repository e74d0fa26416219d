"""Whether models have become what the file asks for: what is behind yet, why, and who waits for it.

Only looks: a wait that ends, by its deadline or with its client, changes nothing. What counts is the file as it is at
the end of the wait, so a change that comes meanwhile is waited for, too.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor

_FOR_GOOD = frozenset({Reason.NOT_ENDED, Reason.DOES_NOT_FIT})  # somebody has to do something first


@dataclass(frozen=True, slots=True)
class Behind:
    """What is not as the file asks. `comes`: it may become so by itself."""

    name: str  # of an instance, a model or an adapter
    why: str
    comes: bool

    def __str__(self) -> str:
        """As people read it."""
        return f"{self.name}: {self.why}"


class Arrivals:
    """Waits for the models of one daemon."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._waiting: set[asyncio.Event] = set()
        reconciler.listen(self._moved)

    def _moved(self, _: Model) -> None:
        for one in self._waiting:
            one.set()

    async def wait(self, model_id: str | None, seconds: float) -> list[Behind]:
        """What is behind of a model, or of all, once nothing more comes by itself, or after so many seconds.

        Empty: each instance runs what the file asks for, and is ready or sleeps. A model that is gone is not behind.

        Raises:
            RequestError: `shutting_down`.

        """
        moved = asyncio.Event()
        self._waiting.add(moved)
        try:
            async with asyncio.timeout(seconds):
                while any(one.comes for one in self.behind(model_id)):
                    if self._reconciler.stopping.is_set():  # there may be no other move
                        msg = "cannot wait for this change any longer: the daemon stops; the file has it"
                        raise RequestError("shutting_down", msg)
                    await moved.wait()
                    moved.clear()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(moved)
        return self.behind(model_id)

    def behind(self, model_id: str | None) -> list[Behind]:
        """What is behind now of a model, or of all."""
        models = self._reconciler.models()
        return [one for model in models if model_id in {None, model.spec.id} for one in _of_model(model)]


def _of_model(model: Model) -> Iterator[Behind]:
    if model.refusal is not None and not model.ends:
        yield Behind(model.name, model.refusal.message, comes=False)
        return
    there = [one for one in model.instances if one.state is not State.STOPPED]
    found = [behind for one in there if (behind := _of_instance(model, one))]
    arrived, wanted = len(there) - len(found), model.spec.policy.replicas if model.is_to_run else 0
    if model.ends and not found:
        yield Behind(model.name, "is being removed", comes=True)
    elif arrived < wanted and not found:
        yield Behind(model.name, f"{arrived} of {wanted} replicas run", comes=True)
    yield from found
    if arrived and wanted:
        yield from _of_adapters(model, arrived)


def _of_instance(model: Model, one: Supervisor) -> Behind | None:
    """Why it is behind; None where it is what is wanted."""
    known = one.diagnosis.message if one.diagnosis else one.waiting_because
    again = model.is_renewed(one)
    comes = again or not (one.state is State.ERROR or (one.diagnosis and one.diagnosis.reason in _FOR_GOOD))
    if one.spec.engine != model.spec.engine and one.state is not State.ERROR:
        what = "runs what was asked for before"
    elif one.state in {State.READY, State.SLEEPING} and not again:
        return None
    elif one.state is State.LOADING and one.phase is not None:
        what = f"loading ({one.phase})"
    else:
        what = str(one.state)
    return Behind(one.name, f"{what}; {known}" if known else what, comes=comes)


def _of_adapters(model: Model, arrived: int) -> Sequence[Behind]:
    found = []
    for one in model.adapters_now():
        if one.message is not None:
            found.append(Behind(one.id, one.message, comes=False))
        elif one.state != "ready" or len(one.instances) < arrived:
            found.append(Behind(one.id, "is being loaded", comes=True))
    return found
