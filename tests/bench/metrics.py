"""What a scrape costs: `python -m tests.bench.metrics` prints ours beside prometheus-client's, in the same run.

All times are processor time of this process, the best of several: other programs on the machine do not count. The
longest turn is what a request waits for at most while a scrape is made. `--recorded` takes what was asked of a real
engine under load, by `curl ADDRESS/metrics` every 15 s.
"""

import argparse
import asyncio
import contextlib
import functools
import gzip
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvloop
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tests.api.test_metrics import Fleet, call, metrics_of
from tests.fakes.fake_metrics import RECORDED
from vllm_proxy.api.engine_metrics import EngineMetrics
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.reconciler import Reconciler

_TIMES = 9
_TRACE = SimpleNamespace(trace_id="4bf92f3577b34da6a3ce929d0e0e4736")
_TELLS = ("counter", "gauge")
_SERVER = """
import asyncio, itertools, sys
texts = [open(name, "rb").read() for name in sys.argv[2:]]
answers = [b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(text) + text for text in texts]
def engine():
    said = itertools.cycle(answers)
    async def answered(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(next(said))
        await writer.drain()
    return asyncio.start_server(answered, "127.0.0.1", 0)
async def main():
    servers = [await engine() for _ in range(int(sys.argv[1]))]
    print(*(one.sockets[0].getsockname()[1] for one in servers), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
# As engines say it that the daemon started, without `_created` (domain/command.py); and with other numbers each time.
_SAID = "".join(
    f"# HELP {family}"
    for family in RECORDED.read_text().split("# HELP ")[1:]
    if not family.split()[0].endswith("_created")
)
_CHANGING = [re.sub(r"(?<=\d)\n", f"{number}\n", _SAID) for number in range(1, 10)]


class Client(Collector):
    """The same series for prometheus-client, made of plain numbers as its users make them of theirs."""

    def __init__(self, text: str) -> None:
        self._plain = [_plain(family) for family in text_string_to_metric_families(text) if family.samples]

    def collect(self) -> Iterator[Metric]:
        """Every family, anew."""
        for kind, name, meaning, labels, samples in self._plain:
            if kind == "histogram":
                histogram = HistogramMetricFamily(name, meaning, labels=labels)
                for values, (buckets, total) in samples:
                    histogram.add_metric(values, buckets, total)
                yield histogram
            else:
                make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                family = make(name, meaning, labels=labels)
                for values, value in samples:
                    family.add_metric(values, value)
                yield family


def _plain(family: Metric) -> tuple[str, str, str, list[str], list[tuple[list[str], Any]]]:
    if family.type in _TELLS:
        labels = list(family.samples[0].labels)
        return family.type, family.name, family.documentation, labels, [
            (list(one.labels.values()), one.value) for one in family.samples
        ]  # fmt: skip
    histograms: dict[tuple[str, ...], tuple[list[tuple[str, float]], list[float]]] = {}
    labels = [label for label in family.samples[0].labels if label != "le"]
    for one in family.samples:
        buckets, total = histograms.setdefault(tuple(one.labels[label] for label in labels), ([], []))
        if one.name.endswith("_bucket"):
            buckets.append((one.labels["le"], one.value))
        elif one.name.endswith("_sum"):
            total.append(one.value)
    samples = [(list(values), (buckets, total[0])) for values, (buckets, total) in histograms.items()]
    return family.type, family.name, family.documentation, labels, samples


def fleet_of(models: int) -> tuple[Fleet, Metrics]:
    """Models with an instance each, whose engine was started once, and one route each that was asked."""
    fleet = Fleet(*(f"m{number}" for number in range(models)))
    metrics = metrics_of(fleet)
    for model in fleet.models():
        model.history.startups.add(40.0)
    ask(metrics, fleet.config.models)
    return fleet, metrics


def ask(metrics: Metrics, models: Iterable[str], *, traced: bool = False) -> None:
    """One request to each of these."""
    for model in models:
        ended: Any = call(model, first=0.5, sent=0.1)
        ended.trace = _TRACE if traced else None
        metrics.count(ended)


async def cost(work: Callable[[], Awaitable[bytes]], before: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """Processor time of the work, and of its longest turn of the event loop, in ms: the best of several."""
    took, turns = [], []
    for _ in range(_TIMES):
        before()
        began = time.process_time()
        await work()
        took.append(time.process_time() - began)
        before()
        turns.append(await _longest_turn(work))
    return min(took) * 1000, min(turns) * 1000


async def _longest_turn(work: Callable[[], Awaitable[bytes]]) -> float:
    # It spins while the work waits, so that no turn of it is missed; that is no part of what the work costs.
    task, longest = asyncio.ensure_future(work()), 0.0
    while not task.done():
        turn = time.thread_time()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - turn)
    return longest


async def own(models: int) -> None:
    """`/metrics`."""
    fleet, metrics = fleet_of(models)
    text = await metrics.text()
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    print(
        f"{models} models, {series} series, {len(text) / 1e6:.2f} MB, {len(gzip.compress(text, 1)) / 1e3:.0f} kB gzip"
    )
    client = Client(text.decode())

    async def theirs() -> bytes:
        return generate_latest(client)

    names = list(fleet.config.models)
    rows = [("prometheus-client", *await cost(theirs))]
    for what, changed in (
        ("all models have changed", names),
        ("10 have changed", names[:10]),
        ("none has changed", []),
    ):
        rows.append((f"ours, {what}", *await cost(metrics.text, lambda changed=changed: ask(metrics, changed))))  # type: ignore[misc]
    exemplified = functools.partial(metrics.text, openmetrics=True)
    rows.append(("ours, all, with exemplars", *await cost(exemplified, lambda: ask(metrics, names, traced=True))))
    for what, took, longest in rows:
        print(f"  {what:32} {took:8.2f} ms, longest turn {longest:8.2f} ms, {rows[0][1] / took:5.1f} times less")


async def engines(count: int, recorded: Sequence[str]) -> None:
    """`/metrics/engines`, of engines that answer as a real vLLM 0.32 did."""
    took = {}
    said = [("all numbers have changed", _CHANGING), ("none has changed", [_SAID])]
    for what, texts in [*said, ("as recorded", recorded)] if recorded else said:
        with answering(count, texts) as ports:
            text = functools.partial(metrics_of_engines(ports).text, 30.0, everything=False)
            answer = await text()
            took[what] = await cost(text)
    series, small = sum(not line.startswith(b"#") for line in answer.splitlines()), len(gzip.compress(answer, 1))
    print(f"{count} engines, {series} series, {len(answer) / 1e6:.2f} MB, {small / 1e3:.0f} kB gzip")
    parsed, _ = await cost(functools.partial(_parsed, _SAID, count))
    print(f"  {'prometheus-client, not asking':32} {parsed:8.2f} ms")
    for what, (processor, longest) in took.items():
        print(
            f"  {f'ours, asking, {what}':38} {processor:8.2f} ms, longest turn {longest:8.2f} ms,"
            f" {parsed / processor:5.1f} times less"
        )


def metrics_of_engines(ports: Sequence[int]) -> EngineMetrics:
    """Of a fleet with a ready engine at each of these."""
    instances = [
        SimpleNamespace(
            name=f"m{number}/0", state=State.READY, endpoint=SimpleNamespace(address=TcpAddress("127.0.0.1", port))
        )
        for number, port in enumerate(ports)
    ]
    fleet: Any = SimpleNamespace(models=lambda: [SimpleNamespace(instances=instances)])
    return EngineMetrics(cast("Reconciler", fleet))


async def _parsed(text: str, count: int) -> bytes:
    """The same, as who has prometheus-client does it: parse what each says, and write it with two labels more."""
    lines = []
    for number in range(count):
        for family in text_string_to_metric_families(text):
            for one in family.samples if family.name.startswith("vllm:") else ():
                labels = {"model": f"m{number}", "replica": "0"} | one.labels
                written = ",".join(f'{label}="{value}"' for label, value in labels.items())
                lines.append(f"{one.name}{{{written}}} {one.value}\n")
    return "".join(lines).encode()


@contextlib.contextmanager
def answering(count: int, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ports of so many engines in another process, each of which says one of these after the other."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        command = [sys.executable, "-c", _SERVER, str(count), *map(str, files)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            yield [int(port) for port in server.stdout.readline().split()]
            server.kill()


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument(
        "--recorded", type=Path, nargs="+", default=[], help="what an engine under load said, one scrape after another"
    )
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(own(options.models))
        runner.run(engines(options.engines, [file.read_text() for file in options.recorded]))


if __name__ == "__main__":
    main()
