"""Freed memory stays with the process, unless somebody chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from philora.kernels.memory import keep_freed_memory
done = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()  # the heap grows to its size
print(done, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("changes", [{}, {"PHILORA_FUSED": "0"}, {"MALLOC_ARENA_MAX": "4"}])
def test_pages_are_used_again(changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "PHILORA_"))}
    done, faults = subprocess.run(
        [sys.executable, "-c", CODE], env={**kept, **changes}, capture_output=True, text=True, check=True
    ).stdout.split()
    pages = 5 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (done == "True") == (not changes)
    assert (int(faults) < pages / 20) == (not changes), faults  # the others are the negative control
