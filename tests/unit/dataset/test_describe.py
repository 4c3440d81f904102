"""`philora.describe_data` and `philora data`: what is in a file, by what was put into it."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

import philora
from philora.cli.commands import app
from philora.dataset import languages
from philora.dataset.describe import describe_data
from philora.dataset.near import near_duplicates
from philora.errors import ConfigError, DataError

CARD, NO_CARD = "4111 1111 1111 1111", "4111 1111 1111 1112"


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows))
    return path


LONG = "my parcel with the blue shoes has not come although it was sent a week ago from your shop in Oslo"
ROWS = [
    (f"Good day, {LONG}", "It comes tomorrow."),
    (f"Hello there, {LONG}", "It comes tomorrow."),
    ("Write to ann@example.org", f"We charged {CARD}."),
    ("My order is 4111111111111112", f"It is {NO_CARD}."),
    ("", "How can I help?"),
    ("Thanks", "Thanks"),
    ("Thanks", "Thanks"),
    ("Bye", ""),
]


def test_what_was_put_in_is_found(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    found = philora.describe_data(file)
    assert {each.what: (each.rows, each.places) for each in found.findings} == {
        "a question is empty": (1, [f"{file}:5"]),
        "an answer repeats what it answers": (2, [f"{file}:6"] * 2),
        "an e-mail address": (1, [f"{file}:3"]),
        "a card number": (1, [f"{file}:3"]),
    }
    train = found.splits["train"]
    assert (train.counts.rows, train.counts.duplicates) == (7, 1)
    assert found.near_duplicates == 1
    (source,) = found.sources["train"]
    assert (source.format, source.invalid, source.recognised) == (
        "prompt_completion",
        1,
        "by the fields prompt and completion",
    )
    assert len(found.examples) == 3
    assert "".join(text for text, labelled in found.examples[0] if labelled).strip().startswith("It comes tomorrow.")


def test_nothing_is_changed_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PHILORA_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "a.jsonl", ROWS)
    before = file.read_bytes()
    describe_data(file)
    assert file.read_bytes() == before
    assert not (tmp_path / "cache").exists()


def test_near_duplicates_between_splits(tmp_path):
    train = write(tmp_path / "a.jsonl", ROWS[:1] + ROWS[2:4])
    held_out = write(tmp_path / "b.jsonl", ROWS[1:3])
    found = describe_data(train, [f"data.eval={held_out}"])
    assert found.near_duplicates == 1  # the equal one is told as what stands in both
    assert any("1 rows of eval are also in train" in each for each in found.notices)
    assert found.splits["eval"].counts.rows == 2
    other = write(tmp_path / "c.jsonl", ROWS[4:5])
    assert describe_data(train, [f"data.eval={other}"]).near_duplicates == 0


def test_near_duplicates_are_those_of_a_plain_comparison():
    draw = random.Random(0)
    words = [f"w{each}" for each in range(300)]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(60)]
    changed = []
    for text in texts[:30]:
        parts = text.split()
        parts[draw.randrange(60)] = "other"
        changed.append(" ".join(parts))
    found = near_duplicates(changed + texts[30:40], texts[:30] + texts[50:])
    assert found == {place: place for place in range(30)}
    assert near_duplicates([text + " more of it" for text in texts[:3]], texts[10:]) == {}  # planted: none is there


def test_a_configuration_is_described_with_its_split(tmp_path):
    file = write(tmp_path / "a.jsonl", [(f"question {each}", "yes") for each in range(40)])
    (tmp_path / "run.yaml").write_text(f"data: {{train: {file}, eval: 0.05}}\n")
    found = describe_data(tmp_path / "run.yaml")
    assert {name: each.counts.rows for name, each in found.splits.items()} == {"train": 32, "eval": 8}


def test_the_commonest_system_turn_is_told(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"system": "Be brief.", "prompt": f"q{each}", "completion": "yes"} for each in range(3)]
    file.write_text("".join(json.dumps(each) + "\n" for each in [*rows, {"prompt": "q", "completion": "yes"}]))
    assert describe_data(file).splits["train"].system_turns == ("Be brief.", 0.75)


ENGLISH = ("My order has not arrived yet. Can you check where it is?", "It was sent yesterday and arrives tomorrow.")
GERMAN = ("Ich komme nicht in mein Konto, bitte helfen Sie mir.", "Setzen Sie bitte zuerst Ihr Passwort zurück.")
JAPANESE = ("注文がまだ届きません。確認してください。", "昨日発送しました。明日届く予定です。")


def test_languages_are_told_with_their_shares(tmp_path):
    file = write(tmp_path / "a.jsonl", [ENGLISH] * 6 + [GERMAN] * 2 + [JAPANESE, ("def f(x): return x", "1 + 1 = 2")])
    shares = describe_data(file).splits["train"].languages
    assert shares == {"en": 0.6, "de": 0.2, "ja": 0.1, "und": 0.1}
    assert next(iter(shares)) == "en"
    assert "languages: en 60%, de 20%" in CliRunner().invoke(app, ["data", str(file)]).output


def test_of_many_rows_a_spread_sample_is_looked_at(monkeypatch):
    monkeypatch.setattr(languages, "SAMPLE", 4)
    texts = [" ".join(ENGLISH)] * 8 + [" ".join(GERMAN)] * 8
    assert languages.language_shares(texts) == {"en": 0.5, "de": 0.5}
    assert languages.language_shares(texts[:3]) == {"en": 1.0}
    assert languages.language_shares([]) == {}


def test_the_command(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    shown = CliRunner().invoke(app, ["data", str(file)])
    assert shown.exit_code == 0
    for words in (
        "8 records, read as prompt_completion (by the fields prompt and completion)",
        "user: Write to ann@example.org | assistant: We charged 4111 1111 1111 1111.",
        "train      7 rows, 1 duplicates",
        f"a card number: 1 rows ({file}:3)",
        "1 of 8 records",
        "the loss is on the tokens between >> and <<",
    ):
        assert words in shown.output, words
    plain = json.loads(CliRunner().invoke(app, ["data", str(file), "--json"]).output)
    assert plain["splits"]["train"]["counts"]["rows"] == 7
    assert plain["findings"][0]["rows"] == 1


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises((ConfigError, DataError), match="an existing file or folder"):
        describe_data(tmp_path / "none.jsonl")
