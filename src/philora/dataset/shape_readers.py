"""Read a record of a known shape as a conversation."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from philora.dataset.messages import TEXT_ROLE, Conversation, Message, conversation_of, system_of, tools_of, with_system
from philora.dataset.record_fields import Fields, is_empty, text_of, type_name
from philora.dataset.records import Fault
from philora.errors import DataError, fault, nearest

# Names of a question and its answer, most specific first.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction", "response"),
    ("user", "assistant"),
    ("input", "output"),
)
# Fields with the text that a question is about.
_MATERIAL_NAMES = ("input", "context")


def read(fields: Fields, shape: str, columns: Sequence[tuple[str, str]]) -> Conversation:
    """Return the conversation of a record.

    Args:
        fields: The fields of the record.
        shape: The name of its shape.
        columns: Templates by name, of the shapes `columns` and `turns`.

    Raises:
        Fault: The record has no conversation of this shape.
        DataError: A template names no column.
    """
    if shape == "columns":
        return _from_columns(fields, dict(columns))
    if shape == "turns":
        return _from_turns(fields, dict(columns))
    return _READERS[shape](fields)


def _from_messages(fields: Fields) -> Conversation:
    return with_system(conversation_of(fields.needed("messages"), "messages", fields), fields)


def _from_sharegpt(fields: Fields) -> Conversation:
    singular = fields.values.get("conversations") is None and "conversation" in fields.values
    name = "conversation" if singular else "conversations"
    return with_system(conversation_of(fields.needed(name), name, fields), fields)


def _pair(user: str, assistant: Any, name: str, system: str | None = None, history: Any = None) -> Conversation:
    messages: list[Message] = []
    if system is not None and system.strip():
        messages.append({"role": "system", "content": system})
    for past in history or ():
        if not (isinstance(past, list | tuple) and len(past) == 2):
            raise Fault("history", past, "pairs of question and answer")
        messages += [
            {"role": "user", "content": text_of(past[0], "history")},
            {"role": "assistant", "content": _answer(past[1], "history")},
        ]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": _answer(assistant, name)}]
    return Conversation(messages)


def _answer(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text.strip():
        raise Fault(name, text, "an answer that is not empty", "Write the answer or remove the record")
    return text


def _from_prompt_completion(fields: Fields) -> Conversation:
    first, second = next((pair for pair in PAIRS if fields.filled(pair)), PAIRS[0])
    prompt, completion = fields.needed(first), fields.needed(second)
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answered = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        both = conversation_of(asked + answered, f"{first}+{second}", fields, prompt_turns=len(asked))
        return with_system(both, fields)
    return _from_names(fields, first, second)


def _from_names(fields: Fields, first: str, second: str) -> Conversation:
    """Return a question and its answer, with the record's material, system turn, earlier turns and tools."""
    user = text_of(fields.needed(first), first)
    for name in _MATERIAL_NAMES:
        if name in (first, second) or is_empty(fields.values.get(name)):
            continue
        material = text_of(fields.get(name), name)
        if material.strip() not in user:
            user = f"{user}\n{material}"
    conversation = _pair(user, fields.needed(second), second, system_of(fields), fields.get("history"))
    conversation.tools = tools_of(fields)
    return conversation


def _text(text: str) -> Conversation:
    if not text.strip():
        raise Fault("text", text, "text that is not empty", "Remove the record")
    return Conversation([{"role": TEXT_ROLE, "content": text}])


def _from_columns(fields: Fields, columns: Mapping[str, str]) -> Conversation:
    system = _fill("system", columns["system"], fields) if "system" in columns else None
    if "messages" in columns:
        name = columns["messages"].strip("{}")
        if name not in fields.values:
            raise DataError(_no_column("messages", columns["messages"], fields))
        return with_system(conversation_of(fields.needed(name), name, fields), fields, system)
    if "text" in columns:
        return _text(_fill("text", columns["text"], fields))
    user = _fill("user", columns["user"], fields) if "user" in columns else ""
    system = system or system_of(fields)
    conversation = _pair(user, _fill("assistant", columns["assistant"], fields), "assistant", system)
    if "user" not in columns:
        conversation.messages = [message for message in conversation.messages if message["role"] != "user"]
    conversation.tools = tools_of(fields)
    return conversation


def _no_column(role: str, template: str, fields: Fields) -> str:
    known = [str(key) for key in fields.values]
    hint = f"Did you mean '{{{template}}}'?" if template in known else nearest(template.strip("{}"), known)
    expected = f"a template with the name of a column in braces (the columns are {', '.join(known)})"
    return fault("data", f"columns.{role}", template, expected, hint or "Put the column's name in braces")


def _fill(role: str, template: str, fields: Fields) -> str:
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
            raise Fault(name, value, f"text or a number for a template, not {type_name(value)}")
        parts.append("" if value is None else str(value))
    # The text would be the same in every record, or a column's name without braces.
    if not names and (role != "system" or template in fields.values):
        raise DataError(_no_column(role, template, fields))
    return "".join(parts)


def _from_turns(fields: Fields, columns: Mapping[str, str]) -> Conversation:
    """Return a conversation that was assembled from rows; a row that belongs to none is unchanged."""
    if "messages" not in fields.values:
        name = columns["conversation"][1:-1]
        todo = "Fill it in, or remove the row"
        raise Fault(name, fields.values.get(name), "the id of the conversation that the row belongs to", todo)
    return _from_messages(fields)


_READERS: dict[str, Callable[[Fields], Conversation]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": lambda fields: _from_names(fields, "instruction", "output"),
    "prompt_completion": _from_prompt_completion,
    "text": lambda fields: _text(text_of(fields.needed("text"), "text")),
}
