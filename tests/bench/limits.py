"""What limits cost a request: admission, header lines and settling. `python -m tests.bench.limits` prints it.

Without looking up the key, which `access` measures. Figures are the least of many short rounds, of CPU time.
"""

import time
from collections.abc import Callable

from vllm_proxy.domain.fair import FairShare
from vllm_proxy.domain.limits import Rate
from vllm_proxy.domain.window import Budgets, Granted, Quota, Window, admit, anthropic_lines, openai_lines, settle

_CALLS, _ROUNDS = 2_000, 100
_RATE = Rate(10**8, 10**9)


def cost(calls: int = _CALLS, rounds: int = _ROUNDS) -> dict[str, float]:
    """Microseconds a call, by what is done."""
    now, epoch = time.monotonic(), time.time()
    one = Budgets([Window(_RATE, now)])
    two = Budgets([Window(_RATE, now), Window(_RATE, now, "bench*")])
    quotas = Budgets(two.windows, [Quota("day", 10**9, int, epoch), Quota("month", 10**9, int, epoch)])
    full = Budgets([Window(Rate(1, 1), now)])
    admit(full, 1, 0, now, epoch, bounded=True)
    fair = FairShare()
    works: dict[str, Callable[[], object]] = {
        "one scope": lambda: request(one),
        "two scopes": lambda: request(two),
        "two scopes, day and month": lambda: request(quotas),
        "two scopes: admit and settle": lambda: settled(two),
        "two scopes: six lines": lambda: openai_lines(two, time.monotonic(), epoch),
        "two scopes: lines of /v1/messages": lambda: anthropic_lines(two, time.monotonic(), epoch),
        "a refusal": lambda: admit(full, 1, 0, now, epoch, bounded=True),
        "a fair number": lambda: numbered(fair),
    }
    empty = _least(lambda: None, calls, rounds)
    return {name: _least(work, calls, rounds) - empty for name, work in works.items()}


def settled(budgets: Budgets) -> None:
    """A request that is let in, and over."""
    found = admit(budgets, 100, 200, time.monotonic(), time.time(), bounded=True)
    assert isinstance(found, Granted)
    settle(found, 120, time.monotonic(), time.time())


def request(budgets: Budgets) -> None:
    """As above, with the header lines of its answer."""
    now, epoch = time.monotonic(), time.time()
    found = admit(budgets, 100, 200, now, epoch, bounded=True)
    openai_lines(budgets, now, epoch)
    assert isinstance(found, Granted)
    settle(found, 120, time.monotonic(), epoch)


def numbered(fair: FairShare) -> None:
    """A request that is numbered, begins and ends."""
    place = fair.place("ci", 0, 1.0, 300)
    place.began()
    place.ended(120)


def _least(work: Callable[[], object], calls: int, rounds: int) -> float:
    return min(_seconds(work, calls) for _ in range(rounds)) / calls * 1e6


def _seconds(work: Callable[[], object], calls: int) -> float:
    began = time.process_time()
    for _ in range(calls):
        work()
    return time.process_time() - began


if __name__ == "__main__":
    for name, least in cost().items():
        print(f"{least:6.2f} us  {name}")
