"""What the commands of `keys` do where no daemon runs: the edits that one would make, on the files themselves.

The edits are those of `domain/file/edit_keys.py`. A daemon that follows the file takes them over.
"""

import argparse
import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any

from vllm_proxy.commands.check import load_outside_service
from vllm_proxy.domain import key_resources
from vllm_proxy.domain.file import edit_keys
from vllm_proxy.domain.key_resources import key_of
from vllm_proxy.domain.keys import RANDOM_BYTES, hash_of, new_key
from vllm_proxy.fleet.changes import KeyEdit, KeyFiles
from vllm_proxy.fleet.store import Store


def create(options: argparse.Namespace, table: Mapping[str, Any]) -> tuple[key_resources.NewKey, str]:
    """A key that is made, or whose hash is given; and where that is written.

    Raises:
        ConfigError: when a file is invalid, or would be.
        RequestError: when it cannot be done.

    """
    key, written = edit_keys.issued(options.name, table, secrets.token_bytes(RANDOM_BYTES))
    found, where = _edited(options, partial(edit_keys.create, name=options.name, keys=written))
    return {**found, "key": key}, where


def every(options: argparse.Namespace) -> key_resources.Keys:
    """All of them; raises as `create` does."""
    config = _files(options).change(lambda texts: texts).config
    return {"revision": config.keys_revision, "keys": [key_of(key) for key in config.keys.values()]}


def rotate(options: argparse.Namespace) -> tuple[key_resources.NewKey, str]:
    """One more key for a name, or with --finish the newest alone; raises as `create` does."""
    key = None if options.finish else new_key(secrets.token_bytes(RANDOM_BYTES))
    change = edit_keys.finish if key is None else partial(edit_keys.rotate, new=hash_of(key))
    found, where = _edited(options, partial(change, name=options.name))
    return {**found, "key": key}, where


def patch(options: argparse.Namespace, change: Mapping[str, Any]) -> tuple[key_resources.Key, str]:
    """Some of its keys changed; raises as `create` does."""
    return _edited(options, partial(edit_keys.patch, name=options.name, change=change))


def _files(options: argparse.Namespace) -> KeyFiles:
    settings = load_outside_service(options)
    return KeyFiles(Store(settings.config_file), settings.parse, settings.files, settings.keys_file)


def _edited(options: argparse.Namespace, edit: KeyEdit) -> tuple[key_resources.Key, str]:
    """The resource, and where that is written."""
    change = _files(options).change(edit)
    change.write()
    where = f"in {change.store.file}: no daemon answers here, and one that follows this file takes it over"
    return key_of(change.config.keys[options.name]), where
