"""Keys are made, rotated, changed and revoked over REST and by command, with a daemon and without one."""

import asyncio
import json
import os
import re
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_disk import fill, mounted
from tests.forks import Run, Stdout
from tests.forks import shared as shared_forks
from tests.harness import Daemon, clean_environment, daemon, fake_engines, port_block, until, vllm_proxy
from vllm_proxy.domain.keys import hash_of, is_mistyped

OWN = "k" * 32  # a key that somebody brings along
SERVER = '[server]\nkeys_file = "keys.toml"\n'
HERE = f"""\
# Of the house.
[keys.old]  # since May
hash = "{hash_of(OWN)}"  # Ada's
scopes = ["read", "metrics"]
"""
THERE = "# Not in git.\n"


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with a file for keys, a key in its own file, and one of the environment."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys.toml").write_text(THERE)
    config = SERVER + fake_engines(port_block()) + HERE
    async with daemon(config, folder, env={"VLLM_PROXY_API_KEY": "e" * 40}) as running:
        yield running


def there(running: Daemon) -> str:
    """The text of the file for keys."""
    return (running.folder / "keys.toml").read_text()


def table(running: Daemon, name: str) -> Any:  # noqa: ANN401 - TOML
    """A key as it stands in that file."""
    return tomllib.loads(there(running))["keys"][name]


async def test_a_key_that_is_made_is_told_once_and_kept_as_a_hash(shared: Daemon) -> None:
    """In the file for keys, below what stands there; the other file stays as it is."""
    before = shared.file.read_text()
    body = {"name": "ci", "models": ["chat"], "expires_at": "2099-01-01T00:00:00+02:00", "description": "builds"}
    made = await shared.write("POST", "/keys", body, 201)
    key = made.pop("key")
    assert not is_mistyped(key)
    assert key.startswith("vp-")
    digest = hash_of(key).removeprefix("sha256:")
    assert made == {
        "name": "ci", "id": digest[:8], "hashes": 1, "source": "keys_file", "file": None, "description": "builds",
        "scopes": ["inference"], "models": ["chat"], "enabled": True, "expires_at": "2098-12-31T22:00:00Z",
        "isolate_cache": False, "requests_per_minute": 0, "tokens_per_minute": 0, "tokens_per_day": 0,
        "tokens_per_month": 0, "max_in_flight": 0, "max_output_tokens": 0, "priority": 0, "weight": 1.0, "limits": {},
    }  # fmt: skip
    assert f'[keys.ci]\nhash = "{hash_of(key)}"\nmodels = ["chat"]\nexpires_at = 2099-01-01T00:00:00+02:00\n' in there(
        shared
    )
    assert there(shared).startswith(THERE)
    assert shared.file.read_text() == before
    assert await shared.write("GET", "/keys/ci") == made
    listed = await shared.write("GET", "/keys")
    assert made in listed["keys"]
    for shown in (str(listed), shared.log()):
        assert key not in shown
        assert digest not in shown


async def test_a_key_is_changed_where_it_stands(shared: Daemon) -> None:
    """Comments stay; null takes away; what others include is not shown apart."""
    shown = await shared.write("GET", "/keys/old")
    assert (shown["source"], shown["scopes"], shown["id"]) == ("file", ["read"], hash_of(OWN)[7:15])
    shown = await shared.write("PATCH", "/keys/old", {"enabled": False, "scopes": ["admin", "read"]})
    assert (shown["enabled"], shown["scopes"]) == (False, ["admin"])
    assert HERE.replace('["read", "metrics"]\n', '["admin", "read"]\nenabled = false\n') in shared.file.read_text()
    await shared.write("PATCH", "/keys/old", {"enabled": None, "scopes": ["read", "metrics"]})
    assert HERE in shared.file.read_text()


async def test_limits_are_changed_alone_and_taken_away(shared: Daemon) -> None:
    """Those of some models are tables of their own in the file; a patch leaves the others as they are."""
    made = await shared.write("POST", "/keys", {"name": "much", "tokens_per_minute": 20000, "weight": 2}, 201)
    assert (made["tokens_per_minute"], made["weight"], made["limits"]) == (20000, 2.0, {})
    await shared.write("PATCH", "/keys/much", {"limits": {"chat": {"requests_per_minute": 5}, "c*": {}}})
    shown = await shared.write("PATCH", "/keys/much", {"limits": {"chat": {"tokens_per_minute": 7}, "c*": None}})
    assert shown["limits"] == {"chat": {"requests_per_minute": 5, "tokens_per_minute": 7}}
    assert shown["tokens_per_minute"] == 20000
    assert table(shared, "much")["limits"] == {"chat": {"requests_per_minute": 5, "tokens_per_minute": 7}}
    shown = await shared.write("PATCH", "/keys/much", {"limits": None, "weight": None})
    assert (shown["limits"], shown["weight"]) == ({}, 1.0)
    assert "limits" not in table(shared, "much")
    await shared.write("DELETE", "/keys/much", status=204)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens_per_minute": -1},
        {"weight": 0},
        {"priority": 1.5},
        {"limits": {"chat": 5}},
        {"limits": {"chat": {"tokens_per_day": 5}}},
        {"requests_per_minute": 10**15 + 1},
    ],
)
async def test_limits_that_mean_nothing_are_refused(shared: Daemon, wrong: dict[str, Any]) -> None:
    """422, and nothing is written."""
    before = there(shared)
    assert (await shared.write("POST", "/keys", {"name": "no", **wrong}, 422))["error"]["code"] == "invalid_key"
    assert there(shared) == before


async def test_a_rotation_makes_a_second_key_and_its_end_leaves_that_alone(shared: Daemon) -> None:
    """The first is good until then; the newest hash is the last, and makes the id."""
    first = await shared.write("POST", "/keys", {"name": "turned"}, 201)
    second = await shared.write("POST", "/keys/turned/rotate")
    assert (second["hashes"], second["id"]) == (2, hash_of(second["key"])[7:15])
    assert table(shared, "turned")["hash"] == [hash_of(first["key"]), hash_of(second["key"])]
    done = await shared.write("POST", "/keys/turned/rotate", {"finish": True})
    assert (done["hashes"], done["id"], done["key"]) == (1, second["id"], None)
    assert table(shared, "turned")["hash"] == hash_of(second["key"])


async def test_a_key_of_ones_own_is_not_told(shared: Daemon) -> None:
    """Its hash is brought along, or the file that holds it; `anonymous` has none."""
    own = "o" * 40
    made = await shared.write("POST", "/keys", {"name": "own", "hash": hash_of(own)}, 201)
    assert (made["key"], made["id"]) == (None, hash_of(own)[7:15])
    (shared.folder / "own.key").write_text("f" * 40 + "\n")
    made = await shared.write("POST", "/keys", {"name": "sops", "file": "own.key"}, 201)
    assert (made["key"], made["id"], made["file"]) == (None, hash_of("f" * 40)[7:15], "own.key")
    made = await shared.write("POST", "/keys", {"name": "anonymous", "scopes": []}, 201)
    assert (made["key"], made["id"], made["hashes"]) == (None, None, 0)
    for name in ("own", "sops", "anonymous"):
        await shared.write("DELETE", f"/keys/{name}", status=204)
        assert (await shared.write("GET", f"/keys/{name}", status=404))["error"]["code"] == "key_not_found"


async def test_what_cannot_be_done_is_refused_with_its_code(shared: Daemon) -> None:
    """With the way out, and without a word of what stands in a key."""
    (shared.folder / "ref.key").write_text("r" * 40 + "\n")
    await shared.write("POST", "/keys", {"name": "ref", "file": "ref.key"}, 201)
    await shared.write("POST", "/keys", {"name": "full"}, 201)
    for _ in range(3):
        await shared.write("POST", "/keys/full/rotate")
    text, other = there(shared), shared.file.read_text()
    refused: list[tuple[str, str, Any, int, str, str]] = [
        ("POST", "/keys", {"name": "old"}, 409, "key_exists", "there is one"),
        ("POST", "/keys/env/rotate", None, 409, "key_conflict", "VLLM_PROXY_API_KEY gives it"),
        ("PATCH", "/keys/env", {"enabled": False}, 409, "key_conflict", "restart the daemon"),
        ("DELETE", "/keys/env", None, 409, "key_conflict", "VLLM_PROXY_API_KEY gives it"),
        ("POST", "/keys/ref/rotate", None, 409, "key_conflict", "put another key into that file"),
        ("POST", "/keys/full/rotate", None, 409, "key_conflict", "--finish"),
        ("GET", "/keys/nobody", None, 404, "key_not_found", "GET /keys lists them"),
        ("PATCH", "/keys/nobody", {}, 404, "key_not_found", "cannot find key"),
        ("DELETE", "/keys/nobody", None, 404, "key_not_found", "cannot find key"),
        ("POST", "/keys", {}, 422, "invalid_key", 'needs a "name"'),
        ("POST", "/keys", {"name": "env"}, 422, "invalid_key", "kept for the key"),
        ("POST", "/keys", {"name": "A b"}, 422, "invalid_key", "lower-case"),
        ("POST", "/keys", {"name": "x", "hash": "planted"}, 422, "invalid_key", "keys.x.hash"),
        ("POST", "/keys", {"name": "x", "file": "no.key"}, 422, "invalid_key", "keys.x.file"),
        ("POST", "/keys", {"name": "x", "scopes": ["planted"]}, 422, "invalid_key", "keys.x.scopes"),
        ("POST", "/keys", {"name": "x", "expires_at": "planted"}, 422, "invalid_key", "keys.x.expires_at"),
        ("POST", "/keys", {"name": "x", "expires_at": 5}, 422, "invalid_key", "keys.x.expires_at"),
        ("POST", "/keys", {"name": "x", "scope": "planted"}, 422, "invalid_key", "did you mean scopes?"),
        ("PATCH", "/keys/old", {"name": "new"}, 422, "invalid_key", "a name cannot be changed"),
        ("PATCH", "/keys/old", {"hash": None}, 422, "invalid_key", "keys.old"),
        ("POST", "/keys/old/rotate", {"finish": 1}, 422, "invalid_key", "true or false"),
        ("POST", "/keys/old/rotate", {"end": True}, 422, "invalid_key", "there is finish alone"),
        ("POST", "/keys/old/rotate", [], 400, "invalid_json", "JSON object"),
    ]  # fmt: skip
    for method, path, body, status, code, words in refused:
        error = (await shared.write(method, path, body, status))["error"]
        assert (error["code"], words in error["message"]) == (code, True), error
        assert "planted" not in str(error)
    assert (there(shared), shared.file.read_text()) == (text, other)


async def status_of(running: Daemon, key: str, path: str = "/models") -> int:
    """What the port answers to who has this key."""
    async with running.session.get(path, headers={"Authorization": f"Bearer {key}"}) as answer:
        await answer.read()
        return answer.status


async def test_a_change_is_in_force_when_it_is_answered(shared: Daemon) -> None:
    """Made, rotated, finished, narrowed, disabled, deleted: the next request at the port meets it."""
    first = (await shared.write("POST", "/keys", {"name": "live", "scopes": ["read"]}, 201))["key"]
    assert await status_of(shared, first) == 200
    second = (await shared.write("POST", "/keys/live/rotate"))["key"]
    assert [await status_of(shared, key) for key in (first, second)] == [200, 200]
    await shared.write("POST", "/keys/live/rotate", {"finish": True})
    assert [await status_of(shared, key) for key in (first, second)] == [401, 200]
    await shared.write("PATCH", "/keys/live", {"scopes": ["inference"]})
    assert await status_of(shared, second) == 403
    await shared.write("PATCH", "/keys/live", {"scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"})
    assert await status_of(shared, second) == 401
    await shared.write("PATCH", "/keys/live", {"expires_at": None})
    assert await status_of(shared, second) == 200
    await shared.write("PATCH", "/keys/live", {"enabled": False})
    assert await status_of(shared, second) == 401
    await shared.write("PATCH", "/keys/live", {"enabled": True})
    assert await status_of(shared, second) == 200
    await shared.write("DELETE", "/keys/live", status=204)
    assert await status_of(shared, second) == 401


async def test_keys_are_for_administrators_alone(shared: Daemon) -> None:
    """At the port: whoever may do less is refused, and nothing has changed; an administrator may."""
    made = {
        scope: (await shared.write("POST", "/keys", {"name": f"as-{scope}", "scopes": [scope]}, 201))["key"]
        for scope in ("inference", "metrics", "read", "operate", "admin")
    }
    before = there(shared), shared.file.read_text()
    routes = [
        ("GET", "/keys"), ("POST", "/keys"), ("GET", "/keys/ci"), ("PATCH", "/keys/ci"), ("DELETE", "/keys/ci"),
        ("POST", "/keys/ci/rotate"),
    ]  # fmt: skip
    for scope, key in [*made.items(), ("none", "")]:
        for method, path in routes if scope != "admin" else routes[:1]:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with shared.session.request(method, path, headers=headers) as answer:
                assert answer.status == {"admin": 200, "none": 401}.get(scope, 403), (scope, method, path)
    assert (there(shared), shared.file.read_text()) == before


async def test_who_changed_a_key_is_logged_with_the_revision_of_both_files(shared: Daemon) -> None:
    """And what: never the key."""
    old = (await shared.write("GET", "/keys"))["revision"]
    key = (await shared.write("POST", "/keys", {"name": "logged"}, 201))["key"]
    new = (await shared.write("GET", "/keys"))["revision"]
    await shared.logged(f"before={old}")
    (line,) = (line for line in shared.log().splitlines() if f"before={old}" in line)
    for words in ("POST /keys", f"uid {os.geteuid()}", f"after={new}"):
        assert words in line
    assert key not in shared.log()


async def revision(running: Daemon) -> str:
    """Of both files, as an ETag."""
    return '"' + str((await running.write("GET", "/keys"))["revision"]) + '"'


async def test_a_write_that_insists_on_a_revision_is_refused_after_a_change_of_either_file(shared: Daemon) -> None:
    """By REST or by hand; the revision of an answer is good for the next write."""
    old = await revision(shared)
    await shared.write("PATCH", "/keys/old", {"description": "one"}, if_match=old)
    assert await revision(shared) != old
    error = (await shared.write("PATCH", "/keys/old", {"description": "two"}, 412, if_match=old))["error"]
    assert error["code"] == "revision_mismatch"
    for file in (shared.file, shared.folder / "keys.toml"):
        old = await revision(shared)
        file.write_text(file.read_text() + "# by hand\n")
        assert (await shared.write("POST", "/keys", {"name": "late"}, 412, if_match=old))["error"]["code"] == (
            "revision_mismatch"
        )
        made = await shared.write("POST", "/keys", {"name": "late"}, 201)
        assert made["source"] == "keys_file"
        assert "# by hand\n" in file.read_text()
        await shared.write("DELETE", "/keys/late", status=204, if_match=await revision(shared))


async def test_a_key_that_somebody_writes_by_hand_is_there_too(shared: Daemon) -> None:
    """Whichever file it stands in, and a later write sees it at once."""
    file = shared.folder / "keys.toml"
    file.write_text(there(shared) + f'\n[keys.hand]\nhash = "{hash_of("h" * 40)}"  # by hand\n')
    shown = await shared.write("PATCH", "/keys/hand", {"enabled": False})
    assert shown["id"] == hash_of("h" * 40)[7:15]
    assert '"  # by hand\nenabled = false\n' in there(shared)


async def test_many_writers_at_once_lose_nothing(shared: Daemon) -> None:
    """Of keys and of models; one after another."""
    names = [f"n{number}" for number in range(12)]
    models = [shared.write("POST", "/models", {"id": name, "model": "x", "enabled": False}, 201) for name in names[:4]]
    made = await asyncio.gather(*(shared.write("POST", "/keys", {"name": name}, 201) for name in names), *models)
    assert len({one["key"] for one in made[:12]}) == 12
    assert set(names) <= set(tomllib.loads(there(shared))["keys"])
    assert set(names[:4]) <= set(tomllib.loads(shared.file.read_text())["models"])


async def test_a_file_that_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path, port_start: int) -> None:
    """Read-only, 409; while keys in the other file can be changed."""
    (tmp_path / "keys.toml").write_text(THERE)
    async with daemon(SERVER + fake_engines(port_start) + HERE, tmp_path) as running:
        running.file.chmod(0o444)
        error = (await running.write("PATCH", "/keys/old", {"enabled": False}, 409))["error"]
        assert (error["code"], str(running.file) in error["message"]) == ("config_read_only", True)
        assert (await running.write("GET", "/keys/old"))["enabled"] is True
        await running.write("POST", "/keys", {"name": "ci"}, 201)
        (tmp_path / "keys.toml").chmod(0o444)
        error = (await running.write("POST", "/keys/ci/rotate", status=409))["error"]
        assert (error["code"], str(tmp_path / "keys.toml") in error["message"]) == ("config_read_only", True)
        assert (await running.write("GET", "/keys/ci"))["hashes"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_full_disk_is_507_and_no_key_is_told(tmp_path: Path, port_start: int) -> None:
    """Nothing has changed; when there is room again the same request succeeds."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", at=disk):
        (disk / "keys.toml").write_text(THERE)
        config = SERVER.replace("keys.toml", "disk/keys.toml") + fake_engines(port_start)
        async with daemon(config, tmp_path) as running:
            fill(disk)
            error = (await running.write("POST", "/keys", {"name": "ci"}, 507))["error"]
            assert (error["code"], "vp-" in str(error)) == ("config_not_written", False)
            assert (disk / "keys.toml").read_text() == THERE
            assert (await running.write("GET", "/keys"))["keys"] == []
            (disk / "ballast").unlink()
            await running.write("POST", "/keys", {"name": "ci"}, 201)
            assert await running.stop() == 0


async def test_a_file_that_stays_empty_is_refused_and_a_comment_is_not(tmp_path: Path, port_start: int) -> None:
    """A save that fails on a full disk leaves an empty one: nobody's key goes with it, and loopback is not opened."""
    config = SERVER + fake_engines(port_start)
    (tmp_path / "keys.toml").write_text(THERE)
    async with daemon(config, tmp_path) as running:
        made = await running.write("POST", "/keys", {"name": "ci", "scopes": ["read"]}, 201)
        (tmp_path / "keys.toml").write_text("")
        health = await running.eventually("/health", lambda found: found["config"]["error"] is not None)
        assert "keys.toml: it is empty, as a save that failed leaves it" in health["config"]["error"]
        headers = {"Authorization": f"Bearer {made['key']}"}
        async with running.session.get("/models", headers=headers) as answer:
            assert answer.status == 200
        (tmp_path / "keys.toml").write_text("# none\n")
        await until(lambda: running.write("GET", "/keys"), lambda found: not found["keys"])
        await running.eventually("/health", lambda found: found["config"]["error"] is None)


async def test_a_file_that_is_missing_is_made_by_the_first_key(tmp_path: Path, port_start: int) -> None:
    """The daemon refuses a configuration that names it, until it is there."""
    async with daemon(fake_engines(port_start), tmp_path) as running:
        running.file.write_text(SERVER + running.file.read_text())
        error = (await running.write("POST", "/config/reload", status=422))["error"]
        assert error["problems"][0]["path"] == "server.keys_file"
        made = await running.write("POST", "/keys", {"name": "ci"}, 201)
        assert made["source"] == "keys_file"
        assert (await running.write("GET", "/health"))["config"]["error"] is None
        assert (await running.write("POST", "/config/reload"))["changes"] == []


# By command


@pytest.mark.parametrize("by", ["file", "rest", "command", "rotation"])
async def test_a_revocation_ends_the_streams_of_its_key_and_no_others(tmp_path: Path, port_start: int, by: str) -> None:
    """However it comes: an error as the last event, no end of a good answer; another key's stream goes on."""
    config = SERVER + fake_engines(port_start) + '[models.chat]\nmodel = "org/chat"\n'
    (tmp_path / "keys.toml").write_text(THERE)
    gate = tmp_path / "go"
    body = {"model": "chat", "messages": [], "stream": True, "fake": {"chunks": 4, "hold_at": 2, "hold": str(gate)}}
    async with daemon(config, tmp_path) as running:
        await running.all_ready()
        keys = [(await running.write("POST", "/keys", {"name": name}, 201))["key"] for name in ("ci", "other")]
        if by == "rotation":
            await running.write("POST", "/keys/ci/rotate")
        revoked, other = [
            await running.session.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            for key in keys
        ]
        for stream in (revoked, other):
            await stream.content.readuntil(b"\n\n")
        if by == "file":
            (tmp_path / "keys.toml").write_text(there(running).replace("[keys.ci]", "[keys.ci]\nenabled = false"))
        elif by == "rest":
            await running.write("PATCH", "/keys/ci", {"enabled": False})
        elif by == "command":
            assert (await vllm_proxy(tmp_path, "keys", "revoke", "ci"))[0] == 0
        else:
            await running.write("POST", "/keys/ci/rotate", {"finish": True})
        end = (await revoked.read()).decode()
        assert '"code":"invalid_api_key"' in end.replace(" ", "")
        assert "[DONE]" not in end
        gate.touch()
        assert (await other.read()).endswith(b"data: [DONE]\n\n")


async def with_stdin(folder: Path, text: str, *arguments: str) -> tuple[int, str, str]:
    """A command that reads something."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_proxy", *arguments, "--state-dir", str(folder / "state"),
        cwd=folder, env=clean_environment(), stdin=-1, stdout=-1, stderr=-1,
    )  # fmt: skip
    out, err = await process.communicate(text.encode())
    return process.returncode or 0, out.decode(), err.decode()


def written(folder: Path, name: str) -> str:
    """What stands in a file, its hashes and times aside."""
    return re.sub(r"expires_at = \S+", "expires_at = TIME", re.sub("[0-9a-f]{64}", "HASH", (folder / name).read_text()))


async def life(folder: Path, *, where: str) -> list[str]:
    """A key's life by command; returns what the file for keys says after each step."""
    file, found = "keys.toml", list[str]()
    options = ("--scope", "read", "--scope", "inference", "--models", "chat", "--models", "org/*", "--expires", "90d")
    limits = ("--rpm", "60", "--tpm", "20000")
    status, out, err = await vllm_proxy(folder, "keys", "new", "ci", *options, *limits)
    key = out.removesuffix("\n")
    assert (status, is_mistyped(key), key.startswith("vp-")) == (0, False, True)
    assert (key in err, where in err, hash_of(key)[7:15] in err) == (False, True, True)
    assert hash_of(key) in (folder / file).read_text()
    found.append(written(folder, file))
    status, out, err = await with_stdin(folder, OWN + "\n", "keys", "add", "own", "--stdin")
    assert (status, where in out, OWN in out + err, hash_of(OWN) in (folder / file).read_text()) == (
        0,
        True,
        False,
        True,
    )
    found.append(written(folder, file))
    status, out, err = await vllm_proxy(folder, "keys", "rotate", "own")
    newest = out.removesuffix("\n")
    assert (status, newest in err, where in err, "--finish" in err) == (0, False, True, True)
    assert tomllib.loads((folder / file).read_text())["keys"]["own"]["hash"] == [hash_of(OWN), hash_of(newest)]
    status, out, _ = await vllm_proxy(folder, "keys", "list")
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert (status, rows[0]) == (0, ["name", "id", "scopes", "models", "limits", "state"])
    shown = ["ci", hash_of(key)[7:15], "inference,read", "chat,org/*", "60 requests/min, 20000 tokens/min"]
    assert rows[1][:5] == shown
    assert rows[2] == ["own", hash_of(newest)[7:15], "inference", "*", "-", "good, 2 keys: being rotated"]
    status, out, _ = await vllm_proxy(folder, "keys", "rotate", "own", "--finish", "--json")
    own = json.loads(out)
    assert (status, own["hashes"], own["id"], own["key"]) == (0, 1, hash_of(newest)[7:15], None)
    assert tomllib.loads((folder / file).read_text())["keys"]["own"]["hash"] == hash_of(newest)
    status, out, _ = await vllm_proxy(folder, "keys", "revoke", "ci")
    assert (status, "revoked" in out, where in out) == (0, True, True)
    found.append(written(folder, file))
    status, out, _ = await vllm_proxy(folder, "keys", "list", "--json")
    assert [(one["name"], one["enabled"]) for one in json.loads(out)["keys"]] == [("ci", False), ("own", True)]
    return found


async def test_the_commands_write_the_same_with_a_daemon_and_without_one(tmp_path: Path, port_start: int) -> None:
    """A key goes to stdout, once and alone; what is said about it goes to stderr."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.toml").write_text(THERE)
    config = SERVER + fake_engines(port_start)
    async with daemon(config, tmp_path / "with"):
        by_daemon = await life(tmp_path / "with", where="in force")
    (tmp_path / "without" / "models.toml").write_text(config)
    by_hand = await life(tmp_path / "without", where="no daemon answers here")
    assert by_daemon == by_hand
    async with daemon(config, tmp_path / "without") as running:
        shown = (await running.write("GET", "/keys"))["keys"]
        assert [(one["name"], one["enabled"]) for one in shown] == [("ci", False), ("own", True)]


async def test_without_a_file_for_keys_they_stand_in_the_configuration(tmp_path: Path, port_start: int) -> None:
    """Below the models, with every comment kept; also where no daemon runs."""
    (tmp_path / "models.toml").write_text(fake_engines(port_start) + HERE)
    status, out, err = await vllm_proxy(tmp_path, "keys", "new", "me", "--scope", "admin")
    assert (status, str(tmp_path / "models.toml") in err) == (0, True)
    text = (tmp_path / "models.toml").read_text()
    assert text.endswith(f'{HERE}\n[keys.me]\nhash = "{hash_of(out.strip())}"\nscopes = ["admin"]\n')
    async with daemon(text, tmp_path) as running:
        status, out, _ = await vllm_proxy(tmp_path, "keys", "new", "ci", "--json")
        made = json.loads(out)
        assert (status, made["source"], is_mistyped(made["key"])) == (0, "file", False)
        assert running.file.read_text().startswith(text)


async def test_a_command_that_cannot_do_it_says_why(tmp_path: Path, port_start: int) -> None:
    """1 where something is in the way, 2 for a wrong command line, 78 where a file is invalid; nothing is made."""
    config = fake_engines(port_start) + HERE + '[keys.sops]\nfile = "sops.key"\n'
    (tmp_path / "sops.key").write_text("s" * 40)

    async def fails(status: int, words: str, *arguments: str, stdin: str = "") -> None:
        command = ("keys", *arguments)
        found, out, err = await (with_stdin(tmp_path, stdin, *command) if stdin else vllm_proxy(tmp_path, *command))
        assert (found, out, words in err) == (status, "", True), err
        assert not stdin or stdin not in err

    async def all_of_them() -> None:
        await fails(1, "there is one; rotate", "new", "old")
        await fails(1, "lower-case letters", "new", "No")
        await fails(1, "cannot find key", "rotate", "nobody")
        await fails(1, "cannot find key", "revoke", "nobody")
        await fails(1, "put another key into that file", "rotate", "sops")

    async with daemon(config, tmp_path) as running:
        await all_of_them()
        running.file.write_text(config + "[models.x]\n")
        await fails(78, "models.x", "new", "ci")
    (tmp_path / "models.toml").write_text(config)
    await all_of_them()
    (tmp_path / "models.toml").write_text(config + "[models.x]\n")
    await fails(78, "models.x", "new", "ci")
    await fails(1, "at least 32 characters", "add", "own", "--stdin", stdin="too-short-a-key")
    await fails(1, "mistyped", "add", "own", "--stdin", stdin="vp-" + "x" * 49)
    await fails(2, "expected how long", "new", "ci", "--expires", "soon")
    await fails(2, "expected a time to come", "new", "ci", "--expires", "2020-01-01T00:00:00Z")
    await fails(2, "invalid choice", "new", "ci", "--scope", "root")
    await fails(2, "--stdin", "add", "ci")


async def test_a_key_that_cannot_be_told_is_named_with_the_way_out(tmp_path: Path, port_start: int) -> None:
    """A reader that is gone, a full disk: who made it learns that it is in force. With stdout closed none is made."""

    def run(stdout: Stdout, *arguments: str) -> tuple[int, list[str]]:
        place = ("--state-dir", str(tmp_path / "state"))
        ended = shared_forks().run(
            [Run(["keys", *arguments, *place], str(tmp_path), clean_environment(), stdout=stdout)]
        )
        return ended[0].status, ended[0].err.splitlines()

    def told(stdout: Stdout, name: str, where: str) -> None:
        full = ["vllm-proxy: cannot write to the standard output: No space left on device"] if stdout == "full" else []
        way_out = f'vllm-proxy: key "{name}" is {where}, but could not be told: vllm-proxy keys revoke {name}'
        assert run(stdout, "new", name) == (1, [way_out, *full])
        way_out = (
            f'vllm-proxy: the new key of "{name}" is {where}, but could not be told: vllm-proxy keys rotate {name}'
            " makes another one, and --finish then disables this one"
        )
        assert run(stdout, "rotate", name, "--json") == (1, [way_out, *full])
        assert run(stdout, "list") == (1, full)
        assert run(stdout, "rotate", name, "--finish") == (1, full)

    def with_closed() -> None:
        before = (tmp_path / "models.toml").read_text()
        refused = (1, ["vllm-proxy: cannot write to the standard output: it is closed"])
        assert run("closed", "new", "lost") == run("closed", "rotate", "old") == refused
        assert (tmp_path / "models.toml").read_text() == before

    async with daemon(fake_engines(port_start) + HERE, tmp_path):
        await asyncio.to_thread(told, "left", "one", "in force")
        await asyncio.to_thread(told, "full", "two", "in force")
        await asyncio.to_thread(with_closed)
    told("left", "three", f"in {tmp_path}/models.toml")
    with_closed()


async def test_the_first_key_says_whom_it_shuts_out(tmp_path: Path) -> None:
    """On stderr, where the second one says nothing of it; the key alone is on stdout."""
    (tmp_path / "models.toml").write_text("# none yet\n")
    config = ("-c", str(tmp_path / "models.toml"))
    status, out, err = await vllm_proxy(tmp_path, "keys", "new", "one", *config)
    assert (status, is_mistyped(out.strip())) == (0, False)
    assert "It is the first key: who sends none may do nothing" in err
    status, _, err = await vllm_proxy(tmp_path, "keys", "new", "two", *config)
    assert (status, "first key" in err) == (0, False)


async def test_the_first_key_with_limits_says_what_it_costs(tmp_path: Path) -> None:
    """On stderr, with a daemon and without one; one without limits, and the second one with, say nothing of it."""
    words = "It is the first key with limits: engines take requests in the order of their keys, which replaces all"

    async def told(*arguments: str) -> bool:
        status, _, err = await vllm_proxy(tmp_path, "keys", "new", *arguments)
        assert status == 0, err
        return words in err

    (tmp_path / "models.toml").write_text("# none yet\n")
    assert [await told("a"), await told("b", "--rpm", "9"), await told("c", "--tpm", "9")] == [False, True, False]
    async with daemon("", tmp_path) as running:
        assert [await told("d"), await told("e", "--tpm", "9"), await told("f", "--rpm", "9")] == [False, True, False]
        assert "because of [keys.e] engines take requests in the order of their keys" in running.log()


async def test_a_rotation_of_a_revoked_key_brings_the_old_one_never_back(shared: Daemon) -> None:
    """Enabled again, it has the new hash alone: what was revoked stays so."""
    first = await shared.write("POST", "/keys", {"name": "leaked"}, 201)
    await shared.write("PATCH", "/keys/leaked", {"enabled": False})
    second = await shared.write("POST", "/keys/leaked/rotate")
    await shared.write("PATCH", "/keys/leaked", {"enabled": True})
    assert table(shared, "leaked")["hash"] in (hash_of(second["key"]), [hash_of(second["key"])])
    assert first["key"] != second["key"]


async def test_a_dangerous_key_is_told_in_the_log_when_it_is_adopted(shared: Daemon) -> None:
    """Once, and the names of the keys that have changed with it."""
    await shared.write("POST", "/keys", {"name": "anonymous", "scopes": ["admin"]}, 201)
    await shared.logged("[keys.anonymous] has the scope admin: whoever can connect may change models", times=1)
    await shared.logged("keys='added anonymous'")
    await shared.write("DELETE", "/keys/anonymous", status=204)
    await shared.logged("keys='removed anonymous'")
