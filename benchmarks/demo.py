"""The demo's figures over several seeds, as rows of benchmarks/results/demo.csv.

python -m benchmarks.demo [SEED ...]
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib import resources

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import philora
from benchmarks.process import REPOSITORY
from benchmarks.results import RESULTS, append, commit
from philora.training.run import versions


def main(seeds: list[int]) -> None:
    """Run the demo once for each seed and append one row each."""
    source = str(resources.files("philora") / "nano" / "demo.yaml")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"training_config.output_dir={folder}/run", f"training_config.seed={seed}"]
            results = philora.train(source, overrides, quiet=True).results
        row = {
            "commit": commit(REPOSITORY),
            "machine": f"{os.cpu_count()} cores {platform.machine()}",
            "seed": seed,
            "exact_match_before": results["before"]["exact_match"],
            "exact_match_after": results["after"]["exact_match"],
            "answers": results["after"]["answers"],
            "train_seconds": results["throughput"]["seconds"],
            "tokens": results["throughput"]["tokens"],
            "tokens_per_second": results["throughput"]["tokens_per_second"],
            "peak_bytes": results["memory"]["peak_bytes"],
            **versions(),
        }
        append(RESULTS / "demo.csv", row)
        print(row)


if __name__ == "__main__":
    main([int(item) for item in sys.argv[1:]] or [42, 1, 2])
