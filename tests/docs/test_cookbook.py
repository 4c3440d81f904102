"""The recipes of docs/cookbook.md make of each export the conversations that a reader sees in it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import prepare
from tests.data_kinds import MODEL
from tests.docs.test_blocks import blocks, write

EXPECTED = {
    "zendesk": [
        ["Where is my parcel?", "It comes tomorrow."],
        ["I want my money back.", "It is on its way."],
    ],
    "intercom": [
        ["Can I change my address?", "Yes: under Account & address."],
        ["Do you ship to Oslo?", "We do."],
    ],
    "whatsapp": [
        ["Hi, are you open today?\nI need new keys.", "Until six.\nCome by!"],
        ["And on Saturday?", "From nine to two."],
    ],
    "slack": [["How do I reset the VPN?", "Sign out, then in again."]],
    "chatgpt": [["How do I clean suede?", "With a brush, dry."]],
    "mail": [["Where is my invoice?", "It is in your account."]],
    "clean": [["I am [e-mail], call [phone].", "Thank you! I have written to [e-mail]."]],
}


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A folder with the exports of the page and what its recipes make of them."""
    folder = tmp_path_factory.mktemp("kitchen")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("docs/cookbook.md"):
            if block.title:
                write(block.title, block.text)
            elif block.language == "python":
                exec(compile(block.text, "cookbook", "exec"), {})
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe(kitchen, name):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = SourceConfig(str(kitchen / f"{name}-messages.jsonl"))
    data = DataConfig(train=(source,), eval=None, num_proc=1, cache_dir=str(kitchen / "cache"))
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    made = prepare(data, tokenizer, max_length=512, seed=0, stop_token_ids=stops)
    found = [[(each["role"], each["content"]) for each in talk] for talk in made.train_conversations]
    assert found == [[("user", asked), ("assistant", answered)] for asked, answered in EXPECTED[name]]
    assert made.report.sources["train"][0].format == ("messages" if name == "chatgpt" else "turns")
    assert not made.report.notices
