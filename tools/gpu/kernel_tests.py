#!/usr/bin/env python3
"""The kernels' own tests on the GPU, one process per file: most of the time is compilation, on the CPUs.

python tools/gpu/kernel_tests.py OUT           writes OUT/tests.json; exit code 1 for a test that fails
python tools/gpu/kernel_tests.py OUT --tiny    on plain torch: a rehearsal
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.gpu.results import Results

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("-q", "-p", "no:cacheprovider", "-o", "pythonpath=", "-o", "addopts=--import-mode=importlib -ra")
"""-P and no pythonpath: the package under test is the one that this process has. Without --strict-config pytest takes
the settings of a plugin that is not here."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A pytest that runs, what it writes and the report that it leaves. Example: ``name="test_permute"``."""

    name: str
    process: subprocess.Popen
    log: Path
    report: Path


def start(name: str, files: Sequence[Path], folder: Path, tiny: bool) -> Started:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if tiny else {"RING_TEST_DEVICE": "cuda"})
    report, log = folder / f"{name}.xml", folder / f"{name}.log"
    words = [*WORDS, *(["-k", "torch"] if tiny else []), f"--junitxml={report}", *map(str, files)]
    command = [sys.executable, "-P", "-m", "pytest", *words]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)
    return Started(name=name, process=process, log=log, report=report)


def count(started: Started, results: Results) -> None:
    """A row per file, and a line for each failed test and for each pytest that ended abnormally."""
    status, said = started.process.wait(), started.log.read_text(encoding="utf-8", errors="replace").strip()
    print(said[-6000:], flush=True)
    rows: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    cases = ElementTree.parse(started.report).iter("testcase") if started.report.exists() else ()
    for case in cases:
        name = case.get("classname", "").rpartition(".")[2]
        row = rows.setdefault(name, {"name": name, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        failures = [child.get("message", "") for child in case if child.tag in ("failure", "error")]
        row["failed" if failures else "skipped" if case.find("skipped") is not None else "passed"] += 1
        row["seconds"] += float(case.get("time", 0))
        wrong += [f"{name}: {case.get('name')}: {' '.join(each.split())[:200]}" for each in failures]
    if status != 0 and not (status == 1 and wrong):
        wrong.append(f"{started.name}: pytest ended with exit code {status}: {said.splitlines()[-1:]}")
    for name, row in rows.items():
        results.row(**row)
        if not row["passed"] and not row["failed"]:
            wrong.append(f"{name}: all {row['skipped']} tests were skipped")
    for line in wrong:
        results.wrong(line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for tests.json")
    parser.add_argument("--tiny", action="store_true", help="on plain torch, wherever this is")
    parser.add_argument("files", type=Path, nargs="*", help="in place of all of tests/kernels")
    args = parser.parse_args()
    results = Results(args.out, "tests")
    files = args.files or [
        file
        for file in sorted(ROOT.glob("tests/kernels/test_*.py"))
        if "(backend" in file.read_text(encoding="utf-8")
    ]
    # a rehearsal has few CPUs
    groups = {"all": files} if args.tiny else {file.stem: [file] for file in files}
    with tempfile.TemporaryDirectory() as folder:
        running = [start(name, each, Path(folder), args.tiny) for name, each in groups.items()]
        # an interrupt reaches every process of the group, and each still writes its report
        with contextlib.suppress(KeyboardInterrupt):
            for each in running:
                each.process.wait()
        for each in running:
            count(each, results)
    counts = {kind: sum(row[kind] for row in results.rows) for kind in ("passed", "failed", "skipped")}
    results.facts |= {**counts, "said": ", ".join(f"{number} {kind}" for kind, number in counts.items())}
    results.write()
    print(results.facts["said"], flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())
