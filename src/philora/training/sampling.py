"""Choose the rows of each process: the batches of a single process, divided so that processes wait little."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from transformers.trainer_pt_utils import BatchRebalanceSampler

from philora.dataset import row_lengths


class SharedSampler(BatchRebalanceSampler):  # type: ignore[misc]
    """transformers' sampler that balances micro-batches, over the rows that a single process would take.

    Each step has the rows that a single process with the same seed and the same rows per step would train on. They are
    divided between processes and micro-batches so that those computed at the same time cost about the same. If the last
    step of an epoch has fewer rows than there are micro-batches, transformers repeats rows. Here empty rows fill up
    (`with_empty_rows`), so that the step's loss is that of its own rows.

    Args:
        lengths: Tokens of every row, without the empty ones.
        empty: Number of empty rows after them.
        rows: Rows of a micro-batch.
        accumulation: Micro-batches of a step in each process.
        processes: Processes that share a step.
        rank: This process's number.
        seed: Seed of the order, which is drawn as accelerate does for one process.
        shuffle: Whether the order is random.
        padded: Whether the rows of a micro-batch are padded to the longest, which transformers' sampler balances;
            otherwise they are concatenated, and tokens are balanced.
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
        """Return the rows of this process's micro-batches."""
        order = list(range(self._real))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self._real, generator=generator).tolist()
        order += range(self._real, len(self.lengths))
        for start in range(0, len(order), self.effective_batch_size):
            yield from self._yield_global_batch(order[start : start + self.effective_batch_size])

    def _assign(self, indices: list[int], lengths: list[int]) -> list[list[list[int]]]:
        """Assign rows to processes and micro-batches: the longest goes to the micro-batch with the fewest tokens."""
        if self._padded:
            return cast("list[list[list[int]]]", super()._assign(indices, lengths))
        groups: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(self.dp_size * self.grad_accum)]
        for length, row in sorted(zip(lengths, indices, strict=True), key=lambda pair: -pair[0]):
            tokens, number, rows = heapq.heappop(groups)
            heapq.heappush(groups, (tokens + length, number, [*rows, row]))
        # Micro-batches of a round are neighbours in size; the process with the larger one alternates.
        ordered = [rows for _, _, rows in sorted(groups, key=lambda group: (-group[0], group[1]))]
        rounds = [ordered[start : start + self.dp_size] for start in range(0, len(ordered), self.dp_size)]
        return [
            [entry[-1 - rank if turn % 2 else rank] for turn, entry in enumerate(rounds)]
            for rank in range(self.dp_size)
        ]


def with_empty_rows(rows: Dataset, micro_batch_rows: int, groups: int) -> tuple[Dataset, list[int]]:
    """Return rows for a `SharedSampler`, with empty ones appended if the last step needs them.

    Args:
        rows: Tokenised rows with `input_ids` and `labels`, packed or not.
        micro_batch_rows: Rows of a micro-batch.
        groups: Micro-batches of a step, of all processes together.

    Returns:
        The dataset, and the tokens of every original row.
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


class SharedRows:
    """The training rows of a trainer, divided between its processes with about equally many tokens.

    Attributes:
        rows: The rows, with empty ones appended if the last step has too few.
    """

    def __init__(self, rows: Dataset, micro_batch_rows: int, arguments: Any) -> None:
        groups = arguments.gradient_accumulation_steps * arguments.world_size
        self.rows, self._lengths = with_empty_rows(rows, micro_batch_rows, groups)
        self._micro_batch_rows, self._arguments = micro_batch_rows, arguments

    def sampler(self, rows: Dataset, padded: bool) -> SharedSampler:
        """Return the sampler of this process; `padded`: whether a micro-batch is padded to its longest row."""
        arguments = self._arguments
        return SharedSampler(
            self._lengths,
            len(rows) - len(self._lengths),
            rows=self._micro_batch_rows,
            accumulation=arguments.gradient_accumulation_steps,
            processes=arguments.world_size,
            rank=arguments.process_index,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            shuffle=arguments.train_sampling_strategy == "random",
            padded=padded,
        )


def shares_rows(arguments: Any, accelerator: Any, rows: Any) -> bool:
    """Return whether philora divides the rows between processes; otherwise accelerate does, in their order."""
    return (
        arguments.world_size > 1
        and arguments.train_sampling_strategy in ("random", "sequential")
        and not arguments.dataloader_drop_last
        and not arguments.auto_find_batch_size
        and getattr(accelerator, "parallelism_config", None) is None
        and not accelerator.split_batches
        and not accelerator.dispatch_batches
        and can_share(rows)
    )


def can_share(rows: Any) -> bool:
    """Return whether `with_empty_rows` can take these rows: a table of tokens and their labels."""
    return isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)
