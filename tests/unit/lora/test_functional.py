"""The fused function against plain PyTorch: values, gradients, dtypes, dropout, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from philora.errors import ConfigError
from philora.lora import functional
from philora.native import build
from tests import on_device

# Largest difference over largest value. bf16 and fp16 round the base product and the update apart, as the
# reference does, but in another order; fp32 and fp64 differ by the order of summation only.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

ROWS = [4, 2, 3]
BLOCKS = [(0, 4, 0, 2), (6, 9, 2, 4)]


@dataclass
class Case:
    """One entry point with its reference, and the shapes of A and B that it takes."""

    fast: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shape_a: tuple[int, int]
    shape_b: tuple[int, int]


def call(function: Callable[..., Tensor], **extra: object) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, **kwargs: object) -> Tensor:
        return function(x, weight, bias, a, b, scaling=1.7, **extra, **kwargs)

    return run


def unfused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functional.fused(False)(function)


def sliced_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    blocks: list[tuple[int, ...]],
    **kwargs: object,
) -> Tensor:
    """Multiply B by the mask of its blocks."""
    inside = torch.zeros_like(b)
    for row_start, row_stop, rank_start, rank_stop in blocks:
        inside[row_start:row_stop, rank_start:rank_stop] = 1
    return functional.lora_linear_reference(x, weight, bias, a, b * inside, **kwargs)


MERGED = {"slices": ROWS, "enable_lora": [True, False, True]}
CASES = {
    "linear": Case(call(functional.lora_linear), call(functional.lora_linear_reference), (3, 5), (9, 3)),
    "merged": Case(
        call(functional.lora_merged_linear, **MERGED),
        unfused(call(functional.lora_merged_linear, **MERGED)),
        (4, 5),
        (7, 2),
    ),
    "sliced": Case(
        call(functional.lora_sliced_linear, blocks=BLOCKS),
        call(sliced_reference, blocks=BLOCKS),
        (4, 5),
        (9, 4),
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    torch.manual_seed(0)
    with functional.fused(True):
        yield CASES[request.param]


def inputs(
    case: Case, dtype: torch.dtype, adapter: torch.dtype | None = None, lead: tuple[int, ...] = (7,), bias: bool = True
) -> list[Tensor | None]:
    shapes = [(*lead, 5), (9, 5), (9,), case.shape_a, case.shape_b]
    dtypes = [dtype] * 3 + [adapter or dtype] * 2
    made: list[Tensor | None] = [
        torch.randn(s, dtype=torch.float64).to(on_device.chosen(), d).requires_grad_()
        for s, d in zip(shapes, dtypes, strict=True)
    ]
    if not bias:
        made[2] = None
    return made


def gap(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def compare(case: Case, tensors: list[Tensor | None], tolerance: float, **kwargs: object) -> None:
    results = []
    for function in (case.fast, case.plain):
        torch.manual_seed(3)
        y = function(*tensors, **kwargs)
        torch.manual_seed(4)
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        grads = torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y))
        results.append([y, *grads])
        assert [g.dtype for g in grads] == [t.dtype for t in wanted]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert gap(got, want) <= tolerance


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead", [(7,), (), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    compare(case, inputs(case, dtype, lead=lead), TOLERANCE[dtype])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_dropout_draws_the_mask_of_the_reference(case: Case, dropout_p: float, bias: bool) -> None:
    compare(case, inputs(case, torch.float32, bias=bias), 1e-5, dropout_p=dropout_p, training=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dropout_in_pieces(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU treats rows of x piece by piece; 11 rows are three pieces of at most four."""
    tensors = inputs(case, dtype, lead=(11,))
    torch.manual_seed(3)
    whole = case.fast(*tensors, dropout_p=0.4, training=True)
    monkeypatch.setattr(functional, "_PIECE_ELEMENTS", 1)
    torch.manual_seed(3)
    assert gap(case.fast(*tensors, dropout_p=0.4, training=True), whole) <= TOLERANCE[dtype]
    compare(case, tensors, TOLERANCE[dtype], dropout_p=0.4, training=True)


def dropped(p: float, rows: int, columns: int) -> Tensor:
    """Dropout of ones, seen through an update that is the identity."""
    one, zero = torch.eye(columns), torch.zeros(columns, columns)
    return functional.lora_linear(torch.ones(rows, columns), zero, None, one, one, 1.0, p, training=True)


@pytest.mark.parametrize("p", [0.05, 0.5, 1 / 3, 0.999])
def test_dropout_drops_as_often_as_it_says(p: float) -> None:
    torch.manual_seed(0)
    rows, columns = 4096, 61
    got = dropped(p, rows, columns)
    kept = got != 0
    # A wrong p, a lane of the drawn words that differs, or a dependence on the neighbour, by five standard deviations.
    bound = 5 * (p * (1 - p) / got.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < bound
    for lane in range(4):
        assert abs(float(kept.flatten()[lane::4].double().mean()) - (1 - p)) < 2 * bound
    for distance in (1, 2, 3, 4, columns):
        both = (kept.flatten()[distance:] & kept.flatten()[:-distance]).double().mean()
        assert abs(float(both) - (1 - p) ** 2) < 3 * bound
    values = got[kept]
    assert (values == values[0]).all()
    assert abs(float(values[0]) * (1 - p) - 1) < 2**-16 / (1 - p)
    assert not torch.equal(dropped(p, rows, columns), got)
    torch.manual_seed(0)
    assert torch.equal(dropped(p, rows, columns), got)


@pytest.mark.parametrize(("p", "kept"), [(1.0, 0.0), (1 - 1e-9, 0.0), (1e-9, 1.0)])
def test_dropout_at_its_ends(p: float, kept: float) -> None:
    assert torch.equal(dropped(p, 64, 5), torch.full((64, 5), kept))


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_keeps_no_tensor_of_the_size_of_x_but_the_mask(
    case: Case, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setenv("PHILORA_NATIVE", "0")
    elif not build.available():
        pytest.skip("no compiler")
    tensors = inputs(case, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.fast(*tensors, dropout_p=0.5, training=True)
    kept = [(t.dtype, t.shape) for t in saved if t.shape in ((7, 5), (7, 1))]  # 16 bits of a mask in one int16
    assert kept == [(torch.float32, (7, 5)), (torch.int16, (7, 1)) if compiled else (torch.uint8, (7, 5))]


def test_dropout_rests_outside_training(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    assert torch.equal(case.fast(*tensors, dropout_p=0.5), case.fast(*tensors))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_adapter_of_another_dtype(case: Case, base: torch.dtype, adapter: torch.dtype) -> None:
    # Gradients come in the adapter's dtype, values in the base's: the coarser of the two sets the tolerance.
    compare(case, inputs(case, base, adapter), max(TOLERANCE[base], TOLERANCE[adapter]))


def test_autocast(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compare(case, tensors, TOLERANCE[torch.bfloat16])
        assert case.fast(*tensors).dtype == torch.bfloat16
    # Backward after the block, and backward in a block that forward did not see.
    with torch.autocast("cpu", torch.bfloat16):
        y = case.fast(*tensors)
    y.float().sum().backward()
    y = case.fast(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(t is None or t.grad is not None for t in tensors)


def test_autocast_leaves_float64(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compare(case, inputs(case, torch.float64), TOLERANCE[torch.float64])


def test_gradcheck(case: Case) -> None:
    tensors = inputs(case, torch.float64, lead=(2, 2))
    assert torch.autograd.gradcheck(case.fast, tensors)
    assert torch.autograd.gradgradcheck(case.fast, tensors)


@pytest.mark.slow
def test_gradcheck_with_dropout(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_PIECE_ELEMENTS", 1)

    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return case.fast(*tensors, dropout_p=0.5, training=True)

    tensors = inputs(case, torch.float64, lead=(2, 3))
    assert torch.autograd.gradcheck(seeded, tensors)
    assert torch.autograd.gradgradcheck(seeded, tensors)


@pytest.mark.parametrize("wanted", [[3], [4], [3, 4], [0], [0, 3, 4], [1], [2], [0, 1, 2, 3, 4]], ids=str)
def test_only_what_is_asked_for(case: Case, wanted: list[int]) -> None:
    tensors = inputs(case, torch.float32)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    compare(case, tensors, 1e-5)


def test_no_gradient_at_all(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    want = case.fast(*tensors)
    with torch.no_grad():
        got = case.fast(*tensors)
    assert torch.equal(got, want)
    assert not got.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(case: Case, reentrant: bool) -> None:
    tensors = inputs(case, torch.float32)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        if wrapped:
            y = checkpoint(lambda *t: case.fast(*t, dropout_p=0.3, training=True), *tensors, use_reentrant=reentrant)
        else:
            y = case.fast(*tensors, dropout_p=0.3, training=True)
        y.square().sum().backward()
        grads.append([t.grad for t in tensors])
        for tensor in tensors:
            tensor.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_accumulate(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    for _ in range(2):
        case.fast(*tensors).sum().backward()
    doubled = [t.grad for t in tensors]
    once = torch.autograd.grad(case.fast(*tensors).sum(), tensors)
    for got, want in zip(doubled, once, strict=True):
        torch.testing.assert_close(got, 2 * want)


def test_transposed_weight_and_gradient(case: Case) -> None:
    x, weight, bias, a, b = inputs(case, torch.float32)
    flat = weight.detach().t().contiguous().t().requires_grad_()
    compare(case, [x, flat, bias, a, b], 1e-5)
    # An expanded gradient, as `sum` makes it, has strides of zero.
    y, z = case.fast(x, weight, bias, a, b), case.plain(x, weight, bias, a, b)
    for got, want in zip(torch.autograd.grad(y.sum(), [x, a, b]), torch.autograd.grad(z.sum(), [x, a, b]), strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_without_graph_break(case: Case) -> None:
    compiled = torch.compile(case.fast, backend="aot_eager", fullgraph=True)
    tensors = inputs(case, torch.float32)
    compare(Case(compiled, case.plain, case.shape_a, case.shape_b), tensors, 1e-5)
    torch.manual_seed(0)
    y = compiled(*tensors, dropout_p=0.5, training=True)
    assert not torch.equal(y, compiled(*tensors, dropout_p=0.5, training=True))


def test_saves_x_once_and_the_thin_product(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        case.fast(*tensors)
    assert sorted(saved) == sorted([(7, 5), (9, 5), case.shape_a, case.shape_b, (7, case.shape_a[0])])


def test_sliced_gives_off_block_zeros_no_gradient() -> None:
    torch.manual_seed(0)
    case = CASES["sliced"]
    x, weight, bias, a, b = inputs(case, torch.float32)
    case.fast(x, weight, bias, a, b).square().sum().backward()
    outside = torch.ones(9, 4, dtype=torch.bool)
    for top, bottom, left, right in BLOCKS:
        outside[top:bottom, left:right] = False
    assert torch.equal(b.grad[outside], torch.zeros(int(outside.sum())))
    assert (b.grad[~outside] != 0).all()


def test_sliced_equals_linear_on_a_block_diagonal() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = inputs(CASES["sliced"], torch.float64)
    diagonal = torch.block_diag(*[torch.ones(3, 2)] * 2).bool()
    diagonal = torch.cat([diagonal[:3], torch.zeros(3, 4, dtype=torch.bool), diagonal[3:]])
    blocks = [(0, 3, 0, 2), (6, 9, 2, 4)]
    b = (b * diagonal).detach()
    got = functional.lora_sliced_linear(x, weight, bias, a, b, blocks, 0.5)
    torch.testing.assert_close(got, functional.lora_linear(x, weight, bias, a, b, 0.5))


def test_negative_control_scaling(case: Case) -> None:
    tensors = inputs(case, torch.float32)
    wrong = Case(lambda *t: case.fast(t[0], t[1], t[2], t[3] * 1.01, t[4]), case.plain, case.shape_a, case.shape_b)
    with pytest.raises(AssertionError):
        compare(wrong, tensors, 1e-5)


@pytest.mark.parametrize(
    "blocks",
    [[(0, 4, 0, 2), (3, 9, 2, 4)], [(0, 4, 0, 3), (4, 9, 2, 4)], [(0, 10, 0, 4)], [(0, 9, 0, 5)], [(2, 2, 0, 4)]],
    ids=["rows shared", "ranks shared", "rows beyond", "ranks beyond", "empty"],
)
def test_wrong_blocks_are_refused(blocks: list[tuple[int, int, int, int]]) -> None:
    x, weight, bias, a, b = inputs(CASES["sliced"], torch.float32)
    with pytest.raises(ConfigError, match="blocks="):
        functional.lora_sliced_linear(x, weight, bias, a, b, blocks, 1.0)


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHILORA_FUSED", raising=False)
    assert functional.fused_enabled()
    monkeypatch.setenv("PHILORA_FUSED", "0")
    assert not functional.fused_enabled()
    with functional.fused():
        assert functional.fused_enabled()
        with functional.fused(False):
            assert not functional.fused_enabled()
    assert not functional.fused_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_switch_changes_the_graph_not_the_values(case: Case, enabled: bool) -> None:
    tensors = inputs(case, torch.float32)
    with functional.fused(enabled):
        y = case.fast(*tensors)
        compare(case, tensors, 1e-5, dropout_p=0.3, training=True)
    names, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    assert ("_LoRALinearBackward" in names) is enabled
