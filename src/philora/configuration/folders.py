"""Names of files and folders that a configuration or the command line mentions."""

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
"""Suffixes of files that are data where a configuration is asked for."""

_LONGEST_SETTINGS_BYTES: Final = 1_000_000


def holds_data(name: str) -> bool:
    """Return whether a name is that of data where a configuration is asked for: a file of records, or a folder of them.

    JSON is a configuration where it is one object with a section of a configuration, else data.
    """
    file = Path(name).expanduser()
    if not exists(file):
        return False
    if file.is_dir():
        if (file / "config.yaml").is_file():
            return False
        return any(path.suffix.lower() in RECORD_SUFFIXES for depth in ("*", "*/*") for path in file.glob(depth))
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in DATA_SUFFIXES
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size < _LONGEST_SETTINGS_BYTES else None
    except (OSError, ValueError):
        return True
    sections = (*SECTIONS, "training_config", "peft_config")
    return not (isinstance(content, Mapping) and any(isinstance(content.get(section), Mapping) for section in sections))


def unused_folder(folder: Path) -> Path:
    """Return a folder that holds nothing: the one given, or the first with a number behind its name."""
    found, number = folder, 1
    while found.exists() and (found.is_file() or any(found.iterdir())):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def newest_folder(folder: Path) -> Path:
    """Return the folder with the highest number behind its name that is there; the one given where none is."""
    numbers = [file.name.removeprefix(f"{folder.name}-") for file in folder.parent.glob("*") if file.is_dir()]
    highest = max((int(number) for number in numbers if number.isdecimal()), default=1)
    return folder.with_name(f"{folder.name}-{highest}") if highest > 1 else folder


def exists(file: Path) -> bool:
    """Return whether a path leads to something; one that no file can have, such as one that is too long, does not."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def nearest_file(file: Path) -> str:
    """A hint with the file in the same folder whose name is nearest, or that the folder does not exist."""
    folder = file.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return f"The folder {str(folder)!r} does not exist" if not exists(folder) else ""
    return nearest(file.name, names)
