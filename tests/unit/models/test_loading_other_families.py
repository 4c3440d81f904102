"""Other architectures, the generic path: trained, loaded in PEFT, merged, packed; the table in docs/family.md."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer

import philora
from philora.adapters.fast_layers import FastLinear
from philora.adapters.slices import lora_layers
from philora.adapters.statistics import coverage
from philora.adapters.targets import resolve
from philora.errors import TargetError
from philora.families import OTHER, generic_notice
from philora.kernels.attention import NAME
from philora.models.loading import PADDING_CANDIDATES, local_path, set_padding
from philora.training.readiness import preflight
from tests.family import build, packed, padded, tokens
from tests.tolerances import LOGITS_FP32, PACKED_FP32

PAGE = Path(__file__).parents[3] / "docs" / "family.md"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1.0, 4.0, 9.0, 20.0, 40.0, 64.0],
    "original_max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "crop_size": 28,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8,
}  # fmt: skip
# Beside the sizes, what makes each model itself: its config.json's words.
MODELS = {
    "Phi-2": ("PhiConfig", {"num_key_value_heads": None, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1}),
    "Phi-3.5-MoE": (
        "PhimoeConfig",
        {
            "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True,
            "rope_scaling": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.3},
        },
    ),
    "Phi-4-multimodal": (
        "Phi4MultimodalConfig",
        {"vision_config": VISION, "audio_config": AUDIO, "rope_scaling": LONGROPE},
    ),
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": 16}),
    "Qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}),
    "Gemma": ("GemmaConfig", {"head_dim": 16}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _less_garbage():
    """accelerate collects garbage around every training: 0.3 s each over all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def config_of(name):
    kind, changes = MODELS[name]
    return getattr(transformers, kind)(**(SIZES | changes))


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def gap(mine, theirs):
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())


def logits(model, **more):
    with torch.no_grad():
        return model(**({"input_ids": tokens(40, 99)} | more), use_cache=False).logits


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """A model, its folder with an adapter of three steps, and the trained model."""
    folder = tmp_path_factory.mktemp(request.param)
    args = philora.SFTConfig(
        str(folder / "run"), max_steps=3, per_device_train_batch_size=2, packing=True, max_length=64,
        learning_rate=5e-3, save_strategy="no", report_to="none", bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    documents = [tokens(count, count)[0].tolist() for count in (40, 12, 30, 25, 60, 9)]
    made = philora.SFTTrainer(
        build(config_of(request.param)),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": each, "labels": each} for each in documents]),
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=lora(),
    )
    made.train()
    made.model.save_pretrained(folder / "adapter")
    return request.param, folder, made.model.eval()


def test_trains_saves_and_loads_in_plain_peft(trained):
    name, folder, model = trained
    moved = {key for key, each in model.named_parameters() if "lora_B" in key and each.abs().max() > 0}
    still = {key for key, each in model.named_parameters() if "lora_B" in key} - moved
    # Text reaches neither the encoders of images nor those of sound.
    assert all("embed_tokens_extend" in key for key in still)
    assert bool(still) == (name == "Phi-4-multimodal")
    want = logits(model)
    loaded = PeftModel.from_pretrained(build(config_of(name)), folder / "adapter").eval()
    assert gap(logits(loaded), want) < LOGITS_FP32
    assert gap(logits(build(config_of(name))), want) > 1e-3, "the adapter changes nothing"
    with torch.no_grad():
        loaded.get_parameter(min(moved)).mul_(1.05)
    assert gap(logits(loaded), want) > 2 * LOGITS_FP32, "negative control"


def test_merges(trained):
    name, _, model = trained
    merged = philora.merge(copy.deepcopy(model))
    assert gap(logits(merged), logits(model)) < 10 * LOGITS_FP32  # W + BA is rounded once more than W x + B A x
    assert gap(logits(build(config_of(name))), logits(model)) > 1e-3, "negative control: the base"
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == (
        merged.config.tie_word_embeddings
    )
    assert merged.config.tie_word_embeddings == (name in ("Qwen2", "Gemma", "Gemma 3"))


def test_packed_and_padded_rows_are_the_rows_alone(trained):
    """In eval mode: Phi-2 drops parts of its residuals in training, and Phi-3.5-MoE draws its experts."""
    _, _, model = trained
    lengths = [30, 11, 24]
    documents = [tokens(count, count) for count in lengths]
    alone = [logits(model, input_ids=each)[0] for each in documents]
    together = logits(model, **packed(documents))[0].split(lengths)
    batch = padded(documents)
    in_rows = [row[mask.bool()] for row, mask in zip(logits(model, **batch), batch["attention_mask"], strict=True)]
    for mine, row, each in zip(together, in_rows, alone, strict=True):
        assert gap(mine, each) < PACKED_FP32
        assert gap(row, each) < PACKED_FP32
    leaking = logits(model, input_ids=torch.cat(documents, 1))[0].split(lengths)
    assert gap(leaking[1], alone[1]) > 1e-2, "negative control: without positions that start again"


def facts(name, model):
    """The row of the table in docs/family.md."""
    covered = coverage(model)
    adapted = {row.module.replace("model.embed_tokens_extend.", "").rpartition(".")[2] for row in covered.rows
               if "embed_tokens_extend" not in row.module}  # fmt: skip
    base = model.get_base_model()
    inside = sum("embed_tokens_extend" in row.module for row in covered.rows)
    left = {key.rpartition(".")[2] for key, _ in covered.frozen_linears}
    left |= {"experts" for key, each in base.named_parameters() if each.ndim == 3 and ".experts." in key}
    norms = any(type(each).__module__ == "philora.kernels.modules" for each in model.modules())
    layers = [each for key, each in lora_layers(model).items() if "embed_tokens_extend" not in key]
    assert layers
    assert all(isinstance(each, FastLinear) for each in layers), "the table would have to say which are not"
    fast = ["LoRA layers", *(["RMSNorm"] if norms else [])]
    attention = "by document" if base.config._attn_implementation == NAME else "transformers' mask"
    also = "; both encoders" if inside else ""
    cells = [
        name,
        f"`{type(base).__name__}`",
        ", ".join(sorted(adapted)) + also,
        ", ".join(sorted(left)),
        ", ".join(fast),
        attention,
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_docs_is_what_happens(trained):
    name, _, model = trained
    row = facts(name, model)
    assert row in PAGE.read_text(encoding="utf-8"), row


def test_the_page_has_every_phi_model():
    page = PAGE.read_text(encoding="utf-8")
    for each in [*philora.families.MODELS, *OTHER]:
        assert all(hub_id in page for hub_id in each.hub_ids), each.name
        assert each.name in page


def test_a_router_of_experts_is_left_out_with_a_notice(caplog):
    model = build(config_of("Phi-3.5-MoE"))
    philora.adapters.targets._warn_left_out.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert resolve(model, lora()).config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "all-linear leaves out PhimoeTopKRouter" in caplog.text
    with pytest.raises(
        TargetError, match=r"target_modules='model.layers.0.mlp.router' - expected a linear, .* It is a Ph"
    ):
        resolve(model, lora(target_modules=["router"]))


def test_experts_train_where_target_parameters_names_them():
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(0)
    model = philora.get_peft_model(
        build(config_of("Phi-3.5-MoE")), lora(target_modules=["q_proj"], target_parameters=names)
    )
    model(input_ids=tokens(40, 1), use_cache=False).logits.sum().backward()
    found = [each.grad for name, each in model.named_parameters() if "lora_B" in name]
    assert len(found) == 6
    assert all(each.abs().max() > 0 for each in found)


def test_longrope_of_the_mixture_of_experts_as_docs_say():
    """transformers' own rotary embedding of this model has the short factors at every length; see docs/family.md."""
    rotary = build(config_of("Phi-3.5-MoE")).model.rotary_emb
    x = torch.zeros(1, 1, 8)
    short = rotary(x, torch.arange(64)[None])[0] / 1.2
    long = rotary(x, torch.arange(65)[None])[0] / 1.3
    assert torch.allclose(short, long[:, :64], atol=1e-6)


def test_the_language_model_of_the_multimodal_one_by_the_expression_in_the_docs():
    expression = r"model\.layers\..*\.(qkv|o|gate_up|down)_proj"
    assert f"'{expression}'" in PAGE.read_text(encoding="utf-8")
    model = philora.get_peft_model(build(config_of("Phi-4-multimodal")), lora(target_modules=expression))
    assert len(lora_layers(model)) == 4 * SIZES["num_hidden_layers"]
    model(input_ids=tokens(40, 1), use_cache=False).logits.sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_another_architecture_is_named(name):
    notice = generic_notice(config_of(name))
    assert notice.endswith("(docs/family.md).")
    assert notice.startswith(f"{name}: ") if name.startswith("Phi") else "is not one of the Phi family" in notice
    assert generic_notice(transformers.Phi3Config()) is None


def test_a_check_and_a_run_go_on_with_a_notice(tmp_path, caplog):
    folder = tmp_path / "model"
    kind, changes = MODELS["Llama"]
    build(getattr(transformers, kind)(**(SIZES | changes | {"vocab_size": 4096}))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder)
    given = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "data": {"train": {"path": "helpdesk", "limit": 12}, "eval": None},
        "training_config": {"output_dir": str(tmp_path / "run"), "max_steps": 2},
    }
    expected = "model_type='llama' is not one of the Phi family: it takes the generic path (docs/family.md)."
    assert expected in preflight(given).notices
    with caplog.at_level(logging.WARNING):
        result = philora.train(given)
    assert expected in caplog.text
    assert (result.adapter / "adapter_model.safetensors").exists()


class Vocabulary:
    """What `set_padding` asks of a tokenizer."""

    def __init__(self, tokens, pad, eos):
        self.vocabulary = {token: index for index, token in enumerate(tokens)}
        self.pad_token, self.eos_token = pad, eos

    def get_vocab(self):
        return self.vocabulary

    @property
    def pad_token_id(self):
        return self.vocabulary.get(self.pad_token)

    @property
    def eos_token_id(self):
        return self.vocabulary[self.eos_token]


@pytest.mark.parametrize(
    ("tokens", "pad", "eos", "chosen"),
    [
        (["<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>"], "<|endoftext|>", "<|endoftext|>",
         "<|endofprompt|>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"], "<|endoftext|>", "<|im_end|>", "<|fim_pad|>"),
        (["<unk>", "<s>", "<|endoftext|>", "<|end|>"], "<|endoftext|>", "<|endoftext|>", "<unk>"),
        (["<|endoftext|>", "<|im_end|>", "<|dummy_85|>"], "<|dummy_85|>", "<|im_end|>", "<|dummy_85|>"),
    ],
    ids=["Phi-4-mini", "Qwen", "Phi-3", "Phi-4"],
)  # fmt: skip
def test_padding_that_is_no_stop_token(tokens, pad, eos, chosen):
    vocabulary = Vocabulary(tokens, pad, eos)
    set_padding(vocabulary)
    assert vocabulary.pad_token == chosen
    assert chosen in (*PADDING_CANDIDATES, "<|dummy_85|>")
