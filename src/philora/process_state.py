"""What a run sets for its whole process: memory, products and the network, which other code in the process shares.

A run is a command of the command line, or `philora.train`. A call of the library (`optimize`, `get_peft_model`,
`load_adapter`, a merge, ...) leaves the process as it is; what it would set asks `is_run` first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_runs = 0


@contextmanager
def run() -> Iterator[None]:
    """In this block the process belongs to a run."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1


def is_run() -> bool:
    """Whether the process belongs to a run now."""
    return _runs > 0
