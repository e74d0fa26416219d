"""What changes outside of models is told by a plan, whichever key it is: nothing of the file is changed in silence."""

import json
from pathlib import Path

import pytest

import vllm_proxy
from vllm_proxy.domain.config import Config
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import changes, hash_of
from vllm_proxy.domain.plan import plan, restart_needed, settings
from vllm_proxy.domain.references import NoFiles

type Tables = dict[str, dict[str, str]]

SCHEMA = json.loads((Path(vllm_proxy.__file__).parent / "models.schema.json").read_text())
MODEL = "models.guard"
BEFORE: Tables = {
    "server": {"tls_cert": '"a.pem"', "tls_key": '"a.pem"'},
    "moderation": {"model": '"guard"', "kind": '"classifier"', "classes": '["hate", "safe"]'},
    MODEL: {"model": '"m"', "args": '{ runner = "pooling" }'},
    "models.other": {"model": '"m"', "args": '{ runner = "pooling" }'},
    "keys.ci": {"hash": f'"{hash_of("a" * 32)}"', "scopes": '["inference"]'},
}
ANOTHER: Tables = {  # of each key outside models, a value that it does not have there
    "server": {
        "host": '"0.0.0.0"', "port": "9", "listen": '["127.0.0.1:9"]', "tls_cert": '"b.pem"', "tls_key": '"b.pem"',
        "keys_file": '"keys.toml"', "cors_origins": '["https://a.example"]', "allowed_hosts": '["a.example"]',
        "allow_remote_admin": "true", "max_body_size": '"1GiB"', "max_buffered": '"2GiB"', "max_connections": "9",
        "head_timeout": "9", "body_timeout": "9", "shutdown_timeout": "9", "usage": "true", "fair": "true",
        "on_exit": '"keep"',
    },
    "engine": {"command": '["x"]', "port_start": "8002", "port_end": "8898", "env": '{ A = "b" }'},
    "devices": {
        "source": '"none"', "reserve": '"1GiB"', "max_wait": "9", "min_residency": "9", "limit": '{ 0 = "1GiB" }',
        "host_memory": '"60%"',
    },
    "moderation": {
        "model": '"other"', "kind": '"json"', "threshold": "0.9", "classes": '["safe", "hate"]',
        "categories": '{ hate = ["harassment"] }',
    },
    "keys.ci": {
        "hash": f'"{hash_of("b" * 32)}"', "file": '"key"', "scopes": '["read"]', "models": '["a"]', "enabled": "false",
        "expires_at": "2090-01-01T00:00:00Z", "isolate_cache": "true", "description": '"d"', "priority": "9",
        "weight": "9", "requests_per_minute": "9", "tokens_per_minute": "9", "tokens_per_day": "9",
        "tokens_per_month": "9", "max_in_flight": "9", "max_output_tokens": "9",
        "limits": '{ "*" = { requests_per_minute = 9 } }',
    },
}  # fmt: skip
NOT_BESIDE = {"listen": ("host", "port"), "file": ("hash",), "kind": ("classes",)}  # what may not stand beside


class Named(NoFiles):
    """The file of keys is empty, and every other one holds a key."""

    def read(self, text: str) -> bytes:
        """Its bytes."""
        return b"" if text == "keys.toml" else b"c" * 40


def adopted(tables: Tables) -> Config:
    """What a file means."""
    lines = [line for name, keys in tables.items() for line in (f"[{name}]", *(f"{k} = {v}" for k, v in keys.items()))]
    return parse_config("\n".join(lines).encode(), "models.toml", files=Named())


def properties(table: str) -> set[str]:
    """The keys that the schema has of a table."""
    return set((SCHEMA["$defs"]["Key"] if table == "keys.ci" else SCHEMA["properties"][table])["properties"])


def test_a_value_is_known_for_each_key_of_the_schema() -> None:
    """A key that is new is asked for here; those of models and `[defaults]` are tested with the plan's actions."""
    tables = {"keys.ci" if name == "keys" else name for name in SCHEMA["properties"]} - {"models", "defaults"}
    assert {name: set(keys) for name, keys in ANOTHER.items()} == {name: properties(name) for name in tables}


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, keys in ANOTHER.items() for key in keys])
def test_no_key_changes_in_silence(table: str, key: str) -> None:
    """It is a setting that is told, or waits for a restart, or changes a key; and back again."""
    others = {k: v for k, v in BEFORE.get(table, {}).items() if k not in NOT_BESIDE.get(key, ())}
    before, after = adopted(BEFORE), adopted({**BEFORE, table: {**others, key: ANOTHER[table][key]}})
    for old, new in ((before, after), (after, before)):
        waiting = restart_needed(old.server, new.server)
        told = [*waiting, *settings(old, new, waiting)]
        if table == "keys.ci":
            assert changes(old.keys, new.keys)["changed"] == ["ci"]
            assert told == []
        else:
            assert {one.split(" ")[0].startswith(f"{table}.{key}") for one in told} == {True}, told


def test_what_no_table_says_any_more_is_told() -> None:
    """Another file altogether, without a key: each table that is gone; and what it means that no key is left."""
    before, after = adopted(BEFORE), adopted({MODEL: BEFORE[MODEL]})
    told = settings(before, after)
    assert [one.split(" ")[0] for one in told] == [
        "server.tls_cert", "server.tls_key", "moderation.model", "moderation.kind", "moderation.threshold",
    ]  # fmt: skip
    assert changes(before.keys, after.keys)["removed"] == ["ci"]
    (warning,) = after.warnings(since=before)
    assert warning.startswith("no key is left: on loopback whoever can connect may use the models")
    assert before.warnings(since=after) == []
    assert settings(before, before) == []


def test_settings_are_told_as_people_write_them_and_secrets_are_not() -> None:
    """Durations and sizes with their units, one entry of a table alone; a variable's value stays hidden."""
    after = {
        **BEFORE,
        "server": BEFORE["server"] | {"max_body_size": '"1GiB"', "shutdown_timeout": '"1m"', "cors_origins": '["*"]'},
        "devices": {"limit": '{ 0 = "1GiB" }'},
        "engine": {"env": '{ HF_TOKEN = "hf_planted" }'},
    }
    assert settings(adopted(BEFORE), adopted(after)) == [
        'server.cors_origins [] -> ["*"]',
        "server.max_body_size 64MiB -> 1GiB",
        "server.shutdown_timeout 30s -> 1m",
        "engine.env.HF_TOKEN changed",
        "devices.limit.0 not given -> 1GiB",
    ]


def test_a_default_that_a_model_takes_is_an_action_of_that_model() -> None:
    """So nothing of `[defaults]` has to be told beside."""
    before, after = adopted(BEFORE), adopted({"defaults": {"queue_size": "9"}, **BEFORE})
    assert [one.reason for one in plan(after.models, before.models)] == ["queue_size 512 -> 9"] * 2
    assert settings(before, after) == []
