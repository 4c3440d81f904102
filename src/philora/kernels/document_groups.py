"""Group documents of about equal length, so that the documents of a packed batch attend together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from philora.kernels.layout import PackedLayout


class Group(NamedTuple):
    """Documents of about equal length, padded to one length.

    Attributes:
        documents: Number of documents.
        length: Length of a padded document in tokens.
        tokens: Index in B·T of the token at every position (documents x length); 0 at padding.
        start: First token if the positions are consecutive tokens, with padding after `filled`; else None.
        filled: Number of positions that are not padding.
        starts: First token of every document, on the CPU.
        lengths: Tokens of every document, on the CPU.
        places: Positions that are not padding, in order; None if `start` is given.
        padding: The other positions.
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
    """How the tokens of a packed batch are gathered into groups of documents of about equal length.

    Attributes:
        groups: The groups; their positions are counted one after another.
        scatter: Position of every token.
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
    """Return the documents of a batch: those that it carries, else read from the positions.

    Args:
        position_ids: Positions; a document begins wherever one is not the previous plus one.
        rows: Rows of the batch.
        keywords: The batch's other keyword arguments.
        with_lengths: Whether the lengths must be known on the host.

    Shapes:
        position_ids (B or 1, T).

    Cost:
        Positions are read once per tensor, which waits for a GPU; the result is cached while the tensor lives.
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
    """Return the groups of the documents of a batch; they are made once per batch."""
    assert documents.lengths is not None
    return _groups(documents.lengths, rows, documents.bounds.device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # cached tensors are also used where a gradient is recorded
def _groups(lengths: tuple[int, ...], rows: int, device: torch.device) -> Layout:
    if len(lengths) == rows:
        every, total = torch.arange(sum(lengths), device=device), sum(lengths)
        of_rows = torch.arange(rows) * lengths[0], torch.tensor(lengths)
        return Layout((Group(rows, lengths[0], every, 0, total, *of_rows),), every, *of_rows)
    starts = [0, *accumulate(lengths)][:-1]
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        # Few different lengths, since the first product of a new length costs its preparation.
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
    """Copy a tensor from the CPU to a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
