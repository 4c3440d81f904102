"""Memory that the process keeps for its next step instead of giving it back after each tensor, and memory refused."""

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


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed blocks of up to 1 GiB, which torch's tensors on a CPU come from.

    By default a block above 32 MiB goes back to the system when it is freed, and the system clears its pages again, one
    fault each, when the next tensor of that size is made: several times the cost of an element-wise operation. The
    peak stays what it was; between steps the memory stays with the process. `PHILORA_FUSED=0`, or an allocator chosen
    in the environment (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`), leaves everything as it is.

    Returns:
        Whether it is so now.
    """
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if not sys.platform.startswith("linux") or chosen or os.environ.get("PHILORA_FUSED") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST_FREE))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by a GPU's allocator, by PyTorch's on a CPU, or by C's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _REFUSALS)
