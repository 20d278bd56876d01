#!/usr/bin/env python3
"""What a verification costs: a tiny Python program bare and in the sandbox, compiled languages, answers in
mathematics.

    python tools/benchmark/sandbox.py [--runs 100] [--workers 1 2] [--without-compilers]

Bare is ``python -I -S -B`` of the same system Python on the same program, without isolation; "one bwrap per
run" isolates each run in the same way, in its own bubblewrap and interpreter; "own interpreter" only starts a
new interpreter. All take turns in rounds, so that other load on the machine affects each. Every run's output is
checked before its time counts.
"""

import argparse
import dataclasses
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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


def bwrap_each(argv: Sequence[str]):
    """A function that runs ``argv`` inside a bubblewrap of its own, as a run without a zygote would."""
    from megatron_ring.rl.reward.sandbox import command as walls

    words = [walls.find_tool("bwrap", "the sandbox"), "--unshare-all", "--unshare-user", "--die-with-parent"]
    words += [
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--hostname",
        "sandbox",
        "--new-session",
        *walls.system_binds(),
    ]
    words += [
        "--proc",
        "/proc",
        "--tmpfs",
        "/proc/1",
        "--remount-ro",
        "/proc/1",
        "--dev",
        "/dev",
        "--size",
        "67108864",
    ]
    words += ["--tmpfs", "/tmp", "--chdir", "/tmp", "--clearenv", "--disable-userns", "--cap-drop", "ALL"]
    limits = ["--cpu=61:62", "--fsize=16777216", "--nproc=26", "--nofile=64", "--core=0", "--as=536870912"]

    def run(_: int) -> bool:
        data, rules = walls.open_data(SOURCE.encode()), walls.open_data(walls.seccomp_program())
        try:
            done = subprocess.run(
                [
                    *(*words, "--seccomp", str(rules), "--ro-bind-data", str(data), f"{walls.CODE}/main.py"),
                    *(
                        "--remount-ro",
                        "/dev",
                        "--remount-ro",
                        "/",
                        "--",
                        "/usr/bin/prlimit",
                        *limits,
                        "--",
                        *argv,
                    ),
                ],
                input=b"1 2",
                capture_output=True,
                check=False,
                pass_fds=(data, rules),
                cwd="/",
                **walls.identity(),
            )
        finally:
            os.close(data)
            os.close(rules)
        return done.stdout == b"3\n"

    return run


def python_runs(words: argparse.Namespace) -> None:
    from megatron_ring.rl.reward.sandbox.command import Limits, Program
    from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
    from megatron_ring.rl.reward.sandbox.zygote_handle import ZygoteHandle

    started = time.perf_counter()
    sandbox = Sandbox.open()
    print(f"start, isolation tried: {1e3 * (time.perf_counter() - started):.0f} ms")
    program = sandbox.python(SOURCE)
    fresh = dataclasses.replace(program, ready_python=False)
    argv = [*program.argv[:-1], "-c", SOURCE]
    starts = []
    for _ in range(5):
        started = time.perf_counter()
        ZygoteHandle.start(program.argv[0]).close()
        starts.append(1e3 * (time.perf_counter() - started))
    print(f"one more process that stands ready, started and ended: {statistics.median(starts):.0f} ms")

    def bare(_: int) -> bool:
        done = subprocess.run(argv, input=b"1 2", capture_output=True, check=False)
        return done.stdout == b"3\n"

    def walled(each: Program):
        return lambda _: sandbox.run(each, Limits(seconds=60.0), b"1 2").stdout == b"3\n"

    sides = {
        "bare python": bare,
        "one bwrap per run": bwrap_each(program.argv),
        "sandbox, own interpreter": walled(fresh),
        "sandbox": walled(program),
    }
    for run in sides.values():
        assert run(0)
    for workers in words.workers:
        rounds = [
            [_per_second(run, words.runs, workers) for run in sides.values()] for _ in range(words.rounds)
        ]
        rates = dict(zip(sides, zip(*rounds, strict=True), strict=True))
        for name, each in rates.items():
            rate = statistics.median(each)
            ratio = statistics.median(map(operator.truediv, each, rates["one bwrap per run"]))
            print(
                f"{workers} worker{'s' * (workers > 1)}, {name}: {rate:.0f} runs/s (best round {max(each):.0f}), "
                f"{1e3 * workers / rate:.1f} ms a run, {ratio:.2f} times one bwrap per run"
            )


def compiled_runs() -> None:
    from megatron_ring.config.rl import RewardConfig
    from megatron_ring.rl.reward.code.job import Language
    from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier

    verifier = CodeVerifier(RewardConfig(reward_timeout=120.0, sandbox_timeout=60.0))
    test = {"input": "1 2", "output": "3"}
    sources: tuple[tuple[Language, str], ...] = (("cpp", CPP), ("java", JAVA))
    for language, source in sources:
        seconds = []
        for tests in ((test,), (test,) * 21):
            started = time.perf_counter()
            assert verifier.verify(CodeJob(source=source, tests=tests, language=language)).score == 1.0
            seconds.append(time.perf_counter() - started)
        each = (seconds[1] - seconds[0]) / 20
        print(f"{language}: compile {seconds[0] - each:.2f} s, then {1e3 * each:.0f} ms a test")


def answers() -> None:
    from megatron_ring.data.prompts.stream import Prompt
    from megatron_ring.rl.reward.mathematics.verifier import verify_math

    started = time.perf_counter()
    verify_math(Prompt(uid=0, domain="math", text="", tokens=(), reference={"answer": "1/2"}), r"\boxed{0.5}")
    print(f"mathematics: first verdict {time.perf_counter() - started:.2f} s, imports included")
    for name, pairs in (("by value", PAIRS), ("integers", [("16", "17"), ("16", "16"), ("1000", "1,000")])):
        milliseconds = []
        for n in range(20 * len(pairs)):
            reference, answer = pairs[n % len(pairs)]
            prompt = Prompt(uid=n, domain="math", text="", tokens=(), reference={"answer": reference})
            started = time.perf_counter()
            verify_math(prompt, rf"<think>{'x' * 40000}</think> \boxed{{{answer}}}")
            milliseconds.append(1e3 * (time.perf_counter() - started))
        milliseconds.sort()
        print(f"  {name}: median {statistics.median(milliseconds):.2f} ms, slowest {milliseconds[-1]:.1f} ms")


def main() -> None:
    words = _arguments()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    python_runs(words)
    print(f"load {os.getloadavg()[0]:.1f}")
    if not words.without_compilers:
        compiled_runs()
    answers()


if __name__ == "__main__":
    main()
