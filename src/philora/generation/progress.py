"""How far a long evaluation is: whoever scores or generates tells it, whoever has a terminal shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with what is done (`rows scored`, `answers`), how many are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("philora_progress", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a function of all progress within the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def advance(what: str, done: int, total: int) -> None:
    """Tell whoever listens how many of `total` are done."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)
