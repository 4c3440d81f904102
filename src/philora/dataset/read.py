"""Where records come from: files, folders and hub datasets, read in batches with the place of every record.

The readers never hold a whole file. A JSONL line stays bytes until a worker parses it, so that parsing runs in
parallel with everything else; each record carries its place (`file:line`, or a row number) for messages.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import difflib
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

from philora.dataset.splits import DEFAULT_SPLITS, choose_split, folder_splits
from philora.errors import DataError, fault, nearest
from philora.files.links import refuse_leading_out

if TYPE_CHECKING:
    from philora.configuration.sections import SourceConfig

Role: TypeAlias = Literal["train", "eval"]
Record: TypeAlias = "dict[str, Any] | bytes"
"""A parsed record, or the bytes of one JSONL line that `parse_line` turns into one."""
Kind: TypeAlias = Literal["json", "csv", "parquet", "excel"]

BUNDLED = "helpdesk"
"""The `path` of the chat set that comes with philora."""

BATCH_ROWS = 512
BATCH_BYTES = 4 << 20
"""A batch closes at whichever comes first: large enough for the tokenizer, small enough to keep memory flat."""

_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".xlsx": "excel",
}
_COMPRESSED = (".gz", ".zst")
_DELIMITERS = (",", ";", "\t")
_NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json", "README.md"}
_RECORD_KEYS = (
    "messages", "conversations", "conversation", "instruction", "prompt", "text", "question", "query", "user", "chosen",
)  # fmt: skip
_UTF16_OR_32 = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FILES_NAMED = 5
_JSON_BLOCK = 1 << 20
_START_BYTES = 200


@dataclass(eq=False)
class Fault(Exception):
    """A record that cannot be used: what `philora.errors.fault` needs besides the place."""

    name: str
    value: object
    expected: str
    todo: str = ""

    def at(self, where: str) -> str:
        """The message, with its place."""
        return fault(where, self.name, self.value, self.expected, self.todo)


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file; `places` are line or row numbers."""

    file: str
    unit: Literal["line", "row"]
    places: list[int]
    records: list[Record]

    def where(self, index: int) -> str:
        """The place of one record as messages write it."""
        if self.unit == "line":
            return f"{self.file}:{self.places[index]}"
        return f"{self.file} row {self.places[index]}"


@dataclass(frozen=True)
class Source:
    """A source after its path has been resolved; `open` and `read` may be called again and again.

    `read` gives all records, `open` the first `limit` of them. `unread` names files, splits and lists of the source
    that are not read. What stands inside a file is known once it has been read to its end.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[Batch]]
    limit: int | None = None
    size_bytes: int | None = None
    unread: dict[str, None] = field(default_factory=dict)

    def open(self) -> Iterator[Batch]:
        """Return the records, up to the limit."""
        return _limited(self.read(), self.limit)


@dataclass(frozen=True)
class _Reading:
    """How the files of a source are read: for what, which of several lists, and where to say what was left."""

    role: Role
    split: str | None
    unread: dict[str, None]


def resolve(config: SourceConfig, role: Role) -> Source:
    """Find what a source names: bundled set, file, folder, saved dataset or hub dataset.

    Args:
        config: the source; `path` is looked up on disk before the hub.
        role: decides the file of the bundled set and the default split of a hub dataset.

    Returns:
        The source with the fingerprint of its content: for files the sha256 of their bytes.

    Raises:
        DataError: nothing is there, it is of a kind philora does not read, or the hub cannot be reached.
    """
    if config.path == BUNDLED:
        return _bundled_source(config, role)
    path = Path(config.path).expanduser()
    if path.is_file():
        _refuse_subset(config, "a file has no subsets")
        return _files_source(config, [path], config.path, _Reading(role, config.split, {}))
    _refuse_pipe(path, config.path, "data")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            _refuse_subset(config, "a saved dataset has no subsets")
            return _saved_source(config, path, role)
        return _folder_source(config, path, role)
    if _looks_local(config.path):
        raise DataError(_missing_file(path))
    return _hub_source(config, role)


def _refuse_pipe(path: Path, given: str, where: str) -> None:
    """Refuse what is there and can be read once only: a pipe, `/dev/stdin`, `<(...)` of a shell.

    Raises:
        DataError: It is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        expected = "a file, which can be read again; this is a pipe or a device, which can be read once"
        raise DataError(fault(where, "path", given, expected, "Write it to a file first, and give that"))


def _refuse_subset(config: SourceConfig, why: str) -> None:
    if config.subset is not None:
        raise DataError(fault(config.path, "subset", config.subset, f"null: {why}", "Leave subset out"))


def _bundled_source(config: SourceConfig, role: Role) -> Source:
    _refuse_subset(config, "the bundled set has none")
    split = choose_split(BUNDLED, config.split, role, ["train", "eval"])
    file = Path(str(resources.files("philora"))) / "nano" / "helpdesk" / f"{split}.jsonl"
    return _files_source(config, [file], f"{BUNDLED}/{split}.jsonl", _Reading(role, None, {}))


def parse_line(raw: bytes) -> dict[str, Any]:
    """One JSONL line as a record.

    Raises:
        Fault: the bytes are no UTF-8, no JSON, or no object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_fault(raw, error) from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _json_fault(text, error) from None
    except RecursionError:
        raise Fault("record", text, "JSON that is not nested a thousand levels deep") from None
    return _as_record(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: of two equal ones, JSON would keep the last without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Fault("record", twice, "names that stand once in a JSON object", "Rename or remove one of the two")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def encoding_fault(raw: bytes, error: UnicodeDecodeError, offset: int = 0) -> Fault:
    """The fault of bytes that are no UTF-8, with the encoding they are probably in."""
    return Fault(
        "byte",
        f"0x{raw[error.start]:02x}",
        f"UTF-8 text, but byte {offset + error.start} (from 0) of this {'line' if offset == 0 else 'file'} is not",
        f"It is probably {_likely_encoding(raw)}: convert the file to UTF-8, for instance with "
        f"`iconv -f {_likely_encoding(raw)} -t UTF-8`",
    )


def _likely_encoding(raw: bytes) -> str:
    """A guess for people: by the zeros of UTF-16, runs of bytes over 0x80 (Cyrillic, Hebrew), and telling letters."""
    start = raw[:200]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4:
        return "UTF-16"
    if re.search(rb"[\xc0-\xff]{3}", raw):
        return "windows-1251" if re.search(rb"[\xc0-\xdf\xfb-\xff]", raw) else "windows-1255"
    # The letters of Romanian and Hungarian that Latin-1 lacks, unless Norwegian's are there.
    central = re.search(rb"[\xe3\xfe\xba\xaa\xf5\xfb\xd5\xdb]", raw) and not re.search(rb"[\xe5\xf8\xe6]", raw)
    return "windows-1250" if central else "windows-1252"


def _json_fault(text: str, error: json.JSONDecodeError) -> Fault:
    around = text[max(0, error.pos - 30) : error.pos + 30]
    return Fault("record", around, f"JSON, but at column {error.colno}: {error.msg}", "Correct or remove this record")


def _as_record(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault("record", value, "a JSON object with named fields")
    return value


# ---------------------------------------------------------------------------------------------------- files


def _looks_local(path: str) -> bool:
    suffixes = Path(path).suffixes
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "\\" in path
        or any(suffix.lower() in (*_KINDS, *_COMPRESSED) for suffix in suffixes)
    )


def _missing_file(path: Path) -> str:
    parent = path.parent if str(path.parent) else Path()
    if not parent.is_dir():
        return fault("data", "path", str(path), "a file or folder that exists", f"There is no folder {str(parent)!r}")
    names = sorted(each.name for each in parent.iterdir() if not each.name.startswith("."))
    hint = nearest(path.name, names)
    return fault("data", "path", str(path), "a file or folder that exists", hint or f"Its folder is {str(parent)!r}")


def _folder_source(config: SourceConfig, folder: Path, role: Role) -> Source:
    files, unread = _folder_files(folder)
    splits = folder_splits(folder, config.subset, files)
    in_some = {file for each in splits.values() for file in each}
    lost = [file for file in files if file not in in_some]
    if config.split is None and len(splits) == 1 and lost and not splits.keys() & set(DEFAULT_SPLITS[role]):
        # One split of another purpose, and files beside it: which of them is meant is not for us to guess.
        names = ", ".join(splits)
        expected = f"the name of a split, since this folder has {names} alone and {len(lost)} more files"
        raise DataError(fault(str(folder), "split", None, expected, "Give split, or a folder with the files to read"))
    split = choose_split(str(folder), config.split, role, list(splits))
    for name, others in splits.items():
        if name != split:
            unread[f"split {name} ({_names(others, folder)})"] = None
    if lost:
        unread[f"files in no split ({_names(lost, folder)})"] = None
    name = config.path if len(splits) == 1 else f"{config.path}[{split}]"
    return _files_source(config, splits[split], name, _Reading(role, None, unread))


def _folder_files(folder: Path) -> tuple[list[Path], dict[str, None]]:
    """The files of a folder that a reader is for, and the others, by name."""
    found = [each for each in sorted(folder.rglob("*")) if each.is_file() and not _hidden(each, folder)]
    files = [each for each in found if _kind(each) is not None and each.name not in _NOT_DATA]
    if not files:
        raise DataError(fault("data", "path", str(folder), f"a folder with files of the kinds {', '.join(_KINDS)}"))
    others = [each for each in found if each not in set(files) and each.name not in _NOT_DATA]
    return files, {f"files of other kinds ({_names(others, folder)})": None} if others else {}


def _names(files: list[Path], folder: Path) -> str:
    names = [str(each.relative_to(folder)) for each in files]
    more = f" and {len(names) - _FILES_NAMED} more" if len(names) > _FILES_NAMED else ""
    return ", ".join(names[:_FILES_NAMED]) + more


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _kind(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in (".parquet", ".xlsx"):
            return None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _is_object(file: Path) -> bool:
    """Return whether a file is one JSON object, whose lists may be several; JSON lines are none."""
    if not file.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        return False
    with _located(file), _open(file) as stream:
        return stream.read(64).lstrip(b" \t\r\n").startswith(b"{")


def _files_source(config: SourceConfig, files: list[Path], name: str, reading: _Reading) -> Source:
    for file in files:
        if _kind(file) is None:
            raise DataError(
                fault("data", "path", str(file), f"a file of the kinds {', '.join(_KINDS)}", _save_as(file))
            )
    digest = hashlib.sha256()
    for file in files:
        digest.update(_kind_bytes(file))
        digest.update(_sha256(file))
        if reading.split is not None or _kind(file) == "excel" or _is_object(file):
            digest.update(f"{reading.role} {reading.split}".encode())  # they choose among the lists of a file

    def batches() -> Iterator[Batch]:
        return _read_files(files, reading)

    size = sum(file.stat().st_size for file in files)
    return Source(name, digest.hexdigest(), batches, config.limit, size, reading.unread)


def _save_as(file: Path) -> str:
    """What to do with a file of a kind that is not read."""
    if file.suffix.lower() in (".xls", ".ods", ".numbers"):
        return "Open it and save it as .xlsx, or as CSV UTF-8"
    return "Unpack it" if file.suffix.lower() in (".zip", ".7z", ".bz2", ".xz", *_COMPRESSED) else ""


def _kind_bytes(file: Path) -> bytes:
    return "".join(file.suffixes[-2:]).lower().encode()


def _sha256(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(fault("data", "path", str(file), f"a file that can be read ({error.strerror})")) from error


def _read_files(files: list[Path], reading: _Reading) -> Iterator[Batch]:
    for file in files:
        kind = _kind(file)
        if kind in ("csv", "parquet"):
            _refuse_split(file, reading)
        with _located(file):
            if kind == "json":
                yield from _read_json(file, reading)
            elif kind == "csv":
                yield from _read_csv(file)
            elif kind == "excel":
                yield from _read_excel(file, reading)
            else:
                yield from _read_parquet(file)


def _refuse_split(file: Path, reading: _Reading) -> None:
    if reading.split is not None:
        expected = "null, since this file is one list of records"
        todo = "Leave split out, or give the file or folder of that split as path"
        raise DataError(fault(str(file), "split", reading.split, expected, todo))


@contextlib.contextmanager
def _located(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(fault(str(file), "file", file.name, f"a whole gzip file ({error})")) from error
    except OSError as error:
        if file.suffix.lower() != ".zst" or error.errno is not None:
            raise
        raise DataError(fault(str(file), "file", file.name, f"a whole zstd file ({error})")) from error


def _limited(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    left = sys.maxsize if limit is None else limit
    for batch in batches:
        if left <= 0:
            return
        if len(batch.records) > left:
            batch = Batch(batch.file, batch.unit, batch.places[:left], batch.records[:left])
        left -= len(batch.records)
        yield batch


def _open(file: Path) -> IO[bytes]:
    """The bytes of a file as UTF-8 without a byte order mark; of UTF-16 and UTF-32 the mark says which it is.

    Raises:
        DataError: it has zeros among its first bytes and no mark, so its encoding is another.
    """
    stream = _bytes_of(file)
    start = stream.peek(_START_BYTES)[:_START_BYTES]
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = next((name for mark, name in _UTF16_OR_32 if start.startswith(mark)), None)
    if encoding is not None:
        with stream:
            return _as_utf8(stream, encoding, file)
    if b"\0" in start:
        stream.close()
        todo = f"Convert the file to UTF-8, for instance with `iconv -f {_likely_encoding(start)}LE -t UTF-8`"
        expected = "UTF-8 text, or UTF-16 with a byte order mark, but zeros stand among its first bytes"
        raise DataError(fault(str(file), "file", file.name, expected, todo))
    return stream


def _bytes_of(file: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked where its name says that it is packed."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return io.BufferedReader(cast("io.RawIOBase", gzip.open(file, "rb"))) if suffix == ".gz" else file.open("rb")


def _as_utf8(stream: IO[bytes], encoding: str, file: Path) -> IO[bytes]:
    """What a stream says in another encoding, in a temporary file: lines then end where they do in every file."""
    made = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115 (callers close it)
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := stream.read(_JSON_BLOCK):
            made.write(decoder.decode(block).encode())
        made.write(decoder.decode(b"", final=True).encode())
    except UnicodeError as error:
        made.close()
        expected = f"text to its end in {encoding.upper()}, as its byte order mark says ({error.args[-1]})"
        raise DataError(fault(str(file), "file", file.name, expected, "Is the file whole?")) from None
    made.seek(0)
    return made


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers; they end at a newline, with or without a carriage return before it.

    Raises:
        DataError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        with _located(file), _open(file) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    yield number, raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise DataError(encoding_fault(raw, error).at(f"{file}:{number}")) from None
    except OSError as error:
        raise DataError(fault(str(file), "file", file.name, f"a file that can be read ({error.strerror})")) from error


def _group(
    file: str, unit: Literal["line", "row"], records: Iterable[tuple[int, Record]], rows: int = BATCH_ROWS
) -> Iterator[Batch]:
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
            size += sum(len(v) for each in value if isinstance(each, dict) for v in each.values() if isinstance(v, str))
    return size


def _read_json(file: Path, reading: _Reading) -> Iterator[Batch]:
    with _open(file) as stream:
        style, skipped = _json_style(stream)
    if style is None:
        raise DataError(fault(str(file), "file", file.name, "at least one record, but the file is empty"))
    if style == "lines":
        _refuse_split(file, reading)
    records = _json_values(file, reading) if style == "document" else _json_lines(file, skipped)
    yield from _group(str(file), "line", records)


def _json_style(stream: IO[bytes]) -> tuple[Literal["lines", "document"] | None, int]:
    """How a JSON file is laid out, decided by its content since people name both kinds .json.

    A first line that is a whole object makes it JSON Lines, unless that line is all there is and wraps a list.
    """
    skipped = 0
    while line := stream.readline(_JSON_BLOCK):
        if not line.strip():
            skipped += line.endswith(b"\n")
            continue
        if line.lstrip()[:1] == b"[":  # maybe all in one line: it is not read on here
            return "document", skipped
        if not line.endswith(b"\n"):
            line += stream.readline()
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            # `{` alone opens a document that is spread over lines; anything else is a broken line.
            return ("document" if line.strip() in (b"{", b"[") or _opens_wrapper(line) else "lines"), skipped
        wraps = isinstance(value, dict) and not any(key in value for key in _RECORD_KEYS)
        wraps = wraps and any(isinstance(each, list) and each and isinstance(each[0], dict) for each in value.values())
        if wraps and not any(rest.strip() for rest in stream):
            return "document", skipped
        return "lines", skipped
    return None, skipped


def _opens_wrapper(line: bytes) -> bool:
    return line.rstrip().endswith((b"[", b"{")) and len(line) < 200


def _json_lines(file: Path, skip: int) -> Iterator[tuple[int, Record]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number > skip and not line.isspace():
                yield number, line


class _JsonText:
    """A window over a JSON document: values are decoded one by one, and what is behind them is forgotten."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stream = io.TextIOWrapper(_open(file), encoding="utf-8", newline="")
        self.decoder = _DECODER
        self.text = ""
        self.position = 0
        self.ended = False
        # Lines are counted up to `counted`, which follows `position`.
        self.line = 1
        self.counted = 0

    def more(self, block: int = _JSON_BLOCK) -> bool:
        """Forget what is behind and read on; False at the end of the file."""
        self.line = self.line_at(self.position)
        try:
            added = self.stream.read(block)
        except UnicodeDecodeError:
            raise DataError(self._encoding_message()) from None
        self.text = self.text[self.position :] + added
        self.position = self.counted = 0
        self.ended = not added
        return bool(added)

    def _encoding_message(self) -> str:
        with _open(self.file) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    return encoding_fault(raw, error).at(f"{self.file}:{number}")
        return fault(str(self.file), "file", self.file.name, "UTF-8 text to the end")

    def line_at(self, position: int) -> int:
        """The line of a position in the window."""
        return self.line + self.text.count("\n", self.counted, position)

    def where(self, position: int | None = None) -> str:
        """`file:line` of a position in the window."""
        return f"{self.file}:{self.line_at(self.position if position is None else position)}"

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.position < len(self.text):
                if not self.text[self.position].isspace():
                    return self.text[self.position]
                self.position += 1
            if not self.more():
                return ""

    def take(self, character: str) -> None:
        """Step over one expected character."""
        if self.peek() != character:
            around = self.text[self.position : self.position + 40]
            raise DataError(fault(self.where(), "text", around, f"JSON with {character!r} here", "Is the file whole?"))
        self.position += 1

    def value(self) -> tuple[int, Any]:
        """The next value with the line it begins on."""
        self.peek()
        block = _JSON_BLOCK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # A value cut off by the edge of the window fails at that edge, or inside an open string.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if cut and not self.ended:
                    self.more(block)
                    block *= 2
                    continue
                raise DataError(_json_fault(self.text, error).at(self.where(error.pos))) from None
            except Fault as error:
                raise DataError(error.at(self.where())) from None
            except RecursionError:
                deep = "JSON that is not nested a thousand levels deep"
                raise DataError(fault(self.where(), "record", "[[[...", deep)) from None
            if end == len(self.text) and not self.ended and not isinstance(value, dict | list | str):
                self.more(block)  # a number may go on beyond the window
                continue
            line = self.line_at(self.position)
            self.line, self.counted, self.position = self.line_at(end), end, end
            return line, value


def _json_values(file: Path, reading: _Reading) -> Iterator[tuple[int, Record]]:
    """Records of a JSON document: a list; an object with lists of them; or objects one after another."""
    text = _JsonText(file)
    with text.stream:
        if text.peek() == "[":
            _refuse_split(file, reading)
            yield from _array_values(text)
            _ends(text, "the list of records")
            return
    wanted = _wanted_list(file, reading)
    text = _JsonText(file)
    with text.stream:
        if wanted is not None:
            yield from _named_list(text, wanted)
            return
        _refuse_split(file, reading)
        while text.peek():
            line, value = text.value()
            yield line, value if isinstance(value, dict) else json.dumps(value).encode()


def _ends(text: _JsonText, what: str) -> None:
    if text.peek():
        around = text.text[text.position : text.position + 40]
        raise DataError(fault(text.where(), "text", around, f"nothing after {what}", "Correct or remove what follows"))


def _members(text: _JsonText) -> Iterator[str]:
    """The names of an object's members, each when its value comes next."""
    text.take("{")
    while text.peek() == '"':
        _, key = text.value()
        text.take(":")
        yield str(key)
        if text.peek() != ",":
            break
        text.take(",")
    text.take("}")


def _wanted_list(file: Path, reading: _Reading) -> str | None:
    """The name of the list of records in a JSON object; None where the object is itself a record.

    The object is read once for its names and again for its records, so that no list is taken for being the first.
    """
    text = _JsonText(file)
    lists: dict[str, int] = {}
    others: list[str] = []
    with text.stream:
        for key in _members(text):
            records = _skipped_list(text) if text.peek() == "[" else (text.value(), 0)[1]
            if key in _RECORD_KEYS and not (key == "conversations" and records):
                return None
            if records:
                lists[key] = records
            else:
                others.append(key)
        if not lists:
            return None
        _ends(text, "the object with the list of records")
    names = list(lists)
    # A list that stands alone is the records, whatever its name; of several the name says which.
    wanted = (
        names[0]
        if len(names) == 1 and reading.split is None
        else choose_split(str(file), reading.split, reading.role, names)
    )
    for name in names:
        if name != wanted:
            reading.unread[f"list {name} of {file.name} ({lists[name]:,} records)"] = None
    if others:
        reading.unread[f"fields beside the list of {file.name} ({', '.join(others)})"] = None
    return wanted


def _skipped_list(text: _JsonText) -> int:
    """Step over a list; how many objects it has, 0 where it holds turns or anything else."""
    count = 0
    text.take("[")
    while text.peek() != "]":
        _, value = text.value()
        if not isinstance(value, dict) or {"from", "role"} & set(value) or count < 0:
            count = -1
        else:
            count += 1
        if text.peek() == ",":
            text.take(",")
        elif text.peek() != "]":
            text.take("]")
    text.take("]")
    return max(count, 0)


def _named_list(text: _JsonText, wanted: str) -> Iterator[tuple[int, Record]]:
    for key in _members(text):
        if key == wanted:
            yield from _array_values(text)
            return
        text.value()


def _array_values(text: _JsonText) -> Iterator[tuple[int, Record]]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        raise DataError(fault(str(text.file), "file", text.file.name, "at least one record, but the list is empty"))
    while True:
        line, value = text.value()
        # What is no object is handed on as bytes, so that it is reported with the other faults of the file.
        yield line, value if isinstance(value, dict) else json.dumps(value).encode()
        if text.peek() == "]":
            text.take("]")
            return
        text.take(",")


def _read_csv(file: Path) -> Iterator[Batch]:
    # Cells hold whole conversations: the module's default of 128 KiB is too low.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    with _open(file) as stream:
        yield from _group(str(file), "line", _csv_rows(file, stream))


def _csv_rows(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, Record]]:
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        for line_number, raw in enumerate(stream, start=1):
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(encoding_fault(raw, error).at(f"{file}:{line_number}")) from None

    text = lines()
    try:
        delimiter, start = _delimiter(file, text)
        reader = csv.reader(itertools.chain(start, text), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            raise DataError(fault(str(file), "file", file.name, "a line of column names, but the file is empty"))
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            expected = "names of columns that differ"
            raise DataError(fault(f"{file}:1", "columns", ", ".join(twice), expected, "Rename or remove one of them"))
        first = line_number + 1
        for row in reader:
            if len(row) == len(header):
                yield first, dict(zip(header, row, strict=True))
            elif row:
                raise DataError(
                    fault(
                        f"{file}:{first}", "cells", len(row), f"{len(header)} as in the first line", _QUOTE[delimiter]
                    )
                )
            first = line_number + 1
    except csv.Error as error:
        raise DataError(fault(f"{file}:{line_number}", "line", str(error), "a line of CSV")) from error


_QUOTE = {",": "Quote commas", ";": "Quote semicolons", "\t": "Quote tabs"}


def _delimiter(file: Path, lines: Iterator[str]) -> tuple[str, list[str]]:
    """What stands between the cells, and the first line to read: Excel writes semicolons where commas are decimal.

    That is said by a line `sep=;` above the names, else by the kind of separator that makes most cells of the names.
    """
    first = next(lines, None)
    if first is None:
        return ",", []
    said = re.fullmatch(r"sep=(.)\r?\n?", first, re.IGNORECASE)
    if said and said[1] in _DELIMITERS:
        return said[1], []
    if ".tsv" in [suffix.lower() for suffix in file.suffixes]:
        return "\t", [first]
    return max(_DELIMITERS, key=lambda each: _cells(first, each)), [first]


def _cells(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


def _read_excel(file: Path, reading: _Reading) -> Iterator[Batch]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        todo = "Install it: pip install 'philora[excel]', or save the sheet as CSV UTF-8"
        raise DataError(fault(str(file), "file", file.name, "openpyxl, which reads Excel's files", todo)) from error
    import zipfile

    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(fault(str(file), "file", file.name, f"a whole .xlsx file ({error})")) from error
    with contextlib.closing(book):
        sheets = {sheet.title: rows for sheet in book.worksheets if (rows := _filled(sheet)) is not None}
        if not sheets:
            raise DataError(fault(str(file), "file", file.name, "a line of column names, but the file is empty"))
        names = list(sheets)
        alone = len(names) == 1 and reading.split is None
        chosen = names[0] if alone else choose_split(str(file), reading.split, reading.role, names)
        for name in names:
            if name != chosen:
                reading.unread[f"sheet {name} of {file.name}"] = None
        yield from _group(str(file), "row", _sheet_rows(file, sheets[chosen]))


def _filled(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]] | None:
    """The rows of a sheet with their numbers, from its first row with a value on; None where there is none."""
    rows = enumerate(sheet.iter_rows(values_only=True), start=1)
    first = next((row for row in rows if any(cell is not None for cell in row[1])), None)
    return None if first is None else itertools.chain([first], rows)


def _sheet_rows(file: Path, rows: Iterator[tuple[int, Sequence[Any]]]) -> Iterator[tuple[int, Record]]:
    """The records below the names of a sheet; cells are text, as in a CSV."""
    header = [_cell_text(cell) for cell in next(rows)[1]]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        expected = "names of columns that differ"
        raise DataError(fault(str(file), "columns", ", ".join(twice), expected, "Rename or remove one of them"))
    for number, row in rows:
        cells = [_cell_text(cell) for cell in row]
        beyond = [cell for name, cell in itertools.zip_longest(header, cells, fillvalue="") if cell and not name]
        if beyond:
            raise DataError(fault(f"{file} row {number}", "cell", beyond[0], "a name above each column with values"))
        if any(cells):
            yield number, {name: cell for name, cell in itertools.zip_longest(header, cells, fillvalue="") if name}


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _read_parquet(file: Path) -> Iterator[Batch]:
    import pyarrow as pa
    from pyarrow import parquet

    def rows() -> Iterator[tuple[int, Record]]:
        number = 0
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise DataError(fault(str(file), "file", file.name, f"a whole Parquet file ({error})")) from error

    yield from _group(str(file), "row", rows())


# ------------------------------------------------------------------------------------------------------ hub


def _saved_source(config: SourceConfig, path: Path, role: Role) -> Source:
    from datasets import DatasetDict, load_from_disk

    _require_files_inside(path)
    with quiet_datasets():
        loaded = load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        names = list(loaded)
        split = choose_split(str(path), config.split, role, names)
        others = {f"split {name} ({len(loaded[name]):,} records)": None for name in names if name != split}
        return _dataset_source(config, loaded[split], config.path, others)
    if config.split is not None:
        raise DataError(
            fault(str(path), "split", config.split, "null, since this saved dataset is one split", "Leave split out")
        )
    return _dataset_source(config, loaded, config.path, {})


def _require_files_inside(path: Path) -> None:
    """Check that a saved dataset names no file outside its folder.

    Raises:
        DataError: `state.json` names another folder's file, or a file is a link to one.
    """
    for state in [*path.glob("state.json"), *path.glob("*/state.json")]:
        try:
            files = json.loads(state.read_text(encoding="utf-8")).get("_data_files", [])
            named = [state.parent / str(file["filename"]) for file in files]
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            expected = "JSON as datasets' save_to_disk writes it"
            raise DataError(fault(str(state), "content", type(error).__name__, expected)) from error
        refuse_leading_out(path, DataError, [state, *named])


def _hub_source(config: SourceConfig, role: Role) -> Source:
    import datasets

    from philora.runtime.hub import datasets_from_cache

    arguments = (config.path, config.subset) if config.subset else (config.path,)
    with quiet_datasets(), datasets_from_cache():
        try:
            split = config.split
            others: dict[str, None] = {}
            if split is None:
                names = datasets.get_dataset_split_names(*arguments)
                split = choose_split(config.path, None, role, names)
                others = {f"split {name}": None for name in names if name != split}
            loaded = datasets.load_dataset(*arguments, split=split, streaming=config.streaming)
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(_hub_message(config, error)) from error
    return _dataset_source(config, loaded, f"{config.path}[{split}]", others)


def _hub_message(config: SourceConfig, error: Exception) -> str:
    close = difflib.get_close_matches(config.path, [BUNDLED, *(each.name for each in Path().iterdir())], n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    if isinstance(error, ConnectionError):
        return fault(
            "data",
            "path",
            config.path,
            "a file or folder that exists, or a dataset of the Hugging Face hub; no such file is here and the hub "
            "cannot be reached",
            f"{hint}Check the spelling of the path, connect to the network, or download the dataset on another machine "
            "and give its folder",
        )
    return fault(
        "data",
        "path",
        config.path,
        f"a file or folder that exists, or a dataset of the Hugging Face hub ({str(error).splitlines()[0]})",
        f"{hint}Check path, subset and split",
    )


def _dataset_source(config: SourceConfig, dataset: Any, name: str, unread: dict[str, None]) -> Source:
    def rows() -> Iterator[tuple[int, Record]]:
        number = 0
        for columns in dataset.iter(batch_size=BATCH_ROWS):
            names = list(columns)
            for cells in zip(*columns.values(), strict=True):
                number += 1
                yield number, dict(zip(names, cells, strict=True))

    def batches() -> Iterator[Batch]:
        return _group(name, "row", rows())

    fingerprint = hashlib.sha256(f"{name}:{getattr(dataset, '_fingerprint', '')}".encode()).hexdigest()
    size = None if config.streaming else getattr(dataset, "size_in_bytes", None)
    return Source(name, fingerprint, batches, config.limit, size, unread)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no chatter of `datasets` inside; what was set before is set again afterwards."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
