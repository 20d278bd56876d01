"""Write a source of problems to JSONL, so that runs read the same problems wherever and whenever they start.

ring prompts --source 'reasoning_gym:word_ladder?seed=7' --count 5000 --output ladders.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_ring.config.load import OneLineParser
from megatron_ring.data.files import written_whole
from megatron_ring.data.prompts.sources import open_source
from megatron_ring.errors import DataError


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.count < 1:
        raise DataError(f"count={args.count} must be at least 1; try 1000")
    if Path(args.output).exists() and not args.overwrite:
        raise DataError(
            f"{args.output} exists already; choose another --output, or replace it with --overwrite"
        )
    source = open_source(args.source, freezing=True)
    count = min(args.count, len(source))
    with written_whole(args.output) as (path,), path.open("w", encoding="utf-8") as file:
        for index in range(count):
            file.write(json.dumps(source[index].to_json(), ensure_ascii=False) + "\n")
    print(f"{args.output}: {count:,} of {len(source):,} problems of {args.source}")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", required=True, metavar="SOURCE", help="FILE.jsonl or reasoning_gym:NAME?PARAMETERS"
    )
    parser.add_argument("--count", type=int, default=1000, help="problems, the source's first ones")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    return parser
