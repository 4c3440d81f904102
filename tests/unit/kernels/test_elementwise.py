"""RMSNorm and SwiGLU: values and gradients of plain PyTorch, in float64, in blocks of every size."""

from __future__ import annotations

import pytest
import torch

from philora.kernels import elementwise
from philora.kernels.elementwise import rms_norm, swiglu
from tests import on_device
from tests.references import rms_norm_reference, swiglu_reference

# One rounding of the result (2^-8 for bf16, of values up to about 8), and of each factor on the way.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2}}


# Every test with the compiled functions, and without them.
pytestmark = pytest.mark.usefixtures("compiled_or_not")


@pytest.fixture(params=[1 << 20, 300], ids=["one block", "many blocks"], autouse=True)
def _blocks(request, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK_BYTES", request.param)


def compare(fast, plain, inputs, tolerance):
    """Values and gradients of `fast` against `plain` in float64."""
    inputs = [each.to(on_device.chosen()) for each in inputs]
    mine = [each.detach().clone().requires_grad_() for each in inputs]
    theirs = [each.detach().double().requires_grad_() for each in inputs]
    before = [each.detach().clone() for each in mine]
    got, want = fast(*mine), plain(*theirs)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(9)).to(got)
    kept = grad.clone()
    got.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(got.double(), want, **tolerance)
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad.dtype == a.dtype
        # a gradient that sums over rows is as large as their number's root
        scale = max(1.0, float(b.grad.abs().max()) / 8)
        torch.testing.assert_close(a.grad.double() / scale, b.grad / scale, **tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, mine, strict=True)), "inputs are not written to"
    assert torch.equal(grad, kept), "nor is the gradient"


def norm64(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 7), (40, 33), (2, 19, 64)])
def test_rms_norm(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-5), norm64, (x, weight), TOLERANCE[dtype])
    with pytest.raises(AssertionError):  # negative control
        compare(lambda x, w: rms_norm(x, w * 1.1, 1e-5), norm64, (x, weight), TOLERANCE[dtype])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 6), (40, 34)])
def test_swiglu(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(shape, generator=generator).to(dtype)
    compare(swiglu, swiglu_reference, (gate_up,), TOLERANCE[dtype])
    with pytest.raises(AssertionError):  # negative control: the halves swapped
        compare(lambda x: swiglu(torch.cat(x.chunk(2, -1)[::-1], -1)), swiglu_reference, (gate_up,), TOLERANCE[dtype])


def test_as_transformers_to_the_bit():
    """The reference is what transformers computes, and in bf16 the fast norm rounds where it does."""
    generator = torch.Generator().manual_seed(0)
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

    module = Phi3RMSNorm(64).bfloat16()
    x = torch.randn(50, 64, generator=generator).bfloat16()
    want = module(x)
    assert torch.equal(rms_norm_reference(x, module.weight, module.variance_epsilon), want)
    different = (rms_norm(x, module.weight, module.variance_epsilon) != want).float().mean()
    assert different < 0.01  # where the sum of squares falls on the other side of a rounding


def test_only_what_is_asked_for():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    weight.requires_grad_()
    rms_norm(x.detach(), weight, 1e-5).sum().backward()
    assert weight.grad is not None
