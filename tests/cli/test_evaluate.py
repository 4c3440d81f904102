"""`philora evaluate` and `philora generate` as a person calls them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig

import philora
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the bundled model that changes every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = ModelConfig(dtype="float32")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = load_model(settings, load_tokenizer(settings, TokenizerConfig()))
    philora.get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


def test_evaluate_shows_base_beside_adapter(cli, adapter, tmp_path):
    common = ("--base", "nano", "--data", "helpdesk", "--limit", "4", "--answers", "2", "--max-new-tokens", "4",
              "--no-forgetting", "--out", tmp_path / "out")  # fmt: skip
    shown = cli("evaluate", adapter, *common)
    assert shown.code == 0, shown.err
    for word in ("Loss", "Perplexity", "Exact match", "ROUGE-L", "BLEU", "chrF", "better/same/worse", "examples.jsonl"):
        assert word in shown.out
    as_json = cli("evaluate", adapter, *common, "--json")
    assert as_json.code == 0
    assert json.loads(as_json.out) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_evaluate_says_what_is_wrong(cli, adapter, tmp_path):
    for words, expected in (
        (("--metrics", "meteor", "--out", tmp_path / "o"), "metrics='meteor' - expected some of rouge, bleu, chrf"),
        (("--temperature", "0.5", "--out", tmp_path / "o", "--data", "helpdesk"), "Set do_sample to true"),
        (("--data", "helpdesk"), "Give --out DIR"),
    ):
        answer = cli("evaluate", adapter, "--base", "nano", *words)
        assert (answer.code, expected in answer.err) == (2, True), answer.err
    assert not (tmp_path / "o").exists()


def test_generate_answers_a_file(cli, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("What is LoRA?\nWhat is a rank?\n")
    common = ("generate", adapter, "--base", "nano", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "6")
    printed = cli(*common)
    assert printed.code == 0, printed.err
    entries = [json.loads(line) for line in printed.out.splitlines()]
    assert [each["prompt"][0]["content"] for each in entries] == ["What is LoRA?", "What is a rank?"]
    assert all(1 <= each["tokens"] <= 6 for each in entries)
    written = cli(*common, "--out", tmp_path / "answers.jsonl")
    assert written.out.strip().endswith("answers.jsonl: 2 answers")
    assert (tmp_path / "answers.jsonl").read_text() == printed.out
    base = cli(*common, "--no-adapter")
    assert base.out != printed.out
    missing = cli("generate", adapter, "--base", "nano", "--prompts", tmp_path / "promts.txt")
    assert (missing.code, "promts.txt" in missing.err) == (2, True)


def test_report_of_several_runs(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"peft_config: {{r: {len(name) + ord(name[0])}}}\n")
    answer = cli("report", "one", "two")
    assert (answer.code, answer.out.strip()) == (0, "comparison.html")
    assert "peft_config.<wbr>r" in (tmp_path / "comparison.html").read_text()
    assert cli("report", "one", "two", "--out", "both.html").out.strip() == "both.html"
    assert cli("report", "one").out.strip() == "one/report.html"
    missing = cli("report", "one", "three")
    assert (missing.code, "expected a run folder" in missing.err) == (2, True)
