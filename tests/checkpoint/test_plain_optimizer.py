"""Without the distributed optimizer: what is saved comes back bit for bit, at another layout, and in the other one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.checkpoint.plain_cases import LAYOUTS, configure, next_step, same, state_of
from tests.helpers.model.small import weights
from tests.helpers.parallel.running import randomise
from tests.helpers.parallel.spawning import spawn

PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
TRAINER = {"step": 2}


@contextmanager
def checkpointer(seed: int = 1, **settings) -> Iterator[Checkpointer]:
    config = configure(seed=seed, **settings)
    with open_session(config.parallel, seed=seed) as session:
        yield Checkpointer(config, Engine(config, session), session, stage="pretrain")


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory,
) -> dict[bool, tuple[Path, list[torch.Tensor], dict[str, float], list[torch.Tensor]]]:
    """By precision: the folder of a checkpoint after two steps, its state, the next step and the state then."""
    folder, found = tmp_path_factory.mktemp("plain"), {}
    for bf16 in (False, True):
        root = folder / f"one-{bf16}"
        with checkpointer(save=str(root), bf16=bf16) as writer:
            randomise(writer.engine)
            for _ in range(2):
                next_step(writer.engine)
            writer.save(2, TRAINER)
            state = state_of(writer.engine)
            found[bf16] = (root, state, next_step(writer.engine), state_of(writer.engine))
    return found


@PRECISIONS
def test_a_resumed_run_is_the_run_that_never_stopped(saved, bf16):
    root, state, step, after = saved[bf16]
    with checkpointer(seed=2, load=str(root), bf16=bf16) as reader:
        assert reader.load(root) == TRAINER
        assert same(state_of(reader.engine), state)
        assert next_step(reader.engine) == step
        assert same(state_of(reader.engine), after)


@PRECISIONS
@pytest.mark.parametrize("flag", ["finetune", "no_load_optim"])
def test_weights_alone_can_be_loaded(saved, bf16, flag):
    root, state, _, _ = saved[bf16]
    with checkpointer(seed=2, load=str(root), bf16=bf16, **{flag: True}) as reader:
        assert reader.load(root) == (None if flag == "finetune" else TRAINER)
        own = list(weights(reader.engine).values())
        assert same(own, state[: len(own)])
        parts = reader.engine.optimizer.chained_optimizers
        assert not any(part.optimizer.state for part in parts)
        for parameter in reader.engine.models[0].parameters():
            assert torch.equal(getattr(parameter, "main_param", parameter).to(parameter.dtype), parameter)


@PRECISIONS
def test_an_asynchronous_save_is_a_snapshot(tmp_path, bf16):
    with checkpointer(save=str(tmp_path), async_save=True, bf16=bf16) as writer:
        next_step(writer.engine)
        state = state_of(writer.engine)
        writer.save(2, TRAINER)
        next_step(writer.engine)
        assert not same(state_of(writer.engine), state)
        writer.finish()
    with checkpointer(seed=2, load=str(tmp_path), bf16=bf16) as reader:
        assert reader.load(tmp_path) == TRAINER
        assert same(state_of(reader.engine), state)


@PRECISIONS
@pytest.mark.parametrize("to_plain", [False, True], ids=["plain-to-distributed", "distributed-to-plain"])
def test_either_optimizer_goes_on_from_the_others_checkpoint(tmp_path, bf16, to_plain):
    with checkpointer(save=str(tmp_path), bf16=bf16, use_distributed_optimizer=to_plain) as writer:
        randomise(writer.engine)
        next_step(writer.engine)
        writer.save(2, TRAINER)
        step, after = next_step(writer.engine), weights(writer.engine)
    with checkpointer(
        seed=2, load=str(tmp_path), bf16=bf16, use_distributed_optimizer=not to_plain
    ) as reader:
        assert reader.load(tmp_path) == TRAINER
        assert next_step(reader.engine) == pytest.approx(step, rel=1e-6)
        for name, value in weights(reader.engine).items():
            torch.testing.assert_close(value, after[name], rtol=1e-2 if bf16 else 1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def two_processes(saved) -> Path:
    """The folder in which two processes have gone on from the single process's checkpoints."""
    folder = saved[False][0].parent
    result = spawn(2, "tests.helpers.checkpoint.plain_worker", str(folder))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return folder


@PRECISIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_go_on_from_one_and_one_from_two(saved, two_processes, layout, bf16):
    _, state, step, _ = saved[bf16]
    there = two_processes / f"{layout}-{bf16}"
    assert json.loads((there / "step.json").read_text()) == pytest.approx(step, rel=2e-2 if bf16 else 1e-5)
    with checkpointer(seed=2, load=str(there), bf16=bf16) as reader:
        assert reader.load(there) == TRAINER
        assert same(state_of(reader.engine), state)
