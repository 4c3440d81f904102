"""Define Triton kernels for the element-wise work of a decoder layer, with one program per row.

A row is one token. A kernel reads and writes its rows once, and does all related work in that pass: the sum of the
residual stream with the norm, dropout of the adapter's input, and the fp8 copy for the next product.

Letters in the shapes: T tokens, C hidden size, I intermediate size, H query heads, K key heads, D head size, R half of
the rotated columns of a head.

All kernels compute in fp32 and round once to the dtype of the result. The time of a kernel is that of moving the bytes
of its arguments, not of its arithmetic.

Triton is needed to import this module. With `TRITON_INTERPRET=1` set before Triton is imported, the same kernels run
on a CPU, slowly; the tests use that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from philora.decoder_stack.rows import FP8, Dropout, Rows


@triton.jit
def _keeps(seed, row, columns, width, p):
    """Return which elements of a row dropout keeps: a hash of (seed, row, column), so that backward has the same."""
    key = tl.load(seed).to(tl.uint32)
    bits = (row * width + columns).to(tl.uint32)
    bits = (bits ^ key) * 0x85EBCA6B
    bits = bits ^ (bits >> 15)
    bits = (bits + key) * 0xC2B2AE35
    bits = bits ^ (bits >> 13)
    bits = bits * 0x27D4EB2F
    bits = bits ^ (bits >> 16)
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p


@triton.jit
def _store_fp8(values, largest, at, inside, row, quantized, scales):
    """Store a row in e4m3, whose largest number is 448, with its scale."""
    scale = tl.maximum(largest, 1e-12) / 448.0
    tl.store(quantized + at, (values / scale).to(tl.float8e4nv), inside)
    tl.store(scales + row, scale)


@triton.jit
def _add_norm(
    x, h, weight, total, y, inverse, quantized, scales, dropped, seed, p, factor, width, eps,
    ADD: tl.constexpr, DROP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    a = tl.load(x + at, inside, 0.0)
    if ADD:
        a = (a.to(tl.float32) + tl.load(h + at, inside, 0.0).to(tl.float32)).to(a.dtype)
        tl.store(total + at, a, inside)
    wide = a.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    normal = (wide * scale).to(a.dtype).to(tl.float32)  # rounded here as transformers does
    result = (normal * tl.load(weight + columns, inside, 0.0).to(tl.float32)).to(a.dtype)
    tl.store(y + at, result, inside)
    tl.store(inverse + row, scale)
    if DROP:
        kept = _keeps(seed, row, columns, width, p)
        tl.store(dropped + at, tl.where(kept, result.to(tl.float32) * factor, 0.0).to(a.dtype), inside)
    if QUANTIZE:
        wide = result.to(tl.float32)
        _store_fp8(wide, tl.max(tl.abs(wide), 0), at, inside, row, quantized, scales)


@triton.jit
def _norm_again(x, weight, inverse, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    a = tl.load(x + at, inside, 0.0)
    normal = (a.to(tl.float32) * tl.load(inverse + row)).to(a.dtype).to(tl.float32)
    tl.store(y + at, (normal * tl.load(weight + columns, inside, 0.0).to(tl.float32)).to(a.dtype), inside)


@triton.jit
def _norm_backward(
    dy, x, inverse, weight, dresidual, dx, quantized, scales, dadapter, seed, p, factor, width,
    DROP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    scale = tl.load(inverse + row)
    normal = tl.load(x + at, inside, 0.0).to(tl.float32) * scale
    grad = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if DROP:
        kept = _keeps(seed, row, columns, width, p)
        grad += tl.where(kept, tl.load(dadapter + at, inside, 0.0).to(tl.float32) * factor, 0.0)
    grad = grad * tl.load(weight + columns, inside, 0.0).to(tl.float32)
    grad = scale * (grad - normal * (tl.sum(grad * normal, 0) / width))
    grad += tl.load(dresidual + at, inside, 0.0).to(tl.float32)
    tl.store(dx + at, grad.to(dx.dtype.element_ty), inside)
    if QUANTIZE:
        _store_fp8(grad, tl.max(tl.abs(grad), 0), at, inside, row, quantized, scales)


@triton.jit
def _rotate(qkv, cos, sin, stride, heads, size, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    first = qkv + row * stride + head * size + column
    a = tl.load(first, inside, 0.0)
    b = tl.load(first + half, inside, 0.0)
    c = tl.load(cos + row * half + column, column < half, 0.0)
    s = tl.load(sin + row * half + column, column < half, 0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    tl.store(first, (wide_a * c - wide_b * s).to(a.dtype), inside)
    tl.store(first + half, (wide_b * c + wide_a * s).to(a.dtype), inside)


@triton.jit
def _turned_back(source, heads, size, half, cos, sin, row, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Return the gradient before the rotation, of all heads of a row; other columns are copied."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (column < size)
    low = column < half
    rotated = column < 2 * half
    angle = tl.where(low, column, column - half)
    c = tl.load(cos + row * half + angle, rotated, 1.0)
    s = tl.load(sin + row * half + angle, rotated, 0.0)
    other = tl.where(low, column + half, tl.where(rotated, column - half, column))
    start = source + (row * heads + head) * size
    a = tl.load(start + column, inside, 0.0).to(tl.float32)
    b = tl.load(start + other, inside, 0.0).to(tl.float32)
    return a * c + tl.where(low, b, -b) * s


@triton.jit
def _rotate_backward(
    dq, dk, dv, cos, sin, dqkv, quantized, scales, heads, key_heads, size, half,
    QUANTIZE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    key_head = tl.arange(0, KEY_HEADS)[:, None]
    in_query = (head < heads) & (column < size)
    in_key = (key_head < key_heads) & (column < size)
    query = _turned_back(dq, heads, size, half, cos, sin, row, HEADS, SIZE)
    key = _turned_back(dk, key_heads, size, half, cos, sin, row, KEY_HEADS, SIZE)
    value = tl.load(dv + (row * key_heads + key_head) * size + column, in_key, 0.0).to(tl.float32)
    start = row * (heads + 2 * key_heads) * size
    at_query = start + head * size + column
    at_key = start + (heads + key_head) * size + column
    at_value = at_key + key_heads * size
    element = dqkv.dtype.element_ty
    tl.store(dqkv + at_query, query.to(element), in_query)
    tl.store(dqkv + at_key, key.to(element), in_key)
    tl.store(dqkv + at_value, value.to(element), in_key)
    if QUANTIZE:
        of_query = tl.max(tl.where(in_query, tl.abs(query), 0.0))
        of_key = tl.max(tl.where(in_key, tl.abs(key), 0.0))
        largest = tl.maximum(tl.maximum(of_query, of_key), tl.max(tl.abs(value)))
        _store_fp8(query, largest, at_query, in_query, row, quantized, scales)
        _store_fp8(key, largest, at_key, in_key, row, quantized, scales)
        _store_fp8(value, largest, at_value, in_key, row, quantized, scales)


@triton.jit
def _swiglu(
    gate_up, y, quantized, scales, dropped, seed, p, factor, width,
    DROP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    gate = tl.load(gate_up + 2 * row * width + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row * width + width + columns, inside, 0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    rounded = result.to(y.dtype.element_ty)
    tl.store(y + at, rounded, inside)
    if DROP:
        kept = _keeps(seed, row, columns, width, p)
        tl.store(dropped + at, tl.where(kept, rounded.to(tl.float32) * factor, 0.0).to(rounded.dtype), inside)
    if QUANTIZE:
        _store_fp8(result, tl.max(tl.abs(result), 0), at, inside, row, quantized, scales)


@triton.jit
def _swiglu_backward(
    dy, gate_up, dgate_up, quantized, scales, dadapter, seed, p, factor, width,
    DROP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    at_gate = 2 * row * width + columns
    gate = tl.load(gate_up + at_gate, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + width, inside, 0.0).to(tl.float32)
    grad = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if DROP:
        kept = _keeps(seed, row, columns, width, p)
        grad += tl.where(kept, tl.load(dadapter + at, inside, 0.0).to(tl.float32) * factor, 0.0)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_up = grad * gate * sigmoid
    of_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_up + at_gate, of_gate.to(dgate_up.dtype.element_ty), inside)
    tl.store(dgate_up + at_gate + width, of_up.to(dgate_up.dtype.element_ty), inside)
    if QUANTIZE:
        largest = tl.maximum(tl.max(tl.abs(of_gate), 0), tl.max(tl.abs(of_up), 0))
        _store_fp8(of_gate, largest, at_gate, inside, row, quantized, scales)
        _store_fp8(of_up, largest, at_gate + width, inside, row, quantized, scales)


@triton.jit
def _drop(x, y, seed, p, factor, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    kept = _keeps(seed, row, columns, width, p)
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, tl.where(kept, value * factor, 0.0).to(y.dtype.element_ty), inside)


@triton.jit
def _add_dropped(x, addend, seed, p, factor, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    kept = _keeps(seed, row, columns, width, p)
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value += tl.where(kept, tl.load(addend + at, inside, 0.0).to(tl.float32) * factor, 0.0)
    tl.store(x + at, value.to(x.dtype.element_ty), inside)


@triton.jit
def _quantize(x, quantized, scales, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    _store_fp8(value, tl.max(tl.abs(value), 0), at, inside, row, quantized, scales)


def _block(width: int) -> dict[str, int]:
    """Return the columns of a program, a power of two, and its number of warps."""
    return {"BLOCK": triton.next_power_of_2(width), "num_warps": 4 if width <= 4096 else 8}


def _copy_in_fp8(like: Tensor, columns: int, wanted: bool) -> tuple[Tensor, Tensor] | None:
    """Return memory for a matrix in fp8 and its scales, or None if it is not needed."""
    if not wanted:
        return None
    quantized = torch.empty(len(like), columns, device=like.device, dtype=FP8)
    return quantized, torch.empty(len(like), 1, device=like.device, dtype=torch.float32)


def _dropout(dropout: Dropout | None, unused: Tensor) -> tuple[Tensor, float, float]:
    """Return a kernel's arguments for dropout: seed, probability, and the factor of kept elements."""
    if dropout is None:
        return unused, 0.0, 1.0
    return dropout.seed, dropout.p, 1.0 / (1.0 - dropout.p) if dropout.p < 1 else 0.0


def add_norm(
    x: Tensor, h: Tensor | None, weight: Tensor, eps: float, dropout: Dropout | None = None, quantize: bool = False
) -> tuple[Tensor, Rows, Tensor, Tensor | None]:
    """Return the sum of the residual stream and the part to add to it, and the RMSNorm of that sum.

    `dropout` is that of the adapter that reads the norm; with `quantize` the norm is also written in fp8.

    Returns:
        The sum (x itself where h is None); its norm; one over the root mean square; the norm after dropout, or None.

    Shapes:
        x and h (T, C), weight (C); returns (T, C), (T, C), (T), (T, C).
    """
    tokens, width = x.shape
    total = x if h is None else torch.empty_like(x)
    y, inverse = torch.empty_like(x), torch.empty(tokens, device=x.device, dtype=torch.float32)
    dropped = None if dropout is None else torch.empty_like(x)
    fp8 = _copy_in_fp8(x, width, quantize)
    _add_norm[(tokens,)](
        x, x if h is None else h, weight, total, y, inverse, *(fp8 or (y, y)), y if dropped is None else dropped,
        *_dropout(dropout, y), width, eps,
        ADD=h is not None, DROP=dropped is not None, QUANTIZE=quantize, **_block(width),
    )  # fmt: skip
    return total, Rows(y, *(fp8 or ())), inverse, dropped


def norm_again(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the norm with the same bits as `add_norm`. Shapes: x (T, C), weight (C), inverse (T)."""
    y = torch.empty_like(x)
    _norm_again[(len(x),)](x, weight, inverse, y, x.shape[1], **_block(x.shape[1]))
    return y


def norm_backward(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, dresidual: Tensor,
    dadapter: Tensor | None = None, dropout: Dropout | None = None, quantize: bool = False,
) -> Rows:  # fmt: skip
    """Return the gradient of the residual stream before a norm.

    With `n = x / rms(x)` and `g = (dy + mask(dadapter)) * weight`: `dx = (g - n mean(g n)) / rms(x) + dresidual`.

    Args:
        dy: Gradient of the norm.
        x: The norm's input.
        inverse: One over its root mean square.
        weight: Of the norm.
        dresidual: Gradient that reaches x past the norm.
        dadapter: The adapter's part of the gradient of the norm, before the mask of dropout; None: it is in dy.
        dropout: Of that adapter.
        quantize: Whether the result is also written in fp8.

    Shapes:
        dy, x, dresidual and dadapter (T, C), inverse (T), weight (C); returns (T, C).
    """
    tokens, width = x.shape
    dx = torch.empty_like(x)
    fp8 = _copy_in_fp8(x, width, quantize)
    _norm_backward[(tokens,)](
        dy, x, inverse, weight, dresidual, dx, *(fp8 or (dx, dx)), dy if dadapter is None else dadapter,
        *_dropout(dropout, dx), width, DROP=dadapter is not None, QUANTIZE=quantize, **_block(width),
    )  # fmt: skip
    return Rows(dx, *(fp8 or ()))


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> None:
    """Rotate the first `heads` heads of every row in place: (a, b) becomes (a cos - b sin, b cos + a sin).

    Shapes:
        qkv (T, (H + 2 K) D), of which the first H + K heads are rotated; cos and sin (T, R), fp32.
    """
    half = cos.shape[1]
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _rotate[(len(qkv),)](qkv, cos, sin, qkv.stride(0), heads, size, half, **blocks, num_warps=4)


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, quantize: bool = False) -> Rows:
    """Return the gradient of the fused projection's output from those of the rotated heads.

    Shapes:
        dq (T, H, D), dk and dv (T, K, D), cos and sin (T, R), fp32; returns (T, (H + 2 K) D).
    """
    tokens, heads, size = dq.shape
    key_heads, half = dk.shape[1], cos.shape[1]
    dqkv = torch.empty(tokens, (heads + 2 * key_heads) * size, device=dq.device, dtype=dq.dtype)
    fp8 = _copy_in_fp8(dqkv, dqkv.shape[1], quantize)
    sizes = {"HEADS": heads, "KEY_HEADS": key_heads, "SIZE": size}
    blocks = {name: triton.next_power_of_2(item) for name, item in sizes.items()}
    _rotate_backward[(tokens,)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, dqkv, *(fp8 or (dqkv, dqkv)),
        heads, key_heads, size, half, QUANTIZE=quantize, **blocks, num_warps=8,
    )  # fmt: skip
    return Rows(dqkv, *(fp8 or ()))


def swiglu(gate_up: Tensor, dropout: Dropout | None = None, quantize: bool = False) -> tuple[Rows, Tensor | None]:
    """Return `silu(gate) * up`, and a copy after dropout or None.

    Shapes:
        gate_up (T, 2 I), gate first; returns (T, I) twice.
    """
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    y = torch.empty(tokens, width, device=gate_up.device, dtype=gate_up.dtype)
    dropped = None if dropout is None else torch.empty_like(y)
    fp8 = _copy_in_fp8(y, width, quantize)
    _swiglu[(tokens,)](
        gate_up, y, *(fp8 or (y, y)), y if dropped is None else dropped, *_dropout(dropout, y), width,
        DROP=dropped is not None, QUANTIZE=quantize, **_block(width),
    )  # fmt: skip
    return Rows(y, *(fp8 or ())), dropped


def swiglu_backward(
    dy: Tensor, gate_up: Tensor, dadapter: Tensor | None = None, dropout: Dropout | None = None, quantize: bool = False
) -> Rows:
    """Return the gradient of `gate_up`; `dadapter` and `dropout` as in `norm_backward`.

    With s the sigmoid of the gate: `dup = dy gate s` and `dgate = dy up s (1 + gate (1 - s))`.

    Shapes:
        dy and dadapter (T, I), gate_up (T, 2 I); returns (T, 2 I).
    """
    tokens, width = dy.shape
    dgate_up = torch.empty_like(gate_up)
    fp8 = _copy_in_fp8(gate_up, 2 * width, quantize)
    _swiglu_backward[(tokens,)](
        dy, gate_up, dgate_up, *(fp8 or (dgate_up, dgate_up)), dy if dadapter is None else dadapter,
        *_dropout(dropout, dgate_up), width, DROP=dadapter is not None, QUANTIZE=quantize, **_block(width),
    )  # fmt: skip
    return Rows(dgate_up, *(fp8 or ()))


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return x after dropout; x itself without. Shape: (T, columns)."""
    if dropout is None:
        return x
    y = torch.empty_like(x)
    _drop[(len(x),)](x, y, *_dropout(dropout, x), x.shape[1], **_block(x.shape[1]))
    return y


def add_dropped_(x: Tensor, addend: Tensor, dropout: Dropout) -> Tensor:
    """Add `addend` after dropout to x in place, and return x. Shapes: both (T, columns)."""
    _add_dropped[(len(x),)](x, addend, *_dropout(dropout, x), x.shape[1], **_block(x.shape[1]))
    return x


def quantize(x: Tensor) -> Rows:
    """Return x with its copy in fp8. Shape: (T, columns)."""
    fp8 = _copy_in_fp8(x, x.shape[1], True)
    assert fp8 is not None
    _quantize[(len(x),)](x, *fp8, x.shape[1], **_block(x.shape[1]))
    return Rows(x, *fp8)
