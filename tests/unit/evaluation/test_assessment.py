"""`philora.evaluate` on a run of the bundled model: which rows are scored, what is compared, what is refused."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import philora
from philora.configuration.config import load_config
from philora.configuration.writing import dump_yaml
from philora.dataset import prepare
from philora.errors import AdapterError, ConfigError, DataError, RunError
from philora.evaluation import assessment, measures
from philora.evaluation.assessment import evaluate, is_accepted, judged
from philora.evaluation.scores import score
from philora.generation.inference import load, read_prompts
from philora.models.loading import load_model, load_tokenizer, stop_token_ids

QUICK: dict[str, Any] = {"answers": 2, "forgetting": False, "generation": {"max_new_tokens": 6}}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder as training leaves it: configuration, adapter, and the fingerprint of the data."""
    folder = tmp_path_factory.mktemp("run")
    rows = [chat(f"What is item {index}?", f"Item {index} is number {index * index}.") for index in range(40)]
    data = write_rows(folder / "rows.jsonl", rows)
    config = load_config(
        {
            "model": {"name_or_path": "nano", "dtype": "float32"},
            "data": {"train": str(data), "eval": 0.2, "cache_dir": str(folder / "cache")},
            "training_config": {"output_dir": str(folder), "max_length": 128, "seed": 5},
            "evaluation": {"generate": 3, "max_new_tokens": 8},
        }
    )
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = philora.get_peft_model(load_model(config.model, tokenizer), lora)
    model.save_pretrained(str(folder / "adapter"))
    (folder / "results.json").write_text(json.dumps({"data": {"fingerprint": prepared(config).fingerprint}}))
    return folder


def prepared(config: Any) -> Any:
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    stops = stop_token_ids(tokenizer, None)
    return prepare(config.data, tokenizer, max_length=128, seed=5, stop_token_ids=stops)


@pytest.fixture(scope="module")
def found(run) -> Any:
    return evaluate(run, metrics=["rouge", "chrf"], answers=4, command="philora evaluate RUN")


def lines(found: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.folder / "examples.jsonl").read_text().splitlines()]


def test_the_rows_are_those_that_the_run_held_out(run, found):
    examples = lines(found)
    assert len(examples) == 8
    own = prepared(load_config(run / "config.yaml"))
    assert [each["prompt"] for each in examples if "prompt" in each] == [row[:-1] for row in own.eval_conversations[:4]]
    training = {row[0]["content"] for row in own.train_conversations}
    assert not training & {each["prompt"][0]["content"] for each in examples if "prompt" in each}
    assert found.results["training_rows_left_out"] == 0
    assert found.results["training_rows_known"] is True


def test_figures_are_those_of_each_model_alone(run, found):
    loaded = load(run)
    own = prepared(load_config(run / "config.yaml")).eval
    padding = loaded.tokenizer.pad_token_id
    with loaded.model.disable_adapter():
        base = score(loaded.model, own, pad_token_id=padding)
    adapter = score(loaded.model, own, pad_token_id=padding)
    by_field = {each.field: each for each in found.figures}
    assert by_field["loss"].before == pytest.approx(base.loss, rel=1e-5)  # fp32, other batches
    assert by_field["loss"].after == pytest.approx(adapter.loss, rel=1e-5)
    assert base.loss != pytest.approx(adapter.loss, rel=1e-3)
    assert list(by_field) == ["loss", "perplexity", "token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL",
                              "rougeLsum", "chrf"]  # fmt: skip
    assert {each.field: each.examples for each in found.figures} == {
        field: 8 if field in ("loss", "perplexity", "token_accuracy") else 4 for field in by_field
    }


def test_every_figure_can_be_traced_to_its_rows(found):
    examples = lines(found)
    by_field = {each.field: each for each in found.figures}
    for name, figure in (("base", by_field["loss"].before), ("adapter", by_field["loss"].after)):
        total = sum(each[name]["loss"] * each["label_tokens"] for each in examples)
        assert total / sum(each["label_tokens"] for each in examples) == pytest.approx(figure)
    answered = [each for each in examples if "prompt" in each]
    rouge = sum(each["adapter"]["rougeL"] for each in answered) / len(answered)
    assert rouge == pytest.approx(by_field["rougeL"].after, abs=1e-3)  # rounded to four places in the file
    assert {"answer", "exact_match", "tokens", "stopped", "chrf"} <= answered[0]["base"].keys()
    assert answered[0]["base"]["answer"] != answered[0]["adapter"]["answer"]


def test_the_forgetting_check_scores_texts_and_prompts_of_both(found):
    fields = {each.field: each for each in found.forgetting}
    assert list(fields) == ["forgetting_loss", "forgetting_perplexity", "forgetting_correct"]
    assert fields["forgetting_loss"].examples == len(assessment._bundled("texts.jsonl"))
    assert fields["forgetting_correct"].examples == len(assessment._bundled("prompts.jsonl"))
    assert fields["forgetting_loss"].before != fields["forgetting_loss"].after
    assert found.results["forgetting"][0]["verdict"] in ("better", "worse", "unclear")


def test_the_bundled_prompts_are_answerable_by_their_own_words():
    for each in assessment._bundled("prompts.jsonl"):
        for word in each["accept"]:
            assert is_accepted(f"The answer is {word}.", each["accept"], bool(each.get("case")))
        assert not is_accepted("I do not know that.", each["accept"], bool(each.get("case")))
    assert not is_accepted("ok", ["OK"], case=True)


def test_rows_that_were_trained_on_are_named_and_left_out(run, tmp_path, caplog):
    own = prepared(load_config(run / "config.yaml"))
    trained, held = own.train_conversations[0], own.eval_conversations[0]
    data = write_rows(tmp_path / "mixed.jsonl", [{"messages": held}, {"messages": trained}, chat("New?", "Yes.")])
    result = evaluate(run, data=data, out=tmp_path / "out", **QUICK)
    assert [each["row"] for each in lines(result)] == [1, 3]
    assert f"rows of the training set are left out: row 2 ('{trained[0]['content']}')" in caplog.text
    assert result.results["training_rows_left_out"] == 1
    result = evaluate(run, data=data, out=tmp_path / "out", keep_training_rows=True, **QUICK)
    assert [each.get("in_training", False) for each in lines(result)] == [False, True, False]
    only = write_rows(tmp_path / "only.jsonl", [{"messages": trained}])
    with pytest.raises(DataError, match=r"rows=0 - expected at least one row that is not in the training set"):
        evaluate(run, data=only, out=tmp_path / "out", **QUICK)


def test_fields_of_given_rows_that_are_not_read_are_named(run, tmp_path, caplog):
    data = write_rows(tmp_path / "rows.jsonl", [chat("New?", "Yes.") | {"topic": "shop"}])
    evaluate(run, data=data, out=tmp_path / "out", **QUICK)
    assert "topic (1)" in caplog.text
    caplog.clear()
    data = write_rows(tmp_path / "rows.jsonl", [chat("New?", "Yes.")])
    evaluate(run, data=data, out=tmp_path / "out", **QUICK)
    assert "not read" not in caplog.text


def test_changed_data_is_refused_because_the_held_out_rows_are_no_longer_known(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "adapter").symlink_to(run / "adapter")
    (copy / "results.json").write_text((run / "results.json").read_text())
    rows = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (copy / "rows.jsonl").write_text("".join(rows[1:]))
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run / "rows"), str(copy / "rows")))
    with pytest.raises(DataError, match=r"the data that the run was trained with; it has changed.*--data FILE"):
        evaluate(copy, **QUICK)


def test_an_adapter_alone_needs_rows_and_a_folder(run, tmp_path, caplog):
    alone = tmp_path / "alone"
    alone.mkdir()
    for each in (run / "adapter").iterdir():
        (alone / each.name).write_bytes(each.read_bytes())
    with pytest.raises(ConfigError, match=r"out=None - expected a folder for the results.*Give --out DIR"):
        evaluate(alone, base="nano", **QUICK)
    with pytest.raises(DataError, match=r"data=None - expected rows to score.*Give --data FILE"):
        evaluate(alone, base="nano", out=tmp_path / "out", **QUICK)
    data = write_rows(tmp_path / "rows.jsonl", [chat("New?", "Yes.")])
    result = evaluate(alone, base="nano", data=data, out=tmp_path / "out", **QUICK)
    assert result.results["training_rows_known"] is False
    assert "whether these rows are in the training set is not known" in caplog.text
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"expected a new or empty folder, or one with an earlier evaluation"):
        evaluate(alone, base="nano", data=data, out=tmp_path / "out", **QUICK)
    with pytest.raises(AdapterError, match="expected a run folder"):
        evaluate(tmp_path, **QUICK)


JUDGE = """
import json, sys
rows = [json.loads(line) for line in sys.stdin]
for row in reversed(rows):
    assert set(row) == {"id", "prompt", "reference", "answer"}
    print(json.dumps({"id": row["id"], "score": len(row["answer"])}))
"""


def test_a_judge_scores_answers_without_knowing_whose_they_are(run, tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(JUDGE)
    command = shlex.join([sys.executable, str(script)])
    result = evaluate(run, out=tmp_path / "out", judge=command, **QUICK)
    answered = [each for each in lines(result) if "prompt" in each]
    for each in answered:
        for name in ("base", "adapter"):
            assert each[name]["judge"] == len(each[name]["answer"])
    figure = {each.field: each for each in result.figures}["judge"]
    assert figure.after == pytest.approx(sum(each["adapter"]["judge"] for each in answered) / len(answered))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("print('5')", RunError, r"judge's line 1: line='5' - expected JSON with an id and a score"),
        ("pass", RunError, r"judge=0 - expected a score for each of 1 answers\. Without one: 0"),
        ('print(\'{"id": 0, "score": NaN}\')', RunError, r"a finite number"),
        ('print(\'{"id": 7, "score": 1}\')', RunError, r"expected the id of an answer that has no score yet"),
        ("import sys; sys.exit('no key')", RunError, r"a command that ends with 0, not 1\. Its output: no key"),
    ],
)
def test_a_judge_that_fails_is_told_how(code, error, message):
    with pytest.raises(error, match=message):
        judged(shlex.join([sys.executable, "-c", code]), [{"id": 0, "prompt": [], "reference": "", "answer": ""}])


def test_a_judge_may_repeat_a_text_with_unicodes_line_ends():
    code = "import json, sys; sys.stdout.reconfigure(encoding='utf-8'); print(json.dumps({**json.loads(sys.stdin.buffer.readline()), 'score': 2}, ensure_ascii=False))"  # noqa: E501
    question = {"id": 0, "prompt": [], "reference": "", "answer": "a\u2028b\x85c"}
    assert judged(shlex.join([sys.executable, "-c", code]), [question]) == {"0": 2.0}


def test_a_judge_that_is_not_there():
    with pytest.raises(ConfigError, match=r"judge='no-such-judge' - expected a command that can be started"):
        judged("no-such-judge", [])


def test_sampled_answers_follow_their_seed(run, tmp_path):
    def answers(seed: int) -> list[str]:
        generation = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": seed}
        result = evaluate(run, out=tmp_path / "out", answers=2, forgetting=False, generation=generation, metrics=[])
        return [each["adapter"]["answer"] for each in lines(result) if "prompt" in each]

    assert answers(1) == answers(1) != answers(2)


def test_without_the_extra_what_needs_it_is_left_out_with_a_notice(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(measures, "_installed", lambda package: False)
    result = evaluate(run, out=tmp_path / "out", **QUICK)
    assert [each.field for each in result.figures] == ["loss", "perplexity", "token_accuracy", "exact_match"]
    assert "rouge is left out: its package is not installed (pip install 'philora[evaluation]')" in caplog.text


def test_prompts_in_any_shape(tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": "a"},
        chat("b", "no matter"),
        {"conversations": [{"from": "human", "value": "c"}]},
        {"instruction": "d", "input": "e"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "f"}]},
    ]
    expected = [["a"], ["b"], ["c"], ["d\ne"], ["s", "f"]]
    found = read_prompts(write_rows(tmp_path / "prompts.jsonl", rows))
    assert [[message["content"] for message in each] for each in found] == expected
    (tmp_path / "prompts.txt").write_text("one\n\n two\n")
    assert [each[0]["content"] for each in read_prompts(tmp_path / "prompts.txt")] == ["one", "two"]
    write_rows(tmp_path / "bad.jsonl", [{"prompt": 5}, {"text": "t"}, {"other": 1}])
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "bad.jsonl")
    assert "3 faults" in str(caught.value)
    assert "bad.jsonl:1: prompt=5 - expected text" in str(caught.value)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="at least one line"):
        read_prompts(tmp_path / "empty.txt")


def test_results_are_json_that_anything_reads(found):
    text = (found.folder / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == found.results
    assert math.isfinite(found.results["comparison"][0]["low"])
