"""The options of the fake: those of the real program that the daemon uses, and the faults."""

import argparse
import functools
import json
import os
import sys

import fake_guard  # type: ignore[import-not-found] # beside this script
import fake_ledger  # type: ignore[import-not-found] # as above

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# In the order of a start. A phase's faults come behind the line that tells of the phase.
PHASES = (
    "import",  # before anything is bound or said
    "bind",  # the port is taken, nothing listens on it
    "load",  # the engine core runs
    "weights",
    "profile",  # how much memory is left; compiling is a part of it
    "compile",
    "capture",
    "listen",  # the port accepts connections, and nothing answers yet
)
# Whose product is how many devices an engine has.
WORLD = ("tensor-parallel-size", "pipeline-parallel-size", "prefill-context-parallel-size", "data-parallel-size")
# What `--fake-once` takes back: whatever keeps a start from its end, and the faults of a sleep that follows.
_ONCE = (
    "fake_exit_at",
    "fake_hang_at",
    "fake_phase_until",
    "fake_load_until",
    "fake_load_seconds",
    "fake_steal_port",
    "fake_unhealthy",
    "fake_foreign",
    "fake_sleep",
    "fake_wake",
)


def parse() -> argparse.Namespace:
    """The command line; exit code 2 where it is wrong, as argparse has it."""
    width = functools.partial(argparse.HelpFormatter, width=120)  # else it would import a lot to find one
    parser = argparse.ArgumentParser(prog="vllm serve", formatter_class=width)
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds", metavar="PATH", help="listen there and nowhere else")
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    parser.add_argument("--disable-access-log-for-endpoints")
    parser.add_argument("--max-model-len", type=int, default=4096)
    for size in WORLD:
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--scheduling-policy", choices=["fcfs", "priority"], default="fcfs")
    parser.add_argument("--dtype")
    parser.add_argument("--trust-remote-code", action=argparse.BooleanOptionalAction)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--enable-sleep-mode", action=argparse.BooleanOptionalAction)
    parser.add_argument("--hf-overrides", type=json.loads)
    _lora(parser)
    _memory(parser)
    _faults_of_the_start(parser)
    _faults_of_the_core(parser)
    _faults_while_it_runs(parser)
    _faults_of_sleep(parser)
    options = parser.parse_args(sys.argv[2:] if sys.argv[1:2] == ["serve"] else sys.argv[1:])
    if (options.max_cpu_loras or options.max_loras) < options.max_loras:
        parser.error(f"max_cpu_loras ({options.max_cpu_loras}) must be >= max_loras ({options.max_loras}).")
    if options.fake_residue is None:
        options.fake_residue = options.fake_context + int(0.67 * 2**30)
    if options.fake_residue < options.fake_context:
        parser.error("--fake-residue: a sleeper keeps at least its context")
    if options.fake_ledger and not fake_ledger.Ledger(options.fake_ledger).wake():
        parser.error(f"nobody keeps {options.fake_ledger} true: see tests.fakes.ledger")
    if options.fake_once and not first(options.fake_once):
        for name in _ONCE:
            setattr(options, name, parser.get_default(name))
    return options


def _lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--enable-tokenizer-info-endpoint", action=argparse.BooleanOptionalAction)
    parser.add_argument("--enable-lora", action=argparse.BooleanOptionalAction)
    parser.add_argument("--max-lora-rank", type=int, choices=RANKS, default=16)
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int)


def _memory(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fake-ledger", metavar="FILE", help="the memory of the devices, shared with all that name the same file")
    add("--fake-context", type=int, default=int(0.6 * 2**30), metavar="BYTES", help="of each device, before all else")
    add("--fake-residue", type=int, metavar="BYTES", help="of each device, asleep; default: its context and 0.67 GiB")
    add("--fake-weights", type=int, metavar="BYTES", help="of each device; default: a quarter of what it wants")
    add("--fake-hold", type=int, metavar="BYTES", help="it has no KV cache, and keeps so much of each device")
    add(
        "--fake-release-delay", type=float, default=0.0, metavar="SECONDS", help="from its death to its memory's return"
    )


def _faults_of_the_start(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fake-once", metavar="FILE", help="the faults of a start happen to the one that creates this file")
    add("--fake-load-seconds", type=float, default=0.0, help="in the phase load")
    add("--fake-load-until", metavar="FILE", help="the phase load lasts until this file exists")
    add("--fake-phase-until", type=phase_and_file, metavar="PHASE=FILE", action="extend", nargs="+", default=[])
    add("--fake-hang-at", choices=PHASES, help="stop there for ever, in silence")
    add("--fake-exit-at", choices=PHASES, help="end there")
    add("--fake-exit-code", type=int, default=1)
    add("--fake-exit-signal", type=int, help="end by this signal instead, all of a sudden: the core stays")
    add("--fake-exit-text", help="the last words")
    add("--fake-tell", metavar="NAME", nargs="+", default=[], help="log these variables, in the phase load")
    add("--fake-steal-port", action="store_true", help="another program has taken the port")


def _faults_of_the_core(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fake-orphan", action="store_true", help="the core ignores SIGTERM; the server kills it where it ends")
    add("--fake-stubborn-core", action="store_true", help="the core ignores SIGTERM, and the server leaves it")
    add("--fake-grandchildren", type=int, default=0, metavar="N", help="the core has so many workers")
    add("--fake-escape", action="store_true", help="the last of the workers makes a session of its own")
    add("--fake-shm", nargs="?", choices=["core", "server"], const="core", help="who maps a shared memory segment")


def _faults_while_it_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fake-unhealthy", action="store_true", help="/health answers 503")
    add("--fake-foreign", action="store_true", help="lists other names than asked for")
    add("--fake-ignore-sigterm", action="store_true")
    add("--fake-tasks", nargs="+", choices=("generate", "embed"), help="it has the routes of these alone, and says so")
    add("--fake-guard", choices=fake_guard.KINDS, help="its answers are verdicts on what it is asked about")
    add("--fake-no-metrics", action="store_true", help="/metrics holds nothing of vLLM's")
    add("--fake-flood", type=int, default=0, metavar="BYTES", help="log so much as soon as it listens")
    add("--fake-garbage-log", action="store_true", help="log what is no text, in the phase load")


def _faults_of_sleep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--fake-sleep",
        choices=["lies", "fails-after-freeing", "dies", "slow"],
        help="200, and nothing is freed; 500, and all is freed; the core dies of it; it lasts an hour",
    )
    add(
        "--fake-wake",
        choices=["oom", "dies", "hangs", "garbage"],
        help="half is mapped, for good; the core dies of it; no answer, of anything that asks the core; '!!!!'",
    )
    add("--fake-sleep-seconds", type=float, default=0.0, help="until memory is freed")
    add("--fake-sleep-until", metavar="FILE", help="memory is not freed before this file exists")
    add("--fake-wake-seconds", type=float, default=0.0, help="until weights are back: from the host, or read again")
    add("--fake-wake-until", metavar="FILE", help="they are not back before this file exists")


def phase_and_file(text: str) -> tuple[str, str]:
    """`PHASE=FILE`, read."""
    phase, _, file = text.partition("=")
    if phase not in PHASES or not file:
        raise ValueError(text)
    return phase, file


def first(path: str) -> bool:
    """Whether nobody has asked so before, of whatever process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
