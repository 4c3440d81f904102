"""Data preparation: philora's beside TRL's, from a file of conversations to packs.

`python -m benchmarks.preparation [--conversations 50000] [--processes 2] [--rounds N]`

Both read the same JSON lines, apply the bundled model's chat template, tokenise, label the assistant's turns and pack
to 512 tokens; each run is a process of its own with empty caches. Rows go to results/preparation.csv.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import REPOSITORY, environment, peak_bytes, start
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now

PACK_TOKENS = 512
SEED = 2024
SYSTEM = "You are philora's help desk. Answer briefly."


def write_conversations(path: Path, count: int) -> None:
    """Conversations of one to six exchanges of the bundled help desk, one in ten with a system turn."""
    origin = util.find_spec("philora")
    if origin is None or origin.origin is None:
        raise ModuleNotFoundError("philora is not installed in this environment")
    bundled = Path(origin.origin).parent / "nano" / "helpdesk" / "train.jsonl"
    exchanges = []
    for line in bundled.read_text(encoding="utf-8").splitlines():
        messages = [item for item in json.loads(line)["messages"] if item["role"] != "system"]
        exchanges += [messages[at : at + 2] for at in range(0, len(messages) - 1, 2)]
    chance = random.Random(SEED)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = chance.choices(exchanges, k=chance.randint(1, 6))
            messages = [message for turn in turns for message in turn]
            if chance.random() < 0.1:
                messages.insert(0, {"role": "system", "content": SYSTEM})
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ one contestant


def _packer(trainer_class: Any, config_class: Any, folder: str, processes: int) -> Callable[[Any, Any], Any]:
    """The trainer's own preparation of a dataset; the trainer is built around two rows first, outside the clock."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from philora.models.loading import local_path

    arguments = config_class(
        folder,
        packing=True,
        max_length=PACK_TOKENS,
        assistant_only_loss=True,
        dataset_num_proc=processes if processes > 1 else None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    example = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]}

    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(local_path("nano")),
        args=arguments,
        train_dataset=Dataset.from_list([example, example]),
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
    )

    def pack(rows: Any, tokenizer: Any) -> Any:
        return trainer._prepare_dataset(rows, tokenizer, arguments, True, None, "train")

    return pack


def prepare_philora(path: Path, caches: Path, processes: int) -> dict[str, Any]:
    """philora's preparation, as `philora train` calls it, then the trainer's packing."""
    from philora import SFTConfig, SFTTrainer
    from philora.configuration.config import load_config
    from philora.dataset import prepare
    from philora.models import loading as models

    data = {"train": str(path), "eval": None, "num_proc": processes, "cache_dir": str(caches / "philora")}
    config = load_config({"model": {"name_or_path": "nano"}, "data": data})
    tokenizer = models.load_tokenizer(config.model, config.tokenizer)
    stops = models.stop_token_ids(tokenizer, models.load_skeleton(config.model).generation_config.eos_token_id)
    pack = _packer(SFTTrainer, SFTConfig, str(caches), processes)
    clock = time.perf_counter()
    prepared = prepare(config.data, tokenizer, max_length=PACK_TOKENS, seed=SEED, stop_token_ids=stops)
    read = time.perf_counter() - clock
    return _figures(pack(prepared.train, tokenizer), clock, read)


def prepare_trl(path: Path, caches: Path, processes: int) -> dict[str, Any]:
    """`datasets` reads the file; TRL's trainer does the rest."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from philora.models.loading import local_path

    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    pack = _packer(SFTTrainer, SFTConfig, str(caches), processes)
    clock = time.perf_counter()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(caches / "datasets"))
    read = time.perf_counter() - clock
    return _figures(pack(rows, tokenizer), clock, read)


def _figures(packs: Any, clock: float, read: float) -> dict[str, Any]:
    seconds = time.perf_counter() - clock
    import pyarrow.compute as pc

    table = packs.data.table
    flat = pc.list_flatten(table["labels"])
    return {
        "seconds": seconds,
        "read_seconds": read,
        "packs": len(packs),
        "documents": len(pc.list_flatten(table["seq_lengths"])),
        "tokens": len(flat),
        "labels": int(pc.sum(pc.not_equal(flat, -100)).as_py()),
        "peak_bytes": peak_bytes(),
        "worker_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


# Labels that TRL has and philora has not, of each conversation: `<|endoftext|>` after the last answer's `<|end|>`.
CLOSING_LABELS = {"trl": 1, "philora": 0}


def differences(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return where the two made different data, apart from the closing token's label."""
    found = {
        (item["documents"], item["tokens"], item["labels"] - item["documents"] * CLOSING_LABELS[name])
        for name, runs in results.items()
        for item in runs
    }
    if len(found) < 2:
        return []
    return [f"(documents, tokens, labels of answers)={sorted(found)} - expected one, the same for both."]


PREPARERS = {"trl": prepare_trl, "philora": prepare_philora}


def one(name: str, path: Path, processes: int, out: Path) -> None:
    """The body of a contestant's process."""
    with tempfile.TemporaryDirectory() as caches:
        out.write_text(json.dumps(PREPARERS[name](path, Path(caches), processes)), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- all of it


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=50_000)
    parser.add_argument("--processes", default="2", help="numbers of processes, as in 1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one process may take")
    parser.add_argument("--quick", action="store_true", help="500 conversations, 1 round, nothing written")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    given = parser.parse_args(line)
    if given.quick:
        given.conversations, given.rounds, given.no_write = 500, 1, True
    given.processes = [int(item) for item in given.processes.split(",")]
    return given


def main() -> int:
    """Run the benchmark; 1 when a process failed or the two made different data."""
    given = arguments()
    console = Console(soft_wrap=True)
    console.width = max(console.width, 110)
    stamp = {"commit": commit(REPOSITORY), "date": now(), "machine": machine(environment(max(given.processes)))}
    failures: list[str] = []
    table = Table("contestant", "processes", "rows/s", "min..max", "seconds", "x TRL", box=None, pad_edge=False)
    for column in ("peak GB", "worker GB", "tokens", "labels"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        path = folder / "conversations.jsonl"
        write_conversations(path, given.conversations)
        console.print(f"{given.conversations:,} conversations, {path.stat().st_size / 1e6:.1f} MB", highlight=False)
        for processes in given.processes:
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in PREPARERS}
            for number in range(1, given.rounds + 1):
                for name in PREPARERS if number % 2 else reversed(PREPARERS):
                    caches = folder / "caches"
                    env = environment(processes) | {
                        "HF_HOME": str(caches / str(number) / name),
                        "HF_DATASETS_CACHE": str(caches / str(number) / name / "datasets"),
                        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                    }
                    env.pop("TOKENIZERS_PARALLELISM")  # philora's and TRL's own choice
                    command = [sys.executable, "-m", "benchmarks.preparation", "--one", name, str(path), str(processes)]
                    try:
                        result = start(command, folder / name, env, given.timeout)
                    except RuntimeError as error:
                        failures.append(str(error))
                        console.print(f"[red]{error}[/]", highlight=False)
                        console.print((folder / f"{name}.log").read_text(encoding="utf-8")[-2000:], markup=False)
                        continue
                    results[name].append(result)
                    console.print(f"round {number}: {name}, {processes} processes: {result}", highlight=False)
            failures += differences(results)
            reference = [item["seconds"] for item in results["trl"]]
            for name, found in results.items():
                if not found:
                    continue
                seconds = [item["seconds"] for item in found]
                rates = [given.conversations / item for item in seconds]
                peak, worker = (max(item[key] for item in found) for key in ("peak_bytes", "worker_peak_bytes"))
                table.add_row(
                    name,
                    str(processes),
                    f"{median(rates):,.0f}",
                    f"{min(rates):,.0f}..{max(rates):,.0f}",
                    f"{median(seconds):.1f}",
                    f"{median(reference) / median(seconds):.2f}" if reference else "-",
                    f"{peak / 1e9:.2f}",
                    f"{worker / 1e9:.2f}",
                    f"{found[0]['tokens']:,}",
                    f"{found[0]['labels']:,}",
                )
                if not given.no_write:
                    row = {
                        **stamp,
                        "contestant": name,
                        "conversations": given.conversations,
                        "processes": processes,
                        "rounds": len(found),
                        "rows_per_second": round(median(rates), 1),
                        "rows_per_second_min": round(min(rates), 1),
                        "rows_per_second_max": round(max(rates), 1),
                        "seconds": round(median(seconds), 3),
                        "read_seconds": round(median([item["read_seconds"] for item in found]), 3),
                        "peak_bytes": peak,
                        "worker_peak_bytes": worker,
                        **{key: found[0][key] for key in ("packs", "documents", "tokens", "labels")},
                    }
                    append(RESULTS / "preparation.csv", row)
    console.print(table)
    for item in failures:
        console.print(f"[red]{item}[/]", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        sys.exit(main())
