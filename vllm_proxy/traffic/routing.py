"""What a name leads to: a model or an adapter of it, the instances that serve it, and which of them is next.

Kept by the registry. Everything runs on the event loop.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vllm_proxy.domain.adapters import Adapter
from vllm_proxy.domain.balance import LENGTHS, Memory, least_loaded
from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.prompt import Prompt
from vllm_proxy.traffic.queue import Queue


@dataclass(slots=True)
class Routed:
    """What decided which instance got a request, counted; of those that were compared, bytes of their prompts."""

    prefix: int = 0  # what it was sent before
    load: int = 0
    only: int = 0  # no other could take it
    known_bytes: int = 0  # sent where they had been sent before
    all_bytes: int = 0


@dataclass(slots=True, eq=False)
class Route:
    """One model, or one adapter of it, as requests see it.

    The spec of an adapter's is its base's under the adapter's id. Of an adapter's count `endpoints`, `accepts`,
    `retired` and `problem` alone: all else is in its `base`, which of a model is the route itself.
    """

    spec: ModelSpec
    wake: Callable[[], None]  # a request waits for it, and nothing has started it
    base: "Route" = None  # type: ignore[assignment]  # set below
    adapters: "dict[str, Route]" = field(default_factory=dict)  # by id, in the file's order
    problem: str | None = None  # of an adapter: why no instance that runs will hold it
    state: State = State.STOPPED
    message: str | None = None  # why it is not ready
    because: str | None = None  # why it waits for room
    no_room: str | None = None  # why it will not become ready by itself, though it waits for room
    ready_in: float | None = None  # seconds; a guess, where it waits for room
    stopped_by_hand: bool = False
    retired: bool = False  # gone from the file, while its engines drain
    accepts: bool = False  # takes requests: ready, and not about to be stopped by hand
    idle_since: float = 0.0  # of the loop's clock; since when nothing holds it
    endpoints: list[Endpoint] = field(default_factory=list)
    waiting: Queue = field(default_factory=Queue)
    in_flight: int = 0  # requests that hold an endpoint of this model, a withdrawn one included
    balances: bool = False  # whether what its instances were sent decides who gets a request
    memory: Memory[Endpoint] = field(default_factory=Memory)  # of what that was
    routed: Routed = field(default_factory=Routed)

    def __post_init__(self) -> None:
        self.base = self.base or self

    @property
    def queued(self) -> int:
        """Requests that wait, for its adapters too."""
        return len(self.waiting)

    @property
    def waits_since(self) -> float | None:
        """Since when the oldest request has waited, on the loop's clock; None: nobody waits."""
        return self.waiting.since

    @property
    def adapter(self) -> str:
        """The id of an adapter's; "" of a model's."""
        return "" if self.base is self else self.spec.id

    def rivals(self) -> set[str]:
        """What is waited for that is served as soon as this, or later because of it: ids of adapters, "" the model."""
        base = self.base
        if base.endpoints and not self.endpoints:  # its time comes when an instance has loaded it
            return {self.adapter}
        return {"", *(name for name, one in base.adapters.items() if one.endpoints or not base.endpoints)}

    def names(self) -> "dict[str, Route]":
        """What leads to this model and to its adapters."""
        return {self.spec.id: self, **self.adapters, **dict.fromkeys(self.spec.policy.aliases, self)}

    def add(self, endpoint: Endpoint, count: int) -> None:
        """So many requests more on one of its instances. For the registry alone."""
        endpoint.add(count)
        base = self.base
        base.in_flight += count
        if not endpoint.in_flight:
            endpoint.idle_since = asyncio.get_running_loop().time()
            if not base.in_flight:
                base.idle_since = endpoint.idle_since

    def follow_balance(self) -> None:
        """Its instances have changed, or its policy."""
        wanted = self.spec.policy.balance == "prefix"
        self.balances = wanted and len(self.endpoints) > 1
        if self.balances:
            self.memory.follow(self.endpoints)
        elif not wanted:
            self.memory.clear()  # what they are sent from now on would not be in it

    def find_holders(self) -> None:
        """Which instances hold which adapter has changed, or whether they take requests."""
        for adapter_id, route in self.adapters.items():
            route.endpoints = [endpoint for endpoint in self.endpoints if adapter_id in endpoint.adapters]
            route.accepts = self.accepts and bool(route.endpoints)


def spec_of(adapter: Adapter, base: ModelSpec) -> ModelSpec:
    """As requests for an adapter see it: its base's under its own id, without the names of the base."""
    policy = base.policy.model_copy(update={"enabled": base.policy.enabled and adapter.enabled, "aliases": ()})
    return replace(base, id=adapter.id, policy=policy, adapters={})


def free_endpoints(route: Route, without: Sequence[Endpoint] = ()) -> Sequence[Endpoint]:
    """Those that can be sent a request; ejected ones are left out, unless there is no other."""
    most = route.spec.policy.max_in_flight
    if len(route.endpoints) == 1 and not without:
        return () if most and route.endpoints[0].in_flight >= most else route.endpoints
    usable = [endpoint for endpoint in route.endpoints if not endpoint.ejected] or route.endpoints
    if most or without:
        return [one for one in usable if (not most or one.in_flight < most) and one not in without]
    return usable


def pick(route: Route, free: Sequence[Endpoint], prompt: Prompt | None) -> Endpoint:
    """Who is sent a request of those that can be, as the model's `balance` says; it is remembered, and counted."""
    base = route.base
    routed = base.routed
    if len(free) == 1:
        routed.only += 1
        if prompt is not None and prompt.is_marked:  # it had a choice before
            prompt.known, _ = base.memory.known(prompt.marks, free[0].bit)
            base.memory.learn(prompt, free[0])
        return free[0]
    chance = random.random()  # noqa: S311 - no secret
    if prompt is None or not base.balances:
        routed.load += 1
        return least_loaded(free, chance)
    prompt.mark(route.adapter)
    chosen, prompt.known, by_prefix = base.memory.choose(prompt, free, chance)
    base.memory.learn(prompt, chosen)
    if by_prefix:
        routed.prefix += 1
    else:
        routed.load += 1
    routed.known_bytes += LENGTHS[prompt.known]
    routed.all_bytes += prompt.size
    return chosen
