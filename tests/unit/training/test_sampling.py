"""Rows dealt to several processes: the steps of one process, balanced by tokens."""

from __future__ import annotations

import random

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset

from philora.training.sampling import SharedSampler, can_share, with_empty_rows

SEED = 7


def table(lengths):
    generator = random.Random(0)
    ids = [[generator.randrange(3, 97) for _ in range(each)] for each in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "seq_lengths": [[len(each) - 1, 1] for each in ids]})


def dealt(lengths, processes, *, rows=2, accumulation=2, epoch=0, padded=False):
    """Each process's micro-batches, and the table that they index."""
    full, found = with_empty_rows(table(lengths), rows, accumulation * processes)
    assert found == lengths
    batches = []
    for rank in range(processes):
        sampler = SharedSampler(
            found, len(full) - len(found), rows=rows, accumulation=accumulation, processes=processes, rank=rank,
            seed=SEED, shuffle=True, padded=padded,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler)
    return full, batches


def uneven(count, seed=1):
    generator = random.Random(seed)
    return [generator.randrange(2, 200) for _ in range(count)]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [1, 5, 24, 25, 31, 47])
@pytest.mark.parametrize(("epoch", "padded"), [(0, False), (0, True), (2, False)])
def test_each_step_has_the_rows_of_one_process(processes, count, epoch, padded):
    rows, accumulation = 2, 2
    _, batches = dealt(uneven(count), processes, epoch=epoch, padded=padded)
    one = SeedableRandomSampler(range(count), generator=torch.Generator(), data_seed=SEED)
    one.set_epoch(epoch)
    order, step = list(one), rows * accumulation * processes
    assert len({len(each) for each in batches}) == 1, "no process waits for another's last batch"
    for number in range(0, len(batches[0]), accumulation):
        mine = [row for each in batches for batch in each[number : number + accumulation] for row in batch]
        theirs = order[number // accumulation * step :][:step]
        assert sorted(each for each in mine if each < count) == sorted(theirs)
        assert all(each for share in batches for each in share[number : number + accumulation])


def test_missing_rows_are_empty_and_only_as_many_as_needed():
    lengths = uneven(25)
    full, _ = dealt(lengths, 2)
    assert len(full) == 28, "the last step has one row for four micro-batches"
    for row in full.select(range(25, 28)):
        assert (row["labels"], len(row["input_ids"]), row["seq_lengths"]) == ([-100], 1, [1])
    assert full.select(range(25)).to_dict() == table(lengths).to_dict()
    assert full.features == table(lengths).features
    same, _ = dealt(uneven(24), 2)
    assert len(same) == 24


def waiting(lengths, batches):
    """The share of token times that processes wait for the slowest of the same round."""
    tokens = [[sum(lengths[row] for row in batch) for batch in each] for each in batches]
    spent = sum(max(each) for each in zip(*tokens, strict=True)) * len(batches)
    return 1 - sum(map(sum, tokens)) / spent


def test_what_runs_at_the_same_time_is_about_as_long():
    lengths = uneven(400)
    _, batches = dealt(lengths, 2)
    order = list(SeedableRandomSampler(range(400), generator=torch.Generator(), data_seed=SEED))
    pairs = [order[start : start + 2] for start in range(0, 400, 2)]
    in_turn = [pairs[0::2], pairs[1::2]]
    assert waiting(lengths, batches) < 0.05
    assert waiting(lengths, in_turn) > 0.15, "negative control: as accelerate deals them"


def test_what_is_no_table_of_labelled_tokens_is_left_to_accelerate():
    assert can_share(table([3, 4]))
    assert not can_share(table([3, 4]).remove_columns("labels"))
    assert not can_share(table([3, 4]).to_iterable_dataset())
    assert not can_share([{"input_ids": [1], "labels": [1]}])
