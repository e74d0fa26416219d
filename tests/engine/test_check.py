"""Options are looked at before a start, with a program that only looks like vLLM's Python."""

import json
import os
from pathlib import Path

import pytest

from vllm_proxy.domain.config import EngineSpec, ModelSpec, Policy
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.options import OptionTables
from vllm_proxy.engine.program import LaunchError, Programs

SEED = {"names": ["--seed"], "kind": "store", "nargs": None, "type": "int", "choices": None}
TABLE = json.dumps({"version": "0.32.0", "options": [SEED]})


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment's Python, and vLLM's script beside it; the Python notes that it was run."""
    (tmp_path / "env/lib/python3.12/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    folder = tmp_path / "env/bin"
    folder.mkdir()
    for name, text in {
        "python": f"#!/bin/sh\necho run >>{tmp_path}/runs\necho '{TABLE}'\n",
        "vllm": f"#!{folder}/python\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "python"


def check_of(tmp_path: Path) -> OptionCheck:
    """As a daemon has it whose configuration lies in this folder."""
    return OptionCheck(Programs(tmp_path, os.environ, None), OptionTables(tmp_path / "options"))


def model(*command: str, **args: object) -> ModelSpec:
    """A model; `args` are options of vLLM."""
    spec = EngineSpec(model="m", command=command, args=args)
    return ModelSpec("chat", spec, Policy(), {"model": "m", "args": args})


async def test_a_check_without_a_table_finds_nothing_and_has_it_read(python: Path, tmp_path: Path) -> None:
    """The first start of a new vLLM is not kept waiting; the second is checked."""
    check, wrong = check_of(tmp_path), model(f"{python.parent}/vllm", "serve", sed=1)
    assert await check.problems(wrong) == []
    assert await check.names(wrong.engine) == {"seed"}  # waits for what is being read
    assert await check.problems(wrong) == [("args.sed", "unknown option; did you mean seed?")]
    assert (tmp_path / "runs").read_text() == "run\n"
    await check.close()


async def test_a_table_of_an_earlier_daemon_is_at_hand_at_once(python: Path, tmp_path: Path) -> None:
    """So that a restart with a wrong option does not start an engine to learn it."""
    wrong = model(f"{python.parent}/vllm", "serve", sed=1)
    assert await check_of(tmp_path).names(wrong.engine)
    assert len(await check_of(tmp_path).problems(wrong)) == 1
    assert (tmp_path / "runs").read_text() == "run\n"


async def test_models_of_the_same_vllm_have_it_read_once(python: Path, tmp_path: Path) -> None:
    """However many there are."""
    check = check_of(tmp_path)
    check.prefetch(model(f"{python.parent}/vllm", "serve", seed=seed).engine for seed in range(20))
    assert await check.names(model(str(python), "-m", "vllm", "serve").engine)
    assert (tmp_path / "runs").read_text() == "run\n"
    await check.close()


async def test_a_relative_command_begins_at_the_configuration(python: Path, tmp_path: Path) -> None:
    """As it does where it is started."""
    assert await check_of(tmp_path).names(model("env/bin/vllm", "serve").engine) == {"seed"}
    programs = Programs(python.parent, os.environ, ("./vllm", "serve"))
    assert programs.command(EngineSpec(model="m")) == ("./vllm", "serve")
    assert programs.python(EngineSpec(model="m")) == python


async def test_a_path_of_the_model_decides(python: Path, tmp_path: Path) -> None:
    """The PATH in its `env` is where its command is looked for."""
    spec = EngineSpec(model="m", command=("vllm", "serve"), env={"PATH": str(python.parent)})
    assert Programs(tmp_path, {"PATH": "/nowhere"}, None).python(spec) == python


async def test_what_is_not_known_to_be_vllm_is_not_run(tmp_path: Path) -> None:
    """A program of the user's may do anything when it is run."""
    program = tmp_path / "engine"
    program.write_text(f"#!/bin/sh\necho run >>{tmp_path}/runs\n")
    program.chmod(0o755)
    check = check_of(tmp_path)
    assert await check.problems(model(str(program), "serve", sed=1)) == []
    assert await check.names(model(str(program), "serve").engine) == frozenset()
    await check.close()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [("no-such-program",), ("./no-such-program",), None])
def test_a_command_that_is_not_there_is_told(command: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Before anything is started."""
    with pytest.raises(LaunchError, match=r"no such program|cannot find vLLM: install it") as error:
        Programs(tmp_path, {"PATH": str(tmp_path)}, None).command(EngineSpec(model="m", command=command))
    assert error.value.diagnosis.reason == "command_not_found"


def test_a_wrapper_of_vllm_on_path_is_told_with_what_runs_it(tmp_path: Path) -> None:
    """What it is nobody knows, so it is not taken for vLLM; who put it there finds out what to write."""
    wrapper = tmp_path / "vllm"
    wrapper.touch(mode=0o755)
    with pytest.raises(LaunchError) as error:
        Programs(tmp_path, {"PATH": str(tmp_path)}, None).command(EngineSpec(model="m"))
    assert f'set engine.command = ["{wrapper}", "serve"]' in str(error.value)
