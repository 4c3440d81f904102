"""Whoever takes part in the calls of PEFT's inner modules is noticed, and PEFT's own forward runs."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrizations, parametrize, prune

import philora
from philora.adapters.fast_layers import FastLinear, not_plain
from philora.errors import TargetError
from philora.kernels import attention, tiled_attention
from philora.kernels.document_groups import groups_of
from philora.kernels.layout import PackedLayout
from philora.lora.functional import _LoRALinear
from tests.conftest import make_phi3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def pair(dropout=0.0):
    """The same adapted model, PEFT's and optimized."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["first", "second"])
    plain = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for name, each in plain.named_parameters():
            if "lora_B" in name:
                each.normal_()
    mine = philora.optimize(copy.deepcopy(plain))
    return plain.train(), mine.train()


def layers(model):
    return [each for each in model.modules() if isinstance(each, PeftLinear)]


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return 3 * x


def double(module, *_):
    return None if not isinstance(_[-1], torch.Tensor) else 2 * _[-1]


def doubled_gradient(module, grad_input, grad_output):
    return tuple(None if each is None else 2 * each for each in grad_input)


def learnable(layer):
    layer.scaling["default"] = nn.Parameter(torch.tensor(0.7))
    layer.register_parameter("own_scaling", layer.scaling["default"])


def replace_forward(module):
    own = module.forward
    module.forward = lambda x: 2 * own(x)


PARTS = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}
CHANGES = {"a learnable scaling": learnable}
for part, find in PARTS.items():
    CHANGES |= {
        f"a forward hook of {part}": lambda layer, find=find: find(layer).register_forward_hook(double),
        f"a forward pre-hook of {part}": lambda layer, find=find: find(layer).register_forward_pre_hook(
            lambda _, args: (2 * args[0],)
        ),
        f"a backward hook of {part}": lambda layer, find=find: find(layer).register_full_backward_hook(
            doubled_gradient
        ),
        f"a backward pre-hook of {part}": lambda layer, find=find: find(layer).register_full_backward_pre_hook(
            lambda _, grads: tuple(2 * each for each in grads)
        ),
        f"a forward of its own of {part}": lambda layer, find=find: replace_forward(find(layer)),
    }
for part in ("base", "A", "B"):
    find = PARTS[part]
    CHANGES |= {
        f"parametrize {part}": lambda layer, find=find: parametrize.register_parametrization(
            find(layer), "weight", Half()
        ),
        f"weight_norm of {part}": lambda layer, find=find: parametrizations.weight_norm(find(layer)),
        f"prune {part}": lambda layer, find=find: prune.l1_unstructured(find(layer), "weight", amount=0.5),
    }
CHANGES |= {
    "dropout of its own": lambda layer: layer.lora_dropout.update({"default": OwnDropout()}),
    "a scaling of one number": lambda layer: layer.scaling.update({"default": torch.tensor(0.5)}),
}


def outcome(model, x):
    """The output, and the gradient of everything that trains."""
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return {"output": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def equal(plain, mine, x):
    want, got = outcome(plain, x), outcome(mine, x)
    assert got.keys() == want.keys()
    for name, each in want.items():
        torch.testing.assert_close(got[name], each, rtol=1e-5, atol=1e-6, msg=name)
    return want


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_noticed(change):
    plain, mine = pair()
    x = torch.randn(3, 6, requires_grad=True)
    before = equal(plain, mine, x)
    assert all(not_plain(each) is None for each in layers(mine))
    for model in (plain, mine):
        CHANGES[change](layers(model)[1])
    assert not_plain(layers(mine)[0]) is None
    assert isinstance(not_plain(layers(mine)[1]), str)
    after = equal(plain, mine, x)
    if change != "weight_norm of base":  # which says the same in other words
        assert after.keys() != before.keys() or any(
            not torch.equal(each, before[name]) for name, each in after.items()
        ), "negative control: the change does something"


@pytest.mark.parametrize(
    "register",
    [
        hooks_of_all.register_module_forward_hook,
        hooks_of_all.register_module_forward_pre_hook,
        hooks_of_all.register_module_full_backward_hook,
        hooks_of_all.register_module_full_backward_pre_hook,
    ],
    ids=lambda each: each.__name__,
)
def test_hooks_of_all_modules_see_every_module(register):
    plain, mine = pair()
    x = torch.randn(3, 6, requires_grad=True)
    seen = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        outcome(plain, x)
        theirs, seen[:] = list(seen), []
        outcome(mine, x)
    finally:
        handle.remove()
    assert seen == theirs
    assert seen.count("Linear") > 6
    assert not_plain(layers(mine)[0]) is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Linear, "forward"), (nn.Dropout, "forward"), (PeftLinear, "forward"), (nn.functional, "linear")],
    ids=str,
)
def test_a_replaced_forward_is_noticed(monkeypatch, owner, name):
    plain, mine = pair(dropout=0.5)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    x = torch.randn(3, 6)
    for model in (plain, mine):
        torch.manual_seed(3)
        model.first_output = model(x)
    torch.testing.assert_close(mine.first_output, plain.first_output)
    assert "replaced" in not_plain(layers(mine)[0])
    monkeypatch.undo()
    assert not_plain(layers(mine)[0]) is None


def test_the_plain_case_is_one_node(monkeypatch):
    calls = []
    original = _LoRALinear.forward
    monkeypatch.setattr(_LoRALinear, "forward", staticmethod(lambda *args: calls.append(1) or original(*args)))
    _, mine = pair()
    mine(torch.randn(3, 6))
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ names


def test_tools_read_pefts_and_transformers_names():
    config = LoraConfig(r=2, target_modules=["qkv_proj"])
    plain, mine = peft.get_peft_model(make_phi3(), config), philora.get_peft_model(make_phi3(), config)
    assert str(mine) == str(plain)
    assert [type(each).__name__ for each in mine.modules()] == [type(each).__name__ for each in plain.modules()]
    assert mine.get_layer_status() == plain.get_layer_status()
    assert mine.get_model_status() == plain.get_model_status()
    layer = layers(mine)[0]
    assert type(layer) is FastLinear
    assert type(pickle.loads(pickle.dumps(layer))) is FastLinear
    sliced = philora.get_peft_model(make_phi3(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(sliced).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize("targets", [["nope"], ["nope", "qkv_proj"], "nope.*"])
def test_a_missing_target_begins_with_pefts_words_and_is_pefts_error(targets):
    with pytest.raises(NoMatchingPeftModuleError) as theirs:
        peft.get_peft_model(make_phi3(), LoraConfig(r=2, target_modules="nope.*" if targets == "nope.*" else ["nope"]))
    with pytest.raises(NoMatchingPeftModuleError) as mine:
        philora.get_peft_model(make_phi3(), LoraConfig(r=2, target_modules=targets))
    assert isinstance(mine.value, TargetError)
    assert isinstance(mine.value, ValueError)
    first, _, rest = str(mine.value).partition("\n")
    assert str(theirs.value).startswith(first)
    assert "target_modules='nope" in rest


# ------------------------------------------------------------------------------------------------ recording


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, positions):
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_traced_model_computes_the_same(merged, training):
    model = philora.get_peft_model(make_phi3(), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
    model = (model.merge_and_unload() if merged else model).train(training)
    ids = torch.randint(3, 97, (1, 12))
    inputs = ids, torch.cat([torch.arange(5), torch.arange(7)])[None]
    whole = Logits(model)
    want = whole(*inputs)
    traced = torch.jit.trace(whole, inputs, check_trace=False)
    torch.testing.assert_close(traced(*inputs), want, rtol=1e-4, atol=1e-5)
    if not training:
        exported = torch.export.export(whole, inputs).module()
        torch.testing.assert_close(exported(*inputs), want, rtol=1e-4, atol=1e-5)


def test_a_peft_layer_is_traced_by_fx():
    plain, mine = pair()
    graph = torch.fx.symbolic_trace(mine.base_model.model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(graph(x), plain(x))


def test_attention_leaves_onednns_precision(monkeypatch):
    settings = torch.backends.mkldnn.matmul
    seen = []
    original = tiled_attention._attend
    monkeypatch.setattr(
        tiled_attention, "_attend", lambda *args: seen.append(settings.fp32_precision) or original(*args)
    )
    before = settings.fp32_precision
    layout = groups_of(PackedLayout.of_lengths([5, 7]), 1)
    q, k, v = torch.randn(3, 1, 2, 12, 8).bfloat16()
    attention.document_attention(q, k, v, layout)
    assert seen
    assert set(seen) == {before}
