"""The planner's peak within a tenth of a real training's, measured in processes of their own (benchmarks/memory.py)."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import CELLS, EVALUATED, QUICK, UNPACKED, measure
from philora.models.loading import bf16_is_fast
from philora.planning.footprint import PARTS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
fast_bf16 = pytest.mark.skipif(not bf16_is_fast(), reason="without bf16 instructions a cell takes a quarter of an hour")

CLOSE = 0.1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def check(cell, root):
    found = measure(cell, root)
    estimate, peak = found["plan"]["estimate"], found["peak_bytes"]
    assert found["plan"]["recomputation"] == cell.recomputation
    assert found["plan"]["quantization"] == ("nf4" if cell.base == "nf4" else "none")
    assert estimate["peak"] == pytest.approx(peak, rel=CLOSE)
    # Negative control: without a part that is larger than the tolerance allows for.
    for name in PARTS:
        if estimate[name] > 2 * CLOSE * peak:
            assert estimate["peak"] - estimate[name] != pytest.approx(peak, rel=CLOSE), name
    return estimate, peak


@fast_bf16
def test_bf16_keeps_its_activations(root):
    pytest.importorskip("bitsandbytes")
    estimate, peak = check(QUICK[0], root)
    assert estimate["activations"] > 2 * CLOSE * peak, "the control leaves them out"
    assert estimate["files"] == estimate["weights"]


@fast_bf16
def test_nf4_with_recomputation(root):
    pytest.importorskip("bitsandbytes")
    estimate, _ = check(QUICK[1], root)
    assert estimate["files"] == 0


@fast_bf16
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_three_sizes_with_and_without(cell, root):
    pytest.importorskip("bitsandbytes")
    check(cell, root)


@fast_bf16
@pytest.mark.slow
@pytest.mark.parametrize("cell", EVALUATED, ids=lambda cell: cell.name)
def test_answers_before_and_after(cell, root):
    """The peak is in the evaluation, which over a bf16 base holds its weights once more."""
    pytest.importorskip("bitsandbytes")
    found = measure(cell, root)
    estimate, peak = found["plan"]["estimate"], found["peak_bytes"]
    assert estimate["peak"] == estimate["evaluation"] == pytest.approx(peak, rel=CLOSE)
    assert estimate["training"] < (1 - 2 * CLOSE) * peak, "the control: the peak of training alone is not it"


@pytest.mark.slow
@pytest.mark.parametrize("cell", UNPACKED, ids=lambda cell: cell.name)
def test_conversations_that_are_not_packed(cell, root):
    """The estimate is an upper bound: it takes each row as long as the longest, and padding is not computed."""
    found = measure(cell, root)
    estimate, peak = found["plan"]["estimate"], found["peak_bytes"]
    assert peak < (1 + CLOSE) * estimate["peak"]
    assert estimate["peak"] < 1.6 * peak
    assert estimate["activations"] + estimate["loss"] > CLOSE * peak, "without them it would be too low"
