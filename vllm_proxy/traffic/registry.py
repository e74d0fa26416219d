"""Routing: which endpoints serve a model now, the leases on them, and the queue of requests that wait for one.

A lease is counted in the step that grants it and released exactly once, whatever ends its request. Each model has a
queue of its own: no head-of-line blocking between models, nor behind who has as much in flight as its key allows.
Everything runs on the event loop, and no method but `acquire`, `wait` and `wait_idle` waits.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from vllm_proxy.domain.config import ModelSpec, Policy
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.runtime import clock
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.queue import Queue, Turn, Waiter

_MOST_RETRY_AFTER = 120  # seconds: the OpenAI client gives up where it is asked to wait for longer


@dataclass(slots=True)
class Route:
    """One model, as requests see it."""

    spec: ModelSpec
    wake: Callable[[], None]  # a request waits for it, and nothing has started it
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

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting)

    @property
    def waits_since(self) -> float | None:
        """Since when the oldest request has waited, on the loop's clock; None: nobody waits."""
        return self.waiting.since

    def _add(self, endpoint: Endpoint, count: int) -> None:
        endpoint.add(count)
        self.in_flight += count
        if not endpoint.in_flight:
            endpoint.idle_since = asyncio.get_running_loop().time()
            if not self.in_flight:
                self.idle_since = endpoint.idle_since


class Lease:
    """One request's hold on one instance. `with lease:` gives it back."""

    def __init__(self, registry: "Registry", route: Route, endpoint: Endpoint) -> None:
        self._registry = registry
        self._route = route
        self._tried = [endpoint]
        self.endpoint = endpoint
        self.model_id = route.spec.id

    @property
    def policy(self) -> Policy:
        """The model's policy now: it may change while a request runs."""
        return self._route.spec.policy

    @property
    def closing(self) -> bool:
        """Whether the daemon is stopping, so that clients should not keep their connection."""
        return self._registry.closing

    def move(self) -> bool:
        """Give the instance up for one that was not tried yet; False, and nothing changed, where there is none."""
        return self._move(_least_loaded(self._route, self._tried))

    def move_back(self, endpoint: Endpoint) -> bool:
        """Return to an instance that was given up; False, and nothing changed, where it is gone or full by now."""
        if endpoint is self.endpoint:
            return endpoint in self._route.endpoints
        most = self.policy.max_in_flight
        usable = endpoint in self._route.endpoints and (not most or endpoint.in_flight < most)
        return self._move(endpoint if usable else None)

    def _move(self, other: Endpoint | None) -> bool:
        if other is None:
            return False
        self._route._add(other, 1)  # noqa: SLF001 - the counters are this module's
        self._registry.release(self._route, self.endpoint)
        self._tried.append(other)
        self.endpoint = other
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.release(self._route, self.endpoint)


class Registry:
    """All routes, by model id and by alias."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._aliases: dict[str, str] = {}
        self.closing = False
        self._closed = False

    # Reported by the reconciler and its supervisors

    def declare(self, spec: ModelSpec, wake: Callable[[], None]) -> None:
        """There is such a model, enabled or not. `wake` is called when a request waits for it, again and again."""
        self._routes[spec.id] = Route(spec, wake, idle_since=asyncio.get_running_loop().time())
        self._aliases |= dict.fromkeys(spec.policy.aliases, spec.id)

    def update(self, specs: Mapping[str, ModelSpec]) -> None:
        """What the file says now. Models that it does not hold any more are retired: unknown, while they drain."""
        self._aliases = {alias: spec.id for spec in specs.values() for alias in spec.policy.aliases}
        self._routes = {
            **{name: self._routes[name] for name in specs if name in self._routes},
            **{name: route for name, route in self._routes.items() if name not in specs},
        }
        for name, route in self._routes.items():
            if route.retired:
                continue  # its successor, if there is one, is declared when it is gone
            route.retired = name not in specs
            route.spec = specs.get(name, route.spec)
            if route.retired or not route.spec.policy.enabled:
                self._fail_waiting(route)
            else:
                self._serve_waiting(route)  # more may be let in than before

    def forget(self, model_id: str) -> None:
        """A retired model has ended."""
        del self._routes[model_id]

    def report(self, model_id: str, state: State, message: str | None, *, stopped_by_hand: bool = False) -> None:
        """A model's state changed. The requests that wait for it fail where it will not become ready by itself."""
        route = self._routes[model_id]
        route.state, route.message, route.stopped_by_hand = state, message, stopped_by_hand
        route.accepts = state is State.READY and not stopped_by_hand
        if stopped_by_hand or state is State.ERROR:
            self._fail_waiting(route)

    def report_room(self, model_id: str, because: str | None, no_room: str | None, ready_in: float | None) -> None:
        """Why a model that does not serve waits for room, where it does.

        `no_room`: none can be made; `ready_in`: seconds, a guess.
        """
        route = self._routes[model_id]
        route.because, route.no_room, route.ready_in = because, no_room, ready_in
        if no_room is not None:
            self._fail_waiting(route)

    def add_endpoint(self, model_id: str, endpoint: Endpoint) -> None:
        """An instance is ready."""
        route = self._routes[model_id]
        route.endpoints.append(endpoint)
        route.idle_since = endpoint.idle_since = asyncio.get_running_loop().time()
        self._serve_waiting(route)

    def withdraw_endpoint(self, model_id: str, endpoint: Endpoint) -> None:
        """No new request for this instance; those in flight keep their lease."""
        self._routes[model_id].endpoints.remove(endpoint)

    def readmit(self, model_id: str) -> None:
        """An ejected instance takes requests again."""
        self._serve_waiting(self._routes[model_id])

    def disable_keep_alive(self) -> None:
        """The daemon stops: answers tell clients not to keep their connections alive."""
        self.closing = True

    def close(self) -> None:
        """No new request for anyone."""
        self.closing = self._closed = True
        for route in self._routes.values():
            self._fail_waiting(route)

    # For requests

    def names(self) -> dict[str, Route]:
        """Every name that clients may send, with its route: ids first, aliases behind; disabled models left out."""
        enabled = {
            name: route for name, route in self._routes.items() if route.spec.policy.enabled and not route.retired
        }
        return enabled | {alias: enabled[name] for alias, name in self._aliases.items() if name in enabled}

    def find(self, name: str) -> Route:
        """The route of an id or alias.

        Raises:
            RequestError: `model_not_found`.

        """
        route = self._routes.get(self._aliases.get(name, name))
        if route is None or route.retired:
            raise model_not_found(name)
        return route

    def is_awaited(self, model_id: str) -> bool:
        """Whether a request waits for this model."""
        return self.waits_since(model_id) is not None

    def waits_since(self, model_id: str) -> float | None:
        """Since when the oldest request has waited for this model, on the loop's clock; None: nobody does."""
        return self._routes[model_id].waits_since

    def idle_seconds(self, model_id: str) -> float:
        """For how long no request has held this model or waited for it."""
        route = self._routes[model_id]
        if route.in_flight or self.is_awaited(model_id):
            return 0.0
        return clock.elapsed(route.idle_since)

    def counts(self, model_id: str) -> tuple[int, int]:
        """Requests in flight and requests waiting, of one model."""
        route = self._routes[model_id]
        return route.in_flight, route.queued

    async def acquire(self, name: str, turn: Turn | None = None) -> Lease:
        """Hold an instance that serves `name`: at once, or when one becomes ready or free.

        Raises:
            RequestError: when none will, the queue is full or the wait too long.

        """
        route = self.find(name)
        return self.lease(route, turn) or await self.wait(route, turn=turn)

    def lease(self, route: Route, turn: Turn | None = None) -> Lease | None:
        """Hold an instance now; None where the request must wait for one.

        Raises:
            RequestError: when none will come.

        """
        if self._closed or not route.accepts or not route.spec.policy.enabled:
            self._raise_if_unavailable(route)
            route.wake()
        endpoint = _least_loaded(route)
        if endpoint is None or route.waiting:
            return None
        if turn is not None:
            if not turn.may_go():
                return None
            turn.go()
        route._add(endpoint, 1)  # noqa: SLF001 - as above
        return Lease(self, route, endpoint)

    async def wait(self, route: Route, caller: str = "", turn: Turn | None = None) -> Lease:
        """Hold an instance when one becomes ready or free. `caller`: for whom it waits.

        Raises:
            RequestError: when none will, the queue is full or the wait too long.

        """
        return Lease(self, route, await self._queue(route, caller, turn))

    def next_turn(self, model_id: str) -> None:
        """Somebody who waits for this model may go now."""
        if (route := self._routes.get(model_id)) is not None:
            self._serve_waiting(route)

    def every_instance(self, wanted: Callable[[ModelSpec], bool]) -> Iterator[Lease]:
        """A lease on each ready instance of the `wanted` models in turn, for what only one of them knows."""
        for route in [route for route in self._routes.values() if wanted(route.spec)]:
            for endpoint in list(route.endpoints):
                if endpoint in route.endpoints:  # not withdrawn meanwhile
                    route._add(endpoint, 1)  # noqa: SLF001 - as above
                    yield Lease(self, route, endpoint)

    def release(self, route: Route, endpoint: Endpoint) -> None:
        """A request has ended: its permit is free."""
        route._add(endpoint, -1)  # noqa: SLF001 - as above
        if route.waiting:
            self._serve_waiting(route)

    def _raise_if_unavailable(self, route: Route) -> None:
        name = route.spec.id
        if self._closed:
            raise RequestError("shutting_down", "cannot take requests: the daemon is stopping", retry_after=5)
        if route.retired:
            raise model_not_found(name)
        if not route.spec.policy.enabled:
            raise RequestError("model_disabled", f"cannot serve {name}: it is disabled in the configuration")
        if route.state is State.ERROR:
            raise RequestError("model_error", f"cannot serve {name}: {route.message}")
        if route.stopped_by_hand:
            raise RequestError("model_stopped", f"cannot serve {name}: it was stopped by hand")
        if route.no_room is not None:
            raise RequestError("no_room", route.no_room)

    async def _queue(self, route: Route, caller: str, turn: Turn | None) -> Endpoint:
        policy = route.spec.policy
        if turn is not None:
            turn.wait(policy.queue_size)
        if route.queued >= policy.queue_size and route.waiting.contenders() >= policy.queue_size:
            msg = f"cannot serve {route.spec.id}: {policy.queue_size} requests wait already"
            raise RequestError("queue_full", msg, retry_after=_retry_after(route.ready_in))
        if not route.waiting:  # from now on somebody waits
            route.wake()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Endpoint] = loop.create_future()
        waiter = Waiter(caller, loop.time(), future, turn)
        route.waiting.add(waiter)
        self._serve_waiting(route)  # those in front may be none that may go
        try:
            if await clock.wait({future}, policy.queue_timeout):
                return future.result()
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(route, future.result())  # a race: it was granted in the moment of the cancellation
            raise
        finally:
            route.waiting.discard(waiter)
            route.idle_since = loop.time()
        msg = f"cannot serve {route.spec.id}: it was not ready or free within {policy.queue_timeout:g} s"
        if route.because is not None:
            msg = f"{msg}; it {route.because}"
        raise RequestError("queue_timeout", msg)

    def _serve_waiting(self, route: Route) -> None:
        while route.waiting and (endpoint := _least_loaded(route)) and (waiter := route.waiting.take()):
            route._add(endpoint, 1)  # noqa: SLF001 - as above
            waiter.endpoint.set_result(endpoint)

    def _fail_waiting(self, route: Route) -> None:
        for waiter in route.waiting.clear():
            try:
                self._raise_if_unavailable(route)
            except RequestError as error:
                waiter.endpoint.set_exception(error)
            else:
                raise AssertionError("whoever waits is failed for a reason")


def _retry_after(ready_in: float | None) -> int:
    return 1 if ready_in is None else min(max(math.ceil(ready_in), 1), _MOST_RETRY_AFTER)


def _least_loaded(route: Route, without: Sequence[Endpoint] = ()) -> Endpoint | None:
    """The endpoint with the fewest requests in flight, any of them where several have; None when all are full.

    Ejected ones are left out, unless there is no other.
    """
    most = route.spec.policy.max_in_flight
    if len(route.endpoints) == 1 and not without:
        only = route.endpoints[0]
        return only if not most or only.in_flight < most else None
    usable = [endpoint for endpoint in route.endpoints if not endpoint.ejected] or route.endpoints
    free = [endpoint for endpoint in usable if (not most or endpoint.in_flight < most) and endpoint not in without]
    if len(free) <= 1:
        return free[0] if free else None
    least = min(endpoint.in_flight for endpoint in free)
    return random.choice([endpoint for endpoint in free if endpoint.in_flight == least])  # noqa: S311 - no secret
