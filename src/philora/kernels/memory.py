"""Memory that is free; freed memory on a CPU, kept for the next step or given back; and memory refused."""

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

# glibc's mallopt(3): blocks above the threshold are mapped by themselves, and memory at the end of the heap above the
# other is given back. The second is an int in C.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
# What the messages of PyTorch's other allocators, of oneDNN and of CUDA's libraries (cuBLAS, cuDNN) have in common
# where memory is refused.
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
    """Let glibc's allocator keep freed blocks of up to 1 GiB, which torch's tensors on a CPU come from.

    By default a block above 32 MiB goes back to the system when it is freed, and the system clears its pages again, one
    fault each, when the next tensor of that size is made: several times the cost of an element-wise operation. The
    peak stays what it was; between steps the memory stays with the process. `PHILORA_FUSED=0`, or an allocator chosen
    in the environment (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`), leaves everything as it is, and so does a process
    that belongs to no run (`process_state`): the setting is the whole process's, and stays.

    Returns:
        Whether it is so now.
    """
    return _set(_LARGEST_BLOCK, _MOST_FREE)


def return_large_blocks() -> bool:
    """Have glibc's allocator give freed blocks of 1 MiB and more back to the system, each by itself.

    Where every product over a quantised base allocates a matrix of its own between activations that stay, those leave
    holes in one heap that the next matrix does not fit into, and what the process holds grows from step to step to half
    as much again; a mapping of its own leaves none. It costs page faults at every step.

    Returns:
        Whether it is so now; not where an allocator was chosen, as in `keep_freed_memory`.
    """
    return _set(_LARGE_BLOCK, _LARGE_BLOCK)


def give_back_freed_memory() -> None:
    """Have glibc's allocator give what is free in its heap back to the system, once: after a phase that held more.

    Elsewhere than on Linux with glibc nothing happens.
    """
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
    _say_once(mmap_threshold)
    return True


@cache
def _say_once(mmap_threshold: int) -> None:
    what = "keeps freed memory" if mmap_threshold == _LARGEST_BLOCK else "gives large blocks back"
    logger.info("this process %s from here on; MALLOC_ARENA_MAX=... or another of malloc's variables leaves it", what)


def available_bytes(device: str) -> int:
    """Memory that a run of this process can have, of the accelerator or of this machine.

    On a CPU: `free_bytes`, and what this process holds already, since a run's runtime is among it.

    Args:
        device: `cpu`, or an accelerator's name.
    """
    if device != "cpu":
        held = int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0
        return free_bytes(device) + held
    return free_bytes(device) + int(psutil.Process().memory_info().rss)


def free_bytes(device: str) -> int:
    """Memory that nobody holds, of the accelerator or of this machine.

    On a CPU: what the system can give, within the limits of the control group and of the process (`ulimit -v`,
    `ulimit -d`) where there are any. Pages of files that nobody uses count as free.

    Args:
        device: `cpu`, or an accelerator's name.
    """
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return min([int(psutil.virtual_memory().available), *_group_bytes(), *_limit_bytes()])


def _group_bytes() -> list[int]:
    """Return what the limit of this process's control group leaves, in a list that is empty without one."""
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
    """Return what the limits of this process leave: of its addresses (`ulimit -v`) and data (`ulimit -d`)."""
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
    """Return whether memory was refused: by a GPU's allocator, by PyTorch's on a CPU, or by C's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(refusal in str(error) for refusal in _REFUSALS)
