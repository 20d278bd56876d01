"""Fine-tuning in this process: it learns answers only, packs without a difference, and resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from megatron_ring.errors import CheckpointError, ConfigError, DataError
from megatron_ring.runtime.session import open_session
from megatron_ring.stages.sft import SftRun, train_sft, with_derived_steps
from tests.helpers.e2e.runs import records
from tests.helpers.model.small import weights
from tests.helpers.parallel.cases import MODELS
from tests.helpers.parallel.running import randomise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, and conversations of several lengths in which there is something to learn."""
    folder = tmp_path_factory.mktemp("sft")
    train_tokenizer(builtin_documents(0.1), folder / "tok.model", vocab_size=400)
    for name, start, count in (("train", 0, 60), ("held_out", 60, 12)):
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"{i}+1" * (1 + i % 3)},
                    {"role": "assistant", "content": "yes" * (1 + i % 4)},
                ]
            }
            for i in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def configure(folder, tmp_path) -> Callable:
    def make(model: str = "v1", **settings):
        values = {
            **MODELS[model],
            "vocab_size": 400,
            "seq_length": 48,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 0,
            "lr": 2e-3,
            "tokenizer_model": str(folder / "tok.model"),
            "sft_data": (str(folder / "train.jsonl"),),
            "sft_eval_data": (str(folder / "held_out.jsonl"),),
            "sft_epochs": 1.0,
            "log_level": "error",
            "metrics_file": str(tmp_path / "metrics.jsonl"),
            **settings,
        }
        config = config_from_mapping(values)
        validate(config, 1, "sft")
        return config

    return make


@pytest.mark.parametrize("model", ["v2_mtp", "dense"])
def test_the_loss_falls_on_held_out_conversations_too(configure, tmp_path, model):
    train_sft(configure(model, sft_epochs=3, eval_interval=8, eval_iters=2, lr=1e-2, min_lr=1e-3))
    steps, validations = records(tmp_path), records(tmp_path, "eval")
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert validations[-1]["loss"] < 0.9 * validations[0]["loss"]
    assert ("mtp_loss" in steps[0]) == (model == "v2_mtp")
    assert validations[-1]["step"] == steps[-1]["step"]
    assert "<role>ASSISTANT</role>" in (tmp_path / "sample.txt").read_text()


def test_an_epoch_is_every_conversation_once_and_sets_the_steps(configure, tmp_path):
    train_sft(configure(sft_epochs=2))
    steps = records(tmp_path)
    shown = sum(record["conversations"] for record in steps)
    assert abs(shown - 120) <= steps[0]["conversations"] / 2
    # 60 conversations of 8.5 slots on average make 1.5 steps of 192 slots an epoch, or a little more
    assert all(record["packing"] > 0.5 for record in steps)
    assert [record["epoch"] for record in steps] == sorted(record["epoch"] for record in steps)
    assert all(record["loss_tokens"] < record["packing"] * 192 for record in steps)


def test_warm_up_and_steps_are_derived_where_they_are_not_given(configure):
    config = with_derived_steps(configure(sft_warmup_fraction=0.05), 200)
    assert (config.train.train_iters, config.train.lr_warmup_iters) == (200, 10)
    config = with_derived_steps(configure(train_iters=50, lr_warmup_iters=7), 200)
    assert (config.train.train_iters, config.train.lr_warmup_iters) == (50, 7)
    assert with_derived_steps(configure(), 1).train.lr_warmup_iters == 0
    with pytest.raises(ConfigError, match=r"lr_warmup_iters=300 must be from 0 to below train_iters=200"):
        with_derived_steps(configure(lr_warmup_iters=300), 200)


@pytest.mark.parametrize("model", ["v1", "v2_mtp"])
def test_a_conversation_alone_has_the_loss_that_it_has_packed(configure, model):
    config = configure(model)
    with (
        open_session(config.parallel, config.train.seed) as session,
        SftRun.of(config, session).opened() as run,
    ):
        randomise(run.engine)
        group = max(run.stream.take(4), key=len)
        assert len(group) > 3

        def loss_sum(members) -> float:
            microbatch = run.stream.microbatch(members)
            mean = run.engine.evaluate([microbatch], run.objective)["lm_loss"]
            return mean * run.objective.local_denominator([microbatch])

        alone = [loss_sum((index,)) for index in group]
        assert loss_sum(group) == pytest.approx(sum(alone), rel=1e-5)
        assert min(alone) > 0


def test_questions_have_no_gradient_of_their_own(configure):
    """The loss weighs answers alone: other labels in the questions change nothing."""
    config = configure()
    with (
        open_session(config.parallel, config.train.seed) as session,
        SftRun.of(config, session).opened() as run,
    ):
        (group,) = run.stream.take(1)
        microbatch = run.stream.microbatch(group)
        learned = int(run.stream.conversations.learned.sum())
        every = [run.stream.microbatch((index,)) for index in range(len(run.stream.conversations))]
        assert run.objective.local_denominator(every) == learned
        assert bool((microbatch.labels_T[microbatch.loss_mask_T == 0] == -100).all())


def test_a_resumed_run_is_the_run_that_never_stopped(configure, tmp_path):
    final: dict[str, dict] = {}
    losses: dict[str, list] = {}
    for name, stops in (("straight", 1), ("stopped", 3)):
        where = tmp_path / name
        settings = {
            "save": str(where),
            "load": str(where),
            "sft_epochs": 4.0,
            "metrics_file": str(where / "metrics.jsonl"),
        }
        for stop in range(stops):
            leaves = {"exit_interval": 2} if stop < stops - 1 else {}
            config = configure(**settings, **leaves)
            with open_session(config.parallel, config.train.seed) as session:
                run = SftRun.of(config, session)
                run.run()
                final[name] = weights(run.engine)
        losses[name] = [
            (record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in records(where)
        ]
    assert losses["straight"] == losses["stopped"] and len(losses["straight"]) > 4
    assert all(map(torch.equal, final["straight"].values(), final["stopped"].values()))


def opened(config, session) -> SftRun:
    with SftRun.of(config, session).opened() as run:
        return run


def test_the_runs_own_checkpoint_wins_over_the_pretrained_one(configure, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    train_sft(configure(save=first))
    settings = {"save": second, "load": second, "pretrained_checkpoint": first, "sft_epochs": 4.0}
    config = configure(**settings)
    with open_session(config.parallel, config.train.seed) as session:
        from megatron_ring.checkpoint.checkpointer import Checkpointer

        run = opened(config, session)
        loaded = weights(run.engine)
        assert run.step == 0 and run.stream.state_dict()["drawn"] == 0
        Checkpointer(config, run.engine, session, stage="sft").load_weights(first)
        assert all(map(torch.equal, weights(run.engine).values(), loaded.values()))
    with open_session(config.parallel, config.train.seed) as session:
        fresh = opened(configure(**settings | {"pretrained_checkpoint": None}), session)
        assert not torch.equal(weights(fresh.engine)["output_layer.weight"], loaded["output_layer.weight"])
    train_sft(configure(**settings, exit_interval=2))
    with open_session(config.parallel, config.train.seed) as session:
        resumed = opened(config, session)
        assert resumed.step == 2
        assert not torch.equal(weights(resumed.engine)["output_layer.weight"], loaded["output_layer.weight"])


def test_a_checkpoint_can_be_kept_of_every_epoch(configure, tmp_path):
    run = tmp_path / "run"
    train_sft(configure(save=str(run), sft_save_every_epoch=True, sft_epochs=3))
    saved = [int(path.name.removeprefix("iter_")) for path in sorted(run.glob("iter_*"))]
    steps = records(tmp_path)
    ends = [one["step"] for one, after in pairwise(steps) if one["epoch"] != after["epoch"]]
    assert len(ends) == 2 and saved == [*ends, steps[-1]["step"]]


def test_a_checkpoint_of_another_stage_and_none_at_all_are_refused_in_one_line(configure, tmp_path):
    from dataclasses import replace

    config = configure(pretrained_checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no checkpoint; name a folder that a run saved to"):
        train_sft(config)
    where = str(tmp_path / "run")
    train_sft(configure(save=where))
    config = configure(save=where, load=where)
    with pytest.raises(DataError, match="was reading other conversations"):
        train_sft(replace(config, train=replace(config.train, seed=7)))
