"""What is valid in a file, and will not do what its writer means: paths, commands, keys without effect. For `check`.

Looks at the file system, and runs nothing. What `[devices]` manages is weighed by `objections`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllm_proxy.domain import args, fit
from vllm_proxy.domain.adapters import CONFIG
from vllm_proxy.domain.config import Config, ModelSpec, Policy
from vllm_proxy.domain.secrets import show
from vllm_proxy.domain.toml import KeyPath
from vllm_proxy.engine.find import find_vllm
from vllm_proxy.engine.program import LaunchError, Programs
from vllm_proxy.runtime.regular_file import is_missing

type Found = tuple[KeyPath, str]  # where, what

_API_KEY = "VLLM_API_KEY"
_MODEL_PLACE = "{model}"  # in a command: the daemon puts the model there


def oversights(config: Config, folder: Path, env: Mapping[str, str], *, shares: bool) -> Iterator[Found]:
    """What this machine lacks, of every model that is not off.

    `folder`: of the file. `env`: what engines would inherit. `shares`: whether those of one device are added up.
    """
    programs = Programs(folder, env, find_vllm(env))
    wanted = _wanted(config)
    for model in wanted:
        for key, message in (
            *_of_paths(model, folder),
            *_of_adapters(model, folder),
            *_of_command(model, programs),
            *_of_devices(model),
            *_of_no_device(model, config),
        ):
            yield ("models", model.id, *key), message
    yield from _of_vllm(wanted, programs)
    if shares:
        yield from _of_shares(wanted)


def ineffective(config: Config, folder: Path) -> list[Found]:
    """What does nothing, or not what it looks like, on any machine; of the defaults and of `[engine]` once."""
    wanted = _wanted(config)
    found = [*_of_idle_timeouts(wanted)]
    for model in wanted:
        found += [*_of_name(model, folder), *_of_api_key(model, config), *_of_options(model, config)]
    return list(dict.fromkeys(found))


def _wanted(config: Config) -> list[ModelSpec]:
    return [model for model in config.models.values() if model.policy.enabled]


# On this machine: at keys below the model's table


def _of_paths(model: ModelSpec, folder: Path) -> Iterator[Found]:
    spec = model.engine
    texts: dict[KeyPath, object] = {("model",): spec.model}
    texts |= {("args", name): value for name, value in spec.args.items()}
    texts |= {("env", name): value for name, value in spec.variables.items()}
    for key, value in texts.items():
        if isinstance(value, str) and value.startswith("~/"):
            yield key, _no_shell(value)
    if spec.model.startswith(("/", "./", "../")) and is_missing(folder / spec.model):
        yield ("model",), f"there is no {spec.model}"


def _of_adapters(model: ModelSpec, folder: Path) -> Iterator[Found]:
    """Folders that are not there: a file is read as by a daemon that starts, where that is up to the adapter alone."""
    for one in model.adapters.values():
        key = ("adapters", one.id, "path")
        if not one.enabled or one.is_hub_id:
            continue
        if one.path.startswith("~/"):
            yield key, _no_shell(one.path)
        elif is_missing(folder / one.path):
            yield key, f"there is no folder {one.path}"
        elif is_missing(folder / one.path / CONFIG):
            yield key, f"there is no {CONFIG} in {one.path}"


def _no_shell(path: str) -> str:
    return f"no shell replaces the ~ of {path}: write the whole path"


def _of_command(model: ModelSpec, programs: Programs) -> Iterator[Found]:
    if model.engine.command is None:
        return
    try:
        programs.command(model.engine)
    except LaunchError as error:
        yield ("command",), error.diagnosis.message


def _of_vllm(models: list[ModelSpec], programs: Programs) -> Iterator[Found]:
    """Said once: a file may be checked where no vLLM is installed."""
    try:
        for model in models:
            if model.engine.command is None:
                programs.command(model.engine)
    except LaunchError as error:
        yield ("engine", "command"), error.diagnosis.message


def _of_no_device(model: ModelSpec, config: Config) -> Iterator[Found]:
    """Usual for vLLM on a CPU, and meant for GPUs."""
    names_none = model.engine.variables.get("CUDA_VISIBLE_DEVICES", "0").strip() == ""
    if config.devices.source == "cpu" and names_none and model.engine.devices is None:
        what = "with an empty CUDA_VISIBLE_DEVICES it has no device, so that its memory is not managed"
        yield ("env", "CUDA_VISIBLE_DEVICES"), f'{what}: remove it where [devices] has source = "cpu"'


def _of_devices(model: ModelSpec) -> Iterator[Found]:
    named = model.engine.devices
    count = fit.demand_of(model).count
    if named and count > len(named):
        yield ("devices",), f"names {len(named)}, and the model's engine wants {count}"


def _of_shares(models: list[ModelSpec]) -> Iterator[Found]:
    """The first model of each device with which those that always run want more than there is."""
    shares: defaultdict[object, float] = defaultdict(float)
    for model in models:
        share = model.engine.gpu_memory_utilization
        if share is None or model.policy.start != "always":
            continue
        for device in model.engine.devices or ():
            before, shares[device] = shares[device], shares[device] + share * model.policy.replicas
            if before <= 1 < shares[device] and not math.isclose(shares[device], 1):
                msg = f"all that always run want {shares[device]:g} of device {device}: together at most 1"
                yield ("models", model.id, "gpu_memory_utilization"), msg


# On any machine: at keys of the whole file


def _of_idle_timeouts(models: Sequence[ModelSpec]) -> Iterator[Found]:
    """Those of models that are never unloaded for want of requests; 0 says just that."""
    starts = {model.policy.start for model in models}
    for model in models:
        start, given = model.policy.start, model.policy.idle_timeout
        if start == "on-demand" or not given:
            continue
        if "idle_timeout" in model.written:
            message = f'does nothing: start is {show(start)}; write start = "on-demand"'
            yield ("models", model.id, "idle_timeout"), message
        elif given != Policy().idle_timeout and "on-demand" not in starts:
            yield ("defaults", "idle_timeout"), 'does nothing: no model has start = "on-demand"'


def _of_name(model: ModelSpec, folder: Path) -> Iterator[Found]:
    name = model.engine.model
    is_tag = ":" in name and "/" not in name
    if (is_tag or any(map(str.isspace, name))) and is_missing(folder / name):
        of_others = "; names of Ollama are not known here" if is_tag else ""
        message = f'{show(name)} is no Hugging Face id and no folder{of_others}: write one such as "Qwen/Qwen3-8B"'
        yield ("models", model.id, "model") if "model" in model.written else ("defaults", "model"), message


def _of_api_key(model: ModelSpec, config: Config) -> Iterator[Found]:
    """The daemon is the only client of an engine."""
    if _API_KEY in model.engine.env:
        own, engine = model.written.get("env", {}), config.engine.env
        path = ("env", _API_KEY)
        where = ("models", model.id) if _API_KEY in own else ("engine",) if _API_KEY in engine else ("defaults",)
        yield (
            (*where, *path),
            "does nothing: each engine gets a key of its own; [keys.NAME] says who may ask the daemon",
        )


def _of_options(model: ModelSpec, config: Config) -> Iterator[Found]:
    """Options in a command, behind the program: the daemon does not know of them, and gives others."""
    command = model.engine.command or ()
    of_engine = "command" not in model.written and command == config.engine.command
    where = ("engine",) if of_engine else ("models", model.id) if "command" in model.written else ("defaults",)
    for token in command[_first_option(command) :]:
        option = token.partition("=")[0]
        name = args.option_name(option.lstrip("-"))
        if not option.startswith("-") or (name == "model" and any(_MODEL_PLACE in part for part in command)):
            continue
        if instead := args.instead(name, is_short=not option.startswith("--")):
            yield (*where, "command"), f"gives {option}: {instead}"


def _first_option(command: Sequence[str]) -> int:
    """Where vLLM's own may begin: what stands before `serve` is for another program that starts it."""
    ends = [index for index, word in enumerate(command) if word == "serve" or word.endswith("api_server")]
    return ends[0] + 1 if ends else 1
