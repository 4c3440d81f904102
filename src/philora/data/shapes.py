"""Records of every accepted shape become conversations: lists of messages with role and content."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from philora.data.read import Fault, Record, parse_line
from philora.errors import DataError, fault, nearest

Message: TypeAlias = "dict[str, Any]"

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text")
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

# Pairs of names that stand for a question and its answer, most telling first.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("user", "assistant"),
    ("input", "output"),
)
_COLUMN_KEYS = ("system", "user", "assistant", "prompt", "completion", "text", "messages")


# Lines that open a turn in records that are one text: a model's markup, or words such as "user" and "### Response:".
_USER_LINE = re.compile(r"^[#\s]*(?:<\|(?:im_start\|>)?user|(?:user|human|instruction)[ \t]*(?::|$))", re.I | re.M)
_ANSWER_LINE = re.compile(
    r"^[#\s]*(?:<\|(?:im_start\|>)?assistant|(?:assistant|gpt|response|answer)[ \t]*(?::|$))", re.I | re.M
)


@dataclass(slots=True)
class Conversation:
    """One normalised record."""

    messages: list[Message]
    tools: list[Any] | None = None
    two_user_turns: bool = False
    """Two user turns stand in a row somewhere."""
    untrained: frozenset[int] = field(default_factory=frozenset)
    """Assistant turns whose `weight` is 0: context without loss."""

    @property
    def is_text(self) -> bool:
        """Plain text, without roles."""
        return bool(self.messages[0]["role"] == TEXT_ROLE)

    @property
    def has_turns_as_text(self) -> bool:
        """Plain text in which somebody wrote turns of user and assistant, so that all of them are trained on."""
        text = self.messages[0]["content"]
        return self.is_text and bool(_USER_LINE.search(text) and _ANSWER_LINE.search(text))

    @property
    def is_plain(self) -> bool:
        """Nothing but role and content, so the roles alone say how a template arranges it."""
        return self.tools is None and all(len(message) == 2 for message in self.messages)


@dataclass(frozen=True)
class Shape:
    """How the records of one source are read: a name for the report, and the columns when they are given."""

    name: str
    columns: tuple[tuple[str, str], ...] = ()

    def read(self, record: Record) -> Conversation:
        """Normalise one record.

        Raises:
            Fault: the record cannot be trained on.
        """
        fields = parse_line(record) if isinstance(record, bytes) else record
        if not isinstance(fields, dict):
            raise Fault("record", fields, "an object with named fields")
        conversation = _READERS[self.name](fields, self) if not self.columns else _from_columns(fields, self)
        if not conversation.is_text:
            _check(conversation)
        return conversation


def detect(records: Sequence[Record], where: str) -> Shape:
    """The shape of a source from its first records.

    Raises:
        DataError: none of them looks like an accepted shape.
    """
    seen: dict[str, Any] = {}
    for record in records:
        try:
            fields = parse_line(record) if isinstance(record, bytes) else record
        except Fault:
            continue
        seen = seen or fields
        name = _shape_of(fields)
        if name:
            return Shape(name)
    if not seen:
        # Nothing could be parsed: reading in any shape reports each line.
        return Shape("messages")
    names = ", ".join(sorted(map(str, seen))[:20])
    raise DataError(
        fault(
            where,
            "fields",
            names,
            "messages, conversations, instruction and output, prompt and completion, or text",
            'Say which column is which with columns, such as {user: "{question}", assistant: "{answer}"}, '
            "if the names are others",
        )
    )


def _shape_of(fields: Mapping[str, Any]) -> str | None:
    filled = {key for key, value in fields.items() if value is not None}
    if "messages" in filled:
        return "messages"
    if "conversations" in filled or "conversation" in filled:
        return "sharegpt"
    if {"instruction", "output"} <= filled:
        return "alpaca"
    if any(set(pair) <= filled for pair in _PAIRS):
        return "prompt_completion"
    return "text" if "text" in filled else None


def shape_from_config(format_name: str | None, columns: Mapping[str, str] | None, where: str) -> Shape | None:
    """The shape that the configuration gives; None where it is to be detected.

    Raises:
        DataError: the format or a column key is unknown, or the columns give no answer.
    """
    if columns:
        for key, template in columns.items():
            if key not in _COLUMN_KEYS:
                todo = nearest(key, _COLUMN_KEYS)
                raise DataError(fault(where, f"columns.{key}", template, f"one of {', '.join(_COLUMN_KEYS)}", todo))
            try:
                list(string.Formatter().parse(template))
            except (ValueError, TypeError) as error:
                expected = f"a template such as '{{instruction}}' ({error})"
                raise DataError(fault(where, f"columns.{key}", template, expected)) from None
        if not {"assistant", "completion", "text", "messages"} & set(columns):
            expected = "a template for assistant (or completion, text or messages)"
            raise DataError(fault(where, "columns", dict(columns), expected, "Add one"))
        roles = {"prompt": "user", "completion": "assistant"}
        return Shape("columns", tuple((roles.get(key, key), template) for key, template in columns.items()))
    if format_name in (None, "auto"):
        return None
    if format_name not in FORMATS:
        todo = nearest(str(format_name), FORMATS)
        raise DataError(fault(where, "format", format_name, f"one of {', '.join(FORMATS)}", todo))
    return Shape(str(format_name))


# ---------------------------------------------------------------------------------------------------- readers


def _needed(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None:
        names = ", ".join(str(key) for key in fields if fields[key] is not None)
        raise Fault("record", names, f"a field {name!r}", nearest(name, map(str, fields)))
    return value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Fault(name, value, f"text, not {_type_name(value)}")
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _from_messages(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    return _from_list(_needed(fields, "messages"), "messages", fields)


def _from_sharegpt(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    name = "conversation" if fields.get("conversations") is None and "conversation" in fields else "conversations"
    conversation = _from_list(_needed(fields, name), name, fields)
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and conversation.messages[0]["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": system})
        conversation.untrained = frozenset(index + 1 for index in conversation.untrained)
    return conversation


def _from_list(value: Any, name: str, fields: Mapping[str, Any]) -> Conversation:
    if isinstance(value, str):  # CSV cells and some Parquet columns hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Fault(name, value, f"a list of messages ({error})") from None
    if not isinstance(value, list):
        raise Fault(name, value, f"a list of messages, not {_type_name(value)}")
    messages: list[Message] = []
    untrained: set[int] = set()
    previous = None
    two_user_turns = False
    for index, each in enumerate(value):
        message = _message(each, f"{name}[{index}]")
        role = message["role"]
        if role == "user" and previous == "user":
            two_user_turns = True
        if role == "system" and not message["content"].strip() and "tools" not in message:
            continue
        if role == "assistant" and "weight" in each and each["weight"] is not None:
            if each["weight"] not in (0, 1):
                raise Fault(f"{name}[{index}].weight", each["weight"], "0 (no loss on this turn) or 1")
            if each["weight"] == 0:
                untrained.add(len(messages))
        previous = role
        messages.append(message)
    if not messages:
        raise Fault(name, value, "at least one turn of the user and one of the assistant")
    return Conversation(messages, _tools(fields), two_user_turns, frozenset(untrained))


def _message(each: Any, name: str) -> Message:
    if not isinstance(each, dict):
        raise Fault(name, each, "an object with role and content")
    if "role" in each and each["role"] is not None:
        given, content = each["role"], each.get("content")
        content_name = "content"
    elif "from" in each and each["from"] is not None:
        given, content = each["from"], each.get("value")
        content_name = "value"
    else:
        raise Fault(name, ", ".join(map(str, each)), "role and content, or from and value", "Add the role")
    role = given if given in _PLAIN_ROLES else _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        hint = nearest(given.lower(), _ROLES) if isinstance(given, str) else ""
        raise Fault(f"{name}.role", given, f"one of {', '.join(_PLAIN_ROLES)} or an alias of theirs", hint)
    if isinstance(content, list):
        content = _joined_parts(content, f"{name}.{content_name}")
    calls = len(each) > 2 and each.get("tool_calls")
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
    if len(each) > 2:
        for key in _EXTRA_KEYS:
            if each.get(key) is not None:
                message[key] = each[key]
    return message


def _joined_parts(parts: list[Any], name: str) -> str:
    texts: list[str] = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise Fault(name, part, "text, or a list of parts of type text", "Pictures and sound are not trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tools(fields: Mapping[str, Any]) -> list[Any] | None:
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


def _pair(user: str, assistant: Any, name: str, system: Any = None, history: Any = None) -> Conversation:
    messages: list[Message] = []
    if isinstance(system, str) and system.strip():
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


def _from_alpaca(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    user = _string(_needed(fields, "instruction"), "instruction")
    extra = fields.get("input")
    if extra is not None and _string(extra, "input").strip():
        user = f"{user}\n{extra}"
    return _pair(user, _needed(fields, "output"), "output", fields.get("system"), fields.get("history"))


def _from_prompt_completion(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    first, second = next((pair for pair in _PAIRS if all(fields.get(name) is not None for name in pair)), _PAIRS[0])
    prompt, completion = _needed(fields, first), _needed(fields, second)
    if isinstance(prompt, list) or isinstance(completion, list):
        as_list = [
            value if isinstance(value, list) else [{"role": role, "content": value}]
            for value, role in ((prompt, "user"), (completion, "assistant"))
        ]
        return _from_list(as_list[0] + as_list[1], f"{first}+{second}", fields)
    conversation = _pair(_string(prompt, first), completion, second, fields.get("system"))
    conversation.tools = _tools(fields)
    return conversation


def _from_text(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    return _text(_string(_needed(fields, "text"), "text"))


def _text(text: str) -> Conversation:
    if not text.strip():
        raise Fault("text", text, "text that is not empty", "Remove the record")
    return Conversation([{"role": TEXT_ROLE, "content": text}])


def _from_columns(fields: Mapping[str, Any], shape: Shape) -> Conversation:
    columns = dict(shape.columns)
    if "messages" in columns:
        name = columns["messages"].strip("{}")
        return _from_list(_needed(fields, name), name, fields)
    if "text" in columns:
        return _text(_fill(columns["text"], fields))
    user = _fill(columns["user"], fields) if "user" in columns else ""
    system = _fill(columns["system"], fields) if "system" in columns else None
    conversation = _pair(user, _fill(columns["assistant"], fields), "assistant", system)
    if "user" not in columns:
        conversation.messages = [message for message in conversation.messages if message["role"] != "user"]
    conversation.tools = _tools(fields)
    return conversation


def _fill(template: str, fields: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        if name not in fields:
            known = ", ".join(map(str, fields))
            hint = nearest(name, map(str, fields))
            raise Fault("columns", template, f"names of this record's columns ({known}), not {name!r}", hint)
        value = fields[name]
        if isinstance(value, dict | list):
            raise Fault(name, value, f"text or a number for a template, not {_type_name(value)}")
        parts.append("" if value is None else str(value))
    return "".join(parts)


_READERS: dict[str, Callable[[Mapping[str, Any], Shape], Conversation]] = {
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
