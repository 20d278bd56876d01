#!/usr/bin/env python3
"""How fast the kernels are, beside what they replace, in one run.

    python tools/benchmark/kernels.py                        every kernel, on the GPU if there is one, else the CPU
    python tools/benchmark/kernels.py --only token_logprob   one of them
    python tools/benchmark/kernels.py --json                 the same as JSON

On the CPU each row is ours (C++), our reference (what MEGATRON_RING_EXT=0 runs) and plain torch, with the extra
memory of ours and of torch. On a GPU it is ours (Triton) and plain torch, with the share of the memory's peak
bandwidth. A row first checks that both give the same answer: no time is printed for a wrong one.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron_ring.kernels import (
    HeadNorms,
    combine,
    dispatch,
    permute,
    qk_norm_rope,
    rms_norm,
    route,
    route_index,
    token_logprob,
)
from megatron_ring.runtime.device import device
from tools.benchmark import machine
from tools.gpu.peaks import peak_of

TEMPERATURE = 0.9


@dataclass
class Case:
    """Ours and torch's forward and backward on the same tensors, each returning (outputs..., gradients...)."""

    name: str
    shape: str
    ours: Callable[[], list[Tensor]]
    plain: Callable[[], list[Tensor]]
    gigabytes: float
    """that a perfect implementation has to move"""


@dataclass
class Row:
    kernel: str
    shape: str
    ours_ms: float
    reference_ms: float
    plain_ms: float
    ours_gb_per_s: float
    share_of_peak: float | None = None

    def line(self) -> str:
        share = "" if self.share_of_peak is None else f"  {100 * self.share_of_peak:4.0f}% of peak"
        return (
            f"{self.kernel:16}{self.shape:28}{self.ours_ms:10.2f}{self.reference_ms:12.2f}{self.plain_ms:10.2f}"
            f"{self.plain_ms / self.ours_ms:10.1f}x{self.ours_gb_per_s:9.1f}{share}"
        )


def gradients(outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    return [*outputs, *torch.autograd.grad(outputs, inputs, seeds)]


def token_logprob_case(tokens: int, columns: int, dtype: torch.dtype) -> Case:
    logits_TV = torch.randn(tokens, columns, device=device(), dtype=dtype, requires_grad=True)
    targets_T = torch.randint(columns, (tokens,), device=device())
    seeds = [torch.randn(tokens, device=device()) for _ in range(2)]

    def ours() -> list[Tensor]:
        values = token_logprob(logits_TV, targets_T, temperature=TEMPERATURE)
        return gradients(list(values), [logits_TV], seeds)

    def plain() -> list[Tensor]:
        logp_TV = (logits_TV.float() / TEMPERATURE).log_softmax(-1)
        logp_T = logp_TV.gather(1, targets_T[:, None]).squeeze(1)
        return gradients([logp_T, -(logp_TV.exp() * logp_TV).sum(-1)], [logits_TV], seeds)

    moved = 3 * logits_TV.numel() * logits_TV.element_size() / 1e9
    return Case("token_logprob", f"{tokens} x {columns}", ours, plain, moved)


def route_case(tokens: int, experts: int, topk: int) -> Case:
    logits_TE = torch.randn(tokens, experts, device=device(), requires_grad=True)
    seeds = [torch.randn(tokens, topk, device=device()), torch.randn(experts, device=device())]

    def ours() -> list[Tensor]:
        routing = route(logits_TE, topk=topk)
        index = route_index(routing.experts_TK, experts)
        return [*gradients([routing.probs_TK, routing.prob_sum_E], [logits_TE], seeds), index.gather_N]

    def plain() -> list[Tensor]:
        p_TE = logits_TE.softmax(-1)
        chosen_TK, experts_TK = p_TE.topk(topk)
        probs_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
        token_N = experts_TK.flatten().argsort(stable=True) // topk
        torch.bincount(experts_TK.flatten(), minlength=experts).cumsum(0)
        return [*gradients([probs_TK, p_TE.sum(0)], [logits_TE], seeds), token_N]

    return Case(
        "route + index", f"{tokens} x {experts}, top-{topk}", ours, plain, 3 * logits_TE.numel() * 4 / 1e9
    )


def permute_case(tokens: int, width: int, experts: int, topk: int, dtype: torch.dtype) -> Case:
    x_TD = torch.randn(tokens, width, device=device(), dtype=dtype, requires_grad=True)
    scores_TE = torch.randn(tokens, experts, device=device())
    weights_TK = torch.rand(tokens, topk, device=device(), requires_grad=True)
    index = route_index(scores_TE.topk(topk).indices, experts)
    seed_TD = torch.randn_like(x_TD)

    def ours() -> list[Tensor]:
        out_TD = combine(permute(x_TD, index), index, weights_TK)
        return gradients([out_TD], [x_TD, weights_TK], [seed_TD])

    def plain() -> list[Tensor]:
        x_ND = x_TD.index_select(0, index.gather_N)
        y_TKD = x_ND.index_select(0, index.position_TK.flatten()).view(tokens, topk, width)
        out_TD = (y_TKD.float() * weights_TK[..., None]).sum(1).to(dtype)
        return gradients([out_TD], [x_TD, weights_TK], [seed_TD])

    # rows written, read, read and written, read: one each way per copy and per token
    moved = (5 * topk + 5) * x_TD.numel() * x_TD.element_size() / 1e9
    return Case("permute+combine", f"{tokens} x {width}, top-{topk}", ours, plain, moved)


def rms_norm_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    x_TD = torch.randn(tokens, width, device=device(), dtype=dtype, requires_grad=True)
    weight_D = torch.randn(width, device=device(), dtype=dtype, requires_grad=True)
    seed_TD = torch.randn_like(x_TD)

    def ours() -> list[Tensor]:
        return gradients([rms_norm(x_TD, weight_D, 1e-6)], [x_TD, weight_D], [seed_TD])

    def plain() -> list[Tensor]:
        y_TD = torch.nn.functional.rms_norm(x_TD, (width,), weight_D, 1e-6)
        return gradients([y_TD], [x_TD, weight_D], [seed_TD])

    return Case("rms_norm", f"{tokens} x {width}", ours, plain, 5 * x_TD.numel() * x_TD.element_size() / 1e9)


def qk_norm_rope_case(tokens: int, groups: int, heads: int, channels: int, dtype: torch.dtype) -> Case:
    """``heads`` query heads to a group, every channel rotated."""
    shape = (tokens, groups, heads + 2, channels)
    mixed_TGMC = torch.randn(*shape, device=device(), dtype=dtype, requires_grad=True)
    weight_C = torch.ones(channels, device=device(), dtype=dtype, requires_grad=True)
    turns_TH = torch.rand(tokens, channels // 2, device=device())
    rotary_2TH = torch.stack((turns_TH.cos(), turns_TH.sin()))
    seed_TGMC = torch.randn_like(mixed_TGMC)
    seeds = seed_TGMC[:, :, :-2].flatten(1, 2), seed_TGMC[:, :, -2], seed_TGMC[:, :, -1]
    leaves = [mixed_TGMC, weight_C]

    def ours() -> list[Tensor]:
        return gradients(
            qk_norm_rope(mixed_TGMC, rotary_2TH, HeadNorms(weight_C, weight_C, 1e-6)), leaves, seeds
        )

    def plain() -> list[Tensor]:
        q, k, v = mixed_TGMC.split((heads, 1, 1), dim=2)
        q, k = (torch.nn.functional.rms_norm(x, (channels,), weight_C, 1e-6) for x in (q, k))
        cos, sin = rotary_2TH.repeat(1, 1, 2)[:, :, None, None]
        q, k = (
            x * cos + torch.cat((-x[..., channels // 2 :], x[..., : channels // 2]), -1) * sin for x in (q, k)
        )
        return gradients([q.to(dtype).flatten(1, 2), k.to(dtype).squeeze(2), v.squeeze(2)], leaves, seeds)

    # read and written, and again with its gradient
    moved = 5 * mixed_TGMC.numel() * mixed_TGMC.element_size() / 1e9
    return Case("qk_norm_rope", f"{tokens} x {groups} x {heads + 2} x {channels}", ours, plain, moved)


def cases(only: str | None) -> list[Callable[[], Case]]:
    """Ring-lite's shapes on a GPU; on a CPU the shapes of the tiny model, and the whole vocabulary."""
    gpu = device().type != "cpu"
    T, D, dtype = (8192, 2048, torch.bfloat16) if gpu else (2048, 256, torch.float32)
    all_cases = {
        "token_logprob": lambda: token_logprob_case(T, 126_464, dtype),
        "route": lambda: route_case(T, 64, 6),
        "permute": lambda: permute_case(T, D, 64, 6, dtype),
        "rms_norm": lambda: rms_norm_case(T, D, dtype),
        "qk_norm_rope": lambda: qk_norm_rope_case(T, 4, 4, 128 if gpu else 64, dtype),
    }
    return [make for name, make in all_cases.items() if only in (None, name)]


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of the repeats after one warm-up."""
    from megatron_ring.runtime.device import synchronize

    run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def check_same(case: Case) -> None:
    """Check that both give the same answer, within the dtype's rounding; in parts, because the logits are
    large."""
    for ours, plain in zip(case.ours(), case.plain(), strict=True):
        scale = plain.detach().abs().max().item() or 1.0
        pairs = zip(ours.detach().split(64), plain.detach().split(64), strict=True)
        error = max((a.double() - b.double()).abs().max().item() for a, b in pairs) / scale
        if not error < (2e-2 if ours.element_size() == 2 else 1e-4):
            sys.exit(f"{case.name}: ours differs from torch by {error:.1e}: no time for a wrong answer")


def measure(case: Case, repeats: int) -> Row:
    check_same(case)
    ours = milliseconds(case.ours, repeats)
    with dispatch.force("torch"):
        reference = milliseconds(case.ours, repeats)
    rate = case.gigabytes / ours * 1e3
    row = Row(case.name, case.shape, ours, reference, milliseconds(case.plain, repeats), rate)
    if device().type != "cpu":
        peak = peak_of(torch.get_device_module(device()).get_device_name())
        row.share_of_peak = None if peak is None else rate * 1e9 / peak.bytes
    return row


def peak_megabytes() -> float:
    """High-water mark of this process's resident memory, since it started its program."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_extra_megabytes(which: str) -> float:
    """Growth of the memory's peak by one forward and backward on the CPU; run in a process of its own."""
    case = token_logprob_case(2048, 126_464, torch.float32)
    before = peak_megabytes()
    run = case.ours if which == "ours" else case.plain
    run()
    return peak_megabytes() - before


def memory_line() -> str:
    extra = {}
    for which in ("ours", "plain"):
        command = [sys.executable, __file__, "--memory-of", which]
        extra[which] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return (
        f"token_logprob, 2048 x 126464 fp32: extra memory at the peak {extra['ours']:.0f} MB, "
        f"torch {extra['plain']:.0f} MB: {extra['ours'] / extra['plain']:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["token_logprob", "route", "permute", "rms_norm", "qk_norm_rope"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_extra_megabytes(options.memory_of))
        return
    torch.manual_seed(0)
    rows = []
    backend = dispatch.backend(torch.empty(0, device=device()))
    if not options.json:
        print(
            f"forward + backward on {machine.device_name()}, median of {options.repeats}, ours: {backend}, "
            f"threads: {torch.get_num_threads()}"
        )
        print(
            f"{'kernel':16}{'shape':28}{'ours ms':>10}{'reference':>12}{'torch':>10}{'ratio':>11}{'GB/s':>9}"
        )
    for make in cases(options.only):
        rows.append(measure(make(), options.repeats))
        if not options.json:
            print(rows[-1].line(), flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif device().type == "cpu" and options.only in (None, "token_logprob"):
        print(memory_line())


if __name__ == "__main__":
    main()
