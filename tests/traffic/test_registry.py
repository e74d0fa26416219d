"""Who serves which name now: leases, the queue, and counts that always come back to 0."""

import asyncio
import contextlib
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.virtual import model, now, passes, settle, virtual
from vllm_proxy.domain.address import TcpAddress
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.registry import Registry


def nobody() -> None:
    """Whom a request that waits need not wake."""


def registry_of(
    state: State = State.READY, *, stopped_by_hand: bool = False, wake: Callable[[], None] = nobody, **policy: object
) -> Registry:
    """A registry with one model, "chat"."""
    registry = Registry()
    registry.declare(model("chat", None, **policy), wake)
    registry.report("chat", state, "because", stopped_by_hand=stopped_by_hand)
    return registry


def opened(registry: Registry, index: int = 0) -> Endpoint:
    """An instance of "chat" that became ready."""
    endpoint = Endpoint(f"chat/{index}", TcpAddress("127.0.0.1", 9000 + index), "secret", None)
    registry.add_endpoint("chat", endpoint)
    return endpoint


def release(lease: Lease) -> None:
    """The request ends."""
    with lease:
        pass


async def waiter(registry: Registry) -> asyncio.Task[Lease]:
    """A request that has come as far as it can."""
    task = asyncio.create_task(registry.acquire("chat"))
    await settle()
    return task


async def refusal(registry: Registry, name: str = "chat") -> RequestError:
    """Why a request gets no lease."""
    with pytest.raises(RequestError) as refused:
        await registry.acquire(name)
    return refused.value


@virtual
async def test_an_id_and_its_aliases_lead_to_the_same_instance() -> None:
    """The lease says the id, whatever name the client sent."""
    registry = registry_of(aliases=("gpt-4o", "gpt-5"))
    endpoint = opened(registry)
    for name in ("chat", "gpt-4o", "gpt-5"):
        with await registry.acquire(name) as lease:
            assert (lease.model_id, lease.endpoint) == ("chat", endpoint)


@virtual
async def test_a_name_that_nobody_has_is_not_found() -> None:
    """404 with the name and the parameter."""
    error = await refusal(registry_of(), "Chat")
    assert (error.code, error.status, error.param) == ("model_not_found", 404, "model")
    assert "'Chat'" in error.message


@virtual
async def test_the_error_names_up_to_ten_models_that_the_caller_may_use() -> None:
    """No disabled one, and none that its key does not allow: whether such a one is there, it does not tell."""
    many = "".join(f'[models.m{number}]\nmodel = "x"\n' for number in range(12))
    specs = parse_config(f'{many}[models.off]\nmodel = "x"\nenabled = false\n'.encode(), "models.toml").models
    registry = Registry()
    for spec in specs.values():
        registry.declare(spec, lambda: None)
    for allowed, named in (
        (None, f"{', '.join(f'm{number}' for number in range(10))} and more, which GET /v1/models lists"),
        (frozenset({"m11", "off", "m1"}), "m1, m11"),
        (frozenset[str](), ""),
    ):
        with pytest.raises(RequestError) as refused:
            registry.find("nobody" if allowed is None else "m5", allowed)
        assert refused.value.message.partition("; there is ")[2] == named


@virtual
async def test_the_list_has_ids_first_and_no_disabled_model() -> None:
    """Neither its id nor its alias is shown."""
    registry = Registry()
    for spec in (
        model("a", aliases=("a1",)),
        model("off", enabled=False, aliases=("off1",)),
        model("b", aliases=("b1",)),
    ):
        registry.declare(spec, nobody)
    assert list(registry.names()) == ["a", "b", "a1", "b1"]
    assert registry.names()["b1"] is registry.names()["b"]


@pytest.mark.parametrize(
    ("state", "stopped_by_hand", "code"),
    [
        (State.ERROR, False, "model_error"),
        (State.STOPPED, True, "model_stopped"),
        (State.UNLOADING, True, "model_stopped"),
        (State.READY, True, "model_stopped"),
    ],
)
@virtual
async def test_a_model_that_will_not_come_refuses_at_once(state: State, stopped_by_hand: bool, code: str) -> None:  # noqa: FBT001 - a parameter of the test
    """503 without a wait; one that was stopped by hand takes nothing from that moment on."""
    registry = registry_of(state, stopped_by_hand=stopped_by_hand)
    if state is State.READY:
        opened(registry)
    error = await refusal(registry)
    assert (error.code, error.status, now()) == (code, 503, 0)


@virtual
async def test_a_model_in_error_says_why() -> None:
    """The message of its diagnosis reaches the client."""
    assert (await refusal(registry_of(State.ERROR))).message == "cannot serve chat: because"


@virtual
async def test_a_disabled_model_refuses() -> None:
    """It exists, but not for requests."""
    assert (await refusal(registry_of(enabled=False))).code == "model_disabled"


@virtual
async def test_a_closing_registry_refuses_everybody() -> None:
    """Late requests and those that wait get shutting_down with Retry-After; those in flight keep their lease."""
    registry = registry_of(max_in_flight=1)
    endpoint = opened(registry)
    running = await registry.acquire("chat")
    waiting = await waiter(registry)
    registry.close()
    with pytest.raises(RequestError) as refused:
        await waiting
    late = await refusal(registry)
    assert refused.value.code == late.code == "shutting_down"
    assert late.retry_after
    assert endpoint.in_flight == 1
    release(running)
    assert (endpoint.in_flight, registry.counts("chat")) == (0, (0, 0))


@pytest.mark.parametrize(
    ("state", "stopped_by_hand", "code"),
    [(State.ERROR, False, "model_error"), (State.UNLOADING, True, "model_stopped")],
)
@virtual
async def test_a_model_that_gives_up_fails_all_who_wait(state: State, stopped_by_hand: bool, code: str) -> None:  # noqa: FBT001 - as above
    """They need not sit out their queue_timeout; a loading model does not fail them."""
    registry = registry_of(State.LOADING)
    waiting = [await waiter(registry) for _ in range(3)]
    registry.report("chat", State.LOADING, "crashed once")
    await settle()
    assert registry.counts("chat") == (0, 3)
    registry.report("chat", state, "no luck", stopped_by_hand=stopped_by_hand)
    for task in waiting:
        with pytest.raises(RequestError) as refused:
            await task
        assert refused.value.code == code
    assert registry.counts("chat") == (0, 0)


@virtual
async def test_the_least_loaded_instance_is_taken() -> None:
    """Nine requests on three instances are three each, whichever ended in between."""
    registry = registry_of()
    endpoints = [opened(registry, index) for index in range(3)]
    leases = [await registry.acquire("chat") for _ in range(9)]
    assert [endpoint.in_flight for endpoint in endpoints] == [3, 3, 3]
    mine = next(lease for lease in leases if lease.endpoint is endpoints[1])
    release(mine)
    assert (await registry.acquire("chat")).endpoint is endpoints[1]


@virtual
async def test_max_in_flight_holds_for_each_instance() -> None:
    """Two instances with two places serve four; the fifth waits for the first place that gets free."""
    registry = registry_of(max_in_flight=2)
    endpoints = [opened(registry, index) for index in range(2)]
    leases = [await registry.acquire("chat") for _ in range(4)]
    fifth = await waiter(registry)
    assert [endpoint.in_flight for endpoint in endpoints] == [2, 2]
    assert registry.counts("chat") == (4, 1)
    release(leases[2])
    assert (await fifth).endpoint is leases[2].endpoint
    assert registry.counts("chat") == (4, 0)


@virtual
async def test_the_queue_is_first_come_first_served() -> None:
    """Each place that gets free goes to who waited longest, never to who comes just then."""
    registry = registry_of(max_in_flight=1)
    opened(registry)
    served: list[int] = []

    async def request(number: int) -> None:
        with await registry.acquire("chat"):
            served.append(number)
            await passes(1)

    tasks = []
    for number in range(6):
        tasks.append(asyncio.create_task(request(number)))
        await passes(0.4)  # some come while a place is just given back
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3, 4, 5]


@virtual
@pytest.mark.parametrize(("size", "said"), [(1, "1 request waits already"), (2, "2 requests wait already")])
async def test_the_refusal_of_a_full_queue_counts_in_plain_english(size: int, said: str) -> None:
    """Of one as of many."""
    registry = registry_of(State.LOADING, queue_size=size)
    _waiting = [await waiter(registry) for _ in range(size)]
    assert (await refusal(registry)).message == f"cannot serve chat: {said}"


@virtual
async def test_a_full_queue_refuses_at_once() -> None:
    """The limit is for those who wait; who leaves makes room."""
    registry = registry_of(State.LOADING, queue_size=2)
    first, _second = await waiter(registry), await waiter(registry)
    error = await refusal(registry)
    assert (error.code, error.retry_after) == ("queue_full", 1)
    first.cancel()
    third = await waiter(registry)
    assert not third.done()


@virtual
async def test_a_queue_of_no_size_still_serves_who_need_not_wait() -> None:
    """queue_size = 0 refuses waiting, not serving."""
    registry = registry_of(queue_size=0, max_in_flight=1)
    opened(registry)
    with await registry.acquire("chat"):
        assert (await refusal(registry)).code == "queue_full"
    with await registry.acquire("chat"):
        pass


@virtual
async def test_the_wait_ends_at_queue_timeout() -> None:
    """504, and nothing is left in the queue."""
    registry = registry_of(State.LOADING, queue_timeout=600)
    error = await refusal(registry)
    assert (error.code, error.status, now()) == ("queue_timeout", 504, 600)
    assert registry.counts("chat") == (0, 0)
    endpoint = opened(registry)
    assert endpoint.in_flight == 0


@virtual
async def test_a_permit_that_comes_with_the_timeout_is_used() -> None:
    """Given and timed out in one step of the loop, the request is served, and gives its place back."""
    registry = registry_of(max_in_flight=1, queue_timeout=10)
    endpoint = opened(registry)
    running = await registry.acquire("chat")
    asyncio.get_running_loop().call_at(10 - 5e-10, release, running)
    with await registry.acquire("chat"):
        assert endpoint.in_flight == 1
    assert endpoint.in_flight == 0


@virtual
async def test_a_waiter_cancelled_as_its_permit_comes_gives_it_back() -> None:
    """A client that hangs up in that very moment costs nobody a place: the next in line gets it."""
    registry = registry_of(max_in_flight=1)
    endpoint = opened(registry)
    running = await registry.acquire("chat")
    unlucky, following = await waiter(registry), await waiter(registry)
    release(running)
    assert endpoint.in_flight == 1, "the place is the first waiter's already"
    unlucky.cancel()
    assert (await following).endpoint is endpoint
    assert unlucky.cancelled()
    release(following.result())
    assert (endpoint.in_flight, registry.counts("chat")) == (0, (0, 0))


@virtual
async def test_a_waiter_cancelled_as_it_is_refused_is_cancelled() -> None:
    """No permit is given back that never was, and the cancellation is not lost."""
    registry = registry_of(State.LOADING)
    task = await waiter(registry)
    registry.report("chat", State.ERROR, "no luck")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert registry.counts("chat") == (0, 0)


@virtual
async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    """It is not counted and not served."""
    registry = registry_of(State.LOADING)
    first, second = await waiter(registry), await waiter(registry)
    first.cancel()
    await settle()
    assert registry.counts("chat") == (0, 1)
    endpoint = opened(registry)
    assert (await second).endpoint is endpoint
    assert endpoint.in_flight == 1


@virtual
async def test_a_place_that_opens_as_a_waiter_is_cancelled_goes_to_the_next() -> None:
    """Cancelled, but not gone from the queue yet: it is passed over."""
    registry = registry_of(State.LOADING)
    first, second = await waiter(registry), await waiter(registry)
    first.cancel()
    endpoint = opened(registry)
    assert (await second).endpoint is endpoint
    assert (first.cancelled(), endpoint.in_flight) == (True, 1)


@virtual
async def test_every_instance_is_leased_in_turn_and_given_back() -> None:
    """Each ready one once, whatever its load; one that was withdrawn meanwhile is left out."""
    registry = registry_of(max_in_flight=1)
    endpoints = [opened(registry, index) for index in range(3)]
    seen = []
    for lease in registry.every_instance(lambda _: True):
        with lease:
            seen.append(lease.endpoint)
            assert registry.counts("chat") == (1, 0)
            if len(seen) == 1:
                registry.withdraw_endpoint("chat", endpoints[1])
    assert seen == [endpoints[0], endpoints[2]]
    assert registry.counts("chat") == (0, 0)
    assert [endpoint.in_flight for endpoint in endpoints] == [0, 0, 0]


@virtual
async def test_a_withdrawn_instance_gets_no_new_request_and_keeps_the_old() -> None:
    """Its leases end in their own time and are counted until then; new requests wait."""
    registry = registry_of()
    endpoint = opened(registry)
    running = await registry.acquire("chat")
    registry.withdraw_endpoint("chat", endpoint)
    task = await waiter(registry)
    assert registry.counts("chat") == (1, 1)
    release(running)
    await settle()
    assert not task.done()
    assert registry.counts("chat") == (0, 1)
    assert (endpoint.in_flight, opened(registry, 1).in_flight) == (0, 1)


@virtual
async def test_wait_idle_returns_when_the_last_request_has_ended() -> None:
    """Not when one of two has, and at once when there is none."""
    registry = registry_of()
    endpoint = opened(registry)
    await endpoint.wait_idle()
    first, second = await registry.acquire("chat"), await registry.acquire("chat")
    idle = asyncio.create_task(endpoint.wait_idle())
    release(first)
    await settle()
    assert not idle.done()
    release(second)
    await idle


@virtual
async def test_a_lease_ends_with_its_block_however_that_ends() -> None:
    """An exception in the request gives the place back."""
    registry = registry_of()
    endpoint = opened(registry)
    with contextlib.suppress(ConnectionResetError), await registry.acquire("chat"):
        assert endpoint.in_flight == 1
        raise ConnectionResetError
    assert endpoint.in_flight == 0


class Storm:
    """Requests and instances that come and go as drawn."""

    def __init__(self, most: int, queue_size: int) -> None:
        self.most = most
        self.registry = registry_of(max_in_flight=most, queue_size=queue_size, queue_timeout=5)
        self.every: list[Endpoint] = []
        self.open: list[Endpoint] = []
        self.requests: list[asyncio.Task[None]] = []
        self.running: list[asyncio.Event] = []

    async def request(self) -> None:
        """One request, which runs until it is released or cancelled."""
        ends = asyncio.Event()
        with await self.registry.acquire("chat"):
            self.running.append(ends)
            await ends.wait()

    async def step(self, action: str, number: int) -> None:
        """Something happens; only "turn" and "wait" let the others have their turn."""
        if action == "acquire":
            self.requests.append(asyncio.create_task(self.request()))
        elif action == "release" and self.running:
            self.running.pop(number % len(self.running)).set()
        elif action == "cancel" and self.requests:
            self.requests[number % len(self.requests)].cancel()
        elif action == "open":
            self.every.append(opened(self.registry, len(self.every)))
            self.open.append(self.every[-1])
        elif action == "withdraw" and self.open:
            self.registry.withdraw_endpoint("chat", self.open.pop(number % len(self.open)))
        elif action == "turn":
            await asyncio.sleep(0)
        elif action == "wait":
            await passes(number)

    def check(self) -> None:
        """What holds at every moment."""
        _in_flight, queued = self.registry.counts("chat")
        assert self.registry.counts("chat")[0] == sum(endpoint.in_flight for endpoint in self.every)
        free = [endpoint for endpoint in self.open if not self.most or endpoint.in_flight < self.most]
        assert not (queued and free), "somebody waits though there is room"
        assert all(0 <= endpoint.in_flight <= (self.most or 999) for endpoint in self.every)

    async def calm(self) -> None:
        """Everybody goes."""
        for request in self.requests:
            request.cancel()
        for outcome in await asyncio.gather(*self.requests, return_exceptions=True):
            if isinstance(outcome, RequestError):
                assert outcome.code in {"queue_full", "queue_timeout"}
            else:
                assert outcome is None or isinstance(outcome, asyncio.CancelledError)


ACTIONS = ["acquire", "acquire", "acquire", "release", "release", "cancel", "open", "withdraw", "turn", "turn", "wait"]


@settings(max_examples=60, deadline=None)
@given(
    most=st.integers(0, 2),
    queue_size=st.sampled_from([1, 3, 100]),
    steps=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 6)), min_size=20, max_size=80),
)
@virtual
async def test_whatever_happens_every_count_comes_back_to_zero(
    most: int, queue_size: int, steps: list[tuple[str, int]]
) -> None:
    """Leases, queue and idleness balance for any order of requests, hang-ups, timeouts and instances."""
    random.seed(0)
    storm = Storm(most, queue_size)
    for action, number in steps:
        await storm.step(action, number)
        storm.check()
    await storm.calm()
    assert [endpoint.in_flight for endpoint in storm.every] == [0] * len(storm.every)
    assert storm.registry.counts("chat") == (0, 0)
    assert not storm.registry.find("chat").waiting
    for endpoint in storm.every:
        await endpoint.wait_idle()
    with await storm.registry.acquire("chat") if storm.open else contextlib.nullcontext():
        storm.check()


@virtual
async def test_a_request_for_a_model_that_sleeps_wakes_it_and_waits() -> None:
    """One that sleeps or loads is asked to come; a request for a ready one asks nobody."""
    woken: list[State] = []
    registry = registry_of(State.STOPPED, wake=lambda: woken.append(registry.find("chat").state))
    first, second = await waiter(registry), await waiter(registry)
    assert woken == [State.STOPPED] * 3  # twice by the first who waits
    assert registry.is_awaited("chat")
    registry.report("chat", State.READY, None)
    endpoint = opened(registry)
    for task in (first, second):
        assert (await task).endpoint is endpoint
    await registry.acquire("chat")
    assert len(woken) == 3
    assert not registry.is_awaited("chat")


@virtual
async def test_a_model_is_idle_from_its_last_request_on() -> None:
    """Neither one in flight nor one that waits lets it be idle; one that gave up waiting counts as use, too."""
    registry = registry_of(max_in_flight=1)
    opened(registry)
    await passes(10)
    assert registry.idle_seconds("chat") == 10
    lease = await registry.acquire("chat")
    waiting = await waiter(registry)
    await passes(10)
    assert registry.idle_seconds("chat") == 0
    release(lease)
    assert registry.idle_seconds("chat") == 0, "the other one has it now"
    release(await waiting)
    await passes(5)
    assert registry.idle_seconds("chat") == 5
    registry.report("chat", State.LOADING, None)
    leaving = await waiter(registry)
    leaving.cancel()
    await asyncio.wait({leaving})
    assert registry.idle_seconds("chat") == 0
