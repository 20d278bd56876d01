"""One token of each of S sequences: attention over the cache, sampling, the experts, and a whole step of four
layers.

Legend: S sequences, G key heads, R query heads of each, C channels per head, V vocabulary, N rows, D model width, F expert
width, E experts, L positions of the cache, H half of the channels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.config.check import validate
from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.presets import PRESETS
from megatron_ring.kernels import decode_attention, expert_mlp, qk_norm_rope, sample_token
from megatron_ring.model.build import build_model
from megatron_ring.model.head import NormHead
from megatron_ring.model.kv_cache import KvCache, cache_shape
from megatron_ring.rl.rollout.model_runner import ModelRunner
from megatron_ring.rl.rollout.protocol import SamplingParams
from megatron_ring.rl.rollout.scheduler import ScheduledBatch
from megatron_ring.runtime.session import open_session
from tools.gpu import peers
from tools.gpu.bench import TINY, Bench, side
from tools.gpu.shapes import expert_ends

LAYERS = 4


@torch.no_grad()
def decoding(bench: Bench) -> None:
    attend(bench)
    draw(bench)
    s = bench.sizes
    N = s.S * s.K
    ends = expert_ends(N, s.E, bench.device, skewed=False)
    x_ND, up, down = (
        bench.new(N, s.D),
        bench.new(s.E, 2, s.F, s.D, scale=0.02),
        bench.new(s.E, s.D, s.F, scale=0.02),
    )

    def grouped() -> Tensor:
        gate, value = F.grouped_mm(x_ND, up.flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=ends)

    bench.compare(f"experts of a decoding step, {N} rows", [
        side("ours", lambda: expert_mlp(x_ND, up, down, ends)), side("torch.grouped_mm", grouped),
    ], bytes_moved=2.0 * (up.numel() + down.numel() + 2 * x_ND.numel()))  # fmt: skip


def attend(bench: Bench) -> None:
    """Rotate, keep key and value, attend. All tokens are at one position: flash-attn's table has the same angles."""
    s, G, R, C = bench.sizes, 4, 4, 128
    mixed, turns_LH = bench.new(s.S, G, R + 2, C), torch.rand(1, C // 2, device=bench.device) * 6
    turns_LH = turns_LH.expand(s.context, -1)
    rotary_2LH = torch.stack((turns_LH.cos(), turns_LH.sin()))
    keys, values = (bench.new(s.S + 1, s.context, G, C) for _ in range(2))
    slots = torch.arange(s.S, device=bench.device)
    positions = torch.full((s.S,), s.context - 1, device=bench.device)
    rotary_2SH, scale = rotary_2LH[:, positions].contiguous(), C**-0.5

    def sdpa() -> Tensor:
        q, k, v = qk_norm_rope(mixed, rotary_2SH)
        keys[slots, positions], values[slots, positions] = k, v
        k_SGLC, v_SGLC = (cache[: s.S].transpose(1, 2) for cache in (keys, values))
        return F.scaled_dot_product_attention(
            q[:, :, None], k_SGLC, v_SGLC, scale=scale, enable_gqa=True
        ).squeeze(2)

    qkv = mixed[:, :, :R].reshape(s.S, G * R, C), mixed[:, :, R], mixed[:, :, R + 1]
    bench.compare(f"decode attention, {s.S} over {s.context}", [
        side("ours", lambda: decode_attention(mixed, rotary_2SH, keys, values, slots, positions, scale)),
        side("our rope, then SDPA", sdpa),
        *peers.flash_decoding(qkv, (keys, values), rotary_2LH, (slots, positions), scale),
    ], bytes_moved=4.0 * s.S * s.context * G * C)  # fmt: skip


def draw(bench: Bench) -> None:
    """From logits and a uniform number to a token and its log p."""
    s = bench.sizes
    logits_SV, uniforms_S = bench.new(s.S, s.V), torch.rand(s.S, dtype=torch.float64, device=bench.device)

    def eager() -> tuple[Tensor, Tensor]:
        logp_SV = logits_SV.float().log_softmax(-1)
        mass_SV = logp_SV.exp().cumsum(-1)
        aim_S1 = (uniforms_S[:, None] * mass_SV[:, -1:]).float()
        tokens_S1 = torch.searchsorted(mass_SV, aim_S1, right=True).clamp(max=s.V - 1)
        return tokens_S1.squeeze(1), logp_SV.gather(1, tokens_S1).squeeze(1)

    def tokens(found: tuple[Tensor, Tensor]) -> list[Tensor]:
        # sums in another order sometimes give the neighbouring token, whose id is a close number
        return [found[0].float()]

    bench.compare(f"sample a token, {s.S}x{s.V}", [
        side("ours", lambda: sample_token(logits_SV, uniforms_S), tokens),
        side("eager torch", eager, tokens),
        side("torch.multinomial (its own random numbers, no log p)",
             lambda: torch.multinomial(logits_SV.float().softmax(-1), 1), None),
    ], bytes_moved=2.0 * logits_SV.numel())  # fmt: skip


def whole_step(bench: Bench) -> None:
    """A decoding step of the rollout engine over Ring-lite with four layers, from tokens on the host to tokens
    on the host."""
    s = bench.sizes
    preset = {**PRESETS["ring_lite_tiny" if s is TINY else "ring_lite"], "num_layers": LAYERS}
    config = config_from_mapping({**preset, "bf16": bench.device == "cuda"})
    validate(config, 1)
    rows, random = np.arange(s.S), np.random.default_rng(0)
    step = ScheduledBatch(
        tokens_N=random.integers(0, config.model.vocab_size, s.S), slots_N=rows,
        positions_N=np.full(s.S, s.context - 1), lengths=None, rows_W=rows, slots_W=rows,
        uniforms_W=random.random(s.S),
    )  # fmt: skip
    sampling = SamplingParams(max_response_length=s.context)
    with open_session(config.parallel, seed=1) as session, torch.no_grad():
        models = build_model(config.model, config.parallel, session.topology, session.device, 1)
        model = models[0].eval()
        cache = KvCache(cache_shape(list(model.decoder.layers)), model.config.params_dtype, session.device)
        cache.reserve(s.S, s.context)
        runner = ModelRunner(models, config.model, session, cache)
        held = sum(store[layer][0].numel() for store in (cache.keys, cache.values) for layer in store) * s.S
        weights = sum(each.numel() for name, each in model.named_parameters() if "embedding" not in name)
        moved = float((weights + held) * model.output_layer.weight.element_size())
        work = lambda: runner(step, sampling)  # noqa: E731
        what = f"decoding step, {LAYERS} layers, {s.S} sequences over {s.context}"
        if isinstance(model.output_layer, NormHead):
            with model.output_layer.held():
                bench.compare(what, [side("ours", work, None)], bytes_moved=moved)
        else:
            bench.compare(what, [side("ours", work, None)], bytes_moved=moved)
