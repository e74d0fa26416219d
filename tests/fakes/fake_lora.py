"""The LoRA adapters of the fake, as vLLM 0.32 has them: what its server lists, and what its core holds.

Kept from vLLM: the two are not the same. The server knows names and folders; the core holds weights by a number of each
load, in a cache of `--max-cpu-loras` that forgets the one that was used last longest ago. One that it has forgotten is
read again at the next step of a request for it, and where its files are gone the core dies of that. What is unloaded is
forgotten by the server alone, and requests for it go on. What lies on the devices is lost in a sleep of level 2.

A folder may ask for a fault, by `"fake"` in its configuration: "hang", "fail", "garbage", "die", or {"until": FILE}, as
may `/fake/lora?load=...&unload=...` of all of them, until it is asked otherwise.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import fake_engine  # type: ignore[import-not-found] # beside this script

ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_REQUIRED = ("lora_alpha", "r", "target_modules")
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PLAIN = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_PATHS = (r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+", r"(?:/[\w\-]+)+/[\w\-]+\.\w+")
type Answer = tuple[int, object]  # status, and JSON or the text itself


class RefusedError(Exception):
    """The adapter's files say, in words of vLLM's, why it cannot be loaded."""


class Adapter:
    """One load of an adapter: what a request keeps, whatever becomes of the name."""

    def __init__(self, number: int, name: str, path: str) -> None:
        self.number, self.name, self.path = number, name, path
        self.voice = ""  # what its weights put in front of each answer


class Lora:
    """The adapters of one engine."""

    def __init__(self, options: argparse.Namespace, engine: fake_engine.Engine, die: Callable[[], None]) -> None:
        """`die`: its core does."""
        self.options, self.engine, self.die = options, engine, die
        self.updates = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in {"1", "true"}
        self.listed: dict[str, Adapter] = {}
        self.held: dict[int, Adapter] = {}  # the one that was used last is the last
        self.lost: set[int] = set()  # they say what the base says
        self.faults: dict[str, str] = {}
        self.loads = self.reads = 0
        self._core = asyncio.Lock()

    @property
    def capacity(self) -> int:
        """How many the core holds."""
        return self.options.max_cpu_loras or self.options.max_loras  # type: ignore[no-any-return]

    # The server

    async def answer(self, path: str, body: bytes) -> Answer:
        """Status and value for one request to ROUTES."""
        try:
            asked = json.loads(body)
            name = asked["lora_name"]
        except (ValueError, KeyError, TypeError):
            return _error(
                400, "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'lora_name')}", "Bad Request"
            )
        what = "load" if path == ROUTES[0] else "unload"
        if (fault := self.faults.get(what)) and (answer := await self._fault(fault)):
            return answer
        return await self._load(name, asked) if what == "load" else self._unload(name)

    async def _load(self, name: str, asked: dict[str, Any]) -> Answer:
        path, in_place = asked.get("lora_path", ""), asked.get("load_inplace", False)
        if not name or not path:
            return _error(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        if name in self.options.served_model_name:
            return _error(400, f"The lora adapter '{name}' conflicts with a served base model.", "InvalidUserInput")
        if name in self.listed and not in_place:
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            return _error(400, f"{message}set 'load_inplace' to True.", "InvalidUserInput")
        before = self.listed.get(name)
        if before is None:
            self.loads += 1
        adapter = Adapter(before.number if before else self.loads, name, path)
        try:
            if answer := await self._fault(_configuration(path).get("fake")):
                return answer
            await self.engine.running.wait()
            async with self._core:
                self._take(adapter)
        except FileNotFoundError:
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        except (RefusedError, OSError, ValueError, TypeError, AttributeError) as error:
            cause = f"Worker failed with error '{error}', please check the stack trace above for the root cause"
            cause = cause if self.engine.core.workers else str(error)
            return _error(500, f"Call to add_lora method failed: {cause}", "InternalServerError")
        self.listed[name] = adapter
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> Answer:
        if not name:
            return _error(400, "'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput")
        if name not in self.listed:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self.listed[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    async def _fault(self, fault: object) -> Answer | None:
        """What was asked for instead; None: nothing, or it is over."""
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "die":
            self.die()
            await asyncio.Event().wait()
        if isinstance(fault, dict):
            while not os.path.exists(fault["until"]):  # noqa: PTH110 - imports nothing
                await asyncio.sleep(0.005)
        if fault == "fail":
            return _error(500, "Call to add_lora method failed: CUDA error: out of memory", "InternalServerError")
        return (200, "<html>") if fault == "garbage" else None

    def cards(self) -> list[dict[str, object]]:
        """As `/v1/models` lists them."""
        card = {"object": "model", "owned_by": "vllm", "parent": self.options.served_model_name[0]}
        return [{"id": it.name, **card, "root": it.path, "max_model_len": None} for it in self.listed.values()]

    # The core

    def use(self, adapter: Adapter) -> bool:
        """One step of a request for it. False: its files are gone, which is the end of the core."""
        try:
            self._take(adapter)
        except (RefusedError, OSError, ValueError, TypeError, AttributeError):
            return False
        return True

    def _take(self, adapter: Adapter) -> None:
        """Hold it, as the one that was used last: read it, unless it is held, and forget another for it."""
        if held := self.held.pop(adapter.number, None):
            if held.path == adapter.path:
                self.held[adapter.number] = held
                adapter.voice = held.voice
                return
            self.lost.discard(adapter.number)
        adapter.voice = self._read(adapter.path)
        if len(self.held) >= self.capacity:
            forgotten = next(iter(self.held))
            del self.held[forgotten]
            self.lost.discard(forgotten)
        self.held[adapter.number] = adapter

    def _read(self, path: str) -> str:
        """What an adapter says, by its files.

        Raises:
            FileNotFoundError: there is no configuration.
            RefusedError: vLLM refuses it.

        """
        if not self.options.enable_lora:
            raise RefusedError("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        self.reads += 1
        found = _configuration(path)
        if missing := {name for name in _REQUIRED if name not in found}:
            raise RefusedError(f"Missing required configuration fields: {missing}")
        if problems := _refused(found, self.options.max_lora_rank):
            raise RefusedError(" ".join(problems))
        if strange := [name for name in found["target_modules"] if name not in _MODULES]:
            text = f"While loading {path}, expected target modules in {set(_MODULES)} but received {strange}."
            raise RefusedError(f"{text} Please verify that the loaded LoRA module is correct")
        for name in _WEIGHTS:
            if os.path.isfile(f"{path}/{name}"):  # noqa: PTH113 - imports nothing
                return voice_of(path, name)
        raise RefusedError(f"{path} doesn't contain tensors")

    def slept(self) -> None:
        """At level 2: what lay on the devices is lost, and nobody notices."""
        self.lost = set(self.held)

    def said(self, adapter: Adapter | None) -> str:
        """What its weights put in front of what the base says."""
        if adapter is None or adapter.number in self.lost:
            return ""
        return f"{adapter.name}@{adapter.voice}: "

    # Tests

    def control(self, query: str) -> dict[str, object]:
        """Faults for all that follows, by `load` and `unload`; an empty one ends them. Tells what there is."""
        for what, values in parse_qs(query, keep_blank_values=True).items():
            self.faults[what] = values[-1]
        return {
            "listed": {it.name: it.path for it in self.listed.values()},
            "held": [it.name for it in self.held.values()],
            "loads": self.loads,
            "reads": self.reads,
        }


def voice_of(path: str, name: str = _WEIGHTS[0]) -> str:
    """Eight digits over the files of an adapter."""
    digest = hashlib.sha256()
    for file in (_CONFIG, name):
        with open(f"{path}/{file}", "rb") as content:  # noqa: PTH123 - imports nothing
            digest.update(content.read())
    return digest.hexdigest()[:8]


def _configuration(path: str) -> dict[str, Any]:
    with open(f"{path}/{_CONFIG}", encoding="utf-8") as file:  # noqa: PTH123 - imports nothing
        return json.load(file)  # type: ignore[no-any-return]


def _refused(found: dict[str, Any], most: int) -> list[str]:
    """What vLLM does not take of a configuration, in its words."""
    problems = []
    init = found.get("init_lora_weights", True)
    if other := [name for name in found.get("modules_to_save") or [] if name not in {"classifier", "score"}]:
        problems.append(
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification '
            f"models. Unsupported modules_to_save: {other}"
        )
    if found.get("use_dora"):
        problems.append("vLLM does not yet support DoRA.")
    if found.get("lora_bias"):
        problems.append("vLLM does not support LoRA bias (lora_bias).")
    if isinstance(init, str) and init.lower() not in _PLAIN:
        problems.append(f"vLLM does not support init_lora_weights={init!r}.")
    if found.get("alora_invocation_tokens"):
        problems.append("vLLM does not support Activated LoRA (aLoRA).")
    rank = max([found["r"], *(found.get("rank_pattern") or {}).values()])
    if rank > most:
        problems.append(f"LoRA rank {rank} is greater than max_lora_rank {most}.")
    if found.get("bias", "none") != "none":
        problems.append("Adapter bias is not supported.")
    return problems


def _error(status: int, message: str, kind: str) -> Answer:
    """One of vLLM's, which shows no paths."""
    for pattern in _PATHS:
        message = re.sub(pattern, "<path>", message)
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
