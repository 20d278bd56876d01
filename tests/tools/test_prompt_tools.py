"""Problems frozen to JSONL are the problems of their source; worked examples are chat JSONL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.data.conversations import read_line
from megatron_ring.data.corpus.documents import read_records
from megatron_ring.data.prompts.sources import GymSource, JsonlSource
from tests.helpers.paths import python_path

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore", **env},
    )


def test_frozen_problems_are_the_sources(tmp_path: Path):
    out = tmp_path / "sums.jsonl"
    source = "reasoning_gym:chain_sum?seed=3&size=40"
    done = run("freeze_prompts.py", "--source", source, "--count", 30, "--output", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 30 of 40 problems of {source}\n"
    frozen, generated = JsonlSource(out), GymSource.parse(source)
    assert len(frozen) == 30
    assert [frozen[i] for i in range(30)] == [generated[i] for i in range(30)]


def test_problems_that_depend_on_the_hash_seed_can_be_frozen(tmp_path: Path):
    out = tmp_path / "words.jsonl"
    done = run(
        "freeze_prompts.py", "--source", "reasoning_gym:ransom_note?seed=3", "--count", 5, "--output", out,
        PYTHONHASHSEED="1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    source = JsonlSource(out)
    assert len(source) == 5 and source[0].domain == "reasoning_gym"
    again = run("freeze_prompts.py", "--source", out, "--output", out)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_worked_examples_are_conversations(tmp_path: Path):
    out = tmp_path / "sums.jsonl"
    done = run(
        "make_worked_examples.py", "--count", 20, "--slip-share", 0.25, "--max-digits", 1, "--output", out
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 20 worked examples, 25% of them with a slip\n"
    conversations = [read_line(record).messages for record in read_records([out])]
    assert len(conversations) == 20
    assert all([message["role"] for message in one] == ["user", "assistant"] for one in conversations)
    assert json.loads(out.read_text().splitlines()[0])["messages"][1]["content"].startswith("<think>")


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        ("freeze_prompts.py", ["--source", "nowhere.jsonl"], "input nowhere.jsonl does not exist"),
        ("freeze_prompts.py", ["--source", "a", "--count", 0], "count=0 must be at least 1"),
        ("freeze_prompts.py", [], "--source"),
        ("make_worked_examples.py", ["--count", "0"], "count=0 must be at least 1"),
        ("make_worked_examples.py", ["--min-terms", "9"], "max_terms"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, tool: str, words: list, said: str):
    done = run(tool, *words, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert list(tmp_path.iterdir()) == []
