"""`init`: writes a first configuration with comments, which says where editors find its schema; never over a file."""

import argparse
import json
import os
from importlib.resources import files
from pathlib import Path

from vllm_proxy.commands.outcome import OK
from vllm_proxy.commands.output import write
from vllm_proxy.errors import StartupError
from vllm_proxy.places import dangling_link


def run(options: argparse.Namespace) -> int:
    """Where the arguments say, else the environment, else here."""
    chosen = options.config or os.environ.get("VLLM_PROXY_CONFIG") or "models.toml"
    file = Path(chosen).absolute()
    package = files("vllm_proxy")
    text = f"#:schema {package.joinpath('models.schema.json')}\n"
    text += package.joinpath("first_models.toml").read_text(encoding="utf-8")
    try:
        _write_new(file, text)
    except FileExistsError:
        why = dangling_link(file) or "it exists already"
        msg = f"cannot write {file}: {why}; choose another place with --config"
        raise StartupError(msg) from None
    except OSError as error:
        msg = f"cannot write {file}: {error.strerror}; choose another place with --config"
        raise StartupError(msg) from error
    write(json.dumps({"file": str(file)}) if options.json else f"wrote {file}")
    return OK


def _write_new(file: Path, text: str) -> None:
    """All of it or nothing: half a file would be in the way of the next try."""
    with open(file, "x", encoding="utf-8", opener=_readable_by_its_group) as target:
        try:
            target.write(text)
            target.flush()
        except OSError:
            file.unlink()
            raise


def _readable_by_its_group(file: str, flags: int) -> int:
    """It may come to hold keys; umask may narrow it further."""
    return os.open(file, flags, 0o640)
