"""Metered requests: whose turn it is, and what becomes of those that cannot be counted."""

import heapq
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import Key, Scope
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.domain.usage import Counts
from vllm_proxy.traffic.asked import Asked
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.usage import Usage

NO_LIMITS = Limits()


class Faulty(Usage):
    """Fails when a request is to be counted."""

    def counts(self, key: str, model: str) -> Counts:
        """A fault of ours."""
        raise RuntimeError(f"a bug with {key} and {model}")


def metering_of(usage: Usage, served: list[str]) -> Metering:
    """One that counts and numbers."""
    metering = Metering(cast("Registry", SimpleNamespace(next_turn=served.append, base_of=str)), usage)
    metering.is_on = metering.is_fair = True
    return metering


def call_of(key: Key) -> Any:  # noqa: ANN401 - a call
    """One to `chat`."""
    return SimpleNamespace(
        caller=SimpleNamespace(key=key), model="chat", route="/v1/chat/completions", status=200, code=None,
        is_anthropic=False, limit_lines=b"", forwarded=b"", metered=None, tokens=None,
    )  # fmt: skip


def key_of(name: str, limits: Limits = NO_LIMITS) -> Key:
    """It may send requests."""
    return Key(name, (), frozenset({Scope.INFERENCE}), limits=limits)


@pytest.mark.parametrize("most", [30_000, 4096, 300])
def test_who_allows_long_answers_gets_as_much_as_who_says_nothing(most: int) -> None:
    """Two keys of one weight, 40 clients each, the same answers of 20 tokens, two at a time: from the first on."""
    metering = metering_of(Usage(), [])
    spec = parse_config(b'[models.chat]\nmodel = "m"\n', "").models["chat"]
    waiting: list[tuple[int, int, str, Any]] = []
    running: list[tuple[str, Any]] = []
    served: Counter[str] = Counter()
    arrivals = iter(range(10_000))

    def ask(name: str) -> None:
        call = call_of(key_of(name))
        asked = Asked("chat", streams=False, most=most if name == "says" else None, is_given=name == "says", samples=1,
                      binary=False)  # fmt: skip
        metering.admit(call, spec, asked, b"x" * 100)
        heapq.heappush(waiting, (call.metered.number, next(arrivals), name, call))

    for _ in range(40):
        ask("says")
        ask("silent")
    for _ in range(400):
        while len(running) < 2:
            _, _, name, call = heapq.heappop(waiting)
            call.metered.go()
            running.append((name, call))
        name, call = running.pop(0)
        call.metered.answered(Tokens(5, 20))
        call.metered.end()
        served[name] += 1
        ask(name)
    assert abs(served["says"] - served["silent"]) <= 4


def test_a_request_that_cannot_be_counted_holds_nothing() -> None:
    """Its key gets back its place in flight and what was held of its limits: a fault must not lock it out for ever."""
    served: list[str] = []
    metering = metering_of(Faulty(), served)
    call = call_of(key_of("ci", Limits(Rate(10, 1000), max_in_flight=1)))
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
