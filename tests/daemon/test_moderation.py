"""Texts are checked by a guard of the fleet: for `/v1/moderations`, and before requests to moderated models."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import aiohttp
import anthropic
import openai
import pytest
from openai.types.moderation import Categories
from pydantic import TypeAdapter

from tests.harness import Daemon, connected, daemon, fake_engines, port_block, request, until
from vllm_proxy.domain.keys import hash_of, new_key
from vllm_proxy.domain.moderation_resources import Moderations

MODERATIONS, CHAT = "/v1/moderations", "/v1/chat/completions"
GUARDS = {
    "llama": 'kind = "llama-guard"',
    "qwen": 'kind = "qwen3guard"',
    "judge": 'kind = "json"',
    "classes": 'kind = "classifier"\nclasses = ["safe", "toxic", "threat"]\n'
    '[moderation.categories]\ntoxic = ["hate", "harassment"]',
}
KINDS = {"llama": "llama-guard", "qwen": "qwen3guard", "judge": "json", "classes": "classifier"}
KEYS = {name: new_key(bytes([number]) * 32) for number, name in enumerate(("all", "chat", "few", "two", "private"))}
TABLES = "".join(
    f'[keys.{name}]\nhash = "{hash_of(KEYS[name])}"\n{more}\n'
    for name, more in {
        "all": "",
        "chat": 'models = ["chat"]',
        "few": "requests_per_minute = 2\nmax_in_flight = 1",
        "two": "requests_per_minute = 2",
        "private": "isolate_cache = true",
    }.items()
)
ANONYMOUS = '[keys.anonymous]\nscopes = ["inference", "read"]\n'
THREATENED = 'threat = ["violence"]'


def models() -> str:
    """A guard of each kind, a moderated model, and one that is not."""
    guards = "".join(
        f'[models.{name}]\nmodel = "org/{name}"\nargs = {{ fake_guard = "{kind}" }}\n' for name, kind in KINDS.items()
    )
    return f'{guards}[models.chat]\nmodel = "org/chat"\nmoderate = true\n[models.free]\nmodel = "org/free"\n'


def moderation(guard: str, more: str = "") -> str:
    """A `[moderation]` table."""
    return f'[moderation]\nmodel = "{guard}"\n{more}{GUARDS[guard]}\n'


class Moderated:
    """A running daemon, and how its file is written."""

    def __init__(self, running: Daemon, rest: str) -> None:
        self.daemon = running
        self._rest = rest

    async def guarded(self, guard: str, more: str = "") -> None:
        """Have this guard from now on."""
        self.daemon.save(moderation(guard, more) + self._rest)
        await self.daemon.adopts()


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Moderated]:
    """A daemon whose models are all ready, with keys."""
    rest = fake_engines(port_block()) + models() + TABLES + ANONYMOUS
    async with daemon(moderation("llama") + rest, tmp_path_factory.mktemp("moderation")) as running:
        await running.all_ready()
        yield Moderated(running, rest)


@pytest.fixture
async def running(shared: Moderated) -> Daemon:
    """The same, with Llama Guard."""
    await shared.guarded("llama")
    return shared.daemon


def client(running: Daemon, key: str = "all") -> openai.AsyncOpenAI:
    """OpenAI's own."""
    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEYS[key], max_retries=0)


async def ask(running: Daemon, path: str, body: Any, status: int = 200, key: str | None = None) -> Any:  # noqa: ANN401 - JSON
    """The answer, its status checked; of an error what is in it."""
    headers = {"Authorization": f"Bearer {KEYS[key]}"} if key else {}
    async with running.session.post(path, json=body, headers=headers) as answer:
        assert answer.status == status, await answer.text()
        found = await answer.json()
        return found if status == 200 else found["error"]


def said(text: object, **more: object) -> dict[str, object]:
    """A chat whose last user turn is that."""
    return {"model": "chat", "messages": [{"role": "user", "content": text}], **more}


async def seen(running: Daemon, model: str) -> list[Any]:
    """The questions and requests that a model's engine saw."""
    (port,) = await running.ports(model)
    async with running.session.get(f"http://127.0.0.1:{port}/fake/seen") as answer:
        return [one for one in await answer.json() if one["method"] == "POST"]


# /v1/moderations


async def test_openais_client_reads_every_verdict(running: Daemon) -> None:
    """All 13 categories with scores, whatever the model is called that it asks for."""
    async with client(running) as asks:
        found = await asks.moderations.create(input="something bad", model="omni-moderation-latest")
        (one,) = found.results
        assert (found.model, one.flagged) == ("llama", True)
        assert {name for name, is_so in one.categories.model_dump(by_alias=True).items() if is_so} == {
            "violence", "hate",
        }  # fmt: skip
        assert one.category_scores.violence == one.category_scores.hate == pytest.approx(0.9)
        assert one.category_scores.sexual == 0
        assert one.category_applied_input_types.violence == ["text"]
        assert one.to_dict()["labels"] == ["S1", "S10"]
        several = await asks.moderations.create(input=["fine", "bad", "fine too"])
        assert [one.flagged for one in several.results] == [False, True, False]
        parts: Any = [{"type": "text", "text": "fine"}, {"type": "text", "text": "bad"}]
        (together,) = (await asks.moderations.create(input=parts)).results
        assert together.flagged


async def test_an_answer_has_all_thirteen_keys(running: Daemon) -> None:
    """Those of OpenAI's own types, `illicit` among them."""
    found = await ask(running, MODERATIONS, {"input": "fine"})
    TypeAdapter(Moderations).validate_python(found, strict=True, extra="forbid")
    assert found.keys() == {"id", "model", "results"}
    (one,) = found["results"]
    assert one.keys() == {"flagged", "categories", "category_scores", "category_applied_input_types", "labels"}
    names = {field.alias or name for name, field in Categories.model_fields.items()}
    assert one["categories"].keys() == one["category_scores"].keys() == one["category_applied_input_types"].keys()
    assert one["categories"].keys() == names
    assert len(names) == 13


@pytest.mark.parametrize(
    ("guard", "scores", "labels"),
    [
        ("llama", {"violence": 0.9, "hate": 0.9}, ["S1", "S10"]),
        ("qwen", {"violence": 0.925}, ["Violent"]),
        ("judge", {"violence": 0.9}, ["violence"]),
        ("classes", {"hate": 0.9, "harassment": 0.9}, ["toxic"]),
    ],
)
async def test_each_kind_of_guard_gives_its_verdict(
    shared: Moderated, guard: str, scores: dict[str, float], labels: list[str]
) -> None:
    """Another guard is a live change: no engine is started for it."""
    pids = [await shared.daemon.pids(name) for name in GUARDS]
    await shared.guarded(guard)
    found = await ask(shared.daemon, MODERATIONS, {"input": ["fine", "bad"]})
    assert found["model"] == guard
    fine, bad = found["results"]
    assert (fine["flagged"], fine["labels"]) == (False, [])
    assert (bad["flagged"], bad["labels"]) == (True, labels)
    assert {name: score for name, score in bad["category_scores"].items() if score >= 0.5} == pytest.approx(scores)
    assert [await shared.daemon.pids(name) for name in GUARDS] == pids


async def test_a_label_without_a_category_flags_alone_and_a_threshold_decides(shared: Moderated) -> None:
    """A threat of 0.9 has no category until the file gives it one; from 0.95 on it is none."""
    await shared.guarded("classes")
    (one,) = (await ask(shared.daemon, MODERATIONS, {"input": "odd"}))["results"]
    assert (one["flagged"], one["labels"], any(one["categories"].values())) == (True, ["threat"], False)
    await shared.guarded("classes", "threshold = 0.95\n")
    (one,) = (await ask(shared.daemon, MODERATIONS, {"input": "odd"}))["results"]
    assert (one["flagged"], one["labels"]) == (False, [])


async def test_sixteen_texts_of_a_request_are_asked_about_at_once(running: Daemon, tmp_path: Path) -> None:
    """The seventeenth waits for one of them; each text is one request to the guard, and the answer is in order."""
    gate = tmp_path / "gate"
    before = len(await seen(running, "llama"))
    texts = [f"{'bad' if number % 3 else 'fine'} {number} fault:hold={gate}" for number in range(40)]
    asking = asyncio.create_task(ask(running, MODERATIONS, {"input": texts}))

    async def begun() -> int:
        return len(await seen(running, "llama")) - before

    await until(begun, lambda count: count == 16)
    in_flight = await running.get("/models/llama")
    assert in_flight["status"]["in_flight"] == 16
    gate.touch()
    found = await asking
    assert [one["flagged"] for one in found["results"]] == [number % 3 > 0 for number in range(40)]
    assert await begun() == 40


async def test_a_client_that_leaves_aborts_its_questions(running: Daemon, tmp_path: Path) -> None:
    """All that are in flight, and no other is asked any more."""
    texts = [f"{uuid.uuid4()} fault:hold={tmp_path / 'never'}" for _ in range(20)]
    before = len(await seen(running, "llama"))
    async with connected(running.port) as leaving:
        await leaving.send(request(MODERATIONS, json.dumps({"input": texts}).encode()))
        await until(lambda: seen(running, "llama"), lambda found: len(found) == before + 16)
    found = await until(
        lambda: seen(running, "llama"), lambda found: all(one["state"] != "open" for one in found[before:])
    )
    assert [one["state"] for one in found[before:]] == ["gone"] * 16
    await running.eventually("/models/llama", lambda found: found["status"]["in_flight"] == 0)


@pytest.mark.parametrize(
    ("text", "status", "code", "words"),
    [
        ("fault:garbage", 502, "engine_failed", "cannot read what llama/0 says: it is no verdict"),
        ("fault:mute", 502, "engine_failed", "it tells no probability of its verdict"),
        ("fault:broken", 502, "engine_failed", "llama/0 says 500"),
        ("fault:long", 400, "bad_request", "maximum context length is 512 tokens"),
    ],
)
async def test_what_cannot_be_read_is_an_error_and_never_safe(
    running: Daemon, text: str, status: int, code: str, words: str
) -> None:
    """Nor are the texts beside it answered; before a moderated model it is 503, and the model is not asked."""
    error = await ask(running, MODERATIONS, {"input": ["fine", text]}, status)
    assert error["code"] == code
    assert words in error["message"]
    before = len(await seen(running, "chat"))
    error = await ask(running, CHAT, said(text), 503)
    assert error["code"] == "moderation_unavailable"
    assert words in error["message"]
    assert len(await seen(running, "chat")) == before


@pytest.mark.parametrize(
    "body",
    [{}, [], {"input": None}, {"input": []}, {"input": 7}, {"input": [1, 2]}, {"input": ["a", {"type": "text"}]},
     {"input": [{"type": "image_url", "image_url": {"url": "data:"}}]}, {"input": ["x"] * 1025}],
)  # fmt: skip
async def test_input_that_is_no_text_is_refused(running: Daemon, body: object) -> None:
    """400, with what was expected; the guard is not asked."""
    before = len(await seen(running, "llama"))
    error = await ask(running, MODERATIONS, body, 400)
    assert (error["code"], error["param"]) == ("bad_request", "input")
    assert len(await seen(running, "llama")) == before


# Who may, and what it counts as


async def test_a_key_needs_the_guard_to_ask_it_and_not_to_be_checked(running: Daemon) -> None:
    """Its globs say which models it may use; that a moderated one is checked is not up to it."""
    error = await ask(running, MODERATIONS, {"input": "fine"}, 404, "chat")
    assert error["code"] == "model_not_found"
    await ask(running, CHAT, said("fine"), key="chat")
    error = await ask(running, CHAT, said("bad"), 400, "chat")
    assert error["code"] == "content_filter"


async def used(running: Daemon) -> dict[str, int]:
    """What the key that may use everything had of the guard."""
    rows = (await running.get("/usage?by=key,model"))["rows"]
    found = [one for one in rows if (one["key"], one["model"]) == ("all", "llama")]
    names = ("requests", "prompt_tokens", "completion_tokens", "estimated_tokens")
    return {name: found[0][name] if found else 0 for name in names}


async def test_what_a_guard_used_counts_for_it_under_the_callers_key(running: Daemon) -> None:
    """One request for each of the clients', and the tokens of all questions: those of checks too."""
    before = await used(running)
    await ask(running, MODERATIONS, {"input": ["fine", "bad", "fine"]}, key="all")
    await ask(running, CHAT, said("fine"), key="all")
    await ask(running, CHAT, said("bad"), 400, key="all")
    after = await used(running)
    assert {name: after[name] - before[name] for name in after} == {
        "requests": 3, "prompt_tokens": 15, "completion_tokens": 10, "estimated_tokens": 0,
    }  # fmt: skip


@pytest.mark.parametrize("path", [MODERATIONS, CHAT])
async def test_who_leaves_while_the_guard_works_pays_for_the_question(
    running: Daemon, tmp_path: Path, path: str
) -> None:
    """By its size (4,000 bytes), since the guard does not tell any more what it used."""
    before, asked = await used(running), len(await seen(running, "llama"))
    text = f"fault:hold={tmp_path / 'never'}" + " and so on" * 400
    body = json.dumps({"input": text} if path == MODERATIONS else said(text)).encode()
    async with connected(running.port) as leaving:
        await leaving.send(request(path, body, f"Authorization: Bearer {KEYS['all']}"))
        await until(lambda: seen(running, "llama"), lambda found: len(found) == asked + 1)
    after = await until(lambda: used(running), lambda found: found["requests"] > before["requests"])
    more = {name: after[name] - before[name] for name in after}
    assert 300 < more.pop("estimated_tokens") < 2000
    assert more == {"requests": 1, "prompt_tokens": 0, "completion_tokens": 0}


async def test_limits_count_a_request_whatever_number_of_texts_it_has(running: Daemon) -> None:
    """Three texts are one request and one in flight; the third request in a minute is refused, and none is asked."""
    headers = {"Authorization": f"Bearer {KEYS['few']}"}
    for left in ("1", "0"):
        async with running.session.post(MODERATIONS, json={"input": ["a", "b", "c"]}, headers=headers) as answer:
            assert answer.status == 200
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert answer.headers["X-Vllm-Proxy-Model"] == "llama"
    before = len(await seen(running, "llama"))
    error = await ask(running, MODERATIONS, {"input": "a"}, 429, "few")
    assert error["code"] == "rate_limit_exceeded"
    assert len(await seen(running, "llama")) == before


async def test_a_check_is_no_request_to_the_limits_of_its_key(running: Daemon) -> None:
    """Two chats of a key that may have two a minute are both answered, though the guard was asked twice as well."""
    for _ in range(2):
        await ask(running, CHAT, said("fine"), key="two")
    before = len(await seen(running, "llama"))
    await ask(running, CHAT, said("fine"), 429, "two")
    assert len(await seen(running, "llama")) == before


async def test_an_isolated_keys_texts_share_no_cache(running: Daemon) -> None:
    """The guard gets a salt with each of them."""
    await ask(running, MODERATIONS, {"input": "fine"}, key="private")
    await ask(running, CHAT, said("fine"), key="private")
    first, second = (json.loads(one["body"]) for one in (await seen(running, "llama"))[-2:])
    assert first["cache_salt"] == second["cache_salt"]
    assert len(first["cache_salt"]) == 64


# Moderated models


TURNS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, said("bad")),
    (CHAT, said("bad", stream=True)),
    (CHAT, said([{"type": "text", "text": "so"}, {"type": "text", "text": "bad"}])),
    (CHAT, said("x", messages=[{"role": "user", "content": "bad"}, {"role": "user", "content": "so"}])),
    (CHAT, said("x", messages=[{"role": "user", "content": "bad"}, {"role": "assistant", "content": "so"}])),
    (CHAT, said("x", messages=[{"role": "system", "content": "bad"}])),
    ("/v1/chat/completions/batch", said("x", messages=[[{"role": "user", "content": one}] for one in ("a", "bad")])),
    ("/v1/completions", {"model": "chat", "prompt": "bad"}),
    ("/v1/completions", {"model": "chat", "prompt": ["fine", "bad"]}),
    ("/v1/responses", {"model": "chat", "input": "bad"}),
    ("/v1/responses",
     {"model": "chat", "input": [{"role": "user", "content": [{"type": "input_text", "text": "bad"}]}]}),
    ("/v1/messages", said([{"type": "text", "text": "bad"}], max_tokens=5)),
    ("/v1/messages", said([{"type": "tool_result", "tool_use_id": "t", "content": "bad"}], max_tokens=5)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), TURNS)
async def test_what_the_guard_flags_does_not_reach_a_moderated_model(
    running: Daemon, path: str, body: dict[str, Any]
) -> None:
    """400 `content_filter`, on every route that generates, with what the guard calls it."""
    before = len(await seen(running, "chat"))
    error = await ask(running, path, body, 400)
    if path != "/v1/messages":
        assert error["code"] == "content_filter"
    assert "hate, violence; S1, S10" in error["message"]
    assert len(await seen(running, "chat")) == before
    async with running.session.post(path, json={**body, "model": "free"}) as answer:
        assert answer.status == 200  # nobody checks this one


async def test_what_passes_reaches_the_model_as_it_came(running: Daemon) -> None:
    """Byte for byte; earlier turns are not looked at, and a route that generates nothing is not checked."""
    body = json.dumps(
        {"model": "chat", "messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "no"},
                                       {"role": "user", "content": "fine"}]}, indent=3,
    ).encode()  # fmt: skip
    async with running.session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as answer:
        assert answer.status == 200
        assert answer.headers["X-Vllm-Proxy-Model"] == "chat"
        assert answer.headers["X-Vllm-Proxy-Instance"] == "chat/0"
    assert (await seen(running, "chat"))[-1]["body"] == body.decode()
    assert json.loads((await seen(running, "llama"))[-1]["body"])["messages"] == [{"role": "user", "content": "fine"}]
    before = len(await seen(running, "llama"))
    await ask(running, "/v1/embeddings", {"model": "chat", "input": "bad"})
    await ask(running, "/tokenize", {"model": "chat", "prompt": "bad"})
    assert len(await seen(running, "llama")) == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}),
        ("/v1/completions", {"prompt": "fine", "prompt_embeds": "AAAA"}),
        (CHAT, said([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])),
        (CHAT, said([{"type": "text", "text": "fine"}, {"type": "input_audio", "input_audio": {}}])),
        (CHAT, said([{"text": "fine"}])),
        (CHAT, said({"text": "fine"})),
        (CHAT, said("x", messages=["fine"])),
        (CHAT, said("x", messages="fine")),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ],
)
async def test_what_cannot_be_checked_is_refused(running: Daemon, path: str, body: dict[str, Any]) -> None:
    """Token ids, embeddings, images and audio are no way around the guard: 400, and neither engine is asked."""
    before = [len(await seen(running, model)) for model in ("chat", "llama")]
    error = await ask(running, path, {"model": "chat", **body}, 400)
    assert error["code"] == "bad_request"
    assert "its guard reads text alone" in error["message"]
    assert [len(await seen(running, model)) for model in ("chat", "llama")] == before


async def test_speech_is_refused_by_a_moderated_model(running: Daemon) -> None:
    """Nobody reads it before the model does."""
    form = aiohttp.FormData({"model": "chat"})
    form.add_field("file", b"RIFF", filename="speech.wav")
    async with running.session.post("/v1/audio/transcriptions", data=form) as answer:
        assert answer.status == 400
        assert "its guard reads text alone" in (await answer.json())["error"]["message"]
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await running.session.ws_connect(f"{running.url}/v1/realtime?model=chat")
    assert refused.value.status == 400
    async with running.session.ws_connect(f"{running.url}/v1/realtime") as session:
        await session.receive_json()
        await session.send_json({"type": "session.update", "model": "chat"})
        assert "its guard reads text alone" in (await session.receive_json())["error"]["message"]


async def test_a_check_ends_with_its_client(running: Daemon, tmp_path: Path) -> None:
    """The guard stops working on it, and the model is never asked."""
    before, chats = len(await seen(running, "llama")), len(await seen(running, "chat"))
    async with connected(running.port) as leaving:
        await leaving.send(request(CHAT, json.dumps(said(f"fault:hold={tmp_path / 'never'}")).encode()))
        await until(lambda: seen(running, "llama"), lambda found: len(found) == before + 1)
    found = await until(lambda: seen(running, "llama"), lambda found: found[-1]["state"] != "open")
    assert found[-1]["state"] == "gone"
    assert len(await seen(running, "chat")) == chats


async def test_clients_raise_what_their_api_has(running: Daemon) -> None:
    """OpenAI's and Anthropic's own."""
    async with client(running) as asks:
        with pytest.raises(openai.BadRequestError) as found:
            await asks.chat.completions.create(model="chat", messages=[{"role": "user", "content": "bad"}])
        assert found.value.code == "content_filter"
    async with anthropic.AsyncAnthropic(base_url=running.url, api_key=KEYS["all"], max_retries=0) as other:
        with pytest.raises(anthropic.BadRequestError):
            await other.messages.create(model="chat", max_tokens=5, messages=[{"role": "user", "content": "bad"}])


# The file


@asynccontextmanager
async def one_guard(folder: Path, more: str = "", moderated: str = "") -> AsyncIterator[Daemon]:
    """A daemon of its own."""
    text = (
        f'{moderation("llama")}{fake_engines(port_block())}[models.llama]\nmodel = "x"\n'
        f'args = {{ fake_guard = "llama-guard" }}\n{more}[models.chat]\nmodel = "y"\n{moderated}'
    )
    async with daemon(text, folder) as running:
        await running.all_ready()
        yield running


async def test_without_a_guard_it_is_not_offered_and_says_what_to_write(tmp_path: Path) -> None:
    """501; a model is moderated live, and not without a guard; the guard cannot go while one is."""
    async with one_guard(tmp_path) as running:
        pids = await running.pids("chat")
        await running.write("PATCH", "/models/chat", {"moderate": True})
        assert (await ask(running, CHAT, said("bad"), 400))["code"] == "content_filter"
        assert await running.pids("chat") == pids
        refused = await running.write("DELETE", "/models/llama", status=422)
        assert refused["error"]["problems"][0]["path"] == "moderation.model"
        await running.write("PATCH", "/models/chat", {"moderate": None})
        await ask(running, CHAT, said("bad"))
        running.edit(moderation("llama"), "")
        await running.adopts()
        error = await ask(running, MODERATIONS, {"input": "x"}, 501)
        assert error["code"] == "unsupported_endpoint"
        assert '[moderation]\nmodel = "guard"\nkind = "llama-guard"' in error["message"]
        refused = await running.write("PATCH", "/models/chat", {"moderate": True}, 422)
        assert refused["error"]["problems"][0]["path"] == "models.chat.moderate"


async def test_a_guard_that_does_not_serve_lets_nothing_pass(tmp_path: Path) -> None:
    """Stopped by hand: 503 of either kind; and back again."""
    async with one_guard(tmp_path, moderated="moderate = true\n") as running:
        await running.write("POST", "/models/llama/stop", status=202)
        await running.eventually("/models/llama", lambda found: found["status"]["state"] == "stopped")
        assert (await ask(running, MODERATIONS, {"input": "x"}, 503))["code"] == "model_stopped"
        error = await ask(running, CHAT, said("fine"), 503)
        assert error["code"] == "moderation_unavailable"
        assert "stopped by hand" in error["message"]
        await running.write("POST", "/models/llama/start", status=202)
        await ask(running, CHAT, said("fine"))  # it waits in the guard's queue


async def test_a_question_whose_engine_dies_is_asked_again_elsewhere(tmp_path: Path) -> None:
    """It may be: nothing comes of a question but its verdict."""
    async with one_guard(tmp_path, "replicas = 2\n") as running:
        found = await ask(running, MODERATIONS, {"input": f"bad fault:once={tmp_path / 'died'}"})
        assert found["results"][0]["flagged"]
        assert (tmp_path / "died").exists()


async def test_a_guard_has_a_deadline_and_so_has_the_model(tmp_path: Path) -> None:
    """504 of its own route, 503 before another; the moderated model's deadline counts the check."""
    async with one_guard(tmp_path, 'request_timeout = "300ms"\n', "moderate = true\n") as running:
        hold = f"fault:hold={tmp_path / 'never'}"
        assert (await ask(running, MODERATIONS, {"input": hold}, 504))["code"] == "request_timeout"
        assert (await ask(running, CHAT, said(hold), 503))["code"] == "moderation_unavailable"
        await running.write("PATCH", "/models/llama", {"request_timeout": 0})
        await running.write("PATCH", "/models/chat", {"request_timeout": "300ms"})
        assert (await ask(running, CHAT, said(hold), 504))["code"] == "request_timeout"


async def test_questions_take_their_turn_in_vllms_own_queue(tmp_path: Path) -> None:
    """With the number of their key: in the header of a chat, and in the body of `/classify`, which reads no header."""
    text = (
        f"[server]\nfair = true\n{fake_engines(port_block())}{moderation('llama')}{models()}{TABLES}"
        '[keys.urgent]\nfile = "key"\npriority = 2\n'
    )
    key = new_key(bytes([77]) * 32)
    (tmp_path / "key").write_text(key)
    headers = {"Authorization": f"Bearer {key}"}
    async with daemon(text, tmp_path) as running:
        await running.all_ready()
        found = Moderated(running, text.partition(moderation("llama"))[0] + text.partition(moderation("llama"))[2])
        for guard in ("llama", "classes"):
            await found.guarded(guard)
            for path, body in ((MODERATIONS, {"input": "fine"}), (CHAT, said("fine"))):
                async with running.session.post(path, json=body, headers=headers) as answer:
                    assert answer.status == 200
                question = (await seen(running, guard))[-1]
                numbers = [int(value) for name, value in question["headers"] if name == "X-Vllm-Priority"]
                assert -2 * 2**40 <= numbers[0] < -(2**40)
                assert json.loads(question["body"]).get("priority", numbers[0]) == numbers[0]
                assert ("priority" in json.loads(question["body"])) == (guard == "classes")


def test_the_types_of_openais_client_are_those_of_the_answer() -> None:
    """Its categories have no optional ones but two."""
    optional = {name for name, field in Categories.model_fields.items() if type(None) in get_args(field.annotation)}
    assert optional == {"illicit", "illicit_violent"}
