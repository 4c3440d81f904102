"""What was trained is what is asked: the system turn of the training conversations begins every later prompt."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

import philora
from philora.configuration.config import load_config
from philora.configuration.sections import TokenizerConfig
from philora.dataset import prepare
from philora.dataset.arrangement import Arrangement
from philora.dataset.system_turns import commonest_system_turn
from philora.generation.conversation import load_pool
from philora.models.loading import load_tokenizer
from philora.models.run_folder import SystemTurn, TrainedRun
from tests.adapters_of_nano import NANO
from tests.cli.conftest import QUICK
from tests.gguf_models import go_template
from tests.served import serve

SYSTEM = 'You are the help desk of "Acme & Sons".\nAnswer in one sentence.'
QUESTION = "Is progress saved if I abort with Ctrl-C?"


def chats(folder, share):
    """Twenty conversations, of which a share begins with `SYSTEM`."""
    lines = []
    for number in range(20):
        system = [{"role": "system", "content": SYSTEM}] if number < 20 * share else []
        question = QUESTION if number == 0 else f"Question {number}?"
        turns = [*system, {"role": "user", "content": question}, {"role": "assistant", "content": f"Answer {number}."}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "chats.jsonl").write_text("".join(lines))
    return folder / "chats.jsonl"


def trained(folder, share):
    """A run of one step on `chats`; its folder."""
    folder.mkdir()
    train = chats(folder, share)
    (folder / "eval.jsonl").write_text(train.read_text().splitlines()[0])
    settings = json.loads(json.dumps(QUICK))
    settings["data"] = {"train": str(train), "eval": str(folder / "eval.jsonl")}
    settings["evaluation"] = {"generate": 0}
    settings["training_config"] |= {"output_dir": str(folder / "run"), "max_steps": 1, "save_steps": 1}
    return philora.train(settings, quiet=True).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By what their conversations begin with: the system turn, and nothing."""
    folder = tmp_path_factory.mktemp("runs")
    return {"system": trained(folder / "a", 1.0), "nothing": trained(folder / "b", 0.0)}


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are tokenised while a test runs."""
    found = []
    whole = Arrangement.prompt_ids

    def recorded(self, *arguments, **options):
        ids = whole(self, *arguments, **options)
        found.extend(ids)
        return ids

    monkeypatch.setattr(Arrangement, "prompt_ids", recorded)
    return found


def row(run):
    """Tokens of the row that asks `QUESTION`, and where its answer begins."""
    entry = json.loads((run / "held_out.jsonl").read_text())
    return entry["input_ids"], entry["label_spans"][0][0]


def begins(ids, run):
    """Whether a prompt is a trained row up to its answer."""
    tokens, answer = row(run)
    return ids == tokens[:answer]


def ids_of(messages):
    return Arrangement(load_tokenizer(NANO, TokenizerConfig())).prompt_ids([messages])[0]


def test_a_run_records_it(runs):
    record = json.loads((runs["system"] / "run.json").read_text())
    results = json.loads((runs["system"] / "results.json").read_text())
    assert record["system"] == results["system"] == {"text": SYSTEM, "share": 1.0}
    assert TrainedRun(runs["system"]).system == SystemTurn(SYSTEM, 1.0)
    assert TrainedRun(runs["nothing"]).system is None
    assert row(runs["system"]) != row(runs["nothing"])


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("share", "used"), [(0.9, True), (0.85, False), (0.0, False)])
def test_it_is_used_where_nearly_all_have_it(tmp_path, share, used, drops):
    """Also where the template drops system turns, which training then puts into the user's."""
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    if drops:
        tokenizer.chat_template = tokenizer.chat_template.replace("== 'system'", "== 'nobody'")
    data = load_config({"data": {"train": str(chats(tmp_path, share)), "eval": None}}).data
    prepared = prepare(data, tokenizer, max_length=128, seed=0, stop_token_ids=[tokenizer.eos_token_id])
    assert bool(prepared.report.train.folded_system) == (drops and share > 0)
    found = commonest_system_turn(prepared, data)
    assert found == (SystemTurn(SYSTEM, pytest.approx(share)) if share else None)
    (tmp_path / "run.json").write_text(json.dumps({"system": None if found is None else found._asdict()}))
    assert (TrainedRun(tmp_path).system is not None) == used


@pytest.mark.parametrize("drops", [False, True])
def test_several_at_the_beginning_are_used_as_they_were_trained(tmp_path, drops):
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    if drops:
        tokenizer.chat_template = tokenizer.chat_template.replace("== 'system'", "== 'nobody'")
    given = [{"role": "system", "content": text} for text in ("Be brief.", "Never apologise.")]
    given += [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": given}) + "\n")
    data = load_config({"data": {"train": str(file), "eval": None}}).data
    prepared = prepare(data, tokenizer, max_length=128, seed=0, stop_token_ids=[tokenizer.eos_token_id])
    found = commonest_system_turn(prepared, data)
    assert found is not None
    assert all(turn["content"] in found.text for turn in given[:2])
    (asked,) = Arrangement(tokenizer).prompt_ids([[{"role": "system", "content": found.text}, given[2]]])
    (lost,) = Arrangement(tokenizer).prompt_ids([[given[0], given[2]]])
    ids = list(prepared.train[0]["input_ids"])
    assert ids[: len(asked)] == asked
    assert ids[: len(lost)] != lost


@pytest.mark.parametrize("name", ["system", "nothing"])
def test_generate_begins_with_it(runs, name, cli, asked, tmp_path):
    (tmp_path / "prompts.txt").write_text(QUESTION + "\n")
    done = cli("generate", runs[name], "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "2")
    assert done.code == 0, done.err
    assert begins(asked[-1], runs[name])
    assert begins(asked[-1], runs["system"]) == (name == "system")
    assert done.err.count("100% of the training conversations") == (name == "system")


def test_a_prompt_keeps_its_own(runs, cli, asked, jsonl):
    file = jsonl([{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]}])
    assert cli("generate", runs["system"], "--prompts", file, "--max-new-tokens", "2").code == 0
    assert asked[-1] == ids_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])


@pytest.mark.parametrize("name", ["system", "nothing"])
def test_the_terminal_begins_with_it(runs, name, cli, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/system -\n{QUESTION}\n"))
    done = cli("chat", runs[name], "--max-new-tokens", "2")
    assert done.code == 0, done.err
    assert begins(asked[-2], runs[name])
    assert begins(asked[-1], runs["nothing"]), "removed"
    assert done.err.count("/system - removes it") == (name == "system")


@pytest.mark.parametrize("name", ["system", "nothing"])
def test_the_endpoint_begins_with_it(runs, name, asked):
    voices = load_pool({"own": runs[name]})
    question = {"role": "user", "content": QUESTION}
    none = {"role": "system", "content": ""}
    with serve(voices) as server:
        models = server.raw("GET", "/v1/models")[1]["data"]
        assert [each.get("system") for each in models] == [SYSTEM if name == "system" else None, None]
        requests = [("own", [question], name), ("nano", [question], "nothing")]
        if name == "system":
            requests += [(model, [none, question], "nothing") for model in ("own", "nano")]
        for model, messages, like in requests:
            body = {"model": model, "messages": messages, "max_tokens": 2}
            assert server.raw("POST", "/v1/chat/completions", body)[0] == 200
            assert begins(asked[-1], runs[like])


@pytest.mark.parametrize("name", ["system", "nothing"])
def test_the_card_asks_so(runs, name):
    code = re.search(r"^messages = (.*)$", (runs[name] / "adapter" / "README.md").read_text(), re.MULTILINE)[1]
    messages = json.loads(code)
    assert messages[:-1] == ([{"role": "system", "content": SYSTEM}] if name == "system" else [])
    assert begins(ids_of([*messages[:-1], {"role": "user", "content": QUESTION}]), runs[name])


@pytest.mark.parametrize("name", ["system", "nothing"])
def test_a_merged_folder_asks_so(runs, name, cli, tmp_path):
    assert cli("merge", runs[name], "--out", tmp_path / "merged", "--no-verify").code == 0
    readme = (tmp_path / "merged" / "README.md").read_text()
    messages = json.loads(re.search(r"print\(answer\((.*), max_new", readme)[1])
    assert begins(ids_of([*messages[:-1], {"role": "user", "content": QUESTION}]), runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["system", "nothing"])
def test_ollama_begins_with_it(runs, name, cli, tmp_path):
    """Ollama puts SYSTEM before a conversation that has no system turn of its own."""
    done = cli("export", runs[name], "--format", "ollama", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "Modelfile").read_text()
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)[1]
    messages = [{"Role": "user", "Content": QUESTION}]
    if system is not None:
        messages.insert(0, {"Role": "system", "Content": system[1]})
    tokenizer = load_tokenizer(NANO, TokenizerConfig())
    assert begins(tokenizer(go_template(template, {"Messages": messages}))["input_ids"], runs[name])
    assert (system is not None) == (name == "system")
