"""Which settings a module reads, by its syntax: ``config.train.lr``, or ``t.lr`` after ``t = config.train``.

A name stands for a section where it is the section's own, is annotated with its dataclass, or is assigned from such a
name, anywhere in the module. So ``sampling.temperature`` of another class is no reading of ``rollout.temperature``, and
``data.split(",")``, a call, none of ``data.split``. It errs where a variable is called like a section and holds something
else that has a field of the same name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from megatron_ring.config.settings import sections

CLASSES = {cls.__name__: section for section, cls in sections().items()}


def settings_read(tree: ast.AST) -> set[tuple[str, str]]:
    """(section, setting) of every attribute that is loaded from a section and not called."""
    names = _sections_by_name(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        (section, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
        for section in names.get(_last(node.value), ())
    }


def _sections_by_name(tree: ast.AST) -> dict[str, set[str]]:
    found = {section: {section} for section in sections()}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            _note(found, node.arg, _annotated(node.annotation))
        elif isinstance(node, ast.AnnAssign):
            _note(found, _last(node.target), _annotated(node.annotation))
    for node in ast.walk(tree):
        for target, value in _assigned(node):
            for section in list(found.get(_last(value), ())):
                _note(found, _last(target), section)
    return found


def _note(found: dict[str, set[str]], name: str, section: str | None) -> None:
    if name and section:
        found.setdefault(name, set()).add(section)


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) pairs of an assignment; what ``replace(x, ...)`` gives is as good as x."""
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
        for one, value in pairs:
            is_replace = isinstance(value, ast.Call) and _last(value.func) == "replace" and value.args
            yield one, value.args[0] if is_replace else value


def _last(node: ast.expr) -> str:
    """The last name of a dotted expression, or nothing."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _annotated(annotation: ast.expr | None) -> str | None:
    """The section whose dataclass an annotation names."""
    for node in ast.walk(annotation) if annotation else ():
        word = (
            node.value
            if isinstance(node, ast.Constant)
            else _last(node)
            if isinstance(node, ast.expr)
            else ""
        )
        if word in CLASSES:
            return CLASSES[word]
    return None
