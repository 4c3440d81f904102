"""Ask Phi-3, ask it again with its weights in 4 bits, and fine-tune it with LoRA on conversations.

python examples/Phi_3_Inference_Finetuning.py                                          # needs a GPU and the Hub
python examples/Phi_3_Inference_Finetuning.py --model nano --data examples/data/conversations.jsonl   # a laptop
"""

import argparse

import torch

import philora
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.generation.batches import GenerationSettings, generate
from philora.models.loading import load_model, load_tokenizer

QUESTIONS = [  # with the new tokens that each answer may have
    ("Why is Africa called an emerging economy?", 120),
    ("Write C# code that reads several text files and saves what they hold as one CSV file.", 200),
]

# The published arguments, in today's spelling.
TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 7,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "paged_adamw_32bit",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": None,  # a checkpoint of each epoch stays, as published; philora's default keeps two
    "max_length": 128,  # as published: longer conversations are cut there
    "packing": False,  # so that 7 x 4 rows are 28 conversations, as published
}


def answer(model_id: str, quantization: str, max_new_tokens: int | None) -> list[str]:
    """Load the model, print its answers and give them back."""
    # Fixed: no trust_remote_code. The code in the model's repository breaks generation on today's transformers.
    config = ModelConfig(
        name_or_path=model_id,
        quantization=quantization,
        device_map="cuda" if torch.cuda.is_available() else None,
    )
    tokenizer = load_tokenizer(config, TokenizerConfig())
    model = load_model(config, tokenizer)
    print(f"\n{model_id}, quantization {quantization}: {model.get_memory_footprint() / 1e6:,.1f} MB")
    answers = []
    for question, limit in QUESTIONS:
        # Fixed: a chat message instead of bare text. The model was made for its own markup, which generate() adds.
        chat = [{"role": "user", "content": question}]
        settings = GenerationSettings(do_sample=True, seed=2024, max_new_tokens=min(limit, max_new_tokens or limit))
        answers.append(generate(model, tokenizer, [chat], settings)[0].text)
        print(f"\n> {question}\n{answers[-1]}")
    return answers


def fine_tune(options: argparse.Namespace) -> philora.Run:
    """Train on `conversations: [{from: system|human|gpt, value}]`, a shape that philora recognises by itself."""
    return philora.train(
        {
            "model": {"name_or_path": options.model},
            # Fixed: 5% are held out; the sample evaluates every few steps and has nothing to evaluate on.
            # Fixed: the chat template with <|end|>, the loss on the answers only, and padding that is no end token
            # are philora's defaults. The sample writes "user" and "assistant" as plain text, appends the number of
            # the end token as digits, and pads with the end token, so that the model never learns to stop.
            "data": {"train": {"path": options.data, "limit": options.limit}, "eval": 0.05},
            "training_config": TRAINING | {"output_dir": options.out, "max_steps": options.max_steps},
            # Fixed: LoRA. The sample trains all 3.8 billion weights, which takes several times the memory.
            "peft_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        }
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id, folder, or nano")
    parser.add_argument("--data", default="macadeliccc/opus_samantha", help="hub id or file")
    parser.add_argument("--limit", type=int, default=100, help="records to read")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1: three epochs")
    parser.add_argument("--max-new-tokens", type=int, help="shorter answers")
    parser.add_argument("--out", default="runs/opus-samantha-phi-3-mini-4k", help="run folder, new or empty")
    options = parser.parse_args(arguments)

    answer(options.model, "none", options.max_new_tokens)
    answer(options.model, "nf4", options.max_new_tokens)
    run = fine_tune(options)
    print(f"\nloss on held-out conversations: {run.before.loss:.3f} -> {run.after.loss:.3f}")
    print(f"adapter: {run.adapter}")


if __name__ == "__main__":
    main()
