"""The device of this process. The rest of the package calls this module instead of ``torch.cuda``.

Only this file and :mod:`megatron_ring.runtime.megatron_cpu` name ``torch.cuda``.
"""

import os

import torch


def _forced_to_cpu() -> bool:
    return os.environ.get("MEGATRON_RING_DEVICE", "").lower() == "cpu"


if _forced_to_cpu():
    # before the first check for CUDA: torch and Megatron check by themselves, and must find the same
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def has_cuda() -> bool:
    """True when tensors live on a CUDA device; ``MEGATRON_RING_DEVICE=cpu`` hides it from the whole process."""
    return not _forced_to_cpu() and torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: ``cuda:<local rank>`` after :func:`bind`, else ``cpu``."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def of_new_parameters() -> torch.device:
    """Device for a layer's new parameters: this process's, unless a ``torch.device`` block is active (meta, to count)."""
    default = torch.get_default_device()
    return device() if default.type == "cpu" else default


def bind(local_rank: int) -> torch.device:
    """Make ``local_rank``'s device the current one and return it."""
    if has_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return device()


def collective_backend() -> str:
    """``nccl`` with CUDA, else ``gloo``."""
    return "nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has finished what was queued; returns at once on the CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def warn_of_waits(on: bool) -> None:
    """Have torch warn whenever the host waits for the device (CUDA's sync debug mode); no effect on the CPU."""
    if has_cuda():
        torch.cuda.set_sync_debug_mode("warn" if on else "default")


def peak_memory_bytes() -> int:
    """Highest memory use so far: allocator peak on CUDA, resident set on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rng_state() -> dict[str, torch.Tensor]:
    """Generator states of the CPU and, with CUDA, of the device (``uint8`` tensors)."""
    state = {"cpu": torch.get_rng_state()}
    if has_cuda():
        state["device"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if has_cuda() and "device" in state:
        torch.cuda.set_rng_state(state["device"])


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """Activities for a torch profiler to record: CPU and, with CUDA, the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if has_cuda():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities
