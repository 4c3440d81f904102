"""Teach Phi-3 to write Python with LoRA, merge, push to the Hugging Face Hub, and score it with ROUGE.

    python examples/Phi-3-finetune-lora-python.py                                           # needs a GPU and the Hub
    python examples/Phi-3-finetune-lora-python.py --model nano --data examples/data/python_code.jsonl

Weights & Biases logs the run where `wandb` is installed; WANDB_MODE=offline keeps that on this machine.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from python_code import COLUMNS, DATASET, look_for_needs, rouge_of, split

import philora

# The published settings, in today's spelling.
TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # of the run; it was warmup_ratio
    "optim": "adamw_torch",
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 100,
    "save_strategy": "epoch",
    "save_total_limit": None,  # a checkpoint of each epoch stays, as published; philora's default keeps two
    "max_length": 512,
    "packing": False,  # so that 8 x 4 rows are 32 examples, as published
    "seed": 42,
}
LORA = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    # Fixed by philora: Phi-3 has only the fused qkv_proj and gate_up_proj, and PEFT silently adapts the two of these
    # names that it finds, 8,912,896 parameters. Here all seven train, as slices: 29,884,416.
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def precision() -> tuple[dict, dict]:
    """bf16 with flash_attention_2 where both are there, else fp16 with sdpa; a CPU takes what is fast on it."""
    if not torch.cuda.is_available():
        return {}, {}
    if torch.cuda.is_bf16_supported(including_emulation=False):
        # philora's own attention (auto) does what flash_attention_2 does, where that is not installed.
        attention = "flash_attention_2" if find_spec("flash_attn") else "auto"
        return {"dtype": "bfloat16", "attn_implementation": attention, "device_map": "cuda"}, {}
    return {"dtype": "float16", "attn_implementation": "sdpa", "device_map": "cuda"}, {"fp16": True}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id, folder, or nano")
    parser.add_argument("--data", default=DATASET, help="hub id or JSON lines of the same columns")
    parser.add_argument("--limit", type=int, help="records to read; all by default")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1: three epochs")
    parser.add_argument("--answers", type=int, default=500, help="held-out rows for ROUGE")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", default="runs/phi-3-mini-LoRA", help="folder for everything, new or empty")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="repository for the merged model; the adapter's is NAME-LoRA"
    )
    options = parser.parse_args(arguments)
    out = Path(options.out)
    os.environ.setdefault("WANDB_PROJECT", "Phi3-mini-ft-python-code")
    look_for_needs(options.push)

    # 1. Train. Fixed by philora's defaults: the loss is on the assistant's answers, not on the user's words.
    train, test = split(options.data, out / "data", options.limit)
    model, arithmetic = precision()
    run = philora.train(
        {
            "model": {"name_or_path": options.model, **model},
            "data": {"train": {"path": train, "columns": COLUMNS}, "eval": {"path": test, "columns": COLUMNS}},
            "training_config": TRAINING
            | arithmetic
            | {
                "output_dir": str(out / "run"),
                "max_steps": options.max_steps,
                "report_to": ["wandb"] if find_spec("wandb") else "none",
                "run_name": out.name,
            },
            "peft_config": LORA,
        }
    )

    # 2. Merge into the 16-bit base. What is written is compared with what was trained before it gets its name.
    merged = philora.merge_to_folder(run.folder, out / "merged")
    print(f"\nmerged: {merged.folder}\n{merged.agreement}")

    # 3. Publish, if asked to: the adapter, then the merged model, each with its tokenizer and a card.
    if options.push:
        print(philora.push(run.folder, f"{options.push}-LoRA").url)
        print(philora.push(run.folder, options.push, merged=True).url)

    # 4. Ask the merged model what it was not trained on.
    scores = rouge_of(merged.folder, test, options.answers, options.max_new_tokens, batch_size=16)
    print("\n" + "  ".join(f"{kind} {score:.1f}" for kind, score in scores.items()))


if __name__ == "__main__":
    main()
