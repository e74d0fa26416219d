"""What the daemon answers to requests that it cannot serve, and how it takes a file that it cannot use."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import clean_environment, daemon, fake_engines, port_block

CHAT = '[models.chat]\nmodel = "org/chat"\n'


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b'{"model": "chat"} trailing', 400, "invalid_json"),
        (b'["model"]', 400, "missing_model"),
        (b"{}", 400, "missing_model"),
        (b'{"model": null}', 400, "missing_model"),
        (b'{"model": ""}', 400, "missing_model"),
        (b'{"model": ["chat"]}', 400, "missing_model"),
        (b'{"model": "nobody"}', 404, "model_not_found"),
        (b'{"model": "chat", "pad": "%s"}' % (b"x" * 2000), 413, "request_too_large"),
    ],
)
async def test_bodies_that_cannot_be_routed(
    shared: Any,  # noqa: ANN401 - a fixture
    body: bytes,
    status: int,
    code: str,
) -> None:
    """Each gets the OpenAI envelope with its code, and says what cannot be done and why."""
    error = (await shared.post("/v1/chat/completions", body, status))["error"]
    assert error["code"] == code
    assert error["message"].startswith("cannot ")
    assert error["type"] == "invalid_request_error"
    assert "param" in error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/secret", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/models/nobody", 404, "model_not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_paths_that_lead_nowhere(
    shared: Any,  # noqa: ANN401 - a fixture
    method: str,
    path: str,
    status: int,
    code: str,
) -> None:
    """A path that is not in the table answers in the envelope and reaches no engine."""
    async with shared.session.request(method, path) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["code"] == code


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/embeddings/", "/messages"])
async def test_a_path_without_its_version_says_what_is_missing(
    shared: Any,  # noqa: ANN401 - a fixture
    path: str,
) -> None:
    """A client whose base URL has no /v1 is told so."""
    async with shared.session.post(path, json={"model": "chat"}) as answer:
        assert answer.status == 404
        error = (await answer.json())["error"]
        assert f"there is /v1{path.rstrip('/')}; clients need a base URL with /v1" in error["message"]


async def test_a_foreign_host_name_is_refused(shared: Any) -> None:  # noqa: ANN401 - a fixture
    """A web page that points its own name at this machine reads nothing."""
    async with shared.session.get("/models", headers={"Host": "evil.example"}) as answer:
        assert answer.status == 403
        assert (await answer.json())["error"]["code"] == "host_not_allowed"


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401 - an async generator
    """One daemon for all of them."""
    config = '[server]\nmax_body_size = "1KiB"\n' + fake_engines(port_block()) + CHAT
    async with daemon(config, tmp_path_factory.mktemp("bad_input")) as running:
        await running.until("1 of 1 models ready")
        yield running


async def test_a_model_whose_command_does_not_exist_rests_in_error_and_the_others_go_on(
    tmp_path: Path, port_start: int
) -> None:
    """Its requests fail at once with the reason; another model answers."""
    config = CHAT + '[models.lost]\nmodel = "x"\ncommand = ["no-such-vllm", "serve"]\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.until("1 of 2 models ready; error: lost")
        status = (await running.get("/models/lost"))["status"]
        assert (status["state"], status["reason"]) == ("error", "command_not_found")
        assert "no-such-vllm" in status["message"]
        error = (await running.post("/v1/completions", {"model": "lost"}, 503))["error"]
        assert error["code"] == "model_error"
        assert "no-such-vllm" in error["message"]
        await running.post("/v1/completions", {"model": "chat", "prompt": "hi"})


async def test_options_that_vllm_refuses_are_not_tried_again(tmp_path: Path, port_start: int) -> None:
    """Exit code 2 means that no retry can help; the last line says which option it was."""
    config = '[models.chat]\nmodel = "x"\nargs = { swap_space = 4 }\n'
    async with daemon(fake_engines(port_start) + config, tmp_path) as running:
        await running.until("0 of 1 models ready; error: chat")
        status = (await running.get("/models/chat"))["status"]
        assert status["reason"] == "invalid_arguments"
        assert "--swap-space=4" in status["message"]
        assert status["instances"][0]["restarts"] == 0
        assert status["instances"][0]["last_exit"]["code"] == 2
        assert any("unrecognized" in line for line in status["instances"][0]["last_exit"]["log_tail"])


def test_a_disabled_and_an_unknown_configuration(tmp_path: Path) -> None:
    """A file that is missing or invalid: every problem printed with its line, exit status 78, nothing started."""
    file = tmp_path / "models.toml"
    command = [sys.executable, "-m", "vllm_proxy", "serve", "-c", str(file), "--state-dir", str(tmp_path / "state")]
    missing = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    assert missing.returncode == 78
    assert "cannot read it" in missing.stderr
    file.write_text('[models.chat]\nmodle = "x"\n[models.b]\nmodel = "x"\nreplicas = "two"\n')
    invalid = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    assert invalid.returncode == 78
    assert invalid.stderr.splitlines() == [
        f'{file}:1: models.chat.model: missing: every model needs model = "a Hugging Face id, path or URL"',
        f"{file}:2: models.chat.modle: unknown key; did you mean model?",
        f'{file}:5: models.b.replicas: expected a whole number, got "two"',
    ]
    assert not (tmp_path / "state").exists()
