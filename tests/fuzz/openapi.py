"""schemathesis over `/openapi.json` of a running daemon with fake engines, as an admin, as others, without a key.

Every answer has a status and a body that the document knows, none is 500, none shows a secret; methods that the
document does not know are refused.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import HIDDEN
from tests.harness import Daemon, daemon, fake_engines, port_block
from vllm_proxy.domain.keys import hash_of, new_key

KEYS = {name: new_key(os.urandom(32)) for name in ("admin", "read", "inference")}
SECRET = "planted-value-of-an-environment"
MODELS = f"""
[models.chat]
model = "org/chat"
aliases = ["gpt"]
[models.chat.env]
SOME_TOKEN = "{SECRET}"
[models.embed]
model = "org/embed"
"""
ENDLESS = ("/events", "/v1/realtime")  # streams, and a WebSocket
WRITES = "^(PUT|PATCH|DELETE) |^POST /(models|keys|config/reload)"
# One after another: where a model is deleted, or the whole configuration replaced, little is left to be asked for.
PASSES = (
    ("--exclude-name-regex", WRITES),
    ("--include-name-regex", WRITES, "--exclude-name", "PUT /config"),
    ("--include-name", "PUT /config"),
)
SETTINGS = """
[checks] # an id that is well formed may not be there, and most bodies say nothing of what must hold between their keys
negative_data_rejection.enabled = false
positive_data_acceptance.enabled = false
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 501, 502, 503, 504, 507] # what the document says besides
[[operations]]
include-path = "/models/{model_id}/logs"
parameters = { "query.follow" = "0" }
[[operations]] # any other method takes these for the ids of models
include-path-regex = "/(start|stop|restart|sleep|wake|logs)$"
checks.unsupported_method.enabled = false
checks.allow_header_conformance.enabled = false
"""


async def run(caller: str | None, options: Sequence[str]) -> int:
    """Run schemathesis as a caller, None: who sends no key; its exit status, or 1 where the daemon has a fault."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        tables = "".join(
            f'[keys.{scope}]\nhash = "{hash_of(KEYS[scope])}"\nscopes = ["{scope}"]\n'
            for scope in ("read", "inference")
        )
        (folder / "keys.toml").write_text(tables, encoding="utf-8")
        (folder / "hidden").write_text("\n".join(_hidden()), encoding="utf-8")
        (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
        config = '[server]\nkeys_file = "keys.toml"\n' + fake_engines(port_block()) + MODELS
        status = 0
        async with daemon(config, folder, env={"VLLM_PROXY_ADMIN_KEY": KEYS["admin"]}) as running:
            await running.all_ready()
            for which in PASSES:
                status |= await _schemathesis(running, caller, [*which, *options])
            faults = [
                line for line in running.log().splitlines() if "fault of the daemon" in line or "Traceback" in line
            ]
    for line in faults:
        print(line)
    return status or bool(faults)


def _hidden() -> list[str]:
    return [*KEYS.values(), *(hash_of(key).removeprefix("sha256:") for key in KEYS.values()), SECRET]


async def _schemathesis(running: Daemon, caller: str | None, options: Sequence[str]) -> int:
    key = ("--header", f"Authorization: Bearer {KEYS[caller]}") if caller is not None else ()
    command = (
        Path(sys.executable).with_name("schemathesis"), "--config-file", running.folder / "schemathesis.toml", "run",
        f"{running.url}/openapi.json", *key, "--phases", "examples,coverage,fuzzing",
        "--continue-on-failure", "--request-timeout", "20", "--suppress-health-check", "all", "--warnings", "off",
        "--generation-database", "none", *(word for path in ENDLESS for word in ("--exclude-path", path)), *options,
    )  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SCHEMATHESIS_HOOKS": "tests.fuzz.checks",
        HIDDEN: str(running.folder / "hidden"),
    }
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=running.folder)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
