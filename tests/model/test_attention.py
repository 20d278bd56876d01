"""Packed attention, rotary and RMSNorm against the formulas, gradients included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.kernels import qk_norm_rope
from megatron_ring.model.attention import PackedCoreAttention
from megatron_ring.model.norm import RingRMSNorm
from megatron_ring.model.packed import pack_inputs, rotary_table

C = 6
LENGTHS = [(13, 7, 1, 5), (1,), (4, 4, 4), (1, 1, 3, 3, 2)]


def packed_inputs(lengths: tuple[int, ...], padding: int = 3):
    return pack_inputs(
        pack_microbatch([([1] * n, [1] * n, [1.0] * n) for n in lengths], sum(lengths) + padding)
    )


def naive_attention(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, segment_T: Tensor) -> Tensor:
    """Softmax over the earlier tokens of the same segment; query head h reads key head h * G // H."""
    T, H, _ = q_THC.shape
    G = k_TGC.shape[1]
    position_T = torch.arange(T)
    seen_TT = (segment_T[:, None] == segment_T) & (position_T[:, None] >= position_T)
    heads = []
    for h in range(H):
        scores_TT = q_THC[:, h] @ k_TGC[:, h * G // H].T * C**-0.5
        heads.append(scores_TT.masked_fill(~seen_TT, -torch.inf).softmax(1) @ v_TGC[:, h * G // H])
    return torch.stack(heads, 1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
def test_packed_attention_is_masked_attention(lengths, H, G):
    packed = packed_inputs(lengths)
    T = packed.valid_T.numel()
    generator = torch.Generator().manual_seed(2)
    q, k, v, into = (
        torch.randn(T, heads, C, generator=generator, dtype=torch.float64) for heads in (H, G, G, H)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    core = PackedCoreAttention(SimpleNamespace(kv_channels=C), 1, None, "self")
    ours_THC = core(q, k, v, None, packed_seq_params=packed)
    segment_T = torch.repeat_interleave(
        torch.arange(len(packed.segment_lengths)), torch.tensor(packed.segment_lengths)
    )
    naive_THC = naive_attention(q, k, v, segment_T)
    torch.testing.assert_close(ours_THC, naive_THC, rtol=1e-12, atol=1e-13)
    ours = torch.autograd.grad((ours_THC * into).sum(), leaves)
    naive = torch.autograd.grad((naive_THC * into).sum(), leaves)
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_on_a_gpu_every_dtype_has_an_attention_of_the_installed_torch(dtype):
    """Flash attention takes two of them, and its words differ between versions of torch. Shapes only, without a GPU."""
    packed = packed_inputs((5, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(11, heads, 16, dtype=dtype, device="cuda") for heads in (4, 2, 2))
        core = PackedCoreAttention(SimpleNamespace(kv_channels=16), 1, None, "self")
        context = core(q, k, v, None, packed_seq_params=packed)
    assert context.shape == q.shape and context.dtype == dtype and context.is_cuda


@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_rotary_turns_channel_pairs_by_their_positions_angle(percent):
    """As complex numbers: (x_i, x_(i + R/2)) times exp(i * position * base^(-2i/R)); the rest passes."""
    channels, base = 8, 1000.0
    rotated = int(channels * percent)
    positions_T = torch.tensor([0, 1, 2, 0, 1, 17, 4000])
    generator = torch.Generator().manual_seed(2)
    x_THC = torch.randn(7, 3, channels, generator=generator)
    # one query head per group: x as query, key and value
    mixed_TGMC = x_THC.unsqueeze(2).expand(-1, -1, 3, -1)
    ours_THC, key_THC, value_THC = qk_norm_rope(
        mixed_TGMC, rotary_table(positions_T, channels, percent, base)
    )
    assert torch.equal(key_THC, ours_THC) and torch.equal(value_THC, x_THC)
    pairs = torch.complex(x_THC[..., : rotated // 2].double(), x_THC[..., rotated // 2 : rotated].double())
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    turned = pairs * torch.exp(1j * positions_T[:, None] * frequency)[:, None, :]
    expected_THC = torch.cat([turned.real, turned.imag, x_THC[..., rotated:].double()], -1)
    torch.testing.assert_close(ours_THC.double(), expected_THC, rtol=0, atol=5e-4)
    assert torch.equal(ours_THC[0], x_THC[0])
    assert torch.equal(ours_THC[..., rotated:], x_THC[..., rotated:])
    torch.testing.assert_close(ours_THC[:5].double(), expected_THC[:5], rtol=1e-6, atol=1e-6)


def test_scores_after_rotary_depend_on_distance_only():
    generator = torch.Generator().manual_seed(2)
    q_C, k_C = torch.randn(2, 16, generator=generator)
    scores = []
    for start in (0, 5, 90):
        table = rotary_table(torch.tensor([start, start + 7]), 16, 1.0, 10000.0)
        mixed_TGMC = torch.stack([k_C, q_C])[:, None, None].expand(-1, -1, 3, -1)
        k, q = qk_norm_rope(mixed_TGMC, table)[0].squeeze(1)
        scores.append((q @ k).item())
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)


def norm_of(width: int, dtype: torch.dtype) -> RingRMSNorm:
    config = SimpleNamespace(params_dtype=dtype, use_cpu_initialization=False, sequence_parallel=True)
    norm = RingRMSNorm(config, width, eps=0.01)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, width))
    return norm


def test_rms_norm_is_the_formula_with_gradients():
    norm = norm_of(7, torch.float32)
    x = torch.randn(5, 1, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    norm(x).pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_bf16_rounds_once():
    """Computed in fp32: the answer is the exact one rounded to bf16, not the sum of several roundings."""
    norm = norm_of(256, torch.bfloat16)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != exact.bfloat16()).float().mean() < 1e-3


def test_megatron_is_told_to_sum_the_norms_gradient_over_sequence_shards():
    assert norm_of(4, torch.float32).weight.sequence_parallel is True
