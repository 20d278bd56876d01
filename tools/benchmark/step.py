#!/usr/bin/env python3
"""A training step of ours beside stock Megatron-Core's local spec: same weights, same process, on the CPU.

    python tools/benchmark/step.py [--sequences 8] [--tokens 2048] [--threads 2] [--rounds 9]

Stock is ``GPTModel`` with ``get_gpt_layer_local_spec``, ``SequentialMLP`` and the all-to-all dispatcher. Both read the
same sequences (stock as a batch, ours packed) and have a balance loss; a step here is forward, loss and backward,
without the optimizer, which is the same for both. Logits, loss and gradients must agree before anything is timed. The
two take turns, so that what else the machine does hits both.

The floor is the matrix products of the step alone, on tensors of the right shapes that are ready when the clock
starts: the experts' (every expert with as many rows), the projections and the head, forward and backward. Attention's
own products are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HEADS, KV_HEADS, CHANNELS, VOCABULARY = 4, 2, 64, 2048
BALANCE = 0.001


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--sequences", type=int, default=8, help="sequences they are dealt to")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128, help="width of one expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def model_config(args: argparse.Namespace):
    from megatron_ring.config.model import ModelConfig

    return ModelConfig(
        family="bailing_moe",
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=CHANNELS,
        vocab_size=VOCABULARY,
        max_position_embeddings=args.tokens,
        init_method_std=0.05,
        rotary_base=10000.0,
        num_experts=args.experts,
        moe_router_topk=args.topk,
        moe_ffn_hidden_size=args.width,
        moe_aux_loss_coeff=BALANCE,
    )


def stock_model(model, config, groups):
    """Megatron-Core's own model; its router's linear needs Transformer Engine, which torch's replaces."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import router, token_dispatcher
    from moe_layer import _HostTorch

    token_dispatcher.torch = _HostTorch(token_dispatcher.torch)
    router.router_gating_linear = lambda x, weight, bias, dtype: F.linear(x.to(dtype), weight.to(dtype))
    config = dataclasses.replace(
        config,
        moe_grouped_gemm=False,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=BALANCE,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(model.num_experts, False, normalization="RMSNorm"),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        pg_collection=groups,
    )


def counterpart(ours, name: str) -> tuple[str, object, int | slice]:
    """Where stock's tensor ``name`` lies in ours: name, parameter and, of stacked experts, which one."""
    if ".local_experts." not in name:
        return name, ours.get_parameter(name), slice(None)
    layer, _, rest = name.partition(".experts.local_experts.")
    expert, part, _ = rest.split(".")
    stacked = f"{layer}.experts.{part.removeprefix('linear_')}_weight"
    return stacked, ours.get_parameter(stacked), int(expert)


def copy_weights(ours, stock) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            _, mine, place = counterpart(ours, name)
            parameter.copy_(mine[place].reshape(parameter.shape))


def compare_gradients(ours, stock) -> None:
    """Every gradient, the experts of a layer together (one that no token has visited has none)."""
    import torch

    rows: dict[str, list] = {}
    for name, parameter in stock.named_parameters():
        key, mine, place = counterpart(ours, name)
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        rows.setdefault(key, []).append((mine.grad[place].flatten(), theirs.flatten()))
    assert rows.keys() == dict(ours.named_parameters()).keys()
    for key, pairs in rows.items():
        mine, theirs = (torch.cat(column) for column in zip(*pairs, strict=True))
        agree(f"gradient of {key}", mine, theirs, 1e-4)


def floor_seconds(args: argparse.Namespace) -> Callable[[], float]:
    """Run the step's matrix products once: for ``y = x w`` also ``dx = dy w'`` and ``dw = x' dy``."""
    import torch

    T, D, F, E = args.tokens, args.hidden, args.width, args.experts
    rows = T * args.topk // E
    shapes = [(E, rows, D, 2 * F), (E, rows, F, D)]
    shapes += [(1, T, D, (HEADS + 2 * KV_HEADS) * CHANNELS), (1, T, HEADS * CHANNELS, D)]
    shapes = shapes * args.layers + [(1, T, D, VOCABULARY)]
    operands = []
    for b, m, k, n in shapes:
        x, w, dy = torch.randn(b, m, k), torch.randn(b, n, k), torch.randn(b, m, n)
        operands.append((x, w, dy))

    def run() -> float:
        start = time.perf_counter()
        for x, w, dy in operands:
            torch.bmm(x, w.transpose(1, 2))
            torch.bmm(dy, w)
            torch.bmm(dy.transpose(1, 2), x)
        return time.perf_counter() - start

    return run


def agree(name: str, mine, theirs, limit: float) -> None:
    gap = float((mine - theirs).norm() / theirs.norm())
    if not gap < limit:
        raise SystemExit(f"{name} differs by {gap:.1e} of its norm, more than {limit:.0e}: nothing to time")


def main() -> None:
    args = _arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads)}
    import torch

    from megatron_ring.config.parallel import ParallelConfig
    from megatron_ring.data.microbatch import pack_microbatch
    from megatron_ring.model.build import build_model
    from megatron_ring.model.packed import RouterSignal, pack_inputs
    from megatron_ring.runtime.session import open_session
    from megatron_ring.train.objective import NextTokenObjective

    torch.set_num_threads(args.threads)
    model, parallel = model_config(args), ParallelConfig(bf16=False)
    length = args.tokens // args.sequences
    with open_session(parallel, seed=0) as session:
        (ours,) = build_model(model, parallel, session.topology, session.device, 0)
        stock = stock_model(model, ours.config, session.topology.groups)
        copy_weights(ours, stock)
        tokens_BS = torch.randint(0, VOCABULARY, (args.sequences, length + 1))
        rows = [(row[:-1], row[1:], torch.ones(length)) for row in tokens_BS]
        microbatch = pack_microbatch(rows, args.tokens)
        packed = pack_inputs(microbatch, router=RouterSignal(loss_scale=1 / args.tokens))
        later_SS = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        positions_BS = torch.arange(length).expand(args.sequences, length)
        objective = NextTokenObjective()

        def our_step() -> tuple:
            ours.zero_grad(set_to_none=True)
            start = time.perf_counter()
            logits = ours(microbatch, packed)
            loss = objective(logits, microbatch).loss_sum / args.tokens
            loss.backward()
            return time.perf_counter() - start, loss.item()

        def stock_step() -> tuple:
            stock.zero_grad(set_to_none=True)
            start = time.perf_counter()
            losses_BS = stock(tokens_BS[:, :-1], positions_BS, later_SS, labels=tokens_BS[:, 1:])
            loss = losses_BS.mean()
            loss.backward()
            return time.perf_counter() - start, loss.item()

        with torch.no_grad():
            theirs_BSV = stock(tokens_BS[:, :-1], positions_BS, later_SS)
            agree("logits", ours(microbatch, packed).main_TV, theirs_BSV.flatten(0, 1), 1e-5)
        loss, stock_loss = our_step()[1], stock_step()[1]
        agree("loss", torch.tensor(loss), torch.tensor(stock_loss), 1e-6)
        compare_gradients(ours, stock)
        floor = floor_seconds(args)
        seconds = [(our_step()[0], stock_step()[0], floor()) for _ in range(args.rounds)]
    report(args, seconds)


def report(args: argparse.Namespace, seconds: list[tuple[float, float, float]]) -> None:
    print(
        f"{args.tokens} tokens in {args.sequences} sequences, {args.layers} layers, {args.threads} threads, "
        f"{args.rounds} rounds; logits, loss and every gradient agree"
    )
    mine, theirs, floor = (statistics.median(column) for column in zip(*seconds, strict=True))
    for name, value in (("ours", mine), ("stock", theirs), ("matrix products alone", floor)):
        print(f"{name:22} {value * 1e3:8.1f} ms (median)")
    ratios = [b / a for a, b, _ in seconds]
    print(
        f"stock / ours: {statistics.median(ratios):.2f} in the median round ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(
        f"ours / matrix products alone: {statistics.median([a / f for a, _, f in seconds]):.2f} in the median round"
    )


if __name__ == "__main__":
    main()
