#!/usr/bin/env python3
"""C3PO beside GRPO: the same start, prompts, seeds and learning rate; tokens per step, step time, norms and rewards.

    python tools/benchmark/c3po_grpo.py --start runs/quickstart [--steps 40] [--seeds 3] [--out runs/c3po_grpo]

``--start`` is a folder that examples/quickstart.sh made (its tokenizer and its supervised model). GRPO trains on every
response of the step, so its number of tokens varies; C3PO trains on exactly Phi of them in each of the step's
two updates. Runs take turns, one seed after the other; the numbers are printed as they come, and
``c3po_grpo.png`` has the curves of the paper's figure 7.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmark import machine

ROOT = Path(__file__).resolve().parents[2]

RECIPES = {
    "C3PO": ["--objective", "c3po"],
    "GRPO": ["--objective", "grpo", "--token-budget", "0", "--budget-shortfall", "train"],
}
PANELS = {
    "loss_tokens": "Tokens trained on per step",
    "seconds_update": "Seconds of the update",
    "grad_norm": "Gradient norm",
    "response_length": "Response length (tokens)",
    "reward": "Training reward",
    "entropy": "Entropy",
}
COLOURS = {"C3PO": "#0b63a5", "GRPO": "#c8501e"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, required=True, help="folder of a quickstart run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/c3po_grpo"))
    return parser.parse_args()


def run(args: argparse.Namespace, name: str, seed: int) -> Path:
    folder = args.out / f"{name}-{seed}"
    if (folder / "metrics.jsonl").exists():
        print(f"{folder} is there: taken as it is", flush=True)
        return folder
    command = [sys.executable, "-W", "ignore", "examples/rl_ring.py", "--config", "examples/tiny/rl.toml"]
    command += ["--tokenizer-model", str(args.start / "tokenizer.model")]
    command += ["--pretrained-checkpoint", str(args.start / "sft"), "--save", str(folder), "--load", "none"]
    command += [
        "--save-interval",
        "0",
        "--metrics-file",
        str(folder / "metrics.jsonl"),
        "--log-interval",
        "10",
    ]
    command += ["--train-iters", str(args.steps), "--eval-interval", str(args.steps), "--seed", str(seed)]
    print(f"== {name}, seed {seed}", flush=True)
    subprocess.run(
        [*command, *RECIPES[name]], check=True, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    return folder


def spread(values: list[float]) -> str:
    """Mean and coefficient of variation."""
    mean = statistics.mean(values)
    return f"{mean:12.4g} ±{100 * statistics.pstdev(values) / abs(mean):5.1f}%" if mean else f"{mean:12.4g}"


def draw(runs: dict[str, list], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4))
    for place, (quantity, title) in enumerate(PANELS.items(), start=1):
        axes = figure.add_subplot(2, 3, place)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        for name, of_name in runs.items():
            for index, one in enumerate(of_name):
                series = one.series(quantity)
                label = name if index == 0 else None
                axes.plot(
                    series.steps, series.values, color=COLOURS[name], linewidth=1, alpha=0.8, label=label
                )
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e6e9ed")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = _arguments()
    from megatron_ring.report.read import read_run

    folders = {name: [] for name in RECIPES}
    for seed in range(1, args.seeds + 1):
        for name in RECIPES:
            folders[name].append(run(args, name, seed))
    runs = {name: [read_run(folder) for folder in of_name] for name, of_name in folders.items()}
    print(
        f"\n{machine.device_name()}, {args.seeds} seeds, {args.steps} steps: mean over steps ± its spread, "
        "then accuracy on held-out problems"
    )
    for quantity, title in PANELS.items():
        print(f"{title:30}", end="")
        for name, of_name in runs.items():
            values = [value for one in of_name for value in one.series(quantity).values]
            print(f"  {name} {spread(values)}", end="")
        print()
    for name, of_name in runs.items():
        curves = [one.eval_series("accuracy").values for one in of_name]
        print(f"{name} accuracy: " + ", ".join(f"{c[0]:.3f} -> {c[-1]:.3f}" for c in curves))
    draw(runs, args.out / "c3po_grpo.png")
    print(f"picture: {args.out / 'c3po_grpo.png'}")


if __name__ == "__main__":
    main()
