"""Real vLLM on this machine's processor, for the configurations of the tests."""

from tests.harness import port_block, real_engines
from vllm_proxy.demo.threads import openmp

_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines are pinned to the same cores
}
_KV_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB


def engines_on_cpu(beside: int, *, by_share: bool = False, **variables: str) -> str:
    """The table `[engine]` and its variables, `variables` among them; so many engines run beside each other.

    `by_share`: each has a KV cache as large as its share of the memory allows, else a small one.
    """
    env = openmp(beside) | _VARIABLES | ({} if by_share else _KV_CACHE) | variables
    return f"{real_engines(port_block())}[engine.env]\n" + "".join(f'{key} = "{value}"\n' for key, value in env.items())
