"""A deterministic session allows reproducible operations only, and leaves the process as it found it."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.sample_token.reference import cumulated, cumulated_in_integers
from megatron_ring.model.translate import transformer_config
from megatron_ring.runtime.session import open_session
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.model.small import batch, config_of, gradients, small_engine

PLAIN = ParallelConfig(bf16=False)
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def said() -> list[object]:
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        *(os.environ.get(name) for name in VARIABLES),
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["leaving", "an-error"])
def test_the_flags_hold_inside_and_are_undone(monkeypatch, fails):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    before = said()
    assert before[0] is False
    try:
        with open_session(PLAIN, seed=1, deterministic=True):
            assert said() == [True, False, False, False, True, ":4096:8", "Tree", "0"]
            config = config_of("v1")
            assert transformer_config(config.model, config.parallel).deterministic_mode
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert said() == before


def test_without_it_nothing_is_touched():
    before = said()
    with open_session(PLAIN, seed=1):
        assert said() == before
        config = config_of("v1")
        assert not transformer_config(config.model, config.parallel).deterministic_mode


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")]
)
def test_an_environment_that_asks_for_the_opposite_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    before = said()
    with (
        pytest.raises(ConfigError, match=f"deterministic=True needs {name}=.*says {value}; unset it or drop"),
        open_session(PLAIN, seed=1, deterministic=True),
    ):
        pass
    assert said() == before and not torch.distributed.is_initialized()


def test_a_step_is_the_step_that_it_is_without(monkeypatch):
    """On the CPU every operation is reproducible anyway; the embedding is looked up in another way."""
    found = []
    for deterministic in (False, True):
        with small_engine("v2_mtp", deterministic=deterministic) as engine:
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            report = engine.accumulate(batch(), NextTokenObjective(mtp_loss_scaling_factor=0.3))
            found.append((report.loss, gradients(engine)))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-5, atol=1e-6)


def test_running_sums_in_integers_are_the_running_sums():
    mass_TV = torch.rand(5, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    sums_TV = cumulated_in_integers(mass_TV)
    assert torch.equal(cumulated(mass_TV), mass_TV.cumsum(-1))
    torch.testing.assert_close(sums_TV, mass_TV.cumsum(-1), rtol=0, atol=1e-12)
    assert (sums_TV.diff(dim=-1) > 0).all()
    example = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    assert cumulated_in_integers(example).tolist() == [[0.5, 0.75, 1.0]]
