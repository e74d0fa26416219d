"""What has happened is kept, has ids, and is told to readers that connect anew. Without a daemon."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

from vllm_proxy.api.happenings import _MOST_BYTES, KEPT, Entry, Happenings
from vllm_proxy.domain.diagnose import Diagnosis
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.domain.plan import Action, Kind
from vllm_proxy.errors import ConfigError, Problem
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.outcome import Author, Outcome, Written


def replica(index: int = 0, state: State = State.STOPPED, reason: Reason | None = None) -> Any:  # noqa: ANN401 - of a model
    """An instance of `chat`."""
    why = Diagnosis(reason, "that is why") if reason else None
    return SimpleNamespace(index=index, name=f"chat/{index}", state=state, phase=None, diagnosis=why, last_exit=None)


def chat(*instances: Any, reason: Reason | None = None) -> Model:  # noqa: ANN401 - as above
    """A model with these instances."""
    why = Diagnosis(reason, "so") if reason else None
    return cast("Model", SimpleNamespace(
        spec=SimpleNamespace(id="chat"), state=instances[0].state, diagnosis=why, message=why and why.message,
        instances=instances,
    ))  # fmt: skip


def told(entries: list[Entry]) -> list[dict[str, Any]]:
    """The data of the events."""
    return [json.loads(entry.happened.decode().split("data: ")[1]) for entry in entries]


def test_each_change_of_a_state_or_a_reason_is_one_and_a_phase_is_none() -> None:
    """Of a model that loads only that is kept, not each step."""
    kept = Happenings(lambda _: True)
    one = replica(state=State.LOADING)
    assert kept.of_model(chat(one, replica(1))) is not None
    for phase in (Phase.IMPORTING, Phase.LOADING_WEIGHTS):
        one.phase = phase
        assert kept.of_model(chat(one, replica(1))) is None
    kept.of_model(chat(replica(state=State.LOADING, reason=Reason.OUT_OF_MEMORY), replica(1)))
    kept.of_model(chat(replica(state=State.READY), replica(1, State.LOADING)))
    found = told(kept.since("0")[1])
    assert [(each["instance"], each["state"], each["reason"]) for each in found] == [
        ("chat/0", "loading", None), ("chat/0", "loading", "out_of_memory"), ("chat/0", "ready", None),
        ("chat/1", "loading", None),
    ]  # fmt: skip
    assert found[1]["message"] == "that is why"
    assert [each["id"] for each in found] == [f"{kept.boot}-{number}" for number in (1, 2, 3, 4)]


def test_each_end_of_an_engine_is_one_though_the_next_shows_the_same() -> None:
    """Of a model whose engines die while they load, it is told how often."""
    kept = Happenings(lambda _: True)
    one = replica(state=State.LOADING, reason=Reason.CRASHED)
    for minute in range(3):
        one.last_exit = SimpleNamespace(at=datetime(2026, 11, 1, 0, minute, tzinfo=UTC))
        assert kept.of_model(chat(one)) is not None
        assert kept.of_model(chat(one)) is None
    assert [(each["state"], each["reason"]) for each in told(kept.since("0")[1])] == [("loading", "crashed")] * 3


def test_what_is_of_the_model_alone_is_told_once() -> None:
    """No instance changed, as where it is stopped by hand while nothing of it ran."""
    kept = Happenings(lambda _: True)
    assert kept.of_model(chat(replica())) is None, "nothing has happened yet"
    for _ in range(2):
        kept.of_model(chat(replica(), reason=Reason.STOPPED_BY_HAND))
    (found,) = told(kept.since("0")[1])
    assert (found["kind"], found["instance"], found["reason"]) == ("model", None, "stopped_by_hand")


def test_a_model_that_is_gone_and_comes_again_begins_anew() -> None:
    """Nothing of the first one is remembered."""
    there = {"chat"}
    kept = Happenings(there.__contains__)
    kept.of_model(chat(replica(state=State.READY)))
    there.clear()
    kept.of_model(chat(replica()))
    there.add("chat")
    kept.of_model(chat(replica(state=State.READY)))
    assert [each["state"] for each in told(kept.since("0")[1])] == ["ready", "stopped", "ready"]


def test_files_and_writes_are_kept_with_what_they_say() -> None:
    """As the events of the stream say it."""
    kept = Happenings(lambda _: True)
    kept.of_file(Outcome("abc", ()))
    kept.of_file(ConfigError("f", [Problem(3, "models.chat.replicas", "expected at least 1")]))
    kept.of_file(Written(Author("key ci", "PATCH /models/chat"), "abc", "def"))
    accepted, rejected, written = told(kept.since("0")[1])
    assert (accepted["kind"], accepted["revision"], accepted["changes"]) == ("accepted", "abc", [])
    assert (rejected["kind"], rejected["problems"][0]["line"]) == ("rejected", 3)
    assert (written["kind"], written["who"], written["before"]) == ("write", "key ci", "abc")
    assert kept.since("0")[1][1].plain.startswith(f"id: {kept.boot}-2\nevent: config\n".encode())


def test_a_reader_gets_what_came_after_the_one_it_knows() -> None:
    """Nothing twice, nothing left out; who knows the last one gets nothing."""
    kept = Happenings(lambda _: True)
    for _ in range(3):
        kept.add({"kind": "model"})
    for known, wanted in ((0, [1, 2, 3]), (1, [2, 3]), (3, [])):
        reset, entries = kept.since(f"{kept.boot}-{known}")
        assert (reset, [entry.number for entry in entries]) == (b"", wanted)


def test_a_reader_whose_place_is_gone_is_told_and_gets_all() -> None:
    """It is of another run, too old, of the future, or no id at all; with `0` it asks for all, and has lost nothing."""
    kept = Happenings(lambda _: True)
    for _ in range(KEPT + 10):
        kept.add({"kind": "model"})
    for known in ("00000000-5", f"{kept.boot}-9", f"{kept.boot}-{KEPT + 11}", "nonsense", f"{kept.boot}-x"):
        reset, entries = kept.since(known)
        assert reset.startswith(b"event: reset\ndata: {"), known
        assert [entry.number for entry in entries] == list(range(11, KEPT + 11)), known
    assert kept.since(f"{kept.boot}-10")[0] == b""
    assert kept.since("0")[0] == b""
    assert len(kept.since("0")[1]) == KEPT


def test_large_ones_are_bounded_together() -> None:
    """Plans of hundreds of models, over and over: no more is kept, or sent at once; the last one always."""
    kept = Happenings(lambda _: True)
    steps = [Action(Kind.UPDATE, f"model-{number}", "idle_timeout 10 -> 20", None) for number in range(300)]
    for _ in range(500):
        kept.of_file(Outcome("abc", tuple(steps)))
    entries = kept.since("0")[1]
    assert [entry.number for entry in entries] == list(range(501 - len(entries), 501))
    assert 0.9 * _MOST_BYTES < sum(len(entry.happened) + len(entry.plain) for entry in entries) <= _MOST_BYTES
    assert kept.since(f"{kept.boot}-{500 - len(entries)}")[0] == b""
    assert kept.since(f"{kept.boot}-{499 - len(entries)}")[0].startswith(b"event: reset")
    kept.add({"kind": "write", "what": "x" * 2 * _MOST_BYTES})
    assert [entry.number for entry in kept.since("0")[1]] == [501]
    kept.add({"kind": "write"}, ("write", {}))
    assert [entry.number for entry in kept.since("0")[1]] == [502]


def test_what_is_told_of_a_model_counts_as_well() -> None:
    """It names all of its instances and adapters."""
    kept = Happenings(lambda _: True)
    for _ in range(20):
        kept.tell(kept.add({"kind": "model"}), ("model", {"adapters": "x" * (_MOST_BYTES // 10)}))
    assert len(kept.since("0")[1]) == 9
