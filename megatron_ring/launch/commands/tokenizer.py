"""Train a sentencepiece BPE tokenizer with byte fallback and the chat symbols of Ling and Ring.

ring tokenizer --builtin-corpus --max-mb 4 --vocab-size 2048 --output tok.model
ring tokenizer --input web.jsonl code/ --vocab-size 32000 --max-mb 512 --output tok.model
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ring.config.load import OneLineParser
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.documents import read_records, record_text
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import exit_on_sigterm


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    exit_on_sigterm()
    if bool(args.input) == args.builtin_corpus:
        raise DataError(
            "give either --input or --builtin-corpus: one source of documents, not none and not both"
        )
    if not args.output.endswith(".model"):
        raise DataError(f"output={args.output} must end in .model, as sentencepiece's files do")
    if Path(args.output).exists() and not args.overwrite:
        raise DataError(
            f"{args.output} exists already; choose another --output, or replace it with --overwrite"
        )
    documents = iter(builtin_documents(args.max_mb)) if args.builtin_corpus else _documents(args)
    started = time.monotonic()
    print(f"training a tokenizer of {args.vocab_size} tokens ...", flush=True)
    size = train_tokenizer(
        documents,
        args.output,
        vocab_size=args.vocab_size,
        split_digits=args.split_digits,
        symbols=args.symbol,
    )
    print(f"{args.output}: {size:,} tokens, trained in {time.monotonic() - started:.1f} s")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="JSONL, text files, folders of them"
    )
    parser.add_argument("--builtin-corpus", action="store_true", help="the Python standard library's sources")
    parser.add_argument(
        "--max-mb", type=float, help="train on the first so many MB; default all (it is held in memory)"
    )
    parser.add_argument("--json-key", default="text", help="JSONL key of the text")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, reserved ones included")
    parser.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each digit is one token",
    )
    parser.add_argument(
        "--symbol",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="text that is one token, such as '\\boxed{'",
    )
    parser.add_argument("--output", required=True, metavar="FILE.model")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    return parser


def _documents(args: argparse.Namespace) -> Iterator[str]:
    limit = float("inf") if args.max_mb is None else args.max_mb * 1e6
    size = 0
    for record in read_records(args.input):
        if size >= limit:
            return
        text = record_text(record, [args.json_key])
        if text:
            size += len(record.raw)
            yield text
