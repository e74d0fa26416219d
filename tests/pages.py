"""The tables in `vllm_proxy/docs` that are made of the code. `python -m tests.pages` writes them anew.

In a page such a table stands between `<!-- generated: NAME -->` and `<!-- end -->`. Names, types, defaults and costs
are the code's. What the code has no words for is said in the last column of the page itself, and kept there by its
first column; of a new row that column is empty, which a test does not let pass.
"""

import argparse
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import AwareDatetime, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from tests import completions, schema
from tests.simulation import __main__ as simulation
from tests.simulation import loads, replicas
from vllm_proxy.api.metrics import FAMILIES
from vllm_proxy.api.openapi_keys import KEYS, OF_A_KEY, OF_ADAPTERS_MAX, OF_AN_ADAPTER
from vllm_proxy.api.openapi_operation import Operation
from vllm_proxy.api.openapi_routes import OPERATIONS
from vllm_proxy.arguments import parser
from vllm_proxy.commands import outcome
from vllm_proxy.domain import key_table, plan
from vllm_proxy.domain.config import (
    AdaptersMax,
    AdapterTable,
    Devices,
    EngineDefaults,
    EngineKeys,
    Policy,
    Restart,
    Server,
)
from vllm_proxy.domain.key_table import KeyTable
from vllm_proxy.domain.lifecycle import Reason
from vllm_proxy.domain.moderation_table import ModerationTable
from vllm_proxy.domain.units import parse_duration, parse_size, parse_size_or_percent, show, show_duration, show_size
from vllm_proxy.errors import STATUS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "vllm_proxy/docs"
COMMAND = "python -m tests.pages"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[^\n]*?) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)

type Rows = Iterable[Sequence[str]]  # cells; the last one "" where the page has the words


def written(page: str) -> str:
    """A page with its tables as the code has them now."""
    return BLOCK.sub(lambda found: f"{found[1]}{_table(found['name'], found['table'])}\n{found[4]}", page)


def _table(name: str, before: str) -> str:
    made = TABLES[name]()
    return made if isinstance(made, str) else _with_words(*made, before)


def _with_words(head: Sequence[str], rows: Rows, before: str) -> str:
    """A table; where a row has no words, those that stood there before."""
    words = {cells[0]: cells[-1] for cells in map(cells_of, before.splitlines()) if len(cells) == len(head)}
    lines = [head, ["---"] * len(head), *([*row[:-1], row[-1] or words.get(row[0], "")] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def cells_of(line: str) -> list[str]:
    """The cells of a row; a bar that is escaped parts nothing."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# The configuration


def _keys(
    table: type[BaseModel], cost: Callable[[str], str], prefix: str = "", words: Mapping[str, str] = KEYS
) -> tuple[Sequence[str], Rows]:
    rows = [
        (f"`{prefix}{key}`", _type_of(field), _default_of(field), cost(key), words.get(key, ""))
        for key, field in table.model_fields.items()
        if field.annotation is not Restart
    ]
    return ("key", "type", "default", "a change", "meaning"), rows


def _type_of(field: FieldInfo) -> str:
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, marks: Sequence[Any]) -> str:  # noqa: ANN401 - a type; a table of them
    """A type as people call it. `marks`: what Annotated says of it."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation, *more = typing.get_args(annotation)
        marks = [*marks, *more]
    marks = [part for mark in marks for part in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    readers = {mark.func for mark in marks if isinstance(mark, BeforeValidator)}
    if parse_duration in readers:
        return "duration"
    if parse_size in readers:
        return "size" + _bounds(marks)
    if parse_size_or_percent in readers:
        return "size or percentage"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(_kind(each, marks) for each in inner if each is not type(None))
    if origin is Literal:
        return ", ".join(f"`{show(value)}`" for value in inner)
    if origin is tuple:
        one = _kind(inner[0], ())
        return f"{f'{one} or ' if key_table._one_or_more in readers else ''}list of {one}{_length(marks)}"
    if origin is dict or annotation is dict:
        return "table"
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        AwareDatetime: "time with offset",
    }
    return names[annotation] + (_bounds(marks) if annotation in {int, float} else "")


def _length(marks: Sequence[Any]) -> str:
    most = "".join(f", at most {mark.max_length}" for mark in marks if isinstance(mark, MaxLen))
    return most or (", not empty" if any(isinstance(mark, MinLen) for mark in marks) else "")


def _bounds(marks: Sequence[Any]) -> str:
    said = {Ge: "at least {0.ge}", Gt: "above {0.gt}", Le: "at most {0.le}"}
    return "".join(f", {said[type(mark)].format(mark)}" for mark in marks if type(mark) in said)


def _default_of(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None:
        return ""
    readers = {mark.func for mark in field.metadata if isinstance(mark, BeforeValidator)}
    if value and parse_duration in readers:
        return f'`"{show_duration(value)}"`'
    if value and parse_size in readers:
        return f'`"{show_size(value)}"`'
    if isinstance(value, dict):
        return "`{}`"
    return f"`{show(int(value) if isinstance(value, float) else list(value) if isinstance(value, tuple) else value)}`"


def _of_a_policy(key: str) -> str:
    return {"enabled": "stops, starts", "replicas": "adds, removes"}.get(key, "live")


# Commands


def _commands() -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for name, outer in _below(parser()).items():
        found |= {f"{name} {inner}": sub for inner, sub in _below(outer).items()} or {name: outer}
    return {name: taker for name, taker in found.items() if taker.description}  # what has none is for programs


def _below(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The commands of a command."""
    actions = parser._subparsers._group_actions if parser._subparsers else []
    return typing.cast("Mapping[str, argparse.ArgumentParser]", actions[0].choices) if actions else {}


def command_names() -> list[str]:
    """Of all commands."""
    return list(_commands())


def _usages() -> tuple[Sequence[str], Rows]:
    rows = []
    for name, taker in _commands().items():
        taker.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=1000)
        usage = taker.format_usage().strip().removeprefix(f"usage: {taker.prog} [-h]").strip().replace("|", "\\|")
        rows.append((f"`vllm-proxy {name}`", f"`{usage}`" if usage else "", taker.description or "", ""))
    return ("command", "takes", "does", "exit status"), rows


def _options() -> tuple[Sequence[str], Rows]:
    of: dict[tuple[str, str], list[str]] = {}  # what an option means may differ from command to command
    for command, taker in _commands().items():
        for action in taker._actions:  # argparse offers no other way
            if action.option_strings and "--help" not in action.option_strings:
                metavar = (
                    f" {{{','.join(action.choices)}}}"
                    if action.choices
                    else f" {action.metavar or action.dest.upper()}"
                )
                takes = metavar if action.nargs != 0 else ""
                name = f"`{', '.join(action.option_strings)}{takes}`"
                of.setdefault((name, action.help or ""), []).append(command)
    rows = [(name, ", ".join(commands), explanation) for (name, explanation), commands in of.items()]
    return ("option", "of", "meaning"), rows


# Routes, metrics, codes


def _routes(tag: str) -> tuple[Sequence[str], Rows]:
    rows = [
        (f"`{route}`", _does(operation), _answers(operation))
        for route, operation in OPERATIONS.items()
        if operation.tag == tag
    ]
    return ("route", "does", "answers"), rows


def _does(operation: Operation) -> str:
    summary = operation.summary if operation.summary.endswith("?") else f"{operation.summary}."
    return f"{summary} {operation.description}".strip().replace("|", "\\|")


def _answers(operation: Operation) -> str:
    return " ".join(f"{int(answer.status)}: {answer.description}" for answer in operation.answers)


def _metrics() -> tuple[Sequence[str], Rows]:
    rows = [
        (f"`{one.name}`", one.kind, ", ".join(f"`{label}`" for label in one.labels), one.meaning)
        for one in sorted(FAMILIES, key=lambda one: one.name)
    ]
    return ("metric", "type", "labels", "meaning"), rows


def _codes() -> str:
    rows: list[tuple[str, list[str]]] = [
        *(
            (f"HTTP {status}", [code for code in STATUS if STATUS[code] == status])
            for status in sorted({*STATUS.values()})
        ),
        ("a reason", [str(reason) for reason in Reason]),
        ("an exit status", [str(status) for status in exit_statuses()]),
    ]
    lines = [
        f"| {what} | {' '.join(f'[{code}](#{f"exit-status-{code}" if code.isdigit() else code})' for code in codes)} |"
        for what, codes in rows
    ]
    return "\n".join(["| it is | code |", "|---|---|", *lines])


def exit_statuses() -> list[int]:
    """Those of the commands."""
    return sorted({outcome.OK, outcome.FAILED, outcome.CHANGES, outcome.NO_DAEMON, outcome.CONFIG_INVALID})


@cache
def _simulated() -> tuple[Sequence[str], Rows]:
    """What `python -m tests.simulation` finds, while nobody sleeps."""
    found = [(name.removesuffix("; cold"), *cells) for name, *cells in simulation.rows(loads.LOADS, (False,))]
    return simulation.HEAD, found


@cache
def _replicas() -> tuple[Sequence[str], Rows]:
    """What `python -m tests.simulation --replicas` finds."""
    return replicas.HEAD, replicas.rows()


TABLES: Mapping[str, Callable[[], str | tuple[Sequence[str], Rows]]] = {
    "keys of the engine": lambda: _keys(EngineKeys, lambda _: "replaces"),
    "keys of the policy": lambda: _keys(Policy, _of_a_policy),
    "keys of restarts": lambda: _keys(Restart, lambda _: "live", "restart."),
    "keys of adapters": lambda: _keys(AdapterTable, lambda _: "live", "adapters.NAME.", OF_AN_ADAPTER),
    "keys of adapters_max": lambda: _keys(AdaptersMax, lambda _: "replaces", "adapters_max.", OF_ADAPTERS_MAX),
    "keys of the server": lambda: _keys(
        Server, lambda key: "restart" if key in plan.RESTART_KEYS else "live", "server.", {}
    ),
    "keys of devices": lambda: _keys(Devices, lambda _: "live", "devices.", words={}),
    "keys of a key": lambda: _keys(KeyTable, lambda _: "live", words=OF_A_KEY),
    "keys of moderation": lambda: _keys(ModerationTable, lambda _: "live", "moderation.", words={}),
    "keys of all engines": lambda: _keys(
        EngineDefaults, lambda key: "replaces" if key in EngineKeys.model_fields else "live", "engine.", {}
    ),
    "changes": plan.table,
    "commands": _usages,
    "options": _options,
    **{
        f"routes: {tag}": lambda tag=tag: _routes(tag)  # type: ignore[misc]
        for tag in ("Inference", "Models", "Keys", "Configuration", "Observation", "Daemon", "Documentation")
    },
    "simulation": _simulated,
    "replicas": _replicas,
    "metrics": _metrics,
    "codes": _codes,
}


def main() -> None:
    """Write every page anew that differs, and say which, and what has no words yet."""
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
        for row in wordless(after):
            print(f"{page.relative_to(ROOT)}: say in the last column what this is: {row}")
    for file, text in {schema.FILE: schema.made(), **completions.made()}.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT)}")


def wordless(page: str) -> list[str]:
    """Rows of generated tables whose last column is empty, by their first."""
    rows = (cells_of(line) for found in BLOCK.finditer(page) for line in found["table"].splitlines())
    return [cells[0] for cells in rows if not cells[-1]]


if __name__ == "__main__":
    main()
