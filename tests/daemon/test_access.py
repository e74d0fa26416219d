"""Who may do what, cell by cell, at a running daemon; and how a key that is taken away ends what it has running."""

import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping

import aiohttp
import pytest
from yarl import URL

from tests.api.test_openapi import application
from tests.harness import Daemon, daemon, fake_engines, free_port, port_block
from vllm_proxy.api import app
from vllm_proxy.domain.keys import Scope, hash_of, new_key

MODELS = """
[models.chat]
model = "org/chat"
aliases = ["gpt"]
[models.embed]
model = "org/embed"
"""
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
TOKENS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(
    ["inference", "metrics", "read", "operate", "admin", "disabled", "expired", "unknown"]
)}  # fmt: skip
DISABLED, EXPIRED = "enabled = false", "expires_at = 2020-01-01T00:00:00Z"
KEYS = "".join(
    f'[keys.{name}]\nhash = "{hash_of(token)}"\nscopes = ["{name if name in set(Scope) else "admin"}"]\n'
    f"{ {'disabled': DISABLED, 'expired': EXPIRED}.get(name, '') }\n"
    for name, token in TOKENS.items()
    if name != "unknown"
)
# What is configured: the table of keys, and what who sends none may do, by listener (loopback, elsewhere).
LOCAL = {Scope.INFERENCE, Scope.READ, Scope.METRICS}
CONFIGURED: dict[str, tuple[str, set[Scope], set[Scope]]] = {
    "no keys": ("", LOCAL, set()),
    "keys": (KEYS, set(), set()),
    "keys and anonymous": (KEYS + '[keys.anonymous]\nscopes = ["inference"]\n', {Scope.INFERENCE}, {Scope.INFERENCE}),
    "anonymous reads": (
        '[keys.anonymous]\nscopes = ["read"]\n',
        {Scope.READ, Scope.METRICS},
        {Scope.READ, Scope.METRICS},
    ),
    "revoked keys alone": (f'[keys.x]\nhash = "{hash_of(TOKENS["unknown"])}"\n{DISABLED}\n', set(), set()),
    "remote admin": ("[server]\nallow_remote_admin = true\n", set(Scope), set(Scope)),
}  # fmt: skip
INCLUDED = {
    "inference": {Scope.INFERENCE},
    "metrics": {Scope.METRICS},
    "read": {Scope.READ, Scope.METRICS},
    "operate": {Scope.OPERATE, Scope.READ, Scope.METRICS},
    "admin": set(Scope),
}
# Bodies and ids that are refused for what they are, once their sender was let in: so nothing changes.
PATHS = {"{model_id:.+}": "nobody", "{id}": "r", "{name}": "nobody", "{request_id:.+}": "nobody"}


def routes() -> Iterator[tuple[str, str, Scope | None]]:
    """Every route of the table, with a path that leads there and harms nothing."""
    for route in application()[app.ROUTES]:
        path = route.path
        for placeholder, value in PATHS.items():
            path = path.replace(placeholder, value)
        yield route.method, path, route.scope


ROUTES = list(routes())
# The contract's own words, not the table's: what each route needs.
NEEDS = [
    (r"GET /(|ready|health|docs|redoc|(openapi|schema)\.json|docs/assets/.*|ui(/.*)?|help(/.*)?)", None),
    (r"GET /metrics(/engines)?", Scope.METRICS),
    (r"GET /(models(/nobody)?|devices|events|usage|stats|requests(/nobody)?)", Scope.READ),
    (r"POST /config/plan", Scope.READ),
    (r"POST /models/nobody/(start|stop|restart|sleep|wake)", Scope.OPERATE),
    (r"GET /models/nobody/logs", Scope.OPERATE),
    (r"DELETE /requests/nobody", Scope.OPERATE),
    (r"POST /config/reload", Scope.OPERATE),
    (r"(POST|PUT|PATCH|DELETE) /models(/nobody)?", Scope.ADMIN),
    (r"(GET|PUT) /config", Scope.ADMIN),
    (r"(GET|POST|PATCH|DELETE) /keys.*", Scope.ADMIN),
    (r".* /(v1|v2)/.*", Scope.INFERENCE),
    (r"GET /(version|tokenizer_info)", Scope.INFERENCE),
    (r"POST /(rerank|score|generative_scoring|classify|pooling|tokenize|detokenize)", Scope.INFERENCE),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_each_route_needs_the_scope_of_the_contract(method: str, path: str, scope: Scope | None) -> None:
    """The first line that speaks of it."""
    assert scope == next(needed for words, needed in NEEDS if re.fullmatch(words, f"{method} {path}"))


class Doors:
    """A daemon with a listener on loopback, one on all addresses, and a Unix socket."""

    def __init__(self, running: Daemon, port: int) -> None:
        self.running = running
        self._unix = aiohttp.UnixConnector(str(running.folder / "http.sock"))
        self.clients = {
            "loopback": (running.session, running.url),
            "elsewhere": (aiohttp.ClientSession(), f"http://127.0.0.1:{port}"),
            "unix": (aiohttp.ClientSession(connector=self._unix), "http://localhost"),
            "control": (running.admin, "http://localhost"),
        }

    async def configure(self, keys: str) -> None:
        """Save a file with these keys, and wait until it is followed."""
        self.running.file.write_text(self.text(keys), encoding="utf-8")
        wanted = await self.running.write("POST", "/config/reload")
        assert wanted["revision"]

    def text(self, keys: str) -> str:
        """The file: what is of the listeners stays."""
        base = (self.running.folder / "base.toml").read_text(encoding="utf-8")
        if keys.startswith("[server]"):
            base, keys = base.replace("[server]\n", keys, 1), ""
        return base + keys

    async def ask(
        self, listener: str, method: str, path: str, headers: Mapping[str, str], body: object = None
    ) -> tuple[int, str]:
        """The status and the error's code."""
        session, base = self.clients[listener]
        data = json.dumps(body if body is not None else {"model": "nobody"}) if method != "GET" else None
        kind = "text/toml" if path.startswith("/config") else "application/json"
        async with session.request(
            method, URL(base + path, encoded=True), data=data, headers={"Content-Type": kind, **headers}
        ) as answer:
            if answer.content_type != "application/json":
                return answer.status, ""
            found = await answer.json()
            return answer.status, str(found.get("error", {}).get("code", "")) if isinstance(
                found.get("error"), dict
            ) else ""

    async def close(self) -> None:
        """Close its clients."""
        for session, _ in self.clients.values():
            await session.close()


@pytest.fixture(scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """The daemon, ready."""
    folder, own, other = tmp_path_factory.mktemp("access"), free_port(), free_port()
    base = (
        f'[server]\nlisten = ["127.0.0.1:{own}", "0.0.0.0:{other}", "unix:http.sock"]\n'
        + fake_engines(port_block())
        + MODELS
    )
    (folder / "base.toml").write_text(base, encoding="utf-8")
    async with daemon(base, folder, listens_on=own) as running:
        await running.all_ready()
        found = Doors(running, other)
        yield found
        await found.close()


@pytest.mark.parametrize("listener", ["loopback", "elsewhere", "unix", "control"])
@pytest.mark.parametrize("configured", list(CONFIGURED))
async def test_every_cell_of_the_table(doors: Doors, listener: str, configured: str) -> None:
    """(listener, keys, route, caller) -> let in, 401 with its code, or 403."""
    text, *anonymous = CONFIGURED[configured]
    await doors.configure(text)
    cells = 0
    for (method, path, scope), caller in itertools.product(ROUTES, [None, *TOKENS]):
        if path in {"/events", "/v1/realtime"} and method != "GET":
            continue
        status, code = await _outcome(doors, listener, method, path, caller)
        wanted = _wanted(listener, configured, path, scope, caller, anonymous[listener != "loopback"])
        assert (status if status in {401, 403} else "in", code if status in {401, 403} else "") == wanted, (
            listener, configured, method, path, caller, status, code,
        )  # fmt: skip
        cells += 1
    assert cells > 300


async def _outcome(doors: Doors, listener: str, method: str, path: str, caller: str | None) -> tuple[int, str]:
    headers = {} if caller is None else {"Authorization": f"Bearer {TOKENS[caller]}"}
    if path == "/events":  # endless: its head is all that is asked for
        session, base = doors.clients[listener]
        async with session.get(base + path, headers=headers) as answer:
            return answer.status, (await answer.json())["error"]["code"] if answer.status != 200 else ""
    return await doors.ask(listener, method, path, headers)


def _wanted(
    listener: str, configured: str, path: str, scope: Scope | None, caller: str | None, anonymous: set[Scope]
) -> tuple[object, str]:
    if scope is None or listener == "control":
        return "in", ""
    has_keys = KEYS in CONFIGURED[configured][0]
    if has_keys and caller in INCLUDED and path == "/usage":  # what is about itself
        return "in", ""
    if has_keys and caller in INCLUDED:
        return ("in", "") if scope in INCLUDED[caller] else (403, "missing_scope")
    if has_keys and caller == "expired":
        return 401, "expired_api_key"
    if (has_keys and caller == "disabled") or (configured == "revoked keys alone" and caller == "unknown"):
        return 401, "invalid_api_key"
    if scope in anonymous:
        return "in", ""
    return 401, "missing_api_key" if caller is None else "invalid_api_key"


async def test_a_stored_response_is_asked_for_at_the_models_of_the_key_alone(doors: Doors) -> None:
    """Whoever guesses the id of another tenant's answer does not get it from a model that is none of theirs."""
    await doors.configure(f'[keys.ci]\nhash = "{hash_of(TOKENS["inference"])}"\nmodels = ["embed"]\n')
    headers = {"Authorization": f"Bearer {TOKENS['inference']}", "X-Request-Id": "guessed"}
    async with doors.running.session.get("/v1/responses/resp_1", headers=headers) as answer:
        assert answer.status == 404
    assert len(await doors.running.seen("guessed", "embed")) == 1
    assert await doors.running.seen("guessed", "chat") == []
