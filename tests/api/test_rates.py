"""Rates: what the metrics and the engines have counted, a second, over the last ten. The clock is given."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from vllm_proxy.api.rates import Rates
from vllm_proxy.fleet.reconciler import Reconciler


class Fleet:
    """Two models, and what was counted of them."""

    def __init__(self) -> None:
        self.ended = {"chat": 0}
        self.models: dict[str, Any] = {
            name: SimpleNamespace(history=SimpleNamespace(tokens=Counter())) for name in ("chat", "embed")
        }
        reconciler: Any = SimpleNamespace(knows=self.models.__contains__, model=self.models.__getitem__)
        self.rates = Rates(cast("Reconciler", reconciler), lambda: self.ended)

    def generated(self, tokens: int) -> None:
        """So many, in all, by `chat`."""
        self.models["chat"].history.tokens["generation"] = tokens


def test_a_rate_is_of_the_last_ten_seconds() -> None:
    """What came before them does not count, and what engines do not tell is not known."""
    fleet = Fleet()
    for second in range(0, 22, 2):
        fleet.ended["chat"] = second * 5 if second <= 10 else 50
        if second == 10:
            fleet.generated(200)
        fleet.rates.look(100.0 + second)
        if second == 10:
            assert fleet.rates.now("chat") == (5.0, 20.0)
            assert fleet.rates.now("embed") == (0.0, None)
        if second == 14:
            assert fleet.rates.now("chat") == (3.0, 20.0)
    assert fleet.rates.now("chat") == (0.0, 0.0)


def test_a_model_that_began_anew_has_no_negative_rate() -> None:
    """It was taken out of the file and put there again; one that is gone has none."""
    fleet = Fleet()
    fleet.ended["chat"] = 90
    fleet.rates.look(0.0)
    fleet.ended["chat"] = 2
    fleet.rates.look(2.0)
    assert fleet.rates.now("chat")[0] == 0.0
    fleet.ended["gone"] = 5
    fleet.rates.look(4.0)
