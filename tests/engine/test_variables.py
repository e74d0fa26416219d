"""Which values of a configuration are hidden in texts."""

import asyncio
import threading
from pathlib import Path

import pytest

from vllm_proxy.domain.file.parse import parse_config
from vllm_proxy.engine.variables import Variables
from vllm_proxy.runtime.masking import Masking
from vllm_proxy.runtime.referenced import ReferencedFiles


async def test_what_models_are_called_is_shown_though_a_variable_has_the_same_value(tmp_path: Path) -> None:
    """Else nobody could tell whose line of a log it is."""
    text = b'[models.chatmodel]\nmodel = "m"\naliases = ["chatalias"]\n'
    text += b'env = { OTEL_SERVICE_NAME = "chatmodel", OTHER = "chatalias", TOKEN = "abcdefghij" }\n'
    variables = Variables(ReferencedFiles(tmp_path, None), Masking(), {})
    await variables.follow(parse_config(text, "models.toml"))
    assert variables.masking.mask("chatmodel/0 chatalias abcdefghij") == "chatmodel/0 chatalias ***"
    async with variables.hidden({"OTEL_SERVICE_NAME": "chatmodel", "MORE": "klmnopqrst"}, "uvwxyz012345"):
        assert variables.masking.mask("chatmodel klmnopqrst uvwxyz012345") == "chatmodel *** ***"
    variables.close()


async def test_a_start_that_is_given_up_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cancelled while a thread learned what to hide: what no engine has is not held for good."""
    masking = Masking()
    learns, goes_on = threading.Event(), threading.Event()

    def slow() -> None:
        learns.set()
        goes_on.wait(10)

    monkeypatch.setattr(masking, "learn", slow)
    variables = Variables(ReferencedFiles(tmp_path, None), masking, {})

    async def start() -> None:
        async with variables.hidden({}, "uvwxyz012345"):
            pass

    task = asyncio.create_task(start())
    await asyncio.to_thread(learns.wait)
    assert masking._held
    task.cancel()
    await asyncio.wait([task])
    assert not masking._held
    goes_on.set()
