"""Recomputed modules keep less for the backward pass and change no gradient, whichever module it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from megatron_ring.config.settings import settings
from megatron_ring.train.engine import StepReport
from megatron_ring.train.objective import LossTerms, NextTokenObjective
from tests.helpers.model.small import assert_close, batch, gradients, small_engine

MODEL = "v2_mtp"
"""A dense layer, layers with experts and shared experts, and a multi-token-prediction layer."""

MODULES = settings()["recompute_modules"].choices


@dataclass(frozen=True, kw_only=True)
class Weighed(NextTokenObjective):
    """The objective; at the end of a forward pass it notes how many bytes autograd keeps alive."""

    kept: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __call__(self, logits, microbatch) -> LossTerms:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self.kept}
        self.sizes.append(sum(storage.nbytes() for storage in storages.values()))
        return super().__call__(logits, microbatch)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept.append(tensor)
        return tensor


@cache
def step(granularity: str = "none", *modules: str, model: str = MODEL, method: str = "uniform"):
    """(report, gradients, bytes kept) of one microbatch."""
    objective = Weighed(mtp_loss_scaling_factor=0.3)
    chosen = {"recompute_modules": modules} if modules else {}
    words = {"recompute_granularity": granularity, "recompute_method": method, **chosen}
    with (
        small_engine(model, **words) as engine,
        torch.autograd.graph.saved_tensors_hooks(objective.keep, lambda tensor: tensor),
    ):
        report = engine.accumulate(batch(count=1), objective)
        (size,) = objective.sizes
        return report, gradients(engine), size


def same(one: tuple[StepReport, dict, int], other: tuple[StepReport, dict, int]) -> None:
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-6)
    assert one[0].max_violation == pytest.approx(other[0].max_violation, rel=1e-6)
    assert_close(one[1], other[1], 1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_a_recomputed_module_keeps_less_and_changes_no_gradient(module):
    plain, recomputed = step(), step("selective", module)
    same(recomputed, plain)
    assert recomputed[2] < plain[2], f"{module} keeps {recomputed[2]} bytes as without recompute"


def test_all_modules_together_keep_less_than_any_alone():
    together = step("selective", *MODULES)
    same(together, step())
    assert all(together[2] < step("selective", module)[2] for module in MODULES)


@pytest.mark.parametrize("modules", [("core_attn",), ("layernorm",), ("mlp",), ("layernorm", "mlp")])
def test_so_does_a_dense_model(modules):
    plain, recomputed = step(model="dense"), step("selective", *modules, model="dense")
    same(recomputed, plain)
    assert recomputed[2] < plain[2]


def test_whole_layers_keep_least_and_a_block_is_only_the_first_of_them():
    plain, uniform, block = step(), step("full"), step("full", method="block")
    same(uniform, plain)
    same(block, plain)
    assert uniform[2] < block[2] < plain[2]
    assert uniform[2] < step("selective", *MODULES)[2]
