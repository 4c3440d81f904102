"""Which way decoder layers go: facts that are made up, and facts that are read."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from peft import LoraConfig

import philora
from philora.decoder_stack import facts as facts_module
from philora.decoder_stack.choice import UNTRIED, BatchFacts, DeviceFacts, ModelFacts, stack_for
from philora.decoder_stack.facts import facts_of_call, facts_of_device, facts_of_model, known_facts
from philora.kernels.layout import PackedLayout
from philora.kernels.loss import _even_rows
from tests.conftest import make_phi3

MODEL, BATCH, H200 = ModelFacts(), BatchFacts(), DeviceFacts(name="NVIDIA H200")
CPU = DeviceFacts(kind="cpu", name="a CPU", capability=None, flash=False)


def test_the_case_that_ran_on_a_gpu_takes_the_stack():
    choice = stack_for(MODEL, BATCH, H200)
    assert choice.path == "stack"
    assert str(choice) == "stack (Phi3Model on NVIDIA H200)"
    for base in ("nf4", "fp8"):
        assert stack_for(replace(MODEL, base=base), BATCH, H200).path == "stack"
    for keep in ("elementwise", "input"):
        assert stack_for(MODEL, replace(BATCH, keep=keep), H200).path == "stack"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "LlamaModel"}, "the architecture is LlamaModel"),
        ({"dtype": "mixed"}, "differ in dtype"),
        ({"dtype": "float64"}, "weights are float64"),
        ({"base": "mixed"}, "differ in dtype or quantisation"),
        ({"head_size": 288}, "heads have 288 columns"),
        ({"head_size": 20}, "heads have 20 columns"),
        ({"activation": "gelu"}, "the activation is gelu"),
        ({"attention_dropout": 0.1}, "dropout of attention"),
        ({"residual_dropout": 0.1}, "dropout of attention or of the residual"),
        ({"adapters": ("a variant of LoRA (Dora)",)}, "a variant of LoRA"),
        ({"hooks": ("Phi3MLP",)}, "hooks on modules of the layers: Phi3MLP"),
        ({"trains_base": ("mlp.down_proj.weight",)}, "weights of the layers train"),
        ({"sharded": True}, "in shards"),
    ],
)
def test_what_in_a_model_keeps_it_off_the_stack(changes, reason):
    choice = stack_for(replace(MODEL, **changes), BATCH, replace(H200, switch="all"))
    assert choice.path == "modules"
    assert reason in str(choice)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gradients": False}, "no gradient is recorded"),
        ({"mask": True}, "rows are padded"),
        ({"positions": False}, "no positions"),
        ({"cache": True}, "a cache"),
        ({"outputs": ("output_hidden_states",)}, "output_hidden_states asked for"),
        ({"autocast": "float16"}, "autocast to float16 over weights in bfloat16"),
    ],
)
def test_what_in_a_call_keeps_it_off_the_stack(changes, reason):
    choice = stack_for(MODEL, replace(BATCH, **changes), replace(H200, switch="all"))
    assert choice.path == "modules"
    assert reason in str(choice)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (CPU, "needs a CUDA GPU, this is a CPU"),
        (replace(CPU, switch="all"), "needs a CUDA GPU, this is a CPU"),
        (replace(H200, triton=None), "Triton is not installed"),
        (replace(H200, name="Tesla T4", capability=(7, 5)), "Tesla T4 has compute capability 7.5"),
        (replace(H200, flash=False), "no flash attention for packed rows"),
        (replace(H200, switch="0"), "PHILORA_STACK=0"),
        (replace(H200, disagreement="differs by 0.3"), "differs by 0.3"),
    ],
)
def test_what_in_a_machine_keeps_it_off_the_stack(device, reason):
    choice = stack_for(MODEL, BATCH, device)
    assert choice.path == "modules"
    assert reason in str(choice)


def test_the_switch_of_all_fast_paths():
    assert stack_for(MODEL, BATCH, replace(H200, fused=False)).path == "plain"


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ({"lora_dropout": 0.05}, {}),
        ({"dtype": "float16"}, {}),
        ({"dtype": "float32"}, {}),
        ({"trains_norms": True}, {}),
        ({"longrope": True}, {}),
        ({"unadapted": True}, {}),
        ({"base": "int8"}, {}),
        ({"base": "fp4"}, {}),
        ({"devices": 2}, {}),
        ({}, {"keep": "host"}),
        ({}, {"autocast": "bfloat16"}),
    ],
)
def test_what_no_gpu_has_run_waits_for_the_switch(model, batch):
    facts = replace(MODEL, **model), replace(BATCH, **batch)
    choice = stack_for(*facts, H200)
    assert choice.path == "modules"
    assert "PHILORA_STACK=all takes it" in str(choice)
    assert any(each in str(choice) for each in UNTRIED.values())
    assert stack_for(*facts, replace(H200, switch="all")).path == "stack"


def test_every_untried_case_has_its_words():
    cases = 11  # of the test above
    assert len(UNTRIED) == cases


def test_dropout_that_does_not_act_is_no_reason():
    assert stack_for(replace(MODEL, lora_dropout=0.05), replace(BATCH, training=False), H200).path == "stack"


# -------------------------------------------------------------------------------------------------- facts read


def adapted(fast=True, **settings):
    config = LoraConfig(**({"target_modules": "all-linear", "r": 4} | settings))
    made = peft.get_peft_model(make_phi3(), config)
    return philora.optimize(made) if fast else made


def facts(model):
    return facts_of_model(model.get_base_model().model)


@pytest.mark.parametrize("fast", [True, False], ids=["philora's layers", "PEFT's"])
def test_the_facts_of_a_plain_adapter(fast):
    found = facts(adapted(fast, lora_dropout=0.05))
    assert found == ModelFacts(dtype="float32", head_size=8, lora_dropout=0.05)


def test_the_facts_of_other_adapters():
    assert facts(adapted(use_dora=True)).adapters == ("a variant of LoRA (Dora)",)
    assert facts(adapted(target_modules=["qkv_proj"])).unadapted
    assert facts(adapted(lora_bias=True)).adapters == ("B has a bias",)
    two = adapted()
    two.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    assert facts(two).adapters == ()
    two.base_model.set_adapter(["default", "other"])
    assert facts(two).adapters == ("several adapters are active: default, other",)
    off = adapted()
    off.merge_adapter()
    assert facts(off).adapters == ("adapters are merged",)
    sliced = philora.get_peft_model(make_phi3(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    assert facts(sliced).adapters == ("slices of fused projections have separate adapters",)


def test_the_facts_of_weights_that_train_and_of_hooks():
    model = adapted()
    decoder = model.get_base_model().model
    decoder.layers[0].input_layernorm.weight.requires_grad_()
    assert facts(model).trains_norms
    decoder.layers[1].mlp.down_proj.base_layer.weight.requires_grad_()
    assert facts(model).trains_base == ("mlp.down_proj.base_layer.weight",)
    decoder.layers[0].mlp.register_full_backward_hook(lambda *_: None)
    assert facts(model).hooks == ("Phi3MLP",)
    decoder.layers[0].self_attn.o_proj.to(torch.bfloat16)
    assert facts(model).dtype == "mixed"


def test_the_facts_of_a_call():
    model = adapted().get_base_model().model
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.arange(4)[None]}
    assert facts_of_call(model, batch | {"use_cache": False}, "input") == BatchFacts(training=False, keep="input")
    model.config.use_cache = True
    assert facts_of_call(model, batch, "input").cache
    assert facts_of_call(model, batch | {"output_attentions": True}, "input").outputs == ("output_attentions",)
    assert facts_of_call(model, batch | {"return_dict": False}, "input").outputs == ("return_dict=False",)
    with torch.autocast("cpu"), torch.no_grad():
        found = facts_of_call(model, {"input_ids": batch["input_ids"], "attention_mask": torch.ones(1, 4)}, "input")
    assert (found.gradients, found.mask, found.positions, found.autocast) == (False, True, False, "bfloat16")


def test_the_facts_of_this_machine(monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "0")
    found = facts_of_device(torch.device("cpu"))
    assert (found.kind, found.switch, found.interpreted, found.fused) == ("cpu", "0", False, True)
    assert found.memory_bytes > 0


# ------------------------------------------------------------------------------------------------- the layout


def test_the_layout_of_lengths_and_of_positions():
    labels = torch.tensor([7, 8, -100, 9, 10])
    layout = PackedLayout.of_lengths([2, 3], labels)
    assert layout.bounds.tolist() == [0, 2, 5]
    assert layout.bounds.dtype == torch.int32
    assert layout.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert (layout.longest_tokens, layout.lengths) == (3, (2, 3))
    assert layout.label_rows.tolist() == [0, 2, 3]
    assert layout.label_ids.tolist() == [8, 9, 10]
    again = PackedLayout.of_positions(torch.tensor([[0, 1], [0, 1], [0, 0]]))
    assert (again.lengths, again.longest_tokens) == ((2, 2, 1, 1), 2)
    offset = PackedLayout.of_positions(torch.tensor([[4, 5, 6, 0]]))
    assert offset.lengths == (3, 1)


def test_the_first_label_of_a_document_is_no_label_of_the_one_before():
    layout = PackedLayout.of_lengths([2, 2], torch.tensor([5, 6, 7, 8]))
    assert layout.label_rows.tolist() == [0, 2]


def test_the_layout_travels_under_the_names_of_transformers():
    layout = PackedLayout.of_lengths([2, 3])
    keywords = layout.keywords()
    assert sorted(keywords) == ["cu_seq_lens_k", "cu_seq_lens_q", "document_lengths", "max_length_k", "max_length_q"]
    again = PackedLayout.of_keywords(keywords)
    assert torch.equal(again.bounds, layout.bounds)
    assert (again.longest_tokens, again.lengths) == (3, (2, 3))
    assert PackedLayout.of_keywords({}) is None
    assert PackedLayout.of_keywords({"cu_seq_lens_q": layout.bounds}) is None
    moved = layout.to("meta")
    assert moved.bounds.device.type == "meta"
    assert moved.lengths == (2, 3)


def test_rows_that_are_padded_for_the_products_keep_their_bounds_true():
    layout = PackedLayout.of_lengths([2, 3])
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": layout.position_ids[None]}
    inputs = batch | layout.keywords()
    assert _even_rows(inputs) == 11
    expected = PackedLayout.of_positions(inputs["position_ids"])
    assert inputs["cu_seq_lens_q"].tolist() == expected.bounds.tolist() == [0, 2, 5, 16]
    assert inputs["max_length_k"] == expected.longest_tokens == 11
    assert inputs["document_lengths"] == expected.lengths == (2, 3, 11)


# --------------------------------------------------------------------------------------------- facts remembered


def _more_adapters(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))


CHANGES = {
    "an adapter": _more_adapters,
    "another active one": lambda model: (_more_adapters(model), known(model), model.set_adapter("other")),
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "a hook": lambda model: decoder_of(model).layers[1].mlp.register_forward_hook(lambda *_: None),
    "a hook for all": lambda _: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "a forward": lambda model: setattr(decoder_of(model).layers[1].mlp, "forward", lambda x: x),
    "a module": lambda model: setattr(decoder_of(model).layers[0].mlp, "down_proj", torch.nn.Linear(48, 32)),
    "a parameter that trains": lambda model: decoder_of(model).layers[0].input_layernorm.weight.requires_grad_(),
    "a dtype": lambda model: decoder_of(model).layers[0].self_attn.o_proj.to(torch.bfloat16),
    "a dropout": lambda model: setattr(first_dropout(model), "p", 0.5),
    "the configuration": lambda model: setattr(decoder_of(model).config, "resid_pdrop", 0.5),
}


def decoder_of(model):
    return model.get_base_model().model


def first_dropout(model):
    return decoder_of(model).layers[0].self_attn.o_proj.lora_dropout["default"]


def known(model):
    return known_facts(decoder_of(model))


@pytest.mark.parametrize("change", CHANGES)
def test_facts_are_read_again_when_what_they_rest_on_has_changed(change):
    model = adapted(lora_dropout=0.05)
    before = known(model)
    assert known(model) is before
    model.train()
    assert known(model) is before, "the mode is a fact of the call"
    handle = CHANGES[change](model)
    try:
        after = known(model)
        assert after is not before
        assert after == facts(model)
        assert known(model) is after
    finally:
        if change == "a hook for all":
            handle.remove()


def test_facts_that_nobody_watches_would_be_old(monkeypatch):
    """Negative control: with a watch that sees nothing, a hook is not found."""
    model = adapted()
    before = known(model)
    monkeypatch.setattr(facts_module._Watch, "changed", lambda _: False)
    CHANGES["a hook"](model)
    assert known(model) is before
    assert facts(model) != before
