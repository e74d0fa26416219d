"""The sentence for `systemctl status` is short, cheap and seldom, however large the fleet is. In virtual time."""

import inspect
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.engine.virtual import Stage, model, now, passes, settle, virtual
from tests.fleet.test_reconciler import reconciler_of
from vllm_proxy.domain.lifecycle import Phase, State
from vllm_proxy.errors import ConfigError, Problem
from vllm_proxy.fleet.model import Model
from vllm_proxy.status import StatusLine, sentence


@virtual
async def test_of_many_models_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    """Of each state."""
    models = [model(f"m{number}") for number in range(42)]
    asleep = [model(f"s{number}", start="on-demand") for number in range(7)]
    reconciler = reconciler_of(Stage(), tmp_path, *models, *asleep)
    await settle()
    named = ", ".join(f"m{number} (importing)" for number in range(5))
    expected = f"0 of 42 models ready; loading: {named} and 37 more; on demand: s0, s1, s2, s3, s4 and 2 more"
    assert sentence(reconciler) == expected


@virtual
async def test_a_model_that_falls_asleep_is_told_so(tmp_path: Path) -> None:
    """It is neither ready nor awaited, and its engine is not being ended."""
    stage = Stage()
    spec = model("chat", start="always")
    reconciler = reconciler_of(stage, tmp_path, replace(spec, engine=spec.engine.model_copy(update={"sleep": 2})))
    (await stage.engine()).listens = True
    (chat,) = reconciler.models()
    await stage.until(lambda: chat.state is State.READY)
    await chat.sleep()
    await stage.until(lambda: chat.instances[0].phase is Phase.FALLING_ASLEEP)
    assert sentence(reconciler) == "0 of 0 models ready; unloading: chat (falling_asleep)"
    await stage.until(lambda: chat.state is State.SLEEPING)
    assert sentence(reconciler) == "0 of 0 models ready; sleeping: chat"


@virtual
async def test_a_model_on_demand_counts_while_it_is_ready_and_never_as_missing(tmp_path: Path) -> None:
    """As `GET /ready` and `vllm_proxy_model_wanted` have it."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("chat"), model("spare", start="on-demand"))
    (await stage.engine()).listens = True
    chat, spare = reconciler.models()
    await stage.until(lambda: chat.state is State.READY)
    assert (chat.is_wanted, spare.is_wanted) == (True, False)
    spare.start()
    engine = await stage.engine(2)
    await settle()
    assert sentence(reconciler) == "1 of 1 models ready; loading: spare (importing)"
    engine.listens = True
    await stage.until(lambda: spare.state is State.READY)
    assert sentence(reconciler) == "2 of 2 models ready"
    chat.stop()
    await stage.until(lambda: chat.state is State.STOPPED)
    assert sentence(reconciler) == "1 of 1 models ready; stopped: chat"
    assert not chat.is_wanted


@virtual
async def test_a_daemon_that_ends_says_of_no_model_that_it_loads(tmp_path: Path) -> None:
    """What has ended stays so."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("chat"))
    (await stage.engine()).listens = True
    await stage.until(lambda: sentence(reconciler) == "1 of 1 models ready")
    await reconciler.stop()
    assert sentence(reconciler) == "0 of 1 models ready; stopped: chat"


@virtual
async def test_the_sentence_has_a_longest_length_and_the_rejection_is_in_it(tmp_path: Path) -> None:
    """systemd drops a message that is too long as a whole."""

    class Rejecting:
        rejected = ConfigError("models.toml", [Problem(1, "x" * 9999, "sk-secret")])

    models = [model(str(number) * 200, start="on-demand") for number in range(9)]
    reconciler = reconciler_of(Stage(), tmp_path, *models)
    found = sentence(reconciler, Rejecting())  # type: ignore[arg-type]
    assert len(found.encode()) < 2000
    assert "; configuration rejected: models.toml:1: xxx" in found
    assert "secret" not in found


@virtual
async def test_each_model_is_looked_at_once_for_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it costs twice as much for twice as many models, not four times."""
    looked: list[str] = []
    state = inspect.getattr_static(Model, "state").fget

    def counted(one: Model) -> object:
        looked.append(one.spec.id)
        return state(one)

    reconciler = reconciler_of(Stage(), tmp_path, *(model(f"m{number}", start="on-demand") for number in range(200)))
    monkeypatch.setattr(Model, "state", property(counted))
    sentence(reconciler)
    assert len(looked) <= 200 + 50


@virtual
async def test_a_thousand_changes_at_once_are_one_sentence() -> None:
    """The first at once, more after a quarter of a second, and the last one is never lost."""
    shown: list[tuple[float, str]] = []
    facts: list[Any] = []

    def show(text: str) -> bool:
        shown.append((now(), text))
        return True

    status = StatusLine(lambda: str(len(facts)), show)
    for _ in range(1000):
        facts.append(None)
        status.changed()
    await passes(0.1)
    assert shown == [(0, "1000")]
    for _ in range(10):
        facts.append(None)
        status.changed()
        await passes(0.1)
    await passes(1)
    times = [time for time, _ in shown]
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.249
    assert shown[-1][1] == "1010"
    status.changed()
    status.close()
    await passes(1)
    assert len(shown) == len(times)


@virtual
async def test_a_sentence_that_systemd_has_no_room_for_is_tried_again() -> None:
    """Four times a second, until it is taken, then no more."""
    tried: list[float] = []

    def show(_: str) -> bool:
        tried.append(now())
        return len(tried) > 3

    status = StatusLine(lambda: "fine", show)
    status.changed()
    await passes(5)
    assert tried == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.001)


@virtual
async def test_a_sentence_that_fails_is_said_at_the_next_change() -> None:
    """A bug in it does not silence the rest of the daemon's life."""
    shown: list[str] = []
    broken = [True]

    def build() -> str:
        if broken:
            raise ValueError
        return "good"

    def show(text: str) -> bool:
        shown.append(text)
        return True

    status = StatusLine(build, show)
    status._loop.set_exception_handler(lambda *_: None)
    status.changed()
    await passes(1)
    broken.clear()
    status.changed()
    await passes(1)
    assert shown == ["good"]


@virtual
async def test_a_model_that_is_always_on_is_never_called_on_demand(tmp_path: Path) -> None:
    """Not even in the moment between its old engine and its new one."""
    stage = Stage()
    stage.launcher.teardown_seconds = 3
    reconciler = reconciler_of(stage, tmp_path, model("chat"))
    (await stage.engine()).listens = True
    said: list[str] = []
    await stage.until(lambda: reconciler.model("chat").state is State.READY)
    reconciler.listen(lambda _: said.append(sentence(reconciler)))
    reconciler.model("chat").restart()
    (await stage.engine(2)).listens = True
    await stage.until(lambda: reconciler.model("chat").state is State.READY)
    assert "0 of 1 models ready; unloading: chat" in said
    assert not any("on demand" in text or "of 0" in text for text in said)
