"""Cache a tokenised source on disk: written once and atomically, and memory-mapped afterwards.

An entry is a folder named by everything that decides its content. It is written under a temporary name and renamed;
`meta.json` states the size of every file, so an entry that was torn later (a full disk, a copy that stopped) is seen
and made again.

    tokens.arrow          input_ids, labels: one row a conversation
    conversations.arrow   the normalised conversation as JSON, the same rows
    rows.npy              hash, lengths and flags of every row
    meta.json             counts, and the sizes of the others

`datasets` keeps what it derives from the rows (TRL's packs) beside them, under names of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from philora.dataset.datasets_library import token_features
from philora.dataset.messages import Conversation
from philora.dataset.records import Batch, Fault, Record, Source, fields_of
from philora.dataset.shapes import Shape, detect
from philora.dataset.template import Encoded, Encoder
from philora.dataset.turns import described as turns_described
from philora.dataset.turns import grouped, turn_columns
from philora.errors import DataError, RunError, fault
from philora.runtime.user_cache import user_cache

FORMAT_VERSION = 5
"""Part of every key: raise it when the meaning or the layout of an entry changes."""

_TURNS_VERSION = 2
"""The same for rows of one message each: raise it when they make other conversations than before."""

_IDENTITY_VERSION = 2
"""Part of what runs record of their rows: raise it when the same data gives other rows than before."""

FAULTS_SHOWN = 20
DETECT_RECORDS = 100
EXAMPLES_KEPT = 3
"""Conversations of an entry that are shown as examples."""

TRUNCATED, TWO_USER_TURNS, MISMATCH, FOLDED, CONTROL, ANSWERS, STOP_NUMBER, TURNS_AS_TEXT = 1, 2, 4, 8, 16, 32, 64, 128
"""Flags of a row; `ANSWERS`: an assistant turn follows something, so a model can be asked for it."""

ROW = np.dtype([("hash", "u8"), ("tokens", "i4"), ("labels", "i4"), ("full_tokens", "i4"), ("flags", "u1")])
"""What is known of a row without reading it; `full_tokens` is its length before truncation."""

Rows = npt.NDArray[Any]

_STALE_SECONDS = 24 * 3600
_PARALLEL_FROM_BYTES = 32 << 20
_MOST_PROCESSES = 16


@dataclass(frozen=True)
class Settings:
    """Describe what besides source and tokenizer decides the tokens."""

    max_length: int
    drop_overlong: bool
    drop_invalid: bool = False
    """Records that cannot be used are left out and listed, in place of ending the run."""


@dataclass
class Chunk:
    """Hold the results of one batch: arrays of its kept rows, and the faults of the others."""

    records: int
    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    labels: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    conversations: list[bytes] = field(default_factory=list)
    rows: Rows = field(default_factory=lambda: np.zeros(0, ROW))
    dropped_overlong: int = 0
    dropped_unlabelled: int = 0
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    """Fields and keys of turns that were not read, with the records that have them."""
    spelled: Counter[str] = field(default_factory=Counter)
    """Counts by control text, as `ControlTexts.spelled` returns them."""

    def refuse(self, error: Fault, where: str) -> None:
        """Count a record that cannot be used, and keep the first faults."""
        self.fault_count += 1
        if len(self.faults) < FAULTS_SHOWN:
            self.faults.append(error.at(where))


@dataclass(frozen=True)
class Entry:
    """Describe one tokenised source on disk."""

    folder: Path
    meta: dict[str, Any]
    rows: Rows

    @property
    def identity(self) -> str:
        """Return a hash of the rows' content, which a run records; the cache's layout does not change it."""
        described = {**self.meta["key"], "version": _IDENTITY_VERSION}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def tokens_file(self) -> Path:
        """Arrow stream with `input_ids` and `labels`."""
        return self.folder / "tokens.arrow"

    @property
    def conversations_file(self) -> Path:
        """Arrow stream with `conversation`."""
        return self.folder / "conversations.arrow"


def cache_root(configured: str | None) -> Path:
    """Return the cache folder: as configured, else `$PHILORA_CACHE`, else the user's (`user_cache`)."""
    chosen = configured or os.environ.get("PHILORA_CACHE")
    return (Path(chosen).expanduser() if chosen else user_cache()) / "data"


def tokenizer_fingerprint(encoder: Encoder) -> str:
    """Return a hash of everything a tokenizer does to a conversation: vocabulary, rules, special tokens, template."""
    digest = hashlib.sha256(encoder.backend.to_str().encode())
    tokenizer = encoder.tokenizer
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    digest.update(f"\0{special}\0{template}\0{sorted(encoder.stops.items())}".encode())
    return digest.hexdigest()


def serialise(conversation: Conversation) -> bytes:
    """Return a conversation as the JSON that is stored, hashed and read back."""
    stored: Any = conversation.messages
    if conversation.tools is not None:
        stored = {"messages": conversation.messages, "tools": conversation.tools}
    text = json.dumps(stored, ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise Fault("content", around, "text without unpaired surrogates", "Correct the text") from None


def process_batch(batch: Batch, shape: Shape, encoder: Encoder, settings: Settings, tokenise: bool = True) -> Chunk:
    """Normalise and tokenise one batch; with `tokenise` off, only look for faults."""
    # A batch makes a hundred thousand small objects and no cycles: collecting them again and again took a fifth of
    # the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _process_batch(batch, shape, encoder, settings, tokenise)
    finally:
        if collecting:
            gc.enable()


def _process_batch(batch: Batch, shape: Shape, encoder: Encoder, settings: Settings, tokenise: bool) -> Chunk:
    """Return the rows of a batch, with what was found in its records."""
    chunk = Chunk(len(batch.records))
    read: list[tuple[int, Conversation, bytes]] = []
    for place, record in enumerate(batch.records):
        try:
            conversation = shape.read(record)
            read.append((place, conversation, serialise(conversation)))
        except Fault as error:
            chunk.refuse(error, batch.where(place))
    if not tokenise or (chunk.fault_count and not settings.drop_invalid):
        return chunk
    conversations = [conversation for _, conversation, _ in read]
    encoded = encoder.encode(conversations)
    chunk.spelled = encoder.controls.spelled(conversations)
    for conversation in conversations:
        if conversation.unread:
            chunk.unread.update(conversation.unread)
    rows = np.zeros(len(encoded), ROW)
    id_parts: list[npt.NDArray[np.int32]] = []
    label_parts: list[npt.NDArray[np.int32]] = []
    for (place, conversation, blob), result in zip(read, encoded, strict=True):
        if isinstance(result, Fault):
            chunk.refuse(result, batch.where(place))
            continue
        chunk.unread.update(result.unshown)
        full_length = len(result.ids)
        overlong = full_length > settings.max_length
        if overlong and settings.drop_overlong:
            chunk.dropped_overlong += 1
            continue
        length = min(full_length, settings.max_length)
        # The first token is never predicted, so a label there does not count.
        labelled = sum(min(end, length) - max(start, 1) for start, end in result.spans if start < length)
        if labelled <= 0:
            chunk.dropped_unlabelled += 1
            continue
        if result.conversation is not conversation:
            blob = serialise(result.conversation)
        row_hash = int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "little")
        flags = _flags_of(result, encoder) | TRUNCATED * overlong
        rows[len(id_parts)] = (row_hash, length, labelled, full_length, flags)
        id_parts.append(result.ids[:length])
        label_parts.append(result.label_array()[:length])
        chunk.conversations.append(blob)
    chunk.rows = rows[: len(id_parts)]
    if id_parts:
        chunk.ids, chunk.labels = np.concatenate(id_parts), np.concatenate(label_parts)
    return chunk


def _flags_of(result: Encoded, encoder: Encoder) -> int:
    """Return what is to be counted of a row, but for its length."""
    conversation = result.conversation
    return (
        TWO_USER_TURNS * conversation.two_user_turns
        | MISMATCH * result.boundary_mismatch
        | FOLDED * result.folded_system
        | CONTROL * result.control_tokens
        | ANSWERS * any(message["role"] == "assistant" for message in conversation.messages[1:])
        | STOP_NUMBER * encoder.controls.ends_in_stop_number(conversation)
        | TURNS_AS_TEXT * conversation.has_turns_as_text
    )


_worker: tuple[Shape, Encoder, Settings] | None = None


def _start_worker(shape: Shape, encoder: Encoder, settings: Settings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (shape, encoder, settings)


def _work(batch: Batch, tokenise: bool) -> Chunk:
    if _worker is None:
        raise RunError("a data worker was used before it was set up")
    return process_batch(batch, *_worker, tokenise)


def chunks(
    batches: Iterable[Batch], shape: Shape, encoder: Encoder, settings: Settings, processes: int
) -> Iterator[Chunk]:
    """Work on batches in order, in `processes` processes, with a bounded number of them under way."""
    failed = False
    if processes <= 1:
        for batch in batches:
            chunk = process_batch(batch, shape, encoder, settings, not failed)
            failed = failed or (chunk.fault_count > 0 and not settings.drop_invalid)
            yield chunk
        return
    under_way: deque[Future[Chunk]] = deque()
    fork, given = multiprocessing.get_context("fork"), (shape, encoder, settings)
    with _forked_quietly(), ProcessPoolExecutor(processes, fork, initializer=_start_worker, initargs=given) as pool:
        try:
            for batch in batches:
                under_way.append(pool.submit(_work, batch, not failed))
                if len(under_way) >= 2 * processes:
                    chunk = under_way.popleft().result()
                    failed = failed or (chunk.fault_count > 0 and not settings.drop_invalid)
                    yield chunk
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


@contextlib.contextmanager
def _forked_quietly() -> Iterator[None]:
    """Stop the tokenizers library from warning about each fork: the workers run it on one thread."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def process_count(asked: int | None, size_bytes: int | None) -> int:
    """Return how many processes to use: as asked; else one for small sources, and the usable cores for large ones.

    One process still tokenises on all cores, by the threads of the tokenizers library. Where processes cannot be
    forked safely (not Linux), it is always one.
    """
    if not sys.platform.startswith("linux"):
        return 1
    if asked is not None:
        return max(1, asked)
    if size_bytes is None or size_bytes < _PARALLEL_FROM_BYTES:
        return 1
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))


def entry_for(
    source: Source,
    shape: Shape | None,
    encoder: Encoder,
    tokenizer_key: str,
    settings: Settings,
    *,
    root: Path,
    processes: int,
) -> Entry:
    """Return the cache entry of a source; make it if it is missing or incomplete.

    Raises:
        DataError: records cannot be used; up to 20 faults are listed, and their number is stated.
    """
    described = {
        "version": FORMAT_VERSION,
        "source": source.fingerprint,
        "limit": source.limit,
        "shape": None if shape is None else [shape.name, shape.columns, *([shape.roles] if shape.roles else [])],
        **({"turns": _TURNS_VERSION} if shape is not None and shape.name == "turns" else {}),
        "tokenizer": tokenizer_key,
        "max_length": settings.max_length,
        "drop_overlong": settings.drop_overlong,
        **({"drop_invalid": True} if settings.drop_invalid else {}),
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / key
    entry = read_entry(folder)
    if entry is not None:
        return entry
    source, shape = recognised(source, shape)
    temporary = root / f".tmp-{key}-{os.getpid()}-{time.monotonic_ns()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary.mkdir()
    except OSError as error:
        todo = "Set data.cache_dir or the environment variable PHILORA_CACHE to another folder"
        expected = f"a folder that can be written ({error})"
        raise DataError(fault("data", "cache_dir", str(root), expected, todo)) from error
    try:
        done = chunks(source.open(), shape, encoder, settings, processes)
        _write_entry(temporary, done, source, shape, settings, described)
        _rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        expected = "free space for the tokenised data, but the disk is full"
        todo = "Free some space, or set PHILORA_CACHE to a folder on a larger disk"
        raise RunError(fault("data", "cache_dir", str(root), expected, todo)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    entry = read_entry(folder)
    if entry is None:
        raise RunError(fault("data", "cache_dir", str(folder), "a cache entry that can be read back after writing"))
    return entry


def recognised(source: Source, given: Shape | None) -> tuple[Source, Shape]:
    """Return a source whose records are conversations, and their shape: as given, else from the first records.

    Raises:
        DataError: there are no records, none of them looks like an accepted shape, or they are not what is given.
    """
    shape = given
    if shape is None or (shape.name == "turns" and not shape.columns):
        first = next(source.read(), None)
        if first is None:
            raise DataError(fault(source.name, "records", 0, "at least one record"))
        records = first.records[:DETECT_RECORDS]
        shape = detect(records, first.file) if given is None else _given_turns(given, records, first.file)
    return (grouped(source, shape.columns, shape.roles), shape) if shape.name == "turns" else (source, shape)


def _given_turns(given: Shape, records: Sequence[Record], file: str) -> Shape:
    """Find the columns of a table with one row for every message."""
    rows = [fields_of(record) for record in records[:1]]
    columns = turn_columns(rows)
    if columns is None:
        expected = "columns for an id, a role and a text, since these are one row for each message"
        todo = 'Name them: columns: {conversation: "{id}", role: "{role}", content: "{text}"}'
        raise DataError(fault(file, "fields", ", ".join(rows[0]), expected, todo))
    return dataclasses.replace(given, columns=columns, why=turns_described(columns))


@dataclass
class _Totals:
    """Describe what the chunks of an entry come to."""

    rows: list[Rows] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    spelled: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, chunk: Chunk) -> None:
        """Count a chunk in."""
        self.faults += chunk.faults[: FAULTS_SHOWN - len(self.faults)]
        self.unread.update(chunk.unread)
        self.spelled.update(chunk.spelled)
        self.examples += [item.decode() for item in chunk.conversations[: EXAMPLES_KEPT - len(self.examples)]]
        self.counts.update(
            records=chunk.records,
            invalid=chunk.fault_count,
            dropped_overlong=chunk.dropped_overlong,
            dropped_unlabelled=chunk.dropped_unlabelled,
        )


def _write_entry(
    folder: Path, done: Iterator[Chunk], source: Source, shape: Shape, settings: Settings, described: dict[str, Any]
) -> None:
    total = _write_rows(folder, done, settings)
    invalid, records = total.counts["invalid"], total.counts["records"]
    if invalid and (not settings.drop_invalid or invalid == records):
        raise DataError(_records_message(source, total.faults, invalid, records))
    if not records:
        raise DataError(fault(source.name, "records", 0, "at least one record"))
    rows = np.concatenate(total.rows) if total.rows else np.zeros(0, ROW)
    with _synced(folder / "rows.npy") as stream:
        np.save(stream, rows)
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    meta = {
        "key": described,
        "name": source.name,
        "shape": shape.name,
        "recognised": shape.why,
        "rows": len(rows),
        "digests": digests,
        "unread_fields": dict(total.unread.most_common()),
        "unread_parts": list(source.unread),
        "spelled": dict(total.spelled.most_common()),
        "invalid_records": total.faults,
        "examples": total.examples,
        **total.counts,
    }
    with _synced(folder / "meta.json") as stream:
        stream.write(json.dumps(meta, indent=1).encode())


def _write_rows(folder: Path, done: Iterator[Chunk], settings: Settings) -> _Totals:
    """Write tokens and conversations; after a fault that ends the run the rest is only looked at."""
    import pyarrow as pa
    from datasets import Features, Value

    tokens = token_features().arrow_schema
    conversations = Features({"conversation": Value("string")}).arrow_schema
    total = _Totals()
    with (
        _synced(folder / "tokens.arrow") as tokens_sink,
        _synced(folder / "conversations.arrow") as conversations_sink,
        pa.ipc.new_stream(tokens_sink, tokens) as tokens_writer,
        pa.ipc.new_stream(conversations_sink, conversations) as conversations_writer,
    ):
        for chunk in done:
            total.add(chunk)
            if (total.counts["invalid"] and not settings.drop_invalid) or not len(chunk.rows):
                continue
            total.rows.append(chunk.rows)
            offsets = np.zeros(len(chunk.rows) + 1, np.int32)
            np.cumsum(chunk.rows["tokens"], out=offsets[1:])
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (chunk.ids, chunk.labels)]
            tokens_writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=tokens))
            blobs = pa.array(chunk.conversations, pa.string())
            conversations_writer.write_batch(pa.RecordBatch.from_arrays([blobs], schema=conversations))
    return total


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records_message(source: Source, faults: list[str], count: int, records: int) -> str:
    todo = "Correct them, or set data.invalid to drop to leave them out" if count < records else ""
    if count == 1:
        return faults[0] + (" Or set data.invalid to drop to leave out what cannot be used." if todo else "")
    more = f" (the first {len(faults)} of them)" if count > len(faults) else ""
    listed = "\n".join(f"  {item}" for item in faults)
    end = f"\n{todo}." if todo else ""
    return f"{source.name}: {count} of {records} records cannot be used{more}:\n{listed}{end}"


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Any]:
    with path.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _rename(temporary: Path, folder: Path) -> None:
    """Put an entry under its name; whoever else finished the same one first is left alone unless theirs is torn."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if read_entry(folder) is None:
            aside = folder.with_name(f".tmp-torn-{folder.name}-{time.monotonic_ns()}")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            temporary.rename(folder)


def _sweep(root: Path) -> None:
    """Remove what runs that were killed have left."""
    for file in root.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(file, ignore_errors=True)


def read_entry(folder: Path) -> Entry | None:
    """Return a complete entry, or None where it is missing, torn or damaged.

    Cost:
        Reads and hashes the entry's files once, about a second for a gigabyte.
    """
    import pyarrow as pa

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any(_digest(folder / name) != digest for name, digest in meta["digests"].items()):
            return None
        rows = np.load(folder / "rows.npy", mmap_mode="r") if meta["rows"] else np.zeros(0, ROW)
        if len(rows) != meta["rows"] or rows.dtype != ROW:
            return None
        for name in ("tokens.arrow", "conversations.arrow"):
            with pa.memory_map(str(folder / name)) as mapped, pa.ipc.open_stream(mapped):
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    return Entry(folder, meta, rows)
