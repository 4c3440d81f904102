"""Locate the documents and labels of a batch once on the host, and pass them on with the batch.

So nothing has to ask the device for a length or for the position of a label. Both are known when the batch is collated
(`philora.training.collation`). Bounds and the longest length are keyword arguments with transformers' names
(`KEYWORDS`), as TRL's collator sends them; lengths and labels have names of philora's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' names: the bounds of the documents and the longest length, for queries and for keys."""
LENGTHS = "document_lengths"
"""Tokens of every document, a tuple on the host."""
LABELS = ("label_rows", "label_ids")
"""Tokens whose next token is a label, as indices into the concatenated rows, and those labels."""
TOKENS = ("token_rows", "token_bounds")
"""For rows with padding on the right: indices of the tokens that are not padding, and the bounds of rows in them."""


def label_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that are followed by a label in their row, and those labels. This waits for a GPU.

    Shapes:
        labels (B, T), -100 for none; returns indices into B·T, and ids.
    """
    wanted = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    rows = wanted.flatten().nonzero().flatten()
    return rows, labels.flatten()[rows + 1]


@dataclass(frozen=True)
class PackedLayout:
    """The documents of a batch whose rows are concatenated.

    Attributes:
        bounds: First token of every document, and the number of tokens at the end, int32. On the batch's device.
        longest_tokens: Tokens of the longest document.
        lengths: Tokens of every document, on the host; None if only the device knows them.
        position_ids: Position of every token in its document, on the batch's device; None for those of the batch.
        label_rows: Tokens whose next token is a label, on the batch's device; None if not computed.
        label_ids: Those labels.

    Shapes:
        bounds (documents + 1), position_ids (T), label_rows and label_ids (labels).
    """

    bounds: Tensor
    longest_tokens: int
    lengths: tuple[int, ...] | None = None
    position_ids: Tensor | None = None
    label_rows: Tensor | None = None
    label_ids: Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], labels: Tensor | None = None) -> PackedLayout:
        """Return the layout of documents of these lengths, on the CPU. Shapes: labels (T).

        Args:
            lengths: Tokens of every document.
            labels: Token ids, -100 for none; the first token of a document is not a label of the previous document.
        """
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        rows = ids = None
        if labels is not None:
            rows, ids = label_places(labels.masked_fill(positions == 0, -100)[None])
        return cls(bounds, max(lengths), tuple(lengths), positions, rows, ids)

    @classmethod
    def of_positions(cls, position_ids: Tensor) -> PackedLayout:
        """Return the layout of a batch in which a document begins wherever a position is not the previous plus one.

        Positions on a GPU are copied to the host, which waits for the device, so the collator should send the bounds.

        Shapes:
            position_ids (B, T); rows are concatenated.
        """
        positions = position_ids.cpu()
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        starts = begins.flatten().nonzero().flatten().tolist()
        lengths = [stop - start for start, stop in zip(starts, [*starts[1:], positions.numel()], strict=True)]
        layout = cls.of_lengths(lengths)
        return replace(layout, bounds=layout.bounds.to(position_ids.device), position_ids=position_ids.flatten())

    @classmethod
    def of_keywords(cls, keywords: Mapping[str, Any]) -> PackedLayout | None:
        """Return the layout that a batch carries under transformers' names, or None."""
        bounds, longest = keywords.get("cu_seq_lens_q"), keywords.get("max_length_q")
        if not isinstance(bounds, Tensor) or not isinstance(longest, int):
            return None
        return cls(bounds.to(torch.int32), longest, keywords.get(LENGTHS))

    def keywords(self) -> dict[str, Any]:
        """Return the known parts of the layout as keyword arguments of a batch."""
        values = (self.bounds, self.bounds, self.longest_tokens, self.longest_tokens)
        others = {LENGTHS: self.lengths, **dict(zip(LABELS, (self.label_rows, self.label_ids), strict=True))}
        known = {name: item for name, item in others.items() if item is not None}
        return dict(zip(KEYWORDS, values, strict=True)) | known

    def to(self, device: torch.device | str) -> PackedLayout:
        """Return the layout with its tensors on a device; pinned tensors are copied without waiting."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            bounds=self.bounds.to(device, non_blocking=True),
            position_ids=moved(self.position_ids),
            label_rows=moved(self.label_rows),
            label_ids=moved(self.label_ids),
        )
