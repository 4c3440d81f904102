"""Measure settings: the demo's training with one setting changed at a time, scored on its held-out questions.

    python -m benchmarks.settings [--only NAME ...] [--seeds 42 1]
    python -m benchmarks.settings --table            # the rows as docs/settings.md shows them

The bundled model and help desk, six epochs unless the row says otherwise; AdamW, no evaluation in training. Rows go to
results/settings.csv; they hold scores, not times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from importlib import resources
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import philora
from benchmarks.results import RESULTS, append, commit, now

BASE = ["training_config.num_train_epochs=6", "training_config.eval_strategy=no", "training_config.save_strategy=no"]
VARIANTS: dict[str, list[str]] = {
    "demo's settings": [],
    "learning rate 2e-4": ["training_config.learning_rate=2e-4"],
    "learning rate 1e-3": ["training_config.learning_rate=1e-3"],
    "learning rate 1.6e-2": ["training_config.learning_rate=1.6e-2"],
    "r 4, alpha 8": ["peft_config.r=4", "peft_config.lora_alpha=8"],
    "r 16, alpha 32": ["peft_config.r=16", "peft_config.lora_alpha=32"],
    "r 64, alpha 128": ["peft_config.r=64", "peft_config.lora_alpha=128"],
    "attention only": ["peft_config.target_modules=[qkv_proj, o_proj]"],
    "feed-forward only": ["peft_config.target_modules=[gate_up_proj, down_proj]"],
    "q and v slices only": ["peft_config.target_modules=[q_proj, v_proj]"],
    "alpha 16": ["peft_config.lora_alpha=16"],
    "alpha 256": ["peft_config.lora_alpha=256"],
    "r 128, alpha 64": ["peft_config.r=128"],
    "r 128, alpha 64, rsLoRA": ["peft_config.r=128", "peft_config.use_rslora=true"],
    "dropout 0.05": ["peft_config.lora_dropout=0.05"],
    "base in nf4": ["model.quantization=nf4"],
    "one conversation a row": ["training_config.packing=false"],
    "loss on every token": ["data.train=TEXTS"],
    "twelve epochs": ["training_config.num_train_epochs=12"],
    "LoRA+ 16, learning rate 1e-3": ["training_config.loraplus_lr_ratio=16", "training_config.learning_rate=1e-3"],
    "steps of 4096 tokens": ["training_config.tokens_per_step=4096"],
    "a quarter of the data": ["data.train={path: helpdesk, limit: 434}"],
    "a quarter, four times the epochs": [
        "data.train={path: helpdesk, limit: 434}",
        "training_config.num_train_epochs=24",
    ],
}


def as_texts(file: Path) -> Path:
    """The help desk as plain texts through the chat template: philora trains those whole, the user's words too."""
    from transformers import AutoTokenizer

    nano = resources.files("philora") / "nano"
    tokenizer = AutoTokenizer.from_pretrained(str(nano / "model"))
    with (nano / "helpdesk" / "train.jsonl").open(encoding="utf-8") as lines, file.open("w", encoding="utf-8") as out:
        for line in lines:
            text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            out.write(json.dumps({"text": text}) + "\n")
    return file


def table() -> str:
    """All rows in Markdown, the best loss first; of several seeds the values stand beside each other."""
    with (RESULTS / "settings.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    lines = [
        "| the demo with | steps | trained parameters | held-out loss | exact match |",
        "| --- | --- | --- | --- | --- |",
    ]
    named = {name: [row for row in rows if row["what"] == name] for name in dict.fromkeys(row["what"] for row in rows)}
    for name, same in sorted(named.items(), key=lambda item: float(item[1][0]["eval_loss"])):
        same.sort(key=lambda row: row["seed"] != "42")
        losses = ", ".join(f"{float(row['eval_loss']):.3f}" for row in same)
        matches = ", ".join(f"{100 * float(row['exact_match']):.1f}%" for row in same)
        steps, parameters = same[0]["steps"], int(same[0]["trainable_parameters"])
        lines.append(f"| {name} | {steps} | {parameters:,} | {losses} | {matches} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores of the demo's training with one setting changed at a time.")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[42])
    parser.add_argument("--table", action="store_true", help="print the rows and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table(), end="")
        return
    source = str(resources.files("philora") / "nano" / "demo.yaml")
    for seed in given.seeds:
        for name in given.only:
            with tempfile.TemporaryDirectory() as folder:
                place = [f"training_config.output_dir={folder}/run", f"training_config.seed={seed}"]
                texts = as_texts(Path(folder) / "texts.jsonl") if "data.train=TEXTS" in VARIANTS[name] else ""
                changed = [item.replace("TEXTS", str(texts)) for item in VARIANTS[name]]
                results = philora.train(source, [*BASE, *place, *changed], quiet=True).results
            row = {
                "commit": commit(Path(__file__).parents[1]),
                "date": now(),
                "what": name,
                "seed": seed,
                "train_rows": results["data"]["train"]["rows"],
                "steps": results["throughput"]["steps"],
                "trainable_parameters": results["coverage"]["trainable_parameters"],
                "train_loss": round(results["train_loss"], 4),
                "eval_loss": round(results["after"]["loss"], 4),
                "exact_match": round(results["after"]["exact_match"], 4),
                "answers": results["after"]["answers"],
            }
            append(RESULTS / "settings.csv", row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
