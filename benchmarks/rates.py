"""Compare learning rates for the defaults: four small tasks, models of several widths, old and new defaults.

    python tools/make_nano.py --out w128 --width 128 --minutes 7
    python tools/make_nano.py --out w512 --width 512 --minutes 14
    python -m benchmarks.rates --models nano w128 w512 [--seeds 1 2 3] [--only NAME ...] [--tasks NAME ...]
    python -m benchmarks.rates --table               # the rows as docs/settings.md shows them

Each run is `philora.train` with three epochs and everything else at its default, scored on held-out rows. What stands
in results/rates.csv already is not run again. The rows hold scores, not times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import philora
from benchmarks.results import RESULTS, append, commit, now
from philora.models.loading import local_path

TABLE = RESULTS / "rates.csv"
TRAIN_ROWS, EVAL_ROWS = 240, 60
RATE, STEPS = 2e-4, 100  # the defaults before: one rate for all, and a hundred steps whatever the epochs

Pair = tuple[str, str]

COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "grey"]
THINGS = ["lamp", "chair", "table", "door", "window", "box", "bottle", "book", "cup", "clock"]
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry"]
PLACES = ["kitchen", "garden", "office", "garage", "hall", "cellar"]
ANSWERS = {
    "password": "Open the account page and choose a new password.",
    "invoice": "Invoices are sent by mail on the first day of the month.",
    "refund": "A refund takes five working days.",
    "delivery": "Parcels leave the store within two days.",
    "address": "Change the address in your profile.",
    "discount": "Students get a discount of ten percent.",
    "warranty": "The warranty lasts for two years.",
    "battery": "Charge the battery for three hours.",
    "update": "Restart the machine to install the update.",
    "noise": "Clean the fan with a dry cloth.",
    "screen": "Hold the power key until the screen turns on.",
    "printer": "Connect the printer with the cable in the box.",
    "backup": "A backup is made every night.",
    "language": "Choose the language in the settings.",
    "contract": "The contract ends after one year.",
    "phone": "Call us on working days from nine to five.",
    "colour": "The colour can not be changed later.",
    "size": "Measure the wall before you order.",
    "guest": "Guests can order without an account.",
    "gift": "We wrap gifts for free.",
}
FRAMES = (
    "What about the {}?", "I have a question about the {}.", "Tell me about the {}.", "Help me with the {}, please.",
    "There is a problem with the {}.", "Can you say something on the {}?", "My {} is not clear to me.",
    "Who knows about the {}?", "I need to know about the {}.", "Where do I read about the {}?",
    "Please explain the {}.", "How is it with the {}?", "The {}, what do I do?", "Is there news on the {}?",
    "We talked about the {} before.",
)  # fmt: skip


def answers(rng: random.Random) -> list[Pair]:
    """Return questions in fifteen forms about twenty subjects, each with the subject's answer."""
    pairs = [(frame.format(subject), answer) for subject, answer in ANSWERS.items() for frame in FRAMES]
    rng.shuffle(pairs)
    return pairs


def rewriting(rng: random.Random) -> list[Pair]:
    """Return sentences about a thing, and the same as an assignment."""
    found = [
        (f"Please make the {thing} in the {place} {colour}.", f"{place} / {thing} = {colour}")
        for thing in THINGS
        for place in PLACES
        for colour in COLOURS
    ]
    return rng.sample(found, TRAIN_ROWS + EVAL_ROWS)


def extraction(rng: random.Random) -> list[Pair]:
    """Return orders in words, and the same as JSON."""
    found = [
        (
            f"{name} orders {count} {colour} {thing}s.",
            json.dumps({"name": name, "count": count, "colour": colour, "item": thing}),
        )
        for name in NAMES
        for count in range(2, 10)
        for colour in COLOURS
        for thing in THINGS
    ]
    return rng.sample(found, TRAIN_ROWS + EVAL_ROWS)


def _helpdesk(name: str) -> Iterator[Pair]:
    with (resources.files("philora") / "nano" / "helpdesk" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            messages = json.loads(line)["messages"]
            if [item["role"] for item in messages] == ["user", "assistant"]:
                yield messages[0]["content"], messages[1]["content"]


def helpdesk(rng: random.Random) -> list[Pair]:
    """Return the part of the bundled help desk with as many rows: some answers, with all of their questions."""
    train, held_out = list(_helpdesk("train")), list(_helpdesk("eval"))
    counts = Counter(answer for _, answer in train)
    asked = sorted({answer for _, answer in held_out} & counts.keys())
    rng.shuffle(asked)
    chosen: set[str] = set()
    for answer in asked:
        if sum(counts[item] for item in chosen) + counts[answer] <= TRAIN_ROWS:
            chosen.add(answer)
    rows = [pair for pair in train if pair[1] in chosen]
    rng.shuffle(rows)
    return rows + [pair for pair in held_out if pair[1] in chosen]


TASKS: dict[str, Callable[[random.Random], list[Pair]]] = {
    "questions to twenty answers": answers,
    "rewriting by a rule": rewriting,
    "extraction to JSON": extraction,
    "help desk": helpdesk,
}


def write(task: str, folder: Path) -> tuple[Path, Path]:
    """Write the task's training and held-out rows; they are the same for every seed of the training."""
    pairs = TASKS[task](random.Random(0))
    count = TRAIN_ROWS if task != "help desk" else sum(pair in set(_helpdesk("train")) for pair in pairs)
    files = folder / "train.jsonl", folder / "eval.jsonl"
    for file, part in zip(files, (pairs[:count], pairs[count : count + EVAL_ROWS]), strict=True):
        lines = [
            json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
            for question, answer in part
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _before(results: dict[str, Any]) -> list[str]:
    """Return the defaults as they were: a hundred steps in all."""
    tokens = results["data"]["train"]["tokens"] * 3 // STEPS
    return [f"training_config.learning_rate={RATE}", f"training_config.tokens_per_step={tokens}"]


WHATS: dict[str, float | None] = {"before": None, "auto": 1.0, "half of auto": 0.5, "twice auto": 2.0}


def overrides(what: str, model: str, train: Path) -> list[str]:
    """Return the settings of one kind of run; `auto` sets nothing."""
    from philora.training.readiness import preflight

    if WHATS[what] == 1.0:
        return []
    found = preflight({"model": {"name_or_path": model}, "data": {"train": str(train), "eval": None}})
    factor = WHATS[what]
    if factor is None:
        return _before({"data": found.data})
    return [f"training_config.learning_rate={found.plan.learning_rate * factor}"]


def run(task: str, model: str, what: str, seed: int) -> dict[str, str | int | float]:
    """Train once and return the row."""
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = write(task, Path(folder))
        source = {
            "model": {"name_or_path": model},
            "data": {"train": str(train), "eval": str(held_out)},
            "evaluation": {"generate": EVAL_ROWS, "max_new_tokens": 48, "batch_size": 32},
            "training_config": {
                "output_dir": f"{folder}/run", "seed": seed, "eval_strategy": "no", "save_strategy": "no",
            },
        }  # fmt: skip
        results = philora.train(source, overrides(what, model, train), quiet=True).results
    width = json.loads((Path(local_path(model)) / "config.json").read_text())["hidden_size"]
    return {
        "commit": commit(Path(__file__).parents[1]),
        "date": now(),
        "task": task,
        "hidden_size": width,
        "what": what,
        "seed": seed,
        "train_rows": results["data"]["train"]["rows"],
        "learning_rate": results["plan"]["learning_rate"],
        "steps": results["throughput"]["steps"],
        "eval_loss": round(results["after"]["loss"], 4),
        "exact_match": round(results["after"]["exact_match"], 4),
        "answers": results["after"]["answers"],
    }


def rows() -> list[dict[str, str]]:
    """Return what has been measured."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def table() -> str:
    """Return the rows in Markdown: a line for each task, width and rate, with the seeds' values beside each other."""
    lines = [
        "| task | hidden size | defaults | learning rate | steps | held-out loss | exact match |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    measured = rows()
    keys = sorted(
        {(row["task"], row["hidden_size"], row["what"]) for row in measured},
        key=lambda key: (list(TASKS).index(key[0]), int(key[1]), list(WHATS).index(key[2])),
    )
    for key in keys:
        same = [row for row in measured if (row["task"], row["hidden_size"], row["what"]) == key]
        same.sort(key=lambda row: int(row["seed"]))
        matches = ", ".join(f"{100 * float(row['exact_match']):.0f}%" for row in same)
        loss = mean(float(row["eval_loss"]) for row in same)
        rate = f"{float(same[0]['learning_rate']):.2g}"
        lines.append(f"| {' | '.join(key)} | {rate} | {same[0]['steps']} | {loss:.3f} | {matches} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores of small tasks by learning rate and width.")
    parser.add_argument("--models", nargs="*", default=["nano"], help="nano, or folders that tools/make_nano.py wrote")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="*", choices=list(WHATS), default=list(WHATS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="print the rows and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table(), end="")
        return
    for seed in given.seeds:
        for model in given.models:
            width = json.loads((Path(local_path(model)) / "config.json").read_text())["hidden_size"]
            for task in given.tasks:
                for what in given.only:
                    key = (task, str(width), what, str(seed))
                    if key in {(row["task"], row["hidden_size"], row["what"], row["seed"]) for row in rows()}:
                        continue
                    row = run(task, model, what, seed)
                    append(TABLE, row)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
