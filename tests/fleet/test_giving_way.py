"""Models share GPUs that cannot hold them all: who comes, and how the others give way. In virtual time."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.engine.virtual import FakeEngine, FakeTenant, Stage, now, passes, settle, virtual
from tests.fleet.test_model import begun
from vllm_proxy.domain.config import Devices, EngineSpec, ModelSpec, Policy
from vllm_proxy.domain.inventory import Seen
from vllm_proxy.domain.ledger import Kind, Standing
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.domain.placement import Machine
from vllm_proxy.engine.program import LaunchError
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.lease import Lease

GIB = 2**30
RULES = Devices(reserve=0, max_wait=30.0, min_residency=10.0)


class Gpus:
    """GPUs whose free memory nobody measures. The first look at them was at the beginning of time."""

    problem = None
    unmanaged = None

    def __init__(self, count: int = 1, gib: int = 10, rules: Devices = RULES) -> None:
        self.rules = rules
        self.host_bytes: int | None = None
        self.looked_at, self.seen_at = math.inf, -math.inf
        self.asked = 0  # times that somebody wanted a look
        self.seen = {
            str(index): Seen(str(index), f"GPU-{index}", index, "GPU", Kind.GPU, unified=False, total=gib * GIB,
                             free=None, visible=str(index))
            for index in range(count)
        }  # fmt: skip

    def host_budget(self) -> int | None:
        """Bytes of the machine's memory that sleepers may have."""
        return self.host_bytes

    def machine(self) -> Machine | None:
        """All of them."""
        return Machine(self.seen, frozenset(self.seen), self.rules, self.looked_at, self.seen_at) if self.seen else None

    def use(self, rules: Devices) -> None:
        """The file says this."""
        self.rules = rules

    def wake(self) -> None:
        """Nobody looks."""
        self.asked += 1


def model(model_id: str, gib: int = 6, keys: Mapping[str, object] | None = None, **policy: object) -> ModelSpec:
    """A model that needs so much of a GPU, its context included."""
    engine = EngineSpec.model_validate({"model": model_id, "memory": f"{gib - 0.6}GiB", **(keys or {})})
    return ModelSpec(model_id, engine, Policy.model_validate({"start": "on-demand", **policy}), {})


async def answered(stage: Stage, name: str) -> Lease:
    """A request that its model has taken; engines that are started become ready."""
    waiting = asyncio.create_task(stage.registry.acquire(name))
    while not waiting.done():
        await settle()
        for engine in stage.launcher.engines:
            engine.listens = engine.reaped_at is None and not engine.exited.done()
        await passes(0.25)
    return await waiting


def engine_of(stage: Stage, name: str) -> FakeEngine:
    """The last one of a model."""
    return [one for one in stage.launcher.engines if one.place.instance.startswith(f"{name}/")][-1]


@virtual
async def test_the_first_start_of_a_model_says_what_its_return_would_cost() -> None:
    """Until then that is thought to be a minute. A quick one gives way after half of it, and not after five seconds."""
    stage = Stage(Gpus(rules=RULES.model_copy(update={"min_residency": 0.0})))
    begun(stage, model("chat"))
    begun(stage, model("code"))
    with await answered(stage, "chat"):
        pass
    (before,) = stage.loop.room.now().holds
    asked = now()
    with await answered(stage, "code"):
        assert before.start_seconds < 2
        assert now() - asked < 2


@virtual
async def test_an_idle_model_gives_way_to_one_that_a_request_waits_for() -> None:
    """It is killed, not asked: nothing is in flight. It says to whom it gave way; its next request brings it back."""
    stage = Stage(Gpus())
    chat, code = begun(stage, model("chat")), begun(stage, model("code"))
    with await answered(stage, "chat"):
        pass
    with await answered(stage, "code"):
        pass
    assert (chat.state, code.state, stage.launcher.stop_timeouts) == (State.STOPPED, State.READY, [0.0])
    assert chat.diagnosis is not None
    assert chat.diagnosis.reason is Reason.GAVE_WAY
    assert chat.diagnosis.message.startswith("gave way to code at ")
    with await answered(stage, "chat"):
        assert code.state is State.STOPPED


@virtual
async def test_room_is_free_when_no_process_is_left_whatever_else_is_tidied_up() -> None:
    """The next engine starts beside that."""
    stage = Stage(Gpus())
    stage.launcher.tidying_seconds = 50
    chat = begun(stage, model("chat"))
    begun(stage, model("code"))
    with await answered(stage, "chat"):
        pass
    with await answered(stage, "code"):
        assert chat.state is State.UNLOADING
    await passes(60)
    assert [chat.state] == [State.STOPPED]


@virtual
async def test_an_engine_that_others_read_from_is_asked_to_end() -> None:
    """One with a KV connector: who reads its cache is not cut off."""
    stage = Stage(Gpus())
    keys: dict[str, object] = {"args": {"kv-transfer-config": {"kv_connector": "x"}}}
    begun(stage, model("chat", keys=keys, stop_timeout=7)), begun(stage, model("code"))
    for name in ("chat", "code"):
        with await answered(stage, name):
            pass
    assert stage.launcher.stop_timeouts == [7.0]


@virtual
async def test_an_idle_model_is_left_alone_for_as_long_as_it_may_expect_its_next_request() -> None:
    """At least `min_residency`; then half of what its return costs, 5 s at most."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    with await answered(stage, "chat"):
        served = now()
    with await answered(stage, "code"):
        assert now() - served == pytest.approx(10, abs=1)


@virtual
async def test_a_busy_model_gives_way_to_one_that_has_waited_too_long_and_its_requests_end() -> None:
    """After `max_wait`. It takes no new request from then on; its running ones have `yield_timeout`, then are cut."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=100))
    begun(stage, model("code"))
    running = await answered(stage, "chat")
    asked = now()
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    assert now() - asked == pytest.approx(30, abs=1)
    instance = chat.instances[0]
    assert (instance.phase, instance.gives_way_to) == (Phase.DRAINING, "code/0")
    await passes(90)
    assert (engine_of(stage, "chat").reaped_at, running.endpoint.in_flight) == (None, 1)
    with await waiting:
        assert now() - asked == pytest.approx(130, abs=1)
    running.__exit__()


@virtual
async def test_with_a_yield_timeout_of_zero_running_requests_are_never_cut() -> None:
    """However long they take."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=0))
    begun(stage, model("code", queue_timeout=10**6))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(answered(stage, "code"))
    await passes(5000)
    assert (chat.state, waiting.done()) == (State.UNLOADING, False)
    running.__exit__()
    with await waiting:
        pass


@virtual
async def test_a_busy_model_that_becomes_idle_gives_way_before_anybody_has_waited_too_long() -> None:
    """The fleet looks again when its last request ends."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code"))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(answered(stage, "code"))
    await passes(12)
    assert not waiting.done()
    running.__exit__()
    ended = now()
    with await waiting:
        assert now() - ended < 6


@virtual
async def test_a_warm_model_runs_without_a_request_and_comes_back_when_nobody_waits_for_its_room() -> None:
    """It makes nobody go for that."""
    stage = Stage(Gpus())
    warm = begun(stage, model("warm", start="warm"))
    code = begun(stage, model("code", idle_timeout=100))
    (await stage.engine()).listens = True
    await stage.until(lambda: warm.state is State.READY)
    with await answered(stage, "code"):
        pass
    await passes(50)
    (instance,) = warm.instances
    assert (warm.state, instance.phase) == (State.LOADING, Phase.QUEUED)
    assert instance.waiting_because is not None
    assert code.state is State.READY
    await stage.until(lambda: code.state is State.STOPPED)
    await stage.engine(3)
    engine_of(stage, "warm").listens = True
    await stage.until(lambda: warm.state is State.READY)


@virtual
async def test_whose_requests_wait_with_more_priority_comes_first() -> None:
    """And who has less gives way first."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("low")), begun(stage, model("high", priority=1))
    running = await answered(stage, "chat")
    low = asyncio.create_task(stage.registry.acquire("low"))
    await settle()
    high = asyncio.create_task(stage.registry.acquire("high"))
    running.__exit__()
    await stage.engine(2)
    assert stage.launcher.engines[1].place.instance == "high/0"
    low.cancel(), high.cancel()


@virtual
async def test_who_starts_a_model_by_hand_waits_for_room_as_a_request_does() -> None:
    """A model that waits without anybody waiting for it makes nobody go."""
    stage = Stage(Gpus())
    chat, code = begun(stage, model("chat", idle_timeout=0)), begun(stage, model("code"))
    with await answered(stage, "chat"):
        pass
    code.start()
    await stage.until(lambda: chat.state is State.STOPPED)
    (await stage.engine(2)).listens = True
    await stage.until(lambda: code.state is State.READY)


@virtual
async def test_a_second_replica_makes_nobody_go() -> None:
    """It comes when there is room that nobody waits for."""
    stage = Stage(Gpus(gib=13))
    other = begun(stage, model("other", idle_timeout=200))
    with await answered(stage, "other"):
        pass
    chat = begun(stage, model("chat", replicas=2, idle_timeout=0))
    with await answered(stage, "chat"):
        pass
    await passes(100)
    assert (other.state, [one.state for one in chat.instances]) == (State.READY, [State.READY, State.LOADING])
    await stage.until(lambda: other.state is State.STOPPED)
    (await stage.engine(3)).listens = True
    await stage.until(lambda: [one.state for one in chat.instances] == [State.READY] * 2)


@virtual
async def test_an_idle_replica_gives_way_and_the_other_one_serves_on() -> None:
    """The model goes on, and its second instance waits for room that nobody wants."""
    stage = Stage(Gpus(gib=13))
    chat = begun(stage, model("chat", replicas=2, idle_timeout=0))
    with await answered(stage, "chat"):
        await passes(1)
    while any(one.state is not State.READY for one in chat.instances):
        stage.launcher.engines[-1].listens = True
        await passes(1)
    begun(stage, model("code"))
    with await answered(stage, "code"):
        assert chat.state is State.READY
        assert sorted(one.state for one in chat.instances) == sorted([State.READY, State.LOADING])
        with await stage.registry.acquire("chat"):
            pass


@pytest.mark.parametrize(("gib", "first"), [(20, State.READY), (10, State.UNLOADING)])
@virtual
async def test_new_beside_old_is_tried_only_where_there_is_room_for_both(gib: int, first: State) -> None:
    """Else the old engine goes first, as if that had been asked for."""
    stage = Stage(Gpus(gib=gib))
    stage.launcher.teardown_seconds = 5
    chat = begun(stage, model("chat", start="always", replace="surge"))
    (await stage.engine()).listens = True
    await stage.until(lambda: chat.state is State.READY)
    chat.adopt_spec(replace(chat.spec, engine=chat.spec.engine.model_copy(update={"max_num_seqs": 5})))
    await passes(1)
    assert chat.instances[0].state is first
    (await stage.engine(2)).listens = True
    await stage.until(lambda: stage.launcher.engines[0].reaped_at is not None)
    await passes(10)
    assert [one.state for one in chat.instances if one.state is not State.STOPPED] == [State.READY]


@virtual
async def test_memory_is_not_set_free_beside_an_engine_that_measures_it() -> None:
    """Who gives way and has no requests any more waits until that one is ready."""
    stage = Stage(Gpus(count=2))
    wide = begun(stage, model("wide", 4, {"devices": (0, 1), "tensor_parallel_size": 2}))
    begun(stage, model("one", 6, {"devices": (0,)}))
    begun(stage, model("big", 8, {"devices": (1,)}))
    with await answered(stage, "wide"):
        pass
    await passes(11)
    one = asyncio.create_task(stage.registry.acquire("one"))
    await stage.engine(2)
    big = asyncio.create_task(stage.registry.acquire("big"))
    await stage.until(lambda: wide.state is State.UNLOADING)
    await passes(20)
    assert engine_of(stage, "wide").reaped_at is None
    engine_of(stage, "one").listens = True
    await stage.engine(3)
    assert engine_of(stage, "wide").reaped_at is not None
    engine_of(stage, "big").listens = True
    for task in (one, big):
        with await task:
            pass


@virtual
async def test_what_never_fits_fails_its_requests_at_once_until_it_does() -> None:
    """An `always` model has its room for good; when it goes, the other one comes by itself."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", start="always"))
    (await stage.engine()).listens = True
    await stage.until(lambda: chat.state is State.READY)
    code = begun(stage, model("code"))
    for _ in range(2):
        with pytest.raises(RequestError) as refused:
            await stage.registry.acquire("code")
        assert (refused.value.code, refused.value.retry_after) == ("no_room", None)
    assert code.diagnosis is not None
    assert code.diagnosis.reason is Reason.DOES_NOT_FIT
    chat.stop()
    with await answered(stage, "code"):
        assert code.state is State.READY


@pytest.mark.parametrize("forgotten", [False, True])
@virtual
async def test_who_was_refused_is_told_of_room_unless_it_does_not_want_to_start_any_more(*, forgotten: bool) -> None:
    """Once, when the devices are known."""

    class Refused(FakeTenant):
        told_of_room = 0

        def on_room(self) -> None:
            self.told_of_room += 1

    gpus = Gpus()
    seen, gpus.seen = gpus.seen, {}
    room = Stage(gpus).loop.room
    tenant = Refused("chat/0")
    tenant.spec = model("chat")
    claim = room.ask(tenant)
    with pytest.raises(LaunchError, match="no device is managed"):
        await claim.admission()
    claim.done()
    if forgotten:
        room.forget(tenant)
    for known in ({}, seen, seen):
        gpus.seen = known
        room.look()
    assert tenant.told_of_room == (not forgotten)


@virtual
async def test_a_full_queue_says_when_there_may_be_room() -> None:
    """As far as can be guessed, two minutes at most."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), begun(stage, model("code", queue_size=1))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(stage.registry.acquire("code"))
    await passes(1)
    with pytest.raises(RequestError) as refused:
        await stage.registry.acquire("code")
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after is not None
    assert 60 <= refused.value.retry_after <= 120
    waiting.cancel()
    running.__exit__()


@virtual
async def test_an_engine_is_told_its_gpu_and_its_share_of_it() -> None:
    """`memory` is a part of the device that it lands on; one of no size sees no GPU."""
    stage = Stage(Gpus(count=2))
    begun(stage, model("chat", start="always"))
    begun(stage, model("none", keys={"memory": 0}, start="always"))
    begun(stage, model("wide", 3, {"tensor_parallel_size": 2}, start="always"))
    for number in range(3):
        (await stage.engine(number + 1)).listens = True
        await settle()
        await passes(1)
    places = {engine.place.instance: engine.place.allocation for engine in stage.launcher.engines}
    shares = {name: one.share for name, one in places.items()}
    assert shares == {"chat/0": pytest.approx(0.54, abs=1e-5), "none/0": None, "wide/0": pytest.approx(0.24, abs=1e-5)}
    assert places["chat/0"].visible == ("0",)
    assert (places["none/0"].visible, places["none/0"].takes) == ((), {})
    assert places["wide/0"].visible == ("0", "1")
    assert {hold.name: hold.standing for hold in stage.loop.room.now().holds} == {
        "chat/0": Standing.SERVES, "none/0": Standing.SERVES, "wide/0": Standing.SERVES,
    }  # fmt: skip


@virtual
async def test_who_stops_a_model_that_gives_way_waits_no_longer_than_for_any_other() -> None:
    """Its running requests then have `drain_timeout`, though they would never have been cut."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=0, drain_timeout=20))
    begun(stage, model("code"))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    await passes(300)
    assert chat.state is State.UNLOADING
    asked = now()
    chat.stop()
    await stage.until(lambda: chat.state is State.STOPPED)
    assert chat.stopped_by_hand
    assert now() - asked == pytest.approx(20, abs=1)
    with await waiting:
        pass
    running.__exit__()


@virtual
async def test_an_engine_that_dies_while_it_is_to_give_way_is_gone_all_the_same() -> None:
    """Nobody waits for its requests any more."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=0))
    begun(stage, model("code"))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    engine_of(stage, "chat").die()
    with await waiting:
        assert chat.state is State.STOPPED
    running.__exit__()


@virtual
async def test_clients_that_give_up_and_ask_again_have_waited_as_long_as_one_that_does_not() -> None:
    """A busy model gives way after `max_wait`, though no request has waited so long."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=0))
    begun(stage, model("code"))
    running = await answered(stage, "chat")
    asked = now()
    while chat.state is State.READY:
        request = asyncio.create_task(stage.registry.acquire("code"))
        await passes(8)
        request.cancel()
        await passes(1)
    assert now() - asked == pytest.approx(30, abs=10)
    running.__exit__()


@virtual
async def test_how_long_a_model_waited_that_nobody_asked_for_does_not_count() -> None:
    """A request for it waits its own time."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat"))
    running = await answered(stage, "chat")
    warm = begun(stage, model("warm", start="warm"))
    await passes(1000)
    request = asyncio.create_task(stage.registry.acquire("warm"))
    await passes(25)
    assert (chat.state, warm.state) == (State.READY, State.LOADING)
    await passes(10)
    assert chat.state is State.UNLOADING
    running.__exit__()
    request.cancel()


@virtual
async def test_a_model_serves_on_when_nobody_waits_for_its_room_any_more() -> None:
    """Its running request goes on, new ones are taken, and the other model does not load for nobody."""
    stage = Stage(Gpus())
    chat, code = begun(stage, model("chat")), begun(stage, model("code"))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(stage.registry.acquire("code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    waiting.cancel()
    gave_up = now()
    await stage.until(lambda: chat.state is State.READY)
    assert now() - gave_up == pytest.approx(10, abs=1)
    with await stage.registry.acquire("chat"):
        assert (code.state, chat.diagnosis) == (State.STOPPED, None)
    running.__exit__()
    await passes(60)
    assert (chat.state, len(stage.launcher.engines)) == (State.READY, 1)
    waiting = asyncio.create_task(answered(stage, "code"))
    await stage.until(lambda: chat.state is State.STOPPED)
    with await waiting:
        assert stage.launcher.stop_timeouts == [0.0]


@virtual
async def test_a_model_that_serves_on_is_stopped_as_any_other() -> None:
    """What was to be given up once can be ended later, and leaves nothing."""
    stage = Stage(Gpus())
    chat, code = begun(stage, model("chat")), begun(stage, model("code"))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(stage.registry.acquire("code"))
    await stage.until(lambda: chat.state is State.UNLOADING)
    waiting.cancel()
    code.stop()
    await stage.until(lambda: chat.state is State.READY)
    running.__exit__()
    await chat.end(keep=False)
    assert engine_of(stage, "chat").reaped_at is not None
    assert stage.loop.room.now().holds == []


@virtual
async def test_an_on_demand_model_that_nobody_waits_for_any_more_does_not_wait_for_room() -> None:
    """It awaits its next request, some seconds after the last one gave up."""
    stage = Stage(Gpus())
    begun(stage, model("chat")), (code := begun(stage, model("code")))
    running = await answered(stage, "chat")
    waiting = asyncio.create_task(stage.registry.acquire("code"))
    await passes(5)
    waiting.cancel()
    await passes(5)
    assert code.state is State.LOADING
    await passes(6)
    assert (code.state, code.awaits_request) == (State.STOPPED, True)
    running.__exit__()


@virtual
async def test_what_a_person_started_waits_for_room_as_long_as_it_takes() -> None:
    """Nobody else has to want it."""
    stage = Stage(Gpus())
    chat = begun(stage, model("chat", yield_timeout=0))
    code = begun(stage, model("code", idle_timeout=100))
    running = await answered(stage, "chat")
    code.start()
    await passes(300)
    assert (chat.state, code.state) == (State.UNLOADING, State.LOADING)
    running.__exit__()
    (await stage.engine(2)).listens = True
    await stage.until(lambda: code.state is State.READY)
    await stage.until(lambda: code.state is State.STOPPED)


@virtual
async def test_a_replica_that_waits_for_room_has_not_waited_for_requests_that_another_one_served() -> None:
    """When that one is gone, the next request waits its own time."""
    stage = Stage(Gpus(count=2))
    begun(stage, model("busy", keys={"devices": [1]}, yield_timeout=0))
    running = await answered(stage, "busy")
    chat = begun(stage, model("chat", keys={"devices": [0]}, replicas=2))
    with await answered(stage, "chat"):
        await passes(5)
    (claim,) = (one.claim for one in chat.instances if one.claim is not None and one.claim.waits)
    engine_of(stage, "chat").die()
    await settle()
    asked = now()
    request = asyncio.create_task(stage.registry.acquire("chat"))
    await settle()
    assert claim.wanted_since() == asked
    running.__exit__()
    request.cancel()
