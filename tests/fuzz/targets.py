"""What is fed with bytes: each target takes some, and raises where the daemon would have a fault, or be deceived.

Each is a function of bytes alone, for `python -m tests.fuzz atheris`; tests/fuzz/test_targets.py feeds a few to each.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.file.edit_keys import KeyTexts
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import Scope, hash_of, new_key
from vllm_proxy.domain.listener import Listener
from vllm_proxy.domain.references import AdapterFolder, NoFiles
from vllm_proxy.errors import ConfigError, RequestError, VllmProxyError
from vllm_proxy.traffic import asked
from vllm_proxy.traffic.access import Access, Head
from vllm_proxy.traffic.body import model_name, model_name_of_large, with_model, with_salt
from vllm_proxy.traffic.envelope import error_response
from vllm_proxy.traffic.head import read_head
from vllm_proxy.traffic.keyring import Caller, Keyring

KEY = new_key(b"k" * 32)
NAMED = f'[keys.ci]\nhash = "{hash_of(KEY)}"\n'
OPEN = NAMED + '[keys.anonymous]\nscopes = ["inference"]\n'
SALT = b"5a17" * 16
_LOOPBACK, _NETWORK = Listener.at("127.0.0.1"), Listener.at("0.0.0.0")


class _Given(NoFiles):
    """One file, whatever it is called."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, _text: str) -> bytes:
        """It."""
        return self._data

    def adapter(self, _text: str) -> AdapterFolder:
        """With it as its configuration."""
        return AdapterFolder("r", self._data)


def configuration(data: bytes) -> None:
    """Bytes are a configuration, or have problems: as the file itself, as that of its keys, as a key, as an adapter."""
    for text, files in (
        (data, _Given(b"")),
        (b'[server]\nkeys_file = "k"\n', _Given(data)),
        (b'[keys.ci]\nfile = "k"\n', _Given(data)),
        (b'[models.a]\nmodel = "m"\nadapters.b.path = "c"\n', _Given(data)),
    ):
        with contextlib.suppress(ConfigError):
            parse_config(text, "models.toml", files=files)


def head(data: bytes) -> None:
    """Lines of a head, `NAME: VALUE`, let nobody in who has no key, and are no fault."""
    raw = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in data.split(b"\n"))]
    mine, _ = read_head(raw)
    if any(KEY.encode() in value for value in mine.values()):
        return
    for text in (NAMED, OPEN, ""):
        config = parse_config(text.encode(), "models.toml")
        access = Access(lambda config=config: config.server, Keyring(config))  # type: ignore[misc]
        for listener in (_LOOPBACK, _NETWORK):
            client: Any = SimpleNamespace(listener=listener, ssl_context=None, transport=None)
            for ask in (access.caller, access.of_session):
                for scope in (Scope.INFERENCE, Scope.ADMIN):
                    _asks(ask, mine, client, scope)


def _asks(ask: Callable[..., Caller], head: Head, client: object, scope: Scope) -> None:
    try:
        found = ask(head, client, scope)
    except RequestError as error:
        answer = error_response(error)
    else:
        assert found.is_anonymous
        assert scope is Scope.INFERENCE
        return
    assert answer.status in {401, 403}


def body(data: bytes) -> None:
    """What the daemon reads of a body is what its engine reads; what it puts in counts there, and nothing else does."""
    for large in (False, True):
        try:
            name, place = asyncio.run(model_name_of_large(data)) if large else (model_name(data), None)
        except RequestError:
            continue
        before = _read_by_an_engine(data)
        assert before is None or before["model"] == name
        renamed = asyncio.run(with_model(data, "id", place))
        if before is not None:
            assert _same(_read_by_an_engine(renamed), {**before, "model": "id"})
        with contextlib.suppress(RequestError):
            salted = _read_by_an_engine(with_salt(renamed, SALT))
            if before is not None:
                assert _same(salted, {**before, "model": "id", "cache_salt": SALT.decode()})
            assert salted is None or salted["cache_salt"] == SALT.decode()


def metered(data: bytes) -> None:
    """What is read of a metered request is what its engine reads, a bound and the wish for usage included."""
    for path, large in itertools.product(("/v1/chat/completions", "/v1/completions"), (False, True)):
        try:
            found = asyncio.run(asked.read_large(data, path)) if large else asked.read(data, path)
        except RequestError:
            continue
        before = _read_by_an_engine(data)
        assert before is None or before["model"] == found.model
        with contextlib.suppress(RequestError):
            bounded = asked.with_most(data, path, 50)
            if found.options is not None:
                bounded = asked.with_usage(bounded, found.options)
            after = _read_by_an_engine(bounded)
            assert before is None or after is not None
            if after is not None:
                assert after["max_tokens" if path == "/v1/completions" else "max_completion_tokens"] == 50
                assert found.options is None or after["stream_options"]["include_usage"] is True


def _read_by_an_engine(data: bytes) -> dict[str, Any] | None:
    """As vLLM does (Starlette: `json.loads` of the bytes); None where it answers 400."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _same(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # NaN is not equal to itself


def edit(data: bytes) -> None:
    """A text, a zero byte, a name, a zero byte, JSON: a key is changed as it was asked for, or there is an error."""
    text, _, rest = data.partition(b"\0")
    name, _, keys = rest.partition(b"\0")
    try:
        texts, called, sent = KeyTexts(text.decode()), name.decode(), json.loads(keys)
    except (ValueError, RecursionError):
        return
    if not isinstance(sent, Mapping):
        return
    changes: tuple[Callable[[], KeyTexts], ...] = (
        lambda: edit_keys.create(texts, called, sent),
        lambda: edit_keys.patch(texts, called, sent),
        lambda: edit_keys.delete(texts, called),
        lambda: edit_keys.rotate(texts, called, hash_of(KEY)),
        lambda: edit_keys.finish(texts, called),
    )
    for change in changes:
        with contextlib.suppress(VllmProxyError):
            changed = change()
            with contextlib.suppress(ConfigError):
                parse_config(changed.config.encode(), "models.toml")


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "configuration": (configuration, [OPEN.encode(), b'[models.a]\nmodel = "x"\nenv = { A = "b" }\n', KEY.encode()]),
    "head": (
        head,
        [
            b"Authorization: Bearer vp-x\nHost: localhost:8000\nOrigin: http://localhost:8000",
            b"x-api-key: a\nSec-WebSocket-Protocol: realtime, openai-insecure-api-key.b\nConnection: authorization",
        ],
    ),
    "body": (
        body,
        [
            b'{"model": "chat", "messages": [{"role": "user", "content": "\\u00e9"}], "n": 1.5e3, "cache_salt": "x"}',
            b'\xef\xbb\xbf{"mod\\u0065l":"a","model":"b","x":{"model":[null,true,"}"]}} \r\n',
            '{"model": "chat"}'.encode("utf-16-le"),
        ],
    ),
    "metered": (
        metered,
        [
            b'{"model":"a","stream":"yes","stream_options":{"include_usage":0,"x":[1e400]},"n":"2","prompt":["a",[1]]}',
            b'{"model":"a","max_tokens":1.0,"max_completion_tokens":"9","prompt":[1,2],"m\\u006fdel":"b"} ',
        ],
    ),
    "edit": (
        edit,
        [
            NAMED.encode() + b'\0ci\0{"enabled": false, "expires_at": "2027-01-01T00:00:00Z"}',
            b'keys = { a = { scopes = [] } } # x\n\0a\0{"scopes": ["admin"], "models": null}',
            b'[keys]\nb.scopes = [\n  "read", # y\n]\n\0c\0{"description": "\\n"}',
        ],
    ),
}  # fmt: skip
