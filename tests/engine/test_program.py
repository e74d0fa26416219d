"""What is looked at before an engine is started."""

import sys
from pathlib import Path

import pytest

from vllm_proxy.domain.config import EngineSpec
from vllm_proxy.engine.program import LaunchError, Programs

VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


def programs(folder: Path) -> Programs:
    """Of a machine with a vLLM."""
    return Programs(folder, {}, VLLM)


def test_a_model_folder_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    """With its name, before a vLLM is started; what is there, and what is no path, is vLLM's to judge."""
    with pytest.raises(LaunchError, match=r"cannot find /no/such/folder: ") as error:
        programs(tmp_path).check_model(EngineSpec(model="/no/such/folder"))
    assert error.value.diagnosis.reason == "model_unavailable"
    for there in str(tmp_path), "org/model", "s3://bucket/model":
        programs(tmp_path).check_model(EngineSpec(model=there))


def test_a_command_that_may_run_vllm_elsewhere_has_paths_of_its_own(tmp_path: Path) -> None:
    """In a container, say."""
    spec = EngineSpec(model="/no/such/folder", command=(sys.executable, "run-in-container", "vllm", "serve"))
    programs(tmp_path).check_model(spec)
