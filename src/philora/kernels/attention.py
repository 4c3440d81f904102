"""Compute attention within every document of a packed row, without a mask of row length squared.

A packed row holds several conversations. Each attends to itself only, and its positions start at zero. transformers
expresses that by a dense T x T mask. Here the documents are gathered into groups of about equal length
(`document_groups`), so the work is the sum of the squared lengths of the documents.

A CPU computes a group in tiles (`tiled_attention`). On a GPU there is one call of flash attention for all documents or,
depending on `attention_choice`, one causal call of PyTorch's scaled_dot_product_attention for every group.

`register` registers it with transformers as `NAME`; `philora.adapters.fast_layers.optimize` switches models to it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from philora.kernels.attention_choice import AttentionFacts, Way, attention_for
from philora.kernels.document_groups import Layout, documents_of, groups_of
from philora.kernels.layout import LENGTHS, PackedLayout
from philora.kernels.switches import stack_switch
from philora.kernels.tiled_attention import TiledAttention
from philora.kernels.varlen import Attention, disagreement, varlen_attention
from philora.lora.functional import fused_enabled

logger = logging.getLogger(__name__)

NAME = "philora_sdpa"

# Architectures of transformers whose decoder layers pass position_ids to the attention function.
MODEL_TYPES = ("phi3", "llama", "mistral", "qwen2", "qwen3")

# cuDNN's attention makes a plan for every new shape, and every batch has groups of new shapes.
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
    """Compute causal attention within every document.

    Args:
        query: Queries.
        key: Keys; they may have fewer heads than the queries (grouped-query attention).
        value: Values.
        layout: Layout of the same batch.
        scaling: Multiplier of the scores; default 1/sqrt(D).
        dropout: Probability of dropping an attention weight.
        sliding_window: Number of tokens that a token attends to at most, itself included.

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
        output: Tensor = TiledAttention.apply(  # type: ignore[no-untyped-call]
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
    """Compute attention within all documents by one call of flash attention, PyTorch's or the package flash-attn's.

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
    """Compute attention for transformers: within the documents of a packed batch, else as `sdpa`.

    Shapes:
        query (B, H, T, D), key and value (B, K, T, D); returns (B, T, H, D).
    """
    attention_mask = without_marker(attention_mask)
    rows, _, tokens, _ = query.shape
    if attention_mask is None and position_ids is not None and 1 < tokens == key.shape[2] and fused_enabled():
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
    """Return a placeholder for the mask of a batch that carries its documents; transformers passes it on unchanged.

    Without a mask transformers reads the positions to find out whether a row holds several documents, which waits for
    a GPU. Only models that use the attention `NAME` understand it.
    """
    return like.new_empty((1, 1, 0, 0), dtype=torch.bool)


def without_marker(mask: Tensor | None) -> Tensor | None:
    """Return the mask, or None if it is `packed_marker`."""
    return None if mask is not None and mask.ndim == 4 and mask.numel() == 0 else mask


def attention_mask(**kwargs: Any) -> Tensor | None:
    """Return a mask for transformers: None for a packed batch without padding, else the mask of `sdpa`."""
    packed = (
        kwargs.get("attention_mask") is None
        and not kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
        and kwargs["q_length"] == kwargs["kv_length"] > 1
    )
    return None if packed and fused_enabled() else sdpa_mask(**kwargs)


def facts_of_attention(query: Tensor, dropout: float = 0.0) -> AttentionFacts:
    """Return the facts that the choice of attention depends on. Shapes: query (B, H, T, D)."""
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
    """Return how these heads attend; flash attention is first compared with the reference.

    Shapes:
        query (B, H, T, D).
    """
    facts = facts_of_attention(query, dropout)
    way, _ = attention_for(facts)
    if way != "flash":
        return way
    found = disagreement(query.device, query.dtype, query.shape[-1])
    if found is not None:
        _warn_groups(found)
    return attention_for(replace(facts, disagreement=found))[0]


@cache
def _warn_groups(reason: str) -> None:
    logger.warning("documents attend in groups: %s", reason)


@cache
def has_flash() -> bool:
    """Return whether this PyTorch has flash attention for documents of any lengths on a GPU."""
    return torch.backends.cuda.is_flash_attention_available() and hasattr(torch.ops.aten, "_flash_attention_forward")


@cache
def _has_package() -> bool:
    return find_spec("flash_attn") is not None


def repeat_bits(model: nn.Module, on: bool) -> None:
    """Set whether flash attention outside the decoder stack repeats its bits when a step is repeated."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.repeats_bits = on  # type: ignore[assignment]


def register() -> None:
    """Register the attention with transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
