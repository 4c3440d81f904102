"""Figures with intervals: held to closed forms, to the libraries' own scores, and to messages of what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from philora.errors import ConfigError
from philora.evaluation import measures
from philora.evaluation.measures import EXACT_MATCH, LOSS, PERPLEXITY, Paired, choose, of_means, overlap, paired

ANSWERS = [
    "Run `philora merge RUN --out DIR` and you get one folder.",
    "It's the width of the update.",
    "No.",
    "",
    "The report stands in the run folder, as report.html",
]
REFERENCES = [
    "Use `philora merge RUN --out DIR`; the result is one merged folder.",
    "The rank is the width of the update.",
    "No, it does not.",
    "Yes.",
    "The report stands in the run folder, as report.html",
]


def test_figures_are_those_of_sums_and_not_means_of_figures():
    before, after = of_means([10.0, 1.0], [10, 2]), of_means([5.0, 2.0], [10, 2])
    found = paired(LOSS, before, after)
    assert (found.before, found.after) == (pytest.approx(11 / 12), pytest.approx(7 / 12))
    assert (found.wins, found.ties, found.losses) == (1, 0, 1)
    found = paired(PERPLEXITY, before, after)
    assert found.after == pytest.approx(math.exp(7 / 12))


def test_the_interval_is_that_of_the_normal_law_for_many_examples():
    """Of a mean of n independent differences: the mean, plus or minus 1.96 standard errors."""
    generator = np.random.default_rng(0)
    before = generator.normal(1.0, 0.4, 4000)
    after = before - generator.normal(0.05, 0.5, 4000)
    found = paired(LOSS, of_means(list(before)), of_means(list(after)))
    difference = after - before
    error = difference.std() / math.sqrt(len(difference))
    # 2,000 draws place the 2.5th percentile to about a tenth of a standard error.
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)
    assert found.verdict == "better"
    shuffled = paired(LOSS, of_means(list(generator.permutation(before))), of_means(list(after)))
    assert shuffled.high - shuffled.low > 1.2 * (found.high - found.low), "unpaired differences spread wider"


def test_verdicts():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0] * 10
    same = paired(EXACT_MATCH, of_means(values), of_means(values))
    assert (same.verdict, same.ties, same.low, same.high) == ("unclear", 60, 0.0, 0.0)
    assert paired(EXACT_MATCH, of_means(values), of_means([1.0] * 60)).verdict == "better"
    assert paired(EXACT_MATCH, of_means([1.0] * 60), of_means(values)).verdict == "worse"
    assert paired(EXACT_MATCH, of_means(values), of_means([*values[:-1], 1.0])).verdict == "unclear"
    single = paired(LOSS, of_means([2.0]), of_means([1.0]))
    assert (single.low, single.high, single.verdict) == (None, None, "unclear")


def test_the_same_examples_give_the_same_interval_and_json_keeps_it():
    before, after = of_means([0.0, 1.0, 0.0, 1.0, 0.0]), of_means([1.0, 1.0, 0.0, 1.0, 1.0])
    found = paired(EXACT_MATCH, before, after)
    assert paired(EXACT_MATCH, before, after) == found
    assert Paired.from_dict(found.to_dict()) == found
    assert math.isnan(Paired.from_dict(found.to_dict() | {"before": None}).before)


def test_overlap_gives_the_libraries_own_scores():
    found = {measure.field: (measure, sums) for measure, sums in overlap(list(measures.OVERLAP), ANSWERS, REFERENCES)}
    total = {name: measure.figure(sums.sum(0)) for name, (measure, sums) in found.items()}
    assert list(total) == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"]
    assert total["bleu"] == pytest.approx(BLEU().corpus_score(ANSWERS, [REFERENCES]).score, abs=1e-9)
    assert total["chrf"] == pytest.approx(CHRF().corpus_score(ANSWERS, [REFERENCES]).score, abs=1e-9)
    for name in ("rouge1", "rougeLsum"):
        scorer = RougeScorer([name], use_stemmer=True)
        own = [scorer.score(b, a)[name].fmeasure for a, b in zip(ANSWERS, REFERENCES, strict=True)]
        assert total[name] == pytest.approx(100 * sum(own) / len(own), abs=1e-9)
    measure, sums = found["chrf"]
    assert [measure.figure(each) for each in sums] == pytest.approx(
        [CHRF().sentence_score(a, [b]).score for a, b in zip(ANSWERS, REFERENCES, strict=True)]
    )
    assert total["bleu"] != pytest.approx(BLEU().corpus_score(REFERENCES, [ANSWERS]).score), "the sides differ"
    assert overlap(["rouge"], [], []) == []


def test_the_stemmer_makes_runs_and_running_one_word():
    (one, sums), *_ = overlap(["rouge"], ["the runs"], ["the running"])
    assert one.figure(sums.sum(0)) == 100


def test_a_missing_package_is_named_where_its_measure_was_asked_for(monkeypatch):
    monkeypatch.setattr(measures, "_installed", lambda package: package != "sacrebleu")
    assert choose(None) == (["rouge"], ["bleu", "chrf"])
    assert choose(["rouge"]) == (["rouge"], [])
    message = r"metrics='bleu' - expected the package sacrebleu, which is not installed\. pip install 'philora\[evaluat"
    with pytest.raises(ConfigError, match=message):
        choose(["rouge", "bleu"])
    with pytest.raises(ConfigError, match=r"metrics='meteor' - expected some of rouge, bleu, chrf"):
        choose(["meteor"])
