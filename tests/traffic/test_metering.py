"""Metered requests: whose turn it is, what cannot be counted, and where a day ends meanwhile."""

import heapq
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_proxy.domain.config import Config
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import Key, Scope
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.tokens import Tokens
from vllm_proxy.domain.usage import DAY, Counts, Spent
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


def registry(served: list[str]) -> Registry:
    """Of no model; `served`: those whose queue goes on."""
    return cast("Registry", SimpleNamespace(next_turn=served.append, base_of=str))


def metering_of(usage: Usage, served: list[str]) -> Metering:
    """One that counts and numbers."""
    metering = Metering(registry(served), usage)
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


def test_what_ends_after_midnight_is_charged_to_the_new_day_once() -> None:
    """The quota that begins with it asks the ledger what is used, which has it too from then on."""
    now = [DAY - 1.0]
    usage = Usage(lambda: now[0])
    spent = lambda key: Spent(sum(tokens for hour, tokens in usage.tokens_since(key) if hour >= now[0] // DAY * DAY), 0)  # noqa: E731
    metering = Metering(registry([]), usage, spent, epoch=lambda: now[0])
    for _ in range(2):
        call = call_of(key_of("ci", Limits(tokens_per_day=1000)))
        metering.admit(call)
        call.metered.answered(Tokens(30, 4, 0))
        now[0] = DAY + 1.0
        call.metered.end()
    assert [use.used for use in metering.users["ci"].account.all().uses(0.0, now[0])] == [68]


def configured(models: str, *keys: str) -> Config:
    """With these models, a letter each, and keys with a limit of a minute."""
    tables = [f'[models.{model}]\nmodel = "m"\n' for model in models]
    for number, key in enumerate(keys):
        digest = f"{number:064x}"
        tables.append(f'[keys.{key}]\nhash = "sha256:{digest}"\nrequests_per_minute = 9\n')
        tables.append(f'[keys.{key}.limits."*"]\nrequests_per_minute = 8\n')
    return parse_config("".join(tables).encode(), "")


def test_what_is_known_of_keys_and_models_that_are_gone_is_forgotten() -> None:
    """Thousands may come and go unless somebody scrapes. A key that is back within a minute finds what it has used."""
    metering, now = metering_of(Usage(lambda: now.time), []), SimpleNamespace(time=1000.0)
    metering.now = metering.epoch = lambda: now.time
    config = configured("ab", "ci", "cd")
    metering.adopt(config)
    calls = {}
    for key in config.keys.values():
        for model in "ab":
            call = calls[key.name, model] = call_of(key)
            asked = Asked(model, streams=False, most=9, is_given=True, samples=1, binary=False)
            metering.admit(call, config.models[model], asked, b"x")
            call.metered.go()
            metering.usage.refused(key.name, "requests_per_minute")
    metering.adopt(configured("a", "ci"))
    assert metering.users["ci"].estimates.keys() == {"a"}
    assert metering.users["cd"].in_flight == 2
    for call in calls.values():
        call.metered.answered(Tokens(1, 1))
        call.metered.end()
    metering.usage.take()
    metering.adopt(configured("a", "ci"))
    assert metering.users["cd"].account.all().windows, "it may come back"
    metering.adopt(config)
    assert {use.used for use in metering.users["cd"].account.of("b", now.time).uses(now.time, 0)} == {1, 2}
    now.time += 62
    metering.adopt(configured("a", "ci"))
    assert metering.users.keys() == {"ci"}
    assert {window.scope for window in metering.users["ci"].account.all().windows} == {"", "a"}
    assert metering.usage.outcomes == {("ci", "a", "ok"): 1}
    assert metering.usage.refusals == {("ci", "requests_per_minute"): 2}
    assert metering.usage._taken.keys() == {("ci", "a")}
