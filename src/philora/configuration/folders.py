"""Recognise files and folders that a configuration or the command line names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from philora.configuration.sections import SECTIONS
from philora.errors import nearest

RECORD_SUFFIXES: Final = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".gz", ".zst")
"""Suffixes of files with records."""

DATA_SUFFIXES: Final = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".xlsx", ".txt", ".arrow")
"""Suffixes of files that are taken as data where a configuration is expected."""

_LONGEST_SETTINGS_BYTES: Final = 1_000_000


def holds_data(name: str) -> bool:
    """Return whether a name given in place of a configuration is that of data: a file of records, or a folder of them.

    A JSON file is a configuration if it is one object with a section of a configuration; otherwise it is data.
    """
    file = Path(name).expanduser()
    if not exists(file):
        return False
    if file.is_dir():
        inside = (path.suffix.lower() for depth in ("*", "*/*") for path in file.glob(depth))
        return not (file / "config.yaml").is_file() and any(suffix in RECORD_SUFFIXES for suffix in inside)
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in DATA_SUFFIXES
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size < _LONGEST_SETTINGS_BYTES else None
    except (OSError, ValueError):
        return True
    sections = (*SECTIONS, "training_config", "peft_config")
    return not (isinstance(content, Mapping) and any(isinstance(content.get(section), Mapping) for section in sections))


def unused_folder(folder: Path) -> Path:
    """Return an empty or new folder: the one given, or the first with a number appended to its name."""
    found, number = folder, 1
    while found.exists() and (found.is_file() or any(found.iterdir())):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def newest_folder(folder: Path) -> Path:
    """Return the existing folder with the highest number appended to its name, or the one given if there is none."""
    numbers = [file.name.removeprefix(f"{folder.name}-") for file in folder.parent.glob("*") if file.is_dir()]
    highest = max((int(number) for number in numbers if number.isdecimal()), default=1)
    return folder.with_name(f"{folder.name}-{highest}") if highest > 1 else folder


def exists(file: Path) -> bool:
    """Return whether a path exists; one that is not valid, such as one that is too long, does not."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def nearest_file(file: Path) -> str:
    """Return a hint: the file in the same folder with the nearest name, or that the folder does not exist."""
    folder = file.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return f"The folder {str(folder)!r} does not exist" if not exists(folder) else ""
    return nearest(file.name, names)
