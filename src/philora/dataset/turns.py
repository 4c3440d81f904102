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

from philora.configuration.sections import TURN_COLUMNS, TURN_ROLES
from philora.dataset.record_fields import BAD_LABELS, LOSS_FLAGS, MASK_FLAGS
from philora.dataset.records import BATCH_ROWS, Batch, Fault, Record, Source, fields_of
from philora.errors import DataError, fault, nearest

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
    **{name: name for name in TURN_ROLES},
    **dict.fromkeys(
        ("human", "customer", "client", "requester", "end_user", "visitor", "guest", "lead", "contact"), "user"
    ),
    **dict.fromkeys(("bot", "agent", "support", "admin", "operator", "staff", "representative"), "assistant"),
}
_ANYONE = "*"
_FLAGS = (*LOSS_FLAGS, *MASK_FLAGS)
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
    needed = [found[key] for key in TURN_COLUMNS[:3]]
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

    Messages of one side that follow each other become one turn, unless only some have a loss. The values of other
    columns stay beside the turns.

    Args:
        source: With rows of one message each.
        columns: A template of one column for each of `TURN_COLUMNS`.
        roles: What the values of the role's column mean, before the names that are known; `*` means all others.
    """
    names, said = _names(columns), dict(roles)

    def read() -> Iterator[Batch]:
        held: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        others: list[tuple[int, Record]] = []
        last: Batch | None = None
        for batch in source.read():
            if last is None or batch.file != last.file:
                if last is not None:
                    yield from _batches(last, held, others, names, said, source.unread)
                held, others = {}, []
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
        return fields_of(record)
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
        todo = "write times as 2026-03-31 08:15 to order them"
        column = f"column {names['time']}"
        unread[f"{column} (not all of its values are times, so rows stay in the order of the file; {todo})"] = None
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
            moment = datetime.datetime.fromisoformat(_with_year_first(text.removesuffix(" UTC")))
        except ValueError:
            return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


_WITH_DOTS = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4}|\d\d)(?:,? +(\d{1,2})(:\d\d.*))?")


def _with_year_first(text: str) -> str:
    """Return a date with dots, which is day.month.year, in ISO's form; dates with slashes are ambiguous."""
    found = _WITH_DOTS.fullmatch(text)
    if found is None:
        return text
    day, month, year, hour, rest = found.groups()
    date = f"{year if len(year) == 4 else f'20{year}'}-{month:0>2}-{day:0>2}"
    return date if hour is None else f"{date} {hour:0>2}{rest}"


def _conversation(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], roles: Mapping[str, str]
) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    beside: dict[str, Any] = {}
    for row in rows:
        turn = {"role": _role(_text(row.get(names["role"])), roles), "content": _content(row.get(names["content"]))}
        flags = {name: row[name] for name in _FLAGS if name not in names.values() and _is_flag(name, row.get(name))}
        turn.update(flags)
        if turns and turn["role"] in _JOINED and _same_side(turns[-1], turn):
            turns[-1]["content"] = _joined(turns[-1]["content"], turn["content"])
        else:
            turns.append(turn)
        for name, value in row.items():
            if name in names.values() or name == "messages" or name in flags or value in (None, ""):
                continue
            if name == "label" and str(value).strip().lower() in (*BAD_LABELS, "0"):
                beside[name] = value  # one bad answer is enough
            beside.setdefault(name, value)
    return {"messages": turns, **beside}


def _content(value: Any) -> Any:
    """Return a text; lists of parts and objects stay as they are: the reader of messages joins or refuses them."""
    return value if isinstance(value, list | dict) else _text(value)


def _is_flag(name: str, value: Any) -> bool:
    """Return whether a value turns the loss of a row on or off; `train` and others may hold anything else."""
    return isinstance(value, bool) or (name in ("weight", "loss") and value not in (None, ""))


def _same_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two messages become one turn: they have the same role and the same flags of the loss."""
    return all(str(first.get(name)).lower() == str(second.get(name)).lower() for name in ("role", *_FLAGS))


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return "\n".join(filter(str.strip, (first, second)))
    parts = [text if isinstance(text, list) else [{"type": "text", "text": text}] for text in (first, second)]
    return [*parts[0], {"type": "text", "text": "\n"}, *parts[1]]


def _role(value: str, roles: Mapping[str, str]) -> str:
    """Return the role of a value, by the configuration or the usual names; else the value, which reading refuses."""
    value = value.strip()
    known = _ROLES.get(_plain(value))
    return roles.get(value) or known or roles.get(_ANYONE, value)
