"""A model's status follows from its instances; the fleet in one sentence follows from the models."""

import asyncio
from datetime import UTC, datetime

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, model, now, passes, settle, virtual
from vllm_proxy.daemon import sentence
from vllm_proxy.domain.config import Config, EngineDefaults, ModelSpec, Restart, Server
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.engine.reconciler import ModelStatus, Reconciler
from vllm_proxy.errors import RequestError

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def reconciler_of(stage: Stage, *models: ModelSpec) -> Reconciler:
    """A started reconciler, which tells the stage of every change."""
    config = Config("abc", Server(), EngineDefaults(), {spec.id: spec for spec in models})
    reconciler = Reconciler(config, stage.around, LONG_AGO)
    reconciler.listen(stage.moved)
    reconciler.start()
    return reconciler


def states(status: ModelStatus) -> list[State]:
    """Those of the instances."""
    return [instance.state for instance in status.instances]


@virtual
async def test_every_enabled_model_is_started_with_its_replicas() -> None:
    """A disabled one has no instance and is stopped."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a", replicas=2), model("off", enabled=False), model("b"))
    await stage.engine(3)
    assert [status.spec.id for status in reconciler.models()] == ["a", "off", "b"]
    assert sorted(engine.place.instance for engine in stage.launcher.engines) == ["a/0", "a/1", "b/0"]
    off = reconciler.model("off")
    assert (off.state, off.instances, off.diagnosis, off.updated_at) == (State.STOPPED, (), None, LONG_AGO)


@virtual
async def test_a_model_is_ready_with_its_first_ready_instance() -> None:
    """One of two is enough for requests, whatever the other does."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a", replicas=2, restart=Restart(max_failures=1)))
    one, other = await stage.engine(1), await stage.engine(2)
    assert reconciler.model("a").state is State.LOADING
    other.serves = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    await settle()
    one.die()
    await stage.until(lambda: State.ERROR in states(reconciler.model("a")))
    status = reconciler.model("a")
    assert (status.state, status.diagnosis, states(status)) == (State.READY, None, [State.ERROR, State.READY])
    assert (await stage.registry.acquire("a")).endpoint.port == other.place.port


@virtual
async def test_a_model_in_backoff_is_loading_and_says_why() -> None:
    """The reason of its crash is the model's reason until it is ready again."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a"))
    (await stage.engine()).die()
    await stage.until(lambda: reconciler.model("a").instances[0].phase is Phase.BACKOFF)
    status = reconciler.model("a")
    assert status.state is State.LOADING
    assert status.diagnosis is not None
    assert status.diagnosis.reason is Reason.CRASHED
    (await stage.engine(2)).serves = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    assert reconciler.model("a").diagnosis is None


@virtual
async def test_a_model_in_error_tells_requests_why() -> None:
    """What the status says is what who waits is told."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a"))
    engine = await stage.engine()
    request = asyncio.create_task(stage.registry.acquire("a"))
    await settle()
    engine.lines.append("vllm: error: unrecognized arguments: --wrong")
    engine.die(2)
    with pytest.raises(RequestError) as refused:
        await request
    status = reconciler.model("a")
    assert status.diagnosis is not None
    assert (status.state, status.diagnosis.reason) == (State.ERROR, Reason.INVALID_ARGUMENTS)
    assert status.diagnosis.message in refused.value.message
    assert "--wrong" in refused.value.message


@virtual
async def test_updated_at_is_that_of_the_latest_instance() -> None:
    """A model changed when the last of its instances did."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a", replicas=2))
    (await stage.engine(2)).serves = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    status = reconciler.model("a")
    assert status.updated_at == status.instances[1].updated_at > status.instances[0].updated_at
    assert status.created_at == LONG_AGO


@virtual
async def test_an_unknown_model_is_a_key_error() -> None:
    """The API makes a 404 of it."""
    stage = Stage()
    with pytest.raises(KeyError):
        reconciler_of(stage, model("a")).model("b")


@virtual
async def test_stop_ends_all_instances_at_the_same_time() -> None:
    """Ten slow engines take as long as one; who waits is told that the daemon stops, and one bad end spoils none."""
    stage = Stage()
    stage.launcher.teardown_seconds = 30
    stage.launcher.teardown_error = RuntimeError("a bug")
    reconciler = reconciler_of(stage, model("a", replicas=9), model("b"), model("off", enabled=False))
    await stage.engine(10)
    request = asyncio.create_task(stage.registry.acquire("a"))
    await settle()
    before = now()
    with capture_logs():
        await reconciler.stop()
    with pytest.raises(RequestError) as refused:
        await request
    assert refused.value.code == "shutting_down"
    assert [engine.buried for engine in stage.launcher.engines] == [before + 30] * 10
    assert {status.state for status in reconciler.models()} == {State.STOPPED}


@virtual
async def test_hurry_reaches_every_instance_that_drains() -> None:
    """One call, and nobody waits for requests any more."""
    stage = Stage()
    reconciler = reconciler_of(stage, model("a", replicas=2, drain_timeout=600))
    for number in (1, 2):
        (await stage.engine(number)).serves = True
    await stage.until(lambda: states(reconciler.model("a")) == [State.READY] * 2)
    await settle()
    ready = now()
    _leases = [await stage.registry.acquire("a") for _ in range(2)]
    stopping = asyncio.create_task(reconciler.stop())
    await passes(10)
    assert states(reconciler.model("a")) == [State.UNLOADING] * 2
    reconciler.hurry()
    await stopping
    assert [engine.buried for engine in stage.launcher.engines] == [pytest.approx(ready + 10)] * 2


@virtual
async def test_the_sentence_counts_the_ready_and_names_the_others() -> None:
    """Disabled models are not counted; what is ready is not named."""
    stage = Stage()
    reconciler = reconciler_of(
        stage, model("chat"), model("embed"), model("rank"), model("old"), model("off", enabled=False)
    )
    await stage.engine(4)
    assert sentence(reconciler) == "0 of 4 models ready; loading: chat, embed, rank, old"
    stage.launcher.engines[1].serves = True
    stage.launcher.engines[3].die(2)
    await stage.until(lambda: reconciler.model("old").state is State.ERROR)
    await stage.until(lambda: reconciler.model("embed").state is State.READY)
    assert sentence(reconciler) == "1 of 4 models ready; loading: chat, rank; error: old"
    stage.launcher.teardown_seconds = 10
    stopping = asyncio.create_task(reconciler.stop())
    await settle()
    assert sentence(reconciler) == "0 of 4 models ready; unloading: chat, embed, rank"
    await stopping
    assert sentence(reconciler) == "0 of 4 models ready"


@virtual
async def test_the_sentence_of_nothing_is_a_sentence() -> None:
    """A file without models is valid."""
    assert sentence(reconciler_of(Stage())) == "0 of 0 models ready"
