"""How a command judges what became of a model: its exit status depends on that."""

from typing import Any, cast

import pytest

from vllm_proxy import control
from vllm_proxy.domain.resources import Model


def resource(state: str, reason: str | None, start: str = "on-demand") -> Model:
    """A model as the API shows it."""
    shown: Any = {"effective": {"start": start, "enabled": True}, "status": {"state": state, "reason": reason}}
    return cast("Model", shown)


@pytest.mark.parametrize(
    ("state", "reason", "start", "failed"),
    [
        ("ready", None, "always", False),
        ("stopped", None, "on-demand", False),
        ("stopped", "gave_way", "on-demand", False),
        ("stopped", "gave_way", "warm", False),
        ("stopped", "stopped_by_hand", "on-demand", True),
        ("stopped", None, "always", True),
        ("loading", "does_not_fit", "on-demand", True),
        ("loading", "not_ended", "always", True),
        ("error", "does_not_fit", "on-demand", True),
    ],
)
def test_a_model_that_gave_way_has_not_failed_and_one_that_never_fits_has(
    state: str, reason: str | None, start: str, *, failed: bool
) -> None:
    """After `start`: it served, or was to; nobody has to look at why another one has its room now."""
    assert control.failed(resource(state, reason, start), "start") is failed
