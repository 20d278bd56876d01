"""Write conversations in which a teacher works out sums, a share of them with one slip, as chat JSONL.

python tools/make_worked_examples.py --output sums.jsonl
python tools/make_worked_examples.py --count 500 --seed 2 --slip-share 0 --output held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ring.config.load import OneLineParser
from megatron_ring.data.files import written_whole
from megatron_ring.data.prompts.sources import open_source
from megatron_ring.data.worked_examples import WorkedExamplesConfig, worked_examples
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry


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
    left_out = f", {config.count - count:,} left out that are held out" if excluded else ""
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


if __name__ == "__main__":
    run_entry(main)
