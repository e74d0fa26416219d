"""The document that the API gives of itself, held against the router, the parser and a running daemon."""

import contextlib
import inspect
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tests.harness import Daemon, daemon, fake_engines, port_block
from vllm_proxy.api import app, docs
from vllm_proxy.api.guard import Route
from vllm_proxy.api.openapi import NOT_LET_IN, document
from vllm_proxy.api.openapi_keys import DURATION, KEYS, MODEL_ID, OF_A_KEY
from vllm_proxy.api.openapi_routes import OPERATIONS
from vllm_proxy.api.reply import Reply
from vllm_proxy.domain.config import ModelTable, Restart
from vllm_proxy.domain.key_table import KeyTable
from vllm_proxy.domain.keys import name_problem
from vllm_proxy.domain.units import parse_duration
from vllm_proxy.domain.value_types import id_problem
from vllm_proxy.errors import STATUS
from vllm_proxy.traffic.envelope import envelope


def application() -> web.Application:
    """The daemon's own, without a daemon."""
    fake: Any = SimpleNamespace(
        listen=lambda _: None,
        knows=None,
        reloads={},
        caller=None,
        of_session=None,
        refusal_of=None,
        refused={},
        in_flight=None,
        used_ratio=None,
        options=None,
    )
    fake.room = fake.usage = fake.objections = fake
    parts = app.Parts(fake, fake, fake, fake, fake, None, fake, fake, str, fake, fake, fake, "/s")
    return app.build(parts, 1.0).app


ROUTES = [tuple(route.split(" ")) for route in OPERATIONS]
DOCUMENT = document([(route.method, route.path, route.scope) for route in application()[app.ROUTES]])
SCHEMAS = DOCUMENT["components"]["schemas"]


def fits(name: str, value: object, *, closed: bool = False) -> list[str]:
    """What is wrong with a value, by a schema of the document. `closed`: a key that it does not name is wrong."""
    schemas = msgspec.json.decode(msgspec.json.encode(SCHEMAS))
    for schema in schemas.values():
        if closed and "properties" in schema:
            schema["additionalProperties"] = False
    whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(whole).iter_errors(value)
    ]


def described(found: dict[str, Any]) -> set[str]:
    """The routes of a document."""
    return {f"{method.upper()} {path}" for path, methods in found["paths"].items() for method in methods}


def is_other_spelling(resource: web.AbstractResource) -> bool:
    """Whether it is a path with a slash behind it, taken as the one without."""
    return len(resource.canonical) > 1 and resource.canonical.endswith("/")


def handlers() -> dict[str, Any]:
    """Those of the application itself by route, but for HEAD and what is not offered."""
    return {
        f"{route.method} {re.sub(r'{(\w+):[^}]*}', r'{\1}', route.resource.canonical)}": route.handler
        for route in application().router.routes()
        if route.resource is not None and route.method not in {"HEAD", "*"} and not is_other_spelling(route.resource)
    }


def test_the_document_describes_the_routes_of_the_router_and_no_others() -> None:
    """None is forgotten, none is made up."""
    assert described(DOCUMENT) == set(handlers())


def test_each_handler_returns_the_type_that_the_document_has_for_its_route() -> None:
    """The type checker holds what a handler makes to that type; this holds the type to the document."""
    for route, handler in handlers().items():
        if route == "POST /v1/moderations":  # tests/daemon/test_moderation.py holds what it answers
            continue
        hint = get_type_hints(inspect.unwrap(handler))["return"]
        returned = {get_args(kind)[0].__name__ for kind in (hint, *get_args(hint)) if get_origin(kind) is Reply}
        schemas = [answer.content.get("application/json", {}) for answer in OPERATIONS[route].answers]
        assert {schema["$ref"].rpartition("/")[2] for schema in schemas if "$ref" in schema} == returned, route


def test_a_route_declares_the_scope_that_it_needs() -> None:
    """All that the router knows are in the table; and none can be there, or be described, without one."""
    table = {(route.method, route.path) for route in application()[app.ROUTES]}
    routed = {
        (route.method, getattr(route.resource, "_orig_path", route.resource.canonical))
        for route in application().router.routes()
        if route.resource is not None and route.method not in {"HEAD", "*"} and not is_other_spelling(route.resource)
    }
    assert table == routed
    with pytest.raises(TypeError, match="scope"):
        Route("GET", "/new", handler=docs._page)  # type: ignore[call-arg, arg-type]


def test_a_route_without_a_description_is_an_error() -> None:
    """So nobody adds one without."""
    with pytest.raises(KeyError):
        document([("GET", "/new", None)])


def test_the_document_hangs_together() -> None:
    """Every reference leads somewhere, every operation has a name of its own, every placeholder a parameter."""
    text = msgspec.json.encode(DOCUMENT).decode()
    for reference in re.findall(r'"\$ref":"#/components/(\w+)/([\w.-]+)"', text):
        assert reference[1] in DOCUMENT["components"][reference[0]], reference
    assert text.count('"$ref"') == len(re.findall(r'"\$ref":"#/components/\w+/[\w.-]+"', text))
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names)) == len(ROUTES)
    parameters = DOCUMENT["components"]["parameters"]
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            referred = [parameter["$ref"].rpartition("/")[2] for parameter in operation.get("parameters", [])]
            in_path = {parameters[name]["name"] for name in referred if parameters[name]["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path))
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_error_code_has_a_place_in_the_document() -> None:
    """All but those that any request may get from the HTTP server itself."""
    anywhere = {
        "method_not_allowed",
        "headers_too_large",
        "expectation_failed",
        "internal_error",
    }
    told = {code for operation in OPERATIONS.values() for code in operation.errors} | {*NOT_LET_IN}
    assert told == set(STATUS) - anywhere


def test_the_examples_of_errors_are_errors() -> None:
    """Each fits the schema that stands beside it; where engines answer, one of theirs may stand there instead."""
    examples = [
        (content["schema"], example["value"])
        for methods in DOCUMENT["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for content in [answer.get("content", {}).get("application/json", {})]
        for example in content.get("examples", {}).values()
    ]
    assert len(examples) > 50
    for schema, example in examples:
        envelope = schema.get("anyOf", [schema])[0]["$ref"].rpartition("/")[2]
        assert envelope == ("AnthropicError" if "type" in example else "Error")
        assert fits(envelope, example, closed=True) == []


def test_the_keys_of_a_model_are_those_of_the_configuration() -> None:
    """Name by name, with the same defaults and a line for people each."""
    assert set(KEYS) == {*ModelTable.model_fields, *Restart.model_fields}
    for name, table in (("ModelKeys", ModelTable), ("RestartKeys", Restart)):
        properties = SCHEMAS[name]["properties"]
        assert set(properties) - {"id"} == set(table.model_fields)
        for key, field in table.model_fields.items():
            assert properties[key]["description"].startswith(KEYS[key])
            if field.default is not None and not field.is_required() and key not in {"restart", "adapters_max"}:
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                assert properties[key]["default"] == default


@pytest.mark.parametrize(
    "text",
    ["90s", "5m", "1h30m", "1.5h", "250ms", "1h2m3s4ms", "", "s", "90", "1m1h", "-1s", "1 s", "1d", "0s", "1.s", ".5s"],
)
def test_durations_are_described_as_they_are_read(text: str) -> None:
    """A string fits the schema exactly where the parser takes it."""
    try:
        parse_duration(text)
        taken = True
    except ValueError:
        taken = False
    assert (fits("ModelKeys", {"idle_timeout": text}) == []) is taken
    assert jsonschema.Draft202012Validator(DURATION).is_valid(text) is taken


@pytest.mark.parametrize(
    "text",
    ["chat", "a/b", "a/b:c@d.e-f_g", "start/x", "xstart", "-x", "", "/a", "a/", "a//b", "a/./b", "a/..", "..", "...",
     "a/start", "logs", "ü", "a b", "x" * 200, "x" * 201],
)  # fmt: skip
def test_ids_are_described_as_they_are_read(text: str) -> None:
    """A string fits the schema exactly where it may be an id."""
    assert jsonschema.Draft202012Validator(MODEL_ID).is_valid(text) is (id_problem(text) is None)


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        ({"model": "org/chat"}, True),
        ({"model": "--trust-remote-code"}, False),
        ({"max_model_len": "8k"}, True),
        ({"max_model_len": 0}, False),
        ({"devices": [0, "GPU-1"]}, True),
        ({"devices": [0, 0]}, False),
        ({"devices": [-1]}, False),
        ({"env": {"OMP_NUM_THREADS": 1}}, True),
        ({"env": {"A-B": "x"}}, False),
        ({"aliases": ["a", "-b"]}, False),
        ({"dtype": "float8"}, False),
        ({"replicas": 0}, False),
        ({"replicas": True}, False),
        ({"idle_timeout": 0}, True),
        ({"idle_timeout": -1}, False),
        ({"restart": {"backoff": "2s"}}, True),
        ({"restart": {"bakoff": "2s"}}, False),
        ({"args": {"hf_overrides": {"a": [1]}}}, True),
        ({"replica": 1}, False),
        ({"adapters": {"support": {"path": "adapters/support", "enabled": False}}}, True),
        ({"adapters": {"support": {"path": 1}}}, False),
        ({"adapters": {"support": {"path": "adapters/support", "rank": 8}}}, False),
        ({"adapters_max": {"rank": 64, "loras": 2}}, True),
        ({"adapters_max": {"rank": 65}}, False),
    ],
)
def test_keys_are_described_as_they_are_read(keys: dict[str, Any], good: bool) -> None:  # noqa: FBT001 - a table of cases
    """A body fits the schema exactly where the configuration takes it; null instead of any key is good."""
    try:
        ModelTable.model_validate({"model": "org/chat", **keys})
        taken = True
    except ValueError:
        taken = False
    assert taken is good
    assert (fits("NewModel", {"id": "chat", **keys}) == []) is good
    if set(keys) <= set(ModelTable.model_fields):
        assert fits("ModelKeys", dict.fromkeys(keys)) == []


HASH = "sha256:" + "0" * 64


def test_the_keys_of_a_key_are_those_of_the_configuration() -> None:
    """Name by name, with the same defaults and a line for people each."""
    properties = SCHEMAS["KeyTable"]["properties"]
    assert set(properties) - {"name"} == set(KeyTable.model_fields) == set(OF_A_KEY)
    for key, field in KeyTable.model_fields.items():
        assert properties[key]["description"] == OF_A_KEY[key]
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert properties[key].get("default") == default


@pytest.mark.parametrize(
    "text",
    ["ci", "a", "0.b-c_d", "x" * 64, "x" * 65, "", "Ci", ".a", "-a", "a b", "env", "env-admin", "anonymous", "ü"],
)
def test_names_of_keys_are_described_as_they_are_read(text: str) -> None:
    """A string fits the schema exactly where it may be a name."""
    assert (fits("NewKeyTable", {"name": text}) == []) is (name_problem(text) is None)


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        ({"hash": HASH}, True),
        ({"hash": [HASH, HASH]}, True),
        ({"hash": []}, False),
        ({"hash": [HASH] * 5}, False),
        ({"hash": HASH.upper()}, False),
        ({"hash": "planted"}, False),
        ({"file": "credential:ci"}, True),
        ({"file": ""}, False),
        ({"scopes": ["read", "admin"]}, True),
        ({"scopes": ["root"]}, False),
        ({"models": ["*", "org/[ab]*"]}, True),
        ({"models": [""]}, False),
        ({"models": "*"}, False),
        ({"enabled": 1}, False),
        ({"expires_at": 5}, False),
        ({"isolate_cache": True}, True),
        ({"scope": ["read"]}, False),
        ({"tokens_per_minute": 5, "requests_per_minute": 0}, True),
        ({"tokens_per_day": -1}, False),
        ({"tokens_per_month": 10**15 + 1}, False),
        ({"max_in_flight": 2.5}, False),
        ({"priority": -5, "weight": 2}, True),
        ({"priority": 1001}, False),
        ({"weight": 0}, False),
        ({"limits": {"a*": {"tokens_per_minute": 5}}}, True),
        ({"limits": {"a*": {}}}, True),
        ({"limits": {"": {}}}, False),
        ({"limits": {"a*": {"tokens_per_minute": -5}}}, False),
        ({"limits": {"a*": 5}}, False),
    ],
)
def test_the_keys_of_a_key_are_described_as_they_are_read(keys: dict[str, Any], good: bool) -> None:  # noqa: FBT001 - a table of cases
    """A body fits the schema exactly where the configuration takes it; null instead of any key is good."""
    try:
        KeyTable.model_validate(keys)
        taken = True
    except ValueError:
        taken = False
    assert taken is good
    assert (fits("NewKeyTable", {"name": "ci", **keys}) == []) is good
    if set(keys) <= set(KeyTable.model_fields):
        assert fits("KeyTable", dict.fromkeys(keys)) == []


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with a model that works and one whose engine dies."""
    text = """
        [models.chat]
        model = "org/chat"
        aliases = ["gpt"]
        idle_timeout = "5m"
        [models.bad]
        model = "org/bad"
        restart.max_failures = 1
        args.fake_exit_at = "weights"
    """
    config = fake_engines(port_block()) + re.sub(r"(?m)^ +", "", text)
    async with daemon(config, tmp_path_factory.mktemp("openapi")) as running:
        yield running


async def test_the_daemon_answers_as_its_document_says(shared: Daemon) -> None:
    """Real answers fit the schemas, and hold no key that these do not name."""
    await shared.once("chat", lambda one: one["state"] == "ready")
    await shared.once("bad", lambda one: one["last_exit"] is not None)
    for path, name in (
        ("/", "Root"), ("/health", "Health"), ("/models", "Models"), ("/models/bad", "Model"), ("/v1/models", "Cards"),
        ("/v1/models/gpt", "Card"),
    ):  # fmt: skip
        assert fits(name, await shared.get(path), closed=True) == []
    assert fits("Ready", await shared.get("/ready", 503), closed=True) == []
    assert fits("Error", await shared.get("/models/none", 404), closed=True) == []
    anthropic = await shared.post("/v1/messages", {"model": "none"}, 404)
    assert fits("AnthropicError", anthropic, closed=True) == []
    assert fits("Error", await shared.post("/models", {"id": "x", "replicas": 0}, 422), closed=True) == []
    async with shared.admin.post("/config/plan", data=b"", headers={"Content-Type": "text/toml"}) as answer:
        assert fits("Plan", await answer.json(), closed=True) == []


async def test_writes_answer_as_the_document_says(shared: Daemon) -> None:
    """A model comes, changes and goes; what each write answers fits."""
    example = SCHEMAS["NewModel"]["examples"][0] | {"id": "new", "enabled": False}
    assert fits("NewModel", example) == []
    assert fits("Model", await shared.post("/models", example, 201), closed=True) == []
    async with shared.admin.patch("/models/new", json={"description": "x"}) as answer:
        assert answer.status == 200
        assert fits("Model", await answer.json(), closed=True) == []
    assert fits("Applied", await shared.post("/config/reload", b""), closed=True) == []
    async with shared.admin.delete("/models/new") as answer:
        assert answer.status in {202, 204}


async def test_keys_are_answered_as_the_document_says(shared: Daemon) -> None:
    """Made, shown, rotated, changed, listed, refused."""
    example = SCHEMAS["NewKeyTable"]["examples"][0]
    assert fits("NewKeyTable", example) == []
    assert fits("NewKey", await shared.post("/keys", example, 201), closed=True) == []
    assert fits("NewKey", await shared.post("/keys/ci/rotate", {"finish": True}), closed=True) == []
    assert (
        fits("Key", await shared.write("PATCH", "/keys/ci", {"expires_at": "2099-01-01T00:00:00Z"}), closed=True) == []
    )
    assert fits("Key", await shared.write("GET", "/keys/ci"), closed=True) == []
    assert fits("Keys", await shared.write("GET", "/keys"), closed=True) == []
    assert fits("Error", await shared.post("/keys", {"name": "x", "scopes": 5}, 422), closed=True) == []
    await shared.write("DELETE", "/keys/ci", status=204)


async def test_events_are_as_the_document_says(shared: Daemon) -> None:
    """A model comes, the file breaks and is mended: each event fits its schema."""

    async def until(result: str) -> None:
        while True:
            kind = (await stream.content.readuntil(b"\n")).removeprefix(b"event: ").strip().decode()
            if kind not in names:
                continue
            event = msgspec.json.decode((await stream.content.readuntil(b"\n")).removeprefix(b"data: "))
            name = names[kind].get(event.get("result", ""), "")
            assert fits(name, event, closed=True) == []
            seen.add(name)
            if event.get("result") == result:
                return

    names = {
        "model": {"": "ModelEvent"},
        "plan": {"": "PlanEvent"},
        "config": {"accepted": "ConfigAccepted", "rejected": "ConfigRejected"},
    }
    seen: set[str] = set()
    async with shared.session.get("/events") as stream:
        await stream.content.readuntil(b"\n")  # from here on nothing is missed
        await shared.post("/models", {"id": "event", "model": "org/new"}, 201)
        await until("accepted")
        shared.edit("[models.bad]", "[models.bad")
        await until("rejected")
        shared.edit("[models.bad", "[models.bad]")
        await until("accepted")
    assert seen == {"ModelEvent", "PlanEvent", "ConfigAccepted", "ConfigRejected"}
    async with shared.admin.delete("/models/event") as answer:
        assert answer.status in {202, 204}


async def test_the_daemon_serves_its_document(shared: Daemon) -> None:
    """And `GET /` lists what it describes."""
    found = await shared.get("/openapi.json")
    assert found == msgspec.json.decode(msgspec.json.encode(DOCUMENT))
    assert described(found) == set((await shared.get("/"))["endpoints"])


@contextlib.asynccontextmanager
async def pages(assets: Path | None) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """The pages alone."""
    site = web.Application(middlewares=[envelope])
    for method, path, handler in docs.routes([], assets):
        site.router.add_route(method, path, handler)
    async with TestClient(TestServer(site)) as found:
        yield found


@pytest.fixture
async def client() -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """The pages with the extra `docs`."""
    async with pages(docs.find_assets()) as found:
        yield found


async def test_without_the_extra_the_pages_say_what_to_install() -> None:
    """501 with a plain page that names the extra; the document itself is there, and no asset is."""
    async with pages(None) as client:
        for path in ("/docs", "/redoc"):
            async with client.get(path) as answer:
                assert (answer.status, answer.content_type) == (501, "text/html")
                text = await answer.text()
            assert "--extra docs" in text
            assert 'href="openapi.json"' in text
            assert "<script" not in text
        async with client.get("/openapi.json") as answer:
            assert (answer.status, (await answer.json())["openapi"]) == (200, "3.1.0")
        async with client.get("/docs/assets/swagger.js") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


async def test_pages_and_assets_are_kept_but_asked_for(client: TestClient[web.Request, web.Application]) -> None:
    """Each has an ETag, by which a second request gets 304 and no body."""
    for path in ("/openapi.json", "/docs", "/redoc", "/docs/assets/swagger-ui.css", "/docs/assets/redoc.js"):
        async with client.get(path) as first:
            assert first.status == 200
            assert first.headers["Cache-Control"] == "no-cache"
            assert first.headers["X-Content-Type-Options"] == "nosniff"
            assert first.headers["Referrer-Policy"] == "no-referrer"
            assert "default-src 'none'" in first.headers["Content-Security-Policy"]
            tag = first.headers["ETag"]
        async with client.get(path, headers={"If-None-Match": f'"other", {tag}'}) as second:
            assert (second.status, await second.read(), second.headers["ETag"]) == (304, b"", tag)
        async with client.get(path, headers={"If-None-Match": '"other"'}) as third:
            assert third.status == 200


async def test_pages_name_only_what_is_served(client: TestClient[web.Request, web.Application]) -> None:
    """Every address in the pages is relative, so it holds behind another path too, and answers."""
    for path in ("/docs", "/redoc"):
        async with client.get(path) as answer:
            named = re.findall(r'(?:src|href)="([^"]*)"', await answer.text())
        assert len(named) >= 3
        for address in named:
            assert not address.startswith(("/", "http"))
            async with client.get(f"/{address}") as asset:
                assert asset.status == 200, address


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fdocs.py", "%2Fetc%2Fpasswd", "rapidoc-min.js"])
async def test_nothing_else_is_served(client: TestClient[web.Request, web.Application], name: str) -> None:
    """A name that is no asset's is not found, whatever it spells."""
    async with client.get(f"/docs/assets/{name}") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "not_found"
