"""Read the messages of a conversation: roles, texts, tool calls, the system turn, and turns without loss."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from philora.configuration.sections import TURN_ROLES
from philora.dataset.record_fields import (
    LOSS_FLAGS,
    MASK_FLAGS,
    Fields,
    flag,
    is_empty,
    refuse_unsupported,
    text_of,
    type_name,
)
from philora.dataset.records import Fault
from philora.errors import nearest

Message: TypeAlias = "dict[str, Any]"

TEXT_ROLE = "text"
"""The role of the single message of plain text; all of it is trained, without a chat template."""

_ALIASES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(
        ("tool", "tools", "observation", "function", "function_response", "tool_response", "ipython"), "tool"
    ),
}
# Keys that a template may read besides role and content.
_EXTRA_KEYS = ("name", "tool_calls", "tool_call_id", "tools", "reasoning_content", "thinking")
# Fields of a record with its system turn; the first one that has a value is used.
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")

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
    """Whether a user turn follows another one."""
    untrained: frozenset[int] = field(default_factory=frozenset)
    """Indices of assistant turns without loss: their `weight` is 0, or they belong to the prompt of a pair."""
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
        """Return whether messages have only role and content, so that a template's output depends on the roles."""
        return self.tools is None and all(len(message) == 2 for message in self.messages)


def system_of(fields: Fields) -> str | None:
    """Return the system turn of a record that has it in a field of its own."""
    for name in _SYSTEM_NAMES:
        if not is_empty(fields.values.get(name)):
            return text_of(fields.get(name), name)
    return None


def with_system(conversation: Conversation, fields: Fields, system: str | None = None) -> Conversation:
    """Return the conversation with the system turn of the record's own field in front."""
    system = system or system_of(fields)
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


def _list(value: Any, name: str, items: str) -> list[Any]:
    """Return a list; cells of CSV and some columns of Parquet hold it as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Fault(name, value, f"a list of {items} ({error})") from None
    if not isinstance(value, list):
        raise Fault(name, value, f"a list of {items}, not {type_name(value)}")
    return value


def _list_of_objects(value: Any, name: str, items: str) -> list[Any]:
    found = _list(value, name, items)
    for item in found:
        if not isinstance(item, dict):
            raise Fault(name, value, f"a list of {items}, but {type_name(item)} is in it")
    return found


def conversation_of(value: Any, name: str, fields: Fields, prompt_turns: int = 0) -> Conversation:
    """Return the conversation of a list of messages.

    Args:
        value: The list, or JSON of one.
        name: The field that holds it.
        fields: The fields of the record, for `tools`.
        prompt_turns: The number of turns that belong to a prompt and so have no loss.

    Raises:
        Fault: A message cannot be read.
    """
    value = _list(value, name, "messages")
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
    return Conversation(messages, tools_of(fields), two_user_turns, frozenset(untrained), tuple(sorted(unread)))


def _has_loss(turn: Mapping[str, Any], role: str, name: str) -> bool:
    """Return whether a turn's own flags leave the loss on it.

    Raises:
        Fault: A flag is neither true nor false, or asks for loss on a turn that is not the assistant's.
    """
    trained = True
    for key in (*LOSS_FLAGS, *MASK_FLAGS):
        if turn.get(key) is None:
            continue
        wanted = flag(f"{name}.{key}", turn[key]) != (key in MASK_FLAGS)
        if wanted and role != "assistant" and key != "weight" and key not in MASK_FLAGS:
            raise Fault(f"{name}.{key}", turn[key], "loss on turns of the assistant only", "Set it to false here")
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
    role = given if given in TURN_ROLES else _ALIASES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        hint = nearest(given.lower(), _ALIASES) if isinstance(given, str) else ""
        hint = hint or f"If every row is one message, give the role that it stands for: roles: {{{given}: user}}"
        raise Fault(f"{name}.role", given, f"one of {', '.join(TURN_ROLES)} or one of their aliases", hint)
    if isinstance(content, list):
        content = _joined_parts(content, f"{name}.{content_name}", unread)
    calls = len(turn) > 2 and turn.get("tool_calls")
    if len(turn) > 2:
        refuse_unsupported(Fields(turn), name)
        if calls:
            turn = {**turn, "tool_calls": _calls(calls, role, f"{name}.tool_calls")}
    if content is None:
        if not calls:
            raise Fault(f"{name}.{content_name}", None, "the text of the turn", "Add it or remove the record")
        content = ""
    if not isinstance(content, str):
        raise Fault(f"{name}.{content_name}", content, f"text, not {type_name(content)}")
    if role == "assistant" and not content.strip() and not calls:
        todo = "Write the answer or remove the record"
        raise Fault(f"{name}.{content_name}", content, "an answer that is not empty", todo)
    message = {"role": role, "content": content}
    if len(turn) > 2:
        for key in _EXTRA_KEYS:
            if not is_empty(turn.get(key)):
                listed = key == "tools" and not isinstance(turn[key], str)  # templates write it as it is
                message[key] = json.dumps(turn[key], ensure_ascii=False) if listed else turn[key]
        known = (role_name, content_name, *_EXTRA_KEYS, *LOSS_FLAGS, *MASK_FLAGS)
        unread.update(f"{key} of turns" for key, value in turn.items() if key not in known and not is_empty(value))
    return message


def _calls(calls: Any, role: str, name: str) -> list[Any]:
    found = _list_of_objects(calls, name, "tool calls")
    if role != "assistant":
        raise Fault(name, calls, "tool calls in turns of the assistant only", "Move them to the turn that makes them")
    return found


def _joined_parts(parts: list[Any], name: str, unread: set[str]) -> str:
    texts: list[str] = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise Fault(name, part, "text, or a list of parts of type text", "Pictures and sound are not trained on")
        texts.append(part["text"])
        unread.update(f"{key} of parts of turns" for key in part if key not in ("type", "text") and part[key])
    return "".join(texts)


def tools_of(fields: Fields) -> list[Any] | None:
    """Return the tool descriptions of a record; None if it has none.

    Raises:
        Fault: They are not a list of objects.
    """
    tools = fields.get("tools")
    if not tools:
        return None
    return _list_of_objects(tools, "tools", "tool descriptions") or None


def require_answer(conversation: Conversation) -> None:
    """Require a turn of the assistant that has a loss.

    Raises:
        Fault: There is none.
    """
    answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise Fault("roles", roles, "at least one turn of the assistant", "Add an answer or remove the record")
    if len(conversation.untrained) == len(answers):
        raise Fault("weight", 0, "at least one turn of the assistant with weight 1", "Remove the record")
