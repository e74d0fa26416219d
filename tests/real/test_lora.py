"""A real engine is given adapters, forgets them and reads them again: what `engine/adapters` and the store stand on.

The engine holds two, of rank 8 at most, and its words are compared with the fake's, which are to be the same.
"""

import asyncio
import json
import os
import shutil
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes import running as fake
from tests.harness import Daemon, daemon
from tests.real.cpu import engines_on_cpu
from tests.real.lora import make_adapter
from vllm_proxy.demo.prepare import chat_model
from vllm_proxy.domain.address import parse_address
from vllm_proxy.domain.command import Place
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.adapter_store import AdapterStore
from vllm_proxy.engine.adapters import Failed, HttpAdapters
from vllm_proxy.engine.http_client import answer_to

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

LOAD_SECONDS = 600.0
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FLAGS = ["--enable-lora", "--max-lora-rank=8", "--max-loras=2", "--max-cpu-loras=2"]
PROMPT = "The capital of France is"
SPEC = EngineSpec(model="chat")


def configuration(model: Path) -> str:
    """One model that takes adapters, by hand."""
    return f"""
{engines_on_cpu(1, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")}
[models.chat]
model = "{model}"
max_model_len = 512
gpu_memory_utilization = 0.2
args = {{ enforce_eager = true, enable_lora = true, max_lora_rank = 8, max_loras = 2, max_cpu_loras = 2 }}
"""


class Anywhere:
    """Every path is a folder's."""

    async def find(self, _: EngineSpec, path: str, *, is_hub_id: bool) -> Path:
        """That one."""
        assert not is_hub_id
        return Path(path)


@dataclass
class Adaptable:
    """The engine, beside its daemon."""

    running: Daemon
    place: Place
    session: aiohttp.ClientSession
    adapters: HttpAdapters

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of its own answer."""
        async with answer_to(
            self.session, self.place.address, "POST", path, credential=self.place.credential, body=body
        ) as answer:
            return answer.status, await answer.text()

    async def says(self, model: str, tokens: int = 12) -> str:
        """A greedy answer."""
        asked = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        status, text = await self.ask("/v1/completions", asked)
        assert status == 200, text
        answer: str = json.loads(text)["choices"][0]["text"]
        return answer

    @asynccontextmanager
    async def streams(self, model: str, tokens: int) -> AsyncIterator[Callable[[], Awaitable[str]]]:
        """A greedy answer that has begun; what is yielded waits for all of it."""
        asked = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
        async with answer_to(
            self.session, self.place.address, "POST", "/v1/completions", credential=self.place.credential, body=asked
        ) as answer:
            assert answer.status == 200
            first = await answer.content.readuntil(b"\n\n")

            async def rest() -> str:
                events = (first + await answer.content.read()).decode().split("\n\n")
                assert events[-2] == "data: [DONE]"
                return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2])

            yield rest


@pytest.fixture(scope="module")
async def adaptable(new_place: Callable[[str], Path]) -> AsyncIterator[Adaptable]:
    """One engine for all."""
    async with daemon(configuration(chat_model(os.environ)), new_place("lora")) as running:
        await running.until("1 of 1 models ready", LOAD_SECONDS)
        (record,) = tomllib.loads((running.state_dir / "engines.toml").read_text())["engines"]
        address = parse_address(record["address"])
        place = Place("chat/0", record["own_name"], address, record["credential"], record["folder"])
        async with aiohttp.ClientSession(trust_env=False) as session:
            yield Adaptable(running, place, session, HttpAdapters(session))
        assert await running.stop() == 0


async def test_adapters_answer_differently_from_their_base_and_each_other(adaptable: Adaptable, tmp_path: Path) -> None:
    """Loaded, listed and unloaded while base and adapter answer streams, which end as they would have."""
    one, two = make_adapter(tmp_path / "one", seed=1), make_adapter(tmp_path / "two", seed=2)
    alone = await adaptable.says("chat", 60)
    async with adaptable.streams("chat", 60) as of_the_base:
        assert await adaptable.adapters.load(adaptable.place, "one", one) is None
        assert await adaptable.adapters.load(adaptable.place, "one", one) is None
        assert await adaptable.adapters.load(adaptable.place, "team/two", two) is None
        assert await adaptable.adapters.loaded(adaptable.place) == {"one": one, "team/two": two}
        assert await of_the_base() == alone
    assert len({await adaptable.says(model) for model in ("chat", "one", "team/two")}) == 3
    unloaded = await adaptable.says("one", 60)
    async with adaptable.streams("one", 60) as of_the_adapter:
        assert await adaptable.adapters.unload(adaptable.place, "one") is None
        assert await adaptable.adapters.unload(adaptable.place, "team/two") is None
        assert await adaptable.adapters.loaded(adaptable.place) == {}
        assert await of_the_adapter() == unloaded


async def test_a_forgotten_one_is_read_again_from_its_snapshot(adaptable: Adaptable, tmp_path: Path) -> None:
    """The engine holds two of three; the folders that were given are gone, and it lives."""
    store = AdapterStore(tmp_path / "adapters", Anywhere())
    await store.open()
    folders = []
    for seed in (1, 2, 3):
        source = make_adapter(tmp_path / f"source{seed}", seed=seed)
        async with store.held(SPEC, str(source), is_hub_id=False) as folder:
            assert await adaptable.adapters.load(adaptable.place, f"x{seed}", folder) is None
            folders.append(folder)
        shutil.rmtree(source)
    await store.sweep(lambda: folders)
    said = [await adaptable.says(f"x{seed}") for seed in (1, 2, 3, 1, 2, 3)]
    assert said[:3] == said[3:]
    assert len(set(said)) == 3
    for seed in (1, 2, 3):
        assert await adaptable.adapters.unload(adaptable.place, f"x{seed}") is None


REFUSED: dict[str, dict[str, Any]] = {
    "rank": {"rank": 64},
    "rank_pattern": {"rank_pattern": {"q_proj": 16}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "alora": {"alora_invocation_tokens": [1]},
    "lora_bias": {"lora_bias": True},
    "required": {"r": None},
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_the_fake_refuses_in_the_same_words(adaptable: Adaptable, tmp_path: Path, kind: str) -> None:
    """Status and sentence; to the daemon it is a refusal, without the way that it came."""
    folder = make_adapter(tmp_path / "x", **REFUSED[kind])
    body = {"lora_name": "x", "lora_path": str(folder)}
    if kind == "required":
        text = json.loads((folder / "adapter_config.json").read_text())
        del text["r"]
        (folder / "adapter_config.json").write_text(json.dumps(text))
    real = await adaptable.ask(LOAD, body)
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with fake.engine(*FLAGS, "--fake-grandchildren=1", env=env) as running:
        assert await asyncio.to_thread(running.ask, LOAD, body) == real
    failed = await adaptable.adapters.load(adaptable.place, "x", folder)
    assert isinstance(failed, Failed)
    assert failed.answered
    assert "Call to" not in failed.why
    assert "stack trace" not in failed.why


async def test_the_fake_answers_for_names_and_folders_in_the_same_words(adaptable: Adaptable, tmp_path: Path) -> None:
    """What is missing, taken, unknown, empty; what has no weights."""
    empty = make_adapter(tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    good = make_adapter(tmp_path / "good")
    asked: list[tuple[str, dict[str, Any]]] = [
        (LOAD, {"lora_name": "", "lora_path": "x"}),
        (LOAD, {"lora_name": "chat", "lora_path": "x"}),
        (LOAD, {"lora_name": "x", "lora_path": "/nowhere"}),
        (LOAD, {"lora_name": "x", "lora_path": "/srv/nowhere"}),
        (LOAD, {"lora_name": "x", "lora_path": str(empty)}),
        (UNLOAD, {"lora_name": "x"}),
        (UNLOAD, {"lora_name": ""}),
        (LOAD, {"lora_name": "x", "lora_path": str(good)}),
        (LOAD, {"lora_name": "x", "lora_path": str(empty)}),
        (UNLOAD, {"lora_name": "x"}),
    ]
    real = [await adaptable.ask(path, body) for path, body in asked]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with fake.engine(*FLAGS, "--fake-grandchildren=1", env=env) as running:
        said = [await asyncio.to_thread(running.ask, path, body) for path, body in asked]
    assert said == real
    assert [status for status, _ in real] == [400, 400, 404, 404, 500, 404, 400, 200, 400, 200]


async def test_a_forgotten_one_whose_files_are_gone_ends_the_engine(adaptable: Adaptable, tmp_path: Path) -> None:
    """As it ends the fake, with the same answer: this is why adapters are given as snapshots that stay."""
    folder = make_adapter(tmp_path / "gone")
    for number in range(3):
        assert await adaptable.adapters.load(adaptable.place, f"g{number}", folder) is None
    shutil.rmtree(folder)
    asked = {"model": "g0", "prompt": PROMPT, "max_tokens": 1}
    real = await adaptable.ask("/v1/completions", asked)
    make_adapter(folder)
    with fake.engine(*FLAGS, env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as running:
        for number in range(3):
            await asyncio.to_thread(running.ask, LOAD, {"lora_name": f"g{number}", "lora_path": str(folder)})
        shutil.rmtree(folder)
        assert await asyncio.to_thread(running.ask, "/v1/completions", asked) == real
    assert real[0] == 500
