"""What is seen of an engine that says nothing: with real processes that do what an engine does."""

import asyncio
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE

from vllm_proxy.domain.lifecycle import Phase
from vllm_proxy.engine.output import Output
from vllm_proxy.engine.ownership import Identity, Owned
from vllm_proxy.engine.proc import look_up
from vllm_proxy.engine.vitals import Work, work


def output(folder: Path, text: str = "", weights_bytes: int = 0) -> Output:
    """Of an engine that has written this so far."""
    file = folder / "engine.log"
    file.write_text(text)
    return Output("chat/0", file, 0, 0, lambda *_: None, weights_bytes=weights_bytes)


async def pumped(of: Output, look: Callable[[], Work], holds: Callable[[], bool]) -> None:
    """Read on until something holds."""
    pump = asyncio.create_task(of.pump(look, quiet=0))
    while not holds():
        await asyncio.sleep(0)
    pump.cancel()
    await asyncio.wait({pump})


def session(script: str) -> subprocess.Popen[str]:
    """A shell that leads a session and says when it is so far."""
    return subprocess.Popen(["sh", "-c", script], start_new_session=True, stdin=PIPE, stdout=PIPE, text=True)


def work_of(process: subprocess.Popen[str]) -> Work:
    """What it does, once it said something."""
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    found = look_up(process.pid)
    assert found is not None
    return work(Owned(Identity(found.pid, found.started)))


def test_the_largest_weights_that_it_named_stay_known(tmp_path: Path) -> None:
    """Each process of several names its own; what an earlier daemon has read, the next one does not find in the log."""
    lines = "".join(f"Model loading took {size} GiB memory and 2.5 seconds\n" for size in (1.5, 2, 1.75))
    for text, before, known in ((lines, 0, 2 * 2**30), ("", 2**30, 2**30)):
        of = output(tmp_path, text, weights_bytes=before)
        asyncio.run(of.finish())
        assert of.weights_bytes == known


def test_what_it_wrote_just_before_it_was_ready_is_looked_at(tmp_path: Path) -> None:
    """Though nobody has read it yet; what a serving engine writes is not looked at, and all of it is passed on."""
    file = tmp_path / "log"
    told: list[str] = []
    output = Output("chat/0", file, 0, 0, lambda _, lines: told.extend(lines))
    file.write_text("Model loading took 2.5 GiB memory and 1.0 seconds\n")
    output.loaded()
    with file.open("a") as log:
        log.write("Model loading took 9.5 GiB memory and 1.0 seconds\n")
    output._read()
    assert output.weights_bytes == 2.5 * 2**30
    assert len(told) == 2


def test_a_file_that_is_not_fetched_whole_yet_is_a_download(tmp_path: Path) -> None:
    """Any process of the session may hold it open; huggingface_hub names such a file `*.incomplete`."""
    for script, downloads in {
        f"exec 3>{tmp_path}/4a5b.incomplete; (echo there; read -r go)": True,
        f"exec 3>{tmp_path}/model.safetensors; (echo there; read -r go)": False,
    }.items():
        with session(script) as process:
            assert work_of(process).downloads is downloads
            process.kill()


def test_bytes_that_are_written_are_work(tmp_path: Path) -> None:
    """A loading engine reads and writes, though it says nothing."""
    with session(f"head -c 3000000 /dev/zero >{tmp_path}/file; echo there; read -r go") as process:
        before = work_of(process).moved_bytes
        process.kill()
    with session("echo there; read -r go") as idle:
        assert before > 3_000_000 > work_of(idle).moved_bytes
        idle.kill()


async def test_a_silent_download_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """VLLM says nothing about a download until it has ended, and it may take an hour."""
    found = output(tmp_path)
    await pumped(found, lambda: Work(0, downloads=True), lambda: found.progress.phase is Phase.DOWNLOADING)


async def test_bytes_that_move_keep_a_silent_start_alive(tmp_path: Path) -> None:
    """Each MiB counts as one thing that the engine did; `startup_timeout` begins anew."""
    found, moved = output(tmp_path), iter(range(0, 2**40, 2**21))
    await pumped(found, lambda: Work(next(moved), downloads=False), lambda: found.activity > 3)


async def test_heartbeats_of_a_hanging_engine_are_no_progress(tmp_path: Path) -> None:
    """Some bytes always move, and some lines are said for ever."""
    asked: list[int] = []

    def look() -> Work:
        asked.append(1)
        return Work(len(asked), downloads=False)

    text = "INFO 11-24 08:00:00 [shm_broadcast.py:456] No available shared memory broadcast block found in 60 s.\n"
    found = output(tmp_path, text)
    await pumped(found, look, lambda: len(asked) > 3)
    assert found.activity == 0


def told_by(folder: Path, text: str) -> tuple[Output, list[str]]:
    """The output of an engine that has written this, and what is passed on of it."""
    told: list[str] = []
    file = folder / "engine.log"
    file.write_text(text)
    return Output("chat/0", file, 0, 0, lambda _, lines: told.extend(lines)), told


async def test_the_rest_is_taken_in_when_an_engine_has_ended(tmp_path: Path) -> None:
    """All of it, the line that it did not finish too, with turns for everybody else in between."""
    lines = [f"line {number}" for number in range(20_000)]
    found, told = told_by(tmp_path, "\n".join(lines))
    finishing = asyncio.create_task(found.finish())
    seen = 0
    while not finishing.done():
        seen += 1
        await asyncio.sleep(0)
    assert told == lines
    assert seen > 10


async def test_a_log_that_grows_for_ever_is_not_read_for_ever(tmp_path: Path) -> None:
    """What has escaped of a dead engine may write on as fast as anybody can read."""

    def write_on(_: str, lines: Sequence[str]) -> None:
        with file.open("a") as log:
            log.write("and goes on\n" * 2 * len(lines))

    file = tmp_path / "engine.log"
    file.write_text("it ends\n" * 4000)
    await Output("chat/0", file, 0, 0, write_on).finish()
    assert file.stat().st_size > 2**20


async def test_an_engine_that_writes_much_is_followed_piece_by_piece(tmp_path: Path) -> None:
    """Between two pieces of 16 KiB everybody else has a turn."""
    found, told = told_by(tmp_path, "x\n" * 100_000)
    steps: list[int] = []
    pump = asyncio.create_task(found.pump(lambda: Work(0, downloads=False)))
    while len(told) < 100_000:
        steps.append(len(told))
        await asyncio.sleep(0)
    pump.cancel()
    await asyncio.wait({pump})
    assert max(later - earlier for earlier, later in pairwise(steps)) <= 8192


async def test_only_the_beginning_of_a_line_is_looked_at(tmp_path: Path) -> None:
    """The rest may be a dump of anything, and what makes expressions slow."""
    found, _ = told_by(
        tmp_path, "Loading " * 2000 + "Loading shards: 50% Completed |\nLoading shards: 10% Completed |\n"
    )
    await found.finish()
    assert (found.progress.phase, found.progress.fraction) == (Phase.LOADING_WEIGHTS, 0.1)
