"""What a user names may be a pipe, a folder or a device: every reader says so in one line and never waits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ring.config.load import read_toml
from megatron_ring.data.text.tokenizer import load_tokenizer
from megatron_ring.data.text.tokenizer_files import read_settings
from megatron_ring.errors import RingError
from megatron_ring.observe.metrics_file import read_records
from megatron_ring.observe.responses import read_samples
from megatron_ring.report.read import read_run

STEP = {"kind": "train", "step": 1, "tokens": 1, "seconds": 1.0, "wall_seconds": 1.0}


def beside_metrics(path: Path) -> object:
    (path.parent / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    return read_run(path.parent)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "--config": ("a.toml", read_toml),
    "sentencepiece": ("tok.model", lambda path: load_tokenizer("sentencepiece", path)),
    "chat template": ("chat_template.jinja", lambda path: read_settings(path.parent)),
    "metrics": ("metrics.jsonl", read_records),
    "samples": ("samples.jsonl", read_samples),
    "a run's config": ("config.toml", beside_metrics),
    "a run's text": ("sample.txt", beside_metrics),
    "a run's samples": ("samples.jsonl", beside_metrics),
}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_plain_file_is_one_line(tmp_path, no_waiting, reader, kind):
    name, read = READERS[reader]
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    if reader == "chat template":
        # beside a tokenizer it is there or it is not
        assert read(path) == ({}, None)
        return
    with pytest.raises(RingError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_chat_templates_under_names_that_are_none_are_passed_over(tmp_path):
    named = [{"name": [], "template": "a"}, 3, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_settings(tmp_path)[1] == "b"
