"""What TRL's own scripts give `SFTTrainer`: model names of every class, no arguments, rows that lose their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

import philora
from philora.errors import DataError, TargetError
from philora.models.loading import local_path
from tests.tolerances import LOSS_STEP_FP32

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TEXT = Dataset.from_dict({"text": ["some words of a text"] * 4})


def tokenizer_of_nano() -> Any:
    return AutoTokenizer.from_pretrained(local_path("nano"))


def settings(folder: Path, **changes: Any) -> philora.SFTConfig:
    return philora.SFTConfig(
        str(folder), **({"max_steps": 1, "report_to": "none", "save_strategy": "no", "max_length": 64} | changes)
    )


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    """A folder of a vision-language model that AutoModelForCausalLM does not know."""
    tokenizer = tokenizer_of_nano()
    text = transformers.LlamaConfig(vocab_size=len(tokenizer) + 8, **SMALL)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=len(tokenizer) + 1)
    torch.manual_seed(0)
    folder = tmp_path / "vision"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_vision_language_model_by_its_name(vision_folder, tmp_path):
    trainer = philora.SFTTrainer(
        str(vision_folder),
        settings(tmp_path / "out"),
        train_dataset=TEXT,
        processing_class=AutoTokenizer.from_pretrained(vision_folder),
        peft_config=LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM"),
    )
    assert type(trainer.model.get_base_model()) is transformers.LlavaForConditionalGeneration
    trained = [name for name, each in trainer.model.named_parameters() if each.requires_grad]
    assert trained
    assert all("language_model" in name for name in trained)
    assert trainer.train().training_loss > 0


def test_names_of_a_vision_language_model_are_checked_against_the_class_that_is_loaded(vision_folder, tmp_path):
    def make(targets: list[str]) -> Any:
        return philora.SFTTrainer(
            str(vision_folder),
            settings(tmp_path / "out"),
            train_dataset=TEXT,
            processing_class=AutoTokenizer.from_pretrained(vision_folder),
            peft_config=LoraConfig(r=2, target_modules=targets),
        )

    with pytest.raises(TargetError, match=r"target_modules='vision_tower\.nothing'"):
        make(["vision_tower.nothing"])
    trainer = make(["vision_tower.encoder.layers.0.self_attn.q_proj"])
    assert any("vision_tower" in name for name, each in trainer.model.named_parameters() if each.requires_grad)


def test_a_class_whose_head_is_no_language_model_is_the_configs_own(tmp_path):
    """As TRL, which takes the class from `architectures`, and not what AutoModelForCausalLM makes of the type."""
    tokenizer = tokenizer_of_nano()
    text = transformers.Gemma3TextConfig(vocab_size=len(tokenizer) + 8, head_dim=8, sliding_window=16, **SMALL)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=1,
    )  # fmt: skip
    folder = tmp_path / "gemma"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    trainer = philora.SFTTrainer(
        str(folder),
        settings(tmp_path / "out"),
        train_dataset=TEXT,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert type(trainer.model.get_base_model()) is transformers.Gemma3ForConditionalGeneration
    assert trainer.train().global_step == 1


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_model"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose code stands beside its weights, as on the Hub."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    tokenizer = tokenizer_of_nano()
    folder = tmp_path / "own"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **SMALL))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(OWN_CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "own_model",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "trusts", [{"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}], ids=["field", "kwargs"]
)
def test_own_code_of_a_model_runs_where_it_is_trusted(own_folder, tmp_path, trusts):
    trainer = philora.SFTTrainer(
        str(own_folder),
        settings(tmp_path / "out", **trusts),
        train_dataset=TEXT,
        processing_class=tokenizer_of_nano(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    assert type(trainer.model.get_base_model()).__name__ == "OwnForCausalLM"
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["whole", "LoRA"])
@pytest.mark.parametrize("trusts", [{}, {"trust_remote_code": False}], ids=["unsaid", "refused"])
def test_own_code_of_a_model_does_not_run_otherwise(own_folder, tmp_path, peft_config, trusts):
    marker = tmp_path / "ran"
    with (own_folder / "own.py").open("a", encoding="utf-8") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        philora.SFTTrainer(
            str(own_folder),
            settings(tmp_path / "out", **trusts),
            train_dataset=TEXT,
            processing_class=tokenizer_of_nano(),
            peft_config=peft_config,
        )
    assert not marker.exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a CPU")
@pytest.mark.parametrize("arguments", ["none", "transformers'"])
def test_without_arguments_of_trl_it_runs_on_a_cpu(arguments, phi3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_of_nano()
    given = {} if arguments == "none" else {"args": transformers.TrainingArguments("other", use_cpu=True)}
    model = phi3(vocab_size=len(tokenizer))
    model.config._name_or_path = "someone/small-model"
    trainer = philora.SFTTrainer(
        model,
        train_dataset=TEXT,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"),
        **given,
    )
    assert isinstance(trainer.args, philora.SFTConfig)
    assert Path(trainer.args.output_dir).name == ("small-model-SFT" if arguments == "none" else "other")
    trainer.args.max_steps, trainer.args.report_to, trainer.args.save_strategy = 1, [], "no"
    assert trainer.train().global_step == 1


# -- rows whose labels are all cut off


def pairs(long: int, short: int = 0) -> Dataset:
    """Questions of which `long` fill 64 tokens by themselves, so that their answers are cut off."""
    return Dataset.from_dict(
        {
            "prompt": ["a question that goes on and on " * 30] * long + ["a question"] * short,
            "completion": [" an answer"] * (long + short),
        }
    )


def trainer_of(phi3: Any, folder: Path, rows: Any, evaluation: Any = None, **changes: Any) -> philora.SFTTrainer:
    tokenizer = tokenizer_of_nano()
    return philora.SFTTrainer(
        phi3(vocab_size=len(tokenizer)),
        settings(folder, **changes),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"),
    )


def masked(count: int, labelled: int = 0) -> Dataset:
    ids = [5, 6, 7, 8]
    labels = [ids] * labelled + [[-100] * 4] * (count - labelled)
    return Dataset.from_dict({"input_ids": [ids] * count, "labels": labels})


WITHOUT_LABELS = {
    "cut off": lambda: pairs(long=3),
    "all masked": lambda: masked(3),
    "one token each": lambda: Dataset.from_dict({"input_ids": [[5]] * 3, "labels": [[5]] * 3}),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rows", WITHOUT_LABELS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_without_any_label_are_refused(split, rows, packing, phi3, tmp_path):
    without = WITHOUT_LABELS[rows]()
    with_labels = pairs(long=0, short=4) if rows == "cut off" else masked(4, labelled=4)
    train, held_out = (without, None) if split == "train" else (with_labels, without)
    with pytest.raises(DataError, match=rf"the {split} dataset: labels='0 of 3 rows.*max_length, which is 64"):
        trainer_of(phi3, tmp_path, train, held_out, packing=packing)


def test_rows_that_lose_their_labels_are_left_out_and_counted(phi3, tmp_path, caplog):
    trainer = trainer_of(phi3, tmp_path, pairs(long=3, short=2), pairs(long=1, short=1))
    assert len(trainer.train_dataset) == 2
    assert len(trainer.eval_dataset) == 1
    assert "the train dataset: 3 of 5 rows have no label and are left out" in caplog.text
    assert "the eval dataset: 1 of 2 rows have no label and are left out" in caplog.text
    assert "max_length=64" in caplog.text
    alone = trainer_of(phi3, tmp_path / "alone", pairs(long=0, short=2))
    assert trainer.train().training_loss == pytest.approx(alone.train().training_loss, rel=LOSS_STEP_FP32)


def test_packed_rows_tell_of_documents_without_labels(phi3, tmp_path, caplog):
    trainer = trainer_of(phi3, tmp_path, masked(40, labelled=4), packing=True)
    assert "the train dataset: 36 of 40 rows have no label" in caplog.text
    assert trainer.train().training_loss > 0
    caplog.clear()
    trainer_of(phi3, tmp_path, masked(40, labelled=40), packing=True)
    assert "no label" not in caplog.text


def test_rows_cut_from_one_stream_are_not_taken_for_lost_ones(phi3, tmp_path, caplog):
    trainer = trainer_of(phi3, tmp_path, masked(40, labelled=40), packing=True, packing_strategy="wrapped")
    assert 0 < len(trainer.train_dataset) < 40
    assert "no label" not in caplog.text


def test_rows_with_labels_are_as_they_were(phi3, tmp_path, caplog):
    rows = masked(5, labelled=5)
    trainer = trainer_of(phi3, tmp_path, rows)
    assert trainer.train_dataset["labels"] == rows["labels"]
    assert "no label" not in caplog.text


def test_an_evaluation_of_no_rows_is_refused(phi3, tmp_path):
    empty = masked(4, labelled=4).select([])
    for train, held_out in ((empty, None), (masked(4, labelled=4), empty), (masked(4, labelled=4), {"held": empty})):
        with pytest.raises(DataError, match="rows=0 - expected at least one row"):
            trainer_of(phi3, tmp_path, train, held_out)
    trainer = trainer_of(phi3, tmp_path, masked(4, labelled=4), masked(2, labelled=2))
    assert "eval_loss" in trainer.evaluate()
    for rows in (empty, masked(2)):
        with pytest.raises(DataError, match="the eval dataset"):
            trainer.evaluate(rows)


def test_prepared_rows_are_looked_at_too(phi3, tmp_path):
    changes = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(DataError, match="0 of 3 rows have a label"):
        trainer_of(phi3, tmp_path, masked(3), **changes)
    assert trainer_of(phi3, tmp_path, masked(3, labelled=1), **changes).train().training_loss > 0
