"""Find the shape of records, from their fields or from the configuration, and read them as conversations."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from philora.configuration.sections import COLUMN_ROLES, DATA_FORMATS, TURN_COLUMNS, TURN_ROLES
from philora.dataset.messages import Conversation, require_answer
from philora.dataset.record_fields import BAD_LABELS, LOSS_FLAGS, MASK_FLAGS, Fields, flag, is_empty, refuse_unsupported
from philora.dataset.records import Fault, Record, fields_of
from philora.dataset.shape_readers import PAIRS, read
from philora.dataset.turns import described, turn_columns
from philora.errors import DataError, fault, nearest

_SPEAKER_NAMES = frozenset(("role", "from", "speaker", "author", "sender"))
_WORDS_NAMES = frozenset(("text", "content", "message", "value", "body"))
# Fields that describe a text. Any other field beside it may be its answer or its speaker.
_ORIGIN_NAMES = frozenset(
    (
        "id", "_id", "idx", "index", "url", "uri", "link", "source", "title", "date", "timestamp", "created", "added",
        "dump", "lang", "language", "language_score", "score", "int_score", "token_count", "n_tokens", "tokens",
        "length", "file_path", "path", "filename", "file", "meta", "metadata", "license", "domain", "subset", "split",
    )
)  # fmt: skip
# The answer of a prompt while its record is read.
_STAND_IN = "-"


@dataclass(frozen=True)
class Shape:
    """Describe how the records of one source are read.

    Attributes:
        name: For the report.
        columns: Templates by name, if they are given, or if records are single messages.
        roles: If records are single messages: the roles that values of the role column stand for.
        why: How the shape was recognised, as text.
    """

    name: str
    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    why: str = field(default="", compare=False)

    def read(self, record: Record) -> Conversation:
        """Normalise one record.

        Raises:
            Fault: the record cannot be trained on.
        """
        conversation = self._read(Fields(fields_of(record)))
        if not conversation.is_text:
            require_answer(conversation)
        return conversation

    def _read(self, fields: Fields) -> Conversation:
        refuse_unsupported(fields, "")
        conversation = read(fields, self.name, self.columns)
        if self.name == "columns" or not conversation.is_text:
            _refuse_untrained(fields, self.name)
        conversation.unread += fields.unread()
        return conversation


def _refuse_untrained(fields: Fields, shape: str) -> None:
    """Refuse a record with a flag or label that excludes it from training."""
    for name in LOSS_FLAGS + MASK_FLAGS:
        value = fields.values.get(name)
        if value is None or name in fields.read:
            continue
        if not isinstance(value, bool) and name not in ("weight", "loss"):
            continue  # a field such as `train` may hold anything; it is listed as not read
        if flag(name, fields.get(name)) == (name in MASK_FLAGS):
            raise Fault(name, value, "a record that is trained on", "Remove the records without loss")
    label = fields.values.get("label")
    label = label.strip().lower() if isinstance(label, str) else label
    bad: tuple[Any, ...] = (False, *BAD_LABELS)
    if shape == "prompt_completion":
        bad += ("0",)
    elif label == 0 and not isinstance(label, bool):
        return  # a class by its number
    if "label" not in fields.read and isinstance(label, bool | str | int) and label in bad:
        todo = f"Remove the records with label: {label}, or the field if it means something else"
        raise Fault("label", label, "an answer that is not labelled as bad", todo)
    if label is True:
        fields.get("label")


def detect(records: Sequence[Record], where: str) -> Shape:
    """Detect the shape of a source from its first records.

    Raises:
        DataError: none of them looks like an accepted shape.
    """
    parsed: list[Mapping[str, Any]] = []
    for record in records:
        try:
            parsed.append(fields_of(record))
        except Fault:
            continue
    columns = turn_columns(parsed)
    for fields in parsed:
        found = _shape_of(fields)
        if columns is not None and _may_be_one_turn(found, fields):
            return Shape("turns", columns, why=described(columns))
        if (found is None or found.name == "text") and _SPEAKER_NAMES & fields.keys() and _WORDS_NAMES & fields.keys():
            raise DataError(_one_turn_a_record(fields, where))
        if found is not None:
            if found.name == "text":
                _refuse_more_than_text(fields, where)
            return found
    if not parsed:
        return Shape("messages")  # nothing could be parsed: reading in any shape reports each line
    raise DataError(_no_shape(parsed[0], where))


def _no_shape(seen: Mapping[str, Any], where: str) -> str:
    names = ", ".join(list(map(str, seen))[:20])
    if "chosen" in seen:
        column = '{user: "{prompt}", assistant: "{chosen}"}' if "prompt" in seen else '{text: "{chosen}"}'
        column = '{messages: "{chosen}"}' if isinstance(seen["chosen"], list) else column
        todo = f"To train on the chosen answers set columns: {column}"
        return fault(where, "fields", names, "one answer per record, not a better and a worse one", todo)
    expected = "messages, conversations, instruction and output, prompt and completion, or text"
    return fault(where, "fields", names, expected, _columns_hint(seen))


def _columns_hint(seen: Mapping[str, Any]) -> str:
    """Return what to do about columns with other names; proposes the record's two longest texts."""
    if recipe := _recipe_hint(seen):
        return recipe
    texts = {str(name): value for name, value in seen.items() if isinstance(value, str)}
    usable = [name for name in texts if _fits_template(name)]
    longest = sorted(usable, key=lambda name: len(texts[name]), reverse=True)[:2]
    user, assistant = (name for name in usable if name in longest) if len(longest) == 2 else ("question", "answer")
    columns = f'{{user: "{{{user}}}", assistant: "{{{assistant}}}"}}'
    return f"For other names set columns, such as {columns}; on the command line: 'data.train.columns={columns}'"


def _fits_template(name: str) -> bool:
    return bool(name.strip()) and name.isprintable() and len(name) < 40 and not set("{}!:'\"\\") & set(name)


def _recipe_hint(seen: Mapping[str, Any]) -> str:
    """Return what to do with a program's export whose records are not conversations yet; empty for other records."""
    known = {"mapping": "ChatGPT", "requester_id": "Zendesk", "conversation_parts": "Intercom"}
    slack = seen.get("type") == "message" and {"user", "ts"} <= seen.keys()
    name = "Slack" if slack else next((known[key] for key in known if seen.get(key) is not None), None)
    if name is None:
        return ""
    return f"This looks like an export of {name}: docs/cookbook.md has the recipe that turns it into conversations"


def _may_be_one_turn(found: Shape | None, fields: Mapping[str, Any]) -> bool:
    """Return whether no better shape was found: a `conversation` that is no list is an id."""
    if found is None or found.name == "text":
        return True
    value = fields.get("conversation")
    id_alone = not isinstance(value, list) and not str(value).startswith("[") and fields.get("conversations") is None
    return found.name == "sharegpt" and id_alone


def _refuse_more_than_text(fields: Mapping[str, Any], where: str) -> None:
    more = [str(name) for name, value in fields.items() if name != "text" and not is_empty(value)]
    odd = [name for name in more if name.strip().lower() not in _ORIGIN_NAMES]
    if odd:
        expected = f"text alone or with fields that describe it, but {', '.join(odd)} may be its answer or its speaker"
        todo = _recipe_hint(fields) or (
            'Set columns, such as {user: "{text}", assistant: "{answer}"}, or set format: text to train only the text'
        )
        raise DataError(fault(where, "fields", ", ".join(map(str, fields)), expected, todo))


def _one_turn_a_record(fields: Mapping[str, Any], where: str) -> str:
    expected = "a complete conversation in each record, but these look like single turns"
    todo = (
        'Name the column with the id of the conversation: columns: {conversation: "{id}", role: "{role}", '
        'content: "{text}"}, or group the turns into one record with messages'
    )
    return fault(where, "fields", ", ".join(map(str, fields)), expected, todo)


def _shape_of(fields: Mapping[str, Any]) -> Shape | None:
    filled = {key for key, value in fields.items() if value is not None}
    if "messages" in filled:
        return Shape("messages", why="by the field messages")
    for name in ("conversations", "conversation"):
        if name in filled:
            return Shape("sharegpt", why=f"by the field {name}")
    if {"instruction", "output"} <= filled:
        return Shape("alpaca", why="by the fields instruction and output")
    for pair in PAIRS:
        if set(pair) <= filled:
            return Shape("prompt_completion", why=f"by the fields {pair[0]} and {pair[1]}")
    written = {str(key).strip().lower(): str(key) for key in filled}
    for question, answer in PAIRS:  # spreadsheets write names with a capital letter, or with a space after a comma
        if {question, answer} <= written.keys():
            user, assistant = written[question], written[answer]
            columns = (("user", f"{{{user}}}"), ("assistant", f"{{{assistant}}}"))
            return Shape("columns", columns, why=f"by the fields {user} and {assistant}")
    return Shape("text", why="by the field text: all of it is trained, without turns") if "text" in filled else None


def shape_from_config(
    format_name: str | None, columns: Mapping[str, str] | None, where: str, roles: Mapping[str, str] | None = None
) -> Shape | None:
    """Return the shape that the configuration gives; None if it is to be detected.

    If records are single messages and no columns are given, the shape has none: `detect` finds them.

    Raises:
        DataError: the format, a column key or a role is unknown, or the columns give no answer.
    """
    if format_name not in (None, "auto", *DATA_FORMATS):
        expected = f"one of {', '.join(DATA_FORMATS)}"
        raise DataError(fault(where, "format", format_name, expected, nearest(str(format_name), DATA_FORMATS)))
    for name, role in (roles or {}).items():
        if role not in TURN_ROLES:
            raise DataError(fault(where, f"roles.{name}", role, f"one of {', '.join(TURN_ROLES)}"))
    of_turns = format_name == "turns" or bool(roles) or bool(set(columns or ()) & set(TURN_COLUMNS))
    if columns:
        _check_columns(columns, where, of_turns)
        roles_of = {"prompt": "user", "completion": "assistant"}
        given = tuple((roles_of.get(key, key), template) for key, template in columns.items())
        if of_turns:
            return Shape("turns", given, tuple((roles or {}).items()), f"by columns: {described(given)}")
        templates = ", ".join(f"{key} from {template}" for key, template in given)
        return Shape("columns", given, why=f"by columns: {templates}")
    if of_turns:
        return Shape("turns", (), tuple((roles or {}).items()))
    return None if format_name in (None, "auto") else Shape(str(format_name), why=f"by format: {format_name}")


def _check_columns(columns: Mapping[str, str], where: str, of_turns: bool) -> None:
    for key, template in columns.items():
        if key not in COLUMN_ROLES:
            expected = f"one of {', '.join(COLUMN_ROLES)}"
            raise DataError(fault(where, f"columns.{key}", template, expected, nearest(key, COLUMN_ROLES)))
        try:
            parts = list(string.Formatter().parse(template))
        except (ValueError, TypeError) as error:
            expected = f"a template such as '{{instruction}}' ({error})"
            raise DataError(fault(where, f"columns.{key}", template, expected)) from None
        if key in TURN_COLUMNS and [(text, bool(name)) for text, name, _, _ in parts] != [("", True)]:
            raise DataError(fault(where, f"columns.{key}", template, "the name of one column in braces"))
    if of_turns:
        if not set(TURN_COLUMNS[:3]) <= set(columns) <= set(TURN_COLUMNS):
            expected = "conversation, role and content (and time), the columns of one row for each message"
            raise DataError(fault(where, "columns", dict(columns), expected))
        return
    alone = next((key for key in ("text", "messages") if key in columns), None)
    if alone and set(columns) - {alone, *(("system",) if alone == "messages" else ())}:
        expected = f"{alone} alone" if alone == "text" else "messages alone, or with system"
        raise DataError(fault(where, "columns", dict(columns), expected, "Remove the other keys"))
    if not {"assistant", "completion", "text", "messages"} & set(columns):
        expected = "a template for assistant (or completion, text or messages)"
        raise DataError(fault(where, "columns", dict(columns), expected, "Add one"))


def prompt_of(record: Record, where: str) -> Conversation:
    """Return the turns of a record that come before the assistant's next one.

    The readers of training data expect an answer at the end, so a record without one gets a placeholder, which is
    removed afterwards. Flags that exclude a record from training are ignored.

    Raises:
        Fault: The record cannot be read.
        DataError: It has none of the shapes.
    """
    flags = ("label", *LOSS_FLAGS, *MASK_FLAGS)
    fields = {key: value for key, value in fields_of(record).items() if key not in flags}
    for name in ("messages", "conversations", "conversation"):
        if isinstance(fields.get(name), list) and fields[name]:
            fields[name] = [*fields[name], {"role": "assistant", "content": _STAND_IN}]
    found = _shape_of(fields)
    if found is None or found.name == "text":
        for asked, answer in (*PAIRS[:1], ("instruction", "output"), *PAIRS):
            if fields.get(asked) is not None and fields.get(answer) is None:
                fields[answer] = _STAND_IN
                break
    shape = detect([fields], where)
    if shape.name == "turns":
        raise DataError(_one_turn_a_record(fields, where))
    conversation = shape._read(Fields(fields))
    if conversation.is_text:
        raise Fault("record", "text", "messages, conversations, instruction, or a prompt")
    while conversation.messages and conversation.messages[-1]["role"] == "assistant":
        conversation.messages.pop()
    if not conversation.messages:
        raise Fault("roles", "assistant", "a turn of the user, a tool or the system to answer", "Add the question")
    return conversation
