"""Batched generation against transformers' own on one prompt at a time, and what it leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.generation import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from philora.adapters.fast_layers import optimize
from philora.errors import ConfigError, DataError, ModelError
from philora.evaluation.scores import evaluate
from philora.generation import batches as generation
from philora.generation import decoding
from philora.generation.batches import Answer, GenerationSettings, Sampler, generate, stop_token_ids
from tests import on_device
from tests.tolerances import LOGITS_BF16

SPECIAL = ["<unk>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TURNS = [
    ("hi", "Hello."),
    ("how do I resume a run that was stopped", "Give the same command with --resume."),
    ("which formats", "JSON, JSONL, CSV and Parquet files, a folder of them, or a dataset of the hub."),
    ("what is rank", "The width of the update: r."),
    ("where does the report stand", "In the run folder, as report.html; it opens in any browser."),
]


def user(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


PROMPTS = [
    *(user(question) for question, _ in TURNS),
    user("hi", "Hello.", "which formats"),
    [{"role": "system", "content": "Be brief."}, *user("what is rank")],
    user("which rank do I take for a report that I stopped, and how do I resume the folder of formats?"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with Phi-3's special tokens and template."""
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text for turn in TURNS for text in turn],
        BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<unk>", additional_special_tokens=SPECIAL[2:]
    )
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "phi3.jinja").read_text()
    return made


def tiny(tokenizer: PreTrainedTokenizerFast, **config: Any) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    options: dict[str, Any] = {**shape, **ids, "num_key_value_heads": 2, "max_position_embeddings": 256, **config}
    return Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), **options))


def taught(tokenizer: PreTrainedTokenizerFast, **config: Any) -> Phi3ForCausalLM:
    """A tiny model that has learned the turns: its answers have different lengths, and end by themselves."""
    model = tiny(tokenizer, **config).train()
    chats = [user(question, answer) for question, answer in TURNS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def wild(tokenizer: PreTrainedTokenizerFast, **config: Any) -> Phi3ForCausalLM:
    """A model of wide random weights: what it says next hangs on every token before, and on where it stands."""
    return tiny(tokenizer, initializer_range=0.3, **config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    return taught(tokenizer)


def one_at_a_time(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[dict[str, str]]], new_tokens: int
) -> list[str]:
    """The oracle: transformers' greedy generate, unbatched, so that nothing is padded."""
    texts = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=[1, 5], pad_token_id=0, use_cache=False
        )
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def texts(answers: Sequence[Answer]) -> list[str]:
    return [each.text for each in answers]


@pytest.fixture
def through_transformers(monkeypatch) -> None:
    """Phi-3 answers as any other model does."""
    monkeypatch.setattr(decoding, "covers", lambda model: False)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_answers_equal_those_of_one_prompt_at_a_time(model, tokenizer, batch_size):
    model = copy.deepcopy(model).to(on_device.chosen())
    expected = one_at_a_time(model, tokenizer, PROMPTS, 24)
    got = generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24, batch_size=batch_size))
    assert texts(got) == expected
    assert expected[:2] == ["Hello.", "Give the same command with --resume."]
    assert len(set(expected)) > 4


@pytest.mark.usefixtures("through_transformers")
def test_batched_answers_of_transformers_equal_those_of_one_prompt_at_a_time(model, tokenizer):
    expected = one_at_a_time(model, tokenizer, PROMPTS, 24)
    assert texts(generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24, batch_size=3))) == expected


def next_place(own: Any) -> Any:
    """Each new token stands one place too far."""
    return lambda self, tokens, positions: own(self, tokens, [each + 1 for each in positions])


def neighbours_cache(own: Any) -> Any:
    """Prompts are read into each other's rows."""
    return lambda self, prompts, places: own(self, prompts, list(places)[::-1])


def other_half(own: Any) -> Any:
    """The rotation turns the wrong way."""
    return lambda x, cos, sin: own(x, cos, -sin)


@pytest.mark.parametrize(
    ("owner", "name", "plant"),
    [
        (decoding.Decoder, "step", next_place),
        (decoding.Decoder, "prefill", neighbours_cache),
        (decoding, "_rotate", other_half),
    ],
)
def test_the_comparison_notices_a_fault_of_the_decoder(tokenizer, monkeypatch, owner, name, plant):
    model = wild(tokenizer)
    settings = GenerationSettings(max_new_tokens=24, batch_size=3)
    expected = one_at_a_time(model, tokenizer, PROMPTS, 24)
    assert texts(generate(model, tokenizer, PROMPTS, settings)) == expected
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    assert texts(generate(model, tokenizer, PROMPTS, settings)) != expected


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 12},
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ],
    ids=["window", "partial rotary", "tied"],
)
def test_members_of_the_family_answer_as_they_do_alone(tokenizer, config):
    model = wild(tokenizer, **config)
    expected = one_at_a_time(model, tokenizer, PROMPTS, 24)
    assert decoding.covers(model)
    assert texts(generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24, batch_size=3))) == expected


def test_bf16_logits_are_those_of_transformers_up_to_rounding(model, tokenizer):
    """Over reordered weights, with an adapter beside them, and without it."""
    lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
    adapted = optimize(get_peft_model(copy.deepcopy(model), lora)).to(torch.bfloat16).eval()
    prompts = generation.prompt_tokens(tokenizer, PROMPTS)
    tokens = [7, 30, 50, 90, 12, 44, 8, 9]

    def gaps(model: Any, oracle: Any) -> list[float]:
        decoder = decoding.Decoder(model, len(prompts), 200)
        logits = [decoder.prefill(prompts, range(len(prompts))), decoder.step(tokens, [len(each) for each in prompts])]
        found = []
        for row, prompt in enumerate(prompts):
            expected = oracle(input_ids=torch.tensor([[*prompt, tokens[row]]])).logits[0, -2:].float()
            got = torch.stack([each[row] for each in logits]).float()
            found.append(float((got - expected).norm() / expected.norm()))
        return found

    with torch.inference_mode():
        assert max(gaps(adapted, adapted)) < LOGITS_BF16
        with adapted.disable_adapter():
            base = gaps(adapted, adapted)
            assert max(base) < LOGITS_BF16
        assert min(gaps(adapted, model.to(torch.float32))) > 2 * LOGITS_BF16, "the adapter's part shows"


def test_greedy_answers_are_those_of_the_pipeline_in_its_own_batches(tokenizer, monkeypatch):
    model = wild(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=[1, 5], pad_token_id=0)
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    answer = pipeline("text-generation", model=model, tokenizer=left)
    found = answer(PROMPTS, batch_size=4, do_sample=False, max_new_tokens=16, return_full_text=False)
    expected = [each[0]["generated_text"] for each in found]
    settings = GenerationSettings(max_new_tokens=16, batch_size=4)
    assert texts(generate(model, tokenizer, PROMPTS, settings)) == expected
    monkeypatch.setattr(decoding, "_rotate", other_half(decoding._rotate))
    assert texts(generate(model, tokenizer, PROMPTS, settings)) != expected


def right_padding(pad: Any) -> Any:
    return lambda rows, value, side, device=None: pad(rows, value, "right", device)


def no_mask(pad: Any) -> Any:
    return lambda rows, value, side, device=None: pad(rows, 1 if rows[0][0] == 1 else value, side, device)


@pytest.mark.usefixtures("through_transformers")
@pytest.mark.parametrize("plant", [right_padding, no_mask])
def test_the_comparison_notices_wrong_padding(model, tokenizer, monkeypatch, plant):
    expected = one_at_a_time(model, tokenizer, PROMPTS, 24)
    monkeypatch.setattr(generation, "pad", plant(generation.pad))
    got = generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24, batch_size=16))
    assert texts(got) != expected


def test_stopped_and_tokens_tell_how_an_answer_ended(model, tokenizer):
    short, long = generate(model, tokenizer, [PROMPTS[0], PROMPTS[2]], GenerationSettings(max_new_tokens=8))
    hello = len(tokenizer("Hello.", add_special_tokens=False)["input_ids"])
    assert (short.text, short.stopped, short.tokens) == ("Hello.", True, hello + 1)
    assert (long.stopped, long.tokens) == (False, 8)
    assert TURNS[2][1].startswith(long.text)


def test_peft_model_answers_as_itself_and_as_its_base(model, tokenizer):
    expected_base = one_at_a_time(model, tokenizer, PROMPTS[:3], 12)
    peft_model = get_peft_model(tiny(tokenizer), LoraConfig(target_modules=["qkv_proj"], r=4, init_lora_weights=False))
    peft_model.get_base_model().load_state_dict(
        {name.replace("qkv_proj", "qkv_proj.base_layer"): value for name, value in model.state_dict().items()},
        strict=False,
    )
    assert isinstance(peft_model, PeftModel)
    settings = GenerationSettings(max_new_tokens=12)
    adapter = texts(generate(peft_model, tokenizer, PROMPTS[:3], settings))
    assert adapter == one_at_a_time(peft_model, tokenizer, PROMPTS[:3], 12)
    with peft_model.disable_adapter():
        assert texts(generate(peft_model, tokenizer, PROMPTS[:3], settings)) == expected_base
    assert adapter != expected_base


def test_training_state_is_restored(model, tokenizer):
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    seen: list[object] = []
    handle = model.register_forward_hook(lambda module, args, kwargs, output: seen.append(output), with_kwargs=True)
    flags = [module.training for module in model.modules()]
    try:
        generate(model, tokenizer, PROMPTS[:2], GenerationSettings(max_new_tokens=4))
        assert [module.training for module in model.modules()] == flags
        assert model.is_gradient_checkpointing
        assert model.config.use_cache is False
        assert all(output.past_key_values is not None for output in seen)
        assert all(output.logits.shape[1] == 1 for output in seen[1:])
    finally:
        handle.remove()
        model.gradient_checkpointing_disable()
        model.config.use_cache = True
        model.eval()


def test_greedy_ignores_what_the_models_own_config_asks_for(tokenizer):
    model = taught(tokenizer)
    expected = one_at_a_time(model, tokenizer, PROMPTS, 12)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=5.0, eos_token_id=1, pad_token_id=0
    )
    assert texts(generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=12))) == expected


def test_sampling_follows_its_seed_and_leaves_the_callers(model, tokenizer):
    def sample(seed: int, **options: Any) -> list[str]:
        settings = GenerationSettings(max_new_tokens=12, do_sample=True, seed=seed, **options)
        return texts(generate(model, tokenizer, PROMPTS, settings))

    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = sample(1, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(1, temperature=2.0) == first
    assert sample(2, temperature=2.0) != first
    assert sample(1, temperature=2.0, batch_size=3) == first, "a prompt's neighbours have no part in its answer"
    assert sample(3, top_k=1) == texts(generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=12)))


def test_sampling_draws_as_often_as_transformers_would(model):
    """The shares of many draws against the probabilities that transformers' warpers leave."""
    torch.manual_seed(3)
    logits = torch.randn(1, 40) * 2
    for options in (
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.6},
    ):
        settings = GenerationSettings(do_sample=True, **{"top_k": 40, **options})
        warped = TemperatureLogitsWarper(settings.temperature or 1.0)(None, logits)
        warped = TopKLogitsWarper(settings.top_k)(None, warped)
        warped = TopPLogitsWarper(settings.top_p or 1.0)(None, warped)
        numbers = (torch.arange(20_000) + 0.5) / 20_000  # evenly spread: shares are exact up to one draw a token
        drawn = generation.Sampler(model, settings).draw(logits.expand(20_000, -1), numbers)
        shares = torch.bincount(drawn, minlength=40) / 20_000
        assert (shares - warped.softmax(-1)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("path", ["rows", "transformers"])
def test_a_stop_string_ends_an_answer_and_is_cut(model, tokenizer, path, monkeypatch):
    if path == "transformers":
        monkeypatch.setattr(decoding, "covers", lambda model: False)
    settings = GenerationSettings(max_new_tokens=40, stop_strings=(" CSV", "folder"))
    hello, formats = generate(model, tokenizer, [PROMPTS[0], PROMPTS[2]], settings)
    assert (hello.text, hello.stopped) == ("Hello.", True)
    assert (formats.text, formats.stopped) == ("JSON, JSONL,", True)
    whole = tokenizer("JSON, JSONL, CSV", add_special_tokens=False)["input_ids"]
    assert formats.tokens == len(whole)


def test_stop_token_ids_holds_both_of_phi(model, tokenizer):
    assert set(stop_token_ids(model, tokenizer)) == {1, 5}
    assert set(stop_token_ids(GenerationConfig(eos_token_id=[5, 7]), tokenizer)) == {1, 5, 7}


@pytest.mark.usefixtures("through_transformers")
def test_a_batch_that_memory_cannot_hold_is_halved(model, tokenizer, monkeypatch, caplog):
    own = Phi3ForCausalLM.generate
    sizes: list[int] = []

    def small(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, *args, **kwargs)

    expected = generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=4))
    monkeypatch.setattr(Phi3ForCausalLM, "generate", small)
    assert generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=4)) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert "out of memory with 8 prompts at once; continuing with 4" in caplog.text


def test_rows_that_memory_cannot_hold_are_halved_and_what_is_answered_stays(model, tokenizer, monkeypatch, caplog):
    own = decoding.Decoder.step
    sizes: list[int] = []

    def small(self: Any, tokens: Any, positions: Any) -> Any:
        sizes.append(self.rows)
        if self.rows > 2 and len(sizes) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, tokens, positions)

    expected = generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24))
    monkeypatch.setattr(decoding.Decoder, "step", small)
    assert generate(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=24)) == expected
    assert "out of memory with 8 prompts at once; continuing with 4" in caplog.text
    assert sizes[0] == 8
    assert max(sizes[7:]) == 2


def test_an_ended_row_makes_room_for_the_next_prompt(model, tokenizer, monkeypatch):
    steps: list[int] = []
    own = decoding.Decoder.step

    def counted(self: Any, tokens: Any, positions: Any) -> Any:
        steps.append(self.rows)
        return own(self, tokens, positions)

    monkeypatch.setattr(decoding.Decoder, "step", counted)
    settings = GenerationSettings(max_new_tokens=24, batch_size=4)
    answers = generate(model, tokenizer, PROMPTS * 2, settings)
    lengths = sorted((each.tokens for each in answers), reverse=True)
    batched = sum(lengths[start] - 1 for start in range(0, len(lengths), 4))
    assert len(steps) <= batched, "no more steps than batches of four whose answers end together, the best there are"
    assert min(steps) <= 2, "the cache is halved towards the end"


def test_longrope_answers_do_not_depend_on_their_neighbours(tokenizer, monkeypatch):
    half = 6
    rope = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half, "rope_theta": 10000.0}
    model = taught(tokenizer, rope_parameters=rope, original_max_position_embeddings=24)
    prompts = [*PROMPTS, user("hi " * 12), user("hi " * 30)]
    expected = one_at_a_time(model, tokenizer, prompts, 12)
    settings = GenerationSettings(max_new_tokens=12)
    assert texts(generate(model, tokenizer, prompts, settings)) == expected
    monkeypatch.setattr(generation, "longrope_switch_tokens", lambda config: None)
    assert texts(generate(model, tokenizer, prompts, settings)) != expected


def test_a_prompt_that_fills_the_window_is_refused_and_a_long_one_gets_what_is_left(tokenizer):
    model = tiny(tokenizer, max_position_embeddings=32)
    with pytest.raises(DataError, match=r"conversation: 1='\d+ tokens' - expected fewer than the model's 32\. Shorten"):
        generate(model, tokenizer, [user("hi"), user("hi there " * 40)])
    near = user("hi " * 10)
    length = len(generation.prompt_tokens(tokenizer, [near])[0])
    assert 16 < length < 32
    (answer,) = generate(model, tokenizer, [near], GenerationSettings(max_new_tokens=100))
    assert answer.tokens <= 32 - length


def test_no_conversations_no_answers(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_a_tokenizer_without_a_template_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match=r"tokenizer: chat_template=None - expected a template"):
        generate(model, tokenizer, PROMPTS[:1])


def test_settings_report_all_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        GenerationSettings(max_new_tokens=0, batch_size=0, temperature=0.0, top_p=1.5, top_k=0, stop_strings=("",))
    message = str(caught.value)
    assert message.startswith("9 faults:\n  generation: max_new_tokens=0 - expected a whole number of at least 1.")
    assert (
        "generation: top_p=1.5 - expected null without do_sample. Set do_sample to true, or leave top_p out." in message
    )


# -- numbers that are none, and extreme ones


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_model_of_nan_is_told_and_gives_no_answer(tokenizer, monkeypatch, fast, sampled):
    monkeypatch.setenv("PHILORA_FUSED", "1" if fast else "0")
    broken = tiny(tokenizer).eval()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(generation.NotFiniteError, match=r"model: logits=nan - expected"):
        generate(broken, tokenizer, PROMPTS[:2], GenerationSettings(max_new_tokens=4, do_sample=sampled))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-40},
        {"temperature": 5e-324},
        {"top_p": 1e-46},
        {"top_p": 5e-324, "temperature": 1e30},
        {"top_k": 10**30, "temperature": 1e-40},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e4, 3e37])
def test_a_draw_is_always_a_token_and_tends_to_the_likeliest(values, scale):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * scale
    logits[:, ::7] = -torch.inf  # tokens that are not allowed
    randoms = [torch.Generator().manual_seed(seed) for seed in range(len(logits))]
    drawn = Sampler(None, GenerationSettings(do_sample=True, **values))(logits, randoms)
    assert drawn == logits.argmax(-1).tolist()


def test_evaluation_of_a_model_of_nan_goes_on_without_answers(tokenizer):
    """The report of a run whose loss became NaN is what says so."""
    broken = tiny(tokenizer).eval()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    found = evaluate(broken, tokenizer, [], [(PROMPTS[0], "a")], pad_token_id=0)
    assert [each.answer for each in found.samples] == [""]
