"""Inputs of the check whose outcome no rounding decides."""

import torch

from megatron_ring.kernels import dispatch, route, sample_token
from tools.gpu.firm import firm_logits, firm_uniforms


def experts(logits_TE: torch.Tensor) -> torch.Tensor:
    return route(logits_TE, topk=2).experts_TK


def test_a_token_between_two_experts_takes_over_a_firm_ones_logits():
    logits_TE = torch.tensor([[3.0, 1.0, 1.0 + 1e-6, 0.0], [0.0, 1.0, 2.0, 3.0], [5.0, 4.0, 0.0, 0.0]])
    firm_TE = firm_logits(logits_TE, experts)
    assert firm_TE.tolist() == [logits_TE[1].tolist(), *logits_TE[1:].tolist()]


def test_a_uniform_at_a_tokens_edge_is_drawn_anew():
    logits_SV = torch.zeros(2, 4)
    draws = iter([torch.tensor([0.25, 0.6]), torch.tensor([0.3, 0.9])])
    uniforms_S = firm_uniforms(logits_SV, lambda: next(draws).double(), {})
    assert torch.allclose(uniforms_S, torch.tensor([0.3, 0.6], dtype=torch.float64))


def test_firm_inputs_have_one_outcome_whatever_is_rounded_where_drawn_ones_have_not():
    generator = torch.Generator().manual_seed(4)
    logits_TE = torch.randn(4096, 64, generator=generator, dtype=torch.float64)
    logits_SV = torch.randn(64, 20_000, generator=generator, dtype=torch.float64) * 4

    def others(logits_TE: torch.Tensor) -> int:
        rounded_TE = logits_TE + 3e-4 * torch.randn(logits_TE.shape, generator=generator)
        return int((experts(rounded_TE) != experts(logits_TE)).sum())

    def other_tokens(uniforms_S: torch.Tensor) -> int:
        rounded_SV = logits_SV * (1 + 1e-6)
        return int((sample_token(rounded_SV, uniforms_S)[0] != sample_token(logits_SV, uniforms_S)[0]).sum())

    def draw() -> torch.Tensor:
        return torch.rand(64, dtype=torch.float64, generator=generator)

    with dispatch.force("torch"):
        assert others(logits_TE) > 0
        assert others(firm_logits(logits_TE, experts, shift=1e-3)) == 0
        edges_S = logits_SV.softmax(-1).cumsum(-1)[:, 10_000]
        assert other_tokens(edges_S) > 0
        assert other_tokens(firm_uniforms(logits_SV, draw, {})) == 0
