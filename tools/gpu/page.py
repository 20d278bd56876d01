#!/usr/bin/env python3
"""The results of all parts of the check, as one HTML page and as a table for a README.

    python tools/gpu/page.py OUT        reads OUT/*.json; writes OUT/page.html and OUT/table.md

Both have the card and the versions, what was checked and what is wrong, which goals were met (on an H100 or
H200), and for each kernel our time, the best peer's and all that failed.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.gpu import goals

PARTS = ("compile", "same", "right", "right-small", "tests", "sanitizer", "fast", "pretrain", "rl")
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;width:100%;margin:.6rem 0 1.8rem}th,td{padding:.25rem .6rem;text-align:left;"
    "border-bottom:1px solid #d8dee4}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    "tr.bad td{color:#b3261e}tr.good td:last-child{color:#1a7f37}h2{margin-top:2rem}"
)
NUMBERS = frozenset(("ms", "rate", "of the roof", "of the peak", "share", "calls", "ours / best"))
REHEARSAL = "Tiny sizes, a rehearsal: the times mean nothing."
TIMED = ("kernel", "ms", "rate", "of the roof", "of the peak", "best other", "ours / best")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """{part: its results}; parts that did not run are missing."""
    paths = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def compared(rows: Sequence[dict]) -> Iterator[tuple[str, ...]]:
    """Cells under ``TIMED`` of each thing that was timed. A ratio above 1 means that ours is that many times as
    fast."""
    for what in dict.fromkeys(row["what"] for row in rows):
        timed = [row for row in rows if row["what"] == what and "ms" in row]
        ours = next((row for row in timed if row["who"] == "ours"), None)
        others = sorted(
            (row for row in timed if not row["who"].startswith("ours")), key=lambda row: row["ms"]
        )
        if ours is None and not others:
            continue
        shown = ours or others[0]
        unit = "TFLOP/s" if "TFLOP/s" in shown else "GB/s"
        best = others[0] if ours is not None and others else None
        yield (
            what if ours is not None else f"{what} ({shown['who']})",
            f"{shown['ms']:.3f}",
            f"{shown[unit]:,.0f} {unit}",
            *(f"{shown[name]:.0%}" if name in shown else "" for name in ("share", "peak_share")),
            "" if best is None else best["who"],
            "" if best is None else f"{best['ms'] / shown['ms']:.2f}x",
        )


def failed_peers(parts: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(what, who, why) of the peers that gave no time."""
    rows = parts.get("fast", {}).get("rows", ())
    return [(row["what"], row["who"], row["failed"]) for row in rows if "failed" in row]


def judged(parts: dict[str, dict]) -> list[tuple[str, str, bool]]:
    """(part, summary, whether all is well); results of another card or of other versions are not."""
    lines = []
    first = next(iter(parts.values()))["where"]
    for name, found in parts.items():
        bad, said = found["bad"], found.get("said", f"{len(found['rows'])} rows")
        others = [f"{key} {value}" for key, value in found["where"].items() if first.get(key) != value]
        said += f", {len(bad)} wrong, {found['seconds']:.0f} s"
        if others:
            said += f", of another run ({', '.join(others)})"
        lines.append((name.removesuffix("-small"), said, not bad and not others))
    return lines


def not_run(parts: dict[str, dict]) -> str:
    """The parts whose results are not here; empty if all are."""
    here = {name.removesuffix("-small") for name in parts}
    names = dict.fromkeys(name.removesuffix("-small") for name in PARTS)
    return ", ".join(name for name in names if name not in here)


def wrong(parts: dict[str, dict]) -> list[tuple[str, str]]:
    return [(name, line) for name, found in parts.items() for line in found["bad"]]


def goals_met(parts: dict[str, dict]) -> list[goals.Verdict]:
    found = parts.get("fast")
    return (
        []
        if found is None
        else goals.verdicts(found["rows"], found["where"]["device"], found.get("tiny", False))
    )


def card(parts: dict[str, dict]) -> tuple[str, str]:
    """The card, and the versions beside it."""
    where = next(iter(parts.values()))["where"]
    return where["device"], ", ".join(f"{name} {value}" for name, value in where.items() if name != "device")


def rehearsed(parts: dict[str, dict]) -> bool:
    return any(found.get("tiny") for found in parts.values())


def table(parts: dict[str, dict]) -> str:
    """Markdown: the card and versions, what was checked, goals, what was timed, whole steps, what failed."""
    device, versions = card(parts)
    blocks = [f"**{device}**: {versions}"]
    if rehearsed(parts):
        blocks.append(REHEARSAL)
    cells = [(name, said, "all well" if good else "wrong") for name, said, good in judged(parts)]
    blocks.append(_markdown(("part", "result", ""), cells))
    if missing := not_run(parts):
        blocks.append(f"Not run: {missing}.")
    blocks += [f"- {name}: {line}" for name, line in wrong(parts)]
    if met := goals_met(parts):
        cells = [(each.what, each.goal, each.seen, _met(each)) for each in met]
        blocks.append(_markdown(("goal", "at least", "seen", ""), cells))
    if "fast" in parts:
        blocks.append(_markdown(TIMED, list(compared(parts["fast"]["rows"]))))
    if facts := list(whole_facts(parts)):
        blocks.append(_markdown(("ring_lite, four layers, bf16", ""), facts))
    if peers := failed_peers(parts):
        blocks.append(_markdown(("not timed", "who", "why"), peers))
    return "\n\n".join(blocks) + "\n"


def _met(verdict: goals.Verdict) -> str:
    return "met" if verdict.met else "missed"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:" if name in NUMBERS else "---" for name in head], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def whole_facts(parts: dict[str, dict]) -> Iterator[tuple[str, str]]:
    # a part that died has rows, but not the facts that are written last
    if "planned_gb" in (found := parts.get("pretrain", {})):
        yield "pre-training", f"{found['tokens_per_second']:,.0f} tokens/s"
        if found.get("mfu") is not None:
            yield "share of the card's peak (MFU)", f"{found['mfu']:.1%}"
        yield "memory: highest, planned", f"{found['peak_gb']:.1f} GB, {found['planned_gb']:.1f} GB"
        if found.get("waits_per_step") is not None:
            yield "waits for the device in a step", str(found["waits_per_step"])
    if "planned_gb" in (found := parts.get("rl", {})):
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
    """The same as HTML, with the most expensive kernels."""
    device, versions = card(parts)
    blocks = [f"<h1>megatron_ring on {html.escape(device)}</h1>", f"<p>{html.escape(versions)}</p>"]
    rows = [(name, said, "all well" if good else "wrong") for name, said, good in judged(parts)]
    if rehearsed(parts):
        blocks.append(f"<p>{REHEARSAL}</p>")
    blocks += ["<h2>What was judged</h2>", _table(("part", "result", ""), rows)]
    if missing := not_run(parts):
        blocks.append(f"<p>Not run: {missing}.</p>")
    if lines := wrong(parts):
        blocks += ["<h2>What is wrong</h2>", _table(("part", "what"), lines)]
    if met := goals_met(parts):
        cells = [(each.what, each.goal, each.seen, _met(each)) for each in met]
        blocks += ["<h2>Goals</h2>", _table(("kernel", "at least", "seen", ""), cells)]
    if compiled := parts.get("compile", {}).get("rows"):
        keys = ("name", "launches", "binaries", "registers", "spills", "shared_bytes")
        cells = [tuple(str(row[key]) for key in keys) for row in compiled]
        blocks += ["<h2>What was compiled</h2>", _table(("kernel", *keys[1:-1], "shared bytes"), cells)]
    if "fast" in parts:
        blocks += ["<h2>How fast</h2>", _table(TIMED, list(compared(parts["fast"]["rows"])))]
    if peers := failed_peers(parts):
        blocks += ["<h2>Not timed</h2>", _table(("what", "who", "why"), peers)]
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
    """Numbers are right-aligned; a row whose last cell is bad or good is coloured."""
    classes = {
        "wrong": ' class="bad"',
        "missed": ' class="bad"',
        "met": ' class="good"',
        "all well": ' class="good"',
    }

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if name in NUMBERS else "" for name in head)
        inside = "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr{classes.get(cells[-1], '')}>{inside}</tr>"

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
    return 0 if all(good for _, _, good in judged(parts)) else 1


if __name__ == "__main__":
    sys.exit(main())
