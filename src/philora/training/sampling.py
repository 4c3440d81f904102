"""Which rows a process trains on: one process's batches, shared out so that no process waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from transformers.trainer_pt_utils import BatchRebalanceSampler

from philora.dataset import row_lengths


class SharedSampler(BatchRebalanceSampler):  # type: ignore[misc]
    """transformers' sampler that balances micro-batches, over the rows that one process would take.

    Each step has the rows that a single process with the same seed and the same rows in a step would train on. They
    are dealt to processes and micro-batches so that what runs at the same time costs about the same. Where the last
    step of an epoch has fewer rows than there are micro-batches, transformers repeats rows; here the missing ones are
    empty (`with_empty_rows`), so that the step's loss is that of its own rows.

    Args:
        lengths: Tokens of each row, without the empty ones.
        empty: Empty rows that stand behind them.
        rows: Rows of a micro-batch.
        accumulation: Micro-batches of a step in each process.
        processes: Processes that share a step.
        rank: This process's number.
        seed: Of the order; as accelerate draws it for one process.
        shuffle: Whether the order is drawn at all.
        padded: Whether the rows of a micro-batch are padded to the longest, whose cost transformers' sampler knows;
            else they stand one behind the other, and tokens are what counts.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        empty: int,
        *,
        rows: int,
        accumulation: int,
        processes: int,
        rank: int,
        seed: int,
        shuffle: bool,
        padded: bool = False,
    ) -> None:
        step = rows * accumulation * processes
        super().__init__(
            [*lengths, *[1] * empty], step, processes, accumulation, shuffle, seed=seed, rank=rank, drop_last=False
        )
        self._real = len(lengths)
        self._padded = padded

    def __iter__(self) -> Iterator[list[int]]:
        """The rows of this process's micro-batches."""
        order = list(range(self._real))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self._real, generator=generator).tolist()
        order += range(self._real, len(self.lengths))
        for start in range(0, len(order), self.effective_batch_size):
            yield from self._yield_global_batch(order[start : start + self.effective_batch_size])

    def _assign(self, indices: list[int], lengths: list[int]) -> list[list[list[int]]]:
        """Rows by process and micro-batch: the longest row left goes to the micro-batch with the fewest tokens."""
        if self._padded:
            return cast("list[list[list[int]]]", super()._assign(indices, lengths))
        groups: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(self.dp_size * self.grad_accum)]
        for length, row in sorted(zip(lengths, indices, strict=True), key=lambda pair: -pair[0]):
            tokens, number, rows = heapq.heappop(groups)
            heapq.heappush(groups, (tokens + length, number, [*rows, row]))
        # Micro-batches of the same round are neighbours in size; which process has the larger one alternates.
        ordered = [rows for _, _, rows in sorted(groups, key=lambda group: (-group[0], group[1]))]
        rounds = [ordered[start : start + self.dp_size] for start in range(0, len(ordered), self.dp_size)]
        return [
            [each[-1 - rank if turn % 2 else rank] for turn, each in enumerate(rounds)] for rank in range(self.dp_size)
        ]


def with_empty_rows(rows: Dataset, micro_batch_rows: int, groups: int) -> tuple[Dataset, list[int]]:
    """Rows for a `SharedSampler`: as they are, or with empty ones behind them for the last step.

    Args:
        rows: Tokenised rows with `input_ids` and `labels`, packed or not.
        micro_batch_rows: Rows of a micro-batch.
        groups: Micro-batches of a step, of all processes together.

    Returns:
        The dataset, and the tokens of each row that was there.
    """
    lengths = row_lengths(rows).tolist()
    last = len(rows) % (micro_batch_rows * groups)
    missing = groups - last if 0 < last < groups else 0
    if missing == 0:
        return rows, lengths
    first = rows[0]
    empty: dict[str, Any] = {
        name: [1] if name == "seq_lengths" else value[:1] if isinstance(value, list) else value
        for name, value in first.items()
    }
    empty["labels"] = [-100]
    blanks = Dataset.from_dict({name: [value] * missing for name, value in empty.items()}, features=rows.features)
    return concatenate_datasets([rows.with_format(None), blanks]), lengths


def can_share(rows: Any) -> bool:
    """Whether these are rows that `with_empty_rows` takes: a table of tokens and their labels."""
    return isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)
