"""The benchmarks' own parts: the work, the limit, the packs as trainers see them, the rows that are written."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gpu, preparation, training
from benchmarks.process import REPOSITORY, Record, Task, environment, start
from benchmarks.results import append
from benchmarks.work import (
    ASSISTANT,
    END,
    USER,
    WORKS,
    Document,
    make_documents,
    make_rows,
    pack,
    read_rows,
    write_data,
)
from tests.tolerances import LOSS_STEP_BF16

QUICK = WORKS["quick"]


def test_limit_counts_the_linears_and_the_labelled_part_of_the_head():
    work = WORKS["a"]
    assert work.flops_per_token(0.5) == pytest.approx(682.2e6, rel=1e-3)
    assert work.flops_per_token(1.0) - work.flops_per_token(0.0) == 4 * 32064 * 1024


@pytest.mark.parametrize("name", ["a", "b"])
def test_limit_counts_the_matrices_of_the_real_model(name):
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    work = WORKS[name]
    config = Phi3Config(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(each.weight.numel() for each in linears) == work.linear_parameters + work.head_parameters


def test_documents_are_the_same_each_time_and_half_answer():
    work = replace(WORKS["a"], documents=200)
    documents = make_documents(work)
    for one, other in zip(documents, make_documents(work), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
    lengths = np.array([len(each.input_ids) for each in documents])
    assert 200 < np.median(lengths) < 290
    assert lengths.max() <= 2048
    for each in documents:
        answer = int(each.completion_mask.argmax())
        assert each.completion_mask.sum() == len(each.input_ids) // 2
        assert each.completion_mask[answer:].all()
        assert each.input_ids[[0, answer - 2, answer - 1, -1]].tolist() == [USER, END, ASSISTANT, END]
        assert (each.labels[:answer] == -100).all()
        assert np.array_equal(each.labels[answer:], each.input_ids[answer:])


def test_documents_can_be_learned():
    def entropy(counts):
        shares = np.array(list(counts.values())) / sum(counts.values())
        return -(shares * np.log(shares)).sum()

    ids = [each.input_ids.tolist() for each in make_documents(WORKS["a"])]
    words = Counter(token for each in ids for token in each)
    pairs = Counter(pair for each in ids for pair in itertools.pairwise(each))
    assert entropy(words) < 0.6 * np.log(WORKS["a"].vocabulary)
    assert entropy(pairs) - entropy(words) < 0.3 * entropy(words)


def test_pack_keeps_every_document_once_and_fits():
    random = np.random.default_rng(0)
    for capacity in (50, 128):
        lengths = random.integers(1, 51, 300).tolist()
        rows = pack(lengths, capacity)
        assert sorted(each for row in rows for each in row) == list(range(300))
        sums = [sum(lengths[each] for each in row) for row in rows]
        assert max(sums) <= capacity
        assert sum(sums) / (len(rows) * capacity) > 0.95
    with pytest.raises(ValueError, match="lengths has 51 - expected at most the capacity, 50"):
        pack([51], 50)


def test_packs_are_read_as_they_were_written(tmp_path):
    path = QUICK.data_file(tmp_path)
    write_data(QUICK, path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    for row, expected in zip(read_rows(path), make_rows(QUICK), strict=True):
        for one, other in zip(row, expected, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids)
            assert np.array_equal(one.completion_mask, other.completion_mask)


def test_another_work_has_another_file(tmp_path):
    assert QUICK.data_file(tmp_path) != replace(QUICK, row_tokens=512).data_file(tmp_path)
    assert QUICK.model_folder(tmp_path) == replace(QUICK, row_tokens=512).model_folder(tmp_path)
    assert QUICK.model_folder(tmp_path) != replace(QUICK, layers=3).model_folder(tmp_path)


def test_task_goes_through_json_and_knows_when_the_data_ends(tmp_path):
    path = QUICK.data_file(tmp_path)
    write_data(QUICK, path)
    task = Task("philora", "model", str(path), QUICK, warmup=1, steps=3, rows=2)
    assert Task.from_json(task.to_json()) == task
    assert [len(step) for step in task.read()] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"steps=100 - expected at most \d+"):
        replace(task, steps=100).read()


def test_a_dataset_row_is_what_trl_trains_on(tmp_path):
    """Labels and restarting positions, after TRL's own collator."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from benchmarks.contestants import dataset_of

    rows = make_rows(QUICK)[:3]
    dataset = dataset_of([[row] for row in rows])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for row, documents in zip(dataset, rows, strict=True):
        batch = collate([row])
        assert (batch["position_ids"] == 0).sum() == len(documents)
        assert batch["input_ids"].shape[1] == sum(len(each.input_ids) for each in documents)
        assert (batch["labels"] != -100).sum() == sum(int(each.completion_mask.sum()) for each in documents)


def test_record_leaves_the_warmup_out_of_the_speed():
    record = Record(warmup=1)
    for _ in range(3):
        record.batch(labels=5, tokens=10)
        record.batch(labels=6, tokens=10)
        record.step(2.0)
    record.seconds = [100.0, 1.0, 3.0]
    result = record.result({}, ["numpy"])
    assert result["labels"] == [11, 11, 11]
    assert result["tokens_per_second"] == 40 / 4
    assert result["versions"]["numpy"] == np.__version__
    assert result["peak_bytes"] > 1 << 20


def result(speed=100.0, labels=(5, 5), losses=(2.0, 1.0), peak=10):
    return {
        "losses": list(losses),
        "labels": list(labels),
        "tokens": [10, 10],
        "seconds": [0.1, 0.1],
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "settings": {"dropout": 0.0},
        "versions": {"torch": "2"},
    }


def test_rows_hold_medians_and_the_share_of_the_limit(tmp_path):
    runs = training.Runs([result(90.0), result(110.0, peak=12), result(100.0)])
    task = Task("philora", "model", "data", QUICK)
    stamp = {"commit": "abc", "date": "today", "machine": "m"}
    rates = [QUICK.flops_per_token(0.5) * each for each in (100.0, 200.0, 400.0)]
    table = tmp_path / "new" / "training.csv"
    append(table, training.row_of("philora", runs, task, rates, stamp))
    append(table, training.row_of("other", runs, task, rates, stamp))
    with table.open(encoding="utf-8") as stream:
        row, other = csv.DictReader(stream)
    assert other["contestant"] == "other"
    assert [float(row[f"tokens_per_second{each}"]) for each in ("", "_min", "_max")] == [100, 90, 110]
    assert float(row["limit_tokens_per_second"]) == 200
    assert float(row["share_of_limit"]) == 0.5
    assert int(row["peak_bytes"]) == 12
    assert json.loads(row["losses"]) == [2.0, 1.0]
    with pytest.raises(ValueError, match=r"expected \['a'\]\. Move the table"):
        append(table, {"a": 1})


def test_other_labels_are_a_wrong_run():
    runs = {"one": training.Runs([result()]), "two": training.Runs([result()]), "none": training.Runs()}
    assert training.disagreements(runs) == []
    runs["two"].results.append(result(labels=(5, 6)))
    (found,) = training.disagreements(runs)
    assert found == "two: labels [5, 6] - expected those of the others, [5, 5]."


def test_largest_gap():
    assert training.largest_gap([1.0, 2.0, 3.0], [1.1, 1.5, 3.0]) == 0.5


def test_a_contestant_that_fails_is_named_with_its_last_line(tmp_path):
    stem, env = tmp_path / "philora", environment(1)
    with pytest.raises(RuntimeError, match=r"philora: exit 1: .*No module named benchmarks\.nobody.*philora\.log"):
        start([sys.executable, "-m", "benchmarks.nobody"], stem, env, 60)
    with pytest.raises(RuntimeError, match=r"philora: .*No such file"):
        start([str(tmp_path / "python")], stem, env, 60)
    with pytest.raises(RuntimeError, match=r"philora: not done after 0\.2 s"):
        start([sys.executable, "-c", "import time; time.sleep(5)"], stem, env, 0.2)
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"a\": 1}')"
    assert start([sys.executable, "-c", script], stem, env, 60) == {"a": 1}


def test_an_unknown_contestant_is_refused(capsys):
    with pytest.raises(SystemExit):
        training.arguments(["--contestants", "philora,lora"])
    assert "--contestants: 'lora' - expected some of trl-card" in capsys.readouterr().err


def test_preparation_is_of_the_same_data(tmp_path):
    preparation.write_conversations(tmp_path / "one.jsonl", 40)
    preparation.write_conversations(tmp_path / "two.jsonl", 40)
    lines = (tmp_path / "one.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40
    for line in lines:
        roles = [each["role"] for each in json.loads(line)["messages"]]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns


def test_preparation_tells_other_data():
    def figures(labels, tokens=100):
        return {"documents": 5, "tokens": tokens, "labels": labels}

    assert preparation.differences({"trl": [figures(65)], "philora": [figures(60)]}) == []
    assert "expected one" in preparation.differences({"trl": [figures(65)], "philora": [figures(61)]})[0]
    assert "expected one" in preparation.differences({"trl": [figures(65)], "philora": [figures(60, 99)]})[0]


@pytest.mark.parametrize("module", ["training", "lengths", "preparation", "startup", "gpu"])
def test_what_starts_contestants_stays_small(module):
    """Linux hands a process's peak memory on to those it starts, so torch there would be in every figure."""
    script = f"import sys, benchmarks.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 0


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.results import chart

    chart([(QUICK, {"TRL": 100.0, "philora": 250.0}, 100.0), (QUICK, {}, None)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_document_labels_are_not_shifted():
    document = Document(np.array([3, 9, 5], np.int32), np.array([0, 1, 1], np.uint8))
    assert document.labels.tolist() == [-100, 9, 5]


def test_the_gpu_limit_is_that_of_phi_3_mini():
    """16.45 GFLOP a token at a document of 2048: 14.89 in linears and head, 1.41 in attention, 0.15 in adapters."""
    work = gpu.MINI
    assert work.linear_parameters + work.head_parameters == pytest.approx(3.7224e9, rel=1e-4)
    kept, recomputed = (gpu.flops_per_token(work, [2048], 1.0, each) for each in (False, True))
    assert kept == pytest.approx(16.45e9, rel=1e-3)
    assert recomputed - kept == pytest.approx((14.89 / 2 + 1.41 / 3.5) * 1e9, rel=1e-3)
    short = gpu.flops_per_token(work, [1024, 1024], 1.0, False)
    assert kept - short == pytest.approx(1.41e9 / 2, rel=2e-3), "documents attend to themselves only"


def test_gpu_cases_begin_with_the_most_telling():
    given = gpu.arguments([])
    assert [each.name for each in given.groups[0]] == [
        "philora/bf16/2048/keep",
        "philora/bf16/8192/keep",
        "philora/fp8/2048/keep",
        "philora/fp8/8192/keep",
        "philora/nf4/2048/keep",
        "philora/nf4/8192/keep",
    ], "one process holds one base after the other"
    assert [cases[0].contestant for cases in given.groups] == 2 * list(gpu.CONTESTANTS)
    assert {case.base for case in given.groups[1]} == {"bf16", "nf4"}, "fp8 is philora's alone"
    asked = "philora/nf4/2048/keep,philora/bf16/2048/keep+*,trl/bf16/2048/*,trl/nf4/*/keep,philora/nf4/16384/host"
    assert [[each.name for each in cases] for cases in gpu.arguments(["--only", asked]).groups] == [
        [
            "philora/nf4/2048/keep",
            "philora/bf16/2048/keep+graphs",
            "philora/bf16/2048/keep+dropout",
            "philora/bf16/2048/keep+dropout+graphs",
        ],
        [f"trl/{each}" for each in (
            "bf16/2048/keep", "bf16/2048/keep+dropout", "bf16/2048/recompute", "bf16/2048/recompute+dropout",
            "nf4/2048/keep", "nf4/8192/keep", "nf4/16384/keep",
        )],
        ["philora/nf4/16384/host"],
    ]  # fmt: skip


def test_gpu_cases_turn_on_what_is_off_until_a_card_ran_it():
    plain = gpu.Case("philora", "bf16", 2048)
    assert plain.switches == replace(plain, kept="elementwise").switches == replace(plain, kept="recompute").switches
    assert plain.switches == {}
    assert replace(plain, dropout=0.05).switches == replace(plain, kept="host").switches == {"PHILORA_STACK": "all"}
    assert replace(plain, graphs=True).switches == {"PHILORA_GRAPHS": "all"}
    assert gpu.reference_of(gpu.Case("philora", "fp8", 2048, "host", 0.05), "trl") == gpu.Case("trl", "bf16", 2048)


def test_gpu_switches_are_put_back(monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "0")
    monkeypatch.delenv("PHILORA_GRAPHS", raising=False)
    with gpu.switched({"PHILORA_STACK": "all", "PHILORA_GRAPHS": "all"}):
        assert os.environ["PHILORA_STACK"] == os.environ["PHILORA_GRAPHS"] == "all"
    assert os.environ["PHILORA_STACK"] == "0"
    assert "PHILORA_GRAPHS" not in os.environ


def test_gpu_rows_have_the_columns_of_the_table():
    given = gpu.arguments([])
    facts = {"rates": {"2048": 1e15}, "device": "a card", "stamp": {"date": "", "commit": ""}}
    row = gpu.row_of(gpu.Case("philora", "bf16", 2048), 1, {"status": gpu.SKIPPED}, facts, given)
    with (REPOSITORY / "benchmarks" / "results" / "gpu.csv").open(newline="", encoding="utf-8") as stream:
        assert next(csv.reader(stream)) == list(row)


@pytest.mark.slow
def test_the_planners_memory_stands_beside_what_was_measured():
    """The two trainings of philora that were measured on a card, before there was a stack."""
    pytest.importorskip("bitsandbytes")
    with (REPOSITORY / "benchmarks" / "results" / "gpu.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["contestant"] == "philora" and row["status"] == "ok"]
    for row in [row for row in rows if row["commit"] == "38c5060"]:
        case = gpu.Case("philora", row["base"], int(row["row_tokens"]), row["kept"])
        measured = int(row["max_memory_allocated"])
        assert gpu.planned_bytes(case, gpu.MINI, 0.5, stack=False) == pytest.approx(measured, rel=0.1)
        planned = [gpu.planned_bytes(replace(case, kept=kept), gpu.MINI, 0.5) for kept in gpu.KEPT]
        assert planned == sorted(planned, reverse=True)
        assert len(set(planned)) == 4, "what is kept counts"
    fp8, dropout = gpu.Case("philora", "fp8", 8192), gpu.Case("philora", "bf16", 8192, dropout=0.05)
    plain = gpu.planned_bytes(gpu.Case("philora", "bf16", 8192), gpu.MINI, 0.5)
    assert gpu.planned_bytes(fp8, gpu.MINI, 0.5) > plain
    assert gpu.planned_bytes(dropout, gpu.MINI, 0.5) > plain
    assert gpu.planned_bytes(dropout, gpu.MINI, 0.5, graph=True) > gpu.planned_bytes(dropout, gpu.MINI, 0.5)


def test_gpu_baseline_is_the_best_of_the_others_whatever_its_packs():
    def ran(*speeds):
        return [{"status": gpu.OK, "tokens_per_second": each} for each in speeds]

    results = {
        gpu.Case("philora", "bf16", 8192): ran(30.0, 34.0, 32.0),
        gpu.Case("philora", "fp8", 8192): ran(48.0),
        gpu.Case("trl", "bf16", 2048): ran(5.0),
        gpu.Case("liger", "bf16", 8192, "recompute"): ran(16.0),
        gpu.Case("unsloth", "bf16", 2048): [{"status": "not importable: unsloth"}],
        gpu.Case("philora", "nf4", 2048): ran(20.0),
    }
    assert list(gpu.verdicts(results)) == [
        "bf16: philora/bf16/8192/keep has 32 tokens/s, 2.00 times the best of the others, liger/bf16/8192/recompute "
        "with 16",
        "fp8: philora/fp8/8192/keep has 48 tokens/s, 3.00 times the best of the others, liger/bf16/8192/recompute "
        "with 16",
    ], "NF4 has nobody to be compared with"


def test_gpu_names_that_match_nothing_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.arguments(["--only", "philora/fp4/*"])
    assert "--only: 'philora/fp4/*' - expected patterns of some of philora/bf16/2048/keep" in capsys.readouterr().err


def test_gpu_cases_that_cannot_run_say_why(tmp_path):
    given = gpu.arguments(["--quick", "--device", "cpu"])
    cases = [gpu.Case(name, "bf16", 256) for name in ("unsloth", "philora")]
    soon = time.monotonic()
    found = gpu.run_group(cases[:1], given, soon + 600, tmp_path) | gpu.run_group(cases[1:], given, soon + 1, tmp_path)
    assert found == {
        "unsloth/bf16/256/keep": {"status": "not importable: unsloth"},
        "philora/bf16/256/keep": {"status": gpu.SKIPPED},
    }
    # in a contestant's process: what it raises, and no case after the time
    settings = gpu.Settings(QUICK, "cpu", 1, 2, seconds=60.0)
    out = tmp_path / "out.json"
    gpu.contestant([replace(cases[0], contestant="liger")], settings, out)
    assert json.loads(out.read_text()) == {
        "liger/bf16/256/keep": {"status": "ModuleNotFoundError: No module named 'liger_kernel'"}
    }
    gpu.contestant(cases[1:], replace(settings, seconds=-1.0), out)
    assert json.loads(out.read_text()) == {"philora/bf16/256/keep": {"status": gpu.SKIPPED}}
    with pytest.raises(ValueError, match=r"steps=900 - expected at most \d+"):
        gpu.measure_case(cases[1], replace(settings, steps=900))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_gpu_rows(tmp_path, device):
    """The whole command with a tiny model: same labels for all, losses that agree, rows for what is not there."""
    pytest.importorskip("bitsandbytes")
    if device == "cuda" and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no CUDA GPU")
    table = tmp_path / "gpu.csv"
    only = "philora/*/256/keep,philora/*/256/recompute,trl/*/256/keep,plain/bf16/256/keep,liger/bf16/256/keep"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--quick", "--only", only]
    command += ["--results", str(table), "--work-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with table.open(encoding="utf-8") as stream:
        rows = {(row["contestant"], row["base"], row["kept"]): row for row in csv.DictReader(stream)}
    done = {name: row for name, row in rows.items() if name[0] != "liger"}
    assert len(done) == 9
    if importlib.util.find_spec("liger_kernel") is None:
        assert rows["liger", "bf16", "keep"]["status"] == "not importable: liger_kernel"
    assert {row["status"] for row in done.values()} == {"ok"}
    for what in ("labels", "tokens"):
        assert len({row[what] for row in done.values()}) == 1
    for name, row in done.items():
        base = "bf16" if name[1] == "fp8" else name[1]
        theirs = json.loads(done["trl", base, "keep"]["losses"])
        losses = json.loads(row["losses"])
        assert len(losses) == 3
        assert losses[-1] < losses[0]
        assert training.largest_gap(losses, theirs) < (0.1 if name[1] == "fp8" else LOSS_STEP_BF16)
        speed, limit = float(row["tokens_per_second"]), float(row["limit_tokens_per_second"])
        assert float(row["share_of_limit"]) == pytest.approx(speed / limit, abs=1e-4)
        assert json.loads(row["settings"])["trainable_parameters"] > 0
        assert bool(row["max_memory_allocated"]) == (device == "cuda")
        gap = training.largest_gap(losses, json.loads(done["philora", base, name[2]]["losses"]))
        assert float(row["loss_gap_to_philora"]) == pytest.approx(gap, abs=2e-5)
        if name[0] == "philora":
            assert row["path"].startswith("stack" if device == "cuda" else "modules")
            assert bool(row["planned_memory_allocated"]) == (device == "cuda")
    assert json.loads(done["philora", "bf16", "keep"]["settings"])["adapters"] == "float32"
    assert "bitsandbytes" in json.loads(done["philora", "nf4", "keep"]["versions"])
