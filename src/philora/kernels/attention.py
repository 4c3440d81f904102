"""Attention within every document of a packed row, without a mask of row length squared.

Several conversations share one row when they are packed; each attends to itself only, and its positions start again at
zero. transformers expresses that by a dense T x T mask. Here the documents are gathered into groups of about equal
length, so the work is the sum of the squared lengths of the documents.

On a CPU, whose flash kernel takes more time for its tiles than for its products, a group is computed here in tiles that
stay in the cache (`_TiledAttention`), with the rotary embedding and the splitting of a fused projection in the same
pass. On a GPU there is one call of flash attention for all documents, or, as `attention_choice` says, one causal call
of PyTorch's scaled_dot_product_attention for every group.

`register` makes it known to transformers under `NAME`; `philora.adapters.fast_layers.optimize` switches models over.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from philora.kernels.attention_choice import AttentionFacts, Way, attention_for
from philora.kernels.layout import LENGTHS, PackedLayout
from philora.kernels.switches import stack_switch
from philora.kernels.varlen import Attention, disagreement, varlen_attention
from philora.lora.functional import fused_enabled, refuse_create_graph, without_autocast
from philora.native import library as native
from philora.runtime.process_state import is_run

logger = logging.getLogger(__name__)

NAME = "philora_sdpa"

# Architectures of transformers whose decoder layers hand position_ids on to the attention function.
MODEL_TYPES = ("phi3", "llama", "mistral", "qwen2", "qwen3")

# Queries of a tile, and bytes of its scores: the tile and its gradient stay in two cores' second-level caches.
TILE_ROWS = 128
TILE_BYTES = 2 << 20


class Group(NamedTuple):
    """Documents of about equal length, padded to one length.

    Attributes:
        documents: How many.
        length: Tokens of every place row; those beyond a document's own are padding.
        tokens: For every place (documents x length), the token of B·T; places of padding repeat token 0.
        start: First token, when the places are one run of tokens; the tokens after `filled` are padding then.
        filled: Places that are no padding, when `start` is given.
        starts: First token of every document, on the CPU.
        lengths: Tokens of every document, on the CPU.
        places: Places that are no padding, in order; None when `start` is given.
        padding: The other places.
    """

    documents: int
    length: int
    tokens: Tensor
    start: int | None
    filled: int
    starts: Tensor
    lengths: Tensor
    places: Tensor | None = None
    padding: Tensor | None = None


class Layout(NamedTuple):
    """Describe how the tokens of a packed batch are gathered into groups of documents of about equal length.

    Attributes:
        groups: The groups; their places come one after another.
        scatter: For every token, its place.
        starts: First token of every document, the longest first, on the CPU.
        lengths: Tokens of every document.
    """

    groups: tuple[Group, ...]
    scatter: Tensor
    starts: Tensor
    lengths: Tensor


_known: list[tuple[weakref.ref[Tensor], int, int, PackedLayout]] = []


def documents_of(
    position_ids: Tensor, rows: int, keywords: Mapping[str, Any], with_lengths: bool = True
) -> PackedLayout:
    """Return the documents of a batch: as it carries them, else read from the positions.

    Args:
        position_ids: Positions; a document begins wherever one is not the one before plus one.
        rows: Rows of the batch.
        keywords: What else the batch carries.
        with_lengths: Whether their lengths have to be known on the host.

    Shapes:
        position_ids (B or 1, T).

    Cost:
        Positions are read once for a tensor, which waits for a GPU; the result is remembered while the tensor lives.
    """
    carried = PackedLayout.of_keywords(keywords) if rows == 1 else None
    if carried is not None and (carried.lengths is not None or not with_lengths):
        return carried
    version = 0 if position_ids.is_inference() else position_ids._version
    for known, at, count, layout in _known:
        if known() is position_ids and at == version and count == rows:
            return layout
    layout = PackedLayout.of_positions(position_ids.expand(rows, -1) if len(position_ids) < rows else position_ids)
    _known[:] = [name for name in _known if name[0]() is not None][-3:]
    _known.append((weakref.ref(position_ids), version, rows, layout))
    return layout


def groups_of(documents: PackedLayout, rows: int) -> Layout:
    """Return the groups of the documents of a batch, which are made once for a batch."""
    assert documents.lengths is not None
    return _groups(documents.lengths, rows, documents.bounds.device)


def layout_of(position_ids: Tensor) -> Layout | None:
    """Return the groups of a batch, or None when no row holds more than one document.

    Shapes:
        position_ids (B, T); a document begins wherever the position is not the one before plus one.
    """
    documents = documents_of(position_ids, len(position_ids), {})
    assert documents.lengths is not None
    return None if len(documents.lengths) == len(position_ids) else groups_of(documents, len(position_ids))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # they are used again, and where a gradient is recorded
def _groups(lengths: tuple[int, ...], rows: int, device: torch.device) -> Layout:
    if len(lengths) == rows:
        every, total = torch.arange(sum(lengths), device=device), sum(lengths)
        of_rows = torch.arange(rows) * lengths[0], torch.tensor(lengths)
        return Layout((Group(rows, lengths[0], every, 0, total, *of_rows),), every, *of_rows)
    starts = [0, *accumulate(lengths)][:-1]
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        # Few different lengths, since each new one costs the preparation of its products.
        step = 8 if length <= 64 else 32 if length <= 512 else 64
        by_length.setdefault(-(-length // step) * step, []).append(index)
    scatter = torch.empty(sum(lengths), dtype=torch.long)
    groups, first = [], 0
    for length, documents in by_length.items():
        at = torch.zeros(len(documents), length, dtype=torch.long)
        places, padding = list[Tensor](), list[Tensor]()
        for row, document in enumerate(documents):
            start, own, place = starts[document], lengths[document], row * length
            stop = place + own
            at[row, :own] = torch.arange(start, start + own)
            places.append(torch.arange(place, stop))
            padding.append(torch.arange(stop, place + length))
            scatter[start : start + own] = torch.arange(first + place, first + stop)
        first += len(documents) * length
        bounds = [torch.tensor([item[document] for document in documents]) for item in (starts, lengths)]
        filled = sum(map(len, places))
        group = Group(len(documents), length, _moved(at.flatten(), device), None, filled, *bounds)
        if len(documents) == 1:
            group = group._replace(start=starts[documents[0]])
        else:
            both = [_moved(torch.cat(item), device) for item in (places, padding)]
            group = group._replace(places=both[0], padding=both[1])
        groups.append(group)
    order = sorted(range(len(starts)), key=lambda document: -lengths[document])
    by_size = [torch.tensor([item[document] for document in order]) for item in (starts, lengths)]
    return Layout(tuple(groups), _moved(scatter, device), *by_size)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ------------------------------------------------------------------------------------------- tiles on a CPU


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let a run's products of fp32 go to oneDNN, which is twice as fast as the default library on an attention's tiles.

    The setting is the whole process's, so a run sets it once, and only where it changes no value: it permits oneDNN to
    compute in bf16, which a processor without instructions for that cannot. With them, heads that `native` takes need
    no tiles.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or not is_run() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield  # torch before 2.9 has no such setting
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Tile(NamedTuple):
    """Queries `rows` of the batches `batch` against the keys that they may see."""

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
    """Attention weights of one tile after another, in memory that is used again."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float, window: int | None) -> None:
        self.query, self.key, self.scaling, self.window = query, key, scaling, window
        self._memory: dict[str, Tensor] = {}
        self._masks: dict[tuple[int, int], Tensor] = {}
        self.native = native.usable(query) and scaling > 0

    def room(self, name: str, tile: _Tile) -> Tensor:
        """Memory for the scores of a tile. Shape: (batch, rows, keys)."""
        shape = [item.stop - item.start for item in tile]
        size = shape[0] * shape[1] * shape[2]
        held = self._memory.get(name)
        if held is None or held.numel() < size:
            held = self._memory[name] = self.query.new_empty(size)
        return held[:size].view(shape)

    def of(self, tile: _Tile) -> Tensor:
        """Softmax of the scaled, masked products of a tile."""
        scores = self.room("weights", tile)
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
        """Gradient of the unscaled products of a tile, over that of the weights."""
        if self.native:
            offset = tile.rows.start - tile.keys.start
            native.causal_softmax_backward_(weights, grad, offset, self.window, self.scaling)
        else:
            torch.ops.aten._softmax_backward_data.out(grad, weights, -1, weights.dtype, grad_input=grad)
            grad.mul_(self.scaling)

    def _mask(self, tile: _Tile) -> Tensor:
        """Return what is added to the last columns: minus infinity where a key comes later or is out of the window."""
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
    """Causal attention in tiles. Shapes: all (N, L, D)."""
    output = torch.empty_like(query)
    scores = _Scores(query, key, scaling, window)
    for tile in _tiles(query.shape[0], query.shape[1], window):
        torch.bmm(scores.of(tile), value[tile.batch, tile.keys], out=output[tile.batch, tile.rows])
    return output


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the attention weights P are computed again.

    With dP = dO V^T: dV = P^T dO, dS = scaling * P * (dP - rowsum(P * dP)), dQ = dS K, dK = dS^T Q.
    """
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scores = _Scores(query, key, scaling, window)
    for tile in _tiles(query.shape[0], query.shape[1], window):
        rows, keys = (tile.batch, tile.rows), (tile.batch, tile.keys)
        weights, d_scores = scores.of(tile), scores.room("gradient", tile)
        d_value[keys].baddbmm_(weights.transpose(1, 2), grad[rows])
        torch.bmm(grad[rows], value[keys].transpose(1, 2), out=d_scores)
        scores.backward(tile, weights, d_scores)
        torch.bmm(d_scores, key[keys], out=d_query[rows])
        d_key[keys].baddbmm_(d_scores.transpose(1, 2), query[rows])
    return d_query, d_key, d_value


def _gather(flat: Tensor, group: Group, cos: Tensor | None, sin: Tensor | None, repeat: int = 1) -> Tensor:
    """Heads of a group's documents, rotated where cos and sin are given, each `repeat` times; padding is zero.

    Shapes:
        flat (B·T, heads, D), cos and sin (B·T, half of the rotated columns);
        returns (repeat · heads · documents, L, D).
    """
    heads, width = flat.shape[1:]
    if _native(flat):
        return native.gather_heads(flat, repeat, group.starts, group.lengths, group.length, _pair(cos, sin))
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
    angles = _angles(group, cos, sin)
    if angles is not None:
        _rotate(result, *angles)
    return result.repeat_interleave(repeat, 0).view(-1, group.length, width)


def _put_back(rows: Tensor, flat: Tensor, group: Group, cos: Tensor | None, sin: Tensor | None) -> None:
    """The other way: copies of a head are added up and turned back where cos and sin are given; padding is dropped.

    Shapes:
        rows (repeat · heads · documents, L, D) into flat (B·T, heads, D).
    """
    heads, width = flat.shape[1:]
    repeat = len(rows) // (heads * group.documents)
    if _native(flat):
        native.scatter_heads(rows, flat, repeat, group.starts, group.lengths, _pair(cos, sin))
        return
    if repeat > 1:
        rows = rows.view(heads, repeat, -1).sum(1)
    rows = rows.view(heads, group.documents, group.length, width)
    angles = _angles(group, cos, sin)
    if angles is not None:
        _rotate(rows, angles[0], -angles[1])
    if group.start is None:
        assert group.places is not None
        values = rows.permute(1, 2, 0, 3).to(flat.dtype).reshape(-1, heads, width).index_select(0, group.places)
        flat.index_copy_(0, group.tokens.index_select(0, group.places), values)
    else:
        flat[group.start : group.start + group.filled] = rows.view(heads, -1, width)[:, : group.filled].transpose(0, 1)


def _native(flat: Tensor) -> bool:
    """Return whether the compiled functions take these heads, which may be some columns of wider rows."""
    return flat.stride()[1:] == (flat.shape[2], 1) and native.usable(flat[:0])


def _pair(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cos is None or sin is None else (cos, sin)


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


def _angles(group: Group, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """cos and sin at a group's places. Shapes: given (B·T, half); returns (documents, length, half)."""
    if cos is None or sin is None:
        return None
    rows = [item.index_select(0, group.tokens).view(group.documents, group.length, -1) for item in (cos, sin)]
    return rows[0], rows[1]


def _heads(parts: Sequence[Tensor], heads: tuple[int, int]) -> list[Tensor]:
    """Views of q, k and v by heads. Shapes: (B·T, heads, D)."""
    query, key = heads
    if len(parts) == 3:
        return [part.view(len(part), count, -1) for part, count in zip(parts, (query, key, key), strict=True)]
    return list(torch.split(parts[0].view(len(parts[0]), query + 2 * key, -1), [query, key, key], 1))


class _TiledAttention(torch.autograd.Function):
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
        """parts: q, k, v fused (B·T, (H+2K)·D), or each by itself (B·T, H·D), (B·T, K·D), (B·T, K·D)."""
        views = _heads(parts, heads)
        ctx.layout, ctx.heads, ctx.scaling, ctx.window = layout, heads, scaling, window
        if native.attends(views, scaling):
            output, normaliser = native.attend(views, layout.starts, layout.lengths, _pair(cos, sin), window, scaling)
            output = output.view(len(output), -1)
            ctx.save_for_backward(cos, sin, output, normaliser, *parts)
            return output
        output = parts[0].new_empty(len(parts[0]), heads[0], views[0].shape[2])
        with without_autocast("cpu"):
            for group in layout.groups:
                query, key, value = _prepared(views, group, cos, sin)
                _put_back(_attend(query, key, value, scaling, window), output, group, None, None)
        ctx.save_for_backward(cos, sin, None, None, *parts)
        return output.view(len(output), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parts."""
        refuse_create_graph()
        cos, sin, output, normaliser, *parts = ctx.saved_tensors
        views = _heads(parts, ctx.heads)
        results = [part.new_empty(part.shape) for part in parts]
        grad = grads[0].reshape(len(grads[0]), ctx.heads[0], -1)
        if normaliser is not None:
            layout, settings = ctx.layout, (_pair(cos, sin), ctx.window, ctx.scaling)
            saved, places = (output, normaliser), _heads(results, ctx.heads)
            native.attend_backward(views, layout.starts, layout.lengths, *settings, saved, grad.contiguous(), places)
            return None, None, None, None, None, None, *results
        with without_autocast("cpu"):
            for group in ctx.layout.groups:
                query, key, value = _prepared(views, group, cos, sin)
                d_output = _gather(grad, group, None, None)
                gradients = _attend_backward(query, key, value, d_output, ctx.scaling, ctx.window)
                for item, place, turn in zip(gradients, _heads(results, ctx.heads), (True, True, False), strict=True):
                    _put_back(item, place, group, cos if turn else None, sin if turn else None)
        return None, None, None, None, None, None, *results


def _prepared(
    views: Sequence[Tensor], group: Group, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a group, rotated, k and v once for every query head. Shapes: (H·documents, length, D)."""
    query, key, value = views
    repeat = query.shape[1] // key.shape[1]
    return (
        _gather(query, group, cos, sin),
        _gather(key, group, cos, sin, repeat),
        _gather(value, group, None, None, repeat),
    )


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
    """From the output of a fused q, k, v projection to the input of the output projection, on a CPU.

    Args:
        qkv: Queries, keys and values of all heads, unrotated.
        cos: Cosines of the rotary embedding, both halves alike, as transformers has them.
        sin: Sines.
        heads: Numbers of query and of key heads.
        layout: Of the same batch.
        scaling: Multiplier of the scores.
        sliding_window: A token attends to this many tokens at most, itself included.

    Shapes:
        qkv (B, T, (H+2K)·D), cos and sin (B or 1, T, rotated columns); returns (B, T, H·D).

    Numerics:
        fp32 (float64 for float64) from the rotation to the output, which is rounded once to qkv's dtype.

    Cost:
        12·H·D·(sum of squared document lengths) FLOPs with the gradient, half of that below the diagonal alone.
        Keeps qkv for backward.
    """
    batch, tokens, _ = qkv.shape
    dtype, half = torch.promote_types(qkv.dtype, torch.float32), cos.shape[-1] // 2
    rows = [item[..., :half].to(dtype).expand(batch, -1, -1).reshape(-1, half).contiguous() for item in (cos, sin)]
    output: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        layout, heads, scaling, sliding_window, *rows, qkv.reshape(batch * tokens, -1)
    )
    return output.view(batch, tokens, -1)


# cuDNN's attention makes a plan for every new shape, and groups have new shapes in every batch.
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of every document to itself.

    Args:
        query: Queries.
        key: Keys; heads may be fewer than the queries' (grouped-query attention).
        value: Values.
        layout: Of the same batch.
        scaling: Multiplier of the scores; default 1/sqrt(D).
        dropout: Probability of dropping an attention weight.
        sliding_window: A token attends to this many tokens at most, itself included.

    Shapes:
        query (B, H, T, D), key and value (B, K, T, D); returns (B, T, H, D).

    Numerics:
        On a CPU in fp32, rounded once to the inputs' dtype; on a GPU as PyTorch's kernel.

    Cost:
        4·H·D·(sum of squared document lengths) FLOPs and four passes over q, k, v and the output.
    """
    batch, heads, tokens, width = query.shape
    flat = [item.transpose(1, 2).reshape(batch * tokens, -1, width) for item in (query, key, value)]
    scale = width**-0.5 if scaling is None else scaling
    if query.device.type == "cpu" and dropout == 0.0:
        counts = heads, key.shape[1]
        parts = [item.reshape(batch * tokens, -1).contiguous() for item in flat]
        output: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
            layout, counts, scale, sliding_window, None, None, *parts
        )
        return output.view(batch, tokens, heads, width)
    outputs = []
    for group in layout.groups:
        gathered = (item.index_select(0, group.tokens) for item in flat)
        q, k, v = (item.view(group.documents, group.length, -1, width).transpose(1, 2) for item in gathered)
        if k.shape[1] < heads:
            k, v = (item.repeat_interleave(heads // item.shape[1], 1) for item in (k, v))
        mask = None
        if sliding_window is not None and group.length > sliding_window:
            distance = torch.arange(group.length, device=q.device)
            distance = distance[:, None] - distance[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        with sdpa_kernel(_WITHOUT_PLANS):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
            )
        outputs.append(y.transpose(1, 2).reshape(-1, heads, width))
    return torch.cat(outputs).index_select(0, layout.scatter).view(batch, tokens, heads, width)


def one_call(
    way: Way,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedLayout,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Attend within all documents by one call of flash attention, PyTorch's or that of the package flash-attn.

    Shapes:
        query (B, H, T, D), key and value (B, K, T, D); returns (B, T, H, D).
    """
    rows, heads, tokens, width = query.shape
    q, k, v = (item.transpose(1, 2).reshape(rows * tokens, -1, width) for item in (query, key, value))
    scale = width**-0.5 if scaling is None else scaling
    if way == "flash":
        output = varlen_attention(q, k, v, Attention(documents, scale, sliding_window, deterministic))
    else:
        from flash_attn import flash_attn_varlen_func

        bounds, longest = documents.bounds, documents.longest_tokens
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        output = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, window_size=window,
            deterministic=deterministic,
        )  # fmt: skip
    return output.view(rows, tokens, heads, width)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: documents of a packed batch on their own, everything else as `sdpa`.

    Shapes:
        query (B, H, T, D), key and value (B, K, T, D); returns (B, T, H, D).
    """
    attention_mask = without_marker(attention_mask)
    rows, _, tokens, _ = query.shape
    if attention_mask is None and position_ids is not None and 1 < tokens == key.shape[2] and _usable():
        way = _way_of(query, dropout)
        by_groups = way in ("tiles", "groups")
        documents = documents_of(position_ids, rows, kwargs, with_lengths=by_groups)
        if documents.lengths is None or len(documents.lengths) > rows or kwargs.get(LENGTHS) is not None:
            settings: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
            if by_groups:
                layout = groups_of(documents, rows)
                return document_attention(query, key, value, layout, dropout=dropout, **settings), None
            deterministic = getattr(module, "repeats_bits", True)
            return one_call(way, query, key, value, documents, deterministic=deterministic, **settings), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def packed_marker(like: Tensor) -> Tensor:
    """Return what stands for a mask where a batch carries its documents: transformers hands it on as it is.

    Without it transformers reads from the positions whether a row holds several documents, which waits for a GPU. Only
    models whose attention goes by `NAME` know it.
    """
    return like.new_empty((1, 1, 0, 0), dtype=torch.bool)


def without_marker(mask: Tensor | None) -> Tensor | None:
    """Return a mask as it is, and None for `packed_marker`."""
    return None if mask is not None and mask.ndim == 4 and mask.numel() == 0 else mask


def attention_mask(**kwargs: Any) -> Tensor | None:
    """transformers' mask function: none for a packed batch without padding, else the mask of `sdpa`."""
    packed = (
        kwargs.get("attention_mask") is None
        and not kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
        and kwargs["q_length"] == kwargs["kv_length"] > 1
    )
    return None if packed and _usable() else sdpa_mask(**kwargs)


def facts_of_attention(query: Tensor, dropout: float = 0.0) -> AttentionFacts:
    """Return what the way of attention depends on. Shapes: query (B, H, T, D)."""
    device, cuda = query.device, query.device.type == "cuda"
    return AttentionFacts(
        kind=device.type,
        capability=torch.cuda.get_device_capability(device) if cuda else None,
        dtype=str(query.dtype).removeprefix("torch."),
        head_size=query.shape[-1],
        dropout=dropout > 0,
        flash=cuda and has_flash(),
        package=cuda and _has_package(),
        switch=stack_switch(),
    )


def _way_of(query: Tensor, dropout: float) -> Way:
    """The way of these heads; flash attention after its comparison with the reference. Shapes: query (B, H, T, D)."""
    facts = facts_of_attention(query, dropout)
    way, _ = attention_for(facts)
    if way != "flash":
        return way
    found = disagreement(query.device, query.dtype, query.shape[-1])
    if found is not None:
        _say(found)
    return attention_for(replace(facts, disagreement=found))[0]


@cache
def _say(reason: str) -> None:
    logger.warning("documents attend in groups: %s", reason)


@cache
def has_flash() -> bool:
    """Return whether this PyTorch has flash attention for documents of any lengths on a GPU."""
    return torch.backends.cuda.is_flash_attention_available() and hasattr(torch.ops.aten, "_flash_attention_forward")


@cache
def _has_package() -> bool:
    return find_spec("flash_attn") is not None


def repeat_bits(model: nn.Module, on: bool) -> None:
    """Choose whether flash attention outside the decoder stack gives the same bits when a step is repeated."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.repeats_bits = on  # type: ignore[assignment]


def _usable() -> bool:
    return fused_enabled()


def register() -> None:
    """Make the attention known to transformers; once is enough."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
