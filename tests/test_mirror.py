"""``tests/`` mirrors the package: a module has a test file of its name, or a line in ``covered_by.toml`` names one."""

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS, PACKAGE = ROOT / "tests", ROOT / "megatron_ring"
COVERED_BY: dict[str, str] = tomllib.loads((TESTS / "covered_by.toml").read_text())


@cache
def files() -> dict[str, Path]:
    """Dotted name -> file, of the package, the tests and the scripts that they start."""
    folders = (PACKAGE, TESTS, ROOT / "tools", ROOT / "examples")
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]
    return dict(zip(names, paths, strict=True))


def words(path: Path) -> Iterator[str]:
    """What a file imports, and what its texts say: programs are started, and kernels imported, by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(ROOT).parts[: -node.level])
            base = f"{base}.{node.module}" if node.module else base
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value.split()
            # of a sentence only full names: its other words are no module's
            names = [word.removesuffix(".py").replace("/", ".") for word in said]
            yield from (name for name in names if "." in name or len(names) == 1)


@cache
def below(path: Path) -> dict[str, str]:
    """Modules of the package below a file's folder, by the last part of their names."""
    return {name.split(".")[-1]: name for name, file in files().items() if path.parent in file.parents}


@cache
def used_by(name: str) -> frozenset[str]:
    path, known = files()[name], files()
    own = below(path) if PACKAGE in path.parents else {}
    if "iter_modules(__path__)" in path.read_text(encoding="utf-8"):
        # a package that imports whatever lies in its folder
        return frozenset(own.values())
    return frozenset({own.get(word, word) for word in words(path)} & known.keys())


def reached(test: Path) -> set[str]:
    """Modules that a test uses, itself or through others."""
    seen: set[str] = set()
    todo = [".".join(test.relative_to(ROOT).with_suffix("").parts)]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += used_by(name)
    return seen


def own_tests(module: str) -> list[str]:
    """Where module ``a/b/c.py`` would have a test of its own, as ``a/b/test_c.py``; below tests/."""
    *folders, name = Path(module).parts
    found = ["/".join([*folders, f"test_{name}"])]
    if folders and folders[0] == "kernels":
        found.append(f"kernels/test_{folders[-1]}.py")
    elif len(folders) > 1:
        above = "/".join(folders[:-1])
        found += [f"{above}/test_{name}", f"{above}/test_{folders[-1]}_{name}"]
    return found


def modules() -> list[str]:
    """All but those that only name what their folder holds."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path.relative_to(PACKAGE).as_posix() for path in paths if path.name != "__init__.py"]


def lines_for(module: str) -> list[str]:
    return [pattern for pattern in COVERED_BY if fnmatch(module, pattern)]


def uncovered(module: str) -> str | None:
    """Why no test is known to prove ``module``; None where one is."""
    if any((TESTS / name).exists() for name in own_tests(module)):
        return None
    if not (lines := lines_for(module)):
        return f"{module} has no tests/{own_tests(module)[0]}: add it, or a line to tests/covered_by.toml"
    test = TESTS / COVERED_BY[lines[0]]
    if not test.exists():
        return f"{module}: tests/{COVERED_BY[lines[0]]} is not there"
    dotted = "megatron_ring." + module.removesuffix(".py").replace("/", ".")
    return (
        None if dotted in reached(test) else f"{module}: nothing in tests/{COVERED_BY[lines[0]]} leads to it"
    )


def test_every_module_has_a_test_of_its_name_or_a_line_that_names_one():
    assert [why for module in modules() if (why := uncovered(module))] == []


def test_every_line_is_needed():
    bare = [m for m in modules() if not any((TESTS / name).exists() for name in own_tests(m))]
    assert [line for line in COVERED_BY if not any(fnmatch(module, line) for module in bare)] == []
    assert [module for module in bare if len(lines_for(module)) > 1] == []


def test_a_missing_test_is_noticed(monkeypatch):
    assert "has no tests/rl/test_nothing.py" in (uncovered("rl/nothing.py") or "")
    monkeypatch.setitem(COVERED_BY, "rl/nothing.py", "rl/test_nowhere.py")
    assert "is not there" in (uncovered("rl/nothing.py") or "")
    monkeypatch.setitem(COVERED_BY, "rl/types.py", "config/test_load.py")
    assert "nothing in tests/config/test_load.py leads to it" in (uncovered("rl/types.py") or "")
