"""How much memory there is: of a device and of the host, in this machine or in the container it is told to keep to."""

from __future__ import annotations

import gc
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from gpmetric.errors import NO_MEMORY, OutOfMemoryError
from gpmetric.models import Model

__all__ = [
    "LEVERS", "free_device", "free_disk", "free_host", "is_out_of_memory", "out_of_memory", "resident_bytes", "retried",
]  # fmt: skip

LEVERS = "--memory with less than there is, a shorter --sequence-length, or --dtype bfloat16 take less"

Result = TypeVar("Result")

_SMALLEST = 128  # tokens of a batch that is not halved again

_CONTEXT = 600 * 10**6  # what CUDA and its libraries take of a device
_GROUPS = (  # limit and use of a container's memory, by version of Linux's control groups
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_host() -> int:
    """Bytes of memory that this process may have in all, its present ones included; those of caches count as free."""
    free = resident_bytes() + _available()
    for limit, used in _GROUPS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            others = max(0, int(Path(used).read_text()) - _cached(Path(used).parent) - resident_bytes())
            free = min(free, int(Path(limit).read_text()) - others)
    return free


def _cached(group: Path) -> int:
    """Bytes of files that a container's memory counts, which go when they are needed."""
    with suppress(OSError, StopIteration):
        lines = (group / "memory.stat").read_text().splitlines()
        return int(
            next(line for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))).split()[1]
        )
    return 0


def free_device(device: torch.device) -> int:
    """Bytes of memory that a command may have on a device, the libraries' own included."""
    if device.type != "cuda":
        return free_host()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device)


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def resident_bytes(device: torch.device | None = None) -> int:
    """Bytes that the process has by now in memory, or on a device: mostly libraries before a model is run."""
    if device is not None and device.type == "cuda":
        return _CONTEXT
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host has no memory left."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in told for words in NO_MEMORY)
    )


def retried(model: Model, function: Callable[[], Result], forget: Callable[[], object] = lambda: None) -> Result:
    """What a function gives; where there is no memory for it, again with half the batch, as long as one can be halved.

    Args:
        model: whose batches are halved.
        function: that needs memory.
        forget: lets go of what was made for larger batches.

    Raises:
        OutOfMemoryError: there is none for the smallest batches either.
    """
    while True:
        try:
            return function()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = error.with_traceback(None)  # whose frames hold tensors
        forget()
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if model.placement is None or model.placement.batch_tokens <= _SMALLEST:
            raise out_of_memory(reason)
        model.placement.batch_tokens //= 2


def out_of_memory(error: BaseException) -> OutOfMemoryError:
    """What is told of an exception that says so, in one line."""
    on_device = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    place = "the device" if on_device else "this machine"
    reason = " ".join(str(error).split())[:100]
    return OutOfMemoryError(f"{place} is out of memory ({reason}): {LEVERS}")


def _available() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return 8 * 10**9  # where the system does not tell
