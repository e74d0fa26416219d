"""The types of the values of keys in models.toml: what each takes, and what is said of anything else.

For `config` and `key_table`, which say what keys there are.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from vllm_proxy.domain import hosts, listener, references, secrets
from vllm_proxy.domain.adapters import RANKS
from vllm_proxy.domain.secrets import show
from vllm_proxy.domain.units import parse_duration, parse_size, parse_size_or_percent

_MAX_MODEL_LEN = re.compile(r"auto|\d+(\.\d+)?[kKmMgG]?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # shells drop others from the environment
_ID = re.compile(r"[A-Za-z0-9._:@/-]{1,200}")
_USER = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*@", re.IGNORECASE)
_LEAST_MEMORY = 2**20  # bytes; less is meant as another unit
_ACTIONS = frozenset({"start", "stop", "restart", "sleep", "wake", "logs"})


def id_problem(model_id: str) -> str | None:
    """Why no model can be called so."""
    segments = model_id.split("/")
    if not _ID.fullmatch(model_id):
        return "expected an id of 1 to 200 letters, digits and . _ : @ / -"
    if model_id.startswith("-"):
        return "expected an id that does not begin with -, which vLLM would take for an option"
    if {"", ".", ".."} & set(segments):
        return 'expected an id with no empty, "." or ".." part between its slashes'
    if segments[-1] in _ACTIONS:
        return f"an id may not end in {show(segments[-1])}, which is an action of the REST API"
    return None


def _alias(text: str) -> str:
    if problem := id_problem(text):
        msg = f"{show(text)}: {problem}"
        raise ValueError(msg)
    return text


def _model_name(text: str) -> str:
    if text.startswith("-"):
        msg = f"expected a model, got {show(text)}, which vLLM would take for an option"
        raise ValueError(msg)
    if _USER.match(text):
        raise ValueError("expected a URL without a user or a password in it, which `ps` would show")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        msg = "expected text without NUL characters, which no command line or environment can hold"
        raise ValueError(msg)
    return text


def _max_model_len(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, str) and _MAX_MODEL_LEN.fullmatch(value):
        return value
    msg = f'expected a number of tokens such as 8192, "8k" or "auto", got {show(value)}'
    raise ValueError(msg)


def _sleep(value: object) -> object:
    """pydantic's literals would take `true` and 1.0 for 1."""
    if type(value) is int and value in {0, 1, 2}:
        return value
    msg = f"expected one of 0, 1, 2, got {show(value)}"
    raise ValueError(msg)


def _memory_or_part(size: int | str) -> int | str:
    if isinstance(size, int) and 0 < size < _LEAST_MEMORY:
        msg = f'expected a size such as "64GiB", or a percentage such as "50%", got {show(size)} bytes'
        raise ValueError(msg)
    return size


def _level(sleep: Literal[0, 1, 2]) -> Literal[0, 1, 2] | None:
    """0 is how a model takes back what the defaults say."""
    return sleep or None


def _device(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value and not set(value) & set(", \0"):
        return value
    msg = f"expected a GPU index or UUID, got {show(value)}"
    raise ValueError(msg)


def _each_once(devices: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if len({str(device) for device in devices}) < len(devices):
        msg = "expected each device once"
        raise ValueError(msg)
    return devices


def _env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        msg = f"cannot name an environment variable {show(secrets.shown_name(name))}"
        raise ValueError(msg)
    return name


def _env_value(value: object) -> object:
    """Numbers are accepted, since people write `OMP_NUM_THREADS = 1`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _no_nul(value)
    if secrets.is_reference(value):
        references.reference(secrets.reference_of(value))
        return value
    got = "another table" if isinstance(value, Mapping) else show(value, ("env",))
    expected = 'a string, { file = "..." } or { credential = "..." }' if isinstance(value, Mapping) else "a string"
    msg = f"expected {expected}, got {got}"
    raise ValueError(msg)


def _memory(size: int) -> int:
    if 0 < size < _LEAST_MEMORY:
        msg = f'expected a size such as "20GiB", or 0 for none, got {show(size)} bytes'
        raise ValueError(msg)
    return size


def _adapter_path(text: str) -> str:
    if references.is_credential(text):
        raise ValueError("expected a folder, or the id of an adapter on the hub")
    return text


def _rank(rank: int) -> int:
    if rank not in RANKS:
        msg = f"expected one of {', '.join(map(str, RANKS))}, got {rank}"
        raise ValueError(msg)
    return rank


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Bytes = Annotated[int, BeforeValidator(parse_size)]
BytesOrPercent = Annotated[int | str, BeforeValidator(parse_size_or_percent)]
Text = Annotated[str, AfterValidator(_no_nul)]
NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
AdapterPath = Annotated[NonEmptyText, AfterValidator(_adapter_path)]
LoraRank = Annotated[int, AfterValidator(_rank)]
MaxModelLen = Annotated[int | str, BeforeValidator(_max_model_len)]
Sleep = Annotated[Literal[0, 1, 2], BeforeValidator(_sleep), AfterValidator(_level)]
Device = Annotated[int | str, BeforeValidator(_device)]
DeviceNames = Annotated[tuple[Device, ...], Strict(strict=False), AfterValidator(_each_once)]
ModelName = Annotated[NonEmptyText, AfterValidator(_model_name)]
Aliases = Annotated[tuple[Annotated[str, AfterValidator(_alias)], ...], Strict(strict=False)]
Host = Annotated[NonEmptyText, AfterValidator(hosts.host)]
Hosts = Annotated[tuple[Host, ...], Strict(strict=False)]
Origins = Annotated[tuple[Annotated[NonEmptyText, AfterValidator(hosts.origin)], ...], Strict(strict=False)]
Reference = Annotated[str, AfterValidator(references.reference)]
Listen = Annotated[
    tuple[Annotated[NonEmptyText, AfterValidator(listener.listen_address)], ...],
    Strict(strict=False),
    Field(min_length=1),
    AfterValidator(listener.each_once),
]
Memory = Annotated[Bytes, AfterValidator(_memory)]
MemoryOrPart = Annotated[BytesOrPercent, AfterValidator(_memory_or_part)]
Command = Annotated[tuple[NonEmptyText, ...], Strict(strict=False), Field(min_length=1)]
EnvValue = Annotated[str | dict[str, str], BeforeValidator(_env_value)]  # a table names where the value stands
Environment = dict[Annotated[str, AfterValidator(_env_name)], EnvValue]
Dtype = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
