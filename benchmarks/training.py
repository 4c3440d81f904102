"""The training benchmark: TRL with PEFT, philora and, with `--peers`, torchtune and litgpt, on the same work.

`python -m benchmarks.training [--work a,b] [--contestants NAME,...] [--peers] [--rounds N] [--steps N]`

Each contestant runs in a process of its own, all of them once in every round; between rounds the machine's rate for
matrix products is measured. The table and the rows of results/training.csv hold medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS
from benchmarks.process import REPOSITORY, SPIN_COUNT, Task, environment, start, write_work
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now
from benchmarks.work import WORKS, Work, default_root

CARD = "trl-card"
BEST = {0.0: "trl-best-0", 0.05: "trl-best"}
DEFAULT = ("trl-card", "trl-best", "trl-best-0", "philora", "philora-0")


@dataclass(frozen=True)
class Program:
    """Describe how a contestant is started.

    Attributes:
        python: Its interpreter.
        module: What runs.
        dropout: Of its adapters.
    """

    title: str
    python: str
    module: str
    dropout: float


def programs(peers: Path) -> dict[str, Program]:
    """Return every contestant by name.

    Args:
        peers: Folder with the environments of the other libraries, which `make bench-peers` makes.
    """
    own = {
        name: Program(setting.title, sys.executable, "benchmarks.contestants", setting.dropout)
        for name, setting in CONTESTANTS.items()
    }
    others = {
        "torchtune": Program("torchtune, layers compiled", "torchtune", "benchmarks.peer_torchtune", 0.0),
        "torchtune-eager": Program("torchtune", "torchtune", "benchmarks.peer_torchtune", 0.0),
        "litgpt": Program("litgpt", "litgpt", "benchmarks.peer_litgpt", 0.0),
    }
    return own | {
        name: Program(item.title, str(peers / item.python / "bin" / "python"), item.module, item.dropout)
        for name, item in others.items()
    }


PEERS = ("torchtune", "torchtune-eager", "litgpt")


@dataclass
class Runs:
    """The rounds of one contestant."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each round."""
        return [item["tokens_per_second"] for item in self.results]

    @property
    def label_share(self) -> float:
        """Labelled tokens among all of the timed steps."""
        first = self.results[0]
        return float(sum(first["labels"]) / sum(first["tokens"]))


def largest_gap(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference between two runs' losses at the same step."""
    return max(abs(mine - theirs) for mine, theirs in zip(losses, reference, strict=True))


def disagreements(runs: dict[str, Runs]) -> list[str]:
    """Contestants that were not given the same labels or tokens as the first one: their speed means nothing."""
    found = []
    done = {name: item.results for name, item in runs.items() if item.results}
    first = next(iter(done.values()))[0] if done else {}
    for name, results in done.items():
        for what in ("labels", "tokens"):
            if any(item[what] != first[what] for item in results):
                found.append(f"{name}: {what} {results[-1][what]} - expected those of the others, {first[what]}.")
    return found


def row_of(
    name: str, runs: Runs, task: Task, rates: Sequence[float], stamp: dict[str, str]
) -> dict[str, str | int | float]:
    """Return a row of results/training.csv."""
    last = runs.results[-1]
    limit = median(rates) / task.work.flops_per_token(runs.label_share)
    return {
        **stamp,
        "threads": task.threads,
        "work": task.work.name,
        "contestant": name,
        "settings": json.dumps(last["settings"], sort_keys=True),
        "rounds": len(runs.results),
        "warmup_steps": task.warmup,
        "timed_steps": task.steps,
        "tokens_per_second": round(median(runs.speeds), 2),
        "tokens_per_second_min": round(min(runs.speeds), 2),
        "tokens_per_second_max": round(max(runs.speeds), 2),
        "limit_tokens_per_second": round(limit, 1),
        "share_of_limit": round(median(runs.speeds) / limit, 4),
        "matmul_flops_per_second": round(median(rates)),
        "peak_bytes": max(item["peak_bytes"] for item in runs.results),
        "tokens": json.dumps(last["tokens"]),
        "labels": json.dumps(last["labels"]),
        "losses": json.dumps([round(loss, 5) for loss in last["losses"]]),
        "versions": json.dumps(last["versions"], sort_keys=True),
    }


def table_of(work: Work, runs: dict[str, Runs], rates: Sequence[float], known: dict[str, Program]) -> Table:
    """Print the table."""
    table = Table(title=f"work {work.name}: {work.title}", title_justify="left", box=None, pad_edge=False)
    table.add_column("contestant", no_wrap=True)
    for column in ("tokens/s", "min..max", "x card", "x best", "of limit", "peak GB", "loss", "gap"):
        table.add_column(column, justify="right", no_wrap=True)

    def ratio(speed: float, other: str) -> str:
        there = runs.get(other)
        return f"{speed / median(there.speeds):.2f}" if there and there.results else "-"

    for name, item in runs.items():
        if not item.results:
            table.add_row(known[name].title, "[red]failed[/]")
            continue
        speed, last = median(item.speeds), item.results[-1]
        limit = median(rates) / work.flops_per_token(item.label_share) if rates else None
        best = BEST[known[name].dropout]
        reference = runs.get(best)
        gap = "-"
        if reference and reference.results and name != best:
            gap = f"{largest_gap(last['losses'], reference.results[-1]['losses']):.4f}"
        table.add_row(
            known[name].title,
            f"{speed:,.1f}",
            f"{min(item.speeds):,.1f}..{max(item.speeds):,.1f}",
            ratio(speed, CARD),
            ratio(speed, best),
            f"{speed / limit:.1%}" if limit else "-",
            f"{max(one['peak_bytes'] for one in item.results) / 1e9:.2f}",
            f"{last['losses'][0]:.3f} → {last['losses'][-1]:.3f}",
            f"{gap}{'*' if known[name].dropout and gap != '-' else ''}",
        )
    return table


NOTES = """\
tokens/s: non-padding tokens, median over the rounds. x card, x best: over TRL+PEFT at the model card's settings, and at
the best setting of the same dropout. of limit: of the tokens a second that the measured rate of matrix products allows.
gap: the largest difference of a step's loss from TRL+PEFT, best setting, of the same dropout; * its dropout masks
differ. All contestants ran with {threads} threads and GOMP_SPINCOUNT={spin}."""


def measure(
    work: Work, names: Sequence[str], given: argparse.Namespace, known: dict[str, Program], console: Console
) -> tuple[dict[str, Runs], list[float]]:
    """All rounds of a work; rows are written as contestants finish.

    Returns:
        The runs of each contestant, and the rates of matrix products.
    """
    root = given.work_dir
    folder = root / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    write_work(work.name, root, environment(given.threads))
    model, data = str(work.model_folder(root)), str(work.data_file(root))

    def task(name: str) -> Task:
        return Task(name, model, data, work, given.warmup, given.steps, given.rows, threads=given.threads)

    def run(name: str, python: str, module: str) -> dict[str, Any]:
        command = [python, "-m", module, task(name).to_json()]
        return start(command, folder / name, environment(given.threads), given.timeout)

    runs = {name: Runs() for name in names}
    rates: list[float] = []
    stamp = {"commit": commit(REPOSITORY), "date": now(), "machine": machine(environment(given.threads))}
    written: set[str] = set()

    def write_row(name: str) -> None:
        if not given.no_write and runs[name].results and rates and name not in written:
            written.add(name)
            append(RESULTS / "training.csv", row_of(name, runs[name], task(name), rates, stamp))

    try:
        for number in range(1, given.rounds + 1):
            try:
                rates.append(run("rate", sys.executable, "benchmarks.rate")["flops_per_second"])
                console.print(f"round {number}: matrix products at {rates[-1] / 1e9:,.0f} GFLOP/s", highlight=False)
            except RuntimeError as error:
                console.print(f"[red]{error}[/]", highlight=False)
            # Every other round goes backwards, so that a machine that slows down or warms up favours nobody.
            for name in names if number % 2 else reversed(names):
                item = runs[name]
                if item.failure is not None:
                    continue
                try:
                    result = run(name, known[name].python, known[name].module)
                except RuntimeError as error:
                    item.failure = str(error)
                    console.print(f"[red]{error}[/]", highlight=False)
                    continue
                item.results.append(result)
                with (folder / "raw.jsonl").open("a", encoding="utf-8") as stream:
                    raw = {**stamp, "work": work.name, "contestant": name, "round": number, **result}
                    stream.write(json.dumps(raw) + "\n")
                console.print(
                    f"round {number}: {name}: {result['tokens_per_second']:,.1f} tokens/s, "
                    f"{result['peak_bytes'] / 1e9:.2f} GB, labels {result['labels']}, "
                    f"losses {[round(loss, 4) for loss in result['losses']]}",
                    highlight=False,
                )
                if number == given.rounds:
                    write_row(name)
    finally:
        for name in names:
            write_row(name)
    return runs, rates


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="a", help="a, b or both: a,b (default a)")
    parser.add_argument("--contestants", help=f"of {', '.join(programs(Path()))}; default {','.join(DEFAULT)}")
    parser.add_argument("--peers", action="store_true", help="torchtune and litgpt as well")
    parser.add_argument("--peers-dir", type=Path, default=Path(sys.prefix) / "peers", help="their environments")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--rows", type=int, default=1, help="packs of a step, one after the other")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one process may take")
    parser.add_argument("--work-dir", type=Path, default=default_root(), help="model, data and logs")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 round, nothing written: does it run?")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    given = parser.parse_args(line)
    if given.quick:
        given.work, given.rounds, given.steps, given.threads, given.no_write = "quick", 1, 3, 1, True
    given.work = given.work.split(",")
    given.contestants = given.contestants.split(",") if given.contestants else [*DEFAULT, *(PEERS * given.peers)]
    for what, names, allowed in (
        ("--work", given.work, WORKS),
        ("--contestants", given.contestants, programs(Path())),
    ):
        for name in names:
            if name not in allowed:
                parser.error(f"{what}: {name!r} - expected some of {', '.join(allowed)}")
    if min(given.rounds, given.warmup, given.steps, given.rows, given.threads) < 1:
        parser.error("rounds, warmup, steps, rows and threads: expected at least 1")
    return given


def main() -> int:
    """Run the benchmark; 1 when a contestant failed or was given other work than the rest."""
    given = arguments()
    console = Console(soft_wrap=True)
    console.width = max(console.width, 124)  # the table is not cut where there is no terminal
    known = programs(given.peers_dir)
    faults: list[str] = []
    drawn = []
    for name in given.work:
        work = WORKS[name]
        runs, rates = measure(work, given.contestants, given, known, console)
        console.print()
        console.print(table_of(work, runs, rates, known))
        if rates:
            console.print(
                f"matrix products: {median(rates) / 1e9:,.0f} GFLOP/s, {min(rates) / 1e9:,.0f}..{max(rates) / 1e9:,.0f}"
            )
        faults += [item.failure for item in runs.values() if item.failure] + disagreements(runs)
        done = {known[one].title: median(item.speeds) for one, item in runs.items() if item.results}
        drawn.append((work, done, median(runs[CARD].speeds) if CARD in runs and runs[CARD].results else None))
    console.print(NOTES.format(threads=given.threads, spin=SPIN_COUNT), highlight=False)
    for item in faults:
        console.print(f"[red]{item}[/]", highlight=False)
    if not given.no_write:
        from benchmarks.results import chart

        chart(drawn, RESULTS / "training.png")
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; rows of the rounds that were done are written")
