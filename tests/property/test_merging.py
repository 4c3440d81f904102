"""Merging is the identity on the function that base and adapter compute, whatever the shapes, ranks and slices."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import philora
from philora.adapters.fast_layers import FastLinear
from philora.errors import AdapterError
from philora.exporting.merged_folder import merge_to_folder
from philora.exporting.merging import merge_layer
from philora.models.verify import ROUNDED_ONCE, logits_of, probe

MODULES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model_of(heads: int, key_value_heads: int, size: int, wide: int, tied: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(heads + size + wide)
    config = Phi3Config(
        vocab_size=67, hidden_size=heads * size, intermediate_size=wide, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, max_position_embeddings=128,
        original_max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim == 2 else 1  # logits far from uniform, so that a fault shows
    return model.to(dtype).eval()


@st.composite
def adapted(draw: st.DrawFn) -> tuple[Any, Any, torch.dtype]:
    """A base, the same with an adapter that has values, and the base's dtype."""
    heads = draw(st.sampled_from([2, 4]))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (heads, draw(st.sampled_from([1, 2])), draw(st.sampled_from([8, 12])), draw(st.integers(3, 40)))
    base = model_of(*shape, draw(st.booleans()), dtype)
    fused = draw(st.booleans())
    targets = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"] if fused else MODULES
    config = LoraConfig(
        r=draw(st.integers(1, 5)),
        lora_alpha=draw(st.sampled_from([1, 3, 8])),
        use_rslora=draw(st.booleans()),
        use_dora=draw(st.booleans()),
        target_modules=draw(st.sets(st.sampled_from([*targets, "lm_head", "embed_tokens"]), min_size=1)),
        task_type="CAUSAL_LM",
    )
    model = philora.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=draw(st.booleans())).eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    for layer in model.modules():
        for name, slices in layer.slices.items() if isinstance(layer, FastLinear) else ():
            inside = torch.zeros_like(layer.lora_B[name].weight)
            for part in slices:
                inside[part.row_start : part.row_stop, part.rank_start : part.rank_stop] = 1
            layer.lora_B[name].weight.data *= inside
    return base, model, dtype


@settings(max_examples=40, deadline=None)
@given(adapted())
def test_merging_keeps_the_function(case: tuple[Any, Any, torch.dtype]) -> None:
    base, model, dtype = case
    tokens = probe(67)
    plain, expected = logits_of(base, tokens), logits_of(model, tokens)
    merged = philora.merge(model)
    norm = expected.norm()
    assert {each.dtype for each in merged.parameters()} == {dtype}
    # The bounds of the verification are for deep models; fp32 in one layer is a few ulp (2^-24).
    bound = 1e-5 if dtype == torch.float32 else ROUNDED_ONCE[dtype]
    assert (logits_of(merged, tokens) - expected).norm() <= bound * norm
    assert (plain - expected).norm() > 0


@settings(max_examples=20, deadline=None)
@given(adapted())
def test_injecting_and_unloading_gives_the_base_bit_for_bit(case: tuple[Any, Any, torch.dtype]) -> None:
    base, model, _ = case
    unloaded = model.unload()
    assert not any(isinstance(each, BaseTunerLayer) for each in unloaded.modules())
    before, after = base.state_dict(), unloaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(each, after[name]) for name, each in before.items())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([torch.bfloat16, torch.float32]), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_a_merged_weight_is_within_half_an_ulp(
    rows: int, columns: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, embedding: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows)).to(dtype)
    base = model[0].weight.detach().double()
    model = peft.get_peft_model(model, LoraConfig(r=r, lora_alpha=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(adapter_dtype)
    pair = (layer.lora_embedding_B, layer.lora_embedding_A) if embedding else (layer.lora_B, layer.lora_A)
    up, down = (getattr(each["default"], "weight", each["default"]).detach().double() for each in pair)
    update = up @ down * (3 / r)
    exact = base + (update.T if embedding else update)
    merge_layer(layer, "0")
    merged = layer.base_layer.weight.detach().double()
    smallest = 2.0**-126 if dtype == torch.bfloat16 else 2.0**-14
    spacing = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=smallest)))
    # What fp32 loses before the one rounding: r + 2 operations on values of the size of those that take part.
    size = base.abs() + (up.abs() @ down.abs() * 3 / r).T if embedding else base.abs() + up.abs() @ down.abs() * 3 / r
    assert ((merged - exact).abs() <= spacing / 2 + (r + 2) * 2.0**-24 * size).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Folders of a base and an adapter, and the tensors of the merged model."""
    folder = tmp_path_factory.mktemp("saved")
    base = model_of(4, 2, 8, 24, True, torch.bfloat16)
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    model = philora.get_peft_model(base, config)
    for layer in model.modules():
        if isinstance(layer, FastLinear):
            weight = layer.lora_B["default"].weight
            weight.data[:20, :2] = torch.randn(20, 2) * 0.1
    model.save_pretrained(folder / "adapter")
    return folder, philora.merge(model).state_dict()


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.integers(1, 40_000), st.sampled_from(["1KB", "7KB", "2GB"])))
def test_the_size_of_shards_changes_no_tensor(saved: tuple[Path, dict[str, torch.Tensor]], size: int | str) -> None:
    folder, expected = saved
    with tempfile.TemporaryDirectory() as out:
        result = merge_to_folder(folder / "adapter", out, base=str(folder / "base"), max_shard_size=size, verify=False)
        files = sorted(Path(out).glob("*.safetensors"))
        tensors: dict[str, torch.Tensor] = {}
        for path in files:
            part = load_file(path)
            assert part
            assert not tensors.keys() & part.keys()
            tensors |= {name: each.clone() for name, each in part.items()}
    assert result.shards == len(files)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(each, tensors[name]) for name, each in expected.items())


@settings(max_examples=10, deadline=None)
@given(adapted())
def test_a_planted_fault_is_seen(case: tuple[Any, Any, torch.dtype]) -> None:
    """The negative control: a merge that adds nothing."""
    base, model, dtype = case
    tokens = probe(67)
    plain, expected = logits_of(base, tokens), logits_of(model, tokens)
    effect = float((plain - expected).norm() / expected.norm())
    for layer in model.modules():
        if hasattr(layer, "merge"):
            layer.merge = lambda *args, **kwargs: None
    assume(effect > 2 * ROUNDED_ONCE[dtype])
    with pytest.raises(AdapterError, match=r"merge: difference="):
        philora.merge(model)
