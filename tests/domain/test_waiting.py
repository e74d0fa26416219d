"""Why an ask of the room waits, can never come, or is refused: the sentences that people read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from tests.simulation.checks import carried_out
from vllm_proxy.domain.eviction import Rules
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Kind, Short, Standing
from vllm_proxy.domain.room import Wait, decide
from vllm_proxy.domain.waiting import Situation, refusal, sentence, stuck_sentence

GIB = 2**30
NOW = 1000.0
COMES, SERVES, YIELDS, GOES, SLEEPS = Standing
TURNS = {"0": Device(), "1": Device()}
NOT_ENDED = "process 7 survives"


def gpus(*sizes: float, foreign: int = 0, free: float | None = None, kind: Kind = Kind.GPU) -> dict[str, Device]:
    """Devices of so many GiB, of which half a GiB is kept back."""
    made = {}
    for index, size in enumerate(sizes):
        total = round(size * GIB)
        measured = math.inf if free is None else free * GIB
        made[str(index)] = Device(total, total - GIB // 2, foreign * GIB, measured, kind)
    return made


def hold(name: str, size: float, standing: Standing = SERVES, on: str = "0", **more: object) -> Hold:
    """One that has so many GiB of each of these devices, and has been idle for very long."""
    keys = {"since": 0.0, "idle_since": 0.0, **more}
    return Hold(f"{name}/0", name, dict.fromkeys(on, round(size * GIB)), standing, **keys)  # type: ignore[arg-type]


def ask(name: str, size: float, since: float = NOW, on: str = "0", **more: object) -> Ask:
    """One that wants so many GiB."""
    return Ask(f"{name}/0", name, dict.fromkeys(on, round(size * GIB)), since=since, **more)  # type: ignore[arg-type]


def why(
    devices: Mapping[str, Device],
    holds: Sequence[Hold],
    *asks: Ask,
    in_flight: Mapping[str, int] | None = None,
    foreign: Mapping[str, Sequence[tuple[str, int]]] | None = None,
) -> str:
    """What is said of the last ask."""
    moves = decide(NOW, devices, holds, asks, Rules())
    after, _ = carried_out(holds, asks, moves)
    by_name = {one.name: one for one in after}
    last = asks[-1]
    what_is = Situation(NOW, devices, by_name, in_flight or {}, foreign or {})
    return sentence(last, moves.wait[last.name], what_is)


def test_who_gives_way_is_told_with_its_requests_in_flight() -> None:
    """As soon as it has been asked to go, and until it has gone."""
    chat = hold("chat", 70, idle_since=None)
    waits = ask("code", 12, 0)
    assert why(gpus(80), [hold("chat", 70)], waits) == "waits for 12.0 GiB on GPU 0: chat gives way"
    for flying, more in ((1, "1 request"), (2, "2 requests")):
        found = why(gpus(80), [chat], waits, in_flight={"chat/0": flying})
        assert found == f"waits for 12.0 GiB on GPU 0: chat gives way, {more} in flight"
    both = [hold("chat", 35, YIELDS, to=Depth.STOP), hold("embed", 35, YIELDS, to=Depth.STOP)]
    found = why(gpus(80), both, ask("code", 60), in_flight={"chat/0": 2, "embed/0": 1, "other/0": 9})
    assert found == "waits for 60.0 GiB on GPU 0: chat and embed give way, 3 requests in flight"
    assert why(gpus(80), [hold("chat", 70, GOES)], waits) == "waits for 12.0 GiB on GPU 0: chat is leaving"
    second = replace(hold("chat", 70, GOES), name="chat/1")
    assert why(gpus(80), [second], waits) == "waits for 12.0 GiB on GPU 0: chat/1 is leaving"


def test_when_one_may_give_way_is_told_as_the_longest_that_it_takes() -> None:
    """So it stays true while time passes, and the same for a while."""
    served = hold("chat", 70, since=NOW - 6.1, idle_since=NOW - 5.5)
    assert why(gpus(80), [served], ask("code", 12)) == "waits for 12.0 GiB on GPU 0: chat gives way within 5 s"
    busy = hold("chat", 70, since=0, idle_since=None)
    assert why(gpus(80), [busy], ask("code", 12, NOW - 1)).endswith("chat gives way within 30 s")
    young = hold("chat", 70, since=NOW, idle_since=None, start_seconds=1500.0)
    assert why(gpus(80), [young], ask("code", 12)).endswith("chat gives way within 1800 s")
    unknown = [hold("chat", 39, COMES), hold("embed", 39)]
    found = why(gpus(80), unknown, ask("code", 70))
    assert found == "waits for 70.0 GiB on GPU 0: embed gives way when it is time; chat loads there"


def test_one_that_loads_there_is_told() -> None:
    """vLLM measures the device meanwhile."""
    found = why(gpus(80), [hold("chat", 40, COMES)], ask("code", 12))
    assert found == "waits for 12.0 GiB on GPU 0: chat loads there"
    assert why(gpus(80), [], ask("chat", 40, 0), ask("code", 12)).endswith("GPU 0: chat loads there"), "just admitted"


def test_one_behind_others_is_told_behind_whom() -> None:
    """And for whom these wait."""
    first = ask("chat", 70, 0)
    found = why(gpus(80), [hold("old", 40, YIELDS, to=Depth.STOP)], first, ask("code", 12), in_flight={"old/0": 1})
    assert found == "waits for 12.0 GiB on GPU 0, behind chat: old gives way, 1 request in flight"
    devices = gpus(80, 80)
    rivals = [ask(name, 70, index, on="01", count=1) for index, name in enumerate(["chat", "embed"])]
    holds = [hold("a", 70, GOES, on="0", not_ended=NOT_ENDED), hold("b", 70, YIELDS, on="1", to=Depth.STOP)]
    found = why(devices, holds, rivals[0], rivals[1])
    assert found == f"waits for 70.0 GiB on one of 2 GPUs, behind chat: a could not be ended: {NOT_ENDED}; b gives way"


def test_an_engine_that_could_not_be_ended_is_told_first() -> None:
    """That may take for ever, whatever else is in the way."""
    lost = hold("chat", 40, GOES, not_ended=NOT_ENDED)
    found = why(gpus(80), [lost, hold("embed", 20, GOES)], ask("code", 30))
    assert found == f"waits for 30.0 GiB on GPU 0: chat could not be ended: {NOT_ENDED}; embed is leaving"


def test_what_has_to_be_gone_before_wherever_it_is_is_told() -> None:
    """Its own former engine; what an earlier daemon left, which nobody has tried to end."""
    own = replace(hold("code", 10, GOES), name="code/0")
    assert why(gpus(80), [own], ask("code", 12)) == "waits: its former engine is leaving"
    found = why(gpus(80), [replace(own, not_ended=NOT_ENDED)], ask("code", 12))
    assert found == f"waits: its former engine could not be ended: {NOT_ENDED}"
    left = hold("chat", 10, GOES, untried=True)
    found = why(gpus(80), [left], ask("code", 12))
    assert found == "waits: chat, which an earlier daemon left, is being ended"
    other = hold("embed", 10, GOES, untried=True)
    found = why(gpus(80), [left, other], ask("code", 12))
    assert found == "waits: chat and embed, which an earlier daemon left, are being ended"


def test_memory_of_other_programs_is_told_with_their_names() -> None:
    """The largest first; the sum says what engines have."""
    names = {"0": [("Xorg", GIB), ("python", 40 * GIB), ("a", GIB), ("b", GIB), ("c", GIB)]}
    found = why(gpus(80, foreign=44), [hold("chat", 10, always=True)], ask("code", 30, NOW), foreign=names)
    assert found == (
        "waits for 30.0 GiB on GPU 0: 25.5 of 80.0 are free: chat has 10.0, "
        "other programs have 44.0 (python 40.0, Xorg 1.0, a 1.0 and 2 more)"
    )
    found = why(gpus(80, foreign=70), [], ask("code", 30, pressing=False))
    assert found == "waits for 30.0 GiB on GPU 0: 9.5 of 80.0 are free: other programs have 70.0"


def test_what_a_sleeper_keeps_itself_is_not_missing() -> None:
    """It waits for memory of others to wake; of the rest nobody knows where it is."""
    asleep = hold("code", 10, SLEEPS)
    found = why(gpus(80, free=5), [hold("chat", 10), asleep], ask("code", 30, short=Short(NOW)))
    assert found.endswith("5.0 of 80.0 are free: chat has 10.0, 55.0 are not back yet, or others have them")
    found = why(gpus(30, free=5), [hold("chat", 15), asleep], ask("code", 15, short=Short(NOW)))
    assert "not back" not in found


def test_a_device_that_has_less_than_the_ledger_says_is_told() -> None:
    """Nobody knows where it is."""
    found = why(gpus(80, free=5), [hold("chat", 10)], ask("code", 30, short=Short(NOW)))
    sums = "5.0 of 80.0 are free: chat has 10.0, 65.0 are not back yet, or others have them"
    assert found == f"waits for 30.0 GiB on GPU 0: {sums}"
    found = why(gpus(80, 80, free=5), [], ask("code", 30, on="01", count=2))
    assert found.startswith(
        "waits for 30.0 GiB on each of GPU 0 and GPU 1: 5.0 of 80.0 are free on GPU 0: 75.0 are not back"
    )


def test_one_that_makes_nobody_go_waits_for_room_that_nobody_waits_for() -> None:
    """Unless somebody leaves anyway."""
    warm = ask("code", 12, pressing=False)
    found = why(gpus(80), [hold("chat", 70)], warm)
    assert found == "waits for 12.0 GiB on GPU 0, until there is room that nobody waits for"
    assert why(gpus(80), [hold("chat", 70, GOES)], warm).endswith("GPU 0: chat is leaving")


@pytest.mark.parametrize(
    ("size", "devices", "more", "wants"),
    [
        (70, gpus(80, 80), {"on": "01"}, "70.0 GiB on one of 2 GPUs"),
        (70, gpus(80, 80), {"on": "01", "count": 2}, "70.0 GiB on each of GPU 0 and GPU 1"),
        (70, gpus(80, 80, 80), {"on": "012", "count": 2}, "70.0 GiB on each of 2 of 3 GPUs"),
        (70, gpus(80, 80), {"on": "01", "only": ("1",)}, "70.0 GiB on GPU 1"),
        (70, gpus(80, kind=Kind.MEMORY), {}, "70.0 GiB of the machine's memory"),
        (70, gpus(80, 80, kind=Kind.MIG), {"on": "01"}, "70.0 GiB on one of 2 MIG devices"),
    ],
)
def test_what_it_waits_for_is_its_size_and_where(
    size: float, devices: dict[str, Device], more: dict[str, object], wants: str
) -> None:
    """Its place, once it has one; before, what it may run on."""
    holds = [hold(f"x{name}", 70, on=name) for name in devices]
    assert why(devices, holds, ask("code", size, pressing=False, **more)).startswith(f"waits for {wants},")  # type: ignore[arg-type]


def test_sizes_that_differ_by_device_and_names_that_are_uuids_are_told() -> None:
    """A share of each; MIG devices have no index."""
    devices = {"MIG-a": Device(20 * GIB, 20 * GIB, kind=Kind.MIG), "MIG-b": Device(10 * GIB, 10 * GIB, kind=Kind.MIG)}
    holds = [replace(hold("x", 0), takes={"MIG-a": 9 * GIB, "MIG-b": 9 * GIB})]
    warm = Ask("code/0", "code", {"MIG-a": 18 * GIB, "MIG-b": 9 * GIB}, pressing=False)
    assert why(devices, holds, warm).startswith("waits for 9.0 to 18.0 GiB on one of 2 MIG devices,")
    both = replace(warm, count=2, only=("MIG-a", "MIG-b"))
    assert why(devices, holds, both).startswith("waits for 18.0 GiB on MIG-a and 9.0 GiB on MIG-b,")


def test_where_engines_only_take_turns_the_one_in_the_way_is_told() -> None:
    """Nothing is known of such devices."""

    def turn(*holds: Hold, also: Sequence[Ask] = ()) -> str:
        waits = ask("b", 0, only=("0",))
        return why(TURNS, holds, *also, waits)

    assert turn(hold("first", 0, COMES)) == "waits: first/0 loads on what it needs"
    assert turn(hold("first", 0, GOES)) == "waits: first/0 is leaving what it needs"
    assert turn(hold("b", 0, GOES, on="1")) == "waits: b/0 is leaving what it needs"
    assert turn(hold("first", 0, GOES, untried=True)) == "waits: first/0, which an earlier daemon left, is being ended"
    lost = hold("first", 0, GOES, not_ended=NOT_ENDED)
    assert turn(lost) == f"waits: first/0 could not be ended: {NOT_ENDED}"
    gang = ask("gang", 0, 0, on="01", count=2, only=("0", "1"))
    assert turn(hold("first", 0, COMES, on="1"), also=[gang]) == "waits: gang/0 waits for what it needs"
    assert turn(also=[ask("a", 0, 0, only=("0",))]) == "waits: a/0 loads on what it needs", "just admitted"


# Stuck


@pytest.mark.parametrize(
    ("devices", "holds", "waits", "told"),
    [
        (
            gpus(79.15),
            [hold("chat", 40.02, always=True), hold("embed", 10)],
            ask("code", 60),
            "it needs 60.0 GiB on a GPU and 38.6 can be had: chat (always) has 40.0 of 79.2",
        ),
        (gpus(24), [], ask("code", 60), "it needs 60.0 GiB on a GPU and 23.5 can be had"),
        (
            gpus(80, 80),
            [hold("a", 30, on="0", always=True), hold("b", 50, on="1", always=True)],
            ask("code", 60, on="01"),
            "it needs 60.0 GiB on a GPU and 49.5 can be had: a (always) has 30.0 of 80.0",
        ),
        (
            gpus(80, 80),
            [hold("b", 50, on="1", always=True)],
            ask("code", 60, on="01", count=2),
            "it needs 60.0 GiB on each of 2 GPUs and 29.5 can be had of GPU 1: b (always) has 50.0 of 80.0",
        ),
        (
            gpus(80, 80),
            [hold("b", 50, on="0", always=True), hold("c", 20, on="0", always=True)],
            ask("code", 60, on="01", count=2, only=("0", "1")),
            (
                "it needs 60.0 GiB on each of GPU 0 and GPU 1 and 9.5 can be had of GPU 0: "
                "b (always) has 50.0 and c (always) has 20.0 of 80.0"
            ),
        ),
        (gpus(8, kind=Kind.MEMORY), [], ask("code", 9), "it needs 9.0 GiB of the machine's memory and 7.5 can be had"),
        (gpus(80), [], ask("code", 9, only=("7",)), "it needs GPU 7, and this machine has GPU 0"),
        (gpus(80), [], ask("code", 9, count=2), "it needs 2 devices, and this machine has GPU 0"),
        ({}, [], ask("code", 9), "it needs 1 device, and this machine has no device"),
        (
            gpus(80, 48),
            [],
            ask("code", 40, on="01", count=2),
            "it needs 40.0 GiB on each of 2 GPUs, all of one size, and this machine has not so many",
        ),
    ],
)
def test_one_that_can_never_come_is_told_with_the_sum(
    devices: dict[str, Device], holds: list[Hold], waits: Ask, told: str
) -> None:
    """Of the device that has most of what it wants, and of whom never gives way there."""
    assert decide(NOW, devices, holds, [waits], Rules()).stuck == (waits.name,)
    assert (
        stuck_sentence(waits, Situation(NOW, devices, {one.name: one for one in holds})) == f"cannot serve code: {told}"
    )


# Refused


def test_a_refusal_tells_the_sum_and_the_names_of_other_programs() -> None:
    """Of each device that is short."""
    devices, waits = gpus(24, foreign=11), ask("code", 12, short=Short(0.0))
    holds = [hold("chat", 8, always=True)]
    moves = decide(NOW, devices, holds, [waits], Rules())
    assert moves.refuse == ("code/0",)
    names = {"0": [("python", 11 * GIB)]}
    what_is = Situation(NOW, devices, {one.name: one for one in holds}, foreign=names)
    assert refusal(waits, moves.wait["code/0"], what_is) == (
        "it needs 12.0 GiB on GPU 0, and 4.5 of 24.0 are free: chat has 8.0, other programs have 11.0 (python 11.0)"
    )
    assert refusal(waits, Wait(("0",)), Situation(NOW, gpus(24, free=3), {})) == (
        "it needs 12.0 GiB on GPU 0, and 3.0 of 24.0 are free: 21.0 are not back yet, or others have them"
    )
