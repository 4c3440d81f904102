"""An adapter goes into every layout and back, and what does not fit is refused whole."""

from __future__ import annotations

import json

import loralib
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import philora
from philora import lora
from philora.errors import AdapterError, ConfigError
from philora.exporting.adapter import Adapter, Update, as_fused, as_slices, for_server
from philora.exporting.conversion import export, read_adapter, restored
from philora.models.locate import find_adapter
from philora.models.verify import logits_of, probe
from tests.tolerances import LOGITS_FP32

ALL_SLICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings(**changes):
    values = {"r": 4, "lora_alpha": 6, "target_modules": ALL_SLICES, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(values | changes))


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for layer in philora.adapters.slices.lora_layers(model).values():
        for each in getattr(layer, "slices", {}).get("default", ()):
            outside = torch.ones(layer.out_features, dtype=torch.bool)
            outside[each.row_start : each.row_stop] = False
            layer.lora_B["default"].weight.data[outside, each.rank_start : each.rank_stop] = 0
    return model


@pytest.fixture
def base(phi3, tmp_path):
    phi3().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base, tmp_path):
    """Saves an adapter of the base with random values; returns its folder."""

    def save(name="adapter", **changes):
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = randomize(philora.get_peft_model(model, settings(**changes)))
        for parameter_name, parameter in adapted.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.data.mul_(1.1)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def logits_by_peft(base, folder):
    """What plain PEFT computes with a folder."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return logits_of(model, probe(97))


def assert_same(got, want, bound=LOGITS_FP32):
    """Relative to the largest logit."""
    assert (got - want).abs().max() <= bound * want.abs().max()


CASES = {
    "slices": {},
    "some slices": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "fused": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["qkv_proj", "o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 7, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"qkv_proj": 11},
    },
    "embedding": {"target_modules": ["embed_tokens", "qkv_proj"]},
    "whole head": {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["server", "fused", "slices"])
def test_every_layout_of_peft_computes_the_same(case, layout, base, saved, tmp_path):
    folder = saved(**CASES[case])
    if layout == "server" and case in ("embedding", "whole head"):
        with pytest.raises(AdapterError, match=r"layout server='.*' - expected updates of linear layers only. Merge"):
            export(folder, tmp_path / "out", layout=layout)
        assert not (tmp_path / "out").exists()
        return
    result = export(folder, tmp_path / "out", layout=layout)
    assert result.agreement.relative < 1e-5 < 1e-2 < result.agreement.effect
    # With a scaling that is no power of two, each element of B is rounded once more.
    bound = 1e-4 if case == "rslora" else LOGITS_FP32
    assert_same(logits_by_peft(base, tmp_path / "out"), logits_by_peft(base, folder), bound)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if layout == "server":
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert config["lora_alpha"] == config["r"]
        ranks = {each.shape[0] for name, each in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
                 if "lora_A" in name}  # fmt: skip
        assert ranks == {config["r"]}
    record = json.loads((tmp_path / "out" / "philora.json").read_text())["slices"]
    assert bool(record) == (layout == "slices")


@pytest.mark.parametrize("case", CASES)
def test_loralib_and_back(case, base, saved, tmp_path):
    folder = saved(**CASES[case])
    export(folder, tmp_path / "loralib", format="loralib")
    layout = "slices" if "slices" in case or case == "rslora" else "fused"
    export(tmp_path / "loralib" / "lora.pt", tmp_path / "back", layout=layout, base=str(base))
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    kept = {name: each for name, each in before.items() if "base_layer" not in name}
    assert kept.keys() == after.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(after[name], tensor, atol=0, rtol=0)
    assert_same(logits_by_peft(base, tmp_path / "back"), logits_by_peft(base, folder))


def test_the_loralib_file_is_one_that_loralib_reads(base, saved, tmp_path):
    """Fused modules as loralib.Linear, in a model where loralib's own layers stand."""
    folder = saved(target_modules=["qkv_proj", "down_proj"])
    export(folder, tmp_path / "out", format="loralib")
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = json.loads((tmp_path / "out" / "lora.json").read_text())["layers"]
    for name, arguments in layers.items():
        plain = model.get_submodule(name)
        layer = loralib.Linear(plain.in_features, plain.out_features, bias=False, **arguments)
        layer.weight.data = plain.weight.data
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    missing = model.load_state_dict(torch.load(tmp_path / "out" / "lora.pt", weights_only=True), strict=False)
    assert not missing.unexpected_keys
    assert not any("lora_" in name for name in missing.missing_keys)
    with torch.no_grad():
        got = model(input_ids=probe(97), use_cache=False).logits
    assert_same(got, logits_by_peft(base, folder))


def test_the_loralib_readme_runs(base, saved, tmp_path, monkeypatch):
    export(saved(), tmp_path / "out", format="loralib")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    scope = {}
    exec(code, scope)
    assert_same(logits_of(scope["model"], probe(97)), logits_by_peft(base, tmp_path / "adapter"))


def test_slices_to_fused_and_back_are_the_same_tensors(base, saved, tmp_path):
    folder = saved()
    export(folder, tmp_path / "fused", layout="fused")
    export(tmp_path / "fused", tmp_path / "back", layout="slices")
    before, after = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    records = [json.loads((each / "philora.json").read_text()) for each in (folder, tmp_path / "back")]
    assert records[0] == records[1]


def test_bfloat16_adapters_stay_bfloat16(base, saved, tmp_path):
    folder = saved(lora_alpha=8)
    file = folder / "adapter_model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(file).items()}, file, {"format": "pt"})
    export(folder, tmp_path / "out")
    assert {each.dtype for each in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_gpt2_has_its_weights_transposed(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=97, n_positions=64))
    model.save_pretrained(tmp_path / "base")
    adapted = randomize(philora.get_peft_model(model, settings(target_modules=["c_attn", "c_fc"])))
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "lib", format="loralib", base=str(tmp_path / "base"))
    result = export(tmp_path / "lib" / "lora.pt", tmp_path / "back", layout="fused", base=str(tmp_path / "base"))
    assert result.agreement.effect > 1e-2
    assert_same(
        logits_by_peft(tmp_path / "base", tmp_path / "back"), logits_by_peft(tmp_path / "base", tmp_path / "adapter")
    )


def test_an_old_loralib_file_without_its_layers_file(phi3, base, tmp_path):
    """MergedLinear of a part of the slices: their rows tell which ones."""
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = {
        "model.layers.0.self_attn.qkv_proj": {
            "r": 2,
            "lora_alpha": 4,
            "enable_lora": [True, False, False],
            "slices": [32, 16, 16],
        },
        "model.layers.1.mlp.down_proj": {"r": 3, "lora_alpha": 4},
    }
    lora.replace_layers(model, layers)
    randomize_layers(model)
    torch.save(lora.lora_state_dict(model), tmp_path / "old.pt")
    want = logits_of(model, probe(97))
    with pytest.raises(ConfigError, match=r"lora_alpha=None - expected the lora_alpha of the layers"):
        export(tmp_path / "old.pt", tmp_path / "out", base=str(base))
    export(tmp_path / "old.pt", tmp_path / "out", layout="slices", base=str(base), lora_alpha=4)
    assert_same(logits_by_peft(base, tmp_path / "out"), want)


def randomize_layers(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.copy_(torch.randn(each.shape, generator=generator) * 0.3)


def test_shapes_that_do_not_tell_the_slices(base, tmp_path):
    """k and v have 16 rows each: nothing says which of them a B of 16 rows is."""
    name = "model.layers.0.self_attn.qkv_proj"
    torch.save({f"{name}.lora_A": torch.ones(4, 32), f"{name}.lora_B": torch.ones(48, 2)}, tmp_path / "old.pt")
    expected = r"expected shapes that tell which slices are adapted. Write old.json beside it with enable_lora"
    with pytest.raises(AdapterError, match=expected):
        export(tmp_path / "old.pt", tmp_path / "out", base=str(base), lora_alpha=4)


def test_every_fault_of_a_loralib_file_at_once(base, saved, tmp_path):
    export(saved(), tmp_path / "lib", format="loralib")
    file = tmp_path / "lib" / "lora.pt"
    state = torch.load(file, weights_only=True)
    del state["model.layers.0.mlp.down_proj.lora_B"]
    state["model.layers.1.mlp.down_proj.lora_A"] = torch.ones(4, 5)
    state["model.layers.7.mlp.down_proj.lora_A"] = torch.ones(4, 5)
    torch.save(state, file)
    with pytest.raises(AdapterError) as raised:
        export(file, tmp_path / "out", base=str(base))
    text = str(raised.value)
    assert "3 faults" in text
    assert "model.layers.0.mlp.down_proj.lora_B='missing' - expected a tensor of shape (32, 4)" in text
    assert "model.layers.1.mlp.down_proj.lora_A=(4, 5) - expected shape (4, 48)" in text
    assert "model.layers.7.mlp.down_proj.lora_A='unexpected' - expected a tensor of the base" in text
    assert not (tmp_path / "out").exists()


def test_layers_files_that_are_wrong(base, saved, tmp_path):
    export(saved(), tmp_path / "lib", format="loralib")
    layers = tmp_path / "lib" / "lora.json"
    content = json.loads(layers.read_text())
    for text, message in (
        ("{", r"lora.json: content='JSONDecodeError.* - expected JSON with the arguments of every LoRA layer"),
        ('{"layers": 3}', r"content=.AttributeError.* - expected JSON with the arguments"),
        (
            json.dumps({"layers": {**content["layers"], "model.layers.9.mlp.down_proj": {"r": 2}}}),
            r"model.layers.9.mlp.down_proj='no such module' - expected a module of the base. Did you mean 'model.l",
        ),
        (
            json.dumps({"layers": {**content["layers"], "model.norm": {"r": 2}}}),
            r"model.norm: .*a Phi3RMSNorm is neither a linear layer nor an embedding",
        ),
        (
            json.dumps({"layers": {**content["layers"], "model.layers.0.mlp.down_proj": {"r": -2}}}),
            r"model.layers.0.mlp.down_proj: .*r=-2 - expected a whole number",
        ),
    ):
        layers.write_text(text)
        with pytest.raises(AdapterError, match=message):
            export(tmp_path / "lib" / "lora.pt", tmp_path / "out", base=str(base))


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_files_that_are_torn_or_run_code_are_refused(base, saved, tmp_path, capsys):
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"a.lora_A": Evil()}, tmp_path / "code.pt")
    for name in ("torn.pt", "code.pt"):
        with pytest.raises(AdapterError, match=r"content=.* - expected a complete file of tensors"):
            export(tmp_path / name, tmp_path / "out", base=str(base), lora_alpha=1)
    folder = saved()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: content=.* - expected a complete safetensors"):
        export(folder, tmp_path / "out")
    assert "this ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True, "target_modules": ["down_proj"]}, r"use_dora=True - expected plain LoRA.* Merge it"),
        ({"lora_bias": True, "target_modules": ["down_proj"]}, r"lora_bias=True - expected plain LoRA"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["down_proj"]},
            r"init_lora_weights='pissa' - expected an initialisation that leaves the base as it is. Convert",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, message, saved, tmp_path):
    folder = saved(**changes)
    with pytest.raises(AdapterError, match=message):
        export(folder, tmp_path / "out", format="loralib")
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked(saved, tmp_path):
    folder = saved()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError) as raised:
        export(folder, tmp_path / "full", layout="sever")
    text = str(raised.value)
    with pytest.raises(
        ConfigError, match=r"format='pefd' - expected one of peft, loralib, gguf, ollama. Did you mean 'p"
    ):
        export(folder, tmp_path / "out", format="pefd")
    assert "layout='sever' - expected one of server, fused, slices. Did you mean 'server'?" in text
    assert "expected a new or empty folder. Give another." in text
    with pytest.raises(AdapterError, match=r"source='.*nothing' - expected a run folder, an adapter folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"expected a run folder, or a folder with adapter_config.json. Train one"):
        export(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "x.pt").touch()
    with pytest.raises(AdapterError, match=r"base=None - expected the base model, which the adapter does not name"):
        export(tmp_path / "x.pt", tmp_path / "out")


@pytest.mark.parametrize("fault", ["scaling", "block", "swapped rows"])
def test_a_wrong_conversion_is_caught_and_nothing_written(fault, saved, tmp_path, monkeypatch):
    def wrong(adapter, model):
        right = for_server(adapter, model)
        name = next(iter(right.updates))
        update = right.updates[name]
        up = update.lora_B.clone()
        if fault == "scaling":
            up *= 1.01
        elif fault == "block":
            up[:4, :4] = 0
        else:
            up = up.flip(0)
        return Adapter({**right.updates, name: Update(update.lora_A, up, 1.0)}, right.whole, right.config)

    monkeypatch.setattr("philora.exporting.conversion.for_server", wrong)
    with pytest.raises(AdapterError, match=r"self_attn.* - expected an update that differs by at most 1e-06"):
        export(saved(), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_logits_are_compared_too(saved, tmp_path, monkeypatch):
    """With updates that look right but are applied wrongly."""
    monkeypatch.setattr("philora.exporting.conversion.check_updates", lambda *_: None)

    def wrong(adapter, model):
        right = for_server(adapter, model)
        updates = {n: Update(each.lora_A, each.lora_B * 1.01, 1.0) for n, each in right.updates.items()}
        return Adapter(updates, right.whole, right.config)

    monkeypatch.setattr("philora.exporting.conversion.for_server", wrong)
    with pytest.raises(AdapterError, match=r"export to peft: difference=.* - expected at most 0.0001 relative"):
        export(saved(), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_trained_further_by_peft_is_read_as_fused(base, saved, tmp_path, caplog):
    folder = saved(target_modules=["q_proj", "v_proj"])
    (folder / "philora.json").unlink()
    file = folder / "adapter_model.safetensors"
    filled = {name: each + 0.01 if "lora_B" in name else each for name, each in load_file(file).items()}
    save_file(filled, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base)
    with restored(model):
        adapter = read_adapter(model, find_adapter(folder))[1]
    assert all(not each.slices for each in adapter.updates.values())
    export(folder, tmp_path / "out", layout="slices")
    assert_same(logits_by_peft(base, tmp_path / "out"), logits_by_peft(base, folder))


def test_the_base_is_as_before(base, saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    kinds = {name: type(each) for name, each in model.named_modules()}
    folder = saved(target_modules=["qkv_proj"], modules_to_save=["lm_head"])
    export(folder, tmp_path / "lib", format="loralib")
    for source in (folder, tmp_path / "lib" / "lora.pt"):
        with restored(model):
            read_adapter(model, find_adapter(source))
        assert {name: type(each) for name, each in model.named_modules()} == kinds
        assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
        assert [name for name, each in model.named_parameters() if each.requires_grad] == ["lm_head.weight"]
        assert not hasattr(model, "peft_config")


def test_replace_layers_reports_every_fault_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Embedding(5, 4))
    with pytest.raises(ConfigError) as raised:
        lora.replace_layers(model, {"0": {"r": -1}, "1": {"r": 2}, "7": {"r": 2}, "2": {"rank": 3}})
    assert "4 faults" in str(raised.value)
    assert type(model[0]) is nn.Linear
    before = lora.replace_layers(model, {"0": {"r": 2, "lora_dropout": 0.5}, "2": {"r": 2}})
    assert (type(model[0]), type(model[2])) == (lora.Linear, lora.Embedding)
    assert model[0].weight is before["0"].weight
    assert not model[0].weight.requires_grad
    assert model[0].lora_A.abs().sum() > 0


def test_layouts_are_pure():
    weight = Update(torch.ones(2, 3), torch.ones(4, 2), 0.5)
    adapter = Adapter({"a": weight, "b": Update(torch.ones(3, 3), torch.ones(4, 3), 2.0)})
    model = nn.Module()
    served = for_server(adapter, model)
    assert {each.rank for each in served.updates.values()} == {3}
    for name, each in served.updates.items():
        torch.testing.assert_close(each.delta(), adapter.updates[name].delta(), atol=0, rtol=0)
    assert as_fused(adapter, model).updates["a"] == weight
    assert as_slices(adapter, model).updates["a"] is weight
