"""philora.lora's layers: modes, merging, moving, copying, compiling; every kind of layer through each."""

from __future__ import annotations

import ast
import copy
import io
import math
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philora import lora
from philora.errors import ConfigError

KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **k: lora.Linear(6, 9, r=2, lora_alpha=3, **k), (4, 6)),
    "linear fan_in_fan_out": (lambda **k: lora.Linear(6, 9, r=2, lora_alpha=3, fan_in_fan_out=True, **k), (4, 6)),
    "merged": (
        lambda **k: lora.MergedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True], **k),
        (2, 4, 6),
    ),
    "merged grouped-query": (
        lambda **k: lora.MergedLinear(
            6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True], slices=[5, 2, 2], fan_in_fan_out=True, **k
        ),
        (4, 6),
    ),
    "embedding": (lambda **k: lora.Embedding(7, 5, r=2, lora_alpha=3, **k), (4,)),
    "conv1d": (lambda **k: lora.Conv1d(4, 6, 3, r=2, lora_alpha=3, groups=2, **k), (2, 4, 8)),
    "conv2d": (lambda **k: lora.Conv2d(4, 6, 3, r=2, lora_alpha=3, padding=1, **k), (2, 4, 5, 5)),
    "conv3d": (lambda **k: lora.Conv3d(2, 4, (1, 2, 3), r=2, lora_alpha=3, **k), (1, 2, 4, 4, 4)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def make(kind: str, **kwargs: object) -> nn.Module:
    """A layer of this kind with an update that is not zero."""
    layer = KINDS[kind][0](**kwargs)
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.normal_(matrix, std=0.5)
    return layer


def sample(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = KINDS[kind][1]
    return torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


def base_of(layer: nn.Module) -> Tensor:
    return layer.base_weight.detach()


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eval_merges_and_train_restores_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, dtype=dtype)
    x = sample(kind, dtype)
    before = base_of(layer).clone()
    unmerged = layer(x)
    for _ in range(3):
        assert layer.eval() is layer
        assert layer.merged
        assert not torch.equal(layer.weight, before)
        wide = torch.promote_types(dtype, torch.float32)
        want = (before.to(wide) + layer.merge_AB().detach() * layer.scaling).to(dtype)
        assert torch.equal(layer.weight, want)
        assert close(layer(x), unmerged, TOLERANCE[dtype])
        assert layer.train() is layer
        assert not layer.merged
        assert torch.equal(layer.weight, before)


def test_state_dict_is_unmerged_and_loads_right_in_any_mode(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    want = layer.eval()(x)
    states = [layer.eval().state_dict(), layer.train().state_dict()]
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key])
    for state in states:
        for mode in (True, False):
            fresh = make(kind).train(mode)
            fresh.load_state_dict(state)
            assert torch.equal(fresh.eval()(x), want)
            assert torch.equal(fresh.train().weight, layer.train().weight)
            assigned = make(kind).train(mode)
            assigned.load_state_dict(state, assign=True)
            assert torch.equal(assigned.eval()(x), want)


def test_an_adapter_loaded_in_eval_mode_counts(kind: str) -> None:
    layer, other, x = make(kind), make(kind), sample(kind)
    before = base_of(layer).clone()
    layer.eval().load_state_dict(lora.lora_state_dict(other), strict=False)
    other.load_state_dict({**other.state_dict(), **{k: v for k, v in layer.state_dict().items() if "lora" not in k}})
    assert torch.equal(layer(x), other.eval()(x))
    assert torch.equal(layer.train().weight, before)


def test_training_reaches_a_and_b_only(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad.abs().sum() > 0
    assert layer.base_weight.grad is None
    assert [n for n, p in layer.named_parameters() if "weight" in n and p.requires_grad] == []


def test_pickle_deepcopy_and_save(kind: str) -> None:
    x = sample(kind)
    for mode in (True, False):
        layer = make(kind).train(mode)
        want = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [
            pickle.loads(pickle.dumps(layer)),
            copy.deepcopy(layer),
            torch.load(file, weights_only=False),
        ]
        for each in copies:
            assert torch.equal(each(x), want)
            assert each.merged is layer.merged
            assert torch.equal(each.train().weight, base_of(layer))
            each.load_state_dict(layer.state_dict())
            assert torch.equal(each.train(mode)(x), want)


@pytest.mark.parametrize("move", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.cpu])
def test_moving_while_merged(kind: str, move: Callable[[nn.Module], nn.Module]) -> None:
    layer = make(kind).eval()
    want = move(make(kind))
    want.load_state_dict(move(copy.deepcopy(layer).train()).state_dict())
    move(layer)
    assert layer.merged
    assert torch.equal(layer.weight, want.eval().weight)
    assert layer.weight.dtype == layer.lora_A.dtype
    assert torch.equal(layer.train().weight, want.train().weight)


def test_moving_to_meta(kind: str) -> None:
    """What offloading and `init_empty_weights` do; weights then come from a state dict."""
    x = sample(kind)
    for mode in (True, False):
        layer = make(kind).train(mode)
        state, want = copy.deepcopy(layer.state_dict()), layer(x)
        layer.to(device="meta")
        assert {each.device.type for each in (layer.weight, *layer.parameters())} == {"meta"}
        assert layer.merged is (not mode)
        assert layer(x.to("meta")).shape == want.shape
        for assign in (True, False):
            layer.to(device="meta")
            if not assign:
                layer.to_empty(device="cpu")
            layer.load_state_dict(state, assign=assign)
            assert torch.equal(layer(x), want)
            assert torch.equal(layer.train().weight, base_of(layer))
            layer.train(mode)


def test_merging_costs_one_more_copy_of_the_weight(kind: str) -> None:
    """None in training mode and with `merge_weights=False`; never a parameter, a buffer or part of the state."""
    layer = make(kind)
    held = len(list(layer.parameters())), len(list(layer.buffers())), len(layer.state_dict())
    assert layer.weight is layer.base_weight
    layer.eval()
    assert layer.weight.shape == layer.base_weight.shape
    assert layer.weight.data_ptr() != layer.base_weight.data_ptr()
    assert (len(list(layer.parameters())), len(list(layer.buffers())), len(layer.state_dict())) == held
    assert layer.train().weight is layer.base_weight
    unmerged = KINDS[kind][0](merge_weights=False).eval()
    assert unmerged.weight is unmerged.base_weight
    assert not unmerged.merged


def test_a_state_holds_each_tensor_once(kind: str) -> None:
    layer = make(kind)
    for mode in (True, False):
        state = layer.train(mode).state_dict()
        assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
        assert all(value.is_contiguous() for value in state.values())
        assert {id(each) for each in layer.parameters()} == {id(v) for v in layer.state_dict(keep_vars=True).values()}


def test_meta_then_to_empty(kind: str) -> None:
    x = sample(kind)
    for mode in (True, False):
        layer = KINDS[kind][0](device="meta").train(mode)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        zero = layer.lora_A if kind == "embedding" else layer.lora_B
        assert torch.equal(zero, torch.zeros_like(zero))
        assert layer(x).isfinite().all()
        source = make(kind)
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer(x), source.train(mode)(x))


def test_compiles_in_one_graph(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        compiled.train(mode)
        torch.testing.assert_close(compiled(x), layer(x))
    compiled.train()
    compiled(x).square().sum().backward()
    got = [layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, [layer.lora_A.grad, layer.lora_B.grad])
    torch._dynamo.reset()


def test_base_cast_to_bf16_with_fp32_adapters(kind: str) -> None:
    layer = make(kind)
    layer.base_weight.data = layer.base_weight.data.bfloat16()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = layer.bias.data.bfloat16()
    x = sample(kind, torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert close(layer.eval()(x), y, TOLERANCE[torch.bfloat16])


def test_autocast(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(layer(x), want, TOLERANCE[torch.bfloat16])
        layer.eval()
    assert close(layer(x), want, TOLERANCE[torch.float32])


def test_scaling_changes_at_run_time(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    layer.scaling = 0.25
    want = layer(x)
    layer.scaling = 7.0
    layer.eval()
    layer.scaling = 0.25
    assert close(layer(x), want, 1e-5)


def test_switching_off(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    with torch.no_grad():
        plain = make(kind)
        plain.load_state_dict(layer.state_dict())
        plain.lora_A.zero_()
    for mode in (True, False):
        layer.train(mode)
        with_update = layer(x)
        with lora.disable_adapter(layer):
            assert torch.equal(layer(x), plain(x))
            assert torch.equal(layer.weight, base_of(layer))
            with lora.disable_adapter(layer):
                pass
            assert layer.disable_adapters
            layer.eval()
            assert torch.equal(layer(x), plain(x))
            layer.train(mode)
        assert torch.equal(layer(x), with_update)
        assert not torch.equal(with_update, plain(x))


def test_switched_on_again_after_an_error() -> None:
    layer = make("linear")
    with pytest.raises(KeyError), lora.disable_adapter(layer):
        raise KeyError
    assert not layer.disable_adapters


def test_merge_weights_off_while_merged_does_not_stick(kind: str) -> None:
    layer = make(kind)
    before = base_of(layer).clone()
    layer.eval().merge_weights = False
    layer.train()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.eval().weight, before)


def test_eval_mode_of_a_base_that_trains(kind: str) -> None:
    layer, x = make(kind), sample(kind)
    layer.base_weight.requires_grad_()
    layer.eval()(x).square().sum().backward()
    assert layer.base_weight.grad is not None
    assert layer.lora_A.grad is not None
    with torch.no_grad():
        want = layer.train()(x)
        assert close(layer.eval()(x), want, 1e-5)


def test_tensors_put_there_while_merged_count(kind: str) -> None:
    layer, other, x = make(kind).eval(), make(kind), sample(kind)
    got = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert close(got, other(x), 1e-5)
    layer.lora_A = nn.Parameter(other.lora_A.detach().clone())
    want = layer(x)
    assert close(layer.eval()(x), want, 1e-5)


def test_transforms_of_torch_func() -> None:
    layer, x = make("linear"), torch.randn(5, 6)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss(dict(layer.named_parameters()), x).backward()
    torch.testing.assert_close(each["lora_A"].sum(0), layer.lora_A.grad)
    torch.testing.assert_close(each["lora_B"].sum(0), layer.lora_B.grad)


def test_torch_is_all_that_it_imports() -> None:
    package = Path(lora.__file__).parent
    own, imported = (
        {"philora.errors", "philora.native.build", "philora.native.library", "philora.runtime.user_cache"},
        set(),
    )
    for file in [
        *package.glob("*.py"),
        *(package.parent / f"{each.partition('.')[2].replace('.', '/')}.py" for each in own),
    ]:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= own & modules or {str(node.module)}
    foreign = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {n for n in foreign if n.partition(".")[0] != "torch" and not n.startswith("philora.lora")} == own


def test_eval_under_inference_mode_leaves_a_usable_layer() -> None:
    layer = make("linear")
    with torch.inference_mode():
        layer.eval()
    x = sample("linear").requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("r", [-1, 1.0, "4", True, None])
def test_rank_is_checked(r: object) -> None:
    for build in (
        lambda: lora.Linear(4, 4, r=r),
        lambda: lora.MergedLinear(4, 4, r=r, enable_lora=[True]),
        lambda: lora.Embedding(4, 4, r=r),
        lambda: lora.Conv2d(4, 4, 1, r=r),
    ):
        with pytest.raises(ConfigError, match="r="):
            build()


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"lora_alpha": math.inf}, "lora_alpha"), ({"lora_alpha": "8"}, "lora_alpha"), ({"lora_dropout": 1.5}, "dropout")],
)
def test_alpha_and_dropout_are_checked(kwargs: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        lora.Linear(4, 4, r=2, **kwargs)


def test_rank_zero_is_the_plain_layer() -> None:
    for layer, plain, x in [
        (lora.Linear(4, 3), nn.Linear(4, 3), torch.randn(2, 4)),
        (lora.Embedding(4, 3), nn.Embedding(4, 3), torch.arange(4)),
        (lora.Conv2d(4, 3, 2), nn.Conv2d(4, 3, 2), torch.randn(1, 4, 5, 5)),
        (lora.MergedLinear(4, 3, r=2, enable_lora=[False] * 3), nn.Linear(4, 3), torch.randn(2, 4)),
    ]:
        plain.load_state_dict({k.removeprefix("conv."): v for k, v in layer.state_dict().items()})
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), plain(x))
        assert all(p.requires_grad for p in layer.parameters())
        assert not hasattr(layer, "lora_A")


def test_rslora() -> None:
    assert lora.Linear(4, 4, r=4, lora_alpha=8, use_rslora=True).scaling == 4.0
    assert lora.Linear(4, 4, r=4, lora_alpha=8).scaling == 2.0


def test_merged_linear_slices_are_checked() -> None:
    for kwargs in (
        {"enable_lora": [True, True]},
        {"enable_lora": []},
        {"enable_lora": [True], "slices": [4]},
        {"enable_lora": [True], "slices": [4, 5]},
        {"enable_lora": [True, True], "slices": [9, 0]},
    ):
        with pytest.raises(ConfigError, match=r"slices|enable_lora"):
            lora.MergedLinear(4, 9, r=2, **kwargs)


def test_merged_linear_adapts_the_rows_it_names() -> None:
    torch.manual_seed(0)
    layer = lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True], slices=[16, 4, 4])
    nn.init.normal_(layer.lora_B)
    delta = layer.merge_AB()
    assert torch.equal(delta[16:20], torch.zeros(4, 8))
    torch.testing.assert_close(delta[:16], layer.lora_B[:16] @ layer.lora_A[:2])
    torch.testing.assert_close(delta[20:], layer.lora_B[16:] @ layer.lora_A[2:])


@pytest.mark.parametrize(
    ("kind", "kwargs", "shape"),
    [
        ("Conv1d", {"kernel_size": 5, "padding": "same", "dilation": 2}, (2, 4, 16)),
        ("Conv1d", {"kernel_size": (3,), "stride": 2, "padding_mode": "circular", "padding": 1}, (2, 4, 16)),
        ("Conv1d", {"kernel_size": 4, "padding": "valid", "groups": 2}, (4, 16)),
        ("Conv2d", {"kernel_size": (3, 1), "groups": 4}, (2, 4, 6, 6)),
        ("Conv2d", {"kernel_size": 3, "padding_mode": "reflect", "padding": 1, "groups": 2}, (2, 4, 6, 6)),
        ("Conv2d", {"kernel_size": (1, 5), "stride": (1, 2), "bias": False}, (2, 4, 6, 6)),
        ("Conv2d", {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (0, 1)}, (2, 4, 6, 6)),
        ("Conv2d", {"kernel_size": 3, "padding_mode": "replicate", "padding": 2, "stride": 2}, (2, 4, 6, 6)),
        ("Conv3d", {"kernel_size": 3, "padding": 2, "dilation": 2}, (1, 4, 4, 4, 4)),
        ("Conv3d", {"kernel_size": (1, 2, 2), "stride": (1, 2, 2), "padding_mode": "circular"}, (1, 4, 4, 4, 4)),
        ("Conv3d", {"kernel_size": (2, 1, 3), "groups": 2}, (4, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_convolutions(kind: str, kwargs: dict[str, object], shape: tuple[int, ...], dropout: float) -> None:
    torch.manual_seed(0)
    layer = getattr(lora, kind)(4, 8, r=2, lora_alpha=3, lora_dropout=dropout, **kwargs)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    merged = layer.eval()(x)
    assert layer.conv.weight is layer.weight
    assert close(y, merged, 1e-5) is (dropout == 0.0)
    plain = getattr(nn, kind)(4, 8, **kwargs)
    plain.load_state_dict(lora.merged_state_dict(layer))
    assert torch.equal(plain(x), merged)
    assert sorted(layer.state_dict()) == sorted(
        ["conv.weight", "lora_A", "lora_B"] + ["conv.bias"] * (layer.bias is not None)
    )


def test_dropout_of_a_convolution_touches_the_update_only() -> None:
    torch.manual_seed(0)
    layer = lora.Conv2d(4, 8, 3, r=2, lora_dropout=1.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.conv.weight, layer.bias))


def test_conv_lora_takes_the_classes_of_torch_only() -> None:
    assert isinstance(lora.ConvLoRA(nn.Conv2d, 4, 4, 3, r=1).conv, nn.Conv2d)
    with pytest.raises(ConfigError, match="conv_module"):
        lora.ConvLoRA(nn.ConvTranspose2d, 4, 4, 3, r=1)


@pytest.mark.parametrize("prefix", ["", "conv.", "both"])
def test_both_key_forms_of_conv_checkpoints_load(prefix: str) -> None:
    layer = make("conv2d")
    state = layer.state_dict()
    for name in ("weight", "bias"):
        value = state.pop(f"conv.{name}")
        for each in ("", "conv.") if prefix == "both" else (prefix,):
            state[each + name] = value
    model = nn.Sequential(nn.Identity(), make("conv2d"))
    model.load_state_dict({f"1.{k}": v for k, v in state.items()})
    x = sample("conv2d")
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_embedding_with_max_norm_and_padding(norm_type: float) -> None:
    torch.manual_seed(0)
    layer = lora.Embedding(9, 5, r=2, padding_idx=3, max_norm=1.0, norm_type=norm_type)
    plain = nn.Embedding(9, 5, padding_idx=3, max_norm=1.0, norm_type=norm_type)
    plain.load_state_dict({"weight": layer.weight})
    nn.init.normal_(layer.lora_A)
    adapter = layer.lora_A.detach().clone()
    x = torch.tensor([[0, 3, 8], [8, 1, 0]])
    before = layer.eval().base_weight.clone()
    merged = layer(x)
    assert torch.equal(layer.base_weight, before)
    want = plain(x) + (layer.lora_A.t() @ layer.lora_B.t())[x] * layer.scaling
    torch.testing.assert_close(merged, want)
    layer.train()
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.lora_A, adapter)
    layer(x).sum().backward()
    assert torch.equal(layer.lora_A.grad[:, 3], torch.zeros(2))


def test_embedding_keeps_a_table_that_it_is_given() -> None:
    table = torch.randn(6, 4)
    assert torch.equal(lora.Embedding.from_pretrained(table).weight, table)
    assert torch.equal(lora.Embedding(6, 4, r=2, _weight=table.clone()).weight, table)


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_embedding_gradient_options(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    layer = lora.Embedding(6, 4, r=2, **options)
    layer(torch.tensor([1, 1, 2])).sum().backward()
    plain = nn.Embedding(6, 2, _weight=layer.lora_A.detach().t().clone(), **options)
    F.linear(plain(torch.tensor([1, 1, 2])), layer.lora_B.detach()).mul(layer.scaling).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, plain.weight.grad.to_dense().t())


def test_tied_head_is_left_alone() -> None:
    torch.manual_seed(0)
    table, head = lora.Embedding(9, 4, r=2), nn.Linear(4, 9, bias=False)
    head.weight = table.weight
    nn.init.normal_(table.lora_A)
    model = nn.ModuleList([table, head])
    before = head.weight.detach().clone()
    model.eval()
    assert torch.equal(head.weight, before)
    assert not torch.equal(table.weight, before)
    assert torch.equal(model.state_dict()["0.weight"], before)
    assert len(list(model.parameters())) == 3
    model.train()
    assert table.weight is head.weight


def test_layers_are_lora_layers_and_torch_layers() -> None:
    for layer, kind in [
        (lora.Linear(2, 2), nn.Linear),
        (lora.MergedLinear(2, 2), nn.Linear),
        (lora.Embedding(2, 2), nn.Embedding),
        (lora.Conv2d(2, 2, 1), nn.Module),
    ]:
        assert isinstance(layer, lora.LoRALayer)
        assert isinstance(layer, kind)


def test_a_layer_of_ones_own_on_lora_layer() -> None:
    class Own(nn.Linear, lora.LoRALayer):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 3, 3)
            lora.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.1, merge_weights=False)
            self.lora_A = nn.Parameter(torch.zeros(2, 3))
            self.scaling = self.lora_alpha / self.r

    layer = Own()
    assert layer.scaling == 2.0
    assert layer(layer.lora_dropout(torch.ones(1, 3))).shape == (1, 3)
    lora.mark_only_lora_as_trainable(layer, bias="lora_only")
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias", "lora_A"]


def test_repr_tells_the_rank() -> None:
    assert "r=2, scaling=1.5" in repr(make("linear"))
    assert "r=" not in repr(lora.Linear(2, 2))


DDP = """
import copy, os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from philora import lora

def batch(step, rank):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))

def work(rank, shared, port):
    torch.set_num_threads(1)
    model = copy.deepcopy(shared)  # what spawn hands over lies in memory that both processes write to
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    lora.mark_only_lora_as_trainable(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    one = copy.deepcopy(model)  # what one process does with the batches of both
    both = [(ddp, torch.optim.SGD(model.parameters(), lr=0.1)), (one, torch.optim.SGD(one.parameters(), lr=0.1))]
    for step in range(3):
        ddp(batch(step, rank)).square().sum().backward()
        (sum(one(batch(step, each)).square().sum() for each in range(2)) / 2).backward()
        for (name, got), want in zip(model.named_parameters(), one.parameters()):
            assert (got.grad is None) == (want.grad is None) == ("lora_" not in name), name
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-6)
        for each, optimizer in both:
            optimizer.step(); optimizer.zero_grad()
            each.eval(); each.train()
    for (name, value), start in zip(model.state_dict().items(), shared.state_dict().values()):
        each = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(each, value)
        assert torch.equal(*each) and torch.equal(value, start) == ("lora_" not in name), name
    dist.barrier()
    dist.destroy_process_group()
    os.write(1, b"trained ")  # in one piece, unlike print
    os._exit(0)  # torch now and then aborts while an interpreter shuts down after DDP, with its own layers too

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(lora.Linear(4, 6, r=2), nn.Tanh(), lora.MergedLinear(6, 6, r=2, enable_lora=[True, False]))
    mp.spawn(work, (model, int(sys.argv[1])), nprocs=2)
"""


@pytest.mark.slow
def test_spawned_ddp(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    done = subprocess.run([sys.executable, script, str(port)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["trained", "trained"]
