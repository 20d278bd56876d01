"""The parts of the check on a GPU, rehearsed at small sizes on what is here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_ring
from tests.helpers.paths import python_path
from tools.gpu import parts
from tools.gpu.results import Results

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "import sys; sys.path[:0] = [{0!r}, sys.argv.pop()]; import parts; sys.argv[1:] = ['package']; parts.main()"
MARKED = """
import os, sys
__version__ = "9.9.9"
with open(os.environ["RING_MARK"], "a") as mark:
    print(sys.argv[0], file=mark)
"""
"""The package's __init__ that writes down who imports it."""


@pytest.mark.parametrize(
    ("part", "words", "least", "device"),
    [
        pytest.param("right-small", ["right.py", "--small"], 100, "cpu", marks=pytest.mark.slow),
        ("right-small", ["rehearse.py", "right.py", "--small"], 100, "pretended H100"),
        pytest.param("fast", ["fast.py", "--tiny"], 75, "cpu", marks=pytest.mark.slow),
        pytest.param(
            "fast", ["rehearse.py", "fast.py", "--tiny"], 75, "pretended H100", marks=pytest.mark.slow
        ),
    ],
)
def test_a_part_finds_nothing_wrong_and_leaves_its_rows(
    part: str, words: list[str], least: int, device: str, tmp_path: Path
):
    """On the CPU, and along a GPU's path, where tensors of two devices would raise."""
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    first, *more = words[:-1], words[-1]
    done = subprocess.run(
        [sys.executable, f"tools/gpu/{first[0]}", *first[1:], str(tmp_path), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["bad"] == [] and len(found["rows"]) >= least
    assert found["where"]["torch"] == torch.__version__ and found["where"]["device"] == device
    assert not [row for row in found["rows"] if "failed" in row]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_whole_check_runs_at_tiny_sizes_and_writes_its_page(tmp_path: Path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "RING_GPU_CHECK": "tiny", "OMP_NUM_THREADS": "1"}
    # a busy machine is not a failure
    environment["RING_GPU_CHECK_LIMIT"] = "400"
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for part in ("compile", "same", "right-small", "pretrain", "fast", "rl", "tests"):
        found = json.loads((out / f"{part}.json").read_text())
        assert found["bad"] == [] and found["rows"], part
    table = (out / "table.md").read_text()
    assert "| grouped GEMM forward" in table and "| a C3PO step |" in table
    assert "What is wrong" not in (out / "page.html").read_text()


def test_the_page_names_what_is_wrong_and_escapes_it(tmp_path: Path):
    results = Results(tmp_path, "right")
    results.wrong("<op>: relative error 1")
    done = subprocess.run(
        [sys.executable, "tools/gpu/page.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert done.returncode == 1
    assert "&lt;op&gt;: relative error 1" in (tmp_path / "page.html").read_text()
    assert "| right | 0 rows, 1 wrong, 0 s | wrong |" in (tmp_path / "table.md").read_text()


def test_without_a_gpu_one_line_says_how_to_rehearse(tmp_path: Path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "RING_GPU_CHECK": ""}
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no GPU here; RING_GPU_CHECK=tiny")


@pytest.mark.parametrize(
    ("words", "tiny", "said"),
    [
        (["OUT", "rigth"], "tiny", "'rigth' is no part"),
        (["right", "fast"], "tiny", "OUT=right is the name of a part"),
        (["OUT", "page right"], "tiny", "'page right' is no part"),
        (["OUT"], "Tiny", "RING_GPU_CHECK=Tiny must be tiny"),
        (["--tiny"], "tiny", "--tiny is no word of this script"),
        (["OUT/file/under"], "tiny", "cannot be written (Not a directory); name a folder that can"),
    ],
)
def test_a_check_that_would_check_nothing_is_refused(words: list[str], tiny: str, said: str, tmp_path: Path):
    (tmp_path / "file").touch()
    words = [word.replace("OUT/file", f"{tmp_path}/file") for word in words]
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    done = _check(words, tiny, sys.executable)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTHON": "/no/python"}, "there is no /no/python here; name a Python in PYTHON"),
        ({"RING_GPU_CHECK_LIMIT": "2m"}, "RING_GPU_CHECK_LIMIT=2m must be a whole number of seconds"),
        ({"RING_GPU_CHECK_LIMIT": "0"}, "RING_GPU_CHECK_LIMIT=0 must be a whole number of seconds"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(environment: dict[str, str], said: str, tmp_path: Path):
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "out", "page"]
    environment = {**os.environ, "PYTHON": sys.executable, "RING_GPU_CHECK": "tiny", **environment}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_are_where_the_user_stands_and_one_check_at_a_time_writes_there(tmp_path: Path):
    out = tmp_path / "a b"
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "a b", "fast", "page"]
    python = _python(tmp_path, 'case "$*" in *fast.py*) echo begun; sleep 299 ;; esac')
    environment = {**os.environ, "PYTHON": python, "RING_GPU_CHECK": "tiny"}
    words = {"cwd": tmp_path, "env": environment, "text": True, "stderr": subprocess.PIPE}
    # a group of its own, as a terminal's, which Ctrl-C reaches
    first = subprocess.Popen(command, **words, stdout=subprocess.PIPE, start_new_session=True)
    try:
        while "begun" not in first.stdout.readline():
            assert first.poll() is None
        second = subprocess.run(command, **words, timeout=60)
        assert second.returncode == 2 and "error: another check writes into OUT=" in second.stderr
        os.killpg(first.pid, signal.SIGINT)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130
    assert said == f"== stopped in the midst of fast; what was found so far is in {out}\n"
    assert (out / "fast.log").read_text() == "begun\n"


def test_a_part_that_dies_early_shows_nothing_of_an_earlier_run_and_its_end_in_words(tmp_path: Path):
    out, python = (
        tmp_path / "out",
        _python(tmp_path, 'case "$*" in *fast.py*) echo "no luck"; exit 3 ;; esac'),
    )
    out.mkdir()
    (out / "fast.json").write_text('{"bad": [], "rows": [1]}')
    (out / "rl.json").write_text('{"bad": [], "rows": [1], "seconds": 1, "where": {"device": "x"}}')
    done = _check([str(out), "fast", "page"], "tiny", python)
    assert done.returncode == 1 and "failed: fast (exit code 3)" in done.stdout, done.stdout + done.stderr
    (said,) = json.loads((out / "fast.json").read_text())["bad"]
    assert re.fullmatch(r"ended with exit code 3 after \d+ s; the last it said: no luck", said)
    page = (out / "page.html").read_text()
    assert said in page and page.index("fast") < page.index("1 rows, 0 wrong, 1 s")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sleep 300", "took longer than 1 s and was ended; the last it said: first"),
        pytest.param(
            "trap '' INT; sleep 300",
            "took longer than 1 s and was ended; the last it said: first",
            marks=pytest.mark.slow,
        ),
        ("kill -KILL $$", "was ended by SIGKILL after N s: out of memory?; the last it said: first"),
        ("true", "ended well and left no results"),
    ],
)
def test_how_a_part_ended_is_said_in_words_and_nothing_of_it_is_left(code: str, said: str, tmp_path: Path):
    mark = tmp_path / "child"
    python = _python(
        tmp_path, f'case "$*" in *fast.py*) echo first; sleep 299 & echo $! > {mark}; {code}; exit 0 ;; esac'
    )
    done = _check([str(tmp_path / "out"), "fast"], "tiny", python, limit="1" if "took" in said else "60")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = json.loads((tmp_path / "out" / "fast.json").read_text())["bad"]
    assert re.sub(r"after \d+ s", "after N s", line) == said
    assert _is_gone(int(mark.read_text()))


def test_what_a_part_found_stays_when_it_is_ended(tmp_path: Path):
    results = Results(tmp_path, "right")
    results.row(name="c", error=1.0)
    results.wrong("c: wrong")
    (tmp_path / "where.json").write_text(json.dumps({"where": {}}))
    assert parts.ended(tmp_path, "right", 1, 9, 60)["bad"] == ["c: wrong"]
    assert parts.ended(tmp_path, "right", 137, 60, 60)["bad"] == [
        "c: wrong",
        "took longer than 60 s and was ended; the last it said: nothing",
    ]


@pytest.mark.parametrize(
    ("log", "status", "bad"),
    [
        ("== ERROR SUMMARY: 0 errors\n", 0, []),
        (
            "========= Invalid __global__ read of size 2 bytes\n== ERROR SUMMARY: 3 errors\n",
            9,
            ["3 errors; the first: Invalid __global__ read of size 2 bytes"],
        ),
        ("torch\n", 9, ["ended with exit code 9 after 5 s; the last it said: torch"]),
        ("torch\n", 0, ["ended well and left no results"]),
    ],
)
def test_what_the_sanitizer_counted_is_kept(log: str, status: int, bad: list[str], tmp_path: Path):
    (tmp_path / "sanitizer.log").write_text(log)
    (tmp_path / "where.json").write_text(json.dumps({"where": {}}))
    assert parts.ended(tmp_path, "sanitizer", status, 5, 60)["bad"] == bad


@pytest.mark.parametrize(
    ("source", "said", "bad"),
    [
        (
            "def test_torch_fails(): assert 1 == 2\ndef test_torch_holds(): pass\n",
            "1 passed, 1 failed, 0 skipped",
            "test_it: test_torch_fails: assert 1 == 2",
        ),
        (
            "import pytest\n@pytest.mark.skip\ndef test_torch(): pass\n",
            "0 passed, 0 failed, 1 skipped",
            "test_it: all 1 tests were skipped",
        ),
    ],
)
def test_a_test_that_fails_and_a_file_that_tests_nothing_are_lines_of_their_part(
    source: str, said: str, bad: str, tmp_path: Path
):
    file = tmp_path / "test_it.py"
    file.write_text(source)
    done = subprocess.run(
        [sys.executable, "tools/gpu/kernel_tests.py", str(tmp_path), str(file), "--tiny"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "tests.json").read_text())
    assert done.returncode == 1 and found["said"] == said and found["bad"] == [bad]


@pytest.mark.slow
@pytest.mark.parametrize("found", ["checkout", "installed", "another checkout"])
def test_the_package_that_is_installed_is_the_one_that_is_checked(found: str, tmp_path: Path):
    """In the parts, in what they start, in pytest, and beside packages that take the names of our folders."""
    site, out = tmp_path / "site", tmp_path / "out"
    for name in ("tools", "tests"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise ImportError('not ours')")
    if found != "checkout":
        shutil.copytree(
            ROOT / "megatron_ring", site / "megatron_ring", ignore=shutil.ignore_patterns("*.pyc")
        )
        (site / "megatron_ring" / "__init__.py").write_text(MARKED)
    if found == "another checkout":
        (site / "pyproject.toml").touch()
    environment = {**os.environ, "PYTHON": sys.executable, "RING_GPU_CHECK": "tiny", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.path.relpath(site, ROOT), "RING_MARK": str(tmp_path / "seen")}
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(out), "pretrain", "tests"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    here = "9.9.9, installed" if found == "installed" else f"{megatron_ring.__version__}, checkout"
    for part in ("pretrain", "tests"):
        assert json.loads((out / f"{part}.json").read_text())["where"]["megatron_ring"] == here
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    if found == "installed":
        seen = (tmp_path / "seen").read_text()
        assert all(word in seen for word in ("whole.py", "kernel_tests.py", "pytest/__main__.py"))
        assert notes == [
            f"note: megatron_ring 9.9.9 is installed, and this checkout has {megatron_ring.__version__}"
        ]
    else:
        assert not (tmp_path / "seen").exists()
        assert len(notes) == (found == "another checkout")


@pytest.mark.parametrize(
    ("version", "beside", "kind", "said"),
    [
        (None, "x", "checkout", ""),
        (megatron_ring.__version__, "x", "installed", ""),
        ("9.9.9", "x", "installed", "note: megatron_ring 9.9.9 is installed, and this checkout has"),
        (
            "9.9.9",
            "pyproject.toml",
            "checkout",
            "note: an editable install of another checkout is ignored",
        ),
    ],
)
def test_an_installed_package_goes_before_the_checkout(
    version: str | None, beside: str, kind: str, said: str, tmp_path: Path
):
    (tmp_path / beside).touch()
    if version is not None:
        (tmp_path / "megatron_ring").mkdir()
        (tmp_path / "megatron_ring" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    command = [sys.executable, "-I", "-S", "-c", PACKAGE.format(str(ROOT / "tools" / "gpu")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{kind}\n" and done.stderr.startswith(said) and bool(done.stderr) == bool(said)


def test_what_a_part_starts_finds_the_same_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(ROOT / "megatron_ring", tmp_path / "megatron_ring")
    (tmp_path / "megatron_ring" / "__init__.py").write_text(MARKED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RING_MARK", str(tmp_path / "seen"))
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from pathlib import Path; from tools.gpu import toy; "
    )
    code += f"toy.write_corpus(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)
    seen = (tmp_path / "seen").read_text()
    assert "train_tokenizer.py" in seen and "preprocess_data.py" in seen


def _is_gone(process: int) -> bool:
    """Also where nobody has asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _python(folder: Path, first: str) -> str:
    """An interpreter before which ``first`` runs; where it is, it does not look up, which takes seconds."""
    file = folder / "python"
    quick = """[ "$2" != where ] || { mkdir -p "$3" && echo '{"where": {"device": "x"}}' > "$3/where.json"; exit; }"""
    file.write_text(f'#!/bin/bash\n{quick}\n{first}\nexec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return str(file)


def _check(words: list[str], tiny: str, python: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": python, "RING_GPU_CHECK": tiny}
    environment |= {f"RING_GPU_CHECK_{name.upper()}": value for name, value in more.items()}
    return subprocess.run(
        ["bash", "tools/gpu_check.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
