"""Quantised bases: what is quantised, forward and gradients, loading, merging, optimizers, resuming, faults."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import philora
from philora.adapters.slices import lora_layers
from philora.configuration.config import load_config
from philora.configuration.sections import ModelConfig
from philora.errors import ConfigError, ModelError
from philora.exporting.merged_folder import merge_to_folder
from philora.kernels import quantization
from philora.kernels.quantization import QuantizedWeight, dequantized
from philora.lora.functional import fused
from philora.models.loading import load_model, load_skeleton, local_path
from philora.native import build
from tests import on_device
from tests.tolerances import LOGITS_FP32, MERGED_BF16, QUANTIZED_FP32

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FAST = {"nf4": "FastLinear4bit", "int8": "FastLinear8bitLt"}


def tokens(rows=2, length=20):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1)).to(on_device.chosen())


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": TARGETS} | changes))


@pytest.fixture
def folder(phi3, tmp_path):
    """A 16-bit folder of a tiny model."""
    path = tmp_path / "base"
    phi3(**SHAPE).save_pretrained(path)
    return path


def loaded(folder, how, dtype="float32", **changes):
    model = load_model(ModelConfig(name_or_path=str(folder), quantization=how, dtype=dtype, **changes))
    return model.to(on_device.chosen())


def trained(base, **changes):
    """The base with an adapter that moves it, the same each time."""
    torch.manual_seed(0)
    model = philora.get_peft_model(base, lora(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                inside = model.get_submodule(name.removesuffix(".weight"))
                step = 0.05 * torch.randn(each.shape, generator=generator).to(each.dtype)
                for part in getattr(inside, "slice_layout", ()):
                    rows, ranks = slice(part.row_start, part.row_stop), slice(part.rank_start, part.rank_stop)
                    each[rows, ranks] = step[rows, ranks]
                if not hasattr(inside, "slice_layout"):
                    each.copy_(step)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), use_cache=False).logits.float()


def step(model):
    """Loss and gradients of a training step."""
    model.train().zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gap(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - each).norm() / each.norm().clamp(min=1e-30)) for name, each in theirs.items())


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


# ------------------------------------------------------------------------------------------ what is quantised


def four_bits(kind, block, nested, rows, columns, seed=0):
    """A 4-bit layer over random bf16 weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
    options = {"blocksize": block, "compress_statistics": nested, "quant_type": kind, "quant_storage": torch.uint8}
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **options).to("cpu")
    return layer


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_linears_of_the_layers_are_quantised_and_nothing_else(phi3, tmp_path, how, tied):
    phi3(**SHAPE, tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = loaded(tmp_path, how, "bfloat16")
    quantised = {name for name, each in model.named_modules() if quantization.is_quantized(each)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert quantised == {f"model.layers.{index}.{part}" for index in (0, 1) for part in parts}
    others = [each for name, each in model.named_parameters() if name.rpartition(".")[0] not in quantised]
    assert {each.dtype for each in others} == {torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if how == "nf4":
        state = model.model.layers[0].mlp.down_proj.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested, state.dtype) == ("nf4", 64, True, torch.bfloat16)
        assert model.model.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16


def test_keys_of_bitsandbytes_and_modules_that_are_left_out(folder):
    model = loaded(folder, {"load_in_4bit": True, "llm_int8_skip_modules": ["o_proj"]}, "bfloat16")
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.weight.quant_state.quant_type == "fp4"
    assert not layer.mlp.down_proj.weight.quant_state.nested
    assert layer.mlp.down_proj.compute_dtype == torch.bfloat16  # bitsandbytes' own default is fp32
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear  # transformers quantises it when modules to leave out are named
    with pytest.raises(ConfigError, match=r"bnb_4bit_quant_type='nf5' - expected nf4 or fp4"):
        loaded(folder, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"})
    with pytest.raises(
        ConfigError, match=r"expected values that transformers.BitsAndBytesConfig takes. `bnb_4bit_quant"
    ):
        loaded(folder, {"load_in_4bit": True, "bnb_4bit_quant_storage": "int3"})


def test_parameters_count_what_they_stand_for(folder):
    plain = philora.coverage(philora.get_peft_model(loaded(folder, "none"), lora()))
    nf4 = philora.coverage(philora.get_peft_model(loaded(folder, "nf4"), lora()))
    assert (nf4.total_parameters, nf4.trainable_parameters) == (plain.total_parameters, plain.trainable_parameters)


# ------------------------------------------------------------------------------------------ forward and gradients


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_forward_and_gradients_equal_those_over_the_dequantised_weights(folder, how):
    model = trained(loaded(folder, how))
    assert {type(each).__qualname__ for each in model.modules() if hasattr(each, "lora_A")} == {FAST[how]}
    assert {each.dtype for name, each in model.named_parameters() if "lora_" in name} == {torch.float32}
    outputs, gradients = logits(model), step(model)
    if (how, on_device.chosen().type) != ("int8", "cuda"):  # bitsandbytes' own forward rounds activations there
        with fused(False):
            assert gap(step(model), gradients) < QUANTIZED_FP32
    with model.disable_adapter():
        base = logits(model)
    # The same adapter over a plain model of the dequantised weights.
    plain = loaded(folder, how)
    quantization.dequantize_(plain)
    assert not any(quantization.is_quantized(each) for each in plain.modules())
    assert distance(base, logits(plain)) < LOGITS_FP32
    reference = philora.get_peft_model(plain, lora())
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    assert distance(outputs, logits(reference)) < LOGITS_FP32
    assert gap(gradients, step(reference)) < QUANTIZED_FP32
    # Planted: one scale that is 1% off.
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.scaling["default"] *= 1.01
    assert gap(gradients, step(model)) > 10 * QUANTIZED_FP32


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_dequantised_weight_is_not_kept_for_backward(folder, how):
    model = trained(loaded(folder, how))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        model.train()(input_ids=tokens(), labels=tokens())
    matrices = {(each.out_features, each.in_features) for each in model.modules() if quantization.is_quantized(each)}
    assert len(matrices) == 4
    assert kept
    assert not matrices & {tuple(each) for each in kept}
    assert not matrices & {tuple(reversed(each)) for each in kept}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_in_shared_memory_are_those_of_bitsandbytes(kind, block, nested):
    layer = four_bits(kind, block, nested, 96, 64)
    expected = dequantized(layer, torch.bfloat16)
    with torch.no_grad():
        first = QuantizedWeight(layer).dequantize(torch.bfloat16)
        assert torch.equal(first, expected)
        if build.available():
            other = four_bits(kind, block, nested, 64, 64, seed=1)
            second = QuantizedWeight(other).dequantize(torch.bfloat16)
            assert second.data_ptr() == first.data_ptr()
            assert not torch.equal(first, expected)  # written over
    layer.weight.data[0] ^= 0x11
    with torch.no_grad():
        assert not torch.equal(QuantizedWeight(layer).dequantize(torch.bfloat16), expected)


def test_memory_is_shared_only_where_nothing_keeps_it():
    layer = four_bits("nf4", 64, True, 96, 64)
    weight = QuantizedWeight(layer)
    kept = weight.dequantize(torch.bfloat16)  # a gradient may be recorded: autograd would keep it
    before = kept.clone()
    with torch.no_grad():
        QuantizedWeight(four_bits("nf4", 64, True, 96, 64, seed=1)).dequantize(torch.bfloat16)
        assert weight.dequantize(torch.float32).dtype is torch.float32
        odd = four_bits("nf4", 64, False, 5, 10)  # its last block is not whole
        assert torch.equal(QuantizedWeight(odd).dequantize(torch.bfloat16), dequantized(odd, torch.bfloat16))
        wide = four_bits("nf4", 128, False, 96, 64)  # its blocks span rows
        assert torch.equal(QuantizedWeight(wide).dequantize(torch.bfloat16), dequantized(wide, torch.bfloat16))
    assert torch.equal(kept, before)


def test_int8_layers_without_an_adapter_evaluate_as_they_train(folder):
    """bitsandbytes rounds their inputs to 8 bits in evaluation, on a CPU not in training."""
    model = trained(loaded(folder, "int8"), target_modules=["o_proj"])
    in_evaluation = logits(model)
    with torch.no_grad():
        in_training = model.train()(input_ids=tokens(), use_cache=False).logits
    assert torch.equal(in_evaluation, in_training)
    plain = loaded(folder, "int8")
    quantization.dequantize_(plain)
    with model.disable_adapter():
        assert distance(logits(model), logits(plain)) < LOGITS_FP32
    for each in model.modules():
        if isinstance(each, bitsandbytes.nn.Linear8bitLt):
            each.state.__class__ = bitsandbytes.MatmulLtState
    assert distance(logits(model), in_evaluation) > 100 * LOGITS_FP32, "negative control: bitsandbytes' own"


def test_training_after_an_evaluation_is_as_before_it(folder):
    """bitsandbytes rearranges 4-bit weights in a forward pass without gradients; no gradient passes them then."""
    model = trained(loaded(folder, "nf4", "bfloat16"))
    before = step(model)
    with model.disable_adapter():
        logits(model)
    logits(model)
    assert gap(step(model), before) == 0


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes rearranges with AVX512-BF16")
def test_a_model_that_was_evaluated_before_is_put_right(phi3, tmp_path, caplog):
    # Plain transformers; a width of which bitsandbytes' kernel has whole blocks.
    phi3(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    config = quantization.quantization_config("nf4", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    logits(model)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.packing_format_for_cpu
    caplog.set_level(logging.WARNING, "philora")
    adapted = trained(model)
    assert "had rearranged 8 quantised weights" in caplog.text
    fresh = trained(loaded(tmp_path, "nf4", "bfloat16"))
    assert gap(step(adapted), step(fresh)) < MERGED_BF16


def test_a_transposed_layer(tmp_path):
    """GPT-2's Conv1D holds (in, out); bitsandbytes' layer in its place holds (out, in)."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    model = philora.get_peft_model(loaded(tmp_path, "nf4"), lora(target_modules=["c_attn"], fan_in_fan_out=True))
    nn.init.normal_(model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight, std=0.1)
    expected = logits(model)
    merged = philora.merge(model)
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert distance(logits(merged), expected) < LOGITS_FP32


# ------------------------------------------------------------------------------------------------ loading

MEASURE = """
import sys, threading, time
from pathlib import Path
def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(each.split()[1]) for each in lines if each.startswith(("RssAnon", "RssFile"))) / 1024
from philora.configuration.config import ModelConfig
from philora.models.loading import load_model
load_model(ModelConfig(quantization=sys.argv[2], dtype="bfloat16"))  # what is loaded with the first model
peak = before = rss()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(ModelConfig(name_or_path=sys.argv[1], quantization=sys.argv[2], dtype="bfloat16"))
done = True
thread.join()
print(peak - before, rss() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_16_bit_model_is_never_whole_in_memory(phi3, tmp_path):
    """Files count too: a weight disappears when it is quantised."""
    model = phi3(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_key_value_heads=4).bfloat16()
    size = sum(each.numel() * 2 for each in model.parameters()) / 2**20
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    assert size > 120
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "nf4"]
    # What is freed goes back to the system, so that what remains is what is held.
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=returning)
    peak, after = map(float, done.stdout.split())
    assert after < 0.5 * size  # 4.13 of 16 bits, and what the loader brings
    assert peak < 0.8 * size


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_folder_that_is_quantised_already_is_loaded_as_it_is(folder, tmp_path, how, caplog):
    first = loaded(folder, how, "bfloat16")
    first.save_pretrained(tmp_path / "saved")
    assert load_skeleton(ModelConfig(name_or_path=str(tmp_path / "saved"))).config.vocab_size == 97
    caplog.set_level(logging.WARNING, "philora")
    again = loaded(tmp_path / "saved", "none", "bfloat16")
    assert not caplog.text
    assert torch.equal(logits(first), logits(again))
    adapted = trained(again)
    assert {type(each).__qualname__ for each in adapted.modules() if hasattr(each, "lora_A")} == {FAST[how]}
    loaded(tmp_path / "saved", "int8" if how == "nf4" else "nf4", "bfloat16")
    assert f"is quantised already ({how}): model.quantization is ignored" in caplog.text


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_folder_of_another_scheme_is_refused(folder, method):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_skeleton, load_model):
        with pytest.raises(
            ModelError, match=rf"expected 16-bit weights, or .* these are {method}. Give the model that"
        ):
            load(ModelConfig(name_or_path=str(folder)))


def test_without_bitsandbytes(folder, tmp_path, monkeypatch):
    loaded(folder, "nf4").save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(quantization, "bitsandbytes", None)
    for load in (load_skeleton, load_model):  # before any weight is read
        with pytest.raises(
            ModelError, match=r"quantization='nf4' - expected bitsandbytes .*pip install 'philora\[quant"
        ):
            load(ModelConfig(name_or_path=str(folder), quantization="nf4"))
        with pytest.raises(ModelError, match=r"name_or_path=.*saved' - expected bitsandbytes to be installed"):
            load(ModelConfig(name_or_path=str(tmp_path / "saved")))
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", absent)
    with pytest.raises(ConfigError, match=r"optim='paged_adamw_8bit' - expected an optimizer of torch's, because bits"):
        load_config({"data": {"train": "helpdesk"}}, ["training_config.optim=paged_adamw_8bit"])


@pytest.mark.slow
def test_the_notice_of_an_optional_kernel_is_not_shown():
    command = [sys.executable, "-c", "import philora; from philora import adapters; import bitsandbytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stderr


# ------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_merging_in_memory_gives_a_16_bit_model(folder, tmp_path, how):
    model = trained(loaded(folder, how, "bfloat16"))
    expected = logits(model)
    merged = philora.merge(model)
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear
    assert {each.dtype for each in merged.parameters()} == {torch.bfloat16}
    assert distance(logits(merged), expected) < MERGED_BF16
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert all(torch.equal(each, merged.state_dict()[name]) for name, each in again.state_dict().items())
    assert quantization.scheme_of(again.config) is None


@pytest.mark.parametrize("how", ["nf4", "int8", "saved nf4", "saved int8"])
def test_a_merged_folder_has_the_weights_that_the_adapter_was_trained_over(folder, tmp_path, how):
    base = folder
    if how.startswith("saved"):
        base = tmp_path / "saved"
        loaded(folder, how.split()[1], "bfloat16").save_pretrained(base)
    model = trained(loaded(base, "none" if base != folder else how, "bfloat16"), target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    result = merge_to_folder(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert result.agreement.relative < MERGED_BF16
    in_memory = philora.merge(model).state_dict()
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == in_memory.keys()
    for name, each in written.items():  # those that the adapter leaves alone are dequantised as well
        assert torch.equal(each.bfloat16(), in_memory[name]), name


def test_merging_into_a_fresh_base(folder, tmp_path):
    trained(loaded(folder, "nf4")).save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "philora.json").read_text())
    assert record["base"]["dtype"] == "float32"
    assert record["base"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    merge_to_folder(tmp_path / "adapter", tmp_path / "fresh", fresh_base=True)
    merge_to_folder(tmp_path / "adapter", tmp_path / "trained")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", dtype="auto")
    over = philora.load_adapter(loaded(folder, "none"), tmp_path / "adapter")
    assert distance(logits(fresh), logits(over)) < LOGITS_FP32
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="auto")
    assert distance(logits(fresh), logits(other)) > 100 * LOGITS_FP32


def test_a_fresh_base_must_not_be_quantised(folder, tmp_path):
    loaded(folder, "nf4").save_pretrained(tmp_path / "saved")
    trained(loaded(tmp_path / "saved", "none")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"expected a base of 16-bit weights; these are nf4. Give the model that it was"
    ):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "saved"), fresh_base=True)
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------ optimizers, runs, resuming


@pytest.fixture
def rows():
    ids = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": each, "labels": each} for each in ids])


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
@pytest.mark.parametrize("ratio", [None, 4])
def test_optimizers_by_name(folder, rows, tmp_path, optim, ratio, caplog):
    caplog.set_level(logging.WARNING, "philora")

    def run(name, **settings):
        model = trained(loaded(folder, "nf4"), r=64, target_modules=["down_proj"])  # 4096 and more: 8 bits
        options = {"max_steps": 4, "learning_rate": 1e-3, "bf16": False, "report_to": "none", "disable_tqdm": True}
        options |= {"save_strategy": "no", "loraplus_lr_ratio": ratio, "logging_steps": 1}
        args = philora.SFTConfig(str(tmp_path / name), **(options | settings))
        tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
        trainer = philora.SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return trainer, [each["loss"] for each in trainer.state.log_history if "loss" in each]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Paged optimizers are not supported")
        trainer, losses = run("own", optim=optim)
    inner = trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes")
    bits = {state["state1"].dtype for state in inner.state.values()}
    assert bits == {torch.uint8 if "8bit" in optim else torch.float32}
    assert ("on a CPU the same optimizer runs without" in caplog.text) == optim.startswith("paged")
    _, plain = run("torch", optim="adamw_torch")
    assert losses == pytest.approx(plain, rel=1e-2)  # 8-bit states: their maps have steps of about 2%
    assert losses[0] == plain[0]


def adapter_types(model):
    return {each.dtype for name, each in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("how", ["peft_config", "model"])
def test_adapters_stay_in_fp32_unless_asked_otherwise(folder, rows, tmp_path, how, caplog):
    """TRL, beside it, rounds them."""
    caplog.set_level(logging.WARNING, "philora")
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))

    def made(trainer=philora.SFTTrainer, arguments=philora.SFTConfig, prepare=lambda model: model, **settings):
        torch.manual_seed(0)
        base = loaded(folder, "nf4", "bfloat16")
        targets = ["qkv_proj", "o_proj"]
        model = base if how == "peft_config" else prepare(trained(base, target_modules=targets))
        args = arguments(str(tmp_path), report_to="none", use_cpu=True, **settings)
        options = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
        return trainer(model, **options, peft_config=lora(target_modules=targets) if model is base else None).model

    ours = made()
    assert adapter_types(ours) == {torch.float32}
    assert "the adapter stays in float32 over the quantised base, where TRL rounds it to bfloat16" in caplog.text
    theirs = made(trl.SFTTrainer, trl.SFTConfig)
    assert adapter_types(theirs) == {torch.bfloat16}, "negative control"
    if how == "model":  # the B of `trained`; what PEFT makes over bf16 weights has their precision at first
        ups = [each for name, each in ours.named_parameters() if "lora_B" in name]
        assert not any(torch.equal(each, each.bfloat16().float()) for each in ups), "they were never rounded"
    caplog.clear()
    assert adapter_types(made(adapter_dtype="bfloat16")) == {torch.bfloat16}
    if how == "model":

        def rounded(model):
            for name, each in model.named_parameters():
                if "lora_" in name:
                    each.data = each.data.bfloat16()
            return model

        assert adapter_types(made(prepare=rounded)) == {torch.bfloat16}
    assert "the adapter stays" not in caplog.text
    with pytest.raises(ConfigError, match="adapter_dtype='float16' - expected one of float32, bfloat16 or null"):
        made(adapter_dtype="float16")


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_slices_stay_apart_in_eight_bits(folder, rows, tmp_path, optim):
    """A state of zero is not read back as zero from 8 bits, so that the optimizer moves what has no gradient."""
    args = philora.SFTConfig(str(tmp_path), optim=optim, max_steps=3, learning_rate=1e-3, bf16=False, report_to="none",
                             disable_tqdm=True, save_strategy="no")  # fmt: skip
    trainer = philora.SFTTrainer(
        loaded(folder, "nf4"),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=LoraConfig(r=64, target_modules=["gate_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    states = [state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()]
    assert torch.uint8 in states
    for layer in lora_layers(trainer.model).values():
        up = layer.lora_B["default"]
        inside = torch.zeros_like(up.weight, dtype=torch.bool)
        for each in up.slice_layout:
            inside[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = True
        assert up.weight[inside].abs().min() > 0
        assert (up.weight[~inside] == 0).all()


@pytest.fixture
def run_config(tmp_path):
    """A configuration of a quick run over a quantised nano model."""

    def make(name, **training):
        return {
            "model": {"name_or_path": "nano", "quantization": "nf4", "dtype": "bfloat16"},
            "data": {"train": {"path": "helpdesk", "limit": 60}, "eval": 0.1},
            "evaluation": {"generate": 0},
            "training_config": {
                "output_dir": str(tmp_path / name),
                "max_steps": 4,
                "save_steps": 2,
                "save_strategy": "steps",
                "eval_strategy": "no",
                "logging_steps": 1,
                "max_length": 64,
                "optim": "paged_adamw_8bit",
            }
            | training,
            "peft_config": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        }

    return make


@pytest.mark.slow
def test_a_run_keeps_fp32_adapters_resumes_and_merges(run_config, tmp_path):
    whole = philora.train(run_config("whole"))
    saved = load_file(whole.adapter / "adapter_model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.float32}
    assert any(not torch.equal(each, each.bfloat16().float()) for each in saved.values())
    assert json.loads((whole.adapter / "philora.json").read_text())["base"]["dtype"] == "bfloat16"
    # Stopped after step 2, as by a power cut: what came later was removed.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    for name in ("adapter", "results.json", "report.html"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = philora.train(run_config("cut"), resume="force")
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert all(torch.equal(each, again[name]) for name, each in saved.items())
    result = merge_to_folder(whole.folder, tmp_path / "merged")
    assert result.agreement.relative < MERGED_BF16


@pytest.mark.slow
def test_an_adapter_that_a_run_starts_from_is_not_rounded(run_config, tmp_path, folder):
    base = load_model(ModelConfig(name_or_path="nano", quantization="nf4", dtype="bfloat16"))
    trained(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "first")
    config = run_config("second", learning_rate=1e-20, optim="adamw_torch", max_steps=1)
    config["model"]["adapter"] = str(tmp_path / "first")
    del config["peft_config"]
    second = load_file(philora.train(config).adapter / "adapter_model.safetensors")
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    config["training_config"] |= {"output_dir": str(tmp_path / "third"), "adapter_dtype": "bfloat16"}
    third = load_file(philora.train(config).adapter / "adapter_model.safetensors")
    assert all(torch.equal(each.bfloat16(), third[name]) for name, each in first.items())
