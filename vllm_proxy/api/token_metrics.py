"""The series of tokens that the engines count themselves, for whoever asked, a part of `/metrics`.

They have no label `key`: with one, `vllm_proxy_tokens_total` is what the answers to that caller said. Who adds up a
family takes one of both kinds.
"""

from collections.abc import Mapping

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.fleet.model import Model

TOKENS = Family(
    "vllm_proxy_tokens_total",
    "counter",
    "Tokens: with `key`, as answers to that caller said; without, as the engines count by themselves.",
    ("key", "kind", "model"),
)
UNATTRIBUTED = Family(
    "vllm_proxy_tokens_unattributed",
    "gauge",
    "Tokens that the engines have counted and no caller is charged for, since the daemon started.",
    ("model",),
)
FAMILIES = (TOKENS, UNATTRIBUTED)

_OF_ENGINES = TOKENS.without("key")

type _Mark = tuple[tuple[tuple[str, int], ...], int | None]


class Charged:
    """Tokens that callers are charged for, by model, where any are metered: as it was when the scrape began."""

    def __init__(self) -> None:
        self.by_model: Mapping[str, int] = {}


def by_model(charged: Charged) -> ByModel[Model, _Mark]:
    """All of them; a model whose engines keep no counters, or were not asked yet, has no series."""

    def mark(model: Model) -> _Mark:
        found = [charged.by_model.get(each) for each in (model.spec.id, *model.spec.adapters)]
        mine = [count for count in found if count is not None]  # its engines count its adapters' as well
        return tuple(model.history.tokens.items()), sum(mine) if mine else None

    return ByModel(mark, _lines)


def _lines(model: str, _: Model, mark: _Mark) -> Lines:
    counted, charged = mark
    for kind, count in counted:
        yield _OF_ENGINES, _OF_ENGINES.line(count, kind, model)
    if counted and charged is not None:
        by_kind = dict(counted)
        yield UNATTRIBUTED, UNATTRIBUTED.line(by_kind.get("prompt", 0) + by_kind.get("generation", 0) - charged, model)
