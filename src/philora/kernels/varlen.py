"""Compute causal attention within every document of a packed batch by one call, forward and backward.

On a GPU this is PyTorch's flash attention for documents of any lengths, in bf16 or fp16. The ATen operators under
`torch.nn.attention.varlen` are called directly, because a backward pass written by hand needs both. On other devices,
and for fp32, documents are computed one by one in plain PyTorch, which is also the tests' reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from philora.kernels.layout import PackedLayout
from philora.lora.functional import refuse_create_graph, without_autocast


@dataclass(frozen=True)
class Attention:
    """How the heads of one batch attend.

    Attributes:
        layout: The documents.
        scaling: Multiplier of the scores.
        window_tokens: Number of tokens that a token attends to at most, itself included; None for all before it.
        deterministic: Whether repeated backward passes give the same bits. Otherwise flash attention sums the gradient
            of q in any order.
    """

    layout: PackedLayout
    scaling: float
    window_tokens: int | None = None
    deterministic: bool = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the heads' output, and the values that `gradients` needs.

        Shapes:
            query (T, H, D), key and value (T, K, D) with K dividing H; returns (T, H, D).

        Cost:
            4·H·D·(sum of squared lengths) FLOPs, half of them below the diagonal; T·H fp32 numbers are kept.
        """
        if not _flash(query):
            return self._document_by_document(query, key, value), (None, None, None)
        output, normaliser, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *self._documents(), 0.0, True, False, **self._settings()
        )
        return output, (normaliser, state, unused)

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kept: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value. Shapes: as `attend`; grad (T, H, D)."""
        if not _flash(query):
            return self._gradients_document_by_document(grad, query, key, value)
        normaliser, state, unused = kept
        with deterministic_kernels() if self.deterministic else nullcontext():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad, query, key, value, output, normaliser, *self._documents(), 0.0, True, state, unused,
                **self._settings(),
            )  # fmt: skip
        return dq, dk, dv

    # -- for the flash operators

    def _documents(self) -> tuple[Tensor, Tensor, int, int]:
        bounds, longest = self.layout.bounds, self.layout.longest_tokens
        return bounds, bounds, longest, longest

    def _settings(self) -> dict[str, float | int | None]:
        """Return the settings. The operators' window excludes the token itself; it is off if all documents fit in."""
        limited = self.window_tokens is not None and self.window_tokens < self.layout.longest_tokens
        left = self.window_tokens - 1 if limited and self.window_tokens is not None else None
        return {"scale": self.scaling, "window_size_left": left, "window_size_right": 0 if limited else None}

    # -- the reference

    def _ranges(self) -> Iterator[slice]:
        lengths = self.layout.lengths
        start = 0
        for length in tuple(self.layout.bounds.diff().tolist()) if lengths is None else lengths:
            if length:  # bounds are padded with empty documents
                yield slice(start, start + length)
            start += length

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the softmax of one document's scores. Shapes: (L, H, D) and (L, H, D); returns (H, L, L)."""
        scores = torch.einsum("ihd,jhd->hij", query, key) * self.scaling
        places = torch.arange(len(query), device=query.device)
        distance = places[:, None] - places
        hidden = distance < 0
        if self.window_tokens is not None:
            hidden |= distance >= self.window_tokens
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)

    def _document_by_document(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
        for part in self._ranges():
            q, k, v = _wide(query[part]), _wide(key[part], groups), _wide(value[part], groups)
            output[part] = torch.einsum("hij,jhd->ihd", self._weights(q, k), v).to(output.dtype)
        return output

    def _gradients_document_by_document(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients: with P the weights and dP = dO V^T, dV = P^T dO, dS = P (dP - rowsum(P dP)),
        dQ = dS K, dK = dS^T Q.
        """
        groups = query.shape[1] // key.shape[1]
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for part in self._ranges():
            q, k, v = _wide(query[part]), _wide(key[part], groups), _wide(value[part], groups)
            weights, d = self._weights(q, k), _wide(grad[part])
            of_weights = torch.einsum("ihd,jhd->hij", d, v)
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * self.scaling
            found = (
                torch.einsum("hij,jhd->ihd", of_scores, k),
                torch.einsum("hij,ihd->jhd", of_scores, q),
                torch.einsum("hij,ihd->jhd", weights, d),
            )
            for result, item in zip(results, found, strict=True):
                heads = result.shape[1]
                result[part] = item.view(len(item), heads, -1, item.shape[-1]).sum(2).to(result.dtype)
        return results


class _Varlen(torch.autograd.Function):
    """`Attention` as an autograd node."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the output. Shapes: query (T, H, D), key and value (T, K, D); returns (T, H, D)."""
        output, kept = attention.attend(query, key, value)
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, output, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        refuse_create_graph()
        query, key, value, output, *kept = ctx.saved_tensors
        found = ctx.attention.gradients(grads[0].contiguous(), query, key, value, output, tuple(kept))
        return None, *found


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """Return the output of the heads, with gradients for query, key and value.

    Shapes:
        query (T, H, D), key and value (T, K, D) with K dividing H; returns (T, H, D).
    """
    output: Tensor = _Varlen.apply(attention, query, key, value)  # type: ignore[no-untyped-call]
    return output


LENGTHS = (3, 17, 1, 30)  # tokens of the documents of `disagreement`, shorter and longer than its window
WINDOW_TOKENS = 13
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference that is rounding, relative to the norm of the reference."""


@cache
def disagreement(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return in words how `Attention` differs from its reference on this device; None if it agrees.

    They are compared once per process on a few tokens, forward and backward.
    """
    try:
        with without_autocast(device.type):
            gap = max(_gap(device, dtype, head_size, window) for window in (None, WINDOW_TOKENS))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"flash attention does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    largest = LARGEST_DIFFERENCE[dtype]
    if gap < largest:
        return None
    return f"flash attention differs from the reference here by {gap:.2g} (at most {largest:g} is rounding)"


@torch.no_grad()
def _gap(device: torch.device, dtype: torch.dtype, head_size: int, window: int | None) -> float:
    """Return the largest relative difference of the output and the gradients, for grouped queries."""
    attention = Attention(PackedLayout.of_lengths(LENGTHS).to(device), head_size**-0.5, window)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(sum(LENGTHS), heads, head_size, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4)
    )
    output, kept = attention.attend(query, key, value)
    found = output, *attention.gradients(grad, query, key, value, output, kept)
    expected = (
        attention._document_by_document(query, key, value),
        *attention._gradients_document_by_document(grad, query, key, value),
    )
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))


def _flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _wide(heads: Tensor, copies: int = 1) -> Tensor:
    """Return heads in fp32 or wider, repeated. Shapes: (L, heads, D); returns (L, heads · copies, D)."""
    return heads.to(torch.promote_types(heads.dtype, torch.float32)).repeat_interleave(copies, 1)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Make PyTorch use deterministic kernels in this block.

    It is only for the call of a kernel: PyTorch then also fills new memory, and refuses some operations.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
