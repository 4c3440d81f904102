"""Packed rows: each document attends to itself only, exactly as if it stood alone."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import philora
from philora.kernels import attention, document_groups, varlen
from philora.kernels.attention_choice import AttentionFacts, attention_for
from philora.kernels.layout import PackedLayout
from philora.kernels.varlen import Attention, varlen_attention
from philora.lora.functional import fused
from tests import on_device
from tests.tolerances import PACKED_FP32

# Every test with the compiled functions, and without them.
pytestmark = pytest.mark.usefixtures("compiled_or_not")


def positions(lengths):
    return torch.cat([torch.arange(each) for each in lengths])[None].to(on_device.chosen())


def reference(q, k, v, lengths, window=None):
    """Plain softmax attention of each document in float64."""
    out, start = [], 0
    q, k, v = (each.double() for each in (q, k, v))
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    for length in lengths:
        part = slice(start, start + length)
        scores = q[:, :, part] @ k[:, :, part].transpose(2, 3) / q.shape[-1] ** 0.5
        places = torch.arange(length, device=q.device)
        distance = places[:, None] - places[None]
        allowed = (distance >= 0) & (distance < (window or length))
        scores = scores.masked_fill(~allowed, -torch.inf)
        out.append((scores.softmax(-1) @ v[:, :, part]).transpose(1, 2))
        start += length
    return torch.cat(out, 1)


def layout_of(position_ids: torch.Tensor) -> document_groups.Layout | None:
    """Return the groups of a batch, or None if no row holds more than one document."""
    documents = document_groups.documents_of(position_ids, len(position_ids), {})
    several = len(documents.lengths) > len(position_ids)
    return document_groups.groups_of(documents, len(position_ids)) if several else None


# 8 columns a head go by tiles, 16, 48 and 128 in one piece with compiled functions.
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("width", [8, 16, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("lengths", [[7, 1, 33, 7, 20], [1, 1, 1], [64, 300, 9, 40]])
def test_values_and_gradients(lengths, window, dtype, width):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(on_device.chosen())
        for shape in ((1, 4, total, width), *2 * [(1, 2, total, width)], (1, total, 4, width))
    )
    q, k, v = (each.to(dtype).requires_grad_() for each in (q, k, v))
    layout = layout_of(positions(lengths))
    got = attention.document_attention(q, k, v, layout, sliding_window=window)
    expected = reference(q, k, v, lengths, window)
    # one rounding of the result: 2^-8 for bf16; the scores' error grows with their size in fp32
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    mine = torch.autograd.grad(got, (q, k, v), grad.to(dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), grad.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=4e-2 if dtype is torch.bfloat16 else 1e-4,
            atol=4e-2 if dtype is torch.bfloat16 else 1e-5,
        )
    if total > len(lengths) and (window or 0) < max(lengths):
        wrong = lengths if window else [total]  # negative control: documents see each other, or no window
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got.double(), reference(q, k, v, wrong), **tolerance)


def test_a_row_of_one_document_has_no_layout_and_several_rows_do():
    assert layout_of(torch.arange(9)[None].expand(3, -1)) is None
    two = torch.cat([positions([4, 5]), positions([9])])
    assert sum(each.documents * each.length for each in layout_of(two).groups) >= 18


def test_the_layout_is_remembered_while_its_tensor_lives():
    ids = positions([3, 4])
    assert layout_of(ids) is layout_of(ids)
    ids += 0  # changed in place: looked at again
    first = layout_of(ids)
    ids[0, 3:] = torch.arange(3, 7)
    assert layout_of(ids) is None
    assert first is not None
    del ids
    gc.collect()
    layout_of(positions([2, 2]))
    assert len(document_groups._known) <= 4


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("sliding_window", [None, 6])
@pytest.mark.parametrize("enabled", [True, False])
def test_packed_equals_unpacked_in_a_model(phi3, enabled, sliding_window):
    model = philora.optimize(phi3(sliding_window=sliding_window))
    assert model.config._attn_implementation == attention.NAME
    lengths = [5, 17, 2, 9]
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(4)).to(on_device.chosen())
    with fused(enabled), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions(lengths), use_cache=False).logits
        alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, 1)], 1)
        leaking = model(input_ids=ids).logits
    scale = alone.abs().max()
    assert (packed - alone).abs().max() < PACKED_FP32 * scale
    assert (leaking - alone).abs().max() > PACKED_FP32 * scale, "negative control"


def test_padding_generation_and_eager_are_untouched(phi3):
    plain, fast = phi3(), philora.optimize(phi3())
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            fast(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
        )
        a = plain.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        b = fast.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert a.tolist() == b.tolist()
    eager = phi3()
    eager.set_attn_implementation("eager")
    assert philora.optimize(eager).config._attn_implementation == "eager"


def test_inference_mode(phi3):
    model = philora.optimize(phi3())
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        assert model(input_ids=ids, position_ids=positions([4, 5]), use_cache=False).logits.isfinite().all()


# -------------------------------------------------------------------------------------------- once for a batch


def small_llama():
    torch.manual_seed(0)
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, **settings)
    return philora.optimize(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_the_layout_is_read_once_for_a_batch(phi3, family, rows, monkeypatch):
    model = small_llama() if family == "llama" else philora.optimize(phi3(num_hidden_layers=3))
    read = PackedLayout.of_positions
    calls = []
    monkeypatch.setattr(PackedLayout, "of_positions", lambda each: (calls.append(1), read(each))[1])
    ids = torch.randint(3, 97, (rows, 12), generator=torch.Generator().manual_seed(4))
    given = {"input_ids": ids, "position_ids": positions([4, 8]), "use_cache": False}
    one = model(**given).logits
    assert len(calls) == 1
    layout = PackedLayout.of_lengths([4, 8])
    if rows == 1:
        carried = model(**given, **layout.keywords()).logits
        assert torch.equal(carried, one)
        assert len(calls) == 1, "a batch that carries its documents is not read"
    monkeypatch.setattr(document_groups, "_known", [])  # a planted fault: nothing is remembered
    monkeypatch.setattr(document_groups, "weakref", SimpleNamespace(ref=lambda _: lambda: None))
    model(**given)
    assert len(calls) > 2


# ------------------------------------------------------------------------------------------- one call for all


@pytest.mark.parametrize("window", [None, 5])
def test_one_call_for_all_documents_equals_groups(window):
    lengths = [3, 9, 1, 7]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, sum(lengths), 8, generator=generator)
    k, v = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(2))
    grad = torch.randn(1, sum(lengths), 4, 8, generator=generator)

    def found(function):
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    def one_call(window):
        documents = PackedLayout.of_lengths(lengths)
        return found(lambda *each: attention.one_call("flash", *each, documents, sliding_window=window))

    layout = layout_of(positions(lengths))
    theirs = found(lambda *each: attention.document_attention(*each, layout, sliding_window=window))
    for mine, other in zip(one_call(window), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):  # negative control: another window
        torch.testing.assert_close(one_call(2)[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_equals_the_reference(window):
    lengths = [3, 90, 1, 70]
    q = torch.randn(sum(lengths), 4, 96, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths), 2, 96, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    layout, grad = PackedLayout.of_lengths(lengths), torch.randn_like(q)
    both = []
    for each in ((q, k, v), tuple(each.cpu().float() for each in (q, k, v))):
        leaves = [one.clone().requires_grad_() for one in each]
        output = varlen_attention(*leaves, Attention(layout.to(leaves[0].device), 96**-0.5, window))
        both.append([output, *torch.autograd.grad(output, leaves, grad.to(output))])
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine.cpu().float(), other, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize(
    ("changes", "way", "reason"),
    [
        ({}, "flash", "PyTorch has flash attention"),
        ({"dtype": "float16"}, "groups", "no GPU has run flash attention in float16 here yet, PHILORA_STACK=all"),
        ({"dtype": "float16", "switch": "all"}, "flash", "PyTorch has flash attention"),
        ({"disagreement": "flash attention differs"}, "groups", "flash attention differs"),
        ({"dtype": "float32"}, "groups", "no flash attention in float32"),
        ({"capability": (7, 5)}, "groups", "needs compute capability 8.0, this is 7.5"),
        ({"head_size": 20}, "groups", "heads have 20 columns"),
        ({"head_size": 288}, "groups", "heads have 288 columns"),
        ({"dropout": True}, "groups", "weights are dropped"),
        ({"flash": False}, "groups", "this PyTorch has no flash attention for packed rows"),
        ({"flash": False, "package": True}, "groups", "PHILORA_STACK=all takes flash-attn"),
        ({"flash": False, "package": True, "switch": "all"}, "flash-attn", "flash-attn is installed"),
        ({"kind": "cpu", "capability": None}, "tiles", "a CPU"),
        ({"kind": "cpu", "capability": None, "dropout": True}, "groups", "weights are dropped"),
        ({"kind": "mps", "capability": None}, "groups", "the device is mps"),
    ],
)
def test_which_way_documents_attend(changes, way, reason):
    chosen, why = attention_for(replace(AttentionFacts(), **changes))
    assert chosen == way
    assert reason in why


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, None),
        (lambda self, q, k, v: (2 * self._document_by_document(q, k, v), (None,) * 3), "differs from the reference"),
        (lambda self, q, k, v: torch.ops.aten._flash_attention_forward(q), "does not run here"),
    ],
    ids=["none", "twice", "no kernel"],
)
def test_flash_attention_is_compared_before_its_first_use(monkeypatch, caplog, fault, said):
    attention._warn_groups.cache_clear()
    monkeypatch.setattr(attention, "facts_of_attention", lambda query, dropout: AttentionFacts())
    monkeypatch.setattr(attention, "disagreement", varlen.disagreement.__wrapped__)
    if fault is not None:
        monkeypatch.setattr(Attention, "attend", fault)
    head = torch.empty(1, 2, 3, 8)
    assert attention._way_of(head, 0.0) == attention._way_of(head, 0.0) == ("flash" if said is None else "groups")
    texts = [each.getMessage() for each in caplog.records]
    assert len(texts) == (said is not None)
    assert all(each.startswith("documents attend in groups: ") and said in each for each in texts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("head_size", [32, 96])
def test_flash_attention_agrees_on_the_card(head_size):
    assert varlen.disagreement(torch.device("cuda"), torch.bfloat16, head_size) is None


def test_the_facts_of_heads():
    found = attention.facts_of_attention(torch.empty(1, 2, 3, 8, dtype=torch.bfloat16), 0.1)
    expected = AttentionFacts(kind="cpu", capability=None, head_size=8, dropout=True, flash=False)
    assert found == replace(expected, switch=found.switch)
