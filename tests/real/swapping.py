"""What is asked of two real models that do not fit together, wherever their memory is."""

import re
from collections.abc import Callable
from typing import Any

from tests import mixed_load
from tests.harness import Daemon
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.fit import CUDA_CONTEXT_BYTES, demand_of, needs
from vllm_proxy.domain.ledger import Device, Kind

GIB = 2**30


async def one_serves(running: Daemon) -> tuple[Any, str]:
    """Of the models `a` and `b` the instance that is ready, `a` where none is, and the name of the other one."""
    instances = {name: await running.instance(name) for name in "ab"}
    ready = [name for name, instance in instances.items() if instance["state"] == "ready"]
    name = ready[0] if ready else "a"
    assert await mixed_load.run(running.url, [[name]]) == []
    return await running.instance(name), "b" if name == "a" else "a"


async def refused_without_room(running: Daemon, device_now: Callable[[], Device]) -> tuple[float, float]:
    """What vLLM wants where nobody made room for it, as it says itself and as `fit` has it, in GiB.

    It looks at what is free after the CUDA context was made, which the need of a GPU includes. The device is asked for
    when it has: a virtual machine's memory may grow and shrink.
    """
    _, other = await one_serves(running)
    text = running.file.read_text(encoding="utf-8")
    running.save(re.sub(r'source = "\w+"', 'source = "none"', text))
    await running.adopts()
    (failure,) = await mixed_load.run(running.url, [[other]])
    assert "503" in failure
    ended = (await running.instance(other))["last_exit"]
    assert ended["reason"] == "insufficient_memory"
    said = re.search(r" asks for ([\d.]+) GiB", ended["message"])
    assert said, ended
    device = device_now()
    model = parse_config(text.encode(), "models.toml").models[other]
    (need,) = needs(demand_of(model), {"0": device}).values()
    return float(said[1]), (need - (CUDA_CONTEXT_BYTES if device.kind is Kind.GPU else 0)) / GIB
