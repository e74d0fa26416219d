"""What clients may take of the daemon, and how long they may let it wait: bodies, heads, connections, disk."""

import asyncio
import io
import itertools
import json
import resource
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests import certificates
from tests.harness import OPEN, Answer, Client, Daemon, connected, daemon, fake_engines, memory, request, until

CHAT = "/v1/chat/completions"
FORM = "/v1/audio/transcriptions"
MODELS = """
[models.chat]
model = "org/chat"
[models.narrow]
model = "org/narrow"
max_in_flight = 1
"""
LOADS = """
[models.loads]
model = "org/loads"
request_timeout = "300ms"
args = { fake_hang_at = "weights" }
"""
# Three of these are more than max_buffered, two are not.
SIZE = 900_000
BUFFERED, CONNECTIONS = 2 * 2**20, 40
PATIENT = f'[server]\nmax_body_size = "3MiB"\nmax_buffered = {BUFFERED}\nmax_connections = {CONNECTIONS}\n'
STRICT = '[server]\nhead_timeout = "1s"\nbody_timeout = "1s"\n'
WEBSOCKET = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip


@pytest.fixture(scope="module")
async def patient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon with little room and much time; at its end nothing is counted any more."""
    async with daemon(PATIENT + OPEN + fake_engines(11_600) + MODELS, tmp_path_factory.mktemp("patient")) as running:
        await running.all_ready()
        yield running
        await buffered(running, 0)


@pytest.fixture(scope="module", params=["tcp", "tls", "unix"])
async def strict(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon with little time, however its clients come."""
    folder = tmp_path_factory.mktemp("strict")
    pair = certificates.make(folder) if request.param == "tls" else None
    path = folder / "http.sock" if request.param == "unix" else None
    env = {"VLLM_PROXY_LISTEN": f"127.0.0.1:1,unix:{path}"} if path else {}
    config = STRICT + OPEN + fake_engines(11_800) + MODELS + LOADS
    async with daemon(config, folder, env=env, pair=pair) as running:
        running.unix = path
        await running.until(lambda status: status.startswith("2 of 3 models ready"))
        yield running
        await buffered(running, 0)


async def buffered(running: Daemon, wanted: int) -> None:
    """Wait until bodies hold so many bytes."""
    await until(running.metrics, lambda metrics: metrics["vllm_proxy_buffered_bytes"] == wanted)


async def refused(client: Client, status: int, code: str) -> Answer:
    """The next answer is this refusal, in the envelope, and the last of its connection."""
    answer = await client.answer()
    error = json.loads(answer.body)["error"]
    assert (answer.status, error.get("code")) == (status, code), answer
    assert error["message"].startswith("cannot ")
    assert (answer.all("retry-after") != []) == (code == "overloaded")
    assert answer.all("connection") == ["close"]  # once the client has stopped sending, or after ten seconds
    return answer


def json_body(model: str = "chat", size: int = SIZE, **more: object) -> bytes:
    """A body of this size."""
    body = json.dumps({"model": model, "pad": "", **more}).encode()
    return body.replace(b'"pad": "', b'"pad": "' + b"x" * (size - len(body)))


def chunk(data: bytes) -> bytes:
    """One chunk of a body without a length."""
    return b"%x\r\n%s\r\n" % (len(data), data)


PART = b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
# How each kind of route is sent the beginning of a body: head, first bytes, whether it says how long it will be.
KINDS: dict[str, tuple[bytes, bytes]] = {
    "json": (request(CHAT, b"", f"Content-Length: {SIZE}"), b'{"model": "chat", "pad": "'),
    "chunked": (request(CHAT, b"", "Transfer-Encoding: chunked"), b'{"model": "chat", "pad": "'),
    "form": (
        request(
            FORM, b"", "Transfer-Encoding: chunked", "Content-Type: multipart/form-data; boundary=b0undary"
        ).replace(b"Content-Type: application/json\r\n", b""),
        PART,
    ),
    "config": (
        request("/config", b"", "Transfer-Encoding: chunked", "Content-Type: text/toml", method="PUT").replace(
            b"Content-Type: application/json\r\n", b""
        ),
        b"# ",
    ),
    "model": (request("/models", b"", "Transfer-Encoding: chunked"), b'{"id": "'),
    "cancel": (request("/v1/responses/r/cancel", b"", "Transfer-Encoding: chunked"), b"{"),
}


def begun(kind: str, size: int) -> bytes:
    """A request with the first `size` bytes of its body, and more to come."""
    head, first = KINDS[kind]
    body = first + b"x" * (size - len(first))
    return head + (chunk(body) if b"chunked" in head else body)


# Room for bodies


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "json"])
async def test_unfinished_bodies_have_no_more_room_than_max_buffered(patient: Daemon, kind: str) -> None:
    """On every route that takes one: the third is refused while it comes, and what they sent is given back."""
    async with connected(patient.port) as one, connected(patient.port) as two, connected(patient.port) as three:
        for number, client in enumerate((one, two), 1):
            await client.send(begun(kind, SIZE))
            await buffered(patient, number * SIZE)
        await three.send(begun(kind, SIZE))
        await refused(three, 503, "overloaded")
        await buffered(patient, 2 * SIZE)
        one.leave()
        two.leave()
        await buffered(patient, 0)


async def test_a_length_for_which_there_is_no_room_is_refused_before_a_byte_is_read(patient: Daemon) -> None:
    """The client that asks first is told so and sends nothing; as soon as there is room the same request is served."""
    body = json_body()
    async with connected(patient.port) as one, connected(patient.port) as two, connected(patient.port) as three:
        for number, client in enumerate((one, two), 1):
            await client.send(begun("json", SIZE - 1))
            await buffered(patient, number * (SIZE - 1))
        await three.send(request(CHAT, b"", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        await refused(three, 503, "overloaded")
        one.leave()
        await buffered(patient, SIZE - 1)
        assert (await patient.post(CHAT, body))["object"] == "chat.completion"
        two.leave()
    await buffered(patient, 0)


async def test_many_clients_with_unfinished_bodies_cost_no_more_memory_than_is_allowed(patient: Daemon) -> None:
    """Twenty of them declare a body and send nearly all of it: two have room, and the daemon does not grow."""
    before = memory(patient.process.pid, "VmHWM")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(patient.port)) for _ in range(20)]
        await asyncio.gather(*(client.send(begun("json", SIZE - 1)) for client in clients))
        answers = {asyncio.ensure_future(refused(client, 503, "overloaded")) for client in clients}
        for refusal in itertools.islice(asyncio.as_completed(answers), 18):
            await refusal
        await buffered(patient, 2 * (SIZE - 1))
        for answer in answers:
            answer.cancel()
    assert memory(patient.process.pid, "VmHWM") - before < 16 * 2**20
    await buffered(patient, 0)


async def test_bodies_of_waiting_requests_take_room_too(patient: Daemon, tmp_path: Path) -> None:
    """A queue of any length holds no more than `max_buffered`; each of its requests is served in the end."""
    hold = tmp_path / "go"
    held = json_body("narrow", 1000, fake={"hold": str(hold)})
    async with connected(patient.port) as first, connected(patient.port) as one, connected(patient.port) as two:
        await first.send(request(CHAT, held))
        await patient.eventually("/models/narrow", lambda model: model["status"]["in_flight"] == 1)
        for number, client in enumerate((one, two), 1):
            await client.send(request(CHAT, json_body("narrow")))
            await buffered(patient, 1000 + number * SIZE)
        answer = await patient.post(CHAT, json_body("narrow"), 503)
        assert answer["error"]["code"] == "overloaded"
        hold.touch()
        assert [(await client.answer()).status for client in (first, one, two)] == [200, 200, 200]
    await buffered(patient, 0)


@pytest.mark.parametrize("size", [BUFFERED + 1, 3 * 2**20 + 1])
async def test_a_body_that_will_never_have_room_is_413(patient: Daemon, size: int) -> None:
    """No client is told to try that again; the smaller bound is named."""
    async with connected(patient.port) as client:
        await client.send(request(CHAT, b"", f"Content-Length: {size}"))
        answer = await refused(client, 413, "request_too_large")
        assert b"server.max_buffered (2097152 bytes)" in answer.body


async def test_an_unfinished_message_of_a_session_takes_room_too(patient: Daemon) -> None:
    """WebSocket messages count until they are passed on; the session for which there is no room is cut."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(patient.port)) for _ in range(3)]
        frame = b"\x81\xff" + struct.pack("!Q", SIZE + 100) + bytes(4)
        for number, client in enumerate(clients, 1):
            await client.send(request("/v1/realtime?model=chat", b"", *WEBSOCKET, method="GET"))
            await client.reader.readuntil(b"}")  # its greeting
            await client.send(frame + b" " * SIZE)
            if number < 3:
                await buffered(patient, number * (len(frame) + SIZE))
        assert await clients[2].closed()
        await buffered(patient, 2 * (len(frame) + SIZE))
        await clients[0].send(b" " * 100)
        await buffered(patient, len(frame) + SIZE)
    await buffered(patient, 0)


async def test_an_upload_for_which_the_disk_has_no_room_is_507(patient: Daemon) -> None:
    """The message says where to make room, nothing of it is left, and the next one is served once there is room."""
    pid = patient.process.pid
    body = PART + b"x" * 1_500_000 + b'\r\n--b0undary\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n'
    body += b"--b0undary--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b0undary"}
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_200_000, before[1]))
    try:
        async with patient.session.post(FORM, data=io.BytesIO(body), headers=kind) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (507, "storage_full")
            assert "make room in /tmp" in error["message"]
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert [target for target in open_files(pid) if target.startswith("/tmp/tmp")] == []
    async with patient.session.post(FORM, data=io.BytesIO(body), headers=kind) as answer:
        assert answer.status == 200


def open_files(pid: int) -> list[str]:
    """What a process has open."""
    return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]


# Connections


@asynccontextmanager
async def full(running: Daemon) -> AsyncIterator[list[Client]]:
    """Connections until there is no room for one more; they have been served, so that the daemon knows them."""
    clients: list[Client] = []
    async with AsyncExitStack() as stack:
        while True:
            client = await stack.enter_async_context(connected(running.port))
            await client.send(request("/health", b"", method="GET"))
            answer = await client.answer()
            if answer.status == 503:
                break
            clients.append(client)
        yield clients


async def status_of_one_more(running: Daemon) -> int:
    """What a new client is told."""
    async with connected(running.port) as client:
        await client.send(request("/health", b"", method="GET"))
        return (await client.answer()).status


async def test_a_connection_too_many_is_told_so(patient: Daemon) -> None:
    """503 in the envelope and the end, whatever it sends; the others go on, and who leaves makes room."""
    async with full(patient) as clients:
        assert CONNECTIONS - 3 <= len(clients) <= CONNECTIONS
        for sent in (b"", request("/health", b"", method="GET"), request(CHAT, json_body())):
            async with connected(patient.port) as client:
                await client.send(sent)
                await refused(client, 503, "overloaded")
                assert await client.closed()
        await clients[0].send(request(CHAT, b'{"model": "chat"}'))
        assert (await clients[0].answer()).status == 200
        clients[0].leave()
        await until(lambda: status_of_one_more(patient), lambda status: status == 200)


async def test_the_control_socket_has_room_always(patient: Daemon) -> None:
    """An operator can ask what goes on when no client can; there the number of connections is told."""
    connector = aiohttp.UnixConnector(str(patient.state_dir / "control.sock"))
    async with aiohttp.ClientSession("http://localhost", connector=connector) as session, full(patient) as clients:
        async with session.get("/metrics") as answer:
            line = next(
                line for line in (await answer.text()).splitlines() if line.startswith("vllm_proxy_connections ")
            )
        assert int(float(line.split()[1])) > len(clients)


async def test_the_number_of_connections_is_live(patient: Daemon) -> None:
    """A change of the file counts for the next client."""
    async with full(patient):
        patient.edit(f"max_connections = {CONNECTIONS}", "max_connections = 0")
        await until(lambda: status_of_one_more(patient), lambda status: status == 200)
    patient.edit("max_connections = 0", f"max_connections = {CONNECTIONS}")
    await patient.adopts()


async def test_a_client_that_vanishes_is_probed_for(patient: Daemon) -> None:
    """The kernel asks for it after twenty seconds of silence, on every connection of a client."""
    async with connected(patient.port) as client:
        await client.send(request("/events", b"", method="GET"))
        await client.reader.readuntil(b":\n\n")
        port: int = client._writer.get_extra_info("sockname")[1]
        ends = f":{patient.port:04X} 0100007F:{port:04X} 01 "
        (line,) = [line for line in Path("/proc/net/tcp").read_text().splitlines() if ends in line]
        kind, jiffies = line.split()[5].split(":")
        assert kind == "02"  # a keepalive timer
        assert 0 < int(jiffies, 16) <= 2000


# Time for heads and bodies


async def test_a_head_that_does_not_come_is_408(strict: Daemon) -> None:
    """The first of a connection, begun or not, and every later one that has begun."""

    async def one(sent: bytes, *, first: bool) -> None:
        async with connected(strict) as client:
            if not first:
                await client.send(request("/health", b"", method="GET"))
                assert (await client.answer()).status == 200
            await client.send(sent)
            await refused(client, 408, "request_timeout")
            assert await client.closed()

    heads = (b"GET", b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    await asyncio.gather(
        one(b"", first=True), *(one(sent, first=True) for sent in heads), *(one(sent, first=False) for sent in heads)
    )


async def test_a_head_that_comes_byte_by_byte_is_408(strict: Daemon) -> None:
    """The time is for all of it."""
    async with connected(strict) as client:
        await client.send(b"GET /health HTTP/1.1\r\n")
        ended = asyncio.ensure_future(client.answer())
        while not (await asyncio.wait({ended}, timeout=0.05))[0]:
            await client.send(b"X-Slow: 1\r\n")
        assert ended.result().status == 408


async def test_a_body_that_stops_coming_is_408(strict: Daemon) -> None:
    """On every route that takes one, be it small, large or on disk already; nothing of it is held any longer."""

    async def one(kind: str, size: int) -> None:
        async with connected(strict) as client:
            await client.send(begun(kind, size))
            answer = await refused(client, 408, "request_timeout")
            assert b"server.body_timeout (1 s)" in answer.body
            assert await client.closed()

    await asyncio.gather(*(one(kind, size) for kind in KINDS for size in (100, 700_000)), one("form", 3_000_000))
    await buffered(strict, 0)
    assert [target for target in open_files(strict.process.pid) if target.startswith("/tmp/tmp")] == []


async def test_a_late_body_is_told_as_anthropics_clients_read_it(strict: Daemon) -> None:
    """In their envelope."""
    async with connected(strict) as client:
        await client.send(request("/v1/messages", b"{", "Content-Length: 10"))
        answer = json.loads((await client.answer()).body)
        assert (answer["type"], answer["error"]["type"]) == ("error", "timeout_error")


async def test_a_session_that_names_no_model_is_ended(strict: Daemon) -> None:
    """As a body of which nothing comes."""
    async with strict.session.ws_connect("/v1/realtime") as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        event = await socket.receive_json()
        assert event["error"]["code"] == "request_timeout"
        message = await socket.receive()
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1008)


async def test_time_in_the_queue_is_time_of_the_request(strict: Daemon) -> None:
    """`request_timeout` ends a request that still waits for its model to load."""
    error = (await strict.post(CHAT, {"model": "loads"}, 504))["error"]
    assert (error["code"], error["message"]) == (
        "request_timeout", "cannot answer within request_timeout (0.3 s)",
    )  # fmt: skip
    await strict.eventually("/models/loads", lambda model: model["status"]["queued"] == 0)
