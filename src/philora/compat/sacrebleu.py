"""Give private names of sacrebleu public ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from philora.compat.private_names import PrivateName

_WHY = "corpus_score keeps no statistics by example, which the bootstrap resamples"

PRIVATE = (
    PrivateName("sacrebleu.metrics.base.Metric._extract_corpus_statistics", "statistics of each example", _WHY),
    PrivateName("sacrebleu.metrics.base.Metric._compute_score_from_stats", "the score of summed statistics", _WHY),
)


def statistics_of(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Any:
    """Return the statistics of every answer, as sacrebleu's own significance tests take them."""
    return metric._extract_corpus_statistics(list(answers), [list(references)])


def score_of(metric: Any, total: Sequence[int]) -> float:
    """Return the score of statistics that were summed over examples."""
    return float(metric._compute_score_from_stats(list(total)).score)
