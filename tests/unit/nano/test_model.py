"""The bundled base model: files, tokenizer, chat format, and what its training text may not contain."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Phi3ForCausalLM

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "src" / "philora" / "nano" / "model"
ADDED = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]
TEXTS = [
    "How do I merge the adapter into the base model?",
    "  two spaces first,\n\ta tab, 12345 and `code --with options=1e-4`",
    "Здравей, свят! Как се запазва файлът?",
    "Învățăm română și mâncăm pâine țărănească.",
    "Blåbærsyltetøy på brød, ærlig talt så søtt",
    "שלום, מה שלומך היום?",
    "Árvíztűrő tükörfúrógép",
    "😀👍🏽👩‍👩‍👧 — “quotes”… 中文 العربية",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def make_nano():
    pytest.importorskip("sentencepiece")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("make_nano", ROOT / "tools" / "make_nano.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_folder_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 16e6


def test_model_is_phi3_with_fused_projections(model):
    assert type(model) is Phi3ForCausalLM
    assert model.dtype == torch.bfloat16
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6
    layer = model.model.layers[0]
    assert layer.self_attn.qkv_proj.weight.shape == (512, 256)
    assert layer.mlp.gate_up_proj.weight.shape == (1408, 256)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_config(model):
    config = model.config
    assert config.model_type == "phi3"
    assert config.max_position_embeddings == config.original_max_position_embeddings == 2048
    assert config.rope_parameters["rope_type"] == "default"
    assert config.sliding_window is None


def test_tokenizer_is_llamas_as_in_phi3(tokenizer):
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["legacy"] is False
    assert config["add_bos_token"] is False
    assert tokenizer.is_fast
    assert len(tokenizer) == 4096


def test_special_tokens_are_phi3s(tokenizer, model):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(ADDED) == list(range(4096 - len(ADDED), 4096))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<s>",
        "<|endoftext|>",
        "<unk>",
        "<unk>",
    )
    assert model.config.vocab_size == len(tokenizer)
    for name in ADDED:
        ids = tokenizer(f"text{name}text", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == 1
        assert tokenizer(name, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(name)]


def test_generation_stops_at_end_and_endoftext_and_not_at_padding(tokenizer):
    config = GenerationConfig.from_pretrained(MODEL, local_files_only=True)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.pad_token_id not in config.eos_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_file_agrees_with_tokenizer_json(tokenizer, text):
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    assert processor.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chat_template_is_the_one_trl_knows():
    trl = pytest.importorskip("trl")
    known = Path(trl.__file__).parent / "chat_templates" / "phi3.jinja"
    if not known.exists():
        pytest.skip("this TRL has no Phi-3 template")
    assert (MODEL / "chat_template.jinja").read_bytes() == known.read_bytes()


def test_chat_template_tokenises_like_its_text(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How are you?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHello\nthere<|end|>\n"
        "<|assistant|>\nHi.<|end|>\n<|user|>\nHow are you?<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_model_answers_in_the_chat_format(tokenizer, model):
    messages = [{"role": "user", "content": "How do I paint the door?"}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=40, do_sample=False)
    answer = output[0, batch["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    text = tokenizer.decode(answer[:-1])
    assert len(text.split()) >= 3
    assert text.isascii()


def test_training_text_shares_nothing_with_the_help_desk(make_nano):
    assert make_nano.overlaps_helpdesk(documents=3000) == []


def test_overlap_check_finds_a_planted_sentence(make_nano, tmp_path):
    sentence = make_nano.Corpus().passages[0].split(". ")[0]
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"Well, {sentence}."}]}
    (tmp_path / "eval.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert make_nano.overlaps_helpdesk(tmp_path, documents=10)


def test_corpus_and_tokenizer_are_deterministic(make_nano):
    def first(count):
        stream = make_nano.Corpus().documents()
        return [next(stream) for _ in range(count)]

    assert first(200) == first(200)
    assert make_nano.train_sentencepiece(make_nano.tokenizer_text()) == (MODEL / "tokenizer.model").read_bytes()
