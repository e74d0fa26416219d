"""What a secret is, how it is shown, what `***` means when it comes back, and what of it is found in a log."""

import gc
import json
import re
import string
import weakref
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_proxy.domain import secrets
from vllm_proxy.domain.config import ModelTable
from vllm_proxy.domain.file import edit
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.toml import same
from vllm_proxy.errors import ConfigError


@pytest.mark.parametrize(
    "name",
    "token HF_TOKEN hf-token hfToken api_key apiKey APIKEY keys key KEY secret client_secret AWS_SECRET_ACCESS_KEY "
    "password dbPassword PASSWORDS credential credentials hf-overrides.api_key token_ids".split(),
)
def test_what_names_a_secret(name: str) -> None:
    """As words of a key in any spelling, and run together with others."""
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    "tokenizer tokenizer-mode TOKENIZERS_PARALLELISM detokenize keyword keywords keyboard model dtype env".split(),
)
def test_what_only_sounds_like_one(name: str) -> None:
    """Tokenizers and keywords are no secrets, and people need to see them."""
    assert not secrets.is_secret_name(name)


def test_no_key_of_a_model_is_taken_for_a_secret() -> None:
    """What has a key of its own holds none, `env`, `args` and `metadata` aside."""
    assert not [key for key in ModelTable.model_fields if secrets.is_secret_name(key)]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ({"env": {"A": "x", "N": 1, "E": ""}}, {"env": {"A": "***", "N": "***", "E": "***"}}),
        ({"env": {"A": {"file": "f"}}}, {"env": {"A": {"file": "f"}}}),
        ({"env": {"A": {"credential": "n"}}}, {"env": {"A": {"credential": "n"}}}),
        ({"env": {"A": {"file": "f", "x": "y"}}}, {"env": {"A": "***"}}),
        ({"args": {"hf-overrides": {"api_key": "x", "a": 1}}}, {"args": {"hf-overrides": {"api_key": "***", "a": 1}}}),
        ({"args": {"tokenizer": "org/x"}}, {"args": {"tokenizer": "org/x"}}),
        ({"args": {"max_num_batched_tokens": 2048}}, {"args": {"max_num_batched_tokens": 2048}}),
        ({"args": {"max_num_batched_tokens": "8k"}}, {"args": {"max_num_batched_tokens": "8k"}}),
        ({"args": {"return_tokens": True}}, {"args": {"return_tokens": True}}),
        ({"metadata": {"password": "8k"}}, {"metadata": {"password": "***"}}),
        ({"metadata": {"keys": ["a", "b"]}}, {"metadata": {"keys": "***"}}),
        ({"metadata": {"credentials": {"user": "u", "n": 1}}}, {"metadata": {"credentials": "***"}}),
        ({"metadata": {"a": [{"token": "x"}, 1]}}, {"metadata": {"a": [{"token": "***"}, 1]}}),
        ({"metadata": {"env": "prod"}}, {"metadata": {"env": "prod"}}),
        ({"metadata": {"b": {"env": {"X": "y"}}}}, {"metadata": {"b": {"env": {"X": "***"}}}}),
        ({"args": {"url": "https://u:pw@h/p:x@y"}}, {"args": {"url": "https://u:***@h/p:x@y"}}),
        ({"args": {"url": "http://h:80/a@b"}}, {"args": {"url": "http://h:80/a@b"}}),
        ({"command": ["env", "HF_TOKEN=x", "A=b", "--api-key", "v"]},
         {"command": ["env", "HF_TOKEN=***", "A=b", "--api-key", "v"]}),
        ({"model": "org/key", "description": "key=value"}, {"model": "org/key", "description": "key=value"}),
    ],
)  # fmt: skip
def test_how_a_table_is_shown(written: dict[str, Any], shown: dict[str, Any]) -> None:
    """Secrets as `***`, whole; numbers, booleans, references and everything else as they are."""
    assert secrets.shown(written) == shown


NAME = ("models", "chat")
_KEYS = st.sampled_from(["env", "args", "metadata", "a", "b_c", "api_key", "token", "tokens", "credentials", "url"])
_TEXTS = st.one_of(
    st.text(string.ascii_letters + '"\\ü.=:@/ *-', max_size=12),
    st.sampled_from(["***", "https://u:pw@h", "https://u:***@h", "KEY=***", "KEY=x", "8k", "vllm"]),
)
_VALUES = st.recursive(
    st.one_of(_TEXTS, st.booleans(), st.integers(-9, 9), st.sampled_from([0.5, 1.0])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)
_VARIABLES: st.SearchStrategy[Any] = st.one_of(
    _TEXTS, st.integers(0, 9), st.builds(dict, file=st.just("/f")), st.builds(dict, credential=st.just("n"))
)
_TABLES = st.fixed_dictionaries(
    {"model": st.just("x")},
    optional={
        "env": st.dictionaries(st.sampled_from(["A", "B", "HF_TOKEN"]), _VARIABLES, max_size=3),
        "args": st.dictionaries(st.sampled_from(["a_b", "c-d", "auth_token", "x"]), _VALUES, max_size=3),
        "metadata": st.dictionaries(_KEYS, _VALUES, max_size=4),
        "command": st.lists(st.sampled_from(["vllm", "KEY=a", "KEY=b", "TOKEN=***"]), min_size=1, max_size=4),
    },
)


@given(_TABLES)
def test_what_is_shown_and_sent_back_changes_nothing(table: dict[str, Any]) -> None:
    """Through JSON, whatever the values are: `***` itself, two that look alike, lists, tables in lists."""
    sent = msgspec.json.decode(msgspec.json.encode(secrets.shown(table)))
    back, lost = secrets.restored(sent, table)
    assert same(back, table)
    assert not lost


@given(_TABLES)
def test_a_put_of_what_is_shown_leaves_the_file_as_it_is(table: dict[str, Any]) -> None:
    """Byte for byte."""
    text = edit.create("# first\n", NAME, table)
    old = edit.tables_in(text, "models")["chat"]
    back, _ = secrets.restored(edit.spelled_as(old, secrets.shown(old)), old)
    assert edit.put(text, NAME, back) == text


@given(_TABLES, _TABLES)
def test_nothing_that_is_shown_holds_a_secret(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Whatever the values of secrets are, the same is shown."""
    planted = _with_secrets(one, iter(f"planted{number}secret" for number in range(1000)))
    shown = json.dumps(secrets.shown(planted))
    assert "planted" not in shown
    assert "planted" not in secrets.show(planted)
    back, _ = secrets.restored(secrets.shown(planted), other)
    assert "planted" not in json.dumps(back)


def _with_secrets(value: Any, supply: Any, *, hidden: bool = False) -> Any:  # noqa: ANN401 - a TOML value
    """Each text of a table where a secret stands is one."""
    if isinstance(value, dict):
        if hidden and secrets.is_reference(value):
            return value
        return {
            key: _with_secrets(
                item, supply, hidden=hidden or secrets.is_secret_name(key) or (key == "env" and isinstance(item, dict))
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_secrets(item, supply, hidden=hidden) for item in value]
    return next(supply) if hidden and isinstance(value, str) else value


OLD = {
    "model": "x",
    "env": {"A": "a-value", "R": {"file": "f"}},
    "args": {"url": "https://u:pw@h"},
    "metadata": {"keys": ["k", "l"], "hosts": [{"host": "a", "token": "of-a"}, {"host": "b", "token": "of-b"}]},
}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"env": {"A": "***"}}, {"env": {"A": "a-value"}}),
        ({"env": {"A": "new", "B": "b"}}, {"env": {"A": "new", "B": "b"}}),
        ({"env": {"A": None}}, {"env": {"A": None}}),
        ({"env": {"R": "***"}}, {"env": {"R": {"file": "f"}}}),
        ({"env": {"R": {"file": "g"}}}, {"env": {"R": {"file": "g"}}}),
        ({"metadata": {"keys": "***"}}, {"metadata": {"keys": ["k", "l"]}}),
        ({"metadata": {"hosts": [{"host": "b", "token": "***"}]}},
         {"metadata": {"hosts": [{"host": "b", "token": "of-b"}]}}),
        ({"metadata": {"hosts": [{"host": "c", "token": "t"}, {"host": "a", "token": "***"}]}},
         {"metadata": {"hosts": [{"host": "c", "token": "t"}, {"host": "a", "token": "of-a"}]}}),
        ({"args": {"url": "https://u:***@h"}}, {"args": {"url": "https://u:pw@h"}}),
        ({"description": "***"}, {"description": "***"}),
    ],
)  # fmt: skip
def test_what_comes_back_hidden_keeps_its_value(sent: dict[str, Any], kept: dict[str, Any]) -> None:
    """Of a list each item is known by what is shown of it, in any order; text that is no secret is itself."""
    assert secrets.restored(sent, OLD) == (kept, [])


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        ({"env": {"B": "***"}}, ("env", "B")),
        ({"env": {"A": {"file": "***"}}}, ("env", "A", "file")),
        ({"metadata": {"token": "***"}}, ("metadata", "token")),
        ({"metadata": {"keys": ["***", "new"]}}, ("metadata", "keys", "0")),
        ({"metadata": {"hosts": [{"host": "c", "token": "***"}]}}, ("metadata", "hosts", "0", "token")),
        ({"args": {"url": "https://u:***@elsewhere"}}, ("args", "url")),
        ({"command": ["env", "KEY=***"]}, ("command", "1")),
    ],
)
def test_what_stands_for_nothing_is_told_with_its_place(sent: dict[str, Any], path: tuple[str, ...]) -> None:
    """So no secret reaches another variable, another service or another host than its own."""
    assert secrets.restored(sent, OLD)[1] == [path]


PLANTED = "planted-secret-of-mine"


@pytest.mark.parametrize(
    "text",
    [
        f'[models.chat.env]\nT = ["{PLANTED}"]',
        f'[models.chat.env.T]\nx = "{PLANTED}"',
        f'[models.chat.env.T]\nfile = "{PLANTED}"\ncredential = "{PLANTED}"',
        f'[models.chat.env.T]\ncredential = "a/{PLANTED}"',
        f'[models.chat.env]\n"T={PLANTED}" = ""',
        f'[models.chat.env]\n"T {PLANTED}" = ""',
        f'[models.chat]\nenv = "T={PLANTED}"',
        f'[models.chat]\nenv = ["T={PLANTED}"]',
        f'[[models.chat.env]]\nT = "{PLANTED}"',
        f'[[engine]]\n[engine.env]\nT = "{PLANTED}"',
        f'[[defaults]]\nenv.T = "{PLANTED}"',
        f'[engine.env]\nT = ["{PLANTED}"]',
        f'[defaults.env]\nT = ["{PLANTED}"]',
        f'[models.chat]\nreplicas = {{ api_key = "{PLANTED}" }}',
        f'[models.chat]\nidle_timeout = {{ api_key = "{PLANTED}" }}',
        f'[models.chat]\nmax_model_len = [{{ env.T = "{PLANTED}" }}]',
        f'[models.chat.args]\nhf_token = "{PLANTED}"',
        f'[models.chat.args]\napi-key = "{PLANTED}"',
        f'[models.chat.args]\nauth_token = ["-{PLANTED}"]',
        f'[models.chat.args]\nno_auth_token = "{PLANTED}"',
        f'[models.chat.args]\n"--auth-token={PLANTED}" = true',
        f'[models.chat.args]\nx = {{ token = "{PLANTED}\\u0000" }}',
        f'[models.chat]\nmodel = "https://user:{PLANTED}@host/m"',
        f'[models.chat]\nmodel = "https://{PLANTED}@host/m"',
        f'keys = "{PLANTED}"',
        f'[keys]\nci = "{PLANTED}"',
        f'[keys.ci]\nhash = "{PLANTED}"',
        f'[keys.ci]\nhash = ["sha256:{PLANTED}"]',
        f'[keys.ci]\nfile = "credential:{PLANTED}/"',
        f'[keys.ci]\nscopes = "{PLANTED}"',
        f'[keys.ci]\nscopes = ["{PLANTED}"]',
        f'[keys.ci]\nexpires_at = "{PLANTED}"',
        f"[models.chat.env]\nT = {PLANTED}",
        f"[models.chat.env]\nT {PLANTED} = 1",
        f"[models.chat.env]\nT: {PLANTED}",
        f"[models.chat]\nenv = {{ T = {PLANTED} }}",
        f"[models.chat]\napi_key = {PLANTED}",
        f"[models.chat]\nenv.T = {PLANTED}",
        f'[models.chat.env]\nT = "{PLANTED}',
        f'[models.chat.env]\nT = """\n{PLANTED}',
        f"[keys.ci]\nhash = {PLANTED}",
    ],
)
def test_no_problem_repeats_a_secret(text: str) -> None:
    """Of a wrong type, in the wrong place, in a name, in a line that is no TOML."""
    before = "" if "[models.chat]" in text or "model =" in text else '[models.chat]\nmodel = "x"\n'
    text = text.replace("[models.chat]\n", '[models.chat]\nmodel = "x"\n') if "model =" not in text else text
    with pytest.raises(ConfigError) as found:
        parse_config((text + "\n" + before).encode() if text.startswith("keys =") else (before + text).encode(), "f")
    assert found.value.problems
    assert PLANTED not in repr([*found.value.lines(), *found.value.places(), str(found.value)])


@pytest.mark.parametrize(
    "text",
    ['args = "--hf-token hf_mine --x 1"', 'args = ["--hf-token", "hf_mine"]', 'command = "HF_TOKEN=hf_mine vllm serve"',
     "args = \"--auth-token 'of hf_mine'\""],
)  # fmt: skip
def test_a_command_line_in_the_wrong_form_is_not_repeated_where_it_may_hold_a_secret(text: str) -> None:
    """One is known there by the word before it."""
    with pytest.raises(ConfigError) as found:
        parse_config(f'[models.chat]\nmodel = "x"\n{text}'.encode(), "f")
    assert "hf_mine" not in repr([*found.value.lines(), *found.value.places(), str(found.value)])


def test_a_line_that_holds_no_secret_is_told_how_to_write_it() -> None:
    """Of one that may, only its key is repeated."""
    with pytest.raises(ConfigError, match="1 problem") as found:
        parse_config(b"[models.chat.env]\nHF_HOME = /srv/hf\n", "f")
    assert found.value.lines() == ['f:2: this is no TOML: Invalid value; text needs quotes: write HF_HOME = "..."']


def test_a_variable_of_a_model_is_not_merged_with_that_of_the_defaults() -> None:
    """Where one names a file and the other a credential, the model's own counts."""
    defaults = '[defaults.env]\nA = { file = "f" }\nB = { file = "g" }\n'
    text = defaults + '[models.x]\nmodel = "x"\nenv.A = { credential = "c" }\n'
    engine = parse_config(text.encode(), "f").models["x"].engine
    assert engine.env == {"A": {"credential": "c"}, "B": {"file": "g"}}
    assert engine.references == {"A": "credential:c", "B": "g"}
    assert engine.variables == {}


_SECRETS = st.lists(st.text(string.ascii_letters + '"\\ü/ -', min_size=8, max_size=20), min_size=1, max_size=30)


@given(_SECRETS, st.text(string.ascii_letters + " \n"))
def test_every_secret_is_found_in_a_text(values: list[str], around: str) -> None:
    """However many there are and however alike: as it is, in JSON and in Python's spelling."""
    values = [value.strip() for value in values if len(value.strip()) >= secrets.SHORTEST]
    pattern = secrets.pattern(values)
    for value in values:
        assert pattern is not None
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1]):
            assert pattern.fullmatch(form)
            assert form not in pattern.sub(secrets.HIDDEN, f"{around} {form} {around}")


def test_thousands_of_secrets_are_one_pattern() -> None:
    """Beginnings in common are shared, and of two of which one begins as the other, the longer one is found."""
    values = [f"{'hf_' if number % 2 else ''}{number:08}" for number in range(5000)] + [
        "hf_00000001-and-more",
        "a" * 200,
    ]
    pattern = secrets.pattern(values)
    assert pattern is not None
    assert pattern.sub("", "".join(values)) == ""


def test_what_is_a_secret_no_more_is_kept_nowhere() -> None:
    """The standard library's cache of patterns would keep those of the last 512 configurations."""
    made = secrets.pattern(["hf_nobody-may-keep-this"])
    assert made is not None
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is None


def test_short_values_are_left_in_texts() -> None:
    """Else every "1" and "INFO" would be gone from the log."""
    assert secrets.pattern(["1", "INFO", "1234567"]) is None


def test_of_a_value_of_several_lines_each_is_looked_for() -> None:
    """As a service account in JSON has: a log shows one line at a time."""
    pattern = secrets.pattern(['{\n  "private": "abcdefgh",\n  "n": 1\n}\n'])
    assert pattern is not None
    assert pattern.sub("***", '  "private": "abcdefgh",') == "  ***"


def test_which_values_of_a_model_are_secrets_in_texts() -> None:
    """Those that JSON does not show; of a command's word the value too."""
    model = {
        "env": {"A": "of-env", "R": {"file": "f"}, "N": 1},
        "args": {
            "auth-token": "of-args",
            "x": {"api_key": "deep"},
            "u": "http://u:pw@h",
            "tokenizer": "no",
            "tokens": 5,
        },
        "metadata": {"keys": ["k1", {"a": "k2"}]},
        "command": ["env", "HF_TOKEN=word"],
        "description": "no",
    }
    found = set(secrets.values_of(model))
    assert found == {"of-env", "1", "of-args", "deep", "pw", "k1", "k2", "HF_TOKEN=word", "word"}


def test_the_rule_is_the_one_of_the_specification() -> None:
    """What it names is hidden, all that only contains `tokeniz` or `keyword` aside."""
    rule = re.compile("token|key|secret|password|credential", re.IGNORECASE)
    for word in "tokenizer keyword keyboard tokenizer_key api_token_v2 my.secret.thing".split():
        assert secrets.is_secret_name(word) <= bool(rule.search(word))


def test_the_id_of_an_adapter_hides_nothing() -> None:
    """It may well have "key" in it; below it, and in other tables of that name, it is as everywhere."""
    table = {"adapters": {"monkey": {"path": "a/b", "api_key": "x"}}, "args": {"adapters": {"token": "x"}}}
    assert secrets.shown(table) == {
        "adapters": {"monkey": {"path": "a/b", "api_key": "***"}}, "args": {"adapters": {"token": "***"}},
    }  # fmt: skip
    assert secrets.restored(secrets.shown(table), table) == (table, [])
    assert not secrets.hides(("models", "chat", "adapters", "monkey", "path"))
    assert secrets.hides(("models", "chat", "adapters", "monkey", "api_key"))
