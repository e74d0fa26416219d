"""The fake sleeps and wakes as vLLM 0.32 does, with what goes wrong there."""

import contextlib
import json
import os
import signal
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.ledger import GIB, Devices
from tests.fakes.running import GONE, LISTENS, Engine, chat, come, engine, meanwhile, request, state

CHAT = "/v1/chat/completions"
TOTAL = 80 * GIB
CONTEXT = int(0.6 * GIB)
RESIDUE = CONTEXT + int(0.67 * GIB)
WEIGHTS = 10 * GIB  # a quarter of half a device
DEVELOPS = {"VLLM_SERVER_DEV_MODE": "1"}
AWAKE = (200, {"status": "awake", "tags": None})


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    """One."""
    with Devices(tmp_path / "devices.toml", {"0": TOTAL}) as found:
        yield found


@contextlib.contextmanager
def sleeper(devices: Devices, *flags: str) -> Iterator[Engine]:
    """An engine on the device that may sleep."""
    on = [f"--fake-ledger={devices.file}", "--gpu-memory-utilization=0.5", "--enable-sleep-mode"]
    with engine(*on, *flags, env=DEVELOPS | {"CUDA_VISIBLE_DEVICES": "0"}) as running:
        running.until(LISTENS)
        yield running


def post(running: Engine, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and value of a call."""
    status, text = running.ask(path, body, "POST")
    return status, json.loads(text)


def is_sleeping(running: Engine) -> bool:
    """As it says."""
    status, text = running.ask("/is_sleeping")
    assert status == 200
    found: bool = json.loads(text)["is_sleeping"]
    return found


def says(running: Engine) -> str:
    """What it answers to a chat."""
    status, text = running.ask(CHAT, {"model": "chat", "messages": [{"content": "hi"}]})
    assert status == 200
    found: str = json.loads(text)["choices"][0]["message"]["content"]
    return found


def free(devices: Devices) -> int:
    """What the daemon would read."""
    found: int = tomllib.loads(devices.file.read_text())["0"]["free"]
    return found


@contextlib.contextmanager
def asking(running: Engine, path: str = CHAT, *, method: str = "POST", **fault: object) -> Iterator[socket.socket]:
    """A request that it has got, with what it has answered by then unread."""
    with running.connect() as connection:
        body = chat(**fault) if path == CHAT else None  # type: ignore[arg-type]
        before = len(json.loads(running.ask("/fake/seen")[1]))
        connection.sendall(request(path, body, method))
        while len(json.loads(running.ask("/fake/seen")[1])) == before:
            pass
        yield connection


def until_working(running: Engine, what: str) -> None:
    """Wait until its core is held up by this."""
    while running.state()["working"] != what:
        pass


def until_free(devices: Devices, wanted: int) -> None:
    """Wait until so much is free."""
    while free(devices) != wanted:
        pass


# Where it listens, and what it takes


def test_it_listens_on_a_unix_socket(tmp_path: Path) -> None:
    """There and on no port; where there is a file already, the start fails as on a taken port."""
    uds = tmp_path / "socket"
    with engine(uds=uds) as running:
        assert says(running) == "echo: hi"
        assert f"Starting vLLM server on unix:{uds}\n".encode() in running.output
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", running.port)):
            pass
    assert uds.is_socket()
    with engine(uds=uds) as running:
        assert running.rest().endswith(b"OSError: [Errno 98] Address already in use\n")
        assert running.code() == 1


def test_only_the_development_mode_has_its_routes() -> None:
    """Without it they are not found; with it they want no key, and say what is wrong with a request."""
    with engine(env={"VLLM_API_KEY": "k"}) as running:
        for path in ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc"):
            assert running.ask(path, {})[0] == running.ask(path)[0] == 404
    with engine(env=DEVELOPS | {"VLLM_API_KEY": "k"}) as running:
        assert running.ask("/v1/models")[0] == 401
        assert not is_sleeping(running)
        assert running.ask("/sleep")[0] == running.ask("/is_sleeping", {})[0] == 405
        for path, parameter in (("/sleep?level=3", "query.level"), ("/sleep?mode=later", "query.mode")):
            assert post(running, path)[1]["error"]["param"] == parameter
            assert post(running, path)[0] == 400
        assert post(running, "/collective_rpc")[0] == 400
        assert post(running, "/collective_rpc", {"method": "dance"})[0] == 500
        assert not is_sleeping(running)


def test_sleep_mode_wants_devices(devices: Devices) -> None:
    """On the CPU its start fails, before there is a core; so it does where it sees no device."""
    ledger = f"--fake-ledger={devices.file}"
    for flags, env in (((), {}), ((ledger,), {"CUDA_VISIBLE_DEVICES": ""})):
        with engine("--enable-sleep-mode", *flags, env=env) as running:
            output = running.rest()
            assert b"  Value error, Sleep mode is not supported on current platform. [type=value_error, " in output
            assert b"EngineCore" not in output
            assert running.code() == 1


# What becomes of requests


def test_a_sleeper_takes_requests_and_answers_none() -> None:
    """It is as healthy as before, its counters stand, and all are answered once it is awake."""
    with engine(env=DEVELOPS) as running:
        assert post(running, "/sleep?level=2&mode=wait") == (200, {"status": "sleeping", "level": 2})
        with asking(running) as one, asking(running, stream=True) as other:
            before = running.counters()
            meanwhile()
            assert come(one) == come(other) == b""
            assert running.ask("/health")[0] == running.ask("/v1/models")[0] == 200
            assert running.counters() == before
            assert is_sleeping(running)
            assert post(running, "/wake_up") == AWAKE
            assert one.recv(12) == other.recv(12) == b"HTTP/1.1 200"
        assert not is_sleeping(running)
        assert says(running) == "echo: hi"  # nothing was freed on the CPU, whatever the level


def test_only_the_query_counts() -> None:
    """A body asks for nothing: the defaults are level 1, and the end of whatever runs."""
    with engine(env=DEVELOPS) as running, asking(running, stream=True, chunks=1, hang=0) as stream:
        answer = post(running, "/sleep", {"level": 2, "mode": "wait"})
        assert answer == (200, {"status": "sleeping", "level": 1})
        while b"[DONE]" not in (data := stream.recv(2**16, socket.MSG_PEEK)):
            pass
        assert b'"finish_reason":"abort"' in data
        stream.recv(2**16)


def test_abort_ends_what_runs_and_what_waits() -> None:
    """Each answer is a whole one, with an end that says so; but for a stream that never ran, which just ends."""
    with engine(env=DEVELOPS) as running:
        with asking(running, stream=True, hang=3) as stream, asking(running, hang="before") as plain:
            while b"t2 " not in stream.recv(2**16, socket.MSG_PEEK):
                pass
            assert post(running, "/sleep?level=0")[0] == 200
            while b"[DONE]" not in (data := stream.recv(2**16, socket.MSG_PEEK)):
                pass
            assert data.count(b"HTTP/1.1") == 1
            assert b"t3 " not in data
            assert b'"finish_reason":"abort"' in data
            assert b'"finish_reason":"abort"' in plain.recv(2**16)
        with asking(running) as waits, asking(running, stream=True) as stream:
            assert post(running, "/sleep?mode=abort")[0] == 200
            assert b'"finish_reason":"abort"' in waits.recv(2**16)
            while b"[DONE]" not in (data := stream.recv(2**16, socket.MSG_PEEK)):
                pass
            assert data.count(b'"finish_reason":null') == data.count(b'"finish_reason"') == 1


def test_wait_lets_what_runs_end(tmp_path: Path) -> None:
    """New requests hang meanwhile, and it calls itself asleep; memory is not touched before the last has ended."""
    go = tmp_path / "go"
    with (
        engine(env=DEVELOPS) as running,
        asking(running, hold=str(go)) as runs,
        asking(running, "/sleep?mode=wait") as call,
    ):
        while not is_sleeping(running):
            pass
        with asking(running) as new:
            meanwhile()
            assert come(call) == come(new) == come(runs) == b""
            assert running.state()["asleep"] == []
            go.touch()
            assert b"echo: " in runs.recv(2**16)
            assert b'{"status":"sleeping","level":1}' in call.recv(2**16)
            assert running.state()["asleep"] == ["kv_cache", "weights"]
            assert come(new) == b""


def test_keep_freezes_what_runs() -> None:
    """Not a byte comes, then the rest of the stream, where it was."""
    with engine(env=DEVELOPS) as running, asking(running, stream=True, chunks=100_000) as stream:
        assert post(running, "/sleep?mode=keep")[0] == 200
        come(stream)
        meanwhile()
        assert come(stream) == b""
        assert post(running, "/wake_up") == AWAKE
        assert b'"delta"' in stream.recv(2**16)


def test_a_call_goes_on_without_its_client(tmp_path: Path) -> None:
    """One that has left while requests ran; the engine sleeps all the same, later."""
    go = tmp_path / "go"
    with engine(env=DEVELOPS) as running, asking(running, hold=str(go)):
        with asking(running, "/sleep?mode=wait"):
            pass
        go.touch()
        while running.state()["asleep"] != ["kv_cache", "weights"]:
            pass


def test_a_core_that_works_answers_nobody_else(tmp_path: Path) -> None:
    """Not even whether it sleeps; the server is healthy meanwhile."""
    go = tmp_path / "go"
    with engine(f"--fake-sleep-until={go}", env=DEVELOPS) as running, asking(running, "/sleep") as call:
        until_working(running, "sleep")
        with asking(running, "/is_sleeping", method="GET") as other:
            meanwhile()
            assert come(call) == come(other) == b""
            assert running.ask("/health")[0] == 200
            go.touch()
            assert b'{"is_sleeping":true}' in other.recv(2**16)


def test_a_sleeper_that_is_told_to_sleep_again_changes_nothing(devices: Devices) -> None:
    """It answers with the level that was asked for, and is woken as from the first."""
    with sleeper(devices) as running:
        assert post(running, "/sleep?level=1") == (200, {"status": "sleeping", "level": 1})
        before = free(devices)
        assert post(running, "/sleep?level=2") == (200, {"status": "sleeping", "level": 2})
        assert free(devices) == before
        assert running.state()["sleeps"] == 1
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "echo: hi"
        assert post(running, "/wake_up") == AWAKE  # so it says, and does nothing
        assert running.state()["wakes"] == 1


# What becomes of memory


def test_level_1_moves_weights_to_the_host(devices: Devices) -> None:
    """Weights and KV cache are free, the residue is not; the host has the weights 1.8 times, and keeps them so."""
    with sleeper(devices) as running:
        awake = {"context": CONTEXT, "rest": RESIDUE - CONTEXT, "weights": WEIGHTS, "kv": 30 * GIB - RESIDUE + CONTEXT}
        assert devices.holders() == [("chat", {"0": awake})]
        assert free(devices) == TOTAL - CONTEXT - TOTAL // 2
        assert not devices.host()
        assert post(running, "/sleep?level=1")[0] == 200
        assert free(devices) == TOTAL - RESIDUE
        assert devices.host() == {"chat": int(WEIGHTS * 1.8)}
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "echo: hi"
        assert devices.holders() == [("chat", {"0": awake})]
        assert devices.host() == {"chat": int(WEIGHTS * 1.8)}
    until_free(devices, TOTAL)
    assert not devices.host()
    assert not devices.events()


def test_level_0_frees_nothing(devices: Devices) -> None:
    """Nor does any level without the option; it pauses."""
    with sleeper(devices) as running:
        before = free(devices)
        assert post(running, "/sleep?level=0") == (200, {"status": "sleeping", "level": 0})
        assert is_sleeping(running)
        assert free(devices) == before
        assert post(running, "/wake_up?tags=scheduling") == (200, {"status": "awake", "tags": ["scheduling"]})
    with sleeper(devices, "--no-enable-sleep-mode") as running:
        assert post(running, "/sleep?level=2")[0] == 200
        assert is_sleeping(running)
        assert free(devices) == before
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "echo: hi"


def test_the_residue_is_as_asked_for(devices: Devices) -> None:
    """Also of an engine without a KV cache; less than its context it cannot be."""
    with sleeper(devices, f"--fake-residue={2 * GIB}", f"--fake-hold={5 * GIB}") as running:
        assert free(devices) == TOTAL - CONTEXT - 5 * GIB
        assert post(running, "/sleep?level=2")[0] == 200
        assert free(devices) == TOTAL - 2 * GIB
        assert not devices.host()
        assert post(running, "/wake_up") == AWAKE
        assert free(devices) == TOTAL - CONTEXT - 5 * GIB
    with engine("--fake-residue=1", env={}) as running:
        assert b"--fake-residue: " in running.rest()
        assert running.code() == 2


def test_level_2_is_woken_in_three_steps(devices: Devices) -> None:
    """Weights' memory, the weights, the KV cache: only then it is awake, and its answers are as before."""
    with sleeper(devices) as running, asking(running) as before:
        assert b"echo: " in before.recv(2**16)
        assert post(running, "/sleep?level=2")[0] == 200
        assert free(devices) == TOTAL - RESIDUE
        assert post(running, "/wake_up?tags=weights") == (200, {"status": "sleeping", "tags": ["weights"]})
        assert free(devices) == TOTAL - RESIDUE - WEIGHTS
        assert is_sleeping(running)
        assert post(running, "/collective_rpc", {"method": "reload_weights"}) == (200, {"results": [None]})
        assert post(running, "/wake_up?tags=kv_cache") == (200, {"status": "awake", "tags": ["kv_cache"]})
        assert free(devices) == TOTAL - CONTEXT - TOTAL // 2
        assert says(running) == "echo: hi"
        assert (running.state()["sleeps"], running.state()["reloads"]) == (1, 1)


def test_level_2_without_its_weights_answers_garbage(devices: Devices) -> None:
    """Whole, with 200 and without a warning, in every form; until they are read again."""
    with sleeper(devices) as running:
        assert post(running, "/sleep?level=2")[0] == 200
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "!!!!"
        text = post(running, "/v1/completions", {"model": "chat", "prompt": "hi", "max_tokens": 1})[1]
        assert text["choices"][0]["text"] == "!!!!"
        assert post(running, "/v1/embeddings", {"model": "chat", "input": "hi"})[1]["data"][0]["embedding"] == [0, 0]
        assert '"!!!!"' in running.ask(CHAT, chat(stream=True))[1]
        assert post(running, "/sleep?level=1")[0] == post(running, "/wake_up")[0] == 200
        assert says(running) == "!!!!"  # they were kept as they were
        assert post(running, "/collective_rpc", {"method": "reload_weights"})[0] == 200
        assert says(running) == "echo: hi"


def test_weights_are_not_read_into_memory_that_is_not_there(devices: Devices) -> None:
    """The call fails, and it sleeps on."""
    with sleeper(devices) as running:
        assert post(running, "/sleep?level=2")[0] == 200
        status, answer = post(running, "/collective_rpc", {"method": "reload_weights"})
        assert status == 500
        assert "illegal memory access" in answer["error"]["message"]
        assert is_sleeping(running)


def test_a_wake_without_room_stays_half_mapped(devices: Devices) -> None:
    """It fails with what CUDA says, keeps what it has taken, and fails for good, whatever room there is later."""
    with sleeper(devices) as running:
        assert post(running, "/sleep?level=1")[0] == 200
        with devices.taken("0", TOTAL - RESIDUE - WEIGHTS - 4 * GIB):
            status, answer = post(running, "/wake_up")
            assert status == 500
            assert answer["error"]["message"].startswith("Call to wake_up method failed: CUDA Error: out of memory at ")
            assert free(devices) < 4 * GIB
        kept = free(devices)
        assert kept < TOTAL - RESIDUE - WEIGHTS
        assert post(running, "/wake_up")[0] == 500
        assert free(devices) == kept
        assert is_sleeping(running)
        assert running.ask("/health")[0] == 200
        assert [event["what"] for event in devices.events()] == ["out of memory"]
        os.killpg(running.pid, signal.SIGKILL)
        until_free(devices, TOTAL)


def test_a_neighbour_that_takes_memory_makes_a_sleep_fail(devices: Devices, tmp_path: Path) -> None:
    """More than was freed, meanwhile: the worker thinks that it freed nothing, and it was freed all the same."""
    go = tmp_path / "go"
    flags = (f"--fake-sleep-until={go}", "--gpu-memory-utilization=0.25")
    with sleeper(devices, *flags) as running, asking(running, "/sleep") as call:
        until_working(running, "sleep")
        before = free(devices)
        with devices.taken("0", before):
            go.touch()
            assert call.recv(12) == b"HTTP/1.1 500"
        assert free(devices) == TOTAL - RESIDUE
        assert post(running, "/wake_up") == AWAKE
        assert free(devices) == TOTAL - RESIDUE


def test_a_sleeper_that_frees_or_takes_disturbs_who_profiles(devices: Devices, tmp_path: Path) -> None:
    """As any other does: freed memory ends that start."""
    go = tmp_path / "go"
    with sleeper(devices) as running:
        flags = [f"--fake-ledger={devices.file}", "--gpu-memory-utilization=0.2", f"--fake-phase-until=profile={go}"]
        with engine(*flags, env={"CUDA_VISIBLE_DEVICES": "0"}) as other:
            other.until(b"Model loading took")
            assert post(running, "/sleep")[0] == 200
            go.touch()
            assert b"AssertionError: Error in memory profiling." in other.rest()


# Faults


def test_a_sleep_that_lies(devices: Devices) -> None:
    """It says what a good one says, and nothing is freed."""
    with sleeper(devices, "--fake-sleep=lies") as running:
        before = free(devices)
        assert post(running, "/sleep") == (200, {"status": "sleeping", "level": 1})
        assert is_sleeping(running)
        assert free(devices) == before
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "echo: hi"


def test_a_sleep_that_fails_after_freeing(devices: Devices) -> None:
    """500, memory is gone, a wake says awake and maps nothing; the next request is the end of the engine."""
    with sleeper(devices, "--fake-sleep=fails-after-freeing") as running:
        status, answer = post(running, "/sleep")
        assert status == 500
        assert answer["error"]["message"] == "Call to sleep method failed: Memory usage increased after sleeping."
        assert free(devices) == TOTAL - RESIDUE
        assert is_sleeping(running)  # it is paused
        assert post(running, "/wake_up") == AWAKE
        assert free(devices) == TOTAL - RESIDUE
        assert not is_sleeping(running)
        assert running.ask(CHAT, chat())[0] == 500
        assert running.code() == 0
        until_free(devices, TOTAL)


def test_what_was_frozen_does_not_survive_a_failed_sleep(devices: Devices) -> None:
    """A stream that would go on finds no memory: the engine dies in the midst of it."""
    with sleeper(devices, "--fake-sleep=fails-after-freeing") as running:
        with asking(running, stream=True, chunks=100_000) as stream, running.connect() as wake:
            assert stream.recv(12) == b"HTTP/1.1 200"
            assert post(running, "/sleep?mode=keep")[0] == 500
            wake.sendall(request("/wake_up", None, "POST"))  # its answer may not come any more
            while stream.recv(2**20):
                pass
        assert running.code() == 0


@pytest.mark.parametrize(("flag", "call"), [("--fake-sleep=dies", "/sleep"), ("--fake-wake=dies", "/wake_up")])
def test_a_core_that_dies_of_a_call(devices: Devices, flag: str, call: str) -> None:
    """The server ends with it, exit code 0 and without an answer; memory comes back."""
    with sleeper(devices, flag) as running:
        if call == "/wake_up":
            assert post(running, "/sleep")[0] == 200
        core = running.state()["core"]
        with running.connect() as connection:
            connection.sendall(request(call, None, "POST"))
            assert connection.recv(1) == b""
        assert running.code() == 0
        assert state(core) in GONE
        until_free(devices, TOTAL)


@pytest.mark.parametrize(
    ("flag", "call", "what"), [("--fake-sleep=slow", "/sleep", "sleep"), ("--fake-wake=hangs", "/wake_up", "wake")]
)
def test_a_call_that_does_not_end(devices: Devices, flag: str, call: str, what: str) -> None:
    """No answer, of anything that asks the core; what does not is as before."""
    with sleeper(devices, flag) as running:
        if call == "/wake_up":
            assert post(running, "/sleep")[0] == 200
        with asking(running, call) as connection, asking(running, "/is_sleeping", method="GET") as other:
            until_working(running, what)
            meanwhile()
            assert come(connection) == come(other) == b""
            assert running.ask("/health")[0] == 200
            assert free(devices) == TOTAL - CONTEXT - TOTAL // 2  # not yet free, or taken already


def test_a_wake_that_finds_no_memory(devices: Devices) -> None:
    """Though there is: half of the weights is mapped, for good."""
    with sleeper(devices, "--fake-wake=oom") as running:
        assert post(running, "/sleep")[0] == 200
        for _ in range(2):
            status, answer = post(running, "/wake_up")
            assert (status, answer["error"]["type"]) == (500, "InternalServerError")
            assert free(devices) == TOTAL - RESIDUE - WEIGHTS // 2
        assert is_sleeping(running)


def test_a_wake_to_garbage(devices: Devices) -> None:
    """It says awake, and answers garbage, even where its weights were read again."""
    with sleeper(devices, "--fake-wake=garbage") as running:
        assert says(running) == "echo: hi"
        assert post(running, "/sleep?level=1")[0] == 200
        assert post(running, "/wake_up") == AWAKE
        assert says(running) == "!!!!"
        assert post(running, "/collective_rpc", {"method": "reload_weights"})[0] == 200
        assert says(running) == "!!!!"


def test_faults_of_sleep_happen_once(tmp_path: Path) -> None:
    """To the first that starts; without devices they are the same, but for memory."""
    flags = (f"--fake-once={tmp_path}/once", "--fake-sleep=fails-after-freeing", "--fake-wake=garbage")
    with engine(*flags, env=DEVELOPS) as first:
        assert post(first, "/sleep")[0] == 500
    with engine(*flags, env=DEVELOPS) as second:
        assert post(second, "/sleep")[0] == 200
        assert post(second, "/wake_up") == AWAKE
        assert says(second) == "echo: hi"
