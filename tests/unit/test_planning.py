"""The batch that fits, from an estimate that grows with what it counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from philora.planning import TOKENS_PER_STEP, choose, estimate, step_tokens

SHAPE = SimpleNamespace(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, vocab_size=32064)
GIB = 2**30


def batch(plan):
    return plan.micro_batch_rows, plan.accumulation, plan.recomputation


def plan(memory, **changes):
    settings = {
        "row_tokens": 2048,
        "tokens_per_step": 8192,
        "rows": None,
        "accumulation": None,
        "recomputation": None,
        "element_bytes": 2,
    }
    return choose(SHAPE, 3_821_000_000, 25_000_000, memory=memory, **(settings | changes))


def test_parts_add_up_and_recomputation_saves_activations():
    kept, some, again = (
        estimate(SHAPE, 10**9, 10**6, 2048, element_bytes=2, recomputation=grade)
        for grade in ("none", "elementwise", "full")
    )
    assert kept.total == sum(value for key, value in kept.to_dict().items() if key != "total")
    assert again.activations < kept.activations / 5
    assert kept.activations - some.activations == 2048 * 32 * (2 * 3072 + 8192) * 2
    assert again.weights == kept.weights == 2 * 10**9


def test_the_largest_micro_batch_that_fits():
    assert batch(plan(500 * GIB)) == (4, 1, "none")
    small = plan(15 * GIB)
    assert small.recomputation == "full"
    assert small.micro_batch_rows * small.accumulation == 4
    between = plan(20.5 * GIB, rows=1)
    assert between.recomputation == "elementwise"
    assert plan(1 * GIB).micro_batch_rows == 1, "nothing fits: the least, and the run will say so"


def test_what_is_given_stays():
    given = plan(500 * GIB, rows=3, accumulation=5, recomputation="full")
    assert batch(given) == (3, 5, "full")
    assert batch(plan(500 * GIB, accumulation=2))[:2] == (2, 2)


@pytest.mark.parametrize(("total", "tokens"), [(10, 1), (100_000, 1000), (10**9, TOKENS_PER_STEP)])
def test_small_data_gets_small_steps(total, tokens):
    assert step_tokens(total) == tokens
