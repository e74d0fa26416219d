"""Metered requests, where what they used cannot be counted, and where a day ends meanwhile."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_proxy.domain.keys import Key, Scope
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.domain.usage import DAY, Counts, Spent
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.usage import Usage


class Faulty(Usage):
    """Fails when a request is to be counted."""

    def counts(self, key: str, model: str) -> Counts:
        """A fault of ours."""
        raise RuntimeError(f"a bug with {key} and {model}")


def registry(served: list[str]) -> Registry:
    """Of no model; `served`: those whose queue goes on."""
    return cast("Registry", SimpleNamespace(next_turn=served.append, base_of=str))


def call_of(key: Key) -> Any:  # noqa: ANN401 - a stand-in
    """One of a key."""
    return SimpleNamespace(
        caller=SimpleNamespace(key=key), model="chat", route="/v1/chat/completions", status=200, code=None,
        is_anthropic=False, limit_lines=b"", forwarded=b"", metered=None, tokens=None,
    )  # fmt: skip


def test_a_request_that_cannot_be_counted_holds_nothing() -> None:
    """Its key gets back its place in flight and what was held of its limits: a fault must not lock it out for ever."""
    served: list[str] = []
    metering = Metering(registry(served), Faulty())
    metering.is_on = metering.is_fair = True
    key = Key("ci", (), frozenset({Scope.INFERENCE}), limits=Limits(Rate(10, 1000), max_in_flight=1))
    call = call_of(key)
    metering.admit(call)
    request = call.metered
    request.go()
    user = metering.users["ci"]
    assert user.in_flight == 1
    user.waiting["chat"] = 1
    with pytest.raises(RuntimeError, match="a bug"):
        request.end()
    assert user.in_flight == 0
    assert served == ["chat"]
    assert call.metered is None
    assert [use.held for use in user.account.all().uses(metering.now(), metering.epoch())] == [0, 0]


def test_what_ends_after_midnight_is_charged_to_the_new_day_once() -> None:
    """The quota that begins with it asks the ledger what is used, which has it too from then on."""
    now = [DAY - 1.0]
    usage = Usage(lambda: now[0])
    spent = lambda key: Spent(sum(tokens for hour, tokens in usage.tokens_since(key) if hour >= now[0] // DAY * DAY), 0)  # noqa: E731
    metering = Metering(registry([]), usage, spent, epoch=lambda: now[0])
    key = Key("ci", (), frozenset({Scope.INFERENCE}), limits=Limits(tokens_per_day=1000))
    for _ in range(2):
        call = call_of(key)
        metering.admit(call)
        call.metered.answered(Tokens(30, 4, 0))
        now[0] = DAY + 1.0
        call.metered.end()
    assert [use.used for use in metering.users["ci"].account.all().uses(0.0, now[0])] == [68]
