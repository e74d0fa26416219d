"""What asking a guard counts as, for callers that are metered: by `/v1/moderations`, or before another request.

Both count for the guard under the caller's key. They give the questions of one request their turn in the guard's queue.
"""

from types import TracebackType
from typing import Self

from vllm_proxy.domain.config import ModelSpec
from vllm_proxy.domain.fair import Place
from vllm_proxy.domain.tokens import NO_TOKENS, Tokens
from vllm_proxy.domain.window import charge
from vllm_proxy.traffic.call import Call, Metered
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.usage import Outcome

_BYTES_PER_TOKEN = 4


class SharedTurn:
    """The turn of one metered request whose questions may be in flight side by side: it counts as one in flight."""

    def __init__(self, metered: Metered) -> None:
        self.number = metered.number
        self._metered = metered
        self._went = self._waits = False

    def may_go(self) -> bool:
        """Whether its caller has fewer requests in flight than it may, this one aside."""
        return self._went or self._metered.may_go()

    def go(self) -> None:
        """One of its questions has an endpoint now."""
        if not self._went:
            self._went = True
            self._metered.go()

    def wait(self, queue_size: int) -> None:
        """One of its questions waits.

        Raises:
            RequestError: as of any request.

        """
        if not self._went and not self._waits:
            self._waits = True
            self._metered.wait(queue_size)

    def answered(self, tokens: Tokens) -> None:
        """The guard has answered one question."""
        self._metered.answered(tokens)


class Check:
    """The questions that go before a metered request to a moderated model. As a context manager: until it has ended.

    Nothing of it is refused by a limit, which the request itself meets; its tokens are charged. Where the
    caller gives up while the guard works, what was asked is charged, by its size.
    """

    number = 0

    def __init__(self, metering: Metering, call: Call, guard: ModelSpec, size: int) -> None:
        """`size`: characters of what is to be checked."""
        self._metering = metering
        self._user = metering.user(call.caller)
        self._guard = guard.id
        self._tokens = NO_TOKENS
        self._went = False
        self._asked = size // _BYTES_PER_TOKEN + 1  # tokens, as estimated
        limits = self._user.limits
        self._place: Place | None = None
        if metering.is_fair:
            share = metering.share(self._guard)
            self._place = share.place(self._user.name, limits.priority, limits.weight, self._asked)
            self.number = self._place.number

    def may_go(self) -> bool:
        """At any time."""
        return True

    def go(self) -> None:
        """One of its questions has an endpoint now."""
        self._went = True

    def wait(self, queue_size: int) -> None:
        """One of its questions waits."""

    def answered(self, tokens: Tokens) -> None:
        """The guard has answered one question."""
        self._tokens = self._tokens.plus(tokens)
        if self._place is not None:
            self._place.began()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        metering, name, tokens = self._metering, self._user.name, self._tokens
        outcome: Outcome = "ok" if kind is None else "engine_error" if issubclass(kind, Exception) else "aborted"
        used = tokens.prompt + tokens.completion
        estimated = max(self._asked - used, 0) if outcome == "aborted" and self._went else 0
        now, epoch = metering.now(), metering.epoch()
        charge(self._user.account.of(self._guard, now), None, used + estimated, now, epoch)
        metering.usage.settled(name, self._guard, outcome, tokens, estimated)
        if self._place is not None:
            self._place.ended(used + estimated)
