"""bfloat16 matrix products on processors without bfloat16 instructions: computed in fp32 and rounded once."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator

import torch

from megatron_ring.kernels import dispatch

log = logging.getLogger("megatron_ring")


def has_bf16_products() -> bool:
    """Are torch's own bfloat16 products fast here? oneDNN has code for them with AVX-512 and on Arm."""
    return (
        platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """Have torch's ``mm``, ``bmm`` and ``addmm`` of bfloat16 matrices on the CPU run in fp32 for the ``with`` block.

    No effect if the processor has bfloat16 instructions. Elsewhere about ten times faster and no less accurate: both
    operands are converted, and the fp32 result is rounded once. Needs the C++ extension; logs which path is used.
    """
    if has_bf16_products():
        yield
    elif not dispatch.native_is_available():
        log.warning(
            "this processor has no bfloat16 products and the C++ kernels are not built: bf16 is about ten times "
            "slower than fp32; build them, or set --no-bf16"
        )
        yield
    else:
        log.info("this processor has no bfloat16 products: they run in fp32 and are rounded once")
        torch.ops.megatron_ring.use_wide_products(True)
        try:
            yield
        finally:
            torch.ops.megatron_ring.use_wide_products(False)
