"""Scores against the plain model's own logits, and the choice of what is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from philora.evaluation import measures
from philora.evaluation import scores as evaluation
from philora.evaluation.scores import (
    Evaluation,
    Sample,
    Scores,
    compare_table,
    evaluate,
    exact_match,
    pick_samples,
    score,
    score_rows,
)
from philora.generation.batches import GenerationSettings, generate

VOCABULARY = 300
# fp32: the order of summation, in batches against a row at a time.
RELATIVE = 1e-5

Row = dict[str, list[int]]


def phi(**config: Any) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    options = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 128, **shape, **ids}
    # Wide weights: the predictions are far from uniform, so that a wrong position or scale shows.
    return Phi3ForCausalLM(Phi3Config(**{"initializer_range": 0.3, **options, **config})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()


def gemma2() -> Gemma2ForCausalLM:
    """A model that caps its logits after the output layer."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 12,
    }
    config = Gemma2Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.3, final_logit_softcapping=2.0, **shape
    )
    return Gemma2ForCausalLM(config).eval()


def with_lora(**options: Any) -> Any:
    return get_peft_model(phi(), LoraConfig(r=4, init_lora_weights=False, **options)).eval()


def with_prefix() -> Any:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(phi(num_key_value_heads=4), config).eval()


def rows_of(count: int = 24, seed: int = 0) -> list[Row]:
    """Rows of many lengths, about half of whose tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 60, (1,), generator=generator))
        ids = torch.randint(6, VOCABULARY, (length,), generator=generator)
        hidden = torch.rand(length, generator=generator) < 0.5
        rows.append({"input_ids": ids.tolist(), "labels": ids.masked_fill(hidden, -100).tolist()})
    return rows


def plain(model: Any, rows: list[Row], shift: int = 1) -> tuple[float, float, int]:
    """The oracle: the model's own logits, a row at a time."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-shift].float()
            labels = torch.tensor(row["labels"])[shift:]
            keep = labels != -100
            loss += float(cross_entropy(logits[keep], labels[keep], reduction="sum"))
            correct += int((logits.argmax(-1) == labels)[keep].sum())
            count += int(keep.sum())
    return loss / count, correct / count, count


MODELS: dict[str, Callable[[], Any]] = {
    "phi3": phi,
    "phi3, tied": lambda: phi(tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma2": gemma2,
    "lora on a projection": lambda: with_lora(target_modules=["qkv_proj"]),
    "lora on the output layer": lambda: with_lora(target_modules=["qkv_proj", "lm_head"]),
    "a trained output layer": lambda: with_lora(target_modules=["o_proj"], modules_to_save=["lm_head"]),
    "prefix": with_prefix,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_score_is_the_cross_entropy_of_the_models_own_logits(make):
    model, rows = make(), rows_of()
    loss, accuracy, count = plain(model, rows)
    got = score(model, rows, pad_token_id=0, batch_tokens=200)
    assert got.loss == pytest.approx(loss, rel=RELATIVE)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=10 * RELATIVE)
    assert got.token_accuracy == pytest.approx(accuracy, abs=1e-9)
    assert got.label_tokens == count


def test_the_comparison_notices_a_shifted_label():
    model, rows = phi(), [row for row in rows_of() if len(row["input_ids"]) > 4]
    got = score(model, rows, pad_token_id=0)
    assert got.loss != pytest.approx(plain(model, rows, shift=2)[0], rel=RELATIVE)


def test_the_cheap_way_is_taken_where_it_is_exact_and_only_there():
    def way(model: Any) -> type:
        rows = rows_of(2)
        pieces = list(evaluation._sequences(rows))
        with torch.inference_mode():
            return evaluation._label_logits(model, rows, pieces, torch.device("cpu")).func

    assert way(phi()) is way(gpt2()) is way(with_lora(target_modules=["qkv_proj"])) is evaluation._from_hidden
    assert way(gemma2()) is way(with_prefix()) is evaluation._from_model


def test_scores_do_not_depend_on_batching_chunks_or_container(monkeypatch):
    model, rows = phi(), rows_of()
    expected = score(model, rows, pad_token_id=0)
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    for batch_tokens in (1, 150):
        got = score(model, datasets.Dataset.from_list(rows), pad_token_id=5, batch_tokens=batch_tokens)
        assert got == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.slow
def test_a_batch_without_memory_is_halved_and_later_ones_too(caplog):
    """PyTorch's allocator refuses what nobody has, wherever more than 60 positions are computed at once."""
    model, rows = phi(), rows_of()
    want = score_rows(model, rows, pad_token_id=0)
    seen = []

    def limited(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.shape[0] * hidden.shape[1])
        if seen[-1] > most:
            torch.empty(1 << 60, dtype=torch.uint8)

    most = 60
    hook = model.model.layers[0].register_forward_hook(limited)
    got = score_rows(model, rows, pad_token_id=0)
    assert max(seen[-3:]) <= 60
    assert caplog.text.count("positions at once; continuing with") == sum(each > 60 for each in seen)
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    most = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        score_rows(model, rows, pad_token_id=0)
    hook.remove()


def test_the_output_layer_sees_labelled_positions_only():
    model, rows = phi(), rows_of()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].numel() // 48))
    got = score(model, rows, pad_token_id=0)
    probe = 2 * min(8, len(rows[0]["input_ids"]))
    assert sum(seen) == got.label_tokens + probe


def test_lora_scores_differ_from_the_base_with_the_adapter_disabled():
    model, rows = with_lora(target_modules=["qkv_proj"]), rows_of()
    adapter = score(model, rows, pad_token_id=0)
    with model.disable_adapter():
        base = score(model, rows, pad_token_id=0)
    assert base.loss == pytest.approx(plain(phi(), rows)[0], rel=RELATIVE)
    assert adapter.loss != pytest.approx(base.loss, rel=1e-3)


def test_the_sequences_of_a_pack_are_scored_apart():
    model, rows = phi(), rows_of()
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for row in rows:
        packed["input_ids"] += row["input_ids"]
        packed["labels"] += row["labels"]
        packed["seq_lengths"].append(len(row["input_ids"]))
    assert score(model, [packed], pad_token_id=0) == pytest.approx(score(model, rows, pad_token_id=0), rel=RELATIVE)


def test_longrope_scores_do_not_depend_on_their_neighbours(monkeypatch):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "rope_theta": 10000.0}
    model, rows = phi(rope_parameters=rope, original_max_position_embeddings=24), rows_of()
    loss, _, _ = plain(model, rows)
    assert score(model, rows, pad_token_id=0).loss == pytest.approx(loss, rel=RELATIVE)
    monkeypatch.setattr(evaluation, "longrope_switch_tokens", lambda config: None)
    assert score(model, rows, pad_token_id=0).loss != pytest.approx(loss, rel=RELATIVE)


def test_a_bfloat16_model_is_scored_from_fp32_logits():
    model, rows = phi().bfloat16(), rows_of()
    # The batch changes the shapes of bf16 matrix products, and with them their rounding.
    assert score(model, rows, pad_token_id=0).loss == pytest.approx(plain(model, rows)[0], rel=5e-3)


def test_nothing_labelled_is_nan_and_null_in_json():
    got = score(
        phi(), [{"input_ids": [7, 8], "labels": [-100, -100]}, {"input_ids": [7], "labels": [7]}], pad_token_id=0
    )
    assert math.isnan(got.loss)
    assert got.label_tokens == 0
    written = json.dumps(Scores(*got).to_dict(), allow_nan=False)
    assert json.loads(written)["loss"] is None
    assert math.isnan(Scores.from_dict(json.loads(written)).loss)


def test_score_keeps_the_training_flags():
    model = phi().train()
    score(model, rows_of(2), pad_token_id=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Yes.", "Yes.", True),
        ("  Yes,\n\tit does. ", "Yes, it does.", True),
        ("yes.", "Yes.", False),
        ("Yes", "Yes.", False),
        ("", "", True),
        ("Ja, på norsk.", "Ja, på norsk.", True),
    ],
)
def test_exact_match(answer, reference, equal):
    assert exact_match(answer, reference) is equal


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and Phi's special tokens: enough to ask and answer."""
    special = ["<unk>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>"))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<|endoftext|>", pad_token="<unk>", additional_special_tokens=special[2:]
    )
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "phi3.jinja").read_text()
    return made


def test_evaluate_gives_scores_and_samples():
    model, tokenizer, rows = phi(), byte_tokenizer(), rows_of(3)
    prompts = [[{"role": "user", "content": text}] for text in ("hi", "why?", "x" * 200)]
    settings = GenerationSettings(max_new_tokens=6)
    answers = [each.text for each in generate(model, tokenizer, prompts[:2], settings)]
    conversations = list(zip(prompts, [f" {answers[0]}\n", "something else", "too long"], strict=True))
    result = evaluate(model, tokenizer, rows, conversations, settings, pad_token_id=0)
    assert (result.scores.exact_match, result.scores.exact_match_count, result.scores.answers) == (0.5, 1, 2)
    assert result.scores.loss == score(model, rows, pad_token_id=0).loss
    assert result.too_long == 1
    assert result.seconds > 0
    first = result.samples[0]
    assert (first.prompt, first.answer, first.matched, first.tokens) == (prompts[0], answers[0], True, 6)
    assert Scores.from_dict(result.scores.to_dict()) == result.scores


def test_evaluate_without_conversations_has_no_exact_match():
    result = evaluate(phi(), byte_tokenizer(), rows_of(2), [], pad_token_id=0)
    assert result.scores.exact_match is None
    assert result.samples == []


def test_compare_table():
    before = Scores(
        loss=3.21987, perplexity=25.02, token_accuracy=0.412, label_tokens=900, exact_match=0.03, answers=200
    )
    after = Scores(loss=0.4, perplexity=1.4918, token_accuracy=0.905, label_tokens=900, exact_match=0.845, answers=200)
    assert compare_table(before, after) == [
        ("Loss", "3.220", "0.400", "−2.820"),
        ("Perplexity", "25.020", "1.492", "−23.528"),
        ("Token accuracy", "41.2%", "90.5%", "+49.3 pp"),
        ("Exact match", "3.0%", "84.5%", "+81.5 pp"),
    ]


def test_a_difference_has_the_digits_of_its_figures():
    """3,605 and 4,228 differ by 623, and not by 622.574."""
    paired = measures.Paired("perplexity", "Perplexity", 3605.2, 4227.8, -922.44, 1208.1, 1, 0, 1)
    assert evaluation.interval_of(paired) == "+623 [−922, +1,208]"


def test_compare_table_without_answers_and_with_what_is_not_finite():
    before = Scores(loss=1000.0, perplexity=math.inf, token_accuracy=math.nan, label_tokens=9)
    after = Scores(loss=math.nan, perplexity=math.inf, token_accuracy=0.5, label_tokens=9)
    assert compare_table(before, after) == [
        ("Loss", "1,000", "–", "–"),
        ("Perplexity", "inf", "inf", "–"),
        ("Token accuracy", "–", "50.0%", "–"),
    ]


def test_better_knows_which_way_is_up():
    loss, *_, exact = evaluation.METRICS
    assert evaluation.better(loss, 2.0, 1.0) is True
    assert evaluation.better(exact, 0.9, 0.1) is False
    assert evaluation.better(exact, 0.5, 0.5) is None
    assert evaluation.better(exact, None, 0.5) is None


def evaluation_of(*answers: tuple[int, str]) -> Evaluation:
    """Pairs of how many user turns the prompt has, and the answer; the reference is always `right`."""
    samples = []
    for index, (turns, answer) in enumerate(answers):
        prompt = [{"role": role, "content": f"{index}"} for role in (["user", "assistant"] * turns)[:-1]]
        samples.append(Sample(prompt, "right", answer, answer == "right", stopped=True, tokens=1))
    return Evaluation(Scores(1.0, math.e, 0.5, 10), samples, seconds=1.0)


def test_pick_samples_shows_a_conversation_a_gain_and_a_miss():
    before = evaluation_of((1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e"), (1, "right"))
    after = evaluation_of((1, "a"), (1, "right"), (1, "x"), (2, "y"), (2, "right"), (1, "right"))
    picked = pick_samples(before, after)
    assert [(each["base"], each["adapter"]) for each in picked] == [("e", "right"), ("b", "right"), ("c", "x")]
    assert picked[0]["prompt"] == before.samples[4].prompt
    assert (picked[0]["base_matched"], picked[0]["adapter_matched"], picked[0]["reference"]) == (False, True, "right")
    assert pick_samples(before, after) == picked
    assert len(pick_samples(before, after, n=10)) == 6
    assert json.dumps(picked)


def test_pick_samples_takes_what_there_is():
    assert pick_samples(evaluation_of(), evaluation_of()) == []
    only = evaluation_of((1, "right"), (1, "right"))
    assert len(pick_samples(only, only)) == 2
    other = evaluation_of((3, "right"))
    assert pick_samples(only, other) == []
