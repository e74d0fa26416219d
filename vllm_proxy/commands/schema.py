"""`schema`: prints the JSON schema of the configuration, or writes it; with --vllm the options of vLLM are in it.

Needs no daemon and, but for --vllm, no file.
"""

import argparse
from importlib.resources import files
from pathlib import Path

from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import complain, write
from vllm_proxy.errors import CommandError


def run(options: argparse.Namespace) -> int:
    """Where to put it is told on stderr, how editors find it."""
    text = files("vllm_proxy").joinpath("models.schema.json").read_text(encoding="utf-8")
    if options.vllm:
        from vllm_proxy.commands import vllm_options  # noqa: PLC0415 - imports engines

        text = vllm_options.added(text, options)
    if options.output is None:
        write(text.rstrip("\n"))
        return OK
    file = Path(options.output).absolute()
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write {file}: {error.strerror}; choose another place with --output"
        raise CommandError(msg) from error
    complain(f"wrote {file}; editors take it where the first line of the configuration is: #:schema {file}")
    return OK
