"""What `make demo` promises: the bundled model learns the bundled help desk by LoRA alone, in minutes."""

from __future__ import annotations

import time
from importlib import resources

import pytest
import torch

import philora

MOST_TIMES_THE_ARITHMETIC = 4.0
"""CPU seconds of a whole run, evaluation and answers included, by those that its training's products take alone.

Measured 2.0 to 2.4, the higher where another process computes beside it: threads that wait for each other spin.
"""


def seconds_per_flop(dtype: torch.dtype) -> float:
    """Return the CPU seconds of an operation in products of the demo's size, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens, inner, outer, repeats = 1024, 256, 1024, 40
    x, weight = torch.randn(tokens, inner, dtype=dtype), torch.randn(inner, outer, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        for _ in range(repeats):
            torch.mm(x, weight)
        best = min(best, (time.process_time() - begun) / (2.0 * repeats * tokens * inner * outer))
    torch.set_num_threads(threads)
    return best


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    source = str(resources.files("philora") / "nano" / "demo.yaml")
    begun = time.process_time()
    results = philora.train(source, [f"training_config.output_dir={tmp_path / 'demo'}"]).results
    seconds = time.process_time() - begun
    covered = results["coverage"]
    assert {row["slice"] for row in covered["rows"]} == {""}
    assert covered["trainable_parameters"] == sum(row["parameters"] for row in covered["rows"]), "by LoRA alone"
    assert results["before"]["exact_match"] < 0.10
    assert results["after"]["exact_match"] >= 0.70
    assert results["after"]["answers"] >= 200
    assert any(len(sample["prompt"]) > 1 for sample in results["samples"]), "one conversation of several turns"
    # Forward and backward through frozen weights: four operations for each parameter and token.
    operations = 4.0 * results["model"]["parameters"] * results["throughput"]["tokens"]
    arithmetic = operations * seconds_per_flop(getattr(torch, results["model"]["dtype"]))
    print(f"{seconds:.0f} CPU seconds, {seconds / arithmetic:.1f} times those of the products")
    assert seconds <= MOST_TIMES_THE_ARITHMETIC * arithmetic
