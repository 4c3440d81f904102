"""The machine's rate for the matrix products of a work's layers, measured in a process of its own.

`python -m benchmarks.rate TASK OUT`; with `describe` in place of TASK it only says what the machine is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.process import Task, run, start
from benchmarks.work import Work


def layers_rate(work: Work, device: str = "cpu") -> float:
    """FLOPs a second of bf16 products at the tokens of a row: all four matrices of a layer, forward and backward."""
    import torch

    from benchmarks.machine import matmul_rate

    work_flops = seconds = 0.0
    for rows, columns in work.layer_shapes:
        for inner, outer in ((columns, rows), (rows, columns)):  # x W^T, and dy W
            flops = 2.0 * work.row_tokens * rows * columns
            work_flops += flops
            seconds += flops / (1e9 * matmul_rate(torch.bfloat16, work.row_tokens, inner, outer, device))
    return work_flops / seconds


def matrix_rate(task: Task) -> dict[str, Any]:
    """The rate at a task's work, as a result."""
    return {"flops_per_second": layers_rate(task.work)}


def machine(environment: Mapping[str, str]) -> str:
    """Describe the machine, from a separate process, since this one must not load torch.

    Raises:
        RuntimeError: That process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        facts = start([sys.executable, "-m", "benchmarks.rate", "describe"], Path(folder) / "machine", environment, 300)
    return f"{facts['cores']} cores {facts['arch']} {facts['capabilities']}"


def describe(out: Path) -> None:
    """Write what the machine is."""
    from benchmarks import machine as facts

    out.write_text(json.dumps(facts.describe()), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        describe(Path(sys.argv[2]))
    else:
        run(matrix_rate)
