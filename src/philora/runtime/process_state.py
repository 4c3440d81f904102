"""Set and restore the state of the process for a run: memory, products and the network.

A run is a command of the command line, or `philora.train`. A call of the library (`optimize`, `get_peft_model`,
`load_adapter`, a merge, ...) does not change the process: code that would do so checks `is_run` first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_runs = 0


@contextmanager
def run() -> Iterator[None]:
    """Mark the process as a run's in this block."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1


def is_run() -> bool:
    """Return whether the process belongs to a run now."""
    return _runs > 0


@contextmanager
def quiet_libraries(*, bars: bool = False) -> Iterator[None]:
    """Turn off progress bars of transformers, datasets and the Hub's library, and transformers' infos, in this block.

    The earlier settings are restored afterwards.

    Args:
        bars: Do not change the bars of transformers and the Hub, for a person who waits for a download.
    """
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers

    level, enabled = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    no_hub_bars, no_dataset_bars = are_progress_bars_disabled(), datasets.are_progress_bars_disabled()
    transformers.set_verbosity_warning()
    if not bars:
        transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        if enabled and not bars:
            transformers.enable_progress_bar()
            if no_hub_bars:
                disable_progress_bars()
        elif not no_hub_bars and not bars:
            enable_progress_bars()
        if not no_dataset_bars:
            datasets.enable_progress_bars()
