"""Compute RMSNorm and SwiGLU, the element-wise parts of a decoder layer, with fewer passes over memory.

Both are one autograd node that saves only its input. On a CPU they are one pass of `native`; without it, blocks of rows
stay in the cache from the first operation to the last. On a GPU the package liger-kernel computes them if
`elementwise_choice` takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from philora.kernels import liger
from philora.lora.functional import refuse_create_graph
from philora.native import library as native

# Bytes of fp32 rows that are computed at a time: half of the second-level caches of two cores.
BLOCK_BYTES = 1 << 20


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Yield blocks of the rows of a matrix; on a GPU one block."""
    count, columns = rows.shape
    step = max(16, BLOCK_BYTES // (4 * max(1, columns))) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield slice(start, start + step)


class _RMSNorm(torch.autograd.Function):
    """`y = x / rms(x) * w`. With n = x / rms and g = w dy: `dx = (g - n mean(g n)) / rms`; `dw = sum(dy n)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute y. Shapes: x (T, C), weight (C)."""
        ctx.liger = None
        if native.usable(x, weight):
            y, inverse = native.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, inverse[:, None])
            return y
        if liger.usable(x, weight):
            y, inverse, ctx.liger = liger.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return y
        y = torch.empty_like(x)
        inverse = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        for part in _blocks(x):
            wide = x[part].to(torch.float32, copy=True)
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
            inverse[part] = scale
            torch.mul(wide.mul_(scale).to(x.dtype), weight, out=y[part])
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight."""
        refuse_create_graph()
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dy = grads[0].contiguous()
        if not needs_weight and native.usable(x, weight, dy):
            return native.rms_norm_backward(x, weight, inverse, dy), None, None
        if ctx.liger is not None:
            return *liger.rms_norm_backward(x, weight, inverse, dy, ctx.liger, needs_weight), None
        dx = torch.empty_like(x) if needs_x else None
        dweight = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device) if needs_weight else None
        wide_weight = weight.float()
        for part in _blocks(x):
            normal = x[part].to(torch.float32, copy=True).mul_(inverse[part])
            grad = dy[part].to(torch.float32, copy=True)
            if dweight is not None:
                dweight += (grad * normal).sum(0)
            if dx is not None:
                grad.mul_(wide_weight)
                along = torch.linalg.vecdot(grad, normal).div_(x.shape[1])
                dx[part] = grad.addcmul_(normal, along[:, None], value=-1).mul_(inverse[part])
        return dx, None if dweight is None else dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every row by its root mean square, and multiply by the weight.

    Shapes:
        x (..., C), weight (C); returns (..., C).

    Numerics:
        fp32 inside; rounded to x's dtype before the product with the weight, as transformers does.

    Cost:
        Keeps x and one number a row for backward (in plain PyTorch: x in fp32, twice).

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    y: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _SwiGLU(torch.autograd.Function):
    """`y = silu(gate) * up`, with gate and up side by side in one tensor, and their gradients too."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Compute y. Shapes: gate_up (T, 2 C)."""
        ctx.save_for_backward(gate_up)
        if native.usable(gate_up):
            return native.swiglu(gate_up)
        if liger.usable(gate_up):
            return liger.swiglu(gate_up)
        gate, up = gate_up.chunk(2, -1)
        y = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        for part in _blocks(gate_up):
            torch.mul(F.silu(gate[part]), up[part], out=y[part])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of gate_up."""
        refuse_create_graph()
        (gate_up,) = ctx.saved_tensors
        dy = grads[0].contiguous()
        if native.usable(gate_up, dy):
            return (native.swiglu_backward(gate_up, dy),)
        if liger.usable(gate_up, dy):
            return (liger.swiglu_backward(gate_up, dy),)
        gate, up = gate_up.chunk(2, -1)
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, -1)
        for part in _blocks(gate_up):
            torch.mul(dy[part], F.silu(gate[part]), out=d_up[part])
            d_gate[part] = torch.ops.aten.silu_backward(dy[part] * up[part], gate[part])
        return (result,)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute `silu(gate) * up` of a fused projection. Shapes: gate_up (..., 2 C), gate first; returns (..., C).

    Numerics:
        silu and the product are both rounded to the input's dtype, as in plain PyTorch; compiled, once at the end.

    Cost:
        Keeps gate_up for backward (in plain PyTorch also silu(gate)), and does not concatenate the two gradients.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    y: Tensor = _SwiGLU.apply(gate_up.reshape(-1, gate_up.shape[-1]))  # type: ignore[no-untyped-call]
    return y.view(*gate_up.shape[:-1], -1)


class _Gated(torch.autograd.Function):
    """`y = silu(gate) * up`, with separate gate and up, by Liger's kernels."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Compute y. Shapes: (T, C) both."""
        ctx.save_for_backward(gate, up)
        return liger.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        refuse_create_graph()
        gate, up = ctx.saved_tensors
        return liger.gated_backward(gate, up, grads[0].contiguous())


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, in one node if Liger's kernels do it. Shapes: (..., C) all.

    Numerics:
        silu and the product are both rounded to the input's dtype, as in plain PyTorch.
    """
    if not liger.usable(gate, up):
        return F.silu(gate) * up
    y: Tensor = _Gated.apply(*(item.reshape(-1, item.shape[-1]) for item in (gate, up)))  # type: ignore[no-untyped-call]
    return y.view(gate.shape)
