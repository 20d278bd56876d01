import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.corpus import open_corpus
from megatron_ring.data.corpus.indexed import open_indexed
from megatron_ring.data.text.tokenizer import load_tokenizer
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from tests.helpers.paths import python_path

COMMAND = [sys.executable, "-m", "megatron_ring", "preprocess"]
ENVIRONMENT = {"PYTHONPATH": python_path(), "PATH": "", "OMP_NUM_THREADS": "1"}


def run(*words: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=preexec_fn
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_tokenizer(builtin_documents(0.2), path, vocab_size=500)
    return path


def test_jsonl_and_folders_become_a_corpus_in_two_processes(tmp_path: Path, model: Path):
    texts = [f"document {i}: {'x' * i}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in texts))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "last.txt").write_text("the last")
    (tmp_path / "folder" / "empty.txt").write_text("")
    prefix = tmp_path / "out" / "corpus"
    done = run(
        *("--input", tmp_path / "a.jsonl", tmp_path / "folder", "--json-keys", "t"),
        *("--tokenizer-model", model, "--output-prefix", prefix, "--workers", 2),
    )
    assert done.returncode == 0, done.stderr
    assert "41 documents" in done.stdout and "1 empty or binary records left out" in done.stdout
    tokenizer = load_tokenizer("sentencepiece", model)
    corpus = open_indexed(prefix)
    for i, text in enumerate([*texts, "the last"]):
        document = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].tolist()
        assert document == [*tokenizer.encode(text), tokenizer.eos_id]
    assert f"{corpus.num_tokens:,} tokens" in done.stdout
    assert open_corpus([str(prefix)], "1", tokenizer=tokenizer).train.num_documents == 41
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.meta.json",
    ]


def test_the_builtin_corpus_without_ends(tmp_path: Path, model: Path):
    done = run(
        *("--builtin-corpus", "--max-mb", 0.2, "--no-append-eod"),
        *("--tokenizer-model", model, "--output-prefix", tmp_path / "std"),
    )
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer("sentencepiece", model)
    corpus = open_indexed(tmp_path / "std")
    first = corpus.tokens[: corpus.offsets[1]].tolist()
    assert tokenizer.decode(first) == builtin_documents(0.2)[0] and tokenizer.eos_id not in first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --input or --builtin-corpus"),
        (["--builtin-corpus", "--workers", "0"], "workers=0 must be at least 1"),
        (["--builtin-corpus", "--tokenizer-model", "nowhere.model"], "nowhere.model does not exist"),
        (["--builtin-corpus", "--tokenizer-type", "huggingface"], "set tokenizer_type=sentencepiece"),
        (["--input", "nowhere.jsonl"], "input nowhere.jsonl does not exist"),
        (["--builtin-corpus", "--apend-eod"], "apend-eod"),
        (
            ["--builtin-corpus", "--max-mb", "0.1", "--output-prefix", "/dev/null/c"],
            "cannot write /dev/null/c.bin",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path: Path, model: Path, words: list[str], message: str):
    done = run("--tokenizer-model", model, "--output-prefix", tmp_path / "c", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_leaves_nothing_behind(tmp_path: Path, model: Path):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    done = run(
        *("--input", tmp_path / "in.jsonl"), *("--tokenizer-model", model, "--output-prefix", tmp_path / "c")
    )
    assert done.returncode == 2 and "in.jsonl:2 is not JSON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing_behind(tmp_path: Path, model: Path):
    def allow_100_kilobytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(
        *("--builtin-corpus", "--max-mb", 1),
        *("--tokenizer-model", model, "--output-prefix", tmp_path / "c"),
        preexec_fn=allow_100_kilobytes,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "c.bin" in done.stderr and "File too large; the folder must be writable and have room" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_write_over_a_corpus_unasked(tmp_path: Path, model: Path):
    (tmp_path / "c.bin").write_text("mine")
    words = (
        "--builtin-corpus",
        "--max-mb",
        0.1,
        "--tokenizer-model",
        model,
        "--output-prefix",
        tmp_path / "c",
    )
    done = run(*words)
    assert done.returncode == 2 and "c.bin exists already; choose another --output-prefix" in done.stderr
    assert (tmp_path / "c.bin").read_text() == "mine"
    assert run(*words, "--overwrite").returncode == 0
    assert open_indexed(tmp_path / "c").num_documents > 1


def test_a_terminated_run_leaves_nothing_behind(tmp_path: Path, model: Path):
    process = subprocess.Popen(
        [*COMMAND, "--builtin-corpus", "--tokenizer-model", model, "--output-prefix", tmp_path / "c"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 128 + signal.SIGTERM
    assert process.stderr is not None and process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []
