"""Choose the values of a parametrised test that the quick suite runs; the slow one runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Return all values, those that are not chosen marked slow."""
    every = list(values)
    assert all(value in every for value in chosen), "a value that no longer exists"
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in every]
