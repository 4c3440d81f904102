"""Phi-3-mini at full size on a small machine: memory and time from a folder on disk to steps of 2048 tokens.

    python -m benchmarks.full_size --folder DIR              # write it, then one process for each measurement
    python -m benchmarks.full_size --folder DIR --layers 2   # the same in small, to try the script

Writes a bf16 folder of the model's shape with random weights (7.6 GB, a layer at a time), and trains over it with
`philora.train` as a configuration would: in nf4, in nf4 under a limit on memory, and in bf16, with recomputation.
`reference` compares the loss of 2048 tokens over nf4 weights with those over the dequantised ones: with the same
functions, and with transformers' own modules, whose bf16 roundings are others. Each is a process of its own; a thread
samples the process's anonymous memory.

Memory is RssAnon of /proc/self/status: what the process holds and cannot get back from a file. Weights of a bf16 base
are pages of the folder's files and count as RssFile, which is shown beside it.

With `--rounds` above 1 the measurements take turns. Every one is a row of results/full_size.csv, unless `--no-write`.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process import start
from benchmarks.rate import machine
from benchmarks.results import RESULTS, append, commit, now

TOKENS = 2048
GIB = 2**30
MEASUREMENTS = ("nf4", "nf4-limited", "bf16", "reference")


# ----------------------------------------------------------------------------------------------- the folder


def write_folder(folder: Path, layers: int, hidden: int) -> None:
    """The shape of Phi-3-mini-4k as bf16 files of four layers each, with the bundled model's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config, Phi3ForCausalLM

    from philora.models.loading import local_path

    source = Path(local_path("nano"))
    special = json.loads((source / "config.json").read_text())
    config = Phi3Config(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=32,
        sliding_window=2047,
        dtype="bfloat16",
        architectures=["Phi3ForCausalLM"],
        **{name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    with torch.device("meta"):
        skeleton = Phi3ForCausalLM(config)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton.named_parameters():
        index = next((part for part in name.split(".") if part.isdigit()), None)
        part = f"layers-{int(index) // 4}" if index is not None else name.split(".")[-2]
        parts.setdefault(part, {})[name] = parameter.shape
    needed = 2 * sum(shape.numel() for part in parts.values() for shape in part.values())
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed + GIB:
        sys.exit(f"{folder}: {needed / 1e9:.1f} GB and some more are needed")
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, (part, shapes) in enumerate(parts.items(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            tensors[name] = tensor if len(shape) == 1 else tensor.normal_(0, 0.02, generator=generator)
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        print(f"  {part}: {file}", flush=True)
    index = {"metadata": {"total_size": needed}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(source / file, folder / file)


# ------------------------------------------------------------------------------------------------ measuring


class Memory(threading.Thread):
    """Samples this process's memory; `peak` is kept apart for each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "loading"
        self.peak: dict[str, dict[str, int]] = {}

    def run(self) -> None:
        """Take a sample every 10 ms."""
        while True:
            self.sample()
            time.sleep(0.01)

    def sample(self) -> None:
        """Take a sample."""
        seen = {}
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("RssAnon", "RssFile", "VmData"):
                seen[name] = int(rest.split()[0]) * 1024
        peak = self.peak.setdefault(self.phase, {})
        for name, value in seen.items():
            peak[name] = max(peak.get(name, 0), value)


def train(folder: Path, quantization: str, steps: int, work: Path) -> dict[str, Any]:
    """`philora.train` for some steps; the times of the steps and the peak before and after the first began."""
    from transformers import TrainerCallback

    import philora

    memory = Memory()
    memory.start()
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory.phase = "training"

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            moments.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.monotonic())

    begun = time.monotonic()
    atexit.register(lambda: print(memory.peak, file=sys.stderr))  # also when the limit ends the run
    result = philora.train(
        {
            "model": {"name_or_path": str(folder), "dtype": "bfloat16", "quantization": quantization},
            "data": {"train": "helpdesk", "eval": None},
            "training_config": {
                "output_dir": str(work),
                "max_length": TOKENS,
                "max_steps": steps,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": True,
                "save_strategy": "no",
                "logging_steps": 1,
            },
            "peft_config": {"r": 16, "lora_alpha": 32},
        },
        callbacks=[Clock()],
        quiet=True,
    )
    memory.sample()
    losses = [json.loads(line).get("loss") for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {
        "before_training_seconds": round(moments[0] - begun, 1),
        "step_seconds": [round(b - a, 1) for a, b in zip(moments[::2], moments[1::2], strict=True)],
        "losses": [loss for loss in losses if loss is not None],
        "peak_gib": {
            phase: {name: round(value / GIB, 2) for name, value in peak.items()} for phase, peak in memory.peak.items()
        },
        "parameters": result.results["model"]["parameters"],
    }


def compare(folder: Path) -> dict[str, Any]:
    """Loss of 2048 tokens over nf4 weights, and over dequantised ones with and without the fast functions."""
    import torch
    from peft import LoraConfig

    import philora
    from philora.configuration.sections import ModelConfig
    from philora.kernels.quantization import dequantize_
    from philora.lora.functional import fused
    from philora.models.loading import load_model

    base = load_model(ModelConfig(name_or_path=str(folder), dtype="bfloat16", quantization="nf4"))
    tokens = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    model = philora.get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    losses = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.01, generator=torch.Generator().manual_seed(1))
        losses["fast, over nf4"] = float(model(input_ids=tokens, labels=tokens).loss)
        dequantize_(base)
        gc.collect()
        losses["fast, over the dequantised weights"] = float(model(input_ids=tokens, labels=tokens).loss)
        base.set_attn_implementation("sdpa")
        with fused(False):
            losses["plain, over the dequantised weights"] = float(model(input_ids=tokens, labels=tokens).loss)
    return {"losses": list(losses.values()), "of": list(losses)}


# ------------------------------------------------------------------------------------------------ the processes


def measure(name: str, folder: Path, steps: int, limit_gib: float) -> dict[str, Any]:
    """Measure in a separate process, whose log is written beside the folder."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--folder", str(folder), "--child", name]
    command += ["--steps", str(steps), "--limit", str(limit_gib), "--out"]
    environment = os.environ | {
        "GOMP_SPINCOUNT": "10000",  # else waiting threads take the cores from each other
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own reserves 1 GiB, which counts though it is not touched
    }
    try:
        return start(command, folder.with_name(f"{folder.name}-{name}"), environment, None)
    except RuntimeError as error:
        return {"failed": str(error)}


def child(name: str, folder: Path, steps: int, limit_gib: float | None) -> dict[str, Any]:
    """Run a measurement in this process."""
    if limit_gib is not None:
        # Anonymous memory and everything else that is private and writable, touched or not: stricter than a limit on
        # what is resident.
        limit = int(limit_gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if name == "reference":
        return compare(folder)
    work = folder / f"run-{name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        return train(folder, "none" if name == "bf16" else "nf4", steps, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def row(name: str, given: argparse.Namespace, figures: dict[str, Any]) -> dict[str, str | int | float]:
    """A line of the table; what a measurement does not have stays empty."""
    peak = figures.get("peak_gib", {})
    seconds = figures.get("step_seconds", [])[1:]  # the first step also allocates
    return {
        "commit": commit(Path(__file__).parents[1]),
        "date": now(),
        "machine": machine(os.environ),
        "what": name,
        "layers": given.layers,
        "hidden": given.hidden,
        "limit_gib": given.limit if name.endswith("limited") else "",
        "anonymous_gib_loading": peak.get("loading", {}).get("RssAnon", ""),
        "anonymous_gib_training": peak.get("training", {}).get("RssAnon", ""),
        "file_pages_gib": max((phase["RssFile"] for phase in peak.values()), default=""),
        "seconds_before_training": figures.get("before_training_seconds", ""),
        "steps_timed": len(seconds),
        "step_seconds": round(median(seconds), 2) if seconds else "",
        "step_seconds_min": min(seconds, default=""),
        "step_seconds_max": max(seconds, default=""),
        "losses": " ".join(f"{loss:.5f}" for loss in figures.get("losses", [])),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Phi-3-mini at full size: memory and time.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=6.5, help="GiB, of nf4-limited")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--no-write", action="store_true", help="add no rows to the table")
    parser.add_argument("--child", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        limit = given.limit if given.child.endswith("limited") else None
        given.out.write_text(json.dumps(child(given.child, given.folder, given.steps, limit)), encoding="utf-8")
        return
    if not (given.folder / "config.json").exists():
        write_folder(given.folder, given.layers, given.hidden)
    times: dict[str, list[float]] = {}
    failed = False
    try:
        for _ in range(given.rounds):
            for name in given.only:
                figures = measure(name, given.folder, given.steps, given.limit)
                print(name, json.dumps(figures, indent=1), flush=True)
                failed = failed or "failed" in figures
                times.setdefault(name, []).extend(figures.get("step_seconds", [])[1:])
                if not given.no_write and "failed" not in figures:
                    append(RESULTS / "full_size.csv", row(name, given, figures))
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)
    if times.get("nf4") and times.get("bf16"):
        print(f"a step over nf4 takes {median(times['nf4']) / median(times['bf16']):.2f} times that over bf16")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
