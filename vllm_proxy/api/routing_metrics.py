"""The series of balancing, a part of `/metrics`: what decided who got a request, and what was known of prompts.

Counted by the registry as it chooses. What engines really had in their caches is among their own series.
"""

from vllm_proxy.api.by_model import ByModel, Lines
from vllm_proxy.domain.exposition import Family
from vllm_proxy.fleet.model import Model
from vllm_proxy.traffic.registry import Registry

ROUTED = Family(
    "vllm_proxy_routed_total",
    "counter",
    "Requests that got an instance, repeated ones each time, by what decided: `prefix` (what it was sent before, or a "
    "session), `load`, or `only`: no other could take it.",
    ("by", "model"),
)
PREFIX = Family(
    "vllm_proxy_prefix_bytes_total",
    "counter",
    "Bytes of the prompts that were compared, up to 1 MiB of each: `known` is `yes` for those that begin what the "
    "instance was sent before.",
    ("known", "model"),
)
FAMILIES = (ROUTED, PREFIX)

type _Mark = tuple[int, int, int, int, int]


def by_model(registry: Registry) -> ByModel[Model, _Mark]:
    """All of them, its adapters' requests included; of a model that got no request there are none."""

    def mark(model: Model) -> _Mark:
        found = registry.routed(model.spec.id)
        return found.prefix, found.load, found.only, found.known_bytes, found.all_bytes

    return ByModel(mark, _lines)


def _lines(model: str, _: Model, mark: _Mark) -> Lines:
    prefix, load, only, known, size = mark
    for by, count in (("prefix", prefix), ("load", load), ("only", only)):
        if count:
            yield ROUTED, ROUTED.line(count, by, model)
    if size:
        yield PREFIX, PREFIX.line(known, "yes", model)
        yield PREFIX, PREFIX.line(size - known, "no", model)
