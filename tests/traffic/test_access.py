"""Who may do what: the head of a request becomes its caller, or a refusal."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.hosts import is_loopback
from vllm_proxy.domain.keys import ALL, Key, Scope, closure, digest, hash_of, new_key
from vllm_proxy.domain.listener import CONTROL as CONTROL_SOCKET
from vllm_proxy.domain.listener import Listener
from vllm_proxy.errors import AccessError, ConfigError, RequestError
from vllm_proxy.traffic.access import CONTROL, Access, Admission
from vllm_proxy.traffic.envelope import error_response
from vllm_proxy.traffic.head import read_head
from vllm_proxy.traffic.keyring import Caller, Keyring

LOOPBACK, NETWORK, UNIX = Listener.at("127.0.0.1"), Listener.at("0.0.0.0"), Listener()
KEY, OTHER, ADMIN = (new_key(bytes([number]) * 32) for number in range(3))
KEYS = f"""
[keys.ci]
hash = "{hash_of(KEY)}"
[keys.admin]
hash = "{hash_of(ADMIN)}"
scopes = ["admin"]
"""
ANYBODY = '[keys.anonymous]\nscopes = ["inference"]\n'


def connection(listener: Listener, *, tls: bool = False) -> Any:  # noqa: ANN401 - as much of a connection as is looked at
    """A client that came by a listener."""
    return SimpleNamespace(listener=listener, ssl_context=object() if tls else None, transport=None)


def outcome(ask: Callable[[], Caller]) -> Caller | RequestError:
    """Who that is, or the refusal."""
    try:
        return ask()
    except RequestError as error:
        return error


def caller(
    text: str,
    listener: Listener = LOOPBACK,
    scope: Scope | None = Scope.INFERENCE,
    **headers: str,
) -> Caller | str:
    """Who that is, or the code of the refusal. `headers`: with _ for -."""
    config = parse_config(text.encode(), "models.toml")
    access = Access(lambda: config.server, Keyring(config), () if listener.host == "" else (listener.host,))
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    head, _ = read_head(raw)
    client = connection(listener, tls=headers.get("Tls") == "yes")
    try:
        return access.caller(head, client, scope) if scope else access.whoever(head, client)
    except RequestError as error:
        return error.code


def name(text: str, listener: Listener = LOOPBACK, scope: Scope | None = Scope.INFERENCE, **headers: str) -> str:
    """The name of the caller, or the code of the refusal."""
    found = caller(text, listener, scope, **headers)
    return found if isinstance(found, str) else found.name


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("chat.localhost", True),
        ("ip6-localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Addresses of 127/8, ::1 and the names that mean them; nothing that only looks so."""
    assert is_loopback(host) is expected


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER   {KEY} "},
        {"x_api_key": KEY},
        {"X_API_KEY": f" {KEY} "},
        {"Authorization": "Bearer EMPTY", "x_api_key": KEY},
        {"Authorization": "Basic dXNlcjpwYXNz", "x_api_key": KEY},
    ],
)
def test_a_key_comes_as_a_bearer_or_as_x_api_key(headers: dict[str, str]) -> None:
    """In any case of the scheme, and by whichever header holds one that is known."""
    assert name(KEYS, NETWORK, Scope.INFERENCE, **headers) == "ci"


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (f"openai-insecure-api-key.{KEY}", "ci"),
        (f"realtime, openai-insecure-api-key.{KEY}", "ci"),
        (f" openai-insecure-api-key.{KEY} ,openai-beta.realtime-v1", "ci"),
        (f"openai-insecure-api-key.{OTHER}", "invalid_api_key"),
        (f"openai-insecure-api-key.{ADMIN}, openai-insecure-api-key.{KEY}", "admin"),
        ("openai-insecure-api-key.", "missing_api_key"),
        (f"OpenAI-Insecure-Api-Key.{KEY}", "missing_api_key"),
        (KEY, "missing_api_key"),
        ("", "missing_api_key"),
    ],
)
def test_a_key_comes_with_a_websocket_as_one_of_its_protocols(offered: str, expected: str) -> None:
    """Which is all that a browser can send with it; on no other route."""
    config = parse_config(KEYS.encode(), "models.toml")
    access, head = Access(lambda: config.server, Keyring(config)), {b"sec-websocket-protocol": offered.encode()}
    found = outcome(lambda: access.of_session(head, connection(NETWORK), Scope.INFERENCE))
    assert (found.name if isinstance(found, Caller) else found.code) == expected
    with pytest.raises(AccessError, match="without a key"):
        access.caller(head | {b"upgrade": b"websocket"}, connection(NETWORK), Scope.INFERENCE)


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_websockets_other_key_counts_for_more_than_its_protocol(header: str) -> None:
    """As programs send it."""
    config = parse_config(KEYS.encode(), "models.toml")
    value = KEY.encode() if header == "x-api-key" else f"Bearer {KEY}".encode()
    head = {header.lower().encode(): value, b"sec-websocket-protocol": f"openai-insecure-api-key.{ADMIN}".encode()}
    assert (
        Access(lambda: config.server, Keyring(config)).of_session(head, connection(NETWORK), Scope.INFERENCE).name
        == "ci"
    )


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": ""}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": KEY}, "missing_api_key"),
        ({"Authorization": f"Basic {KEY}"}, "missing_api_key"),
        ({"api_key": KEY}, "missing_api_key"),
        ({"Sec_WebSocket_Protocol": f"openai-insecure-api-key.{KEY}"}, "missing_api_key"),
        ({"Authorization": f"Bearer {OTHER}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {KEY},{KEY}"}, "invalid_api_key"),
        ({"x_api_key": "EMPTY"}, "invalid_api_key"),
    ],
)
def test_whoever_sends_no_key_that_is_known_gets_nothing_where_nothing_is_open(
    headers: dict[str, str], code: str
) -> None:
    """No key is told from a wrong one, so that one knows what to mend."""
    assert name(KEYS, NETWORK, Scope.INFERENCE, **headers) == code
    assert name(KEYS, LOOPBACK, Scope.INFERENCE, **headers) == code


def message(text: str, **headers: str) -> AccessError:
    """The refusal itself."""
    config = parse_config(text.encode(), "models.toml")
    head, _ = read_head([(key.encode(), value.encode()) for key, value in headers.items()])
    with pytest.raises(AccessError) as refused:
        Access(lambda: config.server, Keyring(config)).caller(head, connection(NETWORK), Scope.ADMIN)
    return refused.value


def test_a_mistyped_key_is_told_from_one_that_is_unknown() -> None:
    """By its checksum; the key itself is in no message."""
    mistyped = KEY[:10] + ("A" if KEY[10] != "A" else "B") + KEY[11:]
    for key, words in ((mistyped, "mistyped"), (KEY[:-1], "mistyped"), (OTHER, "unknown or revoked")):
        refused = message(KEYS, authorization=f"Bearer {key}")
        assert words in refused.message
        assert key not in refused.message
        assert key[:12] not in refused.message


def test_a_refusal_says_how_to_get_in() -> None:
    """In a header for programs (RFC 6750), in words for people."""
    refused = message(KEYS)
    assert refused.challenge == 'Bearer realm="vllm-proxy"'
    assert "vllm-proxy keys new NAME --scope admin" in refused.message
    assert (
        message(KEYS, authorization=f"Bearer {OTHER}").challenge == 'Bearer realm="vllm-proxy", error="invalid_token"'
    )
    narrow = message(KEYS, authorization=f"Bearer {KEY}")
    assert (narrow.code, narrow.status) == ("missing_scope", 403)
    assert narrow.challenge == 'Bearer realm="vllm-proxy", error="insufficient_scope", scope="admin"'


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ("enabled = false", "invalid_api_key"),
        ("expires_at = 2020-01-01T00:00:00Z", "expired_api_key"),
        ('scopes = ["read"]', "missing_scope"),
    ],
)
def test_a_key_that_is_known_never_falls_back_to_anonymous(keys: str, code: str) -> None:
    """Disabled, expired or too narrow: it says so, though who sends none may do it."""
    text = f'[keys.ci]\nhash = "{hash_of(KEY)}"\n{keys}\n{ANYBODY}'
    assert name(text, NETWORK, Authorization=f"Bearer {KEY}") == code
    assert name(text, NETWORK, Authorization="Bearer EMPTY") == "anonymous"
    assert name(text, NETWORK) == "anonymous"


@pytest.mark.parametrize("held", list(Scope))
@pytest.mark.parametrize("needed", list(Scope))
def test_a_scope_includes_those_below_it(held: Scope, needed: Scope) -> None:
    """Read includes metrics, operate includes read, admin includes all; inference is beside them."""
    text = f'[keys.ci]\nhash = "{hash_of(KEY)}"\nscopes = ["{held}"]\n'
    included: dict[str, set[str]] = {
        "inference": {"inference"},
        "metrics": {"metrics"},
        "read": {"read", "metrics"},
        "operate": {"operate", "read", "metrics"},
        "admin": {*Scope},
    }
    expected = "ci" if needed in included[held] else "missing_scope"
    assert name(text, NETWORK, needed, Authorization=f"Bearer {KEY}") == expected


def test_a_valid_key_needs_neither_host_nor_origin() -> None:
    """No page knows it."""
    headers = {"Host": "evil.example", "Origin": "http://evil.example", "Authorization": f"Bearer {KEY}"}
    assert name(KEYS, LOOPBACK, Scope.INFERENCE, **headers) == "ci"


# Who sends none


@pytest.mark.parametrize(
    ("text", "listener", "scopes"),
    [
        ("", LOOPBACK, {"inference", "read", "metrics"}),
        ("", NETWORK, set()),
        ("", UNIX, set()),
        (KEYS, LOOPBACK, set()),
        (KEYS, NETWORK, set()),
        (ANYBODY, LOOPBACK, {"inference"}),
        (ANYBODY, NETWORK, {"inference"}),
        (ANYBODY + KEYS, NETWORK, {"inference"}),
        ('[keys.anonymous]\nscopes = ["operate"]', NETWORK, {"operate", "read", "metrics"}),
        ("[keys.anonymous]\nenabled = false", LOOPBACK, set()),
        ("[keys.anonymous]\nexpires_at = 2020-01-01T00:00:00Z", LOOPBACK, set()),
        (f'[keys.ci]\nhash = "{hash_of(KEY)}"\nenabled = false', LOOPBACK, set()),
        ("[server]\nallow_remote_admin = true", LOOPBACK, set(Scope)),
        ("[server]\nallow_remote_admin = true\n" + KEYS, NETWORK, set(Scope)),
        ("", CONTROL_SOCKET, set(Scope)),
        (KEYS, CONTROL_SOCKET, set(Scope)),
    ],
)
def test_what_who_sends_no_key_may_do(text: str, listener: Listener, scopes: set[str]) -> None:
    """On loopback infer and read while there are no keys, elsewhere nothing; or what [keys.anonymous] says."""
    assert {scope for scope in Scope if not isinstance(caller(text, listener, scope), str)} == scopes


@pytest.mark.parametrize("scope", [*Scope])
@pytest.mark.parametrize("known_as", [*Scope, "root", "keys"])
def test_the_name_of_a_key_gives_it_nothing(known_as: str, scope: Scope) -> None:
    """Be it that of a scope."""
    text = f'[keys.{known_as}]\nhash = "{hash_of(KEY)}"\nscopes = ["metrics"]\n'
    expected = known_as if scope is Scope.METRICS else "missing_scope"
    assert name(text, NETWORK, scope, Authorization=f"Bearer {KEY}") == expected


def test_no_key_has_the_name_of_who_uses_the_control_socket() -> None:
    """What is used is counted by name, and nothing limits the socket."""
    with pytest.raises(ConfigError) as error:
        parse_config(f'[keys.control]\nhash = "{hash_of(KEY)}"\n'.encode(), "models.toml")
    assert "kept for who uses the control socket" in error.value.problems[0].message


def test_a_key_is_good_until_the_clock_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment itself it has expired; where the clock is set back it is good again; what runs ends by it too."""
    config = parse_config(ci("expires_at = 2027-01-01T00:00:00+02:00").encode(), "models.toml")
    access, client = Access(lambda: config.server, Keyring(config)), connection(NETWORK)
    head, last = {b"authorization": f"Bearer {KEY}".encode()}, 1798754400.0
    now = last - 0.001
    monkeypatch.setattr("vllm_proxy.traffic.access.time", SimpleNamespace(time=lambda: now))
    admission = Admission(access.caller(head, client, Scope.INFERENCE), Scope.INFERENCE)
    assert access.whoever(head, client).name == "ci"
    for now in (last, last + 1e9, last - 1e9, last):
        found = outcome(lambda: access.caller(head, client, Scope.INFERENCE))
        ended = access.refusal_of(admission, client)
        assert access.whoever(head, client).name == ("ci" if now < last else "anonymous")
        if now < last:
            assert isinstance(found, Caller)
            assert ended is None
        else:
            assert not isinstance(found, Caller)
            assert (found.code, ended and ended.code) == ("expired_api_key", "expired_api_key")


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {OTHER}"}, {"x_api_key": "EMPTY"}])
def test_an_unknown_key_is_no_key_where_none_is_needed(headers: dict[str, str]) -> None:
    """Clients must send some."""
    assert name("", LOOPBACK, Scope.INFERENCE, **headers) == "anonymous"


# Pages


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LocalHost", "[::1]:8000", "x.localhost:1", "proxy.lan:8000"],
)
@pytest.mark.parametrize("scope", [Scope.INFERENCE, Scope.READ, None])
def test_a_loopback_listener_answers_to_loopback_names_and_allowed_hosts(host: str, scope: Scope | None) -> None:
    """With or without a port, in any case."""
    assert name('[server]\nallowed_hosts = ["Proxy.LAN"]', LOOPBACK, scope, Host=host) == "anonymous"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1@evil.example", "[::1", "10.0.0.1", " "],
)
@pytest.mark.parametrize("scope", [Scope.INFERENCE, Scope.READ, None])
def test_a_loopback_listener_refuses_any_other_host(host: str, scope: Scope | None) -> None:
    """A page that points its own name at this machine gets nothing: not inference, not what is public."""
    assert name("", LOOPBACK, scope, Host=host) == "host_not_allowed"


def test_a_request_without_a_host_is_from_no_page() -> None:
    """HTTP/1.0 need not send one, and every browser does."""
    assert name("", LOOPBACK) == "anonymous"


def test_a_host_that_was_good_is_asked_again_when_the_configuration_changes() -> None:
    """What is remembered of hosts is forgotten with the list that they stood in."""
    allowed = parse_config(b'[server]\nallowed_hosts = ["ui.lan"]', "models.toml")
    none = parse_config(b"", "models.toml")
    keyring, server = Keyring(allowed), allowed.server
    access = Access(lambda: server, keyring, ["127.0.0.1"])
    head = {b"host": b"ui.lan"}
    for _ in range(2):
        assert access.caller(head, connection(LOOPBACK), Scope.INFERENCE).name == "anonymous"
    server = none.server
    keyring.adopt(none)
    with pytest.raises(RequestError, match=r"ui\.lan"):
        access.caller(head, connection(LOOPBACK), Scope.INFERENCE)


@pytest.mark.parametrize("key", ['host = "workstation"', 'listen = ["unix:http.sock", "workstation:1"]'])
def test_the_listen_address_is_an_allowed_host(key: str) -> None:
    """The name in the file, and the address that it became."""
    text, listener = f"[server]\n{key}", Listener.at("127.0.1.1")
    assert name(text, listener, Host="workstation:8000") == "anonymous"
    assert name(text, listener, Host="127.0.1.1:8000") == "anonymous"


@pytest.mark.parametrize("scope", [Scope.INFERENCE, Scope.READ])
def test_the_daemons_own_pages_may_ask(scope: Scope) -> None:
    """They send an Origin that equals the address they were loaded from; behind TLS a browser says so itself."""
    assert name("", LOOPBACK, scope, Host="localhost:8000", Origin="http://localhost:8000") == "anonymous"
    headers = {"Host": "localhost", "Origin": "https://localhost"}
    assert name("", LOOPBACK, scope, **headers) == "origin_not_allowed"
    assert name("", LOOPBACK, scope, **headers, Sec_Fetch_Site="same-origin") == "anonymous"
    assert not isinstance(caller("", LOOPBACK, scope, Tls="yes", **headers), str)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://localhost:3000", "https://localhost:8000", "http://127.0.0.1:8000", "null"],
)
@pytest.mark.parametrize("scope", [Scope.INFERENCE, Scope.READ])
def test_any_other_page_is_refused(origin: str, scope: Scope) -> None:
    """Another host, port or scheme is another origin, and so is a sandboxed page's "null"; so too for inference."""
    assert name("", LOOPBACK, scope, Host="localhost:8000", Origin=origin) == "origin_not_allowed"


@pytest.mark.parametrize(
    ("cors_origins", "inference", "read"),
    [
        (["http://ui.lan"], "anonymous", "anonymous"),
        (["*"], "anonymous", "origin_not_allowed"),
        (["http://ui.lan:81"], "origin_not_allowed", "origin_not_allowed"),
        (["http://ui.lan.evil.example"], "origin_not_allowed", "origin_not_allowed"),
    ],
)
def test_an_origin_is_allowed_by_its_exact_name(cors_origins: list[str], inference: str, read: str) -> None:
    """Or, for inference alone, by "*", which means every page."""
    text = f"[server]\ncors_origins = {cors_origins!r}"
    headers = {"Host": "localhost", "Origin": "http://ui.lan"}
    assert name(text, LOOPBACK, Scope.INFERENCE, **headers) == inference
    assert name(text, LOOPBACK, Scope.READ, **headers) == read


def test_an_allowed_origin_does_not_excuse_the_host() -> None:
    """Both rules hold."""
    text = '[server]\ncors_origins = ["*"]'
    assert name(text, LOOPBACK, Host="evil.example", Origin="http://evil.example") == "host_not_allowed"


def test_elsewhere_a_name_is_not_looked_at_but_a_page_of_an_unknown_one_is_refused() -> None:
    """The network calls a machine what it likes; a page whose own name leads here may have been pointed at it."""
    assert name(ANYBODY, NETWORK, Host="node-7:8000") == "anonymous"
    assert name(ANYBODY, NETWORK, Host="evil.example", Origin="http://evil.example") == "host_not_allowed"
    assert name(ANYBODY, NETWORK, Host="10.0.0.7:8000", Origin="http://10.0.0.7:8000") == "anonymous"
    allowed = '[server]\nallowed_hosts = ["node-7"]\n' + ANYBODY
    assert name(allowed, NETWORK, Host="node-7", Origin="http://node-7") == "anonymous"
    assert name(allowed, NETWORK, Host="node-7", Origin="http://other") == "origin_not_allowed"


def test_allowing_remote_administration_does_not_open_a_loopback_listener_to_other_names() -> None:
    """The key is about other machines, not about pages in this one's browser."""
    text = "[server]\nallow_remote_admin = true"
    assert name(text, LOOPBACK, Scope.ADMIN, Host="evil.example") == "host_not_allowed"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "control"),
        ({"Host": "whatever"}, "control"),
        ({"Host": "localhost:8800", "Origin": "http://localhost:8800"}, "control"),
        ({"Host": "localhost:8800", "Sec_Fetch_Site": "none"}, "control"),
        ({"Host": "localhost:8800", "Origin": "http://evil.example"}, "origin_not_allowed"),
        ({"Host": "evil.example:8800", "Origin": "http://evil.example:8800"}, "host_not_allowed"),
        ({"Host": "evil", "Sec_Fetch_Mode": "no-cors"}, "host_not_allowed"),
        ({"Host": "evil.example:8800"}, "host_not_allowed"),  # a GET from a page of plain HTTP
        ({"Host": "127.0.0.1:8800"}, "control"),
        ({"Authorization": f"Bearer {KEY}"}, "control"),
    ],
)
def test_the_control_socket_may_do_everything_but_does_not_believe_browsers(
    headers: dict[str, str], expected: str
) -> None:
    """Whoever may open its file may administer; a port forwarded to it would open it to every page."""
    assert name(KEYS, CONTROL_SOCKET, Scope.ADMIN, **headers) == expected


# What was let in and may not go on


def refusal(before: str, after: str, model: str = "chat", scope: Scope = Scope.INFERENCE, key: str = KEY) -> str | None:
    """The code with which a request of a key ends when the configuration changes."""
    old, new = (parse_config((text + MODELS).encode(), "models.toml") for text in (before, after))
    keyring = Keyring(old)
    access = Access(lambda: old.server, keyring)
    client = connection(NETWORK)
    head = {b"authorization": f"Bearer {key}".encode()} if key else {}
    admission = Admission(access.caller(head, client, scope), scope, model)
    keyring.adopt(new)
    error = access.refusal_of(admission, client)
    return error.code if error else None


MODELS = '\n[models.chat]\nmodel = "x"\naliases = ["gpt"]\n[models.embed]\nmodel = "y"\n'


def ci(keys: str = "", key: str = KEY) -> str:
    """A table of one key."""
    return f'[keys.ci]\nhash = "{hash_of(key)}"\n{keys}\n'


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (ci(), None),
        (ci('description = "x"'), None),
        (ci('models = ["chat"]'), None),
        (ci('models = ["gpt"]'), None),
        (ci('scopes = ["admin"]'), None),
        (ci('models = ["embed"]'), "model_not_found"),
        (ci('scopes = ["read"]'), "missing_scope"),
        (ci("enabled = false"), "invalid_api_key"),
        (ci("expires_at = 2020-01-01T00:00:00Z"), "expired_api_key"),
        (ci(key=OTHER), "invalid_api_key"),
        ("", "invalid_api_key"),
    ],
)
def test_a_request_ends_when_its_key_may_not_have_it_any_more(after: str, code: str | None) -> None:
    """Dropped, disabled, narrowed, rotated away or expired; anything else does it no harm."""
    assert refusal(ci(), after) == code


def test_a_request_of_a_model_that_is_gone_goes_on_whatever_else_becomes_of_its_key() -> None:
    """It drains: only a key that may not use a model of that name any more has lost it."""
    config = {
        models: parse_config((ci(f'models = ["ch*"]\n{more}') + models).encode(), "models.toml")
        for models, more in (
            (MODELS, ""),
            (MODELS.replace("[models.chat]", "[models.renamed]"), "isolate_cache = true"),
        )
    }
    before, after = config.values()
    keyring = Keyring(before)
    access = Access(lambda: before.server, keyring)
    head = {b"authorization": f"Bearer {KEY}".encode()}
    admission = Admission(access.caller(head, connection(NETWORK), Scope.INFERENCE), Scope.INFERENCE, "chat")
    keyring.adopt(after)
    assert access.refusal_of(admission, connection(NETWORK)) is None
    keyring.adopt(parse_config(ci('models = ["embed"]').encode(), ""))
    assert access.refusal_of(admission, connection(NETWORK)) is not None


def test_what_is_being_done_is_done_and_what_waits_for_its_turn_is_not() -> None:
    """A change commits in its turn: before that it ends with its key, from then on it has its answer."""
    old, new = (parse_config(text.encode(), "models.toml") for text in (ci('scopes = ["admin"]'), ""))
    keyring, client = Keyring(old), connection(NETWORK)
    access = Access(lambda: old.server, keyring)
    caller = access.caller({b"authorization": f"Bearer {KEY}".encode()}, client, Scope.ADMIN)
    committed, waits = Admission(caller, Scope.ADMIN), Admission(caller, Scope.ADMIN)
    committed.commit()
    keyring.adopt(new)
    assert access.refusal_of(committed, client) is None
    waits.revoked = access.refusal_of(waits, client)
    with pytest.raises(RequestError, match="revoked"):
        waits.commit()


def test_a_request_of_nobody_ends_when_nobody_may_have_it_any_more() -> None:
    """[keys.anonymous] is narrowed as any other."""
    assert refusal(ANYBODY, ANYBODY, key="") is None
    assert refusal(ANYBODY, KEYS, key="") == "missing_api_key"  # as the next one; nobody has a key called anonymous
    everything = "[server]\nallow_remote_admin = true\n"
    assert refusal(everything, "", key="") == "missing_api_key"
    assert refusal(everything, ANYBODY, key="") is None
    assert refusal(everything, ANYBODY, key="", scope=Scope.ADMIN) == "missing_api_key"
    assert refusal(ANYBODY, everything, key="") is None


def test_the_control_socket_is_never_revoked() -> None:
    """It has no key."""
    config = parse_config(b"", "models.toml")
    access = Access(lambda: config.server, Keyring(config))
    assert access.refusal_of(Admission(CONTROL, Scope.ADMIN), connection(CONTROL_SOCKET)) is None


# Models


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        ('["*"]', {"chat", "gpt", "embed"}),
        ('["chat"]', {"chat", "gpt"}),
        ('["gpt"]', {"gpt"}),
        ('["g*", "embed"]', {"gpt", "embed"}),
        ("[]", set()),
        ('["nobody"]', set()),
    ],
)
def test_a_glob_that_allows_an_id_allows_its_aliases_and_not_the_other_way_round(globs: str, names: set[str]) -> None:
    """Globs are over ids and aliases."""
    found = caller(ci(f"models = {globs}") + MODELS, NETWORK, Authorization=f"Bearer {KEY}")
    assert isinstance(found, Caller)
    assert {model for model in ("chat", "gpt", "embed") if found.may_use(model)} == names


def test_keys_that_isolate_have_salts_of_their_own_that_last() -> None:
    """A rotation keeps it, another key has another, and nobody outside can compute it."""
    text = (
        ci("isolate_cache = true")
        + f'[keys.b]\nhash = "{hash_of(OTHER)}"\nisolate_cache = true\n'
        + KEYS.split("[keys.ci]", maxsplit=1)[0]
    )
    one, other = (caller(text, NETWORK, Authorization=f"Bearer {key}") for key in (KEY, OTHER))
    rotated = caller(ci("isolate_cache = true", ADMIN), NETWORK, Authorization=f"Bearer {ADMIN}")
    assert isinstance(one, Caller)
    assert isinstance(other, Caller)
    assert isinstance(rotated, Caller)
    assert len({one.isolation, other.isolation, b""}) == 3
    assert rotated.isolation == one.isolation
    assert digest(KEY.encode()).hex().encode() not in one.isolation


NAMES = [b"authorization", b"x-api-key", b"origin", b"host", b"upgrade", b"sec-websocket-protocol", b"sec-fetch-site",
         b"Authorization", b"X-API-KEY", b"connection"]  # fmt: skip
PIECES = [b"Bearer ", b"bearer", b"Basic ", KEY[:-1].encode(), OTHER.encode(), KEY[:20].encode(), b"\xff", b"\0", b",",
          b" ", b"\t", b"openai-insecure-api-key.", b"localhost", b"[::1", b"@", b":8000", b"http://", b"null",
          b"same-origin", b"\x80", b"sha256:", hash_of(KEY).encode(), digest(KEY.encode())]  # fmt: skip
VALUES = st.binary(max_size=80) | st.lists(st.sampled_from(PIECES), max_size=6).map(b"".join)
HEADS = st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=8)


@given(HEADS, st.sampled_from([LOOPBACK, NETWORK, UNIX]), st.sampled_from([*Scope]))
def test_no_head_without_a_key_becomes_a_caller_that_needs_one(
    raw: list[tuple[bytes, bytes]], listener: Listener, scope: Scope
) -> None:
    """Whatever bytes stand in it, also what is kept of a key: a refusal whose words a client can be sent, no fault."""
    config = parse_config(KEYS.encode(), "models.toml")
    access = Access(lambda: config.server, Keyring(config))
    head, _ = read_head(raw)
    for let_in in (access.caller, access.of_session):
        with pytest.raises(RequestError) as refused:
            let_in(head, connection(listener), scope)
        answer = error_response(refused.value)
        assert 400 <= answer.status < 500
        assert KEY[:20] not in str(answer.text)
        assert "\n" not in answer.headers["WWW-Authenticate"]


@given(
    HEADS, st.sampled_from([LOOPBACK, NETWORK, UNIX, CONTROL_SOCKET]), st.sampled_from(["", ANYBODY, KEYS + ANYBODY])
)
def test_no_head_is_a_fault_where_it_needs_no_key(
    raw: list[tuple[bytes, bytes]], listener: Listener, text: str
) -> None:
    """It is a caller who may do what anonymous may, or a refusal."""
    config = parse_config(text.encode(), "models.toml")
    access = Access(lambda: config.server, Keyring(config), ["127.0.0.1"])
    head, _ = read_head(raw)
    client = connection(listener)
    for scope in (None, Scope.INFERENCE, Scope.ADMIN):
        ask = partial(access.caller, head, client, scope) if scope else partial(access.whoever, head, client)
        found = outcome(ask)
        if isinstance(found, Caller):
            assert found.is_anonymous
            assert scope is not Scope.ADMIN or listener is CONTROL_SOCKET
        else:
            assert error_response(found).status in {401, 403}


def test_scopes_are_closed_in_the_caller() -> None:
    """What a scope includes is looked up once, not for each request."""
    assert Keyring(parse_config(KEYS.encode(), "")).find(digest(ADMIN.encode())).scopes == ALL  # type: ignore[union-attr]
    assert closure(["read"]) == {Scope.READ, Scope.METRICS}
    assert Key("x", (), closure(["admin"])).scopes == ALL
