"""Every setting in which an example differs from the original stands in the table of examples/README.md, and no other.

What the originals set is written down here; a key that an original does not name has the default of transformers. The
settings of the examples are read from their files.
"""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from philora.configuration import schema
from philora.configuration.config import load_config
from philora.configuration.fields import OWN_TRAINING_KEYS
from philora.configuration.spellings import translate_training_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"

CHAT = {
    "num_train_epochs": 3, "per_device_train_batch_size": 7, "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True, "learning_rate": 1e-4, "lr_scheduler_type": "linear", "optim": "paged_adamw_32bit",
    "eval_strategy": "steps", "save_strategy": "epoch", "logging_steps": 10, "max_length": 128,
}  # fmt: skip
CODE = {
    "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "learning_rate": 1e-4,
    "lr_scheduler_type": "linear", "warmup_steps": 0.1, "optim": "adamw_torch", "eval_strategy": "steps",
    "eval_steps": 100, "logging_steps": 100, "save_strategy": "epoch", "max_length": 512, "report_to": ["wandb"],
    "push_to_hub": True,
    "lora.r": 16, "lora.lora_alpha": 16, "lora.lora_dropout": 0.05,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
CODE_4_BIT = CODE | {
    "optim": "paged_adamw_8bit", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8,
}  # fmt: skip
CARD = {
    "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
    "logging_strategy": "steps", "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1,
    "output_dir": "./checkpoint_dir", "overwrite_output_dir": True, "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4, "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1,
    "seed": 0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1, "warmup_ratio": 0.2, "max_seq_length": 2048, "packing": True,
    "lora.r": 16, "lora.lora_alpha": 32, "lora.lora_dropout": 0.05, "lora.bias": "none",
    "lora.task_type": "CAUSAL_LM", "lora.target_modules": "all-linear", "lora.modules_to_save": None,
}  # fmt: skip
PUBLISHED = {
    "Phi_3_Inference_Finetuning.py": CHAT,
    "FineTrainingScript.py": CHAT | {"fp16": True},
    "Phi-3-finetune-lora-python.py": CODE,
    "Phi-3-finetune-qlora-python.py": CODE_4_BIT,
    "sample_finetune.py": CARD,
    "sample_finetune.yaml": CARD,
}
# What decides where a run stands and how it is watched, and not what is trained.
NOT_COMPARED = {*OWN_TRAINING_KEYS, "output_dir", "max_steps", "bf16", "fp16", "run_name", "disable_tqdm", "log_level"}
TRL_DEFAULTS = {"gradient_checkpointing": False, "packing": False, "max_length": None, "logging_steps": 500}
"""Where TRL's defaults are not those of transformers, which the originals had."""


def keywords(call: str, source: str) -> dict[str, Any]:
    """Return the literal keywords of the first call of a name in a script."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call:
            return {
                each.arg: ast.literal_eval(each.value)
                for each in node.keywords
                if each.arg and isinstance(each.value, (ast.Constant, ast.List, ast.UnaryOp))
            }
    raise AssertionError(call)


def used(name: str) -> dict[str, Any]:
    """Return the settings of an example, as they reach the trainer; LoRA's under `lora.`."""
    path = EXAMPLES / name
    if name.endswith(".yaml"):
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        training, lora = given["training_config"], given["peft_config"]
        training = load_config({"data": {"train": "helpdesk"}, "training_config": training}).training_config
    elif name == "FineTrainingScript.py":
        text = path.read_text(encoding="utf-8")
        training, lora = keywords("SFTConfig", text), keywords("LoraConfig", text)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(EXAMPLES))
            script = runpy.run_path(str(path))
        training = dict(script.get("TRAINING") or script["training_config"])
        lora = script.get("LORA") or script.get("peft_config") or {}
        text = path.read_text(encoding="utf-8")
        if "philora.train(" in text:
            training |= {"report_to": ["wandb"]} if '"wandb"' in text else {}
            training |= {"push_to_hub": True} if "options.push" in text else {}
            training = load_config({"data": {"train": "helpdesk"}, "training_config": training}).training_config
        else:
            training |= keywords("SFTTrainer", text) | keywords("TrainingArguments", text)
    training, _ = translate_training_arguments(training)
    return training | {f"lora.{key}": value for key, value in lora.items()}


def differences(name: str) -> set[str]:
    """Return the keys in which an example differs from its original."""
    given = PUBLISHED[name]
    plain = {key: value for key, value in given.items() if not key.startswith("lora.")}
    published = translate_training_arguments(plain)[0] | {k: v for k, v in given.items() if k.startswith("lora.")}
    ours = used(name)
    found = set()
    for key in (ours.keys() | published.keys()) - NOT_COMPARED:
        if key in published:
            expected = published[key]
        elif key.startswith("lora."):
            continue  # an original without LoRA: the table says so in words
        else:
            library = schema.training_fields().get(key)
            expected = TRL_DEFAULTS.get(key, library.default if library else None)
        # eval_steps that are not given are the logging steps.
        if key == "eval_steps" and key not in published:
            expected = published.get("logging_steps") if published.get("eval_strategy") == "steps" else ours.get(key)
        default = schema.training_fields()[key].default if key in schema.training_fields() else None
        if ours.get(key, TRL_DEFAULTS.get(key, default)) != expected:
            found.add(key)
    unused = {"save_steps"} if ours.get("save_strategy") == "epoch" else set()
    return found - unused


def table() -> dict[str, set[str]]:
    """Return the keys that the page names for each example."""
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    part = page.split("<!-- deviations -->")[1].split("<!-- end -->")[0]
    found: dict[str, set[str]] = {name: set() for name in PUBLISHED}
    for line in part.strip().splitlines()[2:]:
        key, files = re.findall(r"`([\w.]+)`", line.split("|")[1])[0], line.split("|")[2]
        for name in found if files.strip() == "all" else re.findall(r"`([^`]+)`", files):
            found[name].add(key)
    return found


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_table_names_every_difference_and_no_other(name):
    assert table()[name] == differences(name)


def test_a_difference_that_is_planted_is_found(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "sample_finetune.py", CARD | {"weight_decay": 0.1, "lora.r": 8})
    assert {"weight_decay", "lora.r"} <= differences("sample_finetune.py") - table()["sample_finetune.py"]
