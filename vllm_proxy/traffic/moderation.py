"""Asks the guard of `[moderation]` about texts: for `/v1/moderations`, and before requests to moderated models.

Each text is one subrequest, which takes a lease like any request; at most `_AT_ONCE` of a client's are in flight. No
answer of the guard that cannot be read lets anything pass.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from vllm_proxy.domain import guards
from vllm_proxy.domain.moderation import Moderation, Verdict, verdict
from vllm_proxy.domain.tokens import NO_TOKENS, Tokens, of_json
from vllm_proxy.errors import EngineFailedError, RequestError
from vllm_proxy.runtime import background
from vllm_proxy.traffic import user_turn
from vllm_proxy.traffic.call import Call
from vllm_proxy.traffic.checks import Check
from vllm_proxy.traffic.head import engine_id
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.queue import Turn
from vllm_proxy.traffic.registry import Registry
from vllm_proxy.traffic.relay import forward
from vllm_proxy.traffic.routing import Route
from vllm_proxy.traffic.subrequest import Reply, ask

_AT_ONCE = 16
_OF_THE_TEXT = frozenset({400, 413, 422})  # statuses with which a guard refuses a text, such as one that is too long
_LONGEST = 300  # characters of a guard's message that are passed on
_TRACE = frozenset({b"traceparent", b"tracestate"})
_PASS = frozenset(
    {"shutting_down", "rate_limit_exceeded", "insufficient_quota"}
)  # say more than that there is no verdict


class Asker(Turn, Protocol):
    """For whom a guard is asked: its turn in the guard's queue, and who is told what that took."""

    def answered(self, tokens: Tokens) -> None:
        """The guard has answered one question."""


class _ErrorBody(msgspec.Struct):
    message: str = ""


class _Error(msgspec.Struct):
    error: _ErrorBody = msgspec.field(default_factory=_ErrorBody)


class Moderator:
    """Of one daemon."""

    def __init__(self, registry: Registry, moderation: Callable[[], Moderation | None], metering: Metering) -> None:
        """`moderation`: what the file asks for now."""
        self._registry = registry
        self._metering = metering
        self.moderation = moderation

    async def verdicts(
        self, call: Call, moderation: Moderation, route: Route, texts: Sequence[str], asker: Asker | None
    ) -> list[Verdict]:
        """The verdict on each text. `asker`: None where nothing is metered.

        Raises:
            RequestError: `engine_failed`, or whatever a request to the guard may end with.

        """
        questions = _Questions(self._registry, call, moderation, route, asker)
        seconds = route.spec.policy.request_timeout
        try:
            async with asyncio.timeout(seconds or None):
                return await questions.ask(texts)
        except TimeoutError:
            msg = f"cannot get an answer from {route.spec.id} within its request_timeout ({seconds:g} s)"
            raise RequestError("request_timeout", msg) from None

    async def forward(self, call: Call, registry: Registry, route: Route, body: bytes) -> web.StreamResponse:
        """As `relay.forward`, for a moderated model: once its guard has let the request pass.

        Raises:
            RequestError: as `check`, and as `relay.forward`.
            ConnectionResetError: as `relay.forward`.

        """
        await self.check(call, route, body)
        return await forward(call, registry, route, body)

    async def check(self, call: Call, route: Route, body: bytes) -> None:
        """Let a request to a moderated model pass, or not.

        Raises:
            RequestError: `content_filter`; `moderation_unavailable`, where there is no verdict; `bad_request`, where
                there is something that cannot be checked.

        """
        call.model = call.model or route.spec.id
        if not user_turn.is_checked(call.route):
            return
        began = time.monotonic()
        texts = await user_turn.texts(body, call.route)
        if not texts:
            return
        limit = route.spec.policy.request_timeout
        try:
            async with asyncio.timeout(max(call.started_at + limit - began, 0.0) if limit else None):
                found = await self._judged(call, texts)
        except TimeoutError:
            raise RequestError("request_timeout", f"cannot answer within request_timeout ({limit:g} s)") from None
        except RequestError as error:
            if error.code in _PASS:
                raise
            msg = f"cannot check this request, which {route.spec.id} takes no other way: {error.message}"
            raise RequestError("moderation_unavailable", msg, retry_after=error.retry_after) from None
        finally:
            call.check_seconds = time.monotonic() - began
        if any(one.flagged for one in found):
            raise _flagged(found)

    async def _judged(self, call: Call, texts: Sequence[str]) -> list[Verdict]:
        moderation = self.moderation()
        if moderation is None:  # it went away as this request came
            raise RequestError("unsupported_endpoint", "there is no [moderation] in the configuration any more")
        guard = self._registry.find(moderation.model)
        if not self._metering.is_on:
            return await self.verdicts(call, moderation, guard, texts, None)
        with Check(self._metering, call, guard.spec, sum(map(len, texts))) as check:
            return await self.verdicts(call, moderation, guard, texts, check)


class _Questions:
    """Those of one client's request."""

    def __init__(
        self, registry: Registry, call: Call, moderation: Moderation, route: Route, asker: Asker | None
    ) -> None:
        self._registry = registry
        self._call = call
        self._moderation = moderation
        self._route = route
        self._asker = asker
        self._path = guards.path(moderation.kind)
        lines = call.forwarded.splitlines(keepends=True)
        self._trace = b"".join(line for line in lines if line.partition(b":")[0].lower() in _TRACE)

    async def ask(self, texts: Sequence[str]) -> list[Verdict]:
        """The verdicts, in the order of the texts."""
        if len(texts) == 1:
            return [await self._one(0, texts[0])]
        found: list[Verdict | None] = [None] * len(texts)
        numbered = iter(enumerate(texts))
        tasks = [
            background.spawn(self._some(numbered, found), f"question {number} to {self._route.spec.id}")
            for number in range(min(_AT_ONCE, len(texts)))
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [one for one in found if one is not None]

    async def _some(self, numbered: Iterator[tuple[int, str]], found: list[Verdict | None]) -> None:
        for number, text in numbered:
            found[number] = await self._one(number, text)

    async def _one(self, number: int, text: str) -> Verdict:
        call = self._call
        body, lines = self._request(text)
        if call.model == self._route.spec.id and not call.sent_at:
            call.sent_at = time.monotonic()
        reply = await ask(
            self._registry,
            self._route,
            self._path,
            body,
            lines=lines,
            client=call.request.remote or "",
            turn=self._asker,
        )
        if self._asker is not None:
            self._asker.answered(of_json(self._path, reply.body[:1024], reply.body) or NO_TOKENS)
        if call.model == self._route.spec.id:  # it is about these questions alone
            call.instance = reply.instance
        if reply.status != 200:
            raise _refused(number, reply)
        try:
            return verdict(self._moderation, guards.read(self._moderation, reply.body))
        except guards.UnreadableError as error:
            raise EngineFailedError(f"cannot read what {reply.instance} says: {error}") from None

    def _request(self, text: str) -> tuple[bytes, bytes]:
        """The body of a question, and lines of its head."""
        call, number = self._call, self._asker.number if self._asker is not None else 0
        asked = guards.question(self._moderation, text)
        if call.salt:
            asked["cache_salt"] = call.salt.decode()
        if number and self._path == "/classify":  # elsewhere vLLM reads the header
            asked["priority"] = number
        lines = b"X-Request-Id: %s\r\n%s" % (engine_id(call.request_id), self._trace)
        if number:
            lines += b"X-Vllm-Priority: %d\r\n" % number
        return msgspec.json.encode(asked), lines


def _refused(number: int, reply: Reply) -> RequestError:
    try:
        message = msgspec.json.decode(reply.body, type=_Error).error.message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = ""
    message = message[:_LONGEST] or f"status {reply.status}"
    if reply.status in _OF_THE_TEXT:
        return RequestError(
            "bad_request", f"cannot check text {number}: {reply.instance} says: {message}", param="input"
        )
    return EngineFailedError(f"cannot check text {number}: {reply.instance} says {reply.status}: {message}")


def _flagged(found: Sequence[Verdict]) -> RequestError:
    categories = dict.fromkeys(name for one in found for name, is_so in one.categories.items() if is_so)
    labels = dict.fromkeys(label for one in found if one.flagged for label in one.labels)
    named = "; ".join(filter(None, (", ".join(categories), ", ".join(labels))))
    msg = f"cannot answer this: the guard flags the last user turn{f' ({named})' if named else ''}"
    return RequestError("content_filter", msg)


def refuse_unchecked(route: Route) -> None:
    """Refuse what a moderated model would get unchecked.

    Raises:
        RequestError: `bad_request`.

    """
    if route.spec.policy.moderate:
        msg = f"cannot take this for {route.spec.id}: the model is moderated, and its guard reads text alone"
        raise RequestError("bad_request", msg)
