"""Freed memory stays with the process, unless somebody chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from philora.kernels import memory
done = getattr(memory, sys.argv[1])()
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
    done, faults = outcome("keep_freed_memory", changes)
    pages = 5 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (done == "True") == (not changes)
    assert (int(faults) < pages / 20) == (not changes), faults  # the others are the negative control


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_go_back():
    done, faults = outcome("return_large_blocks", {})
    assert done == "True"
    assert int(faults) > 0.9 * 5 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")


def outcome(function, changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "PHILORA_"))}
    return subprocess.run(
        [sys.executable, "-c", CODE, function], env={**kept, **changes}, capture_output=True, text=True, check=True
    ).stdout.split()
