"""Fine-tune Phi-3 on conversations, as a TRL script whose trainer comes from philora.

python examples/FineTrainingScript.py                                                   # needs a GPU and the Hub
python examples/FineTrainingScript.py --model nano --data examples/data/conversations.jsonl --max-steps 20
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from philora import SFTConfig, SFTTrainer  # in place of: from trl import SFTConfig, SFTTrainer
from philora.models.loading import local_path

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def to_messages(example: dict) -> dict:
    # Fixed: messages, which TRL puts into Phi's own markup with <|end|> behind each turn. The sample joins the turns
    # by the words "user" and "assistant", a format that nobody asks the model in.
    turns = example["conversations"]
    return {"messages": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id, folder, or nano")
    parser.add_argument("--data", default="macadeliccc/opus_samantha", help="hub id or JSON lines")
    parser.add_argument("--limit", type=int, help="records to read; all by default")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1: three epochs")
    parser.add_argument("--out", default="runs/phi-3-mini-finetuned", help="folder for checkpoints and adapter")
    options = parser.parse_args(arguments)

    # float16 weights as published, on a GPU: a CPU computes in it slowly, and without a loss scaler.
    half = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        local_path(options.model), dtype=torch.float16 if half else torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(local_path(options.model))
    # Fixed: padding that is no end token. Phi-3's tokenizer pads with <|endoftext|>, which tools then mask out.
    tokenizer.pad_token = tokenizer.unk_token

    rows = (
        load_dataset("json", data_files=options.data, split="train")
        if Path(options.data).is_file()
        else load_dataset(options.data, split="train")
    )
    rows = rows.select(range(min(options.limit or len(rows), len(rows))))
    rows = rows.map(to_messages, remove_columns=rows.column_names)
    # Fixed: 5% are held out; the sample evaluates every few steps and has nothing to evaluate on.
    splits = rows.train_test_split(test_size=0.05, seed=2024)

    args = SFTConfig(
        output_dir=options.out,
        num_train_epochs=3,
        max_steps=options.max_steps,
        per_device_train_batch_size=7,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        optim="paged_adamw_32bit",
        fp16=half,
        bf16=False,
        eval_strategy="steps",
        save_strategy="epoch",
        logging_steps=10,
        max_length=128,  # as published: longer conversations are cut there
        assistant_only_loss=True,  # Fixed: the sample spends its loss on the user's words too
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        # Fixed: LoRA, in float32 beside the weights. The sample trains all 3.8 billion weights, and those are float16,
        # whose gradients torch's loss scaler refuses.
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    print(f"held-out loss: {trainer.evaluate()['eval_loss']:.3f}")
    trainer.save_model()
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
