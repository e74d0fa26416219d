"""`/metrics/engines`: what vLLM says of itself, of all ready engines at once, each with its model and its replica.

Nobody is woken or started for that. An engine that does not answer in time is told by `vllm_proxy_engine_up`, and has
none of its series.
"""

from collections.abc import Iterator

from vllm_proxy.api.model_metrics import UP
from vllm_proxy.domain.exposition import Exposition
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.relabel import Merged
from vllm_proxy.engine.scrape import scraped
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.supervisor import Supervisor
from vllm_proxy.runtime.turns import in_turns

_VLLM = "vllm:"


class EngineMetrics:
    """Of all engines of one daemon."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._before: dict[str, Merged] = {}  # by prefix

    async def text(self, seconds: float, *, everything: bool) -> bytes:
        """The exposition, with what has come after so long. `everything`: what is not vLLM's own, too."""
        ready = [one for model in self._reconciler.models() for one in model.instances if _is_ready(one)]
        asked = [(one, one.endpoint.address) for one in ready if one.endpoint is not None]
        texts = await scraped([address for _, address in asked], seconds)
        prefix = "" if everything else _VLLM
        merged, up = Merged(prefix, "model", "replica", before=self._before.get(prefix)), Exposition()

        def add() -> Iterator[None]:
            for (one, _), text in zip(asked, texts, strict=True):
                if _is_ready(one):  # still
                    model, _, replica = one.name.rpartition("/")
                    up.add(UP, UP.line(text is not None, model, replica))
                    merged.add(text or b"", model, replica)
                yield

        async for _ in in_turns(add()):
            pass
        text = merged.text(up.text())
        merged.forget()
        self._before[prefix] = merged
        return text


def _is_ready(instance: Supervisor) -> bool:
    return instance.state is State.READY and instance.endpoint is not None
