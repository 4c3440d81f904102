"""Attention within each document of a packed row, without a mask of row length squared.

Several conversations share one row when they are packed; each attends to itself only, and its positions start again at
zero. transformers expresses that by a dense T x T mask. Here the documents are gathered into groups of about equal
length and each group is one causal call of PyTorch's scaled_dot_product_attention, so the work is the sum of the
squared lengths of the documents.

`register` makes it known to transformers under `NAME`; `philora.adapters.optimize` switches models over.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from philora.lora.functional import fused_enabled

NAME = "philora_sdpa"

# Architectures of transformers whose decoder layers hand position_ids on to the attention function.
MODEL_TYPES = ("phi3", "llama", "mistral", "qwen2", "qwen3")

# On a CPU the flash kernel converts bf16 tile by tile, which costs more than the products of short documents: at 37
# tokens fp32 is four times faster, at this length they are about equal.
SHORT_TOKENS = 256


class Layout(NamedTuple):
    """How the tokens of a packed batch are gathered into groups of documents of about equal length.

    Attributes:
        gather: For each place of all groups, the token (of B·T) that goes there; places of padding repeat token 0.
        scatter: For each token, its place.
        groups: (documents, length) of each group, in the order of the places.
    """

    gather: Tensor
    scatter: Tensor
    groups: tuple[tuple[int, int], ...]


_known: list[tuple[weakref.ref[Tensor], int, Layout | None]] = []


def layout_of(position_ids: Tensor) -> Layout | None:
    """The groups of a batch, or None when no row holds more than one document.

    Shapes:
        position_ids (B, T); a document begins wherever the position is not the one before plus one.

    Cost:
        Computed once for a tensor and remembered while it lives; on a GPU it waits for the device once.
    """
    version = 0 if position_ids.is_inference() else position_ids._version
    for known, at, layout in _known:
        if known() is position_ids and at == version:
            return layout
    layout = _compute_layout(position_ids)
    _known[:] = [each for each in _known if each[0]() is not None][-3:]
    _known.append((weakref.ref(position_ids), version, layout))
    return layout


def _compute_layout(position_ids: Tensor) -> Layout | None:
    rows, tokens = position_ids.shape
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten().tolist()
    if len(starts) == rows:
        return None
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], rows * tokens], strict=True)]
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        step = max(8, 1 << max(0, length.bit_length() - 4))  # at most an eighth of a group is padding
        by_length.setdefault(-(-length // step) * step, []).append(index)
    gather: list[Tensor] = []
    scatter = torch.empty(rows * tokens, dtype=torch.long)
    groups = []
    place = 0
    for documents in by_length.values():
        longest = max(lengths[each] for each in documents)
        at = torch.zeros(len(documents), longest, dtype=torch.long)
        for row, document in enumerate(documents):
            start, length = starts[document], lengths[document]
            at[row, :length] = torch.arange(start, start + length)
            scatter[start : start + length] = torch.arange(place, place + length)
            place += longest
        gather.append(at.flatten())
        groups.append((len(documents), longest))
    device = position_ids.device
    return Layout(torch.cat(gather).to(device), scatter.to(device), tuple(groups))


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
    """Causal attention of each document to itself.

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
        In the inputs' dtype, as PyTorch's kernel; short documents in fp32 on a CPU, then rounded to the inputs' dtype.

    Cost:
        4·H·D·(sum of squared document lengths) FLOPs and four passes over q, k, v and the output.
    """
    batch, heads, tokens, width = query.shape
    flat = [each.transpose(1, 2).reshape(batch * tokens, -1, width) for each in (query, key, value)]
    gathered = [each.index_select(0, layout.gather) for each in flat]
    sizes = [documents * length for documents, length in layout.groups]
    repeat = heads // key.shape[1]
    outputs = []
    for (documents, length), q, k, v in zip(
        layout.groups, *(torch.split(each, sizes) for each in gathered), strict=True
    ):
        parts = [each.view(documents, length, -1, width).transpose(1, 2) for each in (q, k, v)]
        if query.device.type == "cpu" and length <= SHORT_TOKENS and query.dtype is not torch.float64:
            parts = [each.float() for each in parts]
        q, k, v = parts
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mask = None
        if sliding_window is not None and length > sliding_window:
            distance = torch.arange(length, device=q.device)
            distance = distance[:, None] - distance[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        outputs.append(y.transpose(1, 2).reshape(documents * length, heads, width).to(query.dtype))
    return torch.cat(outputs).index_select(0, layout.scatter).view(batch, tokens, heads, width)


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
    if attention_mask is None and position_ids is not None and 1 < query.shape[2] == key.shape[2] and _usable():
        layout = layout_of(position_ids.expand(query.shape[0], -1) if position_ids.shape[0] == 1 else position_ids)
        if layout is not None:
            output = document_attention(
                query, key, value, layout, scaling=scaling, dropout=dropout, sliding_window=sliding_window
            )
            return output, None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def attention_mask(**kwargs: Any) -> Tensor | None:
    """transformers' mask function: none for a packed batch without padding, else the mask of `sdpa`."""
    packed = (
        kwargs.get("attention_mask") is None
        and not kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
        and kwargs["q_length"] == kwargs["kv_length"] > 1
    )
    return None if packed and _usable() else sdpa_mask(**kwargs)


def _usable() -> bool:
    return fused_enabled()


def register() -> None:
    """Make the attention known to transformers; once is enough."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
