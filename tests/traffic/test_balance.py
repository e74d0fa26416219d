"""Which instance gets a request, by its prompt: where that is found, who is looked at, and what is remembered."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.virtual import model, settle, virtual
from tests.traffic.test_registry import nobody, opened, registry_of, release
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.balance import marks_of
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.asked import read, read_large
from vllm_proxy.traffic.body import members, members_of_large
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.prompt import NAMES, Members, Prompt, members_at, runs_one
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.requests import Requests
from vllm_proxy.traffic.routing import Routed

LONG = "You are a helpful assistant. " * 40


def body(text: str = LONG, /, **more: object) -> bytes:
    """A chat."""
    return json.dumps({"model": "chat", "messages": [{"role": "user", "content": text}], **more}).encode()


def prompt(text: str = LONG, /, lines: bytes = b"", salt: bytes = b"", **more: object) -> Prompt:
    """Its prompt."""
    return Prompt(members(body(text, **more)), salt, lines)


def marked(found: Prompt, adapter: str = "") -> Prompt:
    """With its marks."""
    found.mark(adapter)
    return found


def several(count: int = 2, **policy: Any) -> tuple[Registry, list[Endpoint]]:  # noqa: ANN401 - keys of a model
    """A registry with so many instances of "chat"."""
    registry = registry_of(**policy)
    return registry, [opened(registry, index) for index in range(count)]


def sent(registry: Registry, asked: Prompt, name: str = "chat") -> Endpoint:
    """Where a request goes, which then ends."""
    lease = registry.lease(registry.find(name), None, asked)
    assert lease is not None
    with lease:
        return lease.endpoint


# Prompts


def test_the_prompt_is_what_an_engine_runs_in_its_order() -> None:
    """Tools and system first, wherever they stand in the body; nothing else of it counts."""
    tools, messages = json.dumps([{"name": LONG}]), json.dumps([{"content": LONG}])
    one = f'{{"messages": {messages}, "temperature": 1, "model": "chat", "tools": {tools}}}'.encode()
    other = f'{{"tools": {tools}, "model": "chat", "user": "x", "messages": {messages}}}'.encode()
    found = [marked(Prompt(members(text), b"", b"")) for text in (one, other)]
    assert found[0].marks == found[1].marks == marks_of(f"{tools}{messages}".encode())
    assert found[0].size == len(tools) + len(messages)


@pytest.mark.parametrize("name", ["messages", "prompt", "input", "system", "instructions", "tools"])
def test_every_api_has_its_member(name: str) -> None:
    """Whatever it holds."""
    for value in (LONG, [LONG], [{"content": LONG}]):
        text = json.dumps({"model": "chat", name: value}).encode()
        assert marked(Prompt(members(text), b"", b"")).marks == marks_of(json.dumps(value).encode())


def test_what_vllm_keeps_apart_is_kept_apart() -> None:
    """Adapters, and callers with a salt; of prompts and of sessions."""
    keyed = {"prompt_cache_key": "k"}
    found = [
        marked(prompt(salt=salt, **keyed), adapter)  # type: ignore[arg-type]
        for salt, adapter in ((b"", ""), (b"s", ""), (b"t", ""), (b"", "sql"), (b"s", "sql"), (b"sql", ""))
    ]
    assert len({tuple(one.marks) for one in found}) == len(found)
    assert len({tuple(one.sessions) for one in found}) == len(found)


def test_a_session_is_named_by_the_body_or_a_header() -> None:
    """In any case of its name; an empty one names none."""
    assert marked(prompt()).sessions == ()
    by_key = marked(prompt(prompt_cache_key="k")).sessions
    by_header = marked(prompt(lines=b"Accept: x\r\nX-sEssion-ID:  k 1\r\n")).sessions
    assert len(by_key) == len(by_header) == 1
    assert marked(prompt(lines=b"x-session-id: k 1\r\n")).sessions == by_header
    assert [*marked(prompt(lines=b"X-Session-Id: k 1\r\n", prompt_cache_key="k")).sessions] == [*by_key, *by_header]
    for lines, more in ((b"X-Session-ID: \r\nAccept: x\r\n", {}), (b"", {"prompt_cache_key": None})):
        assert not marked(prompt(lines=lines, **more)).sessions  # type: ignore[arg-type]
    assert not marked(prompt(lines=b"Y-X-Session-ID: k\r\n")).sessions
    assert len(marked(prompt(lines=b"X-Session-ID: a\r\n" * 100)).sessions) <= 8


def test_what_runs_no_prompt_is_not_compared() -> None:
    """No cache holds what is only counted or taken apart."""
    assert runs_one("/v1/chat/completions")
    assert not any(map(runs_one, ("/tokenize", "/detokenize", "/v1/messages/count_tokens")))


names = st.sampled_from([*sorted(name.decode() for name in NAMES), "user"])


@given(st.dictionaries(names, st.text() | st.lists(st.text())))
def test_large_bodies_and_metered_ones_have_the_same_members(found: dict[str, object]) -> None:
    """Found in steps, in one pass, and beside what is asked for."""
    text = json.dumps({"model": "chat", **found}).encode()
    spans = asyncio.run(members_of_large(text, NAMES))
    metered = read(text, "/v1/chat/completions", whole=True).members
    stepwise = asyncio.run(read_large(text, "/v1/chat/completions", whole=True)).members
    assert metered is not None
    assert stepwise is not None
    for name in map(bytes.decode, NAMES):
        expected = bytes(getattr(members(text), name))
        assert expected == (json.dumps(found[name]).encode() if name in found else b"")
        assert {bytes(getattr(each, name)) for each in (members_at(text, spans), metered, stepwise)} == {expected}


def test_what_is_no_body_is_refused_as_before() -> None:
    """With its code."""
    for text, code in ((b"{", "invalid_json"), (b"[1]", "missing_model"), (b'{"a":' + b"[" * 100_000, "invalid_json")):
        with pytest.raises(RequestError) as refused:
            members(text)
        assert refused.value.code == code
    assert members(b"\xef\xbb\xbf" + body()).model == "chat"


# The registry


@virtual
async def test_a_prompt_goes_where_its_beginning_went() -> None:
    """The same instance each time, for each of some prompts, though all are idle."""
    registry, _ = several(4)
    for number in range(8):
        turns = f"{number} {LONG}"
        first = sent(registry, prompt(turns))
        for turn in range(5):
            turns = f"{turns}, and then {turn}"
            assert sent(registry, prompt(turns)) is first
    routed = registry.routed("chat")
    assert (routed.prefix, routed.load, routed.only) == (40, 8, 0)
    assert 0.7 < routed.known_bytes / routed.all_bytes < 0.9


@virtual
async def test_a_session_goes_where_it_went() -> None:
    """Without anything else in common, and nothing of it was known to be cached."""
    registry, _ = several(4)
    first = sent(registry, prompt("a", prompt_cache_key="k"))
    for number in range(20):
        assert sent(registry, prompt(f"{number}", prompt_cache_key="k")) is first
    routed = registry.routed("chat")
    assert (routed.prefix, routed.load, routed.known_bytes) == (20, 1, 0)


@virtual
async def test_no_instance_has_much_more_than_the_others() -> None:
    """All requests begin alike: at most 1.25 times the mean, two more, and the one that is sent."""
    registry, endpoints = several(4)
    route = registry.find("chat")
    for _ in range(200):
        assert registry.lease(route, None, prompt()) is not None
        mean = sum(one.in_flight for one in endpoints) / 4
        assert max(one.in_flight for one in endpoints) <= 1.25 * mean + 3
    assert registry.routed("chat").prefix > 150


@virtual
async def test_nothing_is_computed_without_a_choice() -> None:
    """With one instance, with one that is free, or where the policy says so."""
    one, _ = several(1)
    assert not one.balances
    sent(one, found := prompt())
    assert not found.is_marked
    assert one.routed("chat") == Routed(only=1)
    plain, _ = several(2, balance="least-loaded")
    assert not plain.balances
    sent(plain, found := prompt())
    assert not found.is_marked
    assert plain.routed("chat") == Routed(load=1)
    full, endpoints = several(2, max_in_flight=1)
    assert full.balances
    endpoints[0].ejected = True
    sent(full, found := prompt())
    assert not found.is_marked
    assert full.routed("chat") == Routed(only=1)


@virtual
async def test_full_and_ejected_and_withdrawn_ones_do_not_count() -> None:
    """Whatever they know. Of one that was withdrawn, nothing is known any more."""
    registry, _ = several(3, max_in_flight=2)
    route = registry.find("chat")
    first = sent(registry, prompt())
    held, again = registry.lease(route, None, prompt()), registry.lease(route, None, prompt())
    assert held is not None
    assert again is not None
    assert held.endpoint is again.endpoint is first
    assert sent(registry, prompt(f"{LONG} more")) is not first  # it is full
    release(held)
    release(again)
    longer = f"{LONG} and much more {LONG}"
    holder = sent(registry, prompt(longer))
    holder.ejected = True
    assert sent(registry, prompt(longer)) is not holder
    holder.ejected = False
    registry.withdraw_endpoint("chat", holder)
    registry.add_endpoint("chat", holder)
    assert holder.bit
    memory = route.memory
    assert memory.known(marked(prompt(longer)).marks, holder.bit) == (0, 0)


@virtual
async def test_a_new_engine_in_its_place_has_nothing() -> None:
    """Its requests go where the load is least, the others' stay."""
    registry, endpoints = several(2)
    sent(registry, prompt("a" + LONG))
    there = sent(registry, prompt("b" + LONG))
    other = next(one for one in endpoints if one is not there)
    registry.withdraw_endpoint("chat", there)
    assert registry.balances is False
    opened(registry, 7)
    assert registry.balances
    sent(registry, prompt("c" + LONG))
    before = registry.routed("chat").prefix
    sent(registry, prompt("b" + LONG))
    assert registry.routed("chat").prefix == before
    assert other in registry.find("chat").endpoints


@virtual
async def test_who_waits_gets_the_one_that_knows_its_prompt() -> None:
    """Where two become free in the meantime."""
    registry, _ = several(2, max_in_flight=1)
    route = registry.find("chat")
    wanted = sent(registry, prompt())
    leases = [registry.lease(route), registry.lease(route)]
    registry.update({"chat": model("chat", max_in_flight=1)})
    waits = [asyncio.create_task(registry.wait(route, prompt=prompt(f"{LONG}{number}"))) for number in range(2)]
    await settle()
    registry.update({"chat": model("chat", max_in_flight=2)})  # each has room for one more
    await settle()
    assert waits[0].result().endpoint is wanted
    for lease in (*leases, *(task.result() for task in waits)):
        assert lease is not None
        release(lease)
    assert route.in_flight == 0


@virtual
async def test_a_request_that_moves_takes_its_marks_along() -> None:
    """The next one that begins alike goes to where it was answered."""
    registry, _ = several(3)
    route = registry.find("chat")
    lease = registry.lease(route, None, prompt())
    assert lease is not None
    failed = lease.endpoint
    assert lease.move()
    answered = lease.endpoint
    assert answered is not failed
    release(lease)
    for _ in range(10):
        assert sent(registry, prompt()) is answered
    # Also to the last one there is, and back to the first on a fresh connection.
    lease = registry.lease(route, None, prompt("other" + LONG))
    assert lease is not None
    first = lease.endpoint
    while lease.move():
        pass
    assert lease.move_back(first)
    release(lease)
    assert sent(registry, prompt("other" + LONG)) is first


@virtual
async def test_a_change_of_the_key_is_live() -> None:
    """Off: the load decides, and what was known is forgotten. On again: from nothing."""
    registry, _ = several(2)
    first = sent(registry, prompt())
    registry.update({"chat": model("chat", balance="least-loaded")})
    assert not registry.balances
    assert {sent(registry, prompt()) for _ in range(40)} > {first}
    registry.update({"chat": model("chat", balance="prefix")})
    before = registry.routed("chat").prefix
    there = sent(registry, prompt())
    assert registry.routed("chat").prefix == before
    assert {sent(registry, prompt()) for _ in range(10)} == {there}


@virtual
async def test_bodies_are_looked_into_only_while_a_model_has_several_instances() -> None:
    """Of many models one is enough; a model that goes does not count."""
    registry = Registry()
    for name in ("a", "b"):
        registry.declare(model(name), nobody)
    added = [Endpoint(f"b/{index}", TcpAddress("127.0.0.1", 9000 + index), "secret", None) for index in range(2)]
    registry.add_endpoint("b", added[0])
    assert not registry.balances
    registry.add_endpoint("b", added[1])
    assert registry.balances
    registry.withdraw_endpoint("b", added[0])
    assert not registry.balances
    registry.add_endpoint("b", added[0])
    registry.update({"a": model("a")})
    for endpoint in added:
        registry.withdraw_endpoint("b", endpoint)
    registry.forget("b")
    assert not registry.balances


def test_members_of_nothing_are_no_prompt() -> None:
    """A request without one has neither marks nor a size."""
    found = marked(Prompt(Members("chat"), b"", b""))
    assert (list(found.marks), found.size, found.sessions) == ([], 0, ())


def test_a_request_that_is_over_has_no_prompt() -> None:
    """It is kept among the last thousand, and a prompt that was never compared is a part of its body."""

    class Ended:
        request = SimpleNamespace(_transport_peername=None)
        head = forwarded = b""

        def __init__(self) -> None:
            self.prompt: Prompt | None = prompt()

    kept, call = Requests(), cast("Any", Ended())
    kept.active[call] = None
    kept.end(call)
    assert list(kept.recent) == [call]
    assert call.prompt is None
