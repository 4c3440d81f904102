"""transformers' modules with fast functions inside: the same model, values, gradients and files."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import philora
from philora.kernels.modules import FAST, FastPhi3Attention, FastPhi3MLP
from philora.lora.functional import fused
from tests.tolerances import PACKED_FP32

LENGTHS = [5, 17, 2, 9, 31]


def packed():
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(each) for each in LENGTHS])[None]}


def results(model, batch, **more):
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**batch, use_cache=False, **more).logits.float()
    (logits * torch.sin(torch.arange(logits.numel())).view(logits.shape)).sum().backward()
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


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("batch", ["packed", "rows"])
def test_values_and_gradients_equal_plain_ones(phi3, changes, batch):
    model = philora.optimize(phi3(**changes)).train()
    assert {type(each) for each in model.modules()} & {FastPhi3Attention, FastPhi3MLP}
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(5))
    inputs = packed() if batch == "packed" else {"input_ids": ids}
    fast = results(model, inputs)
    with fused(False):
        plain = results(model, inputs)
    # fp32 sums in another order through two layers and back
    assert largest_gap(fast, plain) < 1e-4
    inputs["input_ids"] = inputs["input_ids"].roll(1, 1)
    assert largest_gap(results(model, inputs), plain) > 1e-2, "negative control"


def test_bf16_is_as_near_to_fp32_as_plain_bf16(phi3):
    wide = phi3().train()
    model = philora.optimize(copy.deepcopy(wide).bfloat16())
    want = results(wide, packed())
    fast = results(model, packed())
    with fused(False):
        plain = results(model, packed())
    assert largest_gap(fast, want) < 1.2 * largest_gap(plain, want)


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
