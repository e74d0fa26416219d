"""What the pages tell somebody to type, typed at a running daemon."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import pages
from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, fake_engines, lives, vllm_proxy
from tests.test_pages import blocks
from vllm_proxy.api.metrics import FAMILIES
from vllm_proxy.domain.keys import hash_of, new_key

KEY = new_key(b"k" * 32)  # $KEY of the pages
KEYS = f'[keys.me]\nhash = "{hash_of(KEY)}"\nscopes = ["admin"]\n'
CHAT = '[models.chat]\nmodel = "org/chat"\n'


@pytest.fixture
async def running(tmp_path: Path, port_start: int) -> AsyncIterator[Daemon]:
    """A daemon with the model `chat`, which the pages talk about."""
    async with daemon(f"# kept\n{fake_engines(port_start)}{KEYS}{CHAT}", tmp_path) as found:
        await found.all_ready()
        yield found


async def typed(running: Daemon, line: str) -> str:
    """What a `curl` line prints, with this daemon's ports instead of the page's; it must be answered with success."""
    engine = (await running.instance("chat"))["port"]
    line = line.replace("localhost:8000", f"localhost:{running.port}").replace("127.0.0.1:8001", f"127.0.0.1:{engine}")
    command = f"curl -sS --fail-with-body {line.removeprefix('curl ').partition(' | ')[0]}"
    pipe = asyncio.subprocess.PIPE
    env = {**os.environ, "KEY": KEY}
    process = await asyncio.create_subprocess_shell(command, cwd=running.folder, env=env, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    assert process.returncode == 0, (command, out, err)
    return out.decode()


async def test_models_change_as_the_page_types_it(running: Daemon) -> None:
    """The blocks of docs/changes.md, line by line: a model comes, changes and goes, and a file is put back whole."""
    before = (running.folder / "models.toml").read_bytes()
    shown = [block.splitlines() for block in blocks(pages.DOCS / "changes.md") if "curl" in block]
    over_rest, whole_file, rollout = shown
    await typed(running, over_rest[0])
    await typed(running, rollout[1])  # answered once the engine that runs it is ready
    status = (await running.get("/models/small"))["status"]
    assert [(one["state"], one["revision"]) for one in status["instances"]] == [("ready", status["revision"])]
    await typed(running, over_rest[1])
    changed = (await running.get("/models/small"))["spec"]
    assert changed == {"model": "Qwen/Qwen3-0.6B", "max_model_len": 4096, "args": {"seed": 1}}
    await typed(running, over_rest[2])
    await running.eventually("/models", lambda found: [model["id"] for model in found["models"]] == ["chat"])
    assert (running.folder / "models.toml").read_bytes() == before
    await typed(running, whole_file[0])
    assert (running.folder / "models.toml.good").read_bytes() == before
    planned = json.loads(await typed(running, whole_file[1]))
    assert not any((*planned.pop("keys").values(), *planned.values()))
    (running.folder / "models.toml").write_bytes(before + b"description = 'bad'\n")
    await running.eventually("/models/chat", lambda found: found["spec"].get("description") == "bad")
    await typed(running, whole_file[2])
    assert (running.folder / "models.toml").read_bytes() == before


async def test_what_is_typed_at_night_is_answered(running: Daemon) -> None:
    """Each `curl` line of docs/operating.md; those for numbers name series that are there."""
    (running.folder / "models.toml.good").write_bytes((running.folder / "models.toml").read_bytes())
    lines = [line for block in blocks(pages.DOCS / "operating.md") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("curl")]
    assert len(lines) > 10
    for line in lines:
        found = await typed(running, line)
        if (filtered := re.search(r"grep -E '(.*)'", line)) and "127.0.0.1" not in line:
            assert re.search(filtered[1], found, re.MULTILINE), line


async def test_the_page_of_metrics_is_what_a_daemon_says(running: Daemon) -> None:
    """Every family with its type and its explanation, and no other; labels as the page has them."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with running.session.post("/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200
    text = await typed(running, 'curl -H "Authorization: Bearer $KEY" localhost:8000/metrics')
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    meanings = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.MULTILINE))
    families = {one.name: one for one in FAMILIES}
    assert kinds == {name: one.kind for name, one in families.items()}
    assert meanings == {name: one.meaning for name, one in families.items()}
    for name, labels in re.findall(r"^(\w+)\{(.*)\} ", text, re.MULTILINE):
        family = name if name in families else name.rpartition("_")[0]
        assert set(re.findall(r"(\w+)=", labels)) - {"le"} == set(families[family].labels), name


async def test_two_models_on_one_gpu_take_turns_as_the_page_has_it(tmp_path: Path, port_start: int) -> None:
    """The file of docs/scheduling.md as it is, on a GPU of 24 GiB, and what is typed there: what it says comes true."""
    page = pages.DOCS / "scheduling.md"
    models, *_ = blocks(page, "toml")
    with Devices(tmp_path / "gpus.toml", {"0": 24 * GIB}) as devices:
        shared = f'[defaults]\nargs = {{ fake_ledger = "{devices.file}" }}\n'
        async with daemon(f"{fake_engines(port_start)}{KEYS}{devices.config}{shared}{models}", tmp_path) as running:
            asked, wanted = [block.splitlines() for block in blocks(page)]
            found = [json.loads(await typed(running, line)) for line in asked]
            assert [answer["model"] for answer in found[:2]] == ["chat", "code"]
            status = found[2]["status"]
            assert (status["state"], status["reason"]) == ("stopped", "gave_way")
            assert re.fullmatch(r"gave way to code at [\d:]{8} UTC; its next request starts it", status["message"])
            (gpu,) = found[3]["devices"]
            assert [(hold["instance"], hold["standing"]) for hold in gpu["holds"]] == [("code/0", "serves")]
            (line,) = wanted
            filtered = re.search(r"grep -E '(.*)'", line)
            assert filtered is not None
            assert len(re.findall(filtered[1], await typed(running, line), re.MULTILINE)) >= 8


async def test_chat_and_embeddings_share_one_gpu_as_the_page_has_it(tmp_path: Path, port_start: int) -> None:
    """The second file of docs/start.md on a GPU of 24 GiB: each loads with its first request, and both stay."""
    _, both, *_ = blocks(pages.DOCS / "start.md", "toml")
    both = both.replace('args = { runner = "pooling" }\n', "")  # the fake has no such option
    with Devices(tmp_path / "gpus.toml", {"0": 24 * GIB}) as devices:
        both = both.replace('start = "on-demand"', f'start = "on-demand"\nargs = {{ fake_ledger = "{devices.file}" }}')
        async with daemon(f"{fake_engines(port_start)}{KEYS}{devices.config}{both}", tmp_path) as running:
            headers = {"Authorization": f"Bearer {KEY}"}
            for model, path in (("chat", "chat/completions"), ("embed", "embeddings")):
                assert (await running.get(f"/models/{model}"))["status"]["state"] == "stopped"
                body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "input": "hi"}
                async with running.session.post(f"/v1/{path}", json=body, headers=headers) as answer:
                    assert answer.status == 200
            states = [model["status"]["state"] for model in (await running.get("/models"))["models"]]
            assert states == ["ready", "ready"]


async def test_a_change_is_planned_in_a_copy_and_adopted_with_its_name(running: Daemon) -> None:
    """The first block of docs/changes.md: the copy changes nothing, and its new name does what the plan said."""
    copy, plan, move = [line.partition("  #")[0].split() for line in blocks(pages.DOCS / "changes.md")[0].splitlines()]

    async def done(command: list[str]) -> bool:
        process = await asyncio.create_subprocess_exec(*command, cwd=running.folder)
        return await process.wait() == 0

    assert await done(copy)
    with (running.folder / copy[-1]).open("a") as file:
        file.write('[models.more]\nmodel = "org/more"\n')
    code, out, _ = await vllm_proxy(running.folder, *plan[1:])
    assert (code, "start more" in out) == (2, True)
    assert [model["id"] for model in (await running.get("/models"))["models"]] == ["chat"]
    assert await done(move)
    await running.eventually("/models", lambda found: [model["id"] for model in found["models"]] == ["chat", "more"])
    code, _, _ = await vllm_proxy(running.folder, "plan")
    assert code == 0


async def test_what_a_failed_change_has_left_serving_ends_with_the_daemon(tmp_path: Path, port_start: int) -> None:
    """As docs/operating.md warns, where engines are kept too: the next daemon starts what the file says."""
    kept = f'{fake_engines(port_start)}[server]\non_exit = "keep"\n{CHAT}'
    async with daemon(kept, tmp_path) as first:
        await first.all_ready()
        first.save(kept + 'args = { fake_exit_at = "load" }\n[models.chat.restart]\nmax_failures = 1\n')
        await first.eventually(
            "/models/chat",
            lambda found: (found["status"]["state"], found["status"]["reason"]) == ("ready", "replacement_failed"),
        )
        left = (await first.instance("chat"))["pid"]
        assert await first.stop() == 0
    assert lives(left)
    async with daemon(first.file.read_text(), tmp_path) as second:
        found = await second.eventually("/models/chat", lambda found: found["status"]["state"] == "error")
        assert found["status"]["reason"] == "crashed"
        assert not lives(left)
