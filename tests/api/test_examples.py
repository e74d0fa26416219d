"""The examples for Prometheus and Grafana, without either: they ask for nothing that is not there."""

import json
import re

from tests.fakes.fake_metrics import RECORDED
from tests.prometheus.queries import FOLDER, alerts, panels
from vllm_proxy.api.metrics import FAMILIES
from vllm_proxy.help import about, page

_NAME = re.compile(r"\b(?:vllm:|vllm_proxy_|process_)\w+")


def asked() -> set[str]:
    """The names of all series that a query of an example names."""
    return {name for query in (*alerts().values(), *(query for _, query in panels())) for name in _NAME.findall(query)}


def test_every_series_of_vllm_in_a_query_is_one_that_vllm_has() -> None:
    """As a real one of the version that is supported has told."""
    theirs = {name for name in asked() if name.startswith("vllm:")}
    assert len(theirs) > 4
    assert theirs <= set(re.findall(r"^(vllm:\w+)\{", RECORDED.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_series_of_ours_in_a_query_is_one_that_we_have() -> None:
    """With the part of a histogram where it is one."""
    ours = {one.name: one.kind for one in FAMILIES}
    names = {name for name in asked() if not name.startswith("vllm:")}
    assert len(names) > 15
    for name in names:
        assert name in ours or ours[name.removesuffix("_bucket")] == "histogram"


def test_each_alert_is_explained_under_its_name() -> None:
    """By the row that `vllm-proxy help NAME` prints; no row is of an alert that there is not."""
    assert set(re.findall(r"^\| `(VllmProxy\w+)` \|", page("metrics"), re.MULTILINE)) == set(alerts())
    for name in alerts():
        head, _, row, *_ = about(name).splitlines()
        assert head == "| alert | expression | says |"
        assert row.startswith(f"| `{name}` | ")


def test_the_dashboard_is_of_the_models_that_are_chosen() -> None:
    """By the daemon's own names of them; the data source is chosen too, so that it can be imported anywhere."""
    dashboard = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["model"]["definition"] == "label_values(vllm_proxy_in_flight, model)"
    rows = [one["title"] for one in dashboard["panels"] if one["type"] == "row"]
    assert rows == ["Fleet", "Latency", "Engines", "Life", "Daemon"]
    sources = {one["datasource"]["uid"] for one in dashboard["panels"] if one["type"] != "row"}
    assert sources == {"$datasource"}
