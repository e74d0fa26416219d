"""`/metrics` as OpenMetrics: all of the daemon's series, with exemplars of the requests that are traced."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.api.test_metrics import ROUTE, Fleet, call, metrics_of
from tests.domain.test_openmetrics import families
from vllm_proxy.api.metrics import Metrics
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain.usage import Counts
from vllm_proxy.traffic.usage import Usage

DURATION = "vllm_proxy_request_duration_seconds"
FIRST_BYTE = "vllm_proxy_time_to_first_byte_seconds"

type Found = dict[tuple[str, str, str], tuple[str, float]]


def traced(trace: int, model: str = "chat", **times: float) -> Any:  # noqa: ANN401 - a part of a call
    """A request that has ended, of this trace."""
    ended: Any = call(model, 200, **times)
    ended.trace = SimpleNamespace(trace_id=f"{trace:032x}")
    return ended


def trace_id(trace: int) -> str:
    """As exemplars have it."""
    return f"{trace:032x}"


async def strictly(metrics: Metrics) -> list[Metric]:
    """The families, as the strict parser reads them."""
    return families(await metrics.text(openmetrics=True))


async def exemplars(metrics: Metrics) -> Found:
    """The trace and the value of each, by family, model and bucket."""
    return {
        (family.name, one.labels["model"], one.labels["le"]): (one.exemplar.labels["trace_id"], one.exemplar.value)
        for family in await strictly(metrics)
        for one in family.samples
        if one.exemplar
    }


def samples(found: list[Metric]) -> dict[tuple[str, str], list[Any]]:
    """Name, labels and value of each sample, by family and type, but for what a scrape itself changes."""
    return {
        (family.name, family.type): [one[:3] for one in family.samples]
        for family in found
        if not family.name.startswith("process_")
    }


async def test_it_has_the_series_and_the_values_of_the_plain_text() -> None:
    """Of every family, in the same order, whether requests were traced or not."""
    usage = Usage()
    usage.counts("ci", "chat").add(Counts(requests=2, prompt=30))
    metrics = metrics_of(Fleet("chat", "other"), UsageMetrics(usage, {"missing_scope": 3}))
    metrics.count(traced(1, first=0.5, sent=0.1))
    metrics.count(call("other", 503))
    metrics.count(call(""))
    found = await strictly(metrics)
    classic = list(text_string_to_metric_families((await metrics.text()).decode()))
    assert samples(found) == samples(classic)
    assert [one.name for one in found] == [one.name for one in classic]
    assert len(found) > 30


async def test_the_last_traced_request_of_each_bucket_is_its_exemplar() -> None:
    """By model, for the whole and for the first byte; one that is not traced takes nobody's place."""
    metrics = metrics_of(Fleet("chat", "other"))
    began = time.time()
    for one in (traced(1, took=0.2, first=0.04), traced(2, took=0.2), traced(3, took=4.0, first=0.04), call(took=4.0),
                traced(4, "other", took=1000.0)):  # fmt: skip
        metrics.count(one)
    found = await exemplars(metrics)
    assert {place: trace for place, (trace, _) in found.items()} == {
        (DURATION, "chat", "0.25"): trace_id(2),
        (DURATION, "chat", "5.0"): trace_id(3),
        (DURATION, "other", "+Inf"): trace_id(4),
        (FIRST_BYTE, "chat", "0.05"): trace_id(3),
    }
    assert found[DURATION, "other", "+Inf"][1] == pytest.approx(1000.0, abs=0.5)
    (family,) = (one for one in await strictly(metrics) if one.name == FIRST_BYTE)
    (at,) = (one.exemplar.timestamp for one in family.samples if one.exemplar)
    assert at is not None
    assert began - 0.001 <= float(at) <= time.time() + 0.001


async def test_a_later_exemplar_is_in_the_next_text_and_none_is_in_the_plain_one() -> None:
    """Whoever asked for which before."""
    metrics = metrics_of(Fleet("chat"))
    for trace in (1, 2):
        metrics.count(traced(trace, took=0.2))
        assert b"trace_id" not in await metrics.text()
        assert {one for one, _ in (await exemplars(metrics)).values()} == {trace_id(trace)}


async def test_the_exemplars_of_a_removed_model_disappear() -> None:
    """And do not come back when it does."""
    fleet = Fleet("chat", "other")
    metrics = metrics_of(fleet)
    for trace, model in enumerate(("chat", "other")):
        metrics.count(traced(trace, model))
    assert {model for _, model, _ in await exemplars(metrics)} == {"chat", "other"}
    del fleet.config.models["other"]
    assert {model for _, model, _ in await exemplars(metrics)} == {"chat"}
    fleet.config.models["other"] = None
    metrics.count(call("other"))
    assert {model for _, model, _ in await exemplars(metrics)} == {"chat"}


async def test_nothing_is_kept_of_requests_that_are_not_traced() -> None:
    """As in every daemon that sends no traces."""
    metrics = metrics_of(Fleet("chat"))
    metrics.count(call(first=0.5))
    assert not metrics._models["chat"].exemplars
    assert not await exemplars(metrics)


async def test_the_text_of_many_models_is_made_in_turns() -> None:
    """With an exemplar in every bucket that a request was in."""
    fleet = Fleet(*(f"m{number}" for number in range(200)))
    metrics = metrics_of(fleet)
    for model in fleet.config.models:
        metrics.count(traced(1, model, first=0.5, sent=0.1))
    making = asyncio.create_task(metrics.text(openmetrics=True))
    turns = 0
    while not making.done():
        turns += 1
        await asyncio.sleep(0)
    found = (await making).decode()
    assert found.count(trace_id(1)) == 400
    assert turns > 5
    assert ROUTE in found
