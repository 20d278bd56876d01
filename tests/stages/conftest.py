"""What RL runs in this process begin with; pre-training's and fine-tuning's tests have a ``folder`` and a
``configure`` of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from tests.helpers.e2e.rl_settings import settings as tiny

PLAIN = {
    "rollout_token_budget": 0,
    "budget_overshoot": "token",
    "minibatches_per_step": 1,
    "train_iters": 2,
    "kl_loss_coef": 0.0,
    "save_interval": 0,
    "log_level": "error",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    train_tokenizer(builtin_documents(0.1), folder / "tok.model", vocab_size=400)
    for name, first, count, domain in (
        ("train", 0, 40, "toy"),
        ("held_out", 90, 4, "toy"),
        ("strange", 0, 4, "astrology"),
    ):
        rows = [
            {"prompt": f"f{i}(x):", "domain": domain, "answer": str(i)} for i in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    return folder


@pytest.fixture
def values(folder, tmp_path) -> Callable[..., dict[str, object]]:
    def make(**settings: object) -> dict[str, object]:
        corpus = {"tokenizer-model": folder / "tok.model"}
        where = {"metrics_file": str(tmp_path / "metrics.jsonl")}
        return tiny(corpus, folder / "train.jsonl", **{**PLAIN, **where, **settings})

    return make


@pytest.fixture
def configure(values) -> Callable:
    def make(**settings: object):
        flat = {k: tuple(v) if isinstance(v, list) else v for k, v in values(**settings).items()}
        config = config_from_mapping(flat)
        validate(config, 1, "rl")
        return config

    return make
