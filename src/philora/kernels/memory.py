"""Freed memory on a CPU, kept for the next step or given back after each large tensor; and memory refused."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# glibc's mallopt(3): blocks above the threshold are mapped by themselves, and memory at the end of the heap above the
# other is given back. The second is an int in C.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
# What the messages of PyTorch's other allocators and of oneDNN have in common where memory is refused.
_REFUSALS = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "bad_alloc", "could not create a memory")
_LARGEST_BLOCK, _MOST_FREE = 1 << 30, (1 << 31) - 1
_LARGE_BLOCK = 1 << 20


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed blocks of up to 1 GiB, which torch's tensors on a CPU come from.

    By default a block above 32 MiB goes back to the system when it is freed, and the system clears its pages again, one
    fault each, when the next tensor of that size is made: several times the cost of an element-wise operation. The
    peak stays what it was; between steps the memory stays with the process. `PHILORA_FUSED=0`, or an allocator chosen
    in the environment (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`), leaves everything as it is.

    Returns:
        Whether it is so now.
    """
    return _set(_LARGEST_BLOCK, _MOST_FREE)


def return_large_blocks() -> bool:
    """Have glibc's allocator give freed blocks of 1 MiB and more back to the system, each by itself.

    Where each product over a quantised base allocates a matrix of its own between activations that stay, those leave
    holes in one heap that the next matrix does not fit into, and what the process holds grows from step to step to half
    as much again; a mapping of its own leaves none. It costs page faults at every step.

    Returns:
        Whether it is so now; not where an allocator was chosen, as in `keep_freed_memory`.
    """
    return _set(_LARGE_BLOCK, _LARGE_BLOCK)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if not sys.platform.startswith("linux") or chosen or os.environ.get("PHILORA_FUSED") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_threshold)) and bool(mallopt(_M_TRIM_THRESHOLD, trim_threshold))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by a GPU's allocator, by PyTorch's on a CPU, or by C's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _REFUSALS)
