"""Tables, and the targets with their verdicts."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from tests.bench import access, balance, cases, client, hazards, swap
from tests.bench.idle import Idle
from tests.bench.peers import DIRECT, OURS


@dataclass(slots=True)
class Findings:
    """All that a run found out."""

    conditions: dict[str, object] = field(default_factory=dict)
    results: cases.Results = field(default_factory=cases.Results)
    memory: dict[str, hazards.Memory] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)
    departures: dict[str, hazards.Departures] = field(default_factory=dict)
    slow_mb: dict[str, float] = field(default_factory=dict)
    big_body: dict[str, hazards.BigBody] = field(default_factory=dict)
    models: cases.Results = field(default_factory=cases.Results)
    balance: cases.Results = field(default_factory=cases.Results)
    balance_us: dict[str, dict[str, float]] = field(default_factory=dict)  # by size and kind
    scrapes: hazards.Scrapes | None = None
    keys: access.Access = field(default_factory=access.Access)
    swaps: list[swap.Swap] = field(default_factory=list)
    wakes: list[swap.Swap] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the verdict; `value` None: not measured. `holds`: a run that misses it has failed."""

    name: str
    must: float
    aim: float | None
    unit: str
    value: float | None
    holds: bool = False

    @property
    def verdict(self) -> str:
        """What became of it."""
        if self.value is None:
            return "not measured"
        if self.value > self.must:
            return "missed"
        return "met" if self.aim is None or self.value <= self.aim else "met, not the aim"


def _shown(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if math.isfinite(value) else "never"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _rounds_table(
    title: str, results: cases.Results, cell: Callable[[str, str], str], names: Sequence[str]
) -> Iterator[str]:
    found = [case for case in results.rounds if any(results.get(case, name) for name in names)]
    if found:
        yield f"**{title}**"
        yield ""
        yield from _table(["proxy", *found], [[name, *(cell(case, name) for case in found)] for name in names])


def _added(results: cases.Results, case: str, name: str, value: Callable[[client.Figures], float]) -> list[float]:
    """Differences to direct, round by round."""
    return [
        value(figures) - value(direct)
        for figures, direct in zip(results.get(case, name), results.get(case, DIRECT), strict=False)
    ]


def _ratios(
    results: cases.Results, case: str, name: str, other: str, value: Callable[[client.Figures], float]
) -> list[float]:
    """Quotients, round by round; rounds in which nothing came through are left out."""
    return [
        value(figures) / value(peer)
        for figures, peer in zip(results.get(case, name), results.get(case, other), strict=False)
        if figures.count and peer.count
    ]


def _cpu(figures: client.Figures) -> float:
    return figures.cpu_us


def _p50(figures: client.Figures) -> float:
    return figures.p50_us


def _p99(figures: client.Figures) -> float:
    return figures.p99_us


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def targets(findings: Findings) -> list[Target]:
    """Every target with what was measured."""
    results = findings.results
    models = list(findings.models.rounds.get("json32", {}))

    def cpu(case: str, other: str) -> float | None:
        return _median(_ratios(results, case, OURS, other, _cpu))

    def more(case: str) -> float | None:
        if len(models) != 2:
            return None
        ratio = _median(_ratios(findings.models, case, models[1], models[0], _cpu))
        return None if ratio is None else (ratio - 1) * 100

    sequential = _median(_added(results, "json1", OURS, _p50))
    tail = _median(_added(results, "sse1024", OURS, _p99))
    memory = findings.memory.get(OURS)
    plain = [one for kind, one in findings.idle.items() if kind != "TLS"]
    departed = findings.departures.get(OURS)
    big = findings.big_body.get(OURS)
    compared = findings.keys.compared
    half, tail_of_swaps = swap.overheads(findings.swaps) if findings.swaps else (None, None)
    tail_of_wakes = swap.overheads(findings.wakes)[1] if findings.wakes else None
    metered = {name: _median(_ratios(compared, name, access.WITH, access.WITHOUT, _cpu)) for name in access.COMPARED}
    return [
        Target("CPU per JSON request, 32 connections, vs vllm-router", 0.55, None, "x", cpu("json32", "vllm-router")),
        Target("CPU per JSON request, 32 connections, vs nginx", 2.2, None, "x", cpu("json32", "nginx")),
        Target("CPU per event, 256 streams, vs vllm-router", 0.75, None, "x", cpu("sse256", "vllm-router")),
        Target("CPU per event, 256 streams, vs nginx", 1.3, None, "x", cpu("sse256", "nginx")),
        Target("added to a sequential JSON request, p50", 80, None, "us", sequential),
        Target("memory of an idle stream", 20, None, "KiB", memory.kib_per_stream if memory else None),
        Target(
            "memory of an idle connection",
            20,
            None,
            "KiB",
            max((one.kib_per_connection for one in plain), default=None),
        ),
        Target(
            "a request beside 10,000 idle connections, p95",
            10,
            None,
            "ms",
            max((one.p95_ms for one in plain), default=None),
        ),
        Target("added delay of an event, 1,024 streams, p99", 20, None, "ms", None if tail is None else tail / 1000),
        Target(
            "client gone: seen by the engine, worst of four states",
            50,
            None,
            "ms",
            departed.worst if departed else None,
        ),
        Target("memory growth for a client that reads nothing", 5, None, "MB", findings.slow_mb.get(OURS)),
        Target("longest delay of an event beside a 50 MB body", 100, None, "ms", big.stall_ms if big else None),
        Target("events beside scrapes of /metrics, p99, later by", 5, None, "ms", _scraped(findings)),
        Target("finding the caller", 1, None, "us", max(_callers(findings).values(), default=None)),
        Target("CPU per JSON request of a key with limits, vs unmetered", 1.10, None, "x", metered["json32"]),
        Target("CPU per event of a key with limits, vs unmetered", 1.03, None, "x", metered["sse256"]),
        Target("until a 64 MiB upload is refused", 10, None, "ms", _median([one.ms for one in findings.keys.refused])),
        Target("CPU per JSON request with 1,000 models, more by", 5, None, "%", more("json32")),
        Target("CPU per event with 1,000 models, more by", 5, None, "%", more("sse256")),
        Target("a swap beside the engine's own start and stop, p50", 40, None, "ms", half, holds=True),
        Target("a 1 KiB chat over four engines by prefix, more by", 3, None, "us", _more(findings, "1 KiB")),
        Target("a 40 KiB chat over four engines by prefix, more by", 25, None, "us", _more(findings, "40 KiB")),
        Target("a swap beside the engine's own start and stop, p95", 100, None, "ms", tail_of_swaps, holds=True),
        Target("a wake beside the engine's own and the canary, p95", 30, None, "ms", tail_of_wakes, holds=True),
    ]


def _scraped(findings: Findings) -> float | None:
    found = findings.scrapes
    return None if found is None else found.p99_ms - found.p99_without_ms


def _callers(findings: Findings) -> dict[str, float]:
    """Those that the target is about: who sends a known key, and who sends none where none is needed."""
    return {name: us for name, us in findings.keys.caller_us.items() if "unknown" not in name}


def _key_rows(findings: Findings) -> Iterator[tuple[str, str, str]]:
    for name, us in findings.keys.caller_us.items():
        yield f"finding the caller, {name}", OURS, f"{us:.2f} us"
    for case, name in product(access.COMPARED, (access.WITHOUT, access.WITH)):
        if found := findings.keys.compared.get(case, name):
            yield f"{case}, {name}", OURS, f"{spread([one.cpu_us for one in found])} us"
    if refused := findings.keys.refused:
        statuses = ", ".join(str(status) for status in sorted({one.status for one in refused}))
        text = f"{statuses} in {spread([one.ms for one in refused])} ms, of its body was read by then"
        yield "64 MiB upload that is refused", OURS, f"{text} {spread([one.read / 1024 for one in refused], 0)} KiB"


def _balance_rows(findings: Findings) -> Iterator[tuple[str, str, str]]:
    for size, kinds in findings.balance_us.items():
        shown = ", ".join(f"{name} {us:.1f}" for name, us in kinds.items())
        yield f"choosing an engine for a chat of {size}: us in a loop", OURS, shown
    for name in balance.FILES:
        if found := findings.balance.get("json32", name):
            yield f"json32, {name}", OURS, f"{spread([one.cpu_us for one in found])} us"


def _more(findings: Findings, size: str) -> float | None:
    kinds = findings.balance_us.get(size)
    return None if kinds is None else kinds[balance.PREFIX] - kinds[balance.ONE]


def _hazard_rows(findings: Findings) -> Iterator[tuple[str, str, str]]:
    for name, memory in findings.memory.items():
        text = f"{memory.kib_per_stream:.1f} KiB at {memory.streams:,} (base {memory.base_kib / 1024:.0f} MiB,"
        yield "memory of an idle stream", name, f"{text} open files limit {memory.files_limit:,})"
    for what, swaps in (("swaps", findings.swaps), ("wakes", findings.wakes)):
        if swaps:
            whole, engine = ([getattr(one, name) for one in swaps] for name in ("all_ms", "engine_ms"))
            text = f"{spread(whole)}, of it the engine {spread(engine)}"
            yield f"{len(whole)} {what}: ms to the first byte", OURS, text
    for kind, one in findings.idle.items():
        text = f"{one.kib_per_connection:.1f} KiB at {one.connections:,}; a request beside them: p50 {one.p50_ms:.2f},"
        yield f"memory of an idle connection, {kind}", OURS, f"{text} p95 {one.p95_ms:.2f}, most {one.most_ms:.2f} ms"
    for name, gone in findings.departures.items():
        for state, values in gone.found.items():
            shown = ["never (4 s)" if ms is None else f"{ms:.1f}" for ms in values]
            yield f"client gone, {state}: ms", name, ", ".join(shown)
    for name, growth in findings.slow_mb.items():
        yield "client reads nothing: growth", name, f"{growth:.1f} MB"
    if found := findings.scrapes:
        text = f"an event's p99 {found.p99_ms:.1f} ms, most {found.most_ms:.1f}"
        without = f"without {found.p99_without_ms:.1f}, {found.most_without_ms:.1f}"
        yield f"256 streams, {found.models:,} models, /metrics asked {found.asked} times", OURS, f"{text}; {without}"
    for name, big in findings.big_body.items():
        text = f"{big.status} in {big.seconds:.2f} s, {big.cpu_ms:.0f} ms CPU, longest delay {big.stall_ms:.1f} ms"
        yield "50 MB body beside 64 streams", name, f"{text} ({big.stall_without_ms:.1f} without)"


def render(findings: Findings) -> str:
    """The whole report, Markdown."""
    lines = [f"- {name}: {value}" for name, value in findings.conditions.items()]
    lines.append("")
    results = findings.results
    names = list(dict.fromkeys(name for found in results.rounds.values() for name in found))
    proxies = [name for name in names if name != DIRECT]

    def delays(case: str, name: str) -> str:
        p50, p99 = (statistics.median(value(found) for found in results.get(case, name)) for value in (_p50, _p99))
        if name == DIRECT:
            return f"{p50:.0f} / {p99:.0f} in all"
        more = [statistics.median(_added(results, case, name, value) or [math.nan]) for value in (_p50, _p99)]
        return f"{more[0]:.0f} / {more[1]:.0f}"

    def rate(case: str, name: str) -> str:
        found = results.get(case, name)
        text = spread([figures.count / figures.seconds for figures in found], 0)
        failed = sum(figures.errors for figures in found)
        short = min(figures.connections for figures in found) < cases.CASES[case].connections
        return text + (f", {failed} errors" if failed else "") + (", too few connections" if short else "")

    def cpu(case: str, name: str) -> str:
        return spread([_cpu(figures) for figures in results.get(case, name)])

    lines += _rounds_table("CPU us of the proxy for each request or event: median (range)", results, cpu, proxies)
    lines += _rounds_table("Delay added to direct, us: p50 / p99", results, delays, names)
    lines += _rounds_table("Requests or events a second", results, rate, names)
    if findings.models.rounds:
        shown = list(findings.models.rounds["json32"])
        lines += _rounds_table(
            "CPU us with many models declared",
            findings.models,
            lambda case, name: spread([_cpu(figures) for figures in findings.models.get(case, name)]),
            shown,
        )
    if rows := [*_hazard_rows(findings), *_key_rows(findings), *_balance_rows(findings)]:
        lines += _table(["case", "proxy", "found"], rows)
    verdicts = []
    for target in targets(findings):
        value = "-" if target.value is None else _shown(target.value, target.unit)
        aim = "" if target.aim is None else f"{target.aim:g}"
        verdicts.append([target.name, f"{target.must:g} {target.unit}", aim, value, target.verdict])
    lines += _table(["target", "at most", "aim", "found", "verdict"], verdicts)
    return "\n".join(lines)
