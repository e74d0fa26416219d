"""The daemon as clients meet it, with fake engines as real processes."""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

from tests.harness import daemon, fake_engines, free_port

TWO_MODELS = """
[models.chat]
model = "org/chat"
aliases = ["gpt-4o-mini"]
max_model_len = 1234
[models.chat.args]
enable_prefix_caching = true
hf_overrides = { a = 1 }

["models"."org/embed"]
model = "org/embed"
replicas = 2

[models.off]
model = "org/off"
enabled = false
"""
READY = "2 of 2 models ready"


async def test_both_models_become_ready_and_answer_an_openai_client(tmp_path: Path, port_start: int) -> None:
    """An unmodified openai client chats with one model and embeds with another, through one address."""
    import openai  # it takes two seconds, in every process that collects this file

    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        await running.until(READY)
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
            assert answer.choices[0].message.content == "echo: hi"
            vector = await client.embeddings.create(model="org/embed", input="hi", encoding_format="float")
            assert vector.data[0].embedding == [0.25, 0.5]
            stream = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert (
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "t0 t1 t2 t3 t4 "
            )
            assert chunks[-1].usage is not None
            listed = [model.id async for model in client.models.list()]
            assert listed == ["chat", "org/embed", "gpt-4o-mini"]
            card = await client.models.retrieve("org/embed")
            assert (card.id, card.owned_by) == ("org/embed", "vllm-proxy")


async def test_requests_reach_the_engine_byte_for_byte(tmp_path: Path, port_start: int) -> None:
    """The body, odd spacing and key order included, and the path with its query arrive as they were sent."""
    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        await running.until(READY)
        body = b'{"stream":null,  "fake": {"echo": true},"x":1.50, "\\u00e4": 1e2,\n "model":"chat"}'
        seen = await running.post("/v1/chat/completions?a=%2F&b", body)
        assert seen["body"].encode() == body
        assert seen["path"] == "/v1/chat/completions?a=%2F&b"


async def test_an_alias_is_rewritten_to_the_id_and_nothing_else(tmp_path: Path, port_start: int) -> None:
    """The engine knows the id alone; every other value keeps its spelling."""
    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        await running.until(READY)
        seen = await running.post("/v1/completions", b'{"model": "gpt-4o-mini", "x": 1.50, "fake": {"echo": true}}')
        assert json.loads(seen["body"]) == {"model": "chat", "x": 1.5, "fake": {"echo": True}}
        assert "1.50" in seen["body"]


async def test_engines_get_their_own_credential_and_never_the_clients(tmp_path: Path, port_start: int) -> None:
    """What a client sends as Authorization stops at the daemon."""
    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        await running.until(READY)
        body = {"model": "chat", "fake": {"echo": True}}
        headers = {"Authorization": "Bearer client-secret", "Connection": "X-Secret", "X-Secret": "1", "X-Kept": "2"}
        async with running.session.post("/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.headers["X-Vllm-Proxy-Instance"] == "chat/0"
            assert answer.headers["X-Vllm-Proxy-Model"] == "chat"
            seen = {name.lower(): value for name, value in (await answer.json())["headers"]}
        assert "client-secret" not in str(seen)
        assert "x-secret" not in seen
        assert seen["x-kept"] == "2"


async def test_resources_show_what_is_asked_and_what_is(tmp_path: Path, port_start: int) -> None:
    """GET /models gives the keys as written, the effective ones, and each instance with pid, port and times in UTC."""
    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        await running.until(READY)
        await running.eventually(
            "/models/org/embed", lambda found: all(item["ready_at"] for item in found["status"]["instances"])
        )
        listing = await running.get("/models")
        chat, embed, off = listing["models"]
        assert chat["spec"]["args"] == {"enable_prefix_caching": True, "hf_overrides": {"a": 1}}
        assert chat["effective"]["max_model_len"] == 1234
        assert chat["effective"]["dtype"] is None
        assert chat["status"]["state"] == "ready"
        assert [instance["index"] for instance in embed["status"]["instances"]] == [0, 1]
        instances = chat["status"]["instances"] + embed["status"]["instances"]
        assert len({instance["port"] for instance in instances}) == 3
        assert all(port_start <= instance["port"] < port_start + 200 for instance in instances)
        assert all(instance["ready_at"].endswith("Z") for instance in instances)
        assert off["status"] == off["status"] | {"state": "stopped", "instances": []}
        assert await running.get("/models/org/embed") == await running.get("/models/org%2Fembed")
        assert (await running.get("/models/org/embed"))["id"] == "org/embed"
        async with running.session.get("/models") as answer:
            assert answer.headers["ETag"] == f'"{listing["revision"]}"'


async def test_health_ready_and_root(tmp_path: Path, port_start: int) -> None:
    """/health counts states, /ready waits for every model, / lists the endpoints."""
    gate = tmp_path / "go"
    slow = f'[models.slow]\nmodel = "x"\nargs = {{ fake_load_until = "{gate}" }}\n'
    async with daemon(fake_engines(port_start) + TWO_MODELS + slow, tmp_path) as running:
        await running.until(lambda status: status.startswith("2 of 3 models ready; loading: slow"))
        assert (await running.get("/ready", 503))["not_ready"] == {"slow": "loading"}
        health = await running.get("/health")
        assert health["models"] == {
            "ready": 2, "loading": 1, "stopped": 1, "sleeping": 0, "error": 0, "unloading": 0,
        }  # fmt: skip
        assert health["config"]["error"] is None
        gate.touch()
        await running.until("3 of 3 models ready")
        assert (await running.get("/ready"))["status"] == "ready"
        assert "POST /v1/chat/completions" in (await running.get("/"))["endpoints"]


async def test_every_answer_has_a_request_id(tmp_path: Path, port_start: int) -> None:
    """The daemon's own answers and errors too: the client's where it is usable, else a new one."""
    async with daemon(fake_engines(port_start) + TWO_MODELS, tmp_path) as running:
        for path in ("/health", "/models", "/v1/models", "/nowhere", "/models/nobody"):
            async with running.session.get(path, headers={"X-Request-Id": "mine-1"}) as answer:
                assert answer.headers["X-Request-Id"] == "mine-1", path
            async with running.session.get(path, headers={"X-Request-Id": "a, b"}) as answer:
                assert len(answer.headers.getall("X-Request-Id")) == 1
                assert "," not in answer.headers["X-Request-Id"], path


async def test_a_request_for_a_loading_model_waits_for_it(tmp_path: Path, port_start: int) -> None:
    """Clients need not know that a model is still loading."""
    gate = tmp_path / "go"
    config = f'[models.slow]\nmodel = "x"\nargs = {{ fake_load_until = "{gate}" }}\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        body = {"model": "slow", "messages": [{"content": "hi"}]}
        waiting = asyncio.create_task(running.post("/v1/chat/completions", body))
        await running.eventually("/models/slow", lambda resource: resource["status"]["queued"] == 1)
        gate.touch()
        assert (await waiting)["object"] == "chat.completion"


async def test_instances_that_share_a_gpu_load_one_after_another(tmp_path: Path, port_start: int) -> None:
    """A second engine on the same device is not started before the first one is ready, and says what it waits for."""
    gate = tmp_path / "go"
    config = f"""
    [defaults]
    devices = [0]
    [models.first]
    model = "x"
    args = {{ fake_load_until = "{gate}" }}
    [models.second]
    model = "x"
    """
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.eventually("/models/first", lambda found: found["status"]["instances"][0]["pid"])
        second = (await running.get("/models/second"))["status"]["instances"][0]
        assert (second["state"], second["phase"], second["pid"]) == ("loading", "queued", None)
        assert (second["reason"], second["message"]) == (None, "waits: first/0 loads on what it needs")
        gate.touch()
        await running.until("2 of 2 models ready")
        assert [(await running.instance(model))["message"] for model in ("first", "second")] == [None, None]


async def test_a_start_that_is_stopped_while_it_waits_says_no_more_what_for(tmp_path: Path, port_start: int) -> None:
    """Nothing is in the way of what nobody wants."""
    config = f"""
    [defaults]
    devices = [0]
    [models.first]
    model = "x"
    args = {{ fake_load_until = "{tmp_path / "go"}" }}
    [models.second]
    model = "x"
    """
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.once("second", lambda one: one["message"])
        await running.post("/models/second/stop", {}, 202)
        second = await running.once("second", lambda one: one["state"] == "stopped")
        assert second["message"] is None


async def test_the_listen_backlog_takes_a_burst_of_clients(tmp_path: Path, port_start: int) -> None:
    """Six hundred connections, made while the daemon is stopped dead, are all there when it goes on."""
    async with daemon(fake_engines(port_start), tmp_path) as running:
        running.process.send_signal(signal.SIGSTOP)
        clients = [socket.create_connection(("127.0.0.1", running.port), timeout=5) for _ in range(600)]
        running.process.send_signal(signal.SIGCONT)
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for client in clients:
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            client.close()


SYSTEMD_HOLDS = """
import os, socket, sys
held = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(held.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execvp(sys.argv[2], sys.argv[2:])
"""


async def test_that_systemd_holds_the_sockets_is_told(tmp_path: Path, port_start: int) -> None:
    """Since host and port of the file then have no effect: in the log with the addresses, and in /health."""
    port = free_port()
    text = "[server]\nport = 1\n" + fake_engines(port_start)
    below = [sys.executable, "-c", SYSTEMD_HOLDS, str(port)]
    async with daemon(text, tmp_path, below=below, listens_on=port) as running:
        config = (await running.get("/health"))["config"]
        assert (config["sockets_are_given"], config["pending_restart"]) == (True, [])
    log = (tmp_path / "daemon.log").read_text()
    assert "systemd holds the sockets: server.host, server.port and server.listen have no effect" in log
    assert f"http://127.0.0.1:{port}" in log
    async with daemon(fake_engines(port_start), tmp_path) as running:
        assert (await running.get("/health"))["config"]["sockets_are_given"] is False
