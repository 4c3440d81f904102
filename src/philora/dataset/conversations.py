"""Read normalised conversations from disk, one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, overload

from philora.dataset.arrangement import with_tools
from philora.dataset.datasets_library import quiet_datasets
from philora.dataset.messages import Message


class Conversations(Sequence[list[Message]]):
    """Read normalised conversations from disk, one at a time."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> list[Message]: ...

    @overload
    def __getitem__(self, index: slice) -> Conversations: ...

    def __getitem__(self, index: int | slice) -> list[Message] | Conversations:
        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            if isinstance(self._stored, list):
                return Conversations([self._stored[item] for item in chosen])
            with quiet_datasets():
                return Conversations(self._stored.select(chosen))
        return with_tools(*self._parsed(index))

    def stored(self, index: int) -> str:
        """Return a conversation as the JSON that is stored and hashed."""
        row = self._stored[index]
        text = row if isinstance(row, str | bytes) else row["conversation"]
        return text if isinstance(text, str) else text.decode()

    def tools(self, index: int) -> list[Any] | None:
        """Return the tool descriptions of a conversation, for the chat template."""
        return self._parsed(index)[1]

    def _parsed(self, index: int) -> tuple[list[Message], list[Any] | None]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        value = json.loads(self.stored(index))
        return (value["messages"], value["tools"]) if isinstance(value, dict) else (value, None)
