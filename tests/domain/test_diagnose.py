"""Why an engine ended. `tails` holds what real vLLM wrote when it was made to fail."""

import re
from pathlib import Path

import pytest

from vllm_proxy.domain.causes import CAUSES, Cause
from vllm_proxy.domain.diagnose import Exit, diagnose
from vllm_proxy.domain.fit import requested
from vllm_proxy.domain.units import parse_size

TAILS = Path(__file__).parent / "tails"
LOGS = Path(__file__).parent / "logs"

ARGPARSE = [
    "usage: vllm serve [model_tag] [options]",
    "vllm serve: error: unrecognized arguments: --no-such-option",
    "",
]
TRACEBACK = [
    "INFO 07-01 Loading model weights",
    "ValueError: No such luck.",
    "ERROR 07-01 EngineCore failed to start.",
]


def test_refused_options_are_invalid_arguments() -> None:
    """Exit 2 before it was ready is argparse's, and its last line says which option."""
    found = diagnose(Exit(2, None), ARGPARSE, was_ready=False)
    assert found.reason == "invalid_arguments"
    assert "unrecognized arguments: --no-such-option" in found.message


@pytest.mark.parametrize("code", [126, 127])
def test_a_command_that_does_not_run_is_not_found(code: int) -> None:
    """What a shell or a wrapper answers for a command it cannot run."""
    found = diagnose(Exit(code, None), ["env: 'vllm': No such file or directory"], was_ready=False)
    assert found.reason == "command_not_found"
    assert "No such file" in found.message


@pytest.mark.parametrize("code", [2, 126, 127])
def test_an_engine_that_served_had_a_command_and_options(code: int) -> None:
    """The same exit codes mean a crash once it had been ready."""
    assert diagnose(Exit(code, None), [], was_ready=True).reason == "crashed"


def test_a_taken_port_is_told_from_a_crash() -> None:
    """The port may be lost to another program between its choice and vLLM's bind."""
    tail = ["OSError: [Errno 98] Address already in use", "ERROR: exiting"]
    assert diagnose(Exit(1, None), tail, was_ready=False).reason == "port_in_use"


@pytest.mark.parametrize(("was_ready", "when"), [(True, "while it served"), (False, "before it was ready")])
def test_sigkill_from_elsewhere_is_killed(was_ready: bool, when: str) -> None:  # noqa: FBT001 - a parameter of the test
    """Nobody but the kernel or a person sends SIGKILL to an engine; the message says where to look."""
    found = diagnose(Exit(None, 9), TRACEBACK, was_ready=was_ready)
    assert found.reason == "killed"
    assert when in found.message
    assert "dmesg" in found.message


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        (Exit(0, None), "exit code 0"),
        (Exit(1, None), "exit code 1"),
        (Exit(None, 11), "signal SIGSEGV"),
        (Exit(None, 99), "a signal"),
        (Exit(None, None), "exit code unknown"),
    ],
)
def test_any_other_end_is_a_crash(ended: Exit, shown: str) -> None:
    """Exit 0 too, since vLLM exits so when it dies, and an adopted engine whose code cannot be known."""
    found = diagnose(ended, [], was_ready=True)
    assert (found.reason, found.message) == ("crashed", f"the engine ended while it served ({shown})")


@pytest.mark.parametrize(
    "success",
    [
        'INFO:     127.0.0.1:41522 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
        "(APIServer pid=7) INFO 11-28 17:31:01 [loggers.py:271] Engine 000: Avg prompt throughput: 0.0 tokens/s",
        "INFO 11-28 17:31:01 [launcher.py:46] Route: /v1/chat/completions, Methods: POST",
        "DEBUG 11-28 17:31:01 [core.py:1] waiting",
        "  INFO: indented",
    ],
)
def test_a_crash_does_not_quote_a_success(success: str) -> None:
    """The last line of an engine that was killed is often of a request that it answered, or of its statistics."""
    tail = ["what is this", success]
    assert diagnose(Exit(None, None), tail[1:], was_ready=True).message == (
        "the engine ended while it served (exit code unknown)"
    )
    assert diagnose(Exit(None, None), tail, was_ready=True).message.endswith("(exit code unknown): what is this")


def test_a_crash_names_its_last_error() -> None:
    """The cause is the last line that speaks of an error, not merely the last line."""
    found = diagnose(Exit(1, None), [*TRACEBACK[:2], "bye"], was_ready=False)
    assert found.message.endswith("(exit code 1): ValueError: No such luck.")


def test_a_crash_without_an_error_shows_its_last_line() -> None:
    """Blank lines at the end hide nothing."""
    found = diagnose(Exit(1, None), ["first", "  Segmentation fault  ", "", "  "], was_ready=False)
    assert found.message.endswith(": Segmentation fault")


# What real engines wrote

REAL = {
    "broken_weights": ("model_unavailable", "download it again"),
    "config_error": ("invalid_arguments", "max_num_batched_tokens (1) is smaller than max_model_len (256)"),
    "insufficient_memory": ("insufficient_memory", "on node 0, and gpu_memory_utilization 0.99 asks for"),
    "invalid_choice": ("invalid_arguments", "--dtype: invalid choice: 'float61' (choose from 'auto', 'bfloat16'"),
    "missing_folder": ("model_unavailable", "there is no folder /no/such/folder"),
    "missing_value": ("invalid_arguments", "--max-num-seqs: expected one argument"),
    "no_config": ("model_unavailable", "/srv/models/empty holds no model: expected a folder with a config.json"),
    "offline_hub": ("model_unavailable", "HF_HUB_OFFLINE"),
    "port_taken": ("port_in_use", "another program took"),
    "too_long": ("invalid_arguments", "max_model_len 100000 is more than the model can: set at most 256"),
    "unknown_option": ("invalid_arguments", "unrecognized arguments: --no-such-option"),
    "unknown_quantization": ("invalid_arguments", "no quantization nope"),
    "unknown_tool_parser": ("invalid_arguments", "no tool call parser nope"),
    "unsupported_architecture": ("model_unavailable", "NopeForCausalLM"),
    "wrong_type": ("invalid_arguments", "--max-num-seqs: invalid int value: 'many'"),
}


def test_every_tail_is_looked_at() -> None:
    """No file lies there for nothing."""
    assert {file.stem for file in TAILS.glob("*.txt")} == set(REAL)


@pytest.mark.parametrize("name", list(REAL))
def test_what_vllm_wrote_is_understood(name: str) -> None:
    """The reason, and a sentence that names what to change; the exit code is the one that it really had."""
    head, *tail = (TAILS / f"{name}.txt").read_text().splitlines()
    code = re.fullmatch(r"# real, vLLM 0\.32 on a CPU, exit code (\d)", head)
    assert code
    found = diagnose(Exit(int(code[1]), None), tail, was_ready=False)
    reason, words = REAL[name]
    assert (found.reason, words in found.message) == (reason, True), found.message


# What needs a GPU or a hub to be seen: the texts stand in the sources named


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (  # torch/csrc/CUDACachingAllocator
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of",
            "out_of_memory",
            "2.00 GiB more were wanted: lower gpu_memory_utilization",
        ),
        (  # vllm/v1/worker/gpu_worker.py
            "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests.",
            "out_of_memory",
            "max_num_seqs",
        ),
        (  # vllm/v1/worker/utils.py
            (
                "ValueError: Free memory on device cuda:0 (3.10/79.11 GiB) on startup is less than desired GPU memory "
                "utilization (0.92, 72.78 GiB). Decrease GPU memory utilization or"
            ),
            "insufficient_memory",
            "3.10 of 79.11 GiB are free on device cuda:0, and gpu_memory_utilization 0.92 asks for 72.78 GiB",
        ),
        (  # vllm/v1/worker/gpu_worker.py
            "AssertionError: Error in memory profiling. Initial free memory 70.4 GiB, current free memory 78.9 GiB",
            "crashed",
            "another program gave memory back while this one measured its GPU (70.4 GiB were free, then 78.9)",
        ),
        (  # vllm/v1/core/kv_cache_utils.py
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when",
            "insufficient_memory",
            "the weights leave no memory",
        ),
        (
            (
                "ValueError: To serve at least one request with the model's max seq len (8192), (1.0 GiB KV cache "
                "is needed, which is larger than the available KV cache memory (0.5 GiB). Based on the available "
                "memory, the estimated maximum model length is 4096. Try increasing"
            ),
            "insufficient_memory",
            "set max_model_len to at most 4096",
        ),
        ("MemoryError", "out_of_memory", "the machine's own memory"),
        (  # vllm/v1/executor/multiproc_executor.py
            "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
            "killed",
            "see dmesg",
        ),
        (  # huggingface_hub/errors.py
            "huggingface_hub.errors.GatedRepoError: 403 Client Error. Cannot access gated repo for url https://",
            "model_unavailable",
            "HF_TOKEN",
        ),
        ("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.", "model_unavailable", "no such model"),
        (
            "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
            "model_unavailable",
            "out of reach",
        ),
        (  # vllm/transformers_utils/config.py
            (
                "RuntimeError: Failed to load the model config. If the model is a custom model not yet available in "
                "the HuggingFace transformers library, consider setting `trust_remote_code=True` in LLM or using the"
            ),
            "invalid_arguments",
            "trust_remote_code = true",
        ),
        (  # vllm/config/model.py
            "Total number of attention heads (14) must be divisible by tensor parallel size (4).",
            "invalid_arguments",
            "tensor_parallel_size 4 does not divide the model's 14 attention heads",
        ),
        (  # vllm/config/parallel.py
            "ValueError: World size (8) is larger than the number of available GPUs (2) in this node. If this is",
            "invalid_arguments",
            "is 8 and 2 GPUs are there",
        ),
        ("RuntimeError: Failed to infer device type, please set the environment", "crashed", "no usable GPU"),
        ("RuntimeError: No CUDA GPUs are available", "crashed", "nvidia-smi"),
        ("torch.AcceleratorError: CUDA error: invalid device ordinal", "crashed", "devices"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "crashed", "/dev/shm"),
        ("/usr/bin/python3: No module named vllm", "command_not_found", "set engine.command"),
        (
            "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
            "command_not_found",
            "finds no vLLM",
        ),
        ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77", "crashed", "NCCL_DEBUG"),
    ],
)
def test_a_known_line_is_understood_above_its_echo(line: str, reason: str, words: str) -> None:
    """With vLLM's prefix and the last words of whoever merely noticed behind it."""
    tail = [
        f"(EngineCore pid=12) ERROR 11-24 03:10:00 [core.py:1136] {line}",
        "(EngineCore pid=12) ERROR 11-24 03:10:00 [core.py:1136] EngineCore failed to start.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ]
    found = diagnose(Exit(1, None), tail, was_ready=False)
    assert (found.reason, words in found.message) == (reason, True), found.message


_FREE = (
    "ValueError: Free memory on device cuda:0 ({}/{} GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 72.78 GiB). Decrease GPU memory utilization or"
)
_FITS = (
    "ValueError: To serve at least one request with the model's max seq len (8192), (1.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (0.5 GiB). Based on the available memory, the estimated maximum "
    "model length is {}. Try increasing"
)


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        (_FITS.format(4096), {"max_model_len": 4096}),
        (_FITS.format(0), {}),
        (_FREE.format("31.20", "79.11"), {"gpu_memory_utilization": 0.39, "memory": "31.1GiB"}),
        (_FREE.format("0.02", "79.11"), {}),
        (_FREE.format("0.0", "0.0"), {}),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total", {}),
        ("ValueError: No available memory for the cache blocks. Try increasing", {}),
    ],
)
def test_a_change_that_would_do_is_told_where_vllm_says_what_would(line: str, changes: dict[str, object]) -> None:
    """A length that it names, the memory that it found free; elsewhere none is guessed."""
    found = diagnose(Exit(1, None), [line], was_ready=False)
    assert {one.key: one.value for one in found.changes} == changes


def test_a_real_vllm_has_named_a_length_and_what_was_free() -> None:
    """In what it wrote, with its memory in decimals that are rounded: what is told is less."""
    tails = {name: (TAILS / f"{name}.txt").read_text().splitlines()[1:] for name in ("too_long", "insufficient_memory")}
    found = {name: diagnose(Exit(1, None), tail, was_ready=False).changes for name, tail in tails.items()}
    assert [(one.key, one.value) for one in found["too_long"]] == [("max_model_len", 256)]
    share, memory = found["insufficient_memory"]
    assert (share.key, share.value) == ("gpu_memory_utilization", 0.64)
    assert (memory.key, memory.value) == ("memory", "6.8GiB")


@pytest.mark.parametrize("free", [2.0, 6.87, 31.2, 79.1, 140.03])
@pytest.mark.parametrize("total", [10.71, 79.11, 140.04])
def test_the_share_that_is_told_is_within_what_was_free_however_vllm_has_rounded(free: float, total: float) -> None:
    """Its figures may be off by half a hundredth; it wants the share of the whole, rounded up to a byte."""
    changes = {it.key: it.value for it in diagnose(Exit(1, None), [_FREE.format(free, total)], was_ready=False).changes}
    share, memory = float(changes["gpu_memory_utilization"]), parse_size(changes["memory"])
    assert memory <= (free - 0.005) * 2**30
    if free <= total:
        assert requested(int((total + 0.005) * 2**30), share) <= (free - 0.005) * 2**30


@pytest.mark.parametrize("file", sorted(LOGS.glob("*.txt")), ids=lambda file: file.stem)
def test_a_healthy_start_holds_no_cause(file: Path) -> None:
    """Warnings and settings of a good start are never taken for the reason of a later death."""
    text = file.read_text()
    assert [cause.message for cause in CAUSES if cause.pattern.search(text)] == []
    assert diagnose(Exit(1, None), text.splitlines(), was_ready=False).reason == "crashed"


def test_an_echo_is_not_the_cause() -> None:
    """Of several errors the last that is not merely somebody's notice of a death is shown, without its prefix."""
    tail = [
        "(EngineCore pid=1) ERROR 11-24 03:10:00 [core.py:9] ZeroDivisionError: division by zero",
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    found = diagnose(Exit(0, None), tail, was_ready=True)
    assert found.message == "the engine ended while it served (exit code 0): ZeroDivisionError: division by zero"


def test_an_engine_that_served_is_judged_by_what_can_end_one_that_serves() -> None:
    """A full GPU may; a port, a model or an option that was good once is not the cause now."""
    full = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"]
    assert diagnose(Exit(0, None), full, was_ready=True).reason == "out_of_memory"
    stale = ["OSError: [Errno 98] Address already in use", "ValueError: Unknown quantization method: x. Must be"]
    assert diagnose(Exit(0, None), stale, was_ready=True).reason == "crashed"
    long_ago = [*full, *["INFO a request"] * 400]
    assert diagnose(Exit(0, None), long_ago, was_ready=True).reason == "crashed"


def test_the_nearest_options_are_named_where_they_are_known() -> None:
    """For each that is unknown."""
    tail = ["vllm serve: error: unrecognized arguments: --max-num-seq=3 --gpu-memory-utilisation 0.5"]
    known = {"max-num-seqs", "gpu-memory-utilization", "dtype"}
    found = diagnose(Exit(2, None), tail, was_ready=False, known_options=known)
    assert "did you mean max-num-seqs, gpu-memory-utilization?" in found.message


def test_a_message_is_short_however_long_a_line_is() -> None:
    """It must fit into a status, a log line and an answer."""
    found = diagnose(Exit(1, None), ["ValueError: " + "x" * 100_000], was_ready=False)
    assert len(found.message) <= 400


# A log may be megabytes


def alternatives(pattern: str) -> list[str]:
    """The branches of an expression, at its top."""
    branches, depth, escaped = [""], 0, False
    for char in pattern:
        depth += {"(": 1, ")": -1, "[": 1, "]": -1}.get(char, 0) if not escaped else 0
        escaped = char == "\\" and not escaped
        if char == "|" and depth == 0:
            branches.append("")
        else:
            branches[-1] += char
    return branches


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.pattern.pattern[:30])
def test_each_branch_of_a_pattern_has_a_mark_that_every_match_holds(cause: Cause) -> None:
    """Else a line would be passed over that the pattern knows."""
    for branch in alternatives(cause.pattern.pattern):
        plain = re.sub(r"\\(.)", r"\1", branch)
        held = [mark for mark in cause.marks if mark in plain or mark.startswith("invalid ")]
        assert held, (branch, cause.marks)


@pytest.mark.parametrize("file", sorted(TAILS.glob("*.txt")), ids=lambda file: file.stem)
def test_marks_find_what_the_patterns_would_find_alone(file: Path) -> None:
    """In what real vLLM wrote: the same place."""
    text = file.read_text()
    for cause in CAUSES:
        alone, found = cause.pattern.search(text), cause.find(text)
        assert (found and found.span()) == (alone and alone.span())


@pytest.mark.parametrize("name", ["insufficient_memory", "too_long", "missing_folder"])
def test_dumps_around_a_cause_do_not_hide_it(name: str) -> None:
    """VLLM dumps its state when it dies, in lines of 8,000 characters, each like the cause and none of it."""
    tail = (TAILS / f"{name}.txt").read_text().splitlines()
    near = "Repo id must max seq len (x huggingface.co User-specified max_model_len ( validation errors for " * 80
    dumps = [near] * 50
    assert diagnose(Exit(1, None), [*dumps, *tail, *dumps], was_ready=False) == diagnose(
        Exit(1, None), tail, was_ready=False
    )


def test_only_the_last_mebibyte_of_a_log_counts() -> None:
    """And of each line its beginning."""
    cause = "OSError: [Errno 98] Address already in use"
    assert diagnose(Exit(1, None), [cause, *["x" * 900] * 1000], was_ready=False).reason == "port_in_use"
    assert diagnose(Exit(1, None), [cause, *["x" * 900] * 1300], was_ready=False).reason == "crashed"
    assert diagnose(Exit(1, None), ["x" * 1000 + cause], was_ready=False).reason == "crashed"
