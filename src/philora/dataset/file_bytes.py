"""Open a data file: compressed or not, in whatever encoding it names; lines of text."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from philora.dataset.records import START_BYTES, encoding_fault, likely_encoding
from philora.errors import DataError, fault

_UTF16_OR_32 = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BLOCK_CHARACTERS = 1 << 20
COMPRESSED = (".gz", ".zst")


@contextlib.contextmanager
def faults_located(file: Path) -> Iterator[None]:
    """Name the file in the error of a damaged compressed file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(fault(str(file), "file", file.name, f"a complete gzip file ({error})")) from error
    except OSError as error:
        if file.suffix.lower() != ".zst" or error.errno is not None:
            raise
        raise DataError(fault(str(file), "file", file.name, f"a complete zstd file ({error})")) from error


def open_file(file: Path) -> IO[bytes]:
    """Return the bytes of a file as UTF-8 without a byte order mark; UTF-16 and UTF-32 are known by their mark.

    Raises:
        DataError: it has zeros among its first bytes and no mark, so its encoding is another.
    """
    stream = _bytes_of(file)
    start = stream.peek(START_BYTES)[:START_BYTES]
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return stream
    encoding = next((name for mark, name in _UTF16_OR_32 if start.startswith(mark)), None)
    if encoding is not None:
        with stream:
            return _as_utf8(stream, encoding, file)
    if b"\0" in start:
        stream.close()
        todo = f"Convert the file to UTF-8, for instance with `iconv -f {likely_encoding(start)}LE -t UTF-8`"
        expected = "UTF-8 text, or UTF-16 with a byte order mark, but its first bytes contain zeros"
        raise DataError(fault(str(file), "file", file.name, expected, todo))
    return stream


def _bytes_of(file: Path) -> io.BufferedReader:
    """Return the bytes of a file, decompressed if its name ends like a compressed file's."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return io.BufferedReader(cast("io.RawIOBase", gzip.open(file, "rb"))) if suffix == ".gz" else file.open("rb")


def _as_utf8(stream: IO[bytes], encoding: str, file: Path) -> IO[bytes]:
    """Return a stream of another encoding as UTF-8 in a temporary file: lines end there as in every file."""
    made = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115 (callers close it)
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := stream.read(BLOCK_CHARACTERS):
            made.write(decoder.decode(block).encode())
        made.write(decoder.decode(b"", final=True).encode())
    except UnicodeError as error:
        made.close()
        expected = f"text to its end in {encoding.upper()}, as its byte order mark says ({error.args[-1]})"
        raise DataError(fault(str(file), "file", file.name, expected, "Is the file complete?")) from None
    made.seek(0)
    return made


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers; they end at a newline, with or without a carriage return before it.

    Raises:
        DataError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        with faults_located(file), open_file(file) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    yield number, raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise DataError(encoding_fault(raw, error).at(f"{file}:{number}")) from None
    except OSError as error:
        raise DataError(fault(str(file), "file", file.name, f"a file that can be read ({error.strerror})")) from error
