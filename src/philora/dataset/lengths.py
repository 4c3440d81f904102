"""Compute what the lengths of tokenised rows mean for a model: its window, and the boundary of LongRoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute
from datasets import Dataset

from philora.families import longrope_switch_tokens

_ROWS_AT_ONCE = 10_000


def length_notices(config: Any, splits: Mapping[str, Any]) -> list[str]:
    """Return a notice for every split with rows beyond the model's window, or beyond the boundary of LongRoPE.

    Args:
        config: The model's configuration, as transformers reads it.
        splits: Tokenised rows by the name of their split, packed or not; streams and None are skipped.
    """
    window = getattr(config, "max_position_embeddings", None)
    switch = longrope_switch_tokens(config)
    notices = []
    for name, rows in splits.items():
        lengths = sequence_lengths(rows)
        beyond = int((lengths > window).sum()) if window else 0
        if beyond:
            notices.append(
                f"{name}: {beyond:,} of {len(lengths):,} rows are longer than the model's window of {window:,} tokens "
                f"(the longest has {lengths.max():,}), and it knows no positions beyond that. "
                f"Set max_length to {window} or less."
            )
        long = int((lengths > switch).sum()) if switch else 0
        if long:
            notices.append(
                f"{name}: {long:,} of {len(lengths):,} rows are longer than {switch:,} tokens, where LongRoPE turns "
                f"from its short factors to its long ones. Each row is trained with the factors of its own length, "
                f"as at inference, where prompt and answer count together. "
                f"For the short factors alone, set max_length to {switch} or less."
            )
    return notices


def sequence_lengths(rows: Any) -> npt.NDArray[np.int64]:
    """Return the tokens of every sequence; sequences of a packed row are counted one by one. Empty for a stream."""
    if not isinstance(rows, Dataset):
        return np.zeros(0, np.int64)
    if "seq_lengths" in rows.column_names:
        return _numbers(rows, "seq_lengths", lambda column: column.flatten())
    return row_lengths(rows) if "input_ids" in rows.column_names else np.zeros(0, np.int64)


def row_lengths(rows: Dataset) -> npt.NDArray[np.int64]:
    """Return the tokens of every row; a packed row is one row."""
    return _numbers(rows, "input_ids", pyarrow.compute.list_value_length)


def _numbers(rows: Dataset, name: str, read: Callable[[Any], Any]) -> npt.NDArray[np.int64]:
    """Return the numbers that `read` makes of a column of lists."""
    found = [np.zeros(0, np.int64)]
    for batch in rows.with_format("arrow", columns=[name]).iter(_ROWS_AT_ONCE):
        found.append(read(batch.column(name).combine_chunks()).to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(found)
