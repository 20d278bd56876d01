"""Read from a unit test's source which names of the solution it uses; nothing is run.

The test runs in its own process, where the solution's names are proxies of objects in the solution's process
(see ``harness_test``). The names are chosen here, so that a solution cannot replace ``len`` or ``abs``: a name
that Python or its standard library offers counts as the solution's only if the test imports it from
``solution``, or if it uses no other name of the solution.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ring.rl.reward.code.inside.python_harness import MODULES, STAR

_GIVEN = frozenset(
    [*dir(builtins), "__file__", "__name__", "__doc__", *MODULES, *" ".join(STAR.values()).split()]
)
"""Names that a test has without the solution; see ``python_harness.provided``."""
_HELPERS = frozenset({"pytest"})
"""Modules in the sandbox beside the standard library: the part of pytest in ``harness_pytest``."""
_RUNS_TEXT = frozenset({"pickle", "marshal", "shelve"})
_ENTRY = re.compile(r"[A-Za-z_]\w*(\(\)\.[A-Za-z_]\w*)?")
_PRINTING = re.compile(
    r"p?print|print_exc(eption)?|write|flush|debug|info|warn(ing)?|error|exception|critical|log"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTest:
    """What the harness has to know of a test.

    Example: for ``"assert add(1, 2) == 3"``: names ("add",), calls_check False.
    """

    names: tuple[str, ...]
    """Names of the solution that the test uses."""
    calls_check: bool
    """It defines ``check(candidate)`` without calling it: the harness calls it."""


@functools.lru_cache(maxsize=256)
def read_unit_test(source: str, entry: str = "") -> UnitTest:
    """Read a test's source; ``entry`` is the argument of ``check``. Raises ValueError with the reason if it is no test."""
    try:
        tree = ast.parse(source)
        table = symtable.symtable(source, "test.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is not Python: {error}") from error
    if entry and not _ENTRY.fullmatch(entry):
        raise ValueError(
            f"is for {entry!r}, which is neither a function's name nor of the form Solution().name"
        )
    if not any(map(_can_fail, ast.walk(tree))):
        raise ValueError("has no assertion: whatever it is given passes")
    if not _has_assertion(tree):
        raise ValueError(
            "catches what its own assertions raise and goes on, or never runs them: whatever it is given passes"
        )
    _check_it_is_run(tree)
    imported = _imports(tree)
    made = {
        symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()
    }
    free = _globals_used(table) - made
    calls_check = _leaves_check_uncalled(tree)
    if calls_check and not entry:
        raise ValueError("defines check(candidate) and never calls it; name the function in entry_point")
    own = free - _GIVEN
    asked = imported | ({entry.partition("(")[0], "Solution"} if entry else set())
    names = own | asked or {name for name in free if name not in ("eval", "exec", "print")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in (own | imported):
                    raise ValueError(
                        f"derives a class from the solution's {base.id}, which lives in another process"
                    )
    return UnitTest(names=tuple(sorted(names)), calls_check=calls_check)


def _check_it_is_run(tree: ast.Module) -> None:
    """Raises ValueError if no assertion is ever reached, or if a test function has a parameter that nothing fills."""
    used = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    idle: list[str] = []
    run = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            live = node.name.startswith("test") or node.name == "check" or node.name in used
            needed = len(node.args.args) - len(node.args.defaults)
            if node.name.startswith("test") and node.name not in used and needed and not node.decorator_list:
                raise ValueError(f"has {node.name}({ast.unparse(node.args)}), and no fixtures exist here")
        elif isinstance(node, ast.ClassDef):
            live = node.name.startswith("Test") or bool(node.bases) or node.name in used
        else:
            live = True
        if _has_assertion(node):
            run |= live
            if not live:
                idle.append(getattr(node, "name", ""))
    if not run:
        raise ValueError(f"runs no assertion: they stand in {', '.join(idle)}, which nothing calls")


def _has_assertion(tree: ast.AST) -> bool:
    """Can an assertion in ``tree`` fail the test?"""
    return any(map(_can_fail, _reached(tree)))


def _reached(tree: ast.AST) -> Iterator[ast.AST]:
    """``tree`` and all nodes in it, without the lines whose assertions can fail no test."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        silent = _silent(node)
        waiting += [child for child in ast.iter_child_nodes(node) if child not in silent]


def _silent(node: ast.AST) -> Sequence[ast.AST]:
    """The lines of ``node`` whose assertions can fail no test: never executed, or caught and at most printed."""
    if isinstance(node, ast.If | ast.While):
        return node.body if isinstance(node.test, ast.Constant) and not node.test.value else ()
    if isinstance(node, ast.With | ast.AsyncWith):
        return node.body if any(_suppresses(item.context_expr) for item in node.items) else ()
    if not isinstance(node, ast.Try | ast.TryStar):
        return ()
    if any(isinstance(line, ast.Return | ast.Break | ast.Continue) for line in node.finalbody):
        # whatever is raised ends there
        return [*node.body, *node.handlers, *node.orelse]
    handler = next(filter(_takes_assertions, node.handlers), None)
    return node.body if handler is not None and all(map(_continues, handler.body)) else ()


def _continues(line: ast.stmt) -> bool:
    if isinstance(line, ast.If):
        return all(map(_continues, [*line.body, *line.orelse]))
    if isinstance(line, ast.Expr):
        return isinstance(line.value, ast.Constant) or _PRINTING.fullmatch(_called(line.value)) is not None
    return isinstance(line, ast.Pass | ast.Continue | ast.Break | ast.Return | ast.Import | ast.ImportFrom)


def _takes_assertions(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or _catches(kind) for kind in kinds)


def _suppresses(manager: ast.expr) -> bool:
    """Does a context manager catch assertions, like contextlib.suppress under any name? ``raises`` expects them."""
    return (
        isinstance(manager, ast.Call)
        and not _called(manager).lower().endswith(("raises", "raisesregex"))
        and any(map(_catches, manager.args))
    )


def _catches(kind: ast.expr) -> bool:
    return getattr(kind, "id", getattr(kind, "attr", "")) in ("AssertionError", "Exception", "BaseException")


def _called(node: ast.expr) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        always = isinstance(node.test, ast.Constant) and bool(node.test.value)
        # (x == 1, "why") is a pair, which is true
        return not always and not (isinstance(node.test, ast.Tuple) and node.test.elts)
    if isinstance(node, ast.Raise):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = _called(node)
    return name == "raises" or (isinstance(node.func, ast.Attribute) and name.startswith(("assert", "fail")))


def _imports(tree: ast.Module) -> set[str]:
    """Names imported from the solution. Raises ValueError for modules that the sandbox does not have."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
            if node.module == "solution":
                names.update(alias.name for alias in node.names if alias.name != "*")
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            if top in _RUNS_TEXT:
                raise ValueError(f"imports {module}, which could run what a solution returns")
            if top not in sys.stdlib_module_names and top != "solution" and top not in _HELPERS:
                raise ValueError(
                    f"imports {module}, which the sandbox does not have (the solution's module is called solution)"
                )
    return names


def _globals_used(table: symtable.SymbolTable) -> set[str]:
    used = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
    }
    return used.union(*map(_globals_used, table.get_children()))


def _leaves_check_uncalled(tree: ast.Module) -> bool:
    defines = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    calls = any(
        isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check"
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
    )
    return defines and not calls
