"""Compute the two products of a frozen weight, `x W^T` and `dy W`, in the forms that the decoder stack supports.

| class                | the weight is                          | the product is in        |
| -------------------- | -------------------------------------- | ------------------------ |
| `PlainProduct`       | a matrix                               | its dtype                |
| `DequantizedProduct` | 4 or 8 bits of bitsandbytes            | the activations' dtype   |
| `Fp8Product`         | a matrix, and copies of it in fp8      | fp8, sums in fp32        |

All have `forward`, `backward`, and `takes_fp8`: whether the kernel that makes an operand should also write it in fp8.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from philora.decoder_stack.rows import FP8, FP8_LARGEST, Rows
from philora.kernels.quantization import dequantized_into, is_quantized

logger = logging.getLogger(__name__)

Scaling = Literal["rows", "tensor"]
"""Whether an fp8 operand has one scale per row or one per tensor."""


class Product(Protocol):
    """The products of one frozen weight.

    Attributes:
        takes_fp8: Whether `forward` and `backward` use an fp8 copy of their operand.
    """

    takes_fp8: bool

    def forward(self, x: Rows) -> Tensor:
        """Return `x W^T`. Shapes: x (T, in); returns (T, out)."""

    def backward(self, dy: Rows) -> Tensor:
        """Return `dy W`. Shapes: dy (T, out); returns (T, in)."""


class PlainProduct:
    """A weight that is a matrix in the activations' dtype. If the model is moved, the moved weight is used."""

    takes_fp8 = False

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Rows) -> Tensor:
        """Return `x W^T`, as `Product.forward`."""
        return x.values @ self._weight.detach().t()

    def backward(self, dy: Rows) -> Tensor:
        """Return `dy W`, as `Product.backward`."""
        return dy.values @ self._weight.detach()


class Buffer:
    """Memory for one matrix at a time, shared by all layers of a stack."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def matrix(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of this shape. Earlier contents are lost."""
        memory = self._memory
        if memory is None or memory.numel() < shape.numel() or memory.dtype != dtype or memory.device != device:
            memory = self._memory = torch.empty(shape.numel(), dtype=dtype, device=device)
        return memory[: shape.numel()].view(shape)


class DequantizedProduct:
    """A weight of bitsandbytes, dequantised for every product into memory that all layers share.

    Cost:
        Every product, forward and backward, writes the matrix once: 22% of the time of the products at 1,000 tokens,
        less with more tokens.
    """

    takes_fp8 = False

    def __init__(self, layer: nn.Module, buffer: Buffer) -> None:
        self._layer, self._buffer = layer, buffer

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        layer: Any = self._layer
        shape = torch.Size((layer.out_features, layer.in_features))
        return dequantized_into(layer, self._buffer.matrix(shape, dtype, layer.weight.device))

    def forward(self, x: Rows) -> Tensor:
        """Return `x W^T`, as `Product.forward`."""
        return x.values @ self._matrix(x.values.dtype).t()

    def backward(self, dy: Rows) -> Tensor:
        """Return `dy W`, as `Product.backward`."""
        return dy.values @ self._matrix(dy.values.dtype)


class Fp8Product:
    """A matrix whose products are computed from copies in e4m3, the sums in fp32.

    Args:
        weight: The matrix; it is not changed, for evaluation and for calls that the stack does not cover.
        scaling: Whether scales are per row or per tensor.
        backward: The format of the backward product: e4m3, or the weight's own dtype, which is exact and slower.

    Numerics:
        Every operand is divided by its scale and rounded to 3 bits of mantissa. `docs/performance.md` shows the effect
        on losses and gradients.

    Cost:
        The memory of the weight in bf16 once more: an fp8 copy for each direction, since both operands of a product
        must be contiguous along its inner dimension. Half of that if backward is not in fp8.
    """

    def __init__(self, weight: Tensor, scaling: Scaling = "rows", backward: Literal["e4m3", "weight"] = "e4m3") -> None:
        self._weight, self._scaling = weight, scaling
        self.takes_fp8 = scaling == "rows"
        self._forward = to_fp8(weight, scaling)
        self._backward = to_fp8(weight.t().contiguous(), scaling) if backward == "e4m3" else None

    def forward(self, x: Rows) -> Tensor:
        """Return `x W^T`, as `Product.forward`."""
        return self._product(x, *self._forward)

    def backward(self, dy: Rows) -> Tensor:
        """Return `dy W`, as `Product.backward`."""
        return dy.values @ self._weight if self._backward is None else self._product(dy, *self._backward)

    def _product(self, x: Rows, weight: Tensor, scales: Tensor) -> Tensor:
        if x.quantized is not None and x.scales is not None and self._scaling == "rows":
            return scaled_product(x.quantized, x.scales, weight, scales, x.values.dtype)
        return scaled_product(*to_fp8(x.values, self._scaling), weight, scales, x.values.dtype)


def to_fp8(matrix: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return a matrix in e4m3 and its scales.

    Shapes:
        matrix (rows, columns); returns (rows, columns), and scales (rows, 1) or () in fp32.
    """
    wide = matrix.float()
    largest = wide.abs().amax(1, keepdim=True) if scaling == "rows" else wide.abs().amax()
    scales = largest.clamp(min=1e-12) / FP8_LARGEST
    return (wide / scales).to(FP8), scales


def scaled_product(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(a * of_a) (b * of_b)^T` of two matrices in fp8; a CPU computes it in fp32.

    Shapes:
        a (T, k), of_a (T, 1) or (), b (n, k), of_b (n, 1) or (); returns (T, n).
    """
    if not a.is_cuda:
        return ((a.float() @ b.float().t()) * of_a * of_b.t()).to(dtype)
    return torch._scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b.t(), out_dtype=dtype, use_fast_accum=True)


@cache
def fp8_scaling(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Scaling | None:
    """Return the finest scaling with which this device can multiply in fp8, tried by one small product, or None.

    Warns once if it is not per row. Some releases and GPUs refuse scales per row (PyTorch issues 130359 and 192707),
    and below compute capability 8.9 there is no fp8.
    """
    reasons = []
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 64, generator=generator).to(device, dtype) for _ in range(2))
    expected = (a.float() @ b.float().t()).cpu()
    for scaling in ("rows", "tensor"):
        try:
            found = scaled_product(*to_fp8(a, scaling), *to_fp8(b, scaling), dtype).float().cpu()
        except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
            reasons.append(f"by {scaling}: {str(error).partition(chr(10))[0]}")
            continue
        difference = float((found - expected).norm() / expected.norm())
        if difference < 0.1:  # 3 bits of mantissa give 0.03 to 0.05
            if reasons:
                logger.warning("fp8: scales by tensor, because scales by row do not work here (%s)", reasons[0])
            return scaling
        reasons.append(f"by {scaling}: the product is {difference:.2f} away from the right one")
    logger.warning("fp8 is not available here, products stay in %s: %s", dtype, "; ".join(reasons))
    return None


def product_of(layer: nn.Module, buffer: Buffer, fp8: Scaling | None = None) -> Product:
    """Return the products of a linear layer's frozen weight.

    Args:
        layer: A `torch.nn.Linear`, or a quantised layer of bitsandbytes.
        buffer: Memory for dequantised matrices.
        fp8: The scaling of products in fp8; None for products in the weight's dtype. Ignored for a quantised layer.
    """
    if is_quantized(layer):
        return DequantizedProduct(layer, buffer)
    weight: Any = layer.weight
    return PlainProduct(weight) if fp8 is None else Fp8Product(weight.detach(), fp8)
