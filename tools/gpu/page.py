#!/usr/bin/env python3
"""What the parts of the check found, as one HTML page and as a table that fits a README.

python tools/gpu/page.py OUT        reads OUT/*.json; writes OUT/page.html and OUT/table.md
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CORRECT = ("right", "right-small", "same", "tests", "sanitizer")
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;width:100%;margin:.6rem 0 1.8rem}th,td{padding:.25rem .6rem;text-align:left;"
    "border-bottom:1px solid #d8dee4}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".bad{color:#b3261e}.good{color:#1a7f37}h2{margin-top:2rem}"
)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """{part: what it wrote}; parts that did not run are missing."""
    names = (*CORRECT, "compile", "fast", "pretrain", "rl")
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in names
        if (folder / f"{name}.json").exists()
    }


def compared(rows: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """One line for each thing that was timed: ours, the best of the others, the ratio."""
    for what in dict.fromkeys(row["what"] for row in rows):
        timed = [row for row in rows if row["what"] == what and "ms" in row]
        ours = next((row for row in timed if row["who"] == "ours"), None)
        others = sorted((row for row in timed if row is not ours), key=lambda row: row["ms"])
        if ours is None and not others:
            continue
        shown = ours or others[0]
        unit = "TFLOP/s" if "TFLOP/s" in shown else "GB/s"
        best = others[0] if ours is not None and others else None
        yield {
            "what": what,
            "who": shown["who"],
            "ms": shown["ms"],
            "rate": f"{shown[unit]:,.0f} {unit}",
            "share": shown.get("share"),
            "best": None if best is None else best["who"],
            "times": None if best is None else best["ms"] / shown["ms"],
        }


def verdicts(parts: dict[str, dict]) -> list[tuple[str, str, bool]]:
    """(part, what it says, whether all is well) of the parts that judge."""
    lines = []
    for name, found in parts.items():
        count, bad = len(found["rows"]), found["bad"]
        lines.append((name, f"{count} rows, {len(bad)} wrong, {found['seconds']:.0f} s", not bad))
    return lines


def table(parts: dict[str, dict]) -> str:
    """Markdown: the card and versions, what was judged, what was timed, whole steps."""
    where = next(iter(parts.values()))["where"]
    lines = [", ".join(f"{name} {value}" for name, value in where.items() if name != "device"), ""]
    lines = [f"**{where['device']}**: {lines[0]}", "", "| part | result |", "|---|---|"]
    lines += [f"| {name} | {said} |" for name, said, _ in verdicts(parts)]
    if "fast" in parts:
        lines += ["", "| kernel | ms | rate | of the roof | beside |", "|---|---|---|---|---|"]
        for row in compared(parts["fast"]["rows"]):
            beside = "" if row["times"] is None else f"{row['times']:.2f}x {row['best']}"
            share = "" if row["share"] is None else f"{row['share']:.0%}"
            lines.append(f"| {row['what']} | {row['ms']:.3f} | {row['rate']} | {share} | {beside} |")
    facts = list(whole_facts(parts))
    if facts:
        lines += [
            "",
            "| ring_lite, four layers, bf16 | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts),
        ]
    return "\n".join(lines) + "\n"


def whole_facts(parts: dict[str, dict]) -> Iterator[tuple[str, str]]:
    if found := parts.get("pretrain"):
        yield "pre-training", f"{found['tokens_per_second']:,.0f} tokens/s"
        if found.get("mfu") is not None:
            yield "share of the card's peak (MFU)", f"{found['mfu']:.1%}"
        yield "memory: highest, planned", f"{found['peak_gb']:.1f} GB, {found['planned_gb']:.1f} GB"
        if found.get("waits_per_step") is not None:
            yield "waits for the device in a step", str(found["waits_per_step"])
    if found := parts.get("rl"):
        last = found["rows"][-2]
        yield "a C3PO step", f"{last['seconds']:.2f} s, {last['tokens_per_second']:,.0f} tokens/s"
        yield "its rollouts", f"{last['rollout_tokens_per_second']:,.0f} tokens/s"
        phases = {
            name.removeprefix("seconds_"): value
            for name, value in last.items()
            if name.startswith("seconds_")
        }
        yield (
            "its phases",
            ", ".join(f"{name} {value:.2f} s" for name, value in phases.items() if value >= 0.005),
        )
        yield "memory: highest, planned (RL)", f"{found['peak_gb']:.1f} GB, {found['planned_gb']:.1f} GB"


def page(parts: dict[str, dict]) -> str:
    """The same as HTML, with all that is wrong and the dearest kernels."""
    where = next(iter(parts.values()))["where"]
    blocks = [f"<h1>megatron_ring on {html.escape(where['device'])}</h1>"]
    blocks.append(
        "<p>"
        + html.escape(", ".join(f"{key} {value}" for key, value in where.items() if key != "device"))
        + "</p>"
    )
    rows = [(name, said, "all well" if good else "wrong") for name, said, good in verdicts(parts)]
    blocks += ["<h2>What was judged</h2>", _table(("part", "result", ""), rows)]
    wrong = [(name, line) for name, found in parts.items() for line in found["bad"]]
    if wrong:
        blocks += ["<h2>What is wrong</h2>", _table(("part", "what"), wrong)]
    if "fast" in parts:
        timed = [
            (row["what"], f"{row['ms']:.3f}", row["rate"], "" if row["share"] is None else f"{row['share']:.0%}",
             "" if row["times"] is None else f"{row['times']:.2f}x {row['best']}")
            for row in compared(parts["fast"]["rows"])
        ]  # fmt: skip
        blocks += [
            "<h2>How fast</h2>",
            _table(("kernel", "ms", "rate", "of the roof", "beside the best other"), timed),
        ]
    if facts := list(whole_facts(parts)):
        blocks += ["<h2>ring_lite, four layers, bf16</h2>", _table(("", ""), facts)]
    for name in ("pretrain", "rl"):
        dearest = parts.get(name, {}).get("dearest", ())
        if dearest:
            cells = [
                (each["kernel"], f"{each['ms']:.2f}", f"{each['share']:.1%}", str(each["calls"]))
                for each in dearest
            ]
            blocks += [
                f"<h2>The dearest kernels of a step: {name}</h2>",
                _table(("kernel", "ms", "share", "calls"), cells),
            ]
    body = "\n".join(blocks)
    return f"<!doctype html><meta charset=utf-8><title>megatron_ring: GPU check</title><style>{_STYLE}</style>\n{body}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    args = parser.parse_args()
    parts = read(args.out)
    if not parts:
        print(f"error: {args.out} holds no results; run tools/gpu_check.sh first", file=sys.stderr)
        return 2
    (args.out / "table.md").write_text(table(parts), encoding="utf-8")
    (args.out / "page.html").write_text(page(parts), encoding="utf-8")
    print(table(parts))
    print(f"page: {args.out / 'page.html'}")
    return 1 if any(found["bad"] for found in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
