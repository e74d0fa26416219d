"""TLS at a running daemon: certificates that change under streams, pairs that cannot be used, clients that leave.

That bytes, WebSocket sessions, cut answers and deadlines are over TLS what they are without is in the modules about
those, which run over both.
"""

import asyncio
import json
import signal
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import certificates
from tests.certificates import Pair
from tests.harness import Client, Daemon, connected, daemon, fake_engines, port_block, request, until, vllm_proxy

PATH = "/v1/chat/completions"
MODELS = '[models.chat]\nmodel = "org/chat"\n'
STREAMS = 100
HEAD = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Pairs that are made once."""
    folder = tmp_path_factory.mktemp("made")
    return {name: certificates.make(folder, name) for name in ("one", "two")}


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Pair]) -> AsyncIterator[Daemon]:
    """One daemon for all of them; each test leaves `one` in force."""
    folder = tmp_path_factory.mktemp("tls")
    pair_of(folder).replace_with(made["one"])
    async with daemon(fake_engines(port_block()) + MODELS, folder, pair=pair_of(folder)) as running:
        await running.all_ready()
        yield running


def pair_of(folder: Path) -> Pair:
    """The files that the daemon is given."""
    return Pair(folder / "server.crt", folder / "server.key")


async def shown(running: Daemon, made: dict[str, Pair]) -> str:
    """The name in the certificate that a new client is shown."""
    trust = ssl.create_default_context()
    for pair in made.values():
        trust.load_verify_locations(pair.certificate)
    _, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trust, server_hostname="localhost")
    found = writer.get_extra_info("peercert")
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    writer.transport.abort()
    return str(dict(part[0] for part in found["subject"])["commonName"])


def told(**fault: Any) -> bytes:  # noqa: ANN401 - JSON
    """A body that tells the fake what to do."""
    return json.dumps({"model": "chat", "stream": True, "fake": fault}).encode()


async def test_certificates_are_swapped_under_running_streams_and_none_is_cut(
    shared: Daemon, made: dict[str, Pair], tmp_path: Path
) -> None:
    """A hundred of them go on to their end on the connections they have; whoever connects sees the new certificate."""
    go = tmp_path / "go"
    async with AsyncExitStack() as stack:
        clients: list[Client] = []
        for _ in range(STREAMS):
            client = await stack.enter_async_context(connected(shared))
            await client.send(request(PATH, told(chunks=4, hold_at=2, hold=str(go))))
            clients.append(client)
        for client in clients:
            await client.peek(b'"t1 "')
        pair_of(shared.folder).replace_with(made["two"])
        await until(lambda: shown(shared, made), lambda name: name == "two")
        go.touch()
        answers = await asyncio.gather(*(client.answer() for client in clients))
        assert [answer.whole for answer in answers] == [True] * STREAMS
        assert all(b'"t3 "' in answer.body and answer.body.endswith(b"data: [DONE]\n\n") for answer in answers)
        await clients[0].send(request(PATH, told(chunks=1)))
        assert (await clients[0].answer()).whole, "a connection that is kept goes on with the certificate that it has"
    pair_of(shared.folder).replace_with(made["one"])
    assert (await vllm_proxy(shared.folder, "reload"))[0] == 0
    assert await shown(shared, made) == "one", "a reload takes what is there at once"


async def test_a_pair_that_cannot_be_used_keeps_the_one_before_and_is_shown(
    shared: Daemon, made: dict[str, Pair]
) -> None:
    """In the health, the STATUS and the log; nothing of the files is, and all of it is over once the pair is good."""
    pair = pair_of(shared.folder)
    pair.key.write_bytes(made["two"].key.read_bytes())
    why = f"server.tls_key: cannot use {pair.key}: it is not the key of the certificate in server.tls_cert"
    health = await shared.eventually("/health", lambda found: found["error"])
    assert health["config"]["certificate_error"] == why
    assert health["config"]["error"] is None
    await shared.until(lambda status: status == f"1 of 1 models ready; certificate rejected: {why}")
    await shared.logged(why)
    assert await shown(shared, made) == "one"
    status, out, err = await vllm_proxy(shared.folder, "reload")
    assert (status, out) == (78, "nothing to do\n"), "the configuration itself is accepted"
    assert why in err
    pair.replace_with(made["one"])
    assert (await vllm_proxy(shared.folder, "reload"))[0] == 0
    health = await shared.get("/health")
    assert (health["error"], health["config"]["certificate_error"]) == (False, None)
    await shared.until("1 of 1 models ready")
    assert shared.log().count("the certificate is rejected") == 1
    await shared.logged("the certificate is accepted again")
    assert made["two"].key.read_text().splitlines()[1] not in shared.log()


async def test_sighup_looks_at_the_certificate_before_it_reports_that_all_is_ready(
    shared: Daemon, made: dict[str, Pair]
) -> None:
    """So a hook that renews certificates can say `systemctl reload`, and go on when that comes back."""
    pair_of(shared.folder).replace_with(made["two"])
    before = len(shared.notes.messages)
    shared.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(60):
        while "READY=1" not in shared.notes.messages[before:]:
            shared.notes.changed.clear()
            await shared.notes.changed.wait()
    assert await shown(shared, made) == "two"
    pair_of(shared.folder).replace_with(made["one"])
    assert (await vllm_proxy(shared.folder, "reload"))[0] == 0


async def test_the_address_says_https(shared: Daemon) -> None:
    """In the log, as it is printed."""
    await shared.logged(f"https://127.0.0.1:{shared.port}")


@pytest.mark.parametrize("how", ["gone", "in order"])
@pytest.mark.parametrize("where", ["before the first byte", "silent stream", "blocked writer"])
async def test_the_engine_of_a_client_that_left_is_told_at_once(shared: Daemon, where: str, how: str) -> None:
    """Whether it closes TLS in order or is simply gone; in each state of its request."""
    asked = {
        "before the first byte": told(hang="before"),
        "silent stream": told(chunks=3, hang=1),
        "blocked writer": told(raw=[HEAD], flood=2**28, end="keep"),
    }[where]
    request_id = uuid.uuid4().hex

    async def state() -> list[str]:
        return [seen["state"] for seen in await shared.seen(request_id)]

    async with connected(shared, receive_buffer=4096, limit=4096) as client:
        await client.send(request(PATH, asked, f"X-Request-Id: {request_id}"))
        await until(state, lambda found: found == ["open"])
        if where != "before the first byte":
            await client.reader.readuntil(b"\r\n\r\n")
        client.leave() if how == "gone" else client._writer.close()
        await until(state, lambda found: found == ["gone"])


async def test_a_bad_pair_is_a_problem_of_the_file_at_the_start(tmp_path: Path, made: dict[str, Pair]) -> None:
    """Exit status 78, with the line of the key; nothing listens before."""
    (tmp_path / "server.crt").write_bytes(made["one"].certificate.read_bytes())
    file = tmp_path / "models.toml"
    file.write_text('[server]\ntls_cert = "server.crt"\ntls_key = "server.key"\n', encoding="utf-8")
    status, _, said = await vllm_proxy(tmp_path, "serve", "-c", str(file))
    assert status == 78
    assert f"{file}:3: server.tls_key: cannot read {tmp_path}/server.key: No such file or directory" in said
    assert not (tmp_path / "state" / "control.sock").exists()


async def test_a_unix_socket_of_clients_speaks_no_tls(tmp_path: Path, made: dict[str, Pair]) -> None:
    """It is for a web server on this machine, which has certificates of its own; its file goes with the daemon."""
    path = tmp_path / "http.sock"
    pair_of(tmp_path).replace_with(made["one"])
    env = {"VLLM_PROXY_LISTEN": f"unix:{path}"}
    async with daemon(fake_engines(port_block()), tmp_path, env=env, pair=pair_of(tmp_path)) as running:
        running.unix, running.tls = path, None
        async with connected(running) as client:
            await client.send(request("/health", b"", method="GET"))
            assert (await client.answer()).status == 200
        await running.logged(f"https://127.0.0.1:{running.port}, unix:{path}")
        other = (tmp_path / "other").resolve()
        other.mkdir()
        (other / "models.toml").write_text("", encoding="utf-8")
        env = {"VLLM_PROXY_LISTEN": f"unix:{path}"}
        status, _, said = await vllm_proxy(other, "serve", "-c", str(other / "models.toml"), env=env)
        assert (status, "it is taken" in said) == (1, True)
        async with connected(running) as client:
            await client.send(request("/health", b"", method="GET"))
            assert (await client.answer()).status == 200
    assert not path.exists()
