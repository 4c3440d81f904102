"""Read the fields of one record, and refuse those that cannot be ignored without changing its meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from philora.dataset.records import Fault
from philora.errors import nearest

# True means that a turn has a loss; for masks, that it has none.
LOSS_FLAGS = ("weight", "loss", "train", "training", "trainable")
MASK_FLAGS = ("mask", "masked")
# Values of `label` beside an answer that is not to be learned.
BAD_LABELS = ("false", "bad", "rejected", "thumbs_down", "thumbs down", "dislike")
# A text model cannot read these, and the text may be about them.
_MEDIA_NAMES = ("image", "images", "video", "videos", "audio", "audios", "input_audio")
# Older fields of tool calls, which no chat template reads.
_OLD_CALLS = ("function_call", "functions")
_PARTS_OF_LOSS = ("train_detail", "loss_mask", "loss_weight")
_REFUSED = frozenset((*_MEDIA_NAMES, *_OLD_CALLS, *_PARTS_OF_LOSS))


class Fields:
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
        """Return the names of fields that have a value and were not read."""
        if len(self.values) <= len(self.read) and self.values.keys() <= self.read:
            return ()
        return tuple(str(key) for key, value in self.values.items() if key not in self.read and not is_empty(value))


def is_empty(value: Any) -> bool:
    """Return whether a value holds no text and no items."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def text_of(value: Any, name: str) -> str:
    """Return a value that has to be text.

    Raises:
        Fault: It is not.
    """
    if not isinstance(value, str):
        number = isinstance(value, int | float) and value == value
        todo = f'Write it in quotes, or set columns, which read numbers as text: "{{{name}}}"' if number else ""
        raise Fault(name, value, f"text, not {type_name(value)}", todo)
    return value


def type_name(value: Any) -> str:
    """Return the name of a value's type, as JSON has it."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def refuse_unsupported(values: Fields, where: str) -> None:
    """Refuse fields that cannot be left out without changing what a record means.

    Args:
        values: The fields of a record or of a turn.
        where: The name of the turn; empty for a record.

    Raises:
        Fault: One of them has a value.
    """
    for name in values.values.keys() & _REFUSED:
        if is_empty(values.values[name]):
            continue
        place = f"{where}.{name}" if where else name
        if name in _MEDIA_NAMES:
            todo = "Remove the field if the text is meant to be trained without it, or the record if it is not"
            raise Fault(place, values.values[name], "no pictures, video or sound beside the text", todo)
        if name in _OLD_CALLS:
            todo = "Write the calls as tool_calls of the turn and the descriptions as tools of the record"
            raise Fault(place, values.values[name], "tool calls in the current format (tool_calls)", todo)
        todo = "Remove it, or set weight: 0 on the turns without loss"
        raise Fault(place, values.values[name], "loss on complete turns, not on parts of them", todo)


def flag(name: str, value: Any) -> bool:
    """Return the value of a flag that turns the loss on or off.

    Raises:
        Fault: It is neither true nor false.
    """
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    text = str(value).strip().lower()
    if text not in known:
        expected = "0 (no loss on this turn) or 1" if name.endswith("weight") else "true or false (false: no loss)"
        if name.rpartition(".")[2] in MASK_FLAGS:
            expected = "true or false (true: no loss)"
        raise Fault(name, value, expected, "A turn counts in full or not at all")
    return known[text]
