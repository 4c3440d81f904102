"""Describe a machine and measure its rate of products, to compare measured times with.

The processor's name is left out: its cores and instruction sets say what matters for these measurements.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median

import torch

_CAPABILITIES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "bf16")


def describe(device: str = "cpu", packages: Sequence[str] = ("torch",)) -> dict[str, str | int]:
    """Facts to keep beside a measurement.

    Args:
        device: `cpu` or `cuda`.
        packages: Distributions whose versions count.
    """
    facts: dict[str, str | int] = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "arch": platform.machine(),
        "capabilities": " ".join(_capabilities()),
    }
    if device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version()} | {name: version(name) for name in packages}


def _capabilities() -> list[str]:
    known = torch.cpu.get_capabilities()
    return [name for name in _CAPABILITIES if known.get(name)]


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that runs another one and returns its milliseconds.

    On CUDA the time is between two events on the stream, with nothing left to do before the first.
    """

    def of_cpu(work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begun)

    def of_cuda(work: Callable[[], object]) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    return of_cuda if device == "cuda" else of_cpu


def matmul_rate(
    dtype: torch.dtype, tokens: int, in_features: int, out_features: int, device: str = "cpu", repeats: int = 5
) -> float:
    """GFLOP/s of `x W^T` as measured now, with torch's current number of threads: the median of some products.

    On CUDA each of them is fifty, one after the other, since one alone takes little more than its start.

    Shapes:
        x (tokens, in_features), W (out_features, in_features).
    """
    products = 50 if device == "cuda" else 1
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    weight = torch.randn(out_features, in_features, device=device).to(dtype)
    out = torch.empty(tokens, out_features, device=device, dtype=dtype)
    measure = clock(device)

    def work() -> None:
        for _ in range(products):
            torch.mm(x, weight.t(), out=out)

    times = [measure(work) for _ in range(repeats + 1)]
    # The first product makes the kernel.
    return 2e-6 * products * tokens * in_features * out_features / median(times[1:])
