"""How fast a checkpoint converts, in how much memory, against the disk's own copy speed in the same run.

python tools/benchmark/convert.py --scratch /somewhere/with/70GB                    # Ring-lite, 33.6 GB, bf16
python tools/benchmark/convert.py --scratch build/convert --num-layers 4            # the same at a few GB

Writes a random model, converts it to Megatron's format, removes the original's weights, converts back, and
compares the CRC-32 of every file with the original's: equal means that each of the parameters came back bit
for bit. Everything in SCRATCH is removed at the end. Files are dropped from the page cache before they are
read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ring.config.load import OneLineParser
from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry

TOOLS = Path(__file__).resolve().parents[1]
COPY_BYTES = 4_000_000_000
POLL_SECONDS = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.scratch.exists():
        raise DataError(f"{args.scratch}: exists already; name a folder to make and remove")
    args.scratch.mkdir(parents=True)
    try:
        report = measure(args.scratch, args)
    finally:
        shutil.rmtree(args.scratch)
    print(json.dumps(report, indent=1))


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, object]:
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    words = ["--preset", args.preset, "--output", str(hf), "--max-file-gb", str(args.max_file_gb)]
    if args.num_layers is not None:
        words += ["--num-layers", str(args.num_layers)]
    made = json.loads(run("make_random_checkpoint.py", *words)["stdout"])
    options = ["--workers", str(args.workers), "--max-file-gb", str(args.max_file_gb)]
    report: dict[str, object] = {
        "preset": args.preset,
        "num_layers": args.num_layers,
        "workers": args.workers,
        **made,
    }
    report.pop("folder")
    sums = checksums(hf)
    report["copy_gb_s_before"] = copy_speed(hf, scratch)
    report["hf_to_megatron"] = convert("hf-to-megatron", hf, megatron, options, made["bytes"])
    for path in hf.glob("*.safetensors"):
        path.unlink()
    report["copy_gb_s_between"] = copy_speed(megatron / "iter_0000000", scratch)
    report["megatron_to_hf"] = convert("megatron-to-hf", megatron, back, options, made["bytes"])
    report["copy_gb_s_after"] = copy_speed(back, scratch)
    report["bit_equal"] = checksums(back) == sums
    return report


def convert(
    command: str, source: Path, target: Path, options: list[str], num_bytes: int
) -> dict[str, object]:
    drop_from_cache(source)
    done = run("convert_checkpoint.py", command, str(source), str(target), *options)
    print(done["stdout"], end="", file=sys.stderr, flush=True)
    seconds = done["seconds"]
    return {
        "seconds": round(seconds, 1),
        "gb_s": round(num_bytes / 1e9 / seconds, 3),
        "peak_rss_anon_gb": round(done["rss_anon"] / 1e9, 3),
    }


def run(tool: str, *words: str) -> dict:
    """Run a tool; its output, wall seconds (imports included), and the highest RssAnon of any of its
    processes in bytes.
    """
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / tool), *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, *(rss_anon(pid) for pid in family(process.pid)))
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise DataError(f"{tool} {' '.join(words)} failed with exit code {process.returncode}; see above")
    return {"stdout": output, "seconds": seconds, "rss_anon": peak}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    pids = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                pids += family(int(child))
    except OSError:
        pass
    return pids


def rss_anon(pid: int) -> int:
    """Bytes of anonymous memory; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def copy_speed(folder: Path, scratch: Path) -> float:
    """GB/s of cp for the first files of ``folder``, until the copy is on the disk."""
    files, size = [], 0
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".distcp")):
        if files and size + path.stat().st_size > COPY_BYTES:
            break
        files.append(path)
        size += path.stat().st_size
    free = shutil.disk_usage(scratch).free
    if size > free:
        raise DataError(
            f"{scratch}: {free / 1e9:.1f} GB free but measuring a copy takes {size / 1e9:.1f} GB; free space"
        )
    drop_from_cache(folder)
    target = scratch / "copy"
    target.mkdir()
    started = time.monotonic()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return round(size / 1e9 / seconds, 3)


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checksums(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["crc32"] for name, entry in files.items()}


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, required=True, metavar="FOLDER", help="made, and removed at the end"
    )
    parser.add_argument("--preset", default="ring_lite", help="model to convert (default: ring_lite)")
    parser.add_argument(
        "--num-layers", type=int, help="number of layers instead of the preset's, for a small disk"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that convert (default: 1)")
    parser.add_argument("--max-file-gb", type=float, default=2.0, help="largest file (default: 2)")
    return parser


if __name__ == "__main__":
    run_entry(main)
