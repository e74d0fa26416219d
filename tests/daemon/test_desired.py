"""The file, an editor and the REST API are equal ways to change what is wanted, and only what changed moves."""

import asyncio
import contextlib
import io
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness import Daemon, daemon, fake_engines, port_block, session_of, vllm_proxy
from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.domain.keys import hash_of

ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
CHAT = '# Chat.\n[models.chat]\nmodel = "org/chat"  # the small one\nmax_model_len = 4096\n'
EMBED = '\n# Embeddings.\n[models.embed]\nmodel = "org/embed"\n'


@asynccontextmanager
async def serving(folder: Path, port_start: int, text: str = CHAT + EMBED) -> AsyncIterator[Daemon]:
    """A daemon whose models are all ready; whatever happens in the block, it stops in order and leaves nothing."""
    async with daemon(fake_engines(port_start) + text, folder) as running:
        await running.all_ready()
        pids = {pid for model in (await running.get("/models"))["models"] for pid in await running.pids(model["id"])}
        yield running
        assert await running.stop() == 0
        assert all(session_of(pid) == set() for pid in pids)


async def length(running: Daemon, model: str = "chat") -> int:
    """What the engine that answers was started with."""
    found = await running.get(f"/v1/models/{model}")
    return int(found["max_model_len"])


async def events(running: Daemon, until: Callable[[str, Any], bool]) -> list[tuple[str, Any]]:
    """What `/events` tells, up to and with what is waited for. Read what comes after the call has begun."""
    found: list[tuple[str, Any]] = []
    async with running.session.get("/events") as answer:
        assert answer.content_type == "text/event-stream"
        async for event in _events(answer):
            found.append(event)
            if until(*event):
                return found
    raise AssertionError(found)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    kind = ""
    async for raw in answer.content:
        line = raw.decode().strip()
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        if line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


# By the file


async def test_what_did_not_change_keeps_its_process_and_its_streams(tmp_path: Path, port_start: int) -> None:
    """While another model is replaced, started or removed; nobody else notices."""
    gate = tmp_path / "go"
    async with serving(tmp_path, port_start) as running:
        before = await running.pids("chat")
        body = ASK | {"stream": True, "fake": {"chunks": 4, "hold_at": 3, "hold": str(gate)}}
        async with running.session.post("/v1/chat/completions", json=body) as stream:
            (embed,) = await running.pids("embed")
            running.edit('model = "org/embed"', 'model = "org/embed"\nmax_model_len = 99')
            await running.once("embed", lambda one: one["state"] == "ready" and one["pid"] != embed)
            running.edit("# Embeddings.", '[models.third]\nmodel = "x"\n# Embeddings.')
            await running.adopts()
            running.edit('[models.embed]\nmodel = "org/embed"\nmax_model_len = 99\n', "")
            await running.adopts()
            gate.touch()
            text = (await stream.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert await running.pids("chat") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Chat.", "# Chat, for everybody."),
        ('model = "org/chat"  # the small one\nmax_model_len = 4096', 'max_model_len = 4096\nmodel = "org/chat"'),
        ("max_model_len = 4096", "max_model_len = 4096\nreplicas = 1\nqueue_timeout = 600"),
        ("[models.chat]", "[defaults]\n[models.chat]"),
    ],
)
async def test_other_words_for_the_same_change_nothing(tmp_path: Path, port_start: int, old: str, new: str) -> None:
    """Comments, order, a default that is written out: no action, the same processes; the new text is shown."""
    async with serving(tmp_path, port_start) as running:
        before = await running.get("/models")
        running.edit(old, new)
        await running.adopts()
        after = await running.get("/models")
        assert after["revision"] != before["revision"]
        assert [model["status"]["instances"] for model in after["models"]] == [
            model["status"]["instances"] for model in before["models"]
        ]
        assert " action=" not in running.log()


async def test_a_changed_engine_key_replaces_the_engine_and_requests_wait_for_it(
    tmp_path: Path, port_start: int
) -> None:
    """The running stream ends in peace; who comes meanwhile is served by the new engine."""
    gate = tmp_path / "go"
    async with serving(tmp_path, port_start) as running:
        (old,) = await running.pids("chat")
        body = ASK | {"stream": True, "fake": {"chunks": 4, "hold_at": 2, "hold": str(gate)}}
        async with running.session.post("/v1/chat/completions", json=body) as stream:
            running.edit("4096", "8192")
            await running.once("chat", lambda one: one["state"] == "unloading")
            late = asyncio.create_task(running.post("/v1/chat/completions", ASK))
            await running.eventually("/models/chat", lambda model: model["status"]["queued"] == 1)
            gate.touch()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert (await late)["object"] == "chat.completion"
        assert await running.pids("chat") != [old]
        assert await length(running) == 8192
        assert session_of(old) == set()
        assert 'action=replace model=chat reason="max_model_len 4096 -> 8192"' in running.log().replace("'", '"')


async def test_live_keys_are_live(tmp_path: Path, port_start: int) -> None:
    """Aliases, limits, description: at once, in the same process; a name that is gone is 404."""
    async with serving(tmp_path, port_start) as running:
        before = await running.pids("chat")
        running.edit("max_model_len = 4096", 'max_model_len = 4096\naliases = ["gpt"]\nqueue_size = 7')
        await running.adopts()
        assert (await running.post("/v1/chat/completions", ASK | {"model": "gpt"}))["object"] == "chat.completion"
        assert (await running.get("/models/chat"))["effective"]["queue_size"] == 7
        running.edit('aliases = ["gpt"]', 'aliases = ["new"]')
        await running.adopts()
        await running.post("/v1/chat/completions", ASK | {"model": "gpt"}, 404)
        await running.post("/v1/chat/completions", ASK | {"model": "new"})
        assert await running.pids("chat") == before


async def test_replicas_come_and_go_at_the_end(tmp_path: Path, port_start: int) -> None:
    """Those that stay keep their processes."""
    async with serving(tmp_path, port_start) as running:
        (first,) = await running.pids("chat")
        running.edit("max_model_len = 4096", "max_model_len = 4096\nreplicas = 3")
        await running.eventually(
            "/models/chat", lambda model: [one["state"] for one in model["status"]["instances"]] == ["ready"] * 3
        )
        running.edit("replicas = 3", "replicas = 2")
        await running.eventually("/models/chat", lambda model: len(model["status"]["instances"]) == 2)
        assert (await running.pids("chat"))[0] == first


async def test_disabled_enabled_renamed_removed(tmp_path: Path, port_start: int) -> None:
    """Each says what it is to requests, and to `/v1/models`."""
    async with serving(tmp_path, port_start) as running:
        running.edit("max_model_len = 4096", "max_model_len = 4096\nenabled = false")
        await running.eventually("/models/chat", lambda model: model["status"]["state"] == "stopped")
        assert (await running.post("/v1/chat/completions", ASK, 503))["error"]["code"] == "model_disabled"
        running.edit("enabled = false", "enabled = true")
        await running.adopts()
        await running.post("/v1/chat/completions", ASK)
        running.edit("[models.chat]", "[models.talk]")
        await running.adopts()
        await running.post("/v1/chat/completions", ASK | {"model": "talk"})
        assert (await running.post("/v1/chat/completions", ASK, 404))["error"]["code"] == "model_not_found"
        assert [card["id"] for card in (await running.get("/v1/models"))["data"]] == ["talk", "embed"]


async def test_an_invalid_file_changes_nothing_and_is_seen_everywhere(tmp_path: Path, port_start: int) -> None:
    """Log, STATUS, `/health`, `/events`, metrics, and the exit status of `reload`; a good one follows as ever."""
    async with serving(tmp_path, port_start) as running:
        before, adopted = await running.get("/models"), await running.revision()
        listening = asyncio.create_task(events(running, lambda kind, _: kind == "config"))
        running.edit("4096", "-1")
        health = await running.eventually("/health", lambda health: health["config"]["error"] is not None)
        assert health["config"]["error"].endswith("1 problem: models.toml:8: models.chat.max_model_len")
        assert health["config"]["revision"] == adopted
        await running.until(lambda status: "configuration rejected: " in status)
        assert (await running.metrics())['vllm_proxy_config_reloads_total{result="rejected"}'] >= 1
        status, _, err = await vllm_proxy(tmp_path, "reload")
        assert (status, "models.toml:8: models.chat.max_model_len: expected" in err) == (78, True)
        await running.logged("the configuration is rejected")
        assert (await running.get("/models"))["models"] == before["models"]
        running.edit("-1", "4096")
        await running.eventually("/health", lambda health: health["config"]["error"] is None)
        await running.until(lambda status: "rejected" not in status)
        await running.logged("the configuration is again what runs")
        listening.cancel()


async def test_the_status_tells_the_outcome_of_each_reload_however_quickly_they_follow(
    tmp_path: Path, port_start: int
) -> None:
    """Who sees `systemctl reload` fail looks at the status next."""
    async with serving(tmp_path, port_start) as running:
        await running.until(lambda status: status == "2 of 2 models ready")
        before = len(running.notes.messages)
        for _ in range(3):
            running.edit("4096", "-1")
            await running.write("POST", "/config/reload", status=422)
            running.edit("-1", "4096")
            await running.write("POST", "/config/reload")
        await running.until(lambda status: "rejected" not in status)
        told = ["configuration rejected" in note for note in running.notes.messages[before:] if "STATUS=" in note]
        assert told == [True, False] * 3


async def test_what_everybody_may_see_of_a_rejected_file_is_where_it_is_wrong(tmp_path: Path, port_start: int) -> None:
    """`/health` is public, STATUS is every local user's: lines and key paths, never what stands there."""
    async with serving(tmp_path, port_start) as running:
        running.edit("max_model_len = 4096", 'max_model_len = "sk-a-secret"\nreplicas = "sk-another"')
        health = await running.eventually("/health", lambda health: health["config"]["error"] is not None)
        await running.until(lambda status: "configuration rejected: " in status)
        places = "models.toml:8: models.chat.max_model_len; models.toml:9: models.chat.replicas"
        assert health["config"]["error"] == f"the configuration is rejected, 2 problems: {places}"
        assert "models.toml:8: models.chat.max_model_len" in running.notes.status
        assert "sk-" not in running.notes.status
        told = await running.write("POST", "/config/reload", status=422)
        assert "sk-a-secret" in told["error"]["problems"][0]["message"]


async def test_events_tell_what_happens(tmp_path: Path, port_start: int) -> None:
    """The verdict on the file, the plan, and each change of a model's state."""
    async with serving(tmp_path, port_start) as running:

        def is_ready(kind: str, data: Any) -> bool:  # noqa: ANN401 - JSON
            return kind == "model" and data["id"] == "third" and data["state"] == "ready"

        listening = asyncio.create_task(events(running, is_ready))
        while (await running.metrics())["vllm_proxy_tasks"] and not listening.done():
            running.edit("# Chat.", "# Chat..")  # until somebody listens nothing is told
            await running.adopts()
            if "third" not in running.file.read_text() and running.log().count("is adopted") > 3:
                running.edit("# Embeddings.", '[models.third]\nmodel = "x"\n# Embeddings.')
        found = await listening
        assert ("plan", "third") in [
            (kind, change["model"]) for kind, data in found if kind == "plan" for change in data["changes"]
        ]
        assert "accepted" in [data["result"] for kind, data in found if kind == "config"]


async def test_sighup_reloads_and_tells_systemd_either_way(tmp_path: Path, port_start: int) -> None:
    """RELOADING=1 with the time, then READY=1, for a good file and for a bad one."""
    async with serving(tmp_path, port_start) as running:
        for count in (1, 2):
            running.process.send_signal(signal.SIGHUP)

            def told(_: str, count: int = count) -> bool:
                return running.notes.messages.count("READY=1") == count + 1

            await running.until(told)
            reloading = [message for message in running.notes.messages if message.startswith("RELOADING=1")]
            assert len(reloading) == count
            assert "\nMONOTONIC_USEC=" in reloading[-1]
            if count == 1:
                running.edit("4096", "nonsense")


async def test_host_and_port_wait_for_a_restart_and_the_rest_of_server_is_live(tmp_path: Path, port_start: int) -> None:
    """`pending_restart` names them."""
    text = '[server]\nhost = "127.0.0.1"\nmax_body_size = "1MiB"\n' + CHAT
    async with serving(tmp_path, port_start, text) as running:
        running.edit('host = "127.0.0.1"\nmax_body_size = "1MiB"', 'host = "::1"\nmax_body_size = 100')
        await running.adopts()
        assert (await running.get("/health"))["config"]["pending_restart"] == ["server.host"]
        assert (await running.post("/v1/chat/completions", ASK | {"user": "x" * 200}, 413))["error"]["code"]


async def test_a_burst_of_edits_ends_with_the_last_one(tmp_path: Path, port_start: int) -> None:
    """However many there are, and whatever is being applied meanwhile; half-written ones included."""
    async with serving(tmp_path, port_start) as running:
        text = running.file.read_text()
        for number in range(1, 60):
            running.file.write_text(text.replace("4096", str(number)))
            running.file.write_text(text[: len(text) - number])
        running.file.write_text(text.replace("4096", "777"))
        await running.adopts()
        await running.eventually("/v1/models/chat", lambda card: card["max_model_len"] == 777)
        assert len(await running.pids("chat")) == 1


async def test_a_file_that_is_truncated_and_then_filled_unloads_nobody(tmp_path: Path, port_start: int) -> None:
    """As `cp`, `tee` and many editors write: an empty file would be a valid one, without any model."""
    async with serving(tmp_path, port_start) as running:
        before = await running.pids("chat")
        text = running.file.read_text()
        with running.file.open("w") as file:
            for number in range(20):  # long enough for the daemon to look
                file.flush()
                assert len((await running.get("/models"))["models"]) == 2, number
            file.write(text + "# more\n")
        await running.adopts()
        assert await running.pids("chat") == before


async def test_a_file_that_stays_empty_is_refused_and_a_comment_is_not(tmp_path: Path, port_start: int) -> None:
    """A save that fails on a full disk leaves an empty one, and must not end all models."""
    async with serving(tmp_path, port_start) as running:
        before = await running.pids("chat")
        running.file.write_text("")
        health = await running.eventually("/health", lambda found: found["config"]["error"] is not None)
        assert "it is empty, as a save that failed leaves it" in health["config"]["error"]
        assert await running.pids("chat") == before
        running.file.write_text("# no models\n")
        await running.eventually("/models", lambda found: not found["models"])


async def test_what_was_stopped_by_hand_is_started_by_a_change(tmp_path: Path, port_start: int) -> None:
    """A hand's word holds until the model is changed; other models' changes do not count."""
    async with serving(tmp_path, port_start) as running:
        await running.write("POST", "/models/chat/stop", status=202)
        await running.once("chat", lambda one: one["state"] == "stopped")
        running.edit("# Chat.", "# Chat!")
        await running.adopts()
        assert (await running.instance("chat"))["state"] == "stopped"
        running.edit("4096", "8192")
        await running.once("chat", lambda one: one["state"] == "ready")


# Replacement


async def test_surge_never_leaves_a_moment_without_an_engine(tmp_path: Path, port_start: int) -> None:
    """The new one loads beside the old one, which serves until then; the next daemon adopts what is left."""
    gate = tmp_path / "go"
    text = CHAT + 'replace = "surge"\n'
    async with daemon(fake_engines(port_start) + text, tmp_path) as running:
        await running.all_ready()
        (old,) = await running.pids("chat")
        running.edit('"surge"\n', f'"surge"\nargs = {{ fake_phase_until = "weights={gate}" }}\n')
        await running.eventually("/models/chat", lambda model: len(model["status"]["instances"]) == 2)
        for _ in range(20):
            assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        assert (await running.instance("chat"))["pid"] == old
        gate.touch()
        model = await running.eventually(
            "/models/chat", lambda model: [one["index"] for one in model["status"]["instances"]] == [1]
        )
        assert model["status"]["state"] == "ready"
        assert session_of(old) == set()
        running.process.send_signal(signal.SIGKILL)
        await running.process.wait()
        async with daemon(running.file.read_text(), tmp_path) as second:
            await second.all_ready()
            assert await second.pids("chat") == [model["status"]["instances"][0]["pid"]]


@pytest.mark.parametrize("replace", ["auto", "surge", "drain"])
async def test_a_replacement_that_fails_leaves_what_was_ready(tmp_path: Path, port_start: int, replace: str) -> None:
    """It still runs, or is started again; the state says so with the engine's own reason; the next edit tries again."""
    async with serving(tmp_path, port_start, CHAT + f'replace = "{replace}"\n') as running:
        bad = 'args = { fake_exit_at = "weights", fake_exit_text = "RuntimeError: no luck" }\n'
        running.edit("4096\n", f"8192\n{bad}")
        model = await running.eventually(
            "/models/chat",
            lambda model: (model["status"]["state"], model["status"]["reason"]) == ("ready", "replacement_failed"),
        )
        assert "no luck" in model["status"]["message"]
        assert model["effective"]["max_model_len"] == 8192, "that is still what is wanted"
        assert await length(running) == 4096
        assert (await running.post("/v1/chat/completions", ASK))["object"] == "chat.completion"
        running.edit(bad, "")
        model = await running.eventually("/models/chat", lambda model: model["status"]["reason"] is None)
        await running.eventually("/v1/models/chat", lambda card: card["max_model_len"] == 8192)


async def test_an_option_that_vllm_refuses_never_touches_a_healthy_engine(tmp_path: Path, port_start: int) -> None:
    """A command that is not there, known before anything is stopped."""
    async with serving(tmp_path, port_start) as running:
        before = await running.pids("chat")
        running.edit("4096", '4096\ncommand = ["no-such-vllm"]')
        model = await running.eventually(
            "/models/chat", lambda model: model["status"]["reason"] == "replacement_failed"
        )
        assert "no-such-vllm" in model["status"]["message"]
        assert await running.pids("chat") == before


async def test_several_instances_are_replaced_one_at_a_time(tmp_path: Path, port_start: int) -> None:
    """While one is away the others serve."""
    async with serving(tmp_path, port_start, CHAT + "replicas = 3\n") as running:
        before = set(await running.pids("chat"))
        running.edit("4096", "8192")
        least = 3

        def done(model: Any) -> bool:  # noqa: ANN401 - JSON
            nonlocal least
            instances = model["status"]["instances"]
            least = min(least, sum(one["state"] == "ready" for one in instances))
            return (
                not before & {one["pid"] for one in instances}
                and least < 3
                and all(one["state"] == "ready" for one in instances)
            )

        await running.eventually("/models/chat", done)
        assert least == 2


# By REST


async def test_a_models_life_over_rest(tmp_path: Path, port_start: int) -> None:
    """Created, changed, replaced, deleted; the file says each of it, with its comments."""
    async with serving(tmp_path, port_start) as running:
        text = running.file.read_text()
        made = await running.write(
            "POST", "/models", {"id": "org/new", "model": "x", "args": {"enable_prefix_caching": True}}, 201
        )
        assert (made["id"], made["spec"]) == ("org/new", {"model": "x", "args": {"enable_prefix_caching": True}})
        assert running.file.read_text() == (
            text + '\n[models."org/new"]\nmodel = "x"\n\n[models."org/new".args]\nenable_prefix_caching = true\n'
        )
        await running.once("org/new", lambda one: one["state"] == "ready")
        patched = await running.write("PATCH", "/models/chat", {"max_model_len": 8192, "description": "d"})
        assert patched["effective"]["max_model_len"] == 8192
        await running.write("PUT", "/models/org/new", {"model": "y"})
        await running.once("org/new", lambda one: one["state"] == "ready" and one["pid"] is not None)
        await running.write("DELETE", "/models/org%2Fnew", status=202)
        assert running.file.read_text() == text.replace("4096", '8192\ndescription = "d"')
        await running.eventually(
            "/models", lambda found: [model["id"] for model in found["models"]] == ["chat", "embed"]
        )
        await running.get("/models/org/new", 404)


async def test_adapters_are_added_changed_and_removed_over_rest(tmp_path: Path, port_start: int) -> None:
    """One alone, by a merge patch; null removes it; the answer says what engines would be started with."""
    off = '[models.off]\nmodel = "x"\nenabled = false\n'
    async with serving(tmp_path, port_start, CHAT + EMBED + off) as running:
        one = await running.write("PATCH", "/models/off", {"adapters": {"a": {"path": "org/a"}}})
        assert one["spec"]["adapters"] == {"a": {"path": "org/a"}}
        await running.write("PATCH", "/models/off", {"adapters": {"b.c": {"path": "org/b"}}})
        both = await running.write("PATCH", "/models/off", {"adapters": {"a": {"description": "d"}}})
        assert both["effective"]["adapters"] == {
            "a": {"path": "org/a", "description": "d", "enabled": True},
            "b.c": {"path": "org/b", "description": "", "enabled": True},
        }
        assert both["effective"]["adapters_max"] == {"rank": 16, "loras": 2, "cpu_loras": 16}
        refused = await running.write("PATCH", "/models/off", {"adapters": {"chat": {"path": "./none"}}}, 422)
        assert {problem["path"] for problem in refused["error"]["problems"]} == {
            "models.off.adapters.chat", "models.off.adapters.chat.path",
        }  # fmt: skip
        left = await running.write("PATCH", "/models/off", {"adapters": {"a": None}})
        assert left["spec"]["adapters"] == {"b.c": {"path": "org/b"}}
        none = await running.write("PATCH", "/models/off", {"adapters": None})
        assert "adapters" not in none["spec"]
        assert none["effective"]["adapters_max"] == {"rank": None, "loras": None, "cpu_loras": None}


async def test_who_waits_for_a_rollout_is_answered_at_its_end(tmp_path: Path, port_start: int) -> None:
    """By REST and by the command; each instance tells what it was started with. What is behind is named, with why."""
    async with serving(tmp_path, port_start) as running:
        before = (await running.get("/models/chat"))["status"]
        assert before["revision"] == before["instances"][0]["revision"]
        changed = await running.write("PATCH", "/models/chat?wait=1&timeout=1m", {"max_model_len": 99})
        (instance,) = changed["status"]["instances"]
        assert (instance["state"], instance["revision"]) == ("ready", changed["status"]["revision"])
        assert instance["revision"] != before["revision"]
        code, out, _ = await vllm_proxy(
            tmp_path, "reload", "--wait", "--timeout", "1m", "--state-dir", str(running.state_dir)
        )
        assert (code, out.strip()) == (0, "nothing to do")
        failed = await running.write(
            "PATCH", "/models/chat?wait=1&timeout=90", {"max_model_len": 98, "args": {"fake_exit_at": "weights"}}, 504
        )
        assert failed["error"]["code"] == "not_rolled_out"
        assert "is in force: chat: the change failed and what was ready before is kept" in failed["error"]["message"]
        code, _, err = await vllm_proxy(tmp_path, "reload", "--wait", "--state-dir", str(running.state_dir))
        assert (code, "what was ready before is kept" in err) == (1, True)
        assert (await running.instance("chat"))["revision"] != (await running.get("/models/chat"))["status"]["revision"]
        await running.write("PATCH", "/models/chat?wait=1&timeout=soon", {}, 400)
        await running.write("DELETE", "/models/chat?wait=1", None, 204)


async def test_the_daemons_own_write_is_not_followed_a_second_time(tmp_path: Path, port_start: int) -> None:
    """The watch sees the file change, and its bytes are those that are followed already."""
    async with serving(tmp_path, port_start) as running:
        await running.write("PATCH", "/models/chat", {"description": "d"})
        running.edit("# Chat.", "# Chat!")
        await running.adopts()
        await running.logged("the configuration is adopted", 2)


async def test_a_write_can_insist_on_the_revision_it_knows(tmp_path: Path, port_start: int) -> None:
    """412 and nothing changes where the file has another one; every answer that shows configuration has its ETag."""
    async with serving(tmp_path, port_start) as running:
        tags = set()
        for path in ("/models", "/models/chat", "/config"):
            async with running.admin.get(path) as answer:
                tags.add(answer.headers["ETag"])
        (tag,) = tags
        running.edit("# Chat.", "# Chat!")
        text = running.file.read_text()
        for method, path, body in (
            ("PATCH", "/models/chat", {"replicas": 2}),
            ("PUT", "/models/chat", {"model": "x"}),
            ("DELETE", "/models/chat", None),
            ("POST", "/models", {"id": "new", "model": "x"}),
            ("PUT", "/config", ""),
        ):
            error = await running.write(method, path, body, 412, if_match=tag)
            assert error["error"]["code"] == "revision_mismatch"
        assert running.file.read_text() == text
        await running.write("PATCH", "/models/chat", {"description": "d"}, if_match="*")
        async with running.session.get("/models") as answer:
            tag = answer.headers["ETag"]
        await running.write("PATCH", "/models/chat", {"description": "e"}, if_match=tag)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/models", {"id": "chat", "model": "x"}, 409, "model_exists"),
        ("POST", "/models", {"model": "x"}, 422, "invalid_model"),
        ("POST", "/models", {"id": "a b", "model": "x"}, 422, "invalid_model"),
        ("POST", "/models", {"id": "x"}, 422, "invalid_model"),
        ("POST", "/models", ["x"], 400, "invalid_json"),
        ("PATCH", "/models/none", {"replicas": 2}, 404, "model_not_found"),
        ("PUT", "/models/none", {"model": "x"}, 404, "model_not_found"),
        ("DELETE", "/models/none", None, 404, "model_not_found"),
        ("PATCH", "/models/chat", {"replicas": 0, "dtype": "x", "none": 1}, 422, "invalid_model"),
        ("PATCH", "/models/chat", {"id": "other"}, 422, "invalid_model"),
        ("PATCH", "/models/chat", {"metadata": {"x": [None]}}, 422, "invalid_model"),
        ("PATCH", "/models/chat", {"model": None}, 422, "invalid_model"),
        ("PUT", "/config", "[models.x]\nmodell = 1", 422, "invalid_config"),
        ("PUT", "/config", "this is no toml", 422, "invalid_config"),
        ("POST", "/config/plan", "this is no toml", 422, "invalid_config"),
    ],
)
async def test_a_write_that_cannot_be_is_refused_with_every_problem(
    shared: Daemon, method: str, path: str, body: object, status: int, code: str
) -> None:
    """Nothing changes, on disk or in the fleet."""
    text, revision = shared.file.read_text(), await shared.revision()
    error = (await shared.write(method, path, body, status))["error"]
    assert error["code"] == code
    assert error["message"].startswith("cannot ")
    if isinstance(body, dict) and "dtype" in body:
        assert {problem["path"] for problem in error["problems"]} == {
            "models.chat.dtype", "models.chat.none", "models.chat.replicas",
        }  # fmt: skip
    assert (shared.file.read_text(), await shared.revision()) == (text, revision)


@pytest.mark.parametrize(
    ("method", "path", "body", "where", "words"),
    [
        ("POST", "/models", {"id": 1, "model": "x"}, "id", "expected a string, got 1"),
        ("PATCH", "/models/chat", {"metadata": {"x": 2**63}}, "models.chat.metadata.x", "more than 64 bits"),
        ("PATCH", "/models/chat", {"metadata": {"x": [None]}}, "models.chat.metadata.x[0]", "TOML has no null"),
    ],
)
async def test_a_value_that_cannot_be_written_is_named(
    shared: Daemon, method: str, path: str, body: object, where: str, words: str
) -> None:
    """So that a page can show the problem beside it."""
    (problem,) = (await shared.write(method, path, body, 422))["error"]["problems"]
    assert problem["path"] == where
    assert words in problem["message"]


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [60, 499, 600, 5000, 100_000])
async def test_values_that_are_nested_too_deeply_are_refused(shared: Daemon, begin: str, end: str, depth: int) -> None:
    """However deeply, by every route that takes values: what recurses over them would give up."""
    text = '{"id": "deep", "model": "m", "args": {"x": ' + begin * depth + "1" + end * depth + "}}"
    for method, path in (("PATCH", "/models/chat"), ("PUT", "/models/chat"), ("POST", "/models"), ("POST", "/keys")):
        async with shared.admin.request(method, path, data=text) as answer:
            error = (await answer.json())["error"]
            assert answer.status in {400, 422}, error
            assert answer.status == 400 or depth < 500, error


async def test_a_configuration_that_is_larger_than_any_is_refused(shared: Daemon) -> None:
    """Declared or not: reading a list of a few megabytes takes a processor for a minute."""
    large = b"a = [" + b"1," * 2**21 + b"]"
    toml = {"Content-Type": "application/toml"}
    for method, path in (("POST", "/config/plan"), ("PUT", "/config")):
        async with shared.admin.request(method, path, data=io.BytesIO(large), headers=toml) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, "request_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 2**16):
            yield large[start : start + 2**16]

    async with shared.admin.post("/config/plan", data=pieces(), headers=toml) as answer:
        assert answer.status == 413
        assert "at most 4 MiB" in (await answer.json())["error"]["message"]


async def test_half_of_a_surrogate_pair_is_told_as_what_it_is(shared: Daemon) -> None:
    """As programs that cut text between UTF-16 units send it: no text, and the body is not too short."""
    error = (await shared.write("PATCH", "/models/chat", {"description": "\ud83d"}, 400))["error"]
    assert "half of a surrogate pair" in error["message"]


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for what changes nothing."""
    folder = tmp_path_factory.mktemp("shared")
    async with daemon(fake_engines(port_block()) + CHAT + EMBED, folder) as running:
        await running.all_ready()
        yield running


async def test_plan_says_what_would_happen_and_does_nothing(shared: Daemon) -> None:
    """Over REST, and from the shell with exit status 2 for changes and 0 for none."""
    text = shared.file.read_text()
    wanted = text.replace("4096", "8192").replace("models.embed", "models.other")
    plan = await shared.write("POST", "/config/plan", wanted)
    assert plan["changes"] == [
        {"model": "embed", "action": "stop", "reason": "no longer in the file"},
        {"model": "chat", "action": "replace", "reason": "max_model_len 4096 -> 8192", "place": None},
        {"model": "other", "action": "start", "reason": "new", "place": None},
    ]
    file = shared.folder / "other.toml"
    file.write_text(wanted)
    status, out, _ = await vllm_proxy(shared.folder, "plan", "-c", str(file))
    assert (status, out.splitlines()[1]) == (2, "replace chat: max_model_len 4096 -> 8192")
    status, out, _ = await vllm_proxy(shared.folder, "plan", "-c", str(shared.file))
    assert (status, out) == (0, "nothing to do\n")
    status, out, _ = await vllm_proxy(shared.folder, "reload", "--json")
    keys: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
    assert (status, json.loads(out)) == (0, {"changes": [], "keys": keys, "settings": [], "warnings": []})
    assert shared.file.read_text() == text


async def test_what_waits_for_a_restart_is_no_nothing_to_do(shared: Daemon) -> None:
    """Who opens the daemon to others is told that nothing is open yet: before the save and at it."""
    text = shared.file.read_text()
    wanted = text.replace("[engine]", '[server]\nhost = "0.0.0.0"\n[engine]', 1)
    assert wanted != text
    assert (await shared.write("POST", "/config/plan", wanted))["pending_restart"] == ["server.host"]
    file = shared.folder / "open.toml"
    file.write_text(wanted)
    said = "with the next start of the daemon: server.host\n"
    assert (await vllm_proxy(shared.folder, "plan", "-c", str(file)))[:2] == (2, said)
    try:
        shared.save(wanted)
        assert (await vllm_proxy(shared.folder, "reload"))[:2] == (0, said)
    finally:
        shared.save(text)
        await shared.adopts()
    assert (await shared.write("POST", "/config/plan", text))["pending_restart"] == []


async def test_what_opens_the_daemon_is_no_nothing_to_do(shared: Daemon) -> None:
    """Keys and what is live: by exit status 2 and when it is written, with what it means that no key is left."""
    text = shared.file.read_text()
    file = shared.folder / "open.toml"
    file.write_text(text.replace("[engine]", '[server]\ncors_origins = ["*"]\n[engine]', 1))
    try:
        shared.save(text + f'[keys.ci]\nhash = "{hash_of("k" * 32)}"\nscopes = ["read"]\n')
        await shared.adopts()
        status, out, _ = await vllm_proxy(shared.folder, "plan", "-c", str(file))
        keys, setting, warning = out.splitlines()
        assert (status, keys) == (2, "keys: removed ci")
        assert setting == 'live: server.cors_origins [] -> ["*"]'
        assert warning.startswith("warning: no key is left: on loopback whoever can connect may use the models")
        status, out, _ = await vllm_proxy(shared.folder, "plan", "-c", str(file), "--json")
        planned = json.loads(out)
        assert (status, planned.pop("changes"), planned.pop("pending_restart")) == (2, [], [])
        written = await shared.write("PUT", "/config", file.read_text())
        assert {key: written[key] for key in planned} == planned
    finally:
        shared.save(text)
        await shared.adopts()
    assert (await vllm_proxy(shared.folder, "plan"))[:2] == (0, "nothing to do\n")


async def test_plan_without_a_file_is_of_the_daemons_own(shared: Daemon, tmp_path: Path) -> None:
    """As it is on disk, wherever the command runs; a file that is named counts, and its problems have its name."""
    (tmp_path / "models.toml").write_text("not the daemon's")
    (tmp_path / "state").symlink_to(shared.state_dir)
    assert (await vllm_proxy(tmp_path, "plan"))[:2] == (0, "nothing to do\n")
    status, _, err = await vllm_proxy(tmp_path, "plan", "-c", "models.toml")
    assert (status, err.split(":")[0]) == (78, str(tmp_path / "models.toml"))
    async with shared.session.get("/health") as answer:
        assert (await answer.json())["config"]["file"] == str(shared.file)


async def test_plan_and_reload_name_the_file_whose_problems_they_tell(tmp_path: Path) -> None:
    """That of the daemon, not the one of the folder in which they run."""
    folder, elsewhere = tmp_path / "daemon", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "state").symlink_to(folder / "state")
    async with daemon(fake_engines(port_block()) + CHAT, folder) as running:
        running.file.write_text(running.file.read_text() + "replicas = -1\n")
        for command in "plan", "reload":
            status, _, err = await vllm_proxy(elsewhere, command)
            assert (status, err.split(":")[0]) == (78, str(running.file)), command


async def test_plan_from_nothing_and_reload_without_a_daemon(tmp_path: Path) -> None:
    """Everything would start; nobody is there to reload."""
    (tmp_path / "models.toml").write_text(CHAT)
    status, out, _ = await vllm_proxy(tmp_path, "plan")
    assert (status, out) == (2, "start chat: new\n")
    assert (await vllm_proxy(tmp_path, "reload"))[0] == 3
    (tmp_path / "models.toml").write_text("x")
    assert (await vllm_proxy(tmp_path, "plan"))[0] == 78


async def test_a_whole_file_over_rest(tmp_path: Path, port_start: int) -> None:
    """`GET` gives its text as it is, `PUT` replaces it and says what changes."""
    async with serving(tmp_path, port_start) as running:
        async with running.admin.get("/config") as answer:
            assert (answer.content_type, await answer.text()) == ("text/toml", running.file.read_text())
            text = await answer.text()
        answered = await running.write("PUT", "/config", text.replace("# Chat.", "# Talk.").replace("4096", "1"))
        assert [change["action"] for change in answered["changes"]] == ["replace"]
        assert "# Talk." in running.file.read_text()


async def test_a_file_that_was_removed_can_be_put_back_over_rest(tmp_path: Path, port_start: int) -> None:
    """What runs goes on meanwhile; a configuration that is declared as JSON is none."""
    async with serving(tmp_path, port_start) as running:
        text, pids = running.file.read_text(), await running.pids("chat")
        running.file.unlink()
        await running.write("PATCH", "/models/chat", {"replicas": 2}, 422)
        error = await running.write("PUT", "/config", {}, 415)
        assert error["error"]["code"] == "unsupported_media_type"
        await running.write("PUT", "/config", text + "# again\n")
        assert running.file.read_text() == text + "# again\n"
        assert await running.pids("chat") == pids


async def test_a_deleted_model_drains_and_its_name_is_taken_until_then(tmp_path: Path, port_start: int) -> None:
    """202, `unloading`, inference 404, a POST of the same id 409; the stream in flight ends in peace."""
    gate = tmp_path / "go"
    async with serving(tmp_path, port_start) as running:
        body = ASK | {"stream": True, "fake": {"chunks": 4, "hold_at": 2, "hold": str(gate)}}
        async with running.session.post("/v1/chat/completions", json=body) as stream:
            gone = await running.write("DELETE", "/models/chat", status=202)
            assert gone["status"]["state"] == "unloading"
            assert (await running.get("/models/chat"))["status"]["state"] == "unloading"
            await running.post("/v1/chat/completions", ASK, 404)
            await running.write("POST", "/models", {"id": "chat", "model": "x"}, 409)
            running.file.write_text(running.file.read_text() + CHAT)  # an editor may
            await running.adopts()
            gate.touch()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        await running.once("chat", lambda one: one["state"] == "ready")


async def test_a_deleted_model_that_runs_nothing_is_gone_at_once(tmp_path: Path, port_start: int) -> None:
    """204, whatever kept it from running; its name is free."""
    others = "".join(
        f'[models.{name}]\nmodel = "x"\n{keys}\n'
        for name, keys in {
            "disabled": "enabled = false",
            "awaits": 'start = "on-demand"',
            "stopped": "",
            "failed": 'args = { fake_exit_at = "import", fake_exit_code = 2 }',
        }.items()
    )
    async with daemon(fake_engines(port_start) + others, tmp_path) as running:
        await running.eventually("/models/failed", lambda model: model["status"]["state"] == "error")
        await running.post("/models/stopped/stop", {}, 202)
        await running.eventually("/models/stopped", lambda model: model["status"]["state"] == "stopped")
        for name in ("disabled", "awaits", "stopped", "failed"):
            await running.write("DELETE", f"/models/{name}", status=204)
            await running.write("POST", "/models", {"id": name, "model": "x", "enabled": False}, 201)


async def test_of_many_writers_nobody_loses_anything(tmp_path: Path, port_start: int) -> None:
    """Fifty PATCHes while an editor saves: the file always parses, each PATCH is in it, and it is what runs."""
    async with serving(tmp_path, port_start) as running:
        stop = asyncio.Event()

        async def edit() -> None:
            while not stop.is_set():
                parse_config(running.file.read_bytes(), "models.toml")
                await asyncio.sleep(0)

        watching = asyncio.create_task(edit())
        patches = [
            running.write("PATCH", "/models/chat", {"metadata": {f"key{number}": number}}) for number in range(50)
        ]
        saved = asyncio.create_task(asyncio.to_thread(running.edit, "# Chat.", "# Chat! "))
        await asyncio.gather(*patches)
        await saved
        stop.set()
        await watching
        metadata = parse_config(running.file.read_bytes(), "").models["chat"].policy.metadata
        written = {f"key{number}" for number in range(50)}
        lost = written - set(metadata)
        if lost:  # the editor wins as with any file: what it read, it wrote
            assert "# Chat! " in running.file.read_text()
        await running.write("PATCH", "/models/chat", {"metadata": dict.fromkeys(lost, 1)})
        await running.adopts()
        found = (await running.get("/models/chat"))["effective"]["metadata"]
        assert set(found) == written


async def test_a_client_that_leaves_does_not_undo_its_write(tmp_path: Path, port_start: int) -> None:
    """What was begun is finished; nothing half is left."""
    async with serving(tmp_path, port_start) as running:
        for number in range(10):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.002 * number):
                    await running.write("PATCH", "/models/chat", {"description": f"number {number}"})
        await running.write("PATCH", "/models/embed", {"description": "last"})
        config = parse_config(running.file.read_bytes(), "")
        assert config.models["embed"].policy.description == "last"
        assert config.revision == await running.revision()


async def test_a_link_is_written_through_and_stays(tmp_path: Path, port_start: int) -> None:
    """As `models.toml` in a folder under git may be."""
    async with serving(tmp_path, port_start) as running:
        real = tmp_path / "repository"
        real.mkdir()
        running.file.rename(real / "m.toml")
        running.file.symlink_to("repository/m.toml")
        await running.write("PATCH", "/models/chat", {"description": "d"})
        assert running.file.is_symlink()
        assert 'description = "d"' in (real / "m.toml").read_text()
        text = (real / "m.toml").read_text().replace('"d"', '"e"')
        (real / "m.toml").write_text(text)
        await running.adopts()


async def test_what_cannot_be_written_says_so_and_nothing_changes(tmp_path: Path, port_start: int) -> None:
    """409 with the way out; the fleet is as it was."""
    async with serving(tmp_path, port_start) as running:
        running.file.chmod(0o444)
        text, revision = running.file.read_text(), await running.revision()
        error = (await running.write("PATCH", "/models/chat", {"max_model_len": 1}, 409))["error"]
        assert error["code"] == "config_read_only"
        assert "no write bit" in error["message"]
        async with running.admin.get("/config") as answer:
            assert answer.headers["X-Vllm-Proxy-Read-Only"] == error["message"]
        assert (running.file.read_text(), await running.revision()) == (text, revision)
        assert (await running.get("/models/chat"))["effective"]["max_model_len"] == 4096
        running.file.chmod(0o644)
        async with running.admin.get("/config") as answer:
            assert "X-Vllm-Proxy-Read-Only" not in answer.headers
