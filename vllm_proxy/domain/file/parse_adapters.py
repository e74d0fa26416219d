"""Parses `[models.ID.adapters.*]`: LoRA adapters, with what is known of their folders.

A folder that vLLM would refuse is a problem of the file, one that is not there too, unless the caller says that it may
be missing: then it is up to its model to say so. Where `adapters/` is a folder beside the file, `adapters/support` is
one in it and never a hub id: when it goes, no stranger's adapter of that name may come in its place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from vllm_proxy.domain.adapters import Adapter, describe, looks_like_hub_id
from vllm_proxy.domain.config import AdapterTable, ModelTable, TomlTable
from vllm_proxy.domain.file.validate import Found
from vllm_proxy.domain.references import AdapterFolder, Files
from vllm_proxy.domain.toml import KeyPath, dotted
from vllm_proxy.domain.units import show
from vllm_proxy.domain.value_types import id_problem

_ARGS = {  # that say what `adapters` does, and where to say it
    "enable-lora": "adapters",
    "max-lora-rank": "adapters_max.rank",
    "max-loras": "adapters_max.loras",
    "max-cpu-loras": "adapters_max.cpu_loras",
}
_ENGINES = ("data-parallel-size", "api-server-count")  # with more than one, vLLM loads no adapter while it runs


class AdapterFolders:
    """The folders of all adapters, as they are read. `attached`: revision by path, "" where there is nothing."""

    def __init__(self, files: Files) -> None:
        self.attached: dict[str, str] = {}
        self._files = files
        self._seen: dict[str, AdapterFolder] = {}

    def adapter(self, name: str, table: AdapterTable, path: KeyPath, found: list[Found]) -> Adapter:
        """An adapter; what is wrong with its folder is appended to `found`. One that is disabled is not looked at."""
        adapter = Adapter(name, table.path, table.description, table.enabled)
        if not table.enabled or self._files.is_elsewhere(table.path):
            return replace(adapter, is_hub_id=looks_like_hub_id(table.path))
        folder = self._read(table.path)
        adapter = replace(adapter, revision=folder.revision)
        if folder.config is not None:
            try:
                return replace(adapter, rank=describe(folder.config).rank)
            except ValueError as error:
                found.append(((*path, "path"), f"{show(table.path)}: {error}"))
        elif not (folder.is_there or folder.has_place) and looks_like_hub_id(table.path):
            return replace(adapter, is_hub_id=True)
        elif not self._files.may_lack(table.path):
            message = f"{show(table.path)}: {folder.problem}; expected a folder as PEFT writes it, or a hub id"
            found.append(((*path, "path"), message))
        return adapter

    def _read(self, path: str) -> AdapterFolder:
        if path not in self._seen:
            self._seen[path] = self._files.adapter(path)
            self.attached[path] = self._seen[path].revision
        return self._seen[path]


def adapters_of(valid: ModelTable, at: KeyPath, folders: AdapterFolders, found: list[Found]) -> dict[str, Adapter]:
    """The adapters of a model by id; what is wrong with them is appended to `found`. `at`: the model's table."""
    adapters = {}
    for name, table in valid.adapters.items():
        path = (*at, "adapters", name)
        if message := id_problem(name):
            found.append((path, message))
        adapters[name] = folders.adapter(name, table, path, found)
    fixed = valid.adapters_max
    for one in adapters.values():
        if fixed.rank is not None and one.enabled and (one.rank or 0) > fixed.rank:
            message = f"expected at least {one.rank}, the rank of {dotted(('adapters', one.id))}, got {fixed.rank}"
            found.append(((*at, "adapters_max", "rank"), message))
    if fixed.loras is not None and fixed.cpu_loras is not None and fixed.cpu_loras < fixed.loras:
        message = f"expected at least loras ({fixed.loras}), got {fixed.cpu_loras}"
        found.append(((*at, "adapters_max", "cpu_loras"), message))
    return adapters


def not_with_adapters(args: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(option, message) for each of `args`, by name, that cannot be given to a model with adapters."""
    for name, value in args.items():
        begun = name.removeprefix("no-")  # argparse takes an abbreviation for the full name
        if place := next((place for full, place in _ARGS.items() if full.startswith(begun)), None):
            yield name, f"cannot be given beside adapters, for which the daemon gives it: write {place} outside args"
        if name in _ENGINES and str(value) != "1":
            yield name, "cannot be more than 1 beside adapters: such a vLLM loads none while it runs"


def dotted_names(tables: TomlTable, at: KeyPath) -> Iterator[Found]:
    """Each adapter whose id has a dot and no quotes, and so became tables in tables. `at`: the model's table."""
    for name, table in tables.items():
        rest: list[tuple[KeyPath, object]] = [((name,), table)]
        while rest:
            path, value = rest.pop()
            if not isinstance(value, Mapping):
                continue
            if len(path) > 1 and "path" in value:
                header = dotted((*at, "adapters", ".".join(path)))
                yield (*at, "adapters", *path), f"an id with a dot needs quotes: write [{header}]"
            rest += [((*path, key), item) for key, item in value.items()]
