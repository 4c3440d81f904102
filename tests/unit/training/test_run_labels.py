"""What is trained on the two surfaces: `philora train` and `philora.SFTTrainer` on the same conversations."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
from peft import LoraConfig
from transformers import AutoTokenizer

import philora
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import prepare

NANO = Path(philora.__file__).parent / "nano"
ROWS = NANO / "helpdesk" / "eval.jsonl"


def test_the_trainer_has_one_more_label_in_each_conversation_as_trl_has(tmp_path):
    """`docs/data.md` states both numbers: the template's `<|endoftext|>` makes the difference."""
    tokenizer = AutoTokenizer.from_pretrained(NANO / "model")
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    source = DataConfig(train=(SourceConfig(str(ROWS)),), eval=None, num_proc=1, cache_dir=str(tmp_path / "cache"))
    prepared = prepare(source, tokenizer, max_length=512, seed=0, stop_token_ids=stops).train
    command = sum(sum(label != -100 for label in row["labels"]) for row in prepared)

    rows = datasets.load_dataset("json", data_files=str(ROWS), split="train", cache_dir=str(tmp_path / "rows"))
    arguments = philora.SFTConfig(
        str(tmp_path / "out"), report_to=[], use_cpu=True, packing=False, assistant_only_loss=True, max_length=512
    )
    trainer = philora.SFTTrainer(
        str(NANO / "model"),
        args=arguments,
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    surface = sum(int((batch["labels"] != -100).sum()) for batch in trainer.get_train_dataloader())
    assert surface - command == len(rows)
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.search(rf"{len(rows)}\D+{surface:,} labels \D+{command:,}\b", page)
