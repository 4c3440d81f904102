"""Make training rows from the configuration's sources: mixing, holding out, counting."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from philora.dataset.conversations import Conversations
from philora.dataset.data_report import DataReport, SourceReport, SplitReport, add_notice, notice_share, notice_splits
from philora.dataset.datasets_library import quiet_datasets, token_features
from philora.dataset.messages import Conversation, Message
from philora.dataset.read import resolve
from philora.dataset.records import Fault, Source
from philora.dataset.row_choice import Indices, hold_out, part_of, weighted_rows
from philora.dataset.shapes import Shape, shape_from_config
from philora.dataset.store import (
    ANSWERS,
    CONTROL,
    EXAMPLES_KEPT,
    FOLDED,
    MISMATCH,
    STOP_NUMBER,
    TRUNCATED,
    TURNS_AS_TEXT,
    TWO_USER_TURNS,
    Entry,
    Rows,
    Settings,
    cache_root,
    entry_for,
    process_batch,
    process_count,
    recognised,
    serialise,
    tokenizer_fingerprint,
)
from philora.dataset.template import Encoder, Tokenizer
from philora.errors import DataError, fault

if TYPE_CHECKING:
    from philora.configuration.sections import DataConfig, SourceConfig


logger = logging.getLogger("philora.dataset")

_SOURCE_COUNTS = (
    "records", "unread_fields", "unread_parts", "spelled", "recognised", "invalid", "invalid_records",
)  # fmt: skip
"""What a source's report takes from its cache entry under the same name."""
_STREAM_PREVIEW_ROWS = 256
_STREAM_SHUFFLE_ROWS = 1000
_TURNS_SHOWN = 4
_LETTERS_SHOWN = 80


def shape_of(data: DataConfig, source: SourceConfig) -> Shape | None:
    """Return the shape that the configuration gives a source; None where it is to be found.

    Raises:
        DataError: As `shape_from_config`.
    """
    return shape_from_config(source.format or data.format, source.columns, f"data ({source.path})", source.roles)


def places_of(data: DataConfig, wanted: set[str]) -> dict[str, str]:
    """Return file and line, or row, of conversations as `Conversations.stored` returns them; of equal ones the first.

    A conversation that the tokenizer's template changed, such as one whose system turn was folded, is not found.

    Cost:
        Reads the sources again until all are found.
    """
    found: dict[str, str] = {}
    for config in data.train:
        source, shape = recognised(resolve(config, "train"), shape_of(data, config))
        for batch in source.open():
            for index, record in enumerate(batch.records):
                if len(found) == len(wanted):
                    return found
                try:
                    text = serialise(shape.read(record)).decode()
                except Fault:
                    continue
                if text in wanted:
                    found.setdefault(text, batch.where(index))
    return found


@dataclass
class PreparedData:
    """Tokenised splits with columns `input_ids` and `labels` (-100 where there is no loss).

    `train_conversations[i]` is the conversation of row i of `train`; of a streaming set they are its first ones.
    `eval_conversations` are those of `eval` that can be asked for: with an assistant turn that follows something.
    `all_eval_conversations[i]` is the conversation of row i of `eval`; `eval_in_training` are the rows of `eval` that
    are also in the training set, None if a stream keeps that unknown.
    """

    train: Any
    eval: Any | None
    train_conversations: Conversations
    eval_conversations: Conversations | None
    fingerprint: str
    report: DataReport
    all_eval_conversations: Conversations | None = None
    eval_in_training: list[int] | None = None


def prepare(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    seed: int,
    stop_token_ids: Sequence[int],
    held_out_rows: int | None = None,
) -> PreparedData:
    """Read, check, normalise, tokenise and label the data of a run; the result is cached on disk.

    Mixing: a source of weight w gives each of its rows floor(w) times, and a sample of the rest, drawn with the
    seed; several sources are shuffled together, a single one keeps its order. A fraction for `eval` is held out with
    the seed before weights apply; equal conversations stay in one split, so that none is in both. In streaming,
    where sizes are unknown, weights are the odds of drawing from a source.

    Args:
        data: the `data` section of the configuration.
        tokenizer: a fast tokenizer with its chat template.
        max_length: longest row in tokens; longer ones are truncated or dropped, by `data.overlong`.
        seed: decides the held-out rows, samples and the order of mixed sources.
        stop_token_ids: any of these ends an assistant turn.
        held_out_rows: where `eval` is a fraction, the rows that a run which continues has recorded.

    Returns:
        Splits, conversations and the report. Rows of `train` and `eval` are memory-mapped.

    Raises:
        DataError: a source or record cannot be used (up to 20 faults are listed, their number is stated), or the
            chat template cannot be trained with.
        RunError: the disk of the cache is full.
    """
    _check_arguments(data, max_length)
    loader = Loader(data, Encoder(tokenizer, stop_token_ids), max_length)
    report = DataReport()
    if any(source.streaming for source in data.train):
        return _prepare_stream(data, loader, report, seed)
    prepared = _prepare_splits(data, loader, report, seed, held_out_rows)
    _require_rows(report)
    notice_splits(report, max_length)
    return prepared


def _prepare_splits(
    data: DataConfig, loader: Loader, report: DataReport, seed: int, held_out_rows: int | None
) -> PreparedData:
    """Return the training rows, and the held-out rows if there are any; count both in the report."""
    entries = [loader.load(source, "train", report) for source in data.train]
    held_out, eval_entries, eval_indices = _held_out_part(data, entries, loader, report, seed, held_out_rows)
    kept = [rest_of(entry, out) for entry, out in zip(entries, held_out, strict=True)]
    train_indices = weighted(data, kept, seed)
    report.splits["train"] = _split_report(entries, train_indices, kept, count_dropped=True)
    fingerprint = fingerprint_of(entries, train_indices, eval_entries, eval_indices)
    train, train_conversations = assemble(entries, train_indices, seed if len(entries) > 1 else None)
    prepared = PreparedData(train, None, train_conversations, None, fingerprint, report)
    if eval_entries:
        counts = _split_report(eval_entries, eval_indices, eval_indices, count_dropped=eval_entries is not entries)
        report.splits["eval"] = counts
        report.in_both = len(rows_in_training(eval_entries, eval_indices, entries, train_indices))
        _add_eval(prepared, eval_entries, eval_indices)
        prepared.eval_in_training = rows_in_training(eval_entries, eval_indices, entries, kept)
    return prepared


def rest_of(entry: Entry, out: Indices) -> Indices:
    """Return the rows of an entry that are not held out."""
    return np.setdiff1d(np.arange(len(entry.rows)), out, assume_unique=True)


def weighted(data: DataConfig, kept: Sequence[Indices], seed: int) -> list[Indices]:
    """Return the rows of every training source, repeated or sampled by its weight."""
    together = enumerate(zip(kept, data.train, strict=True))
    return [weighted_rows(rows, source.weight, seed, position) for position, (rows, source) in together]


def _held_out_part(
    data: DataConfig, entries: list[Entry], loader: Loader, report: DataReport, seed: int, recorded: int | None
) -> tuple[list[Indices], list[Entry], list[Indices]]:
    """Return the rows that each training source gives up, the sources of the held-out rows, and their rows."""
    if isinstance(data.eval, float | int):
        rows = sum(len(entry.rows) for entry in entries)
        part = part_of(data.eval, recorded, rows)
        held_out = hold_out([entry.rows["hash"] for entry in entries], part, seed)
        notice_share(report, part, rows, sum(map(len, held_out)))
        return held_out, entries, held_out
    nothing: list[Indices] = [np.zeros(0, np.int64) for _ in entries]
    own = [loader.load(source, "eval", report) for source in data.eval or ()]
    return nothing, own, [np.arange(len(entry.rows)) for entry in own]


def _check_arguments(data: DataConfig, max_length: int) -> None:
    if max_length < 2:
        raise DataError(fault("data", "max_length", max_length, "at least 2 tokens"))
    if not data.train:
        raise DataError(fault("data", "train", None, "a file, folder or hub id", "Give data.train"))
    if data.overlong not in ("truncate", "drop"):
        raise DataError(fault("data", "overlong", data.overlong, "truncate or drop"))
    if isinstance(data.eval, float | int) and not (0 < data.eval < 1 or (data.eval >= 1 and data.eval % 1 == 0)):
        raise DataError(fault("data", "eval", data.eval, "a fraction between 0 and 1, a number of rows, or a source"))
    if data.invalid not in ("error", "drop"):
        raise DataError(fault("data", "invalid", data.invalid, "error or drop"))
    for source in data.train:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise DataError(fault("data.train", "weight", source.weight, "a number over 0", f"Source: {source.path}"))
        if source.limit is not None and source.limit < 1:
            raise DataError(fault("data.train", "limit", source.limit, "at least 1", f"Source: {source.path}"))


class Loader:
    """Brings one configured source to a cache entry."""

    def __init__(self, data: DataConfig, encoder: Encoder, max_length: int) -> None:
        self.data = data
        self.encoder = encoder
        self.settings = Settings(max_length, data.overlong == "drop", data.invalid == "drop")
        self.key = tokenizer_fingerprint(encoder)

    def load(self, config: SourceConfig, role: Any, report: DataReport) -> Entry:
        """Read, tokenise and cache a source, and note in the report what was found."""
        shape = shape_of(self.data, config)
        source = resolve(config, role)
        processes = process_count(self.data.num_proc, source.size_bytes)
        root = cache_root(self.data.cache_dir)
        entry = entry_for(source, shape, self.encoder, self.key, self.settings, root=root, processes=processes)
        found = SourceReport(
            name=source.name,
            format=entry.meta["shape"],
            weight=config.weight if role == "train" else 1.0,
            examples=[_line_of(item) for item in entry.meta["examples"]],
            **{name: entry.meta[name] for name in _SOURCE_COUNTS},
        )
        report.sources.setdefault(role, []).append(found)
        logger.info("%s", found)
        for example in found.examples if role == "train" else ():
            logger.info("  %s", example)
        return entry


def _line_of(stored: str) -> str:
    """Return a stored conversation in one line, its turns shortened."""
    value = json.loads(stored)
    messages: list[Message] = value["messages"] if isinstance(value, dict) else value
    turns = [f"{message['role']}: {_short(message['content'])}" for message in messages[:_TURNS_SHOWN]]
    more = [f"{len(messages) - _TURNS_SHOWN} more turns"] if len(messages) > _TURNS_SHOWN else []
    return " | ".join(turns + more)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LETTERS_SHOWN else f"{text[:_LETTERS_SHOWN]}..."


def _split_report(
    entries: Sequence[Entry], indices: Sequence[Indices], once: Sequence[Indices], *, count_dropped: bool
) -> SplitReport:
    """Count rows over `indices`; duplicates over `once`, the same rows before weights repeat them."""
    report = SplitReport()
    for entry, chosen in zip(entries, indices, strict=True):
        rows: Rows = entry.rows[chosen]
        flags = rows["flags"]
        report.rows += len(rows)
        report.tokens += int(rows["tokens"].sum(dtype=np.int64))
        report.labels += int(rows["labels"].sum(dtype=np.int64))
        report.longest_tokens = max(report.longest_tokens, int(rows["full_tokens"].max(initial=0)))
        report.truncated += int(np.count_nonzero(flags & TRUNCATED))
        report.two_user_turns += int(np.count_nonzero(flags & TWO_USER_TURNS))
        report.boundary_mismatches += int(np.count_nonzero(flags & MISMATCH))
        report.folded_system += int(np.count_nonzero(flags & FOLDED))
        report.control_tokens += int(np.count_nonzero(flags & CONTROL))
        report.stop_numbers += int(np.count_nonzero(flags & STOP_NUMBER))
        report.turns_as_text += int(np.count_nonzero(flags & TURNS_AS_TEXT))
        if count_dropped:
            report.dropped_overlong += int(entry.meta["dropped_overlong"])
            report.dropped_unlabelled += int(entry.meta["dropped_unlabelled"])
    report.dropped = report.dropped_overlong + report.dropped_unlabelled
    hashes = _hashes(entries, once)
    report.duplicates = len(hashes) - len(np.unique(hashes))
    return report


def _hashes(entries: Sequence[Entry], indices: Sequence[Indices]) -> npt.NDArray[np.uint64]:
    return np.concatenate([entry.rows["hash"][chosen] for entry, chosen in zip(entries, indices, strict=True)])


def rows_in_training(
    eval_entries: Sequence[Entry], eval_indices: Sequence[Indices], entries: Sequence[Entry], kept: Sequence[Indices]
) -> list[int]:
    """Return the indices of the evaluation rows that are also in the training set."""
    return np.flatnonzero(np.isin(_hashes(eval_entries, eval_indices), _hashes(entries, kept))).tolist()


def fingerprint_of(
    entries: Sequence[Entry], indices: Sequence[Indices], eval_entries: Sequence[Entry], eval_indices: Sequence[Indices]
) -> str:
    """Return a hash of the rows that a run trains on and holds out."""
    digest = hashlib.sha256()
    for entry, chosen in (*zip(entries, indices, strict=True), *zip(eval_entries, eval_indices, strict=True)):
        digest.update(entry.identity.encode())
        digest.update(chosen.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()


def assemble(
    entries: Sequence[Entry], indices: Sequence[Indices], shuffle_seed: int | None
) -> tuple[Any, Conversations]:
    """Memory-mapped rows and conversations of the chosen indices, in one order."""
    from datasets import Dataset, concatenate_datasets

    with quiet_datasets():
        tokens = concatenate_datasets([Dataset.from_file(str(entry.tokens_file)) for entry in entries])
        conversations = concatenate_datasets([Dataset.from_file(str(entry.conversations_file)) for entry in entries])
        starts = np.cumsum([0, *(len(entry.rows) for entry in entries)])
        chosen = np.concatenate([item + start for item, start in zip(indices, starts, strict=False)])
        if shuffle_seed is not None:
            chosen = np.random.default_rng(shuffle_seed).permutation(chosen)
        if not np.array_equal(chosen, np.arange(starts[-1])):
            tokens, conversations = tokens.select(chosen), conversations.select(chosen)
    return tokens, Conversations(conversations)


def _add_eval(prepared: PreparedData, entries: Sequence[Entry], indices: Sequence[Indices]) -> None:
    """Add the held-out rows, the conversation of each, and the conversations that can be asked for."""
    prepared.eval, prepared.all_eval_conversations = assemble(entries, indices, None)
    asked = [item[(entry.rows["flags"][item] & ANSWERS) > 0] for entry, item in zip(entries, indices, strict=True)]
    _, prepared.eval_conversations = assemble(entries, asked, None)


def _require_rows(report: DataReport) -> None:
    for name, split in report.splits.items():
        if split.rows == 0:
            expected = (
                f"at least one row, but all records were dropped ({split.dropped_overlong} too long, "
                f"{split.dropped_unlabelled} without an answer in the first tokens)"
            )
            raise DataError(fault(f"data.{name}", "rows", 0, expected, "Raise max_length"))


def _prepare_stream(data: DataConfig, loader: Loader, report: DataReport, seed: int) -> PreparedData:
    from datasets import interleave_datasets

    if isinstance(data.eval, float | int):
        todo = "Give data.eval a source of its own, or set streaming to false"
        raise DataError(fault("data", "eval", data.eval, "a source, since a stream cannot be split", todo))
    streams = []
    first: list[bytes] = []
    for config in data.train:
        source, shape = recognised(resolve(config, "train"), shape_of(data, config))
        if shape.name == "turns":
            todo = "Set streaming to false, or group the messages into records with messages"
            raise DataError(fault(source.name, "streaming", True, "whole conversations in each record", todo))
        found = SourceReport(source.name, shape.name, 0, config.weight, recognised=shape.why)
        some = _first_conversations(source, shape, loader.encoder, found, loader.settings.drop_invalid)
        found.examples = [_line_of(item.decode()) for item in some[:EXAMPLES_KEPT]]
        first += some
        found.unread_parts = list(source.unread)
        streams.append(_stream(source, shape, loader))
        report.sources.setdefault("train", []).append(found)
    with quiet_datasets():
        train = streams[0]
        if len(streams) > 1:
            weights = np.array([source.weight for source in data.train])
            train = interleave_datasets(streams, probabilities=list(weights / weights.sum()), seed=seed)
        train = train.shuffle(seed=seed, buffer_size=_STREAM_SHUFFLE_ROWS)
    report.streaming = True
    report.splits["train"] = SplitReport()
    entries = [loader.load(source, "eval", report) for source in data.eval or ()]
    indices = [np.arange(len(entry.rows)) for entry in entries]
    names = [f"{source.path}:{source.limit}:{source.weight}" for source in data.train]
    fingerprint = hashlib.sha256(f"{loader.key}{names}{fingerprint_of([], [], entries, indices)}".encode()).hexdigest()
    prepared = PreparedData(train, None, Conversations(first[:_STREAM_PREVIEW_ROWS]), None, fingerprint, report)
    if entries:
        report.splits["eval"] = _split_report(entries, indices, indices, count_dropped=True)
        _add_eval(prepared, entries, indices)
    add_notice(report, "train: the data is streamed, so its rows, duplicates and lengths are not counted.")
    notice_splits(report, loader.settings.max_length)
    return prepared


def _first_conversations(
    source: Source, shape: Shape, encoder: Encoder, found: SourceReport, drop_invalid: bool
) -> list[bytes]:
    """Return the first conversations of a stream; fields that are not read are counted in its report."""
    batch = next(source.open(), None)
    if batch is None:
        return []
    conversations: list[Conversation] = []
    for index, record in enumerate(batch.records[:_STREAM_PREVIEW_ROWS]):
        try:
            conversations.append(shape.read(record))
        except Fault as error:
            if not drop_invalid:
                raise DataError(error.at(batch.where(index))) from None
    found.unread_fields = dict(Counter(name for conversation in conversations for name in conversation.unread))
    found.spelled = dict(encoder.controls.spelled(conversations))
    return [serialise(conversation) for conversation in conversations]


def _stream(source: Source, shape: Shape, loader: Loader) -> Any:
    from datasets import IterableDataset

    arguments = {"source": source, "shape": shape, "loader": loader}
    return IterableDataset.from_generator(_stream_rows, features=token_features(), gen_kwargs=arguments)


def _stream_rows(source: Source, shape: Shape, loader: Loader) -> Iterator[dict[str, Any]]:
    for batch in source.open():
        chunk = process_batch(batch, shape, loader.encoder, loader.settings)
        if chunk.fault_count and not loader.settings.drop_invalid:
            raise DataError("\n".join(chunk.faults))
        for fault_text in chunk.faults:
            logger.warning("left out: %s", fault_text)
        end = 0
        for length in chunk.rows["tokens"]:
            start, end = end, end + int(length)
            yield {"input_ids": chunk.ids[start:end], "labels": chunk.labels[start:end]}
