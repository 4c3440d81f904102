"""Group rows of one message each into complete conversations, before their shape is read.

This is how support desks and messengers export. The rows of a file stay in memory until its end, since those of a
conversation need not be adjacent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from philora.dataset.records import BATCH_ROWS, Batch, Fault, Record, Source, parse_line
from philora.errors import DataError, fault, nearest

TURN_KEYS = ("conversation", "role", "content", "time")
"""Keys of `columns` that describe one row for every message; `time` may be left out."""

# Names in the form of `_plain`, most telling first.
_NAMES = {
    "conversation": (
        "conversation_id", "conversation", "ticket_id", "ticket", "thread_id", "thread", "thread_ts", "chat_id", "chat",
        "session_id", "session", "dialog_id", "dialogue_id", "case_id", "case", "issue_id",
    ),
    "role": (
        "role", "from", "speaker", "author_type", "sender_type", "author_role", "sender_role", "author", "sender",
    ),
    "content": ("text", "content", "message", "body", "value", "message_text", "plain_body", "comment"),
    "time": (
        "created", "created_at", "timestamp", "time", "date", "datetime", "sent_at", "ts", "turn", "turn_id",
        "message_index", "position",
    ),
}  # fmt: skip
_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(
        ("human", "customer", "client", "requester", "end_user", "visitor", "guest", "lead", "contact"), "user"
    ),
    **dict.fromkeys(("bot", "agent", "support", "admin", "operator", "staff", "representative"), "assistant"),
}
_ANYONE = "*"
_JOINED = ("user", "assistant")


def _plain(name: object) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def turn_columns(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...] | None:
    """Return the columns of rows that are one message each, as `columns` would name them; None for other rows.

    Args:
        records: The first ones of a source. A column `id` tells conversations apart if a value of it comes twice.
    """
    if not records:
        return None
    known: dict[str, str] = {}
    for name in records[0]:
        known.setdefault(_plain(name), str(name))
    found = {key: next((known[name] for name in names if name in known), None) for key, names in _NAMES.items()}
    if found["conversation"] is None and "id" in known:
        ids = [str(record.get(known["id"])) for record in records]
        found["conversation"] = known["id"] if len(set(ids)) < len(ids) else None
    needed = [found[key] for key in TURN_KEYS[:3]]
    if any(name is None or isinstance(records[0].get(name), list | dict) for name in needed):
        return None
    return tuple((key, f"{{{name}}}") for key, name in found.items() if name is not None)


def described(columns: tuple[tuple[str, str], ...]) -> str:
    """Return how rows become conversations, as a person reads it."""
    names = _names(columns)
    order = f"in the order of {names['time']}" if "time" in names else "in the order of the file"
    return (
        f"one row for each message: conversations by {names['conversation']}, {order}, "
        f"roles from {names['role']}, text from {names['content']}"
    )


def _names(columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {key: template[1:-1] for key, template in columns}


def grouped(source: Source, columns: tuple[tuple[str, str], ...], roles: tuple[tuple[str, str], ...] = ()) -> Source:
    """Return the source with a record for every conversation in place of one for every message.

    Messages of one side that follow each other become one turn. The values of other columns stay beside the turns.

    Args:
        source: With rows of one message each.
        columns: A template of one column for each of `TURN_KEYS`.
        roles: What the values of the role's column mean, before the names that are known; `*` means all others.
    """
    names, said = _names(columns), dict(roles)

    def read() -> Iterator[Batch]:
        held: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        others: list[tuple[int, Record]] = []
        last: Batch | None = None
        for batch in source.read():
            if last is not None and batch.file != last.file:
                yield from _batches(last, held, others, names, said, source.unread)
                held, others = {}, []
            if last is None or batch.file != last.file:
                _require_columns(batch, names)
            last = batch
            for place, record in zip(batch.places, batch.records, strict=True):
                row = _row(record)
                key = "" if row is None else _text(row.get(names["conversation"])).strip()
                if row is None or not key:
                    others.append((place, record))  # reading it alone reports its fault
                else:
                    held.setdefault(key, []).append((place, row))
        if last is not None:
            yield from _batches(last, held, others, names, said, source.unread)

    return dataclasses.replace(source, read=read)


def _row(record: Record) -> Mapping[str, Any] | None:
    try:
        return parse_line(record) if isinstance(record, bytes) else record
    except Fault:
        return None


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _require_columns(batch: Batch, names: Mapping[str, str]) -> None:
    rows = [row for row in map(_row, batch.records) if row is not None]
    known = list(dict.fromkeys(str(name) for row in rows for name in row))
    for key, name in names.items():
        if rows and name not in known:
            expected = f"a template with the name of a column in braces (the columns are {', '.join(known)})"
            raise DataError(fault(batch.file, f"columns.{key}", f"{{{name}}}", expected, nearest(name, known)))


def _batches(
    last: Batch,
    held: Mapping[str, list[tuple[int, Mapping[str, Any]]]],
    others: Sequence[tuple[int, Record]],
    names: Mapping[str, str],
    roles: Mapping[str, str],
    unread: dict[str, None],
) -> Iterator[Batch]:
    """Yield the conversations of one file, by the places of their first rows."""
    times = _times(held, names.get("time"))
    if times is None:
        unread[f"column {names['time']} (not all of its values are times, so rows stay in the order of the file)"] = (
            None
        )
    made: list[tuple[int, Record]] = list(others)
    for rows in held.values():
        order = rows if not times else sorted(rows, key=lambda row: times[row[0]])
        made.append((rows[0][0], _conversation([row for _, row in order], names, roles)))
    made.sort(key=lambda item: item[0])
    for start in range(0, len(made), BATCH_ROWS):
        part = made[start : start + BATCH_ROWS]
        yield Batch(last.file, last.unit, [place for place, _ in part], [record for _, record in part])


def _times(held: Mapping[str, list[tuple[int, Mapping[str, Any]]]], name: str | None) -> dict[int, float] | None:
    """Return the time of every row by its place; None where one cannot be read as a time."""
    times: dict[int, float] = {}
    if name is None:
        return times
    for rows in held.values():
        for place, row in rows:
            time = _seconds(row.get(name))
            if time is None:
                return None
            times[place] = time
    return times


def _seconds(value: Any) -> float | None:
    """Return a time as a number that orders; a date without a zone counts as UTC."""
    if isinstance(value, datetime.datetime):
        moment = value
    else:
        text = _text(value).strip()
        with contextlib.suppress(ValueError):
            return float(text) if math.isfinite(float(text)) else None
        try:
            moment = datetime.datetime.fromisoformat(text.removesuffix(" UTC"))
        except ValueError:
            return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _conversation(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], roles: Mapping[str, str]
) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    beside: dict[str, Any] = {}
    for row in rows:
        role, text = _role(_text(row.get(names["role"])), roles), _text(row.get(names["content"]))
        if turns and role in _JOINED and turns[-1]["role"] == role:
            turns[-1]["content"] = "\n".join(filter(str.strip, (turns[-1]["content"], text)))
        else:
            turns.append({"role": role, "content": text})
        for name, value in row.items():
            if name not in names.values() and name != "messages" and value not in (None, ""):
                beside.setdefault(name, value)
    return {"messages": turns, **beside}


def _role(value: str, roles: Mapping[str, str]) -> str:
    """Return the role of a value, by the configuration or the usual names; else the value, which reading refuses."""
    value = value.strip()
    known = _ROLES.get(_plain(value))
    return roles.get(value) or known or roles.get(_ANYONE, value)
