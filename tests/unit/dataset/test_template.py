"""Tokens and labels of conversations, against oracles that use nothing of the code under test."""

import itertools
import json
import random
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from philora.dataset import IGNORED, Encoder, TemplateFault, encode_conversation, preview, prompts_and_references
from philora.dataset.arrangement import with_tools
from philora.dataset.messages import Conversation
from philora.dataset.records import Fault
from philora.dataset.turn_proof import TurnProof
from philora.errors import DataError
from philora.generation.batches import prompt_tokens

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PHI3 = (TRL_TEMPLATES / "phi3.jinja").read_text()
PHI3_5 = (TRL_TEMPLATES / "phi3_5.jinja").read_text()
LLAMA3 = (TRL_TEMPLATES / "llama3.jinja").read_text()
PHI4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
    "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_SYSTEM = PHI3.replace("message['role'] == 'system'", "message['role'] == 'never'")
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PHI3
NO_STOP = PHI3.replace("'role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'", "@").replace(
    "@", "'role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '\n'"
)
INCONSISTENT = "{% if messages|length > 2 %}{{ 'A long talk.' }}{% endif %}" + PHI3
STRIPS_THOUGHTS = PHI3.replace(
    "'<|assistant|>\n' + message['content']", "'<|assistant|>\n' + message['content'].split('</think>')[-1]"
)
MARKS_LAST = PHI3.replace("{{ eos_token }}", "{{ '(the end)' + eos_token }}")

TEXTS = [
    "Как да подновя обучението? Пуснете командата с --resume.",
    "Cum reiau antrenarea? Cu --resume, și așteptați câteva clipe.",
    "Hvordan gjenopptar jeg treningen? Kjør på nytt med --resume, så går det bra. Ærlig talt, åtte øl.",
    "איך ממשיכים את האימון? מריצים שוב עם --resume.",
    "Hogyan folytathatom a tanítást? Futtassa újra a --resume kapcsolóval, gyönyörű idő.",
    "Emoji: 😀👩‍👩‍👧 flags 🇳🇴, combining é, tabs\tand\n\nlines.",
    "def f(x):\n    return {'a': [x, 1.5]}\n",
    "  leading and trailing spaces  ",
    "Short",
]
PHI_TOKENS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>", "<|/tool|>"]
IM_TOKENS = ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def corpus():
    return ["How do I resume? Use --resume, then wait for the answer of the system."] * 3 + TEXTS[6:]


def sentencepiece_like(prepend: str) -> Tokenizer:
    """BPE with byte fallback as Phi-3's: letters of other alphabets become bytes."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz.▁"),
            limit_alphabet=60,
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    if prepend == "normalizer":
        tokenizer.normalizer = normalizer
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_special_tokens(
        [AddedToken(text, rstrip=text != "<|endoftext|>", normalized=False, special=True) for text in PHI_TOKENS]
    )
    return tokenizer


def byte_level(special: list[str]) -> Tokenizer:
    """Byte-level BPE as GPT-2's, Phi-4's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def fast(backend: Tokenizer, template: str | None, eos: str, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **special)
    tokenizer.chat_template = template
    return tokenizer


CASES = {
    "phi3": lambda: fast(sentencepiece_like("normalizer"), PHI3, "<|endoftext|>", bos_token="<s>"),
    "phi3-metaspace": lambda: fast(sentencepiece_like("metaspace"), PHI3, "<|endoftext|>", bos_token="<s>"),
    "phi3.5": lambda: fast(sentencepiece_like("metaspace"), PHI3_5, "<|endoftext|>", bos_token="<s>"),
    "phi4": lambda: fast(byte_level(IM_TOKENS), PHI4, "<|endoftext|>"),
    "phi4-mini": lambda: fast(byte_level(PHI_TOKENS), PHI4_MINI, "<|endoftext|>"),
    "chatml": lambda: fast(byte_level(IM_TOKENS), CHATML, "<|endoftext|>"),
    "llama3": lambda: fast(byte_level(LLAMA_TOKENS), LLAMA3, "<|eot_id|>", bos_token="<|begin_of_text|>"),
    "drops-system": lambda: fast(sentencepiece_like("metaspace"), DROPS_SYSTEM, "<|endoftext|>"),
}
STOPS = {
    "phi4": ["<|im_end|>", "<|endoftext|>"],
    "chatml": ["<|im_end|>", "<|endoftext|>"],
    "llama3": ["<|eot_id|>"],
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in CASES.items()}


def stop_ids(tokenizer, name):
    return tokenizer.convert_tokens_to_ids(STOPS.get(name, ["<|end|>", "<|endoftext|>"]))


def phi3(template=PHI3):
    return fast(sentencepiece_like("metaspace"), template, "<|endoftext|>", bos_token="<s>")


def chat(*turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(["user", "assistant"])
    return messages + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def random_chats(count, seed=0):
    chance = random.Random(seed)
    return [
        chat(
            *[chance.choice(TEXTS) for _ in range(2 * chance.randint(1, 4))],
            system=chance.choice([None, *TEXTS]),
        )
        for _ in range(count)
    ]


def oracle_labels(tokenizer, messages, stops):
    """Labels by rendering every prefix and looking at every offset; returns ids, labels, and boundary mismatch."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    mismatch = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        mismatch = mismatch or ids[: len(alone)] != alone
        done = False
        for place, (start, _) in enumerate(offsets):
            if start >= len(prompt) and not done:
                labels[place] = ids[place]
                done = ids[place] in stops
    return ids, labels, mismatch


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", [name for name in CASES if name != "drops-system"])
def test_labels_are_those_of_rendering_every_prefix(tokenizers, name):
    tokenizer = tokenizers[name]
    stops = stop_ids(tokenizer, name)
    chats = random_chats(60)
    results = Encoder(tokenizer, stops).encode([Conversation(messages) for messages in chats])
    for messages, result in zip(chats, results, strict=True):
        ids, labels, mismatch = oracle_labels(tokenizer, messages, stops)
        assert result.input_ids == ids
        assert result.labels == labels
        assert result.boundary_mismatch == mismatch
    wrong = [*results[0].labels[1:], IGNORED]  # the comparison can fail: labels shifted by one
    assert wrong != oracle_labels(tokenizer, chats[0], stops)[1]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("text", TEXTS)
def test_labels_decode_to_the_answers_and_their_stop_token(tokenizers, name, text):
    tokenizer = tokenizers[name]
    stops = stop_ids(tokenizer, name)
    encoded = encode_conversation(tokenizer, chat("Q1", text, "Q2", "Yes."), stop_token_ids=stops)
    stop = tokenizer.convert_ids_to_tokens(stops[0])
    answers = [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
    # Phi-3's <|assistant|> swallows the spaces behind it, and sentencepiece writes one before the first word.
    assert [answer.strip() for answer in answers] == [f"{text}{stop}".strip(), f"Yes.{stop}"] or (
        "llama3" in name and answers == [f"{text.strip()}{stop}", f"Yes.{stop}"]
    )


def test_trl_marks_the_same_tokens_but_for_the_end_of_text():
    tokenizer = phi3()
    stops = stop_ids(tokenizer, "phi3")
    training = (TRL_TEMPLATES / "phi3_training.jinja").read_text()
    for messages in random_chats(40, seed=1):
        # TRL's mask marks the <|assistant|> token where it swallows spaces that an answer begins with.
        messages = [{**message, "content": message["content"].strip()} for message in messages]
        ours = encode_conversation(tokenizer, messages, stop_token_ids=stops)
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
        )
        assert ours.input_ids == theirs["input_ids"]
        mask = theirs["assistant_masks"]
        assert (ours.input_ids[-1], mask[-1]) == (tokenizer.eos_token_id, 1)
        assert [label != IGNORED for label in ours.labels[:-1]] == [bool(bit) for bit in mask[:-1]]
        assert ours.labels[-1] == IGNORED


def test_the_fast_way_and_the_full_proof_agree(tokenizers):
    for name in ("phi3", "phi4", "llama3", "chatml"):
        tokenizer = tokenizers[name]
        chats = [Conversation(messages) for messages in random_chats(30, seed=2)]
        quick, slow = (Encoder(tokenizer, stop_ids(tokenizer, name)) for _ in range(2))
        slow._plan = lambda roles: None
        for one, other in zip(quick.encode(chats), slow.encode(chats), strict=True):
            assert (one.input_ids, one.spans) == (other.input_ids, other.spans)
            assert one.boundary_mismatch == other.boundary_mismatch


def test_one_rendering_a_conversation_is_enough(tokenizers, monkeypatch):
    tokenizer = tokenizers["phi3"]
    encoder = Encoder(tokenizer, stop_ids(tokenizer, "phi3"))
    chats = [Conversation(chat("q", f"answer {index}", "r", "s")) for index in range(50)]
    encoder.encode(chats[:1])
    calls = []
    monkeypatch.setattr(TurnProof, "render", lambda self, *args, **kwargs: calls.append(args))
    encoder.encode(chats)
    assert calls == []


TRIMS = PHI3.replace("message['content'] +", "message['content']|trim +")
NAMES_FIFTH = PHI3.replace(
    "'role'] == 'assistant' %}{{'<|assistant|>\n' +", "'role'] == 'assistant' %}{{'<|assistant|>\n' +"
).replace(
    "{% for message in messages %}", "{% for message in messages %}{% if loop.index0 == 10 %}{{ 'Ten. ' }}{% endif %}"
)


@pytest.mark.parametrize("template", [PHI3, TRIMS, NAMES_FIFTH, LLAMA3, PHI4_MINI])
def test_the_full_proof_of_long_conversations_is_that_of_every_prefix(template):
    name = "llama3" if template is LLAMA3 else "phi3"
    backend = byte_level(LLAMA_TOKENS) if template is LLAMA3 else byte_level(PHI_TOKENS)
    tokenizer = fast(backend, template, "<|eot_id|>" if template is LLAMA3 else "<|endoftext|>", bos_token="<s>")
    stops = stop_ids(tokenizer, name)
    chance = random.Random(5)
    # Contents that templates write themselves, next to spaces and long texts.
    words = ["a", "user", "|>", "end", "<", "assistant\n", " q ", "zq1qz", *TEXTS]
    messages = chat(*[chance.choice(words) for _ in range(40)], system="Be brief.")
    messages.insert(6, {"role": "user", "content": "Once more"})
    encoder = Encoder(tokenizer, stops)
    encoder._plan = lambda roles: None
    result = encoder.encode([Conversation(messages)])[0]
    ids, labels, mismatch = oracle_labels(tokenizer, messages, stops)
    assert (result.input_ids, result.labels, result.boundary_mismatch) == (ids, labels, mismatch)


@pytest.mark.parametrize("template", [PHI3, TRIMS, PHI4_MINI])
@pytest.mark.parametrize("plans", [True, False])
def test_the_proof_is_linear_in_the_turns(monkeypatch, template, plans):
    tokenizer = fast(byte_level(PHI_TOKENS), template, "<|endoftext|>", bos_token="<s>")
    rendered = []
    apply = type(tokenizer).apply_chat_template

    def counted(self, conversation, *args, **kwargs):
        several = conversation if isinstance(conversation[0], list) else [conversation]
        rendered.append(sum(map(len, several)))
        return apply(self, conversation, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    work = []
    for turns in (300, 600, 1200):
        encoder = Encoder(tokenizer, stop_ids(tokenizer, "phi3"))
        if not plans:
            encoder._plan = lambda roles: None
        rendered.clear()
        messages = chat(*[f" turn {index} " for index in range(turns)])
        assert len(encoder.encode([Conversation(messages)])[0].spans) == turns // 2
        assert len(rendered) < 60
        work.append(sum(rendered) / turns)
    assert max(work) < 20  # rendering every prefix is 150, 300 and 600 turns for each
    assert max(work) < 1.7 * min(work)


def test_a_long_template_that_changes_with_what_follows_is_refused():
    """The places where prefixes are rendered find what depends on the number of turns."""
    template = "{% if messages|length > 40 %}{{ 'A long talk.' }}{% endif %}" + PHI3
    tokenizer = phi3(template)
    messages = chat(*["x"] * 60)
    with pytest.raises(TemplateFault, match="as the beginning of the conversation"):
        encode_conversation(tokenizer, messages, stop_token_ids=stop_ids(tokenizer, "phi3"))


@pytest.mark.parametrize("role", ["tool", "user"])
def test_a_turn_that_the_template_leaves_out_is_refused(role):
    template = PHI3.replace("['role'] == 'user'", "['role'] == 'never'") if role == "user" else PHI3
    tokenizer = phi3(template)
    for place in (1, 2, 4):
        messages = chat("q", "a", "r", "s")
        messages.insert(place, {"role": role, "content": "lost"})
        result = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).encode([Conversation(messages)])[0]
        assert f"it leaves out turns of the role {role}" in result.at("f:1")


CALLS = [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


@pytest.mark.parametrize("content", ["", "One moment."])
def test_tool_calls_that_the_template_leaves_out_are_refused(content):
    tokenizer = phi3()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, "tool_calls": CALLS}]
    result = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).encode([Conversation(turns)])[0]
    assert "turn 1='tool_calls of weather' - expected an answer that the chat template shows" in result.at("f:1")


def test_tool_descriptions_that_the_template_leaves_out_are_refused(tokenizers):
    for name in ("phi3", "drops-system", "phi4"):
        tokenizer = tokenizers[name]
        conversation = Conversation(chat("q", "a", system="s"), TOOLS)
        result = Encoder(tokenizer, stop_ids(tokenizer, name)).encode([conversation])[0]
        assert isinstance(result, Fault), name
        assert "tools='weather' - expected tool descriptions that the chat template shows" in result.at("f:1")


TOOLS_ARGUMENT = "{% if tools %}{{ '<|tool|>' + tools|tojson + '<|/tool|>' }}{% endif %}" + PHI3


@pytest.mark.parametrize("template", [TOOLS_ARGUMENT, PHI4_MINI])
def test_the_asked_prompt_with_tools_begins_the_trained_row(template):
    tokenizer = fast(byte_level(PHI_TOKENS), template, "<|endoftext|>", bos_token="<s>")
    ids = stop_ids(tokenizer, "phi3")
    messages = with_tools(chat("Weather in Oslo?", "It rains."), TOOLS)
    trained = encode_conversation(tokenizer, messages, stop_token_ids=ids)
    # As it is stored and asked for at an evaluation, and as a file of prompts gives it.
    stored = with_tools(trained.conversation.messages, trained.conversation.tools)
    for asked in (prompts_and_references(stored)[0], messages[:1]):
        prompt = prompt_tokens(tokenizer, [asked])[0]
        assert '"name": "weather"' in tokenizer.decode(prompt)
        assert trained.input_ids[: len(prompt)] == prompt
    with pytest.raises(DataError, match="expected tool descriptions that the chat template shows"):
        prompt_tokens(phi3(), [messages[:1]])


def test_what_a_template_does_not_show_of_a_turn_is_named(tokenizers):
    turns = chat("q", "a")
    turns[1] |= {"reasoning_content": "hm", "name": "Ann"}
    tokenizer = tokenizers["phi3"]
    result = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).encode([Conversation(turns)])[0]
    assert result.unshown == ("name of turns", "reasoning_content of turns")


def test_control_texts_are_counted_by_name(tokenizers):
    tokenizer = tokenizers["phi3"]
    chats = [
        chat("q", "a<|end|>"),
        chat("q", "a<|end|>\n"),
        chat("What is <|user|>?", "A role."),
        chat("q", "a<|im_end|>"),
        chat("<s>q</s>", "[INST]"),
        chat("q", "A < B | C > D"),
    ]
    found = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).controls.spelled([Conversation(each) for each in chats])
    assert found == {
        "end <|end|>": 2, "own <|user|>": 1, "foreign <|im_end|>": 1, "own <s>": 1, "own </s>": 1, "foreign [INST]": 1,
    }  # fmt: skip


def test_a_template_that_treats_the_last_turn_otherwise_is_still_consistent():
    tokenizer = phi3(MARKS_LAST)
    encoded = encode_conversation(tokenizer, chat("q", "a", "r", "s"), stop_token_ids=stop_ids(tokenizer, "phi3"))
    assert [tokenizer.decode(encoded.input_ids[a:b]) for a, b in encoded.spans] == ["a<|end|>", "s<|end|>"]


def test_boundary_mismatch_is_counted_where_tokens_join_the_answer():
    backend = byte_level(IM_TOKENS)
    tokenizer = fast(backend, CHATML, "<|endoftext|>")
    ids = stop_ids(tokenizer, "chatml")
    plain = encode_conversation(tokenizer, chat("q", "Fine."), stop_token_ids=ids)
    joined = encode_conversation(tokenizer, chat("q", "\n\nFine."), stop_token_ids=ids)
    assert not plain.boundary_mismatch
    expected = oracle_labels(tokenizer, chat("q", "\n\nFine."), ids)[2]
    assert joined.boundary_mismatch == expected


def test_a_token_across_the_boundary_has_no_label_and_is_counted():
    backend = byte_level(["<|im_start|>", "<|im_end|>"])
    template = (
        CHATML.replace("\\n", "\n").replace("assistant\n", "assistant: ").replace("['role'] + '\n'", "['role'] + ': '")
    )
    tokenizer = fast(backend, template, "<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    # The space of the prompt joins the first word of the answer.
    encoded = encode_conversation(tokenizer, chat("q", "answer of the system"), stop_token_ids=ids)
    assert encoded.boundary_mismatch == oracle_labels(tokenizer, chat("q", "answer of the system"), ids)[2] is True
    assert encoded.labels == oracle_labels(tokenizer, chat("q", "answer of the system"), ids)[1]


def test_a_turn_of_weight_zero_has_no_labels(tokenizers):
    tokenizer = tokenizers["phi3"]
    conversation = Conversation(chat("q", "first", "r", "second"), untrained=frozenset([1]))
    result = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).encode([conversation])[0]
    assert [tokenizer.decode(result.input_ids[a:b]) for a, b in result.spans] == ["second<|end|>"]


def test_a_conversation_that_begins_with_the_assistant(tokenizers):
    for name in ("phi3", "phi4", "llama3", "chatml"):
        tokenizer = tokenizers[name]
        ids = stop_ids(tokenizer, name)
        messages = [{"role": "assistant", "content": "Welcome!"}, *chat("q", "a")]
        encoded = encode_conversation(tokenizer, messages, stop_token_ids=ids)
        stop = tokenizer.convert_ids_to_tokens(ids[0])
        decoded = [tokenizer.decode(encoded.input_ids[a:b]).strip() for a, b in encoded.spans]
        assert decoded == [f"Welcome!{stop}", f"a{stop}"]


def test_messages_that_spell_control_tokens_are_marked(tokenizers):
    tokenizer = tokenizers["phi3"]
    ids = stop_ids(tokenizer, "phi3")
    assert encode_conversation(tokenizer, chat("What is <|end|>?", "A token."), stop_token_ids=ids).control_tokens
    clean = encode_conversation(tokenizer, chat("What is <end>?", "A < B | C > D"), stop_token_ids=ids)
    assert not clean.control_tokens
    # The label ends at the turn's own stop token, not at the one that the answer quotes.
    quoted = encode_conversation(tokenizer, chat("q", "It is <|end|> here"), stop_token_ids=ids)
    assert quoted.control_tokens
    assert tokenizer.decode(quoted.input_ids[slice(*quoted.spans[0])]).endswith("here<|end|>")


def test_padding_and_truncation_of_the_tokenizer_do_not_matter(tokenizers):
    tokenizer = phi3()
    ids = stop_ids(tokenizer, "phi3")
    before = encode_conversation(tokenizer, chat("q", "a long answer of the system"), stop_token_ids=ids)
    tokenizer.pad_token = "<unk>"
    tokenizer(["a", "b c d"], padding="max_length", max_length=4, truncation=True)
    after = encode_conversation(tokenizer, chat("q", "a long answer of the system"), stop_token_ids=ids)
    assert (after.input_ids, after.spans) == (before.input_ids, before.spans)


# ------------------------------------------------------------------------------------------------- system, tools


@pytest.mark.parametrize("template", [DROPS_SYSTEM, REFUSES_SYSTEM])
def test_a_system_turn_that_the_template_drops_begins_the_users_turn(template):
    tokenizer = phi3(template)
    encoded = encode_conversation(
        tokenizer, chat("Hi", "Hello", system="Be brief."), stop_token_ids=stop_ids(tokenizer, "phi3")
    )
    assert encoded.folded_system
    assert encoded.conversation.messages[0] == {"role": "user", "content": "Be brief.\n\nHi"}
    assert "Be brief." in tokenizer.decode(encoded.input_ids)


def test_a_system_turn_is_kept_by_phi3(tokenizers):
    encoded = encode_conversation(
        tokenizers["phi3"], chat("Hi", "Hello", system="Be brief."), stop_token_ids=stop_ids(tokenizers["phi3"], "phi3")
    )
    assert not encoded.folded_system
    assert tokenizers["phi3"].decode(encoded.input_ids).startswith("<|system|>")


def test_a_system_turn_without_a_user_turn_is_not_lost():
    tokenizer = phi3(DROPS_SYSTEM)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello"}]
    encoded = encode_conversation(tokenizer, messages, stop_token_ids=stop_ids(tokenizer, "phi3"))
    assert encoded.conversation.messages[0] == {"role": "user", "content": "Be brief."}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {}}}]


def test_phi4_mini_gets_tools_in_the_system_turn_and_tool_turns_pass_through(tokenizers):
    tokenizer = tokenizers["phi4-mini"]
    messages = [
        *chat("Weather in Oslo?", '[{"name": "weather"}]', system="Use tools."),
        {"role": "tool", "content": "Rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    encoded = encode_conversation(tokenizer, messages, tools=TOOLS, stop_token_ids=stop_ids(tokenizer, "phi4-mini"))
    text = tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|system|>Use tools.<|tool|>[{")
    assert "<|/tool|><|end|>" in text
    assert "<|tool|>Rain<|end|>" in text
    assert [tokenizer.decode(encoded.input_ids[a:b]) for a, b in encoded.spans] == [
        '[{"name": "weather"}]<|end|>',
        "It rains.<|end|>",
    ]


def test_a_template_that_reads_tools_gets_them_as_such():
    template = "{% if tools %}{{ '<|tool|>' + tools|tojson + '<|/tool|>' }}{% endif %}" + PHI3
    tokenizer = phi3(template)
    encoded = encode_conversation(tokenizer, chat("q", "a"), tools=TOOLS, stop_token_ids=stop_ids(tokenizer, "phi3"))
    assert '"name": "weather"' in tokenizer.decode(encoded.input_ids)
    assert encoded.conversation.messages[0]["role"] == "user"


def test_tool_calls_are_what_the_template_makes_of_them():
    call = "{{'<|assistant|>\n' + message['content'] + (message.tool_calls|tojson if message.tool_calls else '') +"
    tokenizer = phi3(PHI3.replace("{{'<|assistant|>\n' + message['content'] +", call))
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]},
    ]
    encoded = encode_conversation(tokenizer, messages, stop_token_ids=stop_ids(tokenizer, "phi3"))
    decoded = tokenizer.decode(encoded.input_ids[slice(*encoded.spans[0])])
    assert decoded.replace(" ", "") == '[{"name":"weather"}]<|end|>'


# ------------------------------------------------------------------------------------------------- refusals


def refusal(template, messages, exception=DataError):
    tokenizer = phi3(template)
    with pytest.raises(exception) as caught:
        encode_conversation(tokenizer, messages, stop_token_ids=stop_ids(tokenizer, "phi3"))
    return str(caught.value)


def test_a_template_that_changes_with_what_follows_is_refused():
    message = refusal(INCONSISTENT, chat("q", "a", "r", "s"), TemplateFault)
    assert "tokenizer: chat_template=" in message
    assert "expected the turns before turn 1, rendered with the generation prompt, as the beginning" in message
    assert "use a template that renders each turn the same wherever it is" in message


def test_a_template_whose_turns_end_in_no_stop_token_is_refused():
    message = refusal(NO_STOP, chat("q", "a", "r", "s"), TemplateFault)
    assert "expected a stop token (<|end|>, <|endoftext|>) after the answer of turn 1" in message
    assert "never learns to stop" in message


def test_a_template_that_rewrites_an_answer_is_refused_for_that_record():
    good = chat("q", "plain")
    tokenizer = phi3(STRIPS_THOUGHTS)
    ids = stop_ids(tokenizer, "phi3")
    assert encode_conversation(tokenizer, good, stop_token_ids=ids).spans
    bad = Conversation(chat("q", "<think>hm</think>plain"))
    results = Encoder(tokenizer, ids).encode([Conversation(good), bad])
    assert not isinstance(results[0], Fault)
    assert "expected the content of this turn directly after the generation prompt" in results[1].at("file:2")


def test_a_template_that_refuses_a_conversation_says_why():
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}" + PHI3
    message = refusal(template, [{"role": "tool", "content": "x"}, *chat("q", "a")])
    assert "conversation: roles='tool, user, assistant' - expected turns that the chat template renders" in message
    assert "users first" in message


def test_no_template_is_refused():
    assert "tokenizer: chat_template=None - expected a chat template" in refusal(None, chat("q", "a"))


def test_stop_ids_must_exist(tokenizers):
    with pytest.raises(DataError, match="stop_token_ids=999999 - expected ids of the tokenizer's vocabulary"):
        Encoder(tokenizers["phi3"], [999999])
    with pytest.raises(DataError, match=r"stop_token_ids=\[\] - expected at least one id"):
        Encoder(tokenizers["phi3"], [])


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"tokenizer: class='str' - expected a fast tokenizer"):
        Encoder("slow", [1])


# ------------------------------------------------------------------------------------------------- text, preview


def test_text_is_trained_whole_with_the_final_eos(tokenizers):
    tokenizer = tokenizers["phi3"]
    conversation = Conversation([{"role": "text", "content": "Once upon a time."}])
    result = Encoder(tokenizer, stop_ids(tokenizer, "phi3")).encode([conversation])[0]
    assert result.labels == result.input_ids
    assert result.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(result.input_ids).strip() == "Once upon a time.<|endoftext|>"


@pytest.mark.parametrize("name", ["phi3", "phi3-metaspace", "phi4", "llama3", "chatml"])
def test_a_preview_joined_is_the_decoded_row(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = stop_ids(tokenizer, name)
    for messages in random_chats(20, seed=3):
        encoded = encode_conversation(tokenizer, messages, stop_token_ids=ids)
        row = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        for part in (row, {key: value[: len(value) // 2] for key, value in row.items()}):  # whole, and cut anywhere
            shown = preview(tokenizer, part)
            assert "".join(text for text, _ in shown) == tokenizer.decode(part["input_ids"])
            assert [is_label for _, is_label in shown] == [label != IGNORED for label in part["labels"]]


def test_a_preview_of_a_long_row_is_quick(tokenizers):
    tokenizer = tokenizers["phi3"]
    ids = stop_ids(tokenizer, "phi3")
    encoded = encode_conversation(tokenizer, chat("q", " ".join(TEXTS) * 20), stop_token_ids=ids)
    shown = preview(tokenizer, {"input_ids": encoded.input_ids, "labels": encoded.labels})
    assert sum(1 for text, _ in shown if text) > len(shown) / 3


def test_prompts_and_references():
    messages = chat("q", "a", "r", "s", "left over")
    assert prompts_and_references(messages) == (messages[:3], "s")
    with pytest.raises(DataError, match="an assistant turn with something before it"):
        prompts_and_references(chat("q"))
