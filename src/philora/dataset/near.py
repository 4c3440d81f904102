"""Find texts that are nearly the same by MinHash (Broder 1997) in bands, and check them by their shared pieces."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIMILAR = 0.7
"""Share of pieces in common (Jaccard) from which two texts count as nearly the same."""

_HASHES, _BAND = 64, 4
_WORDS = 3
_COMPARED = 50
"""Most candidates that a text is compared with, so that similar texts do not take quadratic time."""


def near_duplicates(texts: Sequence[str], others: Sequence[str] | None = None) -> dict[int, int]:
    """Return which texts have a nearly equal one, with the place of the first that was found.

    Args:
        texts: To look at.
        others: To look in; None: among the texts themselves, of which the earlier ones count.

    Cost:
        Grows with the number of texts; 10,000 chats take some seconds. Of pairs at the limit some are missed.
    """
    pieces = [_pieces(text) for text in texts]
    theirs = pieces if others is None else [_pieces(text) for text in others]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    if others is not None:
        for place, their in enumerate(theirs):
            for key in _keys(their):
                buckets[key].append(place)
    found: dict[int, int] = {}
    for place, piece in enumerate(pieces):
        keys = _keys(piece)
        candidates = dict.fromkeys(other for key in keys for other in buckets.get(key, ()))
        for other in list(candidates)[:_COMPARED]:
            if len(piece & theirs[other]) / len(piece | theirs[other]) >= SIMILAR:
                found[place] = other
                break
        if others is None:
            for key in keys:
                buckets[key].append(place)
    return found


def _pieces(text: str) -> frozenset[int]:
    """Return hashes of every few consecutive words; of a shorter text, of all of it."""
    words = re.findall(r"\w+", text.lower())
    runs = range(max(1, len(words) - _WORDS + 1))
    return frozenset(zlib.crc32(" ".join(words[start : start + _WORDS]).encode()) for start in runs)


_random = np.random.default_rng(0)
_FACTORS: npt.NDArray[np.uint64] = _random.integers(1, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADDED: npt.NDArray[np.uint64] = _random.integers(0, 2**63, _HASHES, dtype=np.uint64)


def _keys(pieces: frozenset[int]) -> list[tuple[int, bytes]]:
    """Return the bands of a text's smallest hashes: two texts with a band in common are likely alike."""
    values = np.fromiter(pieces, np.uint64, len(pieces))
    smallest = ((values[:, None] * _FACTORS + _ADDED) >> np.uint64(32)).min(axis=0).astype(np.uint32)
    return [(start, smallest[start : start + _BAND].tobytes()) for start in range(0, _HASHES, _BAND)]
