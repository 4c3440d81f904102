"""Read free memory, set what glibc's allocator does with freed memory, and recognise errors of allocations."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

from philora.runtime.process_state import is_run

logger = logging.getLogger(__name__)

# glibc's mallopt(3): blocks above the first threshold are mapped separately; free memory at the end of the heap above
# the second, which is an int in C, is returned.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
# Parts of the messages of PyTorch's other allocators, of oneDNN and of CUDA's libraries (cuBLAS, cuDNN) about
# allocations that failed.
_REFUSALS = (
    "DefaultCPUAllocator: can't allocate memory",
    "out of memory",
    "bad_alloc",
    "could not create a memory",
    "STATUS_ALLOC_FAILED",
)
_LARGEST_BLOCK, _MOST_FREE = 1 << 30, (1 << 31) - 1
_LARGE_BLOCK = 1 << 20


def keep_freed_memory() -> bool:
    """Make glibc's allocator, which torch's tensors on a CPU use, keep freed blocks of up to 1 GiB.

    By default a block above 32 MiB is returned to the system when it is freed. For the next tensor of that size the
    system clears the pages again, with a fault per page, which costs several times an element-wise operation. The peak
    does not change; between steps the process keeps the memory. Nothing is set with `PHILORA_FUSED=0`, with an
    allocator chosen in the environment (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`), or outside a run
    (`process_state`), because the setting applies to the process until it ends.

    Returns:
        Whether the setting is on now.
    """
    return _set(_LARGEST_BLOCK, _MOST_FREE)


def return_large_blocks() -> bool:
    """Make glibc's allocator map blocks of 1 MiB and more separately, and return them when they are freed.

    If every product over a quantised base allocates a matrix, these alternate in one heap with activations that are
    kept. The holes are too small for the next matrix, so the process grows by half over the steps. Separate mappings
    avoid this, at the cost of page faults in every step.

    Returns:
        Whether the setting is on now; conditions as in `keep_freed_memory`.
    """
    return _set(_LARGE_BLOCK, _LARGE_BLOCK)


def return_freed_memory() -> None:
    """Make glibc's allocator on Linux return the free memory of its heap once, after a phase that needed more."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    off = chosen or os.environ.get("PHILORA_FUSED") == "0" or not is_run()
    if off or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    if not (mallopt(_M_MMAP_THRESHOLD, mmap_threshold) and mallopt(_M_TRIM_THRESHOLD, trim_threshold)):
        return False
    _log_once(mmap_threshold)
    return True


@cache
def _log_once(mmap_threshold: int) -> None:
    what = "keeps freed memory for reuse" if mmap_threshold == _LARGEST_BLOCK else "returns large blocks when freed"
    logger.info("memory: this process %s (set MALLOC_ARENA_MAX, or another malloc variable, to prevent it)", what)


def available_bytes(device: str) -> int:
    """Return the memory that a run in this process can have, on an accelerator or (`cpu`) on this machine.

    On a CPU this is `free_bytes` plus the memory of this process, which includes a run's libraries.
    """
    if device == "cpu":
        return free_bytes(device) + int(psutil.Process().memory_info().rss)
    return free_bytes(device) + (int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0)


def free_bytes(device: str) -> int:
    """Return the free memory of an accelerator or (`cpu`) of this machine.

    On a CPU this is what the system can give, within the limits of the control group and of the process (`ulimit -v`,
    `ulimit -d`). Unused pages of files count as free.
    """
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return min([int(psutil.virtual_memory().available), *_group_bytes(), *_limit_bytes()])


def _group_bytes() -> list[int]:
    """Return the free bytes within the limit of this process's control group, in a list that is empty without one."""
    for limit, used, pages in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most, now = ((root / item).read_text(encoding="ascii").strip() for item in (limit, used))
            lines = (root / limit).with_name("memory.stat").read_text(encoding="ascii").split("\n")
        except OSError:
            continue
        if most.isdigit():
            reclaimable = next((int(line.split()[1]) for line in lines if line.startswith(f"{pages} ")), 0)
            return [max(0, int(most) - int(now) + reclaimable)]
    return []


def _limit_bytes() -> list[int]:
    """Return the free bytes within the limits of this process on addresses (`ulimit -v`) and data (`ulimit -d`)."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    held = psutil.Process().memory_info()
    found = []
    for name, used in (("RLIMIT_AS", held.vms), ("RLIMIT_DATA", getattr(held, "data", held.rss))):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            found.append(max(0, limit - int(used)))
    return found


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: by a GPU's allocator, by PyTorch's on a CPU, or by C's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(refusal in str(error) for refusal in _REFUSALS)
