"""The benchmark itself works; what it measures is nothing for a test."""

import json
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from tests.bench import balance, build, cases, client, limits, moderation, peers
from tests.harness import daemon, fake_engines, port_block

PROXY = (peers.OURS, peers.DIRECT)


@pytest.mark.slow
@pytest.mark.skipif(not build.compiler(), reason="no C compiler")
def test_a_short_run_gives_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without peers and with windows of a fraction of a second each asked figure is there, and nothing failed."""
    file = tmp_path / "result.json"
    wanted = "json32,sse256,departed,scrape,keys"
    assert bench.main(["--quick", "--seconds", "1", "--only", wanted, "--peers", "none", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    for case in ("json32", "sse256"):
        for name in PROXY:
            (figures,) = found["results"]["rounds"][case][name]
            assert figures["connections"] == cases.CASES[case].connections
            assert figures["count"] > 0
            assert figures["errors"] == 0
            assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["max_us"]
            assert (figures["cpu_us"] > 0) == (name == peers.OURS)
    assert found["scrapes"]["asked"] > 0
    assert found["scrapes"]["most_ms"] > 0
    assert {refused["status"] for refused in found["keys"]["refused"]} == {401}
    assert all(figures["errors"] == 0 for (figures,) in found["keys"]["compared"]["rounds"]["json32"].values())
    assert all(len(tries) == 1 for tries in found["departures"][peers.OURS]["found"].values())
    assert {target["verdict"] for target in found["targets"]} <= {"met", "met, not the aim", "missed", "not measured"}
    assert "| target | at most |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not build.compiler(), reason="no C compiler")
def test_swaps_and_wakes_are_measured_and_judged(tmp_path: Path) -> None:
    """Each swap is one start, no wake is; the exit status says whether the bounds were met."""
    file = tmp_path / "result.json"
    status = bench.main(["--quick", "--only", "swap,wake", "--peers", "none", "--json", str(file)])
    found = json.loads(file.read_text())
    assert len(found["swaps"]) == len(found["wakes"]) == 20
    assert all(0 < one["engine_ms"] < one["all_ms"] for one in (*found["swaps"], *found["wakes"]))
    verdicts = {target["verdict"] for target in found["targets"] if target["holds"]}
    assert status == ("missed" in verdicts)
    assert "not measured" not in verdicts


def test_a_request_says_how_long_it_is() -> None:
    """The head's Content-Length is that of the body in bytes."""
    head, body = client.request(1, "é").split(b"\r\n\r\n")
    assert b"Content-Length: 2" in head
    assert body == "é".encode()


async def test_what_moderation_adds_is_measured(tmp_path: Path) -> None:
    """By its own route and before a chat, beside the guard asked directly."""
    async with daemon(moderation.FILE + fake_engines(port_block()), tmp_path) as running:
        await running.all_ready()
        found = await moderation.measure(running, 2, 2)
    assert list(found) == ["the guard", "/v1/moderations", "a chat", "a moderated chat"]
    assert all(value > 0 for value in found.values())
    assert len(moderation.added(found)) == 2


def test_limits_are_measured() -> None:
    """Each way to meet them has its figure; nothing is held or used up by what was measured before."""
    found = limits.cost(calls=3, rounds=2)
    assert {"one scope", "two scopes", "a refusal", "a fair number"} <= set(found)


async def test_choosing_an_engine_is_measured() -> None:
    """For small and large chats, with one engine and with four; of these the prompt decides where it is to."""
    found = await balance.cost(calls=1, rounds=1)
    assert {size: list(kinds) for size, kinds in found.items()} == {size: [*balance.FILES] for size in balance.SIZES}
    assert len(balance.chat(1024)) == 1024
    there = balance.registry(balance.FILES[balance.PREFIX])
    for _ in range(2):
        balance.request(there, balance.chat(1024))
    assert (there.routed("bench").prefix, there.routed("bench").load) == (1, 1)
