"""PyTorch's utilities for modules on philora's layers: values and gradients are those on PyTorch's own, plus LoRA."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import loralib
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from philora import lora

warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def make(kind, **changes):
    """A layer, what holds its weight, a plain layer of the same weight, and an input."""
    torch.manual_seed(0)
    if kind == "embedding":
        layer, plain, x = lora.Embedding(11, 6, r=2), nn.Embedding(11, 6), torch.randint(11, (5,))
    elif kind == "convolution":
        layer, plain, x = lora.Conv2d(3, 4, 3, r=2, **changes), nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    elif kind == "merged":
        layer = lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True], **changes)
        plain, x = nn.Linear(6, 12), torch.randn(4, 6)
    else:
        layer, plain, x = lora.Linear(6, 12, r=2, **changes), nn.Linear(6, 12), torch.randn(4, 6)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        plain.weight.copy_(layer.base_weight)
        if getattr(plain, "bias", None) is not None:
            plain.bias.copy_(layer.bias)
    plain.weight.requires_grad_(False)
    return layer, getattr(layer, "conv", layer), plain, x


KINDS = ["linear", "merged", "embedding", "convolution"]
UTILITIES = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}
UNDO = {
    "parametrize": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "weight_norm": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "spectral_norm": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "old weight_norm": remove_weight_norm,
    "old spectral_norm": remove_spectral_norm,
    "prune": lambda m: prune.remove(m, "weight"),
}


def update(layer, x):
    """What LoRA adds, by its definition."""
    delta = layer.merge_AB() * layer.scaling
    if isinstance(layer, lora.Embedding):
        return nn.functional.embedding(x, delta)
    return nn.functional.linear(x, delta) if delta.ndim == 2 else nn.functional.conv2d(x, delta)


def check(layer, plain, x):
    """Values, and the gradients of A, B and of what the utility trains."""
    got, want = layer(x), plain(x) + update(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - plain(x)).abs().max() > 0.1, "negative control: LoRA's part is there"
    if not layer._adds_update():  # merged: the value has no history
        return
    A_and_B = [each for name, each in layer.named_parameters() if "lora_" in name]
    found = torch.autograd.grad(layer(x).sin().sum(), A_and_B)
    wanted = torch.autograd.grad((plain(x) + update(layer, x)).sin().sum(), A_and_B)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("mode", ["train", "eval first", "eval after"])
def test_a_utility_on_the_weight(kind, utility, mode):
    layer, holder, plain, x = make(kind)
    if mode == "eval first":
        layer.eval()
        plain.eval()
    for each in (holder, plain):
        torch.manual_seed(1)  # spectral_norm draws its vectors
        UTILITIES[utility](each)
    if mode == "eval after":
        layer.eval()
        plain.eval()
    if "spectral" not in utility or mode != "train":  # there each call of the plain layer changes its vectors
        check(layer, plain, x)
    else:
        torch.testing.assert_close(layer(x), plain(x) + update(layer, x), rtol=1e-5, atol=1e-5)
    if "old" not in utility:  # PyTorch cannot copy what those leave on its own layers either
        again = copy.deepcopy(layer)
        torch.testing.assert_close(again.eval()(x), layer.eval()(x))
    for each in (holder, plain):
        UNDO[utility](each)
    if "spectral" in utility:  # its vectors moved on with each call of the one and of the other
        plain.weight.data.copy_(holder.base_weight)
    for training in (True, False, True):
        check(layer.train(training), plain.train(training), x)
    assert "weight" in holder.state_dict()
    layer.eval()
    assert layer.merged
    if utility != "weight_norm":  # a hook that it leaves cannot be pickled, on PyTorch's own layers either
        again = pickle.loads(pickle.dumps(layer))
        torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_parametrization_of_A(kind, training):
    layer, _, plain, x = make(kind)
    before = layer.lora_A.detach().clone()
    parametrize.register_parametrization(layer, "lora_A", Doubled())
    check(layer.train(training), plain, x)
    torch.testing.assert_close(layer.lora_A, 2 * before)
    assert [name for name, _ in layer.named_parameters() if "lora_A" in name] == ["parametrizations.lora_A.original"]
    lora.mark_only_lora_as_trainable(layer)
    assert layer.parametrizations.lora_A.original.requires_grad
    copy.deepcopy(layer)
    parametrize.remove_parametrizations(layer, "lora_A")
    check(layer.train(training), plain, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("utility", [*UTILITIES, None])
def test_the_merged_state_loads_where_pytorchs_layer_stands(kind, utility):
    layer, holder, plain, x = make(kind)
    if utility is not None:
        UTILITIES[utility](holder)
    layer.eval()
    want = layer(x)
    other = copy.deepcopy(plain)
    other.load_state_dict(lora.merged_state_dict(layer))
    torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_weight_is_deleted_and_assigned(kind, training):
    layer, holder, plain, x = make(kind)
    layer.train(training)
    del layer.weight
    assert not hasattr(holder, "weight")
    assert "weight" not in dict(holder.named_parameters())
    with torch.no_grad():
        plain.weight.mul_(3)
    layer.weight = nn.Parameter(plain.weight.clone(), requires_grad=False)
    assert holder.base_weight is holder._parameters["weight"]
    check(layer, plain, x)
    layer.weight = nn.Parameter(2 * plain.weight, requires_grad=False)
    with torch.no_grad():
        plain.weight.mul_(2)
    check(layer, plain, x)
    assert torch.equal(layer.train().weight, plain.weight)


def test_the_bias_of_a_convolution_is_assigned():
    layer, holder, _, _ = make("convolution")
    layer.bias = nn.Parameter(torch.ones(4))
    assert holder.bias is layer.bias
    assert "bias" not in layer._parameters


def test_loralibs_modules_are_there():
    for name in ("utils", "layers"):
        theirs, mine = (importlib.import_module(f"{package}.{name}") for package in ("loralib", "philora.lora"))
        public = [
            each for each, value in vars(theirs).items() if getattr(value, "__module__", "").startswith("loralib")
        ]
        assert public
        assert not [each for each in public if not hasattr(mine, each)]
    assert loralib.utils.__name__ == "loralib.utils"
