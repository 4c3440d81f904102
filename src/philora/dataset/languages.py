"""Detect the languages of texts, with py3langid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

UNDETERMINED = "und"
"""The code of ISO 639-2 for a text whose language is not known."""
SAMPLE = 1000
"""Number of texts whose language is detected; a text takes about a millisecond."""
_LETTERS = 1000
_SURE = 0.8


def language_shares(texts: Sequence[str]) -> dict[str, float]:
    """Return the languages of texts with their shares, the commonest first.

    Args:
        texts: Of more than `SAMPLE` texts as many are looked at, evenly spread; of a long one its first 1,000 letters.

    Returns:
        Shares by ISO 639-1 code, such as {"en": 0.97, "de": 0.02, "und": 0.01}. A text counts as "und" where no
        language has a probability of 0.8: it is too short, or code, or a mixture.

    Source:
        Lui & Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool"; py3langid's model.
    """
    identifier = _identifier()
    step = max(len(texts) / SAMPLE, 1.0)
    sample = [texts[int(number * step)] for number in range(min(len(texts), SAMPLE))]
    found: Counter[str] = Counter()
    for text in sample:
        code, probability = identifier.classify(text[:_LETTERS])
        found[code if probability >= _SURE and code != "zxx" else UNDETERMINED] += 1
    return {code: count / len(sample) for code, count in found.most_common()}


@cache
def _identifier() -> Any:
    """Load py3langid's model, which takes 0.3 s."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
