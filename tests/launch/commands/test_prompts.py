"""Problems frozen to JSONL are the problems of their source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.data.prompts.sources import GymSource, JsonlSource
from tests.helpers.paths import python_path


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ring", "prompts", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(), **env},
    )


def test_frozen_problems_are_the_sources(tmp_path: Path):
    out = tmp_path / "sums.jsonl"
    source = "reasoning_gym:chain_sum?seed=3&size=40"
    done = run("--source", source, "--count", 30, "--output", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 30 of 40 problems of {source}\n"
    frozen, generated = JsonlSource(out), GymSource.parse(source)
    assert len(frozen) == 30
    assert [frozen[i] for i in range(30)] == [generated[i] for i in range(30)]


def test_problems_that_depend_on_the_hash_seed_can_be_frozen(tmp_path: Path):
    out = tmp_path / "words.jsonl"
    done = run(
        "--source", "reasoning_gym:ransom_note?seed=3", "--count", 5, "--output", out,
        PYTHONHASHSEED="1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    source = JsonlSource(out)
    assert len(source) == 5 and source[0].domain == "reasoning_gym"
    again = run("--source", out, "--output", out)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "nowhere.jsonl"], "input nowhere.jsonl does not exist"),
        (["--source", "a", "--count", 0], "count=0 must be at least 1"),
        ([], "--source"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, words: list, said: str):
    done = run(*words, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert list(tmp_path.iterdir()) == []
