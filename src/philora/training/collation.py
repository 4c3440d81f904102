"""Locate the documents and labels of a batch once on the host, and pass them on with its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from philora.kernels.layout import KEYWORDS, LABELS, LENGTHS, TOKENS, PackedLayout, label_places


class HostLayout:
    """A collator that adds the lengths of documents and the positions of labels to another one's batches on the CPU."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        """Return the batch of some examples."""
        batch = self.collate(examples)
        return {**batch, **layout_of_batch(batch)} if isinstance(batch, Mapping) else batch


def layout_of_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout of a batch of tensors on the CPU, so that nothing needs to be read back from a GPU.

    Labels in a batch with `shift_labels` are not located.

    Shapes:
        labels and attention_mask (B, T); cu_seq_lens_q (documents + 1) where the documents are in one row.
    """
    labels, bounds, mask = batch.get("labels"), batch.get(KEYWORDS[0]), batch.get("attention_mask")
    found: dict[str, Any] = {}
    if isinstance(labels, Tensor) and labels.ndim == 2 and "shift_labels" not in batch:
        found |= dict(zip(LABELS, label_places(labels), strict=True))
    if isinstance(bounds, Tensor):
        found[LENGTHS] = tuple(bounds.diff().tolist())
    elif isinstance(mask, Tensor) and mask.ndim == 2 and bool(_pads_on_the_right(mask)):
        found[LENGTHS] = tuple(mask.sum(1).tolist())
        rows = mask.flatten().nonzero().flatten()
        found |= dict(zip(TOKENS, (rows, PackedLayout.of_lengths(found[LENGTHS]).bounds.to(rows.device)), strict=True))
    return found


def _pads_on_the_right(mask: Tensor) -> Tensor:
    """Return whether every row starts with its tokens, at least one. Shapes: mask (B, T); returns ()."""
    whole = (mask == 0) | (mask == 1)
    return whole.all() & (mask[:, 0] == 1).all() & (mask[:, 1:] <= mask[:, :-1]).all()


def without_layout(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without the additions of `HostLayout`, so that it can be changed."""
    return {name: entry for name, entry in batch.items() if name not in (*LABELS, *TOKENS, LENGTHS)}
