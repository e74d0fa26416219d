"""Requests that wait for an endpoint of one model: the order in which they get one.

Who has the smallest number is next, and of one number who came first. Who has as much in flight as its key allows is
passed over, as is who waits for an adapter that no free instance holds; they hold up nobody. Everything runs on the
event loop; who is served or failed is no longer in the queue.
"""

import asyncio
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.prompt import Prompt


class Turn(Protocol):
    """When a request of a caller with limits may have an endpoint."""

    number: int  # who has the smallest one is next

    def may_go(self) -> bool:
        """Whether its caller has fewer requests in flight than it may."""

    def go(self) -> None:
        """It has an endpoint now."""

    def wait(self, queue_size: int) -> None:
        """It waits from now on.

        Raises:
            RequestError: so many of its caller's wait already, for one of them to end.

        """


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for an endpoint."""

    caller: str  # for whom: the client's address; "" where it is not known
    since: float  # of the loop's clock
    endpoint: asyncio.Future[Endpoint]
    turn: Turn | None = None  # None: it is served as one with number 0
    adapter: str = ""  # that the instance has to hold; "": it wants the model itself
    prompt: Prompt | None = None  # by which it may be given one

    @property
    def number(self) -> int:
        """Who has the smallest one is next."""
        return 0 if self.turn is None else self.turn.number


class Queue:
    """Of one model."""

    def __init__(self) -> None:
        self._waiters: deque[Waiter] = deque()  # in the order of their numbers

    def __len__(self) -> int:
        return len(self._waiters)

    def contenders(self, adapters: Container[str]) -> int:
        """How many wait for an endpoint that holds one of these adapters, "" for the model itself.

        Those that wait for another request of their own key hold up nobody.
        """
        mine = (waiter for waiter in self._waiters if waiter.adapter in adapters)
        return sum(waiter.turn is None or waiter.turn.may_go() for waiter in mine)

    @property
    def since(self) -> float | None:
        """Since when the oldest one waits, on the loop's clock; None: nobody does."""
        return min((waiter.since for waiter in self._waiters), default=None)

    def add(self, waiter: Waiter) -> None:
        """One more waits."""
        behind, number = len(self._waiters), waiter.number
        while behind and self._waiters[behind - 1].number > number:
            behind -= 1
        self._waiters.insert(behind, waiter)

    def discard(self, waiter: Waiter) -> None:
        """It waits no more, whether or not it was served."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def adapters(self) -> set[str]:
        """What is waited for: the ids of adapters, "" for the model itself."""
        return {waiter.adapter for waiter in self._waiters}

    def take(self, free: Container[str] | None = None) -> Waiter | None:
        """Who gets an endpoint now; None: nobody who may go waits.

        `free`: which adapters free instances hold, "" for the model itself; None: who is next wants whatever there is.
        """
        for waiter in self._waiters:
            if waiter.endpoint.done():  # cancelled, and its task has not run yet
                continue
            if free is not None and waiter.adapter not in free:
                continue
            if waiter.turn is None or waiter.turn.may_go():
                self._waiters.remove(waiter)
                if waiter.turn is not None:
                    waiter.turn.go()
                return waiter
        return None

    def clear(self, adapter: str = "") -> list[Waiter]:
        """All that wait, or all that wait for one adapter, who then wait no more."""
        gone = [waiter for waiter in self._waiters if not adapter or waiter.adapter == adapter]
        self._waiters = deque(waiter for waiter in self._waiters if adapter and waiter.adapter != adapter)
        return [waiter for waiter in gone if not waiter.endpoint.done()]
