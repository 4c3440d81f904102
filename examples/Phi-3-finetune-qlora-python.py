"""Teach Phi-3 to write Python with QLoRA: LoRA over a base in 4 bits, merged into a fresh 16-bit base afterwards.

python examples/Phi-3-finetune-qlora-python.py                                          # needs a GPU and the Hub
python examples/Phi-3-finetune-qlora-python.py --model nano --data examples/data/python_code.jsonl

Weights & Biases logs the run where `wandb` is installed; WANDB_MODE=offline keeps that on this machine.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import HfApi
from python_code import COLUMNS, DATASET, look_for_needs, rouge_of, split

import philora

# The published settings, in today's spelling; what differs from the LoRA sample stands first.
TRAINING = {
    "optim": "paged_adamw_8bit",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "num_train_epochs": 3,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # of the run; it was warmup_ratio
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 100,
    "save_strategy": "epoch",
    "save_total_limit": None,  # a checkpoint of each epoch stays, as published; philora's default keeps two
    "max_length": 512,
    "packing": False,  # so that 4 x 8 rows are 32 examples, as published
    "seed": 42,
}
LORA = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    # Fixed by philora: slices of Phi-3's fused modules, of which PEFT alone would find two; see the LoRA sample.
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id, folder, or nano")
    parser.add_argument("--data", default=DATASET, help="hub id or JSON lines of the same columns")
    parser.add_argument("--limit", type=int, help="records to read; all by default")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1: three epochs")
    parser.add_argument("--answers", type=int, default=500, help="held-out rows for ROUGE")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", default="runs/phi-3-mini-QLoRA", help="folder for everything, new or empty")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="repository for the merged model; the adapter's is NAME-LoRA"
    )
    options = parser.parse_args(arguments)
    out = Path(options.out)
    os.environ.setdefault("WANDB_PROJECT", "Phi3-mini-ft-python-code")
    look_for_needs(options.push)

    # 1. Train over 4-bit weights: nf4 means NF4 with double quantisation, each product in `dtype`.
    train, test = split(options.data, out / "data", options.limit)
    run = philora.train(
        {
            "model": {
                "name_or_path": options.model,
                "quantization": "nf4",
                "device_map": "cuda" if torch.cuda.is_available() else None,
            },
            "data": {"train": {"path": train, "columns": COLUMNS}, "eval": {"path": test, "columns": COLUMNS}},
            "training_config": TRAINING
            | {
                "output_dir": str(out / "run"),
                "max_steps": options.max_steps,
                "report_to": ["wandb"] if find_spec("wandb") else "none",
                "run_name": out.name,
            },
            "peft_config": LORA,
        }
    )

    # 2. Merge into a fresh base, as published. Without fresh_base the result would be the 4-bit weights that were
    #    trained over, written out in 16 bits: exactly what training saw, with their rounding.
    merged = philora.merge_to_folder(run.folder, out / "merged", fresh_base=True)
    print(f"\nmerged: {merged.folder}\n{merged.agreement}")

    # 3. Publish, if asked to: the adapter, then the model that was merged into the fresh base, with its tokenizer.
    if options.push:
        print(philora.push(run.folder, f"{options.push}-LoRA").url)
        hub = HfApi()
        hub.create_repo(options.push, exist_ok=True)
        print(hub.upload_folder(repo_id=options.push, folder_path=merged.folder).commit_url)

    # 4. Ask the merged model what it was not trained on, many questions at a time.
    scores = rouge_of(merged.folder, test, options.answers, options.max_new_tokens, batch_size=32)
    print("\n" + "  ".join(f"{kind} {score:.1f}" for kind, score in scores.items()))


if __name__ == "__main__":
    main()
