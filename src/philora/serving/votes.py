"""Store what people say of two answers: preference pairs and ratings, each a line of a file.

A preference is a line of the votes file, as TRL's DPOTrainer takes it. "Both good" and "both bad" prefer neither, so
they go as ratings, a line for every answer, into `ratings.jsonl` beside it, as TRL's KTOTrainer takes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from philora.errors import ConfigError, fault

_lock = threading.Lock()


def check_votes(path: Path) -> None:
    """Try a file of votes before any weight is loaded: a vote must not be the first to find that it cannot be kept.

    Raises:
        ConfigError: It cannot be written, or is no file.
    """
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        expected = "a file that lines can be added to"
        todo = f"{error.strerror or error}. Give another with --votes"
        raise ConfigError(fault("chat", "votes", str(path), expected, todo)) from error


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a file: on the disk when this returns, and no part of them in the file when this raises.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    line = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    with _lock:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a line that was cut short stays by itself
                    line = b"\n" + line
            try:
                written = file.write(line)
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # of a device, which has no size
                    file.truncate(size)
                raise


def ratings_file(votes: Path) -> Path:
    """Return the file of the ratings beside one of votes."""
    return votes.with_name("ratings.jsonl" if votes.name == "preferences.jsonl" else f"{votes.stem}.ratings.jsonl")


def tally(votes: Path) -> dict[str, Any]:
    """Return how often each model was preferred, and how often both answers were good or bad."""
    preferred: Counter[str] = Counter(str(record.get("chosen_model")) for record in _records(votes))
    ratings = [bool(record.get("label")) for record in _records(ratings_file(votes))]
    return {
        "preferred": dict(preferred),
        "both_good": sum(ratings) // 2,
        "both_bad": (len(ratings) - sum(ratings)) // 2,
        "file": str(votes),
    }


def download(votes: Path) -> str:
    """Return all votes as JSON lines: the preferences, then the ratings."""
    texts = [path.read_text(encoding="utf-8") for path in (votes, ratings_file(votes)) if path.is_file()]
    return "".join(text if text.endswith("\n") or not text else f"{text}\n" for text in texts)


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without a line that was cut short."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found
