"""Find the system turn that most conversations begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from philora.configuration.sections import DataConfig
from philora.dataset.arrangement import join_leading_system
from philora.dataset.prepare import PreparedData, shape_of
from philora.dataset.read import resolve
from philora.dataset.records import Fault
from philora.dataset.store import recognised
from philora.models.run_folder import SystemTurn

LOOKED_AT = 10_000
"""Conversations that are counted, spread evenly over the training set."""


def commonest_system_turn(prepared: PreparedData, data: DataConfig) -> SystemTurn | None:
    """Return the commonest system turn at the beginning of the training conversations; None if there is none.

    Args:
        prepared: The data of a run.
        data: Its sources. If the template drops system turns, which are then part of the user's, they are read again.
    """
    rows = prepared.train_conversations
    folded = "train" in prepared.report.splits and prepared.report.train.folded_system
    step = max(1, -(-len(rows) // LOOKED_AT))
    conversations = _as_given(data) if folded else (rows[place] for place in range(0, len(rows), step))
    first = [next(iter(join_leading_system(messages)), {"role": "", "content": ""}) for messages in conversations]
    counted = Counter(str(item["content"]) for item in first if item["role"] == "system" and item["content"])
    if not counted:
        return None
    ((text, count),) = counted.most_common(1)
    return SystemTurn(text, count / len(first))


def _as_given(data: DataConfig) -> Iterator[list[dict[str, Any]]]:
    """Yield conversations as their sources have them, with their system turns; the first ones of every source."""
    for config in data.train:
        source, shape = recognised(resolve(config, "train"), shape_of(data, config))
        records = (record for batch in source.open() for record in batch.records)
        for record in islice(records, LOOKED_AT):
            try:
                yield shape.read(record).messages
            except Fault:
                continue
