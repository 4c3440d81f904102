"""Preparing a run's data: mixing, holding out, counting, caching, streaming, and refusing."""

import errno
import json
import logging
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import philora
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import IGNORED, encode_conversation, prepare, preview, store
from philora.dataset.row_choice import hold_out
from philora.errors import DataError, RunError

MODEL = Path(philora.__file__).parent / "nano" / "model"
WORDS = ["Как", "нулирам", "rețeaua", "på", "nytt", "שלום", "gyönyörű", "😀", "model", "adapter", "answer", "question"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def stops(tokenizer):
    return tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


@pytest.fixture
def run(tokenizer, stops, tmp_path):
    """`run(train, eval, ...)` with a cache of the test's own."""

    def prepared(train, held_out=None, *, max_length=128, seed=0, overlong="truncate", num_proc=1, format="auto"):
        sources = train if isinstance(train, tuple) else (train,)
        data = DataConfig(
            train=tuple(each if isinstance(each, SourceConfig) else SourceConfig(str(each)) for each in sources),
            eval=(SourceConfig(str(held_out)),) if isinstance(held_out, str | Path) else held_out,
            format=format,
            overlong=overlong,
            num_proc=num_proc,
            cache_dir=str(tmp_path / "cache"),
        )
        return prepare(data, tokenizer, max_length=max_length, seed=seed, stop_token_ids=stops)

    return prepared


def chat(question, answer="yes"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": each}, ensure_ascii=False) + "\n" for each in chats), "utf-8")
    return path


def many(count, seed=0):
    chance = random.Random(seed)
    return [
        chat(f"{number} " + " ".join(chance.choices(WORDS, k=6)), " ".join(chance.choices(WORDS, k=5)))
        for number in range(count)
    ]


def questions(conversations):
    return [each[0]["content"] for each in conversations]


# ------------------------------------------------------------------------------------------------- rows


def test_rows_are_the_encoded_conversations(run, tokenizer, stops, tmp_path):
    chats = many(1200)
    data = run(write(tmp_path / "a.jsonl", chats))
    assert data.train.column_names == ["input_ids", "labels"]
    assert len(data.train) == len(data.train_conversations) == 1200
    assert data.eval is data.eval_conversations is None
    for index in (0, 511, 512, 1199):
        encoded = encode_conversation(tokenizer, chats[index], stop_token_ids=stops)
        assert data.train[index] == {"input_ids": encoded.input_ids, "labels": encoded.labels}
        assert data.train_conversations[index] == chats[index]
    split = data.report.train
    assert split.rows == 1200
    assert split.tokens == sum(map(len, data.train["input_ids"]))
    assert split.labels == sum(label != IGNORED for labels in data.train["labels"] for label in labels)
    assert split.longest_tokens == max(map(len, data.train["input_ids"]))
    shown = preview(tokenizer, data.train[3])
    assert "".join(text for text, is_label in shown if is_label).strip() == chats[3][1]["content"] + "<|end|>"


def test_processes_give_the_same_rows_in_the_same_order(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(1500))
    one, two = run(file), None
    for entry in (tmp_path / "cache" / "data").iterdir():
        entry.rename(tmp_path / "aside")
    two = run(file, num_proc=2)
    assert two.train[:] == one.train[:]
    assert two.report == one.report
    assert two.fingerprint == one.fingerprint


def test_conversations_read_like_a_list(run, tmp_path):
    conversations = run(write(tmp_path / "a.jsonl", many(5))).train_conversations
    assert list(conversations) == many(5)
    assert list(conversations[1:3]) == many(5)[1:3]
    assert conversations[-1] == many(5)[-1]
    with pytest.raises(IndexError):
        conversations[5]


def test_records_of_different_fields_never_fight(run, tmp_path):
    file = tmp_path / "a.jsonl"
    records = [
        {"messages": chat("q"), "id": 1, "score": None},
        {"messages": chat("r"), "id": "two", "score": {"x": [1]}},
        {"messages": [{**chat("s")[0], "name": "Ann"}, chat("s", "four")[1]], "id": [3]},
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    data = run(file)
    assert len(data.train) == 3
    assert data.train_conversations[2][0]["name"] == "Ann"
    assert data.report.sources["train"][0].unread_fields == {"id": 3, "score": 1, "name of turns": 1}


def test_kinds_in_one_run(run, tmp_path):
    write(tmp_path / "a.jsonl", many(3))
    (tmp_path / "b.csv").write_text("instruction,input,output\nAdd,1 2,3\n", "utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"data": [{"text": "Once."}]}))
    columns = SourceConfig(
        str(tmp_path / "b.csv"), columns={"user": "{instruction}\n Input: {input}", "assistant": "{output}"}
    )
    data = run(
        (
            SourceConfig(str(tmp_path / "a.jsonl")),
            SourceConfig(str(tmp_path / "b.csv")),
            columns,
            SourceConfig(str(tmp_path / "c.json")),
        )
    )
    found = [(source.format, source.records) for source in data.report.sources["train"]]
    assert found == [("messages", 3), ("alpaca", 1), ("columns", 1), ("text", 1)]
    contents = sorted(each[0]["content"] for each in data.train_conversations)
    assert {"Add\n1 2", "Add\n Input: 1 2", "Once."} <= set(contents)


def test_a_prompt_with_an_earlier_answer_is_trained_as_trl_does(run, tokenizer, stops, phi3, tmp_path):
    """Only the completion has labels; TRL's mask continues to the end of the text behind the stop token."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    record = {
        "prompt": [*chat("Hi.", "Hello."), {"role": "user", "content": "What is the way?"}],
        "completion": [{"role": "assistant", "content": "Turn left."}],
    }
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record) + "\n")
    ours = run(file).train[0]
    settings = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    trainer = SFTTrainer(phi3(), args=settings, train_dataset=Dataset.from_list([record]), processing_class=tokenizer)
    theirs = trainer.train_dataset[0]
    assert ours["input_ids"] == theirs["input_ids"]
    mask = [int(label != IGNORED) for label in ours["labels"]]
    completion = [int(label != IGNORED) for label in theirs["labels"]]
    stop = ours["input_ids"].index(stops[0], completion.index(1))
    assert mask == [each if place <= stop else 0 for place, each in enumerate(completion)]
    whole = encode_conversation(tokenizer, [*record["prompt"], *record["completion"]], stop_token_ids=stops)
    assert sum(label != IGNORED for label in whole.labels) > sum(mask)  # as messages, both answers are trained


# ------------------------------------------------------------------------------------------------- lengths


LONG = "word " * 100_000


def test_a_hundred_thousand_tokens_are_truncated(run, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", [chat("short"), chat("q", LONG), chat(LONG, "never reached")])
    with caplog.at_level(logging.WARNING, "philora.dataset"):
        data = run(file)
    split = data.report.train
    assert (split.rows, split.truncated, split.dropped, split.dropped_unlabelled) == (2, 1, 1, 1)
    assert split.longest_tokens > 100_000
    assert [len(ids) for ids in data.train["input_ids"]][1] == 128
    assert questions(data.train_conversations) == ["short", "q"]
    assert data.report.notices == [
        "train: 1 conversations are longer than 128 tokens and were cut there "
        f"(the longest has {split.longest_tokens}).",
        "train: 1 conversations have no answer within 128 tokens and were left out.",
    ]
    assert [record.message for record in caplog.records] == data.report.notices


def test_a_hundred_thousand_tokens_are_dropped(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [chat("short"), chat("q", LONG), chat(LONG)])
    data = run(file, overlong="drop")
    split = data.report.train
    assert (split.rows, split.truncated, split.dropped, split.dropped_overlong) == (1, 0, 2, 2)
    assert data.report.notices == ["train: 2 conversations are longer than 128 tokens and were left out."]


def test_nothing_left_is_refused(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [chat(LONG)])
    with pytest.raises(DataError) as caught:
        run(file)
    assert str(caught.value) == (
        "data.train: rows=0 - expected at least one row, but all records were dropped (0 too long, 1 without an answer "
        "in the first tokens). Raise max_length."
    )


def test_the_label_of_the_first_token_is_no_label(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time"}\n{"text": "x"}\n')
    data = run(tmp_path / "a.jsonl")
    assert data.report.train.labels == data.report.train.tokens - 2


# ------------------------------------------------------------------------------------------------- counts


def test_duplicates_are_counted_and_kept(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [*many(4), *many(3), many(1)[0]])
    data = run(file)
    assert (data.report.train.rows, data.report.train.duplicates) == (8, 4)
    assert "train: 4 rows are exact duplicates of others; they are kept." in data.report.notices


def test_rows_in_train_and_eval_are_counted(run, tmp_path):
    train, held_out = (
        write(tmp_path / "a.jsonl", many(6)),
        write(tmp_path / "b.jsonl", [*many(2), chat("new"), many(1)[0]]),
    )
    data = run(train, held_out)
    assert (len(data.eval), data.report.in_both) == (4, 3)
    assert data.report.notices[-1] == "3 rows of eval are also in train: its scores will be too good."
    assert list(data.eval_conversations) == [*many(2), chat("new"), many(1)[0]]
    assert run(train, write(tmp_path / "c.jsonl", [chat("new")])).report.in_both == 0


def test_two_user_turns_are_noticed(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [[chat("q")[0], *chat("r")], chat("s")])
    data = run(file)
    assert data.report.train.two_user_turns == 1
    assert data.report.notices == ["train: 1 rows have two user turns in a row."]


def test_folded_system_turns_are_noticed(tokenizer, stops, run, tmp_path):
    file = write(tmp_path / "a.jsonl", [[{"role": "system", "content": "Be brief."}, *chat("q")]])
    assert run(file).report.train.folded_system == 0
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("== 'system'", "== 'never'")
        data = run(file)
    finally:
        tokenizer.chat_template = template
    assert data.report.train.folded_system == 1
    assert questions(data.train_conversations) == ["Be brief.\n\nq"]
    assert "the chat template drops system turns: in 1 rows" in data.report.notices[0]


def test_boundaries_and_control_tokens_are_noticed(tokenizer, run, tmp_path):
    template = tokenizer.chat_template
    file = write(tmp_path / "a.jsonl", [chat("say <|end|>", "answer"), chat("q", "answer")])
    try:
        tokenizer.chat_template = template.replace("{{'<|assistant|>\n'", "{{'<|assistant|> The'").replace(
            "{{ '<|assistant|>\n' }}", "{{ '<|assistant|> The' }}"
        )
        report = run(file).report
    finally:
        tokenizer.chat_template = template
    assert report.train.control_tokens == 1
    assert any("<|end|> is written out inside messages of 1 records" in each for each in report.notices)
    expected = tokenizer("<|assistant|> The")["input_ids"] != tokenizer("<|assistant|> Theanswer")["input_ids"][:2]
    assert report.train.boundary_mismatches == (2 if expected else 0)


def test_the_report_as_a_dict(run, tmp_path):
    report = run(write(tmp_path / "a.jsonl", many(30)), 0.2).report.to_dict()
    assert report["train"]["rows"] == 24
    assert report["eval"]["rows"] == 6
    assert report["sources"]["train"][0]["format"] == "messages"
    assert json.loads(json.dumps(report)) == report


# ------------------------------------------------------------------------------------------------- hold out


def test_a_fraction_is_held_out_with_the_seed(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(100))
    data, again, other = run(file, 0.05), run(file, 0.05), run(file, 0.05, seed=1)
    assert (len(data.train), len(data.eval)) == (80, 20)  # a fifth: 32 rows would be more
    assert list(again.eval_conversations) == list(data.eval_conversations) != list(other.eval_conversations)
    held_out = questions(data.eval_conversations)
    assert not set(held_out) & set(questions(data.train_conversations))
    assert sorted(held_out + questions(data.train_conversations)) == sorted(questions(many(100)))
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_equal_conversations_stay_on_one_side(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(10) * 5)
    for seed in range(5):
        data = run(file, 0.3, seed=seed)
        assert not set(questions(data.eval_conversations)) & set(questions(data.train_conversations))
        assert len(data.eval) % 5 == 0
        assert 0 < len(data.eval) < 50


def test_a_group_larger_than_the_share_is_not_drawn(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [chat("again")] * 900 + many(100))
    for seed in range(5):
        data = run(file, 0.05, seed=seed)
        assert len(data.eval) == 50
        assert "again" not in questions(data.eval_conversations)
    assert not any("are held out" in each for each in data.report.notices)


def test_a_share_that_equal_conversations_do_not_allow_is_said(run, tmp_path):
    file = write(tmp_path / "a.jsonl", [chat("one")] * 40 + [chat("two")] * 60)
    data = run(file, 0.05)
    assert questions(data.eval_conversations) == ["one"] * 40
    assert any(
        "eval: 40 of 100 rows are held out, not 20 as data.eval=0.05 asks" in each for each in data.report.notices
    )


def test_the_draw_of_different_conversations_is_as_it_was():
    """Older runs find their held-out rows again by the seed."""
    hashes = np.random.default_rng(1).integers(0, 2**63, 1000).astype(np.uint64)
    groups = np.unique(hashes)
    for seed in range(3):
        expected = set(groups[np.random.default_rng(seed).permutation(len(groups))[:50]])
        assert set(hashes[hold_out([hashes], 0.05, seed)[0]]) == expected


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
def test_at_least_one_row_and_never_all(fraction):
    for count in (2, 3, 50):
        taken = sum(map(len, hold_out([np.arange(count, dtype=np.uint64)], fraction, 0)))
        assert 1 <= taken < count


def test_equal_conversations_alone_cannot_be_held_out(run, tmp_path):
    with pytest.raises(
        DataError, match=r"data: eval=0.1 - expected at least two different conversations .* there is 1"
    ):
        run(write(tmp_path / "a.jsonl", [chat("q")] * 5), 0.1)


# ------------------------------------------------------------------------------------------------- mixing


def test_weights_say_how_often_rows_are_taken(run, tmp_path):
    one, two = write(tmp_path / "a.jsonl", many(10)), write(tmp_path / "b.jsonl", [chat(f"b{i}") for i in range(20)])
    data = run((SourceConfig(str(one), weight=2.5), SourceConfig(str(two), weight=0.25)))
    taken = questions(data.train_conversations)
    of_one = [taken.count(each) for each in questions(many(10))]
    assert sorted(of_one) == [2] * 5 + [3] * 5
    assert sum(each.startswith("b") for each in taken) == 5
    assert data.report.train.rows == len(taken) == 30
    assert data.report.train.duplicates == 0
    assert taken != sorted(taken)
    again = run((SourceConfig(str(one), weight=2.5), SourceConfig(str(two), weight=0.25)))
    assert questions(again.train_conversations) == taken


def test_rows_and_conversations_keep_together(run, tokenizer, stops, tmp_path):
    one, two = write(tmp_path / "a.jsonl", many(30)), write(tmp_path / "b.jsonl", many(30, seed=9))
    data = run((SourceConfig(str(one), weight=1.5), SourceConfig(str(two))), 0.1)
    for rows, conversations in ((data.train, data.train_conversations), (data.eval, data.eval_conversations)):
        for row, conversation in zip(rows, conversations, strict=True):
            assert row["input_ids"] == encode_conversation(tokenizer, conversation, stop_token_ids=stops).input_ids


def test_one_source_keeps_its_order(run, tmp_path):
    assert questions(run(write(tmp_path / "a.jsonl", many(50))).train_conversations) == questions(many(50))


def test_conversations_to_ask_leave_out_plain_text(run, tmp_path):
    write(tmp_path / "a.jsonl", many(5))
    (tmp_path / "b.jsonl").write_text('{"text": "Once."}\n{"text": "Twice."}\n')
    data = run(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert len(data.eval) == 2
    assert len(data.eval_conversations) == 0


# ------------------------------------------------------------------------------------------------- cache


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "data").iterdir())


def test_the_second_time_is_read_from_the_cache(run, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", many(300))
    first = run(file)
    monkeypatch.setattr(store, "process_batch", lambda *args: pytest.fail("tokenised again"))
    started = time.perf_counter()
    second = run(file)
    assert time.perf_counter() - started < 2
    assert second.train[:] == first.train[:]
    assert second.report == first.report
    file.rename(tmp_path / "elsewhere.jsonl")  # the content is the key, not the name
    assert len(run(tmp_path / "elsewhere.jsonl").train) == 300
    assert len(entries(tmp_path)) == 1


def test_what_changes_the_rows_changes_the_key(run, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", many(3))
    run(file)
    run(file, max_length=64)
    run(file, overlong="drop")
    run(SourceConfig(str(file), limit=2))
    run(SourceConfig(str(file), format="messages"))
    run(write(tmp_path / "b.jsonl", many(3, seed=5)))
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + "{# as before #}"
        run(file)
    finally:
        tokenizer.chat_template = template
    assert len(entries(tmp_path)) == 7


def test_padding_of_the_tokenizer_does_not_change_the_key(run, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", many(3))
    run(file)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    run(file)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("name", ["tokens.arrow", "conversations.arrow", "rows.npy", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "gone", "empty"])
def test_a_torn_entry_is_made_again(run, tmp_path, name, harm):
    file = write(tmp_path / "a.jsonl", many(20))
    expected = run(file).train[:]
    torn = entries(tmp_path)[0] / name
    if harm == "gone":
        torn.unlink()
    else:
        os.truncate(torn, torn.stat().st_size // 2 if harm == "cut" else 0)
    assert run(file).train[:] == expected
    assert [entry.name.startswith(".tmp") for entry in entries(tmp_path)] == [False]


@pytest.mark.parametrize("name", ["tokens.arrow", "conversations.arrow", "rows.npy"])
def test_a_damaged_entry_of_the_same_size_is_made_again(run, tmp_path, name):
    file = write(tmp_path / "a.jsonl", many(20))
    expected = run(file).train[:]
    damaged = entries(tmp_path)[0] / name
    content = bytearray(damaged.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    damaged.write_bytes(content)
    assert run(file).train[:] == expected
    assert (entries(tmp_path)[0] / name).read_bytes() != bytes(content)


def test_the_cache_folder_of_the_environment(tokenizer, stops, tmp_path, monkeypatch):
    monkeypatch.setenv("PHILORA_CACHE", str(tmp_path / "env"))
    config = DataConfig(train=(SourceConfig(str(write(tmp_path / "a.jsonl", many(2)))),), eval=None)
    prepare(config, tokenizer, max_length=64, seed=0, stop_token_ids=stops)
    assert len(list((tmp_path / "env" / "data").iterdir())) == 1
    monkeypatch.delenv("PHILORA_CACHE")
    assert store.cache_root(None) == Path.home() / ".cache" / "philora" / "data"


def test_a_refusal_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError):
        run(tmp_path / "a.jsonl")
    assert entries(tmp_path) == []


def test_leftovers_of_killed_runs_are_removed(run, tmp_path):
    root = tmp_path / "cache" / "data"
    for name, age in ((".tmp-old", 2 * 24 * 3600), (".tmp-new", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    run(write(tmp_path / "a.jsonl", many(2)))
    assert [each.name for each in entries(tmp_path) if each.name.startswith(".")] == [".tmp-new"]


def test_a_full_disk(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match=r"cache_dir=.*expected free space for the tokenised data"):
        run(write(tmp_path / "a.jsonl", many(2)))
    assert entries(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data: cache_dir=.* - expected a folder that can be written"):
        run(write(tmp_path / "a.jsonl", many(2)))


def test_rows_are_memory_mapped(run, tmp_path):
    data = run(write(tmp_path / "a.jsonl", many(20)))
    assert data.train.cache_files == [{"filename": str(entries(tmp_path)[0] / "tokens.arrow")}]


# ------------------------------------------------------------------------------------------------- refusals


def test_twenty_faults_are_listed_and_all_are_counted(run, tmp_path):
    lines = ['{"messages": []}'] * 30 + [json.dumps({"messages": chat("q")})] * 600 + ["{broken"] * 7
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            run(tmp_path / "a.jsonl", num_proc=processes)
        text = str(caught.value).splitlines()
        assert text[0] == f"{tmp_path}/a.jsonl: 37 of 637 records cannot be used (the first 20 of them):"
        assert len(text) == 22
        assert text[21] == "Correct them, or set data.invalid to drop to leave them out."
        assert text[1].startswith(f"  {tmp_path}/a.jsonl:1: messages=[] - expected at least one turn")


def test_a_few_faults_are_all_listed(run, tmp_path):
    file = tmp_path / "a.jsonl"
    record = json.dumps({"messages": chat("q")})
    file.write_text(f"{record}\n{{broken\n{record}\n" + '{"messages": [{"role": "usr", "content": "q"}]}\n')
    with pytest.raises(DataError) as caught:
        run(file)
    assert str(caught.value) == (
        f"{file}: 2 of 4 records cannot be used:\n"
        f"  {file}:2: record='{{broken\\n' - expected JSON, but at column 2: Expecting property name enclosed in "
        "double quotes. Correct or remove this record.\n"
        f"  {file}:4: messages[0].role='usr' - expected one of system, user, assistant, tool or one of their aliases. "
        "Did you mean 'user'?\n"
        "Correct them, or set data.invalid to drop to leave them out."
    )


def test_one_fault_stands_alone(run, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"messages": [{"role": "user", "content": "p\xe5"}]}\n')
    with pytest.raises(DataError) as caught:
        run(file)
    assert str(caught.value).startswith(
        f"{file}:1: byte='0xe5' - expected UTF-8 text, but byte 44 (from 0) of this line"
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_template_that_cannot_be_trained_with_is_one_message(run, tokenizer, tmp_path, processes):
    template = tokenizer.chat_template
    file = write(tmp_path / "a.jsonl", many(600))
    try:
        tokenizer.chat_template = template + "{{ messages|length }}"
        with pytest.raises(DataError, match=r"^tokenizer: chat_template=.* rendered with the generation prompt"):
            run(file, num_proc=processes)
    finally:
        tokenizer.chat_template = template
    assert entries(tmp_path) == []


def test_half_a_surrogate_pair_is_refused(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}'
    )
    with pytest.raises(DataError, match=r"content=.*unpaired surrogates"):
        run(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "data.train: weight=0.0 - expected a number over 0"),
        ({"weight": float("nan")}, "data.train: weight=nan - expected a number over 0"),
        ({"limit": 0}, "data.train: limit=0 - expected at least 1"),
    ],
)
def test_settings_of_a_source(run, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        run(SourceConfig(str(write(tmp_path / "a.jsonl", many(2))), **change))


def test_settings_of_the_whole(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(3))
    with pytest.raises(
        DataError, match=r"data: eval=1.5 - expected a fraction between 0 and 1, a number of rows, or a source"
    ):
        run(file, 1.5)
    with pytest.raises(DataError, match=r"data: overlong='cut' - expected truncate or drop"):
        run(file, overlong="cut")
    with pytest.raises(DataError, match=r"data: max_length=1 - expected at least 2 tokens"):
        run(file, max_length=1)
    with pytest.raises(DataError, match=r"data: train=None - expected a file, folder or hub id"):
        run(())


# ------------------------------------------------------------------------------------------------- streaming


def test_a_stream_gives_the_same_rows(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(700))
    rows = run(file).train
    data = run(SourceConfig(str(file), streaming=True), file)
    streamed = list(data.train)
    assert len(streamed) == 700
    order = sorted(range(700), key=lambda index: streamed[index]["input_ids"])
    assert [streamed[index] for index in order] == sorted(rows, key=lambda row: row["input_ids"])
    assert data.report.streaming
    assert len(data.eval) == 700
    assert list(data.train_conversations)[:3] == many(3)
    assert "train: the data is streamed" in data.report.notices[0]


def test_streams_are_mixed_by_their_weights(run, tmp_path):
    one, two = write(tmp_path / "a.jsonl", many(400)), write(tmp_path / "b.jsonl", [chat("b")] * 400)
    sources = (SourceConfig(str(one), streaming=True, weight=3), SourceConfig(str(two), streaming=True))
    rows = list(run(sources).train)
    short = min(len(row["input_ids"]) for row in rows)
    share = sum(len(row["input_ids"]) == short for row in rows) / len(rows)
    assert 0.15 < share < 0.35


def test_a_stream_cannot_be_split(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(3))
    with pytest.raises(DataError, match=r"data: eval=0.1 - expected a source, since a stream cannot be split"):
        run(SourceConfig(str(file), streaming=True), 0.1)


def test_a_fault_in_a_stream_is_raised_when_it_is_met(run, tmp_path):
    file = write(tmp_path / "a.jsonl", many(600))
    file.write_text(file.read_text("utf-8") + '{"messages": []}\n', "utf-8")
    data = run(SourceConfig(str(file), streaming=True))
    with pytest.raises(DataError, match=r"a.jsonl:601: messages="):
        list(data.train)
