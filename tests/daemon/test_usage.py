"""What keys have used, at a running daemon: who sees what of it, as JSON, as CSV, from the command line."""

import csv
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.api.test_openapi import fits
from tests.harness import Daemon, daemon, fake_engines, port_block, vllm_proxy
from vllm_proxy.domain.keys import hash_of, new_key
from vllm_proxy.domain.units import show_time
from vllm_proxy.domain.usage import DAY, HOUR, Bucket, Counts
from vllm_proxy.fleet.usage_file import UsageFile

TOKENS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(["ci", "web", "viewer"])}
SCOPES = {"ci": "inference", "web": "metrics", "viewer": "read"}
KEYS = "".join(
    f'[keys.{name}]\nhash = "{hash_of(token)}"\nscopes = ["{SCOPES[name]}"]\n' for name, token in TOKENS.items()
)


@dataclass(frozen=True, slots=True)
class Reported:
    """A daemon whose state directory has usage of before."""

    running: Daemon
    folder: Path
    hour: int  # in which it was counted: the one before this

    async def ask(self, path: str, key: str, accept: str = "*/*") -> tuple[int, str, str]:
        """Status, type and body of an answer to a key."""
        headers = {"Authorization": f"Bearer {TOKENS[key]}", "Accept": accept}
        async with self.running.session.get(path, headers=headers) as answer:
            return answer.status, answer.content_type, await answer.text()


@pytest.fixture(scope="module")
async def reported(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Reported]:
    """One, ready."""
    folder = tmp_path_factory.mktemp("usage")
    state, now = folder / "state", time.time()
    hour = int(now) // HOUR * HOUR - HOUR
    state.mkdir(mode=0o700)
    file = UsageFile(state / "usage.sqlite")
    counted = {Bucket(hour, "ci", "chat"): Counts(2, 10, 20, 5, 3, 1, 4), Bucket(hour, "web", "chat"): Counts(1, 7)}
    file.add({**counted, Bucket(hour - 9 * DAY, "ci", "chat"): Counts(1, 100)}, now)
    file.close()
    async with daemon(fake_engines(port_block()) + '[models.chat]\nmodel = "x"\n' + KEYS, folder) as running:
        yield Reported(running, folder, hour)


async def test_the_last_24_hours_by_key_and_model(reported: Reported) -> None:
    """As the document describes it."""
    status, kind, text = await reported.ask("/usage", "viewer")
    found = json.loads(text)
    assert (status, kind) == (200, "application/json")
    assert fits("Usage", found, closed=True) == []
    assert found["by"] == ["key", "model"]
    assert found["rows"] == [
        {
            "key": "ci", "model": "chat", "requests": 2, "prompt_tokens": 10, "completion_tokens": 20,
            "cached_tokens": 5, "estimated_tokens": 3, "failed": 1, "limited": 4,
        },
        {
            "key": "web", "model": "chat", "requests": 1, "prompt_tokens": 7, "completion_tokens": 0,
            "cached_tokens": 0, "estimated_tokens": 0, "failed": 0, "limited": 0,
        },
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["ci", "web"])
async def test_a_key_that_may_not_read_sees_itself_alone(reported: Reported, key: str) -> None:
    """Whatever its scopes are, and however it asks."""
    for path in ("/usage", "/usage?by=key", "/usage?by=hour,key", "/usage?by=model"):
        status, _, text = await reported.ask(path, key)
        assert status == 200
        (row,) = json.loads(text)["rows"]
        assert row["key"] in {key, None}
        assert row["requests"] == {"ci": 2, "web": 1}[key]


async def test_who_sends_no_key_sees_nothing(reported: Reported) -> None:
    """Nor who sends one that is unknown."""
    async with reported.running.session.get("/usage") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "missing_api_key")
    async with reported.running.session.get("/usage", headers={"x-api-key": "wrong"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_csv_where_it_is_asked_for(reported: Reported) -> None:
    """The same rows; nobody who takes JSON too gets it."""
    status, kind, text = await reported.ask("/usage?by=key,hour", "viewer", "text/csv")
    assert (status, kind) == (200, "text/csv")
    first, second = csv.DictReader(io.StringIO(text))
    assert (first["key"], first["hour"], first["prompt_tokens"]) == ("ci", show_time(reported.hour), "10")
    assert (second["key"], second["limited"]) == ("web", "0")
    assert (await reported.ask("/usage", "viewer", "application/json, text/csv;q=0.5"))[1] == "application/json"


async def test_a_report_of_some_days(reported: Reported) -> None:
    """From a day on, by day, in the order of time."""
    since = show_time(reported.hour - 9 * DAY)[:10]
    _, _, text = await reported.ask(f"/usage?from={since}&by=day", "viewer")
    found = json.loads(text)
    assert found["from"] == f"{since}T00:00:00Z"
    assert [row["prompt_tokens"] for row in found["rows"]] == [100, 17]
    assert found["rows"][0]["day"] == since
    _, _, text = await reported.ask(f"/usage?from={since}&to={show_time(reported.hour)}&by=", "viewer")
    assert [row["prompt_tokens"] for row in json.loads(text)["rows"]] == [100]


@pytest.mark.parametrize(
    "asked",
    [
        "by=user",
        "by=day,hour",
        "from=yesterday",
        "from=2020-01-02&to=2020-01-01",
        "from=2026-11-24T00:00:00",
        "to=9999-99-99",
    ],
)
async def test_what_cannot_be_reported_says_why(reported: Reported, asked: str) -> None:
    """400, with what to write instead."""
    status, _, text = await reported.ask(f"/usage?{asked}", "viewer")
    assert (status, json.loads(text)["error"]["code"]) == (400, "bad_request")


async def test_refusals_are_counted_by_reason(reported: Reported) -> None:
    """As the error's code says."""
    name = 'vllm_proxy_auth_failures_total{reason="missing_scope"}'
    before = (await reported.running.metrics()).get(name, 0)
    assert (await reported.ask("/models", "ci"))[0] == 403
    assert (await reported.running.metrics())[name] == before + 1


async def test_the_command_prints_a_table_csv_or_json(reported: Reported) -> None:
    """Of the last day by key and model, or as its options say."""
    status, out, _ = await vllm_proxy(reported.folder, "usage")
    head, first, second, *_ = out.splitlines()
    assert status == 0
    assert head.split() == [
        "key", "model", "requests", "prompt", "completion", "cached", "estimated", "failed", "limited",
    ]  # fmt: skip
    assert first.split() == ["ci", "chat", "2", "10", "20", "5", "3", "1", "4"]
    assert second.split()[:3] == ["web", "chat", "1"]
    status, out, _ = await vllm_proxy(reported.folder, "usage", "--since", "10d", "--by", "day", "--key", "ci", "--csv")
    assert (status, [row["prompt_tokens"] for row in csv.DictReader(io.StringIO(out))]) == (0, ["100", "10"])
    status, out, _ = await vllm_proxy(reported.folder, "usage", "--by", "", "--json")
    assert (status, [row["requests"] for row in json.loads(out)["rows"]]) == (0, [3])


async def test_the_command_says_what_is_wrong(reported: Reported) -> None:
    """A key that there is not has not used nothing; a wrong time or a wrong name is told."""
    status, out, err = await vllm_proxy(reported.folder, "usage", "--key", "cii")
    assert (status, out) == (1, "")
    assert "cannot find key" in err
    assert (await vllm_proxy(reported.folder, "usage", "--since", "soon"))[0] == 2
    status, _, err = await vllm_proxy(reported.folder, "usage", "--by", "user")
    assert status == 1
    assert "key, model, and day or hour" in err


async def test_what_cannot_be_written_shows_in_health(tmp_path: Path) -> None:
    """And in the log; the daemon starts and serves all the same."""
    (tmp_path / "state" / "usage.sqlite").mkdir(parents=True)
    async with daemon(fake_engines(port_block()) + '[models.chat]\nmodel = "x"\n', tmp_path) as running:
        health = await running.get("/health")
        assert health["error"] is True
        assert health["usage"]["error"] == "Is a directory"
        await running.logged("what keys have used cannot be written")
        await running.all_ready()
        assert (await running.get("/usage", 503))["error"]["code"] == "usage_unavailable"


async def test_without_a_daemon_the_command_says_so(tmp_path: Path) -> None:
    """As every command that asks one."""
    assert (await vllm_proxy(tmp_path, "usage"))[0] == 3


async def test_a_stranger_on_loopback_reads_while_there_are_no_keys(tmp_path: Path) -> None:
    """As `/models`; nothing was counted, and the file was not even made."""
    async with daemon(fake_engines(port_block()) + '[models.chat]\nmodel = "x"\n', tmp_path) as running:
        async with aiohttp.ClientSession() as session, session.get(f"{running.url}/usage") as answer:
            assert (answer.status, (await answer.json())["rows"]) == (200, [])
        assert (await running.get("/health"))["usage"]["error"] is None
        assert not (running.state_dir / "usage.sqlite").exists()
