"""The house's rules that a parser can check: who imports whom, who names CUDA, what is long, what is paired.

`.github/CONTRIBUTING.md` states them. A rule that is in the way is changed there and here, not worked around.
"""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_ring"
LEVELS = {
    "errors": 0,
    "plain": 0,
    "durable": 0,
    "families": 1,
    "kernels": 1,
    "config": 2,
    "runtime": 3,
    "data": 3,
    "model": 4,
    "observe": 4,
    "train": 5,
    "checkpoint": 5,
    "rl": 6,
    "report": 7,
    "stages": 8,
    "launch": 9,
    "__main__": 10,
}
SAYS_CUDA = {"runtime/device.py", "runtime/megatron_cpu.py"}
SAYS_MEGATRON = ("runtime/", "model/", "train/", "checkpoint/")
SAYS_VLLM = "rl/rollout"
MAX_FILE_LINES = 400
MAX_TEST_LINES = 520
"""A test file is a list of cases."""
MAX_TRITON_FUNCTION_LINES = 75
"""A Triton kernel is one function."""
MAX_FUNCTION_LINES = 70

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    [
        *MODULES,
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import anywhere; ``inside`` is the module's package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            parts = [*base, *((node.module,) if node.module else ())]
            yield from ((".".join([*parts, alias.name]), node.lineno) for alias in node.names)


def level_problems(name: str, tree: ast.AST) -> list[str]:
    """Imports of module ``name`` (such as ``data/corpus/corpus.py``) that go up or sideways in the levels."""
    room = name.split("/")[0].removesuffix(".py")
    found: list[str] = []
    for target, line in imports(tree, ("megatron_ring", *name.split("/")[:-1])):
        parts = target.split(".")
        if parts[0] != "megatron_ring" or len(parts) == 1 or parts[1] in (room, "__version__"):
            continue
        if LEVELS.get(parts[1], 99) >= LEVELS[room]:
            found.append(f"{name}:{line} imports {target}: level {LEVELS[room]} may import lower levels only")
    return found


def cuda_problems(name: str, tree: ast.AST) -> list[str]:
    """Places of module ``name`` that name ``torch.cuda`` although only the device seam may."""
    named = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    named += [line for target, line in imports(tree) if target.startswith("torch.cuda")]
    return (
        [] if name in SAYS_CUDA else [f"{name}:{line} says torch.cuda; ask runtime.device" for line in named]
    )


def foreign_problems(name: str, tree: ast.AST) -> list[str]:
    """Imports of Megatron-Core or vLLM outside the rooms that may know them."""
    found: list[str] = []
    for target, line in imports(tree):
        top = target.split(".")[0]
        if top == "megatron" and not name.startswith(SAYS_MEGATRON):
            found.append(f"{name}:{line} imports {target}; only {', '.join(SAYS_MEGATRON)} may")
        if top in ("vllm", "transformers") and not name.startswith(SAYS_VLLM):
            found.append(f"{name}:{line} imports {target}; only {SAYS_VLLM} may, inside the engine's process")
        if name.startswith("config/") and top in ("torch", "numpy", "triton"):
            found.append(f"{name}:{line} imports {target}; config runs on a login node")
    return found


def length_problems(name: str, text: str) -> list[str]:
    """A file or functions that are longer than one page can hold."""
    lines = len(text.splitlines())
    triton = name.startswith("megatron_ring/kernels/") and name.endswith("/kernel.py")
    limit = MAX_TEST_LINES if name.startswith("tests/") else MAX_FILE_LINES
    longest = MAX_TRITON_FUNCTION_LINES if triton else MAX_FUNCTION_LINES
    found = [f"{name} has {lines} lines, more than {limit}; split it"] if lines > limit else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > longest:
                found.append(f"{name}:{node.lineno} {node.name} has {length} lines, more than {longest}")
    return found


def sharing_problems(name: str, tree: ast.AST) -> list[str]:
    """Imports of a test or a conftest by file ``name`` below tests/; what two files need belongs into helpers/."""
    return [
        f"{name}:{line} imports {target}; move what they share into tests/helpers"
        for target, line in imports(tree)
        if target.startswith("tests.") and re.search(r"\.(test_\w+|conftest)(\.|$)", target)
    ]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_a_room_imports_only_lower_levels_or_itself():
    paths = [path for path in MODULES if path.name != "__init__.py" or path.parent != PACKAGE]
    assert [p for path in paths for p in level_problems(relative(path), parse(path))] == []


def test_every_room_has_a_level():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"__init__"} <= set(LEVELS)


def test_only_the_device_seam_says_torch_cuda():
    assert [p for path in MODULES for p in cuda_problems(relative(path), parse(path))] == []


def test_only_their_rooms_import_megatron_and_vllm():
    assert [p for path in MODULES for p in foreign_problems(relative(path), parse(path))] == []


def test_files_and_functions_stay_short():
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES}
    assert [p for name, text in texts.items() for p in length_problems(name, text)] == []


def test_what_tests_share_is_in_helpers():
    paths = sorted((ROOT / "tests").rglob("*.py"))
    names = {path: path.relative_to(ROOT / "tests").as_posix() for path in paths}
    assert [p for path, name in names.items() for p in sharing_problems(name, parse(path))] == []
    others = [
        name
        for name in names.values()
        if not name.startswith(("helpers/", "cases/"))
        and not re.fullmatch(r"(.*/)?(test_\w+|conftest)\.py", name)
    ]
    assert others == [], "neither a test nor a conftest: it belongs into tests/helpers"


def test_every_kernel_has_an_op_a_reference_and_a_test():
    missing: list[str] = []
    for folder in sorted((PACKAGE / "kernels").iterdir()):
        if not folder.is_dir() or folder.name == "__pycache__":
            continue
        wanted = [
            folder / "op.py",
            folder / "reference.py",
            ROOT / "tests/kernels" / f"test_{folder.name}.py",
        ]
        if any("implementation(" in path.read_text(encoding="utf-8") for path in folder.glob("op.py")):
            wanted.append(folder / "kernel.py")
        missing += [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]
    assert missing == []


def test_entry_points_are_guarded_because_checkpoint_writers_spawn():
    for path in [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        guards = [
            node
            for node in parse(path).body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        ]
        assert guards, f"{path.relative_to(ROOT)} needs an `if __name__ == '__main__'` guard"


def test_config_and_dry_run_import_no_torch():
    rooms = sorted(
        relative(path)[:-3].replace("/", ".") for path in MODULES if relative(path).startswith("config/")
    )
    names = [
        f"megatron_ring.{room.removesuffix('.__init__')}"
        for room in [*rooms, "launch.dry_run", "launch.entry"]
    ]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("check", "name", "code"),
    [
        (level_problems, "data/a.py", "from megatron_ring.model import build"),
        (level_problems, "data/a.py", "def f():\n    import megatron_ring.rl.batch"),
        (level_problems, "kernels/a.py", "from megatron_ring import config"),
        (level_problems, "data/a.py", "from ..stages import pretrain"),
        (cuda_problems, "model/a.py", "import torch\ntorch.cuda.synchronize()"),
        (cuda_problems, "model/a.py", "from torch.cuda import Stream"),
        (foreign_problems, "kernels/a.py", "from megatron.core import parallel_state"),
        (foreign_problems, "data/text/chat.py", "import megatron.core"),
        (foreign_problems, "rl/rollout/model_runner.py", "from megatron.core import parallel_state"),
        (foreign_problems, "config/a.py", "import torch"),
        (foreign_problems, "rl/reward.py", "from vllm import LLM"),
        (sharing_problems, "rl/test_a.py", "from tests.rl.test_b import c"),
        (sharing_problems, "rl/test_a.py", "from tests.rl import test_b"),
        (sharing_problems, "helpers/a.py", "def f():\n    import tests.rl.conftest"),
    ],
)
def test_each_rule_sees_its_breach(check, name: str, code: str):
    assert len(check(name, ast.parse(code))) == 1


def test_the_length_rule_sees_its_breach():
    assert len(length_problems("a.py", "x = 1\n" * (MAX_FILE_LINES + 1))) == 1
    assert len(length_problems("a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)) == 1


def test_what_tools_and_examples_import_of_us_is_there():
    """Some import inside a function, where no type checker and no other import looks."""
    missing = []
    for path in (*ROOT.glob("tools/**/*.py"), *ROOT.glob("examples/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                "megatron_ring",
                "tools",
            ):
                missing += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: {node.module} has no {alias.name}"
                    for alias in node.names
                    if not _has(node.module, alias.name)
                ]
    assert missing == []


def _has(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (is_package and importlib.util.find_spec(f"{module}.{name}") is not None)


def test_a_name_that_is_gone_is_noticed():
    assert _has("megatron_ring.rl.reward", "code") and _has("megatron_ring.errors", "RingError")
    assert not _has("megatron_ring.rl.reward", "nothing") and not _has("megatron_ring.errors", "Nothing")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(name: str, tree: ast.AST, known: set[str], is_package: bool = False) -> set[str]:
    """Which of the ``known`` modules module ``name`` imports anywhere, under TYPE_CHECKING and in functions too."""
    inside = tuple(name.split(".") if is_package else name.split(".")[:-1])
    found: set[str] = set()
    for target, _ in imports(tree, inside):
        # the imported name is a module itself, or a name in the module before it
        module = target if target in known else target.rpartition(".")[0]
        found |= {module} & known
    return found - {name}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of an import circle, the first of them again at its end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_one_another_in_a_circle():
    known = {module_name(path) for path in MODULES}
    graph = {
        module_name(path): imported_modules(
            module_name(path), parse(path), known, is_package=path.name == "__init__.py"
        )
        for path in MODULES
    }
    assert circle(graph) == []


def test_a_circle_is_seen_through_type_checking_and_functions():
    known = {"p.a", "p.b", "p.c"}
    sources = {
        "p.a": "from p import b",
        "p.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import name",
        "p.c": "def f():\n    from .a import other",
    }
    graph = {name: imported_modules(name, ast.parse(code), known) for name, code in sources.items()}
    assert graph == {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}
    assert len(circle(graph)) == 4 and circle(graph | {"p.c": set()}) == []


GUIDES = ("README.md", ".github/CONTRIBUTING.md")


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def missing_paths(text: str, files: list[str]) -> list[str]:
    """Files that ``text`` names and that are not there: paths from the root (or from the package), and bare names of
    tests that belong to no file or to several.
    """
    known = {*files, *(name.removeprefix("megatron_ring/") for name in files)}
    found: list[str] = []
    for name in re.findall(r"(?<![\w/.*<])[\w.*-]+(?:/[\w.*-]+)*\.(?:py|sh|sbatch|toml)\b", text):
        path = Path(name)
        if "/" in name:
            there = any(Path(file).match(name) for file in known) if "*" in name else name in known
        elif name.startswith("test_"):
            there = sum(Path(file).name == name for file in files) == 1
        else:
            there = any(Path(file).name == path.name for file in files)
        found += [] if there else [name]
    return found


@pytest.mark.parametrize("guide", GUIDES)
def test_every_file_that_a_guide_names_exists(guide: str):
    assert missing_paths((ROOT / guide).read_text(encoding="utf-8"), tracked_files()) == []


def test_a_file_that_is_gone_is_noticed():
    files = [
        "megatron_ring/data/blend.py",
        "tests/a/test_x.py",
        "tests/b/test_x.py",
        "tests/test_y.py",
        "tools/z.sh",
    ]
    text = "`megatron_ring/data/blend.py`, data/blend.py `test_y.py` blend.py tests/a/test_x.py tests/*/test_x.py z.sh"
    assert missing_paths(text, files) == []
    assert missing_paths(
        "`data/blends.py`, test_x.py, tests/b/test_y.py, tests/c*/test_x.py, w.sh", files
    ) == [
        "data/blends.py",
        "test_x.py",
        "tests/b/test_y.py",
        "tests/c*/test_x.py",
        "w.sh",
    ]


def missing_documents(text: str, files: list[str]) -> list[str]:
    """Markdown documents that ``text`` names and that are not in the repository."""
    names = {Path(file).name for file in files}
    return [name for name in re.findall(r"\b[A-Z][A-Z_]+\.md\b", text) if name not in names]


def test_no_file_names_a_document_that_is_not_in_the_repository():
    files = tracked_files()
    found: list[str] = []
    for name in files:
        if (
            name.endswith((".py", ".md", ".toml", ".sh", ".cpp", ".h", ".yml", ".txt"))
            and name != NAMES_A_DOCUMENT
        ):
            text = (ROOT / name).read_text(encoding="utf-8")
            found += [f"{name} names {document}" for document in missing_documents(text, files)]
    assert found == []


NAMES_A_DOCUMENT = "tests/test_house_rules.py"


def test_a_document_that_is_not_there_is_noticed():
    assert missing_documents("see PLAN.md, 3.3 and README.md", ["README.md"]) == ["PLAN.md"]


def change_rows(text: str) -> list[tuple[str, str]]:
    """(what to change, where) of the guide's table."""
    table = text.partition("## To change X, open Y")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [(row[0], " | ".join(row[1:])) for row in rows if row[0] != "to change or add"]


def test_the_table_of_where_to_change_what_is_true():
    """Each folder is there, each name is in a file of its row, each flag is a setting."""
    from megatron_ring.config.settings import settings

    rows = change_rows((ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(rows) >= 25
    wrong: list[str] = []
    for what, where in rows:
        words = re.findall(r"`([^`]+)`", where)
        paths = [word for word in words if "/" in word and " " not in word]
        text = "".join((PACKAGE / path).read_text(encoding="utf-8") for path in paths if path.endswith(".py"))
        flags = [word.split()[0] for word in words if word.startswith("--")]
        names = [word for word in words if word.isidentifier()]
        wrong += [
            f"{what}: no folder {path}"
            for path in paths
            if path.endswith("/") and not (PACKAGE / path).is_dir()
        ]
        wrong += [f"{what}: no {name} there" for name in names if f" {name}" not in text]
        wrong += [f"{what}: no {flag}" for flag in flags if flag not in {s.flag for s in settings().values()}]
    assert wrong == []
