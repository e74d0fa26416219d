"""Two real engines that may sleep, for several files: each daemon of a test adopts them, and keeps them for the next.

One start of each, which computes for half a minute, does for all. They work on one request at a time.
"""

import os
import tomllib
from pathlib import Path
from typing import Any

from tests.harness import Daemon, daemon
from vllm_proxy.demo.prepare import chat_model
from vllm_proxy.demo.threads import openmp

KEEP = 'on_exit = "keep"'
LEVELS = {"one": 1, "two": 2}  # model -> level


def configuration(server: str = "", defaults: str = "", tables: str = "") -> str:
    """The same weights under two names, one for each level. The arguments: lines of these tables, more tables.

    An engine that shares fairly is started otherwise, so all of these do.
    """
    environment = "\n".join(f'{name} = "{value}"' for name, value in openmp(2).items())
    models = "".join(f"[models.{name}]\nsleep = {level}\n" for name, level in LEVELS.items())
    return f"""
[server]
fair = true
{server}
[engine.env]
{environment}
HF_HUB_OFFLINE = "1"
VLLM_CPU_OMP_THREADS_BIND = "nobind"
VLLM_CPU_KVCACHE_SPACE = "1"
[devices]
source = "cpu"
reserve = 0
[defaults]
start = "on-demand"
model = "{chat_model(os.environ)}"
max_model_len = 512
max_num_seqs = 1
gpu_memory_utilization = 0.1
queue_timeout = "15m"
restart = {{ max_failures = 1 }}
args = {{ enforce_eager = true }}
{defaults}
{models}
{tables}
"""


def under_daemon(folder: Path, defaults: str = "", tables: str = "") -> Any:  # noqa: ANN401 - a context manager
    """A daemon that finds the engines there, and keeps them. The rest: as of `configuration`."""
    return daemon(configuration(KEEP, defaults, tables), folder)


async def all_pids(running: Daemon) -> dict[str, int]:
    """The first process of each model's engine."""
    return {name: (await running.instance(name))["pid"] for name in LEVELS}


async def answer(running: Daemon, model: str) -> str:
    """A whole greedy answer to a client."""
    ask = {"model": model, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}
    text: str = (await running.post("/v1/completions", ask))["choices"][0]["text"]
    return text


async def in_state(running: Daemon, state: str, *models: str) -> None:
    """Wait until these are so."""
    for name in models:
        await running.once(name, lambda one: one["state"] == state)


def record_of(running: Daemon, model: str) -> dict[str, Any]:
    """What is on record of a model's engine."""
    records: list[dict[str, Any]] = tomllib.loads((running.state_dir / "engines.toml").read_text())["engines"]
    return next(record for record in records if record["instance"] == f"{model}/0")
