"""Inject then remove, save then load: identities over shapes, ranks, dtypes and patterns of slices."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import philora
from philora.adapters.fast_layers import FastLinear

SLICES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Drawn(NamedTuple):
    """A base, by its configuration, seed and dtype, and an adapter of it."""

    base: Phi3Config
    seed: int
    dtype: torch.dtype
    config: LoraConfig
    wide: bool  # whether A and B are fp32 over a base of less

    def model(self) -> Phi3ForCausalLM:
        torch.manual_seed(self.seed)
        return Phi3ForCausalLM(self.base).to(self.dtype).eval()

    def adapted(self) -> PeftModel:
        """With values in every B, inside the slices only."""
        model = philora.get_peft_model(self.model(), self.config, autocast_adapter_dtype=self.wide)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
            for layer in fast_layers(model).values():
                for slices in layer.slices.values():
                    weight = layer.lora_B["default"].weight
                    inside = torch.zeros_like(weight)
                    for each in slices:
                        inside[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = 1
                    weight.mul_(inside)
        return model.eval()


@st.composite
def drawn_adapters(draw: st.DrawFn) -> Drawn:
    heads = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([each for each in (1, 2, 4) if heads % each == 0]))
    base = Phi3Config(
        vocab_size=draw(st.integers(8, 40)),
        hidden_size=heads * draw(st.sampled_from([4, 6, 8])),
        intermediate_size=draw(st.integers(3, 20)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
    )
    targets: list[str] = draw(st.lists(st.sampled_from(["o_proj", "down_proj", "embed_tokens"]), unique=True))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for fused, names in SLICES.items():
        chosen = draw(
            st.one_of(st.just([]), st.just([fused]), st.lists(st.sampled_from(names), min_size=1, unique=True))
        )
        if chosen and draw(st.booleans()):  # slices of one module share a rank and an alpha
            ranks |= dict.fromkeys(chosen, draw(st.integers(1, 5)))
        if chosen and draw(st.booleans()):
            alphas |= dict.fromkeys(chosen, draw(st.sampled_from([1, 3.5, 12])))
        targets += chosen
    if not targets:
        targets = [draw(st.sampled_from([*SLICES, *SLICES["qkv_proj"], *SLICES["gate_up_proj"]]))]
    config = LoraConfig(
        r=draw(st.integers(1, 5)),
        lora_alpha=draw(st.sampled_from([1, 8])),
        use_rslora=draw(st.booleans()),
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Drawn(base, draw(st.integers(0, 1000)), dtype, config, draw(st.booleans()))


def fast_layers(model: Any) -> dict[str, FastLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, FastLinear)}


def slices_of(model: PeftModel) -> dict[str, Any]:
    return {name: each.slices for name, each in fast_layers(model).items() if each.slices}


def tokens(drawn: Drawn) -> Tensor:
    return torch.randint(3, drawn.base.vocab_size, (2, 6), generator=torch.Generator().manual_seed(1))


def logits(model: Any, drawn: Drawn) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(drawn)).logits


def in_fp32(model: PeftModel) -> PeftModel:
    """A copy for controls: bf16 may round what an adapter of one small module changes out of the logits."""
    return copy.deepcopy(model).float()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(
        each.dtype == other[name].dtype and torch.equal(each, other[name]) for name, each in one.items()
    )


@settings(max_examples=40, deadline=None)
@given(drawn_adapters())
def test_inject_then_remove(drawn: Drawn) -> None:
    """The base is bit for bit what it was, while an adapter trains over it and after it was removed."""
    plain = philora.optimize(drawn.model())
    expected = {name: each.clone() for name, each in plain.state_dict().items()}
    answer = logits(plain, drawn)
    model = drawn.adapted()
    wide = in_fp32(model)
    with wide.disable_adapter():
        without = logits(wide, drawn)
    assert not torch.equal(logits(wide, drawn), without), "the adapter changes nothing, so nothing could be left of it"
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(input_ids=tokens(drawn), labels=tokens(drawn)).loss.backward()
    optimizer.step()
    inside = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): each
        for name, each in model.state_dict().items()
        if "lora_" not in name
    }
    assert equal(inside, expected)
    with model.eval().disable_adapter():
        assert torch.equal(logits(model, drawn), answer)
    removed = model.unload()
    assert equal(dict(removed.state_dict()), expected)
    assert {n: type(m) for n, m in removed.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert torch.equal(logits(removed, drawn), answer)
    # Negative control: one bit of one weight is noticed.
    next(iter(removed.parameters())).data.view(-1)[0] += 0.5
    assert not equal(dict(removed.state_dict()), expected)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(drawn_adapters())
def test_save_then_load(drawn: Drawn) -> None:
    """Every tensor, the slices, the multipliers and the logits come back; also when PEFT saved the folder again."""
    model = drawn.adapted()
    tensors, expected = get_peft_model_state_dict(model), logits(model, drawn)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(str(Path(folder, "one")))
        PeftModel.from_pretrained(
            drawn.model(), str(Path(folder, "one")), autocast_adapter_dtype=drawn.wide
        ).save_pretrained(str(Path(folder, "two")))
        assert Path(folder, "one", "philora.json").exists() == bool(slices_of(model))
        assert not Path(folder, "two", "philora.json").exists()
        for name in ("one", "two"):
            again = philora.load_adapter(drawn.model(), Path(folder, name), autocast_adapter_dtype=drawn.wide).eval()
            assert equal(get_peft_model_state_dict(again), tensors)
            assert slices_of(again) == slices_of(model)
            assert {n: e.scaling for n, e in fast_layers(again).items()} == {
                n: e.scaling for n, e in fast_layers(model).items()
            }
            assert torch.equal(logits(again, drawn), expected)
            assert philora.coverage(again) == philora.coverage(model)
    # Negative control: another multiplier is noticed.
    wide = in_fp32(again)
    before = logits(wide, drawn)
    next(iter(fast_layers(wide).values()), wide.get_input_embeddings()).scaling["default"] *= 100
    assert not torch.equal(logits(wide, drawn), before)
