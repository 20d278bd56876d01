"""The corrections to Megatron-Core that no run shows by itself."""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from torch._subclasses import FakeTensorMode

from megatron_ring.runtime.megatron_fixes import megatron_fixes


def clipped(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    overflow = torch.zeros(1, dtype=torch.int)
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [tensors], False)
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, overflow, [tensors, tensors], 0.25)
    return norm, tensors


def test_clipping_computes_what_megatron_does():
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(size, generator=generator) * size for size in (1, 7, 4096)]
    with megatron_fixes():
        norm, scaled = clipped([gradient.clone() for gradient in gradients])
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat(gradients).norm(), rtol=1e-6, atol=0)
    assert all(torch.equal(ours, 0.25 * theirs) for ours, theirs in zip(scaled, gradients, strict=True))


def test_clipping_takes_no_number_to_the_host():
    """A fake tensor has no number to take: upstream's own function ends there."""
    with FakeTensorMode():
        gradients = [torch.empty(size, device="cuda") for size in (3, 5)]
        with megatron_fixes():
            norm, _ = clipped(gradients)
    assert norm.is_cuda and norm.shape == (1,)
