"""Norms and SwiGLU by the kernels of liger-kernel: when they are taken, and that they compute the same.

The kernels themselves need the package; on a CPU they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import philora
from philora.kernels import liger
from philora.kernels.elementwise import gated, rms_norm, swiglu
from philora.kernels.elementwise_choice import ElementwiseFacts, elementwise_for
from philora.lora.functional import fused
from tests import on_device
from tests.conftest import make_phi3
from tests.on_device import chosen

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no liger-kernel")
ALL = ElementwiseFacts(switch="all")


def test_liger_is_taken_where_it_is_asked_for():
    assert elementwise_for(ALL) == ("liger", "liger-kernel 0.8.5 is installed")
    assert elementwise_for(replace(ALL, liger="0.9.0.dev1"))[0] == "liger"


@pytest.mark.parametrize(
    ("change", "way", "reason"),
    [
        ({"kind": "cpu"}, "native", "the device is a CPU"),
        ({"kind": "mps"}, "torch", "the device is mps"),
        ({"switch": ""}, "torch", "PHILORA_STACK=all takes liger-kernel"),
        ({"switch": "0"}, "torch", "PHILORA_STACK=0"),
        ({"liger": None, "switch": ""}, "torch", "liger-kernel is not installed"),
        ({"liger": "0.8.4"}, "torch", "liger-kernel is 0.8.4, its functions are those of 0.8.5 and later"),
        ({"liger": "0"}, "torch", "liger-kernel is 0,"),
        ({"liger": "0.10.0"}, "liger", "liger-kernel 0.10.0 is installed"),
        ({"triton": None}, "torch", "Triton is not installed"),
        ({"dtype": "float64"}, "torch", "activations are float64"),
        ({"capability": (7, 5)}, "torch", "compute capability 7.5 has no bf16"),
        ({"capability": (7, 5), "dtype": "float16"}, "liger", "is installed"),
        ({"columns": 65537}, "torch", "rows have 65537 columns"),
        ({"disagreement": "liger-kernel differs"}, "torch", "liger-kernel differs"),
    ],
)
def test_the_way_of_norms_and_swiglu(change, way, reason):
    found, why = elementwise_for(ElementwiseFacts(**{"switch": "all"} | change))
    assert found == way
    assert reason in why


def test_a_cpu_is_never_asked_about_liger():
    assert not liger.usable(torch.ones(2, 4))


def test_what_is_installed_is_read_from_the_packages():
    facts = liger.facts_of_elementwise(torch.device("cpu"), torch.bfloat16, 64, "all")
    assert (facts.kind, facts.dtype, facts.columns, facts.switch) == ("cpu", "bfloat16", 64, "all")
    assert (facts.liger is None) == (importlib.util.find_spec("liger_kernel") is None)


def test_a_package_whose_functions_fail_is_left_with_its_reason(monkeypatch):
    def missing(*_: Any) -> Any:
        raise ImportError("cannot import name 'rms_norm_forward'")

    monkeypatch.setattr(liger, "rms_norm", missing)
    found = liger.disagreement.__wrapped__(torch.device("cpu"), torch.float32)
    assert found == "liger-kernel does not run here (ImportError: cannot import name 'rms_norm_forward')"


# ------------------------------------------------------------------------------------------------- the kernels


@pytest.fixture
def kernels(device, monkeypatch):
    """Liger's kernels in place of philora's own, on a card or in Triton's interpreter."""
    monkeypatch.setattr(liger, "usable", lambda *_: True)
    monkeypatch.setattr("philora.native.library.usable", lambda *_: False)
    if chosen().type == "cpu":
        _take_numbers(monkeypatch)


def _take_numbers(monkeypatch: Any) -> None:
    """Let the interpreter hand numbers to kernels as the compiler does: with a dtype, which Liger's ask for."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def as_tensor(given: Any) -> Any:
        if isinstance(given, float):
            return tl.tensor(interpreter.TensorHandle(np.array([given], dtype=np.float32), tl.float32), tl.float32)
        return convert(given)

    monkeypatch.setattr(interpreter, "_implicit_cvt", as_tensor)
    # CUDA's own function, of which the interpreter knows nothing.
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: 1.0 / tl.sqrt(x))


def gap(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@needs_liger
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("trains", [True, False])
def test_functions_equal_plain_ones(trains):
    generator = torch.Generator().manual_seed(1)
    x, gate_up, grad = (torch.randn(2, 3, n, generator=generator).to(chosen()) for n in (24, 48, 24))
    weight = torch.randn(24, generator=generator).to(chosen()).requires_grad_(trains)
    leaves = [each.clone().requires_grad_() for each in (x, gate_up)]
    gate, up = leaves[1].chunk(2, -1)
    plain = weight * leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-5)
    product = torch.nn.functional.silu(gate) * up
    inputs = [*leaves, *([weight] if trains else [])]
    want = torch.autograd.grad([plain, product, product], inputs, [grad] * 3)
    norm, fused_product, apart = rms_norm(leaves[0], weight, 1e-5), swiglu(leaves[1]), gated(gate, up)
    for mine, theirs in ((norm, plain), (fused_product, product), (apart, product)):
        assert gap(mine, theirs) < 1e-5
    outputs = [norm, fused_product, apart]
    for _ in range(2):  # nothing that backward reads is written over
        found = torch.autograd.grad(outputs, inputs, [grad] * 3, retain_graph=True)
        assert max(map(gap, found, want)) < 1e-5
    with pytest.raises(RuntimeError, match=r"second derivative|create_graph"):
        torch.autograd.grad(outputs, inputs, [grad] * 3, create_graph=True)


@needs_liger
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("model", ["phi3", "llama"])
def test_models_equal_plain_ones_and_a_planted_fault_is_found(model, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    base = make_phi3(num_hidden_layers=1) if model == "phi3" else LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    base = philora.optimize(base.to(chosen())).train()
    batch = on_device.moved({"input_ids": torch.tensor([[3, 5, 7, 11]])})

    def gradients() -> torch.Tensor:
        base.zero_grad()
        base(**batch, use_cache=False).logits.square().mean().backward()
        return torch.cat([each.grad.flatten() for each in base.parameters() if each.grad is not None])

    with fused(False):
        plain = gradients()
    assert gap(gradients(), plain) < 1e-4
    kernel = "swiglu_backward" if model == "phi3" else "gated_backward"
    right = getattr(liger, kernel)
    if model == "phi3":
        monkeypatch.setattr(liger, kernel, lambda *given: right(*given) * 1.1)
    else:
        monkeypatch.setattr(liger, kernel, lambda *given: right(*given)[::-1])
    assert gap(gradients(), plain) > 1e-2, "negative control"


@needs_liger
@pytest.mark.usefixtures("kernels")
def test_the_comparison_before_the_first_use_finds_a_fault(monkeypatch):
    look = liger.disagreement.__wrapped__
    assert look(chosen(), torch.float32) is None
    right = liger.gated
    monkeypatch.setattr(liger, "gated", lambda gate, up: right(up, gate))
    assert "differs from PyTorch here by" in look(chosen(), torch.float32)
