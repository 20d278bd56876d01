#!/usr/bin/env python3
"""Verification of mathematics: results per second, the cost of the most expensive answers, and where both sides
differ.

    python tools/benchmark/verifiers.py [--pairs 300] [--rounds 3] [--without-math-verify]

The pairs are those of ``tests/rl/reward/math_pairs.jsonl``. Ours and Math-Verify's parse and verify (without its own
time limits, which need a signal) take turns on every pair, so that other load on the machine affects both.
Pairs whose powers Math-Verify would try to write out are left out of its side.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

KILLERS = [
    "9^{9^{9^9}}",
    "99999999!",
    r"\frac{1}{" * 80 + "1" + "}" * 80,
    "((((20!)!)!)!)!",
    r"\sum_{i=1}^{10^9} i",
    r"\sum_{i=1}^{1000}\sum_{j=1}^{1000} ij",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\prod_{i=1}^{1000} i^{1000}",
    "(x+1)^{100000}",
    "+".join(rf"\sqrt[7]{{x+{n}}}" for n in range(60)),
    ",".join(rf"\sqrt{{{n}}}" for n in range(2, 80)),
    "(" * 400 + "1" + ")" * 400,
    r"\sin(10^{10^{100}})",
    "+".join(["(1/3)!"] * 100),
]
_TOO_LARGE_FOR_THE_OTHER = ("2^{2^", "4^{2^", "10^{-900}", "2004!")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=300, help="pairs of the table that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-math-verify", action="store_true", help="time our side only")
    return parser.parse_args()


def _ours(reference: str, answer: str) -> bool:
    from megatron_ring.data.prompts.stream import Prompt
    from megatron_ring.rl.reward.mathematics.verifier import verify_math

    prompt = Prompt(uid=0, domain="math", text="", tokens=(), reference={"answer": reference})
    return verify_math(prompt, rf"\boxed{{{answer}}}").score == 1.0


def _math_verify(reference: str, answer: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    sides = [
        parse(rf"\boxed{{{text}}}", extraction_config=targets, parsing_timeout=None)
        for text in (reference, answer)
    ]
    return verify(*sides, timeout_seconds=None)


def pairs(words: argparse.Namespace) -> None:
    """Both sides' results per second, taking turns, and the pairs on which they differ from the table."""
    table = (ROOT / "tests" / "rl" / "reward" / "math_pairs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in table]
    rows = [row for row in rows if not any(text in str(row) for text in _TOO_LARGE_FOR_THE_OTHER)]
    rows = rows[:: max(1, len(rows) // words.pairs)][: words.pairs]
    sides = {"ours": _ours} | ({} if words.without_math_verify else {"Math-Verify": _math_verify})
    for judge in sides.values():
        judge(r"\sqrt{12}", r"2\sqrt{3}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    wrong: dict[str, set[int]] = {name: set() for name in sides}
    for _ in range(words.rounds):
        for at, row in enumerate(rows):
            for name, judge in sides.items():
                started = time.perf_counter()
                if judge(row["reference"], row["answer"]) != row["right"]:
                    wrong[name].add(at)
                seconds[name].append(time.perf_counter() - started)
    for name, each in seconds.items():
        print(
            f"{name}: {len(each) / sum(each):.0f} verdicts/s, median {1e3 * statistics.median(each):.3f} ms, "
            f"slowest {1e3 * max(each):.0f} ms; {len(wrong[name])} of {len(rows)} verdicts are not the table's"
        )


def killers() -> None:
    """The cost of the most expensive answers, the first and the second time."""
    for answer in KILLERS:
        milliseconds = []
        for _ in range(2):
            started = time.perf_counter()
            _ours("5", answer)
            milliseconds.append(1e3 * (time.perf_counter() - started))
        print(f"  {answer[:50]}: {milliseconds[0]:.1f} ms, then {milliseconds[1]:.1f} ms")


def main() -> None:
    words = _arguments()
    logging.disable(logging.CRITICAL)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    pairs(words)
    print("killers, for the reference 5:")
    killers()


if __name__ == "__main__":
    main()
