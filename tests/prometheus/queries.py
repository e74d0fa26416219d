"""The queries of the alerts and of the dashboard in `examples/prometheus`, as they stand there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "examples" / "prometheus"
_FILLED = {"$__rate_interval": "20s", "$model": ".*"}  # as Grafana would
_COMPARED = re.compile(r"\s*(?:==|>|<)\s*[0-9.]+")


def alerts() -> dict[str, str]:
    """Each alert's query, by its name."""
    text = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
    found = re.findall(r"- alert: (\w+)\n +expr: (>-\n(?: {10}.*\n)+|.*\n)", text)
    assert len(found) == text.count("- alert:")
    return {name: " ".join(query.removeprefix(">-").split()) for name, query in found}


def without_comparison(query: str) -> str:
    """What an alert compares: the series that there are while nothing is wrong."""
    return _COMPARED.sub("", query)


def panels() -> Iterator[tuple[str, str]]:
    """A panel's title and one of its queries, variables filled in."""
    for panel in json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in _FILLED.items():
                query = query.replace(variable, value)
            assert "$" not in query
            yield panel["title"], query
