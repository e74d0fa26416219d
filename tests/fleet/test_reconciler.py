"""A model's status follows from its instances; the fleet in one sentence follows from the models."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import Stage, model, now, passes, settle, virtual
from vllm_proxy.domain.adapters import Adapter, Lora
from vllm_proxy.domain.command import fingerprint
from vllm_proxy.domain.config import Config, EngineDefaults, ModelSpec, Policy, Restart, Server
from vllm_proxy.domain.lifecycle import Phase, Reason, State
from vllm_proxy.domain.plan import Action, plan
from vllm_proxy.domain.progress import Progress
from vllm_proxy.engine.proc import look_up
from vllm_proxy.engine.state import EngineRecord, StateDirectory
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.orphans import classify, loras
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.status import sentence


def reconciler_of(
    stage: Stage, folder: Path, *models: ModelSpec, server: Server | None = None, records: tuple[EngineRecord, ...] = ()
) -> Reconciler:
    """A started reconciler, which tells the stage of every change."""
    config = Config("abc", server or Server(), EngineDefaults(), {spec.id: spec for spec in models})
    with StateDirectory(folder / "state") as state:
        for record in records:
            state.record(record)
    reconciler = Reconciler(config, stage.shared, StateDirectory(folder / "state"), lambda spec: spec.model)
    reconciler.listen(lambda _: stage.moved())
    reconciler.start()
    return reconciler


def alive(instance: str = "a/0", **more: object) -> EngineRecord:
    """An engine on record that lives: this process stands in for it."""
    found = look_up(os.getpid())
    assert found is not None
    record = EngineRecord(
        instance, f"own-{instance}", found.pid, found.started, "127.0.0.1:9500", "secret", "/tmp/vp-nowhere", "",
        spec="some/model", started_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(record, **more)  # type: ignore[arg-type]


def states(found: Model) -> list[State]:
    """Those of the instances."""
    return [instance.state for instance in found.instances]


@virtual
async def test_every_enabled_model_is_started_with_its_replicas(tmp_path: Path) -> None:
    """A disabled one has no instance and is stopped."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2), model("off", enabled=False), model("b"))
    await stage.engine(3)
    assert [status.spec.id for status in reconciler.models()] == ["a", "off", "b"]
    assert sorted(engine.place.instance for engine in stage.launcher.engines) == ["a/0", "a/1", "b/0"]
    off = reconciler.model("off")
    assert (off.state, off.instances, off.diagnosis, off.updated_at) == (State.STOPPED, (), None, off.created_at)


@virtual
async def test_a_model_is_ready_with_its_first_ready_instance(tmp_path: Path) -> None:
    """One of two is enough for requests, whatever the other does."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2, restart=Restart(max_failures=1)))
    one, other = await stage.engine(1), await stage.engine(2)
    assert reconciler.model("a").state is State.LOADING
    other.listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    await settle()
    one.die()
    await stage.until(lambda: State.ERROR in states(reconciler.model("a")))
    status = reconciler.model("a")
    assert (status.state, status.diagnosis, states(status)) == (State.READY, None, [State.ERROR, State.READY])
    assert (await stage.registry.acquire("a")).endpoint.address == other.place.address


@virtual
async def test_a_model_in_backoff_is_loading_and_says_why(tmp_path: Path) -> None:
    """The reason of its crash is the model's reason until it is ready again."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"))
    (await stage.engine()).die()
    await stage.until(lambda: reconciler.model("a").instances[0].phase is Phase.BACKOFF)
    status = reconciler.model("a")
    assert status.state is State.LOADING
    assert status.diagnosis is not None
    assert status.diagnosis.reason is Reason.CRASHED
    (await stage.engine(2)).listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    assert reconciler.model("a").diagnosis is None


@virtual
async def test_a_model_in_error_tells_requests_why(tmp_path: Path) -> None:
    """What the status says is what who waits is told."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"))
    engine = await stage.engine()
    request = asyncio.create_task(stage.registry.acquire("a"))
    await settle()
    engine.output.lines.append("vllm: error: unrecognized arguments: --wrong")
    engine.die(2)
    with pytest.raises(RequestError) as refused:
        await request
    status = reconciler.model("a")
    assert status.diagnosis is not None
    assert (status.state, status.diagnosis.reason) == (State.ERROR, Reason.INVALID_ARGUMENTS)
    assert status.diagnosis.message in refused.value.message
    assert "--wrong" in refused.value.message


@virtual
async def test_updated_at_is_that_of_the_latest_instance(tmp_path: Path) -> None:
    """A model changed when the last of its instances did."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2))
    (await stage.engine(2)).listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    status = reconciler.model("a")
    assert status.updated_at == status.instances[1].updated_at > status.instances[0].updated_at


@virtual
async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    """404 with its name."""
    with pytest.raises(RequestError, match="'b'") as refused:
        reconciler_of(Stage(), tmp_path, model("a")).model("b")
    assert refused.value.code == "model_not_found"


@virtual
async def test_stop_ends_all_instances_at_the_same_time(tmp_path: Path) -> None:
    """Ten slow engines take as long as one; who waits is told that the daemon stops, and one bad end spoils none."""
    stage = Stage()
    stage.launcher.teardown_seconds = 30
    stage.launcher.teardown_error = RuntimeError("a bug")
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=9), model("b"), model("off", enabled=False))
    await stage.engine(10)
    request = asyncio.create_task(stage.registry.acquire("a"))
    await settle()
    before = now()
    with capture_logs():
        await reconciler.stop()
    with pytest.raises(RequestError) as refused:
        await request
    assert refused.value.code == "shutting_down"
    assert [engine.reaped_at for engine in stage.launcher.engines] == [before + 30] * 10
    assert {found.state for found in reconciler.models()} == {State.STOPPED}


@virtual
async def test_hurry_reaches_every_instance_that_drains(tmp_path: Path) -> None:
    """One call, and nobody waits for requests any more."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2, drain_timeout=600))
    for number in (1, 2):
        (await stage.engine(number)).listens = True
    await stage.until(lambda: states(reconciler.model("a")) == [State.READY] * 2)
    await settle()
    ready = now()
    _leases = [await stage.registry.acquire("a") for _ in range(2)]
    stopping = asyncio.create_task(reconciler.stop())
    await passes(10)
    assert states(reconciler.model("a")) == [State.UNLOADING] * 2
    reconciler.skip_drain()
    await stopping
    assert [engine.reaped_at for engine in stage.launcher.engines] == [pytest.approx(ready + 10)] * 2


@virtual
async def test_the_sentence_counts_the_ready_and_names_the_others(tmp_path: Path) -> None:
    """Those that are disabled or stopped by hand are not counted; what is ready is not named, what sleeps is so."""
    stage = Stage()
    models = model("chat"), model("embed"), model("rank"), model("old"), model("off", enabled=False)
    reconciler = reconciler_of(stage, tmp_path, *models, model("rare", start="on-demand"))
    await stage.engine(4)
    await settle()
    phases = ", ".join(f"{name} (importing)" for name in ("chat", "embed", "rank", "old"))
    assert sentence(reconciler) == f"0 of 4 models ready; loading: {phases}; on demand: rare"
    stage.launcher.engines[1].listens = True
    stage.launcher.engines[3].die(2)
    await stage.until(lambda: reconciler.model("old").state is State.ERROR)
    await stage.until(lambda: reconciler.model("embed").state is State.READY)
    loading = "loading: chat (importing), rank (importing)"
    assert sentence(reconciler) == f"1 of 4 models ready; {loading}; error: old; on demand: rare"
    reconciler.model("embed").stop()
    await stage.until(lambda: reconciler.model("embed").state is State.STOPPED)
    assert sentence(reconciler) == f"0 of 3 models ready; {loading}; error: old; stopped: embed; on demand: rare"
    stage.launcher.teardown_seconds = 10
    stopping = asyncio.create_task(reconciler.stop())
    await settle()
    assert "unloading: chat, rank" in sentence(reconciler)
    await stopping


@virtual
async def test_the_sentence_says_how_far_a_start_is_and_how_long_it_may_take(tmp_path: Path) -> None:
    """The fraction of the phase, and what is left of the time that the last starts of the same spec took."""
    stage = Stage()
    with StateDirectory(tmp_path / "state") as state:
        state.add_start("some/model", 100)
    reconciler = reconciler_of(stage, tmp_path, model("chat"))
    (await stage.engine()).output.progress = Progress(Phase.LOADING_WEIGHTS, 0.4)
    await passes(1)
    assert sentence(reconciler) == "0 of 1 models ready; loading: chat (loading_weights 40%, about 99 s left)"


@virtual
async def test_the_sentence_of_nothing_is_a_sentence(tmp_path: Path) -> None:
    """A file without models is valid."""
    assert sentence(reconciler_of(Stage(), tmp_path)) == "0 of 0 models ready"


# Adoption


@virtual
async def test_an_engine_on_record_that_fits_is_adopted_and_no_other_is_started(tmp_path: Path) -> None:
    """It serves at once, without a wait for its GPU."""
    stage = Stage()
    reconciler = reconciler_of(
        stage, tmp_path, model("b", devices=(0,)), model("a", devices=(0,)), records=(alive(ready=True),)
    )
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    await stage.engine(2)
    assert sorted(engine.place.instance for engine in stage.launcher.engines) == ["a/0", "b/0"]
    (adopted,) = [engine for engine in stage.launcher.engines if engine.place.instance == "a/0"]
    assert (adopted.place.address.port, adopted.was_ready, now() < 1) == (9500, True, True)
    assert not (tmp_path / "state" / "starts.toml").exists(), "no start to learn from"


@virtual
async def test_an_adopted_engine_that_still_loads_goes_on_loading(tmp_path: Path) -> None:
    """The next daemon waits for it as the one before did, and keeps others off its GPU."""
    stage = Stage()
    stage.launcher.adopted_listen = False
    models = model("a", devices=(0,)), model("b", devices=(0,))
    reconciler = reconciler_of(stage, tmp_path, *models, records=(alive(),))
    await passes(100)
    assert [engine.place.instance for engine in stage.launcher.engines] == ["a/0"]
    assert reconciler.model("b").instances[0].phase is Phase.QUEUED
    stage.launcher.engines[0].listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    assert (await stage.engine(2)).place.instance == "b/0"


@virtual
async def test_an_adopted_engine_that_does_not_answer_any_more_is_replaced(tmp_path: Path) -> None:
    """It has nothing to load: thirty seconds are enough to know that it hangs."""
    stage = Stage()
    stage.launcher.adopted_listen = False
    reconciler = reconciler_of(stage, tmp_path, model("a", startup_timeout=10_000), records=(alive(ready=True),))
    second = await stage.engine(2)
    assert stage.launcher.engines[0].reaped_at == pytest.approx(30, abs=1)
    last = reconciler.model("a").instances[0].last_exit
    assert last is not None
    assert last.diagnosis.reason is Reason.STALLED
    second.listens = True
    await stage.until(lambda: reconciler.model("a").state is State.READY)


@virtual
async def test_an_adopted_engine_of_an_on_demand_model_stays_up(tmp_path: Path) -> None:
    """Its model does not wait for a request; it sleeps when nobody has asked for it for idle_timeout."""
    stage = Stage()
    spec = model("a", start="on-demand", idle_timeout=60)
    reconciler = reconciler_of(stage, tmp_path, spec, records=(alive(ready=True),))
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    await stage.until(lambda: reconciler.model("a").state is State.STOPPED)
    assert now() == pytest.approx(60, abs=1)


@pytest.mark.parametrize(
    "record",
    [
        alive(spec="another/model"),
        alive("b/0"),
        alive("off/0"),
        alive("a/b/0"),
        alive(started=1),
        alive(pid=2**22 + 1),
    ],
)
def test_an_engine_that_is_not_what_the_file_asks_for_is_not_adopted(record: EngineRecord) -> None:
    """Another spec, a model that is gone or disabled, another process, a dead one."""
    models = {"a": model("a"), "off": model("off", enabled=False)}
    adoptable, others = classify([record], models, lambda spec: spec.model)
    assert ([one for mine in adoptable.values() for one in mine], others) == ([], [record])


def test_of_too_many_engines_as_many_as_replicas_are_adopted() -> None:
    """Those that have served first; an index that is high alone is no reason."""
    zero, one, two = (alive(f"a/{index}", ready=index > 0) for index in range(3))
    adoptable, others = classify([zero, one, two], {"a": model("a", replicas=2)}, lambda spec: spec.model)
    assert (adoptable["a"], others) == ({1: one, 2: two}, [zero])


def test_of_two_engines_of_one_instance_the_one_that_has_served_is_adopted() -> None:
    """The other one, which a replacement was about to make or to end, goes."""
    new, old = alive(own_name="new"), alive(own_name="old", ready=True)
    for records in ([new, old], [old, new]):
        adoptable, others = classify(records, {"a": model("a")}, lambda spec: spec.model)
        assert (adoptable["a"], others) == ({0: old}, [new])


@virtual
async def test_a_daemon_that_keeps_its_engines_leaves_them_alone(tmp_path: Path) -> None:
    """Requests in flight end first; then every engine, loading ones too, is left to the next daemon."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("a"), model("b"), server=Server(on_exit="keep"))
    (await stage.engine()).listens = True
    await stage.engine(2)
    await stage.until(lambda: reconciler.model("a").state is State.READY)
    await settle()
    lease = await stage.registry.acquire("a")
    stopping = asyncio.create_task(reconciler.stop())
    await passes(5)
    assert not stopping.done()
    with lease:
        pass
    await stopping
    assert [(engine.kept, engine.reaped_at) for engine in stage.launcher.engines] == [(True, None)] * 2
    assert {found.state for found in reconciler.models()} == {State.STOPPED}


# Engines of an earlier daemon that cannot be ended


@virtual
async def test_who_needs_what_an_earlier_daemon_left_waits_and_all_others_start(tmp_path: Path) -> None:
    """The same instance, and whoever shares a device; told as their reason, and in the sentence of the fleet."""
    stage = Stage()
    stage.launcher.unkillable |= {"a/0": "process 7 survives", "gone/0": "process 8 survives"}

    left = (
        alive(spec="another/model", devices=(), own_name="1"),
        alive("gone/0", devices=("1",), own_name="2"),
        alive("dead/0", devices=("3",), own_name="3"),
    )
    models = model("a"), model("b", devices=(0, 1)), model("c", devices=(2, 3)), model("d")
    reconciler = reconciler_of(stage, tmp_path, *models, records=left)
    await stage.engine(2)
    await passes(100)
    assert sorted(engine.place.instance for engine in stage.launcher.engines) == ["c/0", "d/0"]
    for name, other in (("a", "a/0"), ("b", "gone/0")):
        waiting = reconciler.model(name)
        assert waiting.diagnosis is not None
        assert (waiting.state, waiting.diagnosis.reason) == (State.LOADING, Reason.NOT_ENDED)
        assert waiting.diagnosis.message.startswith(f"waits: {other} could not be ended: process")
    assert sentence(reconciler).endswith("; not ended: a/0, gone/0")
    stage.launcher.unkillable.clear()
    await stage.engine(4)
    assert reconciler.not_ended() == {}


@virtual
async def test_an_engine_of_an_older_daemon_whose_devices_are_not_known_keeps_all_of_them(tmp_path: Path) -> None:
    """Its record does not say; a start without any device is not concerned."""
    stage = Stage()
    stage.launcher.unkillable["gone/0"] = "process 7 survives"

    models = model("a", devices=(0,)), model("b")
    reconciler_of(stage, tmp_path, *models, records=(alive("gone/0"),))
    await stage.engine()
    await passes(100)
    assert [engine.place.instance for engine in stage.launcher.engines] == ["b/0"]


@virtual
async def test_a_stop_does_not_wait_for_ever_for_what_cannot_be_ended(tmp_path: Path) -> None:
    """Neither for an engine of ours nor for one of an earlier daemon; both are still named behind it."""
    stage = Stage()
    stage.launcher.unkillable |= {"a/0": "process 7 survives", "gone/0": "process 8 survives"}

    reconciler = reconciler_of(stage, tmp_path, model("a"), records=(alive("gone/0"),))
    await stage.engine()
    await passes(10)
    await reconciler.stop()
    assert sorted(reconciler.not_ended()) == ["a/0", "gone/0"]
    assert reconciler.model("a").state is State.UNLOADING


@virtual
async def test_a_ready_model_says_that_one_of_its_instances_cannot_be_ended(tmp_path: Path) -> None:
    """It serves with the other one; nobody has to look for it among many instances."""
    stage = Stage()
    stage.launcher.unkillable["a/0"] = "process 7 survives"
    reconciler = reconciler_of(stage, tmp_path, model("a", replicas=2))
    for number in (1, 2):
        (await stage.engine(number)).listens = True
    await stage.until(lambda: states(reconciler.model("a")) == [State.READY] * 2)
    await settle()
    stage.launcher.engines[0].die()
    await passes(10)
    found = reconciler.model("a")
    assert found.diagnosis is not None
    assert (found.state, found.diagnosis.reason) == (State.READY, Reason.NOT_ENDED)


# Another file


def actions(reconciler: Reconciler, config: Config) -> tuple[Action, ...]:
    """The plan of a change."""
    return plan(config.models, reconciler.specs())


async def adopts(reconciler: Reconciler, *models: ModelSpec) -> None:
    """Follow a file of these models."""
    config = replace(reconciler.config, models={spec.id: spec for spec in models})
    await reconciler.adopt(config, actions(reconciler, config))


@pytest.mark.parametrize("others", [0, 200])
@virtual
async def test_who_comes_in_the_same_change_waits_for_who_leaves_its_device(tmp_path: Path, others: int) -> None:
    """However many models change at once, and wherever they stand in the file: nobody loads beside one that leaves."""
    stage = Stage()
    stage.launcher.teardown_seconds = 20
    many = [model(f"m{number}", start="on-demand") for number in range(others)]
    old = model("z", devices=(0,))
    reconciler = reconciler_of(stage, tmp_path, *many, old)
    (await stage.engine()).listens = True
    await stage.until(lambda: reconciler.model("z").state is State.READY)
    await settle()
    changed = [replace(spec, policy=Policy(start="on-demand", description="changed")) for spec in many]
    with capture_logs():
        await adopts(reconciler, model("a", devices=(0,)), *changed)
    new = await stage.engine(2)
    assert (new.place.instance, new.born) == ("a/0", stage.launcher.engines[0].reaped_at)


@pytest.mark.parametrize("how", ["never started", "stopped by hand", "in error"])
@virtual
async def test_a_model_that_runs_nothing_is_gone_when_the_change_is_adopted(tmp_path: Path, how: str) -> None:
    """Nobody has to ask twice, though the loop has many others to look at."""
    stage = Stage()
    many = [model(f"m{number}", start="on-demand") for number in range(200)]
    chat = model("chat", start="on-demand" if how == "never started" else "always")
    reconciler = reconciler_of(stage, tmp_path, chat, *many)
    if how == "stopped by hand":
        await stage.engine()
        reconciler.model("chat").stop()
        await stage.until(lambda: reconciler.model("chat").state is State.STOPPED)
    if how == "in error":
        (await stage.engine()).die(2)
        await stage.until(lambda: reconciler.model("chat").state is State.ERROR)
    for found in reconciler.models():
        stage.loop.changed(found)
    with capture_logs():
        await adopts(reconciler, *many)
    assert not reconciler.knows("chat")


@virtual
async def test_a_model_that_is_gone_and_back_begins_anew_when_the_old_one_has_ended(tmp_path: Path) -> None:
    """What is still told of the old one is nothing to the new one."""
    stage = Stage()
    stage.launcher.teardown_seconds = 30
    reconciler = reconciler_of(stage, tmp_path, model("chat"), model("b", start="on-demand"))
    (await stage.engine()).listens = True
    await stage.until(lambda: reconciler.model("chat").state is State.READY)
    await settle()
    old = reconciler.model("chat")
    with capture_logs():
        await adopts(reconciler, model("b", start="on-demand"))
        await adopts(reconciler, model("chat", replicas=2), model("b", start="on-demand"))
        assert reconciler.model("chat") is old
        await stage.engine(3)
    assert reconciler.model("chat") is not old
    assert [found.spec.id for found in reconciler.models()] == ["chat", "b"]
    stage.loop.changed(old)
    await passes(10)
    assert (old.state, len(stage.launcher.engines)) == (State.STOPPED, 3)


@virtual
async def test_requests_run_while_hundreds_of_models_follow_a_file_which_is_adopted_when_all_do(tmp_path: Path) -> None:
    """Who sees its revision sees no model of before it."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, *[model(f"m{number}", start="on-demand") for number in range(200)])
    await settle()
    changed = [model(f"m{number}", start="on-demand", description="new") for number in range(150)]
    before, seen = reconciler.config, []
    with capture_logs():
        adopting = asyncio.create_task(adopts(reconciler, *changed, model("new", start="on-demand")))
        while reconciler.config is before:
            seen.append({found.spec.policy.description for found in reconciler.models()})
            await asyncio.sleep(0)
        assert {found.spec.policy.description for found in reconciler.models() if not found.ends} == {"new", ""}
        await adopting
    assert {"new", ""} in seen, "it is done in several steps"
    assert [found.spec.id for found in reconciler.models()] == [*(f"m{number}" for number in range(150)), "new"]


@virtual
async def test_nothing_begins_when_the_daemon_stops_in_the_middle_of_a_change_of_many_models(tmp_path: Path) -> None:
    """Else what has just begun would be left behind."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, *[model(f"m{number}", start="on-demand") for number in range(200)])
    await settle()
    with capture_logs():
        many = [model(f"n{number}") for number in range(200)]
        adopting = asyncio.create_task(adopts(reconciler, *many))
        while not reconciler.knows("n0"):
            await asyncio.sleep(0)
        await reconciler.stop()
        await asyncio.wait({adopting})
    assert stage.launcher.engines == []
    assert not reconciler.knows("n199")


@virtual
async def test_a_bug_in_what_follows_a_file_is_told_to_who_adopts_it(tmp_path: Path) -> None:
    """It is no success; and the loop goes on."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("chat"))
    stage.registry.update = None  # type: ignore[assignment,method-assign]
    with capture_logs(), pytest.raises(TypeError):
        await adopts(reconciler, model("chat"))
    del stage.registry.update
    (await stage.engine()).listens = True
    await stage.until(lambda: reconciler.model("chat").state is State.READY)


@virtual
async def test_a_daemon_that_stops_has_nobody_wait_for_what_was_said_just_before(tmp_path: Path) -> None:
    """Neither a hand nor a change: nothing starts, and everybody has an answer."""
    stage = Stage()
    reconciler = reconciler_of(stage, tmp_path, model("chat", start="on-demand"))
    await settle()
    with capture_logs():
        adopting = asyncio.create_task(adopts(reconciler, model("chat"), model("new")))
        await asyncio.sleep(0)
        word = reconciler.model("chat").start()
        await reconciler.stop()
        await asyncio.wait({adopting, word})
        await asyncio.wait({asyncio.create_task(adopts(reconciler, model("late"))), reconciler.model("chat").start()})
    assert stage.launcher.engines == []


@pytest.mark.parametrize(("recorded", "waits"), [(("1",), True), (("0",), False), (("*",), False)])
@virtual
async def test_an_adopted_engine_that_loads_has_the_devices_of_its_record(
    tmp_path: Path, recorded: tuple[str, ...], *, waits: bool
) -> None:
    """Those that it was given, whatever the file says; the file's where the record does not say."""
    stage = Stage()
    stage.launcher.adopted_listen = False
    models = model("b", devices=(1,)), model("a", devices=(0,))
    reconciler_of(stage, tmp_path, *models, records=(alive(devices=recorded),))
    await passes(10)
    started = [engine.place.instance for engine in stage.launcher.engines]
    assert started == ["a/0"] if waits else ["a/0", "b/0"]


def test_an_engine_with_enough_room_for_adapters_is_adopted_as_it_is() -> None:
    """The model's engines have then what that one was started with; one with too little is another engine."""
    room, adapter = Lora(64, 4, 32), Adapter("support", "org/support", rank=8)
    wants = replace(model("a"), adapters={"support": adapter}).with_lora(None)
    found = alive(spec=fingerprint(wants.with_lora(room).engine, ""), lora=room)
    small = Lora(1, 1, 16)
    for spec in (wants, model("a")):
        models = {"a": spec.with_lora(room)}
        assert loras([found], {"a": spec}, lambda one: fingerprint(one, "")) == {"a": room}
        assert classify([found], models, lambda one: fingerprint(one, ""))[0] == {"a": {0: found}}
    less = replace(found, spec=fingerprint(model("a").with_lora(small).engine, ""), lora=small)
    other = replace(found, spec="another")
    for record in (less, other, replace(found, lora=None)):
        assert loras([record], {"a": wants}, lambda one: fingerprint(one, "")) == {}
        assert classify([record], {"a": wants}, lambda one: fingerprint(one, ""))[1] == [record]


@virtual
async def test_a_daemon_that_starts_keeps_the_room_of_the_engines_that_it_adopts(tmp_path: Path) -> None:
    """Adapters went while no daemon ran: the engine stays, and what follows is planned from what it has."""
    room = Lora(64, 4, 32)
    record = alive(spec="some/model", lora=room)
    reconciler = reconciler_of(Stage(), tmp_path, model("a"), model("b"), records=(record,))
    assert {name: spec.lora for name, spec in reconciler.specs().items()} == {"a": room, "b": None}
    assert reconciler.loras() == {"a": room, "b": None}
    assert reconciler.config.models["a"].lora == room
