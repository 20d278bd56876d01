"""Answers in mathematics and science: one box against one reference."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.reward.mathematics.verifier import verify_math, verify_science
from tests.cases import Row, lines

_CASES = ("math_plain_text", "math_tiny_values", "math_interval_inequality", "math_box_without_braces")


def rows() -> Iterator[Row]:
    for case in _CASES:
        for line in lines(case):
            text = line.get("text", rf"\boxed{{{line.get('box')}}}")
            for domain, judge in (("math", verify_math), ("science", verify_science)):
                prompt = Prompt(
                    uid=0, domain=domain, text="?", tokens=(), reference={"answer": line["reference"]}
                )
                yield Row(
                    case=case,
                    given=f"{text} for {line['reference']} in {domain}",
                    expected=line["expected"],
                    got=judge(prompt, text).score,
                )
