"""What an engine was measured to have: it counts for that, and the next start of its spec knows it. In virtual time."""

from dataclasses import replace

import pytest

from tests.engine.virtual import Stage, now, passes, settle, virtual
from tests.fleet.test_giving_way import GIB, Gpus, model
from tests.fleet.test_model import begun
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.fleet.model import Model


class Measured:
    """Two models on a GPU of 10 GiB, and what a look would find of the engines on it."""

    def __init__(self) -> None:
        self.gpus = Gpus()
        self.stage = Stage(self.gpus)
        self.stage.loop.room.learned = lambda spec, size: self.stage.kept.note_memory(spec.model, size)
        self.held: dict[str, int] = {}

    def look(self, began: float | None = None, *, fails: bool = False) -> None:
        """The devices are looked at, from `began` on."""
        if not fails:
            self.gpus.seen["0"] = replace(self.gpus.seen["0"], held=dict(self.held))
            self.gpus.seen_at = now() if began is None else began
        self.stage.loop.room.look()

    def sizes(self) -> dict[str, int]:
        """Bytes that each engine counts for."""
        return {hold.name: hold.takes["0"] for hold in self.stage.loop.room.now().holds}

    async def serves(self, name: str) -> Model:
        """A model of 6 GiB that serves."""
        found = begun(self.stage, model(name, start="warm"))
        engines = len(self.stage.launcher.engines)
        (await self.stage.engine(engines + 1)).listens = True
        await self.stage.until(lambda: found.state is State.READY)
        await settle()
        return found


@virtual
async def test_an_engine_without_a_kv_cache_counts_for_what_it_has_and_leaves_the_rest_to_others() -> None:
    """It had to find 6 GiB, and keeps 2: a quarter more and 512 MiB are its. The other one comes beside it."""
    fleet = Measured()
    await passes(10)
    embed = await fleet.serves("embed")
    assert fleet.sizes() == {"embed/0": pytest.approx(6 * GIB, abs=1e6)}
    fleet.held["embed/0"] = 2 * GIB
    await passes(1)
    fleet.look()
    assert fleet.sizes() == {"embed/0": 3 * GIB}
    await fleet.serves("chat")
    assert embed.state is State.READY
    assert fleet.stage.kept.bytes == {"embed": 2 * GIB}


@virtual
async def test_only_a_look_that_began_after_it_served_counts() -> None:
    """One before has seen an engine that loads; one that fails has seen nothing, and the next one counts."""
    fleet = Measured()
    await passes(10)
    began = now()
    await fleet.serves("embed")
    assert fleet.stage.loop.room.is_asked()
    await passes(1)
    fleet.held["embed/0"] = GIB // 2
    fleet.look(began)
    fleet.look(fails=True)
    assert (fleet.stage.kept.bytes, fleet.stage.loop.room.is_asked()) == ({}, False)
    fleet.held["embed/0"] = 2 * GIB
    fleet.look()
    fleet.held["embed/0"] = 4 * GIB
    await passes(1)
    fleet.look()
    assert fleet.stage.kept.bytes == {"embed": 2 * GIB}


@virtual
async def test_what_cannot_be_measured_teaches_nothing() -> None:
    """Where a file is the source, or the machine's memory: the engine counts for what it needed."""
    fleet = Measured()
    await fleet.serves("embed")
    await passes(1)
    fleet.look()
    await passes(1)
    assert fleet.sizes() == {"embed/0": pytest.approx(6 * GIB, abs=1e6)}
    assert (fleet.stage.kept.bytes, fleet.stage.loop.room.is_asked()) == ({}, False)


@virtual
async def test_the_next_start_needs_what_the_last_engine_had() -> None:
    """One that has more of its GPU than it was to take, in a context that is larger than others, has to find that."""
    fleet = Measured()
    fleet.stage.kept.bytes["chat"] = 8 * GIB
    await fleet.serves("chat")
    assert fleet.sizes() == {"chat/0": 8 * GIB}


@virtual
async def test_an_engine_that_gives_way_sets_free_what_it_had() -> None:
    """It does not count for more again while it leaves."""
    fleet = Measured()
    await passes(10)
    embed = await fleet.serves("embed")
    fleet.held["embed/0"] = 2 * GIB
    await passes(1)
    fleet.look()
    fleet.stage.launcher.teardown_seconds = 5
    embed.stop()
    await fleet.stage.until(lambda: embed.state is State.UNLOADING)
    assert fleet.sizes() == {"embed/0": 3 * GIB}
