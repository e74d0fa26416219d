"""What `plan` says where no daemon runs: everything would be started, but for what this machine can never run."""

import argparse
import os

import uvloop

from vllm_proxy import daemon, logsetup
from vllm_proxy.commands.check import load_outside_service
from vllm_proxy.domain.keys import changes
from vllm_proxy.domain.plan import plan
from vllm_proxy.domain.resources import Plan, changes_of
from vllm_proxy.fleet.objections import misfits_here, reasons


def plan_of(options: argparse.Namespace) -> Plan:
    """From nothing, and of `[server]` and its like nothing: they change for nobody.

    Raises:
        ConfigError: the file cannot be used.

    """
    loaded = load_outside_service(options)
    config = daemon.read_config(loaded)
    logsetup.set_up("error", logsetup.resolve("auto", os.environ))
    actions = plan(config.models, {})
    misfits, _ = uvloop.run(misfits_here(config, loaded.config_file.parent, loaded.engine_environment))
    return {
        "changes": changes_of(actions, reasons(misfits, actions)), "pending_restart": [],
        "keys": changes({}, config.keys), "settings": [], "warnings": config.warnings(),
    }  # fmt: skip
