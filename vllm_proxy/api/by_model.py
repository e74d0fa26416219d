"""Lines of `/metrics` by model, remade for those models alone in which something has changed since the last scrape.

Of two hundred models few change between two scrapes, and a mark tells which: what is shown, or counts of it. A mark
must change whenever the lines do (tests/api/test_metrics.py).
"""

from collections.abc import Callable, Container, Iterable

from vllm_proxy.domain.exposition import Exposition, Family

type Lines = Iterable[tuple[Family, str]]


class ByModel[T, M]:
    """Some families of all models. `mark` is cheap; `lines` are made of a model's id, its subject and the mark."""

    def __init__(self, mark: Callable[[T], M], lines: Callable[[str, T, M], Lines]) -> None:
        self._mark = mark
        self._lines = lines
        self._made: dict[str, tuple[T, M, list[tuple[Family, bytes]]]] = {}

    def add_to(self, exposition: Exposition, model: str, subject: T) -> None:
        """The lines of one model; another subject of the same name is not taken for the one before."""
        mark = self._mark(subject)
        before = self._made.get(model)
        if before is not None and before[0] is subject and before[1] == mark:
            lines = before[2]
        else:
            lines = [(family, text.encode()) for family, text in self._lines(model, subject, mark) if text]
            self._made[model] = (subject, mark, lines)
        exposition.add_made(lines)

    def forget(self, others_than: Container[str]) -> None:
        """Nothing is kept of models that are gone."""
        for model in [model for model in self._made if model not in others_than]:
            del self._made[model]
