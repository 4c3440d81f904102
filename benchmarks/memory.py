"""The planner's peak beside the measured one: three sizes, bf16 and NF4, with and without recomputation.

    python -m benchmarks.memory                      # all cells, rows to benchmarks/results/memory.csv
    python -m benchmarks.memory --only nf4/full      # cells whose name has this in it

Each cell is a process of its own that trains some steps over the bundled help desk by `philora.train`. Its peak is the
most resident memory that the process ever had (VmHWM of /proc/self/status): anonymous memory and pages of files, among
them the weights of a bf16 base. The estimate is the one in the run's results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import REPOSITORY, environment, start
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now

VOCABULARY = 8192


@dataclass(frozen=True)
class Cell:
    """Describe a measurement.

    Attributes:
        width: Of the model; heads of 64.
        layers: Decoder layers.
        tokens: The most that a row may have.
        base: `bf16`, `fp32` or `nf4`.
        recomputation: none, elementwise or full.
        steps: Optimizer steps: oneDNN's kernels and the heap grow in the first ones.
        answers: Answers that are generated before training and after it, of 32 tokens at most; 0: no evaluation.
        rows: Of a micro-batch, one conversation in each, padded to the longest; 0: one row of packed conversations.
    """

    width: int
    layers: int
    tokens: int
    base: str
    recomputation: str
    steps: int = 6
    answers: int = 0
    rows: int = 0

    @property
    def name(self) -> str:
        """Return the name, for people and for `--only`."""
        name = f"{self.width}x{self.layers}/{self.tokens}/{self.base}/{self.recomputation}"
        name += f"/{self.rows} rows" if self.rows else ""
        return f"{name}/{self.answers} answers" if self.answers else name


SIZES = ((1024, 6, 1024), (1536, 6, 1024), (2048, 6, 1024))
CELLS = tuple(
    Cell(*size, base, grade)
    for size in SIZES
    for base in ("bf16", "nf4")
    for grade in ("none", "elementwise", "full")
    if grade != "elementwise" or size[0] == 1536
)
EVALUATED = (Cell(1536, 6, 1024, "bf16", "full", 4, answers=64), Cell(1536, 6, 1024, "nf4", "full", 4, answers=64))
UNPACKED = (Cell(512, 4, 512, "fp32", "none", 8, rows=16), Cell(512, 4, 512, "fp32", "full", 8, rows=32))
QUICK = (Cell(1024, 4, 2048, "bf16", "none", 5), Cell(1024, 4, 2048, "nf4", "full", 5))


def write_folder(folder: Path, width: int, layers: int) -> None:
    """A folder of Phi-3's proportions with random bf16 weights and the bundled model's tokenizer."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from philora.models.loading import local_path

    source = Path(local_path("nano"))
    special = json.loads((source / "config.json").read_text())
    config = Phi3Config(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        **{name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    torch.manual_seed(0)
    Phi3ForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(source / file, folder / file)


class _Sampler(threading.Thread):
    """The parts of this process's resident memory when it was largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest: dict[str, int] = {"VmRSS": 0}

    def run(self) -> None:
        while True:
            seen = _status()
            if seen["VmRSS"] > self.largest["VmRSS"]:
                self.largest = seen
            time.sleep(0.005)


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in fields if name in _FIELDS}


_FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")


def child(cell: Cell, folder: Path, work: Path) -> dict[str, Any]:
    """Train in this process."""
    import philora

    sampler = _Sampler()
    sampler.start()
    grades: dict[str, bool | str] = {"none": False, "elementwise": "elementwise", "full": True}
    result = philora.train(
        {
            "model": {
                "name_or_path": str(folder),
                "dtype": "float32" if cell.base == "fp32" else "bfloat16",
                "quantization": "nf4" if cell.base == "nf4" else "none",
            },
            "data": {"train": "helpdesk", "eval": "helpdesk" if cell.answers else None},
            "evaluation": {"generate": cell.answers, "max_new_tokens": 32},
            "training_config": {
                "output_dir": str(work),
                "max_length": cell.tokens,
                "max_steps": cell.steps,
                "packing": not cell.rows,
                "per_device_train_batch_size": cell.rows or 1,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": grades[cell.recomputation],
                "save_strategy": "no",
                "log_level": "error",
            },
        },
        quiet=True,
    )
    status = _status()
    return {
        "peak_bytes": status["VmHWM"],
        "anonymous_bytes": sampler.largest["RssAnon"],
        "file_bytes": sampler.largest["RssFile"],
        "plan": result.results["plan"],
    }


def measure(cell: Cell, root: Path, threads: int = 2, timeout: float = 900) -> dict[str, Any]:
    """Train in a process of its own, over a folder that is written by another one where it is missing.

    Raises:
        RuntimeError: It failed; the message holds its last line.
    """
    folder, stem = root / f"model-{cell.width}x{cell.layers}", root / cell.name.replace("/", "-").replace(" ", "-")
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(asdict(cell)), "--root", str(root)]
    if not (folder / "tokenizer.json").exists():
        start([*command, "--write", "--out"], root / f"write-{folder.name}", environment(threads), timeout)
    return start([*command, "--out"], stem, environment(threads), timeout)


def row(cell: Cell, found: dict[str, Any], threads: int, of_machine: str) -> dict[str, str | int | float]:
    """Return a row of the table."""
    estimate = found["plan"]["estimate"]
    facts: dict[str, str | int | float] = {"commit": commit(REPOSITORY), "date": now(), "machine": of_machine}
    facts |= {"threads": threads, **asdict(cell), "parameters": found["plan"]["parameters"]}
    facts |= {f"estimated_{name}": size for name, size in estimate.items()}
    facts |= {f"measured_{name}": found[f"{name}_bytes"] for name in ("peak", "anonymous", "file")}
    return facts | {"difference": round(estimate["peak"] / found["peak_bytes"] - 1, 4)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The planner's peak memory beside the measured one.")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        cell = Cell(**json.loads(given.child))
        folder = given.root / f"model-{cell.width}x{cell.layers}"
        if given.write:
            write_folder(folder, cell.width, cell.layers)
            found: dict[str, Any] = {}
        else:
            with tempfile.TemporaryDirectory(dir=given.root) as work:
                found = child(cell, folder, Path(work) / "run")
        given.out.write_text(json.dumps(found), encoding="utf-8")
        return
    of_machine = machine(environment(given.threads))
    with tempfile.TemporaryDirectory() as root:
        for cell in (*CELLS, *EVALUATED, *UNPACKED):
            if given.only in cell.name:
                found = measure(cell, Path(root), given.threads)
                facts = row(cell, found, given.threads, of_machine)
                append(given.out, facts)
                estimated, peak = found["plan"]["estimate"]["peak"] / 1e6, found["peak_bytes"] / 1e6
                print(f"{cell.name:32} estimated {estimated:7,.0f} MB, measured {peak:7,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
