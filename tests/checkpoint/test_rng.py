"""Random-number states come back to the rank they were taken from, at the same layout only."""

from __future__ import annotations

import os
import random

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_ring.checkpoint.rng import gather_rng, load_rng, save_rng
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.runtime.session import open_session

PLAIN = ParallelConfig(bf16=False)


def draw() -> list[torch.Tensor]:
    """From torch's generator and from each of Megatron's named ones."""
    tracker = get_cuda_rng_tracker()
    drawn = [torch.rand(4)]
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            drawn.append(torch.rand(4))
    return drawn


@pytest.fixture
def session():
    with open_session(PLAIN, seed=3) as session:
        yield session


def test_every_generator_goes_on_where_it_was(session, tmp_path):
    draw()
    save_rng(gather_rng(session), tmp_path)
    expected = draw()
    assert len(expected) == 4, "torch's, data-parallel, model-parallel and expert-parallel"
    random.random(), draw(), draw()
    load_rng(tmp_path, session, same_layout=True)
    assert all(map(torch.equal, draw(), expected))


def test_what_is_saved_is_a_copy(session, tmp_path):
    states = gather_rng(session)
    before = {name: state.clone() for name, state in states.items()}
    draw()
    assert all(torch.equal(state, before[name]) for name, state in states.items())


def test_another_layout_keeps_its_own_states_and_says_so(session, tmp_path, caplog):
    save_rng(gather_rng(session), tmp_path)
    draw()
    state = torch.get_rng_state()
    load_rng(tmp_path, session, same_layout=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert "belong to another layout; starting from the seed" in caplog.text


def test_a_file_that_is_none_is_one_line(session, tmp_path):
    for text in (None, b"", b"\0" * 100):
        if text is not None:
            (tmp_path / "rng.safetensors").write_bytes(text)
        with pytest.raises(
            CheckpointError, match=r"rng\.safetensors: cannot be read .*use --no-load-rng"
        ) as caught:
            load_rng(tmp_path, session, same_layout=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_who_may_read_the_checkpoint_may_read_the_states(session, tmp_path, umask):
    before = os.umask(umask)
    try:
        save_rng(gather_rng(session), tmp_path)
        (tmp_path / "other").write_text("x")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("harm", ["missing", "another length", "another dtype", "noise"])
def test_states_that_are_none_are_one_line(session, tmp_path, harm):
    states = gather_rng(session)
    before = draw()
    name = sorted(states)[0]
    change = {
        "missing": lambda _: None,
        "another length": lambda state: state[:-8].clone(),
        "another dtype": lambda state: state.view(torch.int8),
        "noise": lambda state: torch.full_like(state, 255),
    }[harm]
    states = {n: change(s) if n == name else s for n, s in states.items()}
    save_rng({n: s for n, s in states.items() if s is not None}, tmp_path)
    generators = {n: s.clone() for n, s in gather_rng(session).items()}
    with pytest.raises(CheckpointError, match=r"rng\.safetensors: .*use --no-load-rng") as caught:
        load_rng(tmp_path, session, same_layout=True)
    assert "\n" not in str(caught.value) and before
    assert all(map(torch.equal, gather_rng(session).values(), generators.values())), "nothing was restored"
