"""An adapter is more than LoRA tensors: whole embeddings and modules go along everywhere, or are refused by name.

The oracle is plain PEFT on a base of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import philora
from philora.adapters.embeddings import OwnEmbedding
from philora.errors import AdapterError
from philora.generation.conversation import load_pool
from philora.generation.inference import load
from philora.models.loading import local_path
from tests.tolerances import LOGITS_FP32

TOKENS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "tied"])
def base(request, tmp_path_factory) -> Path:
    """A base folder with the bundled tokenizer."""
    from tests.conftest import make_phi3

    folder = tmp_path_factory.mktemp("bases") / ("tied" if request.param else "separate")
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    make_phi3(
        vocab_size=len(tokenizer), tie_word_embeddings=request.param, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def of_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def of_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(of_base(base), str(adapter)))


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (mine - theirs).abs().max() <= LOGITS_FP32 * theirs.abs().max()


def make_adapter(folder: Path, base: Path, *, whole: bool = True, **config: Any) -> Path:
    """An adapter whose file also holds embeddings that differ from the base's."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        of_base(base), LoraConfig(**({"r": 2, "target_modules": ["qkv_proj"], "task_type": "CAUSAL_LM"} | config))
    )
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.normal_(std=0.2)
        if whole:
            for each in (model.get_input_embeddings(), model.get_output_embeddings()):
                each.weight[:] += 0.3 * torch.randn(each.weight.shape)
                if model.config.tie_word_embeddings:
                    break
    model.save_pretrained(folder, save_embedding_layers=whole)
    return folder


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    folder = make_adapter(tmp_path / "adapter", base)
    assert any("embed_tokens" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert (of_peft(base, folder) - logits(of_base(base))).abs().max() > 0.1, "a fault would show"
    return folder


def test_the_base_stays_what_it_is(base, adapter):
    model = philora.load_adapter(of_base(base), adapter)
    assert_same(logits(model), of_peft(base, adapter))
    with model.disable_adapter():
        assert_same(logits(model), logits(of_base(base)))
    assert_same(logits(model), of_peft(base, adapter))
    assert not any(each.requires_grad for name, each in model.named_parameters() if "lora_" not in name)


def test_a_file_with_one_of_two_tied_embeddings(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for lost in [name for name in tensors if "lm_head" in name]:
        del tensors[lost]
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    model = philora.load_adapter(of_base(base), adapter)
    assert_same(logits(model), of_peft(base, adapter))


def test_training_goes_on_without_them(base, adapter):
    model = philora.load_adapter(of_base(base), adapter, is_trainable=True)
    with model.disable_adapter():
        pass
    assert {name.rpartition(".lora_")[1] for name, each in model.named_parameters() if each.requires_grad} == {".lora_"}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_it_is_saved_again_as_it_is(base, adapter, tmp_path):
    philora.load_adapter(of_base(base), adapter).save_pretrained(tmp_path / "again")
    assert_same(of_peft(base, tmp_path / "again"), of_peft(base, adapter))


def test_several_adapters_have_embeddings_of_their_own(base, adapter, tmp_path):
    plain = make_adapter(tmp_path / "plain", base, whole=False)
    other = make_adapter(tmp_path / "other", base, r=3)
    folders = {"whole": adapter, "plain": plain, "other": other}
    for order in (["whole", "plain", "other"], ["plain", "other", "whole"]):
        model = of_base(base)
        for name in order:
            model = philora.load_adapter(model, folders[name], name)
        for name in (*order, *reversed(order)):
            model.set_adapter(name)
            assert_same(logits(model), of_peft(base, folders[name]))
        with model.disable_adapter():
            assert_same(logits(model), logits(of_base(base)))


def test_what_is_served_and_evaluated_as_the_base_is_the_base(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "second")
    loaded = load(adapter, base=str(base))
    with loaded.model.disable_adapter():
        assert_same(logits(loaded.model), logits(of_base(base)))
    voices = load_pool({"one": adapter, "two": tmp_path / "second"}, base=str(base))
    with voices.model.disable_adapter():
        assert_same(logits(voices.model), logits(of_base(base)))
    for name in voices.model.peft_config:
        voices.model.set_adapter(name)
        assert_same(logits(voices.model), of_peft(base, adapter))


def test_merges_have_them(base, adapter, tmp_path):
    want = of_peft(base, adapter)
    assert_same(logits(philora.merge(philora.load_adapter(of_base(base), adapter))), want)
    philora.merge_to_folder(adapter, tmp_path / "merged", base=str(base))
    assert_same(logits(of_base(tmp_path / "merged")), want)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == of_base(base).config.tie_word_embeddings


@pytest.mark.parametrize("layout", ["fused", "slices"])
def test_exports_in_pefts_format_have_them(layout, base, adapter, tmp_path):
    philora.export(adapter, tmp_path / "out", layout=layout, base=str(base))
    assert_same(of_peft(base, tmp_path / "out"), of_peft(base, adapter))


def test_exports_in_loralibs_format_have_them(base, adapter, tmp_path):
    philora.export(adapter, tmp_path / "out", format="loralib", base=str(base))
    model = of_base(base)
    philora.lora.replace_layers(model, json.loads((tmp_path / "out" / "lora.json").read_text())["layers"])
    if model.config.tie_word_embeddings:  # the file has both; loaded into one weight it is the same
        assert torch.equal(
            *[torch.load(tmp_path / "out" / "lora.pt")[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
        )
    philora.lora.load_lora(model, tmp_path / "out" / "lora.pt")
    assert_same(logits(model), of_peft(base, adapter))


@pytest.mark.parametrize("arguments", [{"layout": "server"}, {"format": "gguf", "layout": "base+adapter"}])
def test_layouts_without_room_for_them_refuse_them_by_name(arguments, base, adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"model\.embed_tokens\.weight"):
        philora.export(adapter, tmp_path / "out", base=str(base), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_merged_gguf_file_has_them(base, adapter, tmp_path):
    from philora.exporting.gguf_file import GGUFFile

    philora.export(adapter, tmp_path / "out", format="gguf", dtype="f32", base=str(base))
    written = GGUFFile(next((tmp_path / "out").glob("*.gguf"))).tensor("token_embd.weight")
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(written, saved)


@pytest.mark.parametrize("lost", ["embeddings", "one row", "LoRA"])
def test_an_export_that_loses_something_is_not_called_verified(lost, base, adapter, tmp_path, monkeypatch):
    """Planted faults: what is written is not what was given."""
    from philora.exporting import conversion

    write = conversion.write_peft

    def faulty(wanted: Any, model: Any, folder: Path, name: str) -> None:
        write(wanted, model, folder, name)
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in tensors if ("lora_" in key) == (lost == "LoRA")]:
            if lost == "embeddings":
                tensors[key] = of_base(base).get_input_embeddings().weight.detach().clone()
            elif lost == "one row":
                tensors[key][-1] += 1
            else:
                tensors[key] = torch.zeros_like(tensors[key])
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    monkeypatch.setattr(conversion, "write_peft", faulty)
    with pytest.raises(AdapterError):
        philora.export(adapter, tmp_path / "out", layout="fused", base=str(base))
    assert not (tmp_path / "out").exists()


def test_modules_to_save_go_along_too(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base, whole=False, modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 0.3
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    want = of_peft(base, adapter)
    model = philora.load_adapter(of_base(base), adapter)
    assert_same(logits(model), want)
    with model.disable_adapter():
        assert_same(logits(model), logits(of_base(base)))
    philora.export(adapter, tmp_path / "fused", layout="fused", base=str(base))
    assert_same(of_peft(base, tmp_path / "fused"), want)
    philora.merge_to_folder(adapter, tmp_path / "merged", base=str(base))
    assert_same(logits(of_base(tmp_path / "merged")), want)


def test_embeddings_that_are_the_bases_are_no_part_of_the_adapter(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base, whole=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = of_base(base).get_input_embeddings().weight.detach().clone()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    model = philora.load_adapter(of_base(base), adapter)
    assert not any(isinstance(each, OwnEmbedding) for each in model.modules())
    philora.export(adapter, tmp_path / "out", base=str(base))  # of one rank, as servers want it


def test_a_changed_base_under_lora_is_told_and_not_exported(base, tmp_path, caplog):
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["qkv_proj", "embed_tokens"])
    want = of_peft(base, adapter)
    assert_same(logits(philora.load_adapter(of_base(base), adapter)), want)
    assert "model.embed_tokens" in caplog.text
    assert "They replace the base's" in caplog.text
    with pytest.raises(AdapterError, match=r"model\.embed_tokens"):
        philora.export(adapter, tmp_path / "out", layout="fused", base=str(base))
    plain = make_adapter(tmp_path / "plain", base, whole=False)
    for first, second in ((adapter, plain), (plain, adapter)):
        with pytest.raises(AdapterError, match=r"embeddings=.*another adapter"):
            philora.load_adapter(philora.load_adapter(of_base(base), first), second, "second")
    philora.merge_to_folder(adapter, tmp_path / "merged", base=str(base))
    assert_same(logits(of_base(tmp_path / "merged")), want)


def test_embeddings_of_another_vocabulary_are_refused_by_name(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight.*expected shape"):
        philora.load_adapter(of_base(base), adapter)


@pytest.mark.parametrize("modules", [None, ["classifier"], ["score"]])
def test_an_adapter_for_classification_is_loaded_again(modules, tmp_path):
    folder = tmp_path / "base"
    from tests.conftest import make_phi3

    make_phi3().save_pretrained(folder)

    def classifier() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)

    config = LoraConfig(r=2, target_modules=["qkv_proj"], task_type="SEQ_CLS", modules_to_save=modules)
    model = philora.get_peft_model(classifier(), config)
    with torch.no_grad():
        for _name, each in model.named_parameters():
            if each.requires_grad:
                each.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    again = philora.load_adapter(classifier(), tmp_path / "adapter")
    assert_same(logits(again), logits(model))
    assert_same(logits(again), logits(PeftModel.from_pretrained(classifier(), str(tmp_path / "adapter"))))
