"""Handlers that change the desired state: `/config`, and writes to `/models`.

They translate between HTTP and `fleet/desired.py`, which serializes writes and decides about them. The file's text is
edited by `domain/file/edit.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from vllm_proxy.api.body import Bodies, if_match
from vllm_proxy.api.guard import Route, author_of
from vllm_proxy.api.models import resource
from vllm_proxy.api.reply import Reply, answered, etag
from vllm_proxy.domain import resources, secrets
from vllm_proxy.domain.config import revision_of
from vllm_proxy.domain.file import edit
from vllm_proxy.domain.keys import Scope
from vllm_proxy.domain.resources import changes_of, prospective
from vllm_proxy.domain.toml import dotted
from vllm_proxy.domain.units import parse_duration
from vllm_proxy.errors import ConfigError, InvalidError, Problem, RequestError
from vllm_proxy.fleet.arrival import Arrivals
from vllm_proxy.fleet.desired import Desired
from vllm_proxy.fleet.outcome import Outcome
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.tls import Certificate
from vllm_proxy.traffic.front import caller_of

_LOST = (
    f"{secrets.HIDDEN} keeps the value that the file has here, and it has none: send the value itself, or leave it out"
)
READ_ONLY = "X-Vllm-Proxy-Read-Only"
_YES, _NO = frozenset({"1", "true"}), frozenset({"", "0", "false"})
_SHOWN = 20  # of what is behind
_WAIT_SECONDS = 30 * 60.0  # where nobody says for how long
_OF_A_MODEL = re.compile(r"models\b")


class Writes:
    """The handlers of one daemon."""

    def __init__(self, desired: Desired, reconciler: Reconciler, certificate: Certificate, bodies: Bodies) -> None:
        """`certificate`: is looked at with each reload."""
        self._desired = desired
        self._reconciler = reconciler
        self._certificate = certificate
        self._bodies = bodies
        self._arrivals = Arrivals(reconciler)

    # /models

    async def create(self, request: web.Request) -> Reply[resources.Model]:
        """`POST /models`."""
        seconds = _wait_of(request)
        keys = await self._bodies.json_object(request, "a model's keys")
        model_id = keys.pop("id", None)
        if model_id is None:
            raise _invalid("id", 'missing: every model needs "id", the name that clients send')
        if not isinstance(model_id, str):
            raise _invalid("id", f"expected a string, got {secrets.show(model_id, ('id',))}")

        def change(text: str) -> str:
            if model_id in edit.tables_in(text, "models") or self._reconciler.knows(model_id):
                msg = f"cannot create model {model_id!r}: there is one; PATCH or PUT changes it"
                raise RequestError("model_exists", msg)
            return edit.create(text, ("models", model_id), _restored(model_id, keys, {}))

        outcome = await self._write(request, change)
        await self._arrive(model_id, outcome, seconds)
        return self._shown(model_id, outcome, status=201, headers={"Location": f"/models/{model_id}"})

    async def put(self, request: web.Request) -> Reply[resources.Model]:
        """`PUT /models/{model_id}`."""
        return await self._change(request, edit.put)

    async def patch(self, request: web.Request) -> Reply[resources.Model]:
        """`PATCH /models/{model_id}`."""
        return await self._change(request, edit.patch)

    async def delete(self, request: web.Request) -> Reply[resources.Model] | web.Response:
        """`DELETE /models/{model_id}`: 202 while its engines drain, else 204."""
        model_id, seconds = request.match_info["model_id"], _wait_of(request)

        def change(text: str) -> str:
            _must_exist(text, model_id)
            return edit.delete(text, ("models", model_id))

        outcome = await self._write(request, change)
        await self._arrive(model_id, outcome, seconds)
        if self._reconciler.knows(model_id):
            return self._shown(model_id, outcome, status=202)
        return web.Response(status=204, headers=etag(outcome.revision))

    async def _change(
        self, request: web.Request, how: Callable[[str, edit.TableName, Mapping[str, Any]], str]
    ) -> Reply[resources.Model]:
        model_id, seconds = request.match_info["model_id"], _wait_of(request)
        keys = await self._bodies.json_object(request, "a model's keys")
        if keys.pop("id", model_id) != model_id:
            raise _invalid("id", "an id cannot be changed: create a model with the other one, and delete this one")

        def change(text: str) -> str:
            _must_exist(text, model_id)
            old = edit.tables_in(text, "models")[model_id]
            return how(text, ("models", model_id), _restored(model_id, keys, old))

        outcome = await self._write(request, change)
        await self._arrive(model_id, outcome, seconds)
        return self._shown(model_id, outcome)

    async def _arrive(self, model_id: str | None, outcome: Outcome, seconds: float | None) -> None:
        """Wait until a change has arrived at every instance of a model, or of all; None: do not.

        Raises:
            RequestError: `not_rolled_out`, `shutting_down`.

        """
        if seconds is None:
            return
        if behind := await self._arrivals.wait(model_id, seconds):
            why = "; ".join(str(one) for one in behind[:_SHOWN])
            more = f"; and {len(behind) - _SHOWN} more" if len(behind) > _SHOWN else ""
            late = f" within {seconds:g} s" if any(one.comes for one in behind) else ""
            msg = (
                f"cannot say that all runs as asked{late}, though revision {outcome.revision} is in force: {why}{more}"
            )
            raise RequestError("not_rolled_out", msg)

    async def _write(self, request: web.Request, change: Callable[[str], str]) -> Outcome:
        def changed(data: bytes) -> bytes:
            try:
                return change(data.decode()).encode()
            except edit.EditError as error:
                raise _invalid(error.path, str(error)) from None

        try:
            return await self._desired.write(changed, if_match(request), author_of(request))
        except ConfigError as error:
            of_models = all(_OF_A_MODEL.match(item.path) for item in error.problems)
            raise InvalidError("invalid_model" if of_models else "invalid_config", error.problems) from None

    def _shown(
        self, model_id: str, outcome: Outcome, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Reply[resources.Model]:
        if not self._reconciler.knows(model_id):  # somebody else's change has come while this one was waited for
            msg = f"cannot show {model_id}: it was deleted again; revision {outcome.revision} was in force"
            raise RequestError("not_rolled_out", msg)
        model = self._reconciler.model(model_id)
        answer = resource(model, self._reconciler.registry, self._reconciler.room.held())
        return Reply(answer, status, {**etag(outcome.revision), **(headers or {})})

    # /config

    async def show(self, _request: web.Request) -> web.Response:
        """`GET /config`: the file's text, and whether it can be written."""
        try:
            data, why = await self._desired.text(), await self._desired.read_only()
        except ConfigError as error:
            raise InvalidError("invalid_config", error.problems) from None
        headers = {**etag(revision_of(data)), "Content-Type": "text/toml; charset=utf-8"}
        if why is not None:
            headers[READ_ONLY] = why.encode("unicode_escape").decode()  # one line, in ASCII
        return web.Response(body=data, headers=headers)

    async def replace(self, request: web.Request) -> Reply[resources.Applied]:
        """`PUT /config`."""
        seconds = _wait_of(request)
        data = await self._bodies.toml(request)
        try:
            outcome = await self._desired.write(lambda _: data, if_match(request), author_of(request), blind=True)
        except ConfigError as error:
            raise InvalidError("invalid_config", error.problems) from None
        await self._arrive(None, outcome, seconds)
        return _applied(outcome)

    async def plan(self, request: web.Request) -> Reply[resources.Plan]:
        """`POST /config/plan`: what a text would change; without a body, what the file on disk would.

        Callers may know nothing but what `read` shows, and no text of theirs has a file of this machine looked at.
        """
        data = await self._bodies.toml(request)
        trusted = not data or Scope.ADMIN in caller_of(request).scopes
        try:
            found = await self._desired.plan(data or await self._text(), trusted=trusted)
        except ConfigError as error:
            raise InvalidError("invalid_config", error.problems) from None
        changes = prospective(found.actions, found.prospects)
        answer: resources.Plan = {
            "changes": changes, "pending_restart": found.restart, "keys": found.keys, "settings": found.settings,
            "warnings": found.warnings,
        }  # fmt: skip
        return Reply(answer)

    async def reload(self, request: web.Request) -> Reply[resources.Applied]:
        """`POST /config/reload`."""
        before, author, seconds = self._reconciler.config.revision, author_of(request), _wait_of(request)
        author.commit()
        try:
            outcome = await self._desired.reload()
            self._desired.record(author, before, outcome.revision)
        except ConfigError as error:
            raise InvalidError("invalid_config", error.problems) from None
        finally:
            await self._certificate.look()
        await self._arrive(None, outcome, seconds)
        return _applied(outcome)

    async def _text(self) -> bytes:
        try:
            return await self._desired.text()
        except ConfigError as error:
            raise InvalidError("invalid_config", error.problems) from None


def routes(writes: Writes, model_path: str) -> list[Route]:
    """The routes; `model_path` is that of one model."""
    admin, read, operate = Scope.ADMIN, Scope.READ, Scope.OPERATE
    return [
        Route("POST", "/models", admin, answered(writes.create)),
        Route("PUT", model_path, admin, answered(writes.put)),
        Route("PATCH", model_path, admin, answered(writes.patch)),
        Route("DELETE", model_path, admin, answered(writes.delete)),
        Route("GET", "/config", admin, writes.show),
        Route("PUT", "/config", admin, answered(writes.replace)),
        Route("POST", "/config/plan", read, answered(writes.plan)),
        Route("POST", "/config/reload", operate, answered(writes.reload)),
    ]


def _wait_of(request: web.Request) -> float | None:
    """How many seconds the answer may wait for what follows from a change; None: it does not."""
    asks, given = request.query.get("wait", "0").lower(), request.query.get("timeout")
    if asks not in _YES | _NO:
        raise RequestError("bad_request", "cannot read wait: expected 1 or 0")
    try:
        seconds = _WAIT_SECONDS if given is None else parse_duration(int(given) if given.isdecimal() else given)
    except ValueError as error:
        raise RequestError("bad_request", f"cannot read timeout: {error}") from None
    return seconds if asks in _YES else None


def _invalid(path: str, message: str) -> RequestError:
    return InvalidError("invalid_model", [Problem(0, path, message)])


def _restored(model_id: str, keys: Mapping[str, Any], old: object) -> Mapping[str, Any]:
    """A model's keys with the secrets that `***` stands for; `old`: those in the file."""
    before = old if isinstance(old, Mapping) else {}
    found, lost = secrets.restored(edit.spelled_as(before, keys), before)
    if lost:
        raise InvalidError("invalid_model", [Problem(0, dotted(("models", model_id, *path)), _LOST) for path in lost])
    return found


def _must_exist(text: str, model_id: str) -> None:
    if model_id not in edit.tables_in(text, "models"):
        msg = f"cannot find model {model_id!r}: `vllm-proxy status` and GET /models list them"
        raise RequestError("model_not_found", msg)


def _applied(outcome: Outcome) -> Reply[resources.Applied]:
    changes = changes_of(outcome.changes)
    answer: resources.Applied = {
        "revision": outcome.revision, "changes": changes, "keys": outcome.keys, "settings": outcome.settings,
        "warnings": outcome.warnings,
    }  # fmt: skip
    return Reply(answer, headers=etag(outcome.revision))
