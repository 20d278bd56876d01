"""Code is right when every test passes, in each language and mode."""

from __future__ import annotations

import shutil

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.programs import java_file_name
from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier
from megatron_ring.rl.reward.registry import check_reward_function
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from megatron_ring.rl.types import RewardResult
from tests.helpers.reward.judging import problem

SUMS = ({"input": "1 2\n", "output": "3"}, {"input": "5 6\n", "output": "11\n"})
SORTS = ({"input": [[3, 1, 2]], "output": [1, 2, 3]}, {"input": "[2, 1]\n", "output": "[1, 2]"})
UNITS = (
    "assert add(1, 2) == 3",
    "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(add(2, 2), 4)",
    "from solution import add\ndef test_zero(): assert add(0, 0) == 0",
)
CPP_SUM = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
JAVA_SUM = (
    "import java.util.Scanner;\nclass Helper { static int add(int a, int b) { return a + b; } }\n"
    "public class Solve { public static void main(String[] words) {\n  Scanner in = new Scanner(System.in);\n"
    "  System.out.println(Helper.add(in.nextInt(), in.nextInt()));\n} }"
)


@pytest.fixture(scope="module")
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(RewardConfig(sandbox_timeout=200.0, sandbox_memory_mb=256))


@pytest.fixture(scope="module")
def impatient(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(RewardConfig(sandbox_timeout=2.0))


def result_of(verifier: CodeVerifier, source: str, **job) -> RewardResult:
    result = verifier.verify(CodeJob(source=source, **{"tests": SUMS, **job}))
    assert result.score == float(result.status == "correct")
    assert "\n" not in result.detail
    return result


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("a, b = map(int, input().split()); print(a + b); exit()", "correct"),
        ("if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))", "correct"),
        ("print(sum(map(int, input().split())) or exit(1), end='\\n\\n')", "correct"),
        ("print(3)", "wrong"),
        ("print(3, 3)", "wrong"),
        ("pass", "wrong"),
        ("def f(:", "compile_error"),
        ("print(sys.argv)", "crashed"),
        ("raise SystemExit(3)", "crashed"),
        ("hog = [0] * (1 << 40)", "memory"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("x = 1 #" + "x" * (200 << 20), "compile_error"),
        ("(" * 100_000, "compile_error"),
        ("-" * 100_000 + "1", "compile_error"),
        (
            "def f(n): return n and 1 + f(n - 1)\nprint(sum(map(int, input().split())) + f(30000) - 30000)",
            "correct",
        ),
        (
            "from functools import cache\n@cache\ndef f(n): return n and 1 + f(n - 1)\n"
            "print(sum(map(int, input().split())) + f(20000) - 20000)",
            "correct",
        ),
        ("print(sum(map(int, input().split())) + len(str(10 ** 9999)) - 10000)", "correct"),
        ("print(Counter())", "crashed"),
        (
            "import sys, threading\nsys.setrecursionlimit(10 ** 7)\nthreading.stack_size(1 << 29)\n"
            "def f(n): return n and 1 + f(n - 1)\ndef main(): print(sum(map(int, input().split())) + f(30000) - 30000)\n"
            "thread = threading.Thread(target=main)\nthread.start()\nthread.join()",
            "correct",
        ),
        (
            "import sys\ninput = sys.stdin.buffer.readline\na, b = map(int, input().split())\n"
            "sys.stdout.buffer.write(b'%d\\n' % (a + b))",
            "correct",
        ),
    ],
)
def test_python_from_stdin(verifier: CodeVerifier, source: str, status: str):
    result = result_of(verifier, source)
    assert result.status == status, result.detail


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("class Solution:\n    def arrange(self, x: List[int]):\n        print('hi')\n        return sorted(x)", "correct"),
        ("def arrange(x): return tuple(sorted(x))", "correct"),
        ("def arrange(x): return x", "wrong"),
        ("def arrange(x): return set(x)", "wrong"),
        ("import os\nprint('[1, 2, 3]', flush=True)\nos._exit(0)", "wrong"),
        ("def other(x): return sorted(x)", "crashed"),
        ("def arrange(x): raise ValueError", "crashed"),
        ("def arrange(x: Optional[List[int]], y: ListNode = None): return nsmallest(9, x)", "correct"),
        ("import bisect\ndef arrange(x):\n    y = []\n    for n in x: bisect.insort(y, n)\n    return y", "correct"),
        ("def arrange(x):\n    y = []\n    for n in x: y.insert(bisect(y, n), n)\n    return y", "correct"),
        ("def arrange(x): return bisect.insort([], 1) or copy.copy(sorted(x))", "correct"),
        ("def arrange(x): return sorted(x) if pow(2, 10, 7) == 2 and sum(accumulate(x)) else 0", "correct"),
        ("def arrange(x):\n    f = cache(lambda n: n and f(n - 1))\n    return sorted(x) + [f(9000)][1:]", "correct"),
        ("def arrange(x): return [float(n) for n in sorted(x)]", "correct"),
        ("def arrange(x): return [str(n) for n in sorted(x)]", "wrong"),
        ("def arrange(x): return [n == 1 or n for n in sorted(x)]", "wrong"),
    ],
)  # fmt: skip
def test_python_functions(verifier: CodeVerifier, source: str, status: str):
    assert result_of(verifier, source, mode="function", function="arrange", tests=SORTS).status == status


@pytest.mark.parametrize(
    ("source", "status", "test"),
    [
        ("def add(a, b): return a + b", "correct", ""),
        ("def add(a, b): return 3", "wrong", "test 2 of 3"),
        ("def add(a, b): return a + b or 1", "wrong", "test 3 of 3"),
        ("import os; os._exit(0)", "crashed", "test 1 of 3"),
        ("raise SystemExit(0)", "crashed", "test 1 of 3"),
        ("def add(a, b): exit()", "crashed", "test 1 of 3"),
        ("def other(): pass", "crashed", "test 1 of 3"),
    ],
)
def test_python_unit_tests(verifier: CodeVerifier, source: str, status: str, test: str):
    result = result_of(verifier, source, mode="unit_test", tests=UNITS)
    assert (result.status, result.detail[: len(test)]) == (status, test)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
@pytest.mark.parametrize(
    ("source", "status"),
    [
        (CPP_SUM, "correct"),
        (CPP_SUM.replace("+ b", "- b"), "wrong"),
        ("int main() {", "compile_error"),
        ('#include "/etc/shadow"\nint main() {}', "compile_error"),
        ("int main() { int *nothing = 0; *nothing = 1; }", "crashed"),
        (
            '#include <bits/stdc++.h>\n#pragma GCC optimize("O3")\nusing namespace std;\nint main() {\n'
            "  vector<int> v(istream_iterator<int>(cin), {}); cout << ranges::count_if(v, [](auto) { return true; }) - 2\n"
            '  + accumulate(v.begin(), v.end(), 0) << "\\n"; }',
            "correct",
        ),
        (
            "#include <iostream>\nint deep(int n) {\n"
            "  volatile char room[64]; room[0] = 0; return n ? 1 + deep(n - 1) + room[0] : 0; }\n"
            "int main() { int a, b; std::cin >> a >> b; std::cout << deep(500000) - 500000 + a + b; }",
            "correct",
        ),
        ("#include <vector>\nint main() { return std::vector<char>(10ull << 30, 1)[5]; }", "memory"),
    ],
)
def test_cpp(verifier: CodeVerifier, source: str, status: str):
    result = result_of(verifier, source, language="cpp")
    assert result.status == status, result.detail


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_program_is_told_that_this_is_a_judge(verifier: CodeVerifier):
    """Without the word that contest judges define, many read input.txt instead."""
    source = f'#ifndef ONLINE_JUDGE\n#error "would call freopen"\n#endif\n{CPP_SUM}'
    assert result_of(verifier, source, language="cpp").status == "correct"


@pytest.mark.skipif(shutil.which("javac") is None, reason="no javac on this machine")
def test_java_has_all_its_memory_but_what_the_machine_itself_needs(impatient: CodeVerifier):
    """Of 512 MB an array of 200 MB and what a JVM needs."""
    source = (
        "class Main { public static void main(String[] w) { int[] held = new int[50_000_000]; held[7] = 7;\n"
        'System.out.println(held[7] + System.getProperty("ONLINE_JUDGE")); } }'
    )
    job = CodeJob(source=source, language="java", tests=({"input": "", "output": "7true"},))
    assert impatient.verify(job).status == "correct"


@pytest.mark.parametrize(
    "head",
    ["public @Deprecated final class", '@SuppressWarnings("all") public class', "public @java.lang.Deprecated class",
     'public @SuppressWarnings({"a", "b"}) class', "final public class", "public @Deprecated() record",
     "@FunctionalInterface public interface", "public @interface"],
)  # fmt: skip
def test_an_annotation_hides_no_public_type(head: str):
    assert java_file_name(f"class Other {{}}\n{head} Sol {{ }}") == "Sol"


@pytest.mark.parametrize("junk", ["static ", "public ", '"\\', "'\\", '"""\\', "\\", "@a(", "/*", "class "])
def test_the_public_type_is_found_in_one_pass(junk: str):
    """Words and marks that each began a search of their own took minutes, backslashes in a text for ever."""
    junk *= (1 << 20) // len(junk)
    assert java_file_name(f"public class Sol {{ }}\n{junk}") == "Sol"
    java_file_name(f'class Sol {{ }}\n"""{junk}')
    java_file_name(junk)


@pytest.mark.skipif(shutil.which("javac") is None, reason="no javac on this machine")
@pytest.mark.parametrize(
    ("source", "status"),
    [
        (JAVA_SUM, "correct"),
        (JAVA_SUM.replace("a + b", "a - b"), "wrong"),
        ("package a.b;\nimport java.util.*;\n/* public class No {} */\n"
         "record Two(int a, int b) { int sum() { return a + b; } }\nsealed interface I permits J {}\n"
         "final class J implements I { String s = \"public class X { static void main\"; }\n"
         "public enum Start { ONLY; public static class Inner { static void main() {} }\n"
         "  public static final void main(final String... w) { Scanner in = new Scanner(System.in);\n"
         "  System.out.println(new Two(in.nextInt(), in.nextInt()).sum()); } }", "correct"),
        ("class A { static class B { public static void main(String[] w) {\n  var in = new java.util.Scanner(System.in);\n"
         "  System.out.println(in.nextInt() + in.nextInt()); } } void main() {} }", "correct"),
        ("record Main(int a, int b) { public static void main(String[] w) { var in = new java.util.Scanner(System.in);\n"
         "  var x = new Main(in.nextInt(), in.nextInt()); System.out.println(x.a() + x.b()); } }", "correct"),
        ("interface Main { static void main(String[] w) { var in = new java.util.Scanner(System.in);\n"
         "  System.out.println(in.nextInt() + in.nextInt()); } }", "correct"),
        ("class Main { void main(String[] w) {} static int main(String w) { return 1; } }", "compile_error"),
        ("class Main { int x = ; }", "compile_error"),
        ("class Main { public static void main(String[] w) { long[][] x = new long[999][];"
         " for (int i = 0; i < 999; i++) x[i] = new long[9999999]; } }", "memory"),
    ],
)  # fmt: skip
def test_java(verifier: CodeVerifier, source: str, status: str):
    result = result_of(verifier, source, language="java")
    assert result.status == status, result.detail


@pytest.mark.parametrize(
    ("language", "source"),
    [("python", "input()\nwhile True: pass"), ("cpp", "int main() { for (volatile int i = 0;; i = 1); }")],
)
def test_endless_solutions_time_out(impatient: CodeVerifier, language: str, source: str):
    assert result_of(impatient, source, language=language).status == "timeout"


def test_every_test_has_its_own_limit(sandbox: Sandbox):
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=60.0, reward_timeout=0.5))
    source = "import time\ntime.sleep(0.2)\nprint(1)"
    assert result_of(verifier, source, tests=({"input": "", "output": "1"},) * 5).status == "correct"


def test_a_batch_keeps_its_order(verifier: CodeVerifier):
    jobs = [
        CodeJob(source=f"import time; time.sleep({0.2 if n == 0 else 0}); print({n})",
                tests=({"input": "", "output": str(n - n % 2)},))
        for n in range(8)
    ]  # fmt: skip
    assert [r.status for r in verifier.run_batch(jobs, workers=2)] == ["correct", "wrong"] * 4


def test_the_block_that_is_the_solution_is_judged(verifier: CodeVerifier):
    prompt = problem("code", language="python", mode="stdin", tests=list(SUMS))
    good, bad = "```python\nprint(sum(map(int, input().split())))\n```\n", "```python\nprint(0)\n```\n"
    assert verifier(prompt, bad + "Or:\n" + good).status == "correct"
    assert verifier(prompt, good + bad).status == "wrong"
    assert verifier(prompt, good + "Output:\n```\n3\n```\n").status == "correct"
    assert verifier(prompt, "1. So:\n   " + good.replace("\n", "\n   ")).status == "correct"
    assert verifier(prompt, "print(3)").status == "parse_error"
    assert verifier(problem("code", tests=[]), good).status == "verifier_error"
    check_reward_function(verifier, prompt)


def test_the_block_of_a_unit_test_defines_what_it_uses(verifier: CodeVerifier):
    prompt = problem("code", mode="unit_test", tests=list(UNITS))
    good = "```python\ndef add(a, b): return a + b\n```\n"
    assert verifier(prompt, good + "Use:\n```python\nprint(add(1, 2))\n```").status == "correct"


def test_what_cannot_be_judged_is_an_error_in_one_line(verifier: CodeVerifier):
    for language, mode in [("rust", "stdin"), ("cpp", "function"), ("python", "essay")]:
        with pytest.raises(
            RewardError, match=f"language={language}, mode={mode} cannot be verified; python takes"
        ):
            verifier.verify(CodeJob(source="x", tests=SUMS, language=language, mode=mode))
    with pytest.raises(ValueError, match="without tests"):
        CodeJob.of({"tests": []}, "print(1)")
