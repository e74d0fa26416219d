"""What vLLM's log says about a start."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vllm_proxy.domain.lifecycle import Phase
from vllm_proxy.domain.progress import START, Progress, after_line, estimate, weights_bytes

LOGS = Path(__file__).parent / "logs"
PREFIX = "(EngineCore pid=123) INFO 11-24 03:10:00 [file.py:123] "
ORDER = (
    Phase.IMPORTING,
    Phase.DOWNLOADING,
    Phase.LOADING_WEIGHTS,
    Phase.PROFILING,
    Phase.COMPILING,
    Phase.CAPTURING_GRAPHS,
    Phase.STARTING_SERVER,
)


def steps(name: str) -> list[Progress]:
    """Each new progress in one of the logs; a line that changes nothing gives the same object."""
    progress, found = START, [START]
    for line in (LOGS / name).read_text().splitlines():
        if (now := after_line(progress, line)) is not progress:
            assert now != progress, line
            found.append(progress := now)
    return found


def test_a_real_start_on_a_cpu_is_followed() -> None:
    """vLLM 0.32.0 with a small embedding model: no graphs, nothing to profile."""
    assert steps("cpu_start.txt") == [
        START,
        Progress(Phase.LOADING_WEIGHTS, None),
        Progress(Phase.LOADING_WEIGHTS, 0.0),
        Progress(Phase.LOADING_WEIGHTS, 1.0),
        Progress(Phase.STARTING_SERVER, None),
    ]


def test_a_start_on_a_gpu_is_followed() -> None:
    """With a draft model that is downloaded after the first was loaded, and bars that begin again."""
    told = [(step.phase, step.fraction) for step in steps("gpu_start.txt")]
    assert told == [
        (Phase.IMPORTING, None),
        (Phase.LOADING_WEIGHTS, None),
        *((Phase.DOWNLOADING, done) for done in (0.0, 0.5, 1.0)),
        *((Phase.LOADING_WEIGHTS, done) for done in (None, 0.0, 0.5, 1.0)),
        *((Phase.DOWNLOADING, done) for done in (0.0, 1.0)),
        *((Phase.LOADING_WEIGHTS, done) for done in (None, 0.0, 1.0)),
        (Phase.PROFILING, None),
        (Phase.COMPILING, None),
        # It is tried how much memory graphs take before they are captured for good.
        *((Phase.CAPTURING_GRAPHS, done) for done in (0.0, 1.0)),
        *((Phase.CAPTURING_GRAPHS, done) for done in (0.0, 0.49, 1.0)),
        *((Phase.CAPTURING_GRAPHS, done) for done in (0.0, 0.4, 1.0)),
        (Phase.STARTING_SERVER, None),
    ]


# One line for each thing that vLLM says; {} stands for any prefix.
SAID = {
    "{}Starting to load model /srv/models/chat...": (Phase.LOADING_WEIGHTS, None),
    "{}Loading drafter model...": (Phase.LOADING_WEIGHTS, None),
    "{}Loading weights took 2.31 seconds": (Phase.LOADING_WEIGHTS, None),
    "{}Prefetching checkpoint files: 40% (2/5)": (Phase.LOADING_WEIGHTS, None),
    "Loading pt checkpoint shards:  33% Completed | 1/3 [00:01<00:02,  1.0s/it]": (Phase.LOADING_WEIGHTS, 0.33),
    "Loading safetensors checkpoint shards (eager):  50% Completed | 1/2 [00:01<": (Phase.LOADING_WEIGHTS, 0.5),
    "Loading safetensors using Runai Model Streamer:   7% Completed | 20/291 [": (Phase.LOADING_WEIGHTS, 0.07),
    "Multi-thread loading shards: 100% Completed | 4/4 [00:04<00:00, ": (Phase.LOADING_WEIGHTS, 1.0),
    "Fetching 12 files:  17%|█▋        | 2/12 [00:10<00:50,  5.0s/it]": (Phase.DOWNLOADING, 0.17),
    "model-00001-of-00002.safetensors:  12%|█▏        | 1.20G/9.98G [": (Phase.DOWNLOADING, None),
    "Downloading shards:  50%|█████     | 1/2 [": (Phase.DOWNLOADING, None),
    "{}Model loading took 15.42 GiB memory and 12.345678 seconds": (Phase.PROFILING, None),
    "{}Profiling CUDA graph memory: PIECEWISE=51 (largest=512)": (Phase.PROFILING, None),
    "{}Available KV cache memory: 52.10 GiB": (Phase.PROFILING, None),
    "{}CPU KV cache size: 4,096 tokens, Maximum concurrency for 256": (Phase.PROFILING, None),
    "{}[backbone] Starting torch.compile": (Phase.COMPILING, None),
    "{}Using cache directory: /srv/cache for vLLM's torch.compile": (Phase.COMPILING, None),
    "{}Dynamo bytecode transform time: 3.21 s": (Phase.COMPILING, None),
    "{}Directly load the compiled graph(s) for compile range (1, 8192) from the cache, took 0.4 s": (
        Phase.COMPILING,
        None,
    ),
    "{}torch.compile and initial profiling/warmup run together took 9.1 s in total": (Phase.COMPILING, None),
    "{}Compile and warming up model for size 8": (Phase.COMPILING, None),
    "{}Warming up model for the compilation...": (Phase.COMPILING, None),
    "DeepGEMM warmup:  25%|██▌       | 100/400 [": (Phase.COMPILING, 0.25),
    "JIT kernel warmup (12 compile keys):  50%|█████     | 2/4 [": (Phase.COMPILING, 0.5),
    "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|████      | 2/5 [": (Phase.CAPTURING_GRAPHS, 0.4),
    "(Worker_TP0 pid=9) Capturing decode CUDA graphs (FULL): 100%|██████████| 5/5 [": (Phase.CAPTURING_GRAPHS, 1.0),
    "{}Graph capturing finished in 6 secs, took 0.62 GiB": (Phase.CAPTURING_GRAPHS, None),
    "{}init engine (profile, create kv cache, warmup model) took 34.21 s": (Phase.STARTING_SERVER, None),
    "{}Starting vLLM server on http://127.0.0.1:8001": (Phase.STARTING_SERVER, None),
    "INFO:     Application startup complete.": (Phase.STARTING_SERVER, None),
}


@pytest.mark.parametrize("prefix", ["", PREFIX, "(Worker_TP0 pid=9) WARNING 11-24 03:10:00 [v1/x.py:1] "])
@pytest.mark.parametrize(("line", "told"), SAID.items())
def test_each_known_line_tells_its_phase(prefix: str, line: str, told: tuple[Phase, float | None]) -> None:
    """Whatever process it comes from."""
    assert after_line(START, line.format(prefix)) == Progress(*told)


@pytest.mark.parametrize("prefix", ["", PREFIX, "(Worker_TP0 pid=9) INFO 11-24 03:10:00 [v1/x.py:1] "])
def test_the_weights_of_a_model_are_as_large_as_its_engine_says(prefix: str) -> None:
    """In GiB, in the words of vLLM 0.32 and of earlier ones; other lines with sizes name none."""
    assert weights_bytes(f"{prefix}Model loading took 15.5 GiB memory and 12.345678 seconds") == int(15.5 * 2**30)
    assert weights_bytes(f"{prefix}Model loading took 8 GiB and 12.345678 seconds") == 8 * 2**30
    assert weights_bytes(f"{prefix}Available KV cache memory: 52.10 GiB") == 0


@pytest.mark.parametrize("size", ["9" * 12, "9" * 400, "1." + "9" * 400, "-1", "nan", "inf", "1e9", ""])
def test_a_size_that_no_machine_has_names_no_weights(size: str) -> None:
    """Neither does reading it fail, nor would a record hold what the next daemon refuses to read."""
    assert weights_bytes(f"Model loading took {size} GiB memory and 2.5 seconds") == 0


@pytest.mark.parametrize(
    "line",
    [
        "",
        PREFIX + "Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.",
        PREFIX + "Found pooling configuration.",
        PREFIX + "Loading the tokenizer",
        "tokenizer.json: 100%|██████████| 9.09M/9.09M [00:00<00:00, 30MB/s]",
        "Loading: 50%",
        "Adding requests:  50%|█████     | 1/2 [",
        'INFO:     127.0.0.1:4242 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
    ],
)
def test_a_line_that_says_nothing_changes_nothing(line: str) -> None:
    """The same object comes back, so that it is cheap to see that nothing moved."""
    assert after_line(START, line) is START


def test_a_phase_keeps_its_fraction_until_a_bar_moves() -> None:
    """A message in between does not take it back to unknown; a bar that starts again does."""
    half = Progress(Phase.LOADING_WEIGHTS, 0.5)
    assert after_line(half, PREFIX + "Loading weights took 2.31 seconds") is half
    bar = "Loading safetensors checkpoint shards: {:3d}% Completed | 1/2 ["
    assert after_line(half, bar.format(50)) is half
    assert after_line(half, bar.format(0)) == Progress(Phase.LOADING_WEIGHTS, 0.0)


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.SERVING, Phase.DRAINING, Phase.STOPPING, Phase.BACKOFF])
def test_what_is_no_part_of_a_start_is_left_alone(phase: Phase) -> None:
    """Weights that are loaded again while an engine serves are no start."""
    progress = Progress(phase, None)
    assert after_line(progress, PREFIX + "Starting to load model x...") is progress


@settings(deadline=None)
@given(lines=some.lists(some.sampled_from([*SAID, "noise"])))
def test_a_start_never_goes_back(lines: list[str]) -> None:
    """In whatever order lines come; only downloading and loading take turns."""
    seen = [START]
    for line in lines:
        seen.append(after_line(seen[-1], line.format(PREFIX)))
    for before, now in pairwise(seen):
        turns = {before.phase, now.phase} == {Phase.DOWNLOADING, Phase.LOADING_WEIGHTS}
        assert turns or ORDER.index(now.phase) >= ORDER.index(before.phase)
        assert now.fraction is None or 0 <= now.fraction <= 1


@settings(deadline=None)
@given(line=some.text())
def test_any_text_is_read(line: str) -> None:
    """No line of an engine can break its supervisor."""
    assert after_line(START, line).phase in ORDER


def test_the_logs_name_no_machine() -> None:
    """The fixtures show no path of the machine where they were made."""
    for file in LOGS.iterdir():
        assert not re.search(r"/(?:root|home|work|tmp)/", file.read_text()), file


@pytest.mark.parametrize(
    ("past", "elapsed", "left"),
    [
        ([], 0.0, None),  # nothing is known
        ([60.0], 10.0, 50.0),
        ([30.0, 300.0, 40.0], 10.0, 30.0),  # one slow start, perhaps with a download, does not count
        ([30.0, 40.0], 0.0, 35.0),
        ([60.0], 60.0, None),  # it takes longer than ever: nobody knows
        ([60.0], 99.0, None),
    ],
)
def test_what_is_left_is_told_from_past_starts(past: list[float], elapsed: float, left: float | None) -> None:
    """The median of them, less what has gone by."""
    assert estimate(past, elapsed) == left
