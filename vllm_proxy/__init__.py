"""One OpenAI-compatible address in front of many vLLM processes.

Start with ARCHITECTURE.md beside this file; HACKING.md says where a change goes.
"""

from importlib.metadata import version

__version__ = version("vllm-proxy")
