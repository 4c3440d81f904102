"""Choosing what trains, and reading and writing LoRA's tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from philora import lora
from philora.errors import AdapterError, ConfigError
from philora.lora.state import loraplus_fast_parameters, split_loraplus_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = lora.Embedding(7, 8, r=2)
        self.proj = lora.Linear(8, 8, r=2)
        self.plain = lora.Linear(8, 8)
        self.conv = lora.Conv1d(8, 8, 3, r=2, padding=1)
        self.lora_head = nn.Linear(8, 2)
        self.debias = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.plain(self.proj(self.embed(x)))
        return self.debias(self.lora_head(self.conv(hidden.transpose(1, 2)).transpose(1, 2)))


LORA = [f"{layer}.lora_{matrix}" for layer in ("embed", "proj", "conv") for matrix in "AB"]
BIASES = ["proj.bias", "conv.conv.bias"]
ALL_BIASES = [*BIASES, "plain.bias", "lora_head.bias", "debias.bias"]


def filled() -> Model:
    torch.manual_seed(0)
    model = Model()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("bias", "want"), [("none", LORA), ("lora_only", LORA + BIASES), ("all", LORA + ALL_BIASES)], ids=str
)
def test_what_trains_is_what_is_saved(bias: str, want: list[str]) -> None:
    model = Model()
    for parameter in model.parameters():
        parameter.requires_grad = False
    lora.mark_only_lora_as_trainable(model, bias)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(want)
    assert set(lora.lora_state_dict(model, bias)) == set(want)


def test_choices_are_checked_before_anything_changes() -> None:
    model = Model()
    before = [p.requires_grad for p in model.parameters()]
    for function in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(ConfigError, match=r"bias='lora_onyl'.*lora_only"):
            function(model, "lora_onyl")
    assert [p.requires_grad for p in model.parameters()] == before


def test_names_of_peft_layers_are_known() -> None:
    model = nn.Module()
    model.q = nn.Module()
    model.q.base_layer = nn.Linear(2, 2)
    model.q.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1, bias=False)})
    lora.mark_only_lora_as_trainable(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["q.lora_A.default.weight"]


def test_biases_with_longer_names() -> None:
    model = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    lora.mark_only_lora_as_trainable(model, "all")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "in_proj_bias",
        "out_proj.bias",
        "bias_k",
        "bias_v",
    }


def test_a_tied_parameter_trains_under_either_name() -> None:
    model = nn.ModuleList([lora.Linear(2, 2, r=1), nn.Linear(2, 2)])
    model[1].weight = model[0].lora_A = nn.Parameter(torch.ones(2, 2))
    lora.mark_only_lora_as_trainable(model)
    assert model[1].weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "dict"])
def test_saved_and_loaded(training: bool, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = filled().train(training), Model().train(not training)
    target.load_state_dict(
        {k: v for k, v in source.state_dict().items() if "lora_A" not in k and "lora_B" not in k}, False
    )
    state = lora.lora_state_dict(source)
    path = tmp_path / f"adapter{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    elif suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    lora.load_lora(target, state if suffix == "dict" else path)
    x = torch.randint(0, 7, (2, 5))
    assert torch.equal(target.eval()(x), source.eval()(x))
    assert torch.equal(target.train()(x), source.train()(x))


def test_whole_models_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.ModuleList([Model(), lora.Linear(3, 4, r=1, fan_in_fan_out=True)]).eval()
    for state in (model.state_dict(), lora.merged_state_dict(model)):
        save_file(state, tmp_path / "model.safetensors")
        assert set(load_file(tmp_path / "model.safetensors")) == set(state)


@pytest.mark.parametrize("training", [True, False])
def test_merged_state_dict_fits_torchs_layers(training: bool) -> None:
    model, x = filled().train(training), torch.randint(0, 7, (2, 5))
    plain = Model()
    plain.embed, plain.proj, plain.plain = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    plain.conv = nn.Conv1d(8, 8, 3, padding=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain.load_state_dict(lora.merged_state_dict(model))
    assert torch.equal(plain(x), model.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_merged_state_dict_of_a_layer_by_itself() -> None:
    for layer, plain in [
        (lora.Linear(3, 3, r=1), nn.Linear(3, 3)),
        (lora.Conv2d(3, 3, 2, r=1), nn.Conv2d(3, 3, 2)),
        (lora.Conv2d(3, 3, 2), nn.Conv2d(3, 3, 2)),
    ]:
        plain.load_state_dict(lora.merged_state_dict(layer))


def test_every_fault_is_reported_and_nothing_loaded() -> None:
    model = filled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state: dict[str, object] = dict(lora.lora_state_dict(Model()))
    del state["embed.lora_A"]
    state["proj.lora_B"] = torch.ones(8, 3)
    state["conv.lora_A"] = [1, 2]
    state["proj.lora_C"] = torch.ones(1)
    with pytest.raises(AdapterError) as caught:
        lora.load_lora(model, state)
    text = str(caught.value)
    assert text.startswith("4 faults:")
    for part in (
        "embed.lora_A='missing' - expected a tensor of shape (2, 7)",
        "proj.lora_B=(8, 3) - expected shape (8, 2)",
        "conv.lora_A=[1, 2] - expected a tensor, found list",
        "proj.lora_C='unexpected' - expected a name of this model. Did you mean 'proj.lora_",
    ):
        assert part in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_tensors_of_the_model_load_too() -> None:
    source, target = filled(), Model()
    lora.load_lora(target, {**lora.lora_state_dict(source), "lora_head.bias": torch.full((2,), 7.0)})
    assert target.lora_head.bias.tolist() == [7.0, 7.0]


def test_a_loralib_file_with_convolution_keys_twice_loads() -> None:
    source, target = filled(), Model()
    state = {k.removeprefix("conv."): v for k, v in source.state_dict().items() if k.startswith("conv.")}
    lora.load_lora(target.conv, {**state, "weight": state["conv.weight"], "bias": state["conv.bias"]})
    x = torch.randn(1, 8, 4)
    assert torch.equal(target.conv(x), source.conv(x))


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_files_that_are_torn_or_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save

    monkeypatch.chdir(tmp_path)
    model = filled()
    state = lora.lora_state_dict(model)
    torch.save(state, "whole.pt")
    torch.save({"proj.lora_A": Hostile()}, "hostile.pt")
    torch.save([1, 2], "list.pt")
    whole = Path("whole.pt").read_bytes()
    Path("torn.pt").write_bytes(whole[: len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_bytes(b"hello world" * 9)
    Path("torn.safetensors").write_bytes(save(state)[:-4])
    Path("header.safetensors").write_bytes(save(state)[:5])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("hostile.pt", "list.pt", "torn.pt", "empty.pt", "text.pt", "torn.safetensors", "header.safetensors"):
        with pytest.raises(AdapterError, match=f"^{name}: content="):
            lora.load_lora(model, name)
    with pytest.raises(AdapterError, match=r"nowhere\.pt: path="):
        lora.load_lora(model, "nowhere.pt")
    with pytest.raises(AdapterError, match=r"posix\.system|os\.system|nt\.system"):
        lora.load_lora(model, "hostile.pt")
    assert not Path("ran").exists()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loraplus_groups() -> None:
    model = Model()
    lora.mark_only_lora_as_trainable(model, "lora_only")
    slow, fast = lora.loraplus_parameter_groups(model, lr=1e-4, loraplus_lr_ratio=16, weight_decay=0.1)
    assert {id(p) for p in fast["params"]} == {id(model.proj.lora_B), id(model.conv.lora_B)}
    assert fast["lr"] == pytest.approx(16e-4)
    assert slow["lr"] == 1e-4
    assert len(slow["params"]) == 6
    torch.optim.AdamW([slow, fast])


def test_loraplus_is_checked() -> None:
    model = Model()
    with pytest.raises(ConfigError, match="loraplus_lr_ratio=0"):
        lora.loraplus_parameter_groups(model, 1e-4, 0)
    with pytest.raises(ConfigError, match="trainable"):
        lora.loraplus_parameter_groups(model.requires_grad_(False), 1e-4, 2)


def test_loraplus_knows_b_under_any_wrapper() -> None:
    model = Model()
    lora.mark_only_lora_as_trainable(model)
    compiled = torch.compile(model, backend="eager")
    want = {"proj.lora_B", "conv.lora_B"}
    assert set(loraplus_fast_parameters(model)) == want
    assert set(loraplus_fast_parameters(compiled)) == {f"_orig_mod.{name}" for name in want}
    model.proj.lora_B.requires_grad_(False)
    assert set(loraplus_fast_parameters(model)) == {"conv.lora_B"}


def test_splitting_keeps_each_group_and_its_settings() -> None:
    model = Model()
    lora.mark_only_lora_as_trainable(model, "lora_only")
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and "bias" not in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0, "lr": 1e-2}, {"params": decayed, "betas": (0.5, 0.6)}], lr=1e-3
    )
    split_loraplus_groups(optimizer, loraplus_fast_parameters(model), 4)
    first, second, fast = optimizer.param_groups
    assert {id(p) for p in fast["params"]} == {id(model.proj.lora_B), id(model.conv.lora_B)}
    assert (fast["lr"], fast["betas"]) == (4e-3, (0.5, 0.6))
    assert (first["lr"], second["lr"]) == (1e-2, 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decayed) + len(others)


def test_an_optimizer_that_lacks_some_b_is_refused_unchanged() -> None:
    model = Model()
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.SGD([model.proj.lora_A, model.proj.lora_B], lr=1e-3)
    message = r"loraplus_lr_ratio=4 - expected every B in the groups of SGD, which lacks 1 of 2\. .*conv\.lora_B"
    with pytest.raises(ConfigError, match=message):
        split_loraplus_groups(optimizer, loraplus_fast_parameters(model), 4)
    assert len(optimizer.param_groups) == 1
