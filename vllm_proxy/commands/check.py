"""`check`: validates the configuration without a daemon, and warns of what is valid and dangerous or useless."""

import argparse
import json
import os
from dataclasses import replace

import uvloop

from vllm_proxy import daemon, logsetup, settings
from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import complain, write
from vllm_proxy.fleet.objections import warnings_here
from vllm_proxy.settings import Settings


def run(options: argparse.Namespace) -> int:
    """Problems are raised, and printed by `outcome`."""
    loaded = load_outside_service(options)
    config = daemon.read_config(loaded)
    file = str(loaded.config_file)
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))  # warnings are printed
    here = uvloop.run(warnings_here(config, loaded.config_file, loaded.engine_environment))
    warnings = [*loaded.warnings, *config.warnings(), *here]
    if options.json:
        answer = {"file": file, "revision": config.revision, "models": [*config.models], "problems": []}
        write(json.dumps(answer | {"warnings": warnings}))
    else:
        write(f"{file}: valid, {len(config.models)} model{'' if len(config.models) == 1 else 's'}")
        for warning in warnings:
            complain(f"warning: {warning}")
    return OK


def load_outside_service(options: argparse.Namespace) -> Settings:
    """For a command that reads the configuration in a shell, which has none of the service's credentials."""
    loaded = settings.load(os.environ, vars(options))
    return replace(loaded, files=loaded.files.outside_service())
