"""The numbers of `/metrics`, counted by hand."""

import asyncio
import math
import re
import time
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.virtual import KeptNumbers
from vllm_proxy import __version__
from vllm_proxy.api.metrics import FAMILIES, Metrics
from vllm_proxy.api.usage_metrics import UsageMetrics
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.exposition import Family, number
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
from vllm_proxy.traffic.routing import Routed
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
        self._models: dict[str, Any] = {}
        self.decided = Routed()

    def models(self) -> list[Any]:
        """One instance each, ready, with two requests. The same ones each time."""
        self._models = {name: self._models.get(name) or self._model(name) for name in self.config.models}
        return [*self._models.values()]

    def _model(self, name: str) -> Any:  # noqa: ANN401 - a part of a model
        return SimpleNamespace(
            spec=SimpleNamespace(
                id=name,
                adapters={"sql": None} if name == "chat" else {},
            ),
            history=history_of(name),
            is_wanted=True,
            diagnosis=None,
            instances=[
                SimpleNamespace(
                    index=0,
                    name=f"{name}/0",
                    endpoint=SimpleNamespace(in_flight=2, ejected=False),
                    state=State.READY,
                    engine=SimpleNamespace(memory_bytes=1000),
                    claim=None,
                )
            ],
        )

    def not_ended(self) -> dict[str, str]:
        """All that was to end has ended."""
        return {}

    def knows(self, model: str) -> bool:
        """Whether there is such a model."""
        return model in self.config.models

    def routed(self, _model: str) -> Routed:
        """What decided where requests went."""
        return self.decided

    def counts(self, _model: str) -> tuple[int, int]:
        """In flight, queued."""
        return 2, 3


class OnDisk:
    """What the metrics ask of the configuration's file."""

    reloads: Mapping[str, int] = {"accepted": 2}
    rejected: Exception | None = None
    vllm = "0.32.0"

    def pending_restart(self) -> list[str]:
        """One key."""
        return ["server.port"]


async def at_once[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """In place of a thread, which virtual time knows nothing of."""
    return function(*args, **kwargs)


def metrics_of(
    fleet: Fleet,
    usage: UsageMetrics | None = None,
    lag: LoopLag | None = None,
    log: LogWriter | None = None,
    file: OnDisk | None = None,
) -> Metrics:
    """The metrics of a fleet."""
    return Metrics(cast("Reconciler", fleet), cast("Registry", fleet), file or OnDisk(), lag or LoopLag(),
                   log or LogWriter(2), usage=usage or UsageMetrics(Usage(), {}), offload=at_once)  # fmt: skip


def call(model: str = "chat", status: int = 200, **times: float) -> Call:
    """A request that has ended: `took`, `first`, `sent`, `queued` in seconds, and `retries`."""
    began = time.monotonic() - times.get("took", 1.0)
    ended: Any = SimpleNamespace(
        model=model, route=ROUTE, status=status, started_at=began, ended_at=time.monotonic(),
        retries=int(times.get("retries", 0)),
        first_byte_at=began + times["first"] if "first" in times else 0.0,
        sent_at=began + times["sent"] if "sent" in times else 0.0, queue_seconds=times.get("queued", 0.0),
        check_seconds=0.0, trace=None,
    )  # fmt: skip
    return cast("Call", ended)


async def series(metrics: Metrics) -> dict[str, float]:
    """Value by series."""
    text = await metrics.text()
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_who_waits_and_gets_no_instance_has_waited_too() -> None:
    """Else an alert on the wait would be silent where all time out in the queue; a refusal at once is no wait."""
    metrics = metrics_of(Fleet("chat"))
    metrics.count(call(status=504, queued=60.0))
    metrics.count(call(status=499, queued=2.0))
    metrics.count(call(status=503, queued=0.00002))
    metrics.count(call(status=404))
    found = await series(metrics)
    assert found['vllm_proxy_queue_seconds_count{model="chat"}'] == 2
    assert found['vllm_proxy_queue_seconds_sum{model="chat"}'] == pytest.approx(62)


@given(values=st.lists(st.floats(0, 20)))
def test_a_histogram_counts_each_value_once_and_cumulates(values: list[float]) -> None:
    """Each bucket holds what is at most its bound; the last one holds everything."""
    histogram = Histogram((0.5, 1.0, 10.0))
    for value in values:
        histogram.add(value)
    text = Family("times_seconds", "histogram", "Times.").lines(histogram)
    found = {name: float(value) for name, value in map(str.split, text.splitlines())}
    for bound in (0.5, 1.0, 10.0):
        assert found.pop(f'times_seconds_bucket{{le="{bound}"}}') == sum(value <= bound for value in values)
    assert found.pop('times_seconds_bucket{le="+Inf"}') == found.pop("times_seconds_count") == len(values)
    assert found == {"times_seconds_sum": pytest.approx(sum(values))}


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
    assert found['vllm_proxy_in_flight{model="chat",replica="0"}'] == 2
    assert found['vllm_proxy_queued{model="chat"}'] == 3
    states = {name: value for name, value in found.items() if name.startswith("vllm_proxy_instance_state")}
    assert [name for name, value in states.items() if value] == [
        'vllm_proxy_instance_state{model="chat",replica="0",state="ready"}'
    ]
    assert len(states) == len(State)
    assert found['vllm_proxy_config_info{revision="r1"}'] == 1


async def test_what_decided_where_requests_went_is_counted() -> None:
    """And how much of the prompts that were compared was known; there is nothing of what never was."""
    fleet = Fleet("chat")
    metrics = metrics_of(fleet)
    assert not any("routed" in name or "prefix" in name for name in await series(metrics))
    fleet.decided.only = 2
    found = await series(metrics)
    assert {name for name in found if "routed" in name} == {'vllm_proxy_routed_total{by="only",model="chat"}'}
    fleet.decided.prefix, fleet.decided.load = 3, 1
    fleet.decided.known_bytes, fleet.decided.all_bytes = 600, 1000
    found = await series(metrics)
    assert {by: found[f'vllm_proxy_routed_total{{by="{by}",model="chat"}}'] for by in ("prefix", "load", "only")} == {
        "prefix": 3, "load": 1, "only": 2,
    }  # fmt: skip
    assert found['vllm_proxy_prefix_bytes_total{known="yes",model="chat"}'] == 600
    assert found['vllm_proxy_prefix_bytes_total{known="no",model="chat"}'] == 400


async def test_what_became_of_engines_is_counted() -> None:
    """Their failures by reason, how long their starts took, and the memory that they hold."""
    fleet = Fleet("chat")
    found = await series(metrics_of(fleet))
    assert found['vllm_proxy_instance_restarts_total{model="chat",reason="killed",replica="0"}'] == 4
    assert not any("startup" in name for name in found)  # none has ended
    assert found['vllm_proxy_instance_memory_bytes{model="chat",replica="0"}'] == 1000


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


async def test_every_series_is_explained_and_is_as_it_is_declared() -> None:
    """Prometheus' own parser reads all of it: each family once, of its type, with the labels that the page lists."""
    counted = Usage()
    counted.counts("ci", "chat").add(Counts(prompt=1))
    metrics = metrics_of(Fleet("chat"), UsageMetrics(counted, {}))
    metrics.count(call(first=0.5, sent=0.1))
    declared = {one.name: one for one in FAMILIES}
    assert len(declared) == len(FAMILIES)
    found = list(text_string_to_metric_families((await metrics.text()).decode()))
    assert len({one.name for one in found}) == len(found) > 30
    for family in found:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert (family.type, family.documentation) == (declared[name].kind, declared[name].meaning)
        for sample in family.samples:
            labels = [label for label in sample.labels if label != "le"]
            assert set(labels) <= set(declared[name].labels)
            assert labels == sorted(labels)


def test_the_daemons_own_series_have_its_prefix() -> None:
    """Never vLLM's; those of its process have the names that every exporter gives them."""
    assert all(one.name.startswith(("vllm_proxy_", "process_")) for one in FAMILIES)


def test_labels_hold_whatever_they_are_given() -> None:
    """As a key's name of another day might: quotes, backslashes, lines, and what Python would format."""
    family, value = Family("things", "gauge", "Things.", ("one",)), 'a"b\\c\nd%s{}'
    times = Family("times_seconds", "histogram", "Times.", ("one",))
    text = (family.head + times.head).decode().splitlines(keepends=True)
    lines = "".join([*text[:2], family.line(1, value), *text[2:], times.lines(Histogram((1.0,)), value)])
    samples = [one for found in text_string_to_metric_families(lines) for one in found.samples]
    assert [one.labels["one"] for one in samples] == [value] * 5


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (True, "1"),
        (3, "3"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_are_as_prometheus_reads_them(value: float, written: str) -> None:
    """Whole ones without a point, and what is no number."""
    assert number(value) == written


async def test_what_has_changed_is_shown_in_the_next_text() -> None:
    """Whatever it is of a model: what is kept of the text before is kept only while it is true."""
    fleet = Fleet("chat", "other")
    metrics = metrics_of(fleet)
    (model, _), labels = fleet.models(), f'model="chat",route="{ROUTE}"'
    instance, history = model.instances[0], model.history
    changes: list[tuple[Callable[[], object], str, float]] = [
        (lambda: metrics.count(call()), f'vllm_proxy_requests_total{{{labels},status="200"}}', 1),
        (lambda: metrics.count(call()), f"vllm_proxy_request_duration_seconds_count{{{labels}}}", 2),
        (lambda: setattr(instance.endpoint, "in_flight", 7), 'vllm_proxy_in_flight{model="chat",replica="0"}', 7),
        (lambda: setattr(instance.endpoint, "ejected", True), 'vllm_proxy_engine_up{model="chat",replica="0"}', 0),
        (lambda: setattr(instance.engine, "memory_bytes", 5),
         'vllm_proxy_instance_memory_bytes{model="chat",replica="0"}', 5),
        (lambda: setattr(model, "diagnosis", Diagnosis(Reason.REPLACEMENT_FAILED, "x")),
         'vllm_proxy_model_change_failed{model="chat"}', 1),
        (lambda: setattr(model, "diagnosis", Diagnosis(Reason.CRASHED, "x")),
         'vllm_proxy_model_change_failed{model="chat"}', 0),
        (lambda: setattr(model, "is_wanted", False), 'vllm_proxy_model_wanted{model="chat"}', 0),
        (lambda: setattr(instance, "state", State.ERROR), 'vllm_proxy_model_ready{model="chat"}', 0),
        (lambda: history.failed("chat/0", Reason.CRASHED),
         'vllm_proxy_instance_restarts_total{model="chat",reason="crashed",replica="0"}', 1),
        (lambda: history.startups.add(3.0), 'vllm_proxy_instance_startup_seconds_sum{model="chat"}', 3),
        (lambda: history.tokens.update({"prompt": 1}), 'vllm_proxy_tokens_total{kind="prompt",model="chat"}', 101),
        (lambda: history.slept(2.0), 'vllm_proxy_sleep_seconds_sum{model="chat"}', 2),
    ]  # fmt: skip
    for change, name, value in changes:
        before = await series(metrics)
        assert before.get(name) != value
        change()
        after = await series(metrics)
        assert after[name] == value
        assert not {one for one in after if '"other' in one and after[one] != before.get(one)}


async def test_a_model_that_came_back_is_not_the_one_before() -> None:
    """Its text is made of what it is now, though as much was counted of the one before."""
    fleet = Fleet("chat")
    metrics = metrics_of(fleet)
    await series(metrics)
    again = fleet._model("chat")
    again.history.failures.clear()
    again.history.failures["chat/0", Reason.STALLED] = 4
    fleet._models["chat"] = again
    found = [name for name in await series(metrics) if "restarts" in name]
    assert found == ['vllm_proxy_instance_restarts_total{model="chat",reason="stalled",replica="0"}']


async def test_the_text_of_many_models_is_made_in_turns() -> None:
    """Each family once and whole, with a model that goes meanwhile or without; others have their turns in between."""
    fleet = Fleet(*(f"m{number}" for number in range(200)))
    metrics = metrics_of(fleet)
    for model in fleet.config.models:
        for status in (200, 499, 503):
            metrics.count(call(model, status, first=0.5, sent=0.1))

    def last_one_goes(_model: str) -> tuple[int, int]:
        fleet.config.models.pop("m199", None)
        return 0, 0

    fleet.counts = last_one_goes  # type: ignore[method-assign]
    making = asyncio.create_task(metrics.text())
    turns = 0
    while not making.done():
        turns += 1
        await asyncio.sleep(0)
    text = (await making).decode()
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
    lag.note(0.3, time.monotonic())
    log.dropped = 5
    found = await series(metrics_of(Fleet("chat"), lag=lag, log=log))
    assert found['vllm_proxy_loop_lag_seconds_bucket{le="0.25"}'] == 0
    assert found['vllm_proxy_loop_lag_seconds_bucket{le="0.5"}'] == 1
    assert found["vllm_proxy_loop_lag_max_seconds"] == 0.3
    assert found["vllm_proxy_log_lines_dropped_total"] == 5


async def test_the_file_that_is_refused_now_is_a_number() -> None:
    """And not only a count of looks; so is what waits for a restart, and which versions run."""
    file = OnDisk()
    metrics = metrics_of(Fleet("chat"), file=file)
    found = await series(metrics)
    assert (found["vllm_proxy_config_rejected"], found["vllm_proxy_config_pending_restart"]) == (0, 1)
    assert found[f'vllm_proxy_build_info{{version="{__version__}",vllm="0.32.0"}}'] == 1
    file.rejected = ValueError("line 3")
    assert (await series(metrics))["vllm_proxy_config_rejected"] == 1


async def test_the_daemons_process_is_measured() -> None:
    """As the kernel has it: it began before now, has some memory, and a few files open."""
    found = await series(metrics_of(Fleet("chat")))
    assert 0 < time.time() - found["process_start_time_seconds"] < 86400
    assert found["process_cpu_seconds_total"] == pytest.approx(time.process_time(), abs=1)
    assert 2**20 < found["process_resident_memory_bytes"] < found["process_virtual_memory_bytes"]
    assert found["process_open_fds"] == pytest.approx(len([*Path("/proc/self/fd").iterdir()]), abs=2)
    assert found["process_open_fds"] < found["process_max_fds"]


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
