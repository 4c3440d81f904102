"""Converting there and back is the identity, over shapes, ranks, dtypes and patterns of slices."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from philora.adapters.slices import Slice
from philora.adapters.targets import Names
from philora.exporting.adapter import Adapter, Update, as_fused, as_slices, for_server
from philora.exporting.conversion import read_adapter, restored
from philora.exporting.loralib_file import WEIGHTS_NAME, write_loralib
from philora.exporting.peft_folder import write_peft
from philora.models.locate import AdapterSource


def model_of(kv_heads: int) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 128}
    return Phi3ForCausalLM(Phi3Config(**settings, **heads))


MODELS = {kv_heads: model_of(kv_heads) for kv_heads in (1, 2, 4)}


@st.composite
def adapters(draw):
    """An adapter of a small model: some fused modules whole, some by slices."""
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = Names.of(model).rows
    modules = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    chosen = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, unique=True))
    updates = {}
    for name in chosen:
        module, r = modules[name], draw(st.integers(1, 5))
        scaling = draw(st.sampled_from([0.25, 1.0, 2.0, 8.0]))
        parts: tuple[Slice, ...] = ()
        if name in rows and draw(st.booleans()):
            names = [each for each in rows[name] if draw(st.booleans())] or [next(iter(rows[name]))]
            parts = tuple(Slice(each, *rows[name][each], i * r, (i + 1) * r) for i, each in enumerate(names))
        rank = r * max(1, len(parts))
        down = torch.randn(rank, module.in_features, generator=generator).to(dtype)
        up = torch.randn(module.out_features, rank, generator=generator).to(dtype)
        if parts:
            full, up = up, torch.zeros_like(up)
            for each in parts:
                span = slice(each.row_start, each.row_stop), slice(each.rank_start, each.rank_stop)
                up[span] = full[span]
        updates[name] = Update(down, up, scaling, parts)
    return model, Adapter(updates)


def assert_same(got, want, *, slices=True):
    assert got.updates.keys() == want.updates.keys()
    for name, each in want.updates.items():
        other = got.updates[name]
        assert torch.equal(other.lora_A, each.lora_A), name
        assert torch.equal(other.lora_B, each.lora_B), name
        assert other.scaling == each.scaling
        assert not slices or other.slices == each.slices


def through(model, adapter, write, name=""):
    """The adapter after it was written and read."""
    with tempfile.TemporaryDirectory() as folder:
        write(adapter, model, Path(folder), "base")
        with restored(model):
            return read_adapter(model, AdapterSource(Path(folder) / name, None))[1]


quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(adapters())
def test_through_peft(drawn):
    model, adapter = drawn
    assert_same(through(model, adapter, write_peft), adapter)


@quick
@given(adapters())
def test_through_loralib(drawn):
    model, adapter = drawn
    assert_same(through(model, adapter, write_loralib, WEIGHTS_NAME), adapter)


@quick
@given(adapters())
def test_layouts_keep_every_update(drawn):
    model, adapter = drawn
    for layout in (as_fused, as_slices, for_server):
        changed = layout(adapter, model)
        for name, each in adapter.updates.items():
            # The same products in another order, in fp32; scalings are powers of two, so B is not rounded.
            torch.testing.assert_close(changed.updates[name].delta(), each.delta(), rtol=1e-5, atol=1e-5)
    assert len({each.rank for each in for_server(adapter, model).updates.values()}) == 1


@quick
@given(adapters())
def test_fused_and_back_to_slices(drawn):
    """Blocks on the diagonal are found again; the layout of several slices is the one that was left."""
    model, adapter = drawn
    sliced = as_slices(adapter, model)
    assert_same(as_slices(as_fused(sliced, model), model), sliced, slices=False)


@quick
@given(adapters(), st.sampled_from(["A", "B", "scaling"]))
def test_the_comparison_sees_a_fault(drawn, part):
    """Negative control of everything above."""
    _, adapter = drawn
    name, update = next(iter(adapter.updates.items()))
    wrong = {
        "A": Update(update.lora_A * 2, update.lora_B, update.scaling, update.slices),
        "B": Update(update.lora_A, update.lora_B * 2, update.scaling, update.slices),
        "scaling": Update(update.lora_A, update.lora_B, update.scaling * 2, update.slices),
    }[part]
    try:
        assert_same(Adapter({**adapter.updates, name: wrong}), adapter)
    except AssertionError:
        return
    raise RuntimeError("the fault was not seen")
