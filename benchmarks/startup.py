"""Start-up: from the command `philora train` to the end of the first training step, beside the time of the imports.

`python -m benchmarks.startup [--rounds N]`

The run is the bundled model on the bundled help desk, without an evaluation before it. The imports are those of a
script for TRL: torch, transformers, peft and TRL's trainer. Rows go to results/startup.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.process import REPOSITORY, call, environment
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now

IMPORTS = "import torch, transformers; from peft import LoraConfig; from trl import SFTConfig, SFTTrainer"
TITLES = {
    "imports": "imports of a script for TRL",
    "philora help": "philora --help",
    "philora cold": "philora train, to the end of step 1, nothing cached",
    "philora warm": "the same, data tokenised before",
}


def first_step(folder: Path, env: dict[str, str]) -> float:
    """Seconds from the start of `philora train` to the first entry of its metrics file, which follows the first step.

    Raises:
        RuntimeError: The run failed.
    """
    settings = {
        "model.name_or_path": "nano",
        "training_config.output_dir": folder,
        "training_config.max_steps": 1,
        "training_config.logging_steps": 1,
        "training_config.report_to": "none",
    }
    config = folder.with_suffix(".yaml")
    config.write_text("data: {train: helpdesk, eval: null}\n", encoding="utf-8")
    philora = str(Path(sys.executable).with_name("philora"))
    begun = time.time()
    call([philora, "train", str(config), *(f"{key}={value}" for key, value in settings.items())], env)
    line = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return float(json.loads(line)["time"]) - begun


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="1 round, nothing written")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.no_write = 1, True
    console = Console(soft_wrap=True)
    found: dict[str, list[float]] = {name: [] for name in TITLES}
    env = environment(given.threads)
    imports = [sys.executable, "-c", IMPORTS]
    philora = str(Path(sys.executable).with_name("philora"))
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        call(imports, env)  # byte code and the system's file cache are warm for everybody
        first_step(folder / "first", env | {"PHILORA_CACHE": str(folder / "unused")})
        for number in range(1, given.rounds + 1):
            cached = env | {"PHILORA_CACHE": str(folder / f"cache-{number}")}
            found["imports"].append(call(imports, env))
            found["philora help"].append(call([philora, "--help"], env))
            found["philora cold"].append(first_step(folder / f"cold-{number}", cached))
            found["philora warm"].append(first_step(folder / f"warm-{number}", cached))
            figures = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in found.items())
            console.print(f"round {number}: {figures}", highlight=False)
    table = Table("", "seconds", "min..max", "x imports", box=None, pad_edge=False)
    stamp = {"commit": commit(REPOSITORY), "date": now(), "machine": machine(env)}
    for name, times in found.items():
        ratio = median(times) / median(found["imports"])
        table.add_row(TITLES[name], f"{median(times):.2f}", f"{min(times):.2f}..{max(times):.2f}", f"{ratio:.2f}")
        if not given.no_write:
            row = {
                **stamp,
                "what": name,
                "rounds": len(times),
                "seconds": round(median(times), 3),
                "seconds_min": round(min(times), 3),
                "seconds_max": round(max(times), 3),
                "ratio_to_imports": round(ratio, 3),
            }
            append(RESULTS / "startup.csv", row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
