"""`/keys`: who may do what, as JSON; keys are made, rotated, changed and revoked.

A key is told once, in the answer to what made it; no answer has a hash. Texts are edited by `domain/file/edit_keys.py`
and written by `fleet/desired.py`.
"""

import re
import secrets
from functools import partial

from aiohttp import web

from vllm_proxy.api.body import Bodies, if_match
from vllm_proxy.api.guard import Route, author_of
from vllm_proxy.api.reply import Reply, answered, etag
from vllm_proxy.domain import key_resources
from vllm_proxy.domain.config import Config
from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.key_resources import key_of
from vllm_proxy.domain.keys import RANDOM_BYTES, Scope, hash_of, name_problem, new_key
from vllm_proxy.domain.units import show
from vllm_proxy.errors import ConfigError, InvalidError, Problem, RequestError
from vllm_proxy.fleet.changes import KeyEdit
from vllm_proxy.fleet.desired import Desired

_OF_A_KEY = re.compile(r"keys\b")


class Keys:
    """The handlers of one daemon."""

    def __init__(self, desired: Desired, bodies: Bodies) -> None:
        self._desired = desired
        self._bodies = bodies

    async def list(self, _request: web.Request) -> Reply[key_resources.Keys]:
        """`GET /keys`."""
        config = self._desired.reconciler.config
        shown = [key_of(key) for key in config.keys.values()]
        return Reply({"revision": config.keys_revision, "keys": shown}, headers=etag(config.keys_revision))

    async def show(self, request: web.Request) -> Reply[key_resources.Key]:
        """`GET /keys/{name}`."""
        name, config = request.match_info["name"], self._desired.reconciler.config
        if name not in config.keys:
            raise RequestError("key_not_found", f"cannot find key {show(name)}: GET /keys lists them")
        return Reply(key_of(config.keys[name]), headers=etag(config.keys_revision))

    async def create(self, request: web.Request) -> Reply[key_resources.NewKey]:
        """`POST /keys`: with a hash or a file in the body nothing is made, and nothing told."""
        keys = await self._bodies.json_object(request, "a key's keys")
        name = keys.pop("name", None)
        if not isinstance(name, str):
            raise _invalid("name", 'missing: every key needs a "name"')
        if problem := name_problem(name):
            raise _invalid("name", problem)
        key, table = edit_keys.issued(name, keys, secrets.token_bytes(RANDOM_BYTES))
        config = await self._write(request, partial(edit_keys.create, name=name, keys=table))
        return _told(config, name, key, status=201, headers={"Location": f"/keys/{name}"})

    async def patch(self, request: web.Request) -> Reply[key_resources.Key]:
        """`PATCH /keys/{name}`."""
        name, change = request.match_info["name"], await self._bodies.json_object(request, "a key's keys")
        if change.pop("name", name) != name:
            raise _invalid("name", "a name cannot be changed: create a key with the other one, and delete this one")
        config = await self._write(request, partial(edit_keys.patch, name=name, change=change))
        return Reply(key_of(config.keys[name]), headers=etag(config.keys_revision))

    async def delete(self, request: web.Request) -> web.Response:
        """`DELETE /keys/{name}`."""
        config = await self._write(request, partial(edit_keys.delete, name=request.match_info["name"]))
        return web.Response(status=204, headers=etag(config.keys_revision))

    async def rotate(self, request: web.Request) -> Reply[key_resources.NewKey]:
        """`POST /keys/{name}/rotate`: one more hash, and with `{"finish": true}` the newest alone."""
        name = request.match_info["name"]
        options = await self._bodies.json_object(request, "options") if request.body_exists else {}
        if not isinstance(finish := options.pop("finish", False), bool):
            raise _invalid("finish", "expected true or false")
        if options:
            raise _invalid(show(next(iter(options))), "unknown option; there is finish alone")
        if finish:
            config = await self._write(request, partial(edit_keys.finish, name=name))
            return _told(config, name, None)
        key = new_key(secrets.token_bytes(RANDOM_BYTES))
        config = await self._write(request, partial(edit_keys.rotate, name=name, new=hash_of(key)))
        return _told(config, name, key)

    async def _write(self, request: web.Request, change: KeyEdit) -> Config:
        try:
            return await self._desired.write_keys(change, if_match(request), author_of(request))
        except ConfigError as error:
            of_keys = all(_OF_A_KEY.match(item.path) for item in error.problems)
            raise InvalidError("invalid_key" if of_keys else "invalid_config", error.problems) from None


def routes(keys: Keys) -> list[Route]:
    """The routes, all of them for administrators."""
    admin = Scope.ADMIN
    return [
        Route("GET", "/keys", admin, answered(keys.list)),
        Route("POST", "/keys", admin, answered(keys.create)),
        Route("GET", "/keys/{name}", admin, answered(keys.show)),
        Route("PATCH", "/keys/{name}", admin, answered(keys.patch)),
        Route("DELETE", "/keys/{name}", admin, keys.delete),
        Route("POST", "/keys/{name}/rotate", admin, answered(keys.rotate)),
    ]


def _told(
    config: Config, name: str, key: str | None, *, status: int = 200, headers: dict[str, str] | None = None
) -> Reply[key_resources.NewKey]:
    answer: key_resources.NewKey = {**key_of(config.keys[name]), "key": key}
    return Reply(answer, status, {**etag(config.keys_revision), "Cache-Control": "no-store", **(headers or {})})


def _invalid(path: str, message: str) -> InvalidError:
    return InvalidError("invalid_key", [Problem(0, path, message)])
