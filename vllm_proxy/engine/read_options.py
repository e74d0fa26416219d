"""A script, run by an engine's own Python: prints the options of `vllm serve` as one line of JSON.

It must not import anything of this package, and must run with Python 3.9 and later and any vLLM that has
`make_arg_parser`. What vLLM itself prints goes to stderr. `options` runs it.
"""

from __future__ import annotations

import contextlib
import os
import sys

# A script's folder is where Python looks first, and the names in this one are not vLLM's.
_HERE = os.path.realpath(os.path.dirname(__file__))  # noqa: PTH120
sys.path[:] = [entry for entry in sys.path if not entry or os.path.realpath(entry) != _HERE]

import argparse  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Callable  # noqa: E402, UP035

_PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")  # 0.32; up to 0.31
_CLASSES = ("vllm.utils.argparse_utils", "vllm.utils")
_WORD = "no-Number"  # what no type but text takes
_MOST_CHOICES = 2000


def main() -> None:
    """Print what vLLM's parser knows."""
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _lower_priority()
    parser = _parser()
    vllm = importlib.import_module("vllm")
    options = [_describe(action) for action in parser._actions if action.option_strings]  # noqa: SLF001
    json.dump({"version": str(vllm.__version__), "options": options}, result)
    result.write("\n")
    result.flush()
    os._exit(0)  # do not wait for threads that vLLM started


def _lower_priority() -> None:
    """Lower the priority below that of engines: for the processor, and for the OOM killer."""
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    module = _first_module((*_PARSERS, *_searched()), "make_arg_parser")
    made_with = (
        module if hasattr(module, "FlexibleArgumentParser") else _first_module(_CLASSES, "FlexibleArgumentParser")
    )
    parser: argparse.ArgumentParser = module.make_arg_parser(made_with.FlexibleArgumentParser())
    return parser


def _first_module(names: tuple[str, ...], wanted: str) -> Any:  # noqa: ANN401
    last: Exception = ImportError(f"no module of vLLM has {wanted}")
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # an error of vLLM's own, which is reported
            last = error
            continue
        if hasattr(module, wanted):
            return module
    raise last


def _searched() -> tuple[str, ...]:
    """Where a version that nobody here knows may have put it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return ()
    package = Path(spec.origin).parent
    found = sorted((package / "entrypoints").rglob("cli_args.py"))
    return tuple(".".join(("vllm", *file.relative_to(package).with_suffix("").parts)) for file in found)


def _describe(action: argparse.Action) -> dict[str, Any]:
    return {
        "names": list(action.option_strings),
        "kind": _kind(action),
        "nargs": action.nargs,
        "type": _type(action.type),
        "choices": _choices(action.choices),
        "default": action.default if type(action.default) in (int, float) else None,
    }


def _kind(action: argparse.Action) -> str:
    known = {
        "_StoreAction": "store",
        "_StoreTrueAction": "store_true",
        "_StoreFalseAction": "store_false",
        "_StoreConstAction": "store_const",
        "_AppendAction": "append",
        "_ExtendAction": "extend",
        "BooleanOptionalAction": "boolean_optional",
    }
    return known.get(type(action).__name__, "other")


def _type(convert: Any) -> str:  # noqa: ANN401
    """What a type takes, as far as it is certain; "other" where it is not."""
    convert = _unwrapped(convert)
    if convert is None or convert is str:
        return "str"
    if convert is int or convert is float:
        return str(convert.__name__)
    name = getattr(convert, "__name__", "")
    if convert is json.loads or name == "parse_dataclass":
        return "json" if not _takes(convert, _WORD) else "other"
    if name.startswith("human_readable_int"):
        return "human_int" if _is_human(convert) else "other"
    same = _folded(_converted(convert, _WORD)) == _folded(_WORD)  # no type but one that changes case and dashes at most
    return "folded" if same else "other"


def _unwrapped(convert: Any) -> Any:  # noqa: ANN401
    """vLLM's `optional_type(int)` and `parse_type(int)` are functions that hold `int`."""
    for _ in range(4):
        code, cells = getattr(convert, "__code__", None), getattr(convert, "__closure__", None)
        if code is None or not cells or getattr(convert, "__name__", "") not in {"_optional_type", "_parse_type"}:
            break
        held = dict(zip(code.co_freevars, cells)).get("return_type")  # noqa: B905 - 3.9 has no `strict`
        if held is None:
            break
        convert = held.cell_contents
    return convert


def _folded(text: Any) -> str | None:  # noqa: ANN401
    return text.lower().replace("-", "_") if isinstance(text, str) else None


def _is_human(convert: Callable[[str], Any]) -> bool:
    wrong = (_WORD, "1.5", "2.0", "{}")
    return _converted(convert, "4k") == 4000 and not any(_takes(convert, text) for text in wrong)


def _converted(convert: Callable[[str], Any], text: str) -> Any:  # noqa: ANN401
    try:
        return convert(text)
    except Exception:  # noqa: BLE001 - whatever a type raises, it does not take the text
        return None


def _takes(convert: Callable[[str], Any], text: str) -> bool:
    try:
        convert(text)
    except Exception:  # noqa: BLE001
        return False
    return True


def _choices(choices: Any) -> list[str] | None:  # noqa: ANN401
    """As text; None where they cannot be listed, or are not plainly what one writes."""
    if not isinstance(choices, (list, tuple, set, frozenset, dict, range)) or len(choices) > _MOST_CHOICES:
        return None
    named = [choice for choice in choices if choice is not None]  # None is what `--x=None` gives
    if not named or not all(type(choice) in (str, int, float) for choice in named):
        return None
    return [str(choice) for choice in named]


if __name__ == "__main__":
    main()
