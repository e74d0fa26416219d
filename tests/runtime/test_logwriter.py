"""The queue in front of the log, with real pipes and devices."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vllm_proxy.runtime.logwriter import LogWriter

PIPE_BYTES = 64 * 1024  # that a pipe takes in while nobody reads


@dataclass
class Pipe:
    """A pipe; its two ends may be exchanged for others."""

    out: int
    into: int

    def until(self, text: bytes) -> str:
        """Read until this has come."""
        data = b""
        while text not in data:
            data += os.read(self.out, 2**20)
        return data.decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """One whose ends are closed afterwards."""
    made = Pipe(*os.pipe())
    yield made
    os.close(made.out)
    os.close(made.into)


def rest_of(pipe: Pipe) -> str:
    """What is in it now."""
    os.set_blocking(pipe.out, False)
    try:
        return os.read(pipe.out, 2**20).decode()
    except BlockingIOError:
        return ""
    finally:
        os.set_blocking(pipe.out, True)


def test_lines_come_out_in_order_from_any_thread_flushed_or_not(pipe: Pipe) -> None:
    """Batched lines are not overtaken by a flush."""
    with LogWriter(pipe.into) as log:
        for number in range(1000):
            log.write(f"line {number}\n")
            if number % 7 == 0:
                log.flush()
    assert rest_of(pipe).splitlines() == [f"line {number}" for number in range(1000)]
    assert log.dropped == 0


def test_what_nobody_flushes_is_written_soon_all_the_same(pipe: Pipe) -> None:
    """Nobody has to ask for it."""
    with LogWriter(pipe.into) as log:
        log.write("a request\n")
        assert pipe.until(b"\n") == "a request\n"


def test_nobody_waits_for_whoever_does_not_read(pipe: Pipe) -> None:
    """What finds no room is counted; once somebody reads, a line says in its place how much is missing."""
    line = "x" * 999 + "\n"
    with LogWriter(pipe.into, most_waiting=100_500) as log:
        os.write(pipe.into, b"y" * PIPE_BYTES)  # full
        log.write(line)
        log.flush()
        while log._waiting:
            pass  # the thread takes it, and is stuck with it
        while not log.dropped:
            log.write(line)
        for _ in range(9):
            log.write(line)
        assert log.dropped == 10
        log.write("small\n")  # finds room still
        text = pipe.until(b"small\n").lstrip("y")
    lines = text.splitlines()
    assert lines[-2:] == ["10 lines are missing here", "small"]
    assert lines[:-2] == [line.strip()] * 101


def test_what_cannot_be_written_is_counted_and_told_once_it_can(pipe: Pipe) -> None:
    """Whether nobody is there to read any more, or a disk is full."""
    broken = os.open("/dev/full", os.O_WRONLY)
    good = os.dup(pipe.into)
    os.dup2(broken, pipe.into)
    with LogWriter(pipe.into) as log:
        log.write("one\ntwo\n")
        log.flush()
        while log.dropped < 2:
            pass
        os.dup2(good, pipe.into)
        log.write("three\n")
    assert rest_of(pipe).splitlines() == ["2 lines are missing here", "three"]
    os.close(broken)
    os.close(good)


def test_a_reader_that_went_away_is_no_error(pipe: Pipe) -> None:
    """EPIPE is counted, and nothing is raised anywhere."""
    end, other = os.pipe()
    os.close(end)
    with LogWriter(other) as log:
        log.write("nobody reads this\n")
        log.flush()
    log.write("nor this\n")
    os.close(other)
    assert log.dropped == 2
    assert rest_of(pipe) == ""


def test_a_pipe_that_another_process_has_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    """It is waited for, as if it were a blocking one."""
    os.set_blocking(pipe.into, False)
    with LogWriter(pipe.into) as log:
        for number in range(200):
            log.write(f"{number:999}\n")
        log.flush()
        text = pipe.until(b" 199\n")
    assert [int(line) for line in text.splitlines()] == list(range(200))
    assert log.dropped == 0


def test_the_end_does_not_wait_for_ever(pipe: Pipe) -> None:
    """Who stops has a deadline, whoever reads or not."""
    os.write(pipe.into, b"y" * PIPE_BYTES)
    log = LogWriter(pipe.into).__enter__()
    log.write("last words\n")
    log.close(0.01)
    assert rest_of(pipe) == "y" * PIPE_BYTES
    log.write("later\n")
    assert log.dropped == 1


def test_what_waits_is_written_at_the_end(pipe: Pipe) -> None:
    """Though nobody flushed."""
    with LogWriter(pipe.into) as log:
        log.write("last words\n")
    assert rest_of(pipe) == "last words\n"


def test_what_is_no_text_is_written_with_escapes(pipe: Pipe) -> None:
    """A file's name may hold any bytes."""
    with LogWriter(pipe.into) as log:
        log.write("a name \udcff\n")
    assert rest_of(pipe) == "a name \\udcff\n"


def test_where_no_thread_can_be_made_the_log_is_written_all_the_same(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever logs."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with LogWriter(pipe.into) as log:
        log.write("one\n")
        log.flush()
        assert rest_of(pipe) == "one\n"
        log.write("two\n")
    assert rest_of(pipe) == "two\n"
