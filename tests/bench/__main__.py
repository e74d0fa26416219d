"""`python -m tests.bench`: what vllm-proxy costs, beside other proxies, on this machine.

The figure of merit is the processor time of the proxy for each request or event: rates and tails at saturation say
more about the machine, which the load generator and the mock engine share with it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import access, balance, build, cases, hazards, idle, peers, proc, report, swap, wake

SINGLE = ("memory", "idle", "departed", "slow", "bigbody", "keys", "models", "scrape", "balance", "swap", "wake")
NAMES = (*cases.CASES, *SINGLE)
_OUTPUT = Path(".bench") / "result.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, and for how long."""

    names: Sequence[str] = NAMES
    peers: Sequence[str] = ("nginx", "vllm-router")
    rounds: int = 3
    seconds: float = 4.0
    streams: int = 5000
    idle: int = 10_000
    tries: int = 5
    models: int = 1000
    swaps: int = 200


def _listed(text: str, known: Sequence[str]) -> list[str]:
    if text in ("all", "none"):
        return list(known) if text == "all" else []
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}, all or none")
    return names


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").split("\n\n")[0])
    known = Options()
    add = parser.add_argument
    add("--rounds", type=int, help=f"default {known.rounds}")
    add("--seconds", type=float, help=f"of each window, default {known.seconds:g}")
    add("--only", type=lambda text: _listed(text, NAMES), help=f"some of {','.join(NAMES)}")
    add(
        "--peers",
        type=lambda text: _listed(text, peers.KNOWN),
        help="default nginx,vllm-router; all adds litellm; none",
    )
    add("--install-peers", action="store_true", help="install those from PyPI that are missing, in the cache folder")
    add("--quick", action="store_true", help="one round of one second, fewer streams and tries: under a minute")
    add("--json", type=Path, default=_OUTPUT, metavar="FILE", help=f"default {_OUTPUT}")
    flags = parser.parse_args(arguments)
    options = (
        dataclasses.replace(known, rounds=1, seconds=1.0, streams=500, idle=500, tries=1, swaps=20)
        if flags.quick
        else known
    )
    given = {"rounds": flags.rounds, "seconds": flags.seconds, "names": flags.only, "peers": flags.peers}
    return flags, dataclasses.replace(options, **{name: value for name, value in given.items() if value is not None})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _available(wanted: Sequence[str], *, install: bool) -> list[str]:
    """Those of the peers that can be started here; says what is missing and how to get it."""
    found = []
    for name in wanted:
        trouble = build.install(name) if install and name in build.PACKAGES and not build.find(name) else None
        if build.find(name):
            found.append(name)
        elif name in build.PACKAGES:
            _say(f"{name} is not here: {trouble or '--install-peers gets it from PyPI'}")
        else:
            _say(f"{name} is not here: install it with the system's packages")
    return found


def _started(
    stack: contextlib.ExitStack, names: Sequence[str], programs: build.Programs, engine_port: int, folder: Path
) -> list[peers.Peer]:
    """Those that start; a peer that does not is left out, vllm-proxy that does not is an error."""
    running = []
    for name in names:
        try:
            running.append(stack.enter_context(peers.peer(name, programs, engine_port, folder)))
        except RuntimeError as error:
            if name == peers.OURS:
                raise
            _say(f"left out: {error}")
    return running


def _singles(programs: build.Programs, names: Sequence[str], options: Options, folder: Path) -> report.Findings:
    """The cases that look at one proxy at a time, each started fresh."""
    findings = report.Findings()
    with peers.engine(programs, folder) as engine_port:
        for name in names if "memory" in options.names else ():
            place = folder / f"memory-{name}"
            place.mkdir()
            with contextlib.ExitStack() as stack:
                for peer in _started(stack, [name], programs, engine_port, place):
                    findings.memory[name] = found = hazards.memory(programs, peer, options.streams)
                    _say(f"memory: {name}: {found.kib_per_stream:.1f} KiB a stream")
    if "idle" in options.names:
        findings.idle = idle.measure(programs, folder / "idle", options.idle, _say)
    if {"departed", "slow", "bigbody"} & set(options.names):
        with peers.ours(programs, folder) as peer:
            if "departed" in options.names:
                findings.departures[peer.name] = hazards.departures(peer, options.tries)
            if "slow" in options.names:
                findings.slow_mb[peer.name] = hazards.reads_nothing(peer, options.seconds)
            if "bigbody" in options.names:
                findings.big_body[peer.name] = hazards.big_body(programs, peer, max(2.0, options.seconds))
    return findings


def python() -> str:
    """Which Python measures, and how it was built: with profile-guided optimisation a request costs a third less.

    Debian's is built with it, of which its own configuration says nothing.
    """
    built = str(sysconfig.get_config_var("CONFIG_ARGS"))
    how = "with" if "--enable-optimizations" in built else "not known to be built with"
    of_system = sys.base_prefix == "/usr"
    whose = "the system's" if of_system else f"of {sys.base_prefix}"
    return f"{platform.python_implementation()} {platform.python_version()}, {whose}, {how} profile-guided optimisation"


def run(options: Options, available: Sequence[str], folder: Path) -> report.Findings:
    """Measure everything asked for. `folder` is for programs, configurations and logs."""
    files = proc.open_files_limit()
    programs = build.compile_programs(folder)
    chosen = [peers.OURS, *available]
    single = folder / "single"
    single.mkdir()
    findings = _singles(programs, chosen, options, single)
    if rounds := [name for name in options.names if name in cases.CASES]:
        with contextlib.ExitStack() as stack:
            engine_port = stack.enter_context(peers.engine(programs, folder))
            names = [peers.DIRECT, *chosen]
            running = _started(stack, names, programs, engine_port, folder)
            findings.results = cases.run_rounds(programs, running, rounds, options.rounds, options.seconds, _say)
    if "keys" in options.names:
        findings.keys = access.measure(programs, folder / "keys", options.rounds, options.seconds, _say)
    if "models" in options.names:
        findings.models = hazards.many_models(programs, folder, options.models, options.rounds, options.seconds, _say)
    if "scrape" in options.names:
        findings.scrapes = hazards.scrapes(programs, folder / "scrape", options.models, max(2.0, options.seconds))
    if "balance" in options.names:
        findings.balance = balance.measure(programs, folder / "balance", options.rounds, options.seconds, _say)
        findings.balance_us = asyncio.run(balance.cost())
    if "swap" in options.names:
        findings.swaps = swap.measure(folder / "swap", options.swaps, _say)
    if "wake" in options.names:
        findings.wakes = wake.measure(folder / "wake", options.swaps, _say)
    findings.conditions = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "Python": python(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load average": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "cores that others kept busy before each round": ", ".join(
            f"{cores:.1f}" for cores in findings.results.foreign
        ),
        "rounds": f"{options.rounds} of {options.seconds:g} s",
        "open files limit": files,
        "peers": ", ".join(build.PACKAGES.get(name, name) for name in available) or "none",
    }
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the report, write the figures. Exit status 1 where a bound is missed that is to hold anywhere."""
    flags, options = _parse(arguments)
    available = _available(options.peers, install=flags.install_peers)
    with tempfile.TemporaryDirectory(prefix="vllm-proxy-bench-") as folder:
        findings = run(options, available, Path(folder))
    print(report.render(findings))
    figures = dataclasses.asdict(findings) | {"targets": [_as_json(target) for target in report.targets(findings)]}
    flags.json.parent.mkdir(parents=True, exist_ok=True)
    flags.json.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")
    _say(f"figures: {flags.json}")
    missed = [target for target in report.targets(findings) if target.holds and target.verdict == "missed"]
    for target in missed:
        _say(f"{target.name}: {target.value:.1f} {target.unit}, and at most {target.must:g} is allowed")
    return 1 if missed else 0


def _as_json(target: report.Target) -> dict[str, object]:
    value = target.value if target.value is None or math.isfinite(target.value) else None
    return dataclasses.asdict(target) | {"value": value, "verdict": target.verdict}


if __name__ == "__main__":
    sys.exit(main())
