"""Draw the report of a run, or of several side by side, from what they wrote.

    ring report runs/tiny                     # runs/tiny/report.html and loss.png
    ring report runs/a runs/b --out ab.html   # one page that compares them

A RUN is a run's folder or its metrics.jsonl.
"""

import argparse
from pathlib import Path

from megatron_ring.config.load import OneLineParser
from megatron_ring.report.page import render_comparison, render_report


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument(
        "--out", metavar="FILE", help="page to write (default: RUN/report.html; comparison.html for several)"
    )
    arguments = parser.parse_args()
    if len(arguments.run) == 1:
        run = Path(arguments.run[0])
        folder = run if run.is_dir() else run.parent
        page = render_report(run, arguments.out or folder / "report.html")
    else:
        page = render_comparison(arguments.run, arguments.out or "comparison.html")
    print(f"{page}\n{page.with_name('loss.png')}")
