"""Adapters on a model's engines: loaded, changed and taken back while these serve, each alone. In virtual time."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.virtual import Stage, model, now, passes, place_of, settle, virtual
from vllm_proxy.domain.adapters import Adapter, Lora
from vllm_proxy.domain.config import ModelSpec, Policy
from vllm_proxy.domain.devices import NO_DEVICES
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.engine.adapters import Failed as Refusal
from vllm_proxy.engine.state import EngineRecord
from vllm_proxy.errors import RequestError
from vllm_proxy.fleet.adapters import AdapterNow
from vllm_proxy.fleet.model import Model

ROOM = Lora(16, 4, 16)


def spec_of(
    *adapters: Adapter | str, lora: Lora | None = ROOM, sleep: int | None = None, **policy: object
) -> ModelSpec:
    """A model with these adapters, whose files lie in folders of their names."""
    base = model("chat")
    found = [one if isinstance(one, Adapter) else Adapter(one, one, rank=8) for one in adapters]
    engine = base.engine.model_copy(update={"lora": lora, "sleep": sleep})
    return replace(
        base, engine=engine, policy=Policy.model_validate(policy), adapters={adapter.id: adapter for adapter in found}
    )


class Chat:
    """The model, with what an earlier daemon left of it."""

    def __init__(self, spec: ModelSpec, files: dict[str, str] | None = None, **records: EngineRecord) -> None:
        self.stage = Stage()
        self.engines = self.stage.adapters
        self.engines.files = {"sql": "sql-1", "law": "law-1"} if files is None else files
        self.model = Model(spec, self.stage.shared, self.stage.history(), self._changed)
        self.stage.registry.declare(spec, self.model.request)
        for record in records.values():
            self.stage.shared.adapters.expect(record.own_name)
        self.model.begin({int(record.instance[-1]): record for record in records.values()})

    def _changed(self, found: Model) -> None:
        registry, message = self.stage.registry, found.diagnosis.message if found.diagnosis else None
        registry.report("chat", found.state, message, stopped_by_hand=found.stopped_by_hand)
        registry.report_adapters("chat", found.adapters.problems())
        self.stage.moved()

    def become(self, spec: ModelSpec) -> None:
        """The file says something else."""
        self.stage.registry.update({"chat": spec})
        self.model.adopt_spec(spec)

    def listen(self) -> None:
        """Every engine that lives answers."""
        for engine in self.stage.launcher.engines:
            engine.listens = engine.reaped_at is None and not engine.exited.done()

    async def serves(self) -> None:
        """Until all instances serve."""

        def all_ready() -> bool:
            self.listen()
            return all(one.state is State.READY for one in self.model.instances)

        await self.stage.until(all_ready)
        await settle()

    async def until(self, *wanted: tuple[str, str]) -> None:
        """Until its adapters are in these states."""
        await self.stage.until(lambda: [(one.id, one.state) for one in self.now()] == [*wanted])

    def now(self) -> list[AdapterNow]:
        """What is shown of its adapters."""
        return self.model.adapters.now()

    async def served_by(self, name: str) -> str:
        """The instance that a request gets."""
        with await self.stage.registry.acquire(name) as lease:
            return lease.endpoint.instance

    def held(self, number: int = 0) -> dict[str, str]:
        """The contents that an engine holds, by adapter."""
        found = self.engines.held_now.get(f"engine-{number}", {})
        return {name: folder.name for name, folder in found.items()}


async def started(*adapters: Adapter | str, files: dict[str, str] | None = None) -> Chat:
    """The model serves."""
    chat = Chat(spec_of(*adapters), files)
    await chat.serves()
    return chat


@virtual
async def test_adapters_are_loaded_before_the_first_request_is_served() -> None:
    """Each of them, between the engine's readiness and its endpoint."""
    chat = Chat(spec_of("sql", "law"))
    await chat.stage.engine()
    assert [one.state for one in chat.now()] == ["loading", "loading"]
    await chat.serves()
    assert chat.now() == [AdapterNow("sql", "ready", None, (0,)), AdapterNow("law", "ready", None, (0,))]
    assert chat.stage.registry.find("chat").endpoints[0].adapters == {"sql", "law"}
    assert await chat.served_by("sql") == "chat/0"


@virtual
async def test_one_that_fails_is_in_error_alone_with_the_engines_sentence() -> None:
    """The base and the other serve; a start by hand tries it again."""
    chat = Chat(spec_of("sql", "law", "lost"))
    chat.engines.failures["sql"] = [Refusal("LoRA rank 64 is greater than max_lora_rank", answered=True)]
    await chat.serves()
    assert [(one.id, one.state) for one in chat.now()] == [("sql", "error"), ("law", "ready"), ("lost", "error")]
    assert [one.message for one in chat.now()] == [
        "LoRA rank 64 is greater than max_lora_rank", None, "cannot find lost",
    ]  # fmt: skip
    assert await chat.served_by("law") == await chat.served_by("chat") == "chat/0"
    with pytest.raises(RequestError, match="cannot serve sql: LoRA rank 64") as refused:
        await chat.served_by("sql")
    assert refused.value.code == "model_error"
    await passes(10_000)
    assert chat.engines.done.count("chat/0 + sql") == 1
    chat.engines.files["lost"] = "found"
    await chat.model.start()
    await chat.until(("sql", "ready"), ("law", "ready"), ("lost", "ready"))
    assert chat.engines.done.count("chat/0 + law") == 1


@virtual
async def test_one_that_hangs_holds_up_neither_its_base_nor_another() -> None:
    """The endpoint opens after some seconds; what waits for the one that hangs waits on."""
    chat = Chat(spec_of("sql", "law"))
    chat.engines.load_seconds["sql"] = 100
    await chat.serves()
    assert 0 < now() < 30
    assert [(one.id, one.state) for one in chat.now()] == [("sql", "loading"), ("law", "ready")]
    assert await chat.served_by("law") == "chat/0"
    assert await chat.served_by("sql") == "chat/0"
    assert now() >= 100


@virtual
async def test_files_that_come_from_the_hub_are_not_waited_for() -> None:
    """The base serves while they are fetched."""
    chat = Chat(spec_of(Adapter("sql", "org/sql", is_hub_id=True)), {"org/sql": "sql-1"})
    chat.engines.copy_seconds["org/sql"] = 500
    await chat.serves()
    assert now() < 5
    assert await chat.served_by("sql") == "chat/0"
    assert now() >= 500


@virtual
async def test_adapters_come_change_and_go_while_their_base_serves() -> None:
    """No engine is started for that, and only what changed is touched."""
    chat = await started("sql")
    route = chat.stage.registry.find("chat")
    chat.become(spec_of("sql", "law"))
    assert await chat.served_by("law") == "chat/0"
    chat.engines.files["sql"] = "sql-2"
    chat.become(spec_of(Adapter("sql", "sql", rank=8, revision="2"), "law"))
    assert await chat.served_by("law") == "chat/0"
    await chat.stage.until(lambda: chat.held() == {"law": "law-1", "sql": "sql-2"})
    assert await chat.served_by("sql") == "chat/0"
    chat.become(spec_of("law"))
    await chat.stage.until(lambda: chat.held() == {"law": "law-1"})
    with pytest.raises(RequestError, match="sql"):
        await chat.served_by("sql")
    chat.become(spec_of("law", Adapter("sql", "sql", rank=8, revision="2", description="new words")))
    assert await chat.served_by("sql") == "chat/0"
    chat.become(spec_of("law", Adapter("sql", "sql", rank=8, revision="2", description="others")))
    await passes(10)
    assert chat.engines.done == [
        "chat/0 + sql", "chat/0 + law", "chat/0 - sql", "chat/0 + sql", "chat/0 - sql", "chat/0 + sql",
    ]  # fmt: skip
    assert len(chat.stage.launcher.engines) == 1
    assert route.accepts


@virtual
async def test_while_one_changes_its_requests_wait_and_those_of_the_base_do_not() -> None:
    """It is no longer offered before it is unloaded, and what was just sent is let through first."""
    chat = await started("sql")
    chat.engines.load_seconds["sql"] = 5
    chat.engines.files["sql"] = "sql-2"
    running = await chat.stage.registry.acquire("sql")
    chat.become(spec_of(Adapter("sql", "sql", rank=8, revision="2")))
    await passes(0.02)
    assert chat.held() == {"sql": "sql-1"}
    request = asyncio.create_task(chat.served_by("sql"))
    await passes(1)
    assert (await chat.served_by("chat"), request.done(), chat.held()) == ("chat/0", False, {})
    assert await request == "chat/0"
    assert chat.held() == {"sql": "sql-2"}
    with running:
        assert running.endpoint.in_flight == 1


@virtual
async def test_where_new_files_cannot_be_had_the_ones_before_serve_on() -> None:
    """It is ready, and says what is wrong; an engine that starts then is given them too, and they are not removed."""
    chat = await started("sql")
    chat.engines.files["law"] = chat.engines.files.pop("sql")
    chat.become(spec_of(Adapter("sql", "sql", revision="2")))
    await chat.stage.until(lambda: chat.now()[0].message is not None)
    assert chat.now() == [AdapterNow("sql", "ready", "cannot find sql", (0,))]
    assert await chat.served_by("sql") == "chat/0"
    chat.stage.launcher.engines[0].die()
    await chat.stage.engine(2)
    await passes(10)
    await chat.serves()
    assert (chat.held(1), chat.engines.removed) == ({"sql": "sql-1"}, set())


@virtual
async def test_a_change_that_the_engine_refuses_leaves_the_adapter_in_error() -> None:
    """Its name is free by then; other files are tried again."""
    chat = await started("sql")
    chat.engines.files["sql"] = "sql-2"
    chat.engines.failures["sql"] = [Refusal("it is broken", answered=True)]
    chat.become(spec_of(Adapter("sql", "sql", revision="2")))
    await chat.until(("sql", "error"))
    assert await chat.served_by("chat") == "chat/0"
    chat.engines.files["sql"] = "sql-3"
    chat.become(spec_of(Adapter("sql", "sql", revision="3")))
    await chat.until(("sql", "ready"))
    assert chat.held() == {"sql": "sql-3"}


@virtual
async def test_an_answer_that_is_not_clean_has_the_engine_asked_what_it_holds() -> None:
    """One that it holds after all serves."""
    chat = Chat(spec_of("sql"))
    chat.engines.failures["sql"] = [Refusal("no answer", answered=False)]
    chat.engines.held_now["engine-0"] = {"sql": Path("/snapshots/sql-1")}
    await chat.serves()
    await chat.until(("sql", "ready"))
    assert chat.engines.done == ["chat/0 + sql"]


@virtual
async def test_an_engine_that_dies_while_it_loads_puts_no_adapter_in_error() -> None:
    """Who waits for it waits for the next engine."""
    chat = await started()
    chat.engines.load_seconds["sql"] = 1
    chat.become(spec_of("sql"))
    request = asyncio.create_task(chat.served_by("sql"))
    await passes(0.5)
    chat.stage.launcher.engines[0].die()
    await chat.stage.engine(2)
    await chat.serves()
    assert await request == "chat/0"


@virtual
async def test_each_replica_is_given_them_and_one_that_has_them_serves() -> None:
    """The requests of an adapter that one instance refuses go to the other."""
    chat = Chat(spec_of("sql", replicas=2))
    chat.engines.failures["sql"] = [Refusal("it is full", answered=True)]
    await chat.serves()
    (shown,) = chat.now()
    assert (shown.state, shown.message) == ("ready", "it is full")
    assert len(shown.instances) == 1
    for _ in range(5):
        assert await chat.served_by("sql") == f"chat/{shown.instances[0]}"
    await chat.model.start()
    await chat.stage.until(lambda: chat.now() == [AdapterNow("sql", "ready", None, (0, 1))])


def record(number: int = 0, *, asleep: int = 0) -> EngineRecord:
    """An engine of an earlier daemon."""
    place = place_of(f"chat/{number}", number, NO_DEVICES)
    return EngineRecord(
        place.instance, place.own_name, 4242, 1, str(place.address), "secret", "/nowhere", "", ready=True, lora=ROOM,
        asleep=asleep,
    )  # fmt: skip


@virtual
async def test_an_adopted_engine_is_asked_what_it_holds_and_brought_to_what_is_wanted() -> None:
    """What is right is not touched; what is old is changed, what nobody wants goes, what is missing comes."""
    chat = Chat(spec_of("sql", "law", "new"), {"sql": "sql-1", "law": "law-2", "new": "new-1"}, one=record())
    chat.engines.held_now["engine-0"] = {
        "sql": Path("/snapshots/sql-1"), "law": Path("/snapshots/law-1"), "gone": Path("/elsewhere/gone"),
    }  # fmt: skip
    chat.engines.mute = 2
    await chat.serves()
    await chat.until(("sql", "ready"), ("law", "ready"), ("new", "ready"))
    assert sorted(chat.engines.done) == ["chat/0 + law", "chat/0 + new", "chat/0 - gone", "chat/0 - law"]
    assert chat.held() == {"sql": "sql-1", "law": "law-2", "new": "new-1"}


@virtual
async def test_an_engine_that_never_says_what_it_holds_serves_its_base_alone() -> None:
    """Its adapters say why; nothing is removed that it may use."""
    chat = Chat(spec_of("sql"), one=record())
    chat.engines.mute = 100
    await chat.serves()
    await chat.until(("sql", "error"))
    assert chat.now()[0].message == "cannot ask its engine which adapters it holds: it says nothing"
    assert await chat.served_by("chat") == "chat/0"
    chat.become(spec_of())
    chat.stage.shared.adapters.sweep_soon()
    await passes(100)
    assert chat.engines.removed == set()


@virtual
async def test_snapshots_stay_while_an_engine_lives_that_was_given_them() -> None:
    """One that was unloaded may be read again for a request in flight."""
    chat = await started("sql", "law")
    chat.become(spec_of("sql"))
    await chat.stage.until(lambda: chat.held() == {"sql": "sql-1"})
    chat.stage.shared.adapters.sweep_soon()
    await passes(10)
    assert chat.engines.removed == set()
    await chat.model.restart()
    await chat.stage.engine(2)
    await chat.serves()
    await passes(10)
    assert chat.engines.removed == {Path("/snapshots/law-1")}
    assert await chat.served_by("sql") == "chat/0"


@virtual
async def test_a_daemon_that_stops_leaves_the_snapshots_to_the_engines_that_it_leaves() -> None:
    """They live on, and may read theirs again."""
    chat = await started("sql")
    chat.stage.shared.adapters.close()
    await chat.model.end(keep=True)
    chat.stage.shared.adapters.sweep_soon()
    await passes(10)
    assert (chat.stage.launcher.engines[0].kept, chat.engines.removed) == (True, set())


@virtual
async def test_the_adapters_of_a_model_in_error_are_in_error() -> None:
    """With its reason: no instance will hold them."""
    chat = Chat(spec_of("sql", restart={"max_failures": 1}))
    (await chat.stage.engine()).die()
    await chat.stage.until(lambda: chat.model.state is State.ERROR)
    (shown,) = chat.model.adapters_now()
    assert (shown.state, shown.message) == ("error", chat.model.message)


@virtual
async def test_the_first_adapter_waits_for_engines_that_have_room_for_it() -> None:
    """It loads meanwhile; the old engine serves the base until then, and is given none."""
    chat = Chat(spec_of(lora=None))
    await chat.serves()
    chat.become(spec_of("sql"))
    request = asyncio.create_task(chat.served_by("sql"))
    await settle()
    assert chat.now() == [AdapterNow("sql", "loading", None, ())]
    await chat.stage.engine(2)
    await chat.serves()
    assert await request == "chat/0"
    assert chat.engines.done == ["chat/0 + sql"]


@virtual
async def test_where_the_engines_with_room_for_it_fail_the_adapter_says_so() -> None:
    """And the base serves as before."""
    chat = Chat(spec_of("sql", replace="surge"))
    await chat.serves()
    chat.become(spec_of("sql", Adapter("big", "law", rank=64), lora=Lora(64, 4, 16), replace="surge"))
    engine = await chat.stage.engine(2)
    assert [one.state for one in chat.now()] == ["ready", "loading"]
    engine.die()
    await chat.until(("sql", "ready"), ("big", "error"))
    message = chat.now()[1].message
    assert message is not None
    assert message.startswith("its rank 64 is more than the 16 that its engine was started for: the change failed")
    assert await chat.served_by("sql") == await chat.served_by("chat") == "chat/0"


@pytest.mark.parametrize("level", [1, 2])
@virtual
async def test_after_a_sleep_without_their_weights_they_are_given_again(level: int) -> None:
    """What sleeps with its weights has its adapters still; none is loaded while it sleeps."""
    chat = Chat(spec_of("sql", sleep=level, start="on-demand", idle_timeout=10))
    request = asyncio.create_task(chat.served_by("sql"))
    await chat.stage.engine()
    await chat.serves()
    assert await request == "chat/0"
    await chat.stage.until(lambda: chat.model.state is State.SLEEPING)
    chat.become(spec_of("sql", "law", sleep=level, start="on-demand", idle_timeout=10))
    await passes(5)
    assert chat.engines.done == ["chat/0 + sql"]
    assert await chat.served_by("law") == "chat/0"
    again = ["chat/0 - sql", "chat/0 + sql"] if level == 2 else []
    assert sorted(chat.engines.done) == sorted(["chat/0 + sql", "chat/0 + law", *again])
