"""Token ids and labels that the model has no row for: one error with the row, before training, and never a crash."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer

import philora
from philora.dataset.ids import check_batch, check_rows, vocabulary_of
from philora.errors import DataError
from philora.kernels.loss import label_scores
from philora.lora.functional import fused
from philora.models.loading import local_path
from tests.conftest import make_phi3

VOCABULARY = 97
WRONG = [-1, -99, -101, VOCABULARY, 2**31 - 1, -(2**31), 2**62]


def rows(column, value, row=3, place=2):
    columns = {
        "input_ids": [[5 + i, 6, 7, 8] for i in range(6)],
        "labels": [[-100, 6, 7, 8] for _ in range(6)],
    }
    columns[column][row][place] = value
    return columns


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("column", ["labels", "input_ids"])
def test_the_row_the_place_the_value_and_the_vocabulary_are_named(column, value):
    data = Dataset.from_dict(rows(column, value))
    said = rf"train, row 3: {column}\[2\]={value} - expected .*from 0 to 96: the model's vocabulary has 97"
    with pytest.raises(DataError, match=said):
        check_rows({"train": data}, VOCABULARY)
    shuffled = data.select([5, 3, 1])
    with pytest.raises(DataError, match="row 1"):
        check_rows({"train": shuffled}, VOCABULARY)
    check_rows({"train": data.select([0, 1, 2]), "none": None}, VOCABULARY)
    check_rows({"train": data}, None)
    batch = {name: torch.tensor(each) for name, each in rows(column, value).items()}
    with pytest.raises(DataError, match=rf"batch, row 3: {column}\[2\]={value} "):
        check_batch(batch, VOCABULARY)


def test_rows_of_different_lengths_and_no_lists():
    data = Dataset.from_dict({"input_ids": [[1] * (i % 3) for i in range(2500)] + [[1, 1, 99]], "labels": ["x"] * 2501})
    with pytest.raises(DataError, match=r"row 2,500: input_ids\[2\]=99 "):
        check_rows({"train": data}, VOCABULARY)
    check_rows({"train": Dataset.from_dict({"text": ["a"]}), "other": [1, 2]}, VOCABULARY)
    good = Dataset.from_dict({"input_ids": [[0, 96]], "labels": [[-100, 96]]})
    check_rows({"train": good}, VOCABULARY)


def trainer(tmp_path, train, evaluation=None, **settings):
    arguments = philora.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    from peft import LoraConfig

    return philora.SFTTrainer(
        make_phi3(),
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )


@pytest.mark.parametrize(("column", "value"), [("labels", -1), ("labels", VOCABULARY), ("input_ids", 2**31 - 1)])
def test_the_trainer_refuses_before_training(tmp_path, column, value):
    bad, good = Dataset.from_dict(rows(column, value)), Dataset.from_dict(rows("labels", 7))
    with pytest.raises(DataError, match=rf"train_dataset, row 3: {column}\[2\]={value} "):
        trainer(tmp_path, bad)
    with pytest.raises(DataError, match=r"eval_dataset \(eval\), row 3: "):
        trainer(tmp_path, good, bad)
    assert not list(tmp_path.iterdir())


class Rows(TorchDataset):
    """A dataset that cannot be looked at but row by row."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, row):
        return {name: each[row] for name, each in self.columns.items()}


def test_a_batch_of_rows_that_could_not_be_looked_at(tmp_path):
    made = trainer(tmp_path, Dataset.from_dict(rows("labels", 7)), train_sampling_strategy="sequential")
    made.train_dataset = Rows(rows("labels", -1, row=1))
    with pytest.raises(DataError, match=r"step 1, batch, row 1: labels\[2\]=-1 "):
        made.train()


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_loss_by_itself(value, enabled, compiled_or_not):
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(VOCABULARY, 8)
    labels = torch.tensor([1, 2, value, 3, 4])
    with fused(enabled), pytest.raises(DataError, match=rf"labels\[2\]={value} - .* the vocabulary has 97"):
        label_scores(hidden, weight, None, labels)


def test_the_vocabulary_of_a_model():
    model = make_phi3()
    assert vocabulary_of(model) == VOCABULARY
    with torch.device("meta"):
        assert vocabulary_of(type(model)(model.config)) == VOCABULARY
    assert vocabulary_of(torch.nn.Linear(2, 2)) is None
