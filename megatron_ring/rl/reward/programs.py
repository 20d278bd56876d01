"""From a solution's source to a program for the sandbox: Python as it is, C++ and Java compiled, inside too."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox import Sandbox
from megatron_ring.rl.reward.sandbox_command import Limits, Program, find_tool
from megatron_ring.rl.types import RewardResult

MAX_SOURCE_BYTES = 1 << 20
COMPILE = Limits(
    seconds=30.0,
    memory_mb=2048,
    output_bytes=64 << 20,
    file_bytes=64 << 20,
    tmp_bytes=256 << 20,
    processes=64,
)
"""A compiled program leaves the sandbox as its standard output."""

# the assembler and the linker are found beside the compiler; messages go to stderr, the program to stdout
_CXX = "{cxx} -std=c++17 -O2 -pipe -o /tmp/program /code/main.cpp 1>&2 && cat /tmp/program"
_JAVAC = (
    "{javac} -J-Xmx512m -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -nowarn -encoding UTF-8 -d /tmp/out {path} 1>&2 "
    "&& cd /tmp/out && {python} -I -S -m zipfile -c /tmp/program.jar ./* 1>&2 && cat /tmp/program.jar"
)
_JAVA_MAIN = re.compile(r"\bstatic\s+(?:final\s+)?void\s+main\b")
_JAVA_CLASS = re.compile(r"\b(public\s+)?(?:(?:final|abstract|strictfp)\s+)*class\s+([A-Za-z_$][\w$]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A program that is ready to run, and the limits its language needs."""

    program: Program
    limits: Limits


def build(sandbox: Sandbox, language: str, mode: str, source: str, limits: Limits, seconds: float):
    """``Built``, or the RewardResult of a source that is too long or does not compile.

    ``seconds`` bounds the compiler. Raises RewardError for a language or mode that does not exist here.
    """
    if len(source) > MAX_SOURCE_BYTES:
        return _compile_error(f"a source of {len(source)} characters; at most {MAX_SOURCE_BYTES} are taken")
    if language == "python" and mode in ("stdin", "function", "unit_test"):
        data = source.encode(errors="surrogateescape")
        program = sandbox.python(_harness(), mode, files={"/code/solution.py": data})
        return Built(program=program, limits=limits)
    if mode != "stdin" or language not in ("cpp", "java"):
        raise RewardError(
            f"code of language={language}, mode={mode} cannot be judged; python takes stdin, function and unit_test, "
            "cpp and java take stdin"
        )
    make = _build_cpp if language == "cpp" else _build_java
    return make(sandbox, source, limits, dataclasses.replace(COMPILE, seconds=min(seconds, COMPILE.seconds)))


def _build_cpp(sandbox: Sandbox, source: str, limits: Limits, compile_limits: Limits) -> Built | RewardResult:
    cxx = find_tool("g++", "C++ solutions", "install g++")
    script = _CXX.format(cxx=cxx)
    binary = _compile(sandbox, script, {"/code/main.cpp": source}, compile_limits)
    if isinstance(binary, RewardResult):
        return binary
    return Built(program=Program(argv=("/code/program",), files={"/code/program": binary}), limits=limits)


def _build_java(
    sandbox: Sandbox, source: str, limits: Limits, compile_limits: Limits
) -> Built | RewardResult:
    java = find_tool("java", "Java solutions", "install openjdk-17-jdk-headless")
    javac = find_tool("javac", "Java solutions", "install openjdk-17-jdk-headless")
    classes = list(_JAVA_CLASS.finditer(source))
    if not classes:
        return _compile_error("no class")
    public = next((found[2] for found in classes if found[1]), "Main")
    entry = _JAVA_MAIN.search(source)
    before = [found[2] for found in classes if entry is None or found.start() < entry.start()]
    main = before[-1] if before else public
    path = f"/code/{public}.java"
    python = find_tool("python3", "Java solutions", "install the system's python3")
    script = _JAVAC.format(javac=javac, path=path, python=python)
    # a JVM reserves far more address space than it uses
    jar = _compile(sandbox, script, {path: source}, dataclasses.replace(compile_limits, address_space=False))
    if isinstance(jar, RewardResult):
        return jar
    heap = f"-Xmx{max(16, limits.memory_mb // 2)}m"
    flags = ("-Xss64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:-UsePerfData")
    argv = (java, heap, *flags, "-cp", "/code/program.jar", main)
    return Built(
        program=Program(argv=argv, files={"/code/program.jar": jar}),
        limits=dataclasses.replace(limits, address_space=False, processes=64),
    )


def _compile(sandbox: Sandbox, script: str, sources: dict[str, str], limits: Limits) -> bytes | RewardResult:
    files = {path: source.encode(errors="surrogateescape") for path, source in sources.items()}
    shell = find_tool("sh", "compilers", "install a POSIX shell")
    result = sandbox.run(Program(argv=(shell, "-c", script), files=files), limits)
    if result.status == "ok" and result.stdout:
        return result.stdout
    said = result.stderr.decode(errors="replace").strip()
    return _compile_error(
        said if result.status in ("ok", "crashed") else f"compiler: {result.status}; {said}"
    )


def _compile_error(detail: str) -> RewardResult:
    return RewardResult(score=0.0, status="compile_error", detail=" ".join(detail.split())[:300])


@functools.cache
def _harness() -> str:
    return Path(__file__).with_name("python_harness.py").read_text(encoding="utf-8")
