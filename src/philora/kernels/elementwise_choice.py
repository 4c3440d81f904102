"""Choose how RMSNorm and SwiGLU are computed outside the decoder stack: one function of facts, without a device.

| way      | what runs                                                                                             |
| -------- | ----------------------------------------------------------------------------------------------------- |
| `native` | philora's own on a CPU: compiled, or PyTorch's operations on blocks of rows                            |
| `liger`  | the kernels of the package liger-kernel; only with `PHILORA_STACK=all`, since no GPU has run them here |
| `torch`  | PyTorch's operations in one node of autograd; SwiGLU of separate gate and up as transformers has it   |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from philora.kernels.attention_choice import LEAST_CAPABILITY

ElementwiseWay = Literal["native", "liger", "torch"]

LEAST_LIGER = (0, 8, 5)
"""The oldest release that has the functions called here."""
MOST_COLUMNS = 65536
"""Columns of a row that one program of Liger's kernels can compute."""


@dataclass(frozen=True)
class ElementwiseFacts:
    """The facts that the choice depends on.

    Attributes:
        kind: Type of the device: "cuda", "cpu" or another.
        capability: CUDA's compute capability, or None.
        dtype: Dtype of activations and weights, such as "bfloat16".
        columns: Columns of the widest row.
        liger: The version of liger-kernel, or None.
        triton: The version of Triton, or None.
        switch: Value of `PHILORA_STACK`: "all" also takes what no GPU has run yet.
        disagreement: How the kernels differ from PyTorch's operations, or None.
    """

    kind: str = "cuda"
    capability: tuple[int, int] | None = (9, 0)
    dtype: str = "bfloat16"
    columns: int = 8192
    liger: str | None = "0.8.5"
    triton: str | None = "3.6.0"
    switch: str = ""
    disagreement: str | None = None


def elementwise_for(facts: ElementwiseFacts) -> tuple[ElementwiseWay, str]:
    """Return the way, and the reason for it."""
    if facts.kind == "cpu":
        return "native", "the device is a CPU"
    why = _not_liger(facts)
    if why is not None:
        return "torch", why
    if facts.switch != "all":
        return "torch", "PHILORA_STACK=all takes liger-kernel, which no GPU has run here yet"
    return "liger", f"liger-kernel {facts.liger} is installed"


def _not_liger(facts: ElementwiseFacts) -> str | None:
    """Return why Liger's kernels cannot be used, or None."""
    if facts.kind != "cuda":
        return f"the device is {facts.kind}"
    if facts.switch == "0":
        return "PHILORA_STACK=0 turns Triton's kernels off"
    if facts.liger is None:
        return "liger-kernel is not installed"
    if _numbers(facts.liger) < LEAST_LIGER:
        return f"liger-kernel is {facts.liger}, its functions are those of {'.'.join(map(str, LEAST_LIGER))} and later"
    if facts.triton is None:
        return "Triton is not installed"
    if facts.dtype not in ("bfloat16", "float16", "float32"):
        return f"activations are {facts.dtype}"
    if facts.dtype == "bfloat16" and facts.capability is not None and facts.capability < LEAST_CAPABILITY:
        return f"compute capability {'.'.join(map(str, facts.capability))} has no bf16"
    if facts.columns > MOST_COLUMNS:
        return f"rows have {facts.columns} columns, Liger's kernels take {MOST_COLUMNS}"
    return facts.disagreement


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (0, 8, 5) for "0.8.5.dev1"."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))
