"""Metered requests, where what they used cannot be counted."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_proxy.domain.keys import Key, Scope
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.usage import Counts
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.usage import Usage


class Faulty(Usage):
    """Fails when a request is to be counted."""

    def counts(self, key: str, model: str) -> Counts:
        """A fault of ours."""
        raise RuntimeError(f"a bug with {key} and {model}")


def test_a_request_that_cannot_be_counted_holds_nothing() -> None:
    """Its key gets back its place in flight and what was held of its limits: a fault must not lock it out for ever."""
    served: list[str] = []
    registry = SimpleNamespace(next_turn=served.append, base_of=str)
    metering = Metering(cast("Registry", registry), Faulty())
    metering.is_on = metering.is_fair = True
    key = Key("ci", (), frozenset({Scope.INFERENCE}), limits=Limits(Rate(10, 1000), max_in_flight=1))
    call: Any = SimpleNamespace(
        caller=SimpleNamespace(key=key), model="chat", route="/v1/chat/completions", status=200, code=None,
        is_anthropic=False, limit_lines=b"", forwarded=b"", metered=None, tokens=None,
    )  # fmt: skip
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
