"""Merge then unmerge, save then load: identities over shapes, ranks, dtypes and slice patterns."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from philora import lora
from philora.lora.functional import fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Largest difference over largest value, between the merged and the unmerged product.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two layers of one shape with different values, and an input for them."""
    size = st.integers(1, 9)
    kind = draw(st.sampled_from(["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d"]))
    dtype = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.sampled_from([1, 3, 8])),
        "dtype": dtype,
    }
    options["use_rslora"] = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1000)))
    if kind.startswith("Conv"):
        dimensions, groups = int(kind[4]), draw(st.integers(1, 2))
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
        args: tuple[Any, ...] = (2 * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)), kernel)
        options |= {"groups": groups, "stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1))}
        x = torch.randn(2, args[0], *[4] * dimensions).to(dtype)
    elif kind == "Embedding":
        args = (draw(size), draw(size))
        options["padding_idx"] = draw(st.sampled_from([None, 0]))
        # Bounding a row a second time changes it again where 1e-7, which PyTorch leaves as a margin, is below rounding.
        options["max_norm"] = draw(st.sampled_from([None, 1.0])) if dtype is torch.float64 else None
        x = torch.randint(0, args[0], (3, 4))
    else:
        args = (draw(size), draw(size))
        options |= {"fan_in_fan_out": draw(st.booleans()), "bias": draw(st.booleans())}
        if kind == "MergedLinear":
            slices = draw(st.lists(size, min_size=1, max_size=4))
            enabled = draw(st.lists(st.booleans(), min_size=len(slices), max_size=len(slices)).filter(any))
            args = (args[0], sum(slices))
            options |= {"slices": slices, "enable_lora": enabled}
        x = torch.randn(*draw(st.lists(st.integers(1, 3), max_size=2)), args[0]).to(dtype)
    both = []
    for _ in range(2):
        layer = getattr(lora, kind)(*args, **options)
        for matrix in (layer.lora_A, layer.lora_B):
            nn.init.normal_(matrix, std=0.3)
        both.append(layer)
    return both[0], both[1], x


@settings(max_examples=120, deadline=None)
@given(layers(), st.integers(1, 4))
def test_merge_then_unmerge(drawn: tuple[nn.Module, nn.Module, Tensor], cycles: int) -> None:
    layer, _, x = drawn
    unmerged = layer(x)
    # After the forward: max_norm, as in nn.Embedding, bounds the rows of the table that it looks up.
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(cycles):
        merged = layer.eval()(x)
        largest = max(float(unmerged.detach().abs().max()), float(layer.weight.detach().abs().max()))
        assert (
            float((merged - unmerged).detach().abs().max())
            <= TOLERANCE[x.dtype if x.is_floating_point() else layer.weight.dtype] * largest
        )
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert torch.equal(layer.train()(x), unmerged)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@settings(max_examples=100, deadline=None)
@given(layers(), st.booleans(), st.booleans())
def test_save_then_load(drawn: tuple[nn.Module, nn.Module, Tensor], saved_in: bool, loaded_in: bool) -> None:
    source, target, x = drawn
    file = io.BytesIO()
    torch.save(source.train(saved_in).state_dict(), file)
    file.seek(0)
    target.train(loaded_in)
    lora.load_lora(target, torch.load(file, weights_only=True))
    for mode in (True, False):
        assert torch.equal(target.train(mode)(x), source.train(mode)(x))
    state = source.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


@settings(max_examples=100, deadline=None)
@given(layers())
def test_fused_and_plain_agree(drawn: tuple[nn.Module, nn.Module, Tensor]) -> None:
    layer, _, x = drawn
    results = []
    for enabled in (True, False):
        with fused(enabled):
            layer.zero_grad()
            y = layer(x)
            y.float().square().sum().backward()
            results.append([y.detach(), layer.lora_A.grad, layer.lora_B.grad])
    for got, want in zip(*results, strict=True):
        largest = max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= TOLERANCE[layer.weight.dtype] * largest


@settings(max_examples=60, deadline=None)
@given(layers())
def test_switch_off_then_on(drawn: tuple[nn.Module, nn.Module, Tensor]) -> None:
    layer, _, x = drawn
    for mode in (True, False):
        want = layer.train(mode)(x)
        with lora.disable_adapter(layer):
            layer(x)
        assert torch.equal(layer(x), want)
