"""One row for each message, records that are left out, rows that are held out, and what can be read once only."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from philora.cli.commands import app
from philora.configuration.config import load_config
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import prepare
from philora.dataset.prepare import places_of
from philora.dataset.row_choice import hold_out, wanted_rows
from philora.dataset.shapes import detect
from philora.errors import ConfigError, DataError
from tests.data_kinds import MODEL

ROWS = [
    # ticket, role, text, created: out of order, and two tickets among each other
    ("7", "Agent", "Tomorrow.", "2026-03-02T09:00:00+02:00"),
    ("9", "customer", "Refund?", "2026-03-02T06:30:00Z"),
    ("7", "Customer", "Where is it?", "2026-03-02T06:00:00Z"),
    ("7", "customer", "And when will it come?", "2026-03-02T06:01:00Z"),
    ("9", "agent", "Done.", "2026-03-02T06:45:00Z"),
]
TALKS = [
    [("user", "Where is it?\nAnd when will it come?"), ("assistant", "Tomorrow.")],
    [("user", "Refund?"), ("assistant", "Done.")],
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def run(tokenizer, tmp_path):
    def prepared(source, held_out=None, held_out_rows=None, **settings):
        source = source if isinstance(source, SourceConfig) else SourceConfig(str(source))
        data = DataConfig(train=(source,), eval=held_out, num_proc=1, cache_dir=str(tmp_path / "cache"), **settings)
        stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
        return prepare(data, tokenizer, max_length=512, seed=0, stop_token_ids=stops, held_out_rows=held_out_rows)

    return prepared


def messages(path, rows=ROWS, header=("ticket_id", "role", "text", "created")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def talks(prepared):
    return [[(each["role"], each["content"]) for each in talk] for talk in prepared.train_conversations]


def test_messages_become_conversations_in_the_order_of_time(run, tmp_path):
    prepared = run(messages(tmp_path / "a.csv"))
    assert talks(prepared) == TALKS
    (source,) = prepared.report.sources["train"]
    assert source.format == "turns"
    assert source.recognised == (
        "one row for each message: conversations by ticket_id, in the order of created, roles from role, text from text"
    )
    assert source.examples[1] == "user: Refund? | assistant: Done."


def test_without_a_time_they_stay_as_they_stand(run, tmp_path):
    rows = [row[:3] for row in ROWS]
    assert talks(run(messages(tmp_path / "a.csv", rows, ("ticket_id", "role", "text")))) != TALKS  # planted: no times
    ordered = [rows[at] for at in (2, 1, 3, 4, 0)]
    assert talks(run(messages(tmp_path / "b.csv", ordered, ("ticket_id", "role", "text")))) == TALKS


@pytest.mark.parametrize("form", ["%d.%m.%Y %H:%M", "%d.%m.%Y, %H:%M:%S", "%d.%m.%y %H:%M"])
def test_dates_with_dots_order_too(run, tmp_path, form):
    rows = [(*row[:3], datetime.datetime.fromisoformat(row[3]).astimezone(datetime.UTC).strftime(form)) for row in ROWS]
    rows[0] = (*rows[0][:3], datetime.datetime(2026, 11, 1, 9).strftime(form))
    rows[2] = (*rows[2][:3], datetime.datetime(2026, 2, 12, 9).strftime(form))
    rows[3] = (*rows[3][:3], datetime.datetime(2026, 3, 2, 9).strftime(form))
    prepared = run(messages(tmp_path / "a.csv", rows))
    assert talks(prepared) == TALKS
    assert not prepared.report.notices


def test_times_that_are_not_read_are_named_with_what_to_do(run, tmp_path):
    prepared = run(messages(tmp_path / "a.csv", [(*row[:3], "03/02/2026") for row in reversed(ROWS)]))
    (notice,) = prepared.report.notices
    assert "column created" in notice
    assert "2026-03-31" in notice


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parts_of_a_text_are_joined_and_never_written_as_python(run, tmp_path):
    asked = {"chat_id": "1", "role": "user", "text": "Where?"}
    parts = [{"type": "text", "text": "To"}, {"type": "text", "text": "morrow."}]
    prepared = run(jsonl(tmp_path / "a.jsonl", asked, {"chat_id": "1", "role": "agent", "text": parts}))
    assert talks(prepared) == [[("user", "Where?"), ("assistant", "Tomorrow.")]]
    picture = [{"type": "image", "url": "a.png"}]
    with pytest.raises(DataError, match=r"content=.*a\.png.*expected text, or a list of parts of type text"):
        run(jsonl(tmp_path / "b.jsonl", asked, {"chat_id": "1", "role": "agent", "text": picture}))
    with pytest.raises(DataError, match="expected text, not an object"):
        run(jsonl(tmp_path / "c.jsonl", asked, {"chat_id": "1", "role": "agent", "text": {"html": "x"}}))


@pytest.mark.parametrize(("flag", "off"), [("weight", 0), ("weight", "0"), ("loss", False), ("mask", True)])
def test_what_a_row_says_of_its_loss_is_heeded(run, tmp_path, flag, off):
    rows = [("user", "Hello?"), ("agent", "Hi."), ("user", "Where?"), ("agent", "Here.")]
    given = [{"chat_id": "1", "role": role, "text": text} for role, text in rows]
    given[1][flag] = off
    prepared = run(jsonl(tmp_path / "a.jsonl", *given))
    (row,) = prepared.train
    alone = run(jsonl(tmp_path / "b.jsonl", *given[2:])).train[0]
    assert sum(label != -100 for label in row["labels"]) == sum(label != -100 for label in alone["labels"])


def test_rows_of_one_side_with_and_without_loss_stay_turns_of_their_own(run, tmp_path):
    rows = [("user", "Where?", 1), ("agent", "One moment.", 0), ("agent", "Here.", 1), ("agent", "Bye.", "1")]
    given = [{"chat_id": "1", "role": role, "text": text, "weight": weight} for role, text, weight in rows]
    prepared = run(jsonl(tmp_path / "a.jsonl", *given))
    assert talks(prepared) == [[("user", "Where?"), ("assistant", "One moment."), ("assistant", "Here.\nBye.")]]


def test_a_bad_answer_among_the_rows_refuses_the_conversation(run, tmp_path):
    given = [{"chat_id": "1", "role": "user", "text": "Where?", "label": True}]
    given.append({"chat_id": "1", "role": "agent", "text": "No.", "label": False})
    with pytest.raises(DataError, match="label=False - expected"):
        run(jsonl(tmp_path / "a.jsonl", *given))


def test_a_role_that_nobody_knows_is_refused_with_what_to_do(run, tmp_path):
    with pytest.raises(DataError, match="role='internal note' - expected one of") as caught:
        run(messages(tmp_path / "a.csv", [*ROWS, ("9", "internal note", "Ask Ann.", "2026-03-02T06:31:00Z")]))
    assert "roles: {internal note: " in str(caught.value)


def test_the_limit_counts_conversations(run, tmp_path):
    prepared = run(SourceConfig(str(messages(tmp_path / "a.csv")), limit=1))
    assert talks(prepared) == TALKS[:1]


def test_equal_ids_in_two_files_are_two_conversations(run, tmp_path):
    folder = tmp_path / "months"
    folder.mkdir()
    for month in ("a", "b"):
        messages(folder / f"{month}.csv", [("1", "user", f"{month}?", "1"), ("1", "assistant", "Yes.", "2")])
    assert [talk[0][1] for talk in talks(run(folder))] == ["a?", "b?"]


def test_the_place_is_that_of_the_first_row(run, tmp_path):
    file = messages(tmp_path / "a.csv")
    prepared = run(file)
    stored = prepared.train_conversations.stored(1)
    assert places_of(DataConfig(train=(SourceConfig(str(file)),)), {stored}) == {stored: f"{file}:3"}


def test_the_format_finds_columns_or_says_what_is_missing(run, tmp_path):
    file = messages(tmp_path / "a.csv", ROWS[1::3], ("ticket_id", "role", "text", "created"))
    assert talks(run(SourceConfig(str(file), format="turns"))) == TALKS[1:]
    odd = messages(tmp_path / "b.csv", ROWS, ("number", "who", "said", "created"))
    with pytest.raises(DataError, match=r"fields='number, who, said, created' - expected columns for an id"):
        run(SourceConfig(str(odd), format="turns"))


def test_a_conversation_with_turns_in_one_record_is_left_alone():
    record = {"conversation_id": "1", "role": "user", "conversation": [{"role": "user", "content": "q"}], "text": "x"}
    assert detect([record], "f").name == "sharegpt"
    assert detect([{"id": "1", "role": "user", "text": "q"}] * 2, "f").name == "turns"
    with pytest.raises(DataError, match=r"fields=.*a complete conversation in each record"):
        detect([{"id": "1", "role": "user", "text": "q"}], "f")


KEYS = {
    "system": {"user": "{q}", "assistant": "{a}"},
    "user": {"assistant": "{a}"},
    "assistant": {"user": "{q}"},
    "prompt": {"completion": "{a}"},
    "completion": {"prompt": "{q}"},
    "text": {},
    "messages": {},
    "conversation": {"role": "{q}", "content": "{a}"},
    "role": {"conversation": "{q}", "content": "{a}"},
    "content": {"conversation": "{q}", "role": "{a}"},
    "time": {"conversation": "{q}", "role": "{q}", "content": "{a}"},
}


@pytest.mark.parametrize("key", KEYS)
def test_a_template_that_names_no_column_is_an_error_with_the_columns(run, tmp_path, key):
    file = messages(tmp_path / "a.csv", [("hello", "yes")], ("q", "a"))
    for template in ("{Reply}", "{{q}}", "a") if key != "system" else ("{Reply}", "a"):
        columns = {key: template, **KEYS[key]}
        with pytest.raises((ConfigError, DataError)) as caught:
            run(load_config({"data": {"train": {"path": str(file), "columns": columns}}}).data.train[0])
        assert caught.value.exit_code == 2
        if template == "{Reply}":
            assert "q, a" in str(caught.value)


# ------------------------------------------------------------------------------------- records that cannot be used


def broken(path):
    good = [{"prompt": f"q{each}", "completion": "yes"} for each in range(76)]
    bad = [{"prompt": "q", "completion": ""}] * 4
    path.write_text("".join(json.dumps(each) + "\n" for each in good[:40] + bad + good[40:]))
    return path


def test_records_that_cannot_be_used_end_the_run_or_are_left_out(run, tmp_path):
    file = broken(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="4 of 80 records cannot be used") as caught:
        run(file)
    assert "set data.invalid to drop" in str(caught.value)
    prepared = run(file, invalid="drop")
    assert len(prepared.train) == 76
    (source,) = prepared.report.sources["train"]
    assert (source.records, source.invalid, len(source.invalid_records)) == (80, 4, 4)
    assert source.invalid_records[0].startswith(f"{file}:41: completion='' - expected an answer")
    (notice,) = [each for each in prepared.report.notices if "left out" in each]
    assert all(f"{file}:{line}: " in notice for line in (41, 42, 43, 44))


def test_two_processes_leave_out_the_same(run, tmp_path, tokenizer):
    file = broken(tmp_path / "a.jsonl")
    settings = {"eval": None, "invalid": "drop", "num_proc": 2, "cache_dir": str(tmp_path / "other")}
    data = DataConfig(train=(SourceConfig(str(file)),), **settings)
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    two = prepare(data, tokenizer, max_length=512, seed=0, stop_token_ids=stops)
    assert list(two.train_conversations) == list(run(file, invalid="drop").train_conversations)


def test_records_of_which_none_can_be_used_are_refused(run, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "completion": ""}\n' * 3)
    with pytest.raises(DataError, match="3 of 3 records cannot be used") as caught:
        run(file, invalid="drop")
    assert "data.invalid" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize(
    ("part", "rows", "wanted"),
    [(0.05, 1000, 50), (0.05, 300, 32), (0.05, 160, 32), (0.05, 100, 20), (0.3, 100, 30), (0.05, 2, 1), (7, 300, 7)],
)
def test_a_share_is_at_least_32_rows_and_no_more_than_a_fifth(part, rows, wanted):
    assert wanted_rows(part, rows) == wanted


def pairs(path, count):
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "yes"}) + "\n" for n in range(count)))
    return path


def test_a_number_of_rows_is_taken_as_it_is(run, tmp_path):
    file = pairs(tmp_path / "a.jsonl", 200)
    assert len(run(file, 7).eval) == 7
    assert len(run(file, 0.05).eval) == 32
    with pytest.raises(DataError, match="eval=200 - expected fewer rows than there are, which is 200"):
        run(file, 200)
    assert load_config({"data": {"train": "helpdesk", "eval": 7}}).data.eval == 7


def test_a_run_of_before_finds_the_rows_that_it_recorded(run, tmp_path):
    file = pairs(tmp_path / "a.jsonl", 200)
    as_recorded = run(file, 0.05, held_out_rows=10)
    assert len(as_recorded.eval) == 10
    assert as_recorded.fingerprint == run(file, 10).fingerprint != run(file, 0.05).fingerprint


def test_the_recorded_count_draws_the_same_groups():
    """A count that equal conversations kept below the share draws what the share drew."""
    import numpy as np

    for seed in range(20):
        hashes = np.random.default_rng(seed).integers(0, 60, 200).astype(np.uint64)
        (drawn,) = hold_out([hashes], 0.3, seed)
        (again,) = hold_out([hashes], len(drawn), seed)
        assert drawn.tolist() == again.tolist()


# ------------------------------------------------------------------------------------- what can be read once only


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_for_what_it_is(run, tmp_path):
    pipe = tmp_path / "chats.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="this is a pipe or a device"):
        run(pipe)
    with pytest.raises(ConfigError, match="this is a pipe or a device"):
        load_config(pipe)


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no such device")  # noqa: PTH110
def test_standard_input_is_refused_for_what_it_is():
    program = "from philora.configuration.config import load_config; load_config('/dev/stdin')"
    done = subprocess.run([sys.executable, "-c", program], input="data: 1", capture_output=True, text=True, check=False)
    assert "this is a pipe or a device" in done.stderr


def test_packed_files_are_read_by_lines(run, tmp_path):
    text = pairs(tmp_path / "a.jsonl", 3000).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    assert list(run(tmp_path / "b.jsonl.gz").train_conversations) == list(run(tmp_path / "a.jsonl").train_conversations)


# ------------------------------------------------------------------------------------------------- what is shown


def test_check_shows_the_shape_and_examples(tmp_path):
    file = messages(tmp_path / "a.csv")
    (tmp_path / "run.yaml").write_text(
        f"model: {{name_or_path: nano}}\ndata: {{train: {file}, eval: null}}\n"
        f"training_config: {{output_dir: {tmp_path / 'run'}, max_steps: 30}}\n"
    )
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert shown.exit_code == 0
    assert f"read       {file}: 2 records, read as turns (one row for each message: conversations by" in shown.output
    assert "user: Refund? | assistant: Done." in shown.output
    plain = json.loads(CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml"), "--json"]).output)
    assert plain["sources"]["train"][0]["format"] == "turns"


def test_train_says_the_shape_and_examples(run, tmp_path, caplog):
    with caplog.at_level("INFO", "philora"):
        run(messages(tmp_path / "a.csv"))
    said = [each.getMessage() for each in caplog.records]
    assert any("2 records, read as turns (one row for each message" in each for each in said)
    assert "  user: Refund? | assistant: Done." in said
