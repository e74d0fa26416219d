"""Derives the progress of a start from vLLM's log: the phase, and how much of it is done.

It never goes back, downloads aside, which alternate with loading; a line that is not known changes nothing, so another
version of vLLM shows less and breaks nothing (tests/domain/test_progress.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from vllm_proxy.domain.lifecycle import Phase


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a start is. `fraction` is how much of the phase is done, 0 to 1, as of the last bar; None: not known."""

    phase: Phase
    fraction: float | None


START = Progress(Phase.IMPORTING, None)

# What vLLM 0.32 writes, by the phase that begins or goes on with it, in the order of a start. A pattern that ends with
# "%" is that of a bar. Each begins with a plain character: the search passes over all others fast.
_LINES: dict[Phase, tuple[str, ...]] = {
    Phase.IMPORTING: (),
    # vLLM hides the bars of the weights that it gets from Hugging Face; these are of other loaders and versions.
    Phase.DOWNLOADING: (
        r"Fetching \d+ files: +\d+%",
        r"\.(?:safetensors|bin|gguf|pth?): +\d+%\|",  # a file of several at a time: no measure of the whole
        r"Downloading (?:Model from |\[|shards|bytes)",
        r"Reconstructing [^:]*: +\d+%",
    ),
    Phase.LOADING_WEIGHTS: (
        r"Starting to load model ",
        r"Loading model from scratch",
        r"Loading drafter model",
        r"Time spent downloading weights for ",
        r"Filesystem type for checkpoints: ",
        r"Prefetching checkpoint files",
        r"Loading [^:|]*: +\d+%(?= Completed \|)",
        r"Multi-thread loading [^:|]*: +\d+%(?= Completed \|)",
        r"Loading weights took ",
    ),
    Phase.PROFILING: (
        r"Model loading took ",
        r"Encoder cache will be initialized with a budget",
        r"Initial profiling/warmup run took ",
        r"Profiling CUDA graph memory: ",
        r"Available KV cache memory: ",
        r"skipped memory profiling",
        r"KV cache size: ",
    ),
    # Most of it happens within the profiling run, some after it.
    Phase.COMPILING: (
        r"Starting torch\.compile",
        r"for vLLM's torch\.compile",
        r"Dynamo bytecode transform time: ",
        r"Directly load (?:the compiled graph|AOT compilation)",
        r"Compiling (?:a graph for|model again)",
        r"Cache the graph of compile range ",
        r"torch\.compile (?:and initial [^%]*)?took ",
        r"Compile and warming up model for size ",
        r"Warming up model for the compilation",
        r"JIT kernel warmup (?:starting|\([^)]*\): +\d+%)",
        r"DeepGEMM warmup: +\d+%",
        r"Compiling CuTeDSL kernels: +\d+%",
    ),
    Phase.CAPTURING_GRAPHS: (
        r"Capturing [^:|]*CUDA graphs[^:|]*: +\d+%",
        r"Graph capturing finished in ",
    ),
    Phase.STARTING_SERVER: (
        r"init engine \(profile, ",
        r"Starting vLLM (?:API )?server ",
        r"Started server process ",
        r"Waiting for application startup",
        r"Application startup complete",
    ),
}
_ORDER = {phase: place for place, phase in enumerate(_LINES)}
# Without groups, which would make it four times slower; which phase it was is then asked for the few lines it finds.
_KNOWN = re.compile("|".join(pattern for patterns in _LINES.values() for pattern in patterns))
_OF_PHASE = [(phase, re.compile("|".join(patterns))) for phase, patterns in _LINES.items() if patterns]
# No more digits than any machine has: a line may say anything, and its number goes on record.
_WEIGHTS = re.compile(r"Model loading took (\d{1,6}(?:\.\d{1,9})?) GiB")
_DONE = re.compile(r"\d+(?=%$)")
# A draft model, or another part of the checkpoint, is downloaded when the first is loaded.
_TAKE_TURNS = {Phase.DOWNLOADING, Phase.LOADING_WEIGHTS}


def after_line(progress: Progress, line: str) -> Progress:
    """Where the start is once this line was written; the same object when the line says nothing new."""
    known = _KNOWN.search(line)
    if known is None or progress.phase not in _ORDER:
        return progress
    phase = next(phase for phase, pattern in _OF_PHASE if pattern.match(line, known.start()))
    if _ORDER[phase] < _ORDER[progress.phase] and not {phase, progress.phase} <= _TAKE_TURNS:
        return progress
    done = _DONE.search(known[0])
    fraction = min(int(done[0]), 100) / 100 if done else None
    if phase is progress.phase and fraction in {None, progress.fraction}:
        return progress
    return Progress(phase, fraction)


def weights_bytes(line: str) -> int:
    """What the weights of a model have of each device, from the line of vLLM's log that says so; 0: another line."""
    found = _WEIGHTS.search(line)
    return int(float(found[1]) * 2**30) if found else 0


def estimate(past_seconds: Sequence[float], elapsed: float) -> float | None:
    """Seconds until a start is over, from how long earlier ones took; None when it took longer, or is the first."""
    if not past_seconds:
        return None
    left = median(past_seconds) - elapsed
    return left if left > 0 else None
