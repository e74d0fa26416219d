"""Which requests reach an engine, and which never do: contract section 4, through a real daemon and fake engines."""

import io
import textwrap
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.harness import Daemon, connected, daemon, fake_engines, memory, port_block, request
from vllm_proxy import __version__
from vllm_proxy.traffic import routes

MODELS = """
[server]
max_body_size = "32MiB"
[models.chat]
model = "org/chat"
replicas = 2
aliases = ["an-alias-longer-than-the-id"]
[models.other]
model = "org/other"
[models.talk]
model = "org/talk"
aliases = ["gpt"]
args = { fake_tasks = "generate" }
[models.vectors]
model = "org/vectors"
args = { fake_tasks = "embed" }
"""
JSON_ROUTES = (
    "/v1/chat/completions /v1/chat/completions/batch /v1/completions /v1/embeddings /v1/responses /v1/messages "
    "/v1/messages/count_tokens /v1/rerank /rerank /v2/rerank /v1/score /score /generative_scoring /classify /pooling "
    "/tokenize /detokenize /v2/embed"
).split()
FORM_ROUTES = ("/v1/audio/transcriptions", "/v1/audio/translations")
# Every other path of vLLM 0.32, its development and SageMaker routes included.
ENGINE_ONLY = (
    "/sleep /wake_up /is_sleeping /collective_rpc /v1/load_lora_adapter /v1/unload_lora_adapter /invocations /ping "
    "/server_info /load /secret /abort_requests /pause /resume /is_paused /start_profile "
    "/stop_profile /reset_prefix_cache /reset_mm_cache /reset_encoder_cache /get_world_size /update_weights "
    "/init_weight_transfer_engine /scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply "
    "/fault_tolerance/status /inference/v1/generate /cohere/v2/chat /v1/systemone "
    "/v1/chat/completions/render /v1/chat/completions/derender /v1/completions/render "
    "/v1/messages/render /v1/responses/render /kv_event_sources /release_kv_cache_memory /weight_info /weight_checker "
    "/fake/seen"
).split()
UNSUPPORTED = (
    "/v1/moderations /v1/images/generations /v1/images/edits /v1/audio/speech /v1/assistants /v1/assistants/a "
    "/v1/threads /v1/threads/t/runs /v1/fine_tuning/jobs /v1/files /v1/files/f/content /v1/batches /v1/batches/b "
    "/v1/uploads /v1/uploads/u/parts /v1/vector_stores /v1/vector_stores/v/search"
).split()


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("routes")) as running:
        await running.all_ready()
        yield running


def form(*parts: tuple[str, bytes], boundary: str = "b0undary", end: bool = True) -> bytes:
    """A multipart form; a part's first half is what stands behind `form-data; `."""
    pieces = [
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
        for head, value in parts
    ]
    return b"".join(pieces) + (f"--{boundary}--\r\n".encode() if end else b"")


async def send_form(
    running: Daemon, body: bytes, kind: str = "multipart/form-data; boundary=b0undary", path: str = FORM_ROUTES[0]
) -> tuple[int, dict[str, object], str]:
    """Status, answer and request id."""
    request_id = uuid.uuid4().hex
    headers = {"Content-Type": kind, "X-Request-Id": request_id, "X-Vllm-Priority": "-9", "X-data-parallel-rank": "0"}
    async with running.session.post(path, data=io.BytesIO(body), headers=headers) as answer:
        return answer.status, await answer.json(), request_id


def test_the_table_is_the_contracts() -> None:
    """The routes that find their model in a body are those of contract section 4 and no others."""
    assert sorted(routes.paths("json")) == sorted(JSON_ROUTES)
    assert sorted(routes.paths("form")) == sorted(FORM_ROUTES)


@pytest.mark.parametrize("path", JSON_ROUTES)
@pytest.mark.parametrize("model", ["chat", "an-alias-longer-than-the-id"])
async def test_a_json_route_reaches_an_engine_that_serves_its_model(shared: Daemon, path: str, model: str) -> None:
    """Same method and path, a query too; an alias arrives as the id."""
    answer = await shared.post(path + "?beta=true", {"x": [1, None], "model": model, "fake": {"echo": True}})
    assert (answer["method"], answer["path"]) == ("POST", path + "?beta=true")
    assert answer["body"].replace(" ", "") == '{"x":[1,null],"model":"chat","fake":{"echo":true}}'
    assert answer["pid"] in await shared.pids("chat")


async def test_each_model_has_engines_of_its_own(shared: Daemon) -> None:
    """A request goes to an engine of the model that it names, and the answer says to which."""
    body = {"model": "other", "fake": {"echo": True}}
    async with shared.session.post("/v1/completions", json=body) as answer:
        assert [(await answer.json())["pid"]] == await shared.pids("other")
        assert answer.headers["X-Vllm-Proxy-Model"] == "other"
        assert answer.headers["X-Vllm-Proxy-Instance"] == "other/0"


@pytest.mark.parametrize(
    ("model", "path", "can"),
    [
        ("talk", "/v1/embeddings", "generate (/v1/completions, /v1/chat/completions, /v1/responses, /v1/messages)"),
        ("gpt", "/v2/embed", "generate (/v1/completions, /v1/chat/completions, /v1/responses, /v1/messages)"),
        ("vectors", "/v1/chat/completions", "embed (/v1/embeddings, /v2/embed)"),
    ],
)
async def test_what_a_model_of_another_kind_is_asked_is_404_with_what_it_can(
    shared: Daemon, model: str, path: str, can: str
) -> None:
    """In the envelope of OpenAI's API, the connection to the engine going on; vLLM has no body that clients know."""
    for _ in range(2):
        async with shared.session.post(path, json={"model": model, "input": "x"}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (404, "not_found", "model")
            assert answer.headers["X-Vllm-Proxy-Model"] == {"gpt": "talk"}.get(model, model)
        assert error["message"].startswith(f"cannot POST {path}: ")
        assert error["message"].endswith(f"its tasks are {can}")


async def test_anthropics_clients_read_it_in_their_envelope(shared: Daemon) -> None:
    """As all below /v1/messages."""
    async with shared.session.post("/v1/messages", json={"model": "vectors", "messages": []}) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["type"], error["code"]) == (404, "not_found_error", "not_found")


async def test_the_list_of_models_says_what_each_can(shared: Daemon) -> None:
    """As its engine says, of aliases as of models; nothing of one that does not say."""
    cards = (await shared.get("/v1/models"))["data"]
    assert {card["id"]: card.get("tasks") for card in cards} == {
        "chat": None,
        "an-alias-longer-than-the-id": None,
        "other": None,
        "talk": ["generate"],
        "gpt": ["generate"],
        "vectors": ["embed"],
    }
    assert (await shared.get("/v1/models/vectors"))["tasks"] == ["embed"]


async def test_an_alias_changes_the_name_and_not_one_other_byte(shared: Daemon) -> None:
    """Numbers keep their digits, texts their escapes, and spaces stay; only the name is another."""
    body = rb'{"n": 1.000000000000000000001e400, "s": "\u00e9\/", "model": "an-alias-longer-than-the-id", "e": 1E0,'
    body += b' "fake": {"echo": 1}}'
    answer = await shared.post("/v1/completions", body)
    assert answer["body"].encode() == body.replace(b"an-alias-longer-than-the-id", b"chat")


@pytest.mark.parametrize("path", FORM_ROUTES)
@pytest.mark.parametrize("where", ["first", "last", "between"])
async def test_a_form_goes_to_the_model_that_its_field_names_byte_for_byte(
    shared: Daemon, path: str, where: str
) -> None:
    """Wherever the field stands; binary parts and line ends stay as they are."""
    fields = [('name="file"; filename="a.wav"', bytes(range(256)) * 20), ('name="language"', b"en")]
    fields.insert({"first": 0, "between": 1, "last": 2}[where], ('name="model"', b"chat"))
    body = form(*fields)
    status, _, request_id = await send_form(shared, body, path=path)
    assert status == 200
    (seen,) = await shared.seen(request_id)
    assert (seen["path"], seen["body"].encode("latin-1")) == (path, body)
    assert not {name.lower() for name, _ in seen["headers"]} & {"x-vllm-priority", "x-data-parallel-rank"}


@pytest.mark.parametrize("where", [0, 2])
async def test_an_alias_in_a_form_is_rewritten_and_every_other_byte_kept(shared: Daemon, where: int) -> None:
    """The same bytes with the id in the alias's place, and a Content-Length that fits."""
    fields = [('name="file"; filename="an-alias-longer-than-the-id"', b"\r\n--b0undar\0" * 9), ('name="x"', b"chat")]
    alias = [*fields]
    alias.insert(where, ('name="model"', b"an-alias-longer-than-the-id"))
    fields.insert(where, ('name="model"', b"chat"))
    status, _, request_id = await send_form(shared, form(*alias))
    assert status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["body"].encode("latin-1") == form(*fields)
    assert ["Content-Length", str(len(form(*fields)))] in seen["headers"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (form(('name="file"', b"x")), 400, "missing_model"),
        (form(('name="model"', b"")), 400, "missing_model"),
        (form(('name="model"', b"nobody")), 404, "model_not_found"),
        (form(('name="model"', b"m" * 5000)), 400, "missing_model"),
        (form(('name="model"', b"chat"), end=False), 400, "bad_request"),
        (form(('name="model"', b"chat"), ('name="file"', b"x"))[:-30], 400, "bad_request"),
        (b"no form at all", 400, "bad_request"),
        (b"", 400, "bad_request"),
        (form(('name="model"', b"ch\xffat")), 400, "bad_request"),
    ],
    ids="none empty unknown endless unended cut garbage nothing no-text".split(),
)
async def test_a_form_that_cannot_be_routed(shared: Daemon, body: bytes, status: int, code: str) -> None:
    """Each gets its code in the envelope, and no engine sees it."""
    found, answer, request_id = await send_form(shared, body)
    error = answer["error"]
    assert isinstance(error, dict)
    assert (found, error["code"]) == (status, code)
    assert error["message"].startswith("cannot ")
    assert await shared.seen(request_id) == []


@pytest.mark.parametrize(
    "kind", "application/json multipart/form-data application/x-www-form-urlencoded multipart/mixed;boundary=b".split()
)
async def test_a_form_route_takes_multipart_forms_alone(shared: Daemon, kind: str) -> None:
    """415 for another content type, and for a form without a boundary."""
    status, answer, _ = await send_form(shared, form(('name="model"', b"chat")), kind)
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")  # type: ignore[index] # the envelope


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_form_over_the_limit_is_413(shared: Daemon, chunked: bool) -> None:  # noqa: FBT001 - a parameter
    """By its declared length before it is read, and by its bytes where none is declared."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {33 * 2**20}"
    head = request(FORM_ROUTES[0], b"", framing, "Content-Type: multipart/form-data; boundary=b0undary")
    head = head.replace(b"Content-Type: application/json\r\n", b"")
    async with connected(shared.port) as client:
        await client.send(head)
        piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        if chunked:
            await client.send(b"%x\r\n" % len(start := form(('name="model"', b"chat"), end=False)) + start + b"\r\n")
            await client.send(
                b"100000\r\n--b0undary\r\nContent-Disposition: form-data; name=f\r\n\r\n".ljust(2**20 + 8)
            )
            await client.send(b"\r\n" + piece * 33)
        answer = await client.answer()
    assert answer.status == 413
    assert b'"request_too_large"' in answer.body


async def test_an_upload_is_not_held_in_memory(shared: Daemon) -> None:
    """While 24 MB pass through, the daemon grows by a fraction of that, and they arrive whole."""
    await send_form(shared, form(('name="model"', b"chat"), ('name="file"', b"\0" * 3 * 2**20)))  # threads and buffers
    body = form(('name="file"', bytes(range(256)) * 4 * 1024 * 24), ('name="model"', b"an-alias-longer-than-the-id"))
    pid = shared.process.pid
    before = memory(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the highest
    status, _, request_id = await send_form(shared, body)
    assert status == 200
    assert memory(pid, "VmHWM") - before < 6 * 2**20
    (seen,) = await shared.seen(request_id)
    assert seen["size"] == len(body) - len("an-alias-longer-than-the-id") + len("chat")


async def test_a_stored_response_is_found_in_the_instance_that_knows_it(shared: Daemon) -> None:
    """GET and cancel go to whichever instance made the response."""
    pids: set[int] = set()
    while len(pids) < 2:
        made = await shared.post("/v1/responses", {"model": "chat", "input": "hi"})
        found = await shared.get(f"/v1/responses/{made['id']}")
        cancelled = await shared.post(f"/v1/responses/{made['id']}/cancel", b"")
        assert made["id"].split("_")[1] == str(found["pid"]) == str(cancelled["pid"])
        assert (found["status"], cancelled["status"]) == ("completed", "cancelled")
        pids.add(found["pid"])
    assert pids == set(await shared.pids("chat"))


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/responses/r"), ("POST", "/v1/responses/r/cancel")])
async def test_a_response_that_no_instance_knows_is_404(shared: Daemon, method: str, path: str) -> None:
    """After every instance of every model was asked, once each."""
    request_id = uuid.uuid4().hex
    async with shared.session.request(method, path, headers={"X-Request-Id": request_id}) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "not_found"
    asked = await shared.seen(request_id) + await shared.seen(request_id, "other")
    assert sorted(seen["pid"] for seen in asked) == sorted(await shared.pids("chat") + await shared.pids("other"))
    assert {(seen["method"], seen["path"]) for seen in asked} == {(method, path)}


async def test_a_tokenizer_is_shown_by_an_engine_that_offers_it(tmp_path: Path) -> None:
    """Of the model in the query, under any name of it; 404 says how another engine would, and which model there is."""
    models = """
    [models.open]
    model = "org/open"
    aliases = ["also"]
    args = { enable-tokenizer-info-endpoint = true }
    [models.closed]
    model = "org/closed"
    """
    async with daemon(fake_engines(port_block()) + textwrap.dedent(models), tmp_path) as running:
        await running.all_ready()
        for name in ("open", "also"):
            assert await running.get(f"/tokenizer_info?model={name}") == {"tokenizer_class": "FakeTokenizer"}
        refused = (await running.get("/tokenizer_info?model=closed", 404))["error"]
        assert (refused["code"], refused["param"]) == ("not_found", "model")
        assert "args.enable-tokenizer-info-endpoint = true" in refused["message"]
        assert (await running.get("/tokenizer_info?model=nobody", 404))["error"]["code"] == "model_not_found"
        unnamed = (await running.get("/tokenizer_info", 400))["error"]
        assert (unnamed["code"], "its query (?model=) names no model" in unnamed["message"]) == ("missing_model", True)


async def test_the_version_is_vllms_and_the_daemons(shared: Daemon) -> None:
    """`version` as vLLM has it, of the engines' program where that is known; the daemon's own stands beside it."""
    assert await shared.get("/version") == {"version": "", "vllm_proxy": __version__}, "a fake has none"


@pytest.mark.parametrize("path", UNSUPPORTED)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_what_openai_offers_and_nobody_here_says_so(shared: Daemon, method: str, path: str) -> None:
    """501 `unsupported_endpoint`, not a 404 that looks like a typing error."""
    async with shared.session.request(method, path, json={"model": "chat"}) as answer:
        assert answer.status == 501
        assert (await answer.json())["error"]["code"] == "unsupported_endpoint"


def spellings(path: str) -> list[str]:
    """Ways to write a path that some servers take for it."""
    name = path[1:]
    return [
        path, path + "/", "/" + path, path + "?model=chat", path + "#x", path + ";x", path.upper(),
        f"/v1/..{path}", f"/v1/%2e%2e{path}", f"/%2e{path}", f"/.{path}", f"/v1/chat/completions/../../..{path}",
        f"/%{ord(name[0]):02x}{name[1:]}", "/" + name.replace("/", "%2f"), f"/%2f{name}", f"http://localhost{path}",
        f"http://127.0.0.1:8001{path}", f"/v1/models/..{path}", f"/v1/responses/..%2f..{path}",
        f"/v1/responses/x%2f..%2f..{path}", f"/v1/completions/..;{path}",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ENGINE_ONLY)
async def test_an_engines_own_paths_are_out_of_reach(shared: Daemon, path: str) -> None:
    """404, 405 or 501, with each method and in odd spellings; no engine hears of any."""
    request_id = uuid.uuid4().hex
    body = b'{"model": "chat", "fake": {"echo": true}}'
    async with connected(shared.port) as client:
        for target in spellings(path):
            for method in ("POST",) if path == "/v1/responses/render" else ("GET", "POST"):  # GET: an id "render"
                await client.send(request(target, body, f"X-Request-Id: {request_id}", method=method))
                answer = await client.answer()
                assert answer.status in {404, 405, 501}, (method, target)
                assert answer.body.startswith((b'{"error":', b'{"type":"error","error":')), (method, target)
    seen = await shared.seen(request_id) + await shared.seen(request_id, "other")
    assert {found["path"] for found in seen} <= {target for target in spellings(path) if "/v1/responses/" in target}


@pytest.mark.parametrize(
    "target", ["//v1/chat/completions", "/v1/chat/completions//", "/V1/chat/completions", "/v1//chat/completions"]
)
async def test_a_route_has_one_spelling(shared: Daemon, target: str) -> None:
    """What is nearly a route of the table is none, and reaches no engine."""
    request_id = uuid.uuid4().hex
    async with connected(shared.port) as client:
        await client.send(request(target, b'{"model": "chat"}', f"X-Request-Id: {request_id}"))
        assert (await client.answer()).status == 404
    assert await shared.seen(request_id) == []


@pytest.mark.parametrize("target", ["/v1/completions/", "/v1/completions/?x=1", "/v1/completions/?"])
async def test_a_slash_behind_a_path_is_taken(shared: Daemon, target: str) -> None:
    """The engine gets the path that it knows, which would answer with a redirect else."""
    request_id = uuid.uuid4().hex
    async with connected(shared.port) as client:
        await client.send(request(target, b'{"model": "chat", "prompt": "x"}', f"X-Request-Id: {request_id}"))
        assert (await client.answer()).status == 200
    (seen,) = await shared.seen(request_id)
    assert seen["path"] == target.replace("/?", "?").rstrip("/")


@pytest.mark.parametrize("path", ["/health/", "/v1/models/", "/models/", "/devices/"])
async def test_a_slash_behind_a_path_of_the_daemons_own_is_taken(shared: Daemon, path: str) -> None:
    """As some clients write it."""
    async with shared.session.get(path) as answer, shared.session.get(path.rstrip("/")) as usual:
        assert answer.status == usual.status == 200
        assert (await answer.json()).keys() == (await usual.json()).keys()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"])
async def test_clients_of_anthropics_find_the_id_and_the_errors_where_they_look(shared: Daemon, path: str) -> None:
    """`request-id` of answers and of errors, on what is served below /v1/messages and on what is not."""
    headers = {"X-Request-Id": uuid.uuid4().hex}
    for model in ("chat", "nobody"):
        async with shared.session.post(path, json={"model": model, "messages": []}, headers=headers) as answer:
            assert answer.headers["request-id"] == answer.headers["X-Request-Id"] == headers["X-Request-Id"]
            if model == "nobody" or path.endswith("/batches"):
                body = await answer.json()
                assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/events"])
async def test_streams_tell_nginx_not_to_collect_events(shared: Daemon, path: str) -> None:
    """Answers that are none do not."""
    body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    ask = shared.session.get(path) if "/v1/" not in path else shared.session.post(path, json=body)
    async with ask as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["X-Accel-Buffering"] == "no"
    async with shared.session.post("/v1/completions", json={"model": "chat", "prompt": "x"}) as answer:
        assert "X-Accel-Buffering" not in answer.headers


@pytest.mark.parametrize(
    "target", ["http://localhost/v1/completions", "/v1/%63ompletions", "/v1/completions?a=%2e%2e/b", "/v1/completions?"]
)
async def test_an_engine_gets_the_path_of_the_table(shared: Daemon, target: str) -> None:
    """However a route is spelt, the engine understands that route and nothing else; the query stays as it was."""
    request_id = uuid.uuid4().hex
    async with connected(shared.port) as client:
        await client.send(request(target, b'{"model": "chat", "prompt": "x"}', f"X-Request-Id: {request_id}"))
        answer = await client.answer()
    assert answer.status == 200
    (seen,) = await shared.seen(request_id)
    path, _, query = seen["path"].partition("?")
    assert (unquote(path), query) == ("/v1/completions", target.partition("?")[2])
