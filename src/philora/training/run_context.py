"""Hold the facts of a run from before it loads weights, for all its parts."""

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


@dataclass(frozen=True)
class RunContext:
    """A run's configuration, folder, data and plan.

    Attributes:
        command: The command that the report shows.
        callbacks: Additional callbacks of the trainer.
        stop: Records a signal.
        started: Date and time of its start.
        began: Start by the monotonic clock, in seconds.
    """

    config: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedData
    plan: Plan
    command: str
    callbacks: list[TrainerCallback]
    stop: StopOnSignal
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    began: float = field(default_factory=time.monotonic)
