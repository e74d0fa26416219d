"""The proxies that are measured, each in front of a mock engine: vllm-proxy, nginx, vllm-router, litellm."""

import contextlib
import os
import random
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import certificates
from tests.bench import build, client, proc
from tests.harness import clean_environment, free_port

OURS = "vllm-proxy"
DIRECT = "direct"
KNOWN = ("nginx", "vllm-router", "litellm")
_START_SECONDS = 120.0

_NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log error; {user}
worker_rlimit_nofile {files};
events {{ worker_connections {files}; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    client_max_body_size 64m; keepalive_requests 100000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 1h;
    }}
  }}
}}
"""

_LITELLM = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{engine}/v1", api_key: none, max_retries: 0}}
litellm_settings: {{num_retries: 0, telemetry: false}}
"""


# It listens on loopback for a minute, in front of a mock: no key, and no cost of checking one.
_LITELLM_ENV = {
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches one
    "NO_PROXY": "127.0.0.1",
}


@dataclass(slots=True)
class Peer:
    """A running proxy: where it listens, where its engine does, and the processes that count as it."""

    name: str
    port: int
    engine: int
    root: int | None  # its first process; None for no proxy at all
    children: bool  # whether what descends from it counts; a daemon's engines do not
    key: str = "sk-1234"  # that its clients send

    @property
    def pids(self) -> list[int]:
        """The processes whose time and memory are the proxy's."""
        if self.root is None:
            return []
        return proc.tree(self.root) if self.children else [self.root]


@contextlib.contextmanager
def process(
    command: Sequence[str],
    folder: Path,
    port: int,
    name: str,
    *,
    env: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[int]:
    """A server, once it answers a chat request on `port`; it is ended when the block ends."""
    with (folder / f"{name}.log").open("ab") as log:
        started = subprocess.Popen(
            list(command), cwd=folder, env={**clean_environment(), **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        if not proc.wait_until(lambda: started.poll() is not None or client.answers(port, tls), _START_SECONDS, 0.05):
            raise RuntimeError(f"{name} does not answer")
        if started.poll() is not None:
            tail = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{name} ended with {started.returncode}: {tail}")
        yield started.pid
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextlib.contextmanager
def engine(programs: build.Programs, folder: Path) -> Iterator[int]:
    """A mock engine of its own for the peers; gives its port."""
    port = free_port()
    command = [str(programs.engine), "mock", f"--port={port}", "--served-model-name", client.MODEL]
    with process(command, folder, port, "engine"):
        yield port


def configuration(programs: build.Programs, models: int, keys: str = "", model: str = "") -> str:
    """A models.toml with this many models, all but the first disabled, these tables of keys, and lines of the first."""
    start = random.randrange(9_000, 11_900, 20)  # below what tests/conftest.py hands out
    text = f'[engine]\ncommand = ["{programs.engine}"]\nport_start = {start}\nport_end = {start + 19}\n'
    text += f'{keys}[models.{client.MODEL}]\nmodel = "mock"\n{model}'
    return text + "".join(f'[models.m{n}]\nmodel = "mock"\nenabled = false\n' for n in range(1, models))


@contextlib.contextmanager
def ours(
    programs: build.Programs,
    folder: Path,
    *,
    models: int = 1,
    name: str = OURS,
    pair: certificates.Pair | None = None,
    keys: str = "",
    key: str = "sk-1234",
    model: str = "",
) -> Iterator[Peer]:
    """vllm-proxy and the mock engine that it started.

    `pair`: it speaks TLS. `keys`: tables of its file; `key`: what its clients send, "" for none. `model`: lines of it.
    """
    place = folder / f"{name}-{models}"
    place.mkdir(parents=True)
    (place / "models.toml").write_text(configuration(programs, models, keys, model), encoding="utf-8")
    port = free_port()
    command = [
        sys.executable, "-m", "vllm_proxy", "serve", "--config", str(place / "models.toml"),
        "--port", str(port), "--state-dir", str(place / "state"), "--log-level", "error",
    ]  # fmt: skip
    tls = {"VLLM_PROXY_TLS_CERT": str(pair.certificate), "VLLM_PROXY_TLS_KEY": str(pair.key)} if pair else {}
    trust = pair.trust() if pair else None
    with process(command, place, port, name, env=tls, tls=trust) as pid:
        resource = client.get(port, f"/models/{client.MODEL}", trust)
        yield Peer(name, port, resource["status"]["instances"][0]["port"], pid, children=False, key=key)


@contextlib.contextmanager
def peer(name: str, programs: build.Programs, engine_port: int, folder: Path) -> Iterator[Peer]:
    """One of the peers, direct and ourselves included."""
    if name == OURS:
        with ours(programs, folder) as found:
            yield found
        return
    if name == DIRECT:
        yield Peer(DIRECT, engine_port, engine_port, None, children=False)
        return
    place = folder / name
    place.mkdir()
    port = free_port()
    env = _LITELLM_ENV if name == "litellm" else {}
    with process(_command(name, place, port, engine_port), place, port, name, env=env) as pid:
        yield Peer(name, port, engine_port, pid, children=True)


def _command(name: str, folder: Path, port: int, engine_port: int) -> list[str]:
    program = build.find(name)
    assert program, name
    file = str(folder / "config")
    if name == "nginx":
        user = "user root;" if os.geteuid() == 0 else ""
        files = proc.open_files_limit()
        text = _NGINX.format(folder=folder, port=port, engine=engine_port, user=user, files=files)
        Path(file).write_text(text, encoding="utf-8")
        return [program, "-p", str(folder), "-c", file, "-e", str(folder / "error.log")]
    if name == "litellm":
        file += ".yaml"
        Path(file).write_text(_LITELLM.format(engine=engine_port), encoding="utf-8")
        return [program, "--config", file, "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    # Its default policy keeps a tree of prompts and costs nearly twice as much: this is the cheaper one to be held to.
    return [
        program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine_port}",
        "--policy", "round_robin", "--log-level", "error", "--disable-retries", "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip


@contextlib.contextmanager
def alone(chosen: Peer, everybody: Sequence[Peer]) -> Iterator[Peer]:
    """Every other proxy stands still while the block runs."""
    others = [pid for other in everybody if other is not chosen for pid in other.pids]
    with proc.stopped(others):
        yield chosen
