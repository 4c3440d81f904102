"""The machine's rate for the matrix products of a work's layers, and what the machine is.

`python -m benchmarks.rate TASK OUT` measures in a process of its own, as the contestants run.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from benchmarks.process import Task, run

COPIES = 4
"""Weights of so many layers take turns, since in training each product finds another layer's weights in the caches."""


def matrix_rate(task: Task) -> dict[str, Any]:
    """FLOPs a second of bf16 products `x W^T` and `dy W` of all four matrices of a layer, at the tokens of a row."""
    import torch

    tokens = task.work.row_tokens
    pairs = []
    for rows, columns in task.work.layer_shapes:
        for _ in range(COPIES):
            weight = torch.randn(rows, columns).mul_(0.02).bfloat16()
            pairs.append((torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows).bfloat16(), weight))
    flops = sum(4 * tokens * weight.numel() for *_, weight in pairs)
    passes: list[float] = []
    begun = time.perf_counter()
    with torch.no_grad():
        while len(passes) < 4 or (time.perf_counter() - begun < 5 and len(passes) < 50):
            start = time.perf_counter()
            for x, gradient, weight in pairs:
                x @ weight.t()
                gradient @ weight
            passes.append(time.perf_counter() - start)
    passes = sorted(passes[1:])  # the first one makes oneDNN's kernels
    return {"flops_per_second": flops / passes[len(passes) // 2], "passes": len(passes)}


def machine() -> str:
    """The processor's name, as the system gives it, and its cores."""
    import os

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = named.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in ("avx512_bf16", "amx_bf16", "avx2") if flag in named.get("flags", "").split()]
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores" + (
        f", {flags[0]}" if flags else ""
    )


if __name__ == "__main__":
    run(matrix_rate)
