"""Tokens per second beside transformers' text-generation pipeline: the same weights, prompts and batch, side by side.

`python -m benchmarks.generation [--work nano,a] [--rounds N] [--batch 16] [--prompts 64] [--new-tokens 64]`

Contestants, each greedy: transformers' pipeline and `philora.generation.batches`, over base and adapter as PEFT loads
them, and over the adapter merged into the weights. All run in one process, in turn, every other round backwards. Tokens
are those up to each answer's stop. In fp32 all give the same answers; in bf16 the order of the sums decides between
tokens that are all but equally likely, and PEFT computes its adapters in fp32 where philora, as in training, does not.

Work `nano` is the bundled model, whose answers end by themselves at different lengths; `a` has random weights, so that
nearly every answer has the full length, which favours the pipeline. Seconds of the process on all cores stand beside
the wall time: where other processes disturb, they say more. Rows go to results/generation.csv.

`--device cuda`, or `--rows 1,64`, times so many rows together, on Phi-3-mini's shape (`mini`) or `nano`, beside
transformers' own `generate`: see benchmarks/generation_rows.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.process import REPOSITORY, environment, write_work
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now
from benchmarks.work import WORKS, default_root

SHAPES = ("nano", *(name for name, work in WORKS.items() if work.vocabulary >= 4096))
"""Works whose vocabulary holds the bundled tokenizer's."""


class Timed(NamedTuple):
    """Hold a round of a contestant."""

    texts: list[str]
    tokens: int
    seconds: float
    cpu_seconds: float


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--work", help=f"of {', '.join(SHAPES)}; default nano,a; with --rows nano or mini")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rows", help="numbers of rows that are answered together; default with --device cuda: 1,64")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, help="default 64; with --rows 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, default=default_root(), help="models")
    parser.add_argument("--quick", action="store_true", help="the bundled model and few prompts, nothing written")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    given = parser.parse_args(line)
    given.rows = given.rows or ("1,64" if given.device == "cuda" else "")
    if given.rows and not all(item.isdigit() and int(item) for item in given.rows.split(",")):
        parser.error(f"--rows: {given.rows!r} - expected numbers of at least 1")
    given.rows = [int(item) for item in given.rows.split(",") if item]
    given.new_tokens = given.new_tokens or (256 if given.rows else 64)
    given.work = given.work or ("mini" if given.rows else "nano,a")
    if given.quick:
        given.work, given.prompts, given.new_tokens, given.rounds = "nano", 6, 8, 1
        given.batch, given.threads, given.no_write = 4, 1, True
        given.rows = given.rows and [1, 3]
    given.work = given.work.split(",")
    known = ("nano", "mini") if given.rows else SHAPES
    for name in given.work:
        if name not in known:
            parser.error(f"--work: {name!r} - expected some of {', '.join(known)}")
    return given


def prompts(count: int) -> list[list[dict[str, str]]]:
    """Questions of the bundled help desk, held-out ones first."""
    found = []
    for name in ("eval", "train"):
        text = (resources.files("philora") / "nano" / "helpdesk" / f"{name}.jsonl").read_text(encoding="utf-8")
        found += [json.loads(line)["messages"][:-1] for line in text.splitlines()]
    return found[:count]


def contestants(folder: str, given: argparse.Namespace) -> dict[str, Callable[[], Timed]]:
    """Return the work of every contestant in a round."""
    import torch
    from transformers import AutoModelForCausalLM, pipeline

    from benchmarks.generation_rows import with_adapter
    from philora.adapters.fast_layers import optimize
    from philora.configuration.sections import ModelConfig, TokenizerConfig
    from philora.generation.batches import GenerationSettings, generate
    from philora.models import loading as models

    tokenizer = models.load_tokenizer(ModelConfig(name_or_path=folder), TokenizerConfig(padding_side="left"))
    questions = prompts(given.prompts)

    def adapted() -> Any:
        model = AutoModelForCausalLM.from_pretrained(models.local_path(folder), dtype=getattr(torch, given.dtype))
        models.set_stops(model, tokenizer)
        return with_adapter(model)

    def by_pipeline(model: Any) -> Callable[[], Timed]:
        # The pipeline warns of a PeftModel, which it does not know; the model inside holds the same layers.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        answer = pipeline("text-generation", model=inner, tokenizer=tokenizer)
        stops = set(models.stop_token_ids(tokenizer, inner.generation_config.eos_token_id))

        def run() -> Timed:
            begun, cpu = time.perf_counter(), time.process_time()
            found = answer(
                questions,
                batch_size=given.batch,
                do_sample=False,
                max_new_tokens=given.new_tokens,
                return_tensors=True,
            )
            seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
            texts, tokens = [], 0
            for (item,), question in zip(found, questions, strict=True):
                text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids = list(item["generated_token_ids"])
                start = next(at for at in range(len(ids)) if ids[at : at + len(prompt)] == prompt) + len(prompt)
                ids = ids[start : start + given.new_tokens]
                end = next((at for at, token in enumerate(ids) if token in stops), None)
                tokens += len(ids) if end is None else end + 1
                texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
            return Timed(texts, tokens, seconds, cpu_seconds)

        return run

    def by_philora(model: Any) -> Callable[[], Timed]:
        settings = GenerationSettings(max_new_tokens=given.new_tokens, batch_size=given.batch)

        def run() -> Timed:
            begun, cpu = time.perf_counter(), time.process_time()
            found = generate(model, tokenizer, questions, settings)
            seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
            return Timed([item.text for item in found], sum(item.tokens for item in found), seconds, cpu_seconds)

        return run

    merged = adapted().merge_and_unload().eval()
    return {
        "pipeline, adapter": by_pipeline(adapted()),
        "pipeline, merged": by_pipeline(merged),
        "philora, adapter": by_philora(optimize(adapted())),
        "philora, merged": by_philora(merged),
    }


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    env = environment(given.threads)
    os.environ |= {name: env[name] for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in env}
    import torch

    torch.set_num_threads(given.threads)
    console = Console(soft_wrap=True)
    console.width = max(console.width, 124)
    if given.rows:
        return by_rows(given, console)
    stamp = {"commit": commit(REPOSITORY), "date": now(), "machine": machine(env)}
    for name in given.work:
        folder = name
        if name != "nano":
            write_work(name, given.work_dir, env)
            folder = str(WORKS[name].model_folder(given.work_dir))
        runs = contestants(folder, given)
        rounds: dict[str, list[Timed]] = {item: [] for item in runs}
        for item in runs.values():
            item()  # warm-up
        for number in range(given.rounds):
            for item in runs if number % 2 == 0 else reversed(runs):
                rounds[item].append(runs[item]())
        report(console, given, name, rounds, stamp)
    return 0


def by_rows(given: argparse.Namespace, console: Console) -> int:
    """Time so many rows together; 1 where philora answered on a card without a graph."""
    import torch

    from benchmarks.generation_rows import measure

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: cuda - expected a CUDA GPU that torch can use. Leave it out to use the CPU.")
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    stamp = {"commit": commit(REPOSITORY), "date": now(), "device": name}
    faults = []
    for work in given.work:
        rows, wrong = measure(
            work, given.device, given.dtype, given.rows, given.new_tokens, given.rounds, prompts, console
        )
        faults += wrong
        for row in rows if not given.no_write else []:
            append(RESULTS / "generation_gpu.csv", stamp | row)
    for item in faults:
        console.print(item, style="red", highlight=False, markup=False)
    return int(bool(faults))


def report(
    console: Console, given: argparse.Namespace, work: str, rounds: dict[str, list[Timed]], stamp: dict[str, str]
) -> None:
    """Table and rows: speeds relative to the faster pipeline, and how many answers are the pipeline's."""
    speeds = {name: median(item.tokens / item.seconds for item in found) for name, found in rounds.items()}
    cpu = {name: median(1e3 * item.cpu_seconds / item.tokens for item in found) for name, found in rounds.items()}
    reference = max(speed for name, speed in speeds.items() if name.startswith("pipeline"))
    table = Table("contestant", "tokens/s", "", "CPU ms/token", "tokens", "same answers", title=work, box=None)
    for name, found in rounds.items():
        own = rounds[f"pipeline, {name.split(', ')[1]}"][0].texts
        same = sum(a == b for a, b in zip(found[0].texts, own, strict=True))
        table.add_row(
            name,
            f"{speeds[name]:,.0f}",
            f"{speeds[name] / reference:.2f}x",
            f"{cpu[name]:.3f}",
            f"{found[0].tokens:,}",
            f"{same}/{len(own)}",
        )
        if given.no_write:
            continue
        row: dict[str, str | int | float] = {
            **stamp,
            "threads": given.threads,
            "work": work,
            "dtype": given.dtype,
            "contestant": name,
            "batch": given.batch,
            "prompts": len(own),
            "new_tokens": given.new_tokens,
            "rounds": len(found),
            "tokens": found[0].tokens,
            "tokens_per_second": round(speeds[name], 1),
            "tokens_per_second_min": round(min(item.tokens / item.seconds for item in found), 1),
            "tokens_per_second_max": round(max(item.tokens / item.seconds for item in found), 1),
            "cpu_ms_per_token": round(cpu[name], 4),
            "relative_to_best_pipeline": round(speeds[name] / reference, 3),
            "answers_as_the_pipeline": round(same / len(own), 4),
        }
        append(RESULTS / "generation.csv", row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
