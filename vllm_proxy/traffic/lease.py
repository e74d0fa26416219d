"""One request's hold on one instance, which it may move to another one that was not tried yet.

Made by the registry, which counts it in the step that grants it; released exactly once, whatever ends the request.
Everything runs on the event loop, and nothing here waits.
"""

from collections.abc import Sequence
from typing import Protocol, Self

from vllm_proxy.domain.config import Policy
from vllm_proxy.traffic.endpoint import Endpoint
from vllm_proxy.traffic.prompt import Prompt
from vllm_proxy.traffic.routing import Route, free_endpoints, pick


class Leases(Protocol):
    """Where leases come from: the registry."""

    closing: bool  # the daemon is stopping

    def release(self, route: Route, endpoint: Endpoint) -> None:
        """A request has ended: its permit is free."""


class Lease:
    """One request's hold on one instance. `with lease:` gives it back."""

    def __init__(self, registry: Leases, route: Route, endpoint: Endpoint, prompt: Prompt | None = None) -> None:
        self._registry = registry
        self._prompt = prompt
        self._route = route
        self._tried = [endpoint]
        self.endpoint = endpoint
        self.model_id = route.spec.id

    @property
    def policy(self) -> Policy:
        """The model's policy now: it may change while a request runs."""
        return self._route.spec.policy

    @property
    def other_names(self) -> tuple[str, ...]:
        """What else leads to the model."""
        return self._route.spec.other_names

    @property
    def answer_headers(self) -> bytes:
        """Lines of the answer: which model it comes from, and which instance."""
        found = self.endpoint.answer_headers
        return found if self._route.base is self._route else self.endpoint.answer_headers_of(self.model_id)

    @property
    def closing(self) -> bool:
        """Whether the daemon is stopping, so that clients should not keep their connection."""
        return self._registry.closing

    def move(self) -> bool:
        """Give the instance up for one that was not tried yet; False, and nothing changed, where there is none."""
        free = free_endpoints(self._route, self._tried)
        return bool(free) and self._move(free)

    def move_back(self, endpoint: Endpoint) -> bool:
        """Return to an instance that was given up; False, and nothing changed, where it is gone or full by now."""
        if endpoint is self.endpoint:
            return endpoint in self._route.endpoints
        most = self.policy.max_in_flight
        usable = endpoint in self._route.endpoints and (not most or endpoint.in_flight < most)
        return usable and self._move((endpoint,))

    def _move(self, free: Sequence[Endpoint]) -> bool:
        prompt = self._prompt
        if prompt is not None and prompt.is_marked:  # it takes them along
            self._route.base.memory.forget(prompt, self.endpoint, prompt.known)
        other = pick(self._route, free, prompt)
        self._route.add(other, 1)
        self._registry.release(self._route, self.endpoint)
        self._tried.append(other)
        self.endpoint = other
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.release(self._route, self.endpoint)
