"""Checks of the machine: interpreter, cores, memory, PyTorch, GPU."""

import os
import platform
import sys
import warnings
from pathlib import Path

from kvstore_service.doctor.finding import Finding, missing, present

_CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def python() -> Finding:
    return present(f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}")


def cpu_and_memory() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP_MEMORY_LIMIT.exists() and (limit := _CGROUP_MEMORY_LIMIT.read_text().strip()) != "max":
        memory_bytes = min(memory_bytes, int(limit))
    return present(f"{cores} cores, {memory_bytes / 2**30:.1f} GiB, {platform.machine()}")


def torch() -> Finding:
    import torch

    return present(f"{torch.__version__}, {torch.get_num_threads()} threads")


def cuda() -> Finding:
    import torch

    # torch warns when a driver does not work, and gives the reason.
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return present(f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if torch.version.cuda is None:
        return missing(
            f"PyTorch {torch.__version__} is a build without CUDA",
            "Models run on the CPU. For a GPU install a CUDA build of PyTorch.",
        )
    reason = "; ".join(str(complaint.message) for complaint in complaints) or "PyTorch finds no GPU"
    return missing(reason, "Models run on the CPU. For a GPU check its driver with nvidia-smi.")
