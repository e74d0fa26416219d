"""What it costs to choose between engines by the prompt: `python -m tests.bench.balance`, and a case of `tests.bench`.

In a loop: a body's model and prompt are found, an instance is chosen, held and released; the least of many short
rounds, in which all take turns. In the case: processor time of the daemon, with one engine, and with four.
"""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import build, cases, peers
from vllm_proxy.api.openai import follow_prompt
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.traffic.body import members, model_name, usable
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.prompt import Prompt
from vllm_proxy.traffic.registry import Registry

ONE, LOAD, PREFIX = "one engine", "four, least-loaded", "four, prefix"
FILES = {
    ONE: "",
    LOAD: 'replicas = 4\nbalance = "least-loaded"\n',
    PREFIX: 'replicas = 4\nbalance = "prefix"\n',
}
SIZES = {"1 KiB": 1024, "40 KiB": 40 * 1024}
COMPARED = ("json32",)
_CALLS, _ROUNDS = 50, 400
_HEAD = b"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nContent-Type: application/json\r\nUser-Agent: bench\r\n"


class Request:
    """As much of a call as is looked at."""

    prompt: Prompt | None = None
    salt = b""
    forwarded = _HEAD
    route = "/v1/chat/completions"


def chat(size: int, number: int = 0) -> bytes:
    """A chat of so many bytes."""
    text = f"{number} You are a helpful assistant who answers in few words. " * (size // 40)
    empty = len(json.dumps({"model": "bench", "messages": [{"role": "user", "content": ""}]}))
    return json.dumps({"model": "bench", "messages": [{"role": "user", "content": text[: size - empty]}]}).encode()


def registry(keys: str) -> Registry:
    """With this model, ready."""
    (spec,) = parse_config(f'[models.bench]\nmodel = "x"\n{keys}'.encode(), "models.toml").models.values()
    found = Registry()
    found.declare(spec, lambda: None)
    found.report("bench", State.READY, None)
    for index in range(spec.policy.replicas):
        found.add_endpoint("bench", Endpoint(f"bench/{index}", TcpAddress("127.0.0.1", 9000 + index), "secret", None))
    return found


def request(found: Registry, body: bytes) -> None:
    """What is done of a request here, as `api/openai.py` and `traffic/relay.py` do it."""
    call, parts = Request(), None
    if found.balances:
        parts = members(body)
        name = usable(parts.model)
    else:
        name = model_name(body)
    route = found.find(name)
    if parts is not None:
        follow_prompt(call, route, parts)
    lease = found.lease(route, None, call.prompt)
    assert lease is not None
    with lease:
        pass


async def cost(calls: int = _CALLS, rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds a request, by size and kind."""
    found = {}
    for size, count in SIZES.items():
        works: dict[str, Callable[[], None]] = {}
        for name, keys in FILES.items():
            there = registry(keys)
            for number in range(1500):  # it remembers as much as it may
                request(there, chat(20_000, number))
            works[name] = partial(request, there, chat(count))
        found[size] = _least(works, calls, rounds)
    return found


def _least(works: dict[str, Callable[[], None]], calls: int, rounds: int) -> dict[str, float]:
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            began = time.perf_counter()
            for _ in range(calls):
                work()
            least[name] = min(least[name], (time.perf_counter() - began) / calls * 1e6)
    return least


def measure(
    programs: build.Programs, folder: Path, rounds: int, seconds: float, say: Callable[[str], None]
) -> cases.Results:
    """CPU a request of daemons with these engines, which take turns."""
    with (
        peers.ours(programs, folder, name=ONE, model=FILES[ONE]) as one,
        peers.ours(programs, folder, name=LOAD, model=FILES[LOAD]) as load,
        peers.ours(programs, folder, name=PREFIX, model=FILES[PREFIX]) as prefix,
    ):
        return cases.run_rounds(programs, [one, load, prefix], COMPARED, rounds, seconds, say)


if __name__ == "__main__":
    for size, kinds in asyncio.run(cost()).items():
        for name, least in kinds.items():
            print(f"{least:6.2f} us  {size}, {name}; {least - kinds[ONE]:+.2f}")
