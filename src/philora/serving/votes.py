"""Store judgements of answers: preference pairs and ratings, each a line of a file.

A preference is a line of the votes file, for TRL's DPOTrainer. "Both good" and "both bad" prefer neither answer: they
are written as ratings for TRL's KTOTrainer, a line for every answer, to `ratings.jsonl` beside the votes file.
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
from philora.files.checkpoint import read_json_lines

_lock = threading.Lock()


def check_votes(path: Path) -> None:
    """Check that a file of votes can be written, before any weight is loaded.

    Raises:
        ConfigError: It cannot be written, or is not a file.
    """
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        expected = "a file that lines can be appended to"
        todo = f"{error.strerror or error}. Give another with --votes"
        raise ConfigError(fault("chat", "votes", str(path), expected, todo)) from error


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to a file and sync it; if that fails, the file has no part of them.

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
                if file.read(1) != b"\n":  # end an incomplete line
                    line = b"\n" + line
            try:
                written = file.write(line)
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # a device has no size
                    file.truncate(size)
                raise


def ratings_file(votes: Path) -> Path:
    """Return the file of ratings that belongs to a file of votes."""
    return votes.with_name("ratings.jsonl" if votes.name == "preferences.jsonl" else f"{votes.stem}.ratings.jsonl")


def tally(votes: Path) -> dict[str, Any]:
    """Return how often each model was preferred, and how often both answers were good or bad."""
    preferred: Counter[str] = Counter(str(record.get("chosen_model")) for record in read_json_lines(votes))
    ratings = [bool(record.get("label")) for record in read_json_lines(ratings_file(votes))]
    return {
        "preferred": dict(preferred),
        "both_good": sum(ratings) // 2,
        "both_bad": (len(ratings) - sum(ratings)) // 2,
        "file": str(votes),
    }


def download(votes: Path) -> str:
    """Return all votes as JSONL: the preferences, then the ratings."""
    texts = [path.read_text(encoding="utf-8") for path in (votes, ratings_file(votes)) if path.is_file()]
    return "".join(text if text.endswith("\n") or not text else f"{text}\n" for text in texts)
