r"""Write worked sums as chat JSONL: a teacher shows its steps, and makes mistakes at a given rate.

    python tools/make_worked_examples.py --output sums.jsonl
    python tools/make_worked_examples.py --count 500 --seed 2 --slip-share 0 --output held_out.jsonl

Data for examples/quickstart.sh. Problems are reasoning-gym's ``chain_sum``; the reasoning is the running sum::

    12 + 7 - 3   ->   <think>12+7=19;19-3=16</think>\boxed{16}

A slip changes the result of one step by 1 or 10; later steps build on it, so the answer is wrong. A policy trained
on such examples is often right and often wrong, which is where reinforcement learning can start.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ring.config.load import OneLineParser
from megatron_ring.data.files import written_whole
from megatron_ring.data.prompts.sources import GymSource, open_source
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry

SLIPS = (-10, -1, 1, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkedExamplesConfig:
    """What the teacher shows. Example: ``WorkedExamplesConfig(count=12000, slip_share=0.5, seed=1)``."""

    count: int = 12000
    """Problems."""
    slip_share: float = 0.5
    """Share of them with a slip in one step."""
    seed: int = 1
    min_terms: int = 2
    max_terms: int = 3
    min_digits: int = 1
    max_digits: int = 2

    @property
    def source(self) -> str:
        """The problems, as a run's prompt_data names them."""
        shape = "&".join(
            f"{n}={getattr(self, n)}" for n in ("min_terms", "max_terms", "min_digits", "max_digits")
        )
        return f"reasoning_gym:chain_sum?{shape}&seed={self.seed}&size={self.count}"


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if Path(args.output).exists() and not args.overwrite:
        raise DataError(
            f"{args.output} exists already; choose another --output, or replace it with --overwrite"
        )
    config = WorkedExamplesConfig(**{f.name: getattr(args, f.name) for f in fields(WorkedExamplesConfig)})
    held_out = open_source(args.exclude) if args.exclude else []
    excluded = {held_out[index].text for index in range(len(held_out))}
    count = 0
    with written_whole(args.output) as (path,), path.open("w", encoding="utf-8") as file:
        for example in worked_examples(config, excluded):
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
            count += 1
    left_out = f", {config.count - count:,} left out because they are held out" if excluded else ""
    print(f"{args.output}: {count:,} worked examples, {config.slip_share:.0%} of them with a slip{left_out}")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = WorkedExamplesConfig()
    parser.add_argument("--count", type=int, default=default.count, help="problems")
    parser.add_argument(
        "--slip-share", type=float, default=default.slip_share, help="share of them with a slip in one step"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    for name in ("min_terms", "max_terms", "min_digits", "max_digits"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, name), help=f"of a problem: {name}")
    parser.add_argument(
        "--exclude",
        metavar="SOURCE",
        help="no example has a problem of this source, such as the held-out one",
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    return parser


def worked_examples(config: WorkedExamplesConfig, excluded: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """``config.count`` conversations, ``{"messages": [question, worked answer]}``; the same for the same config.

    Exactly ``round(slip_share * count)`` of them have a slip, spread by the seed. Questions in ``excluded``,
    such as those held out, are then left out.

    Raises:
        DataError: reasoning-gym is not installed, or the config has no such problems.
    """
    if config.count < 1:
        raise DataError(f"count={config.count} must be at least 1; try 12000")
    if not 0 <= config.slip_share <= 1:
        raise DataError(f"slip_share={config.slip_share} must be from 0 to 1; try 0.5")
    problems = GymSource.parse(config.source)
    chance = random.Random(f"worked examples {config.seed}")
    slipping = set(chance.sample(range(config.count), round(config.slip_share * config.count)))
    for index in range(config.count):
        question = problems[index].text
        if question in excluded:
            continue
        answer = running_sum(question, chance if index in slipping else None)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def running_sum(question: str, slip: random.Random | None = None) -> str:
    r"""The sum in ``question``, worked step by step; with ``slip``, one step's result is off by 1 or 10.

    Example: ``running_sum("12 + 7 - 3 =") == r"<think>12+7=19;19-3=16</think>\boxed{16}"``.

    Raises:
        DataError: there is no sum in it.
    """
    found = re.search(r"(-?\d+(?: [+-] -?\d+)+)\s*=?\s*$", question)
    if found is None:
        raise DataError(f"{question[:60]!r} does not end in a sum; take problems of chain_sum")
    first, *rest = found[1].split(" ")
    total, steps = int(first), list(zip(rest[::2], rest[1::2], strict=True))
    wrong = slip.randrange(len(steps)) if slip else -1
    lines: list[str] = []
    for number, (sign, term) in enumerate(steps):
        result = total + int(term) if sign == "+" else total - int(term)
        if slip and number == wrong:
            result += slip.choice(SLIPS)
        lines.append(f"{total}{sign}{term}={result}")
        total = result
    return f"<think>{';'.join(lines)}</think>\\boxed{{{total}}}"


if __name__ == "__main__":
    run_entry(main)
