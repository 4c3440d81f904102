"""Where adapters and bases are found, and the rows that a run keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save

import philora
from philora.configuration.sections import DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from philora.dataset import prepare
from philora.dataset.held_out import held_out, held_out_bytes, read_held_out, spans_of, write_held_out
from philora.errors import AdapterError, DataError
from philora.exporting.conversion import export
from philora.exporting.merged_folder import merge_to_folder
from philora.generation.inference import load
from philora.models.loading import load_model, load_tokenizer, local_path, stop_token_ids
from philora.models.locate import find_adapter, require_base
from philora.models.run_folder import TrainedRun, paths_of
from philora.runtime.hub import HubPath, parse_hub_path
from tests.hub_server import TOKEN, hub_server

FILE = "/{repo_id}/resolve/{revision}/{filename}"
NANO = ModelConfig(name_or_path="nano", dtype="float32")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/adapters", ("me/adapters", "", None)),
        ("me/adapters@v2", ("me/adapters", "", "v2")),
        ("me/adapters/support", ("me/adapters", "support", None)),
        ("me/adapters/a/b/", ("me/adapters", "a/b", None)),
        ("me/adapters/a/b@feature/x", ("me/adapters", "a/b", "feature/x")),
        ("me/adapters@refs/pr/3/a", ("me/adapters", "a", "refs/pr/3")),
        ("me/adapters@feature%2Fx/a", ("me/adapters", "a", "feature/x")),
        ("hf://me/adapters@v2/a", ("me/adapters", "a", "v2")),
        ("me/adapters@v1/a@v2", None),
        ("me/adapters/../secret", None),
        ("me/..", None),
        ("adapters", None),
        ("me/adapters/a b?", ("me/adapters", "a b?", None)),
        ("https://example.org/me/adapters", None),
    ],
)
def test_what_a_path_of_the_hub_names(name, expected):
    assert parse_hub_path(name) == (None if expected is None else HubPath(*expected))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the bundled model, which differ."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        philora.get_peft_model(load_model(NANO), config).save_pretrained(str(folder / name))
    return folder


@pytest.fixture
def hub(monkeypatch, adapters, tmp_path):
    """A Hub with adapters in folders of a repository, other ones at a revision."""

    def files(name, inside):
        return {f"{inside}{each.name}": each.read_bytes() for each in (adapters / name).iterdir()}

    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + FILE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        server.repositories["me/adapters"] = files("new", "support/de/") | {"README.md": b"# Adapters"}
        server.branches["me/adapters", "v1"] = files("old", "support/de/") | files("old", "")
        yield server


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("me/adapters/support/de", "new"),
        ("me/adapters/support/de@v1", "old"),
        ("hf://me/adapters@v1/support/de", "old"),
        ("me/adapters@v1", "old"),
    ],
)
def test_an_adapter_in_a_folder_or_at_a_revision(hub, adapters, source, name):
    found = find_adapter(source)
    written = (adapters / name / "adapter_model.safetensors").read_bytes()
    assert (found.path / "adapter_model.safetensors").read_bytes() == written
    assert require_base(found) == local_path("nano")
    model = philora.load_adapter(load_model(NANO), source)
    expected = philora.load_adapter(load_model(NANO), adapters / name)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("recorded_in", ["the run", "the adapter"])
def test_a_base_on_the_hub_is_taken_at_the_revision_that_was_trained_on(hub, adapters, tmp_path, recorded_in):
    nano = Path(local_path("nano"))
    files = {file.name: file.read_bytes() for file in nano.iterdir() if file.is_file()}
    other = {name: tensor + 1 for name, tensor in load_file(nano / "model.safetensors").items()}
    hub.repositories["me/base"] = files | {"model.safetensors": save(other, {"format": "pt"})}
    hub.branches["me/base", "v1"] = files
    run = tmp_path / "run"
    shutil.copytree(adapters / "new", run / "adapter")
    config = run / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": "me/base", "revision": "v1" if recorded_in == "the adapter" else None}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    if recorded_in == "the run":
        (run / "config.yaml").write_text("model: {name_or_path: me/base, revision: v1}\n")
        (run / "run.json").write_text("{}")
    source = run if recorded_in == "the run" else run / "adapter"
    assert find_adapter(source).revision == "v1"
    assert find_adapter(source, base="me/base").revision is None
    merged = merge_to_folder(source, tmp_path / "merged").folder
    kept = "model.embed_tokens.weight"
    assert torch.equal(load_file(merged / "model.safetensors")[kept], load_file(nano / "model.safetensors")[kept])
    loaded = load(source).model.get_base_model()
    assert torch.equal(loaded.model.embed_tokens.weight, load_file(nano / "model.safetensors")[kept])
    export(source, tmp_path / "exported", format="loralib")
    wrong = merge_to_folder(source, tmp_path / "wrong", base="me/base").folder
    assert torch.equal(load_file(wrong / "model.safetensors")[kept], other[kept]), "main's would have been seen"


def test_a_folder_without_an_adapter_is_said_with_what_there_is(hub):
    with pytest.raises(
        AdapterError, match=r"a folder of the Hub with adapter_config.json. It has: me/adapters/support/de"
    ):
        find_adapter("me/adapters/suport")
    with pytest.raises(AdapterError, match=r"source='me/nothing/a@v1' - expected a run folder.*The hub says"):
        find_adapter("me/nothing/a@v1")


def test_the_bundled_model_of_another_installation_is_this_one_s(adapters, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for each in (adapters / "new").iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    path = folder / "adapter_config.json"
    for base, expected in (
        ("/home/ada/site-packages/philora/nano/model", local_path("nano")),
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        assert require_base(find_adapter(folder)) == expected
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/home/ada/phi"}))
    with pytest.raises(philora.errors.ModelError, match=r"none at /home/ada/phi. Give its current folder: --base"):
        require_base(find_adapter(folder))
    assert require_base(find_adapter(folder, "nano")) == local_path("nano")


def test_places_are_recorded_from_both_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "phi").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = philora.configuration.config.load_config(
        {"model": {"name_or_path": "models/phi"}, "data": {"train": ["rows.jsonl", "helpdesk"]}}
    )
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    paths = paths_of(config, run)
    assert {name: each["relative"] for name, each in paths.items()} == {
        "models/phi": "../../models/phi",
        "rows.jsonl": "../../rows.jsonl",
    }
    (run / "run.json").write_text(json.dumps({"paths": paths}))
    (run / "config.yaml").write_text("model: {name_or_path: models/phi}\n")
    assert TrainedRun(run).base().name == str(tmp_path / "models" / "phi")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("models", "runs"):
        (tmp_path / name).rename(moved / name)
    monkeypatch.chdir("/")
    assert TrainedRun(moved / "runs" / "a").base() == (str(moved / "models" / "phi"), ())
    (moved / "models").rename(moved / "other")
    tried = TrainedRun(moved / "runs" / "a").base().tried
    assert tried == (str(tmp_path / "models" / "phi"), str(moved / "models" / "phi"))


# -- the rows that a run keeps

RECORDS = [
    {"messages": [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Not this.", "weight": 0},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Yes, zwölf \u2028 of them."},
    ]},
    {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "Three " * 10},
                  {"role": "assistant", "content": "A long answer. " * 40}]},
    {"messages": [{"role": "user", "content": "Four?"}, {"role": "assistant", "content": "Four."}]},
]  # fmt: skip
TEXTS = [{"text": "Nothing but text."}, {"text": "More text\nin two lines."}]
PAIRS = [{"prompt": "Five?", "completion": "Five."}, {"prompt": "Six?", "completion": "Six."}]


@pytest.mark.parametrize("records", [RECORDS, TEXTS, PAIRS], ids=["messages", "text", "pairs"])
def test_kept_rows_are_the_held_out_ones(jsonl, tmp_path, records):
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    source = SourceConfig(path=str(jsonl(records, "eval.jsonl")))
    train = SourceConfig(path=str(jsonl([records[-1], *PAIRS[:0]], "train.jsonl")))
    data = DataConfig(train=(train,), eval=(source,))
    common = {"max_length": 96, "seed": 1, "stop_token_ids": stop_token_ids(tokenizer)}
    prepared = prepare(data, tokenizer, **common)
    file = tmp_path / "held_out.jsonl"
    assert write_held_out(file, prepared) == len(records)
    assert held_out_bytes(prepared) == file.stat().st_size, "of few rows it is no estimate"
    kept, read = read_held_out(file, tokenizer, "f"), held_out(data, tokenizer, **common)
    for name in ("input_ids", "labels"):
        assert list(kept.rows[name]) == list(read.rows[name])
    assert [kept.conversations[row] for row in range(len(records))] == [
        read.conversations[row] for row in range(len(records))
    ]
    assert kept.answerable == read.answerable
    assert kept.in_training == read.in_training == [len(records) - 1]
    if records is RECORDS:
        assert len(kept.rows[1]["input_ids"]) == 96  # cut
        assert len(json.loads(file.read_text().split("\n")[0])["label_spans"]) == 1  # the turn of weight 0 has none


def test_spans_are_labels():
    assert spans_of([-100, 1, 2, -100, 3]) == [[1, 3], [4, 5]]
    assert spans_of([7]) == [[0, 1]]
    assert spans_of([-100, -100]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": [99999, 1]},
        {"input_ids": [-1, 1]},
        {"input_ids": []},
        {"input_ids": "12"},
        {"label_spans": [[1, 900]]},
        {"label_spans": [[2, 1]]},
        {"messages": []},
        {"messages": None},
    ],
)
def test_a_changed_row_is_named(tmp_path, change):
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    row = {"messages": [{"role": "user", "content": "?"}], "input_ids": [5, 6, 7], "label_spans": [[1, 3]]}
    file = tmp_path / "held_out.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert read_held_out(file, tokenizer, None).in_training is None
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(DataError, match=r"held_out.jsonl:2: row=.* - expected a row as the run wrote it.*--data FILE"):
        read_held_out(file, tokenizer, None)
    file.write_text(json.dumps(row)[:-9])
    with pytest.raises(DataError, match=r"held_out.jsonl:1: row="):
        read_held_out(file, tokenizer, None)
    file.write_text("")
    with pytest.raises(DataError, match=r"rows=0 - expected the rows that the run held out"):
        read_held_out(file, tokenizer, None)
