"""Each Triton kernel of the decoder stack against plain PyTorch, through the interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from philora.decoder_stack import row_kernels as kernels
from philora.decoder_stack.host_inputs import HostInputs
from philora.decoder_stack.products import Buffer, DequantizedProduct, Fp8Product, PlainProduct, fp8_scaling, to_fp8
from philora.decoder_stack.rows import FP8, FP8_LARGEST, Dropout, Rows, kept_by_dropout
from philora.kernels.layout import PackedLayout
from philora.kernels.varlen import Attention, deterministic_kernels
from tests.references import rms_norm_reference, swiglu_reference
from tests.stacked import DEVICE

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # on a CPU through the interpreter

T, C = 3, 24
EXACT = {"rtol": 2e-6, "atol": 2e-6}  # fp32, the same sums in another order
DROPOUT = Dropout(torch.tensor([123456789], device=DEVICE), 0.3)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def masked(x, dropout=DROPOUT):
    return x * kept_by_dropout(*x.shape, dropout) / (1 - dropout.p)


def assert_fp8_twin(rows):
    """The bits of PyTorch's cast, but for powers of two, where Triton's interpreter loses the carry of the rounding."""
    wide = rows.values.float()
    largest = wide.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rows.scales, (largest.clamp(min=1e-12) / FP8_LARGEST))
    expected = (wide / rows.scales).to(FP8).float()
    found = rows.quantized.float()
    carried = expected.abs().log2().frac() == 0
    assert bool((found == expected)[~carried].all())
    assert float((~carried).float().mean()) > 0.7


def test_norm_with_sum_dropout_and_fp8():
    x, h, weight = random(T, C), random(T, C, seed=1), random(C, seed=2)
    total, y, inverse, dropped = kernels.add_norm(x, h, weight, 1e-5, DROPOUT, quantize=True)
    expected = rms_norm_reference(x + h, weight, 1e-5)
    torch.testing.assert_close(total, x + h, **EXACT)
    torch.testing.assert_close(y.values, expected, **EXACT)
    torch.testing.assert_close(dropped, masked(expected), **EXACT)
    torch.testing.assert_close(kernels.norm_again(total, weight, inverse), y.values, rtol=0, atol=0)
    assert_fp8_twin(y)
    alone, y_alone, _, none = kernels.add_norm(x, None, weight, 1e-5)
    assert alone is x
    assert none is None
    torch.testing.assert_close(y_alone.values, rms_norm_reference(x, weight, 1e-5), **EXACT)


@pytest.mark.parametrize("eps", [1e-5, 2e-2])
def test_gradient_of_the_norm(eps):
    x, weight = random(T, C).requires_grad_(), random(C, seed=2)
    dy, residual, of_adapter = random(T, C, seed=3), random(T, C, seed=4), random(T, C, seed=5)
    rms_norm_reference(x, weight, 1e-5).backward(dy + masked(of_adapter))
    _, _, inverse, _ = kernels.add_norm(x.detach(), None, weight, eps)
    rows = kernels.norm_backward(dy, x.detach(), inverse, weight, residual, of_adapter, DROPOUT, quantize=True)
    same = torch.allclose(rows.values, x.grad + residual, **EXACT)
    assert same == (eps == 1e-5)  # another eps is another norm, and is seen
    assert_fp8_twin(rows)


def rotated(heads, cos, sin):
    half = cos.shape[1]
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


@pytest.mark.parametrize("half", [2, 4], ids=["partial", "whole"])
def test_rotation_and_its_gradient(half):
    heads, key_heads, size = 3, 1, 8
    qkv = random(T, (heads + 2 * key_heads) * size).requires_grad_()
    angles = random(T, half, seed=1)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = qkv.view(T, -1, size).split((heads, key_heads, key_heads), 1)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    given = qkv.detach().clone()
    kernels.rotate_(given, cos, sin, heads + key_heads, size)
    expected = torch.cat([q, k, v], 1).view(T, -1)
    torch.testing.assert_close(given, expected, **EXACT)
    assert not torch.allclose(given, qkv.detach(), **EXACT)
    grads = [random(*each.shape, seed=seed) for seed, each in enumerate((q, k, v))]
    torch.autograd.backward([q, k, v], grads)
    rows = kernels.rotate_backward(*grads, cos, sin, quantize=True)
    torch.testing.assert_close(rows.values, qkv.grad, **EXACT)
    assert_fp8_twin(rows)
    turned_the_wrong_way = kernels.rotate_backward(*grads, cos, -sin)
    assert not torch.allclose(turned_the_wrong_way.values, qkv.grad, **EXACT)


def test_swiglu_and_its_gradient():
    gate_up = random(T, 2 * C).requires_grad_()
    rows, dropped = kernels.swiglu(gate_up.detach(), DROPOUT, quantize=True)
    expected = swiglu_reference(gate_up)
    torch.testing.assert_close(rows.values, expected.detach(), **EXACT)
    torch.testing.assert_close(dropped, masked(expected.detach()), **EXACT)
    assert_fp8_twin(rows)
    dy, of_adapter = random(T, C, seed=3), random(T, C, seed=4)
    expected.backward(dy + masked(of_adapter))
    found = kernels.swiglu_backward(dy, gate_up.detach(), of_adapter, DROPOUT, quantize=True)
    torch.testing.assert_close(found.values, gate_up.grad, **EXACT)
    assert_fp8_twin(found)
    swapped = gate_up.detach().roll(C, 1)
    assert not torch.allclose(kernels.swiglu(swapped)[0].values, expected.detach(), **EXACT)


def test_dropout_has_the_masks_of_its_hash():
    x, addend = random(T, C), random(T, C, seed=1)
    torch.testing.assert_close(kernels.drop(x, DROPOUT), masked(x), rtol=0, atol=1e-6)
    assert kernels.drop(x, None) is x
    torch.testing.assert_close(kernels.add_dropped_(x.clone(), addend, DROPOUT), x + masked(addend), **EXACT)
    other = DROPOUT._replace(seed=DROPOUT.seed + 1)
    assert not torch.equal(kernels.drop(x, other) == 0, kernels.drop(x, DROPOUT) == 0)


def test_masks_are_as_dense_as_asked_for_and_independent():
    """Of 2^18 elements the share is within five standard deviations, and so is the overlap of two masks."""
    rows, columns = 256, 1024
    for p in (0.05, 0.5):
        one, same_layer, other_layer = (
            kept_by_dropout(rows, columns, Dropout(torch.tensor([seed], device=DEVICE), p))
            for seed in (42, 42 + 1000003, 42 + 2654435761)
        )
        five = 5 * (p * (1 - p) / one.numel()) ** 0.5
        for mask in (one, same_layer, other_layer):
            assert abs(float(mask.float().mean()) - (1 - p)) < five
        # of rows, of columns, and of masks beside each other
        for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, same_layer), (one, other_layer)):
            both = float((~a & ~b).float().mean())
            assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / a.numel()) ** 0.5 + 2 * p * five


def test_rows_in_fp8():
    rows = kernels.quantize(random(T, C))
    assert_fp8_twin(rows)
    zeros = kernels.quantize(torch.zeros(T, C, device=DEVICE))
    assert float((zeros.quantized.float() * zeros.scales).abs().max()) == 0


# ------------------------------------------------------------------------------------------------ planted faults

FAULTS = [
    (test_norm_with_sum_dropout_and_fp8, "a.to(tl.float32) + tl.load(h", "a.to(tl.float32) - tl.load(h"),
    (test_norm_with_sum_dropout_and_fp8, "tl.sum(wide * wide, 0) / width", "tl.sum(wide * wide, 0) / (width + 1)"),
    (test_norm_with_sum_dropout_and_fp8, "result = (normal * tl.load(weight", "result = (normal + tl.load(weight"),
    (test_norm_with_sum_dropout_and_fp8, "result.to(tl.float32) * factor", "result.to(tl.float32)"),
    (test_norm_with_sum_dropout_and_fp8, "tl.store(y + at, (normal * ", "tl.store(y + at, (1.01 * normal * "),
    (test_norm_with_sum_dropout_and_fp8, "(values / scale).to(", "(1.1 * values / scale).to("),
    (lambda: test_gradient_of_the_norm(1e-5), "grad - normal * (tl.sum(grad * normal, 0) / width)", "grad"),
    (lambda: test_gradient_of_the_norm(1e-5), "grad += tl.load(dresidual", "grad -= tl.load(dresidual"),
    (lambda: test_gradient_of_the_norm(1e-5), "tl.load(dadapter + at, inside, 0.0).to(tl.float32) * factor", "grad"),
    (lambda: test_gradient_of_the_norm(1e-5), "_store_fp8(grad, tl.max(", "_store_fp8(-grad, tl.max("),
    (lambda: test_rotation_and_its_gradient(2), "wide_a * c - wide_b * s", "wide_a * c + wide_b * s"),
    (lambda: test_rotation_and_its_gradient(2), "wide_b * c + wide_a * s", "wide_b * c"),
    (lambda: test_rotation_and_its_gradient(4), "tl.where(low, b, -b) * s", "b * s"),
    (lambda: test_rotation_and_its_gradient(2), "angle, rotated, 1.0)", "angle, rotated, 0.0)"),
    (
        lambda: test_rotation_and_its_gradient(2),
        "_store_fp8(value, largest, at_value",
        "_store_fp8(key, largest, at_value",
    ),
    (test_swiglu_and_its_gradient, "gate / (1.0 + tl.exp(-gate)) * up", "gate / (1.0 + tl.exp(gate)) * up"),
    (test_swiglu_and_its_gradient, "rounded.to(tl.float32) * factor", "rounded.to(tl.float32)"),
    (test_swiglu_and_its_gradient, "(1.0 + gate * (1.0 - sigmoid))", "(1.0 + gate * sigmoid)"),
    (test_swiglu_and_its_gradient, "of_up = grad * gate * sigmoid", "of_up = grad * gate"),
    (test_swiglu_and_its_gradient, "_store_fp8(of_up, largest", "_store_fp8(of_gate, largest"),
    (test_dropout_has_the_masks_of_its_hash, "0x85EBCA6B", "0x85EBCA6D"),
    (test_dropout_has_the_masks_of_its_hash, "value * factor, 0.0)", "value, 0.0)"),
    (
        test_dropout_has_the_masks_of_its_hash,
        "value += tl.where(kept, tl.load(addend",
        "value -= tl.where(kept, tl.load(addend",
    ),
    (test_rows_in_fp8, "1e-12) / 448.0", "1e-12) / 400.0"),
    (test_rows_in_fp8, "tl.store(scales + row, scale)", "tl.store(scales + row, 2 * scale)"),
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="each fault would be compiled, and on a CPU it shows as much")
@pytest.mark.parametrize(("comparison", "formula", "wrong"), FAULTS, ids=[each[1][:40] for each in FAULTS])
def test_a_planted_fault_in_a_kernel_is_found(comparison, formula, wrong, tmp_path, monkeypatch):
    """The comparison that has to see it is run over the kernels with one formula changed."""
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    assert formula in source
    changed = tmp_path / "changed_kernels.py"
    changed.write_text(source.replace(formula, wrong), encoding="utf-8")
    specification = importlib.util.spec_from_file_location("changed_kernels", changed)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setitem(globals(), "kernels", module)
    with pytest.raises(AssertionError):
        comparison()


TRUE_MASK = kept_by_dropout


def _the_same_in_every_row(rows, columns, dropout):
    return TRUE_MASK(1, columns, dropout).expand(rows, columns)


def _too_few(rows, columns, dropout):
    return TRUE_MASK(rows, columns, dropout._replace(p=dropout.p + 0.01))


def _of_no_seed(rows, columns, dropout):
    return TRUE_MASK(rows, columns, dropout._replace(seed=torch.zeros_like(dropout.seed)))


@pytest.mark.parametrize("fault", [_the_same_in_every_row, _too_few, _of_no_seed], ids=lambda each: each.__name__)
def test_masks_that_are_not_random_are_found(monkeypatch, fault):
    monkeypatch.setitem(globals(), "kept_by_dropout", fault)
    with pytest.raises(AssertionError):
        test_masks_are_as_dense_as_asked_for_and_independent()


# ---------------------------------------------------------------------------------------------------- attention


def test_attention_of_documents_and_its_gradients_beside_pytorch():
    lengths, heads, size, window = (1, 5, 3), 4, 8, 3
    q, k, v = (random(9, count, size, seed=seed).requires_grad_() for seed, count in enumerate((heads, 2, 2)))
    at = Attention(PackedLayout.of_lengths(lengths).to(DEVICE), size**-0.5, window)
    parts = [torch.split(each.repeat_interleave(heads // each.shape[1], 1), lengths) for each in (q, k, v)]
    outputs = []
    for a, b, c in zip(*parts, strict=True):
        places = torch.arange(len(a), device=a.device)
        seen = (places[:, None] >= places) & (places[:, None] - places < window)
        rows = (each.transpose(0, 1)[None] for each in (a, b, c))
        outputs.append(F.scaled_dot_product_attention(*rows, attn_mask=seen)[0].transpose(0, 1))
    expected, grad = torch.cat(outputs), random(9, heads, size, seed=7)
    expected.backward(grad)
    plain = [each.detach() for each in (q, k, v)]
    output, kept = at.attend(*plain)
    torch.testing.assert_close(output, expected.detach(), **EXACT)
    for mine, each in zip(at.gradients(grad, *plain, output, kept), (q, k, v), strict=True):
        torch.testing.assert_close(mine, each.grad, **EXACT)
    wider = Attention(at.layout, at.scaling, window + 1)
    wide_output, wide_kept = wider.attend(*plain)
    assert not torch.allclose(wide_output, expected.detach(), **EXACT)
    for mine, each in zip(wider.gradients(grad, *plain, wide_output, wide_kept), (q, k, v), strict=True):
        assert not torch.allclose(mine, each.grad, **EXACT)


def test_the_window_of_flash_attention_counts_the_tokens_before():
    layout = PackedLayout.of_lengths((5,))
    assert Attention(layout, 1.0, 3)._settings()["window_size_left"] == 2
    assert Attention(layout, 1.0, 5)._settings()["window_size_left"] is None
    assert Attention(layout, 1.0)._settings()["window_size_right"] is None


def test_deterministic_kernels_hold_for_their_block_alone():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError, match="stop"), deterministic_kernels():
        raise ValueError("stop")
    assert not torch.are_deterministic_algorithms_enabled()


# ----------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("scaling", ["rows", "tensor"])
def test_products_in_fp8_are_near_and_are_not_the_same(scaling):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # a card's products by rows are bf16 alone
    x, weight, dy = (random(*shape, seed=at, dtype=dtype) for at, shape in enumerate([(16, 64), (32, 64), (16, 32)]))
    product, plain = Fp8Product(weight, scaling), PlainProduct(weight)
    given, gradient = kernels.quantize(x), kernels.quantize(dy)
    for mine, exact in (
        (product.forward(Rows(x)), plain.forward(Rows(x))),
        (product.backward(Rows(dy)), plain.backward(Rows(dy))),
        (product.forward(given), plain.forward(Rows(x))),
        (product.backward(gradient), plain.backward(Rows(dy))),
    ):
        # A rounding of 2^-4 at most, 2^-5 in the middle, of each of two factors; sums of many average it out. bf16
        # rounds the result by 2^-9, a twentieth of that.
        assert 1e-3 < float((mine - exact).float().norm() / exact.float().norm()) < 0.06
    louder = Fp8Product(weight * 1.1, scaling).forward(Rows(x))
    exact = plain.forward(Rows(x))
    assert float((louder - exact).float().norm() / exact.float().norm()) > 0.06, "negative control: 10% more"
    exact_backward = Fp8Product(weight, scaling, backward="weight")
    assert torch.equal(exact_backward.backward(Rows(dy)), plain.backward(Rows(dy)))


def test_a_device_without_fp8_by_row_takes_scales_by_tensor_and_one_without_any_says_so(monkeypatch, caplog):
    from philora.decoder_stack import products

    def refuses(scalings):
        def product(a, of_a, b, of_b, dtype):
            if ("rows" if of_a.ndim else "tensor") in scalings:
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
            return scaled(a, of_a, b, of_b, dtype)

        return product

    scaled = products.scaled_product
    for scalings, found, said in (
        ((), "rows", ""),
        (("rows",), "tensor", "by tensor"),
        (("rows", "tensor"), None, "not available"),
    ):
        caplog.clear()
        fp8_scaling.cache_clear()
        monkeypatch.setattr(products, "scaled_product", refuses(scalings))
        assert fp8_scaling(torch.device("cpu")) == found
        assert said in caplog.text
        assert bool(caplog.text) == bool(said)
    monkeypatch.setattr(products, "scaled_product", lambda a, of_a, b, of_b, dtype: scaled(a, of_a, b, of_b, dtype) * 2)
    fp8_scaling.cache_clear()
    assert fp8_scaling(torch.device("cpu")) is None
    fp8_scaling.cache_clear()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_weight_is_dequantised_into_one_buffer(scheme):
    pytest.importorskip("bitsandbytes")
    from philora.kernels.quantization import dequantized, empty_layer

    layers = []
    for seed in range(2):
        layer = empty_layer(scheme, 64, 128, torch.bfloat16)
        layer.weight.data = random(128, 64, seed=seed, dtype=torch.bfloat16)
        layers.append(layer.to("cpu"))
    buffer = Buffer()
    x, dy = (Rows(random(4, n, seed=5, dtype=torch.bfloat16)) for n in (64, 128))
    for layer in layers:
        product, matrix = DequantizedProduct(layer, buffer), dequantized(layer, torch.bfloat16)
        assert torch.equal(product.forward(x), x.values @ matrix.t())
        assert torch.equal(product.backward(dy), dy.values @ matrix)
        layer.weight.data[0] = layer.weight.data[0] ^ 0x11  # a planted fault: other numbers in the first row
        assert not torch.equal(product.forward(x), x.values @ matrix.t())
        assert not torch.equal(product.backward(dy), dy.values @ matrix)
    first = buffer.matrix(torch.Size((128, 64)), torch.bfloat16, torch.device("cpu")).data_ptr()
    assert buffer.matrix(torch.Size((64, 64)), torch.bfloat16, torch.device("cpu")).data_ptr() == first


def test_inputs_on_the_host_come_back_in_the_order_of_backward():
    host = HostInputs(torch.device("cpu"))
    given = [random(T, C, seed=each) for each in range(5)]
    for index, each in enumerate(given):
        host.store(index, each)
    places = set()
    for index in reversed(range(5)):
        found = host.fetch(index)
        places.add(found.data_ptr())
        assert torch.equal(found, given[index])
    assert len(places) == 2
    host.store(0, given[1])  # a planted fault: another input in its place
    assert not torch.equal(host.fetch(0), given[0])


def test_fp8_of_a_matrix():
    values, scales = to_fp8(torch.tensor([[448.0, 1.0], [0.0, 0.0]]), "rows")
    assert values.float().tolist() == [[448.0, 1.0], [0.0, 0.0]]
    assert scales[0].item() == 1.0


# ------------------------------------------------------------------------------------------ compiled for a GPU

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from philora.decoder_stack import row_kernels as kernels

WHOLE = ("width", "heads", "key_heads", "size", "half", "stride")
WIDE = ("inverse", "cos", "sin", "scales")
KINDS = {"seed": "*i64", **dict.fromkeys(WIDE, "*fp32"), **dict.fromkeys(("p", "factor", "eps"), "fp32")}
KINDS |= dict.fromkeys(WHOLE, "i32")
SIZES = {"BLOCK": 4096, "HEADS": 32, "KEY_HEADS": 8, "SIZE": 128, "HALF": 64, "ADD": True, "DROP": True}
for capability, fp8 in ((80, False), (90, True)):
    for name in sorted(vars(kernels)):
        kernel = getattr(kernels, name)
        if not isinstance(kernel, triton.JITFunction) or name in ("_keeps", "_store_fp8", "_turned_back"):
            continue
        if name == "_quantize" and not fp8:
            continue
        sizes = SIZES | {"QUANTIZE": fp8}
        fixed = {each: sizes[each] for each in kernel.arg_names if each in sizes}
        kinds = KINDS | {"quantized": "*fp8e4nv" if fp8 else "*bf16"}
        signature = {each: "constexpr" if each in fixed else kinds.get(each, "*bf16") for each in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        print(capability, name, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler on Linux")
def test_every_kernel_compiles_for_gpus_with_and_without_fp8(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("True") == 9 + 10
