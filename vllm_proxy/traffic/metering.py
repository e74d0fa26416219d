"""Metered requests: held against the limits of their key, counted, and settled once, whatever ends them.

There is metering where there are keys, or `server.usage` is set; else nothing of this is reached. What a request holds
is decided in one step of the event loop, so no concurrency gets past a limit; it is given back when the request has
ended, and what the engine reported is charged in its place. The arithmetic is in `domain/window.py` and
`domain/fair.py`, what a key has used in `account`, what an engine reported in `sieve`, who waits in `queue`.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial

from vllm_proxy.domain.account import Account
from vllm_proxy.domain.config import Config, ModelSpec
from vllm_proxy.domain.fair import FairShare, Place
from vllm_proxy.domain.keys import ANONYMOUS
from vllm_proxy.domain.limits import Limits
from vllm_proxy.domain.tokens import NO_TOKENS, Estimate, Tokens
from vllm_proxy.domain.usage import Spent
from vllm_proxy.domain.window import (
    Budgets,
    Granted,
    Refused,
    admit,
    anthropic_lines,
    charge,
    openai_lines,
    settle,
)
from vllm_proxy.errors import LimitError, RequestError
from vllm_proxy.traffic.asked import Asked, with_most, with_usage
from vllm_proxy.traffic.body import with_member
from vllm_proxy.traffic.call import CLIENT_GONE, Call
from vllm_proxy.traffic.exchange import Ending
from vllm_proxy.traffic.keyring import Caller
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.sieve import MeteredExchange
from vllm_proxy.traffic.usage import Outcome, Usage
from vllm_proxy.traffic.user import User

type Clock = Callable[[], float]

_NO_LIMITS = Limits()
_MOST_HELD = 2**40  # tokens: more than any limit, and small beside what stands for none
_MOST_CLAIMED = 2**22  # tokens: more is no request that an engine takes, and would use up the numbers
# vLLM 0.32 reads the header here, and on its other routes the body alone. Source: `_get_priority` of its serving.py.
_HEADER_COUNTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_FULL_WAIT_SECONDS = 1.0  # who has too many requests that wait: nobody knows when one of them ends


class Metering:
    """Of one daemon."""

    def __init__(
        self,
        registry: Registry,
        usage: Usage,
        spent: Callable[[str], Spent] = lambda _: Spent(0, 0),
        now: Clock = time.monotonic,
        epoch: Clock = time.time,
    ) -> None:
        self.is_on = False  # whether requests are counted
        self.is_fair = False  # whether they are numbered
        self.usage = usage
        self.users: dict[str, User] = {}  # by the name of the key
        self.now, self.epoch = now, epoch
        self._registry = registry
        self._spent = spent
        self._shares: dict[str, FairShare] = {}  # by model

    def adopt(self, config: Config) -> None:
        """Follow a configuration."""
        self.is_on = bool(config.keys) or config.server.usage
        self.is_fair = config.is_fair
        keys, models, now = {*config.keys, ANONYMOUS}, {*config.ids}, self.now()
        self.usage.forget(keys, models)
        for name, user in list(self.users.items()):
            key = config.keys.get(name)
            limits = _NO_LIMITS if key is None else key.limits  # who sends no key, say, may go on without a table
            user.follow(limits)
            user.account.change(limits, partial(self._spent, name), self.epoch())
            user.forget(models, now)
            if name not in keys and user.is_unused(now):
                del self.users[name]
        for name in [name for name in self._shares if name not in config.models]:
            del self._shares[name]

    def user(self, caller: Caller) -> User:
        """Of the key that a caller has."""
        name = caller.key.name
        found = self.users.get(name)
        if found is None:
            account = Account(caller.key.limits, partial(self._spent, name), self.epoch())
            found = self.users[name] = User(caller.key, account)
        return found

    def share(self, model: str) -> FairShare:
        """Who is next for a model."""
        found = self._shares.get(model)
        if found is None:
            found = self._shares[model] = FairShare()
        return found

    def admit(self, call: Call, spec: ModelSpec | None = None, asked: Asked | None = None, body: bytes = b"") -> bytes:
        """Let a request in, which is settled when `call.metered.end` is called; returns its body for the engine.

        `spec`: of its model; None: it names none. `asked`: what its body wants; None: no tokens are counted.

        Raises:
            RequestError: `rate_limit_exceeded` or `insufficient_quota`; `invalid_max_tokens`.

        """
        if spec is not None:
            call.model = spec.id
        user = self.users.get(call.caller.key.name) or self.user(call.caller)
        request = _Request(self, user, call)
        if asked is not None and spec is not None:
            body = request.ask(asked, body, spec)
        if user.is_limited:
            request.hold()
        call.metered = request
        if self.is_fair:
            request.take_number(self.share(self.queue_of(call.model)))
            if body and call.route not in _HEADER_COUNTS:
                body = with_member(body, "priority", b"%d" % request.number)
        return body

    def in_flight(self) -> dict[str, float]:
        """Requests that hold an endpoint, by key."""
        return {name: float(user.in_flight) for name, user in self.users.items()}

    def used_ratio(self) -> dict[tuple[str, str], float]:
        """How much of each limit is used or held, by key and limit: where a key has several of one name, the most."""
        found: dict[tuple[str, str], float] = {}
        for name, user in self.users.items():
            for use in user.account.all().uses(self.now(), self.epoch()):
                each = name, use.name
                found[each] = max(found.get(each, 0.0), (use.used + use.held) / use.limit)
        return found

    def queue_of(self, model: str) -> str:
        """The model in whose queue requests for an id wait: of an adapter, its base."""
        return self._registry.base_of(model)

    def serve(self, models: Iterable[str]) -> None:
        """Requests that waited for one of their key to end may go on."""
        for model in models:
            self._registry.next_turn(model)


class _Request:
    """One that is metered; it is its own turn in the queue."""

    __slots__ = ("_metering", "binary", "bounded", "budgets", "call", "estimate", "generates", "granted",
                 "is_told", "made", "model", "number", "output", "place", "prompt", "size", "strip", "told", "user",
                 "waits", "went")  # fmt: skip

    def __init__(self, metering: Metering, user: User, call: Call) -> None:
        self._metering = metering
        self.user = user
        self.call = call
        self.model = call.model
        self.number = 0
        self.prompt = self.output = 0  # tokens, as estimated, or at most
        self.bounded = True  # the answer has no more than `output`
        self.size = 0  # bytes of the body
        self.generates = False  # it has an answer of tokens
        self.strip = False  # the client did not ask for what it used
        self.binary = False  # the body holds a file
        self.is_told = True  # what the answer says of its tokens is the engine's own word
        self.estimate: Estimate | None = None  # what it is guessed by, and which learns from it
        self.granted: Granted | None = None
        self.budgets: Budgets | None = None  # what it meets
        self.place: Place | None = None  # where its number is from
        self.went = self.waits = False
        self.made: MeteredExchange | None = None
        self.told: Tokens | None = None  # what engines said of its parts, where the daemon makes the answer itself

    def ask(self, asked: Asked, body: bytes, spec: ModelSpec) -> bytes:
        """Take in what the body wants; returns it as the engine gets it.

        Raises:
            RequestError: `invalid_max_tokens`.

        """
        user = self.user
        self.size, self.binary, self.is_told = len(body), asked.binary, not asked.is_quoted
        output, most = asked.most, user.limits.max_output_tokens
        if most and output != 0 and (output is None or output > most):
            if asked.is_given:
                wanted = "an unknown number of" if output is None else output
                msg = f"cannot answer with {wanted} tokens: this key may have {most} at most (max_output_tokens)"
                raise RequestError("invalid_max_tokens", msg, param="max_tokens")
            body, output = with_most(body, self.call.route, most), most
        estimate = self.estimate = user.estimates.get(self.model) or user.estimate(self.model)
        if user.is_limited or self._metering.is_fair:
            longest = spec.engine.max_model_len
            self.prompt = estimate.prompt(self.size, longest if type(longest) is int else None, binary=self.binary)
            self.bounded = output is not None
            self.output = min(asked.samples * (estimate.output if output is None else output), _MOST_HELD)
        self.generates = output != 0
        if asked.options is not None:
            self.strip = True
            body = with_usage(body, asked.options)
        return body

    def hold(self) -> None:
        """Hold what it may use.

        Raises:
            LimitError: a limit of its key is reached.

        """
        metering, call = self._metering, self.call
        now, epoch = metering.now(), metering.epoch()
        budgets = self.budgets = self.user.account.of(self.model, now)
        if not budgets.is_any:
            return
        found = admit(budgets, self.prompt, self.output, now, epoch, bounded=self.bounded)
        call.limit_lines = (anthropic_lines if call.is_anthropic else openai_lines)(budgets, now, epoch)
        if type(found) is Refused:
            raise self._refused(found)
        assert type(found) is Granted
        self.granted = found

    def take_number(self, share: FairShare) -> None:
        """Take its place among the requests of all keys."""
        limits = self.user.limits
        tokens = 0 if self.estimate is None else share.tokens(self.estimate, self.prompt, self.output)
        self.place = share.place(self.user.name, limits.priority, limits.weight, min(tokens, _MOST_CLAIMED))
        self.number = self.place.number
        self.call.forwarded += b"X-Vllm-Priority: %d\r\n" % self.number

    def _refused(self, found: Refused) -> LimitError:
        self._metering.usage.limited(self.user.name, self.model, found.limit)
        return LimitError(found.code, found.message, found.type, found.wait)

    # Its turn in the queue

    def may_go(self) -> bool:
        """Whether its key has fewer requests in flight than it may."""
        return self.user.in_flight < self.user.most_in_flight

    def go(self) -> None:
        """It has an endpoint now."""
        self.went = True
        self.user.in_flight += 1
        if self.waits:
            self._wait_no_more()

    def wait(self, queue_size: int) -> None:
        """It waits from now on.

        Raises:
            LimitError: so many of its key's wait already, for one of them to end.

        """
        user = self.user
        if not self.may_go() and user.waiting.total() >= queue_size:
            self._metering.usage.refused(user.name, "max_in_flight")
            msg = f"cannot take this: this key has {user.in_flight} in flight, and {queue_size} waiting"
            raise LimitError("rate_limit_exceeded", msg, "requests", _FULL_WAIT_SECONDS)
        user.waiting[self.model] += 1
        self.waits = True

    def _wait_no_more(self) -> None:
        self.waits = False
        self.user.waiting[self.model] -= 1
        if not self.user.waiting[self.model]:
            del self.user.waiting[self.model]

    # Its answer

    def follow(self, exchange: MeteredExchange) -> None:
        """Count what this one passes on; the last one that was made is what the client gets."""
        self.made = exchange
        exchange.meter(self.call.route, strip=self.strip, on_body=None if self.place is None else self._began)

    def _began(self) -> None:
        """The engine works on it: what it refuses had no turn."""
        if self.place is not None and self.made is not None and self.made.status < 400:
            self.place.began()

    def took(self, tokens: Tokens) -> None:
        """A part of it is done, of a session that may go on for hours: charge that now."""
        metering, user = self._metering, self.user
        now, charged = metering.now(), tokens.prompt + tokens.completion
        charge(user.account.of(self.model, now), None, charged, now, metering.epoch())
        counts = metering.usage.counts(user.name, self.model)
        counts.prompt += tokens.prompt
        counts.completion += tokens.completion
        counts.cached += tokens.cached

    def answered(self, tokens: Tokens) -> None:
        """An engine has answered a part of it, of which the daemon makes an answer itself."""
        self.told = tokens if self.told is None else self.told.plus(tokens)
        if self.place is not None:
            self.place.began()

    def end(self) -> None:
        """It is over: settle it. To be called once, when the status of its call is known."""
        charged = 0
        try:
            outcome = self._outcome()
            tokens, estimated = self._used(outcome)
            charged = tokens.prompt + tokens.completion + estimated
        finally:  # whatever could not be counted, nothing stays held
            self._give_back(charged)
        self._metering.usage.settled(self.user.name, self.model, outcome, tokens, estimated)

    def _used(self, outcome: Outcome) -> tuple[Tokens, int]:
        """What an engine said that it took, and what is estimated where none did."""
        made = self.made
        tokens, estimated = self.told if made is None else made.tokens if self.is_told else None, 0
        self.call.tokens = tokens
        if tokens is None:
            tokens, estimated = NO_TOKENS, self._estimated(outcome)
        if self.estimate is not None and tokens is not NO_TOKENS:
            self.estimate.learn(tokens, self.size, binary=self.binary)
            if self.place is not None:
                self.place.share.estimate.learn(tokens, self.size, binary=self.binary)
        return tokens, estimated

    def _give_back(self, charged: int) -> None:
        metering, user = self._metering, self.user
        if self.budgets is not None or user.is_limited:
            self._settle(charged)
        if self.place is not None:
            self.place.ended(min(charged, _MOST_CLAIMED))
        if self.waits:
            self._wait_no_more()
        if self.went:
            user.in_flight -= 1
            if user.waiting:
                metering.serve(list(user.waiting))
        self.call.metered = self.made = None  # they refer back to this: without the cycle all go at once

    def _settle(self, charged: int) -> None:
        metering = self._metering
        now, epoch = metering.now(), metering.epoch()
        if self.granted is not None:
            settle(self.granted, charged, now, epoch)
        budgets = self.user.account.of(self.model, now)
        if budgets is not self.budgets:  # its key has other limits by now
            charge(budgets, self.budgets, charged, now, epoch)

    def _outcome(self) -> Outcome:
        status, made = self.call.status, self.made
        if status >= 400:
            if status == CLIENT_GONE:
                return "aborted"
            return "engine_error" if status >= 500 else "client_error"
        if made is None or made.ending is Ending.WHOLE:
            return "ok"
        return "engine_error" if made.ending is Ending.BROKEN and not made.ended_early else "aborted"

    def _estimated(self, outcome: Outcome) -> int:
        """Tokens that the engine did not report, and may have worked on."""
        made, estimate = self.made, self.estimate
        prompt = self.prompt or (0 if estimate is None else estimate.prompt(self.size, binary=self.binary))
        if made is None:  # of what the daemon answers itself, by asking engines
            return prompt if outcome == "aborted" and self.went else 0
        is_given_up = outcome == "aborted" or self.call.code == "request_timeout"
        if made.events or (is_given_up and self.size):
            return made.events + prompt
        if outcome == "ok" and self.generates:  # in the background, say: nobody tells what comes of it
            return min(prompt + (self.output or (0 if estimate is None else estimate.output)), _MOST_CLAIMED)
        return 0
