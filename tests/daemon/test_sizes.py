"""Files with models that this machine can never hold: refused where they are new, run as far as they fit at a start."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.fakes.ledger import GIB, Devices
from tests.harness import Daemon, daemon, fake_engines, port_block, vllm_proxy

TOO_LARGE = "needs 90.6 GiB on a GPU, and engines may have 79.5 of GPU 0 (80.0 without what is kept back)"


@asynccontextmanager
async def one_gpu(folder: Path, config: str) -> AsyncIterator[Daemon]:
    """A daemon whose engines share a GPU of 80 GiB."""
    with Devices(folder / "gpus.toml", {"0": 80 * GIB}) as devices:
        args = f'[defaults]\nargs = {{ fake_ledger = "{devices.file}" }}\n'
        async with daemon(f"{fake_engines(port_block())}{devices.config}{args}{config}", folder) as running:
            yield running


def model(name: str, memory: str, start: str = "on-demand") -> str:
    """Its table."""
    return f'[models.{name}]\nmodel = "{name}"\nmemory = "{memory}"\nstart = "{start}"\n'


async def test_what_can_never_run_here_is_refused_in_every_way_to_change_the_file(tmp_path: Path) -> None:
    """At its key and line, with the sum; a plan says it, and where what fits would run."""
    async with one_gpu(tmp_path, model("chat", "50GiB", "always")) as running:
        large = {"id": "code", "model": "code", "memory": "90GiB", "start": "on-demand"}
        refused = (await running.post("/models", large, 422))["error"]
        text = running.file.read_text()
        line = len(text.splitlines()) + 4
        assert refused["code"] == "invalid_model"
        assert refused["problems"] == [{"path": "models.code.memory", "line": line, "message": TOO_LARGE}]
        refused = (await running.post("/models", {**large, "memory": "40GiB", "start": "always"}, 422))["error"]
        assert refused["problems"][0]["path"] == "models.code.start"
        assert "50.6 (chat) + 40.6 (code) = 91.2 GiB, and engines may have 79.5 (GPU 0)" in refused["message"]
        assert running.file.read_text() == text

        await running.all_ready()
        more = text + model("code", "90GiB") + model("small", "10GiB") + model("later", "70GiB")
        changes = (await running.write("POST", "/config/plan", more))["changes"]
        assert {change["model"]: (change.get("place", "none"), change.get("misfit")) for change in changes} == {
            "code": ("none", TOO_LARGE),
            "small": (["0"], None),
            "later": (None, None),
        }
        (other := tmp_path / "other.toml").write_text(more)
        status, out, _ = await vllm_proxy(tmp_path, "plan", "-c", str(other))
        assert status == 2
        assert "start small: new; its first request starts it; on device 0\n" in out
        assert f"start code: new; its first request starts it; it can never run on this machine: {TOO_LARGE}\n" in out

        running.file.write_text(more)
        refused = (await running.post("/config/reload", None, 422))["error"]
        assert (refused["code"], refused["problems"][0]["path"]) == ("invalid_config", "models.code.memory")
        assert [one["id"] for one in (await running.get("/models"))["models"]] == ["chat"]


async def test_a_daemon_that_starts_with_such_a_file_runs_what_fits(tmp_path: Path) -> None:
    """It logs what does not, and no other change is refused for it."""
    config = model("code", "90GiB") + model("chat", "50GiB", "always") + model("embed", "50GiB", "always")
    async with one_gpu(tmp_path, config) as running:
        await running.once("chat", lambda one: one["state"] == "ready")
        assert TOO_LARGE in running.log()
        assert "what is always to run needs 50.6 (chat) + 50.6 (embed) = 101.2 GiB" in running.log()
        await running.write("PATCH", "/models/chat", {"description": "mine"})
        await running.post("/models", {"id": "small", "model": "x", "memory": "1GiB", "start": "on-demand"}, 201)
        await running.write("PATCH", "/models/embed", {"start": "on-demand"})
        await running.write("PATCH", "/models/embed", {"start": "always"}, 422)
