"""Freed memory stays with the process, unless somebody chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.quick import quick

CODE = """
import resource, sys, torch
from philora.runtime import process_state
from philora.kernels import memory
with process_state.run():  # a library call leaves the process as it is
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
@pytest.mark.parametrize("changes", quick([{}, {"PHILORA_FUSED": "0"}, {"MALLOC_ARENA_MAX": "4"}], [{}]))
def test_pages_are_used_again(changes):
    done, faults = outcome("keep_freed_memory", changes)
    pages = 5 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (done == "True") == (not changes)
    assert (int(faults) < pages / 20) == (not changes), faults  # the others are the negative control


@pytest.mark.slow
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


PEAK = "from philora.training.callbacks import peak_memory_bytes as peak; print(peak())"
PARENT = f"""
import resource, subprocess, sys
held = bytearray(2_000_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(int(subprocess.run([sys.executable, "-c", {PEAK!r}], capture_output=True, text=True, check=True).stdout))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as Linux counts")
def test_the_peak_is_this_processs_own():
    """Linux hands ru_maxrss on to a process that is started; the large parent is the negative control."""
    shown = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True).stdout
    parent, child = map(int, shown.split())
    assert parent > 2_000_000_000 > 1_000_000_000 > child > 100_000_000


GIVEN_BACK = """
import ctypes, torch
from philora.training.callbacks import peak_memory_bytes
from philora.kernels import memory
def held():
    import psutil
    return psutil.Process().memory_info().rss
from philora.runtime import process_state
with process_state.run():
    memory.keep_freed_memory()
begun = held()
blocks = [torch.ones(2_500_000) for _ in range(40)]
last = torch.ones(1000)
del blocks
kept = held()
memory.return_freed_memory()
print(kept - begun, held() - begun)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_what_was_kept_is_given_back():
    shown = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True).stdout
    kept, left = map(int, shown.split())
    assert kept > 350_000_000, "the negative control: it stays until it is asked for"
    assert left < 20_000_000
