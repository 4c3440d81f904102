"""Adapters of the bundled model that each say a sentence of their own, for tests of chat and endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig

import philora
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.models.loading import load_model, load_tokenizer

NANO = ModelConfig(name_or_path="nano", dtype="float32")
QUESTIONS = ("Who are you?", "What is your colour?", "Say something.", "And now?", "Tell me, please: who is it?")


def teach(folder: Path, sentence: str, questions: Sequence[str] = QUESTIONS, steps: int = 80) -> Path:
    """Train an adapter by a few steps until it answers everything with one sentence, and save it as a run would."""
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = philora.get_peft_model(load_model(NANO, tokenizer), config)
    rows, labels = [], []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = tokenizer(f"{sentence}<|end|>", add_special_tokens=False)["input_ids"]
        rows.append(start + end)
        labels.append([-100] * len(start) + end)
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if float(loss.detach()) < 0.02:
            break
    else:
        raise AssertionError(f"it did not learn {sentence!r}")
    model.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(str(folder / "adapter"))
    (folder / "config.yaml").write_text("model: {name_or_path: nano, dtype: float32}\ndata: {train: helpdesk}\n")
    (folder / "run.json").write_text("{}")  # by it a folder is known as a run
    return folder
