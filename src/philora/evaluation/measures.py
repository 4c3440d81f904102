"""Compute figures of two models on the same examples, with the interval of their difference.

    a row of sums for every example and model -> added up over the examples -> one figure
    the same examples, drawn repeatedly       -> added up -> the spread of the difference

A figure is a function of sums: the loss is the summed loss over the summed tokens, ROUGE is a mean, and sacrebleu
computes BLEU and chrF from n-gram counts. So one bootstrap serves all of them, and BLEU and chrF are corpus scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from philora.compat.sacrebleu import score_of, statistics_of
from philora.errors import ConfigError, fault

RESAMPLES = 2000
"""Draws of the bootstrap: the ends of a 95% interval then rest on 50 draws each."""

SEED = 2024
"""Seed of the bootstrap: the same examples give the same interval."""

OVERLAP = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
"""Measures of common words, and the packages that they need."""

INSTALL = "pip install 'philora[evaluation]'"

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """A figure and how it is computed.

    Attributes:
        field: Its key in results.
        title: Its display name.
        higher_is_better: Whether a higher value is better.
        percent: Whether it is a share that is shown as a percentage.
        digits: Decimals that are shown.
        figure: Computes the figure from sums over examples.
    """

    field: str
    title: str
    higher_is_better: bool
    percent: bool
    figure: Callable[[Sums], float]
    digits: int = 3


@dataclass(frozen=True)
class Paired:
    """One figure of two models on the same examples.

    Attributes:
        field: The measure's key in results.
        title: The measure's display name.
        before: The base's figure.
        after: The adapter's figure.
        low: Lower end of the 95% interval of `after - before`; None with fewer than two examples.
        high: Its upper end.
        wins: Examples on which the adapter is better than the base.
        ties: Examples on which both are equal.
        losses: Examples on which it is worse.
        higher_is_better: As in the measure.
        percent: As in the measure.
        digits: As in the measure.
    """

    field: str
    title: str
    before: float
    after: float
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int
    higher_is_better: bool = True
    percent: bool = False
    digits: int = 3

    @property
    def examples(self) -> int:
        """Return the number of examples that were compared."""
        return self.wins + self.ties + self.losses

    @property
    def verdict(self) -> str:
        """Return `better`, `worse`, or `unclear` if the interval contains 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Paired:
        """Read what `to_dict` wrote; what is missing or null becomes NaN, or 0 for a count."""
        known = {field.name for field in fields(cls)}
        numbers = {name: math.nan if values.get(name) is None else values[name] for name in ("before", "after")}
        return cls(**({name: value for name, value in values.items() if name in known} | numbers))


def mean(sums: Sums) -> float:
    """Return the first sum over the second."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


LOSS = Measure("loss", "Loss", False, False, mean)
PERPLEXITY = Measure("perplexity", "Perplexity", False, False, lambda sums: exp_or_inf(mean(sums)))
TOKEN_ACCURACY = Measure("token_accuracy", "Token accuracy", True, True, mean)
EXACT_MATCH = Measure("exact_match", "Exact match", True, True, mean)
JUDGE = Measure("judge", "Judge", True, False, mean, digits=2)


def of_means(values: Sequence[float], weights: Sequence[float] | None = None) -> Sums:
    """Return the sums whose `mean` is the weighted mean of values. Shapes: returns (n, 2)."""
    weights = [1.0] * len(values) if weights is None else weights
    return np.column_stack([np.asarray(values, float), np.asarray(weights, float)])


def paired(measure: Measure, before: Sums, after: Sums) -> Paired:
    """Compare two models on the same examples.

    The interval is that of the paired percentile bootstrap: examples are drawn with replacement, with the sums of both
    models together, and the 2.5th and 97.5th percentiles of the difference are its ends. It covers the choice of the
    examples, and not the variation between seeds of training.

    Args:
        measure: The figure.
        before: A row of sums for every example.
        after: The same for the other model.

    Shapes:
        before and after (n, k).

    Source:
        Koehn, "Statistical Significance Tests for Machine Translation Evaluation" (2004); Efron and Tibshirani, "An
        Introduction to the Bootstrap" (1993), chapter 13.
    """
    ones = [(measure.figure(a), measure.figure(b)) for a, b in zip(before, after, strict=True)]
    sign = 1 if measure.higher_is_better else -1
    gains = [sign * (b - a) for a, b in ones]
    same = [math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in ones]
    low, high = _interval(measure.figure, before, after)
    return Paired(
        measure.field,
        measure.title,
        measure.figure(before.sum(0)),
        measure.figure(after.sum(0)),
        low,
        high,
        wins=sum(gain > 0 and not tie for gain, tie in zip(gains, same, strict=True)),
        ties=sum(same),
        losses=sum(gain < 0 and not tie for gain, tie in zip(gains, same, strict=True)),
        higher_is_better=measure.higher_is_better,
        percent=measure.percent,
        digits=measure.digits,
    )


def _interval(figure: Callable[[Sums], float], before: Sums, after: Sums) -> tuple[float | None, float | None]:
    count = len(before)
    if count < 2:
        return None, None
    generator = np.random.default_rng(SEED)
    differences = []
    step = max(1, min(RESAMPLES, 2**22 // count))  # draws at a time, to bound the memory
    for start in range(0, RESAMPLES, step):
        times = generator.multinomial(count, np.full(count, 1 / count), min(step, RESAMPLES - start)).astype(float)
        differences += [figure(b) - figure(a) for a, b in zip(times @ before, times @ after, strict=True)]
    finite = [difference for difference in differences if math.isfinite(difference)]
    if len(finite) < len(differences):
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


# -- common words


def choose(asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the measures of common words to compute, and those whose package is missing.

    Args:
        asked: Names of `OVERLAP`; None: all that can be computed.

    Raises:
        ConfigError: A name is unknown, or a named measure needs a package that is not installed.
    """
    unknown = [entry for entry in asked or () if entry not in OVERLAP]
    if unknown:
        raise ConfigError(fault("evaluate", "metrics", unknown[0], f"some of {', '.join(OVERLAP)}"))
    wanted = list(OVERLAP if asked is None else dict.fromkeys(asked))
    missing = [entry for entry in wanted if not _installed(OVERLAP[entry])]
    if missing and asked is not None:
        expected = f"the package {OVERLAP[missing[0]].replace('_', '-')}, which is not installed"
        raise ConfigError(fault("evaluate", "metrics", missing[0], expected, INSTALL))
    return [entry for entry in wanted if entry not in missing], missing


def _installed(package: str) -> bool:
    """Return whether a package can be imported, and not only found: it may be installed incompletely."""
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def overlap(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[tuple[Measure, Sums]]:
    """Return sums of ROUGE, BLEU and chrF of answers against one reference each.

    ROUGE-1, -2, -L and -Lsum are the means of the F-measures of rouge-score with its stemmer, in percent; they count
    words of Latin letters and digits only. BLEU and chrF are sacrebleu's corpus scores with its defaults. For a single
    example BLEU leaves out orders without an n-gram.

    Returns:
        Measures with their sums, (n, k).

    Source:
        Lin, "ROUGE" (2004); Papineni et al., "BLEU" (2002); Popović, "chrF" (2015); Post, "A Call for Clarity" (2018).
    """
    found: list[tuple[Measure, Sums]] = []
    for name in names if answers else ():
        found += _rouge(answers, references) if name == "rouge" else [_from_sacrebleu(name, answers, references)]
    return found


def _rouge(answers: Sequence[str], references: Sequence[str]) -> list[tuple[Measure, Sums]]:
    from rouge_score.rouge_scorer import RougeScorer

    titles = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    scorer = RougeScorer(list(titles), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return [
        (Measure(key, title, True, False, mean, digits=1), of_means([100 * score[key].fmeasure for score in scores]))
        for key, title in titles.items()
    ]


def _from_sacrebleu(name: str, answers: Sequence[str], references: Sequence[str]) -> tuple[Measure, Sums]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric: Any = BLEU(effective_order=True) if name == "bleu" else CHRF()
    # A test compares these sums with `corpus_score`.
    sums = np.asarray(statistics_of(metric, answers, references), float)

    def figure(total: Sums) -> float:
        return score_of(metric, [int(count) for count in total])

    return Measure(name, "BLEU" if name == "bleu" else "chrF", True, False, figure, digits=1), sums


def exp_or_inf(value: float) -> float:
    """Return exp(value); infinity if that exceeds a float."""
    return math.exp(value) if value < 700 else math.inf
