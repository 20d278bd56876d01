#!/usr/bin/env python3
"""Every op, forward and backward, beside its reference in fp64 on the same device; twice, and equal bit for bit.

python tools/gpu/right.py OUT            the paper's sizes and odd ones; exit code 1 for what is wrong
python tools/gpu/right.py OUT --small    small ones only, for compute-sanitizer and a CPU
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch
from tools.gpu.cases import BF16, Case, Maker, cases
from tools.gpu.results import Results


def check(case: Case, results: Results) -> None:
    """Add the case's row to ``results``, and a line for each thing that is wrong with it."""
    begun = time.perf_counter()
    try:
        first, second = _run(case, wide=False), _run(case, wide=False)
        expected = _run(case, wide=True)
    except Exception as error:
        results.wrong(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    worst = 0.0
    for kind, ours, again, theirs in zip(("output", "gradient"), first, second, expected, strict=True):
        for index, (one, two, true) in enumerate(zip(ours, again, theirs, strict=True)):
            what = f"{case.name}: {kind} {index}"
            if case.repeatable and not torch.equal(one.nan_to_num(), two.nan_to_num()):
                results.wrong(f"{what}: two runs differ")
            if not one.is_floating_point():
                if not torch.equal(one, true.to(one.dtype)):
                    results.wrong(f"{what}: {int((one != true).sum())} of {one.numel()} integers differ")
                continue
            gap = float((one.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))
            worst = max(worst, gap if gap == gap else float("inf"))
            if not gap < case.tolerance:
                results.wrong(f"{what}: relative error {gap:.2e}, at most {case.tolerance:.2e}")
    results.row(name=case.name, error=worst, seconds=round(time.perf_counter() - begun, 2))


def _run(case: Case, wide: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves); ``wide``: of the reference in fp64, on the same values."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.double() if wide and tensor.is_floating_point() else tensor

    leaves = [cast(leaf).detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in case.leaves]
    op = case.reference if wide and case.reference is not None else case.op
    with dispatch.force("torch") if wide else dispatch.force(dispatch.backend(leaves[0])):
        made = op(*leaves, *map(cast, case.fixed))
        outputs = [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]
        return [each.detach() for each in outputs], _gradients(case, outputs, leaves)


def _gradients(case: Case, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    if not case.differentiated:
        return []
    chosen = [outputs[index] for index in case.differentiated]
    into = []
    for index, output in enumerate(chosen):
        generator = torch.Generator(output.device).manual_seed(5 + index)
        # values that bf16 holds, so that the reference has the same
        into.append(
            torch.randn(output.shape, generator=generator, device=output.device).to(BF16).to(output.dtype)
        )
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(chosen, wanted, into, allow_unused=True)
    # one that is written over its leaf still asks for gradients
    return [gradient.detach() for gradient in found if gradient is not None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for right.json")
    parser.add_argument("--small", action="store_true", help="small sizes only")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32 is held to fp32's accuracy
    torch.backends.cuda.matmul.allow_tf32 = False
    results = Results(args.out, "right-small" if args.small else "right")
    for dtype in (BF16, torch.float32):
        for case in cases(Maker(device, dtype), args.small):
            check(case, results)
            if device == "cuda":
                torch.cuda.empty_cache()
    results.write()
    print(f"{len(results.rows)} comparisons, {len(results.bad)} wrong", flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())
