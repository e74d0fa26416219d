"""Adapters, as requests see them: names of their own, served by the instances of their base that hold them."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.virtual import model, now, settle, virtual
from vllm_proxy.domain.adapters import Adapter
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.registry import Registry


def nobody() -> None:
    """Whom a request that waits need not wake."""


def with_adapters(*adapters: str, off: tuple[str, ...] = (), **policy: int) -> ModelSpec:
    """The model, with these adapters."""
    found = {name: Adapter(name, f"adapters/{name}", enabled=name not in off) for name in (*adapters, *off)}
    policies: dict[str, Any] = {**policy}
    return replace(model("chat", aliases=("gpt",), **policies), adapters=found)


def registry_of(spec: ModelSpec, state: State = State.READY, wake: Callable[[], None] = nobody) -> Registry:
    """A registry with one model."""
    registry = Registry()
    registry.declare(spec, wake)
    registry.report("chat", state, "because")
    return registry


def opened(registry: Registry, index: int = 0, *holds: str) -> Endpoint:
    """An instance that became ready, and holds these adapters."""
    endpoint = Endpoint(f"chat/{index}", TcpAddress("127.0.0.1", 9000 + index), "secret", None)
    endpoint.adapters = frozenset(holds)
    registry.add_endpoint("chat", endpoint)
    return endpoint


def hold(registry: Registry, endpoint: Endpoint, *adapters: str) -> None:
    """It holds others now."""
    endpoint.adapters = frozenset(adapters)
    registry.hold_adapters("chat")


async def waiter(registry: Registry, name: str) -> asyncio.Task[Lease]:
    """A request that has come as far as it can."""
    task = asyncio.create_task(registry.acquire(name))
    await settle()
    return task


async def refusal(registry: Registry, name: str) -> RequestError:
    """Why a request gets no lease."""
    with pytest.raises(RequestError) as refused:
        await registry.acquire(name)
    return refused.value


@virtual
async def test_an_adapter_is_served_under_its_own_id_by_an_instance_that_holds_it() -> None:
    """However loaded the others are less; the lease, its headers and its spec say the adapter."""
    registry = registry_of(with_adapters("sql", "law"))
    opened(registry, 0)
    holder = opened(registry, 1, "sql")
    opened(registry, 2, "law")
    leases = [await registry.acquire("sql") for _ in range(3)]
    assert {(lease.endpoint, lease.model_id) for lease in leases} == {(holder, "sql")}
    assert leases[0].answer_headers == b"X-Vllm-Proxy-Model: sql\r\nX-Vllm-Proxy-Instance: chat/1\r\n"
    assert registry.find("sql").spec.id == "sql"
    assert registry.base_of("sql") == registry.base_of("gpt") == registry.base_of("chat") == "chat"
    assert registry.counts("chat") == (3, 0)
    for lease in leases:
        with lease:
            pass
    assert registry.counts("chat") == (0, 0)


@virtual
async def test_a_request_for_an_adapter_moves_to_instances_that_hold_it_alone() -> None:
    """Where its instance gives no answer, too."""
    random.seed(1)
    registry = registry_of(with_adapters("sql"))
    first = opened(registry, 0, "sql")
    opened(registry, 1)
    lease = await registry.acquire("sql")
    assert not lease.move()
    second = opened(registry, 2, "sql")
    assert lease.move()
    assert lease.endpoint is second
    hold(registry, first)
    assert not lease.move_back(first)


@virtual
async def test_who_waits_for_an_adapter_that_loads_holds_up_nobody() -> None:
    """Requests for the base and for other adapters are served meanwhile, however many wait for that one."""
    registry = registry_of(with_adapters("sql", "law", queue_size=2, max_in_flight=3))
    endpoint = opened(registry, 0, "law")
    waiting = [await waiter(registry, "sql"), await waiter(registry, "sql")]
    assert (await refusal(registry, "sql")).code == "queue_full"
    leases = [await registry.acquire("chat"), await registry.acquire("law"), await registry.acquire("gpt")]
    later = await waiter(registry, "chat")
    with leases[0]:
        pass
    assert (await later).model_id == "chat"
    assert not waiting[0].done()
    hold(registry, endpoint, "law", "sql")
    await settle()
    assert not waiting[0].done(), "the instance is full"
    with leases[1], leases[2]:
        pass
    assert [(await one).endpoint for one in waiting] == [endpoint, endpoint]
    assert now() == 0


@virtual
async def test_an_adapter_that_changes_is_awaited_while_its_base_serves() -> None:
    """Its requests wait until it is held again."""
    registry = registry_of(with_adapters("sql"))
    endpoint = opened(registry, 0, "sql")
    hold(registry, endpoint)
    task = await waiter(registry, "sql")
    assert (await registry.acquire("chat")).endpoint is endpoint
    assert not task.done()
    hold(registry, endpoint, "sql")
    assert (await task).endpoint is endpoint


@virtual
async def test_an_adapter_in_error_refuses_with_the_reason_and_its_base_serves() -> None:
    """Who waited for it is told too; where one instance holds it all the same, it serves."""
    registry = registry_of(with_adapters("sql", "law"))
    endpoint = opened(registry, 0, "law")
    task = await waiter(registry, "sql")
    registry.report_adapters("chat", {"sql": "rank 64 is too large", "law": "not on chat/1"})
    with pytest.raises(RequestError) as refused:
        await task
    late = await refusal(registry, "sql")
    assert refused.value.message == late.message == "cannot serve sql: rank 64 is too large"
    assert (late.code, late.status) == ("model_error", 503)
    for name in ("chat", "law"):
        assert (await registry.acquire(name)).endpoint is endpoint
    registry.report_adapters("chat", {})
    task = await waiter(registry, "sql")
    assert not task.done()
    task.cancel()


@virtual
async def test_adapters_come_change_and_go_with_the_file() -> None:
    """One that is gone is unknown at once, and so to who waits for it; one that is held already serves at once."""
    registry = registry_of(with_adapters("sql", "law"))
    endpoint = opened(registry, 0, "law", "new")
    waiting = await waiter(registry, "sql")
    registry.update({"chat": with_adapters("law", "new")})
    with pytest.raises(RequestError) as refused:
        await waiting
    assert (refused.value.code, refused.value.status) == ("model_not_found", 404)
    assert "'sql'" in refused.value.message
    assert (await refusal(registry, "sql")).status == 404
    assert (await registry.acquire("new")).endpoint is endpoint
    registry.update({"chat": with_adapters("new", off=("law",))})
    assert (await refusal(registry, "law")).code == "model_disabled"
    assert [*registry.names()] == ["chat", "new", "gpt"]
    registry.update({})
    assert (await refusal(registry, "new")).status == 404


@virtual
async def test_an_adapter_of_a_model_that_does_not_serve_waits_wakes_or_is_refused_as_the_model() -> None:
    """What holds for its base holds for it, under its own name."""
    woken: list[int] = []
    registry = registry_of(with_adapters("sql"), State.STOPPED, lambda: woken.append(1))
    task = await waiter(registry, "sql")
    assert woken
    assert registry.is_awaited("chat")
    registry.report("chat", State.READY, None)
    endpoint = opened(registry)
    await settle()
    assert not task.done()
    hold(registry, endpoint, "sql")
    assert (await task).endpoint is endpoint
    registry.withdraw_endpoint("chat", endpoint)
    registry.report("chat", State.ERROR, "it crashed")
    assert (await refusal(registry, "sql")).message == "cannot serve sql: it crashed"
    registry.report("chat", State.STOPPED, None, stopped_by_hand=True)
    assert (await refusal(registry, "sql")).code == "model_stopped"
    registry.close()
    assert (await refusal(registry, "sql")).code == "shutting_down"


@virtual
async def test_a_wait_that_is_given_up_leaves_no_trace() -> None:
    """Cancelled while it waits, or in the step in which it was served."""
    registry = registry_of(with_adapters("sql"))
    endpoint = opened(registry)
    task = await waiter(registry, "sql")
    hold(registry, endpoint, "sql")
    task.cancel()
    await settle()
    assert registry.counts("chat") == (0, 0)
    assert endpoint.in_flight == 0
