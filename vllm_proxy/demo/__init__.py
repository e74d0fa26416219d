"""`vllm-proxy demo`: the daemon with two small real models, on a machine with no GPU and no model hub.

For people who want to try it. Nothing in the daemon may import this package (import-linter).
"""

from vllm_proxy.demo.prepare import prepare

__all__ = ["prepare"]
