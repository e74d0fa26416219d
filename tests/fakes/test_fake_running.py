"""The fake engine runs and ends as its options and its controls say, seen from outside."""

import http.client
import os
import re
import signal
from pathlib import Path

import pytest

from tests.fakes.running import GONE, chat, come, engine, ignores, meanwhile, request, state

CHAT = "/v1/chat/completions"
WHO = {"server": "pid", "core": "core"}  # process -> its name in /fake/state


# While it runs


def test_counters_move_with_tokens() -> None:
    """Those of vLLM 0.32, with its labels: by a stream of three, and by nothing else."""
    with engine() as running:
        before = running.counters()
        assert running.counters() == before
        assert running.ask(CHAT, chat(stream=True, chunks=3))[0] == 200
        after = running.counters()
        assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 1
        assert after["generation_tokens_total"] - before["generation_tokens_total"] == 3
        assert after["iteration_tokens_total_count"] - before["iteration_tokens_total_count"] == 4
        assert set(after) >= {"kv_cache_usage_perc", "num_requests_running"}


def test_an_engine_may_keep_no_counters() -> None:
    """`/metrics` is there and holds nothing of vLLM's."""
    with engine("--fake-no-metrics") as running:
        status, text = running.ask("/metrics")
        assert status == 200
        assert "python_info" in text
        assert "vllm:" not in text


@pytest.mark.parametrize("how", ["/fake/freeze", "SIGSTOP"])
def test_a_frozen_engine_is_healthy_and_does_nothing(how: str) -> None:
    """No stream goes on, no new request gets a byte, counters stand still; the server answers. Then it goes on."""
    with engine() as running, running.connect() as stream, running.connect() as other:
        core = running.state()["core"]
        stream.sendall(request(CHAT, chat(stream=True, chunks=100_000)))
        assert stream.recv(12) == b"HTTP/1.1 200"
        if how == "SIGSTOP":
            os.kill(core, signal.SIGSTOP)
        else:
            assert running.ask(how)[0] == 200
        while not running.state()["frozen"]:
            pass
        come(stream)
        other.sendall(request(CHAT, chat()))
        before = running.counters()
        assert before["num_requests_running"] == 1
        assert running.ask("/health")[0] == running.ask("/v1/models")[0] == 200
        assert running.counters() == before
        assert come(stream) == come(other) == b""
        if how == "SIGSTOP":
            os.kill(core, signal.SIGCONT)
        else:
            assert running.ask("/fake/thaw")[0] == 200
        assert other.recv(12) == b"HTTP/1.1 200"
        assert stream.recv(1)


def test_a_busy_engine_counts_and_says_nothing() -> None:
    """Requests get no byte while counters move with each look; then they are answered."""
    with engine() as running, running.connect() as connection:
        assert running.ask("/fake/busy")[0] == 200
        connection.sendall(request(CHAT, chat()))
        first, second = running.counters(), running.counters()
        assert second["iteration_tokens_total_count"] > first["iteration_tokens_total_count"]
        assert second["generation_tokens_total"] > first["generation_tokens_total"]
        assert come(connection) == b""
        assert running.ask("/fake/thaw")[0] == 200
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_an_engine_falls_ill_and_gets_well() -> None:
    """`/health` and nothing else says so."""
    with engine("--fake-unhealthy") as running:
        for command, status in (("seen", 503), ("well", 200), ("sick", 503), ("well", 200)):
            assert running.ask(f"/fake/{command}")[0] == 200
            assert running.ask("/health")[0] == status
            assert running.ask(CHAT, chat())[0] == 200


# Its processes


def test_its_core_outlives_it() -> None:
    """SIGKILL of the server leaves the core, under vLLM's name and in the same session; a SIGTERM ends it."""
    with engine() as running:
        core = running.state()["core"]
        os.kill(running.pid, signal.SIGKILL)
        assert running.code() == -signal.SIGKILL
        assert Path(f"/proc/{core}/comm").read_text() == "VLLM::EngineCor\n"
        assert os.getsid(core) == running.pid
        assert not ignores(core, signal.SIGTERM)
        os.kill(core, signal.SIGTERM)
        running.rest()


def test_an_orphan_ignores_sigterm() -> None:
    """Its core lives on after the server's SIGKILL, SIGTERM or not; a server that ends in order takes it along."""
    with engine("--fake-orphan") as running:
        core = running.state()["core"]
        os.kill(running.pid, signal.SIGKILL)
        assert running.code() == -signal.SIGKILL
        assert ignores(core, signal.SIGTERM)
        assert state(core) not in GONE
    with engine("--fake-orphan") as running:
        assert running.ask("/health")[0] == 200
        os.kill(running.pid, signal.SIGTERM)
        assert running.code() == 0
        running.rest()


def test_a_stubborn_core_is_left_by_its_server() -> None:
    """The server ends in order, and the core is still there, ignoring SIGTERM."""
    with engine("--fake-stubborn-core") as running:
        core = running.state()["core"]
        os.kill(running.pid, signal.SIGTERM)
        assert running.code() == 0
        assert ignores(core, signal.SIGTERM)
        assert state(core) not in GONE


def test_a_core_has_workers() -> None:
    """They are in the session; they outlive server and core, and end with a server that ends in order."""
    with engine("--fake-grandchildren=2") as running:
        found = running.state()
        assert len(found["workers"]) == 2
        assert {os.getsid(pid) for pid in found["workers"]} == {running.pid}
        os.kill(running.pid, signal.SIGKILL)
        assert running.code() == -signal.SIGKILL
        os.kill(found["core"], signal.SIGKILL)
        assert all(state(pid) not in GONE for pid in found["workers"])
    with engine("--fake-grandchildren=2") as running:
        assert running.ask("/health")[0] == 200
        os.kill(running.pid, signal.SIGTERM)
        running.rest()
        assert running.code() == 0


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "lose-core", "die"])
def test_the_death_of_the_core_is_exit_code_0(end: str) -> None:
    """The server notices it, says EngineDeadError, and ends as if all were well."""
    with engine() as running:
        core = running.state()["core"]
        if end.startswith("SIG"):
            os.kill(core, signal.Signals[end])
        else:
            assert running.ask(f"/fake/{end}")[0] == 200
        assert b"vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue." in running.rest()
        assert running.code() == 0


def test_a_request_that_kills_the_engine_leaves_its_core() -> None:
    """The request's own fault: the server ends with 0 and the connection breaks, the process of the core stays."""
    with engine() as running:
        core = running.state()["core"]
        with pytest.raises(http.client.RemoteDisconnected):
            running.ask(CHAT, chat(die="before"))
        assert running.code() == 0
        running.until(b"EngineDeadError")
        assert state(core) not in GONE


@pytest.mark.parametrize("owner", ["core", "server"])
def test_shared_memory_is_left_by_who_is_killed(owner: str) -> None:
    """A file as vLLM makes them, mapped by the one that was asked for, there after SIGKILL; none after SIGTERM."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with engine(f"--fake-shm={owner}") as running:
            found = running.state()
            segment = Path(found["segment"])
            try:
                assert re.fullmatch(r"/dev/shm/psm_[0-9a-f]{8}", str(segment))
                maps = {who: Path(f"/proc/{found[pid]}/maps").read_text() for who, pid in WHO.items()}
                assert [who for who in WHO if str(segment) in maps[who]] == [owner]
                os.kill(running.pid, number)
                running.code()
                assert segment.exists() == (number == signal.SIGKILL)
            finally:
                segment.unlink(missing_ok=True)


# How it ends


def test_sigterm_waits_for_streams(tmp_path: Path) -> None:
    """With time to drain, the one in flight is finished; then exit code 0."""
    go = tmp_path / "go"
    with engine("--shutdown-timeout=15") as running, running.connect() as stream:
        stream.sendall(request(CHAT, chat(stream=True, chunks=3, hold=str(go))))
        while '"state":"open"' not in running.ask("/fake/seen")[1]:
            pass
        os.kill(running.pid, signal.SIGTERM)
        running.until(b"Waiting for connections to close.")
        go.touch()
        answer = http.client.HTTPResponse(stream)
        answer.begin()
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert running.code() == 0
        assert b"mode=drain timeout=15s" in running.rest()


def test_sigterm_without_a_time_to_drain_freezes_streams(tmp_path: Path) -> None:
    """The core is dead, the stream stands still, and the server stays until its client has gone."""
    go = tmp_path / "go"
    with engine() as running, running.connect() as stream:
        core = running.state()["core"]
        stream.sendall(request(CHAT, chat(stream=True, chunks=3, hold=str(go))))
        while '"state":"open"' not in running.ask("/fake/seen")[1]:
            pass
        os.kill(running.pid, signal.SIGTERM)
        running.until(b"Waiting for connections to close.")
        assert state(core) in GONE
        go.touch()
        meanwhile()
        assert b"data:" not in come(stream)
        assert state(running.pid) == "S"
        stream.close()
        assert running.code() == 0


def test_sigterm_may_be_ignored() -> None:
    """By the server; its core is not meant."""
    with engine("--fake-ignore-sigterm") as running:
        core = running.state()["core"]
        assert ignores(running.pid, signal.SIGTERM)
        assert not ignores(core, signal.SIGTERM)
