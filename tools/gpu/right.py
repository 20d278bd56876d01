#!/usr/bin/env python3
"""Every op, forward and backward, beside plain torch (plain.py) in fp64 on the same device; twice, and equal bit for bit.

python tools/gpu/right.py OUT            the paper's sizes and odd ones; exit code 1 for what is wrong
python tools/gpu/right.py OUT --small    small ones only, for compute-sanitizer and a CPU

Outputs start as NaN between margins, which shows what a kernel leaves unwritten or writes outside them. On a
GPU an op that starts no Triton kernel is wrong, and after a kernel that breaks the GPU for its process (an
illegal access) a new process continues with the next comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch
from tools.gpu import cases as of_cases
from tools.gpu.cases import BF16, Case, Maker, cases
from tools.gpu.guard import guarded_outputs
from tools.gpu.plain import OPS
from tools.gpu.results import Results


def check(case: Case, results: Results) -> None:
    """Add the case's row to ``results``, and a line for each thing that is wrong with it."""
    begun = time.perf_counter()
    try:
        # a kernel's fault shows at the next synchronisation, which may be here
        worst, wrong = _compared(case)
    except Exception as error:
        worst, wrong = None, [f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    for line in wrong:
        results.wrong(line)
    if worst is not None:
        results.row(name=case.name, error=worst, seconds=round(time.perf_counter() - begun, 2))


def _compared(case: Case) -> tuple[float, list[str]]:
    """(the largest relative error, what is wrong)."""
    with _launches() as started:
        first, second = _run(case, wide=False), _run(case, wide=False)
    with _launches() as of_reference:
        expected = _run(case, wide=True)
    worst, wrong = 0.0, []
    if case.starts_kernels and started == []:
        wrong.append(f"{case.name}: no Triton kernel ran")
    if of_reference:
        wrong.append(f"{case.name}: the reference is no reference: it started {of_reference[0]}")
    for kind, made, again, theirs in zip(("output", "gradient"), first, second, expected, strict=True):
        if len(made) != len(theirs):
            wrong.append(f"{case.name}: {len(made)} {kind}s, and the reference has {len(theirs)}")
            continue
        for index, (one, two, true) in enumerate(zip(made, again, theirs, strict=True)):
            what = f"{case.name}: {kind} {index}"
            if one.shape != true.shape:
                wrong.append(f"{what}: shape {tuple(one.shape)}, and the reference has {tuple(true.shape)}")
                continue
            if case.repeatable and not torch.equal(one.nan_to_num(), two.nan_to_num()):
                wrong.append(f"{what}: two runs differ")
            if not one.is_floating_point():
                if not torch.equal(one, true.to(one.dtype)):
                    wrong.append(f"{what}: {int((one != true).sum())} of {one.numel()} integers differ")
                continue
            gap = float((one.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))
            worst = max(worst, gap if gap == gap else float("inf"))
            if not gap < case.tolerance:
                wrong.append(f"{what}: relative error {gap:.2e}, at most {case.tolerance:.2e}")
    return worst, wrong


@contextlib.contextmanager
def _launches() -> Iterator[list[str] | None]:
    """The Triton kernels that are started inside; None without a GPU."""
    if not torch.cuda.is_available():
        yield None
        return
    from triton.runtime.jit import JITFunction

    started: list[str] = []
    run = JITFunction.run

    def noted(kernel, *args, **options):
        started.append(kernel.fn.__name__)
        return run(kernel, *args, **options)

    with mock.patch.object(JITFunction, "run", noted):
        yield started


def _run(case: Case, wide: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves); ``wide``: of the reference in fp64, on the same values."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.double() if wide and tensor.is_floating_point() else tensor

    leaves = [cast(leaf).detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in case.leaves]
    op = case.reference if wide and case.reference is not None else case.op
    with contextlib.ExitStack() as stack:
        if wide:
            stack.enter_context(mock.patch.multiple(of_cases, **OPS))
            stack.enter_context(mock.patch.object(dispatch, "backend", _no_backend))
        # with margins compute-sanitizer would not see accesses beyond a tensor
        elif not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
            stack.enter_context(guarded_outputs())
        made = op(*leaves, *map(cast, case.fixed))
        outputs = [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]
        return [each.detach() for each in outputs], _gradients(case, outputs, leaves)


def _no_backend(_tensor: Tensor) -> str:
    raise AssertionError("the reference is no reference: it calls an op of megatron_ring")


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
    # a tensor that was written over its leaf still requires gradients
    return [gradient.detach() for gradient in found if gradient is not None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for right.json")
    parser.add_argument("--small", action="store_true", help="small sizes only")
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32 is held to fp32's accuracy
    torch.backends.cuda.matmul.allow_tf32 = False
    results = Results(args.out, "right-small" if args.small else "right", goes_on=args.done > 0)
    every = (case for dtype in (BF16, torch.float32) for case in cases(Maker(device, dtype), args.small))
    for number, case in enumerate(every):
        if number < args.done:
            continue
        check(case, results)
        if device == "cuda" and _is_broken():
            go_on(number + 1)
    results.write()
    print(f"{len(results.rows)} comparisons, {len(results.bad)} wrong", flush=True)
    return 1 if results.bad else 0


def _is_broken() -> bool:
    """Whether this process has lost its GPU: every later call would fail with the same error."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def go_on(done: int) -> None:
    """A new process in place of this one, after the first ``done`` comparisons."""
    words = sys.argv[: sys.argv.index("--done")] if "--done" in sys.argv else sys.argv
    print("the GPU is lost to this process; a new one continues", flush=True)
    os.execv(sys.executable, [sys.executable, *words, "--done", str(done)])


if __name__ == "__main__":
    sys.exit(main())
