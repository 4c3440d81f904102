"""What is given as a base: one that holds an adapter, an adapter, code from elsewhere, tokens without rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import philora
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.errors import ModelError
from philora.exporting.vocabulary import vocabulary
from philora.families import NOT_IN_TRANSFORMERS
from philora.generation.inference import load
from philora.models.loading import load_model, load_skeleton, load_tokenizer, local_path, set_padding, stop_token_ids
from philora.models.spare_rows import notice, untrained_tokens
from philora.training.readiness import preflight

PAGE = Path(__file__).parents[3] / "docs" / "family.md"


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(local_path("nano"), tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    model = philora.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def settings_of(model: Path, out: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(model)},
        "data": {"train": {"path": "helpdesk", "limit": 8}},
        "training_config": {"output_dir": str(out), "max_length": 128, "max_steps": 1},
        "peft_config": {"r": 2, "target_modules": ["o_proj"]},
    }


# What takes a base, each with an adapter where it wants one.
TAKES_A_BASE = {
    "train": lambda base, adapter, out: philora.train(settings_of(base, out)),
    "check": lambda base, adapter, out: preflight(settings_of(base, out)),
    "chat, generate, serve, evaluate": lambda base, adapter, out: load(adapter, base=str(base)),
    "merge": lambda base, adapter, out: philora.merge_to_folder(adapter, out, base=str(base)),
    "export": lambda base, adapter, out: philora.export(adapter, out, base=str(base)),
    "gguf": lambda base, adapter, out: philora.export(adapter, out, format="gguf", base=str(base)),
    "SFTTrainer": lambda base, adapter, out: philora.SFTTrainer(
        str(base),
        philora.SFTConfig(str(out)),
        train_dataset=Dataset.from_dict({"text": ["a"]}),
        peft_config=LoraConfig(target_modules=["o_proj"]),
    ),
}


@pytest.mark.parametrize("command", TAKES_A_BASE)
@pytest.mark.parametrize("kind", ["holds an adapter", "is an adapter", "is a run"])
def test_a_base_that_holds_or_is_an_adapter_is_refused_by_name(kind, command, base, adapter, tmp_path):
    given, expected = base, "a base model without an adapter"
    if kind == "holds an adapter":
        for path in adapter.iterdir():
            shutil.copy(path, base)
    elif kind == "is an adapter":
        given, expected = Path(shutil.copytree(adapter, tmp_path / "given")), f"this is an adapter. Its base is {base}"
    else:
        shutil.copytree(adapter, tmp_path / "run" / "adapter")
        given, expected = tmp_path / "run", "this is the run of an adapter"
    with pytest.raises(ModelError, match=expected) as caught:
        TAKES_A_BASE[command](given, adapter, tmp_path / "out")
    assert str(given)[:30] in str(caught.value)  # a long path is shortened in the middle
    assert not (tmp_path / "out").exists()


# -- Phi models whose code is on the Hub, with the words of their config.json

_ROPE = {"type": "su", "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}
_LONG = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "hidden_size": 48}
ELSEWHERE = {
    "phi3_v": {"architectures": ["Phi3VForCausalLM"], "rope_scaling": _ROPE, "img_processor": {}, **_LONG},
    "phi4mm": {"architectures": ["Phi4MMForCausalLM"], "rope_scaling": _ROPE | {"type": "longrope"}, **_LONG},
    "phi3small": {"architectures": ["Phi3SmallForCausalLM"], "max_position_embeddings": 8192},
    "phi4flash": {"architectures": ["Phi4FlashForCausalLM"], "max_position_embeddings": 262144},
}


def with_config(base: Path, config: dict[str, Any]) -> ModelConfig:
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelConfig(name_or_path=str(base))


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_model_whose_code_is_elsewhere_is_refused_by_name(kind, base):
    owner = {"AutoConfig": f"configuration_{kind}.Config", "AutoModelForCausalLM": f"modeling_{kind}.Model"}
    model = with_config(base, {"model_type": kind, "auto_map": owner, **ELSEWHERE[kind]})
    for read in (lambda: load_tokenizer(model, TokenizerConfig()), lambda: load_skeleton(model)):
        with pytest.raises(ModelError, match=f"that of model_type={kind} is only on the Hub") as caught:
            read()
        assert "trust_remote_code" in str(caught.value)
        assert "microsoft/Phi-" in str(caught.value)


def test_every_such_model_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert set(ELSEWHERE) == set(NOT_IN_TRANSFORMERS)
    for name in ("Phi-3-small", "Phi-3-vision", "Phi-4-mini-flash", "phi4mm"):
        assert name in text


@pytest.mark.parametrize(
    "config", [{"model_type": "nothing"}, {}, {"model_type": "phi3", "rope_scaling": _ROPE, **_LONG}]
)
def test_a_config_that_cannot_be_read_is_told(config, base):
    with pytest.raises(ModelError, match="name_or_path"):
        load_skeleton(with_config(base, config))


def test_an_old_name_of_longrope_is_told_from_the_tokenizer_on(base):
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"rope_scaling": _ROPE}
    config.pop("rope_parameters", None)
    model = with_config(base, config)
    with pytest.raises(ModelError, match="`longrope`"):
        load_skeleton(model)


# -- padding of Phi-1.5 and Phi-2, and rows without training


def phi_2_tokenizer() -> PreTrainedTokenizerFast:
    """As theirs: bytes, and one special token, which ends a text."""
    words = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    assert tokenizer.pad_token is None
    return tokenizer


def test_padding_takes_a_spare_row_where_the_vocabulary_has_nothing(tmp_path):
    tokenizer = phi_2_tokenizer()
    size = len(tokenizer)
    with pytest.raises(ModelError, match="pad_token"):
        set_padding(phi_2_tokenizer(), rows=size)  # no row is left
    set_padding(tokenizer, rows=size + 8)
    assert tokenizer.pad_token_id == size
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
    assert untrained_tokens(tokenizer, size + 8) == {}
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    set_padding(again, rows=size + 8)
    assert again.pad_token_id == size


def test_a_folder_of_phi_2_can_be_trained(tmp_path):
    folder = tmp_path / "phi-2"
    tokenizer = phi_2_tokenizer()
    config = AutoConfig.for_model(
        "phi", vocab_size=len(tokenizer) + 16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ModelConfig(name_or_path=str(folder), dtype="float32")
    loaded = load_tokenizer(model, TokenizerConfig())
    assert loaded.pad_token == "<|pad|>"
    assert load_model(model, loaded).generation_config.pad_token_id == loaded.pad_token_id < config.vocab_size


def with_rows(base: Path, tokens: list[str], rows: int, spare: str) -> Path:
    """The base with further tokens, and an embedding of some more rows: zero, alike, or each its own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(size + rows, mean_resizing=False)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            new = weight[size:]
            new.copy_(
                {"zero": torch.zeros_like(new), "alike": new[:1].expand_as(new), "own": torch.randn_like(new)}[spare]
            )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize(("spare", "told"), [("zero", True), ("alike", True), ("own", False)])
def test_tokens_with_a_spare_row_are_told_before_training(spare, told, base, tmp_path):
    with_rows(base, ["<|tool|>", "<|plan|>"], rows=8, spare=spare)
    settings = settings_of(base, tmp_path / "out")
    notices = [each for each in preflight(settings).notices if "spare row" in each]
    assert bool(notices) == told
    if told:
        assert "<|tool|>, <|plan|>" in notices[0]
        ids = [4096, 4097]
        assert f"trainable_token_indices: {{embed_tokens: {ids}}}" in notices[0]
        settings["peft_config"]["trainable_token_indices"] = {"embed_tokens": ids}
        assert not [each for each in preflight(settings).notices if "spare row" in each]


def test_the_same_is_told_by_a_run(base, tmp_path, caplog):
    with_rows(base, ["<|tool|>"], rows=8, spare="zero")
    philora.train(settings_of(base, tmp_path / "out"))
    assert "1 tokens of the tokenizer have a spare row" in caplog.text


def test_tokens_beyond_the_embedding_are_told_and_an_export_says_how_to_mend_it(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    notices = preflight(settings_of(base, tmp_path / "out")).notices
    assert any("1 tokens beyond the 4,096 rows" in each and "<|tool|>" in each for each in notices)
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        vocabulary(tokenizer, 4096, [])


def test_the_spare_rows_of_phi_3_are_known():
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    config = AutoConfig.for_model("phi3", vocab_size=32064)
    assert untrained_tokens(tokenizer, 32064, config) == {}
    tokenizer.add_tokens([f"<{index}>" for index in range(32011 - len(tokenizer))] + ["<|tool|>"], special_tokens=True)
    found = untrained_tokens(tokenizer, 32064, config)
    assert found == {"<|tool|>": 32011}
    assert notice(found, 32064, {"target_modules": ["o_proj"]})
    for trained in ({"trainable_token_indices": [32011]}, {"modules_to_save": ["embed_tokens"]}):
        assert notice(found, 32064, trained) is None
