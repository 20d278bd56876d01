"""The C++ kernels' tests under AddressSanitizer: ``bash tools/proof/sanitize.sh`` (about three minutes).

Builds ``csrc`` with the sanitizer into a temporary folder and runs the native tests on that build. Needs g++.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "native",
    "routing",
    "permute",
    "token_logprob",
    "rms_norm",
    "qk_norm_rope",
    "expert_mlp",
    "decode_attention",
    "sample_token",
]
FOLDER = os.environ.get("MEGATRON_RING_SANITIZED")

if FOLDER:
    # as a pytest plugin (-p): the sanitized build is found before the installed one
    import megatron_ring

    megatron_ring.__path__.insert(0, FOLDER)


def build(folder: str) -> None:
    from torch.utils.cpp_extension import load

    flags = ["-O1", "-g", "-fopenmp", "-fno-omit-frame-pointer", "-fsanitize=address"]
    load(
        name="_C",
        sources=sorted(str(path) for path in (ROOT / "csrc").glob("*.cpp")),
        extra_cflags=flags,
        extra_ldflags=["-fopenmp", "-fsanitize=address"],
        build_directory=folder,
        is_python_module=False,
        is_standalone=False,
        verbose=True,
    )


def main() -> int:
    # libstdc++ too, or the sanitizer finds no __cxa_throw to call
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    preload = {
        "LD_PRELOAD": " ".join(libraries),
        # Python leaks on purpose; the threads of OpenMP outlive the process's end
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **preload, "MEGATRON_RING_SANITIZED": folder}
        builder = [
            sys.executable,
            "-c",
            f"from tools.proof import sanitize; sanitize.build({folder!r})",
        ]
        subprocess.run(builder, cwd=ROOT, env=environment, check=True)
        tests = [f"tests/kernels/test_{name}.py" for name in FILES]
        options = ["-q", "-p", "no:cacheprovider", "-p", "tools.proof.sanitize"]
        selection = ["-k", "native and not interpreter and not ranks and not narrow"]
        command = [sys.executable, "-m", "pytest", *options, *tests, *selection]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
