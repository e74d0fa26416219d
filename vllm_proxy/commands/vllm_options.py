"""What `schema --vllm` adds: the options of the vLLM that the configuration would start, asked of that vLLM itself."""

import argparse
import json
import os

import uvloop

from vllm_proxy import logsetup, settings
from vllm_proxy.domain.config import EngineDefaults
from vllm_proxy.domain.options import OptionTable
from vllm_proxy.domain.schema import with_options
from vllm_proxy.engine.check import OptionCheck
from vllm_proxy.engine.find import find_vllm
from vllm_proxy.engine.options import OptionTables
from vllm_proxy.engine.program import Programs
from vllm_proxy.errors import CommandError, ConfigError
from vllm_proxy.places import read_config_file
from vllm_proxy.settings import Settings


def added(text: str, options: argparse.Namespace) -> str:
    """The schema with them.

    Raises:
        CommandError: when there is no vLLM, or it does not tell.

    """
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))
    table = uvloop.run(_options(settings.load(os.environ, vars(options))))
    if table is None:
        msg = (
            "cannot read the options of vLLM: there is none, or it does not print them (`vllm serve --help=all` says"
            " why); install it, or set engine.command in the configuration (-c FILE)"
        )
        raise CommandError(msg)
    return json.dumps(with_options(json.loads(text), table), indent=1, ensure_ascii=False) + "\n"


async def _options(loaded: Settings) -> OptionTable | None:
    env = loaded.engine_environment
    programs = Programs(loaded.config_file.parent, env, find_vllm(env))
    check = OptionCheck(programs, OptionTables(loaded.state_dir / "options"))
    try:
        return await check.of_engine(_engine(loaded))
    finally:
        await check.close()


def _engine(loaded: Settings) -> EngineDefaults:
    """That of the file, where there is one that can be used."""
    try:
        return loaded.parse(read_config_file(loaded.config_file)).engine
    except ConfigError:
        return EngineDefaults()
