"""Who waits for a change is told when it has arrived at each instance, or which one is behind and why."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.virtual import Stage, model, settle, virtual
from tests.fleet.test_reconciler import reconciler_of
from vllm_proxy.domain.config import Config, EngineDefaults, ModelSpec, Restart, Server
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.domain.plan import plan
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.arrival import Arrivals
from vllm_proxy.fleet.reconciler import Reconciler


def changed(model_id: str) -> ModelSpec:
    """A model of which an engine key has changed."""
    spec = model(model_id)
    return replace(spec, engine=spec.engine.model_copy(update={"max_model_len": 99}))


async def adopt(reconciler: Reconciler, *models: ModelSpec) -> None:
    """The file is now of these models."""
    config = Config("def", Server(), EngineDefaults(), {spec.id: spec for spec in models})
    await reconciler.adopt(config, plan(config.models, reconciler.specs()))


async def ready(stage: Stage, reconciler: Reconciler, count: int = 1) -> None:
    """The first engines of `a` are."""
    for number in range(1, count + 1):
        (await stage.engine(number)).listens = True
    await stage.until(lambda: all(one.state is State.READY for one in reconciler.model("a").instances))


@virtual
async def test_a_wait_ends_when_the_new_engine_is_ready(tmp_path: Path) -> None:
    """Not while the old one serves, leaves, or the new one loads."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"))
    arrivals = Arrivals(reconciler)
    await ready(stage, reconciler)
    assert arrivals.behind("a") == []
    await adopt(reconciler, changed("a"))
    waiting = asyncio.create_task(arrivals.wait("a", 600))
    engine = await stage.engine(2)
    await settle()
    assert not waiting.done()
    assert [(one.name, one.comes) for one in arrivals.behind(None)] == [("a/0", True)]
    engine.listens = True
    assert await waiting == []


@virtual
async def test_a_wait_ends_at_its_deadline_and_says_how_far_it_is(tmp_path: Path) -> None:
    """The rollout goes on; who waits again sees its end."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"))
    arrivals = Arrivals(reconciler)
    (behind,) = await arrivals.wait("a", 5)
    assert (behind.name, behind.comes) == ("a/0", True)
    assert str(behind).startswith("a/0: loading (")
    waiting = asyncio.create_task(arrivals.wait("a", 600))
    (await stage.engine()).listens = True
    assert await waiting == []


@virtual
async def test_what_does_not_come_any_more_is_told_at_once(tmp_path: Path) -> None:
    """A replacement that failed, whose old engine came back, and a model in error; who is healthy is not named."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"), model("b", restart=Restart(max_failures=1)))
    arrivals = Arrivals(reconciler)
    first, second = await stage.engine(1), await stage.engine(2)
    first.listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    second.die()
    behind = await arrivals.wait(None, 600)
    assert [(one.name, one.comes) for one in behind] == [("b/0", False)]
    await adopt(reconciler, changed("a"))
    waiting = asyncio.create_task(arrivals.wait("a", 600))
    (await stage.engine(3)).die()
    (behind_a,) = await waiting
    assert (behind_a.name, behind_a.comes) == ("a", False)
    assert "what was ready before is kept" in behind_a.why


@virtual
async def test_fewer_replicas_none_and_no_model_are_waited_for(tmp_path: Path) -> None:
    """Until the engine that is too many has ended; a model that is gone from the file is then unknown."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2))
    arrivals = Arrivals(reconciler)
    await ready(stage, reconciler, 2)
    await adopt(reconciler, model("a", replicas=1))
    assert [one.comes for one in arrivals.behind("a")] == [True]
    assert await arrivals.wait("a", 600) == []
    assert [one.state for one in reconciler.model("a").instances if one.engine] == [State.READY]
    await adopt(reconciler)
    assert await arrivals.wait("a", 600) == []
    assert not reconciler.knows("a")


@virtual
async def test_a_model_that_waits_for_requests_need_not_run(tmp_path: Path) -> None:
    """Nothing is behind then; what a hand stopped is as asked, too."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", start="on-demand"), model("b"))
    await reconciler.model("b").stop()
    assert await Arrivals(reconciler).wait(None, 600) == []


@virtual
async def test_a_daemon_that_stops_keeps_nobody_waiting(tmp_path: Path) -> None:
    """They are told that the file has the change all the same."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"))
    waiting = asyncio.create_task(Arrivals(reconciler).wait("a", 600))
    await stage.engine()
    stopped = asyncio.create_task(reconciler.stop())
    with pytest.raises(RequestError, match="the daemon stops") as raised:
        await waiting
    assert raised.value.code == "shutting_down"
    await stopped
