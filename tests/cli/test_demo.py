"""What `make demo` promises: the bundled model learns the bundled help desk by LoRA alone."""

from __future__ import annotations

import statistics
import time
from importlib import resources

import pytest

import philora


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    source = str(resources.files("philora") / "nano" / "demo.yaml")
    before, after, seconds = [], [], []
    for seed in (42, 1, 2):
        overrides = [f"training_config.output_dir={tmp_path / str(seed)}", f"training_config.seed={seed}"]
        begun = time.process_time()
        results = philora.train(source, overrides).results
        assert {row["slice"] for row in results["coverage"]["rows"]} == {""}
        covered = results["coverage"]
        assert covered["trainable_parameters"] == sum(row["parameters"] for row in covered["rows"]), "by LoRA alone"
        before.append(results["before"]["exact_match"])
        after.append(results["after"]["exact_match"])
        seconds.append(time.process_time() - begun)
        assert results["after"]["answers"] >= 200
        assert any(len(sample["prompt"]) > 1 for sample in results["samples"]), "one conversation of several turns"
    print(f"exact match before {before}, after {after}; CPU seconds {seconds}")
    assert max(before) < 0.10
    assert statistics.median(after) >= 0.70
    assert statistics.median(seconds) <= 2 * 180, "CPU seconds of everything, evaluation too, on two cores"
