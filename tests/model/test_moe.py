"""The mixture-of-experts layer against a loop over tokens and experts, every gradient included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.model.moe import RingExperts, RingMoELayer
from megatron_ring.model.packed import pack_inputs
from megatron_ring.runtime import device
from tests.helpers.model.small import small_engine


def naive_layer(layer: RingMoELayer, hidden_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor) -> Tensor:
    """Token by token: the weighted sum of its experts, plus the shared experts."""
    fc1_e2FD, fc2_eDF = layer.experts.fc1_weight, layer.experts.fc2_weight
    rows = []
    for token, (chosen, probs) in enumerate(zip(experts_TK.tolist(), probs_TK, strict=True)):
        total_D = torch.zeros_like(hidden_TD[token])
        for expert, prob in zip(chosen, probs, strict=True):
            if expert < len(fc1_e2FD):
                gate_F, up_F = fc1_e2FD[expert] @ hidden_TD[token]
                total_D = total_D + prob * (fc2_eDF[expert] @ (F.silu(gate_F) * up_F))
        rows.append(total_D)
    gate_TF, up_TF = (hidden_TD @ layer.shared_experts.linear_fc1.weight.T).chunk(2, dim=1)
    shared_TD = (F.silu(gate_TF) * up_TF) @ layer.shared_experts.linear_fc2.weight.T
    return torch.stack(rows) + shared_TD


@pytest.mark.parametrize("model", ["v1", "v2"])
@pytest.mark.parametrize("spread", [0.3, 30.0], ids=["spread", "some-experts-empty"])
def test_the_layer_is_the_sum_over_its_experts(model, spread):
    with small_engine(model) as engine:
        layer = next(
            module for module in engine.models[0].modules() if isinstance(module, RingMoELayer)
        ).eval()
        generator = torch.Generator().manual_seed(2)
        hidden_T1D = torch.randn(11, 1, 64, generator=generator)
        if spread > 1:
            # nearly equal tokens go to the same few experts
            hidden_T1D = hidden_T1D[:1] + hidden_T1D / spread
        hidden_T1D.requires_grad_()
        packed = pack_inputs(pack_microbatch([([1] * 9, [1] * 9, [1.0] * 9)], 11))
        routings = []
        hook = layer.router.register_forward_hook(lambda _module, _inputs, routing: routings.append(routing))
        ours_T1D = layer(hidden_T1D, packed)
        hook.remove()
        into_T1D = torch.randn(ours_T1D.shape, generator=generator)
        parameters = dict(layer.named_parameters())
        ours = torch.autograd.grad((ours_T1D * into_T1D).sum(), [hidden_T1D, *parameters.values()])
        routing = routings[0]
        assert (routing.counts_E == 0).any() == (spread > 1)
        again = layer.router(hidden_T1D.squeeze(1), packed)
        naive_TD = naive_layer(layer, hidden_T1D.squeeze(1), again.experts_TK, again.probs_TK)
        naive = torch.autograd.grad((naive_TD[:, None] * into_T1D).sum(), [hidden_T1D, *parameters.values()])
    torch.testing.assert_close(ours_T1D.squeeze(1), naive_TD, rtol=1e-4, atol=1e-5)
    for name, mine, theirs in zip(["hidden", *parameters], ours, naive, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_the_experts_gradients_are_made_where_megatron_adds_them_up():
    """Two microbatches through DDP's hooks; of an expert's weight the hook gets nothing to add."""
    with small_engine("v1") as engine:
        layer = next(module for module in engine.models[0].modules() if isinstance(module, RingMoELayer))
        generator = torch.Generator().manual_seed(2)
        hidden_T1D, into_T1D = (torch.randn(11, 1, 64, generator=generator) for _ in range(2))
        packed = pack_inputs(pack_microbatch([([1] * 9, [1] * 9, [1.0] * 9)], 11))
        parameters = dict(layer.named_parameters())
        expected = torch.autograd.grad(
            (layer.eval()(hidden_T1D, packed) * into_T1D).sum(), list(parameters.values())
        )
        layer.train()
        for _ in range(2):
            (layer(hidden_T1D, packed) * into_T1D).sum().backward()
        for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
            assert parameter.grad is None
            assert (parameter.main_grad - 2 * gradient).norm() <= 1e-6 * gradient.norm(), name
            assert parameter.grad_added_to_main_grad == name.startswith("experts."), name


def test_experts_are_made_where_parameters_are(monkeypatch: pytest.MonkeyPatch):
    with small_engine("v1") as engine:
        layer = next(module for module in engine.models[0].modules() if isinstance(module, RingMoELayer))
        monkeypatch.setattr(device, "device", lambda: torch.device("meta"))
        again = RingExperts(layer.config, layer.experts.pg_collection)
    assert again.fc1_weight.is_meta and again.fc2_weight.is_meta
    assert again.fc1_weight.shape == layer.experts.fc1_weight.shape
