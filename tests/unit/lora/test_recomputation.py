"""Element-wise recomputation: the same bits of loss and gradients, and less that is kept for backward."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl.models.activation_offloading import OffloadActivations

import philora
from philora.configuration.sections import ModelConfig
from philora.errors import ConfigError
from philora.kernels import modules
from philora.lora.functional import fused, lora_linear
from philora.lora.recomputation import mark, recipe_of
from philora.models.loading import load_model
from tests import on_device
from tests.fast_paths import train_by_trainer

LENGTHS = [70, 120, 30, 100, 125, 88, 107]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def batch():
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(each) for each in LENGTHS])[None]
    return on_device.moved({"input_ids": ids, "position_ids": positions})


def adapted(model, **changes):
    model = philora.get_peft_model(model, LoraConfig(**(LORA | changes))).train()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def step(model, micro_batches=1):
    """Loss and gradients of accumulated micro-batches, and the bytes that the last one held for its backward."""
    model.zero_grad()
    weights = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    torch.manual_seed(7)
    results = {}
    for index in range(micro_batches):
        held = {}

        def pack(tensor, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = batch()
        inputs["input_ids"] = inputs["input_ids"].roll(index, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state.float()
            loss = (hidden * torch.sin(torch.arange(hidden.numel(), device=hidden.device)).view(hidden.shape)).sum()
        loss.backward()
        results[f"loss {index}"] = loss.detach()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return results | gradients, sum(held.values())


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_and_less_memory(phi3, dtype, dropout, compiled_or_not, monkeypatch):
    model = adapted(phi3(hidden_size=64, intermediate_size=160).to(dtype), lora_dropout=dropout)
    kept, bytes_kept = step(model, 2)
    philora.optimize(model, recomputation="elementwise")
    again, bytes_again = step(model, 2)
    assert equal(kept, again)
    # In both layers the outputs of two norms and of SwiGLU; the first norm's input would not have been kept otherwise.
    saved = sum(LENGTHS) * (3 * 64 + 2 * 160) * dtype.itemsize
    masks = 2 * sum(LENGTHS) * (3 * 64 + 160)
    assert bytes_kept - bytes_again in ([saved + masks, saved + masks // 8] if dropout else [saved])
    philora.optimize(model)  # leaves it as it is
    assert step(model)[1] == bytes_again
    with monkeypatch.context() as patched:
        right = modules.swiglu
        wrong = lambda y, _, *x: mark(y, lambda *x: right(*x) * 1.01 if len(x) == 1 else y, *x)  # noqa: E731
        patched.setattr(modules, "mark", wrong)
        assert not equal(kept, step(model, 2)[0]), "negative control: another function is computed again"
    philora.optimize(model, recomputation="none")
    assert step(model)[1] == bytes_kept


def test_a_recipe_does_not_outlive_a_change_in_place():
    x = torch.randn(3, 4)
    y = mark(x * 2, lambda x: x * 2, x)
    assert recipe_of(y).make(x).equal(y)
    assert recipe_of(y.view(4, 3)) is None
    y.add_(1)
    assert recipe_of(y) is None


def test_gradients_of_gradients():
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (2, 6), (4, 2)))
    weight = torch.randn(4, 6, dtype=torch.float64)

    def function(x, a, b, marked=True):
        y = torch.tanh(x)
        return lora_linear(mark(y, torch.tanh, x) if marked else y, weight, None, a, b, 0.5)

    assert torch.autograd.gradgradcheck(function, (x, a, b))


def test_what_it_does_not_cover_is_said(phi3, caplog):
    caplog.set_level(logging.WARNING)
    philora.optimize(adapted(phi3()), recomputation="elementwise")
    assert not caplog.messages
    philora.optimize(adapted(phi3(), use_dora=True), recomputation="elementwise")
    assert "8 LoRA layers run PEFT's forward and keep their inputs" in caplog.text
    with fused(False):
        philora.optimize(phi3(), recomputation="elementwise")
    assert "belongs to the fused path, which is off" in caplog.text
    philora.optimize(torch.nn.Linear(2, 2), recomputation="elementwise")
    assert "no RMSNorm or SwiGLU of this model has a fast form" in caplog.text
    with pytest.raises(ConfigError, match=r"recomputation='full' - expected none or elementwise\. model\.gradient_ch"):
        philora.optimize(phi3(), recomputation="full")


def test_other_models_have_it_for_their_norms(caplog):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    torch.manual_seed(0)
    model = adapted(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
    kept, bytes_kept = step(model)
    philora.optimize(model, recomputation="elementwise")
    assert "covers only RMSNorm of this model" in caplog.text
    again, bytes_again = step(model)
    assert equal(kept, again)
    assert bytes_kept - bytes_again == sum(LENGTHS) * 3 * 64 * 4


def test_the_trainer_takes_it(tmp_path):
    kept = train_by_trainer(str(tmp_path / "kept"), accumulation=2)
    again = train_by_trainer(str(tmp_path / "again"), accumulation=2, gradient_checkpointing="elementwise")
    assert kept[0] == again[0]
    assert equal(kept[1], again[1])


def test_the_setting_survives_and_contradictions_do_not(tmp_path):
    args = philora.SFTConfig(str(tmp_path), gradient_checkpointing="elementwise", report_to="none")
    given = {key: value for key, value in args.to_dict().items() if value is not None}
    for each in (args, dataclasses.replace(args, seed=4), philora.SFTConfig(**given)):
        assert each.elementwise_recomputation
        assert each.gradient_checkpointing is False
    assert not philora.SFTConfig(str(tmp_path)).elementwise_recomputation
    with pytest.raises(ConfigError, match="elementwise_recomputation=True - expected False, because gradient_check"):
        philora.SFTConfig(str(tmp_path), gradient_checkpointing=True, elementwise_recomputation=True)
    with pytest.raises(
        ConfigError, match="gradient_checkpointing='full' - expected True, False, 'elementwise' or 'host'"
    ):
        philora.SFTConfig(str(tmp_path), gradient_checkpointing="full")


# ------------------------------------------------------------------------------------------- activation offloading


@pytest.mark.parametrize("grade", ["none", "elementwise"])
def test_offloaded_activations_come_back(phi3, grade, monkeypatch):
    """TRL's hooks with the CPU in the place of a GPU: what the fast nodes save is copied away and back."""
    model = philora.optimize(adapted(phi3(), lora_dropout=0.1), recomputation=grade)
    want, _ = step(model)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)

    def offloaded(change=1.0):
        offload = OffloadActivations(use_pin_memory=False, use_streams=False)
        offload.update_model_params(model)
        model.zero_grad()
        torch.manual_seed(7)
        with offload:
            hidden = model.get_base_model().model(**batch(), use_cache=False).last_hidden_state.float()
            loss = (hidden * torch.sin(torch.arange(hidden.numel())).view(hidden.shape)).sum()
        copies = [each[0] for each in offload.tracker.values() if each[1]]
        for each in copies:
            if each.is_floating_point():
                each.mul_(change)
        loss.backward()
        gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        return {"loss 0": loss.detach()} | gradients, len(copies)

    got, copies = offloaded()
    assert copies > 2 * 8, "the tensors of two layers went through it"
    assert equal(got, want)
    assert not equal(offloaded(change=1.01)[0], want), "negative control: what came back counts"


def test_offloading_without_a_gpu_is_left_out(tmp_path, caplog):
    plain = train_by_trainer(str(tmp_path / "plain"))
    got = train_by_trainer(str(tmp_path / "offloaded"), activation_offloading=True)
    assert "activation_offloading is ignored: without a GPU" in caplog.text
    assert got[0] == plain[0]
    assert equal(got[1], plain[1])


# ----------------------------------------------------------------------------------------- quantised bases, runs


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_over_quantised_bases(phi3, how, tmp_path):
    pytest.importorskip("bitsandbytes")
    phi3(hidden_size=64, intermediate_size=160).save_pretrained(tmp_path)
    model = adapted(load_model(ModelConfig(name_or_path=str(tmp_path), quantization=how, dtype="bfloat16")))
    kept, bytes_kept = step(model, 2)
    philora.optimize(model, recomputation="elementwise")
    again, bytes_again = step(model, 2)
    assert equal(kept, again)
    assert bytes_kept - bytes_again == sum(LENGTHS) * (3 * 64 + 2 * 160) * 2


@pytest.mark.slow
def test_a_run_takes_it(tmp_path):
    """`philora.train`, with the same adapter at the end."""
    adapters = {}
    for grade in (False, "elementwise"):
        settings = {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2, "save_strategy": "no"}
        config = {
            "model": {"name_or_path": "nano", "dtype": "float32"},
            "data": {"train": {"path": "helpdesk", "limit": 20}, "eval": None},
            "training_config": settings | {"gradient_checkpointing": grade, "output_dir": str(tmp_path / str(grade))},
            "peft_config": {"r": 4, "lora_dropout": 0.1},
        }
        run = philora.train(config)
        adapters[grade] = load_file(run.adapter / "adapter_model.safetensors")
        log = (run.folder / "train.log").read_text()
        assert re.search(rf"recomputation +{grade or 'none'}", log)
    assert equal(adapters[False], adapters["elementwise"])
