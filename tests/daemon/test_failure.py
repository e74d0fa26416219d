"""What becomes of requests whose engine fails or whose client leaves: contract section 5, to the letter."""

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import WAYS, Answer, Client, Daemon, connected, daemon, fake_engines, port_block, request, until

PATH = "/v1/chat/completions"
MODELS = """
[models.chat]
model = "org/chat"
replicas = 3
[models.alone]
model = "org/alone"
[models.pair]
model = "org/pair"
replicas = 2
[models.hasty]
model = "org/hasty"
request_timeout = "300ms"
[models.narrow]
model = "org/narrow"
max_in_flight = 1
queue_size = 1
[models.impatient]
model = "org/impatient"
max_in_flight = 1
queue_timeout = "200ms"
"""
EVENT = 'data: {"a": 1}\n\n'
STREAM = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_HEAD = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module", params=WAYS)
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """One daemon for all of them, whose requests go one way, then the other; at its end none is counted anywhere."""
    async with daemon(fake_engines(port_block()) + MODELS, tmp_path_factory.mktemp("failure")) as running:
        await running.all_ready()
        running.first = WAYS[request.param]
        yield running
        await nothing_in_flight(running)


async def nothing_in_flight(running: Daemon) -> None:
    """Wait until every counter of running and waiting requests is 0."""

    def idle(found: dict[str, Any]) -> bool:
        states = [model["status"] for model in found["models"]]
        counts = [
            (state["in_flight"], state["queued"], *(i["in_flight"] for i in state["instances"])) for state in states
        ]
        return not any(sum(count) for count in counts)

    await running.eventually("/models", idle)


def chunk(*texts: str) -> str:
    """Each text as a chunk of its own."""
    return "".join(f"{len(text.encode()):x}\r\n{text}\r\n" for text in texts)


def body(model: str = "chat", *, stream: bool = False, **fault: Any) -> bytes:  # noqa: ANN401 - JSON
    """A request that tells the fake what to do."""
    return json.dumps({"model": model, "stream": stream, "fake": fault}).encode()


async def ask(running: Daemon, data: bytes, path: str = PATH) -> tuple[Answer, str]:
    """The answer to one request on a connection of its own, and the request's id."""
    request_id = uuid.uuid4().hex
    async with connected(running) as client:
        await client.send(request(path, data, f"X-Request-Id: {request_id}"))
        return await client.answer(), request_id


async def fresh(running: Daemon, *models: str) -> None:
    """Leave the daemon no kept-alive connection: each engine closes what carries this."""
    for model in models:
        for port in await running.ports(model):
            async with running.session.post(f"http://127.0.0.1:{port}/fake/hang-up") as answer:
                assert answer.status == 200


async def kept_alive_everywhere(running: Daemon, model: str) -> None:
    """Have the daemon keep an idle connection to each instance: requests at the same time go to different ones."""
    count = len(await running.ports(model))
    await fresh(running, model)
    answers = await asyncio.gather(
        *(ask(running, body(model, stream=True, chunks=2, interval=0.2)) for _ in range(count))
    )
    assert len({answer.all("x-vllm-proxy-instance")[0] for answer, _ in answers}) == count


def is_engine_failed(answer: Answer) -> bool:
    """Whether it is 502 `engine_failed` in the envelope."""
    return answer.status == 502 and json.loads(answer.body)["error"]["code"] == "engine_failed"


# Sending again


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_fresh_connection_that_breaks_is_replaced_once_by_another_instance(
    shared: Daemon, tmp_path: Path, end: str
) -> None:
    """The request was sent to one engine, which closed without a byte; another one answers it."""
    await fresh(shared, "chat")
    answer, request_id = await ask(shared, body(raw=[], end=end, once=str(tmp_path / "once")))
    assert answer.status == 200
    seen = await shared.seen(request_id)
    assert len(seen) == len({found["pid"] for found in seen}) == 2
    assert len({found["body"] for found in seen}) == 1


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_second_fresh_connection_that_breaks_is_the_last(shared: Daemon, end: str) -> None:
    """502 after two engines got the request, though a third was there: it may be what kills them."""
    await fresh(shared, "chat")
    answer, request_id = await ask(shared, body(raw=[], end=end))
    assert is_engine_failed(answer)
    seen = await shared.seen(request_id)
    assert len(seen) == len({found["pid"] for found in seen}) == 2


async def test_kept_alive_connections_that_break_send_the_request_to_two_instances(shared: Daemon) -> None:
    """Three instances, each with an idle connection: two tries, then 502, since it may be what kills them."""
    await kept_alive_everywhere(shared, "chat")
    answer, request_id = await ask(shared, body(raw=[], end="close"))
    assert is_engine_failed(answer)
    seen = await shared.seen(request_id)
    assert len(seen) == len({found["pid"] for found in seen}) == 2


async def test_a_kept_alive_connection_that_closed_is_replaced_by_another_instance(
    shared: Daemon, tmp_path: Path
) -> None:
    """The client notices nothing."""
    await kept_alive_everywhere(shared, "chat")
    answer, request_id = await ask(shared, body(raw=[], end="close", once=str(tmp_path / "once")))
    assert answer.status == 200
    assert len({found["pid"] for found in await shared.seen(request_id)}) == 2


async def test_where_there_is_no_other_instance_it_is_502_at_once(shared: Daemon) -> None:
    """The only engine gets the request once; the answer names the instance and the reason."""
    await fresh(shared, "alone")
    answer, request_id = await ask(shared, body("alone", raw=[], end="close"))
    assert is_engine_failed(answer)
    assert "alone/0" in json.loads(answer.body)["error"]["message"]
    assert answer.all("x-request-id") == [request_id]
    assert len(await shared.seen(request_id, "alone")) == 1


@pytest.mark.parametrize("model", ["alone", "pair"])
async def test_a_kept_alive_connection_that_closed_is_replaced_by_a_fresh_one_where_nobody_else_is(
    shared: Daemon, tmp_path: Path, model: str
) -> None:
    """Of one instance, or of several that are all gone but one; the engine never sees an id twice."""
    await fresh(shared, model)
    *others, port = await shared.ports(model)
    for other in others:
        async with shared.session.post(f"http://127.0.0.1:{other}/fake/stop-listening") as told:
            assert told.status == 200
    for _ in range(4):  # until one of them was answered by the last
        await ask(shared, body(model))
    answer, request_id = await ask(shared, body(model, raw=[], end="close", once=str(tmp_path / "once")))
    assert answer.status == 200
    seen = await shared.seen_at(port, request_id)
    ids = [dict(found["headers"])["X-Request-Id"] for found in seen]
    assert (len(seen), len(set(ids)), len({found["pid"] for found in seen})) == (2, 2, 1)
    assert answer.all("x-request-id") == [request_id]


async def test_a_fresh_connection_that_breaks_behind_a_kept_alive_one_is_the_last(shared: Daemon) -> None:
    """The only engine gets the request twice, then it is 502."""
    await kept_alive_everywhere(shared, "alone")
    answer, request_id = await ask(shared, body("alone", raw=[], end="close"))
    assert is_engine_failed(answer)
    assert len(await shared.seen(request_id, "alone")) == 2


@pytest.mark.parametrize(
    "pieces",
    [["H"], ["HTTP/1.1 200 OK\r\n"], ["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n"], ["garbage\r\n\r\n"], ["\0" * 100],
     ["HTTP/1.1 200 OK\r\n" + "x: " + "y" * 70_000], ["HTTP/1.1 103 Early Hints\r\n\r\n"],
     ["HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx"],
     ["HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]],
    ids="one-byte status-line cut-head garbage nul endless-head interim two-lengths length-and-chunked".split(),
)  # fmt: skip
async def test_after_the_first_byte_of_an_answer_a_request_is_never_sent_again(
    shared: Daemon, pieces: list[str]
) -> None:
    """A head that breaks off, or is none: 502, though other instances wait."""
    await fresh(shared, "chat")
    answer, request_id = await ask(shared, body(raw=pieces, end="close"))
    assert is_engine_failed(answer)
    assert len(await shared.seen(request_id)) == 1


async def test_a_refused_connection_goes_to_another_instance(tmp_path: Path, port_start: int) -> None:
    """An engine whose port is closed while its process lives costs no request; alone it is a 502."""
    config = '[models.chat]\nmodel = "x"\nreplicas = 2\n[models.alone]\nmodel = "y"\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.all_ready()
        for port in ((await running.ports("chat"))[0], (await running.ports("alone"))[0]):
            async with running.session.post(f"http://127.0.0.1:{port}/fake/stop-listening") as answer:
                assert answer.status == 200
        for _ in range(20):
            found, _ = await ask(running, body())
            assert (found.status, found.all("x-vllm-proxy-instance")) == (200, ["chat/1"])
        assert is_engine_failed((await ask(running, body("alone")))[0])
        await nothing_in_flight(running)


async def test_an_error_of_an_engine_is_its_answer(shared: Daemon) -> None:
    """500, 503 and 404 pass unchanged and are not sent again."""
    for status in (500, 503, 404, 400, 429):
        answer, request_id = await ask(
            shared, body(raw=[f"HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}"], end="keep")
        )
        assert (answer.status, answer.body) == (status, b"{}")
        assert len(await shared.seen(request_id)) == 1


async def test_a_killed_engine_is_a_retry_for_who_waits_and_an_error_event_for_who_reads(
    tmp_path: Path, port_start: int
) -> None:
    """What SIGKILL does to real requests: another instance answers the one without a byte, the stream says it broke."""
    config = '[models.chat]\nmodel = "x"\nreplicas = 2\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.all_ready()
        waiting = uuid.uuid4().hex
        async with connected(running) as stream, connected(running) as client:
            await stream.send(request(PATH, body(stream=True, chunks=3, hang=1)))
            await stream.reader.readuntil(b"\n\n")
            await client.send(request(PATH, body(hold=str(tmp_path / "go")), f"X-Request-Id: {waiting}"))
            (seen,) = await until(lambda: running.seen(waiting), bool)  # on the one with less to do
            (other,) = set(await running.pids("chat")) - {seen["pid"]}
            os.kill(seen["pid"], signal.SIGKILL)
            (tmp_path / "go").touch()
            assert (await client.answer()).status == 200
            os.kill(other, signal.SIGKILL)
            assert b"engine_failed" in await stream.reader.readuntil(b"0\r\n\r\n")
        await nothing_in_flight(running)


# A broken answer never looks whole


async def broken(running: Daemon, *pieces: str, path: str = PATH, end: str = "close", model: str = "chat") -> Answer:
    """The answer to a request whose engine sends this and goes."""
    answer, request_id = await ask(running, body(model, raw=list(pieces), end=end), path)
    assert len(await running.seen(request_id, model)) == 1
    return answer


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(
    "events",
    [[EVENT], [EVENT, EVENT, "data: x\r\n\r\n"], ["data: a\r\r"], [], [": comment\n\n"], [EVENT[:5], EVENT[5:]],
     ["\n\n"], ["data: a\n", "\n"], ["data: a\r\n", "\r\n"]],
)  # fmt: skip
async def test_a_stream_that_breaks_at_an_events_boundary_says_so_in_a_last_event(
    shared: Daemon, events: list[str], end: str
) -> None:
    """One error event in the envelope, no [DONE], a proper end, and the connection closed."""
    async with connected(shared) as client:
        await client.send(request(PATH, body(raw=[STREAM + chunk(*events)], end=end)))
        answer = await client.answer()
        assert answer.whole
        text = answer.body.decode()
        assert text.startswith("".join(events))
        last = text.removeprefix("".join(events))
        assert last.startswith("data: {")
        assert last.endswith("}\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert set(error) == {"message", "type", "param", "code"}
        assert await client.closed()


async def test_on_messages_the_last_event_is_anthropics(shared: Daemon) -> None:
    """A named `error` event, which its clients do not ignore."""
    answer = await broken(shared, STREAM + chunk("event: ping\ndata: {}\n\n"), path="/v1/messages")
    assert answer.whole
    last = answer.body.decode().removeprefix("event: ping\ndata: {}\n\n")
    assert last.startswith("event: error\ndata: {")
    told = json.loads(last.removeprefix("event: error\ndata: "))
    assert told["type"] == "error"
    assert set(told["error"]) >= {"type", "message"}


@pytest.mark.parametrize(
    "pieces",
    [
        (STREAM, chunk(EVENT, "data: {")),
        (STREAM, chunk(EVENT), "20\r\ndata"),
        (STREAM, chunk(EVENT), "20"),
        (STREAM, chunk("data: a\n")),
        (STREAM, chunk("data: a\r\n")),
        (STREAM, chunk("data: a", "\n")),
        (STREAM, chunk("data: a", "\r\n")),
        (STREAM, "e\r\ndata: a\n\nb"),
        (STREAM, chunk(EVENT), "zz\r\nno chunk\r\n"),
        (STREAM.replace("charset=utf-8", "charset=utf-8\r\ncontent-encoding: gzip"), chunk(EVENT)),
        (JSON_HEAD + "content-length: 100\r\n\r\n", '{"a": 1'),
        (JSON_HEAD + "content-length: 100\r\n\r\n",),
        (JSON_HEAD + "transfer-encoding: chunked\r\n\r\n", chunk('{"a": 1}\n\n')),
        (STREAM.replace("transfer-encoding: chunked", "content-length: 100"), EVENT),
    ],
)
async def test_any_other_answer_that_breaks_is_cut(shared: Daemon, tmp_path: Path, pieces: tuple[str, ...]) -> None:
    """The client has a part and sees that it is one: neither an error event nor a proper end is added."""
    told = [pieces[0], None, *pieces[1:]]
    async with connected(shared) as client:
        await client.send(request(PATH, body(raw=told, hold=str(tmp_path / "go"), end="close")))
        await client.peek(b"\r\n\r\n")
        (tmp_path / "go").touch()
        answer = await client.answer()
        assert (answer.status, answer.whole) == (200, False)
        assert b"engine_failed" not in answer.body
        assert await client.closed()


async def test_an_answer_framed_by_the_connections_end_is_cut_when_that_was_no_orderly_end(shared: Daemon) -> None:
    """A reset is passed on as one: to such a client an orderly end would mean that it has all of it."""
    async with connected(shared) as client:
        await client.send(request(PATH, body(raw=["HTTP/1.1 200 OK\r\nx: y\r\n\r\npart"], end="reset")))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.reader.readuntil(b"never")


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_after_done_nothing_is_added(shared: Daemon, path: str) -> None:
    """A stream that breaks behind its [DONE], before its last chunk, is cut without an error event."""
    for pieces in ([EVENT, "data: [DONE]\n\n"], [EVENT + "data: [DONE]\n\n"], [EVENT, "data: [DO", "NE]\n\n"]):
        answer = await broken(shared, STREAM + chunk(*pieces), path=path)
        assert answer.body.decode() == "".join(pieces)
        assert not answer.whole


async def test_bytes_behind_a_whole_answer_are_nobodys(shared: Daemon) -> None:
    """They reach neither the client nor the next one on that connection: there is no answer in front of them."""
    both = JSON_HEAD + "content-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    async with connected(shared) as client:
        await client.send(request(PATH, body("alone", raw=[both], end="keep")))
        assert is_engine_failed(await client.answer())
        for _ in range(5):
            await client.send(request(PATH, body("alone", echo=True)))
            assert b"evil" not in (await client.answer()).body


@pytest.mark.parametrize(
    ("told", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (b'{"model": "nobody"}', 404, "not_found_error"),
        (body(raw=["garbage"]), 502, "api_error"),
    ],
)
async def test_on_messages_the_daemons_own_errors_are_anthropics(
    shared: Daemon, told: bytes, status: int, kind: str
) -> None:
    """`{"type": "error", "error": {"type", "message"}}`, which its clients understand."""
    answer, _ = await ask(shared, told, "/v1/messages")
    found = json.loads(answer.body)
    assert (answer.status, found["type"], found["error"]["type"]) == (status, "error", kind)
    assert found["error"]["message"].startswith("cannot ")


# The client leaves


async def state_of(running: Daemon, request_id: str, model: str = "chat") -> str | None:
    """What has become of a request in its engine."""
    seen = await running.seen(request_id, model)
    return seen[0]["state"] if seen else None


async def becomes(running: Daemon, request_id: str, state: str) -> None:
    """Wait until the engine tells this of the request."""
    await until(lambda: state_of(running, request_id), lambda found: found == state)


@pytest.mark.parametrize("path", [PATH, PATH + "?a=b", "/v1/messages"])
@pytest.mark.parametrize("where", ["before the first byte", "in JSON", "silent stream", "blocked writer"])
async def test_the_engine_of_a_client_that_left_is_told_at_once(shared: Daemon, path: str, where: str) -> None:
    """Its connection is closed, so that vLLM aborts; nothing is counted afterwards."""
    request_id = uuid.uuid4().hex
    told = {
        "before the first byte": body(stream=True, hang="before"),
        "in JSON": body(raw=[JSON_HEAD + "content-length: 100\r\n\r\n{"], end="hang"),
        "silent stream": body(stream=True, chunks=3, hang=1),
        "blocked writer": body(raw=[STREAM], flood=2**28, end="keep"),
    }[where]
    async with connected(shared, receive_buffer=4096, limit=4096) as client:
        await client.send(request(path, told, f"X-Request-Id: {request_id}"))
        await becomes(shared, request_id, "open")
        if where != "before the first byte":
            await client.reader.readuntil(b"\r\n\r\n")
        if where == "blocked writer":
            await stalled(shared, request_id)
        client.leave()
        await becomes(shared, request_id, "gone")
    await nothing_in_flight(shared)


async def stalled(running: Daemon, request_id: str) -> None:
    """Wait until the engine cannot write any more."""
    history: list[int] = []

    async def written() -> list[int]:
        history.extend(seen["written"] for seen in await running.seen(request_id))
        return history[-30:]

    await until(written, lambda last: len(last) == 30 and last[0] == last[-1] > 2**16)


async def test_a_client_that_left_while_its_request_waited_is_never_sent_on(shared: Daemon) -> None:
    """Its place in the queue is free at once."""
    waiting = uuid.uuid4().hex
    async with connected(shared) as holder, connected(shared) as client:
        await hold(shared, holder, "narrow")
        await client.send(request(PATH, body("narrow"), f"X-Request-Id: {waiting}"))
        await counts(shared, "narrow", (1, 1))
        client.leave()
        await counts(shared, "narrow", (1, 0))
        holder.leave()
    await counts(shared, "narrow", (0, 0))
    assert await shared.seen(waiting, "narrow") == []


# Limits


async def hold(running: Daemon, client: Client, model: str) -> None:
    """Have a request run until its client leaves."""
    await client.send(request(PATH, body(model, stream=True, chunks=3, hang=1)))
    await client.reader.readuntil(b"\n\n")
    await counts(running, model, (1, 0))


async def counts(running: Daemon, model: str, wanted: tuple[int, int]) -> None:
    """Wait for this many requests in flight and queued."""
    await running.eventually(
        f"/models/{model}", lambda found: (found["status"]["in_flight"], found["status"]["queued"]) == wanted
    )


async def test_a_full_queue_is_503_with_a_time_to_come_back(shared: Daemon) -> None:
    """`queue_full` and Retry-After; those that run and wait go on."""
    async with connected(shared) as holder, connected(shared) as waiting:
        await hold(shared, holder, "narrow")
        await waiting.send(request(PATH, body("narrow")))
        await counts(shared, "narrow", (1, 1))
        answer, _ = await ask(shared, body("narrow"))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "queue_full")
        assert int(answer.all("retry-after")[0]) > 0
        holder.leave()
        assert (await waiting.answer()).status == 200


async def test_a_permit_lives_until_the_last_byte_of_an_answer(shared: Daemon, tmp_path: Path) -> None:
    """The next request starts when the answer before it has ended, not when it has begun."""
    whole = [STREAM + chunk(EVENT), None, chunk("data: [DONE]\n\n") + "0\r\n\r\n"]
    async with connected(shared) as first, connected(shared) as second:
        await first.send(request(PATH, body("narrow", raw=whole, hold=str(tmp_path / "go"), end="keep")))
        await first.reader.readuntil(b"\r\n\r\n")
        request_id = uuid.uuid4().hex
        await second.send(request(PATH, body("narrow"), f"X-Request-Id: {request_id}"))
        await counts(shared, "narrow", (1, 1))
        assert await shared.seen(request_id, "narrow") == []
        (tmp_path / "go").touch()
        assert (await second.answer()).status == 200
        assert b"[DONE]" in await first.reader.readuntil(b"0\r\n\r\n")


async def test_too_long_a_wait_is_504(shared: Daemon) -> None:
    """`queue_timeout`, and the request never reaches the engine."""
    async with connected(shared) as holder:
        await hold(shared, holder, "impatient")
        answer, request_id = await ask(shared, body("impatient"))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (504, "queue_timeout")
        assert await shared.seen(request_id, "impatient") == []


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_request_timeout_before_the_first_byte_is_504(shared: Daemon, path: str) -> None:
    """In the envelope of the route; the engine's connection is closed."""
    answer, request_id = await ask(shared, body("hasty", hang="before"), path)
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"]) == (504, "request_timeout")
    await until(lambda: state_of(shared, request_id, "hasty"), lambda found: found == "gone")


@pytest.mark.parametrize(
    "told",
    [{"stream": True, "chunks": 3, "hang": 1}, {"raw": [JSON_HEAD + "content-length: 9\r\n\r\n{"], "end": "hang"}],
)
async def test_request_timeout_after_the_first_byte_cuts_the_answer(shared: Daemon, told: dict[str, Any]) -> None:
    """The client sees that it is incomplete; the engine's connection is closed."""
    answer, request_id = await ask(shared, body("hasty", **told))
    assert (answer.status, answer.whole) == (200, False)
    await until(lambda: state_of(shared, request_id, "hasty"), lambda found: found == "gone")


async def test_no_mixture_of_fates_leaves_a_count_behind(shared: Daemon, tmp_path: Path) -> None:
    """Successes, errors, breaks, refusals and clients that leave, sixty at once: every counter ends at 0."""
    fates: list[dict[str, Any]] = [
        {}, {"status": 500}, {"raw": [], "end": "close"}, {"raw": [], "end": "reset"}, {"raw": ["garbage"]},
        {"raw": [STREAM + chunk(EVENT)]}, {"raw": [STREAM + "ff\r\nx"]}, {"hang": "before"},
        {"once": str(tmp_path / "1"), "raw": []},
        {"raw": [JSON_HEAD + "content-length: 9\r\n\r\n"], "end": "reset"},
    ]  # fmt: skip

    async def one(number: int) -> None:
        model = ("chat", "alone", "hasty", "narrow", "impatient", "chat")[number % 6]
        fate = fates[number % len(fates)]
        async with connected(shared) as client:
            await client.send(request(PATH, body(model, **fate)))
            if number % 4 == 0 or (fate == {"hang": "before"} and model != "hasty"):
                client.leave()
            else:
                await client.answer()

    await asyncio.gather(*(one(number) for number in range(60)))
    await nothing_in_flight(shared)
    metrics = await shared.metrics()
    busy = {
        name: value for name, value in metrics.items() if name.startswith(("vllm_proxy_in_flight", "vllm_proxy_queued"))
    }
    assert busy
    assert not any(busy.values())
