"""Small faults in the source of the room, each of which its tests have to find.

`python -m tests.domain.mutants` makes them by rule (every comparison, operator, constant, condition and statement of
the modules) and lists those that no test finds. `tests/domain/test_mutants.py` keeps the ones that stand for a rule.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib
import itertools
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).parent.parent.parent
MODULES = ("vllm_proxy.domain.ledger", "vllm_proxy.domain.eviction", "vllm_proxy.domain.room")
# What is loaded anew with the mutants, where it is needed.
CHECKS, FACTS = "tests.simulation.checks", "tests.domain.test_room"
PROPERTIES = "tests.domain.test_room_properties"
MACHINES = ("tests.simulation.machine", "tests.simulation.loads", "tests.simulation.scenarios")


def source_of(module: str) -> str:
    """Its text."""
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


@functools.cache
def _code(module: str) -> types.CodeType:
    return compile(source_of(module), module, "exec")  # as it is: assertions are not rewritten by pytest


@contextlib.contextmanager
def mutated(sources: Mapping[str, str]) -> Iterator[None]:
    """The modules with these texts instead of their own, for tests that are imported meanwhile."""
    names = (*MODULES, CHECKS, FACTS, PROPERTIES, *MACHINES)
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        for name in (*MODULES, CHECKS, FACTS):
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(sources[name], name, "exec") if name in sources else _code(name), module.__dict__)
        yield
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name, None)
            if module_before is not None:
                sys.modules[name] = module_before
                parent, _, last = name.rpartition(".")
                setattr(sys.modules[parent], last, module_before)


def found_by(sources: Mapping[str, str], *, seeds: int = 0) -> str | None:
    """The first test that finds a fault in these texts; None: nothing does. `seeds`: machines to try, at the end."""
    try:
        with mutated(sources):
            for name, check in itertools.chain(_facts(), _slower(seeds)):
                if not _holds(check):
                    return name
    except Exception as error:  # noqa: BLE001 - it cannot even be imported
        return f"import: {error!r}"
    return None


def _facts() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, test in vars(sys.modules[FACTS]).items():
        if not name.startswith("test_"):
            continue
        cases = [mark.args[1] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        for case in cases[0] if cases else [()]:
            values = case if isinstance(case, tuple) else (case,)
            yield name, lambda test=test, values=values: test(*values)  # type: ignore[misc]


def _slower(seeds: int) -> Iterator[tuple[str, Callable[[], object]]]:
    if not seeds:
        return
    properties = importlib.import_module(PROPERTIES)
    for name, test in vars(properties).items():
        if name.startswith("test_") and hasattr(test, "hypothesis"):
            yield name, test
    for seed in (*properties.REGRESSIONS[:4], *range(seeds)):
        yield f"seed {seed}", lambda seed=seed: properties._waits_within_the_bound(seed)  # type: ignore[misc]


def _holds(check: Callable[[], object]) -> bool:
    try:
        check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return False
    return True


# Mutants by rule

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was changed, the text) for each small change that the rules make."""
    tree = ast.parse(source)
    for path, node in _nodes(tree):
        for changed in _changes(node):
            other = copy.deepcopy(tree)
            _replace(other, path, changed)
            before, after = ast.unparse(node), ast.unparse(changed) if changed is not None else "(left out)"
            yield getattr(node, "lineno", 0), f"{before} -> {after}", ast.unparse(ast.fix_missing_locations(other))


type _Path = tuple[tuple[str, int | None], ...]


def _nodes(node: ast.AST, path: _Path = ()) -> Iterator[tuple[_Path, ast.AST]]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return  # the default of a field
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                step = (*path, (field, index))
                yield step, child
                yield from _nodes(child, step)


def _replace(tree: ast.AST, path: _Path, changed: ast.AST | None) -> None:
    *way, (field, index) = path
    for name, number in way:
        value = getattr(tree, name)
        tree = value if number is None else value[number]
    if index is None:
        setattr(tree, field, changed)
    else:
        getattr(tree, field)[index] = changed or ast.Pass()


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(left, [operator], rest):
            yield from (ast.Compare(left, [other()], rest) for other in _COMPARE.get(type(operator), ()))
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            yield from (ast.BoolOp(operator, [*values[:at], *values[at + 1 :]]) for at in range(len(values)))
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.BinOp(left, operator, right) if type(operator) in _BINARY:
            yield ast.BinOp(left, _BINARY[type(operator)](), right)
        case ast.If(_, body, orelse):
            yield from (ast.If(ast.Constant(value), body, orelse) for value in (1, 0))
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Call(ast.Name("min" | "max" as name), arguments, keywords):
            yield ast.Call(ast.Name("min" if name == "max" else "max", ast.Load()), arguments, keywords)
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield None


def _in_child(check: Callable[[], str | None], seconds: int) -> str | None:
    """Look in a process of its own, which is ended where it takes too long: that is found, too."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        os.write(write, (check() or "").encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"ended by signal {status}" if status else text or None


def main(arguments: list[str] | None = None) -> int:
    """List the mutants that nothing finds; 1 where there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.domain.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=12, help="random machines to try each mutant on; default 12")
    parser.add_argument("--module", choices=[name.rpartition(".")[2] for name in MODULES], help="only this one")
    parser.add_argument("--part", default="0/1", help="N/M: only the Nth of M parts")
    flags = parser.parse_args(arguments)
    number, of = map(int, flags.part.split("/"))
    settings.register_profile("mutants", deadline=None, database=None)  # a machine that is slow finds nothing
    settings.load_profile("mutants")
    assert found_by({}, seeds=1) is None, "the tests fail without a mutant"
    count, survivors = 0, 0
    for name in MODULES:
        if flags.module not in {None, name.rpartition(".")[2]}:
            continue
        for index, (line, what, text) in enumerate(mutants(source_of(name))):
            if index % of != number:
                continue
            count += 1
            if _in_child(lambda name=name, text=text: found_by({name: text}, seeds=flags.seeds), 60) is None:  # type: ignore[misc]
                survivors += 1
                print(f"{name}:{line}: {what}".replace("\n", " ")[:200], flush=True)
    print(f"{count - survivors} of {count} mutants are found", file=sys.stderr)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
