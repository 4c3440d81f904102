"""Read the rows that a run is scored on: its held-out rows or others, and which of them were trained on.

A run keeps its held-out rows in `held_out.jsonl`, one JSON object a line:

    messages       the conversation as it was rendered (a plain text is one message of the role `text`)
    tools          the tool descriptions, where there are any
    input_ids      its tokens, cut to the run's limit
    label_spans    the token ranges with loss, end excluded
    in_training    whether it is also in the training set; missing if that is not known

With the tokens in it, nothing is tokenised again: the loss is that of the same rows, whatever became of the data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from philora.dataset.conversations import Conversations
from philora.dataset.data_report import DataReport, notice_source
from philora.dataset.datasets_library import quiet_datasets, token_features
from philora.dataset.prepare import (
    Loader,
    PreparedData,
    assemble,
    fingerprint_of,
    rest_of,
    rows_in_training,
    weighted,
)
from philora.dataset.row_choice import hold_out, part_of
from philora.dataset.store import ANSWERS
from philora.dataset.template import IGNORED, Encoder, Tokenizer
from philora.errors import DataError, fault
from philora.files.checkpoint import write_text

_ROWS_MEASURED = 200

if TYPE_CHECKING:
    from philora.configuration.sections import DataConfig, SourceConfig


@dataclass(frozen=True)
class HeldOut:
    """Tokenised rows and their conversations.

    Attributes:
        rows: `input_ids` and `labels`.
        conversations: Of every row.
        answerable: Rows whose conversation has an assistant turn that follows something.
        in_training: Rows that are also in the training set; None if that set cannot be read or is not known.
        fingerprint: Of the run's data and split, as `PreparedData` has it; None for other rows than the run's own.
    """

    rows: Any
    conversations: Conversations
    answerable: list[int]
    in_training: list[int] | None
    fingerprint: str | None


def held_out(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    seed: int,
    stop_token_ids: Sequence[int],
    other: SourceConfig | None = None,
    recorded_rows: int | None = None,
) -> HeldOut:
    """Return the rows that a run held out, found again by its seed, or the rows of another source.

    Args:
        data: The `data` section of the run.
        tokenizer: The run's.
        max_length: The run's longest row, in tokens.
        seed: The run's.
        stop_token_ids: Any of these ends an assistant turn.
        other: Rows to score instead of those that were held out.
        recorded_rows: How many the run held out, as it has recorded.

    Raises:
        DataError: The run held nothing out, or a source cannot be used.
    """
    loader = Loader(data, Encoder(tokenizer, stop_token_ids), max_length)
    report = DataReport()
    if data.eval is None and other is None:
        expected = "a held-out part of the run's data, but it held nothing out"
        raise DataError(fault("evaluate", "data", None, expected, "Give rows: --data FILE"))
    training = _training_rows(loader, data, report, seed, recorded_rows, required=other is None)
    fingerprint = None
    if other is None and training is not None and training.held is not None:
        chosen, indices = training.entries, training.held
    else:
        own = data.eval if isinstance(data.eval, tuple) else ()
        chosen = [loader.load(source, "eval", report) for source in (own if other is None else (other,))]
        indices = [np.arange(len(entry.rows)) for entry in chosen]
    if other is not None:
        notice_source(report, "data", report.sources["eval"][-1])
    elif training is not None:
        fingerprint = fingerprint_of(training.entries, weighted(data, training.kept, seed), chosen, indices)
    if not sum(len(rows) for rows in indices):
        raise DataError(fault("evaluate", "rows", 0, "at least one row that fits the limit of tokens"))
    in_training = None if training is None else rows_in_training(chosen, indices, training.entries, training.kept)
    flags = np.concatenate([entry.rows["flags"][rows] for entry, rows in zip(chosen, indices, strict=True)])
    rows, conversations = assemble(chosen, indices, None)
    answerable = np.flatnonzero(flags & ANSWERS).tolist()
    return HeldOut(rows, conversations, answerable, in_training, fingerprint)


class _TrainingRows(NamedTuple):
    """Return the rows that a run was trained on.

    Attributes:
        entries: Its sources.
        held: Of every source the rows that were held out of it; None where other sources are the held-out ones.
        kept: Of every source the rows that were not.
    """

    entries: list[Any]
    held: list[Any] | None
    kept: list[Any]


def _training_rows(
    loader: Loader, data: DataConfig, report: DataReport, seed: int, recorded_rows: int | None, *, required: bool
) -> _TrainingRows | None:
    """Return the rows of a run's training sources; None where they cannot be known.

    Args:
        loader: Reads and tokenises a source.
        data: The `data` section of the run.
        report: Where sources are counted.
        seed: The run's.
        recorded_rows: How many rows the run held out, as it has recorded.
        required: Whether the held-out rows are taken from these sources, so that they have to be there.

    Raises:
        DataError: They are required and a source cannot be used.
    """
    if not data.train or any(source.streaming for source in data.train):
        return None
    try:
        entries = [loader.load(source, "train", report) for source in data.train]
    except DataError:
        if required and isinstance(data.eval, float | int):
            raise
        return None
    held = None
    if isinstance(data.eval, float | int):
        hashes = [entry.rows["hash"] for entry in entries]
        held = hold_out(hashes, part_of(data.eval, recorded_rows, sum(map(len, hashes))), seed)
    out = [np.zeros(0, np.int64) for _ in entries] if held is None else held
    return _TrainingRows(entries, held, [rest_of(entry, rows) for entry, rows in zip(entries, out, strict=True)])


# -- the rows that a run keeps


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Return a hash of the vocabulary: with the same hash, the same ids mean the same tokens."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def write_held_out(path: Path, prepared: PreparedData) -> int:
    """Write a run's held-out rows atomically, and return their number."""
    if prepared.eval is None or prepared.all_eval_conversations is None:
        return 0
    write_text(path, _lines(prepared))
    return len(prepared.eval)


def held_out_bytes(prepared: PreparedData) -> int:
    """Estimate the size of a run's held-out rows in its folder, by the first of them."""
    first = [len(line.encode("utf-8")) for line in itertools.islice(_lines(prepared), _ROWS_MEASURED)]
    return 0 if prepared.eval is None or not first else sum(first) * len(prepared.eval) // len(first)


def _lines(prepared: PreparedData) -> Iterator[str]:
    conversations, trained = prepared.all_eval_conversations, prepared.eval_in_training
    if prepared.eval is None or conversations is None:
        return
    in_training = set(trained or ())
    for number, row in enumerate(prepared.eval):
        entry: dict[str, Any] = {"messages": conversations[number]}
        if (tools := conversations.tools(number)) is not None:
            entry["tools"] = tools
        entry |= {"input_ids": [int(item) for item in row["input_ids"]], "label_spans": spans_of(row["labels"])}
        if trained is not None:
            entry["in_training"] = number in in_training
        yield json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n"


def spans_of(labels: Sequence[int]) -> list[list[int]]:
    """Return the ranges of positions with a label, end excluded.

    Example:
        >>> spans_of([-100, 5, 6, -100, 7])
        [[1, 3], [4, 5]]
    """
    labelled = np.concatenate([[0], np.asarray(labels) != IGNORED, [0]]).astype(np.int8)
    return [[int(start), int(end)] for start, end in np.flatnonzero(np.diff(labelled)).reshape(-1, 2)]


def read_held_out(path: Path, tokenizer: Tokenizer, fingerprint: str | None) -> HeldOut:
    """Read the rows that `write_held_out` wrote.

    Args:
        path: The file.
        tokenizer: The run's; no token may lie outside its vocabulary.
        fingerprint: Of the run's data and split, as its results have it.

    Raises:
        DataError: A line is not as it was written, or there is none.
    """
    from datasets import Dataset

    most = max(tokenizer.get_vocab().values(), default=0)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    conversations: list[str] = []
    answerable, known = [], True
    in_training: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file):
            entry = _entry(line, f"{path}:{number + 1}", most)
            messages, tools = entry["messages"], entry.get("tools")
            ids.append(entry["input_ids"])
            labels.append(_labels(entry))
            conversations.append(json.dumps(messages if tools is None else {"messages": messages, "tools": tools}))
            if any(message["role"] == "assistant" for message in messages[1:]):
                answerable.append(number)
            known = known and "in_training" in entry
            if entry.get("in_training"):
                in_training.append(number)
    if not ids:
        raise DataError(fault(str(path), "rows", 0, "the rows that the run held out", _OTHERWISE))
    with quiet_datasets():
        rows = Dataset.from_dict({"input_ids": ids, "labels": labels}, features=token_features())
    return HeldOut(rows, Conversations(conversations), answerable, in_training if known else None, fingerprint)


_OTHERWISE = "Remove the file to take the rows from the run's data again, or give rows of your own: --data FILE"


def _entry(line: bytes, where: str, most: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        tokens = np.asarray(entry["input_ids"], np.int64)
        spans = np.asarray(entry["label_spans"], np.int64).reshape(-1, 2)
        turns = [(message["role"], message["content"]) for message in entry["messages"]]
        good = len(tokens) > 0 and len(turns) > 0 and tokens.min() >= 0 and tokens.max() <= most
        good = good and bool(((spans[:, 0] >= 0) & (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= len(tokens))).all())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        good = False
    if not good:
        shown = line[:60].decode("utf-8", "replace")
        raise DataError(fault(where, "row", shown, "a row as the run wrote it", _OTHERWISE))
    return dict(entry)


def _labels(entry: dict[str, Any]) -> list[int]:
    labels = [IGNORED] * len(entry["input_ids"])
    for start, end in entry["label_spans"]:
        labels[start:end] = entry["input_ids"][start:end]
    return labels
