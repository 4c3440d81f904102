"""Adapters that earlier releases wrote still load and compute what they computed; see `tests/golden/make.py`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import loralib
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import philora
from philora import lora
from philora.adapters.fast_layers import FastLinear
from tests.golden import make
from tests.tolerances import LOGITS_FP32

GOLDEN = Path(make.__file__).parent
RELEASES = sorted(each.name for each in GOLDEN.iterdir() if (each / "expected.safetensors").exists())


@pytest.fixture(params=RELEASES)
def release(request):
    return GOLDEN / request.param


def distance(one, other):
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def logits(model, expected):
    return model.eval()(input_ids=expected["tokens"]).logits


def test_this_release_is_among_them():
    assert philora.__version__ in RELEASES, "run python tests/golden/make.py"


@pytest.mark.parametrize("name", ["fused", "slices"])
@pytest.mark.parametrize("load", [philora.load_adapter, PeftModel.from_pretrained])
def test_an_adapter_folder_loads(release, name, load):
    expected = load_file(release / "expected.safetensors")
    model = load(make.base(), str(release / name))
    assert distance(logits(model, expected), expected[f"{name}.logits"]) < LOGITS_FP32
    # Negative controls: the base alone, and one multiplier off by 1%.
    assert distance(logits(make.base(), expected), expected[f"{name}.logits"]) > 1e-2
    model.base_model.model.model.layers[0].self_attn.o_proj.scaling["default"] *= 1.01
    assert distance(logits(model, expected), expected[f"{name}.logits"]) > LOGITS_FP32


def test_slices_are_read(release):
    model = philora.load_adapter(make.base(), release / "slices")
    rows = {
        (row.module.rpartition(".")[2], row.slice, row.r, round(row.scaling, 5)) for row in philora.coverage(model).rows
    }
    half = round(4 / 2**0.5, 5)
    assert rows == {("qkv_proj", "q_proj", 2, half), ("qkv_proj", "v_proj", 2, half), ("o_proj", "", 2, half)} | {
        ("gate_up_proj", "up_proj", 1, 4.0)
    }
    record = json.loads((release / "slices" / "philora.json").read_text())
    assert record["slices"]["model.layers.0.self_attn.qkv_proj"] == {"names": ["q_proj", "v_proj"], "r": 2}
    assert any(isinstance(each, FastLinear) for each in model.modules())


def test_a_file_of_layers_loads(release):
    expected = load_file(release / "expected.safetensors")
    model = make.Layers()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
        assert distance(model(expected["tokens"]), expected["layers.output"]) > 1e-2
        lora.load_lora(model, release / "layers.pt")
        for mode in (True, False):
            assert distance(model.train(mode)(expected["tokens"]), expected["layers.output"]) < LOGITS_FP32
        model.train().head.scaling *= 1.01  # negative control
        assert distance(model(expected["tokens"]), expected["layers.output"]) > LOGITS_FP32


def test_loralib_reads_the_file_of_layers(release):
    """Where loralib has the layer with the same meaning: all but unequal slices."""
    state = torch.load(release / "layers.pt", weights_only=True)
    ours = make.Layers()
    theirs = torch.nn.ModuleDict(
        {
            "embed": loralib.Embedding(13, 8, r=2, lora_alpha=3),
            "conv": loralib.Conv2d(1, 2, 3, r=1, lora_alpha=2, padding=1),
            "head": loralib.Linear(32, 5, r=2, lora_alpha=3),
        }
    )
    kept = {name: value for name, value in ours.state_dict().items() if name.split(".")[0] in theirs}
    theirs.load_state_dict(kept)
    theirs.load_state_dict({name: value for name, value in state.items() if name.split(".")[0] in theirs}, strict=False)
    lora.load_lora(ours, state)
    with torch.no_grad():
        for name, x in (("embed", make.TOKENS), ("conv", torch.ones(1, 1, 4, 5)), ("head", torch.ones(3, 32))):
            assert distance(theirs[name](x), getattr(ours, name)(x)) < LOGITS_FP32


def test_the_script_makes_what_is_stored(tmp_path):
    """The folder of this release is not edited by hand, and the script is still what made it."""
    make.write(tmp_path)
    stored = GOLDEN / philora.__version__
    for path in sorted(each.relative_to(stored) for each in stored.rglob("*") if each.is_file()):
        if path.suffix == ".safetensors":
            new, old = load_file(tmp_path / path), load_file(stored / path)
        elif path.suffix == ".pt":
            new, old = (torch.load(root / path, weights_only=True) for root in (tmp_path, stored))
        else:  # PEFT's releases add keys to the configuration
            continue
        assert new.keys() == old.keys()
        assert all(torch.allclose(new[name], old[name], rtol=1e-5, atol=1e-6) for name in old)


def test_a_release_is_not_written_again():
    with pytest.raises(SystemExit, match=f"{philora.__version__} exists - expected a version that has none yet"):
        runpy.run_path(make.__file__, run_name="__main__")
