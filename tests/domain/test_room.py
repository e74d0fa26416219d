"""Who gets room on the devices, where, and who goes for whom: one fact each."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.simulation.checks import settled
from vllm_proxy.domain.eviction import Plan, Planner, Rules
from vllm_proxy.domain.ledger import Ask, Depth, Device, Hold, Short, Standing
from vllm_proxy.domain.room import Moves, decide

GIB = 2**30
NOW = 1000.0
COMES, SERVES, YIELDS, GOES, SLEEPS = Standing
RULES = Rules()
OVERDUE = NOW - RULES.max_wait


def gpus(*sizes: int, foreign: int = 0) -> dict[str, Device]:
    """Devices of so many GiB: "0", "1", ..."""
    return {str(index): Device(size * GIB, size * GIB, foreign * GIB) for index, size in enumerate(sizes)}


def hold(name: str, size: int, standing: Standing = SERVES, on: str = "0", **more: object) -> Hold:
    """One that has so many GiB of each of these devices, and has been idle for very long."""
    keys = {"since": 0.0, "idle_since": 0.0, **more}
    return Hold(name, name, dict.fromkeys(on, size * GIB), standing, **keys)  # type: ignore[arg-type]


def ask(name: str, size: int, since: float = NOW, on: str = "0123", **more: object) -> Ask:
    """One that wants so many GiB of each of `count` devices among these."""
    return Ask(name, name, dict.fromkeys(on, size * GIB), since=since, **more)  # type: ignore[arg-type]


def moves(
    devices: dict[str, Device], holds: Sequence[Hold], *asks: Ask, rules: Rules = RULES, now: float = NOW
) -> Moves:
    """What is decided; that it keeps to what holds always, and says nothing new when asked again, is checked."""
    return settled(now, devices, holds, asks, rules)


def admitted(found: Moves) -> dict[str, str]:
    """Who comes, on which devices."""
    return {name: "".join(where) for name, where in found.admit.items()}


def gone(found: Moves) -> set[str]:
    """Who goes."""
    return {*found.go}


# Order


def test_the_first_who_asked_comes_first() -> None:
    """Where there is room for one alone."""
    assert admitted(moves(gpus(80), [], ask("a", 60, 990), ask("b", 60, 980))) == {"b": "0"}


def test_priority_comes_before_age() -> None:
    """Among those who press."""
    assert admitted(moves(gpus(80), [], ask("a", 60, 980), ask("b", 60, 990, priority=1))) == {"b": "0"}


def test_who_has_waited_too_long_comes_before_priority() -> None:
    """The oldest of them first; a timer may fire a moment too early."""
    rivals = [ask("p", 60, 995, priority=9), ask("b", 60, OVERDUE - 1, priority=1), ask("a", 60, OVERDUE - 2)]
    assert admitted(moves(gpus(80), [], *rivals)) == {"a": "0"}
    assert admitted(moves(gpus(80), [], rivals[0], ask("b", 60, OVERDUE + 5e-4))) == {"b": "0"}


def test_who_is_always_to_run_comes_before_all() -> None:
    """Even before one that has waited too long."""
    assert admitted(moves(gpus(80), [], ask("a", 60, 0), ask("b", 60, always=True))) == {"b": "0"}
    rivals = [ask("a", 60, 980, always=True), ask("b", 60, always=True, priority=1)]
    assert admitted(moves(gpus(80), [], *rivals)) == {"b": "0"}, "among them by priority"


def test_who_does_not_press_comes_last() -> None:
    """Whatever its age, its priority, and that it is always to run: another replica, say."""
    rivals = [ask("a", 60, 0, pressing=False, priority=9, always=True), ask("b", 60)]
    assert admitted(moves(gpus(80), [], *rivals)) == {"b": "0"}
    rivals[1] = replace(rivals[1], pressing=False)
    assert admitted(moves(gpus(80), [], *rivals)) == {"a": "0"}, "priority"
    rivals = [ask("a", 60, 5, pressing=False), ask("b", 60, 4, pressing=False)]
    assert admitted(moves(gpus(80), [], *rivals)) == {"b": "0"}, "age"


# Admission


def test_a_comer_is_alone_on_its_devices() -> None:
    """vLLM measures a device as a whole while it loads; what serves, drains or sleeps there moves nothing."""
    for standing, comes in ((COMES, False), (GOES, False), (SERVES, True), (YIELDS, True), (SLEEPS, True)):
        found = moves(gpus(80), [hold("a", 10, standing)], ask("b", 10))
        assert bool(found.admit) is comes, standing
    assert admitted(moves(gpus(80), [], ask("a", 10, 990), ask("b", 10))) == {"a": "0"}


def test_what_is_held_and_what_is_needed_fit_to_the_byte() -> None:
    """Memory of other programs counts as held."""
    assert moves(gpus(80), [hold("a", 60, always=True)], ask("b", 20)).admit
    assert not moves(gpus(80), [hold("a", 60, always=True)], replace(ask("b", 20), needs={"0": 20 * GIB + 1})).admit
    assert moves(gpus(80, foreign=40), [], ask("b", 40)).admit
    assert not moves(gpus(80, foreign=41), [], ask("b", 40)).admit


def test_devices_of_which_nothing_is_known_are_used_in_turn() -> None:
    """As without an inventory: nobody goes, and who needs several is not passed once it has waited too long."""
    free = {"0": Device(), "1": Device(), "2": Device()}
    wants = (("a", "0"), ("b", "01"), ("c", "1"), ("d", "2"))
    asks = [replace(ask(name, 0, on=on), only=tuple(on)) for name, on in wants]
    assert admitted(moves(free, [], *asks)) == {"a": "0", "d": "2"}
    found = moves(free, [hold("x", 0, COMES)], *asks)
    assert (admitted(found), gone(found)) == ({"c": "1", "d": "2"}, set())
    asks[1] = replace(asks[1], since=OVERDUE)
    found = moves(free, [hold("x", 0, COMES)], *asks)
    assert (admitted(found), found.wait["c"].behind) == ({"d": "2"}, ("b",))


def test_one_that_uses_no_device_comes_at_once() -> None:
    """There is nothing to wait for."""
    assert admitted(moves(gpus(80), [hold("a", 80, COMES)], Ask("b", "b", {}, 0))) == {"b": ""}
    assert admitted(moves({}, [], Ask("b", "b", {}, 0))) == {"b": ""}
    assert admitted(moves(gpus(80), [], Ask("b", "b", {}, 0, place=("0",)))) == {"b": ""}, "since its keys have changed"


def test_an_instance_waits_until_nothing_of_its_former_engine_is_left() -> None:
    """Wherever that is: its port and its folder are still taken."""
    found = moves(gpus(80, 80), [hold("a", 1, GOES, not_ended="process 7 survives")], ask("a", 10))
    assert (admitted(found), found.wait["a"].waits_for) == ({}, ("a",))
    assert found.wait["a"].not_ended == "process 7 survives"
    assert not moves(gpus(80, 80), [hold("a", 1, YIELDS)], ask("a", 10)).admit


def test_nothing_comes_before_it_was_tried_to_end_what_an_earlier_daemon_left() -> None:
    """What it has may be in use, wherever that is; nor does anybody go for it."""
    left = hold("a", 1, GOES, untried=True)
    for rest in ([], [hold("x", 80, on="1")]):
        found = moves(gpus(80, 80), [left, *rest], ask("b", 70, on="1"))
        assert (admitted(found), gone(found), found.wait["b"].waits_for) == ({}, set(), ("a",))


# Placement


def test_it_comes_where_the_fewest_compute() -> None:
    """Two that are busy on one GPU while another is idle is the worst placement."""
    holds = [hold("a", 10, on="0"), hold("b", 2, SLEEPS, on="1"), hold("c", 2, SLEEPS, on="1")]
    assert admitted(moves(gpus(80, 80), holds, ask("d", 10))) == {"d": "1"}


def test_then_where_the_fewest_sleep() -> None:
    """They will want their devices again, so models spread; who falls asleep counts, who ends or wakes does not."""
    asleep = hold("a", 2, SLEEPS, keeps=2 * GIB)
    assert admitted(moves(gpus(80, 80), [asleep], ask("b", 10))) == {"b": "1"}
    assert admitted(moves(gpus(80, 80), [asleep, hold("c", 2, SLEEPS, on="1")], ask("b", 10))) == {"b": "0"}
    falls = hold("a", 60, YIELDS, keeps=2 * GIB, to=Depth.SLEEP)
    ends = hold("e", 1, YIELDS, on="1", to=Depth.STOP)
    assert admitted(moves(gpus(80, 80), [falls, ends], ask("b", 10))) == {"b": "1"}
    wide = Hold("e", "e", dict.fromkeys("12", 2 * GIB), SLEEPS)
    found = moves(gpus(80, 80, 80), [asleep, wide], ask("c", 79, 980, only=("1",)), ask("b", 10, on="02"))
    assert (gone(found), admitted(found)) == ({"e"}, {"b": "2"})
    rest = [hold("c", 40, COMES, on="1"), hold("d", 2, SLEEPS, on="1")]
    found = moves(gpus(80, 80), [asleep, *rest], ask("a", 20, 980), ask("b", 10))
    assert (admitted(found), found.place) == ({"a": "0"}, {"b": ("0",)})


def test_then_where_least_is_left_over() -> None:
    """So that room for larger ones stays whole."""
    assert admitted(moves(gpus(80, 48, 64), [], ask("a", 40))) == {"a": "1"}
    holds = [hold("a", 10, on="0"), hold("b", 30, on="1")]
    assert admitted(moves(gpus(80, 80), holds, ask("c", 40))) == {"c": "1"}


def test_devices_of_one_engine_have_one_total() -> None:
    """Unless its model names others."""
    assert admitted(moves(gpus(80, 48, 80), [], ask("a", 40, count=2))) == {"a": "02"}
    assert moves(gpus(80, 48), [], ask("a", 40, count=2)).stuck == ("a",)
    assert admitted(moves(gpus(80, 48), [], ask("a", 40, count=2, only=("0", "1")))) == {"a": "01"}


def test_named_devices_are_exactly_these() -> None:
    """Though another one is empty."""
    found = moves(gpus(80, 80), [hold("a", 80, on="0", always=True)], ask("b", 10, only=("0",)))
    assert (admitted(found), found.stuck) == ({}, ("b",))
    assert moves(gpus(80), [], ask("b", 10, on="07", only=("7",))).stuck == ("b",)


def test_a_gang_gets_all_of_its_devices_at_once_or_none() -> None:
    """It holds nothing while it waits; and nobody comes where its turn is next."""
    holds = [hold("a", 80, GOES, on="0")]
    found = moves(gpus(80, 80), holds, ask("g", 40, 990, count=2), ask("s", 10))
    assert admitted(found) == {}
    assert found.place == {"g": ("0", "1")}
    assert admitted(moves(gpus(80, 80), [], ask("g", 40, count=2))) == {"g": "01"}


def test_devices_of_a_set_are_in_the_order_of_the_inventory() -> None:
    """As numbers come, so that a set is recognized however it was found."""
    devices = gpus(*[80] * 12)
    names = [*devices]
    assert moves(devices, [], Ask("a", "a", dict.fromkeys(names[2:4] + names[10:], GIB), 4)).admit["a"] == (
        "2", "3", "10", "11",
    )  # fmt: skip
    holds = [Hold(f"h{name}", f"h{name}", {name: 70 * GIB}, SERVES, since=0.0, idle_since=0.0) for name in names]
    gang = Ask("g", "g", dict.fromkeys(names, 60 * GIB), 6, since=NOW)
    (where,) = moves(devices, holds, gang).place.values()
    assert [*where] == sorted(where, key=int)


def test_of_very_many_sets_those_with_most_room_are_looked_at() -> None:
    """A decision takes no longer for it."""
    devices = gpus(*[80] * 16)
    names = [f"{index}" for index in range(16)]
    holds = [Hold(f"h{name}", f"h{name}", {name: (75 - int(name)) * GIB}, SERVES, since=0.0) for name in names]
    found = moves(devices, holds, Ask("g", "g", dict.fromkeys(names, 70 * GIB), 8, since=NOW - 100))
    assert len(found.go) == 8
    assert gone(found) > {"h13", "h14", "h15"}


# Very many


def test_thousands_that_want_the_same_are_answered_as_one() -> None:
    """A decision takes no longer than to name each; their names, their ages and their models make no difference."""
    asked: list[str] = []
    real = Planner.plan

    def plan(self: Planner, ask: Ask) -> Plan | None:
        asked.append(ask.name)
        return real(self, ask)

    served = [hold(f"h{index}", 70, on=f"{index}", since=NOW - 1, idle_since=None) for index in range(2)]
    asks = [ask(f"a{index}", 50, 980 + index / 100) for index in range(1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "plan", plan)
        found = decide(NOW, gpus(80, 80), served, asks, RULES)
    assert asked == ["a0", "a1"], "the second one is behind the first"
    assert {found.wait[one.name] for one in asks[1:]} == {replace(found.wait["a0"], behind=("a0",))}
    assert found.look_again == asks[0].since + RULES.max_wait


def test_who_is_of_a_model_that_serves_is_answered_for_itself() -> None:
    """One of its own never goes for it, though it goes for all others."""
    served = replace(hold("a", 70), model="b")
    found = moves(gpus(80), [served], ask("b", 50, 980), ask("c", 50))
    assert (found.go, found.go_for) == ({"a": Depth.STOP}, {"a": "c"})


def test_one_that_sleeps_is_answered_for_itself() -> None:
    """It needs less than others that want as much."""
    holds = [hold("a", 30, SLEEPS, keeps=30 * GIB, priority=9), hold("h", 40, since=NOW - 1, idle_since=None)]
    asks = [replace(ask(name, 40, since), model="a") for name, since in (("a/1", 980), ("a/2", 981), ("a", 982))]
    assert admitted(moves(gpus(80), holds, *asks)) == {"a": "0"}


def test_who_is_behind_whom_is_said_as_it_is_in_its_turn() -> None:
    """Though one before it waits for the same and is not."""
    asks = ask("s1", 100, 980), ask("p", 50, 981), ask("s2", 100, 982)
    found = moves(gpus(80), [hold("x", 60, GOES)], *(replace(one, needs={"0": one.needs["0"]}) for one in asks))
    assert [found.wait[name].behind for name in ("s1", "p", "s2")] == [(), (), ("p",)]


def test_when_a_place_is_free_is_told_where_it_is_known() -> None:
    """Now, where somebody leaves; when those may go who are to go; else nobody knows."""
    assert moves(gpus(80), [hold("a", 80, GOES)], ask("b", 50)).wait["b"].at == NOW
    served = hold("a", 80, since=NOW - 4, idle_since=NOW - 4)
    assert moves(gpus(80), [served], ask("b", 50)).wait["b"].at == NOW + 6
    found = moves(gpus(80, 80), [hold("a", 80, always=True), hold("b", 80, on="1")], ask("c", 50, pressing=False))
    assert (found.wait["c"].at, found.wait["c"].where) == (math.inf, ("0", "1", "2", "3"))
    assert moves(gpus(80), [], ask("a", 60)).look_again == math.inf, "it waits no more"


def test_who_wants_something_else_is_answered_for_itself() -> None:
    """As many devices, others, or a place of its own; who does not press, and who has waited too long."""
    lasting = hold("x", 70, on="1", always=True)
    found = moves(gpus(80, 80), [lasting], ask("gang", 40, 980, count=2), ask("one", 40))
    assert (found.stuck, admitted(found)) == (("gang",), {"one": "0"})
    found = moves(gpus(80, 80), [lasting], ask("named", 40, 980, only=("1",)), ask("any", 40))
    assert (found.stuck, admitted(found)) == (("named",), {"any": "0"})

    young = [hold(f"h{index}", 70, on=f"{index}", since=NOW - 1, idle_since=None) for index in range(2)]
    asks = [ask("a", 50, 980), ask("b", 50, 981), ask("c", 50, 982, place=("1",)), ask("d", 50, 983)]
    found = moves(gpus(80, 80), young, *asks, ask("e", 50, pressing=False))
    assert [found.wait[name].where for name in "abcd"] == [("0",), ("0",), ("1",), ("0",)]
    assert [found.wait[name].waits_for for name in "abcde"] == [("h0",), ("h0",), ("h1",), ("h0",), ()]

    busy = hold("h", 70, idle_since=None)
    asks = [ask("a", 50, always=True), ask("b", 50, always=True), ask("late", 50, OVERDUE)]
    assert moves(gpus(80), [busy], *asks).go_for == {"h": "late"}


def test_one_that_comes_in_this_decision_goes_for_none_of_its_model() -> None:
    """Nor is a turn kept behind it, as for another model."""
    asks = [replace(ask(name, size, OVERDUE - 1), model=model) for name, model, size in (
        ("a/0", "a", 60), ("a/1", "a", 50), ("b/0", "b", 50))]  # fmt: skip
    assert moves(gpus(80), [], *asks).place == {"b/0": ("0",)}


def test_of_very_many_sizes_that_nobody_may_go_for_yet_the_first_are_planned() -> None:
    """The others wait behind them, and have a plan as soon as they have waited too long."""
    served = hold("h", 70, since=NOW - 1, idle_since=None)
    asks = [replace(ask(f"a{index:02}", 0, 980 + index / 100), needs={"0": 50 * GIB + index}) for index in range(40)]
    found = moves(gpus(80), [served], *asks)
    assert [name for name, wait in found.wait.items() if wait.waits_for] == [f"a{index:02}" for index in range(32)]
    assert {wait.behind for name, wait in found.wait.items() if not wait.waits_for} == {("a00",)}
    assert found.look_again == asks[0].since + RULES.max_wait
    overdue = [*asks[:-1], replace(asks[-1], since=OVERDUE)]
    assert moves(gpus(80), [served], *overdue).place == {"a39": ("0",)}
    before = [replace(one, always=True) for one in asks[:-1]]
    assert gone(moves(gpus(80), [replace(served, since=0.0)], *before, overdue[-1])) == {"h"}, "however many are before"


# Promises


def test_what_comes_back_is_promised_to_one_ask() -> None:
    """To the byte; the second one waits for something else."""
    for pressing in (True, False):
        assert moves(gpus(80), [hold("a", 60, GOES)], ask("b", 80, pressing=pressing)).place == {"b": ("0",)}
    assert not moves(gpus(80), [hold("a", 60, GOES)], replace(ask("b", 0), needs={"0": 80 * GIB + 1})).place
    found = moves(gpus(80), [hold("a", 80, GOES)], ask("b", 50, 990), ask("c", 50))
    assert found.place == {"b": ("0",)}
    assert (found.wait["b"].waits_for, found.wait["c"].behind) == (("a",), ("b",))
    two = moves(gpus(80, 80), [hold("a", 80, GOES), hold("x", 80, on="1")], ask("b", 50, 990), ask("c", 50))
    assert (two.place, gone(two)) == ({"b": ("0",), "c": ("1",)}, {"x"})


def test_a_promised_place_is_kept() -> None:
    """Though another one would do as well by now."""
    holds = [hold("a", 80, YIELDS, on="0", to=Depth.STOP), hold("b", 80, YIELDS, on="1", to=Depth.STOP)]
    for place in ("0", "1"):
        assert moves(gpus(80, 80), holds, ask("c", 50, place=(place,))).place == {"c": (place,)}
    free = moves(gpus(80, 80, 80), holds, ask("c", 50, place=("1",)))
    assert admitted(free) == {"c": "2"}, "unless it comes at once elsewhere"


def test_a_place_that_is_none_any_more_is_forgotten() -> None:
    """Its device is gone, or its model has another size by now."""
    for place in ("7", "01", ""):
        assert admitted(moves(gpus(80, 80), [], ask("a", 50, on="017", place=tuple(place)))) == {"a": "0"}
    assert admitted(moves(gpus(80, 80), [], ask("a", 50, on="0", place=("1",)))) == {"a": "0"}
    assert moves(gpus(80, 80), [], ask("a", 50, on="0", only=("1",))).stuck == ("a",)


def test_a_turn_is_promised_where_the_fewest_will_compute() -> None:
    """Those who were let in count already, and those who leave do no more."""
    asks = ask("a", 10, 980, only=("0",)), ask("b", 10)
    assert moves(gpus(80, 80), [hold("z", 10, GOES, on="1")], *asks).place == {"b": ("1",)}
    leaving = [hold(name, 30, GOES, on=on) for name, on in (("x", "0"), ("u", "1"), ("v", "1"))]
    assert moves(gpus(80, 80), [hold("z", 5, always=True), *leaving], ask("b", 70)).place == {"b": ("1",)}


def test_one_that_is_let_in_for_good_leaves_no_room_for_others() -> None:
    """These are stuck from then on; and whoever is there beside it is still in the way."""
    assert moves(gpus(80), [], ask("a", 50, 980, always=True), ask("b", 40)).stuck == ("b",)
    found = moves(gpus(80), [hold("y", 10, YIELDS, to=Depth.STOP)], ask("a", 10, 980), ask("b", 70))
    assert found.wait["b"].waits_for == ("a", "y")


def test_one_that_wakes_counts_once_while_others_are_told_to_go() -> None:
    """What it had while it slept is a part of what it has then."""
    holds = [hold("a", 2, SLEEPS, keeps=2 * GIB), hold("h", 70, on="1")]
    asks = ask("a", 20, 980), ask("d", 60, 981, only=("1",)), ask("c", 60, 982, only=("0",))
    found = moves(gpus(80, 80), holds, *asks)
    assert (admitted(found), gone(found), found.place) == ({"a": "0"}, {"h"}, {"c": ("0",), "d": ("1",)})


def test_what_is_given_is_not_promised_to_another_one() -> None:
    """In the same decision."""
    found = moves(gpus(80), [], ask("a", 60, 990), ask("b", 60))
    assert (admitted(found), found.place, found.wait["b"].waits_for) == ({"a": "0"}, {}, ("a",))


def test_a_small_one_passes_a_larger_one_that_waits() -> None:
    """Until that has waited too long; and nothing is taken from a place that was promised already."""
    served = hold("a", 60, since=NOW - 1, idle_since=None)
    assert admitted(moves(gpus(80), [served], ask("large", 50, 980), ask("small", 10))) == {"small": "0"}
    assert admitted(moves(gpus(80), [served], ask("large", 50, OVERDUE), ask("small", 10))) == {}
    leaving = hold("a", 60, GOES)
    assert admitted(moves(gpus(80, 30), [leaving], ask("large", 50, 980), ask("small", 10))) == {"small": "1"}
    assert admitted(moves(gpus(80), [leaving], ask("large", 50, 980), ask("small", 10))) == {}
    drains = hold("a", 60, YIELDS, to=Depth.STOP)
    assert admitted(moves(gpus(80), [drains], ask("large", 50, 980), ask("small", 10))) == {}


def test_who_does_not_press_comes_where_nobody_waits_for_room() -> None:
    """Else it would load there, and be sent away."""
    served = hold("a", 60, since=NOW - 1, idle_since=None)
    warm = ask("warm", 10, pressing=False)
    assert admitted(moves(gpus(80), [served], warm)) == {"warm": "0"}
    assert admitted(moves(gpus(80), [served], ask("large", 50, 980), warm)) == {}
    assert admitted(moves(gpus(80, 20), [served], ask("large", 50, 980), warm)) == {"warm": "1"}


def test_memory_that_may_never_come_back_is_not_promised() -> None:
    """Of an engine that could not be ended: the ask goes elsewhere, and waits where there is nothing else."""
    lost = hold("a", 80, GOES, on="0", not_ended="process 7 survives")
    found = moves(gpus(80, 80), [lost, hold("b", 80, on="1")], ask("c", 50))
    assert (gone(found), found.place) == ({"b"}, {"c": ("1",)})
    alone = moves(gpus(80), [lost], ask("c", 50))
    assert (alone.place, alone.stuck, alone.wait["c"].not_ended) == ({}, (), "process 7 survives")


# Who goes


def test_who_does_not_press_makes_nobody_go() -> None:
    """Though it has waited for ever."""
    found = moves(gpus(80), [hold("a", 80)], ask("b", 50, 0, pressing=False))
    assert (gone(found), found.stuck) == (set(), ())


@pytest.mark.parametrize("more", [{"always": True}, {"model": "b"}])
def test_one_that_is_always_to_run_never_goes_nor_one_of_the_same_model(more: dict[str, object]) -> None:
    """Another one goes instead, though it is worth more."""
    spared = replace(hold("a", 40, on="0"), **more)  # type: ignore[arg-type]
    assert gone(moves(gpus(80, 80), [spared, hold("c", 80, on="1", priority=9)], ask("b", 50))) == {"c"}


def test_one_that_moves_does_not_go() -> None:
    """One that comes may when it serves, whose memory comes back already is asked once."""
    for standing in (COMES, YIELDS, GOES):
        found = moves(gpus(80), [hold("a", 80, standing, to=None if standing is COMES else Depth.STOP)], ask("b", 9, 0))
        assert (gone(found), found.stuck) == (set(), ()), standing


def test_where_one_comes_the_next_turn_is_kept_for_who_has_waited_too_long() -> None:
    """Else a gang could wait for ever, while its devices are used one after the other."""
    holds = [hold("a", 60, COMES, on="0"), hold("b", 60, on="1")]
    found = moves(gpus(80, 80), holds, ask("g", 40, 0, count=2), ask("s", 10))
    assert (admitted(found), gone(found), found.place) == ({}, set(), {"g": ("0", "1")})


def test_nobody_waits_for_one_that_comes_where_another_one_may_go() -> None:
    """Though that one has more priority."""
    holds = [hold("c", 35, COMES, priority=-1), hold("a", 35)]
    assert gone(moves(gpus(80), holds, ask("b", 40, OVERDUE))) == {"a"}


def test_nothing_goes_that_can_be_spared() -> None:
    """What is worth most is spared first."""
    holds = [hold("a", 30, idle_since=10.0), hold("b", 30, idle_since=20.0), hold("c", 20, idle_since=5.0)]
    assert gone(moves(gpus(80), holds, ask("d", 20))) == {"c"}
    assert gone(moves(gpus(80), holds, ask("d", 21))) == {"a"}
    assert gone(moves(gpus(80), holds, ask("d", 31))) == {"a", "c"}
    assert gone(moves(gpus(80), holds, ask("d", 51))) == {"a", "b"}


def test_less_priority_goes_first_then_who_is_not_used_then_who_is_soon_back() -> None:
    """One that was idle for longer counts for less, however long its start takes."""
    rivals = [hold("a", 40, priority=1), hold("b", 40, idle_since=None)]
    assert gone(moves(gpus(80), rivals, ask("d", 40, OVERDUE))) == {"b"}
    rivals = [hold("a", 40, start_seconds=500), hold("b", 40, idle_since=None, start_seconds=5)]
    assert gone(moves(gpus(80), rivals, ask("d", 40, OVERDUE))) == {"a"}
    rivals = [hold("a", 40, idle_since=999.0, start_seconds=500), hold("b", 40, idle_since=None, start_seconds=5)]
    assert gone(moves(gpus(80), rivals, ask("d", 40, OVERDUE))) == {"a"}, "though it is the more expensive one"
    rivals = [hold("a", 40, keeps=GIB, start_seconds=500), hold("b", 40, start_seconds=60)]
    assert gone(moves(gpus(80), rivals, ask("d", 30))) == {"a"}, "from its sleep it is soon back"
    rivals = [hold("a", 40, start_seconds=50), hold("b", 40, start_seconds=60)]
    assert gone(moves(gpus(80), rivals, ask("d", 40))) == {"a"}
    rivals = [hold("a", 40, idle_since=900.0, start_seconds=50), hold("b", 40, idle_since=500.0, start_seconds=60)]
    assert gone(moves(gpus(80), rivals, ask("d", 40))) == {"b"}


def test_one_that_sleeps_is_not_busy() -> None:
    """Whatever was in flight before: it goes for less than one that serves and is soon asked again."""
    asleep = hold("a", 60, SLEEPS, on="0", idle_since=None)
    serves = hold("b", 60, on="1", since=0.0, idle_since=NOW - 6, start_seconds=900.0)
    assert gone(moves(gpus(80, 80), [asleep, serves], ask("d", 50))) == {"a"}


def test_a_sleeper_that_somebody_waits_for_is_spared() -> None:
    """Its ask comes later in the line, and it goes only where nothing else would do. Else the one soonest started."""
    holds = [hold("a", 4, SLEEPS, start_seconds=50, wake_seconds=45), hold("b", 4, SLEEPS, start_seconds=20)]
    assert gone(moves(gpus(80), holds, ask("d", 75, 980))) == {"a"}, "it would lose five seconds"
    holds[0] = replace(holds[0], idle_since=None, start_seconds=45.5)
    assert gone(moves(gpus(80), holds, ask("d", 75, 980))) == {"b"}, "long asleep"
    holds = [hold("a", 4, SLEEPS, start_seconds=5), hold("b", 4, SLEEPS, start_seconds=500)]
    assert gone(moves(gpus(80), holds, ask("d", 75, 980))) == {"a"}
    assert gone(moves(gpus(80), holds, ask("d", 75, 980), ask("a", 60))) == {"b"}
    assert gone(moves(gpus(80), holds, ask("d", 77, 980), ask("a", 60))) == {"a", "b"}


def test_the_place_is_chosen_where_least_is_lost() -> None:
    """The fewest that are busy, then the least priority, then the least time, then the best placement."""

    def goes(*holds: Hold) -> set[str]:
        return gone(moves(gpus(80, 80), holds, ask("d", 50, OVERDUE)))

    assert goes(hold("a", 80, on="0", idle_since=None), hold("b", 80, on="1", priority=9)) == {"b"}
    assert goes(hold("a", 80, on="0", priority=1), hold("b", 80, on="1", start_seconds=500)) == {"b"}
    assert goes(hold("a", 80, on="0", start_seconds=90), hold("b", 80, on="1")) == {"b"}
    both = hold("a", 40, on="0", priority=9), hold("b", 40, on="0")
    assert gone(moves(gpus(80, 80), [*both, hold("c", 80, on="1", priority=5)], ask("d", 80, OVERDUE))) == {"c"}
    crowded = hold("x", 20, on="0", always=True)
    assert goes(crowded, hold("a", 60, on="0"), hold("b", 60, on="1")) == {"b"}
    assert gone(moves(gpus(80, 60), [hold("a", 60, on="0"), hold("b", 60, on="1")], ask("d", 50))) == {"b"}


def test_the_time_until_somebody_may_go_is_lost_like_that_of_its_return() -> None:
    """Seconds, both."""
    cheap, long_idle = hold("a", 80, on="0", idle_since=NOW, start_seconds=8), hold("b", 80, on="1", idle_since=NOW - 5)
    assert gone(moves(gpus(80, 80), [cheap, long_idle], ask("d", 50))) == {"b"}
    cheaper = replace(cheap, start_seconds=4)
    assert moves(gpus(80, 80), [cheaper, long_idle], ask("d", 50)).look_again == NOW + 2


def test_a_return_costs_what_it_does_from_as_far_as_one_goes() -> None:
    """A wake is soon done; one that has to end has to be started, though it may sleep."""
    holds = [hold("a", 80, on="0", keeps=2 * GIB, start_seconds=60), hold("b", 80, on="1", start_seconds=20)]
    assert moves(gpus(80, 80), holds, ask("d", 78)).go == {"a": Depth.SLEEP}
    assert moves(gpus(80, 80), holds, ask("d", 79)).go == {"b": Depth.STOP}


def test_who_goes_from_several_devices_makes_room_on_all_of_them() -> None:
    """Others there wait for it as well: it is not asked twice, and nobody else goes in vain."""
    gang = hold("g", 50, on="01", keeps=GIB)
    found = moves(gpus(80, 80), [gang, hold("h", 30, on="1", priority=1)],
                  ask("b", 60, 990, on="0"), ask("c", 30, on="1"))  # fmt: skip
    assert (found.go, {**found.go_for}) == ({"g": Depth.SLEEP}, {"g": "b"})
    assert found.place == {"b": ("0",), "c": ("1",)}
    found = moves(gpus(80, 80), [gang], ask("b", 60, 990, on="0"), ask("c", 80, on="1"))
    assert (found.go, {**found.go_for}, found.place) == ({"g": Depth.SLEEP}, {"g": "b"}, {"b": ("0",)})


def test_who_was_to_go_is_spared_when_another_one_goes_from_there_as_well() -> None:
    """The gang goes for the second ask, and what it had on the first one's device is enough."""
    holds = [hold("g", 30, on="01", start_seconds=90), hold("h", 30, on="0", start_seconds=60)]
    found = moves(gpus(80, 60), holds, ask("b", 50, 990, on="0"), ask("c", 40, on="1"))
    assert (found.go, {**found.go_for}) == ({"g": Depth.STOP}, {"g": "c"})
    assert found.place == {"b": ("0",), "c": ("1",)}


def test_one_goes_no_further_than_it_has_to() -> None:
    """It sleeps where what it keeps can be spared, and stops where it cannot."""
    sleeper = hold("a", 60, keeps=2 * GIB)
    assert moves(gpus(80), [sleeper], ask("b", 78)).go == {"a": Depth.SLEEP}
    stops = moves(gpus(80), [sleeper], ask("b", 79))
    assert (stops.go, stops.place) == ({"a": Depth.STOP}, {"b": ("0",)})
    assert moves(gpus(80), [hold("a", 60)], ask("b", 30)).go == {"a": Depth.STOP}


def test_nobody_ends_where_it_does_that_others_sleep() -> None:
    """Neither one that sleeps already nor one that serves, unless others are used or count for more."""
    asleep = [hold(name, 1, SLEEPS, keeps=GIB) for name in "bcdefg"]
    idle = hold("a", 6, keeps=GIB, idle_since=NOW - 10)
    assert moves(gpus(20), [idle, *asleep], ask("h", 10)).go == {"a": Depth.SLEEP}
    two = [idle, hold("b", 6, keeps=GIB, idle_since=NOW - 20)]
    assert moves(gpus(13), two, ask("h", 6)).go == {"b": Depth.SLEEP}
    assert moves(gpus(13), two, ask("h", 7)).go == {"a": Depth.SLEEP, "b": Depth.SLEEP}
    for worthy in (replace(idle, idle_since=None), replace(idle, priority=1)):
        assert moves(gpus(20), [worthy, *asleep], ask("h", 9)).go == {"b": Depth.STOP}


def test_of_those_who_may_end_the_one_goes_that_was_not_used_for_longest() -> None:
    """Whether it sleeps or serves: both would have to be started again."""
    asleep = [hold(name, 1, SLEEPS, keeps=GIB, idle_since=NOW - 100) for name in "bcdefg"]
    asleep[3] = replace(asleep[3], idle_since=NOW - 500)
    idle = hold("a", 6, keeps=GIB, idle_since=NOW - 10)
    assert moves(gpus(20), [idle, *asleep], ask("h", 14)).go == {"a": Depth.SLEEP, "e": Depth.STOP}
    idle = replace(idle, idle_since=NOW - 900)
    assert moves(gpus(20), [idle, *asleep], ask("h", 14)).go == {"a": Depth.STOP}


def test_what_a_sleeper_keeps_is_held() -> None:
    """It goes for good where that is wanted, at once: nothing has to end for it."""
    asleep = hold("a", 2, SLEEPS, keeps=2 * GIB, since=NOW, idle_since=NOW)
    assert admitted(moves(gpus(80), [asleep], ask("b", 78))) == {"b": "0"}
    assert moves(gpus(80), [asleep], ask("b", 79)).go == {"a": Depth.STOP}
    more = replace(asleep, takes={"0": 4 * GIB})
    assert moves(gpus(80), [more], ask("b", 77)).go == {"a": Depth.STOP}, "it sleeps already"


def test_one_on_its_way_to_sleep_gives_back_what_it_does_not_keep() -> None:
    """No more is promised."""
    leaving = hold("a", 60, GOES, keeps=2 * GIB, to=Depth.SLEEP)
    assert moves(gpus(80), [leaving], ask("b", 78)).place == {"b": ("0",)}
    assert moves(gpus(80), [leaving], ask("b", 79)).place == {}


def test_a_sleeper_wakes_where_it_sleeps_and_needs_what_it_has_not() -> None:
    """Though another device is empty; somebody goes for it as for any other."""
    asleep = hold("a", 2, SLEEPS, keeps=2 * GIB)
    other = hold("b", 18, always=True)
    assert admitted(moves(gpus(80, 80), [asleep, other], ask("a", 62))) == {"a": "0"}
    assert gone(moves(gpus(80, 80), [asleep, hold("b", 40)], ask("a", 60))) == {"b"}
    lasting = replace(asleep, always=True, takes={"0": 10 * GIB})
    assert gone(moves(gpus(80), [lasting, hold("b", 20)], ask("a", 75, always=True))) == {"b"}, "it is in nobody's way"


def test_a_sleeper_that_can_never_wake_where_it_sleeps_is_started_elsewhere() -> None:
    """It gives up its place, whether somebody waits for it or not, and its turn is next where nobody has to go."""
    asleep, resident = hold("a", 2, SLEEPS, keeps=2 * GIB), hold("b", 70, always=True)
    for pressing in (True, False):
        found = moves(gpus(80, 80), [asleep, resident], ask("a", 60, pressing=pressing))
        assert (found.go, found.place, found.stuck) == ({"a": Depth.STOP}, {"a": ("1",)}, ())
    busy = hold("c", 70, on="1", idle_since=None)
    assert moves(gpus(80, 80), [asleep, resident, busy], ask("a", 60)).go == {"a": Depth.STOP}, "it waits there"
    lasting = replace(asleep, always=True)
    wide = Hold("a", "a", dict.fromkeys("01", 2 * GIB), SLEEPS, always=True, keeps=2 * GIB)
    assert gone(moves(gpus(80, 80), [lasting, resident], ask("a", 60, always=True))) == {"a"}
    found = moves(gpus(80, 80, 80), [wide, resident], ask("a", 79, count=2, always=True))
    assert (gone(found), found.stuck) == ({"a"}, ()), "what it keeps is in nobody's way"


def test_a_sleeper_that_can_never_be_anywhere_is_stuck_and_sleeps_on() -> None:
    """As one that does not sleep; its end would help nobody."""
    asleep, resident = hold("a", 5, SLEEPS, keeps=2 * GIB), hold("b", 70, always=True)
    for pressing in (True, False):
        found = moves(gpus(80), [asleep, resident], ask("a", 12, pressing=pressing))
        assert (found.go, found.stuck) == ({}, ("a",))
    named = ask("a", 60, only=("0",))
    assert moves(gpus(80, 80), [asleep, resident], named).stuck == ("a",)


def test_a_sleeper_moves_where_waiting_takes_longer_than_its_start() -> None:
    """At once where that is known, else when it has waited so long; and only to where nobody has to go."""
    asleep = hold("a", 2, SLEEPS, keeps=2 * GIB, start_seconds=20.0, wake_seconds=2.0)
    busy = hold("b", 70, idle_since=None)
    assert gone(moves(gpus(80, 80), [asleep, busy], ask("a", 60))) == {"a"}, "it goes after 30 s at the earliest"
    assert gone(moves(gpus(80, 80), [asleep, busy], ask("a", 60, NOW - 13))) == set(), "in 17 s, and 2 to wake"
    assert gone(moves(gpus(80, 80), [asleep, busy], ask("a", 60, NOW - 20))) == {"a"}
    other = hold("c", 70, on="1", idle_since=None)
    assert gone(moves(gpus(80, 80), [asleep, busy, other], ask("a", 60))) == set()
    wide = replace(asleep, takes=dict.fromkeys("01", 2 * GIB))
    found = moves(gpus(80, 80, 80), [wide, busy], ask("a", 40, NOW - 20, count=2))
    assert gone(found) == set(), "to devices of which it has none"
    idle = hold("b", 70, idle_since=NOW - 1)
    found = moves(gpus(80, 80), [asleep, idle], ask("a", 60))
    assert (gone(found), found.look_again) == (set(), NOW + 4), "it gives way sooner than a start takes"


@pytest.mark.parametrize(
    "blocked",
    [hold("b", 70, YIELDS, to=Depth.STOP), hold("b", 70, COMES), hold("b", 70, GOES, not_ended="process 7 survives")],
)
def test_a_sleeper_waits_as_long_as_its_start_takes_where_nobody_knows_how_long(blocked: Hold) -> None:
    """And not at all longer where another device is free; who is gone in a moment is waited for."""
    asleep = hold("a", 2, SLEEPS, keeps=2 * GIB, start_seconds=20.0)
    found = moves(gpus(80, 80), [asleep, blocked], ask("a", 60, NOW - 5))
    assert (gone(found), found.look_again) == (set(), NOW + 15)
    found = moves(gpus(80, 80), [asleep, blocked], ask("a", 60, NOW - 20))
    assert (found.go, found.place) == ({"a": Depth.STOP}, {"a": ("1",)})
    leaving = replace(blocked, standing=GOES, not_ended=None, to=Depth.STOP)
    found = moves(gpus(80, 80), [asleep, leaving], ask("a", 60, NOW - 20))
    assert (gone(found), found.place) == (set(), {"a": ("0",)})


def test_a_sleeper_moves_from_where_memory_does_not_come_back() -> None:
    """In the place of being refused, or of making one more go."""
    asleep, other = hold("a", 2, SLEEPS, keeps=2 * GIB), hold("b", 10)
    short = {**gpus(80, 80), "0": Device(80 * GIB, 80 * GIB, free=0)}
    found = moves(short, [asleep, other], ask("a", 60, NOW - 10, short=Short(NOW - 10)))
    assert (found.go, found.refuse) == ({"a": Depth.STOP}, ())
    assert gone(moves(short, [asleep, other], ask("a", 60, NOW - 9, short=Short(NOW - 9)))) == set()


def test_sleepers_that_move_do_not_all_move_to_one_place() -> None:
    """While the first is being ended, nobody comes where it will be started."""
    asleep = [hold(name, 2, SLEEPS, keeps=2 * GIB) for name in "ab"]
    asleep.append(hold("b0", 68, idle_since=None, always=True))
    blocked = [ask("a", 60, NOW - 70), ask("b", 40, NOW - 65), ask("c", 30)]
    found = moves(gpus(80, 80), asleep, *blocked)
    assert (found.place["a"], found.wait["b"].waits_for) == (("1",), ("b",)), "which is never to wake there either"
    assert admitted(found) == {}
    asleep[2] = replace(asleep[2], always=False, standing=YIELDS, to=Depth.STOP)
    found = moves(gpus(80, 80), asleep, *blocked)
    assert (gone(found), found.place["a"]) == ({"a"}, ("1",))


def test_nobody_both_goes_and_comes() -> None:
    """A sleeper that was told to go, or was let in, is not considered a second time in the same decision."""
    asleep = hold("a", 4, SLEEPS, keeps=4 * GIB)
    told = moves(gpus(80), [asleep], ask("d", 78, 980), ask("a", 20))
    assert (gone(told), admitted(told)) == ({"a"}, {})
    let_in = moves(gpus(80), [asleep], ask("a", 20, 980), ask("d", 78))
    assert (gone(let_in), admitted(let_in)) == (set(), {"a": "0"})
    promised = moves(gpus(80), [asleep, hold("x", 60, GOES)], ask("a", 20, 980), ask("d", 78))
    assert (gone(promised), promised.place) == (set(), {"a": ("0",)})


# Which place is lost least


def test_a_holder_of_several_devices_is_lost_once() -> None:
    """However many of them the ask wants."""
    wide = replace(hold("s", 70, on="01", idle_since=NOW - 9), start_seconds=300.0)
    pair = [hold(name, 70, on=on, idle_since=NOW - 9, start_seconds=200.0) for name, on in (("x", "2"), ("y", "3"))]
    assert gone(moves(gpus(80, 80, 80, 80), [wide, *pair], ask("g", 60, count=2))) == {"s"}


def test_of_equal_losses_the_place_counts_where_the_fewest_compute_then() -> None:
    """Those who go do no more; one that goes from another device as well counts where it is wanted."""
    pair = [hold(name, 30, on="0", start_seconds=100.0) for name in "ab"]
    single = [hold("c", 60, on="1", start_seconds=200.0), hold("z", 1, on="1", always=True)]
    assert gone(moves(gpus(80, 80), [*pair, *single], ask("d", 70))) == {"a", "b"}
    wide, other = hold("s", 60, on="02"), hold("v", 60, on="1")
    rest = hold("z", 80, on="2", always=True)
    smaller = {**gpus(80, 80, 160), "1": Device(80 * GIB, 79 * GIB)}
    assert gone(moves(smaller, [wide, other, rest], ask("d", 50, on="01"))) == {"v"}


def test_one_that_is_in_use_costs_all_of_its_return() -> None:
    """Beside it an idle one costs little."""
    busy = [hold(name, 60 - 20 * int(on), on=on, idle_since=None, start_seconds=seconds)
            for name, on, seconds in (("a", "0", 60.0), ("b", "1", 30.0))]  # fmt: skip
    idle = hold("c", 20, on="1", idle_since=NOW - 9, start_seconds=200.0)
    assert gone(moves(gpus(80, 80), [*busy, idle], ask("d", 70, OVERDUE))) == {"b", "c"}


# When


def test_nothing_goes_before_it_has_served_a_while() -> None:
    """It is looked at again then."""
    found = moves(gpus(80), [hold("a", 80, since=NOW - 9, idle_since=NOW - 9)], ask("b", 50, 999.0))
    assert (gone(found), found.look_again) == (set(), NOW + 1)
    assert gone(moves(gpus(80), [hold("a", 80, since=NOW - 10, idle_since=NOW - 10)], ask("b", 50))) == {"a"}


@pytest.mark.parametrize(("start", "patience"), [(60.0, 5.0), (4.0, 2.0)])
def test_an_idle_one_stays_for_half_its_return_and_five_seconds_at_most(start: float, patience: float) -> None:
    """Agents think between their requests."""
    for idle, goes in ((patience - 0.1, False), (patience, True)):
        found = moves(gpus(80), [hold("a", 80, idle_since=NOW - idle, start_seconds=start)], ask("b", 50))
        assert bool(found.go) is goes
    asleep = hold("a", 80, idle_since=NOW - 1, keeps=GIB, wake_seconds=2.0)
    assert moves(gpus(80), [asleep], ask("b", 50)).go == {"a": Depth.SLEEP}, "from its sleep it is soon back"
    assert moves(gpus(80), [asleep], ask("b", 80)).go == {}


def test_a_busy_one_goes_for_who_has_waited_too_long_once_it_was_worth_its_start() -> None:
    """Not before: else two busy models would do nothing but start."""
    busy = hold("a", 80, since=NOW - 60, idle_since=None)
    assert moves(gpus(80), [busy], ask("b", 50, OVERDUE + 5)).look_again == NOW + 5
    assert gone(moves(gpus(80), [busy], ask("b", 50, OVERDUE))) == {"a"}
    young = replace(busy, since=NOW - 59)
    assert moves(gpus(80), [young], ask("b", 50, OVERDUE)).look_again == NOW + 1
    quick = hold("a", 80, since=NOW - 9, idle_since=None, start_seconds=2)
    assert moves(gpus(80), [quick], ask("b", 50, OVERDUE)).look_again == NOW + 1


def test_who_waits_too_long_makes_an_idle_one_go_at_once() -> None:
    """Whatever its next request."""
    assert gone(moves(gpus(80), [hold("a", 80, idle_since=NOW)], ask("b", 50, OVERDUE))) == {"a"}


def test_all_of_a_plan_go_together_when_the_last_of_them_may() -> None:
    """Nobody goes in vain."""
    holds = [hold("a", 40), hold("b", 40, idle_since=NOW - 2)]
    found = moves(gpus(80), holds, ask("c", 80))
    assert (gone(found), found.look_again) == (set(), NOW + 3)


def test_who_has_waited_too_long_keeps_its_place_unless_others_may_go_now() -> None:
    """So nobody comes where it was next."""
    holds = [
        hold("a", 80, on="0", since=NOW - 20, idle_since=None),
        hold("b", 80, on="1", since=NOW - 10, idle_since=None),
    ]
    waits = ask("c", 50, OVERDUE)
    assert moves(gpus(80, 80), holds, waits).place == {"c": ("0",)}
    assert moves(gpus(80, 80), holds, replace(waits, place=("1",))).place == {"c": ("1",)}
    holds[0] = replace(holds[0], since=NOW - 60)
    found = moves(gpus(80, 80), holds, replace(waits, place=("1",)))
    assert (gone(found), found.place) == ({"a"}, {"c": ("0",)})


def test_it_is_looked_again_when_somebody_will_have_waited_too_long() -> None:
    """Its turn changes by time alone."""
    assert moves(gpus(80), [hold("a", 80, COMES)], ask("b", 50, NOW - 10)).look_again == NOW + 20
    assert moves(gpus(80), [hold("a", 80, COMES)], ask("b", 50, NOW - 10, pressing=False)).look_again == math.inf


def test_what_one_sets_in_motion_may_be_all_that_another_waited_for() -> None:
    """It is decided in one step. The gang stands on both devices; the older ask waited for it alone."""
    gang = hold("g", 50, on="01", since=NOW - 30, idle_since=None, keeps=2 * GIB, start_seconds=54, wake_seconds=4)
    rest = [hold("b", 17, on="1", always=True), hold("c", 8, on="1", idle_since=800.0, keeps=GIB, priority=1)]
    found = moves(gpus(80, 80), [gang, *rest, hold("r", 10, on="0", always=True)],
                  ask("old", 55, OVERDUE - 5, on="1"), ask("new", 29, OVERDUE, on="0"))  # fmt: skip
    assert (found.go, {**found.go_for}) == ({"g": Depth.SLEEP, "c": Depth.SLEEP}, {"g": "new", "c": "old"})


# What never fits, and what is short


def test_what_would_not_fit_if_all_had_gone_is_stuck() -> None:
    """Beside what is always to run; memory of other programs may go."""
    assert moves(gpus(80), [hold("a", 30, always=True), hold("c", 50)], ask("b", 51)).stuck == ("b",)
    assert moves(gpus(80), [hold("a", 30, always=True), hold("c", 50)], ask("b", 50)).stuck == ()
    leaves = hold("a", 70, YIELDS, always=True, to=Depth.STOP)
    assert moves(gpus(80), [leaves, hold("c", 10, GOES, not_ended="it survives")], ask("b", 75)).stuck == ()
    assert moves(gpus(80), [], ask("b", 81)).stuck == ("b",)
    assert moves(gpus(80, foreign=79), [], ask("b", 80)).stuck == ()
    assert moves(gpus(80, 80), [hold("a", 1, always=True)], ask("b", 80, count=2)).stuck == ("b",)


def short(free: int, *holds: Hold, since: float = NOW, place: str = "", lacks: Short | None = None) -> Moves:
    """An ask for 40 GiB, where so many are measured as free."""
    devices = {"0": replace(gpus(80)["0"], free=free * GIB)}
    return moves(devices, holds, ask("b", 40, since, place=tuple(place), short=lacks))


def test_an_engine_comes_only_where_as_much_is_measured_as_free() -> None:
    """Elsewhere it does at once; else it waits for that place."""
    assert short(40).admit
    found = short(39)
    assert (found.admit, found.place, found.short) == ({}, {"b": ("0",)}, {"b": Short(NOW)})
    assert found.look_again == NOW + 10
    devices = {"0": replace(gpus(80)["0"], free=39 * GIB), "1": gpus(80, 80)["1"]}
    assert admitted(moves(devices, [hold("a", 1, on="1")], ask("b", 40))) == {"b": "1"}
    asleep = {"0": replace(gpus(80)["0"], free=38 * GIB)}
    assert moves(asleep, [hold("b", 2, SLEEPS)], ask("b", 40)).admit, "it has a part of it"


def test_where_devices_are_short_for_long_one_more_goes_and_then_it_is_refused() -> None:
    """The one worth least; and nothing is counted while something still leaves."""
    rest = hold("a", 10), hold("c", 10, start_seconds=5), hold("d", 10, always=True)
    assert short(39, *rest, lacks=Short(NOW - 9)).go == {}
    found = short(39, *rest, lacks=Short(NOW - 10))
    assert (found.go, found.short, found.refuse) == ({"c": Depth.STOP}, {"b": Short(NOW, evicted=True)}, ())
    again = short(39, *rest, place="0", lacks=Short(NOW - 10))
    assert (again.place, again.short) == (found.place, found.short), "its place was known already"
    leaving = short(39, *rest, hold("e", 1, GOES, to=Depth.STOP), lacks=Short(NOW - 30, evicted=True))
    assert (leaving.go, leaving.refuse) == ({}, ())
    drains = short(39, *rest, hold("e", 1, YIELDS, to=Depth.STOP), lacks=Short(NOW - 30, evicted=True))
    assert (drains.go, drains.refuse, drains.short) == ({}, (), {"b": Short(NOW, evicted=True)})
    after = short(39, *rest, lacks=Short(NOW - 10, evicted=True))
    assert (after.go, after.refuse) == ({}, ("b",))
    assert short(39, lacks=Short(NOW - 10)).refuse == ("b",), "nobody may go"
    assert short(39, hold("a", 10, since=NOW - 1), lacks=Short(NOW - 10)).refuse == ("b",), "nobody may go now"


def test_what_only_other_programs_are_in_the_way_of_waits_and_is_then_refused() -> None:
    """Nobody goes for it in vain."""
    devices = gpus(80, foreign=50)
    found = moves(devices, [hold("a", 20)], ask("b", 40))
    assert (found.go, found.stuck, found.short, found.place) == ({}, (), {"b": Short(NOW)}, {})
    late = moves(devices, [hold("a", 20)], ask("b", 40, short=Short(NOW - 10)))
    assert (late.go, late.refuse) == ({}, ("b",))
    assert gone(moves(devices, [hold("a", 20)], ask("b", 30))) == {"a"}
    lasting = hold("a", 20, always=True)
    assert moves(gpus(80, foreign=40), [lasting], ask("b", 60)).short == {"b": Short(NOW)}, "to the byte"
    behind = moves(gpus(80, foreign=10), [hold("x", 60, GOES)], ask("b", 60, 990), ask("c", 60))
    assert (behind.place, behind.short) == ({"b": ("0",)}, {}), "its turn has not come"
    own = replace(hold("b2", 70), model="b")
    assert moves(gpus(80, foreign=1), [own], ask("b", 40)).short == {}, "they are not what is in its way"
    assert moves(gpus(80), [own], ask("b", 40)).short == {}


def test_who_does_not_press_is_not_refused() -> None:
    """It waits for as long as it takes, and nobody goes."""
    waits = ask("b", 40, pressing=False, short=Short(0.0))
    devices = {"0": replace(gpus(80)["0"], free=39 * GIB)}
    for found in (
        moves(devices, [hold("a", 10)], waits),
        moves(gpus(80, foreign=50), [hold("a", 20)], waits),
    ):
        assert (found.admit, found.go, found.refuse, found.short) == ({}, {}, (), {})


# What people are told


def test_who_waits_is_told_for_whom_and_until_when() -> None:
    """Instances that are in its way, asks before its own, and when those that are to go may."""
    busy = hold("a", 80, since=NOW - 20, idle_since=None)
    wait = moves(gpus(80), [busy], ask("b", 50, OVERDUE)).wait["b"]
    assert (wait.where, wait.waits_for, wait.behind, wait.at) == (("0",), ("a",), (), NOW + 40)
    found = moves(gpus(80), [busy], ask("b", 50, OVERDUE - 1), ask("c", 50, OVERDUE))
    assert (found.wait["c"].behind, found.wait["c"].waits_for) == (("b",), ())
    assert moves(gpus(80, 80), [], ask("b", 90, only=("1",))).wait["b"].where == ("1",)
    assert moves(gpus(80, 80), [], ask("b", 90, on="01")).wait["b"].where == ("0", "1")
    found = moves(gpus(80), [busy], ask("b", 50, 990), ask("c", 50, pressing=False))
    assert found.wait["c"].behind == ("b",)
