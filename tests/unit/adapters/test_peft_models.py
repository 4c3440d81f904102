"""Names in a LoraConfig: strict, slice-aware, all faults at once; the layers compute what PEFT computes."""

from __future__ import annotations

import copy
import json
import logging
import re

import peft
import pytest
import torch
from peft import LoraConfig

import philora
from philora.adapters.fast_layers import FastLinear
from philora.adapters.peft_models import SlicedPeftModelForCausalLM
from philora.adapters.slices import lora_layers
from philora.adapters.statistics import update_norms
from philora.adapters.targets import resolve
from philora.errors import AdapterError, TargetError
from tests.tolerances import LOGITS_FP32

SPLIT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


def tokens(n=20, rows=2, seed=1):
    return torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": SPLIT} | changes))


def randomize(model, seed=5, inside_only=True):
    """Give B values, as training would: inside the blocks only."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FastLinear):
            for name, layer in module.lora_B.items():
                with torch.no_grad():
                    values = torch.randn(layer.weight.shape, generator=generator) * 0.05
                    slices = module.slices.get(name)
                    if slices and inside_only:
                        mask = torch.zeros_like(values)
                        for each in slices:
                            mask[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = 1
                        values *= mask
                    layer.weight.copy_(values)
    return model


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


# ------------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["qkv_prj"]}, r"target_modules='qkv_prj' - expected .*Did you mean 'qkv_proj'\?"),
        ({"target_modules": ["o_proj", "w1"]}, r"target_modules='w1' - expected .*Known: .*down_proj.*q_proj"),
        ({"target_modules": r".*\.nothing"}, r"target_modules=.*at least one module \(as a regular expression\)"),
        ({"exclude_modules": ["layerz"]}, r"exclude_modules='layerz' - expected the name of a module"),
        ({"exclude_modules": r".*\.nothing"}, r"exclude_modules=.*regular expression"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save='lm_haed' - expected .*Did you mean 'lm_head'\?"),
        ({"rank_pattern": {"qq_proj": 8}}, r"rank_pattern='qq_proj' - expected the name of a targeted module"),
        ({"alpha_pattern": {"o_proj": 8}}, r"alpha_pattern='o_proj' - expected the name of a targeted module"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform=7 - expected a layer index from 0 to 1"),
        ({"target_modules": ["input_layernorm"]}, r"input_layernorm' - expected a linear.*It is a Phi3RMSNorm"),
        ({"rank_pattern": {"k_proj": 8}}, r"rank_pattern=\{'q_proj': 4, 'k_proj': 8.* one value for all slices"),
        ({"target_modules": ["qkv_proj", "q_proj"]}, r"expected qkv_proj or its slices, not both"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' - expected True for slices"),
        (
            {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
            r"exclude_modules='k_proj'.*target q_proj and v_proj in its place",
        ),
        ({"target_modules": None, "target_parameters": ["nope.weight"]}, r"target_parameters='nope.weight'"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(phi3, changes, message):
    model = phi3()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=message):
        philora.get_peft_model(model, lora(**changes))
    assert {name: type(module) for name, module in model.named_modules()} == before, "the model was changed"


def test_all_faults_come_at_once(phi3):
    with pytest.raises(TargetError) as caught:
        philora.get_peft_model(phi3(), lora(target_modules=["aa", "bb"], modules_to_save=["cc"]))
    text = str(caught.value)
    assert text.partition("\n")[2].startswith("3 faults:")  # after PEFT's own words
    assert all(name in text for name in ("'aa'", "'bb'", "'cc'"))


def test_peft_alone_ignores_slices_in_silence(phi3):
    """The fault that strictness is for: PEFT adapts what it finds and says nothing of the rest."""
    model = peft.get_peft_model(phi3(), lora(target_modules=[*SPLIT, "o_proj"]))
    adapted = {name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, peft.tuners.lora.Linear)}
    assert adapted == {"o_proj"}


# ---------------------------------------------------------------------------------------------------- slices


def test_slices_are_a_peft_adapter_of_the_fused_module(phi3):
    resolution = resolve(phi3(), lora(rank_pattern={"gate_proj": 2, "up_proj": 2}))
    config = resolution.config
    assert set(config.target_modules) == {"qkv_proj", "gate_up_proj"}
    assert config.rank_pattern == {"qkv_proj": 12, "gate_up_proj": 4}
    # scaling stays alpha / r of each slice: 8 / 4 = 24 / 12 and 8 / 2 = 16 / 4
    assert config.alpha_pattern == {"qkv_proj": 24, "gate_up_proj": 16}
    names = {module: [each.name for each in parts] for module, parts in resolution.slices.items()}
    assert names["model.layers.1.mlp.gate_up_proj"] == ["gate_proj", "up_proj"]
    assert names["model.layers.0.self_attn.qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    rows = [each[1:3] for each in resolution.slices["model.layers.0.self_attn.qkv_proj"]]
    assert rows == [(0, 32), (32, 48), (48, 64)], "grouped-query: q 32 rows, k and v 16"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_slice_is_lora_of_a_split_projection(phi3, use_rslora):
    """Against separate adapters on separate linears, computed by hand in float64."""
    model = phi3().double()
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = model.model.layers[0].self_attn.qkv_proj.weight.detach().clone()
    config = lora(target_modules=["q_proj", "v_proj"], use_rslora=use_rslora)
    adapted = randomize(philora.get_peft_model(model, config, autocast_adapter_dtype=False))
    layer = adapted.base_model.model.model.layers[0].self_attn.qkv_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = 8 / 2 if use_rslora else 8 / 4
    parts = torch.split(x @ weight.T, [32, 16, 16], dim=-1)
    q = parts[0] + scaling * (x @ down[:4].T @ up[:32, :4].T)
    v = parts[2] + scaling * (x @ down[4:].T @ up[48:, 4:].T)
    expected = torch.cat([q, parts[1], v], dim=-1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # negative control: the multiplier off by 1%
        torch.testing.assert_close(layer(x), parts[0].new_tensor(1.01) * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fast", [True, False])
def test_zeros_outside_the_slices_stay_zero(phi3, fast, monkeypatch):
    if not fast:  # PEFT's own forward: DoRA takes it
        monkeypatch.setattr(FastLinear, "plain_adapter", lambda self: None)
    model = philora.get_peft_model(phi3(), lora(lora_dropout=0.1))
    randomize(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for step in range(3):
        batch = tokens(seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, FastLinear):
            outside = torch.ones_like(module.lora_B["default"].weight, dtype=torch.bool)
            for each in module.slices["default"]:
                outside[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = False
            assert outside.any()
            assert not module.lora_B["default"].weight[outside].any()


def test_a_regular_expression_may_name_slices(phi3):
    resolution = resolve(phi3(), lora(target_modules=r".*\.0\..*\.(q_proj|o_proj)"))
    assert resolution.slices.keys() == {"model.layers.0.self_attn.qkv_proj"}
    assert set(resolution.config.target_modules) == {
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
    }


def test_excluding_a_slice_takes_it_out(phi3):
    resolution = resolve(phi3(), lora(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]))
    assert [each.name for each in resolution.slices["model.layers.0.self_attn.qkv_proj"]] == ["q_proj"]
    assert resolution.config.exclude_modules is None


# ------------------------------------------------------------------------------------------- equality with PEFT


@pytest.mark.parametrize("targets", [["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "all-linear", SPLIT])
def test_logits_equal_peft_and_survive_a_round_trip(phi3, targets, tmp_path):
    model = randomize(philora.get_peft_model(phi3(), lora(target_modules=targets))).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        base = phi3()(input_ids=tokens()).logits
    assert distance(base, expected) > 1e-3, "the adapter changes nothing, so the comparison could not fail"
    model.save_pretrained(tmp_path / "one")

    plain = peft.PeftModel.from_pretrained(phi3(), str(tmp_path / "one")).eval()
    assert not any(isinstance(each, FastLinear) for each in plain.modules())
    with torch.no_grad():
        assert distance(plain(input_ids=tokens()).logits, expected) < LOGITS_FP32
        plain.base_model.model.model.layers[0].self_attn.qkv_proj.scaling["default"] *= 1.01  # negative control
        assert distance(plain(input_ids=tokens()).logits, expected) > LOGITS_FP32

    peft.PeftModel.from_pretrained(phi3(), str(tmp_path / "one")).save_pretrained(tmp_path / "two")
    again = philora.load_adapter(phi3(), tmp_path / "two", is_trainable=True).eval()
    with torch.no_grad():
        assert distance(again(input_ids=tokens()).logits, expected) < LOGITS_FP32
    assert philora.coverage(again) == philora.coverage(model)


def test_slices_are_recorded_and_read(phi3, tmp_path):
    model = philora.get_peft_model(phi3(), lora(target_modules=["q_proj", "v_proj"]))
    assert isinstance(model, SlicedPeftModelForCausalLM)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "philora.json").read_text())
    assert record["slices"]["model.layers.1.self_attn.qkv_proj"] == {"names": ["q_proj", "v_proj"], "r": 4}
    again = philora.load_adapter(phi3(), tmp_path)  # B is zero everywhere: only the record knows
    assert [row.slice for row in philora.coverage(again).rows] == ["q_proj", "v_proj"]


def test_blocks_that_are_no_longer_zero_make_a_fused_adapter(phi3, tmp_path, caplog):
    model = randomize(philora.get_peft_model(phi3(), lora(target_modules=["q_proj", "v_proj"])))
    randomize(model, inside_only=False)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = philora.load_adapter(phi3(), tmp_path)
    assert "no longer zero in 2 modules" in caplog.text
    assert [row.slice for row in philora.coverage(again).rows] == [""]
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(phi3(), str(tmp_path)).eval()
        assert distance(again.eval()(input_ids=tokens()).logits, plain(input_ids=tokens()).logits) < LOGITS_FP32


def test_gradients_equal_pefts(phi3):
    mine = randomize(philora.get_peft_model(phi3(), lora(target_modules="all-linear"))).train()
    theirs = peft.get_peft_model(phi3(), lora(target_modules="all-linear")).train()
    theirs.load_state_dict(mine.state_dict())
    for model in (mine, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = {name: each.grad for name, each in theirs.named_parameters() if each.requires_grad}
    assert grads
    for name, each in mine.named_parameters():
        if each.requires_grad:
            assert distance(each.grad, grads[name]) < 1e-4, name


# --------------------------------------------------------------------------- everything else runs PEFT's forward


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": False, "bias": "all"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "qkv_proj"]},
        {"target_modules": ["lm_head", "qkv_proj"]},
        {"target_modules": ["qkv_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"o_proj": 3}},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_what_loraconfig_offers_equals_peft(phi3, changes):
    options = {"target_modules": "all-linear"} | changes
    torch.manual_seed(3)
    mine = philora.get_peft_model(phi3(), lora(**copy.deepcopy(options))).train()
    torch.manual_seed(3)
    theirs = peft.get_peft_model(phi3(), lora(**copy.deepcopy(options))).train()
    theirs.load_state_dict(mine.state_dict())
    losses = [each(input_ids=tokens(), labels=tokens()).loss for each in (mine, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-5
    for loss in losses:
        loss.backward()
    grads = {name: each.grad for name, each in theirs.named_parameters() if each.requires_grad}
    for name, each in mine.named_parameters():
        assert each.requires_grad == (name in grads)
        if each.requires_grad:
            assert each.grad is not None, f"{name} is left without gradient"
            assert torch.allclose(each.grad, grads[name], rtol=1e-3, atol=1e-5), name


def test_dora_over_slices_trains_the_slices_only(phi3):
    model = randomize(philora.get_peft_model(phi3(), lora(use_dora=True, target_modules=["k_proj"]))).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    grad = layer.lora_B["default"].weight.grad
    assert grad[32:48].any()
    assert not grad[:32].any()
    assert not grad[48:].any()


def test_several_adapters_disable_and_mixed_batches(phi3):
    model = philora.get_peft_model(phi3(), lora(target_modules="all-linear"))
    model.add_adapter("other", lora(target_modules="all-linear", r=2))
    philora.optimize(model)
    randomize(model)
    model.eval()
    base = phi3()
    with torch.no_grad():
        default = model(input_ids=tokens()).logits
        model.set_adapter("other")
        other = model(input_ids=tokens()).logits
        assert distance(default, other) > 1e-3
        with model.disable_adapter():
            assert distance(model(input_ids=tokens()).logits, base(input_ids=tokens()).logits) < LOGITS_FP32
        mixed = model(input_ids=tokens(), adapter_names=["default", "other"]).logits
    assert distance(mixed[0], default[0]) < LOGITS_FP32
    assert distance(mixed[1], other[1]) < LOGITS_FP32


def test_optimize_is_idempotent_and_leaves_plain_models_alone(phi3):
    plain = phi3()
    assert philora.optimize(plain) is plain
    model = peft.get_peft_model(phi3(), lora(target_modules="all-linear"))
    philora.optimize(philora.optimize(model))
    assert sum(isinstance(each, FastLinear) for each in model.modules()) == 8


def test_other_peft_methods_pass_through(phi3):
    model = philora.get_peft_model(
        phi3(), peft.IA3Config(target_modules=["qkv_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    assert model.peft_config["default"].peft_type == "IA3"


# --------------------------------------------------------------------------------------------- loading, coverage


def test_loading_reports_every_tensor_that_does_not_fit(phi3, tmp_path):
    from safetensors.torch import load_file, save_file

    philora.get_peft_model(phi3(), lora(target_modules=["qkv_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][:-1].contiguous()
    tensors["base_model.model.extra.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, path)
    base = phi3()
    with pytest.raises((AdapterError, RuntimeError)) as caught:
        philora.load_adapter(base, tmp_path)
    assert isinstance(caught.value, AdapterError), caught.value
    text = str(caught.value)
    assert re.search(rf"missing='{re.escape(names[0])}'", text)
    assert "unexpected='base_model.model.extra.lora_A.weight'" in text
    assert f"{names[1]}=" in text
    assert not any("lora" in name for name, _ in base.named_modules()), "half-loaded"


def test_a_torn_adapter_is_refused(phi3, tmp_path):
    philora.get_peft_model(phi3(), lora(target_modules=["qkv_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: content=.* - expected a complete safetensors"):
        philora.load_adapter(phi3(), tmp_path)
    path.unlink()
    with pytest.raises(AdapterError, match=r"file='adapter_model.safetensors' - expected this file"):
        philora.load_adapter(phi3(), tmp_path)


def test_an_adapter_of_another_model_is_refused(phi3, tmp_path):
    philora.get_peft_model(phi3(), lora(target_modules=["qkv_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"expected the shape"):
        philora.load_adapter(phi3(hidden_size=48, num_attention_heads=6), tmp_path)


def test_coverage_is_a_table(phi3):
    model = philora.get_peft_model(phi3(), lora(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"]))
    table = philora.coverage(model)
    rows = {(row.module, row.slice): row for row in table.rows}
    assert rows[("model.layers.*.self_attn.qkv_proj", "q_proj")].parameters == 2 * 4 * (32 + 32)
    assert rows[("model.layers.*.self_attn.o_proj", "")].parameters == 2 * 4 * (32 + 32)
    assert table.trainable_parameters == 2 * 2 * 4 * 64 + 97 * 32
    text = str(table)
    assert "fully trained" in text
    assert re.search(r"model\.layers\.\*\.mlp\.gate_up_proj +not adapted", text)


@pytest.mark.parametrize("targets", [SPLIT, ["qkv_proj", "down_proj"]])
def test_update_norms_are_those_of_the_updates(phi3, targets):
    model = randomize(philora.get_peft_model(phi3(), lora(target_modules=targets)))
    norms = {(each.module, each.slice): each for each in update_norms(model)}
    assert len(norms) == 2 * len(targets), "two layers"
    for name, layer in lora_layers(model).items():
        delta = layer.get_delta_weight("default")
        parts = [(each.name, slice(each.row_start, each.row_stop)) for each in layer.slices.get("default", ())]
        for title, rows in parts or [("", slice(None))]:
            found = norms[name, title]
            # fp32: a sum over r x r products against one over out x in.
            assert found.norm == pytest.approx(float(delta[rows].detach().norm()), rel=1e-4)
            assert found.relative == pytest.approx(
                found.norm / float(layer.base_layer.weight[rows].detach().norm()), rel=1e-4
            )
