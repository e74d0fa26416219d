"""Known causes of engine failures, as a table: a pattern in the log, a reason, and what to do about it.

For `diagnose`. A pattern must not match a line that a healthy engine writes (tests/domain/test_diagnose.py tries real
logs). It is tried only on lines that contain one of its `marks`, plain text that is found fast in megabytes. Source:
vLLM 0.32, PyTorch 2, huggingface_hub; tests/domain/tails has the failures that were seen for real.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_proxy.domain.lifecycle import Reason

_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_MOST_TRIES = 100  # lines that contain a mark and do not match


@dataclass(frozen=True, slots=True)
class Change:
    """A key of a model, and a value of it that this failure would not have been with."""

    key: str
    value: int | float | str


@dataclass(frozen=True, slots=True)
class Cause:
    """`message` may name the pattern's groups. `while_serving`: it also ends engines that were ready.

    `changes`: from those groups, where vLLM says the value or it follows from what it says; each would do.
    """

    marks: tuple[str, ...]
    pattern: re.Pattern[str]
    reason: Reason
    message: str
    while_serving: bool
    lines: int
    changes: Callable[[Mapping[str, str]], tuple[Change, ...]]

    def find(self, text: str) -> re.Match[str] | None:
        """The first place in a text where it is said."""
        found = [match for mark in self.marks if (match := self._find_by(mark, text))]
        return min(found, key=lambda match: match.start(), default=None)

    def _find_by(self, mark: str, text: str) -> re.Match[str] | None:
        end = 0
        for _ in range(_MOST_TRIES):
            at = text.find(mark, end)
            if at < 0:
                return None
            start, end = text.rfind("\n", 0, at) + 1, _line_end(text, at)
            last = end
            for _ in range(self.lines - 1):
                last = _line_end(text, last + 1)
            if match := self.pattern.search(text, start, last):
                return match
        return None


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _cause(
    marks: str | tuple[str, ...],
    pattern: str,
    reason: Reason,
    message: str,
    *,
    while_serving: bool = False,
    lines: int = 1,
    changes: Callable[[Mapping[str, str]], tuple[Change, ...]] = lambda _: (),
) -> Cause:
    """`marks`: each match holds one of them, in its first line; `lines`: so many a match may span."""
    marks = (marks,) if isinstance(marks, str) else marks
    return Cause(marks, re.compile(pattern, re.MULTILINE), reason, message, while_serving, lines, changes)


def _of_what_is_free(said: Mapping[str, str]) -> tuple[Change, ...]:
    """The most that vLLM would have found free, whichever key says how much it gets; its figures are rounded."""
    free, total = float(said["free"]) - 0.01, float(said["total"])
    share, size = math.floor(100 * free / max(total, free, 0.01)) / 100, math.floor(10 * free) / 10
    shares = (Change("gpu_memory_utilization", share),) if share > 0 else ()
    return (*shares, Change("memory", f"{size}GiB")) if size > 0 else shares


def _of_what_fits(said: Mapping[str, str]) -> tuple[Change, ...]:
    """The longest length that vLLM names."""
    most = int(said["most"])
    return (Change("max_model_len", most),) if most else ()


_MEMORY = (
    _cause(
        " memory on ",
        rf"(?:Free|Available) memory on (?P<where>(?:device|node) \S+) \((?P<free>{_NUMBER})/(?P<total>{_NUMBER}) GiB"
        r"\) on startup is less than desired \w+ memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        Reason.INSUFFICIENT_MEMORY,
        "{free} of {total} GiB are free on {where}, and gpu_memory_utilization {share} asks for {wanted} GiB: "
        "lower it, or stop what else uses that memory",
        changes=_of_what_is_free,
    ),
    _cause(
        "max seq len (",
        r"max seq len \((?P<length>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger than the "
        r"available KV cache memory \((?P<left>-?[\d.]+) GiB\)\. Based on the available memory, the estimated maximum "
        r"model length is (?P<most>\d{1,12})",
        Reason.INSUFFICIENT_MEMORY,
        "max_model_len {length} needs {needed} GiB of KV cache and {left} GiB are left: "
        "set max_model_len to at most {most}, or raise gpu_memory_utilization or memory",
        changes=_of_what_fits,
    ),
    _cause(
        "max seq len (",
        r"max seq len \((?P<length>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger than the "
        r"available KV cache memory \((?P<left>-?[\d.]+) GiB\)",
        Reason.INSUFFICIENT_MEMORY,
        "max_model_len {length} needs {needed} GiB of KV cache and {left} GiB are left: "
        "lower max_model_len, or raise gpu_memory_utilization or memory",
    ),
    _cause(
        "Error in memory profiling. ",
        r"Error in memory profiling\. Initial free memory (?P<before>[\d.]+) GiB, current free memory (?P<now>[\d.]+)",
        Reason.CRASHED,
        "another program gave memory back while this one measured its GPU ({before} GiB were free, then {now}): "
        "it is tried again",
    ),
    _cause(
        "Error: No available memory for the cache blocks",
        r"Error: No available memory for the cache blocks",
        Reason.INSUFFICIENT_MEMORY,
        "the weights leave no memory for the KV cache: raise gpu_memory_utilization or memory, or spread the model "
        "over more GPUs with tensor_parallel_size",
    ),
    _cause(
        " out of memory. Tried to allocate ",
        r"(?:CUDA|HIP|XPU) out of memory\. Tried to allocate (?P<size>[\d.]+ \w+)",
        Reason.OUT_OF_MEMORY,
        "the GPU's memory is full, {size} more were wanted: lower gpu_memory_utilization, max_num_seqs or "
        "max_model_len, raise tensor_parallel_size, or stop what else uses the GPU",
        while_serving=True,
    ),
    _cause(
        (" out of memory", "OutOfMemoryError"),
        r"(?:CUDA|HIP|XPU) out of memory|OutOfMemoryError\b|CUDA error: out of memory",
        Reason.OUT_OF_MEMORY,
        "the GPU's memory is full: lower gpu_memory_utilization, max_num_seqs or max_model_len, raise "
        "tensor_parallel_size, or stop what else uses the GPU",
        while_serving=True,
    ),
    _cause(
        ("DefaultCPUAllocator: can't allocate memory", "MemoryError", "OSError: [Errno 12]"),
        r"DefaultCPUAllocator: can't allocate memory|^MemoryError\b|^OSError: \[Errno 12\]",
        Reason.OUT_OF_MEMORY,
        "the machine's own memory is full: stop something, or load fewer models",
        while_serving=True,
    ),
    _cause(
        "died unexpectedly (exit code: -9)",
        r"died unexpectedly \(exit code: -9\)",
        Reason.KILLED,
        "a process of the engine was killed, perhaps by the kernel for want of memory: see dmesg",
        while_serving=True,
    ),
)

_ENVIRONMENT = (
    _cause(
        ("[Errno 98]", "ddress already in use"),
        r"\[Errno 98\]|[Aa]ddress already in use",
        Reason.PORT_IN_USE,
        "another program took the engine's port while it loaded",
    ),
    _cause(
        "No space left on device",
        r"No space left on device",
        Reason.CRASHED,
        "no space left on a disk or in /dev/shm: see df, and where HF_HOME and TMPDIR are",
        while_serving=True,
    ),
    _cause(
        ("No module named ", "No package metadata was found for vllm"),
        r"No module named '?vllm'?\s*$|No package metadata was found for vllm\b",
        Reason.COMMAND_NOT_FOUND,
        "the engine's command finds no vLLM: install it there, or set engine.command",
    ),
    _cause(
        (
            "Failed to infer device type",
            "No CUDA GPUs are available",
            "no CUDA-capable device is detected",
            "Found no NVIDIA driver",
            "CUDA driver version is insufficient",
            "libcuda.so.1: cannot open",
        ),
        r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device is detected"
        r"|Found no NVIDIA driver|CUDA driver version is insufficient|libcuda\.so\.1: cannot open",
        Reason.CRASHED,
        "no usable GPU: see nvidia-smi, the driver's version, devices and CUDA_VISIBLE_DEVICES",
    ),
    _cause(
        "CUDA error: invalid device ordinal",
        r"CUDA error: invalid device ordinal",
        Reason.CRASHED,
        "a GPU that devices or CUDA_VISIBLE_DEVICES names is not there: see nvidia-smi",
    ),
    _cause(
        ("NCCL error", "ncclUnhandledCudaError", "ncclSystemError", "ncclInternalError"),
        r"NCCL error|ncclUnhandledCudaError|ncclSystemError|ncclInternalError",
        Reason.CRASHED,
        'the GPUs cannot talk to one another: set NCCL_DEBUG = "INFO" in env, and see the log',
        while_serving=True,
    ),
)

_MODEL = (
    _cause(
        ("GatedRepoError", "annot access gated repo", "access to model ", "trying to access a gated repo"),
        r"GatedRepoError|[Cc]annot access gated repo|access to model \S+ is restricted|trying to access a gated repo",
        Reason.MODEL_UNAVAILABLE,
        "the model is gated on Hugging Face: accept its licence there, and set HF_TOKEN in [engine.env]",
    ),
    _cause(
        ("401 Client Error", "Invalid user token", "Invalid username or password"),
        r"401 Client Error|Invalid user token|Invalid username or password",
        Reason.MODEL_UNAVAILABLE,
        "Hugging Face does not let us in, or has no such model: check model, and HF_TOKEN in [engine.env]",
    ),
    _cause(
        ("RevisionNotFoundError", "is not a valid git identifier"),
        r"RevisionNotFoundError|is not a valid git identifier",
        Reason.MODEL_UNAVAILABLE,
        "Hugging Face has the model, but not that revision of it",
    ),
    _cause(
        "Repo id must ",
        r"Repo id must [^\n]*?: '(?P<model>[^'\n]*)'",
        Reason.MODEL_UNAVAILABLE,
        "there is no folder {model}, and it is no Hugging Face id: check model",
    ),
    _cause(
        ("RepositoryNotFoundError", "is not a local folder and is not a valid model identifier"),
        r"RepositoryNotFoundError|is not a local folder and is not a valid model identifier",
        Reason.MODEL_UNAVAILABLE,
        "Hugging Face has no such model: check model",
    ),
    _cause(
        ("OfflineModeIsEnabled", "outgoing traffic has been disabled", "LocalEntryNotFoundError", "in offline mode"),
        r"OfflineModeIsEnabled|outgoing traffic has been disabled|LocalEntryNotFoundError|in offline mode",
        Reason.MODEL_UNAVAILABLE,
        "the model is not in the local cache and cannot be downloaded: check the network, HF_HUB_OFFLINE and HF_HOME",
    ),
    _cause(
        ("couldn't connect to '", "huggingface.co", "hf.co"),
        r"couldn't connect to '(?P<hub>https?://[^'\n]*)'|(?:huggingface\.co|hf\.co)[^\n]*(?:Max retries exceeded"
        r"|Name or service not known|name resolution|unreachable|timed out)",
        Reason.MODEL_UNAVAILABLE,
        "the model cannot be downloaded, the hub is out of reach: check the network, HTTPS_PROXY and HF_ENDPOINT",
    ),
    _cause(
        "Invalid repository ID or local directory specified: '",
        r"Invalid repository ID or local directory specified: '(?P<model>[^'\n]*)'",
        Reason.MODEL_UNAVAILABLE,
        "{model} holds no model: expected a folder with a config.json, or a Hugging Face id",
    ),
    _cause(
        "does not appear to have ",
        r"does not appear to have (?:a file named|files named) (?P<file>[^\n.]+(?:\.\w+)?)",
        Reason.MODEL_UNAVAILABLE,
        "the model is not complete, {file} is missing: check model, or download it again",
    ),
    _cause(
        "Cannot find any model weights with ",
        r"Cannot find any model weights with [`'](?P<model>[^`'\n]*)",
        Reason.MODEL_UNAVAILABLE,
        "{model} holds no weights that vLLM can read",
    ),
    _cause(
        ("SafetensorError", "Error while deserializing header"),
        r"SafetensorError\b|Error while deserializing header",
        Reason.MODEL_UNAVAILABLE,
        "a file of weights is damaged or not whole: download it again",
    ),
    _cause(
        "Model architecture",
        r"Model architectures? (?P<names>\[[^\]\n]*\]|\S+) (?:are|is) not supported",
        Reason.MODEL_UNAVAILABLE,
        "this vLLM cannot serve models of the architecture {names}: use a newer one, or another model",
    ),
    _cause(
        (
            "consider setting `trust_remote_code=True`",
            "contains custom code which must be executed",
            "requires you to execute the ",
        ),
        r"consider setting `trust_remote_code=True`|contains custom code which must be executed"
        r"|requires you to execute the (?:configuration|modeling) file",
        Reason.INVALID_ARGUMENTS,
        "the model brings code of its own: set trust_remote_code = true if you trust it",
    ),
)

_SPEC = (
    _cause(
        "User-specified max_model_len (",
        r"User-specified max_model_len \((?P<length>\d+)\) is greater than the derived max_model_len "
        r"\([^\n]*?=(?P<most>\d{1,12})",
        Reason.INVALID_ARGUMENTS,
        "max_model_len {length} is more than the model can: set at most {most}",
        changes=_of_what_fits,
    ),
    _cause(
        "Unknown quantization method: ",
        r"Unknown quantization method: (?P<name>[^\s.]+)",
        Reason.INVALID_ARGUMENTS,
        "vLLM knows no quantization {name}",
    ),
    _cause(
        ") must be divisible by tensor parallel size (",
        r"heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<size>\d+)\)",
        Reason.INVALID_ARGUMENTS,
        "tensor_parallel_size {size} does not divide the model's {heads} attention heads",
    ),
    _cause(
        "World size (",
        r"World size \((?P<size>\d+)\) is larger than the number of available GPUs \((?P<there>\d+)\)",
        Reason.INVALID_ARGUMENTS,
        "tensor_parallel_size x pipeline_parallel_size is {size} and {there} GPUs are there: lower it, or see devices",
    ),
    _cause(
        ("invalid tool call parser: ", "invalid reasoning parser: "),
        r"invalid (?P<kind>tool call|reasoning) parser: (?P<name>[^\s']+)",
        Reason.INVALID_ARGUMENTS,
        "vLLM knows no {kind} parser {name}; see its documentation for their names",
    ),
    _cause(
        "validation error",
        r"validation errors? for \w+\n(?P<field>[\w.]+\n)?\s+(?:Value error|Assertion failed), (?P<why>[^\n]*?)"
        r"(?= \[type=|$)",
        Reason.INVALID_ARGUMENTS,
        "vLLM refuses its options: {why}",
        lines=3,
    ),
)

CAUSES = _MEMORY + _MODEL + _SPEC + _ENVIRONMENT
