"""Records of every accepted shape become conversations: lists of messages with role and content."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from philora.dataset.records import Fault, Record, parse_line
from philora.dataset.turns import FLAGS, TURN_KEYS, described, turn_columns
from philora.errors import DataError, fault, nearest

Message: TypeAlias = "dict[str, Any]"

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "turns")
"""Values of the `format` key."""

TEXT_ROLE = "text"
"""The role of the one message of a record that is plain text, trained whole and without a chat template."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tools": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
# What a template may read besides role and content; ids and scores of a dataset's own are left behind.
_EXTRA_KEYS = ("name", "tool_calls", "tool_call_id", "tools", "reasoning_content", "thinking")

# Names of a record's own system turn, in the order in which one is looked for.
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
# What is asked about stands in these, beside the question.
_MATERIAL_NAMES = ("input", "context")
# Whether the loss is on a turn; of the second kind, true means that it is not.
_LOSS_FLAGS, _MASK_FLAGS = FLAGS[:5], FLAGS[5:]
# What a text model cannot be given; leaving it out would change what the text speaks of.
_MEDIA_NAMES = ("image", "images", "video", "videos", "audio", "audios", "input_audio")
# Older spellings of calls that no chat template reads.
_OLD_CALLS = ("function_call", "functions")
_PARTS_OF_LOSS = ("train_detail", "loss_mask", "loss_weight")
_SPEAKER_NAMES = frozenset(("role", "from", "speaker", "author", "sender"))
_WORDS_NAMES = frozenset(("text", "content", "message", "value", "body"))

# Pairs of names that stand for a question and its answer, most telling first.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction", "response"),
    ("user", "assistant"),
    ("input", "output"),
)
_COLUMN_KEYS = ("system", "user", "assistant", "prompt", "completion", "text", "messages", *TURN_KEYS)
# What corpora of plain text say of every text; other fields beside it may be what the text answers.
_ORIGIN_NAMES = frozenset(
    (
        "id", "_id", "idx", "index", "url", "uri", "link", "source", "title", "date", "timestamp", "created", "added",
        "dump", "lang", "language", "language_score", "score", "int_score", "token_count", "n_tokens", "tokens",
        "length", "file_path", "path", "filename", "file", "meta", "metadata", "license", "domain", "subset", "split",
    )
)  # fmt: skip


# Lines that open a turn in records that are one text: a model's markup, or words such as "user" and "### Response:".
_USER_LINE = re.compile(r"^[#\s]*(?:<\|(?:im_start\|>)?user|(?:user|human|instruction)[ \t]*(?::|$))", re.I | re.M)
_ANSWER_LINE = re.compile(
    r"^[#\s]*(?:<\|(?:im_start\|>)?assistant|(?:assistant|gpt|response|answer)[ \t]*(?::|$))", re.I | re.M
)


@dataclass(slots=True)
class Conversation:
    """Hold one normalised record."""

    messages: list[Message]
    tools: list[Any] | None = None
    two_user_turns: bool = False
    """Two user turns stand in a row somewhere."""
    untrained: frozenset[int] = field(default_factory=frozenset)
    """Assistant turns without loss: their `weight` is 0, or they stand in the prompt of a pair."""
    unread: tuple[str, ...] = ()
    """Fields of the record, and keys of its turns, that have a value and were not read."""

    @property
    def is_text(self) -> bool:
        """Return whether this is plain text, without roles."""
        return bool(self.messages[0]["role"] == TEXT_ROLE)

    @property
    def has_turns_as_text(self) -> bool:
        """Return whether plain text has turns of user and assistant written in it, which are all trained on."""
        text = self.messages[0]["content"]
        return self.is_text and bool(_USER_LINE.search(text) and _ANSWER_LINE.search(text))

    @property
    def is_plain(self) -> bool:
        """Nothing but role and content, so the roles alone say how a template arranges it."""
        return self.tools is None and all(len(message) == 2 for message in self.messages)


@dataclass(frozen=True)
class Shape:
    """Describe how the records of one source are read.

    Attributes:
        name: For the report.
        columns: Templates, where they are given or, of one row for every message, were found.
        roles: Of one row for every message: what values of the role's column mean.
        why: How it was recognised, as a person reads it.
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
        fields = parse_line(record) if isinstance(record, bytes) else record
        if not isinstance(fields, dict):
            raise Fault("record", fields, "an object with named fields")
        conversation = self._read(_Fields(fields))
        if not conversation.is_text:
            _check(conversation)
        return conversation

    def _read(self, fields: _Fields) -> Conversation:
        _refuse_what_changes_the_meaning(fields, "")
        conversation = _READERS[self.name](fields, self)
        if self.name == "columns" or not conversation.is_text:
            _read_flags_of_record(fields, self)
        conversation.unread += fields.unread()
        return conversation


class _Fields:
    """Hold the fields of one record, and which of them a reader has read."""

    __slots__ = ("read", "values")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """Return the value of a field, which counts as read; None if there is none."""
        self.read.add(name)
        return self.values.get(name)

    def needed(self, name: str) -> Any:
        """Return the value of a field that is required.

        Raises:
            Fault: It is missing or null.
        """
        value = self.get(name)
        if value is None:
            names = ", ".join(str(key) for key, item in self.values.items() if item is not None)
            raise Fault("record", names, f"a field {name!r}", nearest(name, map(str, self.values)))
        return value

    def filled(self, names: Sequence[str]) -> bool:
        """Return whether all of these have a value; it does not count as reading them."""
        return all(self.values.get(name) is not None for name in names)

    def unread(self) -> tuple[str, ...]:
        """Fields with a value that nobody read."""
        if len(self.values) <= len(self.read) and self.values.keys() <= self.read:
            return ()
        return tuple(str(key) for key, value in self.values.items() if key not in self.read and not _is_empty(value))


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def _refuse_what_changes_the_meaning(values: _Fields, where: str) -> None:
    for name in values.values.keys() & _REFUSED:
        if _is_empty(values.values[name]):
            continue
        place = f"{where}.{name}" if where else name
        if name in _MEDIA_NAMES:
            todo = "Remove the field if the text is meant to be trained without it, or the record if it is not"
            raise Fault(place, values.values[name], "no pictures, video or sound beside the text", todo)
        if name in _OLD_CALLS:
            todo = "Write the calls as tool_calls of the turn and the descriptions as tools of the record"
            raise Fault(place, values.values[name], "tool calls in today's form", todo)
        todo = "Remove it, or say with weight: 0 which whole turns have no loss"
        raise Fault(place, values.values[name], "whole turns with or without loss, not parts of them", todo)


_REFUSED = frozenset((*_MEDIA_NAMES, *_OLD_CALLS, *_PARTS_OF_LOSS))


def _read_flags_of_record(fields: _Fields, shape: Shape) -> None:
    """Refuse a record that says of itself that it is not to be trained on."""
    for name in _LOSS_FLAGS + _MASK_FLAGS:
        value = fields.values.get(name)
        if value is None or name in fields.read:
            continue
        if not isinstance(value, bool) and name not in ("weight", "loss"):
            continue  # a name such as `train` may hold anything; it is named as not read
        if _flag(name, fields.get(name)) == (name in _MASK_FLAGS):
            raise Fault(name, value, "a record that is trained on", "Remove the records that have no loss")
    label = fields.values.get("label")
    bad: tuple[Any, ...] = (False, "false", "False", "FALSE")
    if shape.name == "prompt_completion":
        bad += ("0",)
    elif label == 0 and not isinstance(label, bool):
        return  # a class by its number
    if "label" not in fields.read and isinstance(label, bool | str | int) and label in bad:
        todo = "Remove the records whose label is false, or the field if it says something else of them"
        raise Fault("label", label, "an answer that is good", todo)
    if label is True:
        fields.get("label")


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    said = str(value).strip().lower()
    if said not in known:
        expected = "0 (no loss on this turn) or 1" if name.endswith("weight") else "true or false (false: no loss)"
        if name.rpartition(".")[2] in _MASK_FLAGS:
            expected = "true or false (true: no loss)"
        raise Fault(name, value, expected, "A turn counts in full or not at all")
    return known[said]


def detect(records: Sequence[Record], where: str) -> Shape:
    """Detect the shape of a source from its first records.

    Raises:
        DataError: none of them looks like an accepted shape.
    """
    parsed: list[Mapping[str, Any]] = []
    for record in records:
        try:
            parsed.append(parse_line(record) if isinstance(record, bytes) else record)
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
        # Nothing could be parsed: reading in any shape reports each line.
        return Shape("messages")
    raise DataError(_no_shape(parsed[0], where))


def _no_shape(seen: Mapping[str, Any], where: str) -> str:
    names = ", ".join(list(map(str, seen))[:20])
    if "chosen" in seen:
        column = (
            '{messages: "{chosen}"}'
            if isinstance(seen["chosen"], list)
            else ('{user: "{prompt}", assistant: "{chosen}"}' if "prompt" in seen else '{text: "{chosen}"}')
        )
        todo = f"To train on the chosen ones say columns: {column}"
        return fault(where, "fields", names, "one answer a record, not a better and a worse one", todo)
    return fault(
        where,
        "fields",
        names,
        "messages, conversations, instruction and output, prompt and completion, or text",
        _name_columns(seen),
    )


def _name_columns(seen: Mapping[str, Any]) -> str:
    """Return what to do about columns with other names, with the record's own names as far as it has two texts."""
    if recipe := _recipe_of(seen):
        return recipe
    texts = {str(name): value for name, value in seen.items() if isinstance(value, str)}
    usable = [name for name in texts if _may_stand_in_braces(name)]
    longest = sorted(usable, key=lambda name: len(texts[name]), reverse=True)[:2]
    user, assistant = (name for name in usable if name in longest) if len(longest) == 2 else ("question", "answer")
    columns = f'{{user: "{{{user}}}", assistant: "{{{assistant}}}"}}'
    said = f"'data.train.columns={columns}'"
    return f"Say which column is which with columns, such as {columns}, or on the command line {said}"


def _may_stand_in_braces(name: str) -> bool:
    return bool(name.strip()) and name.isprintable() and len(name) < 40 and not set("{}!:'\"\\") & set(name)


def _recipe_of(seen: Mapping[str, Any]) -> str:
    """Return what to do with the export of a program whose records are no conversations yet."""
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
    more = [str(name) for name, value in fields.items() if name != "text" and not _is_empty(value)]
    odd = [name for name in more if name.strip().lower() not in _ORIGIN_NAMES]
    if odd:
        expected = f"text alone, or beside what says where it is from, but {', '.join(odd)} may belong to it"
        todo = _recipe_of(fields) or (
            'Say what is what with columns, such as {user: "{text}", assistant: "{answer}"}, or format: text to train '
            "the text alone"
        )
        raise DataError(fault(where, "fields", ", ".join(map(str, fields)), expected, todo))


def _one_turn_a_record(fields: Mapping[str, Any], where: str) -> str:
    return fault(
        where,
        "fields",
        ", ".join(map(str, fields)),
        "a whole conversation in each record, but these look like one turn each",
        'Name the column that says which turns belong together: columns: {conversation: "{id}", role: "{role}", '
        'content: "{text}"}, or group the turns into one record with messages',
    )


def _shape_of(fields: Mapping[str, Any]) -> Shape | None:
    filled = {key for key, value in fields.items() if value is not None}
    if "messages" in filled:
        return Shape("messages", why="by the field messages")
    for name in ("conversations", "conversation"):
        if name in filled:
            return Shape("sharegpt", why=f"by the field {name}")
    if {"instruction", "output"} <= filled:
        return Shape("alpaca", why="by the fields instruction and output")
    for pair in _PAIRS:
        if set(pair) <= filled:
            return Shape("prompt_completion", why=f"by the fields {pair[0]} and {pair[1]}")
    written = {str(key).strip().lower(): str(key) for key in filled}
    for question, answer in _PAIRS:  # spreadsheets write column names with a capital letter, or a space after a comma
        if {question, answer} <= written.keys():
            user, assistant = written[question], written[answer]
            columns = (("user", f"{{{user}}}"), ("assistant", f"{{{assistant}}}"))
            return Shape("columns", columns, why=f"by the fields {user} and {assistant}")
    return Shape("text", why="by the field text: all of it is trained, without turns") if "text" in filled else None


def shape_from_config(
    format_name: str | None,
    columns: Mapping[str, str] | None,
    where: str,
    roles: Mapping[str, str] | None = None,
) -> Shape | None:
    """Return the shape that the configuration gives; None if it is to be detected.

    Of one row for every message the columns may be left to be found: the shape then has none.

    Raises:
        DataError: the format, a column key or a role is unknown, or the columns give no answer.
    """
    if format_name not in (None, "auto", *FORMATS):
        todo = nearest(str(format_name), FORMATS)
        raise DataError(fault(where, "format", format_name, f"one of {', '.join(FORMATS)}", todo))
    for name, role in (roles or {}).items():
        if role not in _PLAIN_ROLES:
            raise DataError(fault(where, f"roles.{name}", role, f"one of {', '.join(_PLAIN_ROLES)}"))
    of_turns = format_name == "turns" or bool(roles) or bool(set(columns or ()) & set(TURN_KEYS))
    if columns:
        _check_columns(columns, where, of_turns)
        roles_of = {"prompt": "user", "completion": "assistant"}
        given = tuple((roles_of.get(key, key), template) for key, template in columns.items())
        if of_turns:
            return Shape("turns", given, tuple((roles or {}).items()), f"as columns says: {described(given)}")
        said = ", ".join(f"{key} from {template}" for key, template in given)
        return Shape("columns", given, why=f"as columns says: {said}")
    if of_turns:
        return Shape("turns", (), tuple((roles or {}).items()))
    return None if format_name in (None, "auto") else Shape(str(format_name), why=f"as format says: {format_name}")


def _check_columns(columns: Mapping[str, str], where: str, of_turns: bool) -> None:
    for key, template in columns.items():
        if key not in _COLUMN_KEYS:
            todo = nearest(key, _COLUMN_KEYS)
            raise DataError(fault(where, f"columns.{key}", template, f"one of {', '.join(_COLUMN_KEYS)}", todo))
        try:
            parts = list(string.Formatter().parse(template))
        except (ValueError, TypeError) as error:
            expected = f"a template such as '{{instruction}}' ({error})"
            raise DataError(fault(where, f"columns.{key}", template, expected)) from None
        if key in TURN_KEYS and [(text, bool(name)) for text, name, _, _ in parts] != [("", True)]:
            raise DataError(fault(where, f"columns.{key}", template, "the name of one column in braces"))
    if of_turns:
        if not set(TURN_KEYS[:3]) <= set(columns) <= set(TURN_KEYS):
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


# ---------------------------------------------------------------------------------------------------- readers


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        number = isinstance(value, int | float) and value == value
        todo = (
            f'Write it in quotes, or map the fields with columns, which write numbers: "{{{name}}}"' if number else ""
        )
        raise Fault(name, value, f"text, not {_type_name(value)}", todo)
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _from_messages(fields: _Fields, shape: Shape) -> Conversation:
    return _with_system(_from_list(fields.needed("messages"), "messages", fields), fields)


def _from_sharegpt(fields: _Fields, shape: Shape) -> Conversation:
    name = (
        "conversation"
        if fields.values.get("conversations") is None and "conversation" in fields.values
        else ("conversations")
    )
    return _with_system(_from_list(fields.needed(name), name, fields), fields)


def _system_of(fields: _Fields) -> str | None:
    """Return the system turn of a record that has it in a field of its own."""
    for name in _SYSTEM_NAMES:
        if not _is_empty(fields.values.get(name)):
            return _string(fields.get(name), name)
    return None


def _with_system(conversation: Conversation, fields: _Fields, system: str | None = None) -> Conversation:
    """Return the conversation with the system turn of the record's own field in front."""
    system = system or _system_of(fields)
    if system is None or not system.strip():
        return conversation
    first = conversation.messages[0]
    if first["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": system})
        conversation.untrained = frozenset(index + 1 for index in conversation.untrained)
    elif first["content"].strip() != system.strip():
        todo = "Keep one of the two, or join them"
        raise Fault("system", system, "the same text as the system turn among the messages", todo)
    return conversation


def _from_list(value: Any, name: str, fields: _Fields, prompt_turns: int = 0) -> Conversation:
    if isinstance(value, str):  # CSV cells and some Parquet columns hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Fault(name, value, f"a list of messages ({error})") from None
    if not isinstance(value, list):
        raise Fault(name, value, f"a list of messages, not {_type_name(value)}")
    messages: list[Message] = []
    untrained: set[int] = set()
    unread: set[str] = set()
    previous = None
    two_user_turns = False
    for index, item in enumerate(value):
        message = _message(item, f"{name}[{index}]", unread)
        role = message["role"]
        if role == "user" and previous == "user":
            two_user_turns = True
        if role == "system" and not message["content"].strip() and "tools" not in message:
            continue
        trained = len(item) == 2 or _has_loss(item, role, f"{name}[{index}]")
        if role == "assistant" and (index < prompt_turns or not trained):
            untrained.add(len(messages))
        previous = role
        messages.append(message)
    if not messages:
        raise Fault(name, value, "at least one turn of the user and one of the assistant")
    return Conversation(messages, _tools(fields), two_user_turns, frozenset(untrained), tuple(sorted(unread)))


def _has_loss(turn: Mapping[str, Any], role: str, name: str) -> bool:
    """Return whether a turn's own flags leave the loss on it.

    Raises:
        Fault: A flag says neither yes nor no, or asks for loss on a turn that is not the assistant's.
    """
    trained = True
    for key in (*_LOSS_FLAGS, *_MASK_FLAGS):
        if turn.get(key) is None:
            continue
        wanted = _flag(f"{name}.{key}", turn[key]) != (key in _MASK_FLAGS)
        if wanted and role != "assistant" and key != "weight" and key not in _MASK_FLAGS:
            raise Fault(f"{name}.{key}", turn[key], "loss on turns of the assistant alone", "Set it to false here")
        trained = trained and wanted
    return trained


def _message(turn: Any, name: str, unread: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise Fault(name, turn, "an object with role and content")
    if "role" in turn and turn["role"] is not None:
        given, content = turn["role"], turn.get("content")
        role_name, content_name = "role", "content"
    elif "from" in turn and turn["from"] is not None:
        given, content = turn["from"], turn.get("value")
        role_name, content_name = "from", "value"
    else:
        raise Fault(name, ", ".join(map(str, turn)), "role and content, or from and value", "Add the role")
    role = given if given in _PLAIN_ROLES else _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        hint = nearest(given.lower(), _ROLES) if isinstance(given, str) else ""
        hint = hint or f"Of one row for each message say what it means with roles: {{{given}: user}}"
        raise Fault(f"{name}.role", given, f"one of {', '.join(_PLAIN_ROLES)} or an alias of theirs", hint)
    if isinstance(content, list):
        content = _joined_parts(content, f"{name}.{content_name}", unread)
    calls = len(turn) > 2 and turn.get("tool_calls")
    if len(turn) > 2:
        _refuse_what_changes_the_meaning(_Fields(turn), name)
        if calls:
            turn = {**turn, "tool_calls": _calls(calls, role, f"{name}.tool_calls")}
    if content is None:
        if not calls:
            raise Fault(f"{name}.{content_name}", None, "the text of the turn", "Add it or remove the record")
        content = ""
    if not isinstance(content, str):
        raise Fault(f"{name}.{content_name}", content, f"text, not {_type_name(content)}")
    if role == "assistant" and not content.strip() and not calls:
        raise Fault(
            f"{name}.{content_name}", content, "an answer that is not empty", "Write the answer or remove the record"
        )
    message = {"role": role, "content": content}
    if len(turn) > 2:
        for key in _EXTRA_KEYS:
            if not _is_empty(turn.get(key)):
                listed = key == "tools" and not isinstance(turn[key], str)  # templates write it as it is
                message[key] = json.dumps(turn[key], ensure_ascii=False) if listed else turn[key]
        known = (role_name, content_name, *_EXTRA_KEYS, *_LOSS_FLAGS, *_MASK_FLAGS)
        unread.update(f"{key} of turns" for key, value in turn.items() if key not in known and not _is_empty(value))
    return message


def _calls(calls: Any, role: str, name: str) -> list[Any]:
    """Return the tool calls of a turn; Parquet and CSV often hold them as JSON."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError as error:
            raise Fault(name, calls, f"a list of tool calls ({error})") from None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Fault(name, calls, f"a list of tool calls, not {_type_name(calls)}")
    if role != "assistant":
        raise Fault(name, calls, "tool calls in turns of the assistant alone", "Move them to the turn that makes them")
    return calls


def _joined_parts(parts: list[Any], name: str, unread: set[str]) -> str:
    texts: list[str] = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise Fault(name, part, "text, or a list of parts of type text", "Pictures and sound are not trained on")
        texts.append(part["text"])
        unread.update(f"{key} of parts of turns" for key in part if key not in ("type", "text") and part[key])
    return "".join(texts)


def _tools(fields: _Fields) -> list[Any] | None:
    tools = fields.get("tools")
    if not tools:
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Fault("tools", tools, f"a list of tool descriptions ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault("tools", tools, f"a list of tool descriptions, not {_type_name(tools)}")
    return tools or None


def _pair(user: str, assistant: Any, name: str, system: str | None = None, history: Any = None) -> Conversation:
    messages: list[Message] = []
    if system is not None and system.strip():
        messages.append({"role": "system", "content": system})
    for past in history or ():
        if not (isinstance(past, list | tuple) and len(past) == 2):
            raise Fault("history", past, "pairs of question and answer")
        messages += [
            {"role": "user", "content": _string(past[0], "history")},
            {"role": "assistant", "content": _answer(past[1], "history")},
        ]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": _answer(assistant, name)}]
    return Conversation(messages)


def _answer(value: Any, name: str) -> str:
    text = _string(value, name)
    if not text.strip():
        raise Fault(name, text, "an answer that is not empty", "Write the answer or remove the record")
    return text


def _from_alpaca(fields: _Fields, shape: Shape) -> Conversation:
    return _from_names(fields, "instruction", "output")


def _from_prompt_completion(fields: _Fields, shape: Shape) -> Conversation:
    first, second = next((pair for pair in _PAIRS if fields.filled(pair)), _PAIRS[0])
    prompt, completion = fields.needed(first), fields.needed(second)
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answered = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        both = _from_list(asked + answered, f"{first}+{second}", fields, prompt_turns=len(asked))
        return _with_system(both, fields)
    return _from_names(fields, first, second)


def _from_names(fields: _Fields, first: str, second: str) -> Conversation:
    """Return a question and its answer, with the record's material, system turn, earlier turns and tools."""
    user = _string(fields.needed(first), first)
    for name in _MATERIAL_NAMES:
        if name in (first, second) or _is_empty(fields.values.get(name)):
            continue
        material = _string(fields.get(name), name)
        if material.strip() not in user:
            user = f"{user}\n{material}"
    conversation = _pair(user, fields.needed(second), second, _system_of(fields), fields.get("history"))
    conversation.tools = _tools(fields)
    return conversation


def _from_text(fields: _Fields, shape: Shape) -> Conversation:
    return _text(_string(fields.needed("text"), "text"))


def _text(text: str) -> Conversation:
    if not text.strip():
        raise Fault("text", text, "text that is not empty", "Remove the record")
    return Conversation([{"role": TEXT_ROLE, "content": text}])


def _from_columns(fields: _Fields, shape: Shape) -> Conversation:
    columns = dict(shape.columns)
    system = _fill("system", columns["system"], fields) if "system" in columns else None
    if "messages" in columns:
        name = columns["messages"].strip("{}")
        if name not in fields.values:
            raise DataError(_names_no_column("messages", columns["messages"], fields))
        return _with_system(_from_list(fields.needed(name), name, fields), fields, system)
    if "text" in columns:
        return _text(_fill("text", columns["text"], fields))
    user = _fill("user", columns["user"], fields) if "user" in columns else ""
    system = system or _system_of(fields)
    conversation = _pair(user, _fill("assistant", columns["assistant"], fields), "assistant", system)
    if "user" not in columns:
        conversation.messages = [message for message in conversation.messages if message["role"] != "user"]
    conversation.tools = _tools(fields)
    return conversation


def _names_no_column(role: str, template: str, fields: _Fields) -> str:
    known = [str(key) for key in fields.values]
    hint = f"Did you mean '{{{template}}}'?" if template in known else nearest(template.strip("{}"), known)
    expected = f"a template with the name of a column in braces (the columns are {', '.join(known)})"
    return fault("data", f"columns.{role}", template, expected, hint or "Put the column's name in braces")


def _fill(role: str, template: str, fields: _Fields) -> str:
    parts: list[str] = []
    names = 0
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        names += 1
        if name not in fields.values:
            known = ", ".join(map(str, fields.values))
            hint = nearest(name, map(str, fields.values))
            raise Fault("columns", template, f"names of this record's columns ({known}), not {name!r}", hint)
        value = fields.get(name)
        if isinstance(value, dict | list):
            raise Fault(name, value, f"text or a number for a template, not {_type_name(value)}")
        parts.append("" if value is None else str(value))
    # Every record would say the same words, or those that are a column's name.
    if not names and (role != "system" or template in fields.values):
        raise DataError(_names_no_column(role, template, fields))
    return "".join(parts)


def _from_turns(fields: _Fields, shape: Shape) -> Conversation:
    """Return a conversation that was assembled from rows; a row that belongs to none is unchanged."""
    if "messages" not in fields.values:
        name = dict(shape.columns)["conversation"][1:-1]
        todo = "Fill it in, or remove the row"
        raise Fault(name, fields.values.get(name), "the id of the conversation that the row belongs to", todo)
    return _from_messages(fields, shape)


_READERS: dict[str, Callable[[_Fields, Shape], Conversation]] = {
    "columns": _from_columns,
    "turns": _from_turns,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}


def _check(conversation: Conversation) -> None:
    answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise Fault("roles", roles, "at least one turn of the assistant", "Add an answer or remove the record")
    if len(conversation.untrained) == len(answers):
        raise Fault("weight", 0, "at least one turn of the assistant with weight 1", "Remove the record")


# ---------------------------------------------------------------------------------------------------- prompts


def prompt_of(record: Record, where: str) -> Conversation:
    """Return the turns of a record up to the assistant's next one, as the readers of training data do.

    Those want an answer at the end, so a record without one gets a stand-in, which is taken off again. What says
    whether a record is trained on does not matter here.

    Raises:
        Fault: The record cannot be read.
        DataError: It has none of the shapes.
    """
    given = parse_line(record) if isinstance(record, bytes) else record
    if not isinstance(given, dict):
        raise Fault("record", given, "an object with named fields")
    fields = {key: value for key, value in given.items() if key not in ("label", *_LOSS_FLAGS, *_MASK_FLAGS)}
    for name in ("messages", "conversations", "conversation"):
        if isinstance(fields.get(name), list) and fields[name]:
            fields[name] = [*fields[name], {"role": "assistant", "content": _STAND_IN}]
    found = _shape_of(fields)
    if found is None or found.name == "text":
        for asked, answer in (*_PAIRS[:1], ("instruction", "output"), *_PAIRS):
            if fields.get(asked) is not None and fields.get(answer) is None:
                fields[answer] = _STAND_IN
                break
    shape = detect([fields], where)
    if shape.name == "turns":
        raise DataError(_one_turn_a_record(fields, where))
    conversation = shape._read(_Fields(fields))
    if conversation.is_text:
        raise Fault("record", "text", "messages, conversations, instruction, or a prompt")
    while conversation.messages and conversation.messages[-1]["role"] == "assistant":
        conversation.messages.pop()
    if not conversation.messages:
        raise Fault("roles", "assistant", "a turn of the user, a tool or the system to answer", "Add the question")
    return conversation


_STAND_IN = "-"
