#!/usr/bin/env python3
"""What a verdict costs: a tiny Python program bare and in the sandbox, compiled languages, answers in mathematics.

    python tools/benchmark/sandbox.py [--runs 100] [--workers 1 2] [--without-compilers]

Bare is ``python -I -S -B`` of the same system Python on the same program, without any wall. Bare and sandbox take turns
in rounds, so that what else the machine does hits both. Every run's output is checked before its time counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SOURCE = "print(sum(map(int, input().split())))"
CPP = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
JAVA = (
    "public class Main { public static void main(String[] w) { var in = new java.util.Scanner(System.in);"
    " System.out.println(in.nextInt() + in.nextInt()); } }"
)
PAIRS = [
    ("1/2", "0.5"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("x^2-1", "(x-1)(x+1)"),
    ("1,2", "2,1"),
    (r"\pi", "3.14"),
]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="runs per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--without-compilers", action="store_true")
    return parser.parse_args()


def _per_second(run, runs: int, workers: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        assert all(pool.map(run, range(runs)))
    return runs / (time.perf_counter() - started)


def python_runs(words: argparse.Namespace) -> None:
    from megatron_ring.rl.reward.sandbox import Sandbox
    from megatron_ring.rl.reward.sandbox_command import Limits

    started = time.perf_counter()
    sandbox = Sandbox.open()
    print(f"start, isolation tried: {1e3 * (time.perf_counter() - started):.0f} ms")
    program = sandbox.python(SOURCE)
    argv = [*program.argv[:-1], "-c", SOURCE]

    def bare(_: int) -> bool:
        done = subprocess.run(argv, input=b"1 2", capture_output=True, check=False)
        return done.stdout == b"3\n"

    def walled(_: int) -> bool:
        return sandbox.run(program, Limits(seconds=60.0), b"1 2").stdout == b"3\n"

    for run in (bare, walled):
        run(0)
    for workers in words.workers:
        rounds = [
            [_per_second(run, words.runs, workers) for run in (bare, walled)] for _ in range(words.rounds)
        ]
        for name, rates in zip(("bare python", "sandbox"), zip(*rounds, strict=True), strict=True):
            rate = statistics.median(rates)
            print(
                f"{workers} worker{'s' * (workers > 1)}, {name}: {rate:.0f} runs/s (best round {max(rates):.0f}), "
                f"{1e3 * workers / rate:.1f} ms a run"
            )


def compiled_runs() -> None:
    from megatron_ring.config.rl import RewardConfig
    from megatron_ring.rl.reward.code import CodeJob, CodeJudge

    judge = CodeJudge(RewardConfig(reward_timeout=120.0, sandbox_timeout=60.0))
    test = {"input": "1 2", "output": "3"}
    for language, source in (("cpp", CPP), ("java", JAVA)):
        seconds = []
        for tests in ((test,), (test,) * 21):
            started = time.perf_counter()
            assert judge.judge(CodeJob(source=source, tests=tests, language=language)).score == 1.0
            seconds.append(time.perf_counter() - started)
        each = (seconds[1] - seconds[0]) / 20
        print(f"{language}: compile {seconds[0] - each:.2f} s, then {1e3 * each:.0f} ms a test")


def answers() -> None:
    from megatron_ring.data.prompts import Prompt
    from megatron_ring.rl.reward.math_answer import judge_math

    started = time.perf_counter()
    judge_math(Prompt(uid=0, domain="math", text="", tokens=(), reference={"answer": "1/2"}), r"\boxed{0.5}")
    print(f"mathematics: first verdict {time.perf_counter() - started:.2f} s, imports included")
    for name, pairs in (("by value", PAIRS), ("integers", [("16", "17"), ("16", "16"), ("1000", "1,000")])):
        milliseconds = []
        for n in range(20 * len(pairs)):
            reference, answer = pairs[n % len(pairs)]
            prompt = Prompt(uid=n, domain="math", text="", tokens=(), reference={"answer": reference})
            started = time.perf_counter()
            judge_math(prompt, rf"<think>{'x' * 40000}</think> \boxed{{{answer}}}")
            milliseconds.append(1e3 * (time.perf_counter() - started))
        milliseconds.sort()
        print(f"  {name}: median {statistics.median(milliseconds):.2f} ms, slowest {milliseconds[-1]:.1f} ms")


def main() -> None:
    words = _arguments()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    python_runs(words)
    if not words.without_compilers:
        compiled_runs()
    answers()


if __name__ == "__main__":
    main()
