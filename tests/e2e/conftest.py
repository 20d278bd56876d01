"""What whole runs read: a corpus with its tokenizer, and problems."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.e2e.runs import ROOT, environment


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict[str, object]:
    """Flags for a tiny corpus and its tokenizer, made by the project's own tools from the built-in text."""
    folder = tmp_path_factory.mktemp("corpus")

    def tool(name: str, *words: str) -> None:
        subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *words],
            check=True,
            env=environment(),
            capture_output=True,
        )

    model, prefix = folder / "tok.model", folder / "std"
    tool(
        "train_tokenizer.py",
        "--builtin-corpus",
        "--max-mb",
        "0.5",
        "--vocab-size",
        "512",
        "--output",
        str(model),
    )
    tool(
        "preprocess_data.py",
        "--builtin-corpus",
        "--max-mb",
        "0.5",
        "--tokenizer-model",
        str(model),
        "--output-prefix",
        str(prefix),
    )
    return {"data-path": str(prefix), "tokenizer-model": str(model), "split": "90,8,2"}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "toy.jsonl"
    rows = [{"prompt": f"def f{i}(x):", "domain": "toy", "answer": str(i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
