"""What a key uses goes on under its name while its limits change, and requests in flight give back what they held."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.account import Account
from vllm_proxy.domain.limits import Limits, Rate
from vllm_proxy.domain.usage import Spent
from vllm_proxy.domain.window import Granted, Refused, admit, charge, settle

EPOCH = 1_790_000_000.0
MODELS = ("chat", "org/a", "other")


def account(limits: Limits, spent: Spent | None = None) -> Account:
    """Of a key that begins now."""
    return Account(limits, lambda: spent or Spent(0, 0), EPOCH)


def test_a_request_meets_the_limits_of_its_key_and_of_its_model() -> None:
    """An entry counts for each model that its glob matches, on its own; models without one have the key's alone."""
    one = account(Limits(Rate(0, 100), models=(("org/*", Rate(0, 50)), ("chat", Rate(0, 10)))))
    assert isinstance(admit(one.of("org/a", 1.0), 40, 0, 1.0, EPOCH, bounded=True), Granted)
    assert isinstance(found := admit(one.of("org/a", 1.0), 20, 0, 1.0, EPOCH, bounded=True), Refused)
    assert found.scope == "org/a"
    assert isinstance(admit(one.of("org/b", 1.0), 20, 0, 1.0, EPOCH, bounded=True), Granted)
    assert isinstance(admit(one.of("chat", 1.0), 10, 0, 1.0, EPOCH, bounded=True), Granted)
    assert isinstance(found := admit(one.of("other", 1.0), 31, 0, 1.0, EPOCH, bounded=True), Refused)
    assert found.scope == ""
    assert one.of("other", 1.0) is one.of("other", 1.0)
    assert [(use.scope, use.used + use.held) for use in one.all().uses(1.0, EPOCH)] == [
        ("", 70), ("org/a", 40), ("org/b", 20), ("chat", 10),
    ]  # fmt: skip


def test_a_quota_begins_with_what_the_ledger_says() -> None:
    """Also one that is new; one that is there goes on with what it has."""
    one = account(Limits(tokens_per_day=100), Spent(day=90, month=500))
    assert isinstance(admit(one.of("chat", 1.0), 11, 0, 1.0, EPOCH, bounded=True), Refused)
    one.change(Limits(tokens_per_day=200, tokens_per_month=505), lambda: Spent(day=0, month=500), EPOCH)
    assert isinstance(found := admit(one.of("chat", 1.0), 6, 0, 1.0, EPOCH, bounded=True), Refused)
    assert found.limit == "tokens_per_month"
    assert [use.used for use in one.all().uses(1.0, EPOCH)] == [90, 500]


def test_a_limit_that_comes_back_finds_what_was_used() -> None:
    """Taken away and given again within the minute it refuses what it would have refused."""
    one = account(Limits(Rate(0, 100)))
    found = admit(one.of("chat", 1.0), 90, 0, 1.0, EPOCH, bounded=True)
    assert isinstance(found, Granted)
    settle(found, 90, 1.0, EPOCH)
    one.change(Limits(), lambda: Spent(0, 0), EPOCH)
    assert not one.of("chat", 2.0).is_any
    one.change(Limits(Rate(0, 100)), lambda: Spent(0, 0), EPOCH)
    assert isinstance(admit(one.of("chat", 3.0), 20, 0, 3.0, EPOCH, bounded=True), Refused)


def test_a_limit_that_comes_while_a_request_runs_is_charged_by_it() -> None:
    """With what it used in the end; those that it held are settled alone."""
    one = account(Limits(Rate(0, 100)))
    found = admit(one.of("chat", 1.0), 50, 0, 1.0, EPOCH, bounded=True)
    assert isinstance(found, Granted)
    before = one.of("chat", 1.0)
    one.change(Limits(Rate(0, 100), tokens_per_day=500, models=(("chat", Rate(0, 200)),)), lambda: Spent(30, 30), EPOCH)
    settle(found, 40, 2.0, EPOCH)
    charge(one.of("chat", 2.0), before, 40, 2.0, EPOCH)
    assert [(use.name, use.scope, use.used) for use in one.of("chat", 2.0).uses(2.0, EPOCH)] == [
        ("tokens_per_minute", "", 40), ("tokens_per_minute", "chat", 40), ("tokens_per_day", "", 70),
    ]  # fmt: skip


RATES = st.builds(Rate, st.sampled_from([0, 5]), st.sampled_from([0, 50, 100]))
LIMITS = st.builds(
    Limits,
    RATES,
    tokens_per_day=st.sampled_from([0, 500]),
    models=st.lists(st.tuples(st.sampled_from(["chat", "org/*", "*"]), RATES), max_size=2).map(
        lambda models: tuple(dict(models).items())
    ),
)


@given(st.lists(LIMITS | st.tuples(st.sampled_from(MODELS), st.integers(0, 60)) | st.integers(0, 5), max_size=25))
def test_nothing_is_held_when_nothing_is_in_flight(steps: list[Limits | tuple[str, int] | int]) -> None:
    """Whatever limits came and went meanwhile; and nothing is held twice, or given back that was not held."""
    one, flying = account(Limits(Rate(0, 100))), list[Granted]()
    for step in steps:
        if isinstance(step, Limits):
            one.change(step, lambda: Spent(0, 0), EPOCH)
        elif isinstance(step, tuple):
            found = admit(one.of(step[0], 1.0), step[1], 0, 1.0, EPOCH, bounded=True)
            if isinstance(found, Granted):
                flying.append(found)
        elif flying:
            settle(flying.pop(step % len(flying)), 0, 1.0, EPOCH)
        assert all(use.held >= 0 for use in one.all().uses(1.0, EPOCH))
    for grant in flying:
        settle(grant, 1, 1.0, EPOCH)
    assert all(use.held == 0 for use in one.all().uses(1.0, EPOCH))


def test_a_request_without_a_model_meets_the_limits_of_its_key_once() -> None:
    """As one for a stored response, which an id alone names."""
    one = account(Limits(Rate(2, 0)))
    for _ in range(2):
        assert isinstance(admit(one.of("", 1.0), 0, 0, 1.0, EPOCH, bounded=True), Granted)
    assert isinstance(admit(one.of("", 1.0), 0, 0, 1.0, EPOCH, bounded=True), Refused)
