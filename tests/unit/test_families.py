from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from philora import families
from philora.families import FUSED, MODELS, OTHER, STOP_TOKENS, find, find_other, fused_slices, stop_tokens_in


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, philora.families; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_numbers_of_each_model_agree_with_each_other(model: families.PhiModel) -> None:
    assert model.hidden_size == model.num_attention_heads * model.head_dim
    assert model.num_attention_heads % model.num_key_value_heads == 0
    assert set(model.stop_tokens) <= set(STOP_TOKENS)
    assert model.pad_token not in STOP_TOKENS
    assert all(0 < each < model.vocab_size for each in model.stop_token_ids)
    assert model.sources
    assert all(each.startswith("https://") for each in model.sources)
    original = model.original_max_position_embeddings
    if model.rope_type == "longrope":
        assert original == 4096
        assert original < model.max_position_embeddings
    else:
        assert original in (None, model.max_position_embeddings)
    assert all(find(hub_id) is model for hub_id in model.hub_ids)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_slices_are_the_rows_of_transformers_fused_layers(model: families.PhiModel) -> None:
    import torch
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

    config = Phi3Config(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
    )
    with torch.device("meta"):
        rows = {
            "qkv_proj": Phi3Attention(config, 0).qkv_proj.out_features,
            "gate_up_proj": Phi3MLP(config).gate_up_proj.out_features,
        }
    layout = fused_slices(config)
    assert layout == fused_slices(model)
    assert {leaf: max(stop for _, stop in slices.values()) for leaf, slices in layout.items()} == rows
    assert {leaf: tuple(slices) for leaf, slices in layout.items()} == dict(FUSED["phi3"])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_transformers_takes_as_many_factors_as_the_table_says(model: families.PhiModel) -> None:
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from transformers import Phi3Config

    def read(count: int, kind: str = "longrope") -> Phi3Config:
        return Phi3Config(
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            max_position_embeddings=model.max_position_embeddings,
            original_max_position_embeddings=4096,
            partial_rotary_factor=model.partial_rotary_factor,
            rope_scaling={"type": kind, "short_factor": [1.0] * count, "long_factor": [2.0] * count},
        )

    assert (model.rope_factors is not None) == (model.rope_type == "longrope")
    if model.rope_factors is None:
        assert families.longrope_switch_tokens(Phi3Config()) is None
        return
    assert families.longrope_switch_tokens(read(model.rope_factors)) == 4096
    with pytest.raises(KeyError, match="original_max_position_embeddings"):
        read(model.rope_factors, "su")  # were it read, `models` would need no message of its own for it
    with pytest.raises(StrictDataclassClassValidationError, match="must have length"):
        read(model.rope_factors + 1)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_page_has_the_numbers(model: families.PhiModel) -> None:
    """The rows of the two tables in docs/family.md."""
    page = (Path(__file__).parents[2] / "docs" / "family.md").read_text(encoding="utf-8")
    rotated = int(model.head_dim * model.partial_rotary_factor)
    boundary = f"{model.original_max_position_embeddings:,}" if model.rope_type == "longrope" else "-"
    shape = (
        model.name,
        f"{model.num_hidden_layers} x {model.hidden_size:,}",
        f"{model.num_attention_heads} / {model.num_key_value_heads}",
        f"{rotated} of {model.head_dim}" if rotated < model.head_dim else f"{model.head_dim}",
        f"{model.intermediate_size:,}",
        f"{model.vocab_size:,}",
        "tied" if model.tie_word_embeddings else "separate",
    )
    window = (
        model.name,
        f"{model.max_position_embeddings:,}",
        boundary,
        str(model.rope_factors or "-"),
        f"{model.rope_theta:,.0f}",
        f"{model.sliding_window:,}" if model.sliding_window else "-",
        ", ".join(f"`{token}` {number}" for token, number in zip(model.stop_tokens, model.stop_token_ids, strict=True)),
        f"`{model.pad_token}`" if model.pad_token else "not verified",
    )
    for cells in (shape, window):
        row = " | ".join(each.replace("|", r"\|") for each in cells)
        assert f"| {row} |" in page, row


def test_slices_follow_each_other_without_gaps() -> None:
    config = SimpleNamespace(
        model_type="phi3", hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40
    )
    assert fused_slices(config) == {
        "qkv_proj": {"q_proj": (0, 48), "k_proj": (48, 64), "v_proj": (64, 80)},
        "gate_up_proj": {"gate_proj": (0, 40), "up_proj": (40, 80)},
    }


def test_an_explicit_head_size_and_missing_key_value_heads_are_understood() -> None:
    config = SimpleNamespace(
        model_type="phi3",
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=None,
        head_dim=16,
        intermediate_size=40,
    )
    assert fused_slices(config)["qkv_proj"] == {"q_proj": (0, 64), "k_proj": (64, 128), "v_proj": (128, 192)}


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(model_type="llama")])
def test_other_models_have_no_slices(config: object) -> None:
    assert fused_slices(config) == {}


def test_the_stop_tokens_of_a_vocabulary() -> None:
    assert stop_tokens_in({"<|im_end|>": 1, "<|endoftext|>": 2, "x": 3}) == ["<|endoftext|>", "<|im_end|>"]
    assert stop_tokens_in(["</s>"]) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", "Phi-3-mini-4k"),
        ("unsloth/phi-3-mini-4k-instruct", "Phi-3-mini-4k"),
        ("/models/Phi-4-mini-reasoning/", "Phi-4-mini"),
        ("microsoft/phi-2", None),
        ("nano", None),
    ],
)
def test_finding_a_model_by_its_name(name: str, found: str | None) -> None:
    model = find(name)
    assert (model.name if model else None) == found


def test_the_other_architectures() -> None:
    for each in OTHER:
        assert each.note
        assert all(find_other(hub_id) is each for hub_id in each.hub_ids)
        assert all(find_other(model_type) is each for model_type in each.model_types)
        assert all(find(hub_id) is None for hub_id in each.hub_ids)
    assert find_other("phi3") is None
    assert find_other("microsoft/Phi-3-mini-4k-instruct") is None


def test_the_notes_about_transformers_are_true_of_the_installed_version() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    inside = {model_type for each in OTHER for model_type in each.model_types if model_type in CONFIG_MAPPING_NAMES}
    assert inside == {"phi", "phimoe", "phi4_multimodal"}
    for each in OTHER:
        assert ("not in transformers" in each.note) == (not set(each.model_types) & set(CONFIG_MAPPING_NAMES))
