"""GGUF and Ollama: what is written is what was trained, in fields and tensors that llama.cpp's `phi3` reads.

Here files are read back with the `gguf` package; tests/parity/test_llama_cpp.py has llama.cpp read them.
"""

from __future__ import annotations

import json
import os
import re
import sys

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.configuration.sections import ModelConfig
from philora.dataset.arrangement import Arrangement
from philora.errors import AdapterError, ConfigError, ModelError
from philora.exporting import gguf_export, gguf_file, held_out
from philora.exporting.conversion import export
from philora.exporting.gguf_file import GGUFFile, read_config, read_model
from philora.exporting.ollama import markup
from philora.exporting.vocabulary import vocabulary
from philora.models.loading import load_model, local_path, stop_token_ids
from philora.models.verify import logits_of, probe
from tests.gguf_models import MEMBERS, TEMPLATES, go_template, member_named, phi_tokenizer, save_adapter, save_member
from tests.quick import quick
from tests.tolerances import LOGITS_FP32, QUANTIZED_FP32


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a member's base and of an adapter of all its slices, made once."""
    made = {}

    def get(member):
        if member not in made:
            folder = tmp_path_factory.mktemp("member")
            save_member(member, folder / "base")
            save_adapter(folder / "base", folder / "adapter")
            made[member] = folder
        return made[member]

    return get


@pytest.fixture(scope="module")
def pair(saved, tmp_path_factory):
    """Base and adapter of a member as GGUF in fp32, made once."""
    made = {}

    def get(member):
        if member not in made:
            out = tmp_path_factory.mktemp("pair") / "out"
            made[member] = (
                out,
                export(saved(member) / "adapter", out, format="gguf", layout="base+adapter", dtype="f32"),
            )
        return made[member]

    return get


def peft_logits(folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
    return logits_of(model, probe(model.config.vocab_size))


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_both_layouts_compute_what_was_trained(member, saved, pair, tmp_path):
    folder = saved(member)
    want = peft_logits(folder)
    merged = export(folder / "adapter", tmp_path / "merged", format="gguf", dtype="f32")
    assert merged.agreement.mean < 1e-6 < 1e-2 < merged.agreement.effect
    model = read_model(GGUFFile(tmp_path / "merged" / "model-f32.gguf"))
    assert relative(logits_of(model, probe(model.config.vocab_size)), want) < LOGITS_FP32
    out, result = pair(member)
    assert result.agreement.mean < 1e-6 < 1e-2 < result.agreement.effect
    base, lora = GGUFFile(out / "base-f32.gguf"), GGUFFile(out / "adapter.gguf")
    model = read_model(base, lora)
    assert relative(logits_of(model, probe(model.config.vocab_size)), want) < LOGITS_FP32
    plain = read_model(base)
    assert relative(logits_of(plain, probe(model.config.vocab_size)), want) > 1e-2


@pytest.mark.parametrize("member", quick(MEMBERS, ["Phi-3-mini-4k", "Phi-4-mini"]))
def test_the_fields_are_the_members(member, saved, pair):
    folder = saved(member)
    out, _ = pair(member)
    file = GGUFFile(out / "base-f32.gguf")
    config = AutoModelForCausalLM.from_pretrained(folder / "base").config
    again = read_config(file)
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "sliding_window",
        "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(config, name), name
    real = member_named(member)
    assert file.field("general.architecture") == "phi3"
    assert file.field("phi3.rope.dimension_count") == int(config.hidden_size / config.num_attention_heads
                                                        * real.partial_rotary_factor)  # fmt: skip
    assert ("output.weight" in file) is not real.tie_word_embeddings
    assert ("rope_factors_short.weight" in file) is (real.rope_type == "longrope")
    if real.rope_type == "longrope":
        assert file.field("phi3.rope.scaling.original_context_length") == 256
        # sqrt(1 + ln(window / 256) / ln 256), as the paper's code has it
        window = config.max_position_embeddings / 256
        want = np.sqrt(1 + np.log(window) / np.log(256))
        assert file.field("phi3.rope.scaling.attn_factor") == pytest.approx(want, rel=1e-6)
    tokens = file.field("tokenizer.ggml.tokens")
    assert len(tokens) == config.vocab_size == len(set(tokens))
    assert tokens[file.field("tokenizer.ggml.eot_token_id")] == real.stop_tokens[0]
    assert tokens[file.field("tokenizer.ggml.eos_token_id")] == "<|endoftext|>"
    kinds = file.field("tokenizer.ggml.token_type")
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[tokens.index(real.stop_tokens[0])] == gguf.TokenType.CONTROL
    assert file.field("tokenizer.ggml.add_bos_token") is False
    assert file.field("tokenizer.chat_template") == AutoTokenizer.from_pretrained(folder / "base").chat_template
    phi4 = "phi-4" in member.lower()
    assert file.field("tokenizer.ggml.model") == ("gpt2" if phi4 else "llama")
    # llama.cpp drops the space after special tokens by the model's name; Phi-4's tokens keep it.
    assert ("phi-3" in file.field("general.name").lower()) is not phi4
    lora = GGUFFile(out / "adapter.gguf")
    assert lora.field("general.base_model.0.name") == "base"
    assert str(folder).encode() not in (out / "adapter.gguf").read_bytes() + (out / "base-f32.gguf").read_bytes()
    assert str(folder) not in (out / "README.md").read_text()
    assert lora.field("general.type") == "adapter"
    assert lora.field("adapter.type") == "lora"
    down = lora.tensor("blk.0.attn_qkv.weight.lora_a")
    assert lora.field("adapter.lora.alpha") == down.shape[0]
    leaves = ("attn_output", "attn_qkv", "ffn_down", "ffn_up")
    assert {each.removesuffix(".lora_a").removesuffix(".lora_b") for each in lora.names()} == {
        f"blk.{layer}.{leaf}.weight" for layer in range(2) for leaf in leaves
    }


@pytest.mark.parametrize(("dtype", "bound"), [pytest.param("f16", 2e-3, marks=pytest.mark.slow), ("q8_0", 5e-2)])
def test_smaller_types(dtype, bound, saved, tmp_path):
    folder = saved("Phi-4")
    result = export(folder / "adapter", tmp_path / "out", format="gguf", dtype=dtype)
    assert 0 < result.agreement.mean < result.agreement.bound
    file = GGUFFile(tmp_path / "out" / f"model-{dtype}.gguf")
    model = read_model(file)
    assert relative(logits_of(model, probe(model.config.vocab_size)), peft_logits(folder)) < bound
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out" / f"model-{dtype}.gguf").tensors
    }
    assert kinds["blk.0.ffn_up.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.slow
def test_what_lora_alone_cannot_hold_is_merged(saved, tmp_path):
    folder = saved("Phi-4-mini")
    changed = tmp_path / "adapter"
    save_adapter(folder / "base", changed, target_modules=["embed_tokens", "qkv_proj"], use_dora=False)
    with pytest.raises(
        AdapterError, match=r"layout server='model.embed_tokens' - expected updates of linear layers only"
    ):
        export(changed, tmp_path / "out", format="gguf", layout="adapter")
    export(changed, tmp_path / "merged", format="gguf")
    # The adapter changes the input embedding alone, so the two that were one are separate.
    assert "output.weight" in GGUFFile(tmp_path / "merged" / "model-f16.gguf")
    save_adapter(folder / "base", tmp_path / "dora", target_modules=["down_proj"], use_dora=True)
    export(tmp_path / "dora", tmp_path / "dora-merged", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_a_loralib_file(saved, tmp_path):
    folder = saved("Phi-3-mini-4k")
    export(folder / "adapter", tmp_path / "lib", format="loralib")
    for layout in ("merged", "adapter"):
        result = export(
            tmp_path / "lib" / "lora.pt", tmp_path / layout, format="gguf", layout=layout, base=str(folder / "base")
        )
        assert result.agreement.mean < 1e-5 < result.agreement.effect
    assert sorted(each.name for each in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter.gguf", "stop_tokens.json",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["merged", "base+adapter"])
def test_over_a_quantised_base_it_is_the_dequantised_one(layout, saved, tmp_path):
    """An adapter that was trained over nf4 corrects what nf4 did: it belongs to those weights."""
    base = saved("Phi-4") / "base"
    model = load_model(ModelConfig(name_or_path=str(base), quantization="nf4", dtype="float32"))
    adapted = philora.get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, each in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    want = logits_of(adapted, probe(model.config.vocab_size))
    export(tmp_path / "adapter", tmp_path / "out", format="gguf", layout=layout, dtype="f32")
    files = [GGUFFile(tmp_path / "out" / name) for name in ("base-f32.gguf", "adapter.gguf", "model-f32.gguf")
             if (tmp_path / "out" / name).is_file()]  # fmt: skip
    written = read_model(*files)
    assert relative(logits_of(written, probe(model.config.vocab_size)), want) < QUANTIZED_FP32
    over = philora.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert relative(logits_of(over, probe(model.config.vocab_size)), want) > 100 * QUANTIZED_FP32


def test_held_out_conversations_of_the_run_are_among_those_compared(tmp_path):
    sample = {"prompt": [{"role": "user", "content": "Of the run?"}], "reference": "Yes.", "adapter": "No."}
    (tmp_path / "results.json").write_text(json.dumps({"samples": [sample]}))
    talks = held_out.conversations(tmp_path)
    assert talks[0] == [{"role": "user", "content": "Of the run?"}, {"role": "assistant", "content": "Yes."}]
    assert talks[1:] == held_out.conversations(None)
    tokenizer = phi_tokenizer("Phi-4")
    texts = held_out.texts(tmp_path, tokenizer)
    assert "Of the run?<|im_end|><|im_start|>assistant<|im_sep|>Yes." in texts[0]
    assert all(0 < len(row) <= 32 for row in held_out.token_rows(texts, tokenizer, 32))


def wrong_alpha(adapter, model, file, **options):
    gguf_file.write_lora(adapter, model, file, **options)
    reader = gguf.GGUFReader(file, "r+")
    reader.fields["adapter.lora.alpha"].parts[-1][0] *= 1.01
    reader.data.flush()


def swapped_slices(adapter, model, file, **options):
    gguf_file.write_lora(adapter, model, file, **options)
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(each for each in reader.tensors if each.name == "blk.1.attn_qkv.weight.lora_b")
    tensor.data[:] = np.array(tensor.data)[::-1]
    reader.data.flush()


@pytest.mark.parametrize("fault", [wrong_alpha, swapped_slices])
def test_a_wrong_adapter_is_caught_and_nothing_written(fault, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "write_lora", fault)
    with pytest.raises(AdapterError, match=r"expected an update that differs by at most"):
        export(saved("Phi-4") / "adapter", tmp_path / "out", format="gguf", layout="adapter")
    # Without the comparison of updates the distributions tell.
    monkeypatch.setattr(gguf_export, "_check_lora", lambda *_: None)
    monkeypatch.setattr("philora.models.verify.DIVERGENCE", {})
    monkeypatch.setitem(gguf_export.DIVERGENCE, "f32", 1e-7)
    with pytest.raises(
        AdapterError, match=r"read back=.* - expected a mean divergence from the trained model of at most"
    ):
        export(saved("Phi-4") / "adapter", tmp_path / "out", format="gguf", layout="adapter", dtype="f32")
    assert not list(tmp_path.glob("*out*"))


def test_a_wrong_model_is_caught_and_nothing_written(saved, tmp_path, monkeypatch):
    def wrong(model, file, *arguments, **options):
        gguf_file.write_model(model, file, *arguments, **options)
        reader = gguf.GGUFReader(file, "r+")
        tensor = next(each for each in reader.tensors if each.name == "blk.0.ffn_up.weight")
        half = len(tensor.data) // 2  # gate and up change places
        tensor.data[:] = np.concatenate([tensor.data[half:], tensor.data[:half]])
        reader.data.flush()

    monkeypatch.setattr(gguf_export, "write_model", wrong)
    with pytest.raises(
        AdapterError, match=r"model-f16.gguf: blk.0.ffn_up.weight=.* - expected the model's tensor within"
    ):
        export(saved("Phi-4") / "adapter", tmp_path / "out", format="gguf")
    monkeypatch.setattr(gguf_export, "_check_tensors", lambda *_: None)
    with pytest.raises(AdapterError, match=r"expected a mean divergence from the trained model"):
        export(saved("Phi-4") / "adapter", tmp_path / "out", format="gguf")
    assert not list(tmp_path.glob("*out*"))


def test_values_that_f16_cannot_hold(saved, tmp_path, monkeypatch):
    folder = saved("Phi-4")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    words = vocabulary(tokenizer, model.config.vocab_size, stop_token_ids(tokenizer))
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk.0.ffn_down.weight='infinite in f16' - expected values up to 65504"):
        gguf_file.write_model(model, tmp_path / "x.gguf", words, file_type="f16", name="x")


def test_other_models_are_refused(saved, tmp_path):
    folder = saved("Phi-4")
    config = json.loads((folder / "base" / "config.json").read_text())
    from transformers import LlamaConfig, Phi3Config

    with pytest.raises(ModelError, match=r"model_type='llama' - expected phi3"):
        gguf_file.check_architecture(LlamaConfig())
    changed = Phi3Config(**(config | {"hidden_act": "gelu", "head_dim": 4}))
    with pytest.raises(ModelError) as raised:
        gguf_file.check_architecture(changed)
    assert "hidden_act='gelu' - expected silu" in str(raised.value)
    assert "head_dim=4 - expected hidden_size over the number of heads" in str(raised.value)
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match=r"torn.gguf: content=.* - expected a complete GGUF file"):
        GGUFFile(tmp_path / "torn.gguf")


def test_arguments(saved, tmp_path, monkeypatch):
    folder = saved("Phi-4")
    with pytest.raises(ConfigError) as raised:
        export(folder / "adapter", tmp_path / "out", format="ollama", layout="adapter", dtype="q8")
    assert "layout='adapter' - expected one of merged, base+adapter" in str(raised.value)
    assert "dtype='q8' - expected one of f16, q8_0, f32. Did you mean 'q8_0'?" in str(raised.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"expected the package gguf. Install it: pip install 'philora\[gguf\]'"):
        export(folder / "adapter", tmp_path / "out", format="gguf")


# ---------------------------------------------------------------------------------------------- vocabulary


def nano_words(**changes):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    return vocabulary(tokenizer, 4096, stop_token_ids(tokenizer))


def test_pieces_are_formed_in_the_order_of_sentencepiece():
    words = nano_words()
    model = sentencepiece.SentencePieceProcessor(f"{local_path('nano')}/tokenizer.model")
    merged = [
        index
        for index in range(model.get_piece_size())
        if words.types[index] is gguf.TokenType.NORMAL and words.scores[index] > min(words.scores)
    ]
    assert len(merged) > 3000
    assert sorted(merged, key=model.get_score) == sorted(merged, key=lambda index: words.scores[index])
    assert {words.tokens[index] for index in range(3, 259)} == {f"<0x{byte:02X}>" for byte in range(256)}
    assert words.types[3] is gguf.TokenType.BYTE
    assert words.types[0] is gguf.TokenType.UNKNOWN


def test_names_under_which_llama_cpp_strips():
    words = nano_words()
    assert words.strips
    assert words.model_name("support") == "Phi-3 support"
    assert words.model_name("My-PHI3-bot") == "My-PHI3-bot"
    plain = vocabulary(phi_tokenizer("Phi-4"), 500, [])
    assert not plain.strips
    assert plain.model_name("like phi-3 and Phi3") == "like Phi_3 and Phi_3"


def changed_backend(**changes):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        value(described) if callable(value) else described.update({key: value})
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(described))
    return tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": lambda all: all["added_tokens"][5].update(rstrip=False)}, r"tokens with rstrip=.*placeholder1"),
        ({"a": lambda all: all["added_tokens"][5].update(lstrip=True)}, r"tokens with lstrip=.*placeholder1"),
        ({"a": lambda all: all["model"]["merges"].pop(7)}, r"merges that are missing=.* - expected merges"),
        ({"normalizer": {"type": "NFC"}}, r"normalizer=.*NFC.* - expected ▁ for spaces"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"pre_tokenizer=.*Whitespace.* - expected none, or Metaspace"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_lacks(changes, message):
    tokenizer = changed_backend(**changes)
    with pytest.raises(ModelError, match=message):
        vocabulary(tokenizer, 4096, [])


def test_splits_that_llama_cpp_lacks():
    tokenizer = phi_tokenizer("Phi-4")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    with pytest.raises(ModelError, match=r"pre_tokenizer=.* - expected text split as GPT-2, cl100k"):
        vocabulary(tokenizer, 500, [])
    with pytest.raises(ModelError, match=r"expected at most 10 tokens, the rows of the model's embedding"):
        vocabulary(phi_tokenizer("Phi-4"), 10, [])


@pytest.mark.parametrize(("member", "name"), [("Phi-4", "dbrx"), ("Phi-4-mini", "gpt-4o"), ("gpt-2", "gpt-2")])
def test_splits_are_known_by_what_they_do(member, name):
    assert vocabulary(phi_tokenizer(member), 500, []).pre == name


# -------------------------------------------------------------------------------------------------- ollama

TALKS = [
    [("user", "Why?")],
    [("system", "Be brief."), ("user", 'Say "hi" {{ .Content }}')],
    [("system", "A\nB"), ("user", "One?"), ("assistant", "  1\n"), ("user", "Two? é")],
    [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"), ("user", "Three?")],
]


def modelfile(text):
    """Instructions of a Modelfile, read by the grammar of Ollama's documentation."""
    found, rest = [], text
    while rest.strip():
        match = re.match(r'\s*(FROM|ADAPTER|TEMPLATE|PARAMETER|SYSTEM|LICENSE)\s+("""(.*?)"""|[^\n]*)', rest, re.DOTALL)
        assert match, rest[:80]
        found.append((match[1], match[3] if match[2].startswith('"""') else match[2]))
        rest = rest[match.end() :]
        assert not rest or rest[0] == "\n"
    return found


FOLDING = ("no system", "phi4-reasoning")
"""Templates that drop or refuse system turns."""


@pytest.mark.parametrize("name", FOLDING)
def test_ollama_gets_system_turns_as_training_does(name):
    """In every place, as the arrangement of training folds them; the control leaves them out, as before."""
    tokenizer = phi_tokenizer("Phi-4")
    tokenizer.chat_template = TEMPLATES[name]
    roles = ["system", "system", "user", "assistant", "system", "user"]
    messages = [{"role": role, "content": f"{role} {number}\n"} for number, role in enumerate(roles)]
    arrangement = Arrangement(tokenizer)
    want = arrangement.render(arrangement.arranged(messages).messages, generation=True)
    assert all(each["content"] in want for each in messages)
    found = markup(tokenizer).go()
    given = [{k.title(): v for k, v in each.items()} for each in messages]
    assert go_template(found, {"Messages": given}) == want
    assert go_template(found, {"Messages": [each for each in given if each["Role"] != "system"]}) != want


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_ollama_writes_what_the_tokenizer_does(name):
    tokenizer = phi_tokenizer("Phi-4")
    tokenizer.chat_template = TEMPLATES[name]
    found = markup(tokenizer).go()
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        arranged = messages
        if name in FOLDING and messages[0]["role"] == "system":
            arranged = [
                {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"},
                *messages[2:],
            ]
        want = tokenizer.apply_chat_template(arranged, tokenize=False, add_generation_prompt=True)
        assert go_template(found, {"Messages": [{k.title(): v for k, v in each.items()} for each in messages]}) == want
        assert go_template(found.replace("|>", "|]", 1), {"Messages": []}) != want


def test_templates_that_do_more_are_refused():
    tokenizer = phi_tokenizer("Phi-4")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    with pytest.raises(ModelError, match=r"expected a template that writes the same text around every content"):
        markup(tokenizer)


def test_the_beginning_of_a_text_is_written_once():
    tokenizer = phi_tokenizer("Phi-4")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["phi4"]
    assert vocabulary(tokenizer, 500, []).add_bos
    assert "endoftext" in markup(tokenizer).go()
    assert "endoftext" not in markup(tokenizer, writes_bos=False).go()


def test_a_modelfile(saved, tmp_path):
    folder = saved("Phi-4-mini")
    export(folder / "adapter", tmp_path / "out", format="ollama", layout="base+adapter", dtype="q8_0")
    found = modelfile((tmp_path / "out" / "Modelfile").read_text())
    named = [each for each in found if each[0] in ("FROM", "ADAPTER")]
    assert named == [("FROM", "./base-q8_0.gguf"), ("ADAPTER", "./adapter.gguf")]
    assert all((tmp_path / "out" / path).is_file() for _, path in named)
    parameters = [value for name, value in found if name == "PARAMETER"]
    assert parameters == [
        'stop "<|end|>"', 'stop "<|endoftext|>"', "num_ctx 256", "repeat_penalty 1.0", "temperature 0",
    ]  # fmt: skip
    template = next(value for name, value in found if name == "TEMPLATE")
    assert go_template(template, {"Messages": [{"Role": "user", "Content": "x"}]}) == "<|user|>x<|end|><|assistant|>"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "ollama create out -f Modelfile" in readme
    stops = json.loads((tmp_path / "out" / "stop_tokens.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert stops["ends_a_turn"] == "<|end|>"
    assert [each["id"] for each in stops["stop_tokens"]] == tokenizer.convert_tokens_to_ids(
        ["<|end|>", "<|endoftext|>"]
    )


def test_every_format_carries_the_stop_tokens(saved, tmp_path):
    folder = saved("Phi-3-mini-4k")
    for format in ("peft", "loralib"):
        export(folder / "adapter", tmp_path / format, format=format)
        stops = json.loads((tmp_path / format / "stop_tokens.json").read_text())
        assert [each["text"] for each in stops["stop_tokens"]] == ["<|end|>", "<|endoftext|>"]
        assert (tmp_path / format / "README.md").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").chat_template


@pytest.mark.parametrize(("got", "place"), [([5, 6], 2), ([5, 9, 7], 1), ([], 0)])
def test_other_tokens_and_missing_ones_are_named(got, place):
    """Also where a reader's tokens are the beginning of what they should be."""
    from philora.exporting.llama import check_tokens

    with pytest.raises(ModelError, match=rf"expected the tokenizer's \[.*\] at token {place} of 'abc'"):
        check_tokens([got], ["abc"], [[5, 6, 7]])
    check_tokens([[5, 6, 7, 8]], ["abc"], [[5, 6, 7]])


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "crashed with SIGILL; it was built for another processor"),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV", marks=pytest.mark.slow),
        pytest.param(
            "raise OSError('libgomp.so.1 is missing')",
            "exit code 1: OSError: libgomp.so.1 is missing",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_llama_cpp_that_cannot_run_here_leaves_the_file_and_says_so(ending, said, saved, tmp_path, monkeypatch, cli):
    fake = tmp_path / "site"
    (fake / "llama_cpp").mkdir(parents=True)
    (fake / "llama_cpp" / "__init__.py").write_text(f"import os, signal\n{ending}\n")
    (fake / "llama_cpp_python-9.9.9.dist-info").mkdir()
    (fake / "llama_cpp_python-9.9.9.dist-info" / "METADATA").write_text("Name: llama-cpp-python\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(fake)
    monkeypatch.setenv("PYTHONPATH", str(fake), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    folder = saved("Phi-3-mini-4k")
    result = cli("export", folder / "adapter", "--format", "gguf", "--out", tmp_path / "out", "--base", folder / "base")
    assert result.code == 0
    assert "unverified by llama.cpp: llama.cpp (llama-cpp-python 9.9.9)" in result.out
    assert said in result.out
    assert (tmp_path / "out" / "model-f16.gguf").is_file()
