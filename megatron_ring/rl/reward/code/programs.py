"""Build a program for the sandbox from a solution's source. C++ and Java are compiled in the sandbox, too."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.job import CodeJob
from megatron_ring.rl.reward.sandbox.command import Limits, Program, find_tool
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
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
"""Limits of a compiler. The compiled program is its standard output."""

# compiler messages go to stderr, the compiled program to stdout
_CXX = "{cxx} -std=c++20 -O2 -pipe -DONLINE_JUDGE -o /tmp/program /code/main.cpp 1>&2 && cat /tmp/program"
_CXX_RUN = "ulimit -S -s {stack_kb} && exec /code/program"
_JAVAC = (
    "{javac} -J-Xmx512m -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -nowarn -encoding UTF-8 -d /tmp/out {path} 1>&2 "
    "&& {python} -I -S /code/pack.py /tmp/out /tmp/program.jar {name} 1>&2 && cat /tmp/program.jar"
)
_JVM_MB = 160
"""Memory that an idle JVM uses beside its heap, stacks included."""
# comments, string and character literals, which may contain text that looks like code; an unclosed one ends as well, or
# the search would start again at every quotation mark
_JAVA_QUOTED = re.compile(
    r'//[^\n]*|/\*.*?(?:\*/|\Z)|"""(?:\\.|[^\\])*?(?:"""|\\?\Z)|"(?:\\.|[^"\\\n])*+"?|\'(?:\\.|[^\'\\\n])*+\'?',
    re.DOTALL,
)
_JAVA_WORD = re.compile(r"[^\W\d][\w$]*+|[{}();]")
_JAVA_KINDS = frozenset({"class", "interface", "enum", "record"})
_UNIT_TEST_FILES = (
    "harness_wire",
    "harness_server",
    "harness_proxies",
    "harness_client",
    "harness_test",
    "harness_pytest",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A program that is ready to run, and its limits, adapted to the language."""

    program: Program
    limits: Limits


def check_language(language: str, mode: str) -> None:
    """Raises RewardError for a language or mode that is not supported."""
    if mode not in (("stdin", "function", "unit_test") if language == "python" else ("stdin",)) or (
        language not in ("python", "cpp", "java")
    ):
        raise RewardError(
            f"code of language={language}, mode={mode} cannot be verified; python takes stdin, function and unit_test, "
            "cpp and java take stdin"
        )


def build(sandbox: Sandbox, job: CodeJob, limits: Limits) -> Built | RewardResult:
    """The program, or the RewardResult of a source that is too long or does not compile."""
    if len(job.source) > MAX_SOURCE_BYTES:
        return _compile_error(
            f"a source of {len(job.source)} characters; at most {MAX_SOURCE_BYTES} are taken"
        )
    if job.language != "python":
        return (_build_cpp if job.language == "cpp" else _build_java)(sandbox, job.source, limits)
    files = {"/code/solution.py": job.source.encode(errors="surrogateescape")}
    if job.prompt and job.mode != "stdin":
        files["/code/prompt.py"] = job.prompt.encode(errors="surrogateescape")
    if job.mode == "unit_test":
        files |= {f"/code/{name}.py": _inside(name).encode() for name in _UNIT_TEST_FILES}
        # the test runs in its own process
        limits = dataclasses.replace(limits, processes=limits.processes + 1)
    return Built(program=sandbox.python(_inside("python_harness"), job.mode, files=files), limits=limits)


def _build_cpp(sandbox: Sandbox, source: str, limits: Limits) -> Built | RewardResult:
    cxx = find_tool("g++", "C++ solutions", "install g++")
    binary = _compile(sandbox, _CXX.format(cxx=cxx), {"/code/main.cpp": source}, COMPILE)
    if isinstance(binary, RewardResult):
        return binary
    # the stack may take half of the memory
    script = _CXX_RUN.format(stack_kb=limits.memory_mb << 9)
    argv = (find_tool("sh", "C++ solutions", "install a POSIX shell"), "-c", script)
    return Built(program=Program(argv=argv, files={"/code/program": binary}), limits=limits)


def _build_java(sandbox: Sandbox, source: str, limits: Limits) -> Built | RewardResult:
    java = find_tool("java", "Java solutions", "install openjdk-17-jdk-headless")
    javac = find_tool("javac", "Java solutions", "install openjdk-17-jdk-headless")
    python = find_tool("python3", "Java solutions", "install the system's python3")
    name = java_file_name(source)
    path = f"/code/{name}.java"
    script = _JAVAC.format(javac=javac, path=path, python=python, name=name)
    # a JVM reserves far more address space than it uses
    compile_limits = dataclasses.replace(COMPILE, address_space=False)
    jar = _compile(sandbox, script, {path: source, "/code/pack.py": _inside("java_pack")}, compile_limits)
    if isinstance(jar, RewardResult):
        return jar
    heap = f"-Xmx{max(limits.memory_mb // 2, limits.memory_mb - _JVM_MB)}m"
    flags = (
        "-DONLINE_JUDGE=true",
        "-Xss64m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Xshare:auto",
        "-XX:-UsePerfData",
    )
    argv = (java, heap, *flags, "-jar", "/code/program.jar")
    return Built(
        program=Program(argv=argv, files={"/code/program.jar": jar}),
        limits=dataclasses.replace(limits, address_space=False, processes=64),
    )


def java_file_name(source: str) -> str:
    """The file name that javac requires: that of the public top-level type, or Main.

    Example: ``java_file_name("// class A\nfinal class B { public class C {} } public record D() {}") == "D"``.
    """
    depth = 0
    is_public = False
    before = ""
    for match in _JAVA_WORD.finditer(_JAVA_QUOTED.sub(" ", source)):
        word = match[0]
        if word in "{(":
            depth += 1
        elif word in "})":
            depth -= 1
        elif depth == 0 and before in _JAVA_KINDS and is_public and word != ";":
            return word
        if depth == 0:
            # modifiers of a type are between the end of the previous type and its own name
            is_public = word == "public" or (is_public and word not in "};")
        before = word
    return "Main"


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
def _inside(name: str) -> str:
    """The source of a file of ``inside``."""
    return (Path(__file__).parent / "inside" / f"{name}.py").read_text(encoding="utf-8")
