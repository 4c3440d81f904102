"""Check token ids and labels against the model's vocabulary, before they index a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from philora.dataset.template import IGNORED
from philora.errors import DataError, fault

COLUMNS = ("input_ids", "labels")
_ROWS = 1000  # that are looked at together


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a model has embeddings for, if they are in one table; the model may lack weights."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    count = getattr(find(), "num_embeddings", None)
    return count if isinstance(count, int) else None


def _refuse(where: str, column: str, place: int, value: int, vocabulary: int) -> DataError:
    also = f"{IGNORED} (no loss) or " if column == "labels" else ""
    expected = f"{also}a token id from 0 to {vocabulary - 1:,}: the model's vocabulary has {vocabulary:,}"
    todo = "Use the model's own tokenizer, or give the model a row for each token (resize_token_embeddings)"
    if column == "labels" and value < 0:
        todo = f"Tokens without loss have the label {IGNORED}"
    return DataError(fault(where, f"{column}[{place}]", value, expected, todo))


def check_rows(splits: Mapping[str, Any], vocabulary: int | None) -> None:
    """See to it that every token id and label of tokenised rows is one of the vocabulary's.

    Args:
        splits: Rows by name; those that are no `datasets.Dataset`, and columns that are no lists of whole numbers, are
            left to `check_batch`.
        vocabulary: Tokens that the model has; None: unknown, and nothing is checked.

    Raises:
        DataError: One is not; it names the first row, the position in it, the value and the vocabulary's size.

    Cost:
        One pass over the columns, some 10 ms for a million tokens.
    """
    for name, rows in splits.items():
        if vocabulary is None or not isinstance(rows, datasets.Dataset):
            continue
        columns = [item for item in COLUMNS if item in rows.column_names]
        if not columns:
            continue
        first = 0
        for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS):
            for column in columns:
                _check_column(name, column, table[column].combine_chunks(), first, vocabulary)
            first += len(table)


def _check_column(name: str, column: str, lists: Any, first: int, vocabulary: int) -> None:
    kind = lists.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        return
    values = pc.list_flatten(lists)
    wrong = pc.or_(pc.less(values, 0), pc.greater_equal(values, vocabulary))
    if column == "labels":
        wrong = pc.and_(wrong, pc.not_equal(values, IGNORED))
    if not pc.any(wrong).as_py():
        return
    at = pc.index(wrong, True).as_py()
    row = pc.list_parent_indices(lists)[at].as_py()
    place = at - sum(len(item) for item in lists[:row].to_pylist() if item is not None)
    raise _refuse(f"{name}, row {first + row:,}", column, place, values[at].as_py(), vocabulary)


def check_batch(inputs: Mapping[str, Any], vocabulary: int | None, where: str = "batch") -> None:
    """Check the ids of a batch that a collator has made.

    Shapes:
        input_ids and labels (B, T).

    Raises:
        DataError: As `check_rows`.

    Cost:
        Of a batch on a GPU it waits for the device.
    """
    for column in COLUMNS:
        values = inputs.get(column)
        if vocabulary is None or not isinstance(values, Tensor) or values.ndim != 2 or values.is_floating_point():
            continue
        wrong = (values < 0) | (values >= vocabulary)
        if column == "labels":
            wrong &= values != IGNORED
        if bool(wrong.any()):
            row, place = (int(item) for item in torch.nonzero(wrong)[0])
            raise _refuse(f"{where}, row {row:,}", column, place, int(values[row, place]), vocabulary)
