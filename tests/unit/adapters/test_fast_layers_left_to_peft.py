"""What the fast paths do not cover goes to PEFT as it is; the oracle is plain PEFT on a copy of the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from torch import nn
from transformers import AutoTokenizer

import philora
from philora.adapters.fast_layers import FastLinear
from philora.adapters.statistics import coverage, update_norms
from philora.models.loading import local_path
from tests.tolerances import LOGITS_FP32

TOKENS = torch.arange(3, 19)[None]
CONFIGS: dict[str, PeftConfig] = {
    "AdaLora": AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["qkv_proj", "o_proj"], init_r=4, target_r=2, total_step=10
    ),
    "IA3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": LoHaConfig(task_type="CAUSAL_LM", target_modules=["qkv_proj"], r=4),
    "OFT": OFTConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], oft_block_size=4, r=0),
    "VeRA": VeraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=4),
}


def both(phi3: Any, config: PeftConfig, **keywords: Any) -> tuple[Any, Any]:
    """The adapted model of philora and of PEFT, from the same weights and seed."""
    made = []
    for get in (philora.get_peft_model, peft.get_peft_model):
        base = phi3()
        torch.manual_seed(1)
        made.append(get(base, copy.deepcopy(config), **keywords))
    return made[0], made[1]


def assert_trained_alike(ours: Any, theirs: Any) -> None:
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=TOKENS).logits, theirs.eval()(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_peft_types_are_pefts(kind, phi3, tmp_path):
    ours, theirs = both(phi3, CONFIGS[kind])
    assert type(ours) is type(theirs)
    assert type(ours.base_model) is type(theirs.base_model)
    assert_trained_alike(ours, theirs)
    ours.save_pretrained(tmp_path)
    loaded = philora.load_adapter(phi3(), tmp_path).eval()
    with torch.no_grad():
        difference = (loaded(input_ids=TOKENS).logits - theirs(input_ids=TOKENS).logits).abs().max()
    assert difference <= LOGITS_FP32
    again = philora.load_adapter(loaded, tmp_path, "second")
    assert list(again.peft_config) == ["default", "second"]


def test_what_an_adalora_adapter_covers_is_told(phi3):
    model = philora.get_peft_model(phi3(), copy.deepcopy(CONFIGS["AdaLora"]))
    rows = coverage(model).rows
    assert {row.module.rpartition(".")[2]: row.r for row in rows} == {"qkv_proj": 4, "o_proj": 4}
    assert sum(row.parameters for row in rows) + sum(n for _, n in coverage(model).other_trainable) == sum(
        each.numel() for each in model.parameters() if each.requires_grad
    )
    assert update_norms(model) == []  # the update of AdaLoRA has a third factor
    philora.optimize(model)


def test_an_adalora_config_goes_through_the_trainer(phi3, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    model = phi3(vocab_size=len(tokenizer))
    trainer = philora.SFTTrainer(
        model,
        philora.SFTConfig(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", max_length=32),
        train_dataset=Dataset.from_dict({"text": ["a few words"] * 4}),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(CONFIGS["AdaLora"]),
    )
    assert trainer.train().global_step == 1


def test_mixed_adapters_are_pefts(phi3):
    config = LoraConfig(r=4, target_modules=["qkv_proj"])
    ours, theirs = both(phi3, config, mixed=True)
    assert type(ours) is type(theirs) is peft.PeftMixedModel
    ours.add_adapter("other", LoHaConfig(r=4, target_modules=["o_proj"]))
    ours.set_adapter(["default", "other"])
    assert ours(input_ids=TOKENS).logits.isfinite().all()


@dataclass
class Settings:
    model_type: str = "gpt2"
    hidden_size: int = 8
    tie_word_embeddings: bool = False


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.c_attn, self.out = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.c_attn(x))


@pytest.mark.parametrize("settings", [{"model_type": "gpt2", "tie_word_embeddings": False}, Settings(), None])
@pytest.mark.parametrize("targets", [None, ["c_attn"], "all-linear", "c_attn"])
def test_the_config_of_a_model_may_be_a_dict_a_dataclass_or_missing(settings, targets):
    torch.manual_seed(0)
    bases = [Block(settings)]
    bases.append(copy.deepcopy(bases[0]))
    if settings is None:
        for each in bases:
            del each.config
    outcomes = []
    for get, base in zip((philora.get_peft_model, peft.get_peft_model), bases, strict=True):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=copy.copy(targets))
        try:
            model = get(base, config)
        except ValueError:
            outcomes.append("refused")
            continue
        with torch.no_grad():
            for name, each in model.named_parameters():
                if "lora_B" in name:
                    each.fill_(0.5)
        outcomes.append((sorted(name for name, _ in model.named_parameters()), config.target_modules, model))
    if "refused" in outcomes:
        assert outcomes == ["refused", "refused"]
        return
    assert outcomes[0][:2] == outcomes[1][:2]
    x = torch.randn(3, 8)
    assert torch.allclose(outcomes[0][2](x), outcomes[1][2](x), atol=1e-6)


FILLED = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["qkv_proj"]},
    "an expression": {"target_modules": r".*\.o_proj"},
    "a rank of its own": {"target_modules": ["qkv_proj", "o_proj"], "rank_pattern": {"o_proj": 3}},
    "dropped layers": {"target_modules": ["qkv_proj"], "layers_to_transform": 1},
    "tokens": {"target_modules": ["qkv_proj"], "trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("case", FILLED)
def test_the_callers_config_is_filled_in_as_by_peft(case, phi3):
    configs = []
    for get in (philora.get_peft_model, peft.get_peft_model):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **copy.deepcopy(FILLED[case]))
        model = get(phi3(), config)
        assert model.peft_config["default"] is config
        configs.append(config)
    assert configs[0].to_dict() == configs[1].to_dict()
    assert configs[0].target_modules is not None


def test_the_trainer_fills_in_the_callers_config(phi3, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = philora.SFTTrainer(
        phi3(vocab_size=len(tokenizer)),
        philora.SFTConfig(str(tmp_path), report_to="none"),
        train_dataset=Dataset.from_dict({"text": ["a few words"] * 4}),
        processing_class=tokenizer,
        peft_config=config,
    )
    leaves = {name.rpartition(".")[2] for name in config.target_modules}
    assert leaves == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert trainer.model.peft_config["default"] is config


def test_a_config_with_slices_can_be_used_again(phi3):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    first = philora.get_peft_model(phi3(), config)
    second = philora.get_peft_model(phi3(), config)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    for model in (first, second):
        layers = [each for each in model.modules() if isinstance(each, FastLinear)]
        assert layers
        assert all([part.name for part in each.slices["default"]] == ["q_proj", "v_proj"] for each in layers)
