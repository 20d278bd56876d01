#!/usr/bin/env python3
"""Compile every launch of a training step and of decoding for a GPU that is not there, and check it against its
limits.

    python tools/gpu/launches.py                    sm_90: launches, binaries per kernel, problems; exit code 1 for problems
    python tools/gpu/launches.py --arch 100 --json  for sm_100, as JSON
    python tools/gpu/launches.py --sets step        only what a step of the paper's model launches
    python tools/gpu/launches.py --jobs 16          in 16 processes: fills Triton's cache before a GPU is timed
    python tools/gpu/launches.py --out OUT          writes OUT/compile.json as well

Sets: step (training and decoding at the paper's sizes), mini (the same of Ling-mini-2.0), odd (blocks that do not fill,
bf16 and fp32), wide (fp64), right (the comparisons of tools/gpu/right.py), tiny (the models of tools/gpu/same.py).
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch
from tools.benchmark.static import disassemble
from tools.gpu import shapes
from tools.gpu.no_device import SHARED_BYTES, Launch, recording
from tools.gpu.results import Results

SETS = ("step", "mini", "odd", "wide", "right", "tiny")
PROVEN = ("step", "mini", "odd", "wide")
"""Compiled by default; the other sets fill the cache of a GPU."""
TINY = shapes.Widths(D=128, F=64, E=8, K=2, G=2, R=2, C=32, V=512, rotated=32)
"""ring_lite_tiny with the vocabulary of tools/gpu/same.py."""
TINY_TOKENS = (128, 256, 255)
"""Microbatches of same.py: whole, and as responses fill them."""
MAX_BINARIES = 3
"""Most binaries of one kernel over a training step and all decoding steps: each is compiled in the middle of a
run."""


def calls(name: str) -> Iterator[tuple[str, shapes.Call]]:
    """The calls of one set, by (description, call)."""
    if name in ("step", "mini"):
        widths = shapes.RING_LITE if name == "step" else shapes.LING_MINI_2
        yield from shapes.training(widths, shapes.TRAINING_TOKENS, torch.bfloat16)
        for sequences in shapes.DECODED:
            yield from shapes.decoding(widths, sequences, torch.bfloat16)
        return
    if name == "tiny":
        for tokens in TINY_TOKENS:
            yield from shapes.training(TINY, tokens, torch.float32)
        for sequences in range(16, 0, -1):
            yield from shapes.decoding(TINY, sequences, torch.float32)
        return
    if name == "right":
        yield from comparisons()
        return
    for dtype in (torch.bfloat16, torch.float32) if name == "odd" else (torch.float64,):
        for widths in shapes.ODD:
            for tokens in shapes.ODD_TOKENS if name == "odd" else (9,):
                yield from shapes.training(widths, tokens, dtype)
                yield from shapes.decoding(widths, tokens, dtype)


def comparisons() -> Iterator[tuple[str, shapes.Call]]:
    """What tools/gpu/right.py compares, by (description, call)."""
    # it imports Megatron-Core, which takes seconds
    from tools.gpu.right import Maker, cases

    class Untouched(Maker):
        """Tensors whose memory is never touched: the values do not matter here."""

        def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
            return torch.empty(*shape, dtype=dtype or self.dtype)

        def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype)

        def firm_logits(self, logits_TE: Tensor, choose: Any) -> Tensor:
            return logits_TE

        def firm_uniforms(self, logits_SV: Tensor, words: Any) -> Tensor:
            return self.uniform(len(logits_SV), dtype=torch.float64)

    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(Untouched("cpu", dtype), small=False):
            yield case.name, functools.partial(_once, case)


def _once(case: Any) -> None:
    """A comparison's own side, forward and backward."""
    leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in case.leaves]
    made = case.op(*leaves, *case.fixed)
    outputs = made if isinstance(made, tuple) else (made,)
    chosen = [[each for each in outputs if each is not None][index] for index in case.differentiated]
    if chosen:
        torch.autograd.backward(chosen, [torch.empty_like(each) for each in chosen])


def compile_share(
    names: Sequence[str], arch: int, share: int = 0, of: int = 1, launchers: bool = False
) -> tuple[list[Launch], list[str]]:
    """The launches of every ``of``-th call of the sets from the ``share``-th on, and the calls that failed."""
    launches: list[Launch] = []
    failed: list[str] = []
    asked = [(name, call) for name in names for call in calls(name)]
    for name, (what, call) in asked[share::of]:
        with recording(arch, launchers=launchers) as made, dispatch.force("triton"):
            try:
                call()
            except Exception as error:
                failed.append(f"{name}: {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        launches += made
    return launches, failed


def report(launches: Sequence[Launch], failed: Sequence[str], *, judged: bool) -> dict:
    """What was launched: per kernel its launches, binaries, shared bytes and spills; and all problems.

    With ``judged``, more than ``MAX_BINARIES`` of a kernel and any load or store of a spilled register are
    problems.
    """
    problems = sorted({problem for launch in launches for problem in launch.problems}) + list(failed)
    binaries = {launch.binary: launch for launch in launches}
    kernels: dict[str, dict] = {}
    for launch in binaries.values():
        code, _, registers = disassemble(launch.cubin)
        count = collections.Counter(instruction.name for instruction in code)
        found = kernels.setdefault(
            launch.kernel, {"launches": 0, "binaries": 0, "shared_bytes": 0, "registers": 0, "spills": 0}
        )
        found["binaries"] += 1
        found["shared_bytes"] = max(found["shared_bytes"], launch.shared_bytes)
        found["registers"] = max(found["registers"], registers)
        found["spills"] = max(found["spills"], count["LDL"] + count["STL"])
    for launch in launches:
        kernels[launch.kernel]["launches"] += 1
    if judged:
        for name, found in kernels.items():
            if found["binaries"] > MAX_BINARIES:
                problems.append(f"{name}: {found['binaries']} binaries, at most {MAX_BINARIES}")
            if found["spills"]:
                problems.append(f"{name}: {found['spills']} spills at these sizes, at most 0")
    return {
        "launches": len(launches),
        "binaries": len(binaries),
        "kernels": dict(sorted(kernels.items())),
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, choices=tuple(SHARED_BYTES))
    parser.add_argument(
        "--for-this-card", action="store_true", help="the architecture of the GPU that is here"
    )
    parser.add_argument("--sets", nargs="+", default=list(PROVEN), choices=SETS)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder for compile.json")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    if args.for_this_card and not torch.cuda.is_available():
        parser.error("--for-this-card: torch finds no GPU here; name an architecture with --arch")
    if args.for_this_card:
        major, minor = torch.cuda.get_device_capability()
        args.arch = 10 * major + minor
        if args.arch not in SHARED_BYTES:
            parser.error(f"sm_{args.arch} is none of {', '.join(map(str, SHARED_BYTES))}")
    results = Results(args.out, "compile") if args.out else None
    launches: list[Launch] = []
    failed: list[str] = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        shares = [(args.sets, args.arch, share, args.jobs, args.for_this_card) for share in range(args.jobs)]
        for made, broken in pool.starmap(compile_share, shares):
            launches += made
            failed += broken
    found = report(launches, failed, judged=args.sets in (["step"], ["mini"]))
    print(json.dumps(found) if args.json else _table(found))
    if results is not None:
        counts = {name: found[name] for name in ("launches", "binaries")}
        said = ", ".join(f"{number} {name}" for name, number in counts.items())
        results.facts |= {"arch": args.arch, **counts, "said": said}
        results.rows = [{"name": name, **each} for name, each in found["kernels"].items()]
        results.bad = found["problems"]
        results.write()
    for problem in found["problems"]:
        print(problem, file=sys.stderr)
    return 1 if found["problems"] else 0


def _table(found: dict) -> str:
    head = f"{'kernel':24}{'launches':>9}{'binaries':>9}{'regs':>6}{'spills':>8}{'smem KB':>9}"
    rows = [
        f"{name:24}{each['launches']:>9}{each['binaries']:>9}{each['registers']:>6}{each['spills']:>8}"
        f"{each['shared_bytes'] // 1024:>9}"
        for name, each in found["kernels"].items()
    ]
    return "\n".join([head, *rows, f"{found['launches']} launches, {found['binaries']} binaries"])


if __name__ == "__main__":
    sys.exit(main())
