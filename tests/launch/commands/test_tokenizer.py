import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.data.text.tokenizer import load_tokenizer
from tests.helpers.paths import python_path


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ring", "tokenizer", *map(str, words)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": python_path(), "PATH": ""},
    )


def test_it_trains_on_the_builtin_corpus(tmp_path: Path):
    out = tmp_path / "new" / "tok.model"
    done = run("--builtin-corpus", "--max-mb", 0.3, "--vocab-size", 700, "--output", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tok.model: 700 tokens" in done.stdout
    assert load_tokenizer("sentencepiece", out).vocab_size == 700


def test_it_trains_on_files_with_digits_together(tmp_path: Path):
    lines = [f'{{"body": "in {year} there were a number of things"}}' for year in range(1900, 2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "tok.model"
    words = ("--input", tmp_path / "a.jsonl", "--json-key", "body", "--vocab-size", 300, "--output", out)
    assert run(*words).returncode == 0
    assert len(load_tokenizer("sentencepiece", out).encode("1950")) == 4
    assert run(*words, "--no-split-digits", "--overwrite").returncode == 0
    assert len(load_tokenizer("sentencepiece", out).encode("1950")) < 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --input or --builtin-corpus"),
        (["--input", "nowhere"], "input nowhere does not exist"),
        (["--builtin-corpus", "--vocab-size", "9"], "vocab_size=9 must exceed"),
        (["--builtin-corpus", "--max-mb", "0.01", "--vocab-size", "30000"], "set at most"),
        (["--builtin-corpus", "--vocab"], "--vocab"),
        (["--bultin-corpus"], "bultin"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path: Path, words: list[str], message: str):
    done = run(*words, "--output", tmp_path / "tok.model")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_write_over_a_file_unasked(tmp_path: Path):
    (tmp_path / "tok.model").write_text("mine")
    done = run("--builtin-corpus", "--output", tmp_path / "tok.model")
    assert done.returncode == 2 and "exists already; choose another --output, or replace it" in done.stderr
    assert (tmp_path / "tok.model").read_text() == "mine"
