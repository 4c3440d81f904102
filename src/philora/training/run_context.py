"""The facts of a run before it loads weights; all its parts read them."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainerCallback

from philora.configuration.sections import Config
from philora.dataset import PreparedData
from philora.planning.plan import Plan
from philora.runtime.signals import StopOnSignal


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class RunContext:
    """A run's configuration, folder and data, and what was planned for it.

    Attributes:
        command: What the report names as the command.
        callbacks: Further callbacks of the trainer.
        stop: Where a signal is noted.
        started: When it began, for people.
        began: When it began, by a clock that nobody sets, in seconds.
    """

    config: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedData
    plan: Plan
    command: str
    callbacks: list[TrainerCallback]
    stop: StopOnSignal
    started: datetime.datetime = field(default_factory=_now)
    began: float = field(default_factory=time.monotonic)
