#!/usr/bin/env python3
"""Helpers of tools/gpu_check.sh: which megatron_ring is checked, and how a part ended.

python -P tools/gpu/parts.py package        prints installed or checkout, and what to know of it
python tools/gpu/parts.py where OUT         writes OUT/where.json; exit code 2 without a GPU (--tiny: may be none)
python tools/gpu/parts.py ended OUT PART STATUS SECONDS LIMIT
                                            adds to OUT/PART.json what the part itself could not write
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
NEEDED = {
    "torch": "torch", "triton": "triton", "numpy": "numpy", "megatron.core": "megatron-core", "psutil": "psutil",
    "sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "safetensors": "safetensors", "jinja2": "jinja2",
    "rich": "rich", "pytest": "pytest", "hypothesis": "hypothesis",
}  # fmt: skip
"""What the parts import; rewards of the check's own task need neither reasoning-gym nor pyseccomp."""
JUDGED = {"sanitizer": (1, 9)}
"""Exit codes of parts that found something wrong; 1 for all others."""


def package() -> tuple[str, list[str]]:
    """(``installed`` or ``checkout``, lines to print): what ``import megatron_ring`` finds outside this
    checkout.

    Another checkout (an editable install) does not count as installed.
    """
    ours = ROOT / "megatron_ring"
    spec = importlib.util.find_spec("megatron_ring")
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else ours
    if found == ours:
        return "checkout", []
    if (found.parent / "pyproject.toml").exists():
        return "checkout", ["note: an editable install of another checkout is ignored"]
    versions = version(found), version(ours)
    differ = f"note: megatron_ring {versions[0]} is installed, and this checkout has {versions[1]}"
    return "installed", [differ] if versions[0] != versions[1] else []


def where(out: Path, tiny: bool) -> str | None:
    """Write ``OUT/where.json``; returns why nothing can be checked, or None."""
    missing = [name for module, name in NEEDED.items() if not _is_here(module)]
    if missing:
        return f"{', '.join(missing)}: not installed here; without a network see the head of tools/gpu/offline.sh"
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc) is here; Triton builds what starts a kernel with it"
    if not (header := Path(sysconfig.get_path("include", _scheme())) / "Python.h").exists():
        return f"{header} is missing; Triton builds what starts a kernel with it (package python3-dev)"
    from tools.gpu.results import where as found_where

    found = found_where()
    if found["device"] == "cpu" and not tiny:
        return "torch finds no GPU here; RING_GPU_CHECK=tiny bash tools/gpu_check.sh rehearses without one"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "where.json").write_text(json.dumps({"where": found}) + "\n", encoding="utf-8")
    except OSError as error:
        return f"OUT={out} cannot be written ({error.strerror}); name a folder that can"
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return None


def _scheme() -> str:
    """Install scheme under which Triton looks for Python's headers; Debian's own scheme names another folder."""
    return sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def version(folder: Path) -> str:
    """Of a package that is not imported."""
    found = re.search(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(encoding="utf-8"), re.M)
    return found[1] if found else "without a version"


def ended(out: Path, part: str, status: int, seconds: int, limit: int) -> dict[str, Any]:
    """The contents of ``OUT/PART.json`` after the part: what it wrote, and a line if it did not end by
    itself."""
    found = _written(out, part) or {"where": _written(out, "where")["where"], "bad": [], "rows": []}
    log = out / f"{part.removesuffix('-small')}.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if part == "sanitizer":
        found |= sanitizer(text)
    if status != 0 and not (found["bad"] and status in JUDGED.get(part, (1,))):
        last = [line.strip() for line in text.splitlines() if line.strip()][-1:] or ["nothing"]
        found["bad"] = [*found["bad"], f"{_end(status, seconds, limit)}; the last it said: {last[0][:300]}"]
    elif status == 0 and not found["rows"]:
        found["bad"] = [*found["bad"], "ended well and left no results"]
    return {"seconds": seconds, **found}


def sanitizer(log: str) -> dict[str, Any]:
    """The sum that compute-sanitizer prints at its end."""
    sums = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    if not sums:
        return {}
    errors = int(sums[-1])
    first = re.findall(r"^=+ ((?:Invalid|Misaligned|Out-of-|Program hit|Unknown).*)$", log, re.M)[:1]
    bad = [f"{errors} errors; the first: {first[0] if first else 'see the log'}"] if errors else []
    return {
        "errors": errors,
        "bad": bad,
        "rows": [{"name": "memcheck", "errors": errors}],
        "said": f"{errors} errors",
    }


def _end(status: int, seconds: int, limit: int) -> str:
    if seconds >= limit and status in (1, 2, 124, 130, 137):
        return f"took longer than {limit} s and was ended"
    if status > 128:
        name = signal.Signals(status - 128).name if status - 128 in set(signal.Signals) else str(status - 128)
        return f"was ended by {name} after {seconds} s" + (": out of memory?" if name == "SIGKILL" else "")
    return f"ended with exit code {status} after {seconds} s"


def _written(out: Path, part: str) -> dict[str, Any] | None:
    try:
        return json.loads((out / f"{part}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("package")
    before = actions.add_parser("where")
    before.add_argument("out", type=Path)
    before.add_argument("--tiny", action="store_true")
    after = actions.add_parser("ended")
    after.add_argument("out", type=Path)
    after.add_argument("part")
    for name in ("status", "seconds", "limit"):
        after.add_argument(name, type=int)
    args = parser.parse_args()
    if args.action == "package":
        kind, lines = package()
        print(kind)
        for line in lines:
            print(line, file=sys.stderr)
        return 0
    if args.action == "where":
        why_not = where(args.out, args.tiny)
        if why_not is not None:
            print(f"error: {why_not}", file=sys.stderr)
        return 2 if why_not is not None else 0
    found = ended(args.out, args.part, args.status, args.seconds, args.limit)
    (args.out / f"{args.part}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
