"""What Prometheus is given: `/metrics` and `/metrics/engines`, of a running daemon with fake engines."""

import gzip
import http
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Daemon, daemon, fake_engines, port_block
from vllm_proxy.api.scrapes import accepts_gzip

MODELS = """
[models.chat]
model = "org/chat"
replicas = 2
[models."org/other:1"]
model = "org/other"
[models.later]
model = "org/later"
start = "on-demand"
"""
ENGINES = [("chat", "0"), ("chat", "1"), ("org/other:1", "0")]

type Series = dict[str, dict[tuple[str, str], float]]


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("scrapes")) as running:
        for model, index in (("chat", 0), ("chat", 1), ("org/other:1", 0)):
            await running.once(model, lambda one: one["state"] == "ready", index)
        yield running


async def series(running: Daemon, query: str = "", **headers: str) -> Series:
    """By name: the value of each engine's first series."""
    async with running.session.get(f"/metrics/engines{query}", headers=headers) as answer:
        assert answer.status == http.HTTPStatus.OK
        text = await answer.text()
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            found.setdefault(one.name, {}).setdefault((one.labels["model"], one.labels["replica"]), one.value)
    return found


async def test_every_ready_engine_is_shown_with_its_model_and_its_replica(shared: Daemon) -> None:
    """All that is vLLM's, and nothing else: neither when a counter was made nor what a library counts."""
    found = await series(shared)
    assert sorted(found["vllm_proxy_engine_up"]) == ENGINES
    assert {*found["vllm_proxy_engine_up"].values()} == {1}
    for name in ("vllm:kv_cache_usage_perc", "vllm:generation_tokens_total", "vllm:e2e_request_latency_seconds_count"):
        assert sorted(found[name]) == ENGINES
    assert all(name.startswith("vllm:") or name == "vllm_proxy_engine_up" for name in found)
    assert not any(name.endswith("_created") for name in found)


async def test_the_rest_is_shown_to_who_asks_for_it(shared: Daemon) -> None:
    """Engines are told not to say when each counter was made."""
    found = await series(shared, "?all=1")
    assert sorted(found["process_resident_memory_bytes"]) == sorted(found["vllm:num_requests_running"]) == ENGINES
    assert "http_requests_total" in found
    assert not any(name.startswith("vllm:") and name.endswith("_created") for name in found)


async def test_nobody_is_woken_by_a_scrape(shared: Daemon) -> None:
    """A model that the next request would start is stopped afterwards, too."""
    await series(shared)
    later = await shared.get("/models/later")
    assert later["status"]["state"] == "stopped"
    assert (await shared.metrics())['vllm_proxy_model_wanted{model="later"}'] == 0


async def test_an_engine_that_does_not_answer_is_down_and_holds_nobody_up_for_longer_than_a_scrape(
    shared: Daemon,
) -> None:
    """As long as four fifths of what the scraper says; the series of the others are there."""
    stopped = (await shared.instance("chat", 1))["pid"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        found = await series(shared, **{"X-Prometheus-Scrape-Timeout-Seconds": "1"})
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert found["vllm_proxy_engine_up"] == {ENGINES[0]: 1, ENGINES[1]: 0, ENGINES[2]: 1}
    assert sorted(found["vllm:num_requests_running"]) == [ENGINES[0], ENGINES[2]]


@pytest.mark.parametrize("told", ["nan", "-1", "0", "inf", "soon"])
async def test_a_deadline_that_is_none_does_not_count(shared: Daemon, told: str) -> None:
    """Engines have their time then."""
    found = await series(shared, **{"X-Prometheus-Scrape-Timeout-Seconds": told})
    assert {*found["vllm_proxy_engine_up"].values()} == {1}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines"])
async def test_a_scraper_that_accepts_gzip_gets_it(shared: Daemon, path: str) -> None:
    """The same text, and nobody else gets it."""
    names = []
    async with aiohttp.ClientSession(shared.session._base_url, auto_decompress=False) as session:
        for accepted, encoding in (("gzip", "gzip"), ("identity", None), ("br, gzip;q=0", None)):
            async with session.get(path, headers={"Accept-Encoding": accepted}) as answer:
                assert answer.headers.get("Content-Encoding") == encoding
                assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
                assert answer.headers["Vary"] == "Accept-Encoding"
                text = await answer.read()
            text = gzip.decompress(text) if encoding else text
            names.append([line.partition(b" ")[0] for line in text.splitlines()])
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines"])
async def test_without_traces_it_is_the_plain_text_whatever_is_asked_for(shared: Daemon, path: str) -> None:
    """As there are no exemplars."""
    async with shared.session.get(path, headers={"Accept": "application/openmetrics-text;version=1.0.0"}) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["Vary"] == "Accept-Encoding"
        assert "# EOF" not in await answer.text()


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("gzip", True), ("deflate, GZIP;q=0.5", True), ("*", True), ("gzip; q=0.0", False), ("gzip;q=0", False),
     ("identity", False), ("", False)],
)  # fmt: skip
def test_what_a_scraper_accepts(header: str, *, accepted: bool) -> None:
    """As RFC 9110 has it."""
    assert accepts_gzip(header) is accepted
