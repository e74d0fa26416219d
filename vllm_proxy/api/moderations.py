"""`POST /v1/moderations`: texts in, verdicts of the guard out, as OpenAI's API and its clients have them.

How the guard is asked is in `traffic/moderation.py`, what its answers mean in `domain/guards.py`.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from vllm_proxy.api.openai import Settings, found
from vllm_proxy.domain import moderation_resources as resources
from vllm_proxy.domain.moderation import together
from vllm_proxy.errors import RequestError
from vllm_proxy.traffic.asked import Asked
from vllm_proxy.traffic.body import BYTE_ORDER_MARK, body_at_hand, no_json, read_body
from vllm_proxy.traffic.budget import Budget
from vllm_proxy.traffic.call import Call, Work, add_headers
from vllm_proxy.traffic.checks import SharedTurn
from vllm_proxy.traffic.envelope import json_response
from vllm_proxy.traffic.metering import Metering
from vllm_proxy.traffic.moderation import Moderator
from vllm_proxy.traffic.registry import Registry

_MOST_TEXTS = 1024
_MOST_BYTES = 8 * 2**20  # of a body: it is decoded whole, in one step of the event loop
_NOT_HERE = """cannot check texts: nothing here is a guard; write into the configuration
[moderation]
model = "guard"
kind = "llama-guard"
and a model [models.guard]; `vllm-proxy help moderation` says more"""
_EXPECTED = "expected a text, a list of texts, or a list of parts of type text"


class _Body(msgspec.Struct):
    input: Any = None


_body = msgspec.json.Decoder(_Body)


def by_guard(moderator: Moderator, registry: Registry, settings: Settings, budget: Budget, metering: Metering) -> Work:
    """The route whose requests go to the guard of the configuration, one for each text."""

    async def work(call: Call) -> web.StreamResponse:
        moderation = moderator.moderation()
        if moderation is None:
            raise RequestError("unsupported_endpoint", _NOT_HERE)
        server = settings()
        body = body_at_hand(call, server, budget) or await read_body(call, server, budget)
        route = found(call, moderation.model, registry)
        call.model = route.spec.id
        texts, is_one = _texts(body)
        asker = None
        if metering.is_on:
            metering.admit(call, route.spec, _asked(route.spec.id), body)
            asker = SharedTurn(call.metered) if call.metered is not None else None
        verdicts = await moderator.verdicts(call, moderation, route, texts, asker)
        if is_one:
            verdicts = [together(verdicts)]
        answer: resources.Moderations = {
            "id": f"modr-{secrets.token_hex(16)}",
            "model": route.spec.id,
            "results": [resources.result(one) for one in verdicts],
        }
        return _answered(call, registry, answer)

    return work


def _asked(guard: str) -> Asked:
    """What it is to the limits of a key: a prompt; what a guard puts out is charged when it is known."""
    return Asked(guard, streams=False, most=0, is_given=False, samples=1, binary=False)


def _texts(body: bytes) -> tuple[Sequence[str], bool]:
    """The texts to ask about, and whether they are parts of one.

    Raises:
        RequestError: `invalid_json`, `bad_request` or `request_too_large`.

    """
    if len(body) > _MOST_BYTES:
        msg = f"cannot check this: the body is larger than {_MOST_BYTES // 2**20} MiB"
        raise RequestError("request_too_large", msg)
    try:
        given = _body.decode(body[3:] if body.startswith(BYTE_ORDER_MARK) else body).input
    except msgspec.ValidationError:
        given = None  # JSON, but no object
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise no_json(error) from None
    except RecursionError:
        raise no_json("its values are nested too deeply") from None
    if isinstance(given, str):
        return [given], False
    if not isinstance(given, list) or not given:
        raise RequestError("bad_request", f"cannot check this: {_EXPECTED}", param="input")
    if len(given) > _MOST_TEXTS:
        msg = f"cannot check this: expected at most {_MOST_TEXTS} texts, got {len(given)}"
        raise RequestError("bad_request", msg, param="input")
    if all(isinstance(one, str) for one in given):
        return given, False
    return [_part(one) for one in given], True


def _part(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(text := part.get("text"), str):
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    what = f"a part of type {kind[:40]!r}" if isinstance(kind, str) else "something else"
    raise RequestError("bad_request", f"cannot check this: {_EXPECTED}, got {what}", param="input")


def _answered(call: Call, registry: Registry, answer: resources.Moderations) -> web.Response:
    response = json_response(answer)
    assert isinstance(response.body, bytes)
    call.status, call.bytes_out, call.first_byte_at = response.status, len(response.body), time.monotonic()
    add_headers(call, response)
    if len(answer["results"]) == 1:
        response.headers["X-Vllm-Proxy-Instance"] = call.instance
    if registry.closing:
        response.force_close()
    return response
