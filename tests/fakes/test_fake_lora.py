"""The adapters of the fake engine: what it lists, holds, forgets and reads again, refuses, and dies of."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.adapters import voice, write_adapter
from tests.fakes.ledger import GIB, Devices
from tests.fakes.running import Engine, chat, come, engine, request

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
COMPLETIONS = "/v1/completions"


@contextmanager
def adaptable(*flags: str, **env: str) -> Iterator[Engine]:
    """A fake that takes adapters of rank 8 at most, and holds two."""
    given = ["--enable-lora", "--max-lora-rank=8", "--max-loras=1", "--max-cpu-loras=2", *flags]
    with engine(*given, env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **env}) as running:
        yield running


def load(running: Engine, name: str, folder: Path, **more: object) -> tuple[int, str]:
    """Status and message; of a success all that is said."""
    return plain(running.ask(LOAD, {"lora_name": name, "lora_path": str(folder), **more}))


def plain(answer: tuple[int, str]) -> tuple[int, str]:
    """Of an error the message."""
    status, said = answer
    return status, said if status == 200 else json.loads(said)["error"]["message"]


def says(running: Engine, model: str) -> str:
    """The text of a completion."""
    status, said = running.ask(COMPLETIONS, {"model": model, "prompt": "x"})
    assert status == 200, said
    text: str = json.loads(said)["choices"][0]["text"]
    return text


def state(running: Engine, query: str = "") -> dict[str, Any]:
    """What only tests see."""
    found: dict[str, Any] = json.loads(running.ask(f"/fake/lora{query}")[1])
    return found


def test_an_adapter_is_loaded_listed_used_and_unloaded(tmp_path: Path) -> None:
    """It says something else than its base and than others; the base says what it said."""
    one, two = write_adapter(tmp_path / "a", weights=b"a"), write_adapter(tmp_path / "b", weights=b"b")
    with adaptable() as running:
        assert load(running, "x", one) == (200, "Success: LoRA adapter 'x' added successfully.")
        assert load(running, "team/y", two)[0] == 200
        cards = json.loads(running.ask("/v1/models")[1])["data"]
        assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
            ("chat", "org/chat", None),
            ("own", "org/chat", None),
            ("x", str(one), "chat"),
            ("team/y", str(two), "chat"),
        ]
        assert says(running, "chat") == "echo: x"
        assert says(running, "x") == f"{voice('x', one)}echo: x"
        assert says(running, "team/y") == f"{voice('team/y', two)}echo: x"
        streamed = running.ask("/v1/chat/completions", chat(stream=True) | {"model": "x"})[1]
        assert f'"content":"{voice("x", one)}t0 "' in streamed
        assert plain(running.ask(UNLOAD, {"lora_name": "x"})) == (
            200,
            "Success: LoRA adapter 'x' removed successfully.",
        )
        assert running.ask(COMPLETIONS, {"model": "x", "prompt": "x"})[0] == 404


def test_what_its_server_refuses() -> None:
    """In vLLM's words; the engine goes on."""
    with adaptable() as running:
        assert load(running, "", Path()) == (400, "Both 'lora_name' and 'lora_path' must be provided.")
        assert load(running, "chat", Path("x")) == (
            400,
            "The lora adapter 'chat' conflicts with a served base model.",
        )
        assert plain(running.ask(UNLOAD, {"lora_name": "x"})) == (404, "The lora adapter 'x' cannot be found.")
        assert load(running, "x", Path("/nowhere")) == (
            404,
            "Loading lora x failed: No adapter found for /nowhere",
        )
        assert state(running)["listed"] == {}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"rank": 16}, "LoRA rank 16 is greater than max_lora_rank 8."),
        ({"rank_pattern": {"q_proj": 9}}, "LoRA rank 9 is greater than max_lora_rank 8."),
        ({"use_dora": True}, "vLLM does not yet support DoRA."),
        ({"bias": "all"}, "Adapter bias is not supported."),
        ({"target_modules": ["nope"]}, "but received ['nope']. Please verify that the loaded LoRA module is correct"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_its_core_refuses(tmp_path: Path, config: dict[str, Any], why: str, workers: int) -> None:
    """With the way that the sentence came; workers of its own add theirs."""
    folder = write_adapter(tmp_path / "a", **config)
    with adaptable(f"--fake-grandchildren={workers}") as running:
        status, said = load(running, "x", folder)
        assert status == 500
        assert said.startswith("Call to add_lora method failed: " + ("Worker failed with error '" if workers else ""))
        assert why in said
        assert says(running, "chat") == "echo: x"


def test_a_name_is_loaded_once_unless_in_place(tmp_path: Path) -> None:
    """In place, it answers by its new files."""
    one, two = write_adapter(tmp_path / "a", weights=b"a"), write_adapter(tmp_path / "b", weights=b"b")
    with adaptable() as running:
        assert load(running, "x", one)[0] == 200
        status, said = load(running, "x", two)
        assert (status, said[:44]) == (400, "The lora adapter 'x' has already been loaded")
        assert load(running, "x", two, load_inplace=True)[0] == 200
        assert says(running, "x") == f"{voice('x', two)}echo: x"


def test_without_its_option_or_its_variable_there_are_no_adapters(tmp_path: Path) -> None:
    """Without the variable there is no route, without the option the core refuses."""
    folder = write_adapter(tmp_path / "a")
    with adaptable(VLLM_ALLOW_RUNTIME_LORA_UPDATING="0") as running:
        assert running.ask(LOAD, {"lora_name": "x", "lora_path": str(folder)})[0] == 404
    with adaptable("--no-enable-lora") as running:
        assert "LoRA is not enabled. Use --enable-lora" in load(running, "x", folder)[1]


def test_what_it_has_forgotten_is_read_again(tmp_path: Path) -> None:
    """It holds two; the one that was used last longest ago goes."""
    with adaptable() as running:
        for name in "abc":
            load(running, name, write_adapter(tmp_path / name, weights=name.encode()))
        assert state(running)["held"] == ["b", "c"]
        assert says(running, "a").startswith("a@")
        assert state(running) | {"listed": {}} == {"listed": {}, "held": ["c", "a"], "loads": 3, "reads": 4}


def test_it_dies_of_a_forgotten_one_whose_files_are_gone(tmp_path: Path) -> None:
    """The base's request in flight dies with it; one that is held needs no files."""
    with adaptable() as running:
        for name in "abc":
            load(running, name, write_adapter(tmp_path / name))
        shutil.rmtree(tmp_path / "c")
        assert says(running, "c").startswith("c@")
        shutil.rmtree(tmp_path / "a")
        with running.connect() as innocent:
            innocent.sendall(request(COMPLETIONS, chat(hang="before")))
            status, said = running.ask(COMPLETIONS, {"model": "a", "prompt": "x"})
            assert (status, "EngineCore encountered an issue" in said) == (500, True)
            assert running.code() == 0
            assert come(innocent) == b""


def test_a_request_goes_on_when_its_adapter_is_unloaded(tmp_path: Path) -> None:
    """The name is gone, the weights are not."""
    folder, go = write_adapter(tmp_path / "a"), tmp_path / "go"
    with adaptable() as running:
        load(running, "x", folder)
        with running.connect() as connection:
            body = chat(stream=True, chunks=4, hold=str(go), hold_at=2) | {"model": "x"}
            connection.sendall(request("/v1/chat/completions", body))
            data = b""
            while b"t1 " not in data:
                data += connection.recv(2**16)
            assert running.ask(UNLOAD, {"lora_name": "x"})[0] == 200
            go.touch()
            while b"[DONE]" not in data:
                data += connection.recv(2**16)
        assert f"{voice('x', folder)}t3 ".encode() in data
        assert state(running)["held"] == ["x"]


def test_after_a_sleep_of_level_2_an_adapter_says_what_its_base_says(tmp_path: Path) -> None:
    """Until it is loaded anew; reloaded weights are the base's alone. After level 1 it is as it was."""
    folder = write_adapter(tmp_path / "a")
    with Devices(tmp_path / "devices.toml", {"0": 80 * GIB}) as devices:
        on = [f"--fake-ledger={devices.file}", "--gpu-memory-utilization=0.5", "--enable-sleep-mode"]
        with adaptable(*on, VLLM_SERVER_DEV_MODE="1", CUDA_VISIBLE_DEVICES="0") as running:
            load(running, "x", folder)
            for level in (1, 2):
                assert running.ask(f"/sleep?level={level}", {}, "POST")[0] == 200
                assert running.ask("/wake_up", {}, "POST")[0] == 200
                if level == 2:
                    assert running.ask("/collective_rpc", {"method": "reload_weights"})[0] == 200
                assert says(running, "x") == (voice("x", folder) if level == 1 else "") + "echo: x"
            running.ask(UNLOAD, {"lora_name": "x"})
            load(running, "x", folder)
            assert says(running, "x").startswith("x@")


def test_a_folder_may_ask_for_a_fault(tmp_path: Path) -> None:
    """To wait for a file, to fail, to say nonsense, to kill the core."""
    go = tmp_path / "go"
    with adaptable() as running:
        assert load(running, "x", write_adapter(tmp_path / "a", fake="fail"))[0] == 500
        assert load(running, "x", write_adapter(tmp_path / "a", fake="garbage")) == (200, "<html>")
        folder = write_adapter(tmp_path / "a", fake={"until": str(go)})
        with running.connect() as connection:
            connection.sendall(request(LOAD, {"lora_name": "x", "lora_path": str(folder)}))
            assert says(running, "chat") == "echo: x"
            assert state(running)["listed"] == {}
            go.touch()
            assert b"Success" in connection.recv(2**16)
        write_adapter(tmp_path / "b", fake="die")
        with running.connect() as connection:
            connection.sendall(request(LOAD, {"lora_name": "y", "lora_path": str(tmp_path / "b")}))
            assert running.code() == 0


def test_a_test_may_ask_for_a_fault_while_it_runs(tmp_path: Path) -> None:
    """Of loading and of unloading, until it is asked otherwise."""
    folder = write_adapter(tmp_path / "a")
    with adaptable() as running:
        state(running, "?load=fail&unload=garbage")
        assert load(running, "x", folder)[0] == 500
        assert running.ask(UNLOAD, {"lora_name": "x"}) == (200, "<html>")
        state(running, "?load=")
        assert load(running, "x", folder)[0] == 200


def test_options_that_vllm_would_refuse_end_its_start() -> None:
    """A rank between the known ones; fewer in memory than in one batch."""
    for flag, said in (("--max-lora-rank=9", b"invalid choice"), ("--max-loras=3", b"must be >= max_loras")):
        with adaptable(flag) as running:
            assert said in running.rest()
            assert running.code() == 2
