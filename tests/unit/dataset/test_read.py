"""Readers: every kind of file, with the place of each record, and every message for what cannot be read."""

import csv
import gzip
import json
import tracemalloc

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from philora.configuration.sections import SourceConfig
from philora.dataset import datasets_library, file_bytes, json_files
from philora.dataset.read import resolve
from philora.dataset.records import Fault, parse_line
from philora.errors import DataError
from philora.runtime import hub

RECORDS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Да / כן / igen / ja / da 😀"}]}
    for text in ("Здравей", "Bună ziua, îți mulțumesc", "Hei på deg, ærlig", "שלום", "Jó napot, hűvös ősz")
]


def records(path, role="train", **settings):
    """All records of a source with their places."""
    found = []
    for batch in resolve(SourceConfig(str(path), **settings), role).open():
        for index, record in enumerate(batch.records):
            found.append((batch.where(index), parse_line(record) if isinstance(record, bytes) else record))
    return found


def values(path, **settings):
    return [record for _, record in records(path, **settings)]


def refusal(path, role="train", **settings):
    with pytest.raises((DataError, Fault)) as caught:
        records(path, role, **settings)
    return str(caught.value) if isinstance(caught.value, DataError) else caught.value.at("here")


def lines(path, items=RECORDS, encoding="utf-8", start=b""):
    text = "\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n"
    path.write_bytes(start + text.encode(encoding))
    return path


# --------------------------------------------------------------------------------------------- kinds


def test_jsonl_in_five_alphabets_with_its_lines(tmp_path):
    file = lines(tmp_path / "a.jsonl")
    assert records(file) == [(f"{file}:{number}", record) for number, record in enumerate(RECORDS, start=1)]


def test_blank_lines_and_windows_line_ends_keep_the_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\r\n{"text": "one"}\r\n\r\n  \r\n{"text": "two"}')
    assert records(file) == [(f"{file}:2", {"text": "one"}), (f"{file}:5", {"text": "two"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_accepted(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"\xef\xbb\xbf" + (b"text\nhei\n" if name.endswith("csv") else b'{"text": "hei"}\n'))
    assert values(file) == [{"text": "hei"}]


def test_json_arrays_of_any_layout(tmp_path):
    for indent in (None, 2):
        file = tmp_path / f"{indent}.json"
        file.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=indent), encoding="utf-8")
        assert values(file) == RECORDS
    assert [where.rsplit(":")[-1] for where, _ in records(tmp_path / "2.json")][:2] == ["2", "14"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("extra", [{}, {"version": 3, "info": {"name": "x"}, "tags": "a"}])
def test_json_wrapped_in_an_object(tmp_path, indent, extra):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**extra, "data": RECORDS}, indent=indent), encoding="utf-8")
    assert values(file) == RECORDS


def test_one_record_as_a_json_document(tmp_path):
    file = tmp_path / "a.json"
    for indent in (None, 2):
        file.write_text(json.dumps(RECORDS[0], indent=indent), encoding="utf-8")
        assert values(file) == RECORDS[:1]
    talk = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    file.write_text(json.dumps(talk, indent=2))
    assert values(file) == [talk]
    file.write_text(json.dumps({"conversations": [talk, talk]}, indent=2))
    assert values(file) == [talk, talk]


@pytest.mark.parametrize("between", ["\n", "", "\n\n  "])
def test_json_objects_one_after_another_are_read_to_the_end(tmp_path, monkeypatch, between):
    """As `jq .` writes them."""
    file = tmp_path / "a.json"
    file.write_text(between.join(json.dumps(each, indent=2, ensure_ascii=False) for each in RECORDS), encoding="utf-8")
    assert values(file) == RECORDS
    monkeypatch.setattr(json_files, "BLOCK_CHARACTERS", 50)
    assert values(file) == RECORDS
    places = [int(where.rsplit(":")[-1]) for where, _ in records(file)]
    assert places[0] == 1
    assert places == sorted(places)
    for more, message in (("more", ":{}: record="), ("[1", ":{}: record=")):
        file.write_text(json.dumps(RECORDS[0], indent=2) + "\n" + more)
        lines_before = json.dumps(RECORDS[0], indent=2).count("\n") + 2
        assert f"{file}{message.format(lines_before)}" in refusal(file)
    file.write_text(json.dumps(RECORDS[0], indent=2) + "\n5\n")
    assert "expected a JSON object with named fields" in refusal(file)


def test_nothing_stands_behind_an_object_with_a_list(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"data": RECORDS}, indent=1) + '{"data": []}')
    assert "expected nothing after the object with the list of records" in refusal(file)


def test_lists_of_an_object_are_chosen_by_name(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"version": 1, "test": RECORDS[:1], "train": RECORDS[1:]}, indent=1))
    assert values(file) == RECORDS[1:]
    assert [each for _, each in records(file, "eval")] == RECORDS[:1]
    assert values(file, split="test") == RECORDS[:1]
    source = resolve(SourceConfig(str(file)), "train")
    list(source.open())
    assert list(source.unread) == ["list test of a.json (1 records)", "fields beside the list of a.json (version)"]
    assert source.fingerprint != resolve(SourceConfig(str(file), split="test"), "train").fingerprint
    assert refusal(file, split="tests").endswith("split='tests' - expected one of test, train. Did you mean 'test'?")
    file.write_text(json.dumps({"easy": RECORDS[:1], "hard": RECORDS[1:]}))
    assert refusal(file).endswith("split=None - expected one of easy, hard. Name one of them.")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.csv", "a.parquet"])
def test_split_and_subset_of_a_file_are_refused(tmp_path, kind):
    file = tmp_path / kind
    if kind == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(RECORDS), file)
    else:
        file.write_text('{"text": "x"}\n' if kind == "a.jsonl" else "text\nx\n")
    assert "expected null, since this file is one list of records" in refusal(file, split="train")
    assert "expected null: a file has no subsets" in refusal(file, subset="x")


@pytest.mark.parametrize("folder", ["plain", "with [brackets] and *"])
def test_the_splits_of_a_folder_are_those_of_the_hub(tmp_path, folder):
    import datasets

    place = tmp_path / folder
    (place / "data").mkdir(parents=True)
    for name, row in (("train", 0), ("validation", 1), ("test", 2)):
        for shard in (0, 1):
            table = pa.Table.from_pylist([{"text": f"{name} {shard} {row}"}])
            parquet.write_table(table, place / "data" / f"{name}-0000{shard}-of-00002.parquet")
    assert [each["text"] for each in values(place)] == ["train 0 0", "train 1 0"]
    assert [each["text"] for _, each in records(place, "eval")] == ["validation 0 1", "validation 1 1"]
    assert [each["text"] for each in values(place, split="test")] == ["test 0 2", "test 1 2"]
    if folder == "plain":
        with datasets_library.quiet_datasets():
            loaded = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
        for name, rows in loaded.items():
            assert rows["text"] == [each["text"] for each in values(place, split=name)]
    assert "expected one of train, validation, test" in refusal(place, split="tset")


def test_subsets_of_a_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "train.jsonl", [{"text": name}])
        lines(tmp_path / name / "test.jsonl", [{"text": f"{name} test"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_dir: one\n- config_name: two\n  default: true\n  data_files:\n"
        "  - split: train\n    path: two/train.jsonl\n  - split: test\n    path: two/test.jsonl\n---\nText.\n"
    )
    assert values(tmp_path, subset="one") == [{"text": "one"}]
    assert values(tmp_path) == [{"text": "two"}]
    assert values(tmp_path, subset="two", split="test") == [{"text": "two test"}]
    assert "expected one of one, two. Did you mean 'two'?" in refusal(tmp_path, subset="twoo")
    (tmp_path / "README.md").write_text("No card here.\n")
    assert "the folder has no README.md that describes subsets" in refusal(tmp_path, subset="one")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_encodings_with_a_byte_order_mark_are_read(tmp_path, encoding, name):
    file = tmp_path / name
    content = "på\u2028sjøen 😀"
    if name == "a.csv":
        text = f"text\r\n{content}\r\n"
    else:
        text = json.dumps([{"text": content}] if name == "a.json" else {"text": content}, ensure_ascii=False)
    data = text.encode(encoding)
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert values(file) == [{"text": content}]
    if encoding == "utf-16":
        file.write_bytes(gzip.compress(data[:-1]) if name.endswith("gz") else data[:-1])
        assert "expected text to its end in UTF-16" in refusal(file)
        file.write_bytes(gzip.compress(data[2:]) if name.endswith("gz") else data[2:])
        assert "UTF-16 with a byte order mark, but its first bytes contain zeros" in refusal(file)


def test_lines_of_a_text_end_at_newlines_alone(tmp_path):
    file = tmp_path / "a.txt"
    said = ["one\u2028still one", "two\x85still two\x0cand", "", "three"]
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\n")):
        file.write_bytes(end.join(said).encode(encoding))
        assert [text for _, text in file_bytes.text_lines(file)] == said
    file.write_bytes("en\npå\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a.txt:2: byte='0xe5' - expected UTF-8 text.*windows-1252"):
        list(file_bytes.text_lines(file))


def test_names_that_stand_twice_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,answer\na,b,c\n")
    assert "a.csv:1: columns='answer' - expected distinct column names" in refusal(tmp_path / "a.csv")
    for name, text in (("a.jsonl", '{"text": "a", "text": "b"}'), ("a.json", '[\n{"text": "a", "text": "b"}\n]')):
        (tmp_path / name).write_text(text)
        assert "unique names in a JSON object" in refusal(tmp_path / name)


def test_json_lines_under_the_name_json(tmp_path):
    assert values(lines(tmp_path / "a.json")) == RECORDS


def test_records_across_the_edges_of_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK_CHARACTERS", 7)
    file = tmp_path / "a.json"
    items = [*RECORDS, {"number": 1234567890.5, "flag": True, "none": None, "escape": '\u2028\\"\n é'}]
    for indent, ascii_only in ((None, True), (3, False)):
        file.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert values(file) == items


def test_csv_and_tsv(tmp_path):
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, dialect)
            writer.writerows([["question", "answer"], ["a, b\tc", "two\nlines"], ["Здравей", "x" * 200_000]])
        found = records(tmp_path / name)
        assert [record for _, record in found] == [
            {"question": "a, b\tc", "answer": "two\nlines"},
            {"question": "Здравей", "answer": "x" * 200_000},
        ]
        assert [where.rsplit(":")[-1] for where, _ in found] == ["2", "4"]


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), file)
    assert records(file)[4] == (f"{file} row 5", RECORDS[4])


def test_gzip(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(tmp_path / "b.jsonl").read_bytes()))
    assert values(tmp_path / "a.jsonl.gz") == RECORDS


def test_a_folder_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    lines(tmp_path / "sub" / "c.jsonl", RECORDS[2:3])
    lines(tmp_path / "b.jsonl", RECORDS[1:2])
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:1]))
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "dataset_info.json").write_text("{}")
    lines(tmp_path / ".hidden.jsonl")
    assert values(tmp_path) == RECORDS[:3]


def test_a_saved_dataset(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(RECORDS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert values(tmp_path / "one") == RECORDS
    assert values(tmp_path / "two") == RECORDS
    assert [record for _, record in records(tmp_path / "two", "eval")] == RECORDS[:1]
    assert refusal(tmp_path / "two", split="tset").endswith(
        "two: split='tset' - expected one of train, test. Did you mean 'test'?"
    )


def test_limit(tmp_path):
    file = lines(tmp_path / "a.jsonl", RECORDS * 300)
    assert values(file, limit=3) == RECORDS[:3]
    assert len(values(file, limit=600)) == 600
    assert len(values(file, limit=10**6)) == 1500


def test_the_bundled_set():
    train, held_out = records("helpdesk"), records("helpdesk", "eval")
    assert len(train) > len(held_out) >= 200
    assert train[0][0].endswith("train.jsonl:1")
    assert set(train[0][1]) >= {"messages"}


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, two = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl")
    first = resolve(SourceConfig(str(one)), "train").fingerprint
    assert resolve(SourceConfig(str(two)), "train").fingerprint == first
    two.write_bytes(two.read_bytes().replace(b"ja", b"jA"))
    assert resolve(SourceConfig(str(two)), "train").fingerprint != first


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_memory_stays_flat(tmp_path, layout):
    file = tmp_path / "a.json"
    record = json.dumps({"text": "x" * 2000})
    joined = "\n" if layout == "lines" else ","
    text = joined.join([record] * 20_000)
    file.write_text(text if layout == "lines" else f"[{text}]")
    assert file.stat().st_size > 40_000_000
    tracemalloc.start()
    count = sum(len(batch.records) for batch in resolve(SourceConfig(str(file)), "train").open())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12_000_000


# --------------------------------------------------------------------------------------------- messages


def test_an_empty_file(tmp_path):
    for name, rule in (("a.jsonl", "at least one record, but the file is empty"), ("a.csv", "a line of column names")):
        file = tmp_path / name
        file.write_bytes(b"")
        assert f"{file}: file='{name}' - expected {rule}" in refusal(file)
    (tmp_path / "a.json").write_text("[]")
    assert "at least one record, but the list is empty" in refusal(tmp_path / "a.json")


def test_broken_json_in_a_line():
    with pytest.raises(Fault) as caught:
        parse_line(b'{"text": "a" "b"}')
    assert caught.value.at("f:7") == (
        'f:7: record=\'{"text": "a" "b"}\' - expected JSON, but at column 14: Expecting \',\' delimiter. '
        "Correct or remove this record."
    )
    with pytest.raises(Fault) as caught:
        parse_line(b"[" * 100_000)
    assert caught.value.expected == "JSON that is not nested a thousand levels deep"
    with pytest.raises(Fault) as caught:
        parse_line(b"[1]")
    assert caught.value.at("f:1") == "f:1: record=[1] - expected a JSON object with named fields."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"text": "a"},\n{"text": "b" "c"}\n]', ":3: record="),
        (
            '[\n{"text": "a"}\n{"text": "b"}]',
            ":3: text='{\"text\": \"b\"}]' - expected JSON with ',' here. Is the file complete?",
        ),
        ('[\n{"text": "a"},\n{"text": "b', ":3: record="),
        ('[{"text": "a"}] trailing', ":1: text='trailing' - expected nothing after the list of records"),
        ('{\n"data": [{"text": "a"}, {]\n}', ":2: record="),
    ],
)
def test_broken_json_in_a_document(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_text(text)
    assert f"{file}{message}" in refusal(file)


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("Здравей, как си днес? Юни", "windows-1251", "windows-1251"),
        ("שלום וברכה לכולם", "windows-1255", "windows-1255"),
        ("gyönyörű őszi idő", "windows-1250", "windows-1250"),
        ("på sjøen, ærlig talt", "windows-1252", "windows-1252"),
        ("plain", "utf-16", "UTF-16"),
    ],
)
def test_the_wrong_encoding_is_named_with_its_place(tmp_path, text, encoding, guess):
    line = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
    with pytest.raises(Fault) as caught:
        parse_line(line)
    message = caught.value.at("f:2")
    assert f"expected UTF-8 text, but byte {caught.value.expected.split()[4]} (from 0) of this line is not" in message
    assert f"It is probably {guess}: convert the file to UTF-8" in message
    offset = int(caught.value.expected.split()[4])
    assert message.startswith(f"f:2: byte='0x{line[offset]:02x}'")
    for name, start, end in (("a.json", b'[\n{"text": "a"},\n', b"]"), ("a.csv", b"text\nfine\n", b"")):
        file = tmp_path / name
        file.write_bytes(start + line.replace(b'"', b"") + end if name == "a.csv" else start + line + end)
        if encoding != "utf-16":
            assert f"{file}:3: byte=" in refusal(file)


def test_csv_faults(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a,b\n1,2\n1,2,3\n")
    assert refusal(file) == f"{file}:3: cells=3 - expected 2 as in the first line. Quote commas."
    file.write_text('a,b\n1,"2\n')
    assert f"{file}:2: line='unexpected end of data' - expected a line of CSV" in refusal(file)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_row_of_empty_cells_is_no_record(tmp_path, delimiter):
    file = tmp_path / "a.csv"
    file.write_text("a,b\n1,2\n,\n , \n3,4\n,\n".replace(",", delimiter))
    assert records(file) == [(f"{file}:2", {"a": "1", "b": "2"}), (f"{file}:5", {"a": "3", "b": "4"})]


def test_a_csv_row_with_too_few_cells_says_what_to_add(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a;b;c\n1;2\n")
    message = refusal(file)
    assert f"{file}:2: cells=2 - expected 3 as in the first line" in message
    assert "Quote" not in message
    assert "line break" in message


def workbook(path, *rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


@pytest.mark.parametrize("error", ["#N/A", "#REF!", "#DIV/0!"])
def test_an_error_of_excel_is_no_text(tmp_path, error):
    file = workbook(tmp_path / "a.xlsx", ("q", "a"), ("x", "y"), ("#1", "#N/A is what Excel says"), ("x", error))
    assert f"{file} row 4: a='{error}' - expected a value" in refusal(file)


def test_a_formula_without_its_value_is_refused(tmp_path):
    file = workbook(tmp_path / "a.xlsx", ("q", "a"), ("x", "y"), ("x", '="y"&A2'))
    assert f"{file} row 3: a='=\"y\"&A2' - expected a value" in refusal(file)


def test_a_title_above_the_names_is_refused_with_what_to_do(tmp_path):
    file = workbook(tmp_path / "a.xlsx", ("Report",), ("q", "a"), ("x", "y"))
    message = refusal(file)
    assert f"{file} row 2: cell='a' - expected a name above each column with values" in message
    assert "Remove" in message


def test_a_torn_parquet_or_gzip_file(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), file)
    file.write_bytes(file.read_bytes()[:-20])
    assert f"{file}: file='a.parquet' - expected a complete Parquet file" in refusal(file)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(lines(tmp_path / "b.jsonl", RECORDS * 50).read_bytes())[:-40])
    assert f"{zipped}: file='a.jsonl.gz' - expected a complete gzip file" in refusal(zipped)


def test_a_file_that_is_not_there(tmp_path):
    lines(tmp_path / "conversations.jsonl")
    message = refusal(tmp_path / "conversation.jsonl")
    assert message.startswith("data: path=")
    assert "expected a file or folder that exists. Did you mean 'conversations.jsonl'?" in message
    assert "There is no folder" in refusal(tmp_path / "nowhere" / "a.jsonl")


def test_kinds_that_are_not_read(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    assert "expected a file of the kinds .json, .jsonl" in refusal(tmp_path / "a.docx")
    assert "expected a folder with files of the kinds .json, .jsonl" in refusal(tmp_path)


def test_a_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "_has_no_network", lambda endpoint: True)
    message = refusal("nobody/nothing")
    assert message == (
        "data: path='nobody/nothing' - expected a file or folder that exists, or a dataset of the Hugging Face hub; "
        "no such file is here and the hub cannot be reached. Check the spelling of the path, connect to the network, "
        "or download the dataset on another machine and give its folder."
    )
    assert "Did you mean 'helpdesk'?" in refusal("helpdsk")


def test_no_network_is_seen_at_once(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert hub._has_no_network("https://no-such-host.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert not hub._has_no_network("https://no-such-host.invalid")


def test_a_hub_dataset_is_read_with_subset_split_and_limit(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, split, streaming):
        asked.append((arguments, split, streaming))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(hub, "_has_no_network", lambda endpoint: False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *arguments: ["train_sft", "test_sft"])
    found = records("a/b", subset="s", limit=2)
    assert found == [("a/b[train_sft] row 1", RECORDS[0]), ("a/b[train_sft] row 2", RECORDS[1])]
    records("a/b", "eval")
    records("a/b", split="x", streaming=True)
    assert asked == [
        (("a/b", "s"), "train_sft", False),
        (("a/b",), "test_sft", False),
        (("a/b",), "x", True),
    ]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *arguments: ["one", "two"])
    assert "a/b: split=None - expected one of one, two. Name one of them." in refusal("a/b")


def test_datasets_is_quiet_and_then_as_before():
    import datasets

    datasets.enable_progress_bars()
    with datasets_library.quiet_datasets():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
