"""`philora merge --fresh-base`: the loss of both bases, as a plain model with each one's weights has it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import philora
from philora.configuration.config import load_config
from philora.dataset import prepare
from philora.models.loading import load_skeleton, load_tokenizer, stop_token_ids

pytest.importorskip("bitsandbytes")

EVERY = 0.2  # held out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run over a nano model in nf4, whose adapter is as large as the rounding of its base."""
    folder = tmp_path_factory.mktemp("fresh") / "run"
    settings = {"max_steps": 6, "learning_rate": 2e-3, "max_length": 128, "eval_strategy": "no", "save_strategy": "no"}
    philora.train(
        {
            "model": {"name_or_path": "nano", "quantization": "nf4", "dtype": "float32"},
            "data": {"train": {"path": "helpdesk", "limit": 40}, "eval": EVERY},
            "evaluation": {"generate": 0},
            "training_config": settings | {"output_dir": str(folder)},
            "peft_config": {"r": 4},
        }
    )
    return folder


def rows_of(run):
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    stops = stop_token_ids(tokenizer, load_skeleton(config.model).generation_config.eos_token_id)
    return prepare(config.data, tokenizer, max_length=128, seed=42, stop_token_ids=stops).eval


def loss_of(folder, rows):
    """By transformers' own loss, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
            labels_of_row = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * labels_of_row
            count += labels_of_row
    return total / count


def shown(text):
    lines = {name: float(value) for name, value in re.findall(r"^  (\w+) base.*? (\d\.\d{4}),", text, re.MULTILINE)}
    return lines["dequantised"], lines["fresh"]


@pytest.mark.slow
def test_the_loss_of_both_bases(run, tmp_path, cli):
    done = cli("merge", run, "--out", tmp_path / "fresh", "--fresh-base")
    assert done.code == 0, done.err
    rows = rows_of(run)
    assert f"loss with the adapter on {len(rows)} rows that were not trained on:" in done.out
    cli("merge", run, "--out", tmp_path / "dequantised", "--no-verify")
    wanted = loss_of(tmp_path / "dequantised", rows), loss_of(tmp_path / "fresh", rows)
    got = shown(done.out)
    # four decimals are shown; merged weights are rounded once more in fp32
    assert got == pytest.approx(wanted, abs=2e-4)
    assert abs(wanted[0] - wanted[1]) > 1e-3, "negative control: the bases differ by more than that"
    assert got != pytest.approx(wanted[::-1], abs=2e-4)


@pytest.mark.slow
def test_rows_of_ones_own_and_none(run, tmp_path, cli, jsonl):
    record = {
        "messages": [{"role": "user", "content": "Which bird is it?"}, {"role": "assistant", "content": "A wren."}]
    }
    data = jsonl([record])
    done = cli("merge", run, "--out", tmp_path / "fresh", "--fresh-base", "--no-verify", "--data", data)
    assert "loss with the adapter on 1 rows that were not trained on" in done.out
    first, second = shown(done.out)
    assert first != second
    adapter = tmp_path / "adapter"
    (run / "adapter").rename(adapter)
    try:
        alone = cli("merge", adapter, "--out", tmp_path / "alone", "--fresh-base", "--no-verify", "--base", "nano")
        assert alone.code == 0, alone.err
        assert "needs rows that were not trained on: give them by --data FILE" in alone.err
        assert "loss with" not in alone.out
        # without the run's configuration the record beside the adapter says how the base was quantised
        options = ("--fresh-base", "--no-verify", "--base", "nano", "--data", data)
        with_rows = cli("merge", adapter, "--out", tmp_path / "again", *options)
        assert shown(with_rows.out) == pytest.approx((first, second), abs=2e-4)
    finally:
        adapter.rename(run / "adapter")
    wrong = cli("merge", run, "--out", tmp_path / "x", "--data", data)
    assert wrong.code == 2
    assert "expected --fresh-base too" in wrong.err
    full = cli("merge", run, "--out", run, "--fresh-base")
    assert full.code == 2
