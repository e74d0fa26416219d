"""The cases that are measured in rounds, every proxy in each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench import build, client, peers, proc

_ENDLESS = 100_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of load."""

    kind: str
    connections: int
    text: str
    what: str


CASES = {
    "json1": Case("json", 1, client.body(), "JSON requests, one after another"),
    "json32": Case("json", 32, client.body(), "JSON requests, 32 connections"),
    "sse256": Case(
        "stream", 256, client.body(stream=True, count=_ENDLESS, interval_us=50_000), "256 streams, an event each 50 ms"
    ),
    "sse1024": Case(
        "stream",
        1024,
        client.body(stream=True, count=_ENDLESS, interval_us=100_000),
        "1,024 streams, an event each 100 ms",
    ),
}


@dataclass(slots=True)
class Results:
    """Figures by case and proxy, one a round; rounds correspond by index."""

    rounds: dict[str, dict[str, list[client.Figures]]] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)  # cores that others kept busy as each round began

    def add(self, case: str, name: str, figures: client.Figures) -> None:
        """One more round's."""
        self.rounds.setdefault(case, {}).setdefault(name, []).append(figures)

    def get(self, case: str, name: str) -> list[client.Figures]:
        """All rounds of a proxy in a case; empty when it was not measured."""
        return self.rounds.get(case, {}).get(name, [])


def measure(programs: build.Programs, case: Case, peer: peers.Peer, seconds: float) -> client.Figures:
    """One window of one case against one proxy."""
    with client.Load(programs.load, case.kind, peer.port, case.connections, seconds, case.text, peer.key) as load:
        return load.measure(peer.pids)


def run_rounds(
    programs: build.Programs,
    running: Sequence[peers.Peer],
    names: Sequence[str],
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> Results:
    """Round by round, case by case: every proxy in turn, another one first in each round, the others stopped."""
    results = Results()
    for number in range(rounds):
        first = number % len(running)
        results.foreign.append(proc.busy_cores(0.5))
        for name in names:
            for peer in [*running[first:], *running[:first]]:
                with peers.alone(peer, running):
                    figures = measure(programs, CASES[name], peer, seconds)
                results.add(name, peer.name, figures)
                say(f"round {number + 1}: {name} {peer.name}: {figures.cpu_us:.1f} us CPU, p50 {figures.p50_us:.0f} us")
    return results
