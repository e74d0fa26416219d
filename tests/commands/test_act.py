"""How a command judges what became of a model: its exit status depends on that."""

from typing import Any, cast

import pytest

from vllm_proxy.commands import act
from vllm_proxy.domain.resources import Model


def resource(state: str, reason: str | None, start: str = "on-demand") -> Model:
    """A model as the API shows it."""
    status = {"state": state, "reason": reason, "instances": [{"state": state}]}
    shown: Any = {"effective": {"start": start, "enabled": True}, "status": status}
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
    assert act.failed(resource(state, reason, start), "start") is failed


@pytest.mark.parametrize(
    ("action", "state", "start", "failed"),
    [
        ("sleep", "sleeping", "always", False),
        ("sleep", "stopped", "on-demand", True),
        ("sleep", "ready", "on-demand", True),
        ("stop", "sleeping", "on-demand", True),
        ("wake", "ready", "always", False),
        ("wake", "sleeping", "on-demand", False),
        ("wake", "sleeping", "always", True),
    ],
)
def test_a_model_is_put_to_sleep_when_it_sleeps_and_no_better_where_it_was_stopped(
    action: str, state: str, start: str, *, failed: bool
) -> None:
    """One that was woken and sleeps again by itself has not failed; a model that is always to run does not do that."""
    assert act.failed(resource(state, None, start), action) is failed


@pytest.mark.parametrize(
    ("state", "instances", "told"),
    [
        ("ready", [("ready", "serving"), ("unloading", "draining")], "ready; another instance: unloading (draining)"),
        ("ready", [("ready", "serving"), ("loading", "importing")], "ready; another instance: loading (importing)"),
        ("ready", [("ready", "serving")], "ready"),
        ("loading", [("loading", "waking"), ("loading", "importing")], "loading (importing, waking)"),
        ("stopped", [("stopped", None)], "stopped"),
    ],
)
def test_a_phase_is_told_of_the_instance_that_it_is_of(
    state: str, instances: list[tuple[str, str | None]], told: str
) -> None:
    """A model that is ready neither drains nor imports: another instance of it does."""
    status = {
        "state": state,
        "message": None,
        "instances": [{"state": one, "phase": phase} for one, phase in instances],
    }
    assert act._summary(cast("Model", {"status": status})) == told


def test_who_puts_a_model_to_sleep_in_vain_is_told_where_to_look() -> None:
    """Though the model has no reason: it is just stopped."""
    assert "vllm-proxy help sleep_failed" in (act.advice(resource("stopped", None), "sleep") or "")
    assert act.advice(resource("error", "crashed"), "start") == (
        "`vllm-proxy help crashed` says what to look at, and what to do"
    )
