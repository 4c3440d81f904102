"""Each known fault of loralib 0.1.2: a check that fails on loralib, run here, and passes on philora.lora.

`test_settled` runs the same check with both libraries. It demands that loralib fails it in the way that the check
names, so that a check which tests nothing, or a later loralib without the fault, shows.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import loralib
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from philora import lora
from tests.quick import quick

Check = Callable[[Any], None]


class Known(NamedTuple):
    """A check, and what it raises with loralib: by default what a wrong value does."""

    check: Check
    raises: type[BaseException]
    saying: str | None


CHECKS: dict[str, Known] = {}


def check(
    raises: type[BaseException] = AssertionError, saying: str | None = None, name: str | None = None
) -> Callable[[Check], Check]:
    """Enter the function below in `CHECKS`."""

    def enter(function: Check) -> Check:
        CHECKS[name or function.__name__] = Known(function, raises, saying)
        return function

    return enter


NO_PICKLE = "Can't pickle local object 'LoRALayer.__init__.<locals>.<lambda>'"

# One of each kind of layer, and an input for it.
KINDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], Callable[[], Tensor]]] = {
    "Linear": ("Linear", (24, 16), {"r": 4}, lambda: torch.randn(5, 24)),
    "MergedLinear": (
        "MergedLinear",
        (24, 18),
        {"r": 4, "enable_lora": [True, False, True]},
        lambda: torch.randn(5, 24),
    ),
    "Embedding": ("Embedding", (30, 16), {"r": 4}, lambda: torch.arange(30)),
    "Conv2d": ("Conv2d", (4, 6, 3), {"r": 2}, lambda: torch.randn(2, 4, 6, 6)),
}


def make(library: Any, kind: str, **options: Any) -> nn.Module:
    """A layer of this kind whose update is small beside its weight, and not zero."""
    name, args, settings, _ = KINDS[kind]
    layer: nn.Module = getattr(library, name)(*args, **settings, **options)
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.normal_(matrix, std=0.1)
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    found: Tensor = (layer.conv if hasattr(layer, "conv") else layer).weight
    return found


def random_(layer: nn.Module) -> nn.Module:
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.normal_(matrix, std=0.3)
    return layer


def eval_(layer: nn.Module) -> nn.Module:
    layer.eval()
    return layer


# Convolutions


@check(RuntimeError, "shape .* is invalid")
def conv1d_of_any_kernel_size(library: Any) -> None:
    layer = library.Conv1d(4, 6, 3, r=2)
    assert layer(torch.randn(2, 4, 8)).shape == (2, 6, 6)


@check(RuntimeError, "shape .* is invalid")
def conv3d_of_any_kernel_size(library: Any) -> None:
    layer = library.Conv3d(4, 6, 3, r=2)
    assert layer(torch.randn(1, 4, 3, 3, 3)).shape == (1, 6, 1, 1, 1)


@check()
def conv_with_a_tuple_kernel(library: Any) -> None:
    assert library.Conv2d(4, 6, (3, 1), r=2)(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 5)


@check()
def conv_dropout_acts(library: Any) -> None:
    layer = random_(library.Conv2d(4, 6, 3, r=2, lora_dropout=0.5))
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(layer(x), layer(x))


@check(RuntimeError, "Unexpected key")
def checkpoints_of_other_releases_load(library: Any) -> None:
    """`weight` beside `conv.weight`, as loralib's main branch writes it."""
    layer = library.Conv2d(4, 6, 3, r=2)
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["conv.weight"], "bias": state["conv.bias"]})


@check()
def small_updates_of_a_bf16_convolution_count(library: Any) -> None:
    """A weight of ones takes in nothing below 2^-8; x cancels the weight and not the update."""
    layer = library.Conv1d(4, 1, 1, r=1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.conv.weight.fill_(1)
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
        layer.lora_B.fill_(1e-3)
        y = layer(torch.tensor([1.0, -1.0, 1.0, -1.0]).bfloat16().view(1, 4, 1))
    torch.testing.assert_close(y.item(), 2e-3, rtol=2**-7, atol=0)


# States and modes


@check()
def state_saved_in_eval_loads_in_train(library: Any) -> None:
    layer, fresh, x = random_(library.Linear(6, 5, r=2)), library.Linear(6, 5, r=2), torch.randn(3, 6)
    want = layer(x)
    fresh.load_state_dict(eval_(layer).state_dict())
    torch.testing.assert_close(fresh(x), want)


@check()
def state_saved_in_eval_is_unmerged(library: Any) -> None:
    layer = random_(library.Linear(6, 5, r=2))
    before = layer.weight.detach().clone()
    eval_(layer)
    assert torch.equal(layer.state_dict()["weight"], before)


@check()
def adapter_loaded_in_eval_counts(library: Any) -> None:
    layer, other, x = library.Linear(6, 5, r=2), random_(library.Linear(6, 5, r=2)), torch.randn(3, 6)
    other.weight.data.copy_(layer.weight)
    other.bias.data.copy_(layer.bias)
    eval_(layer).load_state_dict(library.lora_state_dict(other), strict=False)
    torch.testing.assert_close(layer(x), other(x))


@check()
def adapter_loaded_in_eval_leaves_the_base(library: Any) -> None:
    layer, other = library.Linear(6, 5, r=2), random_(library.Linear(6, 5, r=2))
    before = layer.weight.detach().clone()
    eval_(layer).load_state_dict(library.lora_state_dict(other), strict=False)
    layer.train()
    assert torch.equal(layer.weight, before)


def base_survives(library: Any, kind: str, dtype: torch.dtype, cycles: int) -> None:
    layer = make(library, kind, dtype=dtype)
    before = weight_of(layer).detach().clone()
    for _ in range(cycles):
        nn.init.normal_(layer.lora_A, std=0.1)  # as training would move it
        layer.eval()
        layer.train()
    assert torch.equal(weight_of(layer), before)


for _kind in KINDS:
    for _dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for _cycles in (1, 10):
            check(name=f"{_kind} in {str(_dtype)[6:]} survives {_cycles} of eval and train")(
                partial(base_survives, kind=_kind, dtype=_dtype, cycles=_cycles)
            )


def moved_while_merged(library: Any, kind: str) -> None:
    layer = make(library, kind)
    before = weight_of(layer).detach().bfloat16()
    eval_(layer).bfloat16()
    layer.train()
    assert torch.equal(weight_of(layer), before)


for _kind in KINDS:
    check(name=f"{_kind} survives a change of dtype while merged")(partial(moved_while_merged, kind=_kind))


@check()
def merging_rounds_once(library: Any) -> None:
    layer = random_(library.Linear(64, 64, r=8, dtype=torch.bfloat16))
    want = (layer.weight.float() + layer.scaling * layer.lora_B.float() @ layer.lora_A.float()).bfloat16()
    assert torch.equal(eval_(layer).weight, want)


@check()
def merge_weights_off_while_merged_does_not_stick(library: Any) -> None:
    layer, x = random_(library.Linear(6, 5, r=2)), torch.randn(3, 6)
    eval_(layer).merge_weights = False
    layer.train()
    assert layer(x).grad_fn is not None
    assert not layer.merged


@check()
def scaling_set_while_merged_counts(library: Any) -> None:
    layer, x = make(library, "Linear"), torch.randn(3, 24)
    before = layer.weight.detach().clone()
    layer.scaling = 3.0
    want = layer(x)
    layer.scaling = 1.0
    eval_(layer).scaling = 3.0
    torch.testing.assert_close(layer(x), want)
    layer.train()
    torch.testing.assert_close(layer.weight, before)


@check()
def adapters_of_a_trained_base_get_gradients_in_eval(library: Any) -> None:
    layer = make(library, "Linear").requires_grad_()
    eval_(layer)(torch.randn(3, 24)).sum().backward()
    assert [name for name, each in layer.named_parameters() if each.grad is None] == []


@check()
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


@check(AttributeError, NO_PICKLE)
def a_layer_can_be_pickled(library: Any) -> None:
    layer, x = library.Linear(6, 5, r=2), torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@check(AttributeError, NO_PICKLE)
def a_model_can_be_saved_whole(library: Any) -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(library.Conv2d(4, 4, 3, r=2)), file)
    file.seek(0)
    torch.load(file, weights_only=False)


SPAWN = """
import importlib, sys, torch, torch.multiprocessing as mp

def use(rank, layer, x, want):
    assert torch.equal(layer(x), want)

if __name__ == "__main__":
    torch.manual_seed(0)
    library = importlib.import_module(sys.argv[1])
    layer, x = library.Linear(6, 5, r=2).requires_grad_(False), torch.randn(3, 6)
    mp.spawn(use, (layer, x, layer(x)), nprocs=1)
"""


@check(saying="Can't (get|pickle) local object")
def a_layer_goes_to_a_spawned_process(library: Any) -> None:
    """As every launcher does that starts its processes from a script; tests/unit trains with two."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "spawn.py"
        script.write_text(SPAWN, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script, library.__name__], capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr


@check()
def a_merged_linear_built_on_meta_has_its_update(library: Any) -> None:
    """loralib's index of the adapted rows stays on meta, and nothing is written where it points."""
    layer, x = library.MergedLinear(6, 9, r=2, enable_lora=[True, False, True], device="meta"), torch.randn(3, 6)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    random_(layer)
    assert not torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@check(ValueError, "non contiguous")
def transposed_weights_are_safetensors(library: Any) -> None:
    save(library.Linear(4, 6, r=2, fan_in_fan_out=True).state_dict())


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


@check()
def a_module_named_like_lora_stays_frozen(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model)
    assert not {name for name in model.trained() if name.startswith("lora_head")}
    assert not {name for name in library.lora_state_dict(model) if name.startswith("lora_head")}


@check()
def a_module_named_like_bias_is_none(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "all")
    assert "debias.bias" in model.trained()
    assert "debias.weight" not in model.trained()


@check()
def lora_parameters_train_again(library: Any) -> None:
    model = Named(library)
    model.requires_grad_(False)
    library.mark_only_lora_as_trainable(model)
    assert {"proj.lora_A", "proj.lora_B"} <= model.trained()


@check()
def biases_that_train_are_saved(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "lora_only")
    assert model.trained() == set(library.lora_state_dict(model, "lora_only"))


@check()
def bias_of_a_convolution_trains(library: Any) -> None:
    model = Named(library)
    library.mark_only_lora_as_trainable(model, "lora_only")
    assert "conv.conv.bias" in model.trained()


@check()
def a_wrong_choice_changes_nothing(library: Any) -> None:
    model = Named(library)
    before = model.trained()
    with pytest.raises((ValueError, NotImplementedError)):
        library.mark_only_lora_as_trainable(model, "alle")
    assert model.trained() == before


# MergedLinear


@check()
def grouped_query_slices(library: Any) -> None:
    """q 64, k 16 and v 16 rows; q and v adapted. Without a way to say so, q is adapted by half and k wholly."""
    extra = {"slices": [64, 16, 16]} if library is lora else {}
    layer = random_(library.MergedLinear(8, 96, r=2, enable_lora=[True, False, True], **extra))
    changed = layer.merge_AB().abs().sum(1) > 0
    assert changed.tolist() == [True] * 64 + [False] * 16 + [True] * 16


@check(AttributeError, "'MergedLinear' object has no attribute 'lora_A'")
def no_slice_adapted(library: Any) -> None:
    layer, x = library.MergedLinear(4, 6, r=2, enable_lora=[False, False]), torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@check()
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


@check(pytest.fail.Exception, "DID NOT RAISE")
def negative_rank_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="r=-1"):
        library.Linear(4, 4, r=-1)


def bf16_base_with_fp32_adapters(library: Any, kind: str) -> None:
    layer = make(library, kind)
    holder = layer.conv if hasattr(layer, "conv") else layer
    holder.weight.data, holder.bias.data = holder.weight.data.bfloat16(), holder.bias.data.bfloat16()
    layer(KINDS[kind][3]().bfloat16()).float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


for _kind in ("Linear", "MergedLinear", "Conv2d"):
    check(
        RuntimeError, "same (dtype|type)|should be the same|expected scalar type", f"bf16 {_kind} with fp32 adapters"
    )(partial(bf16_base_with_fp32_adapters, kind=_kind))


@check(pytest.fail.Exception, "DID NOT RAISE")
def negative_dropout_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match=r"lora_dropout=-0\.1"):
        library.Linear(4, 4, r=2, lora_dropout=-0.1)


@check()
def max_norm_leaves_a(library: Any) -> None:
    layer = random_(library.Embedding(6, 4, r=2, max_norm=0.1))
    before = layer.lora_A.detach().clone()
    layer(torch.arange(6))
    assert torch.equal(layer.lora_A, before)


@check()
def max_norm_merged_is_unmerged(library: Any) -> None:
    layer, x = random_(library.Embedding(6, 4, r=2, max_norm=0.5)), torch.arange(6)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(eval_(layer)(x), other(x))


@check()
def merging_leaves_a_tied_head(library: Any) -> None:
    table, head = random_(library.Embedding(6, 4, r=2)), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    before = head.weight.detach().clone()
    table.eval()
    assert torch.equal(head.weight, before)


@check()
def an_embedding_keeps_the_table_it_is_given(library: Any) -> None:
    table = torch.randn(6, 4)
    assert torch.equal(library.Embedding.from_pretrained(table.clone()).weight, table)


@check(RuntimeError, "sparse transpose")
def sparse_embeddings_train(library: Any) -> None:
    layer = random_(library.Embedding(6, 4, r=2, sparse=True))
    layer(torch.arange(3)).sum().backward()
    assert layer.lora_A.grad is not None


@check()
def transposed_weights_are_contiguous(library: Any) -> None:
    assert library.Linear(4, 6, r=2, fan_in_fan_out=True).weight.is_contiguous()


@check()
def transposed_weights_can_be_initialised_again(library: Any) -> None:
    """nn.Linear bounds its weight by 1/sqrt(in); read as (out, in), a transposed one would get 1/sqrt(out)."""
    layer = library.Linear(400, 4, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.abs().max() <= 1 / 20


@pytest.mark.parametrize("name", quick(CHECKS, CHECKS.keys() - {"a_layer_goes_to_a_spawned_process"}))
def test_settled(name: str) -> None:
    known = CHECKS[name]
    torch.manual_seed(0)
    with pytest.raises(known.raises, match=known.saying):
        known.check(loralib)
    torch.manual_seed(0)
    known.check(lora)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_how_much_merging_changes(dtype: torch.dtype) -> None:
    """The figures of docs/loralib.md: parts of the base that one cycle, and ten with training between them, change."""
    changed = {}
    for library in (loralib, lora):
        torch.manual_seed(0)
        layer = library.Linear(1024, 1024, r=8, lora_alpha=16, dtype=dtype)
        before = layer.weight.detach().clone()
        parts = []
        for _ in range(10):
            nn.init.normal_(layer.lora_B, std=0.05)
            layer.eval()
            layer.train()
            parts.append(float((layer.weight != before).double().mean()))
        changed[library] = parts[0], parts[-1]
    if torch.__version__.startswith("2.13"):
        assert changed[loralib] == pytest.approx((0.19, 0.59), abs=0.01)
    assert changed[loralib][1] > changed[loralib][0] > 0.05  # earlier releases of PyTorch round some sums otherwise
    assert changed[lora] == (0, 0)


@pytest.mark.skipif("MICROSOFT_LORA" not in os.environ, reason="MICROSOFT_LORA names no checkout of microsoft/LoRA")
def test_convolutions_of_loralibs_main_branch() -> None:
    """There each tensor of a convolution stands twice in the state: safetensors refuses it, and we read it."""
    path = Path(os.environ["MICROSOFT_LORA"]) / "loralib" / "__init__.py"
    spec = importlib.util.spec_from_file_location("loralib_main", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "loralib_main", main)
        spec.loader.exec_module(main)
        theirs, ours = (make(library, "Conv2d") for library in (main, lora))
    state = theirs.state_dict()
    assert sorted(state) == ["bias", "conv.bias", "conv.weight", "lora_A", "lora_B", "weight"]
    with pytest.raises(RuntimeError, match="share memory"):
        save(state)
    lora.load_lora(ours, state)
    x = KINDS["Conv2d"][3]()
    torch.testing.assert_close(ours(x), theirs(x))
    assert sorted(ours.state_dict()) == ["conv.bias", "conv.weight", "lora_A", "lora_B"]
    save(ours.state_dict())


def test_embedding_starts_like_loralibs() -> None:
    """A zero and B normal looks like a slip and is none: kept."""
    library: ModuleType
    for library in (loralib, lora):
        layer = library.Embedding(6, 4, r=2)
        assert torch.equal(layer.lora_A, torch.zeros(2, 6))
        assert layer.lora_B.abs().min() > 0
