"""Turn text into a corpus to train on: PREFIX.bin and PREFIX.idx in Megatron's indexed format.

ring preprocess --input web.jsonl code/ --tokenizer-model tok.model --output-prefix corpus/mix
ring preprocess --builtin-corpus --max-mb 4 --tokenizer-model tok.model --output-prefix corpus/std
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ring.config.load import OneLineParser
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.documents import Record, find_files, read_records
from megatron_ring.data.corpus.tokenize_documents import TokenizeConfig, tokenize_documents
from megatron_ring.data.corpus.writer import write_corpus
from megatron_ring.data.text.tokenizer import load_tokenizer
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import exit_on_sigterm


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    exit_on_sigterm()
    if bool(args.input) == args.builtin_corpus:
        raise DataError(
            "give either --input or --builtin-corpus: one source of documents, not none and not both"
        )
    if args.workers < 1:
        raise DataError(f"workers={args.workers} must be at least 1; this machine has {os.cpu_count()} cores")
    _check_output(args.output_prefix, args.overwrite)
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
    config = TokenizeConfig(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
    )
    manifest = {
        "tokenizer_model": Path(args.tokenizer_model).name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "append_eod": args.append_eod,
    }
    records, total_bytes = _source(args)
    started = time.monotonic()
    num_bytes = num_skipped = 0
    with write_corpus(args.output_prefix, vocab_size=tokenizer.vocab_size, manifest=manifest) as writer:
        with _progress() as progress:
            task = progress.add_task("tokenize", total=total_bytes and total_bytes / 1e6, rate="")
            for batch in tokenize_documents(records, config, workers=args.workers):
                for document in batch.documents():
                    writer.add(document)
                num_bytes += batch.num_bytes
                num_skipped += batch.num_skipped
                rate = _rate(writer.num_documents, num_bytes, time.monotonic() - started)
                progress.update(task, completed=num_bytes / 1e6, rate=rate)
        if not writer.num_documents:
            raise DataError(f"the input holds no text ({num_skipped} empty or binary records); check --input")
    skipped = f", {num_skipped} empty or binary records left out" if num_skipped else ""
    print(
        f"{args.output_prefix}.bin/.idx: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
        f"from {num_bytes / 1e6:.1f} MB ({num_bytes / writer.num_tokens:.2f} bytes per token), "
        f"{_rate(writer.num_documents, num_bytes, time.monotonic() - started)}{skipped}"
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="JSONL, text files, folders of them"
    )
    parser.add_argument("--builtin-corpus", action="store_true", help="the Python standard library's sources")
    parser.add_argument("--max-mb", type=float, help="how much of the built-in corpus to take; default all")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="JSONL keys; several are joined by newlines"
    )
    parser.add_argument("--tokenizer-type", choices=("sentencepiece", "huggingface"), default="sentencepiece")
    parser.add_argument(
        "--tokenizer-model", required=True, metavar="PATH", help=".model file, or tokenizer.json"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-sequence token",
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenizer processes")
    return parser


def _check_output(prefix: str, overwrite: bool) -> None:
    existing = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if Path(path).exists()]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists already; choose another --output-prefix, or replace it with --overwrite"
        )


def _source(args: argparse.Namespace) -> tuple[Iterator[Record], int | None]:
    """Records to tokenize, and how many bytes they are, if that is known beforehand."""
    if args.builtin_corpus:
        texts = [text.encode() for text in builtin_documents(args.max_mb)]
        records = (Record(raw=text, origin="built-in", is_json=False, is_named=True) for text in texts)
        return records, sum(map(len, texts))
    files = [path for path, _ in find_files(args.input)]
    is_packed = any(path.suffix == ".gz" for path in files)
    return read_records(args.input), None if is_packed else sum(path.stat().st_size for path in files)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("MB  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _rate(num_documents: int, num_bytes: int, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return f"{num_documents / seconds:,.0f} docs/s, {num_bytes / seconds / 1e6:.1f} MB/s"
