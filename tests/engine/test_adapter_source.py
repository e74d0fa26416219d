"""Where an adapter's path leads: folders, caches as the hub's client has them, downloads by a program beside vLLM."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from tests.fakes.running import GONE, state
from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine import adapter_source
from vllm_proxy.engine.adapter_source import AdapterError, AdapterSources, hub_cache
from vllm_proxy.engine.program import Programs
from vllm_proxy.engine.variables import Variables
from vllm_proxy.runtime.masking import Masking
from vllm_proxy.runtime.referenced import ReferencedFiles

ID = "org/adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")
SECRET = "hf_0123456789abcdef"


def program(path: Path, text: str) -> Path:
    """A program, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def sources(folder: Path, masking: Masking | None = None) -> AdapterSources:
    """Those of a file in this folder, whose vLLM is beside it."""
    inherited = {"PATH": os.environ["PATH"], "HOME": str(folder / "home")}
    program(folder / "env/bin/vllm", "exit 1")
    programs = Programs(folder, inherited, ("env/bin/vllm", "serve"))
    return AdapterSources(programs, Variables(ReferencedFiles(folder, None), masking or Masking(), {}))


def spec(folder: Path, **env: str) -> EngineSpec:
    """A model with this environment, beside the place of its cache."""
    return EngineSpec(model="m", env={"HF_HOME": str(folder / "hf"), **env})


def snapshot(cache: Path, commit: str, *, whole: bool = True, main: bool = False) -> Path:
    """As the hub's client writes one: links into `blobs`."""
    repository = cache / "models--org--adapter"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).symlink_to(repository / "blobs" / f"{commit}-{name}")
        if whole or name == FILES[0]:
            (repository / "blobs" / f"{commit}-{name}").write_text("{}")
    if main:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)
    return folder


async def test_a_path_is_a_folder_from_the_files(tmp_path: Path) -> None:
    """A relative one, a full one; one that is not there too, whatever it looks like, and whatever the hub has."""
    it = sources(tmp_path)
    snapshot(tmp_path / "hf/hub", "aaaa")
    for path, folder in (("./x", tmp_path / "x"), ("/srv/x", Path("/srv/x")), (ID, tmp_path / ID)):
        assert await it.find(spec(tmp_path), path, is_hub_id=False) == folder


async def test_a_cache_that_may_not_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be another user's."""

    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    snapshot(tmp_path / "hf/hub", "aaaa")
    monkeypatch.setattr(adapter_source, "is_whole", refuse)
    with pytest.raises(AdapterError, match=f"cannot look for adapter {ID} in .*/hub: Permission denied"):
        await sources(tmp_path).find(spec(tmp_path), ID, is_hub_id=True)


@pytest.mark.parametrize("path", ["../adapter", "org/../..", "-org/x", "org/adapter;x", "org", "a/b/c", ""])
async def test_what_is_no_id_of_the_hub_is_told(tmp_path: Path, path: str) -> None:
    """It would be an argument of a program."""
    with pytest.raises(AdapterError, match="it is no id of the hub"):
        await sources(tmp_path).find(spec(tmp_path), path, is_hub_id=True)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/huggingface/hub"),
        ({"HF_HOME": "/hf", "XDG_CACHE_HOME": "/cache"}, "/hf/hub"),
        ({"HF_HOME": "~/hf"}, "~/hf/hub"),
        ({"HF_HOME": "hf"}, "/etc/hf/hub"),
        ({"HF_HUB_CACHE": "/hub", "HF_HOME": "/hf"}, "/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"}, "/old"),
    ],
)
def test_the_cache_is_where_the_engines_environment_has_it(env: dict[str, str], place: str) -> None:
    """As the hub's own client reads it, in the folder that engines work in."""
    assert hub_cache({"HOME": "/home/me", **env}, Path("/etc")) == Path(place.replace("~", "/home/me"))


async def test_the_snapshot_of_the_branch_main_wins_where_it_is_whole(tmp_path: Path) -> None:
    """Else the newest that is; one whose files are still being downloaded is none."""
    cache, it = tmp_path / "hf/hub", sources(tmp_path)
    older = snapshot(cache, "aaaa")
    os.utime(older, (1, 1))
    newer = snapshot(cache, "bbbb")
    snapshot(cache, "cccc", whole=False, main=True)
    assert await it.find(spec(tmp_path), ID, is_hub_id=True) == newer
    (cache / "models--org--adapter/refs/main").write_text("aaaa\n")
    assert await it.find(spec(tmp_path), ID, is_hub_id=True) == older


async def test_what_no_cache_has_is_downloaded_by_the_program_beside_vllm(tmp_path: Path) -> None:
    """With the engine's environment, in the file's folder, once for all who ask at the same time."""
    snapshot(tmp_path / "prepared", "aaaa")
    it = sources(tmp_path)
    program(
        tmp_path / "env/bin/hf",
        'echo "$@ $HF_TOKEN $(pwd) $VLLM_PROXY_X" >>"$HF_HOME.told"; mkdir -p "$HF_HOME/hub"\n'
        'cp -r prepared/* "$HF_HOME/hub/"; echo done',
    )
    asked = spec(tmp_path, HF_TOKEN=SECRET)
    found = await asyncio.gather(it.find(asked, ID, is_hub_id=True), it.find(asked, ID, is_hub_id=True))
    assert set(found) == {tmp_path / "hf/hub/models--org--adapter/snapshots/aaaa"}
    told = (tmp_path / "hf.told").read_text()
    assert told == f"download {ID} --include=adapter_* {SECRET} {tmp_path} \n"


@pytest.mark.parametrize("offline", ["1", "true", "YES"])
async def test_nothing_is_downloaded_offline(tmp_path: Path, offline: str) -> None:
    """The sentence says where it was looked for."""
    it = sources(tmp_path)
    program(tmp_path / "env/bin/hf", "touch called")
    with pytest.raises(AdapterError, match=f"it is not in {tmp_path}/hf/hub, and HF_HUB_OFFLINE is set"):
        await it.find(spec(tmp_path, HF_HUB_OFFLINE=offline), ID, is_hub_id=True)
    assert not (tmp_path / "called").exists()


async def test_without_the_hubs_program_a_person_is_told_what_to_run(tmp_path: Path) -> None:
    """A container's vLLM, say."""
    with pytest.raises(AdapterError, match=r"there is no `hf` beside vLLM; run `hf download org/adapter`"):
        await sources(tmp_path).find(spec(tmp_path), ID, is_hub_id=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo Traceback >&2; echo 'Error: Repository not found.' >&2; exit 1", "Error: Repository not found."),
        (
            r"printf '\033[1mError: Local entry not found.\033[0m\n\033[90mHint: set HF_DEBUG=1\033[0m\n' >&2",
            "Error: Local entry not found.$",
        ),
        ("echo said; exit 1", "it is not whole: expected adapter_config.json"),
        (f"echo 'no access with {SECRET}' >&2; exit 1", r"no access with \*\*\*"),
        ("exit 1", "it ended in silence"),
    ],
)
async def test_a_download_that_fails_is_told_in_its_last_words(tmp_path: Path, text: str, why: str) -> None:
    """Without secrets."""
    masking = Masking()
    masking.configure([SECRET])
    it = sources(tmp_path, masking)
    program(tmp_path / "env/bin/hf", text)
    with pytest.raises(AdapterError, match=f"cannot download adapter {ID}: {why}"):
        await it.find(spec(tmp_path, HF_TOKEN=SECRET), ID, is_hub_id=True)


async def test_a_download_ends_with_whoever_wanted_it(tmp_path: Path) -> None:
    """With all that it has started."""
    it = sources(tmp_path)
    program(tmp_path / "env/bin/hf", "sleep 1000 & echo $! >child; mv child pid; wait")
    task = asyncio.create_task(it.find(spec(tmp_path), ID, is_hub_id=True))
    while not (tmp_path / "pid").exists():
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert state(int((tmp_path / "pid").read_text())) in GONE
    program(tmp_path / "env/bin/hf", "echo again >&2; exit 1")  # and nobody waits for it any more
    with pytest.raises(AdapterError, match="again"):
        await it.find(spec(tmp_path), ID, is_hub_id=True)
