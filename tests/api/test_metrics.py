"""The numbers of `/metrics`, counted by hand."""

import asyncio
import re
import time
from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.virtual import KeptNumbers
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.api.token_metrics import families as token_families
from vllm_proxy.api.token_metrics import tokens_family
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain.histogram import Histogram
from vllm_proxy.domain.lifecycle import Reason, State
from vllm_proxy.domain.tokens import NO_TOKENS
from vllm_proxy.domain.usage import Counts
from vllm_proxy.fleet.history import History
from vllm_proxy.fleet.managed import Unmanaged
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.fleet.room import Room
from vllm_proxy.runtime.logwriter import LogWriter
from vllm_proxy.runtime.turns import LoopLag
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.usage import Usage

ROUTE = "/v1/completions"


def history_of(name: str) -> History:
    """An engine was killed four times."""
    history = History(KeptNumbers(), lambda spec: spec.model)
    history.failures[f"{name}/0", Reason.KILLED] = 4
    history.tokens.update({"prompt": 100, "cached": 60, "generation": 20})
    return history


class Fleet:
    """What the metrics ask the reconciler and the registry."""

    def __init__(self, *models: str) -> None:
        known: dict[str, None] = dict.fromkeys(models)
        self.config = SimpleNamespace(models=known, ids=known, revision="r1", keys={"ci": None})
        self.room = Room(lambda: None, Unmanaged())

    def models(self) -> list[Any]:
        """One instance each, ready, with two requests."""
        endpoint, engine = SimpleNamespace(in_flight=2), SimpleNamespace(memory_bytes=1000)
        return [
            SimpleNamespace(
                spec=SimpleNamespace(id=name, adapters={"sql": None} if name == "chat" else {}),
                history=history_of(name),
                instances=[
                    SimpleNamespace(
                        name=f"{name}/0",
                        endpoint=endpoint,
                        state=State.READY,
                        engine=engine,
                        claim=None,
                    )
                ],
            )
            for name in self.config.models
        ]

    def not_ended(self) -> dict[str, str]:
        """All that was to end has ended."""
        return {}

    def knows(self, model: str) -> bool:
        """Whether there is such a model."""
        return model in self.config.models

    def counts(self, _model: str) -> tuple[int, int]:
        """In flight, queued."""
        return 2, 3


def metrics_of(fleet: Fleet, usage: UsageMetrics | None = None) -> Metrics:
    """The metrics of a fleet."""
    return Metrics(cast("Reconciler", fleet), cast("Registry", fleet), {"accepted": 2}, LoopLag(), LogWriter(2),
                   usage=usage or UsageMetrics(Usage(), {}))  # fmt: skip


def call(model: str = "chat", status: int = 200, **times: float) -> Call:
    """A request that has ended: `took`, `first`, `sent`, `queued` in seconds, and `retries`."""
    began = time.monotonic() - times.get("took", 1.0)
    ended: Any = SimpleNamespace(
        model=model, route=ROUTE, status=status, started_at=began, ended_at=time.monotonic(),
        retries=int(times.get("retries", 0)),
        first_byte_at=began + times["first"] if "first" in times else 0.0,
        sent_at=began + times["sent"] if "sent" in times else 0.0, queue_seconds=times.get("queued", 0.0),
        check_seconds=0.0,
    )  # fmt: skip
    return cast("Call", ended)


async def series(metrics: Metrics) -> dict[str, float]:
    """Value by series."""
    _, text = await metrics.text(3)
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@given(values=st.lists(st.floats(0, 20)))
def test_a_histogram_counts_each_value_once_and_cumulates(values: list[float]) -> None:
    """Each bucket holds what is at most its bound; the last one holds everything."""
    histogram = Histogram((0.5, 1.0, 10.0))
    for value in values:
        histogram.add(value)
    buckets = dict(histogram.buckets())
    assert list(buckets) == ["0.5", "1.0", "10.0", "+Inf"]
    for bound in (0.5, 1.0, 10.0):
        assert buckets[str(bound)] == sum(value <= bound for value in values)
    assert buckets["+Inf"] == len(values)
    assert histogram.total == pytest.approx(sum(values))


async def test_a_request_is_counted_with_its_times() -> None:
    """Duration, first byte, time in the queue, and the time in the daemon itself without the queue's."""
    metrics = metrics_of(Fleet("chat"))
    metrics.count(call(took=4.0, first=2.0, sent=1.5, queued=1.25, retries=2))
    found = await series(metrics)
    labels = f'model="chat",route="{ROUTE}"'
    assert found[f'vllm_proxy_requests_total{{{labels},status="200"}}'] == 1
    assert found[f"vllm_proxy_request_duration_seconds_sum{{{labels}}}"] == pytest.approx(4.0, abs=0.5)
    assert found[f"vllm_proxy_time_to_first_byte_seconds_sum{{{labels}}}"] == pytest.approx(2.0)
    assert found['vllm_proxy_queue_seconds_sum{model="chat"}'] == pytest.approx(1.25)
    assert found["vllm_proxy_overhead_seconds_sum"] == pytest.approx(0.25)
    assert found['vllm_proxy_retries_total{model="chat"}'] == 2


async def test_a_request_that_no_engine_was_sent_has_neither_a_first_byte_nor_an_overhead() -> None:
    """It is counted all the same."""
    metrics = metrics_of(Fleet("chat"))
    metrics.count(call(status=503))
    found = await series(metrics)
    assert found[f'vllm_proxy_requests_total{{model="chat",route="{ROUTE}",status="503"}}'] == 1
    assert found["vllm_proxy_overhead_seconds_count"] == 0
    assert not any(name.startswith("vllm_proxy_time_to_first_byte_seconds_count") for name in found)


async def test_the_series_of_a_removed_model_disappear() -> None:
    """And come back from 0 when it does; those of requests for no model stay."""
    fleet = Fleet("chat", "other")
    metrics = metrics_of(fleet)
    for model in ("chat", "other", ""):
        metrics.count(call(model))
    assert any('model="other"' in name for name in await series(metrics))
    del fleet.config.models["other"]
    found = await series(metrics)
    assert not any('"other' in name for name in found)
    assert any('model=""' in name for name in found)
    fleet.config.models["other"] = None
    assert not any("requests_total" in name and 'model="other"' in name for name in await series(metrics))


async def test_what_is_now_is_asked_when_somebody_looks() -> None:
    """Requests in flight and queued, the one state of each instance, and the revision."""
    found = await series(metrics_of(Fleet("chat")))
    assert found['vllm_proxy_in_flight{instance="chat/0",model="chat"}'] == 2
    assert found['vllm_proxy_queued{model="chat"}'] == 3
    states = {name: value for name, value in found.items() if name.startswith("vllm_proxy_instance_state")}
    assert [name for name, value in states.items() if value] == [
        'vllm_proxy_instance_state{instance="chat/0",model="chat",state="ready"}'
    ]
    assert len(states) == len(State)
    assert found['vllm_proxy_config_info{revision="r1"}'] == 1


async def test_what_became_of_engines_is_counted() -> None:
    """Their failures by reason, how long their starts took, and the memory that they hold."""
    fleet = Fleet("chat")
    found = await series(metrics_of(fleet))
    assert found['vllm_proxy_instance_restarts_total{instance="chat/0",model="chat",reason="killed"}'] == 4
    assert found['vllm_proxy_instance_startup_seconds_count{model="chat"}'] == 0
    assert found['vllm_proxy_instance_memory_bytes{instance="chat/0",model="chat"}'] == 1000


async def test_tokens_are_those_that_the_engines_count() -> None:
    """By kind, without a key; what no caller is charged for is known only where there is a ledger."""
    found = {name: value for name, value in (await series(metrics_of(Fleet("chat")))).items() if "_tokens" in name}
    assert found == {
        'vllm_proxy_tokens_total{kind="prompt",model="chat"}': 100,
        'vllm_proxy_tokens_total{kind="cached",model="chat"}': 60,
        'vllm_proxy_tokens_total{kind="generation",model="chat"}': 20,
    }


async def test_tokens_that_no_caller_is_charged_for_are_what_the_ledger_lacks() -> None:
    """Of the prompt, cached or not, and of what was generated; estimates that are too high make it negative.

    Engines count what an adapter was asked as their model's.
    """
    usage = Usage()
    usage.counts("ci", "chat").add(Counts(prompt=90, cached=60, completion=15))
    usage.counts("me", "sql").add(Counts(prompt=5))
    usage.counts("ci", "embed").add(Counts(prompt=100, estimated=25))
    found = await series(metrics_of(Fleet("chat", "embed", "other"), UsageMetrics(usage, {})))
    assert {name: value for name, value in found.items() if "unattributed" in name} == {
        'vllm_proxy_tokens_unattributed{model="chat"}': 10,
        'vllm_proxy_tokens_unattributed{model="embed"}': -5,
    }


async def test_a_model_whose_engines_count_nothing_has_no_tokens() -> None:
    """With `disable_log_stats`, or before its first engine: a zero would be a claim."""
    fleet = Fleet("chat")
    (model,) = fleet.models()
    model.history.tokens.clear()
    fleet.models = lambda: [model]  # type: ignore[method-assign]
    assert not any("_tokens" in name for name in await series(metrics_of(fleet)))


async def test_both_kinds_of_tokens_are_one_family() -> None:
    """What callers had and what engines count is told apart by the label `key`, under one explanation."""
    families = [tokens_family("model", "key", "kind"), *token_families((), {})]
    explained = {(one.name, one.documentation, one.type) for one in families if one.name == "vllm_proxy_tokens"}
    assert len(explained) == 1


async def test_every_series_is_the_daemons_own_and_explained() -> None:
    """The prefix is `vllm_proxy_`, never vLLM's; each family has a help and a type."""
    metrics = metrics_of(Fleet("chat"))
    metrics.count(call(first=0.5, sent=0.1))
    kind, text = await metrics.text(3)
    assert kind.startswith("text/plain")
    helped = set(re.findall(r"^# HELP (\S+) \S", text.decode(), re.MULTILINE))
    typed = set(re.findall(r"^# TYPE (\S+) \S", text.decode(), re.MULTILINE))
    assert helped == typed
    assert all(name.startswith("vllm_proxy_") for name in helped | set(await series(metrics)))


async def test_the_text_of_many_models_is_made_in_turns() -> None:
    """Each family once and whole, with a model that goes meanwhile or without; others have their turns in between."""
    fleet = Fleet(*(f"m{number}" for number in range(200)))
    metrics = metrics_of(fleet)
    for model in fleet.config.models:
        for status in (200, 499, 503):
            metrics.count(call(model, status, first=0.5, sent=0.1))
    making = asyncio.create_task(metrics.text(3))
    turns = 0
    while not making.done():
        turns += 1
        if turns == 3:
            del fleet.config.models["m199"]
        await asyncio.sleep(0)
    text = (await making)[1].decode()
    families = re.findall(r"^# TYPE (\S+) \S", text, re.MULTILINE)
    assert len(families) == len(set(families))
    of_family = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert [name for name, _ in groupby(of_family) if name == "vllm_proxy_queued"] == ["vllm_proxy_queued"]
    assert of_family.count("vllm_proxy_queued") == 199
    assert of_family.count("vllm_proxy_requests_total") == 600
    assert turns > 5


async def test_the_loop_and_the_log_are_watched_too() -> None:
    """How late turns came, and what of the log is missing."""
    lag, log = LoopLag(), LogWriter(2)
    fleet = Fleet("chat")
    lag.note(0.3, time.monotonic())
    log.dropped = 5
    found = await series(
        Metrics(cast("Reconciler", fleet), cast("Registry", fleet), {}, lag, log, usage=UsageMetrics(Usage(), {}))
    )
    assert found['vllm_proxy_loop_lag_seconds_bucket{le="0.25"}'] == 0
    assert found['vllm_proxy_loop_lag_seconds_bucket{le="0.5"}'] == 1
    assert found["vllm_proxy_loop_lag_max_seconds"] == 0.3
    assert found["vllm_proxy_log_lines_dropped_total"] == 5


async def test_what_keys_use_is_shown_by_key_and_model() -> None:
    """Tokens by kind, outcomes, refusals, what limits and engines tell; of names of the file alone."""
    counted = Usage()
    counted.counts("ci", "chat").add(Counts(requests=2, prompt=30, completion=20, cached=10, estimated=5))
    counted.counts("gone", "chat").add(Counts(prompt=1))
    counted.settled("ci", "chat", "aborted", NO_TOKENS, 0)
    counted.refused("ci", "tokens_per_day")
    usage = UsageMetrics(
        counted, {"missing_scope": 3}, lambda: {"ci": 4, "gone": 1}, lambda: {("ci", "tokens_per_day"): 0.5}
    )
    found = await series(metrics_of(Fleet("chat"), usage))
    labels = 'key="ci",model="chat"'
    assert [found[f'vllm_proxy_tokens_total{{key="ci",kind="{kind}",model="chat"}}'] for kind in
            ("prompt", "completion", "cached")] == [30, 20, 10]  # fmt: skip
    assert found[f"vllm_proxy_tokens_estimated_total{{{labels}}}"] == 5
    assert found['vllm_proxy_key_requests_total{key="ci",model="chat",outcome="aborted"}'] == 1
    assert found['vllm_proxy_rate_limited_total{key="ci",limit="tokens_per_day"}'] == 1
    assert found['vllm_proxy_auth_failures_total{reason="missing_scope"}'] == 3
    assert found['vllm_proxy_key_in_flight{key="ci"}'] == 4
    assert found['vllm_proxy_limit_used_ratio{key="ci",limit="tokens_per_day"}'] == 0.5
    assert not any("gone" in name for name in found)
