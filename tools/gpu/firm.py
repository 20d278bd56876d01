"""Inputs whose result, an expert or a token, does not depend on rounding: fp32 and fp64 must choose alike.

Legend: T tokens, E experts, K experts per token, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch, sample_token

_TRIES = 50


def firm_logits(logits_TE: Tensor, choose: Callable[[Tensor], Tensor], shift: float = 1e-4) -> Tensor:
    """``logits_TE``; a token whose experts change when its logits move by about ``shift`` gets another token's
    logits.

    ``choose``: logits -> experts [T, K], in the precision of its input.
    """
    generator = torch.Generator(logits_TE.device).manual_seed(1)
    wide_TE = logits_TE.double()
    with dispatch.force("torch"):
        chosen_TK = choose(wide_TE)
        firm_T = torch.ones(len(wide_TE), dtype=torch.bool, device=wide_TE.device)
        for _ in range(8):
            noise_TE = torch.randn(wide_TE.shape, generator=generator, device=wide_TE.device)
            firm_T &= (choose(wide_TE + shift * noise_TE) == chosen_TK).all(1)
    assert firm_T.any(), f"no token is firm at {shift}"
    # the first firm token replaces it
    return torch.where(firm_T[:, None], logits_TE, logits_TE[firm_T.int().argmax()])


def firm_uniforms(
    logits_SV: Tensor, draw: Callable[[], Tensor], words: Mapping[str, Any], shift: float = 1e-5
) -> Tensor:
    """Uniform numbers [S] (fp64) from ``draw`` that give the same token when they move by ``shift``; drawn anew until
    they do. ``words``: the settings of :func:`~megatron_ring.kernels.sample_token`.
    """
    wide_SV = logits_SV.double()

    def tokens(uniforms_S: Tensor) -> Tensor:
        return sample_token(wide_SV, uniforms_S.clamp(0, 1 - 2**-53), **words)[0]

    uniforms_S = draw()
    with dispatch.force("torch"):
        for _ in range(_TRIES):
            here_S = tokens(uniforms_S)
            firm_S = (tokens(uniforms_S - shift) == here_S) & (tokens(uniforms_S + shift) == here_S)
            if firm_S.all():
                return uniforms_S
            uniforms_S = torch.where(firm_S, uniforms_S, draw())
    raise AssertionError(f"no token of {int((~firm_S).sum())} sequences is wider than {2 * shift}")
