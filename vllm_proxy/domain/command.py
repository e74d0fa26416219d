"""Builds the command line and the environment of one engine, from its `EngineSpec` and its `Place`.

Also the fingerprint by which a later daemon recognises an engine, and the mark by which its processes are identified.
Nothing is started here; `engine/launch.py` does that. Source: `envs.py` and the argument parser of vLLM 0.32.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_proxy.domain import args
from vllm_proxy.domain.adapters import Lora
from vllm_proxy.domain.address import Address
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.domain.devices import NO_DEVICES, Allocation

# vLLM's own: seconds that a stopping engine may take for its teardown. It gives workers 5 and then 4 s.
ENGINE_SHUTDOWN_SECONDS = 15
# Longer than any pooled connection of ours stays idle, so that the engine never closes one as a request leaves.
ENGINE_KEEPALIVE_SECONDS = 75

_MARKER = "ENGINE_INSTANCE"  # of a name that starts with VLLM, vLLM warns
_MODEL_PLACE = "{model}"
_API_SERVER = "api_server"
_OPTIONS = tuple(name for name in args.OWN_KEYS.values() if name != "model")
# What is not an engine's: the daemon's own settings, keys and credentials, systemd's messages to it, and what would
# mislead it, leftovers of another launcher.
_SCRUBBED = re.compile(
    r"VLLM_PROXY_.*|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|LISTEN_.*|WATCHDOG_.*|VLLM_PORT|VLLM_HOST_IP|VLLM_DP_.*|MASTER_.*"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|PROMETHEUS_MULTIPROC_DIR"
)
# PyTorch's allocator would round a pinned block up to a power of two: weights that sleep took up to twice their size.
_PINNED = {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:64"}
_ALLOCATORS = frozenset({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"})  # its other names
# Ours unless the user says otherwise.
_DEFAULTS = {
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENGINE_READY_TIMEOUT_S": "86400",  # the daemon alone decides when a start has taken too long
    "PYTHONUNBUFFERED": "1",
    "PROMETHEUS_DISABLE_CREATED_SERIES": "true",  # a fifth of a scrape, and nobody asks when a counter was made
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # device 0 is then the same for vLLM and for nvidia-smi
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one engine runs and how it is known. `folder` is its private temporary folder."""

    instance: str  # "chat/0"
    own_name: str  # a name that only this engine's model list holds
    address: Address
    credential: str
    folder: str
    allocation: Allocation = NO_DEVICES
    may_sleep: bool = False  # it listens at a Unix socket: vLLM's routes to sleep, and to much else, ask for no key


def may_sleep(spec: EngineSpec, allocation: Allocation) -> bool:
    """Whether an engine is started so that it may sleep: not at level 1 where a GPU has the machine's own memory."""
    return spec.sleep is not None and not (spec.sleep == 1 and allocation.unified)


def argv(model_id: str, spec: EngineSpec, command: Sequence[str], place: Place) -> list[str]:
    """The command line: command, model, the daemon's options, the spec's keys, then `args`."""
    if any(_MODEL_PLACE in token for token in command):
        start = [token.replace(_MODEL_PLACE, spec.model) for token in command]
    elif command[-1].endswith(_API_SERVER):
        start = [*command, "--model", spec.model]
    else:
        start = [*command, spec.model]
    return [
        *start,
        *place.address.options(),
        *_sleep_options(place),
        *_lora_options(spec.lora),
        "--served-model-name",
        model_id,
        place.own_name,
        f"--shutdown-timeout={ENGINE_SHUTDOWN_SECONDS}",
        *_own_options(spec, place.allocation),
        *args.tokens({"disable-access-log-for-endpoints": "/health,/metrics,/v1/models", **spec.args}),
    ]


def _sleep_options(place: Place) -> list[str]:
    on_gpus = place.allocation.gpus and bool(place.allocation.devices)
    return ["--enable-sleep-mode"] if on_gpus and place.may_sleep else []  # on a processor vLLM would refuse to start


def _lora_options(lora: Lora | None) -> list[str]:
    if lora is None:
        return []
    room = {"max-lora-rank": lora.rank, "max-loras": lora.loras, "max-cpu-loras": lora.cpu_loras}
    return args.tokens({"enable-lora": True, **room})


def _own_options(spec: EngineSpec, allocation: Allocation) -> list[str]:
    given = {name: value for name in _OPTIONS if (value := getattr(spec, name)) is not None}
    if allocation.share is not None:
        given["gpu_memory_utilization"] = allocation.share
    return args.tokens(given)


def scrubbed(inherited: Mapping[str, str]) -> dict[str, str]:
    """The part of the daemon's environment that its engines get."""
    return {name: value for name, value in inherited.items() if not _SCRUBBED.fullmatch(name)}


def environment(
    inherited: Mapping[str, str], variables: Mapping[str, str], place: Place, *, takes_adapters: bool = False
) -> dict[str, str]:
    """The environment: the inherited one scrubbed, defaults, the user's `env`, then what only the daemon may say."""
    env = {**_DEFAULTS, **scrubbed(inherited), "TMPDIR": place.folder, **variables}
    if place.allocation.visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(place.allocation.visible)
    if any(place.allocation.takes.values()):  # indices are those of the inventory
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if place.may_sleep:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # the routes to sleep and to wake
        if not _ALLOCATORS & env.keys():
            env |= _PINNED
    if takes_adapters:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # the routes to load one and to unload it
    return env | {
        "VLLM_RPC_BASE_PATH": place.folder,  # sockets: removed with the folder, short enough for AF_UNIX
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(ENGINE_KEEPALIVE_SECONDS),
        "VLLM_API_KEY": place.credential,
        **marked(place.instance, place.credential),
    }


def mark(instance: str, credential: str) -> str:
    """What every process of an engine has in its environment, and no other process can: "ENGINE_INSTANCE=chat/0.HASH".

    For people who look at processes it begins with a name; whoever does not know the credential cannot make it up.
    """
    return f"{_MARKER}={instance}.{hashlib.sha256(credential.encode()).hexdigest()[:16]}"


def marked(instance: str, credential: str) -> dict[str, str]:
    """The mark as a part of an environment, and what keeps it readable in /proc/PID/environ."""
    name, _, value = mark(instance, credential).partition("=")
    return {name: value, "SPT_NOENV": "1"}  # setproctitle, which vLLM uses, would write a title over it


def fingerprint(spec: EngineSpec, folder: str) -> str:
    """A hash of what an engine is started for: the engine keys that are given, and where relative paths begin.

    Keys that are not given leave no trace, so a later version that knows more keys comes to the same.
    """
    given = spec.model_dump(mode="json", exclude_none=True)
    text = json.dumps([folder, {key: value for key, value in given.items() if value not in ({}, [])}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
