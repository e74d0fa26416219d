"""The fake engine starts as its options say, seen from outside: its process, its output, its port."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.running import FAKE, GONE, LISTENS, chat, come, core_of, engine, meanwhile, request, state

CHAT = "/v1/chat/completions"
PHASES = "import bind load weights profile compile capture listen".split()
# What is the last to be said in each phase, before its faults; nothing is said while it imports.
SAID = {
    "bind": b"non-default args: ",
    "load": b"Initializing a V1 LLM engine (v0.32.0) with config: ",
    "weights": b"Loading safetensors checkpoint shards:  50% Completed | 1/2 ",
    "profile": b"Model loading took ",
    "compile": b"Compiling a graph for compile range ",
    "capture": b"Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|",
    "listen": LISTENS,
}


# How it starts


def test_a_start_says_what_vllm_says() -> None:
    """Each phase in its order; vLLM's lines name their process, uvicorn's none; bars are drawn as tqdm draws them."""
    with engine() as running:
        running.until(SAID["listen"])
        places = [running.output.index(SAID[phase]) for phase in PHASES[1:]]
        assert places == sorted(places)
        named = re.compile(
            rb"^\((APIServer|EngineCore) pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[\w+\.py:\d+\] ", re.MULTILINE
        )
        lines = named.split(running.output)
        assert len(lines) > 30
        for text in (
            b"Starting to load model org/chat...\n",
            b"Loading weights took ",
            b"Starting vLLM server on http",
        ):
            assert any(line.startswith(text) for line in lines), text
        assert b"\n\rLoading safetensors checkpoint shards: 100% Completed | 2/2 " in running.output
        assert (
            len(re.findall(rb"^\rCapturing [^\n]*\rCapturing [^\n]*\rCapturing [^\n]*\n", running.output, re.MULTILINE))
            == 1
        )


@pytest.mark.parametrize("phase", PHASES)
def test_it_ends_at_any_phase(phase: str) -> None:
    """With code 1 and a last word, without a word of what would follow, and with all its processes."""
    with engine(f"--fake-exit-at={phase}") as running:
        output = running.rest()
        assert running.code() == 1
        assert output.endswith(b"RuntimeError: Engine core initialization failed.\n")
        for other, text in SAID.items():
            assert (text in output) == (PHASES.index(other) <= PHASES.index(phase)), other


def test_it_ends_with_the_code_and_the_words_that_are_asked_for() -> None:
    """As a start does that finds too little memory."""
    text = "ValueError: No available memory for the cache blocks."
    with engine("--fake-exit-at=profile", "--fake-exit-code=7", f"--fake-exit-text={text}") as running:
        assert running.rest().endswith(text.encode() + b"\n")
        assert running.code() == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_it_ends_by_a_signal_and_leaves_its_core(number: signal.Signals) -> None:
    """Without a last word and without a core file; nobody tells the engine core."""
    with engine("--fake-exit-at=weights", f"--fake-exit-signal={number}") as running:
        assert running.code() == -number
        running.until(SAID["weights"])
        assert b"RuntimeError" not in running.output
        assert state(core_of(running.output)) not in GONE


def test_the_faults_of_a_start_happen_once(tmp_path: Path) -> None:
    """The first start creates the file and fails; the next one serves, healthy and under its own names."""
    once = tmp_path / "once"
    flags = (f"--fake-once={once}", "--fake-exit-at=load", "--fake-unhealthy", "--fake-foreign")
    with engine(*flags) as first:
        assert first.code() == 1
        assert once.exists()
    with engine(*flags) as second:
        assert second.ask("/health")[0] == 200
        assert '"chat"' in second.ask("/v1/models")[1]


@pytest.mark.parametrize("phase", ["import", "bind", "weights", "capture"])
def test_it_hangs_in_silence(phase: str) -> None:
    """Another engine starts as a whole, and this one has not said another word and listens to nobody."""
    with engine(f"--fake-hang-at={phase}") as running:
        if phase in SAID:
            running.until(SAID[phase])
        meanwhile()
        following = SAID[PHASES[PHASES.index(phase) + 1]]
        assert following not in running.output + running.unsaid()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", running.port)):
            pass
        assert state(running.pid) == "S"


def test_it_hangs_when_it_listens() -> None:
    """The port takes connections, nobody answers, and SIGTERM changes nothing."""
    with engine("--fake-hang-at=listen") as running, running.connect() as connection:
        connection.sendall(request("/health"))
        os.kill(running.pid, signal.SIGTERM)
        meanwhile()
        assert come(connection) == b""
        assert state(running.pid) == "S"


@pytest.mark.parametrize("option", ["--fake-phase-until=weights={}", "--fake-load-until={}"])
def test_a_phase_lasts_until_a_file_exists(tmp_path: Path, option: str) -> None:
    """Until then it does not go on; then it comes to serve."""
    go = tmp_path / "go"
    with engine(option.format(go)) as running:
        running.until(SAID["weights" if "weights" in option else "load"])
        meanwhile()
        assert b"Loading weights took" not in running.output + running.unsaid()
        go.touch()
        assert running.ask("/health")[0] == 200


def test_several_phases_last_until_files_exist(tmp_path: Path) -> None:
    """The option takes several values, as a list of the configuration gives them."""
    one, two = tmp_path / "one", tmp_path / "two"
    with engine("--fake-phase-until", f"compile={one}", f"listen={two}") as running:
        running.until(SAID["compile"])
        one.touch()
        with running.connect() as connection:
            connection.sendall(request("/health"))
            meanwhile()
            assert come(connection) == b""
            two.touch()
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_an_unknown_phase_is_a_bad_option() -> None:
    """Exit code 2, as argparse ends vLLM."""
    with engine("--fake-phase-until=dessert=/x") as running:
        assert b"vllm serve: error: " in running.rest()
        assert running.code() == 2


def test_a_stolen_port_ends_the_start() -> None:
    """With the traceback of vLLM and exit code 1, whoever it was that took the port."""
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
        for flags, where in (((), port), (("--fake-steal-port",), None)):
            with engine(*flags, port=where) as running:
                output = running.rest()
                assert output.startswith(b"Traceback (most recent call last):\n")
                assert output.endswith(b"OSError: [Errno 98] Address already in use\n")
                assert running.code() == 1


def test_a_core_that_dies_while_it_loads_fails_the_start(tmp_path: Path) -> None:
    """Exit code 1 and vLLM's sentence, while it waits or hangs."""
    for fault in ("--fake-hang-at=weights", f"--fake-load-until={tmp_path}/never"):
        with engine(fault) as running:
            running.until(SAID["load"])
            os.kill(core_of(running.output), signal.SIGKILL)
            assert b"Engine core initialization failed. See root cause above. Failed core proc(s):" in running.rest()
            assert running.code() == 1


def test_it_imports_little() -> None:
    """No asyncio before its port is taken and its core runs, and never what the daemon is made of."""
    imported = {}
    for phase in ("load", "listen"):
        command = [sys.executable, "-S", "-X", "importtime", str(FAKE), "x", "--port=0", "--served-model-name", "x"]
        done = subprocess.run([*command, f"--fake-exit-at={phase}"], capture_output=True, check=False, env={})
        assert done.returncode == 1
        imported[phase] = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr.decode(), re.MULTILINE))
    assert not imported["load"] & {"asyncio", "subprocess", "threading", "http", "ssl"}
    assert "asyncio" in imported["listen"]
    assert not imported["listen"] & {"aiohttp", "http", "vllm_proxy", "uvloop"}


# Its log


def test_a_flood_does_not_keep_it_from_serving() -> None:
    """While nobody reads its log it answers; every byte of the flood comes, in whole lines."""
    size = 20_000_000
    with engine(f"--fake-flood={size}") as running:
        assert running.ask("/health")[0] == 200
        before = len(running.output)
        assert running.ask(CHAT, chat())[0] == 200
        while len(running.output) < before + 2**18:  # what is certainly flood
            running.output += os.read(running.out, 2**20)
        flood = running.output[running.output.index(SAID["listen"]) + len(SAID["listen"]) :]
        read = len(flood)
        while not flood.endswith(b"flood ended\n"):
            flood = flood[-100:] + os.read(running.out, 2**20)
            read += len(flood) - 100
        assert read - len(flood.splitlines(keepends=True)[-1]) == size


def test_garbage_in_the_log() -> None:
    """Half lines, bytes that are no text, NULs, colours, lone carriage returns, a line of a megabyte; it serves."""
    with engine("--fake-garbage-log") as running:
        assert running.ask("/health")[0] == 200
        with pytest.raises(UnicodeDecodeError):
            running.output.decode()
        for piece in (b"\0", b"\x1b[1;31m", b"\rsecond\r\r", b"half a line, and half of another\n"):
            assert piece in running.output
        assert max(len(line) for line in running.output.split(b"\n")) > 2**20
