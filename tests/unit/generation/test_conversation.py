"""Answers as they come, against transformers' own; who answers; what a conversation remembers and lets go."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from philora.configuration.sections import TokenizerConfig
from philora.errors import AdapterError, ConfigError, DataError, ModelError, TargetError
from philora.generation import decoding
from philora.generation.batches import Sampler
from philora.generation.conversation import (
    AdapterPool,
    ContextError,
    Conversation,
    Memory,
    chat_settings,
    load_named,
    load_pool,
    name_of,
)
from philora.models.loading import load_tokenizer
from tests.adapters_of_nano import NANO
from tests.conftest import COLOURS

QUESTIONS = ["Who are you?", "What is a run folder?", "How do I continue after Ctrl-C?"]


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def voices(colours):
    return load_pool(colours)


def told(voices, messages, adapter, memory=None, **settings):
    reply = voices.answer(voices.prompt(messages), chat_settings(**{"max_new_tokens": 24, **settings}), adapter, memory)
    pieces = list(reply)
    assert "".join(pieces) == reply.text
    return reply


def by_transformers(voices, messages, adapter, new_tokens=24):
    """The oracle: transformers' greedy generate without a cache."""
    voices.switch(adapter)
    ids = torch.tensor([voices.prompt(messages)])
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=sorted(voices.stops), pad_token_id=0, use_cache=False
    )
    output = voices.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return voices.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# -- answers


@pytest.mark.parametrize("adapter", [None, "red"])
def test_the_answer_is_that_of_transformers(voices, adapter):
    for question in QUESTIONS:
        assert told(voices, user(question), adapter).text == by_transformers(voices, user(question), adapter)


def random_voices(**config):
    """A model of random weights with an adapter of random weights, and the bundled model's tokenizer."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 4085, "pad_token_id": 0, "num_key_value_heads": 2}
    torch.manual_seed(3)
    base = Phi3ForCausalLM(Phi3Config(vocab_size=4096, **shape, **ids, **config))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return AdapterPool(adapted, load_tokenizer(NANO, TokenizerConfig()), "base", {"random": "default"})


def test_a_token_that_was_not_read_shows():
    """The control of the test above: the same comparison, with a memory that claims to have read one token more."""
    voices = random_voices()
    messages = user("Who are you?")
    prompt = voices.prompt(messages)
    assert told(voices, messages, "random").text == by_transformers(voices, messages, "random")
    memory = Memory(adapter="random")
    voices.next_logits(prompt[:-3], memory)
    memory.ids = prompt[:-2]
    assert told(voices, messages, "random", memory).text != by_transformers(voices, messages, "random")


SIX = [1.0, 1.2, 1.5, 2.0, 3.0, 4.0]
LONGROPE = {
    "max_position_embeddings": 96,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": SIX,
        "original_max_position_embeddings": 24,
    },
}


@pytest.mark.parametrize(
    "config",
    [{"max_position_embeddings": 96, "sliding_window": 8, "original_max_position_embeddings": 96}, LONGROPE],
    ids=["sliding window", "LongRoPE"],
)
def test_windows_and_factors_that_change_on_the_way(config):
    """The prompt has fewer tokens than the boundary, prompt and answer more; then a second turn follows."""
    voices = random_voices(**config)
    messages = user("Who are you, and why?")
    boundary = config.get("sliding_window") or 24
    first = told(voices, messages, "random", max_new_tokens=30)
    assert len(voices.prompt(messages)) < boundary + 12 < first.prompt_tokens + first.tokens
    assert first.text == by_transformers(voices, messages, "random", 30)
    messages = [*messages, {"role": "assistant", "content": first.text}, *user("Continue.")]
    second = told(voices, messages, "random", first.memory, max_new_tokens=10)
    assert second.text == by_transformers(voices, messages, "random", 10)


def test_factors_of_a_long_conversation_do_not_stay_in_a_short_one():
    voices = random_voices(**LONGROPE)
    long = told(voices, user("Who are you, and why? And where, and when, and for whom?"), "random", max_new_tokens=30)
    assert len(long.memory.ids) > 24
    short = user("Who are you?")
    assert told(voices, short, "random", long.memory, max_new_tokens=4).text == by_transformers(
        voices, short, "random", 4
    )


def test_a_seed_gives_the_same_answer_whoever_else_is_answered(voices):
    drawn = {"temperature": 1.5, "top_p": 0.95, "top_k": 200}
    alone = [told(voices, user(QUESTIONS[1]), None, seed=seed, **drawn).text for seed in (1, 2, 1)]
    assert alone[0] == alone[2] != alone[1]
    prompt = voices.prompt(user(QUESTIONS[1]))
    at_once = [
        voices.answer(prompt, chat_settings(24, seed=1, **drawn), None),
        voices.answer(prompt, chat_settings(24, seed=5, **drawn), "red"),
        voices.answer(prompt, chat_settings(24, seed=2, **drawn), None),
    ]
    for _ in itertools.zip_longest(*at_once):
        pass
    assert [at_once[0].text, at_once[2].text] == alone[:2]


def by_steps(voices, adapter, wanted):
    """Texts of answers that share their steps; each comes a step after the one before, and the second goes early."""
    replies = [voices.answer(voices.prompt(user(text)), chat_settings(**options), adapter) for text, options in wanted]
    for place in range(200):
        there = [each for index, each in enumerate(replies) if index <= place and each.finish is None]
        if place == 4:
            there = [each for each in there if each is not replies[1]]  # as one that has to wait for memory
        assert len(voices.step(adapter, there)) == len(there)
        if not there and place > len(replies):
            break
    assert adapter not in voices._batches, "nothing is held when all have ended"
    return [each.text for each in replies]


TOGETHER = [
    (QUESTIONS[0], {"max_new_tokens": 20}),
    (QUESTIONS[1], {"max_new_tokens": 12}),
    ("Why? " * 40, {"max_new_tokens": 9}),
    (QUESTIONS[1], {"max_new_tokens": 20, "temperature": 1.5, "top_p": 0.95, "top_k": 200, "seed": 1}),
    (QUESTIONS[2], {"max_new_tokens": 1}),
    (QUESTIONS[2], {"max_new_tokens": 40, "stop": ["e"]}),
]
WINDOW = {"max_position_embeddings": 320, "original_max_position_embeddings": 320}


@pytest.mark.parametrize("kind", ["trained", "sliding window", "LongRoPE"])
def test_answers_that_share_their_steps_are_those_alone(voices, kind):
    if kind == "sliding window":
        voices = random_voices(**WINDOW, sliding_window=32)
    if kind == "LongRoPE":  # some end before the boundary and share, others are computed alone
        voices = random_voices(**{**LONGROPE, "max_position_embeddings": 320})
    adapter = voices.adapters[0]
    for who in (adapter, None):
        alone = [told(voices, user(text), who, **options).text for text, options in TOGETHER]
        assert by_steps(voices, who, TOGETHER) == alone
    assert voices._packing is not None, "they did share"


@pytest.mark.parametrize("fault", ["rows", "positions"])
def test_a_neighbours_row_or_place_shows(voices, monkeypatch, fault):
    """The control of the test above."""
    alone = [told(voices, user(text), "red", **options).text for text, options in TOGETHER]
    own = decoding.Decoder.step

    def planted(self, tokens, positions):
        if fault == "positions":
            positions = [max(0, each - 1) for each in positions]
        logits = own(self, tokens, positions)
        return logits.roll(1, 0) if fault == "rows" else logits

    monkeypatch.setattr(decoding.Decoder, "step", planted)
    assert by_steps(voices, "red", TOGETHER) != alone


def test_the_random_state_outside_stays(voices):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    told(voices, user("hi"), None, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_follow_the_probabilities(voices):
    logits = voices.next_logits(voices.prompt(user(QUESTIONS[1])), Memory())
    sampler = Sampler(voices.model, chat_settings(temperature=0.7, top_k=3))
    random = torch.Generator().manual_seed(0)
    draws = torch.tensor([sampler(logits[None], [random])[0] for _ in range(1500)])
    best = logits.topk(3)
    expected = (best.values / 0.7).softmax(-1)
    counts = torch.stack([(draws == token).float().mean() for token in best.indices])
    # Three standard deviations of 1500 draws are below 0.04.
    assert torch.allclose(counts, expected, atol=0.04)
    assert not torch.allclose(counts, best.values.softmax(-1), atol=0.04), "the temperature has an effect"


def scripted(voices, monkeypatch, text):
    """Makes the model say a text, a token at each step, and then stop."""
    script = [*voices.tokenizer(text, add_special_tokens=False)["input_ids"], min(voices.stops)]
    start = len(voices.prompt(user("hi")))
    monkeypatch.setattr(
        voices, "next_logits", lambda ids, _: torch.eye(len(voices.tokenizer))[script[len(ids) - start]]
    )
    return voices.answer(voices.prompt(user("hi")), chat_settings(400), "red")


def test_pieces_are_whole_characters(voices, monkeypatch):
    text = "déjà vu 🙂 漢字, e\u0301\nand  two spaces."
    reply = scripted(voices, monkeypatch, text)
    pieces = list(reply)
    assert "".join(pieces) == reply.text == text
    assert reply.finish == "stop"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "" in pieces, "a character of several tokens comes with its last one"
    assert "🙂" in pieces
    assert len(pieces) == reply.tokens


def test_stop_strings_are_held_back_and_cut(voices):
    reply = voices.answer(
        voices.prompt(user("Who are you?")), chat_settings(40, stop=[", and something", "noth"]), "red"
    )
    seen = ""
    for piece in reply:
        seen += piece
        assert "noth" not in seen
    assert seen == reply.text == "I am red, and "
    assert reply.finish == "stop"
    assert told(voices, user("Who are you?"), "red", stop=["missing"], max_new_tokens=40).text == COLOURS["red"]


def test_length_and_window_end_an_answer(voices):
    reply = told(voices, user("Who are you?"), "red", max_new_tokens=3)
    assert (reply.finish, reply.tokens) == ("length", 3)
    window = random_voices(max_position_embeddings=32, original_max_position_embeddings=32)
    reply = told(window, user("Who are you?"), None, max_new_tokens=500)
    assert (reply.finish, reply.prompt_tokens + reply.tokens) == ("length", 32)


def test_who_answers(voices):
    for name in ("green", None, "red", "green", None):
        text = told(voices, user("Who are you?"), name, max_new_tokens=40).text
        assert text == COLOURS[name] if name else text not in COLOURS.values()


# -- memory


def test_turns_go_on_from_what_was_read(voices):
    talk = Conversation(voices, chat_settings(24), "red")
    for turn, question in enumerate(QUESTIONS):
        reply, _ = talk.ask(question)
        assert (len(reply.memory.ids) > 0) == (turn > 0)
        list(reply)
        fresh = told(voices, [*talk.messages, *user(question)], "red")
        assert reply.text == fresh.text
        talk.keep(question, reply, 0)


def test_another_adapter_does_not_use_the_memory(voices):
    talk = Conversation(voices, chat_settings(24), "red")
    reply, _ = talk.ask("Who are you?")
    list(reply)
    talk.keep("Who are you?", reply, 0)
    talk.adapter = None
    reply, _ = talk.ask("Who are you?")
    assert reply.memory.ids == []
    list(reply)
    assert reply.text == by_transformers(voices, [*talk.messages, *user("Who are you?")], None)


def test_what_was_interrupted_in_the_middle_of_a_step_is_read_again(voices, monkeypatch):
    reply = voices.answer(voices.prompt(user("Who are you?")), chat_settings(24), "red")
    next(reply)

    def interrupted(**_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(voices.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(reply)
    assert reply.memory.ids == []
    list(reply)
    assert reply.text == COLOURS["red"]


# -- history


def small_talk(**settings):
    voices = random_voices(max_position_embeddings=96, original_max_position_embeddings=96)
    return Conversation(voices, chat_settings(**{"max_new_tokens": 8, **settings}), None, "Be brief.")


def test_the_oldest_turns_are_let_go_when_the_window_is_full():
    talk = small_talk()
    dropped = []
    for turn in range(8):
        reply, forgotten = talk.ask(f"This is question {turn}.")
        list(reply)
        assert reply.finish == "stop" or reply.tokens == 8, "room for the answer was kept"
        talk.keep(f"This is question {turn}.", reply, forgotten)
        dropped.append(forgotten)
    assert sum(dropped) == talk.forgotten >= 4
    assert set(dropped) <= {0, 2, 4}
    seen = talk.pool.tokenizer.decode(reply.memory.ids)
    assert "Be brief." in seen
    assert "question 0" not in seen
    assert "question 7" in seen
    assert len(talk.record()["messages"]) == 17, "nothing is lost for /save"


def test_a_message_that_does_not_fit_is_refused_and_changes_nothing():
    talk = small_talk()
    reply, _ = talk.ask("Who are you?")
    list(reply)
    talk.keep("Who are you?", reply, 0)
    with pytest.raises(ContextError, match=r"conversation: prompt='\d+ tokens' - expected fewer than the model's \d+"):
        talk.ask("word " * 200)
    assert (len(talk.messages), talk.forgotten) == (2, 0)
    reply, forgotten = talk.ask("Continue.")
    assert forgotten == 0


def test_an_answer_without_words_takes_the_question_back(voices):
    talk = Conversation(voices, chat_settings(24), "red")
    reply, forgotten = talk.ask("Who are you?")
    talk.keep("Who are you?", reply, forgotten)
    assert talk.messages == []


def test_turns_draw_from_seeds_of_their_own(voices):
    talk = Conversation(voices, chat_settings(12, temperature=1.5, seed=4), None)
    seeds = []
    for _ in range(2):
        reply, _ = talk.ask("Say something.")
        list(reply)
        seeds.append(reply._settings.seed)
        talk.keep("Say something.", reply, 0)
    assert len(set(seeds)) == 2


def test_text_that_is_no_unicode(voices):
    with pytest.raises(DataError, match=r"messages\[0\]: content='\\ud800' - expected text that UTF-8 can encode"):
        voices.prompt(user("\ud800"))


def test_a_template_that_refuses_the_roles(voices, monkeypatch):
    monkeypatch.setattr(voices.tokenizer, "chat_template", "{{ raise_exception('no system prompt, please') }}")
    with pytest.raises(DataError, match=r"roles=\['user'\] - expected .* It says: no system prompt, please"):
        voices.prompt(user("hi"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, r"chat: top_p=0.9 - expected a temperature above 0 beside it"),
        ({"temperature": -1.0}, r"temperature=-1.0 - expected a number above 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 - expected"),
        ({"temperature": 1.0, "top_p": 2.0}, r"top_p=2.0 - expected"),
    ],
)
def test_settings_out_of_bounds(settings, message):
    with pytest.raises(ConfigError, match=message):
        chat_settings(**settings)


# -- loading


def test_names(colours, voices):
    assert name_of(colours["red"]) == "red"
    assert name_of(colours["red"] / "adapter") == "red"
    assert (voices.adapters, voices.base, voices.window) == (("red", "green"), "nano", 2048)


def test_names_are_given_and_kept_apart(colours):
    red, green = colours["red"], colours["green"]
    assert load_named([f"one={red}", f"two={green}"]).adapters == ("one", "two")
    with pytest.raises(AdapterError, match=r"adapters: name='red' - .*NAME=RUN_OR_ADAPTER"):
        load_named([str(red), str(red / "adapter")])
    with pytest.raises(AdapterError, match=r"name='nano' - expected another name than the base's"):
        load_named([f"nano={red}"])


def test_an_adapter_that_is_not_there(colours):
    with pytest.raises(AdapterError, match=r"adapter: source='.*redd' - expected .*Did you mean 'red'\?"):
        load_named([str(colours["red"].with_name("redd"))])


def changed(colours, tmp_path, **values):
    folder = tmp_path / "changed"
    shutil.copytree(colours["green"] / "adapter", folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model_name_or_path": "org/other"}, r"base='org/other' - expected the base of the first adapter"),
        ({"base_model_name_or_path": None}, r"base=None - expected the base of the first adapter"),
        ({"bias": "all"}, r"='bias=all' - expected an adapter that leaves the base as it is"),
        ({"target_modules": ["qkv_prj"]}, r"qkv_prj.*Did you mean"),
        ({"r": 4}, r"expected the shape"),
    ],
)
def test_adapters_that_do_not_go_together(colours, tmp_path, values, message):
    folder = changed(colours, tmp_path, **values)
    with pytest.raises((AdapterError, TargetError), match=message):
        load_pool({"red": colours["red"], "other": folder})


def test_another_template_does_not_go_with_it(colours, tmp_path):
    folder = changed(colours, tmp_path)
    (folder / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(AdapterError, match=r"tokenizer=.* - expected the vocabulary and chat template of"):
        load_pool({"red": colours["red"], "other": folder})


def test_without_a_template_nothing_begins(colours, tmp_path):
    folder = changed(colours, tmp_path)
    (folder / "adapter" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"tokenizer: chat_template=None - expected a template"):
        load_pool({"red": folder})


def test_beside_one_adapter_a_changed_base_is_only_said(colours, tmp_path, caplog):
    load_pool({"red": changed(colours, tmp_path, bias="all")})
    assert "red: bias=all changes the base itself" in caplog.text


def test_a_loralib_file_is_told_how_to_become_an_adapter(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"expected a run or a folder in PEFT's format. Convert it first"):
        load_named([str(tmp_path / "weights.pt")])
