"""Each known fault of loralib 0.1.2: a check that fails on loralib, run here, and passes on philora.lora.

`settled(check)` runs the same check with both libraries. It demands that loralib fails it, so that a check which
tests nothing, or a later loralib without the fault, shows.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

from philora import lora

Check = Callable[[Any], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def random_(layer: nn.Module) -> nn.Module:
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.normal_(matrix, std=0.3)
    return layer


def eval_(layer: nn.Module) -> nn.Module:
    layer.eval()
    return layer


# Convolutions


@check
def conv1d_of_any_kernel_size(library: Any) -> None:
    layer = library.Conv1d(4, 6, 3, r=2)
    assert layer(torch.randn(2, 4, 8)).shape == (2, 6, 6)


@check
def conv3d_of_any_kernel_size(library: Any) -> None:
    layer = library.Conv3d(4, 6, 3, r=2)
    assert layer(torch.randn(1, 4, 3, 3, 3)).shape == (1, 6, 1, 1, 1)


@check
def conv_with_a_tuple_kernel(library: Any) -> None:
    assert library.Conv2d(4, 6, (3, 1), r=2)(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 5)


@check
def conv_dropout_acts(library: Any) -> None:
    layer = random_(library.Conv2d(4, 6, 3, r=2, lora_dropout=0.5))
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(layer(x), layer(x))


@check
def checkpoints_of_other_releases_load(library: Any) -> None:
    """`weight` beside `conv.weight`, as loralib's main branch writes it."""
    layer = library.Conv2d(4, 6, 3, r=2)
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["conv.weight"], "bias": state["conv.bias"]})


# States and modes


@check
def state_saved_in_eval_loads_in_train(library: Any) -> None:
    layer, fresh, x = random_(library.Linear(6, 5, r=2)), library.Linear(6, 5, r=2), torch.randn(3, 6)
    want = layer(x)
    fresh.load_state_dict(eval_(layer).state_dict())
    torch.testing.assert_close(fresh(x), want)


@check
def state_saved_in_eval_is_unmerged(library: Any) -> None:
    layer = random_(library.Linear(6, 5, r=2))
    before = layer.weight.detach().clone()
    eval_(layer)
    assert torch.equal(layer.state_dict()["weight"], before)


@check
def adapter_loaded_in_eval_counts(library: Any) -> None:
    layer, other, x = library.Linear(6, 5, r=2), random_(library.Linear(6, 5, r=2)), torch.randn(3, 6)
    other.weight.data.copy_(layer.weight)
    other.bias.data.copy_(layer.bias)
    eval_(layer).load_state_dict(library.lora_state_dict(other), strict=False)
    torch.testing.assert_close(layer(x), other(x))


@check
def adapter_loaded_in_eval_leaves_the_base(library: Any) -> None:
    layer, other = library.Linear(6, 5, r=2), random_(library.Linear(6, 5, r=2))
    before = layer.weight.detach().clone()
    eval_(layer).load_state_dict(library.lora_state_dict(other), strict=False)
    layer.train()
    assert torch.equal(layer.weight, before)


def cycles(library: Any, dtype: torch.dtype, count: int) -> None:
    layer = library.Linear(64, 64, r=8, dtype=dtype)
    nn.init.normal_(layer.lora_B, std=0.02)
    before = layer.weight.detach().clone()
    for _ in range(count):
        layer.eval()
        layer.train()
    assert torch.equal(layer.weight, before)


@check
def fp16_base_survives_a_cycle(library: Any) -> None:
    cycles(library, torch.float16, 1)


@check
def bf16_base_survives_ten_cycles(library: Any) -> None:
    cycles(library, torch.bfloat16, 10)


@check
def fp32_base_survives_ten_cycles(library: Any) -> None:
    cycles(library, torch.float32, 10)


@check
def merging_rounds_once(library: Any) -> None:
    layer = random_(library.Linear(64, 64, r=8, dtype=torch.bfloat16))
    want = (layer.weight.float() + layer.scaling * layer.lora_B.float() @ layer.lora_A.float()).bfloat16()
    assert torch.equal(eval_(layer).weight, want)


@check
def merge_weights_off_while_merged_does_not_stick(library: Any) -> None:
    layer, x = random_(library.Linear(6, 5, r=2)), torch.randn(3, 6)
    eval_(layer).merge_weights = False
    layer.train()
    assert layer(x).grad_fn is not None
    assert not layer.merged


@check
def train_returns_the_module(library: Any) -> None:
    for layer in (
        library.Linear(2, 2, r=1),
        library.Embedding(2, 2, r=1),
        library.MergedLinear(2, 2, r=1, enable_lora=[True]),
        library.Conv2d(2, 2, 1, r=1),
    ):
        assert layer.train() is layer
        assert layer.eval() is layer


# Copies


@check
def a_layer_can_be_pickled(library: Any) -> None:
    layer, x = library.Linear(6, 5, r=2), torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@check
def a_model_can_be_saved_whole(library: Any) -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(library.Conv2d(4, 4, 3, r=2)), file)
    file.seek(0)
    torch.load(file, weights_only=False)


# Names


class Named(nn.Module):
    def __init__(self, library: Any) -> None:
        super().__init__()
        self.proj = library.Linear(4, 4, r=2)
        self.lora_head = nn.Linear(4, 4)
        self.debias = nn.Linear(4, 4)
        self.conv = library.Conv2d(4, 4, 3, r=2)
        self.plain = library.Linear(4, 4)

    def trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


@check
def a_module_named_like_lora_stays_frozen(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model)
    assert not {name for name in model.trained() if name.startswith("lora_head")}
    assert not {name for name in library.lora_state_dict(model) if name.startswith("lora_head")}


@check
def a_module_named_like_bias_is_none(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "all")
    assert "debias.bias" in model.trained()
    assert "debias.weight" not in model.trained()


@check
def lora_parameters_train_again(library: Any) -> None:
    model = Named(library)
    model.requires_grad_(False)
    library.mark_only_lora_as_trainable(model)
    assert {"proj.lora_A", "proj.lora_B"} <= model.trained()


@check
def biases_that_train_are_saved(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "lora_only")
    assert model.trained() == set(library.lora_state_dict(model, "lora_only"))


@check
def bias_of_a_convolution_trains(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "lora_only")
    assert "conv.conv.bias" in model.trained()


@check
def a_wrong_choice_changes_nothing(library: Any) -> None:
    model = Named(library)
    before = model.trained()
    with pytest.raises((ValueError, NotImplementedError)):
        library.mark_only_lora_as_trainable(model, "alle")
    assert model.trained() == before


# MergedLinear


@check
def grouped_query_slices(library: Any) -> None:
    """q 64, k 16 and v 16 rows; q and v adapted. Without a way to say so, q is adapted by half and k wholly."""
    extra = {"slices": [64, 16, 16]} if library is lora else {}
    layer = random_(library.MergedLinear(8, 96, r=2, enable_lora=[True, False, True], **extra))
    changed = layer.merge_AB().abs().sum(1) > 0
    assert changed.tolist() == [True] * 64 + [False] * 16 + [True] * 16


@check
def no_slice_adapted(library: Any) -> None:
    layer, x = library.MergedLinear(4, 6, r=2, enable_lora=[False, False]), torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@check
def merged_linear_does_not_build_the_update(library: Any) -> None:
    """Tensors kept for backward: none of the size of the weight but the weight."""
    layer, x = (
        random_(library.MergedLinear(64, 192, r=2, enable_lora=[True] * 3)),
        torch.randn(4, 64, requires_grad=True),
    )
    weights = {layer.weight.untyped_storage().data_ptr()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.numel() < 64 * 192 or t.untyped_storage().data_ptr() in weights for t in kept)


# The rest


@check
def negative_rank_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="r=-1"):
        library.Linear(4, 4, r=-1)


@check
def bf16_base_with_fp32_adapters(library: Any) -> None:
    layer = library.Linear(6, 5, r=2)
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    layer(torch.randn(3, 6).bfloat16()).float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


@check
def max_norm_leaves_a(library: Any) -> None:
    layer = random_(library.Embedding(6, 4, r=2, max_norm=0.1))
    before = layer.lora_A.detach().clone()
    layer(torch.arange(6))
    assert torch.equal(layer.lora_A, before)


@check
def max_norm_merged_is_unmerged(library: Any) -> None:
    layer, x = random_(library.Embedding(6, 4, r=2, max_norm=0.5)), torch.arange(6)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(eval_(layer)(x), other(x))


@check
def merging_leaves_a_tied_head(library: Any) -> None:
    table, head = random_(library.Embedding(6, 4, r=2)), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    before = head.weight.detach().clone()
    table.eval()
    assert torch.equal(head.weight, before)


@check
def an_embedding_keeps_the_table_it_is_given(library: Any) -> None:
    table = torch.randn(6, 4)
    assert torch.equal(library.Embedding.from_pretrained(table.clone()).weight, table)


@check
def sparse_embeddings_train(library: Any) -> None:
    layer = random_(library.Embedding(6, 4, r=2, sparse=True))
    layer(torch.arange(3)).sum().backward()
    assert layer.lora_A.grad is not None


@check
def transposed_weights_are_contiguous(library: Any) -> None:
    assert library.Linear(4, 6, r=2, fan_in_fan_out=True).weight.is_contiguous()


@check
def transposed_weights_can_be_initialised_again(library: Any) -> None:
    """nn.Linear bounds its weight by 1/sqrt(in); read as (out, in), a transposed one would get 1/sqrt(out)."""
    layer = library.Linear(400, 4, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.abs().max() <= 1 / 20


@pytest.mark.parametrize("name", CHECKS)
def test_settled(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - a fault may be a wrong value or a crash of any kind
        CHECKS[name](loralib)
    torch.manual_seed(0)
    CHECKS[name](lora)


def test_embedding_starts_like_loralibs() -> None:
    """A zero and B normal looks like a slip and is none: kept."""
    library: ModuleType
    for library in (loralib, lora):
        layer = library.Embedding(6, 4, r=2)
        assert torch.equal(layer.lora_A, torch.zeros(2, 6))
        assert layer.lora_B.abs().min() > 0
