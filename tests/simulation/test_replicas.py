"""What choosing between replicas is worth, in virtual time; and that the engines of the model keep to their rules."""

import itertools
import random

import pytest

from tests.simulation import __main__ as command
from tests.simulation import replicas
from tests.simulation.replicas import BLOCK, CAPACITY, Asked, Chat, Engine

FEW = 4_000  # tokens of a prompt


def asked(engine: Engine, blocks: list[int], output: int = 1) -> Asked:
    """A request that this engine has."""
    found = Asked(0.0, blocks, output, Chat(blocks, 0, random.Random(1)))
    engine.waiting.append(found)
    engine.in_flight += 1
    return found


def finished(engine: Engine, kept: list[int]) -> float:
    """All that it has is done; the seconds that took."""
    whole = 0.0
    while engine.in_flight:
        seconds, _, ended = engine.step()
        whole += seconds
        for one in ended:
            engine.leave(one, kept)
    return whole


def shown(cells: tuple[str, ...]) -> tuple[float, float]:
    """(part that was found in caches, milliseconds to the first token)."""
    return float(cells[0].rstrip("%")), float(cells[1].removesuffix(" ms").replace(",", ""))


@pytest.mark.parametrize(("name", "times"), [("agents, long contexts", 2), ("questions about 60 documents", 10)])
def test_who_remembers_answers_sooner(name: str, times: int) -> None:
    """More is found in caches, and the first token comes in a fraction of the time."""
    found = {kind: shown(replicas.run(replicas.LOADS[name](), policy())) for kind, policy in replicas.POLICIES.items()}
    assert found["prefix"][0] > found["hash of 2 KiB"][0] > found["least-loaded"][0]
    assert times * found["prefix"][1] < found["least-loaded"][1]


def test_where_nothing_is_shared_nothing_is_lost() -> None:
    """The same engines in the same order: the load decides each time."""
    found = [
        replicas.run(replicas.LOADS["nothing in common"](), policy()) for policy in (replicas.Load, replicas.Prefix)
    ]
    assert found[0] == found[1]


def test_an_engine_computes_once_what_its_cache_has_room_for() -> None:
    """Blocks from the beginning on that it had before, but for the last one; and what an answer added."""
    engine, blocks = Engine(0), [*range(1, FEW // BLOCK)]
    first = asked(engine, blocks)
    cold = finished(engine, [9001, 9002])
    again, longer, other = (
        asked(engine, blocks),
        asked(engine, [*blocks, 9001, 9002, 7]),
        asked(engine, [*range(500, 520)]),
    )
    finished(engine, [])
    assert (first.found, again.found, longer.found, other.found) == (0, len(blocks) - 1, len(blocks) + 2, 0)
    asked(engine, blocks)
    assert finished(engine, []) < cold / 3


def test_an_engine_holds_no_more_than_fits() -> None:
    """What was not used for longest goes first, the end of a prompt before its beginning."""
    engine, numbers = Engine(0), itertools.count(1)
    prompts = [[*itertools.islice(numbers, CAPACITY // part)] for part in (3, 3, 3, 6)]
    for blocks in prompts:
        asked(engine, blocks)
        finished(engine, [])
    last = asked(engine, prompts[3])
    finished(engine, [])
    assert last.found == len(prompts[3]) - 1
    oldest = asked(engine, prompts[0])
    finished(engine, [])
    assert 0 < oldest.found < len(prompts[0]) - 1


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each load and policy, under its head."""
    monkeypatch.setattr(replicas, "rows", lambda: [("a load", "a policy", "1%", "2 ms", "3 ms", "4 ms", "5.0")])
    assert command.main(["--replicas"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [*replicas.HEAD]
    assert len(lines) == 3
