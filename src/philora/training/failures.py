"""Turn errors of libraries in a run into one message with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from philora.errors import PhiloraError, RunError, fault
from philora.files import checkpoint
from philora.kernels.memory import out_of_memory
from philora.runtime import processes


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Explain a lost process, an out-of-memory error and a full disk; other errors pass unchanged.

    Raises:
        RunError: The failure in this block, with what to do.
    """
    try:
        yield
    except PhiloraError:
        raise
    except Exception as error:
        message = _message(error, folder)
        if message is None:
            raise
        raise RunError(message) from error


def _message(error: Exception, folder: Path) -> str | None:
    then = checkpoint.how_to_continue(folder / "checkpoints")
    if processes.lost(error):
        expected = "every process to continue, but another one has ended"
        todo = f"Look for its message, or for what ended it (memory, a signal); then {then}"
        return fault("run", "processes", processes.count(), expected, todo)
    if out_of_memory(error):
        todo = "Lower max_length or the batch sizes, or quantise the base (model.quantization: nf4)"
        found = " ".join(str(error).split())[:300] or type(error).__name__
        return fault("run", "memory", found, "memory for the model and its batches", todo)
    if checkpoint.disk_full(error):
        todo = f"Free some space ({checkpoint.free_bytes(folder):,} bytes are free), then {then}"
        return fault("run", "output_dir", str(folder), f"free space to write to it: {error}", todo)
    return None
