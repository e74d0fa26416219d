"""`vllm-proxy demo`: the daemon with two small real models, on a machine with no GPU and no model hub."""

from vllm_proxy.demo.prepare import prepare
from vllm_proxy.demo.watch import watch

__all__ = ["prepare", "watch"]
