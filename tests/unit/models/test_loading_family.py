"""Each member of the family, at reduced width: trained, saved, loaded in PEFT, merged, resumed, packed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.adapters.slices import lora_layers
from philora.families import MODELS, fused_slices
from philora.models.loading import local_path
from tests.family import build, packed, small_config, tokens
from tests.tolerances import LOGITS_FP32, PACKED_FP32

LENGTHS = [60, 9, 33, 90, 64, 65, 21, 40]
"""Longer than the attention window (31) and on both sides of LongRoPE's boundary (64), where a member has one."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module", autouse=True)
def _less_garbage():
    """accelerate collects garbage around every training: 0.3 s each over all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def gap(mine, theirs):
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes))


def rows():
    documents = [tokens(count, seed)[0].tolist() for seed, count in enumerate(LENGTHS)]
    return Dataset.from_list([{"input_ids": each, "labels": [-100] * 3 + each[3:]} for each in documents])


def trainer(member, folder, model=None, **settings):
    """philora's on the small member; further arguments go to SFTConfig."""
    args = philora.SFTConfig(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 1,
            "packing": True,
            "max_length": 128,
            "learning_rate": 5e-3,
            "save_steps": 2,
            "report_to": "none",
            "bf16": False,
            "seed": 5,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        | settings,
    )
    model = build(small_config(member)) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    peft_config = None if isinstance(model, PeftModel) else lora()
    return philora.SFTTrainer(
        model, args=args, train_dataset=rows(), processing_class=tokenizer, peft_config=peft_config
    )


def adapter_of(model):
    return {name: each.detach().clone() for name, each in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module", params=MODELS, ids=lambda each: each.name)
def trained(request, tmp_path_factory):
    """A member, its folder with a run of four steps, and the trained model."""
    folder = tmp_path_factory.mktemp(request.param.name)
    made = trainer(request.param, folder / "run")
    made.train()
    made.model.save_pretrained(folder / "adapter")
    return request.param, folder, made.model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(70, 99), use_cache=False).logits


@pytest.mark.parametrize("member", MODELS, ids=lambda each: each.name)
def test_the_small_members_have_the_ratios_of_the_real_ones(member):
    small = small_config(member)
    assert small.num_attention_heads * member.num_key_value_heads == (
        member.num_attention_heads * small.num_key_value_heads
    )
    assert small.intermediate_size * member.hidden_size == member.intermediate_size * small.hidden_size
    assert small.hidden_size == small.num_attention_heads * (member.head_dim // 8)
    rope = small.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == (member.rope_type, member.rope_theta)
    assert rope["partial_rotary_factor"] == member.partial_rotary_factor
    assert small.tie_word_embeddings == member.tie_word_embeddings
    model = build(small)
    columns = model.model.rotary_emb(torch.zeros(1, 2, 8), torch.arange(2)[None])[0].shape[-1]
    assert columns == int(member.head_dim // 8 * member.partial_rotary_factor)
    assert fused_slices(small)["qkv_proj"]["v_proj"][1] == model.model.layers[0].self_attn.qkv_proj.out_features


def test_trains_and_loads_in_plain_peft(trained):
    member, folder, model = trained
    assert all(each.abs().max() > 0 for name, each in adapter_of(model).items() if "lora_B" in name)
    want = logits(model)
    loaded = PeftModel.from_pretrained(build(small_config(member)), folder / "adapter").eval()
    assert gap(logits(loaded), want) < LOGITS_FP32
    assert gap(logits(build(small_config(member))), want) > 1e-2, "the adapter changes nothing"
    with torch.no_grad():
        next(each for name, each in loaded.named_parameters() if "lora_B" in name).mul_(1.02)
    assert gap(logits(loaded), want) > 10 * LOGITS_FP32, "negative control"


def test_merges_and_stays_tied(trained, tmp_path):
    member, folder, model = trained
    merged = philora.merge(copy.deepcopy(model))
    # W + BA is rounded to fp32 once more than W x + B A x
    assert gap(logits(merged), logits(model)) < 10 * LOGITS_FP32
    assert gap(logits(build(small_config(member))), logits(model)) > 1e-2, "negative control: the base"
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert gap(logits(again), logits(merged)) < LOGITS_FP32
    base = model.get_base_model()
    for each in (base, merged, again):
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == member.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != member.tie_word_embeddings
    assert all("lora_" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert again.config.to_dict()["rope_parameters"] == small_config(member).rope_parameters


def test_resumed_is_uninterrupted(trained, tmp_path):
    member, folder, model = trained
    want = adapter_of(model)
    again = trainer(member, tmp_path)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert all(torch.equal(each, want[name]) for name, each in adapter_of(again.model).items())
    fresh = trainer(member, tmp_path, max_steps=2)
    fresh.train()
    gaps = [gap(each, want[name]) for name, each in adapter_of(fresh.model).items()]
    assert max(gaps) > 1e-2, "negative control: two steps are not four"


def test_a_step_on_packed_rows_is_the_step_on_padded_ones(trained, tmp_path):
    """One step of SGD on all rows, so that the change of the adapter is the gradient: packed, padded, alone."""
    member, folder, _ = trained
    start = philora.load_adapter(build(small_config(member)), folder / "adapter", is_trainable=True)

    def step(model=start, **settings):
        model = copy.deepcopy(model)
        before = adapter_of(model)
        made = trainer(
            member, tmp_path, model, optim="sgd", learning_rate=1.0, max_grad_norm=1e9, weight_decay=0.0,
            lr_scheduler_type="constant", max_steps=1, save_strategy="no", **settings,
        )  # fmt: skip
        made.train()
        return torch.cat([(each - before[name]).flatten() for name, each in adapter_of(made.model).items()])

    alone = step(packing=False, per_device_train_batch_size=1, gradient_accumulation_steps=len(LENGTHS))
    # fp32 sums over hundreds of tokens, in another order
    assert gap(step(packing=True, per_device_train_batch_size=8), alone) < 10 * PACKED_FP32
    assert gap(step(packing=False, per_device_train_batch_size=len(LENGTHS)), alone) < 10 * PACKED_FP32
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight.mul_(1.01)
    assert gap(step(other, packing=True, per_device_train_batch_size=8), alone) > 100 * PACKED_FP32, "negative control"


@pytest.mark.parametrize("member", MODELS, ids=lambda each: each.name)
def test_the_slices_of_grouped_queries_are_exact(member):
    """Output and gradients against autograd through W + s B A, with the blocks put in their rows by hand."""
    config = small_config(member)
    base = build(config)
    model = philora.get_peft_model(copy.deepcopy(base), lora(target_modules=["q_proj", "k_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(3)
    layers = lora_layers(model)
    parts = fused_slices(config)["qkv_proj"]
    reference, weights = {}, {}
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = 0
        for index, (each, (start, stop)) in enumerate(parts.items()):
            columns = slice(4 * index, 4 * index + 4)
            with torch.no_grad():
                up[start:stop, columns] = 0.05 * torch.randn(stop - start, 4, generator=generator)
            a = down[columns].detach().clone().requires_grad_()
            b = up[start:stop, columns].detach().clone().requires_grad_()
            reference[name, each] = a, b
            rows = torch.zeros(up.shape[0], stop - start)
            rows[start:stop] = torch.eye(stop - start)
            delta = delta + 8 / 4 * rows @ b @ a
        weights[f"{name}.weight"] = base.get_parameter(f"{name}.weight").detach() + delta
    batch = packed([tokens(40, 1), tokens(70, 2)])
    want = functional_call(base, weights, (), {"input_ids": tokens(70, 2), "use_cache": False}).logits
    got = model(input_ids=tokens(70, 2), use_cache=False).logits
    assert gap(got, want) < 10 * LOGITS_FP32
    assert gap(model(**batch, use_cache=False).logits[:, 40:], want) < 10 * LOGITS_FP32
    weight = torch.sin(torch.arange(want.numel())).view(want.shape)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    for (name, each), (a, b) in reference.items():
        index = list(parts).index(each)
        columns, rows = slice(4 * index, 4 * index + 4), slice(*parts[each])
        layer = layers[name]
        down, up = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        assert gap(down[columns], a.grad) < 1e-4  # fp32 sums, through two layers and back
        assert gap(up[rows, columns], b.grad) < 1e-4
        assert not up[: rows.start, columns].any()
        assert not up[rows.stop :, columns].any()
        beside = slice(rows.start + 1, rows.stop + 1) if each == "q_proj" else slice(rows.start - 1, rows.stop - 1)
        assert gap(up[beside, columns], b.grad) > 1e-2, "negative control: rows shifted by one"


@pytest.mark.parametrize("member", [each for each in MODELS if each.sliding_window == 2047], ids=lambda each: each.name)
def test_the_attention_window_is_kept_within_packed_documents(member):
    config = small_config(member)
    assert config.sliding_window == 31
    plain = build(config)
    model = philora.optimize(copy.deepcopy(plain))
    documents = [tokens(90, 1), tokens(50, 2), tokens(31, 3), tokens(32, 4)]
    got = model(**packed(documents), use_cache=False).logits[0].split([90, 50, 31, 32])
    for mine, each in zip(got, documents, strict=True):
        assert gap(mine, plain(input_ids=each, use_cache=False).logits[0]) < PACKED_FP32
    whole = build(small_config(member, sliding_window=None))
    assert gap(got[0], whole(input_ids=documents[0], use_cache=False).logits[0]) > 1e-2, "negative control"
