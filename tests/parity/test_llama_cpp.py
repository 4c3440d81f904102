"""llama.cpp reads what is exported: tokens, logits and greedy answers are those of transformers.

llama-cpp-python is built from source, which takes minutes: `make test-slow` tries to install it, and without it these
tests are skipped.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from philora.exporting.conversion import export
from philora.generation.batches import GenerationSettings, generate
from tests.gguf_models import CORPUS, MEMBERS, phi_tokenizer, save_adapter, save_member

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make llama` builds it")
pytestmark = pytest.mark.slow

TALKS = [
    [{"role": "user", "content": "How do I merge the adapter into the base model?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Кога? 12345 It's  two\n\nlines: größer"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1. Yes.\n2. No."},
        {"role": "user", "content": "def f(x):\n    return x"},
    ],
]
# Random weights give logits of some units; llama.cpp sums them in another order, and in f16 rounds each activation to
# 11 bits before it multiplies. Relative to the norm of the logits.
LOGITS = {"f32": 1e-4, "f16": 2e-2}


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The bundled model, which answers in words, with an adapter that changes its answers."""
    from philora.models.loading import local_path

    folder = tmp_path_factory.mktemp("nano")
    save_adapter(local_path("nano"), folder / "adapter", target_modules=["q_proj", "v_proj", "up_proj", "o_proj"])
    return local_path("nano"), folder


@pytest.fixture(scope="module")
def saved(nano, tmp_path_factory):
    made = {"nano": nano}

    def get(member):
        if member not in made:
            folder = tmp_path_factory.mktemp("member")
            save_member(member, folder / "base")
            save_adapter(folder / "base", folder / "adapter")
            made[member] = folder / "base", folder
        return made[member]

    return get


@pytest.fixture(scope="module", autouse=True)
def _runs_here(nano, tmp_path_factory):
    """Fail with a message, not with SIGILL, where llama.cpp was built for another processor."""
    folder = tmp_path_factory.mktemp("probe") / "out"
    done = export(nano[1] / "adapter", folder, format="gguf", base=str(nano[0]))
    assert done.reader_failure is None, done.reader_failure


def opened(model, lora=None, context=256):
    """llama.cpp with a cache in fp32, so that f32 files are computed in fp32 throughout."""
    return llama_cpp.Llama(
        str(model), lora_path=str(lora) if lora else None, n_ctx=context, logits_all=True, verbose=False, n_threads=2,
        type_k=0, type_v=0,
    )  # fmt: skip


def logits(loaded, ids):
    loaded.reset()
    loaded.eval(ids)
    return torch.from_numpy(np.array(loaded.scores[: len(ids)]))


def trained(base, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def answers(model, tokenizer):
    with torch.no_grad():
        return [each.text for each in generate(model, tokenizer, TALKS, GenerationSettings(max_new_tokens=24))]


def answers_of_llama(loaded, tokenizer):
    """Greedy answers through llama.cpp's own tokenizer, sampler and stop tokens."""
    found = []
    for talk in TALKS:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = loaded.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = []
        vocabulary = llama_cpp.llama_model_get_vocab(loaded.model)
        for token in loaded.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if llama_cpp.llama_vocab_is_eog(vocabulary, token) or len(tokens) == 24:
                break
            tokens.append(token)
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("member", ["nano", *MEMBERS])
def test_answers_are_those_of_philora(member, dtype, saved, tmp_path):
    base, folder = saved(member)
    result = export(
        folder / "adapter", tmp_path / "pair", format="gguf", layout="base+adapter", dtype=dtype, base=str(base)
    )
    assert result.reader.mean < 1e-3 < 1e-2 < result.reader.effect
    export(folder / "adapter", tmp_path / "merged", format="gguf", dtype=dtype, base=str(base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = trained(base, folder)
    ids = tokenizer(CORPUS[0])["input_ids"]
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    pair = opened(tmp_path / "pair" / f"base-{dtype}.gguf", tmp_path / "pair" / "adapter.gguf")
    merged = opened(tmp_path / "merged" / f"model-{dtype}.gguf")
    for loaded in (pair, merged):
        assert (logits(loaded, ids) - want).norm() < LOGITS[dtype] * want.norm()
    bare = opened(tmp_path / "pair" / f"base-{dtype}.gguf")
    assert (logits(bare, ids) - want).norm() > 5 * LOGITS[dtype] * want.norm()
    if dtype == "f32" or member == "nano":  # answers of random weights turn on the last bits of f16
        expected = answers(model, tokenizer)
        assert answers_of_llama(pair, tokenizer) == answers_of_llama(merged, tokenizer) == expected
        assert answers_of_llama(bare, tokenizer) != expected
    for loaded in (pair, merged, bare):
        loaded.close()


def test_q8_0(saved, tmp_path):
    base, folder = saved("nano")
    result = export(folder / "adapter", tmp_path / "out", format="gguf", dtype="q8_0", base=str(base))
    assert 1e-5 < result.reader.mean < 2e-2 < result.reader.effect
    assert result.reader.same > 0.9


@pytest.mark.parametrize("fault", ["alpha", "slice"])
def test_a_planted_fault_shows(fault, saved, tmp_path):
    base, folder = saved("nano")
    export(folder / "adapter", tmp_path / "out", format="gguf", layout="base+adapter", dtype="f32", base=str(base))
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf", "r+")
    if fault == "alpha":
        reader.fields["adapter.lora.alpha"].parts[-1][0] *= 2
    else:  # q's and k's rows of one layer change places
        tensor = next(each for each in reader.tensors if each.name == "blk.0.attn_qkv.weight.lora_b")
        tensor.data[:] = np.roll(np.array(tensor.data), 128, axis=0)
    reader.data.flush()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = trained(base, folder)
    ids = tokenizer(CORPUS[0])["input_ids"]
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    loaded = opened(tmp_path / "out" / "base-f32.gguf", tmp_path / "out" / "adapter.gguf")
    assert (logits(loaded, ids) - want).norm() > 10 * LOGITS["f32"] * want.norm()
    assert answers_of_llama(loaded, tokenizer) != answers(model, tokenizer)
    loaded.close()


@pytest.mark.parametrize("member", ["Phi-3.5-mini", "Phi-4-mini"])
def test_long_contexts_take_the_long_factors(member, saved, tmp_path):
    """transformers turns to them for a sequence beyond the boundary, llama.cpp for a context beyond it."""
    base, folder = saved(member)
    export(folder / "adapter", tmp_path / "out", format="gguf", dtype="f32")
    model = trained(base, folder)
    ids = torch.randint(3, 300, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    loaded = opened(tmp_path / "out" / "model-f32.gguf", context=512)
    assert (logits(loaded, ids) - want).norm() < LOGITS["f32"] * want.norm()
    assert (logits(loaded, ids[:100])[-1] - want[99]).norm() < LOGITS["f32"] * want[99].norm()
    with torch.no_grad():
        short = model(input_ids=torch.tensor([ids[:100]])).logits[0]
    assert (logits(loaded, ids[:100]) - short).norm() > 10 * LOGITS["f32"] * short.norm()
    loaded.close()


@pytest.mark.parametrize("member", ["Phi-3-mini-4k", "Phi-4", "Phi-4-mini", "gpt-2"])
def test_plain_texts_give_the_same_tokens(member, tmp_path):
    from philora.exporting.gguf_file import write_model
    from philora.exporting.vocabulary import vocabulary
    from tests.conftest import make_phi3

    tokenizer = phi_tokenizer(member)
    model = make_phi3(vocab_size=len(tokenizer) + 3)
    words = vocabulary(tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])
    write_model(model, tmp_path / "x.gguf", words, file_type="f32", name="x")
    loaded = opened(tmp_path / "x.gguf")
    stop = tokenizer.eos_token
    for text in [
        *CORPUS[:4],
        "  two  spaces\n\n\tand tabs ",
        "שלום 中文 العربية 😀👩‍👩‍👧",
        f"a{stop} b{stop}\n c",
        "é" * 9,
    ]:
        assert (
            loaded.tokenize(text.encode(), add_bos=False, special=True)
            == tokenizer(text, add_special_tokens=False)["input_ids"]
        ), text
    loaded.close()


def test_the_readme_runs(saved, tmp_path, monkeypatch, capsys):
    base, folder = saved("nano")
    for layout in ("merged", "base+adapter"):
        export(folder / "adapter", tmp_path / layout, format="gguf", layout=layout, base=str(base))
        code = (tmp_path / layout / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path / layout)
        exec(code.replace("Hello", TALKS[0][0]["content"]).replace("=64", "=24"), {})
        tokenizer = AutoTokenizer.from_pretrained(base)
        want = answers(trained(base, folder), tokenizer)[0]
        assert capsys.readouterr().out.strip() == want.strip()
