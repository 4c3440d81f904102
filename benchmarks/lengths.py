"""philora's cost of a token at packs of 512 to 8192 tokens: the same conversations, about the same tokens a step.

`python -m benchmarks.lengths [--tokens 512,1024,...] [--contestants philora-0,...] [--rounds N]`

Conversations are clipped to 512 tokens, so that every pack can hold them; a step is as many packs as make up the
longest of the packs. Packs shorter than `--together` tokens share a micro-batch of about as many, as a run plans them
by itself; the micro-batches come one after the other. Rows go to results/lengths.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS
from benchmarks.process import REPOSITORY, Task, environment, start, write_work
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now
from benchmarks.work import WORKS, default_root

LENGTHS = (512, 1024, 2048, 4096, 8192)
CLIP_TOKENS = 512


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="a", choices=WORKS)
    parser.add_argument("--tokens", default=",".join(map(str, LENGTHS)), help="of the packs")
    parser.add_argument("--base", type=int, default=2048, help="the pack that costs are relative to")
    parser.add_argument("--contestants", default="philora-0", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--together", type=int, default=2048, help="tokens of shorter packs that make a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one process may take")
    parser.add_argument("--work-dir", type=Path, default=default_root(), help="model, data and logs")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short packs, nothing written")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    given = parser.parse_args(line)
    if given.quick:
        given.work, given.tokens, given.base, given.rounds, given.no_write = "quick", "64,128,256", 128, 1, True
        given.threads = 1
    given.tokens = [int(item) for item in given.tokens.split(",")]
    given.contestants = given.contestants.split(",")
    for name in given.contestants:
        if name not in CONTESTANTS:
            parser.error(f"--contestants: {name!r} - expected some of {', '.join(CONTESTANTS)}")
    if given.base not in given.tokens:
        parser.error(f"--base: {given.base} - expected one of --tokens, {given.tokens}")
    return given


def main() -> int:
    """Run the benchmark; 1 when a process failed."""
    given = arguments()
    console = Console(soft_wrap=True)
    folder = given.work_dir / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(given.threads)
    clip, longest = min(CLIP_TOKENS, *given.tokens), max(given.tokens)
    tasks: dict[tuple[str, int], Task] = {}
    for tokens in given.tokens:
        change = {"longest_tokens": clip, "row_tokens": tokens}
        work = replace(WORKS[given.work], **change)
        write_work(work.name, given.work_dir, env, change)
        model, data = str(work.model_folder(given.work_dir)), str(work.data_file(given.work_dir))
        for name in given.contestants:
            rows = longest // tokens
            together = min(rows, max(1, given.together // tokens))
            tasks[name, tokens] = Task(
                name, model, data, work, given.warmup, given.steps, rows, together, given.threads
            )

    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in tasks}
    peaks: dict[tuple[str, int], int] = dict.fromkeys(tasks, 0)
    failures = []
    for number in range(1, given.rounds + 1):
        for key in tasks if number % 2 else reversed(tasks):
            name, tokens = key
            command = [sys.executable, "-m", "benchmarks.contestants", tasks[key].to_json()]
            try:
                result = start(command, folder / f"{name}-{tokens}", env, given.timeout)
            except RuntimeError as error:
                failures.append(str(error))
                console.print(f"[red]{error}[/]", highlight=False)
                continue
            speeds[key].append(result["tokens_per_second"])
            peaks[key] = max(peaks[key], result["peak_bytes"])
            figures = f"{result['tokens_per_second']:,.1f} tokens/s, tokens of the steps {result['tokens']}"
            console.print(f"round {number}: {name}, packs of {tokens}: {figures}", highlight=False)

    table = Table("contestant", "pack", "tokens/s", "min..max", "cost of a token", "peak GB", box=None, pad_edge=False)
    stamp = {"commit": commit(REPOSITORY), "date": now(), "machine": machine(env)}
    for (name, tokens), found in speeds.items():
        base = speeds[name, given.base]
        if not found:
            table.add_row(name, str(tokens), "failed")
            continue
        cost = median(base) / median(found) if base else None
        table.add_row(
            name,
            str(tokens),
            f"{median(found):,.1f}",
            f"{min(found):,.1f}..{max(found):,.1f}",
            f"{cost:.3f}" if cost else "-",
            f"{peaks[name, tokens] / 1e9:.2f}",
        )
        if not given.no_write:
            row = {
                **stamp,
                "threads": given.threads,
                "work": given.work,
                "contestant": name,
                "pack_tokens": tokens,
                "packs_per_step": longest // tokens,
                "packs_per_micro_batch": tasks[name, tokens].together,
                "rounds": len(found),
                "tokens_per_second": round(median(found), 2),
                "tokens_per_second_min": round(min(found), 2),
                "tokens_per_second_max": round(max(found), 2),
                "relative_to_tokens": given.base,
                "relative_cost": round(cost, 4) if cost else "",
                "peak_bytes": peaks[name, tokens],
            }
            append(RESULTS / "lengths.csv", row)
    console.print(table)
    console.print(f"cost of a token: relative to packs of {given.base}; conversations of at most {clip} tokens")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
