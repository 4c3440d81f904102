"""Compute attention within documents on a CPU, in tiles whose scores stay in the cache.

PyTorch's flash kernel on a CPU spends more time on its tiles than on their products. Here the rotary embedding and the
split of a fused projection are part of the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from philora.kernels.document_groups import Group, Layout
from philora.lora.functional import refuse_create_graph, without_autocast
from philora.native import library as native
from philora.runtime.process_state import is_run

# Queries of a tile, and bytes of its scores: the tile and its gradient fit into two cores' second-level caches.
TILE_ROWS = 128
TILE_BYTES = 2 << 20

Angles = tuple[Tensor, Tensor] | None
"""cos and sin of every token, (B·T, half of the rotated columns) each; None if heads are not rotated."""


@contextmanager
def onednn_products() -> Iterator[None]:
    """Use oneDNN for a run's products in fp32; on tiles of attention it is twice as fast as the default library.

    The setting applies to the process, so a run sets it once, and only if it changes no value. It permits oneDNN to
    compute in bf16, which a processor without bf16 instructions cannot. With them, heads that `native` takes need no
    tiles.
    """
    if not is_run() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Tile(NamedTuple):
    """Queries `rows` of the batches `batch`, and the keys that they can see."""

    batch: slice
    rows: slice
    keys: slice


def _tiles(batches: int, length: int, window: int | None) -> Iterator[_Tile]:
    for start in range(0, length, TILE_ROWS):
        stop = min(start + TILE_ROWS, length)
        first = 0 if window is None else max(0, start - window + 1)
        count = max(1, TILE_BYTES // (4 * (stop - start) * (stop - first)))
        for batch in range(0, batches, count):
            yield _Tile(slice(batch, min(batch + count, batches)), slice(start, stop), slice(first, stop))


class _Scores:
    """Compute the attention weights of one tile after another in the same memory."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float, window: int | None) -> None:
        self.query, self.key, self.scaling, self.window = query, key, scaling, window
        self._memory: dict[str, Tensor] = {}
        self._masks: dict[tuple[int, int], Tensor] = {}
        self.native = native.usable(query) and scaling > 0

    def buffer(self, name: str, tile: _Tile) -> Tensor:
        """Return memory for the scores of a tile. Shape: (batch, rows, keys)."""
        shape = [item.stop - item.start for item in tile]
        size = shape[0] * shape[1] * shape[2]
        held = self._memory.get(name)
        if held is None or held.numel() < size:
            held = self._memory[name] = self.query.new_empty(size)
        return held[:size].view(shape)

    def of(self, tile: _Tile) -> Tensor:
        """Return the softmax of the scaled, masked products of a tile."""
        scores = self.buffer("weights", tile)
        keys = self.key[tile.batch, tile.keys].transpose(1, 2)
        if self.native:
            torch.bmm(self.query[tile.batch, tile.rows], keys, out=scores)
            native.causal_softmax_(scores, tile.rows.start - tile.keys.start, self.window, self.scaling)
            return scores
        torch.baddbmm(scores, self.query[tile.batch, tile.rows], keys, beta=0, alpha=self.scaling, out=scores)
        mask = self._mask(tile)
        scores[:, :, scores.shape[2] - mask.shape[1] :].add_(mask)
        return torch.softmax(scores, -1, out=scores)

    def backward(self, tile: _Tile, weights: Tensor, grad: Tensor) -> None:
        """Overwrite the gradient of a tile's weights with that of its unscaled products."""
        if self.native:
            offset = tile.rows.start - tile.keys.start
            native.causal_softmax_backward_(weights, grad, offset, self.window, self.scaling)
        else:
            torch.ops.aten._softmax_backward_data.out(grad, weights, -1, weights.dtype, grad_input=grad)
            grad.mul_(self.scaling)

    def _mask(self, tile: _Tile) -> Tensor:
        """Return the mask to add to the last columns: minus infinity for keys that come later or before the window."""
        rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        seen = keys if self.window is not None and keys >= self.window else rows  # columns that need a mask
        if (rows, seen) not in self._masks:
            query = torch.arange(seen - rows, seen)[:, None]
            distance = query - torch.arange(seen)[None]
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            mask = torch.zeros(rows, seen, dtype=self.query.dtype)
            self._masks[rows, seen] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[rows, seen]


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute causal attention in tiles. Shapes: all (N, L, D)."""
    output = torch.empty_like(query)
    scores = _Scores(query, key, scaling, window)
    for tile in _tiles(query.shape[0], query.shape[1], window):
        torch.bmm(scores.of(tile), value[tile.batch, tile.keys], out=output[tile.batch, tile.rows])
    return output


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; the attention weights P are computed again.

    With dP = dO V^T: dV = P^T dO, dS = scaling * P * (dP - rowsum(P * dP)), dQ = dS K, dK = dS^T Q.
    """
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scores = _Scores(query, key, scaling, window)
    for tile in _tiles(query.shape[0], query.shape[1], window):
        rows, keys = (tile.batch, tile.rows), (tile.batch, tile.keys)
        weights, d_scores = scores.of(tile), scores.buffer("gradient", tile)
        d_value[keys].baddbmm_(weights.transpose(1, 2), grad[rows])
        torch.bmm(grad[rows], value[keys].transpose(1, 2), out=d_scores)
        scores.backward(tile, weights, d_scores)
        torch.bmm(d_scores, key[keys], out=d_query[rows])
        d_key[keys].baddbmm_(d_scores.transpose(1, 2), query[rows])
    return d_query, d_key, d_value


def _gather(flat: Tensor, group: Group, angles: Angles, repeat: int = 1) -> Tensor:
    """Gather the heads of a group's documents, rotate them if there are angles, and repeat them; padding is zero.

    Shapes:
        flat (B·T, heads, D), cos and sin (B·T, half of the rotated columns);
        returns (repeat · heads · documents, L, D).
    """
    heads, width = flat.shape[1:]
    if _native(flat):
        return native.gather_heads(flat, repeat, group.starts, group.lengths, group.length, angles)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    shape = (heads, group.documents, group.length, width)
    result = flat.new_empty(shape, dtype=dtype)
    places = result.view(heads, -1, width)
    if group.start is None:
        assert group.padding is not None
        rows = flat.index_select(0, group.tokens).view(group.documents, group.length, heads, width)
        result.copy_(rows.permute(2, 0, 1, 3))
        places.index_fill_(1, group.padding, 0)
    else:
        places[:, : group.filled] = flat[group.start : group.start + group.filled].transpose(0, 1)
        places[:, group.filled :] = 0
    if angles is not None:
        _rotate(result, *_of_group(group, angles))
    return result.repeat_interleave(repeat, 0).view(-1, group.length, width)


def _scatter(rows: Tensor, flat: Tensor, group: Group, angles: Angles) -> None:
    """Reverse `_gather`: sum the copies of a head, rotate back if there are angles, and drop padding.

    Shapes:
        rows (repeat · heads · documents, L, D) into flat (B·T, heads, D).
    """
    heads, width = flat.shape[1:]
    repeat = len(rows) // (heads * group.documents)
    if _native(flat):
        native.scatter_heads(rows, flat, repeat, group.starts, group.lengths, angles)
        return
    if repeat > 1:
        rows = rows.view(heads, repeat, -1).sum(1)
    rows = rows.view(heads, group.documents, group.length, width)
    if angles is not None:
        cos, sin = _of_group(group, angles)
        _rotate(rows, cos, -sin)
    if group.start is None:
        assert group.places is not None
        values = rows.permute(1, 2, 0, 3).to(flat.dtype).reshape(-1, heads, width).index_select(0, group.places)
        flat.index_copy_(0, group.tokens.index_select(0, group.places), values)
    else:
        flat[group.start : group.start + group.filled] = rows.view(heads, -1, width)[:, : group.filled].transpose(0, 1)


def _native(flat: Tensor) -> bool:
    """Return whether the compiled functions take these heads, which may be columns of wider rows."""
    return flat.stride()[1:] == (flat.shape[2], 1) and native.usable(flat[:0])


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first columns of every head in place: (a, b) becomes (a cos - b sin, b cos + a sin).

    Shapes:
        rows (heads, documents, length, D), cos and sin (documents, length, half of the rotated columns).
    """
    half = cos.shape[-1]
    first, second = rows[..., :half], rows[..., half : 2 * half]
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)


def _of_group(group: Group, angles: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """Return cos and sin at a group's positions. Shapes: given (B·T, half); returns (documents, length, half)."""
    return (item.index_select(0, group.tokens).view(group.documents, group.length, -1) for item in angles)


def _heads(parts: Sequence[Tensor], heads: tuple[int, int]) -> list[Tensor]:
    """Return views of q, k and v by heads. Shapes: (B·T, heads, D)."""
    query, key = heads
    if len(parts) == 3:
        return [part.view(len(part), count, -1) for part, count in zip(parts, (query, key, key), strict=True)]
    return list(torch.split(parts[0].view(len(parts[0]), query + 2 * key, -1), [query, key, key], 1))


class TiledAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of every document, from the projections' output to the heads' output.

    Saved for backward: the projections' output. Rotation and attention weights are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        heads: tuple[int, int],
        scaling: float,
        window: int | None,
        cos: Tensor | None,
        sin: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        """Compute the output. Shapes: parts (B·T, (H+2K)·D), or q, k, v (B·T, H·D), (B·T, K·D), (B·T, K·D)."""
        views, angles = _heads(parts, heads), None if cos is None or sin is None else (cos, sin)
        ctx.layout, ctx.heads, ctx.scaling, ctx.window = layout, heads, scaling, window
        if native.attends(views, scaling):
            causal = native.Causal(layout.starts, layout.lengths, angles, window, scaling)
            output, normaliser = native.attend(views, causal)
            output = output.view(len(output), -1)
            ctx.save_for_backward(cos, sin, output, normaliser, *parts)
            return output
        output = parts[0].new_empty(len(parts[0]), heads[0], views[0].shape[2])
        with without_autocast("cpu"):
            for group in layout.groups:
                _scatter(_attend(*_prepared(views, group, angles), scaling, window), output, group, None)
        ctx.save_for_backward(cos, sin, None, None, *parts)
        return output.view(len(output), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parts."""
        refuse_create_graph()
        cos, sin, output, normaliser, *parts = ctx.saved_tensors
        views, angles = _heads(parts, ctx.heads), None if cos is None else (cos, sin)
        results = [part.new_empty(part.shape) for part in parts]
        grad = grads[0].reshape(len(grads[0]), ctx.heads[0], -1)
        if normaliser is not None:
            causal = native.Causal(ctx.layout.starts, ctx.layout.lengths, angles, ctx.window, ctx.scaling)
            saved, of_heads = (output, normaliser), _heads(results, ctx.heads)
            native.attend_backward(views, causal, saved, grad.contiguous(), of_heads)
            return None, None, None, None, None, None, *results
        with without_autocast("cpu"):
            for group in ctx.layout.groups:
                prepared, d_output = _prepared(views, group, angles), _gather(grad, group, None)
                found = _attend_backward(*prepared, d_output, ctx.scaling, ctx.window)
                for item, place, turned in zip(found, _heads(results, ctx.heads), (angles, angles, None), strict=True):
                    _scatter(item, place, group, turned)
        return None, None, None, None, None, None, *results


def _prepared(views: Sequence[Tensor], group: Group, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of a group, rotated; k and v are repeated per query head. Shapes: (H·documents, length, D)."""
    query, key, value = views
    repeat = query.shape[1] // key.shape[1]
    return _gather(query, group, angles), _gather(key, group, angles, repeat), _gather(value, group, None, repeat)


def rotary_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    layout: Layout,
    *,
    scaling: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Compute attention on a CPU from the output of a fused q, k, v projection, with the rotary embedding.

    Args:
        qkv: Queries, keys and values of all heads, not rotated.
        cos, sin: Of the rotary embedding, with two equal halves as in transformers.
        heads: Numbers of query and of key heads.
        layout: Layout of the same batch.
        scaling: Multiplier of the scores.
        sliding_window: Number of tokens that a token attends to at most, itself included.

    Shapes:
        qkv (B, T, (H+2K)·D), cos and sin (B or 1, T, rotated columns); returns (B, T, H·D).

    Numerics:
        fp32 (float64 for float64) from the rotation to the output, which is rounded once to qkv's dtype.

    Cost:
        12·H·D·(sum of squared document lengths) FLOPs with the gradient; half of that is below the diagonal.
        Keeps qkv for backward.
    """
    batch, tokens, _ = qkv.shape
    dtype, half = torch.promote_types(qkv.dtype, torch.float32), cos.shape[-1] // 2
    rows = [item[..., :half].to(dtype).expand(batch, -1, -1).reshape(-1, half).contiguous() for item in (cos, sin)]
    output: Tensor = TiledAttention.apply(  # type: ignore[no-untyped-call]
        layout, heads, scaling, sliding_window, *rows, qkv.reshape(batch * tokens, -1)
    )
    return output.view(batch, tokens, -1)
