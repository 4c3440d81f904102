"""transformers' modules with fast functions inside: the same model, values, gradients and files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

import philora
from philora.kernels.loss import add_label_head
from philora.kernels.modules import FAST, ROWS_STEP, FastPhi3Attention, FastPhi3MLP
from philora.lora.functional import fused
from tests import on_device
from tests.tolerances import PACKED_FP32

LENGTHS = [5, 17, 2, 9, 31]


def packed():
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(each) for each in LENGTHS])[None]
    return on_device.moved({"input_ids": ids, "position_ids": positions})


def results(model, batch, **more):
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**batch, use_cache=False, **more).logits.float()
    (logits * torch.sin(torch.arange(logits.numel(), device=logits.device)).view(logits.shape)).sum().backward()
    gradients = {name: each.grad.float().clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits.detach(), **gradients}


def largest_gap(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - each).norm() / each.norm().clamp(min=1e-12)) for name, each in theirs.items())


CONFIGS = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "sliding_window": 6},
    {"partial_rotary_factor": 0.5},
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("batch", ["packed", "rows"])
def test_values_and_gradients_equal_plain_ones(phi3, changes, batch):
    model = philora.optimize(phi3(**changes)).train()
    assert {type(each) for each in model.modules()} & {FastPhi3Attention, FastPhi3MLP}
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(5))
    inputs = packed() if batch == "packed" else on_device.moved({"input_ids": ids})
    fast = results(model, inputs)
    with fused(False):
        plain = results(model, inputs)
    # fp32 sums in another order through two layers and back
    assert largest_gap(fast, plain) < 1e-4
    inputs["input_ids"] = inputs["input_ids"].roll(1, 1)
    assert largest_gap(results(model, inputs), plain) > 1e-2, "negative control"


@pytest.mark.usefixtures("device")
def test_bf16_is_as_near_to_fp32_as_plain_bf16(phi3):
    wide = phi3().train()
    model = philora.optimize(copy.deepcopy(wide).bfloat16())
    want = results(wide, packed())
    fast = results(model, packed())
    with fused(False):
        plain = results(model, packed())
    assert largest_gap(fast, want) < 1.2 * largest_gap(plain, want)


@pytest.mark.usefixtures("device")
def test_with_gradient_checkpointing(phi3):
    model = philora.optimize(phi3()).train()
    want = results(model, packed())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_gap(results(model, packed()), want) < 1e-6


def test_attention_dropout_stays_with_transformers(phi3):
    model = philora.optimize(phi3(attention_dropout=0.5)).train()
    torch.manual_seed(0)
    first = model(**packed(), use_cache=False).logits
    assert (model(**packed(), use_cache=False).logits - first).abs().max() > 1e-3


def test_states_copies_and_classes(phi3):
    plain, model = phi3(), philora.optimize(phi3())
    assert model.state_dict().keys() == plain.state_dict().keys()
    again = copy.deepcopy(model)
    assert [type(each) for each in again.modules()] == [type(each) for each in model.modules()]
    names = [type(each) for each in model.modules()]
    philora.optimize(model)
    assert [type(each) for each in model.modules()] == names
    assert all(issubclass(fast, plain) for plain, fast in FAST.items())


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)],
)
def test_other_models(config, kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    model = philora.optimize(kind(config(**sizes, **heads))).train()
    fast = results(model, packed())
    with fused(False):
        plain = results(model, packed())
    assert largest_gap(fast, plain) < 1e-4
    alone = [model(input_ids=part, use_cache=False).logits for part in packed()["input_ids"].split(LENGTHS, 1)]
    got = model(**packed(), use_cache=False).logits
    assert (got - torch.cat(alone, 1)).abs().max() < PACKED_FP32 * got.abs().max()


def test_compiled(phi3):
    model = philora.optimize(phi3()).eval()
    with torch.no_grad():
        want = model(**packed(), use_cache=False).logits
        got = torch.compile(model, backend="eager")(**packed(), use_cache=False).logits
    assert (got - want).abs().max() < PACKED_FP32 * want.abs().max()


@pytest.mark.parametrize("labelled", [0, 5, 60, 300])
def test_the_last_layer_computes_what_has_a_label(phi3, labelled):
    """Loss and gradients as without; the products of the last layer see the labelled rows only."""
    model = philora.get_peft_model(phi3(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(each, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    base = model.get_base_model()
    add_fused_lm_head(base)
    add_label_head(base)
    lengths = [30, 110, 7, 105, 68]
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    labels = torch.where(torch.arange(ids.shape[1])[None] % (ids.shape[1] // max(1, labelled)) == 0, ids, -100)
    if not labelled:
        labels[:] = -100
    inputs = {"input_ids": ids, "labels": labels, "fused_lm_head": True}
    inputs["position_ids"] = torch.cat([torch.arange(each) for each in lengths])[None]
    seen = {}
    for index, layer in enumerate(base.model.layers):
        layer.mlp.gate_up_proj.register_forward_hook(
            lambda _, args, __, index=index: seen.__setitem__(index, args[0].shape[1])
        )

    def run():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    mine, rows = run(), dict(seen)
    with fused(False):
        plain = run()
    assert rows[0] == ids.shape[1]
    wanted = max(1, int((labels[:, 1:] != -100).sum()))
    assert rows[1] == (-(-wanted // ROWS_STEP) * ROWS_STEP if labelled < 200 else rows[0])
    if labelled:
        assert largest_gap(mine, plain) < 1e-4
        labels[0, 1:] = labels[0, 1:].roll(1)
        assert largest_gap(run(), plain) > 1e-2, "negative control"
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = run()
        assert seen[1] == ids.shape[1]
        model.gradient_checkpointing_disable()
        assert largest_gap(run(), checkpointed) < 1e-4
    else:
        assert all(each.abs().max() == 0 for name, each in mine.items() if name != "loss")


def test_second_derivatives_are_refused_and_not_wrong(phi3):
    """The fast modules' gradients are made in place and have no history; without them PyTorch differentiates twice."""
    model = philora.get_peft_model(phi3(), LoraConfig(r=2, target_modules="all-linear")).train()
    weights = [each for each in model.parameters() if each.requires_grad]

    def curvature():
        loss = model(**packed(), labels=packed()["input_ids"], use_cache=False).loss
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(sum(each.square().sum() for each in gradients), weights)

    with pytest.raises(RuntimeError, match=r"create_graph=True - .* PHILORA_FUSED=0"):
        curvature()
    model.get_base_model().set_attn_implementation("eager")  # nor has PyTorch's own flash attention one
    with fused(False):
        curvature()
