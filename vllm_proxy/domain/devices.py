"""GPUs by their names, and which of them an engine has. A name is an index or a UUID, as CUDA takes them."""

from collections.abc import Mapping

from vllm_proxy.domain.config import EngineSpec

ANY_DEVICE = "*"  # which GPUs it has is not known


def devices_of(spec: EngineSpec, inherited: Mapping[str, str]) -> frozenset[str]:
    """The GPUs an engine will use on a machine that has some: what engines may not start on at the same time.

    vLLM takes the first `tensor_parallel_size * pipeline_parallel_size` of the visible ones.
    """
    if spec.devices is not None:
        return frozenset(str(device) for device in spec.devices)
    count = (spec.tensor_parallel_size or 1) * (spec.pipeline_parallel_size or 1)
    visible = spec.env.get("CUDA_VISIBLE_DEVICES", inherited.get("CUDA_VISIBLE_DEVICES"))
    if visible is None:
        return frozenset(str(index) for index in range(count))
    named = [name.strip() for name in visible.split(",") if name.strip()]
    return frozenset(named[:count])


def overlap(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets may name the same GPU. An index and a UUID may: nothing here can tell."""
    return any(a == b or ANY_DEVICE in (a, b) or a.isdigit() != b.isdigit() for a in one for b in other)
