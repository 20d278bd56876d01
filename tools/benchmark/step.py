#!/usr/bin/env python3
"""A training step of ours beside stock Megatron-Core's local spec: same weights, same process; on a GPU in bf16.

    python tools/benchmark/step.py [--sequences 8] [--tokens 2048] [--threads 2] [--rounds 9]
    python tools/benchmark/step.py --sequences 4 --tokens 8192 --hidden 2048 --width 1408    for a GPU

Stock is ``GPTModel`` with ``get_gpt_layer_local_spec``, ``SequentialMLP`` and the all-to-all dispatcher. Both read the
same sequences (stock as a batch, ours packed) and have a balance loss; a step here is forward, loss and backward,
without the optimizer, which is the same for both. Logits, loss and gradients must agree before anything is
timed. The two take turns, so that other load on the machine affects both.

The floor is the matrix products of the step alone, on tensors of the right shapes that are ready when the clock
starts: the experts' (all experts with the same number of rows), the projections and the head, forward and
backward. Attention's own products are not included.
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

from tools.benchmark import machine
from tools.benchmark.moe_layer import host_stock

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
    machine.add_bf16(parser)
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
    """Megatron-Core's own model."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    host_stock()
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
    """Which of our parameters holds stock's tensor ``name``: name, parameter and, for stacked experts, which
    one."""
    if ".local_experts." not in name:
        return name, ours.get_parameter(name), slice(None)
    layer, _, rest = name.partition(".experts.local_experts.")
    expert, part, _ = rest.split(".")
    stacked = f"{layer}.experts.{part.removeprefix('linear_')}_weight"
    return stacked, ours.get_parameter(stacked), int(expert)


def copy_weights(ours, stock) -> None:
    """Copy our weights into stock's model, in our dtypes: Megatron casts them when it wraps a model."""
    for name, parameter in stock.named_parameters():
        _, mine, place = counterpart(ours, name)
        parameter.data = mine.detach()[place].reshape(parameter.shape).clone()


def compare_gradients(ours, stock, limit: float) -> None:
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
        machine.agree(f"gradient of {key}", mine, theirs, limit)


def floor_seconds(args: argparse.Namespace, **place) -> Callable[[], float]:
    """Run the step's matrix products once: for ``y = x w`` also ``dx = dy w'`` and ``dw = x' dy``."""
    import torch

    from megatron_ring.runtime.device import synchronize

    T, D, F, E = args.tokens, args.hidden, args.width, args.experts
    rows = T * args.topk // E
    shapes = [(E, rows, D, 2 * F), (E, rows, F, D)]
    shapes += [(1, T, D, (HEADS + 2 * KV_HEADS) * CHANNELS), (1, T, HEADS * CHANNELS, D)]
    shapes = shapes * args.layers + [(1, T, D, VOCABULARY)]
    operands = []
    for b, m, k, n in shapes:
        operands.append([torch.randn(*shape, **place) for shape in ((b, m, k), (b, n, k), (b, m, n))])

    def run() -> float:
        synchronize()
        start = time.perf_counter()
        for x, w, dy in operands:
            torch.bmm(x, w.transpose(1, 2))
            torch.bmm(dy, w)
            torch.bmm(dy.transpose(1, 2), x)
        synchronize()
        return time.perf_counter() - start

    return run


def main() -> None:
    args = _arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads)}
    import torch

    from megatron_ring.config.parallel import ParallelConfig
    from megatron_ring.data.batch.microbatch import pack_microbatch
    from megatron_ring.model.build import build_model
    from megatron_ring.model.packed import RouterStepInfo, pack_inputs
    from megatron_ring.runtime.device import synchronize
    from megatron_ring.runtime.session import open_session
    from megatron_ring.train.objective import NextTokenObjective

    torch.set_num_threads(args.threads)
    bf16 = machine.wants_bf16(args.bf16)
    model, parallel = model_config(args), ParallelConfig(bf16=bf16)
    length = args.tokens // args.sequences
    with open_session(parallel, seed=0) as session:
        (ours,) = build_model(model, parallel, session.topology, session.device, 0)
        stock = stock_model(model, ours.config, session.topology.groups).to(session.device)
        copy_weights(ours, stock)
        tokens_BS = torch.randint(0, VOCABULARY, (args.sequences, length + 1))
        rows = [(row[:-1], row[1:], torch.ones(length)) for row in tokens_BS]
        microbatch = pack_microbatch(rows, args.tokens).to(session.device)
        packed = pack_inputs(microbatch, router=RouterStepInfo(loss_scale=1 / args.tokens))
        tokens_BS = tokens_BS.to(session.device)
        later_SS = torch.ones(length, length, dtype=torch.bool, device=session.device).triu(1)[None, None]
        positions_BS = torch.arange(length, device=session.device).expand(args.sequences, length)
        objective = NextTokenObjective()

        def timed(model, loss_of: Callable) -> tuple[float, float]:
            model.zero_grad(set_to_none=True)
            synchronize()
            start = time.perf_counter()
            loss = loss_of()
            loss.backward()
            synchronize()
            return time.perf_counter() - start, loss.item()

        def our_step() -> tuple[float, float]:
            return timed(ours, lambda: objective(ours(microbatch, packed), microbatch).loss_sum / args.tokens)

        def stock_step() -> tuple[float, float]:
            labels_BS = tokens_BS[:, 1:]
            return timed(
                stock, lambda: stock(tokens_BS[:, :-1], positions_BS, later_SS, labels=labels_BS).mean()
            )

        # in bf16 the second layer sends some tokens to other experts: --no-bf16 compares as strictly as can be
        with torch.no_grad():
            theirs_BSV = stock(tokens_BS[:, :-1], positions_BS, later_SS)
            mine_TV = ours(microbatch, packed).main_TV
            machine.agree("logits", mine_TV, theirs_BSV.flatten(0, 1), 1e-1 if bf16 else 1e-5)
        loss, stock_loss = (torch.tensor(step()[1]) for step in (our_step, stock_step))
        machine.agree("loss", loss, stock_loss, 5e-3 if bf16 else 1e-6)
        compare_gradients(ours, stock, 3e-1 if bf16 else 1e-4)
        floor = floor_seconds(args, device=session.device, dtype=ours.config.params_dtype)
        seconds = [(our_step()[0], stock_step()[0], floor()) for _ in range(args.rounds)]
    report(args, bf16, seconds)


def report(args: argparse.Namespace, bf16: bool, seconds: list[tuple[float, float, float]]) -> None:
    print(
        f"{args.tokens} tokens in {args.sequences} sequences, {args.layers} layers on {machine.described(bf16)}, "
        f"{args.threads} threads, {args.rounds} rounds; logits, loss and every gradient agree"
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
