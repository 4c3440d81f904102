"""Merging: rounded once, whatever the layer; ties; from folder to folder in bounded memory; nothing half-written."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import philora
from philora.adapters.fast_layers import FastLinear
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.errors import AdapterError, ConfigError, ModelError, RunError
from philora.exporting.merged_folder import MergeResult, merge_to_folder
from philora.exporting.merging import merge_layer
from philora.models.loading import load_tokenizer, local_path
from tests.quick import quick
from tests.tolerances import LOGITS_FP32

SPLIT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
TIED = {"tie_word_embeddings": True}


def tokens(n=20, rows=2, seed=1):
    return torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": SPLIT} | changes))


def trained(model, config, seed=5):
    """The model with an adapter, all of whose trainable tensors moved as training would move them."""
    adapted = philora.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if each.requires_grad:
                step = torch.randn(each.shape, generator=generator).to(each.dtype)
                each.add_(step * (each.abs().mean() * 0.2 if "magnitude" in name else 0.05))
        for module in adapted.modules():
            for name, slices in module.slices.items() if isinstance(module, FastLinear) else ():
                weight = module.lora_B[name].weight
                inside = torch.zeros_like(weight)
                for part in slices:
                    inside[part.row_start : part.row_stop, part.rank_start : part.rank_stop] = 1
                weight.mul_(inside)
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits.float()


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def phi(phi3, **changes):
    """Phi-2's form: biases everywhere."""
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    return PhiForCausalLM(PhiConfig(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def gpt2(phi3, **changes):
    """transformers' Conv1D, and embeddings that are shared."""
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=2)).eval()


def phimoe(phi3, **changes):
    """Experts that transformers makes out of several tensors of the files."""
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    return PhimoeForCausalLM(PhimoeConfig(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def plain_phi3(phi3, **changes):
    return phi3(**changes)


class Case(NamedTuple):
    """A base and an adapter on it; `tied`: what becomes of embeddings that the base shares."""

    make: object
    changes: dict
    lora: dict
    tied: bool | None = None


ALL = {"target_modules": "all-linear"}
O = {"target_modules": ["o_proj"]}  # noqa: E741
CASES = {
    "slices": Case(plain_phi3, {}, {"target_modules": ["q_proj", "v_proj", "gate_proj", "o_proj"]}),
    "fused": Case(plain_phi3, {}, ALL),
    "rslora": Case(plain_phi3, {}, ALL | {"use_rslora": True}),
    "dora": Case(plain_phi3, {}, ALL | {"use_dora": True}),
    "dora embedding": Case(plain_phi3, {}, {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    "embedding": Case(plain_phi3, {}, {"target_modules": ["embed_tokens", "o_proj"]}),
    "head": Case(plain_phi3, {}, {"target_modules": ["lm_head", "o_proj"]}),
    "whole modules": Case(plain_phi3, {}, O | {"modules_to_save": ["lm_head", "mlp"]}),
    "tokens": Case(plain_phi3, {}, O | {"trainable_token_indices": [5, 6]}),
    "parameter": Case(plain_phi3, {}, O | {"target_parameters": ["embed_tokens.weight"]}),
    "biases": Case(phi, {}, {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "biases of targets": Case(phi, {}, {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "lora_bias": Case(phi, {}, {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "Conv1D": Case(gpt2, {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, True),
    "pissa": Case(plain_phi3, {}, {"target_modules": ["qkv_proj"], "init_lora_weights": "pissa"}),
    "olora": Case(plain_phi3, {}, {"target_modules": ["qkv_proj"], "init_lora_weights": "olora"}),
    "kasa": Case(plain_phi3, {}, O | {"kasa_config": peft.KasaConfig()}),
    "experts": Case(phimoe, {}, O),
    "tied": Case(plain_phi3, TIED, O, True),
    "tied embedding": Case(plain_phi3, TIED, {"target_modules": ["embed_tokens", "o_proj"]}, False),
    "tied head": Case(plain_phi3, TIED, {"target_modules": ["lm_head", "o_proj"]}, False),
    "tied both": Case(plain_phi3, TIED, {"target_modules": ["lm_head", "embed_tokens"]}, False),
    "tied alike": Case(plain_phi3, TIED,
                       {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, True),
    "tied whole head": Case(plain_phi3, TIED, O | {"modules_to_save": ["lm_head"]}, False),
    "tied whole embedding": Case(plain_phi3, TIED, O | {"modules_to_save": ["embed_tokens"]}, False),
    "tied whole alike": Case(plain_phi3, TIED,
                             O | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied tokens": Case(plain_phi3, TIED, O | {"trainable_token_indices": [5, 6]}, True),
}  # fmt: skip


@pytest.fixture
def case(phi3, tmp_path):
    """Saves the base and the adapter of a case; gives both folders."""

    def make(name, dtype=torch.float32):
        given = CASES[name]
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        given.make(phi3, **given.changes).to(dtype).save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        trained(model, lora(**copy.deepcopy(given.lora))).save_pretrained(adapter)
        return base, adapter

    return make


def loaded(base, adapter):
    return philora.load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)


def tensors_of(folder):
    """All tensors of a folder as they are in its files."""
    return {key: each for path in sorted(folder.glob("*.safetensors")) for key, each in load_file(path).items()}


# ---------------------------------------------------------------------------------------------- rounded once


class Layers(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(24, 40)
        self.conv1d = Conv1D(40, 24)
        self.embedding = nn.Embedding(50, 24)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.sequence = nn.Conv1d(4, 6, 5)
        self.experts = nn.ParameterDict({"weight": nn.Parameter(torch.randn(3, 24, 16))})


KINDS = {
    "linear": {},
    "conv1d": {"fan_in_fan_out": True},
    "embedding": {},
    "convolution": {},
    "pointwise": {},
    "sequence": {},
}


def adapted_layer(kind, dtype, adapter_dtype, **changes):
    """PEFT's layer around one base layer, its adapter with values."""
    torch.manual_seed(1)
    model = Layers().to(dtype)
    model = peft.get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=[kind], **KINDS[kind], **changes))
    layer = getattr(model.base_model.model, kind)
    for name, each in layer.named_parameters():
        if "lora_" in name:
            value = each * (1 + 0.1 * torch.rand_like(each)) if "magnitude" in name else torch.randn_like(each) * 0.1
            each.data = value.to(adapter_dtype)
    return layer


def half_ulps(merged, exact, scale):
    """Largest distance from the exact value, in halves of the spacing of `merged`'s dtype there.

    What fp32 arithmetic loses before the one rounding is allowed: some 2^-24 of the largest value that takes part.
    """
    spacing = torch.finfo(merged.dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=2.0**-14)))
    lost = 32 * 2.0**-24 * scale
    return float((((merged.double() - exact).abs() - lost).clamp(min=0) / (spacing / 2)).max())


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32 adapter", "bf16 adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_is_the_nearest_value(kind, dtype, adapter_dtype, changes):
    layer = adapted_layer(kind, dtype, adapter_dtype, **changes)
    exact = copy.deepcopy(layer).double()
    exact.merge()
    exact = exact.base_layer.weight.detach()
    base = layer.base_layer.weight.detach().clone()
    merge_layer(layer, kind)
    merged = layer.base_layer.weight.detach()
    assert merged.dtype == dtype
    assert not torch.equal(merged, base)
    scale = float(base.abs().max() + exact.abs().max())
    assert half_ulps(merged, exact, scale) <= 1.0
    # Negative controls: an update that is rounded before it is added, and a scaling that is off by 1%.
    twice = base + (exact - base.double()).to(dtype)
    assert half_ulps(twice, exact, scale) > 1.0
    assert half_ulps((base.double() + 1.01 * (exact - base.double())).to(dtype), exact, scale) > 1.0


def test_pefts_own_merge_rounds_more_than_once():
    """The fault that `merge_layer` is for."""
    layer = adapted_layer("linear", torch.bfloat16, torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    exact.merge()
    layer.merge()
    assert half_ulps(layer.base_layer.weight.detach(), exact.base_layer.weight.detach(), 1.0) > 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_exact_to_arithmetic_and_fp64_to_fp64(kind):
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        layer = adapted_layer(kind, dtype, torch.float32)
        exact = copy.deepcopy(layer).double()
        exact.merge()
        merge_layer(layer, kind)
        assert layer.base_layer.weight.dtype == dtype
        assert distance(layer.base_layer.weight.detach(), exact.base_layer.weight.detach()) < bound


def test_several_adapters_are_summed_before_the_rounding():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
    model = peft.get_peft_model(Layers().bfloat16(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.linear
    exact = copy.deepcopy(layer).double()
    exact.merge()
    merge_layer(layer, "linear")
    assert half_ulps(layer.base_layer.weight.detach(), exact.base_layer.weight.detach(), 1.0) <= 1.0


def test_a_bias_of_b_is_merged_into_the_bias():
    layer = adapted_layer("linear", torch.bfloat16, torch.float32, lora_bias=True)
    bias, scaling = layer.base_layer.bias.detach().double(), layer.scaling["default"]
    exact = bias + layer.lora_B["default"].bias.detach().double() * scaling
    merge_layer(layer, "linear")
    assert half_ulps(layer.base_layer.bias.detach(), exact, 1.0) <= 1.0
    assert not torch.equal(layer.base_layer.bias.detach().double(), bias)


def test_values_that_the_dtype_cannot_hold_are_an_error():
    layer = adapted_layer("linear", torch.float16, torch.float32)
    layer.scaling["default"] = 1e8
    with pytest.raises(AdapterError, match="linear='weight' - expected merged values within the range of float16"):
        merge_layer(layer, "linear")


# ---------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("name", CASES)
def test_merged_logits_are_the_adapters(case, name, caplog, tmp_path):
    base, adapter = case(name)
    expected = logits(loaded(base, adapter))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert distance(plain, expected) > 1e-2, "the adapter changes nothing, so the comparison could not fail"
    with caplog.at_level(logging.WARNING, "philora"):
        merged = philora.merge(loaded(base, adapter))
    assert not any("lora" in key or "modules_to_save" in key for key, _ in merged.named_parameters())
    assert distance(logits(merged), expected) < LOGITS_FP32
    assert not any(each.requires_grad for key, each in merged.named_parameters() if "bias" not in key)
    tied = CASES[name].tied
    if tied is not None:
        assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
        assert merged.config.tie_word_embeddings is tied
        assert caplog.text.count("they are separate now") == (not tied)
    merged.save_pretrained(tmp_path / "merged")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert distance(logits(again), logits(merged)) < LOGITS_FP32
    saved = again.state_dict()
    assert all(torch.equal(each, saved[key]) for key, each in merged.state_dict().items())


@pytest.mark.parametrize(("target", "other"), [("lm_head", "input"), ("embed_tokens", "output")])
def test_a_shared_weight_stays_what_it_was_for_the_other(phi3, target, other):
    model = trained(phi3(**TIED), lora(target_modules=[target]))
    expected = logits(model)
    shared = model.get_base_model().state_dict()[
        "model.embed_tokens.weight" if target == "lm_head" else "lm_head.weight"
    ]
    shared = shared.clone()
    merged = philora.merge(copy.deepcopy(model))
    untouched = merged.get_input_embeddings() if other == "input" else merged.get_output_embeddings()
    assert torch.equal(untouched.weight, shared)
    assert distance(logits(merged), expected) < LOGITS_FP32
    # The fault that this is for: PEFT changes the shared tensor.
    assert distance(logits(model.merge_and_unload()), expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_verified(phi3, dtype, caplog):
    model = trained(phi3().to(dtype), lora())
    with caplog.at_level(logging.INFO, "philora"):
        merged = philora.merge(model, probe={"input_ids": tokens(), "attention_mask": torch.ones(2, 20).long()})
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert {each.dtype for each in merged.parameters()} == {dtype}
    assert "merged: largest difference of a logit" in caplog.text


def test_a_wrong_merge_is_caught(phi3, monkeypatch):
    model = trained(phi3(), lora())
    plain = FastLinear.get_delta_weight
    monkeypatch.setattr(FastLinear, "get_delta_weight", lambda self, name: plain(self, name) * 1.05)
    with pytest.raises(AdapterError, match=r"merge: difference=.* - expected at most 0.0001.*is not usable"):
        philora.merge(model)


def test_whole_modules_in_fp32_get_the_dtype_of_the_base(phi3):
    model = trained(phi3().bfloat16(), lora(modules_to_save=["lm_head"]))
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    head.data = head.data.float() + 2.0**-20  # as training keeps it
    expected = head.detach().bfloat16()
    merged = philora.merge(model)
    assert torch.equal(merged.lm_head.weight, expected)


def test_an_adapter_that_was_merged_by_hand_is_not_merged_again(phi3):
    model = trained(phi3(), lora())
    expected = logits(model)
    model.merge_adapter()
    assert distance(logits(philora.merge(model)), expected) < LOGITS_FP32


def test_a_quantised_base_becomes_a_plain_one(phi3, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    phi3(hidden_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    merged = philora.merge(trained(base, lora(target_modules=["o_proj"])))
    assert {type(each) for each in merged.modules() if isinstance(each, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize(
    ("make", "config", "change", "message"),
    [
        (plain_phi3, lora(lora_bias=True, target_modules=["o_proj", "down_proj"]), None,
         r"merge: 4 layers=\['model.layers.0.self_attn.o_proj'.* - expected a base layer with a bias"),
        (phi, lora(target_modules=["q_proj"], alora_invocation_tokens=[3, 4]), None,
         r"merge: 2 layers=.* - expected an update that is the same for every token"),
        (plain_phi3, lora(target_modules=["o_proj"]), float("nan"),
         r"merge: model.layers.0.self_attn.o_proj=.* - expected finite adapter weights. The training diverged"),
        (plain_phi3, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), None,
         r"merge: peft_type='PROMPT_TUNING' - expected an adapter of weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_said_before_anything_changes(phi3, make, config, change, message):
    model = philora.get_peft_model(make(phi3), copy.deepcopy(config))
    if change is not None:
        model.get_base_model().model.layers[0].self_attn.o_proj.lora_B["default"].weight.data[0, 0] = change
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        philora.merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(each.nan_to_num(), after[name].nan_to_num()) for name, each in before.items())


def test_all_that_cannot_be_merged_is_said_at_once(phi3):
    model = philora.get_peft_model(phi3(), lora(lora_bias=True, target_modules=["o_proj"]))
    model.get_base_model().model.layers[1].self_attn.o_proj.lora_A["default"].weight.data[0] = float("inf")
    with pytest.raises(AdapterError, match=r"2 faults:\n.*with a bias(.|\n)*finite adapter weights"):
        philora.merge(model)


def test_a_grouped_convolution_is_refused():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(4, 8, 3, groups=2)

    model = peft.get_peft_model(Grouped(), LoraConfig(r=2, target_modules=["convolution"]))
    with pytest.raises(AdapterError, match=r"merge: convolution=.* - expected a convolution of one group"):
        philora.merge(model)


# ------------------------------------------------------------------------------------- from folder to folder


@pytest.mark.parametrize(
    "name",
    quick(CASES, ["slices", "dora", "whole modules", "biases", "Conv1D", "experts", "tied embedding", "tied tokens"]),
)
def test_the_folder_holds_what_merging_in_memory_gives(case, name, tmp_path, caplog):
    base, adapter = case(name)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    expected = philora.merge(loaded(base, adapter))
    caplog.clear()
    result = merge_to_folder(adapter, tmp_path / "out", base=str(base))
    assert isinstance(result, MergeResult)
    assert result.folder == tmp_path / "out"
    assert result.shards == 1
    assert result.bytes == (result.folder / "model.safetensors").stat().st_size
    assert result.agreement.relative < 1e-6  # fp32: a few ulp grown over two layers
    assert result.agreement.effect > 1e-2
    model, info = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not any(info.values()), info
    wanted, got = expected.state_dict(), model.state_dict()
    assert wanted.keys() == got.keys()
    for key, each in wanted.items():
        assert torch.equal(each, got[key]), key
    ours, theirs = tensors_of(result.folder), tensors_of(base)
    tied = CASES[name].tied
    assert ours.keys() - theirs.keys() == ({"lm_head.weight"} if tied is False else set())
    assert model.config.tie_word_embeddings is bool(tied)
    assert caplog.text.count("they are separate now") == (tied is False)
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}, "the base was changed"
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["slices", "dora", "tied head", "whole modules", "biases", "tokens", "pissa"])
def test_the_dtype_of_the_base_is_kept(case, name, dtype, tmp_path):
    base, adapter = case(name, dtype)
    expected = philora.merge(loaded(base, adapter)).state_dict()
    merge_to_folder(adapter, tmp_path / "out", base=str(base))
    for key, each in tensors_of(tmp_path / "out").items():
        assert each.dtype == dtype
        assert torch.equal(each, expected[key]), key


def test_each_tensor_keeps_its_name_and_dtype(phi3, tmp_path):
    """Files without the prefix that the model has, and with one norm in another dtype."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = gpt2(phi3)
    trained(gpt2(phi3), lora(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(adapter)
    model.save_pretrained(base)
    tensors = {key.removeprefix("transformer."): each for key, each in load_file(base / "model.safetensors").items()}
    tensors = {key: each if "ln_1" in key else each.bfloat16() for key, each in tensors.items()}
    tensors["left.over"] = torch.arange(5)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_to_folder(adapter, out, base=str(base), verify=False)
    written = tensors_of(out)
    assert {key: (each.dtype, each.shape) for key, each in written.items()} == {
        key: (each.dtype, each.shape) for key, each in tensors.items()
    }
    changed = {key for key, each in written.items() if not torch.equal(each, tensors[key])}
    assert changed == {f"h.{i}.attn.c_attn.weight" for i in range(2)}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_many_shards_are_one_model(case, tmp_path):
    base, adapter = case("fused")
    adapted = loaded(base, adapter)
    result = merge_to_folder(adapter, tmp_path / "out", base=str(base), max_shard_size="10KB")
    files = sorted(result.folder.glob("*.safetensors"))
    assert result.shards == len(files) > 3
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert result.bytes == sum(path.stat().st_size for path in files)
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    held = {key: path.name for path in files for key in load_file(path)}
    assert index["weight_map"] == held
    tensors = tensors_of(result.folder)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    for path in files:
        sizes = [each.nbytes for each in load_file(path).values()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": tokens(), "attention_mask": torch.ones(2, 20).long()}
    expected = adapted.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(plain.generate(**prompt, **options), expected), "the adapter changes no answer"


def test_a_base_in_shards_is_read(case, tmp_path):
    base, adapter = case("slices")
    whole = merge_to_folder(adapter, tmp_path / "one", base=str(base))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    parts = merge_to_folder(adapter, tmp_path / "two", base=str(tmp_path / "parts"))
    one, two = tensors_of(whole.folder), tensors_of(parts.folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(each, two[key]) for key, each in one.items())


@pytest.fixture(scope="module")
def nano_run(tmp_path_factory):
    """A run folder of the bundled model, whose adapter has a tokenizer and a generation config of its own."""
    run = tmp_path_factory.mktemp("nano") / "run"
    model = trained(AutoModelForCausalLM.from_pretrained(local_path("nano"), dtype="auto"), lora())
    model.save_pretrained(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    tokenizer.chat_template = {"default": "its own {{ messages }}", "other": "another"}
    tokenizer.save_pretrained(run / "adapter")
    model.generation_config.max_new_tokens = 77
    model.generation_config.save_pretrained(run / "adapter")
    return run


STOP_IDS = AutoTokenizer.from_pretrained(local_path("nano")).convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


def test_a_run_becomes_a_model_folder(nano_run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "philora"):
        result = merge_to_folder(nano_run, tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(result.folder).chat_template
    assert templates == {"default": "its own {{ messages }}", "other": "another"}
    assert AutoModelForCausalLM.from_pretrained(result.folder).generation_config.max_new_tokens == 77
    assert (result.folder / "tokenizer.model").exists()
    readme = (result.folder / "README.md").read_text()
    assert readme.startswith("# out\n")
    assert "\nnano with the LoRA adapter run merged into its weights" in readme
    stops = json.loads((result.folder / "stop_tokens.json").read_text())["stop_tokens"]
    assert {each["text"]: each["id"] for each in stops} == {"<|end|>": STOP_IDS[0], "<|endoftext|>": STOP_IDS[1]}
    assert "An answer ends at `<|end" in readme
    config = json.loads((result.folder / "config.json").read_text())
    assert config == json.loads((Path(local_path("nano")) / "config.json").read_text())
    assert "1 files, largest difference of a logit" in caplog.text
    assert "the adapter moves the base by" in caplog.text
    assert {path.name for path in result.folder.iterdir()} >= {"generation_config.json", "tokenizer.json"}
    assert not list(result.folder.glob("adapter*"))


def test_the_command_of_a_merged_folder_runs(nano_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    for path in (nano_run / "adapter").glob("adapter_*"):
        shutil.copy(path, tmp_path / "adapter")
    result = merge_to_folder(tmp_path / "adapter", tmp_path / "out", base="nano", verify=False)
    assert json.loads((result.folder / "stop_tokens.json").read_text())["ends_a_turn"] == "<|end|>"
    code = (result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(result.folder)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_a_tokenizer_that_cannot_be_read_is_told(nano_run, tmp_path, caplog):
    """Such as one with code of its own: the model is merged, and its stop tokens have ids only."""
    run = tmp_path / "run"
    shutil.copytree(nano_run, run)
    (run / "adapter/tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING, "philora"):
        result = merge_to_folder(run, tmp_path / "out", verify=False)
    assert "the tokenizer cannot be read, so stop tokens are named by id only" in caplog.text
    stops = json.loads((result.folder / "stop_tokens.json").read_text())["stop_tokens"]
    assert {each["id"]: each["text"] for each in stops} == dict.fromkeys(STOP_IDS)
    with pytest.raises(ModelError, match=r"expected a folder with a tokenizer"):
        load_tokenizer(ModelConfig(name_or_path=str(result.folder)), TokenizerConfig())


def test_without_a_tokenizer_of_its_own_the_bases_is_taken(nano_run, tmp_path):
    (tmp_path / "adapter").mkdir()
    for path in (nano_run / "adapter").glob("adapter_*"):
        shutil.copy(path, tmp_path / "adapter")
    result = merge_to_folder(tmp_path / "adapter", tmp_path / "out", base="nano", verify=False)
    assert result.agreement is None
    ours, theirs = AutoTokenizer.from_pretrained(result.folder), AutoTokenizer.from_pretrained(local_path("nano"))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert (result.folder / "generation_config.json").read_bytes() == (
        Path(local_path("nano")) / "generation_config.json"
    ).read_bytes()


def test_a_base_of_the_hub_comes_from_its_cache(case, tmp_path, monkeypatch):
    base, adapter = case("slices")
    snapshot = tmp_path / "cache" / "models--somebody--phi" / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = merge_to_folder(adapter, tmp_path / "out", base="somebody/phi")
    assert result.agreement.relative < 1e-6
    assert "somebody/phi with the LoRA adapter" in (result.folder / "README.md").read_text()
    with pytest.raises(ModelError, match=r"merge: base='somebody/other' - expected the base model's folder"):
        merge_to_folder(adapter, tmp_path / "other", base="somebody/other")


def test_a_check_that_says_little_says_so(phi3, tmp_path, caplog):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    phi3().bfloat16().save_pretrained(base)
    model = trained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), lora())
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.lora_B["default"].weight.data *= 2e-2
    model.save_pretrained(adapter)
    merge_to_folder(adapter, tmp_path / "out", base=str(base))
    assert "the check is weak, because rounding to bfloat16 moves the logits by" in caplog.text


# -- refusals: nothing is written


@pytest.fixture
def refused(case, tmp_path):
    """Merges a changed base or adapter and gives the message; there must be nothing where the model would be."""

    def attempt(change, error, name="slices", message="", **options):
        base, adapter = case(name)
        change(base, adapter)
        with pytest.raises(error, match=message):
            merge_to_folder(adapter, tmp_path / "out", **({"base": str(base)} | options))
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".saving-*"))

    return attempt


def test_a_wrong_merge_is_not_written(refused, monkeypatch):
    plain = FastLinear.get_delta_weight
    monkeypatch.setattr(FastLinear, "get_delta_weight", lambda self, name: plain(self, name) * 1.05)
    message = r"merge: difference=.* - expected at most 0.0001.*Nothing was written"
    refused(lambda base, adapter: None, AdapterError, message=message)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_bin(base, adapter):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def torn(base, adapter):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_shard(base, adapter):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="10KB")
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def misshapen(base, adapter):
    def change(tensors):
        tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(3, 3)
        tensors["model.norm.weight"] = torch.zeros(5)
        del tensors["model.layers.1.mlp.down_proj.weight"]

    edit_weights(base, change)


def other_adapter(base, adapter):
    def change(tensors):
        for key in list(tensors)[:2]:
            tensors[key] = tensors[key][:-1].contiguous()

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (only_bin, ModelError, r"file='model.safetensors' - expected weights in safetensors files. Save it as such"),
        (torn, ModelError, r"base/model.safetensors: content=.* - expected a complete safetensors file. Copy the base"),
        (missing_shard, ModelError, r"weight_map='model-00002-of-.*' - expected an existing .*Copy the complete model"),
        (misshapen, ModelError, r"3 faults:\n.*model.layers.0.self_attn.qkv_proj.weight=\(3, 3\) - expected the shape "
                                r"\(64, 32\)(.|\n)*missing='model.layers.1.mlp.down_proj.weight'(.|\n)*model.norm"),
        (lambda base, adapter: edit_json(base / "config.json", quantization_config={"quant_method": "gptq"}),
         ModelError, r"name_or_path=.* - expected 16-bit weights, or .* these are gptq. Give the model that it was"),
        (lambda base, adapter: (base / "config.json").write_text("{"), ModelError, r"config.json: content=.*JSON file"),
        (other_adapter, AdapterError, r"2 faults:\n.*expected the shape"),
        (lambda base, adapter: edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]]),
         AdapterError, r"layer_replication=.* - expected null, because a merged model has"),
        (lambda base, adapter: edit_json(adapter / "adapter_config.json", peft_type="LOHA"),
         AdapterError, r"peft_type='LOHA' - expected LORA. Merge it in memory"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_base_or_adapter_is_said(refused, change, error, message):
    refused(change, error, message=message)


def test_a_base_that_nobody_names(refused):
    def change(base, adapter):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)

    refused(change, AdapterError, message=r"base=None - expected the base model, which the adapter", base=None)


def test_a_base_that_has_moved(refused):
    def change(base, adapter):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="/nowhere/base")

    refused(change, ModelError, message=r"base='/nowhere/base' - expected the folder of .*--base FOLDER", base=None)


def test_a_size_that_is_none(refused):
    message = r"merge: max_shard_size='many' - expected a number of bytes, or a size such as 500MB"
    refused(lambda base, adapter: None, ConfigError, message=message, max_shard_size="many")


def test_a_loralib_file_has_to_be_converted(tmp_path, case):
    base, _ = case("slices")
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(AdapterError, match=r"merge: source=.* - expected an adapter in PEFT's format"):
        merge_to_folder(path, tmp_path / "out", base=str(base))


def test_experts_in_another_form_are_merged_in_memory(phi3, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    phimoe(phi3).save_pretrained(base)
    config = lora(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"])
    trained(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    with pytest.raises(AdapterError, match=r"these are stored in another form. Merge it in memory: philora.merge"):
        merge_to_folder(adapter, tmp_path / "out", base=str(base))
    adapted = loaded(base, adapter)
    expected = logits(adapted)
    philora.merge(adapted).save_pretrained(tmp_path / "memory")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "memory")), expected) < LOGITS_FP32


def test_a_folder_that_is_not_empty_is_left_alone(case, tmp_path):
    base, adapter = case("slices")
    for name in ("full", "file"):
        out = tmp_path / name
        content = out if name == "file" else out / "mine.txt"
        content.parent.mkdir(exist_ok=True)
        content.write_text("mine")
        with pytest.raises(ConfigError, match=r"merge: out=.* - expected a (new or empty folder|folder that can)"):
            merge_to_folder(adapter, out, base=str(base))
        assert content.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    merge_to_folder(adapter, tmp_path / "empty", base=str(base))
    merge_to_folder(adapter, tmp_path / "new" / "deep", base=str(base))
    assert (tmp_path / "new" / "deep" / "config.json").exists()


def test_too_small_a_disk_is_said_before(refused, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"merge: out=.* - expected free space for [\d,]+ bytes; 1,000 are free"
    refused(lambda base, adapter: None, RunError, message=message)


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a user namespace that may mount a small file system")
def test_a_full_disk_leaves_nothing(case, tmp_path):
    base, adapter = case("slices")
    small = tmp_path / "small"
    small.mkdir()
    code = f"""
import shutil
from philora.errors import RunError
from philora.exporting.merged_folder import merge_to_folder
large = shutil.disk_usage("/")._replace(free=10**12)  # others may fill a disk while we write
shutil.disk_usage = lambda path: large
try:
    merge_to_folder({str(adapter)!r}, {str(small / "out")!r}, base={str(base)!r})
except RunError as error:
    print(error)
"""
    (tmp_path / "fill.py").write_text(code)
    script = f"mount -t tmpfs -o size=64k tmpfs {small} && {sys.executable} {tmp_path}/fill.py && ls -A {small}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Free some space, or give another folder; nothing was written." in done.stdout
    assert done.stdout.count("\n") == 1, "files were left"


# -- bounded memory, and a process that is killed


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of some 270 MB in fp32, and an adapter on all of its projections."""
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = Phi3Config(
        vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=5, num_attention_heads=16,
        num_key_value_heads=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    model.save_pretrained(folder / "base")
    trained(model, lora(target_modules="all-linear")).save_pretrained(folder / "adapter")
    return folder


MEASURE = """
import sys, threading, time
import torch, transformers, peft
import philora
from philora.exporting.merged_folder import merge_to_folder
torch.set_num_threads(1)
base, adapter, out, how = sys.argv[1:]

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def sample():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

before = anonymous()
thread = threading.Thread(target=sample)
thread.start()
if how == "folder":
    merge_to_folder(adapter, out, base=base, max_shard_size="30MB", verify=False)
else:
    model = philora.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded_by_a_shard_and_a_weight(large, tmp_path):
    size = (large / "base" / "model.safetensors").stat().st_size
    grown = {}
    for how in ("folder", "memory"):
        command = [sys.executable, "-c", MEASURE, large / "base", large / "adapter", tmp_path / how, how]
        # Tensors above 32 MB, as real models have them, go back to the system when they are freed; glibc may keep
        # those of a small model, and how many differs from run to run.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            [str(each) for each in command], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        grown[how] = int(done.stdout.splitlines()[-1])
    assert size > 250e6
    # A shard of 30 MB; the largest weight (25 MB) in fp32, and its update twice while PEFT scales it; the adapter and
    # what the libraries import when they are used.
    assert grown["folder"] < size / 2
    assert grown["memory"] > 0.9 * size, "the measurement does not see a model in memory"
    one, two = tensors_of(tmp_path / "folder"), tensors_of(tmp_path / "memory")
    assert one.keys() == two.keys()


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_under_the_final_name(large, tmp_path):
    out = tmp_path / "out"
    code = "import sys, philora; philora.merge_to_folder(*sys.argv[1:3], base=sys.argv[3])"
    command = [sys.executable, "-c", code, large / "adapter", out, large / "base"]
    with subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".saving-*/*.safetensors")) and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".saving-*"))
    assert not out.exists()
