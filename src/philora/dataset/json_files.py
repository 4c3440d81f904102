"""Read JSON: one record a line, a list, an object with lists, or objects one after another."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from philora.dataset.file_bytes import BLOCK_CHARACTERS, faults_located, open_file
from philora.dataset.records import (
    DECODER,
    Batch,
    Fault,
    Reading,
    Record,
    encoding_fault,
    in_batches,
    json_fault,
    refuse_split,
)
from philora.dataset.splits import choose_split
from philora.errors import DataError, fault

_RECORD_KEYS = (
    "messages", "conversations", "conversation", "instruction", "prompt", "text", "question", "query", "user", "chosen",
)  # fmt: skip


def is_object(file: Path) -> bool:
    """Return whether a file is one JSON object, whose lists may be several; JSON lines are none."""
    if not file.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        return False
    with faults_located(file), open_file(file) as stream:
        return stream.read(64).lstrip(b" \t\r\n").startswith(b"{")


def read_json(file: Path, reading: Reading) -> Iterator[Batch]:
    """Yield the records of a JSON file in batches."""
    with open_file(file) as stream:
        style, skipped = _json_style(stream)
    if style is None:
        raise DataError(fault(str(file), "file", file.name, "at least one record, but the file is empty"))
    if style == "lines":
        refuse_split(file, reading)
    records = _json_values(file, reading) if style == "document" else _json_lines(file, skipped)
    yield from in_batches(str(file), "line", records)


def _json_style(stream: IO[bytes]) -> tuple[Literal["lines", "document"] | None, int]:
    """Return how a JSON file is laid out, decided by its content since people name both kinds .json.

    A first line that is a complete object makes it JSON Lines, unless it is the only line and wraps a list.
    """
    skipped = 0
    while line := stream.readline(BLOCK_CHARACTERS):
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
            opens_wrapper = line.rstrip().endswith((b"[", b"{")) and len(line) < 200
            # `{` alone opens a document that is spread over lines; anything else is a broken line.
            return ("document" if line.strip() in (b"{", b"[") or opens_wrapper else "lines"), skipped
        entries = value.values() if isinstance(value, dict) and not value.keys() & set(_RECORD_KEYS) else ()
        wraps = any(isinstance(entry, list) and entry and isinstance(entry[0], dict) for entry in entries)
        return ("document" if wraps and not any(rest.strip() for rest in stream) else "lines"), skipped
    return None, skipped


def _json_lines(file: Path, skip: int) -> Iterator[tuple[int, Record]]:
    with open_file(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number > skip and not line.isspace():
                yield number, line


class _JsonText:
    """Decode the values of a JSON document one by one through a window, and drop what has been read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stream = io.TextIOWrapper(open_file(file), encoding="utf-8", newline="")
        self.text = ""
        self.position = 0
        self.ended = False
        # Lines are counted up to `counted`, which follows `position`.
        self.line = 1
        self.counted = 0

    def more(self, block: int = BLOCK_CHARACTERS) -> bool:
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
        with open_file(self.file) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    return encoding_fault(raw, error).at(f"{self.file}:{number}")
        return fault(str(self.file), "file", self.file.name, "UTF-8 text to the end")

    def line_at(self, position: int) -> int:
        """Return the line of a position in the window."""
        return self.line + self.text.count("\n", self.counted, position)

    def where(self, position: int | None = None) -> str:
        """`file:line` of a position in the window."""
        return f"{self.file}:{self.line_at(self.position if position is None else position)}"

    def peek(self) -> str:
        """Return the next character that is no space; an empty string at the end."""
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
            expected = f"JSON with {character!r} here"
            raise DataError(fault(self.where(), "text", around, expected, "Is the file complete?"))
        self.position += 1

    def value(self) -> tuple[int, Any]:
        """Return the next value with the line it begins on."""
        self.peek()
        block = BLOCK_CHARACTERS
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # A value cut off by the edge of the window fails at that edge, or inside an open string.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if cut and not self.ended:
                    self.more(block)
                    block *= 2
                    continue
                raise DataError(json_fault(self.text, error).at(self.where(error.pos))) from None
            except Fault as error:
                raise DataError(error.at(self.where())) from None
            except RecursionError:
                deep = "JSON that is not nested a thousand levels deep"
                raise DataError(fault(self.where(), "record", "[[[...", deep)) from None
            if end == len(self.text) and not self.ended and not isinstance(value, dict | list | str):
                self.more(block)  # a number may continue beyond the window
                continue
            line = self.line_at(self.position)
            self.line, self.counted, self.position = self.line_at(end), end, end
            return line, value


def _json_values(file: Path, reading: Reading) -> Iterator[tuple[int, Record]]:
    """Records of a JSON document: a list; an object with lists of them; or objects one after another."""
    text = _JsonText(file)
    with text.stream:
        if text.peek() == "[":
            refuse_split(file, reading)
            yield from _array_values(text)
            _ends(text, "the list of records")
            return
    wanted = _wanted_list(file, reading)
    text = _JsonText(file)
    with text.stream:
        if wanted is not None:
            yield from _named_list(text, wanted)
            return
        refuse_split(file, reading)
        while text.peek():
            line, value = text.value()
            yield line, value if isinstance(value, dict) else json.dumps(value).encode()


def _ends(text: _JsonText, what: str) -> None:
    if text.peek():
        around = text.text[text.position : text.position + 40]
        raise DataError(fault(text.where(), "text", around, f"nothing after {what}", "Correct or remove what follows"))


def _members(text: _JsonText) -> Iterator[str]:
    """Yield the names of an object's members, each right before its value."""
    text.take("{")
    while text.peek() == '"':
        _, key = text.value()
        text.take(":")
        yield str(key)
        if text.peek() != ",":
            break
        text.take(",")
    text.take("}")


def _wanted_list(file: Path, reading: Reading) -> str | None:
    """Return the name of the list of records in a JSON object; None if the object is itself a record.

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
    # A single list has the records, whatever its name; of several lists the name decides.
    alone = len(names) == 1 and reading.split is None
    wanted = names[0] if alone else choose_split(str(file), reading.split, reading.role, names)
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
