"""Turn a Hugging Face folder into a Megatron checkpoint and back, in bounded memory.

ring convert hf-to-megatron models/Ring-lite runs/ring_lite --verify
ring convert megatron-to-hf runs/rl/checkpoints models/mine --verify
ring convert repad runs/a runs/b --tensor-model-parallel-size 8
ring convert check models/mine
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ring.config.load import OneLineParser, named_path
from megatron_ring.config.model import MOST, ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.launch.entry import exit_on_sigterm

if TYPE_CHECKING:
    import torch

LARGEST_FILE_GB = 1_000_000
"""More than any file system's files, so that bytes are counted in an integer."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    exit_on_sigterm()
    if args.command is None:
        raise CheckpointError(
            "no command is given; name hf-to-megatron, megatron-to-hf, repad or check, see --help"
        )
    reporter = ConsoleReporter()
    if args.command == "check":
        from megatron_ring.checkpoint.convert.folders import MANIFEST, check_manifest, find_checkpoint
        from megatron_ring.checkpoint.folder import parts_of

        folder = args.source if (args.source / MANIFEST).exists() else find_checkpoint(args.source)
        for part in parts_of(folder):
            reporter.say(f"{part}: {check_manifest(part) / 1e9:.2f} GB as written")
        return
    _check_numbers(args)
    result = _convert(args, reporter)
    reporter.say(f"wrote {result}")
    if getattr(args, "check_logits", False):
        from megatron_ring.checkpoint.convert.check_logits import check_logits

        pair = (args.source, result) if args.command == "hf-to-megatron" else (result, args.source)
        reporter.say(check_logits(*pair, _dtype(args)))


def _check_numbers(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise CheckpointError(
            f"workers={args.workers} must be at least 1; this machine has {os.cpu_count()} cores"
        )
    if not 0 < args.max_file_gb <= LARGEST_FILE_GB:
        raise CheckpointError(
            f"max_file_gb={args.max_file_gb} must be positive and at most {LARGEST_FILE_GB}; try 2"
        )
    multiple = 1
    for name in ("tensor_model_parallel_size", "make_vocab_size_divisible_by"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise CheckpointError(f"{name}={value} must be at least 1; leave the flag out for its default")
        multiple *= 1 if value is None else value
    if multiple > MOST:
        raise CheckpointError(
            f"the vocabulary would be padded to a multiple of {multiple} rows, which must be at most {MOST}; "
            "lower --make-vocab-size-divisible-by or --tensor-model-parallel-size"
        )


def _convert(args: argparse.Namespace, reporter: ConsoleReporter) -> Path:
    from megatron_ring.checkpoint.convert.conversion import Options
    from megatron_ring.checkpoint.convert.repad import repad
    from megatron_ring.checkpoint.convert.to_hf import Export, megatron_to_hf
    from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron

    options = Options(
        dtype=_dtype(args),
        max_file_bytes=int(args.max_file_gb * 1e9),
        num_workers=args.workers,
        verify=args.verify,
    )
    if args.command == "megatron-to-hf":
        export = Export(
            hf_files=args.hf_files,
            config_file=args.config,
            normalize_head=args.normalize_head,
            without_mtp=args.without_mtp,
        )
        return megatron_to_hf(args.source, args.target, options, reporter, export)
    tensor_size, divisible_by = args.tensor_model_parallel_size, args.make_vocab_size_divisible_by
    if args.command == "repad":
        return repad(args.source, args.target, options, reporter, divisible_by, tensor_size)
    divisible_by = divisible_by or ModelConfig().make_vocab_size_divisible_by
    return hf_to_megatron(args.source, args.target, options, reporter, divisible_by, tensor_size)


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` says; None keeps each tensor's own."""
    import torch

    return {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}[getattr(args, "dtype", "keep")]


class ConsoleReporter:
    """Lines on stdout; in a terminal a progress bar with GB/s on stderr."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    @contextmanager
    def progress(self, title: str, total_bytes: int) -> Generator[Callable[[int], None], None, None]:
        """Yields the function to call with the number of bytes done; prints the mean speed at the end."""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        started = time.monotonic()
        done = 0
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(title, total=total_bytes, rate="")

            def on_bytes(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                seconds = max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=done, rate=f"{done / 1e9:.2f} GB, {done / 1e9 / seconds:.2f} GB/s")

            yield on_bytes
        seconds = max(time.monotonic() - started, 1e-9)
        self.say(f"{title}: {done / 1e9:.2f} GB in {seconds:.1f} s, {done / 1e9 / seconds:.2f} GB/s")


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder -> step 0 of a run folder")
    to_hf = commands.add_parser(
        "megatron-to-hf", help="checkpoint (a run's folder: its latest) -> Hugging Face folder"
    )
    again = commands.add_parser(
        "repad", help="checkpoint -> checkpoint with other padding and files, optimizer included"
    )
    check = commands.add_parser(
        "check", help="sum the files of a converted folder and compare with its manifest"
    )
    check.add_argument("source", type=named_path, metavar="FOLDER")
    for command in (to_megatron, to_hf, again):
        command.add_argument("source", type=named_path, metavar="IN")
        command.add_argument("target", type=named_path, metavar="OUT", help="must not exist yet")
        command.add_argument("--workers", type=int, default=1, help="processes that convert (default: 1)")
        command.add_argument(
            "--max-file-gb", type=float, default=2.0, help="largest output file (default: 2)"
        )
        command.add_argument(
            "--verify", action="store_true", help="read both sides back, compare every tensor bit by bit"
        )
    for command in (to_megatron, to_hf):
        command.add_argument(
            "--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="cast weights (default: keep)"
        )
        command.add_argument(
            "--check-logits", action="store_true", help="run both models on a prompt, if they fit"
        )
    for command in (to_megatron, again):
        command.add_argument(
            "--tensor-model-parallel-size",
            type=int,
            default=1,
            help="pad the vocabulary for this many (default: 1)",
        )
        command.add_argument(
            "--make-vocab-size-divisible-by", type=int, help="rows per rank are a multiple of this"
        )
    to_hf.add_argument(
        "--hf-files", type=named_path, metavar="FOLDER", help="take config.json and tokenizer from here"
    )
    to_hf.add_argument(
        "--config", type=named_path, metavar="FILE", help="TOML of a run, if none is beside the checkpoint"
    )
    to_hf.add_argument(
        "--normalize-head",
        action="store_true",
        help="apply NormHead to lm_head.weight and write norm_head: false",
    )
    to_hf.add_argument(
        "--without-mtp",
        action="store_true",
        help="leave multi-token-prediction layers out (vLLM refuses them)",
    )
    return parser
