"""The Phi-3 model card's script, with its trainer and arguments from philora.

    accelerate launch examples/sample_finetune.py                                           # needs a GPU and the Hub
    python examples/sample_finetune.py --model nano --data src/philora/nano/helpdesk/train.jsonl \\
        --epochs 6 --rate 2.4e-3

A step takes 4 x 2048 tokens, and the published rate is one for 3.8 billion parameters and 200,000 conversations. The
bundled help desk makes 8 steps an epoch: nano learns it in more epochs and with a higher rate.

The two dicts are as published: what is spelled otherwise today is translated, with a notice each. The same settings
for `philora train` stand in sample_finetune.yaml.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from philora import SFTConfig as TrainingArguments  # in place of: from transformers import TrainingArguments
from philora import SFTTrainer  # in place of: from trl import SFTTrainer
from philora.models.loading import local_path

training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id, folder, or nano")
    parser.add_argument("--data", default="HuggingFaceH4/ultrachat_200k", help="hub id, or JSON lines with messages")
    parser.add_argument("--limit", type=int, help="conversations to read of each split; all by default")
    parser.add_argument("--max-steps", type=int, default=training_config["max_steps"])
    parser.add_argument("--epochs", type=float, default=training_config["num_train_epochs"])
    parser.add_argument("--rate", type=float, default=training_config["learning_rate"], help="learning rate")
    parser.add_argument("--out", default=training_config["output_dir"], help="folder for checkpoints and adapter")
    options = parser.parse_args(arguments)

    train_conf = TrainingArguments(
        **training_config
        | {
            "output_dir": options.out,
            "max_steps": options.max_steps,
            "num_train_epochs": options.epochs,
            "learning_rate": options.rate,
        },
        # Fixed: the loss is on the assistant's turns; the sample spends it on the user's words too.
        assistant_only_loss=True,
    )
    peft_conf = LoraConfig(**peft_config)

    checkpoint_path = local_path(options.model)
    # Fixed: no trust_remote_code, which breaks generation on today's transformers and is not needed.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_path,
        use_cache=False,
        attn_implementation="flash_attention_2" if find_spec("flash_attn") else "sdpa",
        dtype=torch.bfloat16,  # it was torch_dtype
        device_map=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path)
    tokenizer.model_max_length = 2048
    tokenizer.pad_token = tokenizer.unk_token  # as published: unk and not the end token, so that the end is learned
    tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    tokenizer.padding_side = "right"

    if Path(options.data).is_file():
        splits = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
        train_dataset, test_dataset = splits["train"], splits["test"]
    else:
        train_dataset, test_dataset = load_dataset(options.data, split=["train_sft", "test_sft"])
    # Fixed: the conversations themselves. The sample renders them to text, which no longer says whose words are whose.
    train_dataset, test_dataset = (
        each.select_columns("messages").select(range(min(options.limit or len(each), len(each))))
        for each in (train_dataset, test_dataset)
    )

    trainer = SFTTrainer(
        model=model,
        args=train_conf,
        peft_config=peft_conf,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        max_seq_length=2048,
        tokenizer=tokenizer,
        packing=True,  # today's documents of one row do not see each other
    )
    train_result = trainer.train()
    trainer.log_metrics("train", train_result.metrics)
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()

    tokenizer.padding_side = "left"
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(test_dataset)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model(train_conf.output_dir)


if __name__ == "__main__":
    main()
