"""What is shown of devices, and of who waits for them: as JSON, as events, as metrics. In virtual time."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.api.test_metrics import Fleet, metrics_of, series
from tests.engine.virtual import Stage, passes, virtual
from tests.fleet.test_giving_way import GIB, Gpus, answered, model
from tests.fleet.test_model import begun
from vllm_proxy.api import devices
from vllm_proxy.api.events import Events
from vllm_proxy.api.feed import Feed
from vllm_proxy.api.happenings import Happenings
from vllm_proxy.domain.inventory import Foreign
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.model import Model
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.traffic.lease import Lease

NEED = pytest.approx(6 * GIB, abs=1e6)


class Shown:
    """Two models on a GPU of 10 GiB, another program, and who is told of it."""

    def __init__(self, **keys: Any) -> None:  # noqa: ANN401 - of the device
        self.gpus = Gpus()
        self.change(**keys)
        self.stage = Stage(self.gpus)
        self.chat, self.code = begun(self.stage, model("chat", yield_timeout=0)), begun(self.stage, model("code"))
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        room = self.stage.loop.room
        reconciler: Any = SimpleNamespace(room=room, listen=lambda _: None)
        desired: Any = SimpleNamespace(listen=lambda _: None)
        happenings = Happenings(lambda _: True)
        self.events = Events(cast("Reconciler", reconciler), cast("Desired", desired), happenings, cast("Feed", None))

    def change(self, **keys: Any) -> None:  # noqa: ANN401 - as above
        """The device is like this now."""
        self.gpus.seen["0"] = replace(self.gpus.seen["0"], **keys)

    def device(self) -> Any:  # noqa: ANN401 - JSON
        """The only one."""
        (found,) = devices.shown(self.stage.loop.room)
        return found

    def holds(self) -> list[tuple[str, str]]:
        """Who has it, and what each does."""
        return [(hold["instance"], hold["standing"]) for hold in self.device()["holds"]]

    def told(self) -> list[Any]:
        """The data of the events since this was asked last."""
        found = []
        while not self.queue.empty():
            event = self.queue.get_nowait() or b""
            kind, _, data = event.decode().partition("\n")
            assert kind == "event: device"
            found.append(json.loads(data.removeprefix("data: ")))
        return found

    async def gives_way(self) -> tuple[Lease, asyncio.Task[Lease]]:
        """Chat has a request in flight, and gives way to code, for which one waits."""
        running = await answered(self.stage, "chat")
        waiting = asyncio.create_task(answered(self.stage, "code"))
        await passes(40)
        return running, waiting


@virtual
async def test_a_device_says_who_has_it_what_they_do_and_who_is_next() -> None:
    """From the wish to start on; what it needs counts, contexts included; what becomes free is promised."""
    shown = Shown(free=GIB * 8, foreign=(Foreign(7, "python", GIB),))
    found = shown.device()
    assert (found["id"], found["index"], found["name"], found["kind"]) == ("GPU-0", 0, "GPU", "gpu")
    assert (found["total"], found["free"], found["unified"]) == (10 * GIB, 8 * GIB, False)
    assert found["foreign"] == [{"pid": 7, "name": "python", "bytes": GIB}]
    assert (found["holds"], found["promised_to"]) == ([], None)
    running, waiting = await shown.gives_way()
    found = shown.device()
    assert found["holds"] == [{"instance": "chat/0", "bytes": NEED, "standing": "yields"}]
    assert found["promised_to"] == "code/0"
    running.__exit__()
    with await waiting:
        assert shown.holds() == [("code/0", "serves")]
        assert shown.device()["promised_to"] is None


@virtual
async def test_what_is_kept_back_is_said_too() -> None:
    """By `reserve` and by `limit`: what engines may have is the rest."""
    shown = Shown()
    kept: list[tuple[dict[str, Any], int]] = [({"reserve": GIB}, GIB), ({"limit": {"0": 4 * GIB}}, 6 * GIB)]
    for rules, size in kept:
        shown.gpus.rules = Gpus().rules.model_copy(update=rules)
        assert shown.device()["reserve"] == size


@virtual
async def test_what_an_earlier_daemon_left_holds_its_memory_under_its_own_name() -> None:
    """It is on its way out."""
    shown = Shown()
    left = shown.stage.loop.room.leave("old/0", {"0": 2 * GIB})
    assert shown.device()["holds"] == [{"instance": "old/0", "bytes": 2 * GIB, "standing": "goes"}]
    left.done()
    assert shown.holds() == []


@virtual
async def test_where_nobody_manages_devices_there_are_none() -> None:
    """And the reason is said."""
    shown = Shown()
    shown.gpus.seen = {}
    assert devices.shown(shown.stage.loop.room) == []


@virtual
async def test_an_event_tells_who_has_a_device_and_who_is_next() -> None:
    """Each change once, with all that `GET /devices` says of it; whoever reads gets nothing that has not changed."""
    shown = Shown()
    shown.events.add(shown.queue)
    running, waiting = await shown.gives_way()
    told = [[hold["standing"] for hold in event["holds"]] + [event["promised_to"]] for event in shown.told()]
    assert told == [["comes", None], ["serves", None], ["yields", "code/0"]]
    running.__exit__()
    with await waiting:
        assert shown.told()[-1] == shown.device()


@virtual
async def test_a_little_more_or_less_that_is_free_is_no_event() -> None:
    """A hundredth of the device is; however slowly it comes."""
    shown = Shown(free=8 * GIB)
    shown.events.add(shown.queue)
    for free in (8.0, 8.05, 8.09, 8.11, 8.15, 8.22, None):
        shown.change(free=None if free is None else int(free * GIB))
        shown.stage.loop.room.look()
    assert [event["free"] and round(event["free"] / GIB, 2) for event in shown.told()] == [8.11, 8.22, None]


@virtual
async def test_nobody_who_reads_costs_nothing_and_who_comes_later_is_told_what_changes_from_then_on() -> None:
    """Of what was before, `GET /devices` tells."""
    shown = Shown(free=8 * GIB)
    shown.change(free=4 * GIB)
    shown.stage.loop.room.look()
    shown.events.add(shown.queue)
    shown.stage.loop.room.look()
    assert shown.told() == []
    shown.change(free=2 * GIB)
    shown.stage.loop.room.look()
    assert [event["free"] for event in shown.told()] == [2 * GIB]


def waits(model: Model) -> tuple[Any, ...]:
    """For what a model waits."""
    assert model.waits is not None
    return model.waits.needs, model.waits.waits_for, model.waits.behind


@virtual
async def test_a_model_says_what_it_needs_for_whom_it_waits_and_behind_whom() -> None:
    """While nothing of it serves or loads; in one sentence too, which is what a person reads."""
    shown = Shown()
    late = begun(shown.stage, model("late"))
    assert (shown.code.waits, shown.code.message) == (None, None)
    running, waiting = await shown.gives_way()
    third = asyncio.create_task(answered(shown.stage, "late"))
    await passes(1)
    assert waits(shown.code) == (NEED, ("chat/0",), ())
    assert waits(late)[2] == ("code/0",)
    assert shown.code.message == "waits for 6.0 GiB on GPU 0: chat gives way, 1 request in flight"
    assert shown.chat.message is not None
    assert shown.chat.message.startswith("gave way to code at ")
    running.__exit__()
    with await waiting:
        assert shown.code.waits is None
    with await third:
        pass


@virtual
async def test_devices_and_swaps_are_in_the_metrics() -> None:
    """By device as models name it, and by models of the file; what cannot be measured has no series."""
    ours = {"chat/0": 6 * GIB, "code/0": 6 * GIB}
    shown = Shown(free=8 * GIB, held=ours, foreign=(Foreign(7, "python", GIB),))
    fleet = Fleet("chat", "code")
    fleet.room = shown.stage.loop.room
    metrics = metrics_of(fleet)
    running, waiting = await shown.gives_way()
    running.__exit__()
    shown.change(free=None)
    with await waiting:
        found = await series(metrics)
    memory = {name: value for name, value in found.items() if name.startswith("vllm_proxy_device_memory_bytes")}
    assert memory == {
        'vllm_proxy_device_memory_bytes{device="0",kind="total"}': 10 * GIB,
        'vllm_proxy_device_memory_bytes{device="0",kind="held"}': NEED,
        'vllm_proxy_device_memory_bytes{device="0",kind="foreign"}': GIB,
    }
    assert found['vllm_proxy_evictions_total{depth="stop",for="code",model="chat"}'] == 1
    assert found['vllm_proxy_swaps_total{how="cold",model="code"}'] == 1
    assert found['vllm_proxy_swap_seconds_count{how="cold"}'] == 1
    assert found['vllm_proxy_swap_overhead_seconds_count{how="cold"}'] == 1
    assert found['vllm_proxy_room_wait_seconds_count{model="code"}'] == 1
    assert found['vllm_proxy_wanted_seconds_total{device="0",doing="serving"}'] == pytest.approx(30, abs=1)


@virtual
async def test_time_that_goes_on_is_counted_whenever_somebody_looks() -> None:
    """A device that drains for minutes is seen to do so meanwhile."""
    shown = Shown()
    fleet = Fleet("chat", "code")
    fleet.room = shown.stage.loop.room
    running, waiting = await shown.gives_way()
    draining = 'vllm_proxy_wanted_seconds_total{device="0",doing="draining"}'
    before = (await series(metrics_of(fleet)))[draining]
    await passes(25)
    assert (await series(metrics_of(fleet)))[draining] == before + 25
    running.__exit__()
    with await waiting:
        pass
