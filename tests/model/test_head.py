"""NormHead scales the hidden states; dividing the weight gives the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_ring.model.head import norm_head_scale
from megatron_ring.model.packed import pack_inputs
from tests.helpers.model.small import batch, small_engine

ALONE = SimpleNamespace(size=lambda: 1)


def test_scaling_the_hidden_states_is_dividing_the_weight():
    generator = torch.Generator().manual_seed(2)
    hidden_T1D = torch.randn(9, 1, 5, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(12, 5, generator=generator, dtype=torch.float64) * 3
    # rows past the vocabulary are padding and must not count
    weight_VD[10:] = 1e6
    logits_TV = norm_head_scale(hidden_T1D, weight_VD, 10, ALONE).squeeze(1) @ weight_VD.T
    real_VD = weight_VD[:10]
    expected_TV = hidden_T1D.squeeze(1) @ (real_VD / (real_VD.norm(dim=0) + 1e-7)).T
    torch.testing.assert_close(logits_TV[:, :10], expected_TV, rtol=1e-5, atol=1e-6)


def test_the_norm_is_detached():
    hidden_T1D = torch.randn(9, 1, 5)
    weight_VD = torch.randn(12, 5, requires_grad=True)
    assert not norm_head_scale(hidden_T1D, weight_VD, 12, ALONE).requires_grad


def test_the_models_logits_come_from_the_divided_weight():
    microbatch = batch(count=1)[0]
    with small_engine("v1") as engine:
        model = engine.models[0].eval()
        hidden = []
        model.decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        with torch.no_grad():
            logits_TV = model(microbatch, pack_inputs(microbatch)).main_TV
            model.output_layer.weight[250:] = 1e4
            again_TV = model(microbatch, pack_inputs(microbatch)).main_TV
        weight_VD = model.output_layer.weight.detach()[:250].double()
    expected_TV = hidden[0].squeeze(1).double() @ (weight_VD / (weight_VD.norm(dim=0) + 1e-7)).T
    torch.testing.assert_close(logits_TV[:, :250].double(), expected_TV, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_TV[:, :250], again_TV[:, :250])
