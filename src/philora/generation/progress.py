"""Report the progress of scoring and generation to a listener, such as the progress bar of a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Called with what is counted (`rows scored`, `answers`), how many are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("philora_progress", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report all progress within the block to a function."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def advance(what: str, done: int, total: int) -> None:
    """Report to the listener, if there is one, how many of `total` are done."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)
