"""Choose held-out questions of a run that the chat page suggests."""

from __future__ import annotations

import json
from pathlib import Path

from philora.models.run_folder import HELD_OUT_NAME, is_run, run_of

LONGEST_CHARACTERS = 160


def held_out_questions(source: str, most: int = 6) -> list[str]:
    """Return up to `most` questions that a run was not trained on; `source` is its folder or an adapter in it.

    They are the first short ones that start a conversation, without repeats; none if no held-out rows are on disk.
    """
    given = Path(source).expanduser()
    folder = given if is_run(given) else run_of(given)
    file = folder / HELD_OUT_NAME if folder is not None else None
    found: dict[str, None] = {}
    if file is None or not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text = _first_question(line)
            if text and len(text) <= LONGEST_CHARACTERS:
                found.setdefault(text)
            if len(found) == most:
                break
    return list(found)


def _first_question(line: str) -> str:
    """Return the question that a row starts with; empty if it has none or was trained on."""
    try:
        row = json.loads(line)
        turns = [message for message in row["messages"] if message["role"] != "system"]
        asked = turns[0]["content"] if turns and turns[0]["role"] == "user" and not row.get("in_training") else ""
    except (ValueError, KeyError, TypeError):
        return ""
    return asked.strip() if isinstance(asked, str) else ""
