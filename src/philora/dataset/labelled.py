"""Find which tokenised rows have a label to learn from: a row without one is left out and counted."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from philora.dataset.template import IGNORED
from philora.errors import DataError, fault

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1_000


def refuse_empty(where: str, rows: Any) -> None:
    """Refuse a table without rows.

    Raises:
        DataError: It has none.
    """
    if isinstance(rows, Dataset) and not len(rows):
        raise DataError(fault(where, "rows", 0, "at least one row", "Leave it out if there is nothing to give"))


def keep_labelled(rows: Any, where: str, max_length: int | None, given: int | None = None) -> Any:
    """Return the rows that have a label, and log how many have none.

    Args:
        rows: Tokenised rows, packed or not. Streams, and tables without labels, are returned as they are.
        where: What messages call the table.
        max_length: Tokens at which rows were cut; None: they were not.
        given: How many rows there were before some were dropped for the same reason; None: none were.

    Returns:
        The rows; a packed row stays if one of its documents has a label.

    Raises:
        DataError: No row has a label.
    """
    if not isinstance(rows, Dataset) or "labels" not in rows.column_names:
        return rows
    labels, row_of = _labels_of_documents(rows)
    documents = len(labels) if "seq_lengths" in rows.column_names else max(len(labels), given or 0)
    without = documents - int((labels > 0).sum())
    cut = "" if max_length is None else f"; labels beyond max_length={max_length} tokens are cut off"
    if without == documents:
        cut_off = f"Raise max_length, which is {max_length}, or shorten the prompts; or label some tokens"
        todo = "Label some tokens with their own ids" if max_length is None else cut_off
        found = f"0 of {documents:,} rows have a label"
        raise DataError(fault(where, "labels", found, f"at least one label other than {IGNORED}", todo))
    if without:
        text = "%s: %s of %s rows have no label and are left out%s."
        logger.warning(text, where, f"{without:,}", f"{documents:,}", cut)
    kept = np.unique(row_of[labels > 0])
    return rows if len(kept) == len(rows) else rows.select(kept)


def _labels_of_documents(rows: Dataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the labels of every document, and return its row.

    The first token of a document is predicted from nothing, so that its label does not count.
    """
    packed = "seq_lengths" in rows.column_names
    columns = ["labels", "seq_lengths"] if packed else ["labels"]
    counts, places, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for batch in rows.with_format("arrow", columns=columns).iter(_ROWS_AT_ONCE):
        labels = batch.column("labels").combine_chunks()
        lengths = labels.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        numbers = np.arange(first, first + len(lengths))
        first += len(lengths)
        if packed:
            parts = batch.column("seq_lengths").combine_chunks()
            numbers = np.repeat(numbers, parts.value_lengths().to_numpy(zero_copy_only=False))
            lengths = parts.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        is_label = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
        is_label[starts[lengths > 0]] = False
        total = np.concatenate([[0], np.cumsum(is_label)])
        counts.append(total[ends] - total[starts])
        places.append(numbers)
    return np.concatenate(counts), np.concatenate(places)
