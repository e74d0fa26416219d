"""Which values of a configuration are hidden in texts."""

from pathlib import Path

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
