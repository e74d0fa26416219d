"""What is valid in a file, and will not do here what its writer means: paths, commands, devices. For `check`.

Looks at the file system, and runs nothing. What `[devices]` manages is weighed by `objections`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_proxy.domain import fit
from vllm_proxy.domain.config import Config, ModelSpec
from vllm_proxy.engine.find import find_vllm
from vllm_proxy.engine.program import LaunchError, Programs

type Found = tuple[str, str, str]  # model, path of the key below it, message


def oversights(config: Config, folder: Path, env: Mapping[str, str], *, shares: bool) -> Iterator[Found]:
    """Of every model that is not off.

    `folder`: of the file. `env`: what engines would inherit. `shares`: whether those of one device are added up.
    """
    programs = Programs(folder, env, find_vllm(env))
    wanted = [model for model in config.models.values() if model.policy.enabled]
    for model in wanted:
        yield from _of_paths(model, folder)
        yield from _of_command(model, programs)
        yield from _of_devices(model)
    if shares:
        yield from _of_shares(wanted)


def _of_paths(model: ModelSpec, folder: Path) -> Iterator[Found]:
    spec = model.engine
    texts = {"model": spec.model, **{f"args.{name}": value for name, value in spec.args.items()}}
    texts |= {f"env.{name}": value for name, value in spec.variables.items()}
    for key, value in texts.items():
        if isinstance(value, str) and value.startswith("~/"):
            yield model.id, key, f"no shell replaces the ~ of {value}: write the whole path"
    if spec.model.startswith(("/", "./", "../")) and _is_missing(folder / spec.model):
        yield model.id, "model", f"there is no {spec.model}"


def _is_missing(path: Path) -> bool:
    """Whether that is certain: engines may see what this user does not."""
    try:
        return not path.exists()
    except OSError:
        return False


def _of_command(model: ModelSpec, programs: Programs) -> Iterator[Found]:
    if model.engine.command is None:  # a file may be checked where no vLLM is installed
        return
    try:
        programs.command(model.engine)
    except LaunchError as error:
        yield model.id, "command", error.diagnosis.message


def _of_devices(model: ModelSpec) -> Iterator[Found]:
    named = model.engine.devices
    count = fit.demand_of(model).count
    if named and count > len(named):
        yield model.id, "devices", f"names {len(named)}, and the model's engine wants {count}"


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
                yield model.id, "gpu_memory_utilization", msg
