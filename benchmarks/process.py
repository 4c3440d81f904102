"""Run the process of a contestant: read its task, count the steps, write its result.

Needs numpy alone: contestants live in different environments.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.work import Document, Work, read_rows

REPOSITORY = Path(__file__).resolve().parents[1]

# Set for all contestants alike, before torch is loaded. GNU's OpenMP threads spin for long by default while they wait
# for each other, which makes a step many times slower as soon as anything else uses a core.
SPIN_COUNT = "10000"


@dataclass(frozen=True)
class Task:
    """Hold the task of a contestant's process.

    Attributes:
        rows: Packs of an optimizer step.
        together: Packs of a micro-batch; the micro-batches of a step come one after the other (accumulation).
        warmup: Steps before the clock counts; they train too.
    """

    contestant: str
    model: str
    data: str
    work: Work
    warmup: int = 2
    steps: int = 8
    rows: int = 1
    together: int = 1
    threads: int = 2
    learning_rate: float = 1e-3
    seed: int = 0

    def to_json(self) -> str:
        """Return the task as JSON for a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Return the task that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"work": Work(**values["work"])})

    def read(self) -> list[list[list[Document]]]:
        """The packs of each step.

        Raises:
            ValueError: The data is too short for so many steps.
        """
        wanted = (self.warmup + self.steps) * self.rows
        rows = read_rows(Path(self.data))
        if len(rows) < wanted:
            raise ValueError(f"steps={self.steps} - expected at most {len(rows) // self.rows - self.warmup}.")
        return [rows[at : at + self.rows] for at in range(0, wanted, self.rows)]


@dataclass
class Record:
    """The steps of a contestant: what went in, what came out, how long it took."""

    warmup: int
    losses: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _open: tuple[int, int] = (0, 0)
    _last: float = field(default_factory=time.perf_counter)

    def batch(self, labels: int, tokens: int) -> None:
        """A forward and backward pass of the current step has begun, on so many labels and non-padding tokens."""
        self._open = self._open[0] + labels, self._open[1] + tokens

    def step(self, loss: float) -> None:
        """An optimizer step is over; its time goes from the end of the one before, loading and logging included."""
        now = time.perf_counter()
        self.losses.append(loss)
        self.labels.append(self._open[0])
        self.tokens.append(self._open[1])
        self.seconds.append(now - self._last)
        self._open, self._last = (0, 0), now

    def result(self, settings: dict[str, Any], packages: Sequence[str]) -> dict[str, Any]:
        """Return everything as plain values; speed is that of the steps after the warm-up."""
        tokens, seconds = sum(self.tokens[self.warmup :]), sum(self.seconds[self.warmup :])
        return {
            "losses": self.losses,
            "labels": self.labels,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": peak_bytes(),
            "settings": settings,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        }


def peak_bytes() -> int:
    """The most resident memory that this process has had.

    Linux hands the figure of the process that started this one on to it, so that one has to stay small: the one that
    starts the contestants never loads torch.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(threads: int) -> dict[str, str]:
    """The environment of every contestant's process."""
    return os.environ | {
        "GOMP_SPINCOUNT": SPIN_COUNT,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def run(train: Callable[[Task], dict[str, Any]]) -> None:
    """The body of a contestant's program: `MODULE TASK OUT`; OUT is a file, since libraries print what they like."""
    task, out = Task.from_json(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps(train(task)), encoding="utf-8")


def write_work(name: str, root: Path, environment: Mapping[str, str], change: Mapping[str, int] | None = None) -> None:
    """Have a work's model and data written where they are missing, by a process that may load torch.

    Args:
        name: Of the work.
        root: Folder for it.
        environment: Of the process.
        change: Fields of the work that are to differ.

    Raises:
        RuntimeError: It failed; the message holds what it printed.
    """
    command = [sys.executable, "-m", "benchmarks.work", name, "--root", str(root)]
    call([*command, "--change", json.dumps(change or {})], environment)


def call(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run one process to its end and return the seconds that it took.

    Raises:
        RuntimeError: It failed; the message has the end of what it printed.
    """
    begun = time.perf_counter()
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {ended.returncode}: {ended.stderr.strip()[-2000:]}")
    return time.perf_counter() - begun


def start(command: Sequence[str], stem: Path, environment: Mapping[str, str], timeout: float | None) -> dict[str, Any]:
    """Run one process to its end and read its result.

    Args:
        command: The process; the file for its result is added to its end.
        stem: `.json` is added for the result, `.log` for what it prints.
        environment: All of its environment.
        timeout: Seconds; None for no limit.

    Raises:
        RuntimeError: It failed or took too long; the message holds its last line.
    """
    out, log = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.log")
    out.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            ended = subprocess.run(
                [*command, str(out)],
                cwd=REPOSITORY,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{stem.name}: not done after {timeout:g} s (what it printed: {log})") from None
        except OSError as error:
            raise RuntimeError(f"{stem.name}: {error}") from error
    if ended.returncode or not out.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        raise RuntimeError(f"{stem.name}: exit {ended.returncode}: {last} (what it printed: {log})")
    return dict(json.loads(out.read_text(encoding="utf-8")))
