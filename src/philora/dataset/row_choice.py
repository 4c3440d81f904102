"""Choose rows: those that are held out, and those that weights repeat or leave out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from philora.errors import DataError, fault

Indices = npt.NDArray[np.int64]
LEAST_HELD_OUT = 32
"""Rows to hold out at least where a fraction is asked for, and where a fifth of the rows is as many."""


def part_of(part: float, recorded: int | None, rows: int) -> float:
    """Return what is to be held out: the rows that a run has recorded, whatever a fraction comes to today."""
    return recorded if recorded and part < 1 and recorded < rows else part


def hold_out(hashes: Sequence[npt.NDArray[np.uint64]], part: float, seed: int) -> list[Indices]:
    """Return the rows to hold out of every source: complete groups of equal conversations, at least one row, never all.

    The groups come in a random order, and one that would make the part larger than `wanted_rows` is skipped; where
    all are larger, the smallest is taken.

    Args:
        hashes: Of every row of every source.
        part: The fraction, or from 1 on the number of rows.
        seed: Decides the order of the groups.

    Raises:
        DataError: all conversations are equal, or there are no more rows than are to be held out.
    """
    joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    groups, group_of, sizes = np.unique(joined, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        expected = f"at least two different conversations to hold out a part, but there is {len(groups)}"
        todo = "Add conversations, or give data.eval a file of its own"
        raise DataError(fault("data", "eval", part, expected, todo))
    wanted = wanted_rows(part, len(joined))
    if part >= 1 and wanted >= len(joined):
        raise DataError(fault("data", "eval", part, f"fewer rows than there are, which is {len(joined):,}"))
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = np.zeros(len(groups), bool)
    taken = 0
    for group, size in zip(order[: len(groups) - 1].tolist(), sizes[order].tolist(), strict=False):
        if taken + size <= wanted:
            chosen[group] = True
            taken += size
            if taken == wanted:
                break
    if not taken:
        chosen[order[np.argmin(sizes[order])]] = True
    is_out = chosen[group_of.reshape(-1)]
    starts = np.cumsum([0, *(len(item) for item in hashes)])
    return [np.flatnonzero(is_out[start:end]) for start, end in itertools.pairwise(starts)]


def wanted_rows(part: float, rows: int) -> int:
    """Return the rows to hold out: of a fraction at least 32, if they are no more than a fifth; a number as it is.

    Example:
        >>> wanted_rows(0.05, 300), wanted_rows(0.05, 100), wanted_rows(0.05, 2000), wanted_rows(10, 300)
        (32, 20, 100, 10)
    """
    return int(part) if part >= 1 else max(1, round(part * rows), min(LEAST_HELD_OUT, rows // 5))


def weighted_rows(indices: Indices, weight: float, seed: int, position: int) -> Indices:
    """Return a source's rows, repeated or sampled by its weight and the seed."""
    if weight == 1:
        return indices
    whole = int(weight)
    part = round((weight - whole) * len(indices))
    if whole == 0:
        part = max(1, part)
    sample = np.random.default_rng([seed, position]).permutation(indices)[:part]
    return np.sort(np.concatenate([*[indices] * whole, sample]), kind="stable")
