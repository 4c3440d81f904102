"""Compute a frozen linear map plus its low-rank update as one autograd node.

`philora.lora`'s layers and the fast classes for PEFT's layers use it. One function does the arithmetic
(`_LoRALinear`); three entry points describe the layout of B:

| entry point          | A            | B                                | used by                      |
| -------------------- | ------------ | -------------------------------- | ---------------------------- |
| `lora_linear`        | (r, in)      | (out, r)                         | `Linear`, PEFT's Linear      |
| `lora_merged_linear` | (n*r, in)    | (rows of the adapted slices, r)  | `MergedLinear` (loralib's)   |
| `lora_sliced_linear` | (R, in)      | (out, R), block-diagonal         | slices in PEFT's format      |

The same functions in plain PyTorch run when the fused path is off: `PHILORA_FUSED=0` in the environment, or
`with fused(False)`.

Letters in the shapes: T tokens (all leading dimensions together), in, out features, r rank of one update, R rank
of all updates of one weight together, n number of adapted slices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from philora.errors import ConfigError, fault
from philora.lora.recomputation import Recipe, random_state, recipe_of, set_random_state
from philora.native import library as native


class Quantized(Protocol):
    """A frozen weight that is dequantised for every product; backward dequantises it again.

    Attributes:
        shape: (out, in).
    """

    shape: torch.Size

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix for one product. Without a recorded gradient the next call may overwrite it.

        Shape: (out, in).
        """


def _matrix(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


class Block(NamedTuple):
    """A part of the update: output rows `out_start:out_stop` use ranks `rank_start:rank_stop` of A.

    Its part of B begins at row `b_row` and column `b_column` of the stored matrix.
    """

    out_start: int
    out_stop: int
    rank_start: int
    rank_stop: int
    b_row: int
    b_column: int

    def of_b(self, lora_B: Tensor) -> Tensor:
        """Return a view of the block's part of B. Shape: (out_stop - out_start, rank_stop - rank_start)."""
        rows = self.out_stop - self.out_start
        ranks = self.rank_stop - self.rank_start
        return lora_B[self.b_row : self.b_row + rows, self.b_column : self.b_column + ranks]


# One value for all threads: on a GPU backward, and so recomputation, runs in threads of the autograd engine.
_fused: bool | None = None


def fused_enabled() -> bool:
    """Return whether the fused autograd function is used: as set by `fused`, else unless `PHILORA_FUSED` is 0.

    It is never used while a graph is recorded (`records`).
    """
    if records():
        return False
    return os.environ.get("PHILORA_FUSED", "1") != "0" if _fused is None else _fused


def records() -> bool:
    """Return whether PyTorch's operations are being recorded or transformed, so that only they may be used.

    torch.compile and torch.export fuse operations and choose saved tensors themselves. torch.jit.trace and torch.fx
    record what they see, and pass proxies instead of sizes and tensors. torch.func's transforms, such as vmap, have no
    rule for the fused functions.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or is_fx_symbolic_tracing()
    )


def refuse_create_graph() -> None:
    """Refuse to record a backward pass whose gradients are made in place and have no history.

    PyTorch's `once_differentiable` is not enough: `torch.autograd.grad` ignores its error and leaves terms out.

    Raises:
        RuntimeError: The backward pass itself is to be differentiated.
    """
    if torch.is_grad_enabled():
        todo = "Set PHILORA_FUSED=0 and attn_implementation='eager'"
        raise RuntimeError(f"create_graph=True - the fast modules have no second derivative. {todo}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device: str) -> bool:
    # The compiler of PyTorch 2.11 cannot trace this question.
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of the open autocast block for this kind of device; None if there is none."""
    # The meta device has no autocast, and asking about it raises.
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast for this kind of device."""
    if not _has_autocast(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Turn the fused autograd function on or off in this block, regardless of the environment."""
    global _fused
    before, _fused = _fused, enabled
    try:
        yield
    finally:
        _fused = before


def merged_blocks(slices: Sequence[int], enable_lora: Sequence[bool], r: int) -> list[Block]:
    """Return the layout of loralib's MergedLinear: B holds the rows of the adapted slices one after another, r wide.

    Args:
        slices: Output rows of every slice, adapted or not, in order.
        enable_lora: Which slices are adapted.
        r: Rank of every adapted slice.
    """
    blocks, row, b_row, adapted = [], 0, 0, 0
    for rows, enabled in zip(slices, enable_lora, strict=True):
        if enabled:
            blocks.append(Block(row, row + rows, adapted * r, (adapted + 1) * r, b_row, 0))
            b_row += rows
            adapted += 1
        row += rows
    return blocks


def diagonal_blocks(blocks: Sequence[Sequence[int]], out_features: int, rank: int) -> list[Block]:
    """Return the layout of slices in PEFT's format: a full-height B with blocks where rows and ranks meet.

    Args:
        blocks: `(row_start, row_stop, rank_start, rank_stop)` of every update; neither rows nor ranks overlap.
        out_features: Rows of B.
        rank: Columns of B.

    Raises:
        ConfigError: A block is empty, exceeds B, or shares rows or ranks with another.
    """
    where = "philora.lora.lora_sliced_linear"
    for first, name, bound in ((0, "rows", out_features), (2, "ranks", rank)):
        stop = 0
        for block in sorted(blocks, key=lambda item: item[first]):
            if not stop <= block[first] < block[first + 1] <= bound:
                expected = f"{name} that are not empty, end by {bound} and belong to one block only"
                raise ConfigError(fault(where, "blocks", [tuple(item) for item in blocks], expected))
            stop = block[first + 1]
    return [Block(top, bottom, left, right, top, left) for top, bottom, left, right in blocks]


# Elements of x that dropout on the CPU computes at a time. A tensor of x's own size would be new memory in every call,
# and page faults take longer than the arithmetic. 2^20 elements of bf16 are 2 MiB, which fits into the caches and which
# the allocator keeps. Smaller pieces make the threads synchronise more often.
_PIECE_ELEMENTS = 2**20


def _pieces(x: Tensor) -> list[slice]:
    """Return the rows of x that dropout computes at a time: a multiple of four, so that masks do not depend on it."""
    count = max(len(x), 1)
    size = max(_PIECE_ELEMENTS // max(x.shape[-1], 1) // 4 * 4, 4) if x.device.type == "cpu" else count
    return [slice(start, start + size) for start in range(0, count, size)]


def _packs(x: Tensor) -> bool:
    """Return whether `philora.native.library` draws the mask of x, with one bit for every element."""
    return native.usable(x[:0])


def _keep_mask(x: Tensor, p: float, packed: bool) -> tuple[Tensor, float]:
    """Return which elements dropout keeps, and what the kept ones are multiplied by.

    Args:
        x: Activations.
        p: Probability of dropping an element.
        packed: The value of `_packs(x)`, now or when the same mask was first drawn.

    Returns:
        The mask and the factor. A packed mask has one bit for every element (16 in an int16); another has a byte, 1 or
        0, by which PyTorch multiplies three times faster than by a bool.

    Numerics:
        On the CPU 16 bits are drawn for every element, so p is rounded to a multiple of 2^-16. `bernoulli_` draws 64,
        which takes four times as long: a tenth of the layer's time on two cores.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        return mask.view(torch.uint8), 0.0 if p >= 1 else 1.0 / (1.0 - p)
    dropped = round(p * 2**16)
    factor = 0.0 if dropped == 2**16 else 2**16 / (2**16 - dropped)
    if packed:
        return native.keep_bits(x.shape[0], x.shape[1], dropped), factor
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for rows in _pieces(x):
        piece = mask[rows]
        words = piece.new_empty((piece.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        halves = words.view(torch.int16)[: piece.numel()].view(piece.shape)
        torch.ge(halves, dropped - 2**15, out=piece)
    return mask.view(torch.uint8), factor


class _Redraw(NamedTuple):
    """A mask that backward draws again: the generator's state before it was drawn, and how it was drawn."""

    state: Tensor
    p: float
    packed: bool

    def mask(self, x: Tensor) -> Tensor:
        """Draw the mask with the generator of x's device, and restore its state. Shape: as `_keep_mask`."""
        now = random_state(x.device)
        try:
            set_random_state(x.device, self.state)
            return _keep_mask(x, self.p, self.packed)[0]
        finally:
            set_random_state(x.device, now)


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x * mask`. Shapes: x (T, in), mask as from `_keep_mask`."""
    if mask.dtype == torch.uint8:
        return x * mask
    if native.usable(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return native.keep(x, mask)
    bits = (mask[..., None] >> torch.arange(16, dtype=torch.int16, device=mask.device)) & 1
    return x * bits.view(len(x), -1)[:, : x.shape[1]]


def _add_kept(y: Tensor, x: Tensor, mask: Tensor) -> None:
    """Add `x * mask` to y in place. Shapes: both (T, in), mask as from `_keep_mask`."""
    if mask.dtype == torch.uint8:
        y.addcmul_(x, mask.to(x.dtype))
    elif native.usable(y, x) and not torch.is_grad_enabled():
        native.add_kept_(y, x, mask)
    else:
        y += _kept(x, mask)


def _dropout(x: Tensor, p: float) -> Tensor:
    """Apply dropout with the masks of the fused function, or PyTorch's own while a graph is recorded (`records`)."""
    if records():
        return F.dropout(x, p)
    flat = x.reshape(-1, x.shape[-1])
    mask, factor = _keep_mask(flat, p, _packs(flat))
    return _kept(flat, mask).view(x.shape) * factor


def _down(x: Tensor, mask: Tensor | None, lora_A: Tensor) -> Tensor:
    """Return `(x * mask) A^T`. Shape: (T, R)."""
    if mask is None:
        return x @ lora_A.t()
    down = x.new_empty(x.shape[0], lora_A.shape[0])
    for rows in _pieces(x):
        down[rows] = _kept(x[rows], mask[rows]) @ lora_A.t()
    return down


class _Update(NamedTuple):
    """How an update is computed from A and B.

    Attributes:
        scaling: Multiplier of all blocks.
        blocks: Where the parts of B are, and what they are added to.
        dropout_p: Probability of dropout on the way into A; 0 while dropout is off.
        redraw: Whether backward draws the mask again if that takes less memory than keeping it.
    """

    scaling: float
    blocks: Sequence[Block]
    dropout_p: float
    redraw: bool = False


class _LoRALinear(torch.autograd.Function):
    """`y = x W^T + b`, then `y[:, rows] += s * (x * m) A[ranks]^T B[block]^T` for every block.

    m is the mask of dropout, and its factor is part of s. With `G = s * dy B` (T, R; computed block by block) the
    gradients are

        dx = dy W + (G A) * m        dA = G^T (x * m)        dB[block] = s * dy[:, rows]^T ((x * m) A^T)[:, ranks]

    Neither `B A` nor any other (out, in) or extra (T, out) tensor is made. Thin products are accumulated into the wide
    ones in place (`addmm_`), which is four times faster than a product and an addition. Saved for backward: x,
    `(x * m) A^T` and, with dropout, m. The weight is saved by reference, a quantised one as it is. If x has a recipe,
    its inputs are saved instead of x; with `redraw` the generator's state is saved instead of m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Quantized,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        update: _Update,
        recipe: Recipe | None,
    ) -> Tensor:
        """Compute y. All tensors have one dtype; x is (T, in), or as the recipe makes it."""
        matrix = _matrix(weight, x.dtype)
        y = x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())
        del matrix
        p = update.dropout_p
        packed = p > 0 and _packs(x)
        drawn = _Redraw(random_state(x.device), p, packed) if update.redraw and p > 0 else None
        mask, factor = _keep_mask(x, p, packed) if p > 0 else (None, 1.0)
        scale = update.scaling * factor
        down = _down(x, mask, lora_A)
        for block in update.blocks:
            ranks = slice(block.rank_start, block.rank_stop)
            y[:, block.out_start : block.out_stop].addmm_(down[:, ranks], block.of_b(lora_B).t(), alpha=scale)
        plain = isinstance(weight, Tensor)
        if drawn is not None and mask is not None and mask.nbytes > drawn.state.nbytes:
            ctx.drawn, mask = drawn, None
        else:
            ctx.drawn = None
        kept = (x,) if recipe is None else recipe.inputs
        ctx.save_for_backward(*kept, weight if plain else None, lora_A, lora_B, down, mask)
        ctx.make, ctx.dtype = None if recipe is None else recipe.make, x.dtype
        ctx.quantized = None if plain else weight
        ctx.scale, ctx.blocks = scale, update.blocks
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias, lora_A and lora_B that are asked for."""
        (dy,) = grads
        with without_autocast(dy.device.type):
            return _LoRALinear._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight, lora_A, lora_B, down, mask = ctx.saved_tensors
        x = kept[0] if ctx.make is None else ctx.make(*kept).to(ctx.dtype)
        x = x.reshape(-1, x.shape[-1])
        if ctx.drawn is not None:
            mask = ctx.drawn.mask(x)
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            # create_graph=True: `down` was saved without its history, so it is computed again with it.
            down = _down(x, mask, lora_A)
        dx = dy @ _matrix(weight if ctx.quantized is None else ctx.quantized, dy.dtype) if needs_x else None
        dA = None
        if needs_x or needs_A:
            g = dy.new_zeros(down.shape)  # ranks that no block covers get no gradient
            for block in ctx.blocks:
                rows = dy[:, block.out_start : block.out_stop]
                g[:, block.rank_start : block.rank_stop].addmm_(rows, block.of_b(lora_B), alpha=ctx.scale)
            dA = _down_gradients(g, x, mask, lora_A, dx, needs_A)
        dB = _up_gradient(dy, down, lora_B, ctx.blocks, ctx.scale) if needs_B else None
        dweight = dy.t() @ x if needs_weight else None
        dbias = dy.sum(0) if needs_bias else None
        return dx, dweight, dbias, dA, dB, None, None


def _down_gradients(
    g: Tensor, x: Tensor, mask: Tensor | None, lora_A: Tensor, dx: Tensor | None, needs_A: bool
) -> Tensor | None:
    """Add the update's part to dx in place, and return the gradient of A if it is asked for. Shape of g: (T, R)."""
    if mask is None:
        dA = g.t() @ x if needs_A else None
        if dx is not None:
            dx.addmm_(g, lora_A)
        return dA
    sums = []
    for piece in _pieces(x):
        if needs_A:
            sums.append(g[piece].t() @ _kept(x[piece], mask[piece]))
        if dx is not None:
            _add_kept(dx[piece], g[piece] @ lora_A, mask[piece])
    # PyTorch sums low precision in fp32, so the sum of the pieces is rounded once more.
    return torch.stack(sums).sum(0) if needs_A else None


def _up_gradient(dy: Tensor, down: Tensor, lora_B: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Return the gradient of B: exactly zero outside the blocks."""
    dB = torch.zeros_like(lora_B)
    for block in blocks:
        rows = dy[:, block.out_start : block.out_stop]
        thin = down[:, block.rank_start : block.rank_stop].t()
        # Transposed: a third less time than `rows^T thin`. beta=0: the first argument is not read.
        up = torch.addmm(dy.new_zeros(()), thin, rows, beta=0, alpha=scale)
        block.of_b(dB).copy_(up.t())
    return dB


def _low_rank(
    x: Tensor, weight: Tensor | Quantized, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, update: _Update
) -> Tensor:
    """Compute the fused function on tensors of any leading shape and mixed dtypes."""
    dtype, device = x.dtype, x.device.type
    if dtype != torch.float64 and (chosen := autocast_dtype(device)) is not None:
        dtype = chosen
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        bias = None if bias is None else bias.to(dtype)
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    with without_autocast(device):
        y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, lora_A.to(dtype), lora_B.to(dtype), update, recipe_of(x)
        )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _low_rank_reference(
    x: Tensor, weight: Tensor | Quantized, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, update: _Update
) -> Tensor:
    """Compute the same as `_low_rank` in plain PyTorch."""
    y = F.linear(x, _matrix(weight, x.dtype), bias)
    dropped = _dropout(x, update.dropout_p) if update.dropout_p > 0 else x
    down = F.linear(dropped, lora_A.to(x.dtype))
    parts, row = [], 0
    for block in sorted(update.blocks):
        parts.append(y[..., row : block.out_start])
        up = F.linear(down[..., block.rank_start : block.rank_stop], block.of_b(lora_B).to(down.dtype))
        parts.append(y[..., block.out_start : block.out_stop] + up * update.scaling)
        row = block.out_stop
    return torch.cat([*parts, y[..., row:]], dim=-1)


def lora_linear(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
    redraw: bool = False,
) -> Tensor:
    """Compute `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        x: Activations.
        weight: Base weight of any strides, so that an (in, out) matrix can be given as its transpose; or a quantised
            one.
        bias: Base bias.
        lora_A: Down matrix, of any floating dtype.
        lora_B: Up matrix, of any floating dtype.
        scaling: Multiplier of the update.
        dropout_p: Probability with which an element of x is dropped on its way into A.
        training: Whether dropout is on.
        redraw: Whether backward draws dropout's mask again if that takes less memory than keeping it.

    Shapes:
        x (..., in), weight (out, in), bias (out), lora_A (r, in), lora_B (out, r); returns (..., out).

    Numerics:
        All products are in x's dtype (under autocast: autocast's) with fp32 accumulation; A and B are rounded to it.
        y is rounded after the base product and again after the update. Gradients of A and B are rounded to the
        product's dtype, then returned in the dtypes of A and B. Second derivatives are supported. Dropout's masks come
        from torch's generator, but differ from those of nn.Dropout with the same seed; on the CPU dropout_p is rounded
        to a multiple of 2^-16.

    Cost:
        Forward 2·T·(in·out + r·(in + out)) FLOPs. Keeps x and T·r elements for backward; with dropout also T·in
        bits (bytes without `philora.native.library`).

    Raises:
        RuntimeError: Shapes or the dtypes of x and weight do not fit (PyTorch's own message).

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1; loralib 0.1.2, `Linear`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.zeros(4, 3)
        >>> lora_linear(x, weight, None, torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)[0]
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    if not fused_enabled():
        return lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, dropout_p, training)
    whole = [Block(0, weight.shape[0], 0, lora_A.shape[0], 0, 0)]
    update = _Update(scaling, whole, dropout_p if training else 0.0, redraw)
    return _low_rank(x, weight, bias, lora_A, lora_B, update)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Compute `lora_linear` in plain PyTorch, with the same dropout mask for the same seed.

    Shapes:
        As `lora_linear`.
    """
    dropped = _dropout(x, dropout_p) if training and dropout_p > 0 else x
    down = F.linear(dropped, lora_A.to(x.dtype))
    return F.linear(x, _matrix(weight, x.dtype), bias) + F.linear(down, lora_B.to(down.dtype)) * scaling


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    slices: Sequence[int],
    enable_lora: Sequence[bool],
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Compute a linear map whose output slices have their own updates, with B in loralib's compact layout.

    Args:
        x: Activations.
        weight: Base weight of all slices.
        bias: Base bias.
        lora_A: Down matrices of the adapted slices, stacked.
        lora_B: Up matrices of the adapted slices, stacked.
        scaling: Multiplier of all updates.
        slices: Output rows of every slice; they sum to `out`.
        enable_lora: Which slices are adapted; at least one.
        dropout_p: Probability of dropout on the way into A; one mask for all slices.
        training: Whether dropout is on.

    Shapes:
        x (..., in), weight (out, in), bias (out), lora_A (n·r, in), lora_B (rows of the adapted slices, r);
        returns (..., out).

    Numerics:
        As `lora_linear`.

    Source:
        loralib 0.1.2, `MergedLinear`, which builds the (out, in) update in every forward; this does not.
    """
    blocks = merged_blocks(slices, enable_lora, lora_A.shape[0] // sum(map(bool, enable_lora)))
    update = _Update(scaling, blocks, dropout_p if training else 0.0)
    return (_low_rank if fused_enabled() else _low_rank_reference)(x, weight, bias, lora_A, lora_B, update)


def lora_sliced_linear(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    blocks: Sequence[Sequence[int]],
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
    redraw: bool = False,
) -> Tensor:
    """Compute a linear map whose output slices have their own updates, with B block-diagonal in PEFT's format.

    Equal to `lora_linear` with the same A and B as long as B is zero outside its blocks. Elements outside the blocks
    are not read and have a gradient of zero, so zeros stay zeros under any optimizer.

    Args:
        x: Activations.
        weight: Base weight of all slices.
        bias: Base bias.
        lora_A: Down matrices, stacked.
        lora_B: Block-diagonal up matrix.
        blocks: `(row_start, row_stop, rank_start, rank_stop)` of every update.
        scaling: Multiplier of all updates.
        dropout_p: Probability of dropout on the way into A; one mask for all slices.
        training: Whether dropout is on.
        redraw: Whether backward draws dropout's mask again if that takes less memory than keeping it.

    Shapes:
        x (..., in), weight (out, in), bias (out), lora_A (R, in), lora_B (out, R); returns (..., out).

    Numerics:
        As `lora_linear`. The gradient of B is dense, with exact zeros outside the blocks.

    Raises:
        ConfigError: A block is empty, exceeds B, or shares rows or ranks with another.
    """
    layout = diagonal_blocks(blocks, weight.shape[0], lora_A.shape[0])
    update = _Update(scaling, layout, dropout_p if training else 0.0, redraw)
    return (_low_rank if fused_enabled() else _low_rank_reference)(x, weight, bias, lora_A, lora_B, update)
