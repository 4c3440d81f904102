"""Compute RMSNorm and SwiGLU by the kernels of the package liger-kernel, if `elementwise_choice` takes it.

Its functions for a single pass are called inside philora's autograd nodes, which choose the saved tensors and refuse
second derivatives; Liger's own nodes overwrite gate, up and dy with gradients. Before their first use the kernels are
compared with PyTorch's operations, since another release may have changed them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from philora.kernels.elementwise_choice import ElementwiseFacts, elementwise_for
from philora.kernels.switches import stack_switch

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest difference that is rounding, relative to the norm of the expected result."""

CASTING, OFFSET = "llama", 0.0  # rounded before the product with the weight, as in transformers' norms


def usable(x: Tensor, *others: Tensor) -> bool:
    """Return whether Liger's kernels take these tensors, all of one dtype. Shapes: (T, columns), or (columns)."""
    if x.device.type != "cuda":
        return False
    alike = all(other.dtype == x.dtype and other.device == x.device for other in others)
    return alike and _taken(x.device, x.dtype, x.shape[-1], stack_switch())


@cache
def _taken(device: torch.device, dtype: torch.dtype, columns: int, switch: str) -> bool:
    facts = facts_of_elementwise(device, dtype, columns, switch)
    if elementwise_for(facts)[0] != "liger":
        return False
    found = disagreement(device, dtype)
    if found is not None:
        logger.warning("norms and SwiGLU run by PyTorch's operations: %s", found)
    return found is None


def facts_of_elementwise(
    device: torch.device, dtype: torch.dtype, columns: int, switch: str | None = None
) -> ElementwiseFacts:
    """Return the facts that the choice for norms and SwiGLU depends on, without the comparison.

    `columns` are those of the widest row; the switch `PHILORA_STACK` is read from the environment if it is not given.
    """
    return ElementwiseFacts(
        kind=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=str(dtype).removeprefix("torch."),
        columns=columns,
        liger=_version("liger_kernel", "liger-kernel"),
        triton=_version("triton", "triton"),
        switch=stack_switch() if switch is None else switch,
    )


@cache
def _version(module: str, package: str) -> str | None:
    """Return the version of a package without importing it: "0" if unknown, None if it is not installed."""
    if find_spec(module) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"


@cache
def disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words how Liger's kernels differ from PyTorch's operations on this device; None if they agree."""
    try:
        gap = _gap(device, dtype)
    except Exception as error:  # noqa: BLE001 - Triton's errors have no narrower class
        return f"liger-kernel does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if gap < LARGEST_DIFFERENCE[dtype]:
        return None
    return f"liger-kernel differs from PyTorch here by {gap:.2g} (at most {LARGEST_DIFFERENCE[dtype]:g} is rounding)"


def _gap(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative difference of the kernels' results on a few rows of 48 columns."""
    generator = torch.Generator().manual_seed(0)
    x, dy, weight, gate_up = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((5, 48), (5, 48), (48,), (5, 96))
    )
    with torch.no_grad():
        y, inverse, settings = rms_norm(x, weight, 1e-5)
        dx, dweight = rms_norm_backward(x, weight, inverse, dy, settings, True)
        gate, up = gate_up.chunk(2, -1)
        halves = gate.contiguous(), up.contiguous()
        found = [y, dx, dweight, swiglu(gate_up), swiglu_backward(gate_up, dy)]
        found += [gated(*halves), torch.cat(gated_backward(*halves, dy), -1)]
    with torch.enable_grad():
        leaves = x.float().requires_grad_(), weight.float().requires_grad_(), gate_up.float().requires_grad_()
        normal = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-5) * leaves[1]
        wide_gate, wide_up = leaves[2].chunk(2, -1)
        product = F.silu(wide_gate) * wide_up
        of_x, of_weight, of_gate_up = torch.autograd.grad([normal, product], leaves, [dy.float(), dy.float()])
    expected = [normal, of_x, of_weight, product, of_gate_up, product, of_gate_up]
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b).norm() / b.norm()) if a is not None else float("inf") for a, b in pairs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Sequence[int]]:
    """Return the norm of every row, one over its root mean square in fp32, and settings for backward.

    Shapes:
        x (T, C), weight (C); returns (T, C), (T).
    """
    import liger_kernel.ops.rms_norm as kernels

    y, _, inverse, *settings = kernels.rms_norm_forward(x, weight, eps, OFFSET, CASTING, None)
    return y, inverse, settings


def rms_norm_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor, settings: Sequence[int], needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and the weight, the latter None if not needed. Shapes: as `rms_norm`; dy (T, C)."""
    import liger_kernel.ops.rms_norm as kernels

    block, warps, casting = settings
    dx, dweight = kernels.rms_norm_backward(
        dy, x, weight, inverse, OFFSET, casting, block, warps, False, None, needs_dw=needs_weight
    )
    return dx, dweight


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` of a fused projection. Shapes: gate_up (T, 2 C), gate first; returns (T, C)."""
    import liger_kernel.ops.swiglu as kernels

    y: Tensor = kernels.swiglu_fused_gate_up_forward(gate_up.contiguous())[1]
    return y


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of `gate_up`. Shapes: as `swiglu`; dy (T, C)."""
    import liger_kernel.ops.swiglu as kernels

    dgate_up: Tensor = kernels.swiglu_fused_gate_up_backward(gate_up.contiguous(), dy)
    return dgate_up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`. Shapes: (T, C) all."""
    import liger_kernel.ops.swiglu as kernels

    y: Tensor = kernels.swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return y


def gated_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up. Shapes: (T, C) all."""
    import liger_kernel.ops.swiglu as kernels

    # The kernel overwrites its inputs, which autograd may need again.
    copies = (item.clone(memory_format=torch.contiguous_format) for item in (gate, up))
    of_gate, of_up = kernels.swiglu_backward(*copies, dy)
    return of_gate, of_up
