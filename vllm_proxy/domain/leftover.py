"""Which models that come and go can never have what those leave that always run, in the sentence of their requests.

For warnings: of `check`, and of a daemon that starts. What makes a file be refused is in `fit`. In doubt a model fits:
it is told only where it has no room however the others are placed.
"""

from collections.abc import Mapping, Sequence

from vllm_proxy.domain import fit, waiting
from vllm_proxy.domain.fit import Demand, Misfit
from vllm_proxy.domain.ledger import Ask, Device, Hold, Standing, Where
from vllm_proxy.domain.packing import Part, placed
from vllm_proxy.domain.waiting import Situation

_MOST_STEPS = 1000  # of the search for one model
_MOST_SEARCHES = 100  # models that want the same are one


def crowded_out(
    demands: Sequence[Demand],
    devices: Mapping[str, Device],
    measured: Mapping[str, int],
    misfits: Sequence[Misfit],
) -> list[Misfit]:
    """One for each such model. `misfits`: what `fit` found of the same, of which nothing more is said."""
    told = {one.model for one in misfits}
    here = [one for one in demands if one.count and not one.elsewhere and one.model not in told]
    resident, others = [one for one in here if one.always], [one for one in here if not one.always]
    if not devices or not resident or not others or any(one.key == fit.TOGETHER for one in misfits):
        return []
    parts = fit.parts_of(resident, devices, measured)
    where = placed(parts, devices)
    if where is None or not all(where):
        return []
    what_is = Situation(0, devices, {hold.name: hold for hold in _holds(resident, parts, where)})
    known: dict[tuple[object, ...], bool] = {}
    found = []
    for one in others:
        part = Part(fit.needs(one, devices, measured.get(one.model)), one.count, one.named)
        wants = (*part.needs.items(), part.count, part.named)
        if wants not in known and len(known) < _MOST_SEARCHES:
            known[wants] = placed([*parts, part], devices, _MOST_STEPS) is None
        if known.get(wants):
            ask = Ask(f"{one.model}/0", one.model, part.needs, one.count, one.named or ())
            key = "memory" if one.memory is not None else "gpu_memory_utilization"
            found.append(Misfit(one.model, key, waiting.stuck_sentence(ask, what_is), 0))
    return found


def _holds(resident: Sequence[Demand], parts: Sequence[Part], where: Sequence[Where]) -> list[Hold]:
    names = [(one.model, index) for one in resident for index in range(one.replicas)]
    return [
        Hold(f"{model}/{index}", model, {name: part.needs[name] for name in there}, Standing.SERVES, always=True)
        for (model, index), part, there in zip(names, parts, where, strict=True)
    ]
