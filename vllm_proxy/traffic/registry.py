"""Routing: which endpoints serve a model now, the leases on them, and the queue of requests that wait for one.

Each model has a queue of its own: no head-of-line blocking between models, nor behind who has as much in flight as its
key allows, nor behind who waits for an adapter that no instance holds yet. An adapter has a route of its own, to the
instances that hold it; all else is its base's. Everything runs on the event loop, and no method but `acquire`, `wait`
and `wait_idle` waits.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.lifecycle import State
from vllm_proxy.errors import RequestError, model_not_found
from vllm_proxy.runtime import clock
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.lease import Lease
from vllm_proxy.traffic.prompt import Prompt
from vllm_proxy.traffic.queue import Turn, Waiter
from vllm_proxy.traffic.routing import Route, Routed, free_endpoints, pick, spec_of

_MOST_RETRY_AFTER = 120  # seconds: the OpenAI client gives up where it is asked to wait for longer


class Registry:
    """All routes, by the ids of models and adapters, and by alias."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}  # of models
        self._named: dict[str, Route] = {}  # by every name that is not retired
        self._balancing: set[str] = set()  # models where the prompt decides which instance gets a request
        self.balances = False  # whether there are any: else nobody looks for prompts
        self.closing = False
        self._closed = False

    # Reported by the reconciler and its supervisors

    def declare(self, spec: ModelSpec, wake: Callable[[], None]) -> None:
        """There is such a model, enabled or not. `wake` is called when a request waits for it, again and again."""
        route = self._routes[spec.id] = Route(spec, wake, idle_since=asyncio.get_running_loop().time())
        self._follow_adapters(route)
        self._named |= route.names()

    def update(self, specs: Mapping[str, ModelSpec]) -> None:
        """What the file says now. Models that it does not hold any more are retired: unknown, while they drain."""
        self._routes = {
            **{name: self._routes[name] for name in specs if name in self._routes},
            **{name: route for name, route in self._routes.items() if name not in specs},
        }
        for name, route in self._routes.items():
            if route.retired:
                continue  # its successor, if there is one, is declared when it is gone
            route.retired = name not in specs
            route.spec = specs.get(name, route.spec)
            self._follow_adapters(route)
            self._follow_balance(route)
            if route.retired or not route.spec.policy.enabled:
                self._fail_waiting(route)
            else:
                self._serve_waiting(route)  # more may be let in than before
        self._name()

    def _name(self) -> None:
        self._named = {}
        for route in self._routes.values():
            if not route.retired:
                self._named |= route.names()

    def _follow_balance(self, route: Route) -> None:
        route.follow_balance()
        (self._balancing.add if route.balances else self._balancing.discard)(route.spec.id)
        self.balances = bool(self._balancing)

    def _follow_adapters(self, route: Route) -> None:
        """Those that the file has now; who waits for one that is gone, or disabled, waits no more."""
        before = route.adapters
        route.adapters = {}
        for adapter in route.spec.adapters.values():
            found = before.get(adapter.id) or Route(route.spec, route.wake, route, waiting=route.waiting)
            found.spec = spec_of(adapter, route.spec)
            route.adapters[adapter.id] = found
            if not found.spec.policy.enabled:
                self._fail_waiting(found)
        for name, gone in before.items():
            if name not in route.adapters:
                gone.retired = True
                self._fail_waiting(gone)
        route.find_holders()

    def forget(self, model_id: str) -> None:
        """A retired model has ended."""
        del self._routes[model_id]
        self._balancing.discard(model_id)
        self._name()

    def report(self, model_id: str, state: State, message: str | None, *, stopped_by_hand: bool = False) -> None:
        """A model's state changed. The requests that wait for it fail where it will not become ready by itself."""
        route = self._routes[model_id]
        route.state, route.message, route.stopped_by_hand = state, message, stopped_by_hand
        route.accepts = state is State.READY and not stopped_by_hand
        if route.adapters:
            route.find_holders()
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
        route.find_holders()
        self._follow_balance(route)
        self._serve_waiting(route)

    def withdraw_endpoint(self, model_id: str, endpoint: Endpoint) -> None:
        """No new request for this instance; those in flight keep their lease."""
        route = self._routes[model_id]
        route.endpoints.remove(endpoint)
        route.find_holders()
        endpoint.bit = 0  # what it holds is forgotten, whatever becomes of it
        self._follow_balance(route)

    def hold_adapters(self, model_id: str) -> None:
        """Instances of this model hold other adapters than before: their endpoints say which."""
        route = self._routes[model_id]
        route.find_holders()
        self._serve_waiting(route)

    def report_adapters(self, model_id: str, problems: Mapping[str, str]) -> None:
        """Why no instance that runs will hold an adapter, by its id. The requests that wait for such a one fail."""
        for adapter_id, route in self._routes[model_id].adapters.items():
            route.problem = problems.get(adapter_id)
            if route.problem is not None and not route.endpoints:
                self._fail_waiting(route)

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
        """Every name that clients may send, with its route: ids first, aliases behind; what is disabled is left out."""
        enabled = {name: route for name, route in self._named.items() if route.spec.policy.enabled}
        return dict(sorted(enabled.items(), key=lambda item: item[0] != item[1].spec.id))

    def find(self, name: str, allowed: AbstractSet[str] | None = None) -> Route:
        """The route of an id or alias. `allowed`: those that the caller may use; None: all.

        Raises:
            RequestError: `model_not_found`, with some that there are.

        """
        route = self._named.get(name)
        if route is None or (allowed is not None and name not in allowed):
            usable = (
                each
                for each, route in self._named.items()
                if route.spec.policy.enabled and (allowed is None or each in allowed)
            )
            raise model_not_found(name, usable)
        return route

    def base_of(self, model_id: str) -> str:
        """The model whose instances serve an id; the id itself where there is no such adapter."""
        route = self._named.get(model_id)
        return model_id if route is None else route.base.spec.id

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

    def routed(self, model_id: str) -> Routed:
        """What decided which instances of one model got its requests."""
        return self._routes[model_id].routed

    async def acquire(self, name: str, turn: Turn | None = None) -> Lease:
        """Hold an instance that serves `name`: at once, or when one becomes ready or free.

        Raises:
            RequestError: when none will, the queue is full or the wait too long.

        """
        route = self.find(name)
        return self.lease(route, turn) or await self.wait(route, turn=turn)

    def lease(self, route: Route, turn: Turn | None = None, prompt: Prompt | None = None) -> Lease | None:
        """Hold an instance now; None where the request must wait for one. `prompt`: what may decide which one.

        Raises:
            RequestError: when none will come.

        """
        if self._closed or not route.accepts or not route.spec.policy.enabled:
            self._raise_if_unavailable(route)
            route.wake()
        free = free_endpoints(route)
        if not free or route.waiting:
            return None
        if turn is not None:
            if not turn.may_go():
                return None
            turn.go()
        endpoint = pick(route, free, prompt)
        route.add(endpoint, 1)
        return Lease(self, route, endpoint, prompt)

    async def wait(
        self, route: Route, caller: str = "", turn: Turn | None = None, prompt: Prompt | None = None
    ) -> Lease:
        """Hold an instance when one becomes ready or free. `caller`: for whom it waits; `prompt`: as in `lease`.

        Raises:
            RequestError: when none will, the queue is full or the wait too long.

        """
        return Lease(self, route, await self._queue(route, caller, turn, prompt), prompt)

    def next_turn(self, model_id: str) -> None:
        """Somebody who waits for this model may go now."""
        if (route := self._routes.get(model_id) or self._named.get(model_id)) is not None:
            self._serve_waiting(route)

    def every_instance(self, wanted: Callable[[ModelSpec], bool]) -> Iterator[Lease]:
        """A lease on each ready instance of the `wanted` models in turn, for what only one of them knows."""
        for route in [route for route in self._routes.values() if wanted(route.spec)]:
            for endpoint in list(route.endpoints):
                if endpoint in route.endpoints:  # not withdrawn meanwhile
                    route.add(endpoint, 1)
                    yield Lease(self, route, endpoint)

    def release(self, route: Route, endpoint: Endpoint) -> None:
        """A request has ended: its permit is free."""
        route.add(endpoint, -1)
        if route.waiting:
            self._serve_waiting(route)

    def _raise_if_unavailable(self, route: Route) -> None:
        name, base = route.spec.id, route.base
        if self._closed:
            raise RequestError("shutting_down", "cannot take requests: the daemon is stopping", retry_after=5)
        if route.retired or base.retired:
            raise model_not_found(name)
        if not route.spec.policy.enabled:
            raise RequestError("model_disabled", f"cannot serve {name}: it is disabled in the configuration")
        if base.state is State.ERROR:
            raise RequestError("model_error", f"cannot serve {name}: {base.message}")
        if base.stopped_by_hand:
            raise RequestError(
                "model_stopped", f"cannot serve {name}: it was stopped by hand, until somebody starts it"
            )
        if base.no_room is not None:
            raise RequestError("no_room", base.no_room)
        if route.problem is not None and not route.endpoints:
            raise RequestError("model_error", f"cannot serve {name}: {route.problem}")

    async def _queue(self, route: Route, caller: str, turn: Turn | None, prompt: Prompt | None) -> Endpoint:
        policy = route.spec.policy
        if turn is not None:
            turn.wait(policy.queue_size)
        if route.queued >= policy.queue_size and route.waiting.contenders(route.rivals()) >= policy.queue_size:
            waiting = "1 request waits" if policy.queue_size == 1 else f"{policy.queue_size} requests wait"
            msg = f"cannot serve {route.spec.id}: {waiting} already"
            raise RequestError("queue_full", msg, retry_after=_retry_after(route.base.ready_in))
        if not route.waiting:  # from now on somebody waits
            route.wake()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Endpoint] = loop.create_future()
        waiter = Waiter(caller, loop.time(), future, turn, route.adapter, prompt)
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
            route.base.idle_since = loop.time()
        msg = f"cannot serve {route.spec.id}: it was not ready or free within {policy.queue_timeout:g} s"
        if route.base.because is not None:
            msg = f"{msg}; it {route.base.because}"
        raise RequestError("queue_timeout", msg)

    def _serve_waiting(self, route: Route) -> None:
        base = route.base
        if base.adapters and base.waiting:
            self._serve_adapters_waiting(base)
            return
        while base.waiting and (free := free_endpoints(base)) and (waiter := base.waiting.take()):
            self._serve(base, free, waiter)

    def _serve(self, route: Route, free: Sequence[Endpoint], waiter: Waiter) -> None:
        endpoint = pick(route, free, waiter.prompt)
        route.add(endpoint, 1)
        waiter.endpoint.set_result(endpoint)

    def _serve_adapters_waiting(self, base: Route) -> None:
        """Who waits for what no free instance holds is passed over."""
        routes = {"": base, **base.adapters}
        while True:
            wanted = base.waiting.adapters()
            free = {name: found for name in wanted if name in routes and (found := free_endpoints(routes[name]))}
            waiter = base.waiting.take(free)
            if waiter is None:
                return
            self._serve(routes[waiter.adapter], free[waiter.adapter], waiter)

    def _fail_waiting(self, route: Route) -> None:
        """Of a model, who waits for its adapters too."""
        for waiter in route.waiting.clear(route.adapter):
            try:
                self._raise_if_unavailable(route.adapters.get(waiter.adapter, route))
            except RequestError as error:
                waiter.endpoint.set_exception(error)
            else:
                raise AssertionError("whoever waits is failed for a reason")


def _retry_after(ready_in: float | None) -> int:
    return 1 if ready_in is None else min(max(math.ceil(ready_in), 1), _MOST_RETRY_AFTER)
