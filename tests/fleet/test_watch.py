"""Every way in which people and programs change a file is noticed. With real directories and links."""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.engine.virtual import passes, virtual
from vllm_proxy.domain.config import fingerprint, revision_of
from vllm_proxy.fleet.watch import links_to, watch
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.runtime.watched_files import revision_at


class Watched:
    """A file that is watched, and what was read of it after each call."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.adopted = revision_of(file.read_bytes())
        self._called = asyncio.Event()

    def changed(self) -> None:
        """Read it, as the daemon does."""
        if self.file.exists():
            self.adopted = revision_of(self.file.read_bytes())
        self._called.set()

    async def reads(self, text: str) -> None:
        """Wait until this was read."""
        async with asyncio.timeout(20):
            while self.adopted != revision_of(text.encode()):
                self._called.clear()
                await self._called.wait()


@asynccontextmanager
async def watched(file: Path, poll_seconds: float = 0.1) -> AsyncIterator[Watched]:
    """A watch that has begun."""
    found = Watched(file)
    task = asyncio.create_task(watch(lambda: [file], found.changed, lambda: found.adopted, poll_seconds))
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


def write(file: Path, text: str) -> None:
    """In place, as `echo >` does."""
    file.write_text(text)


def rename_over(file: Path, text: str) -> None:
    """As most editors and this daemon do."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


def with_a_backup(file: Path, text: str) -> None:
    """As vim does: the old one is renamed, then a new one is made."""
    file.rename(file.with_suffix(".toml~"))
    file.write_text(text)


def remove_and_write(file: Path, text: str) -> None:
    """As some programs do."""
    file.unlink()
    file.write_text(text)


def replace_the_folder(file: Path, text: str) -> None:
    """As `git checkout` and deployments do."""
    new = file.parent.with_name("new")
    shutil.copytree(file.parent, new, symlinks=True)
    (new / file.name).write_text(text)
    file.parent.rename(file.parent.with_name("old"))
    new.rename(file.parent)


WAYS = [write, rename_over, with_a_backup, remove_and_write, replace_the_folder]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("folder", ["conf", "work/.git/conf"])
async def test_every_way_to_save_is_seen_again_and_again(
    way: Callable[[Path, str], None], folder: str, tmp_path: Path
) -> None:
    """The second time too: what is watched is found anew, below a `.git` as well."""
    file = tmp_path / folder / "models.toml"
    file.parent.mkdir(parents=True)
    file.write_text("0")
    async with watched(file) as found:
        for text in "1", "2", "3":
            way(file, text)
            await found.reads(text)
            shutil.rmtree(file.parent.with_name("old"), ignore_errors=True)


@pytest.mark.parametrize("way", [write, rename_over])
async def test_an_event_tells_without_a_look(way: Callable[[Path, str], None], tmp_path: Path) -> None:
    """Though the next look is an hour away."""
    file = tmp_path / "models.toml"
    file.write_text("0")
    async with watched(file, 3600) as found:
        for text in "1", "2", "3":  # the first one may be seen by the look that begins it
            way(file, text)
            await found.reads(text)


async def test_a_config_map_of_kubernetes_is_seen(tmp_path: Path) -> None:
    """The file is a link through `..data`, which is swapped; nothing else happens to the file's own name."""
    for number in "1", "2":
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "models.toml").write_text(number)
    (tmp_path / "..data").symlink_to("..1")
    file = tmp_path / "models.toml"
    file.symlink_to("..data/models.toml")
    async with watched(file) as found:
        for number in "2", "1", "2":
            (tmp_path / "..data_tmp").symlink_to(f"..{number}")
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")
            await found.reads(number)


async def test_a_generation_of_nixos_is_seen(tmp_path: Path) -> None:
    """`/etc/x` is a link through `/etc/static`, a link into the store, whose files have all the same time."""
    for number in "1", "2":
        store = tmp_path / f"store-{number}" / "etc" / "vllm-proxy"
        store.mkdir(parents=True)
        (store / "models.toml").write_text(number)
        os.utime(store / "models.toml", (1, 1))
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "static").symlink_to(tmp_path / "store-1/etc")
    (etc / "vllm-proxy").symlink_to("static/vllm-proxy")
    async with watched(etc / "vllm-proxy" / "models.toml") as found:
        for number in "2", "1":
            (etc / "new").symlink_to(tmp_path / f"store-{number}/etc")
            (etc / "new").rename(etc / "static")
            await found.reads(number)


async def test_a_change_before_the_watch_began_is_told(tmp_path: Path) -> None:
    """Between the first read and the first look."""
    file = tmp_path / "models.toml"
    file.write_text("0")
    found = Watched(file)
    file.write_text("1")
    task = asyncio.create_task(watch(lambda: [file], found.changed, lambda: found.adopted, 3600))
    await found.reads("1")
    task.cancel()
    await asyncio.wait({task})


async def test_a_folder_that_is_away_for_a_while_is_found_again(tmp_path: Path) -> None:
    """A volume that is mounted late, a checkout that takes its time."""
    file = tmp_path / "conf" / "models.toml"
    file.parent.mkdir()
    file.write_text("0")
    async with watched(file) as found:
        shutil.rmtree(file.parent)
        found._called.clear()
        await found._called.wait()  # it is told that it is missing
        file.parent.mkdir()
        file.write_text("1")
        await found.reads("1")


def test_every_link_on_the_way_counts_and_nothing_else(tmp_path: Path) -> None:
    """Links of folders, links to links, relative ones; a sibling with many files is not on the way."""
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "m.toml").touch()
    (tmp_path / "way").symlink_to("real")
    (tmp_path / "link.toml").symlink_to("way/deep/m.toml")
    (tmp_path / "models.toml").symlink_to(tmp_path / "link.toml")
    names = {os.path.relpath(name, tmp_path) for name in links_to(tmp_path / "models.toml")}
    assert names == {"models.toml", "link.toml", "way", "way/deep/m.toml", "real/deep/m.toml"}


def test_a_ring_of_links_has_an_end(tmp_path: Path) -> None:
    """It cannot be read, and is no reason to hang."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert {Path(name).name for name in links_to(tmp_path / "a")} == {"a", "b"}


async def test_a_look_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    """No thread can be made for it, say: it is logged, and the file is followed afterwards."""
    file = tmp_path / "models.toml"
    file.write_text("0")
    faults = [RuntimeError("can't start new thread")]

    async def away[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if faults:
            raise faults.pop()
        return await asyncio.to_thread(function, *args, **kwargs)

    found = Watched(file)
    look = partial(watch, lambda: [file], found.changed, lambda: found.adopted, 0.1, away)
    with capture_logs() as logs:
        task = keep_running(look, "watch")
        file.write_text("1")
        await found.reads("1")
        task.cancel()
        await asyncio.wait({task})
    assert [entry["task"] for entry in logs] == ["watch"]


async def test_a_folder_that_may_not_be_looked_at_does_not_end_the_watch(tmp_path: Path) -> None:
    """An adapter's, in a place that is closed to this user: the file is followed all the same."""
    file, closed = tmp_path / "models.toml", tmp_path / ("x" * 300) / "adapter"  # refused to root too
    file.write_text("0")
    found = Watched(file)
    with capture_logs() as logs:
        task = keep_running(partial(watch, lambda: [file, closed], found.changed, lambda: found.adopted, 0.1), "watch")
        file.write_text("1")
        await found.reads("1")
        task.cancel()
        await asyncio.wait({task})
    assert logs == []


async def test_where_nothing_can_be_watched_the_file_is_looked_at(tmp_path: Path) -> None:
    """All of the user's inotify instances are taken: it is said, and changes are seen all the same."""
    file = tmp_path / "models.toml"
    file.write_text("0")
    process = await asyncio.create_subprocess_exec(
        "unshare", "--user", "--map-root-user", "sh", "-c",
        'echo 0 > /proc/sys/user/max_inotify_instances; exec "$@"', "sh", sys.executable, "-c", FOLLOWS, file,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert b"cannot be watched" in await process.stdout.readline()
        file.write_text("1")
        assert await process.stdout.readline() == b"changed\n"
        await process.wait()


FOLLOWS = """
import asyncio, sys
from pathlib import Path
from tests.engine.virtual import passes, virtual
from vllm_proxy.domain.config import revision_of
from vllm_proxy.runtime.background import keep_running
from vllm_proxy.fleet.watch import watch

async def main():
    adopted = revision_of(b"0")
    changed = asyncio.Event()
    task = asyncio.create_task(watch(lambda: [Path(sys.argv[1])], changed.set, lambda: adopted, 0.1))
    await changed.wait()
    print("changed", flush=True)
    task.cancel()

asyncio.run(main())
"""


async def nothing(*_: object) -> None:
    """No events."""


async def test_a_disk_that_does_not_answer_is_said_once_and_waited_for(tmp_path: Path) -> None:
    """One look hangs: no other is begun meanwhile, and when it comes back the file is followed."""
    file = tmp_path / "models.toml"
    file.write_text("0")
    looks: list[asyncio.Future[None]] = []

    @virtual
    async def run() -> None:
        async def away[**P, T](function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
            looks.append(asyncio.get_running_loop().create_future())
            await looks[-1]
            return function(*args, **kwargs)

        changed = asyncio.Event()
        with capture_logs() as logs:
            task = asyncio.create_task(watch(lambda: [file], changed.set, lambda: "", 2.0, away, events=nothing))
            await passes(3600)
            assert len(looks) == 1
            assert ["does not answer" in entry["event"] for entry in logs] == [True]
            looks[0].set_result(None)
            await passes(1)
            looks[1].set_result(None)
            await changed.wait()
            task.cancel()
            await asyncio.wait({task})

    await asyncio.to_thread(run)


@pytest.mark.parametrize("poll_seconds", [0.1, 3600])
async def test_the_folder_of_an_adapter_is_followed(poll_seconds: float, tmp_path: Path) -> None:
    """Other weights in it are noticed at once, in place or renamed over; where no event tells, by a look."""
    file, folder = tmp_path / "models.toml", tmp_path / "adapter"
    file.write_text("0")
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("0")

    def now() -> str:
        return fingerprint([revision_at(file), revision_at(folder)])

    adopted, changed = [now()], asyncio.Event()
    watching = watch(lambda: [file, folder], changed.set, lambda: adopted[0], poll_seconds)
    task = asyncio.create_task(watching)
    try:
        for way in (write, rename_over) if poll_seconds > 1 else (write, rename_over, remove_and_write):
            way(folder / "adapter_model.safetensors", f"{way.__name__} wrote it")
            async with asyncio.timeout(20):
                while now() != adopted[0]:
                    await changed.wait()
                    changed.clear()
                    adopted[0] = now()
    finally:
        task.cancel()
        await asyncio.wait({task})
