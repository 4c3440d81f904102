"""LongRoPE: a document's factors are those of its own length, whatever it is packed, padded or batched with."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset

import philora
from philora.configuration.sections import ModelConfig
from philora.dataset import length_notices
from philora.dataset.lengths import sequence_lengths
from philora.errors import ConfigError, ModelError
from philora.exporting.conversion import restored
from philora.families import MODELS, longrope_switch_tokens
from philora.kernels.rotary import DocumentRotaryEmbedding, document_tokens
from philora.lora.functional import fused
from philora.models.loading import load_skeleton, local_path
from philora.training.readiness import preflight
from tests.family import build, packed, padded, small_config, tokens
from tests.tolerances import PACKED_FP32

LONG = [each for each in MODELS if each.rope_type == "longrope"]
SWITCH = 64
LENGTHS = [90, 20, 64, 65, 7]
"""Documents on both sides of the boundary, and right at it."""


def gap(mine, theirs):
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())


def documents():
    return [tokens(count, seed) for seed, count in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=LONG, ids=lambda each: each.name)
def models(request):
    """transformers' model, and the same with the fast paths."""
    plain = build(small_config(request.param))
    assert longrope_switch_tokens(plain.config) == SWITCH
    return plain, philora.optimize(copy.deepcopy(plain))


def rows_of(logits, batch):
    """The logits of each document of a packed or padded batch."""
    if "position_ids" in batch and len(logits) == 1:
        return logits[0].split(LENGTHS)
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


BATCHES = {
    "packed": lambda: packed(documents()),
    "padded right": lambda: padded(documents()),
    "padded left": lambda: padded(documents(), "left"),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("switched", [True, False], ids=["fast", "plain"])
def test_every_document_has_the_logits_that_it_has_alone(models, batch, switched):
    plain, model = models
    alone = [plain(input_ids=each, use_cache=False).logits[0] for each in documents()]
    inputs = BATCHES[batch]()
    with fused(switched):  # the factors are no fast path: they stay right without
        got = rows_of(model(**inputs, use_cache=False).logits, inputs)
    assert max(gap(mine, each) for mine, each in zip(got, alone, strict=True)) < PACKED_FP32
    theirs = rows_of(plain(**inputs, use_cache=False).logits, inputs)
    assert gap(theirs[1], alone[1]) > 1e-2, "negative control: the long row decides for transformers' whole batch"


def test_left_padding_with_positions_as_generation_gives_them(models):
    plain, model = models
    inputs = padded(documents(), "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    got = rows_of(model(**inputs, use_cache=False).logits, inputs)
    for mine, each in zip(got, documents(), strict=True):
        assert gap(mine, plain(input_ids=each, use_cache=False).logits[0]) < PACKED_FP32


@pytest.mark.parametrize("count", [20, 64, 65, 200])
def test_one_document_alone_is_transformers_bit_for_bit(models, count):
    """cos and sin, the scaling of the attention among them."""
    plain, model = models
    x, positions = torch.zeros(1, count, 8), torch.arange(count)[None]
    model.model.rotary_emb.document_tokens = document_tokens(positions, None)
    mine = model.model.rotary_emb(x, positions)
    theirs = plain.model.rotary_emb(x, positions)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert plain.model.rotary_emb.attention_scaling > 1
    others = torch.arange(SWITCH + 1 if count <= SWITCH else SWITCH)[None]
    assert not torch.equal(plain.model.rotary_emb(x, others)[0][:, :20], mine[0][:, :20]), "negative control"


def test_the_gradient_of_training_is_that_of_the_documents_alone(models):
    plain, _ = models
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = philora.get_peft_model(copy.deepcopy(plain), config).train()

    def gradient(parts):
        """Of a sum over all logits with a weight of its own for each."""
        model.zero_grad()
        sum((each * torch.sin(torch.arange(each.numel())).view(each.shape)).sum() for each in parts).backward()
        return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])

    def together(inputs):
        return gradient(rows_of(model(**inputs, use_cache=False).logits, inputs))

    alone = gradient([model(input_ids=each, use_cache=False).logits[0] for each in documents()])
    # fp32 sums over hundreds of tokens, in another order
    assert gap(together(packed(documents())), alone) < 10 * PACKED_FP32
    assert gap(together(padded(documents())), alone) < 10 * PACKED_FP32
    model.get_base_model().model.rotary_emb.__class__ = type(plain.model.rotary_emb)
    assert gap(together(packed(documents())), alone) > 1e-2, "negative control"


def test_recomputation_sees_the_same_factors(models):
    _, model = models
    model = copy.deepcopy(model).train()
    want = model(**packed(documents()), use_cache=False).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model(**packed(documents()), use_cache=False).logits, want)


def test_generation_with_a_cache_stays_transformers(models):
    plain, model = models
    prompt = tokens(SWITCH - 4, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": True}
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
    batch = padded([tokens(30, 1), tokens(90, 2)], "left")
    with torch.no_grad():
        theirs, mine = plain(**batch, use_cache=True).logits, model(**batch, use_cache=True).logits
    assert gap(mine, theirs) < PACKED_FP32


def test_the_lengths_of_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    assert document_tokens(positions, None).tolist() == [[3, 3, 3, 2, 2, 1], [2, 2, 4, 4, 4, 4]]
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert document_tokens(None, mask).tolist() == [[3], [2]]
    assert document_tokens(torch.arange(4)[None], mask).tolist() == [[3] * 4, [4] * 4]
    assert document_tokens(None, None) is None


def test_only_longrope_models_are_touched_and_only_once(phi3):
    plain = philora.optimize(phi3())
    assert not isinstance(plain.model.rotary_emb, DocumentRotaryEmbedding)
    assert not plain.model._forward_pre_hooks
    model = philora.optimize(philora.optimize(build(small_config(LONG[0]))))
    assert isinstance(model.model.rotary_emb, DocumentRotaryEmbedding)
    assert len(model.model._forward_pre_hooks) == 1
    again = copy.deepcopy(model)
    inputs = packed(documents())
    assert torch.equal(again(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


def test_what_export_borrows_goes_back(models):
    plain = copy.deepcopy(models[0])
    inputs = padded(documents())
    want = plain(**inputs, use_cache=False).logits
    with restored(plain):
        mine = philora.optimize(plain)(**inputs, use_cache=False).logits
    assert gap(mine, want) > 1e-2
    assert type(plain.model.rotary_emb) is type(models[0].model.rotary_emb)
    assert not plain.model._forward_pre_hooks
    assert torch.equal(plain(**inputs, use_cache=False).logits, want)
    assert torch.equal(philora.optimize(plain)(**inputs, use_cache=False).logits, mine)


@pytest.mark.slow
def test_compiled():
    model = philora.optimize(build(small_config(LONG[-1])))
    compiled = torch.compile(model, backend="eager")
    for inputs in (packed(documents()), padded(documents()), packed(documents()[1:])):
        want = model(**inputs, use_cache=False).logits
        assert gap(compiled(**inputs, use_cache=False).logits, want) < PACKED_FP32


def test_positional_arguments_and_hidden_states(models):
    plain, model = models
    batch = padded(documents())
    with torch.no_grad():
        by_name = model.model(**batch, use_cache=False, output_hidden_states=True)
        by_place = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False)
    assert torch.equal(by_name.last_hidden_state, by_place.last_hidden_state)
    assert len(by_name.hidden_states) == plain.config.num_hidden_layers + 1


def test_the_adapter_of_a_longrope_model_loads_in_plain_peft(models, tmp_path):
    plain, _ = models
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    philora.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert type(loaded.get_base_model().model.rotary_emb) is type(plain.model.rotary_emb)


# ------------------------------------------------------------------------------------------- who is told


def rows(lengths):
    return Dataset.from_list([{"input_ids": [5] * each, "labels": [5] * each} for each in lengths])


def test_the_lengths_of_packed_and_unpacked_rows():
    plain = rows([90, 20, 64, 65, 7])
    assert sequence_lengths(plain).tolist() == [90, 20, 64, 65, 7]
    assert sorted(sequence_lengths(pack_dataset(plain, 128, "bfd"))) == [7, 20, 64, 65, 90]
    assert sequence_lengths(plain.select([3, 1])).tolist() == [65, 20]
    assert len(sequence_lengths(plain.to_iterable_dataset())) == len(sequence_lengths(None)) == 0


def test_rows_beyond_the_boundary_and_beyond_the_window():
    config = small_config(LONG[0], max_position_embeddings=80)
    notices = length_notices(config, {"train": rows([90, 20, 64, 65]), "eval": rows([64]), "more": None})
    assert len(notices) == 2
    assert re.search(
        r"train: 1 of 4 rows are longer than the model's window of 80 tokens \(the longest has 90\)", notices[0]
    )
    assert notices[0].endswith("Set max_length to 80 or less.")
    assert "train: 2 of 4 rows are longer than 64 tokens, where LongRoPE turns from its short factors" in notices[1]
    assert notices[1].endswith("For the short factors alone, set max_length to 64 or less.")
    assert length_notices(small_config(MODELS[0]), {"train": rows([64])}) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a LongRoPE model (Phi-4-mini: tied, grouped queries, partly rotated) and the nano tokenizer."""
    path = tmp_path_factory.mktemp("model")
    member = next(each for each in LONG if each.tie_word_embeddings)
    build(small_config(member, vocab_size=4096)).save_pretrained(path)
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(path)
    return path


def settings(folder, tmp_path):
    return {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "data": {"train": {"path": "helpdesk", "limit": 20}, "eval": {"path": "helpdesk", "limit": 4}},
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training_config": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "max_length": 512,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
        },
    }


def test_a_check_and_a_run_tell_how_many_rows_cross(folder, tmp_path, caplog):
    found = preflight(settings(folder, tmp_path))
    told = [each for each in found.notices if "LongRoPE" in each]
    assert len(told) == 1
    assert re.match(r"train: \d+ of 20 rows are longer than 64 tokens", told[0])
    with caplog.at_level(logging.WARNING):
        result = philora.train(settings(folder, tmp_path))
    assert all(each in caplog.text for each in told)
    assert told[0] in (result.folder / "train.log").read_text(encoding="utf-8")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), result.adapter)
    assert loaded.get_base_model().lm_head.weight is loaded.get_base_model().model.embed_tokens.weight


def test_a_context_longer_than_the_window_is_refused(folder, tmp_path):
    given = settings(folder, tmp_path)
    given["training_config"]["max_length"] = 4096
    expected = r"max_length=4096 - expected at most 2048, the context of the model. Set 2048 or less"
    for surface in (preflight, philora.train):
        with pytest.raises(ConfigError, match=expected):
            surface(given)
    assert not (tmp_path / "run").exists()


def test_the_older_name_of_longrope_is_explained(folder, tmp_path):
    """Files of Phi-3's first months say "su", which transformers 5.23 does not take any more."""
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    factors = {name: rope[name] for name in ("short_factor", "long_factor")}
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    for kind in ("longrope", "su"):
        config["rope_scaling"] = {"type": kind, **factors}
        (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if kind == "longrope":
            assert longrope_switch_tokens(load_skeleton(ModelConfig(str(older))).config) == SWITCH
    expected = r"expected `longrope` as rope_scaling.type in its config.json, not the older name `su`. Download"
    for surface in (preflight, philora.train):
        with pytest.raises(ModelError, match=expected):
            surface(settings(older, tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_trainer_of_a_script_tells_too(phi3, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    args = philora.SFTConfig(str(tmp_path), max_length=256, report_to="none", bf16=False, packing=True)
    with caplog.at_level(logging.WARNING, logger="philora"):
        philora.SFTTrainer(
            build(small_config(LONG[0])), args=args, train_dataset=rows([90, 20]), processing_class=tokenizer
        )
        philora.SFTTrainer(
            phi3(max_position_embeddings=64), args=args, train_dataset=rows([90, 20]), processing_class=tokenizer
        )
    told = [each.message for each in caplog.records if each.message.startswith("train:")]
    assert len(told) == 2
    assert told[0].startswith("train: 1 of 2 rows are longer than 64 tokens, where LongRoPE turns")
    assert told[1].startswith("train: 1 of 2 rows are longer than the model's window of 64 tokens")
