#!/usr/bin/env python3
"""The token budget and its microbatches beside the usual recipe, on the same sampled lengths; no GPU needed.

    python tools/benchmark/budget.py [--ranks 64] [--steps 8]

Then trained / selected tokens and fill for prompts from a hundredth to a hundred times as long as answers.

Usual: every sampled response is trained on, samples are dealt to ranks by count, each rank packs by first-fit-decreasing,
and the number of microbatches is the largest that any rank needs. Lengths are lognormal and independent, so the
usual recipe's tokens per step differ here by chance alone; lengths that drift in training add to that.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from megatron_ring.data.batch.bins import best_fit_decreasing
from megatron_ring.data.batch.packing import pack
from megatron_ring.rl.batch.select import select
from megatron_ring.rl.types import RolloutMeta

SIGMA, LONGEST, PROMPTS = 0.45, 24_576, (80, 400)


def sample(args: argparse.Namespace, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Response and prompt lengths of one step."""
    rng = np.random.default_rng(step)
    responses = np.exp(rng.normal(np.log(args.mean) - SIGMA**2 / 2, SIGMA, args.responses))
    prompts = rng.integers(PROMPTS[0], PROMPTS[1] + 1, args.responses)
    return responses.astype(int).clip(1, LONGEST), prompts


def ours(args: argparse.Namespace, responses: np.ndarray, prompts: np.ndarray, phi: int) -> dict[str, float]:
    candidates = [RolloutMeta(i // 16, i % 16, length, i) for i, length in enumerate(responses.tolist())]
    started = time.process_time()
    selection = select(candidates, phi)
    selected = time.process_time()
    picks = selection.minibatches[0]
    tokens = [int(prompts[pick.index]) + pick.stop - 1 for pick in picks]
    grid = pack(tokens, capacity=args.capacity, dp_size=args.ranks)
    packed = time.process_time()
    simple = len(best_fit_decreasing(tokens, args.capacity)) * args.capacity
    rounded = -(-grid.num_bins // args.ranks) * args.ranks
    return grid.metrics() | {
        "tokens": selection.counts.selected,
        "trained": sum(picks[i].num_tokens for rank in grid.placements for bin in rank for i in bin),
        "microbatches": len(grid.placements[0]),
        "select_ms": (selected - started) * 1e3,
        "pack_ms": (packed - selected) * 1e3,
        "bfd_fill": sum(tokens) / simple,
        "rounding": 1 - grid.num_bins / rounded,
    }


def usual(args: argparse.Namespace, responses: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    ranks = np.array_split(responses + prompts, args.ranks)
    # bins are tried in order: first fit
    microbatches = max(first_fit_decreasing(rank.tolist(), args.capacity) for rank in ranks)
    attention = [float((rank.astype(float) ** 2).sum()) for rank in ranks]
    return {
        "tokens": int(responses.sum()),
        "fill": float((responses + prompts).sum()) / (microbatches * args.ranks * args.capacity),
        "attention": max(attention) / statistics.mean(attention),
    }


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        at = next((b for b, space in enumerate(free) if space >= size), len(free))
        if at == len(free):
            free.append(capacity)
        free[at] -= size
    return len(free)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--mean", type=float, default=12_800, help="response tokens before the cut at 24576")
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel ranks")
    parser.add_argument("--capacity", type=int, default=32_768, help="token slots of a microbatch")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    steps = [sample(args, step) for step in range(args.steps)]
    # the largest budget that every step can meet
    phi = min(int(responses.sum()) for responses, _ in steps)
    mine = [ours(args, *step, phi) for step in steps]
    theirs = [usual(args, *step) for step in steps]

    def line(name: str, rows: list[dict[str, float]], key: str, form: str = ".4f") -> None:
        values = [row[key] for row in rows]
        print(
            f"{name:42} median {statistics.median(values):{form}}  {min(values):{form}} to {max(values):{form}}"
        )

    print(f"{args.responses} responses, {args.ranks} ranks, {args.steps} steps; Phi {phi}")
    for name, key, form in (
        ("tokens selected", "tokens", ".0f"),
        ("tokens trained on", "trained", ".0f"),
        ("select, CPU ms", "select_ms", ".1f"),
        ("pack, CPU ms", "pack_ms", ".1f"),
        ("fill of the fewest microbatches", "packing/bin_fill", ".4f"),
        ("  the same by best-fit-decreasing", "bfd_fill", ".4f"),
        ("lost by rounding up to ranks", "rounding", ".4f"),
        ("microbatches of a rank", "microbatches", ".0f"),
        ("fill of the grid", "packing/fill", ".4f"),
        ("attention, max / mean over ranks", "packing/attention_imbalance", ".4f"),
        ("tokens, max / mean over ranks", "packing/tokens_imbalance", ".4f"),
    ):
        line(f"budget: {name}", mine, key, form)
    line("usual: tokens per step", theirs, "tokens", ".0f")
    line("usual: fill", theirs, "fill")
    line("usual: attention, max / mean over ranks", theirs, "attention")
    ratios()


CASES = {
    "prompts 1000, answers 1000, Phi 409600, capacity 32768": (1000, 1000, 409_600, 32_768),
    "prompts 200, answers 150, Phi 65536, capacity 16384": (200, 150, 65_536, 16_384),
}
"""Prompt and answer tokens of every response, budget and capacity: answers far below the longest allowed."""


def ratios() -> None:
    """Trained / selected and fill over prompt/answer ratios, and for two cases of short answers; one rank."""
    print("prompt / answer     trained / selected     fill")
    for ratio in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
        rng = np.random.default_rng(1)
        mean = 12_000 / max(ratio, 1.0)
        answers = np.exp(rng.normal(np.log(mean) - SIGMA**2 / 2, SIGMA, 2048)).astype(int).clip(1, LONGEST)
        prompts = np.full(2048, max(int(mean * ratio), 1))
        print(f"{ratio:15g} {trained(answers, prompts, int(answers.sum() * 0.9), 40_960)}")
    for name, (prompt, answer, phi, capacity) in CASES.items():
        count = phi // answer + 64
        print(f"{name}: {trained(np.full(count, answer), np.full(count, prompt), phi, capacity).strip()}")


def trained(answers: np.ndarray, prompts: np.ndarray, phi: int, capacity: int) -> str:
    selection = select([RolloutMeta(i, 0, length, i) for i, length in enumerate(answers.tolist())], phi)
    picks = selection.minibatches[0]
    grid = pack([int(prompts[p.index]) + p.stop - 1 for p in picks], capacity=capacity, dp_size=1)
    placed = sum(picks[i].num_tokens for bin in grid.placements[0] for i in bin)
    return f"{placed / selection.counts.selected:22.3f} {grid.metrics()['packing/fill']:8.3f}"


if __name__ == "__main__":
    main()
