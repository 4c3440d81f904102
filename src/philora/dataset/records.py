"""Define records as files have them: batches, faults of a record, and text that is not UTF-8."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from philora.errors import DataError, fault

Role: TypeAlias = Literal["train", "eval"]
Record: TypeAlias = "dict[str, Any] | bytes"
"""A parsed record, or the bytes of one JSONL line; `fields_of` gives the fields of both."""

BATCH_ROWS = 512
BATCH_BYTES = 4 << 20
"""A batch closes at whichever comes first: large enough for the tokenizer, small enough to keep memory flat."""
START_BYTES = 200


@dataclass(eq=False)
class Fault(Exception):
    """Report a record that cannot be used: what `philora.errors.fault` needs besides its position."""

    name: str
    value: object
    expected: str
    todo: str = ""

    def at(self, where: str) -> str:
        """Return the message, with its position."""
        return fault(where, self.name, self.value, self.expected, self.todo)


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file; `places` are line or row numbers."""

    file: str
    unit: Literal["line", "row"]
    places: list[int]
    records: list[Record]

    def where(self, index: int) -> str:
        """Return the position of one record as messages write it."""
        if self.unit == "line":
            return f"{self.file}:{self.places[index]}"
        return f"{self.file} row {self.places[index]}"


@dataclass(frozen=True)
class Source:
    """Describe a source after its path has been resolved; `open` and `read` may be called repeatedly.

    `read` gives all records, `open` the first `limit` of them. `unread` names files, splits and lists of the source
    that are not read. The content of a file is known once it has been read to its end.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[Batch]]
    limit: int | None = None
    size_bytes: int | None = None
    unread: dict[str, None] = field(default_factory=dict)

    def open(self) -> Iterator[Batch]:
        """Yield the records, up to the limit."""
        left = sys.maxsize if self.limit is None else self.limit
        for batch in self.read():
            if left <= 0:
                return
            if len(batch.records) > left:
                batch = Batch(batch.file, batch.unit, batch.places[:left], batch.records[:left])
            left -= len(batch.records)
            yield batch


@dataclass(frozen=True)
class Reading:
    """Describe how the files of a source are read: the purpose, the chosen list, and where to record unread parts."""

    role: Role
    split: str | None
    unread: dict[str, None]


def parse_line(raw: bytes) -> dict[str, Any]:
    """Parse one JSONL line as a record.

    Raises:
        Fault: the bytes are no UTF-8, no JSON, or no object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_fault(raw, error) from None
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise json_fault(text, error) from None
    except RecursionError:
        raise Fault("record", text, "JSON that is not nested a thousand levels deep") from None
    if not isinstance(value, dict):
        raise Fault("record", value, "a JSON object with named fields")
    return value


def fields_of(record: Record) -> dict[str, Any]:
    """Return the fields of a record.

    Raises:
        Fault: As `parse_line`.
    """
    return parse_line(record) if isinstance(record, bytes) else record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two equal names JSON would silently keep the last, so that is an error."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Fault("record", twice, "unique names in a JSON object", "Rename or remove one of the two")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def encoding_fault(raw: bytes, error: UnicodeDecodeError) -> Fault:
    """Return the fault of a line that is not UTF-8, with its probable encoding."""
    return Fault(
        "byte",
        f"0x{raw[error.start]:02x}",
        f"UTF-8 text, but byte {error.start} (from 0) of this line is not",
        f"It is probably {likely_encoding(raw)}: convert the file to UTF-8, for instance with "
        f"`iconv -f {likely_encoding(raw)} -t UTF-8`",
    )


def likely_encoding(raw: bytes) -> str:
    """Guess an encoding by the zeros of UTF-16, runs of bytes over 0x80 (Cyrillic, Hebrew), and typical letters."""
    start = raw[:200]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4:
        return "UTF-16"
    if re.search(rb"[\xc0-\xff]{3}", raw):
        return "windows-1251" if re.search(rb"[\xc0-\xdf\xfb-\xff]", raw) else "windows-1255"
    # The letters of Romanian and Hungarian that Latin-1 lacks, unless Norwegian's are there.
    central = re.search(rb"[\xe3\xfe\xba\xaa\xf5\xfb\xd5\xdb]", raw) and not re.search(rb"[\xe5\xf8\xe6]", raw)
    return "windows-1250" if central else "windows-1252"


def json_fault(text: str, error: json.JSONDecodeError) -> Fault:
    """Return the fault of text that is not JSON, with the text around it."""
    around = text[max(0, error.pos - 30) : error.pos + 30]
    return Fault("record", around, f"JSON, but at column {error.colno}: {error.msg}", "Correct or remove this record")


def refuse_split(file: Path, reading: Reading) -> None:
    """Refuse `split` for a file that holds one list of records."""
    if reading.split is not None:
        expected = "null, since this file is one list of records"
        todo = "Leave split out, or give the file or folder of that split as path"
        raise DataError(fault(str(file), "split", reading.split, expected, todo))


def in_batches(
    file: str, unit: Literal["line", "row"], records: Iterable[tuple[int, Record]], rows: int = BATCH_ROWS
) -> Iterator[Batch]:
    """Group records into batches of a bounded number and size."""
    places: list[int] = []
    held: list[Record] = []
    size = 0
    for place, record in records:
        places.append(place)
        held.append(record)
        # The size of a parsed record is not worth measuring exactly: its longest text decides.
        size += len(record) if isinstance(record, bytes) else _rough_size(record)
        if len(held) >= rows or size >= BATCH_BYTES:
            yield Batch(file, unit, places, held)
            places, held, size = [], [], 0
    if held:
        yield Batch(file, unit, places, held)


def _rough_size(record: dict[str, Any]) -> int:
    size = 0
    for value in record.values():
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, list):
            size += sum(len(v) for item in value if isinstance(item, dict) for v in item.values() if isinstance(v, str))
    return size
