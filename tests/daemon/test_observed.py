"""What can be known of requests afterwards: ids, traces, the access log and the metrics."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Daemon, connected, daemon, fake_engines, port_block, request, until
from vllm_proxy.domain.lifecycle import State

PATH = "/v1/chat/completions"
MODELS = """
[models.chat]
model = "org/chat"
replicas = 2
aliases = ["an-alias"]
[models."org/other:1"]
model = "org/other"
"""
ECHO = b'{"model": "chat", "fake": {"echo": true}}'
COUNTED = "prompt", "generation"
FIELDS = "id engine_id key model instance status bytes seconds first_byte".split()


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """One daemon for all of them, its log in JSON."""
    folder = tmp_path_factory.mktemp("observed")
    async with daemon(fake_engines(port_block()) + MODELS, folder, "--log-format", "json") as running:
        await running.all_ready()
        yield running


async def logged(running: Daemon, request_id: str) -> dict[str, Any]:
    """The one line of the access log about this request."""

    async def lines() -> list[dict[str, Any]]:
        await asyncio.to_thread(lambda: None)
        found = [json.loads(line) for line in running.log().splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == "request" and line["id"] == request_id]

    (line,) = await until(lines, bool)
    return line


async def ask(running: Daemon, data: bytes = ECHO, *lines: str, path: str = PATH) -> tuple[int, list[str]]:
    """The status of an answer, and its request ids."""
    async with connected(running.port) as client:
        await client.send(request(path, data, *lines))
        answer = await client.answer()
        return answer.status, answer.all("x-request-id")


# Request ids and traces


@pytest.mark.parametrize("given", ["abc", "a" * 200, "req_8f/9+x==", "~!$'()*"])
async def test_a_usable_request_id_is_given_back_and_logged(shared: Daemon, given: str) -> None:
    """The engine's begins with it, so that it is found in the engine's log too."""
    given += uuid.uuid4().hex if len(given) < 100 else ""
    assert await ask(shared, ECHO, f"X-Request-Id: {given}") == (200, [given])
    assert len(await shared.seen(given)) == 1
    assert (await logged(shared, given))["status"] == 200


@pytest.mark.parametrize(
    "given", [(), ("",), ("a" * 201,), ("a b",), ("\xe9",), ("x\ty",), ("one", "two"), ("one, two",)]
)
async def test_a_missing_or_unusable_request_id_is_replaced(shared: Daemon, given: tuple[str, ...]) -> None:
    """By one of the daemon's, once, and the engine gets that one alone."""
    status, ids = await ask(shared, ECHO, *(f"X-Request-Id: {value}" for value in given))
    assert status == 200
    (made,) = ids
    assert re.fullmatch(r"[0-9a-f]{16,64}", made)
    (seen,) = await shared.seen(made)
    assert [value for name, value in seen["headers"] if name.lower() == "x-request-id"] == [made]


async def test_an_engine_never_sees_one_id_twice(shared: Daemon) -> None:
    """Clients may send the same one: vLLM aborts by id, so that one that leaves would take the other along."""
    request_id = uuid.uuid4().hex
    answers = await asyncio.gather(*(ask(shared, ECHO, f"X-Request-Id: {request_id}") for _ in range(20)))
    assert answers == [(200, [request_id])] * 20
    ids = [dict(seen["headers"])["X-Request-Id"] for seen in await shared.seen(request_id)]
    assert len(ids) == len(set(ids)) == 20
    assert request_id not in ids


async def test_made_ids_differ(shared: Daemon) -> None:
    """A hundred requests have a hundred."""
    ids = [found[0] for _, found in await asyncio.gather(*(ask(shared) for _ in range(100)))]
    assert len(set(ids)) == 100


async def test_an_error_carries_the_request_id(shared: Daemon) -> None:
    """Also one of the daemon's own."""
    assert await ask(shared, b"{", "X-Request-Id: mine-1") == (400, ["mine-1"])
    assert await ask(shared, b'{"model": "nobody"}', "X-Request-Id: mine-2") == (404, ["mine-2"])


async def test_a_trace_is_passed_on(shared: Daemon) -> None:
    """`traceparent` and `tracestate` reach the engine as they are."""
    request_id = uuid.uuid4().hex
    lines = ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate: a=b"]
    await ask(shared, ECHO, f"X-Request-Id: {request_id}", *lines)
    (seen,) = await shared.seen(request_id)
    assert [f"{name}: {value}" for name, value in seen["headers"] if name.startswith("trace")] == lines


# The access log


async def test_a_request_is_one_line_with_every_field(shared: Daemon) -> None:
    """Id, method, route, model, instance, status, bytes and times: values, not texts."""
    request_id = uuid.uuid4().hex
    told = {"raw": ["HTTP/1.1 201 X\r\ncontent-length: 5\r\n\r\nhello"], "end": "keep"}
    body = json.dumps({"model": "an-alias", "fake": told}).encode()
    assert (await ask(shared, body, f"X-Request-Id: {request_id}", path=PATH + "?secret=1"))[0] == 201
    line = await logged(shared, request_id)
    assert {key: line[key] for key in ("method", "route", "model", "status", "bytes")} == {
        "method": "POST", "route": PATH, "model": "chat", "status": 201, "bytes": 5,
    }  # fmt: skip
    assert line["instance"] in {"chat/0", "chat/1"}
    (seen,) = await shared.seen(request_id)
    assert line["engine_id"] == dict(seen["headers"])["X-Request-Id"] != request_id
    assert 0 < line["first_byte"] <= line["seconds"] < 60


@pytest.mark.parametrize(
    ("body", "status", "model"),
    [
        (b"{", 400, None),
        (b'{"model": "nobody"}', 404, None),
        (b'{"model": "chat", "fake": {"raw": ["garbage"]}}', 502, "chat"),
        (b'{"model": "chat", "fake": {"status": 500}}', 500, "chat"),
    ],
)
async def test_a_failed_request_is_logged_with_what_is_known(
    shared: Daemon, body: bytes, status: int, model: str | None
) -> None:
    """Its status is the one that the client got; a name that is no model's is not in the line."""
    request_id = uuid.uuid4().hex
    assert (await ask(shared, body, f"X-Request-Id: {request_id}"))[0] == status
    line = await logged(shared, request_id)
    assert (line["status"], line["model"]) == (status, model)
    assert set(FIELDS) <= set(line)
    assert "nobody" not in json.dumps(line)


@pytest.mark.parametrize(("fault", "status"), [('"hang": "before"', 499), ('"chunks": 3, "hang": 1', 200)])
async def test_a_client_that_left_is_logged(shared: Daemon, fault: str, status: int) -> None:
    """499 when it had no answer yet, else the status that it was sent."""
    request_id = uuid.uuid4().hex
    body = f'{{"model": "chat", "stream": true, "fake": {{{fault}}}}}'.encode()
    async with connected(shared.port) as client:
        await client.send(request(PATH, body, f"X-Request-Id: {request_id}"))
        if status == 200:
            await client.reader.readuntil(b"\n\n")
        else:
            await until(lambda: shared.seen(request_id), bool)
        client.leave()
    line = await logged(shared, request_id)
    assert (line["status"], line["model"]) == (status, "chat")
    assert (line["bytes"] > 0, line["first_byte"] is not None) == (status == 200, status == 200)


async def test_neither_bodies_nor_keys_are_logged(shared: Daemon) -> None:
    """Not what was asked, not what was answered, not the client's key, not the engine's, not the query."""
    request_id = uuid.uuid4().hex
    body = b'{"model": "chat", "messages": [{"content": "the-prompt"}]}'
    await ask(
        shared, body, "Authorization: Bearer client-key", f"X-Request-Id: {request_id}", path=PATH + "?q=the-query"
    )
    await ask(shared, body[:-1], "X-Api-Key: client-key", f"X-Request-Id: {request_id}x")
    await logged(shared, request_id)
    await logged(shared, request_id + "x")
    log = shared.log()
    credentials = re.findall(r'credential = "([^"]+)"', (shared.state_dir / "engines.toml").read_text())
    assert len(credentials) == 3
    for secret in ("the-prompt", "the-query", "client-key", *credentials):
        assert secret not in log


async def test_an_id_cannot_forge_a_line(shared: Daemon) -> None:
    """Quotes and backslashes of a client's id stay inside its own line."""
    request_id = '"}\\"{"' + uuid.uuid4().hex
    await ask(shared, ECHO, f"X-Request-Id: {request_id}")
    assert (await logged(shared, request_id))["status"] == 200


async def test_in_text_a_request_is_one_line_too(tmp_path: Path, port_start: int) -> None:
    """The same fields, as words; it is written before the daemon ends."""
    config = fake_engines(port_start) + '[models.chat]\nmodel = "x"\n'
    async with daemon(config, tmp_path, "--log-format", "text") as running:
        await running.until("1 of 1 models ready")
        await ask(running, ECHO, "X-Request-Id: mine")
        await ask(running, b"{", "X-Request-Id: bad")
        await running.stop()
    lines = [line for line in running.log().splitlines() if "] request " in line]
    assert len(lines) == 2
    first, second = (dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines)
    assert set(first) == set(second) == set(FIELDS)
    assert f"POST {PATH}" in lines[0]
    assert (first["id"], first["model"], first["instance"], first["status"]) == ("mine", "chat", "chat/0", "200")
    assert float(first["first_byte"]) <= float(first["seconds"])
    assert (second["id"], second["model"], second["instance"], second["status"]) == ("bad", "-", "-", "400")
    assert (second["first_byte"], second["engine_id"]) == ("-", "-")
    assert first["engine_id"].startswith("mine.")


# The metrics


async def test_a_request_is_counted_by_model_route_and_status(shared: Daemon) -> None:
    """Under the id also where an alias was named, with the time of its end and of its first byte."""
    before = await shared.metrics()
    other = b'{"model": "org/other:1", "fake": {"status": 418}}'
    for body in (ECHO, ECHO.replace(b"chat", b"an-alias"), other):
        await ask(shared, body)
    after = await shared.metrics()

    def grown(series: str) -> float:
        return after[series] - before.get(series, 0)

    assert grown(f'vllm_proxy_requests_total{{model="chat",route="{PATH}",status="200"}}') == 2
    assert grown(f'vllm_proxy_requests_total{{model="org/other:1",route="{PATH}",status="418"}}') == 1
    for family in ("request_duration_seconds", "time_to_first_byte_seconds"):
        assert grown(f'vllm_proxy_{family}_count{{model="chat",route="{PATH}"}}') == 2
        assert grown(f'vllm_proxy_{family}_bucket{{model="chat",route="{PATH}",le="+Inf"}}') == 2
        assert 0 < grown(f'vllm_proxy_{family}_sum{{model="chat",route="{PATH}"}}') < 60
    assert grown('vllm_proxy_queue_seconds_count{model="chat"}') == 2
    assert grown("vllm_proxy_overhead_seconds_count") == 3
    assert 0 < grown("vllm_proxy_overhead_seconds_sum") < 10


async def test_a_retry_is_counted(shared: Daemon, tmp_path: Path) -> None:
    """Each time a request is sent again."""
    before = (await shared.metrics()).get('vllm_proxy_retries_total{model="chat"}', 0)
    body = json.dumps({"model": "chat", "fake": {"raw": [], "once": str(tmp_path / "once")}}).encode()
    assert (await ask(shared, body))[0] == 200
    assert (await shared.metrics())['vllm_proxy_retries_total{model="chat"}'] == before + 1


async def test_what_runs_now_is_shown_while_it_runs(shared: Daemon) -> None:
    """`in_flight` of the instance is 1 during a stream, and 0 afterwards."""
    async with connected(shared.port) as client:
        await client.send(request(PATH, b'{"model": "chat", "stream": true, "fake": {"hang": 1}}'))
        await client.reader.readuntil(b"\n\n")
        assert sum(await in_flight(shared)) == 1
        client.leave()
        await until(lambda: in_flight(shared), lambda found: sum(found) == 0)


async def in_flight(running: Daemon) -> list[float]:
    """Of each instance of chat."""
    metrics = await running.metrics()
    return [metrics[f'vllm_proxy_in_flight{{model="chat",replica="{index}"}}'] for index in (0, 1)]


async def test_tokens_are_those_that_the_engines_themselves_have_counted(shared: Daemon) -> None:
    """Whoever asked for them, one who left early too, and with no key anywhere."""
    engines = [one["port"] for one in (await shared.get("/models/chat"))["status"]["instances"]]

    async def difference() -> float:
        metrics, theirs = await shared.metrics(), 0.0
        for port in engines:
            async with shared.session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                theirs += sum(map(float, re.findall(r"(?m)^vllm:(?:prompt|generation)_tokens_total\S+ (.+)$",
                                                    await answer.text())))  # fmt: skip
        assert theirs >= 2 + 7 + 1
        ours = (metrics.get(f'vllm_proxy_tokens_total{{kind="{kind}",model="chat"}}') for kind in COUNTED)
        return theirs - sum(one or 0 for one in ours)

    async with shared.admin.get("/events") as watched:  # which makes figures fresher
        await watched.content.readline()
        await ask(shared, b'{"model": "chat", "stream": true, "fake": {"chunks": 7}}')
        async with connected(shared.port) as client:
            await client.send(request(PATH, b'{"model": "chat", "stream": true, "fake": {"hang": 3}}'))
            await client.reader.readuntil(b"\n\n")
        await until(difference, lambda found: found == 0)


async def test_the_state_of_each_instance_and_the_revision_are_shown(shared: Daemon) -> None:
    """1 for the state that an instance is in, 0 for the others; the revision that `/health` names."""
    metrics = await shared.metrics()
    states = {name: value for name, value in metrics.items() if name.startswith("vllm_proxy_instance_state{")}
    assert {name for name, value in states.items() if value} == {
        f'vllm_proxy_instance_state{{model="{instance[:-2]}",replica="{instance[-1]}",state="ready"}}'
        for instance in ("chat/0", "chat/1", "org/other:1/0")
    }
    assert len(states) == 3 * len(State)
    assert metrics['vllm_proxy_queued{model="chat"}'] == 0
    revision = (await shared.get("/health"))["config"]["revision"]
    assert metrics[f'vllm_proxy_config_info{{revision="{revision}"}}'] == 1


async def test_labels_are_configured_names_and_routes_of_the_table_alone(shared: Daemon) -> None:
    """Nothing that a client makes up becomes a label: no name, no path, no id, no method."""
    made_up = "made-up-" + uuid.uuid4().hex
    for body in (b'{"model": "%s"}' % made_up.encode(), b'{"model": "chat", "x": "%s"}' % made_up.encode()):
        for path in (
            PATH,
            f"{PATH}?{made_up}",
            f"/v1/{made_up}",
            f"/v1/responses/{made_up}/cancel",
            f"/v1/files/{made_up}",
        ):
            await ask(shared, body, f"X-Request-Id: {made_up}", path=path)
    async with shared.session.get("/metrics") as answer:
        text = await answer.text()
        assert answer.content_type == "text/plain"
    assert made_up not in text
    assert set(re.findall(r'model="([^"]*)"', text)) <= {"chat", "org/other:1", ""}
    assert set(re.findall(r'route="([^"]*)"', text)) <= {PATH, "/v1/responses/{id}/cancel"}
    assert "vllm:" not in text
    series = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.startswith(("vllm_proxy_", "process_")) for line in series)
    assert len(series) == len({line.rpartition(" ")[0] for line in series})
