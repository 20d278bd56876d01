#!/usr/bin/env python3
"""Our mixture-of-experts layer beside stock Megatron-Core's, forward and backward; on a GPU in bf16.

    python tools/benchmark/moe_layer.py [--tokens 2048] [--threads 2] [--rounds 15] [--without-ext]
    python tools/benchmark/moe_layer.py --tokens 8192 --hidden 2048 --width 1408    the paper's layer: for a GPU

Stock is ``MoELayer`` with ``SequentialMLP`` and the all-to-all dispatcher, as megatron-core 0.16 builds it without
Transformer Engine; both layers route with a balance loss, have no shared experts and start from the same weights.
Their outputs and every gradient must agree before anything is timed. The two take turns, so that other load on
the machine affects both. On a busy machine the fastest rounds are more reliable than the medians.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128, help="width of one expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without-ext", action="store_true", help="plain torch in place of our extension")
    machine.add_bf16(parser)
    return parser.parse_args()


class _NullStream:
    """A stream that has always finished, as on the host."""

    def record_event(self) -> "_NullStream":
        return self

    def wait_stream(self, _other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _HostTorch:
    """``torch`` as stock's dispatcher sees it: its streams are the host."""

    def __init__(self, torch):
        self._torch = torch
        stream = _NullStream()
        self.cuda = types.SimpleNamespace(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda _stream: contextlib.nullcontext(),
        )

    def __getattr__(self, name: str):
        return getattr(self._torch, name)


def host_stock() -> None:
    """Let stock's dispatcher and router run on the host, where there is no stream; on a GPU they stay as they are."""
    import torch.nn.functional as F
    from megatron.core.transformer.moe import router, token_dispatcher

    if machine.device_name() == "cpu":
        token_dispatcher.torch = _HostTorch(token_dispatcher.torch)
        router.router_gating_linear = lambda x, weight, bias, dtype: F.linear(x.to(dtype), weight.to(dtype))


def stock_layer(config, groups):
    """Megatron-Core's own layer."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    host_stock()
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    config = dataclasses.replace(
        config,
        moe_grouped_gemm=False,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=_BALANCE,
    )
    layer = build_module(spec, config=config, pg_collection=groups)
    layer.set_layer_number(1)
    return layer


_BALANCE = 0.001


def pair_of_layers(args: argparse.Namespace, parallel, session) -> tuple[object, object, Callable]:
    """(ours, stock, ours' weight gradients in stock's order), with equal weights."""
    import torch

    from megatron_ring.config.model import ModelConfig
    from megatron_ring.model.moe import RingMoELayer
    from megatron_ring.model.translate import transformer_config

    model = ModelConfig(
        family="bailing_moe",
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=args.hidden // 4,
        num_experts=args.experts,
        moe_router_topk=args.topk,
        moe_ffn_hidden_size=args.width,
        moe_aux_loss_coeff=_BALANCE,
    )
    config, groups = transformer_config(model, parallel), session.topology.groups
    stock = stock_layer(config, groups).to(session.device)
    ours = RingMoELayer(config, model, None, groups).to(session.device)
    ours.router.set_layer_number(1)

    def weights(of: Callable) -> list:
        """Router, gate and up, and down of stock's layer, stacked as ours are."""
        local = stock.experts.local_experts
        up = torch.stack([of(expert.linear_fc1.weight) for expert in local])
        return [of(stock.router.weight), up, torch.stack([of(expert.linear_fc2.weight) for expert in local])]

    own = [ours.router.weight, ours.experts.fc1_weight, ours.experts.fc2_weight]
    with torch.no_grad():
        for mine, theirs in zip(own, weights(lambda weight: weight), strict=True):
            mine.copy_(theirs.view_as(mine))
    return ours, stock, lambda: zip(own, weights(lambda weight: weight.grad), strict=True)


def main() -> None:
    args = _arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads)}
    if args.without_ext:
        os.environ["MEGATRON_RING_EXT"] = "0"
    import torch

    from megatron_ring.config.parallel import ParallelConfig
    from megatron_ring.kernels import dispatch
    from megatron_ring.model.packed import PackedInputs, RouterStepInfo
    from megatron_ring.runtime.device import synchronize
    from megatron_ring.runtime.session import open_session

    torch.set_num_threads(args.threads)
    bf16 = machine.wants_bf16(args.bf16)
    parallel = ParallelConfig(bf16=bf16)
    with open_session(parallel, seed=0) as session:
        ours, stock, weight_pairs = pair_of_layers(args, parallel, session)
        place = {"device": session.device, "dtype": torch.bfloat16 if bf16 else torch.float32}
        hidden_T1D = torch.randn(args.tokens, 1, args.hidden, **place, requires_grad=True)
        dout_T1D = torch.randn(args.tokens, 1, args.hidden, **place)
        packed = PackedInputs(
            valid_T=torch.ones(args.tokens, dtype=torch.bool, device=session.device),
            num_valid=args.tokens,
            router=RouterStepInfo(loss_scale=1 / args.tokens),
        )

        def step(layer, *inputs) -> tuple:
            for parameter in layer.parameters():
                parameter.grad = None
            hidden_T1D.grad = None
            synchronize()
            start = time.perf_counter()
            out = layer(hidden_T1D, *inputs)
            out = out[0] if isinstance(out, tuple) else out
            synchronize()
            middle = time.perf_counter()
            out.backward(dout_T1D)
            synchronize()
            return out.detach(), hidden_T1D.grad, (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3

        compare(step(ours, packed), step(stock), weight_pairs(), 2e-2 if bf16 else 1e-5)
        mine, theirs = [], []
        for _ in range(args.rounds):
            mine.append(step(ours, packed)[2:])
            theirs.append(step(stock)[2:])
    backend = {"triton": "Triton", "native": "extension", "torch": "plain torch"}[
        dispatch.backend(hidden_T1D)
    ]
    print(
        f"{args.tokens} tokens on {machine.described(bf16)}, {args.threads} threads, {args.rounds} rounds, ours with "
        f"{backend}; medians in ms"
    )
    fastest = {}
    for name, times in (("ours", mine), ("stock", theirs)):
        forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
        fastest[name] = min(map(sum, times))
        print(
            f"{name:6} forward {forward:6.1f}  backward {backward:6.1f}  fastest round {fastest[name]:6.1f}"
        )
    ratios = [sum(slow) / sum(fast) for fast, slow in zip(mine, theirs, strict=True)]
    print(f"stock / ours: {fastest['stock'] / fastest['ours']:.2f} fastest against fastest,", end=" ")
    print(f"{statistics.median(ratios):.2f} in the median round ({min(ratios):.2f} to {max(ratios):.2f})")


def compare(ours: tuple, stock: tuple, weight_pairs, limit: float) -> None:
    """Outputs and gradients of both layers, or an error that names what differs."""
    pairs = [("output", ours[0], stock[0]), ("input gradient", ours[1], stock[1])]
    names = ("router gradient", "gate and up gradient", "down gradient")
    pairs += [(name, mine.grad, theirs) for name, (mine, theirs) in zip(names, weight_pairs, strict=True)]
    for name, mine, theirs in pairs:
        machine.agree(name, mine.flatten(), theirs.flatten(), limit)


if __name__ == "__main__":
    main()
