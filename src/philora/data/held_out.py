"""The rows that a run may be judged by: those it held out, or others, and which of them were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from philora.data.prepare import (
    Conversations,
    DataReport,
    _assemble,
    _fingerprint,
    _hashes,
    _Loader,
    _weighted,
    hold_out,
)
from philora.data.store import ANSWERS, Settings, cache_root
from philora.data.template import Encoder, Tokenizer
from philora.errors import DataError, fault

if TYPE_CHECKING:
    from philora.config import DataConfig, SourceConfig


@dataclass(frozen=True)
class HeldOut:
    """Tokenised rows and their conversations.

    Attributes:
        rows: `input_ids` and `labels`.
        conversations: Of each row.
        answerable: Rows whose conversation has an assistant turn that follows something.
        in_training: Rows that also stand in the training set; None: that set cannot be read or is not known.
        fingerprint: Of the run's data and split, as `PreparedData` has it; None for other rows than the run's own.
        report: What was read.
    """

    rows: Any
    conversations: Conversations
    answerable: list[int]
    in_training: list[int] | None
    fingerprint: str | None
    report: DataReport = field(repr=False)


def held_out(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    seed: int,
    stop_token_ids: Sequence[int],
    other: SourceConfig | None = None,
) -> HeldOut:
    """The rows that a run with this configuration held out, found again by its seed; or those of another source.

    Args:
        data: The `data` section of the run.
        tokenizer: The run's.
        max_length: The run's longest row, in tokens.
        seed: The run's.
        stop_token_ids: Any of these ends an assistant turn.
        other: Rows to judge by in place of those that were held out.

    Raises:
        DataError: The run held nothing out, or a source cannot be used.
    """
    loader = _Loader(
        Encoder(tokenizer, stop_token_ids),
        Settings(max_length, data.overlong == "drop"),
        cache_root(data.cache_dir),
        data,
    )
    report = DataReport()
    if data.eval is None and other is None:
        expected = "a held-out part of the run's data, but it held nothing out"
        raise DataError(fault("evaluate", "data", None, expected, "Give rows: --data FILE"))
    known = bool(data.train) and not any(source.streaming for source in data.train)
    fraction = isinstance(data.eval, float | int)
    entries = []
    if known:
        try:
            entries = [loader.load(source, "train", report) for source in data.train]
        except DataError:
            if other is None and fraction:
                raise
            known = False
    hashes = [entry.rows["hash"] for entry in entries]
    held = hold_out(hashes, float(data.eval), seed) if known and isinstance(data.eval, float | int) else None
    kept = [
        np.setdiff1d(np.arange(len(entry.rows)), held[position] if held is not None else [], assume_unique=True)
        for position, entry in enumerate(entries)
    ]
    fingerprint = None
    if other is not None:
        chosen = [loader.load(other, "eval", report)]
        indices = [np.arange(len(each.rows)) for each in chosen]
    else:
        if held is not None:
            chosen, indices = entries, held
        else:
            sources = data.eval if isinstance(data.eval, tuple) else ()
            chosen = [loader.load(source, "eval", report) for source in sources]
            indices = [np.arange(len(each.rows)) for each in chosen]
        if known:
            weighted = [
                _weighted(each, source.weight, seed, position)
                for position, (each, source) in enumerate(zip(kept, data.train, strict=True))
            ]
            fingerprint = _fingerprint(entries, weighted, chosen, indices)
    if not sum(len(each) for each in indices):
        raise DataError(fault("evaluate", "rows", 0, "at least one row that fits the limit of tokens"))
    in_training = None
    if known:
        in_training = np.flatnonzero(np.isin(_hashes(chosen, indices), _hashes(entries, kept))).tolist()
    flags = np.concatenate([entry.rows["flags"][each] for entry, each in zip(chosen, indices, strict=True)])
    rows, conversations = _assemble(chosen, indices, None)
    answerable = np.flatnonzero(flags & ANSWERS).tolist()
    return HeldOut(rows, conversations, answerable, in_training, fingerprint, report)
