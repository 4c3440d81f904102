"""Read tables: CSV with any common delimiter, Excel, and Parquet."""

from __future__ import annotations

import contextlib
import csv
import datetime
import itertools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from philora.dataset.file_bytes import open_file
from philora.dataset.records import BATCH_ROWS, Batch, Reading, Record, encoding_fault, in_batches
from philora.dataset.splits import choose_split
from philora.errors import DataError, fault

_DELIMITERS = (",", ";", "\t")


def read_csv(file: Path) -> Iterator[Batch]:
    """Yield the rows of a CSV file in batches."""
    # Cells hold whole conversations: the module's default of 128 KiB is too low.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    with open_file(file) as stream:
        yield from in_batches(str(file), "line", _csv_rows(file, stream))


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
        _require_distinct(header, f"{file}:1")
        first = line_number + 1
        for row in reader:
            if any(map(str.strip, row)):  # Excel writes empty rows below a table as delimiters only
                if len(row) != len(header):
                    todo = _QUOTE[delimiter] if len(row) > len(header) else _TOO_FEW
                    expected = f"{len(header)} as in the first line"
                    raise DataError(fault(f"{file}:{first}", "cells", len(row), expected, todo))
                yield first, dict(zip(header, row, strict=True))
            first = line_number + 1
    except csv.Error as error:
        raise DataError(fault(f"{file}:{line_number}", "line", str(error), "a line of CSV")) from error


_TOO_FEW = "Add what is missing, or quote a text that holds a line break"
_QUOTE = {",": "Quote commas", ";": "Quote semicolons", "\t": "Quote tabs"}


def _delimiter(file: Path, lines: Iterator[str]) -> tuple[str, list[str]]:
    """Return the delimiter and the first line to read: Excel writes semicolons where commas are decimal.

    A line `sep=;` above the names decides, else the separator that makes the most cells of the names.
    """
    first = next(lines, None)
    if first is None:
        return ",", []
    said = re.fullmatch(r"sep=(.)\r?\n?", first, re.IGNORECASE)
    if said and said[1] in _DELIMITERS:
        return said[1], []
    if ".tsv" in [suffix.lower() for suffix in file.suffixes]:
        return "\t", [first]
    return max(_DELIMITERS, key=lambda item: _cells(first, item)), [first]


def _require_distinct(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        todo = "Rename or remove one of them"
        raise DataError(fault(where, "columns", ", ".join(twice), "distinct column names", todo))


def _cells(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


def read_excel(file: Path, reading: Reading) -> Iterator[Batch]:
    """Yield the rows of one sheet of an Excel file in batches."""
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        todo = "Install it: pip install 'philora[excel]', or save the sheet as CSV UTF-8"
        raise DataError(fault(str(file), "file", file.name, "openpyxl, which reads Excel's files", todo)) from error
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(fault(str(file), "file", file.name, f"a complete .xlsx file ({error})")) from error
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
        rows = _refuse_uncomputed(file, chosen, sheets[chosen])
        yield from in_batches(str(file), "row", _sheet_rows(file, rows))


def _filled(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]] | None:
    """Return the rows of a sheet with their numbers, from its first row with a value; None if there is none."""
    rows = enumerate(sheet.iter_rows(), start=1)
    first = next((row for row in rows if any(cell.value is not None for cell in row[1])), None)
    return None if first is None else itertools.chain([first], rows)


def _refuse_uncomputed(
    file: Path, sheet: str, rows: Iterator[tuple[int, Sequence[Any]]]
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the rows; refuse a formula whose value is not in the file, as in one that no spreadsheet program saved.

    `rows` have the values of formulas. The file is opened again for the formulas at the first empty cell.
    """
    import openpyxl

    header: list[str] | None = None
    given: Iterator[tuple[int, Sequence[Any]]] | None = None
    with contextlib.ExitStack() as stack:
        for number, row in rows:
            header = [_cell_text(cell.value) for cell in row] if header is None else header
            if any(cell.value is None for cell in row):
                if given is None:
                    book = stack.enter_context(contextlib.closing(openpyxl.load_workbook(file, read_only=True)))
                    given = enumerate(book[sheet].iter_rows(), start=1)
                same = next(cells for place, cells in given if place == number)
                for name, cell, formula in zip(header, row, same, strict=False):
                    if cell.value is None and formula.data_type == "f":
                        todo = "Open the file in Excel or LibreOffice and save it, so that the values are in it"
                        expected = "a value, not only a formula"
                        raise DataError(fault(f"{file} row {number}", name, formula.value, expected, todo))
            yield number, row


def _sheet_rows(file: Path, rows: Iterator[tuple[int, Sequence[Any]]]) -> Iterator[tuple[int, Record]]:
    """Yield the records below the header of a sheet; cells are text, as in a CSV."""
    header = [_cell_text(cell.value) for cell in next(rows)[1]]
    _require_distinct([name for name in header if name], str(file))
    for number, row in rows:
        for name, cell in zip(header, row, strict=False):
            if cell.data_type == "e":
                todo = "Correct the cell, or empty it"
                raise DataError(fault(f"{file} row {number}", name, cell.value, "a value, not an error of Excel", todo))
        cells = [_cell_text(cell.value) for cell in row]
        beyond = [cell for name, cell in itertools.zip_longest(header, cells, fillvalue="") if cell and not name]
        if beyond:
            todo = "Remove the lines above the names of the columns, or name each column"
            expected = "a name above each column with values"
            raise DataError(fault(f"{file} row {number}", "cell", beyond[0], expected, todo))
        if any(cells):
            yield number, {name: cell for name, cell in itertools.zip_longest(header, cells, fillvalue="") if name}


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def read_parquet(file: Path) -> Iterator[Batch]:
    """Yield the rows of a Parquet file in batches."""
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
            raise DataError(fault(str(file), "file", file.name, f"a complete Parquet file ({error})")) from error

    yield from in_batches(str(file), "row", rows())
