"""What the model card says of a run, and what is written beside weights."""

from __future__ import annotations

import json
import stat

import pytest

from philora.configuration.config import load_config
from philora.files.checkpoint import atomic_folder
from philora.reporting.card import model_card
from philora.training.run_arguments import logging_steps
from tests.unit.reporting.test_report import evaluated, make_run, results


@pytest.fixture
def run(tmp_path):
    """Return a run that stopped early at 2.5 of its 4 epochs."""
    folder = make_run(tmp_path / "run", written=results() | {"comparison": [evaluated(0.36, -3.3, -3.0)]})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 400, "epoch": 2.5}))
    return folder


def test_the_card_states_what_was_trained_n_intervals_and_an_example(run):
    card = model_card("me/help", run=run, base="nano", adapter_config={})
    assert "| steps, as trained | 400 |" in card
    assert "| epochs, as trained | 2.5 |" in card
    assert "num_train_epochs" not in card, "what was asked for is not what was made"
    assert "| Loss | 3.487 | 0.360 | −3.127 (−3.300, −3.000) | 332 |" in card
    assert "- Question: And how do I continue from there?" in card
    assert "- Fine-tuned: Give the same command again with --resume." in card


def test_a_card_that_is_published_has_no_row_of_the_data(run):
    card = model_card("me/help", run=run, base="nano", adapter_config={}, example=False)
    assert "And how do I continue" not in card
    assert "## Results" in card


@pytest.mark.parametrize("name", ["results.json", "trainer_state.json"])
def test_a_damaged_file_of_the_run_costs_its_figures_only(run, caplog, name):
    (run / name).write_text("{")
    assert "## Settings" in model_card("me/help", run=run, base="nano", adapter_config={})
    assert f"{run / name} cannot be read and is ignored" in caplog.text


def test_a_folder_is_written_with_ordinary_permissions(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "weights").write_bytes(b"1")
        (folder / "weights").chmod(0o600)
        (folder / "plain").write_bytes(b"1")
    modes = {stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("weights", "plain")}
    assert len(modes) == 1, "a file is as readable as those beside it"


@pytest.mark.parametrize(
    ("overrides", "steps", "expected"),
    [([], 120, 1), ([], 500, 5), ([], 5000, 10), ([], None, 10), (["training_config.logging_steps=20"], 120, 20)],
)
def test_a_curve_has_a_hundred_points_where_there_are_as_many_steps(overrides, steps, expected):
    config = load_config({"data": {"train": "helpdesk"}}, overrides)
    assert logging_steps(config, steps) == expected
