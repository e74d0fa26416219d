"""The example configuration against a real Prometheus: it scrapes a daemon, and answers each alert and each panel."""

import asyncio
import contextlib
import http
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, free_port, port_block, until
from tests.prometheus.queries import FOLDER, alerts, panels, without_comparison

pytestmark = pytest.mark.prometheus
RULES = Path(__file__).parent / "alerts_test.yml"
MODELS = """
[models.chat]
model = "org/chat"
replicas = 2
[models.broken]
model = "org/broken"
args = { fake_exit_at = "weights" }
restart = { max_failures = 1 }
"""
PATH = "/v1/chat/completions"


def program(name: str) -> str:
    """Of Debian's package."""
    found = shutil.which(name)
    assert found, f"no {name} here: `apt-get install prometheus`, or leave these tests out with -m 'not prometheus'"
    return found


def promtool(*words: str, told: bytes = b"") -> tuple[int, str]:
    """Exit status and what it says, in the folder of the examples."""
    done = subprocess.run(
        [program("promtool"), *words], cwd=FOLDER, input=told, capture_output=True, check=False, timeout=60
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def test_the_example_configuration_is_valid() -> None:
    """And so are the alerts."""
    assert promtool("check", "config", "prometheus.yml")[0] == 0
    status, said = promtool("check", "rules", "alerts.yml")
    assert (status, f"{len(alerts())} rules found" in said) == (0, True)


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    """Each one, as written down beside this test."""
    assert set(re.findall(r"^ +alertname: (\w+)\n +exp_alerts:", RULES.read_text(), re.MULTILINE)) == set(alerts())
    for file in (FOLDER / "alerts.yml", RULES):
        shutil.copy(file, tmp_path)
    status, said = promtool("test", "rules", str(tmp_path / RULES.name))
    assert status == 0, said


class Prometheus:
    """A real one that scrapes a daemon. `running` is that."""

    def __init__(self, running: Daemon, session: aiohttp.ClientSession) -> None:
        self.running = running
        self._session = session

    async def ask(self, query: str) -> list[dict[str, str]]:
        """The labels of each series that a query returns now."""
        async with self._session.get("/api/v1/query", params={"query": query}) as answer:
            found: Any = await answer.json()
            assert found["status"] == "success", found
            return [one["metric"] for one in found["data"]["result"]]

    async def traces(self, query: str) -> dict[str, set[str]]:
        """Of the exemplars of a query: the traces, by the route of their series."""
        now = time.time()
        asked = {"query": query, "start": str(now - 3600), "end": str(now + 3600)}
        async with self._session.get("/api/v1/query_exemplars", params=asked) as answer:
            found: Any = await answer.json()
        assert found["status"] == "success", found
        return {one["seriesLabels"]["route"]: {it["labels"]["trace_id"] for it in one["exemplars"]}
                for one in found["data"]}  # fmt: skip

    async def series(self, query: str) -> list[dict[str, str]]:
        """As `ask`, once there are some: rates need two scrapes."""
        return await until(lambda: self.ask(query), bool)


def configuration(port: int) -> str:
    """That of the example, for this daemon, and quicker."""
    text = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    assert text.count('"localhost:8000"') == 2
    text = text.replace("localhost:8000", f"127.0.0.1:{port}").replace("- alerts.yml", f"- {FOLDER / 'alerts.yml'}")
    return re.sub(r"(_interval): 15s", r"\1: 1s", text)


async def traffic(running: Daemon) -> None:
    """Requests, one of which cannot be served."""
    bodies = [{"model": "chat", "stream": True, "fake": {"chunks": 3}}] * 4 + [{"model": "broken"}]
    for body in bodies:
        async with running.session.post(PATH, json=body) as answer:
            await answer.read()
            assert (answer.status == http.HTTPStatus.OK) == (body["model"] == "chat")


async def followed(running: Daemon) -> None:
    """Somebody watches, so that tokens are counted soon; requests come all the time."""
    async with running.admin.get("/events"):
        while True:
            await traffic(running)
            await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
async def prometheus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """One for all of them."""
    folder = tmp_path_factory.mktemp("prometheus")
    async with daemon(fake_engines(port_block()) + MODELS, folder) as running:
        for index in (0, 1):
            await running.once("chat", lambda one: one["state"] == "ready", index)
        await running.once("broken", lambda one: one["state"] == "error")
        following = asyncio.create_task(followed(running))
        try:
            async with scraping(running, folder) as found:
                yield found
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


@contextlib.asynccontextmanager
async def scraping(running: Daemon, folder: Path, *options: str) -> AsyncIterator[Prometheus]:
    """One that does so for as long as the block runs."""
    (folder / "prometheus.yml").write_text(configuration(running.port), encoding="utf-8")
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", *options, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            await until(lambda: _is_ready(session), bool)
            yield Prometheus(running, session)
    finally:
        process.kill()
        await process.wait()


async def _is_ready(session: aiohttp.ClientSession) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get("/-/ready") as answer:
            return answer.status == http.HTTPStatus.OK
    return False


@pytest.mark.parametrize("name", alerts())
async def test_every_alert_asks_for_series_that_there_are(prometheus: Prometheus, name: str) -> None:
    """Without what it compares them with."""
    assert await prometheus.series(without_comparison(alerts()[name]))


@pytest.mark.parametrize(("title", "query"), list(panels()))
async def test_every_panel_of_the_dashboard_shows_series(prometheus: Prometheus, title: str, query: str) -> None:
    """With its variables filled in."""
    assert await prometheus.series(query), title


async def test_no_label_of_ours_is_renamed(prometheus: Prometheus) -> None:
    """`instance` and `job` are Prometheus' own; an instance of a model is a `replica`."""
    for name in ("vllm_proxy_in_flight", "vllm:num_requests_running"):
        found = await prometheus.series(f'{name}{{model="chat"}}')
        assert {one["replica"] for one in found} == {"0", "1"}
        assert not {label for one in found for label in one if label.startswith("exported_")}
    assert not await prometheus.ask('{__name__=~"vllm.+",exported_instance!=""}')


async def test_the_text_has_nothing_that_promtool_would_complain_of(prometheus: Prometheus) -> None:
    """Of ours not a word; of vLLM's at most how it names things, which a scrape does not mind."""
    async with prometheus.running.session.get("/metrics") as answer:
        assert promtool("check", "metrics", told=await answer.read()) == (0, "")
    async with prometheus.running.session.get("/metrics/engines") as answer:
        status, said = promtool("check", "metrics", told=await answer.read())
    assert "error while linting" not in said
    assert status in {0, 3}


async def test_the_trace_of_a_request_is_found_at_its_duration(tmp_path: Path) -> None:
    """By a Prometheus that keeps exemplars, of a daemon that sends traces; their collector may be gone."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    async with (
        daemon(fake_engines(port_block()) + '[models.chat]\nmodel = "org/chat"\n', tmp_path, env=env) as running,
        scraping(running, tmp_path, "--enable-feature=exemplar-storage") as prometheus,
    ):
        await running.once("chat", lambda one: one["state"] == "ready")
        sampled = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
        async with running.session.post(PATH, json={"model": "chat"}, headers=sampled) as answer:
            assert answer.status == http.HTTPStatus.OK
        for name in ("request_duration", "time_to_first_byte"):
            query = f'vllm_proxy_{name}_seconds_bucket{{model="chat"}}'
            found = await until(lambda query=query: prometheus.traces(query), bool)  # type: ignore[misc]
            assert found == {PATH: {trace_id}}
        assert await prometheus.series('vllm_proxy_requests_total{model="chat",status="200"} == 1')
        assert await prometheus.series('up{job="vllm-proxy"} == 1')
