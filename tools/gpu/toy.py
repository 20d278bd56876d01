"""A tiny task that needs no download: the built-in corpus, sums whose answer is not read, a reward by parity of
length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.gpu.results import children_path

TOOLS = Path(__file__).resolve().parents[1]
REWARD = """
from megatron_ring.rl.types import RewardResult


def judge(prompt, text):
    right = float(len(text) % 2)
    return RewardResult(score=right, status="correct" if right else "wrong")
"""
"""The source of a reward function ``judge`` for the domain ``bench``."""


def write_problems(path: Path, count: int) -> None:
    """JSONL of problems of the domain ``bench``."""
    rows = ({"prompt": f"{n}+{n * 7 % 13}=", "domain": "bench", "answer": "0"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_corpus(folder: Path) -> dict[str, Path]:
    """Settings for a corpus of half a megabyte, from the source text of Python's standard library, and its tokenizer."""
    model, prefix = folder / "tok.model", folder / "std"
    words = ["--builtin-corpus", "--max-mb", "0.5"]
    for script, more in (
        ("train_tokenizer.py", ["--vocab-size", "512", "--output", model]),
        ("preprocess_data.py", ["--tokenizer-model", model, "--output-prefix", prefix]),
    ):
        command = [sys.executable, str(TOOLS / script), *words, *map(str, more)]
        environment = {**os.environ, "PYTHONPATH": children_path()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"{script} ended with exit code {done.returncode}: {done.stderr[-400:]}")
    return {"data-path": prefix, "tokenizer-model": model}
