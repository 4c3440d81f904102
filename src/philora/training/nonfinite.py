"""Skip and count steps whose loss or gradient is not finite; too many in a row end the training."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from philora.compat.accelerate import report_skipped
from philora.compat.torch import can_skip_on_device
from philora.errors import RunError, fault
from philora.files.checkpoint import write_json
from philora.kernels.switches import stack_switch
from philora.training.callbacks import StepWatch

logger = logging.getLogger(__name__)

NONFINITE_NAME = "nonfinite_examples.json"


class NonFiniteError(RunError):
    """The loss or the gradient was not finite for too many steps in a row; none of them changed a weight."""


class UnreadStep:
    """A step whose loss and gradient norm the host has not read yet.

    Attributes:
        optimizer: The optimizer that skips the step by itself; None if the step has not been taken yet.
        schedule: State of the learning-rate schedule before the step.
        rates: Learning rates of the optimizer's groups before the step.
    """

    def __init__(
        self, step: int, figures: torch.Tensor, batches: list[Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.step, self.batches, self.optimizer = step, batches, optimizer
        self.schedule: dict[str, Any] = {}
        self.rates: list[Any] = []
        self._copy, self._done = figures, None
        if figures.is_cuda:
            self._copy = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._copy.copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def figures(self) -> list[float]:
        """Wait for the loss, the gradient norm and the loss of every micro-batch, and return them."""
        if self._done is not None:
            self._done.synchronize()
        return list(map(float, self._copy.tolist()))


class NonFiniteSteps:
    """Check the losses and gradient norms of a trainer's steps.

    A step that is not finite is skipped: its gradients are dropped, so that the optimizer does nothing, and it is
    reported as skipped, so that the learning-rate schedule does not advance. The next step takes the next data. With
    fp16 torch's gradient scaler does the same, and lowers its scale. On a GPU, with `PHILORA_STACK=all`, a fused
    optimizer skips the step by itself, by a number on the device. The host then reads a step's figures after the next
    step has been computed, and restores the schedule.

    Attributes:
        watch: Counts of the steps that were not finite, and of losses that jumped.
        unread: The step whose figures have not been read yet, if any.
        filters_losses: Whether losses that are not finite are left out of the log.
        locate: Returns the origins of a batch's examples by their token ids.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer: Any = weakref.proxy(trainer)  # a cycle would keep the model in memory
        self.watch = StepWatch()
        self.unread: UnreadStep | None = None
        self.filters_losses = False
        self.locate: Callable[[Sequence[Sequence[int]]], Sequence[Mapping[str, Any]]] | None = None
        self._batches: list[Any] = []
        self._losses: list[torch.Tensor] = []

    def begin_step(self, batches: list[Any]) -> None:
        """Keep the batches of a step until it has been taken."""
        self._batches, self._losses = batches, []

    def loss_for_log(self, loss: torch.Tensor) -> torch.Tensor:
        """Keep the loss of a micro-batch, and return the loss to log.

        With `filters_losses` a loss that is not finite counts as the mean of those before it, as in transformers; but
        no loss is read from the device for that.

        Shapes:
            (); returns ().
        """
        self._losses.append(loss)
        if not self.filters_losses:
            return loss
        trainer = self._trainer
        mean = trainer.loss_since_log / (1 + trainer.state.global_step - trainer.last_logged_step)
        return torch.where(loss.isfinite(), loss, mean.to(loss.device))

    def check(self, norm: Any) -> Any:
        """Check the gradient norm and the losses of a step before the optimizer takes it; return the norm.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        trainer = self._trainer
        if self._limit() is None or trainer.is_deepspeed_enabled or not self._losses:
            return norm
        self.settle()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # each process holds a part of the sum
        losses = torch.stack(self._losses).float()
        loss = losses.sum()
        if trainer.accelerator.num_processes > 1:
            loss = trainer.accelerator.reduce(loss, "sum")
        figures = torch.cat([torch.stack([loss, torch.as_tensor(norm).to(loss)]), losses])
        self.unread = UnreadStep(trainer.state.global_step + 1, figures, self._batches, self._late_optimizer())
        if self.unread.optimizer is None:
            self.settle()
        else:
            self.unread.schedule = trainer.lr_scheduler.state_dict()
            self.unread.rates = [group["lr"] for group in self.unread.optimizer.param_groups]
            self.unread.optimizer.found_inf = (~figures[:2].isfinite().all()).float()  # type: ignore[attr-defined]
        return norm

    def settle(self) -> None:
        """Read the figures of the last step, if they have not been read, and act on them.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        unread, self.unread = self.unread, None
        if unread is None:
            return
        trainer = self._trainer
        loss, norm, *losses = unread.figures()
        scaled = trainer.accelerator.scaler is not None
        if self.watch.finite(loss, 0.0 if scaled else norm):
            median = self.watch.spike(loss)
            if median is not None and trainer.args.should_save:
                text = "step %d: the loss jumps to %.4g, where the median of the last steps is %.4g."
                logger.warning(text, unread.step, loss, median)
            if not scaled:
                report_skipped(trainer.optimizer, False)
            return
        if unread.optimizer is not None:
            self._restore_schedule(unread)
        else:
            trainer.optimizer.zero_grad(set_to_none=True)
            if not scaled:
                report_skipped(trainer.optimizer, True)
        logger.warning(
            "step %d is skipped: loss %g, gradient norm %g; %d in a row, %d in all.",
            unread.step, loss, norm, self.watch.in_a_row, self.watch.total,
        )  # fmt: skip
        limit = self._limit() or 1
        if self.watch.in_a_row >= limit:
            file = self._write_examples(unread, (loss, norm), losses)
            saved = trainer.checkpoints.newest_step
            last = "none was written" if saved is None else f"the last one is checkpoint-{saved}"
            expected = f"a finite loss and gradient at least once in {limit} steps"
            todo = f"The examples of step {unread.step} are in {file}. Checkpoints are unchanged, {last}"
            where, found = f"step {unread.step}", f"loss {loss:g}, gradient norm {norm:g}"
            raise NonFiniteError(fault(where, "training_config.max_nonfinite_steps", found, expected, todo))

    def _limit(self) -> int | None:
        return getattr(self._trainer.args, "max_nonfinite_steps", None)

    def _late_optimizer(self) -> torch.optim.Optimizer | None:
        """Return the optimizer if a step is taken before its figures are read."""
        trainer = self._trainer
        optimizer = cast(torch.optim.Optimizer, getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        fused = bool(optimizer.defaults.get("fused")) and can_skip_on_device(optimizer)
        scaled = trainer.accelerator.scaler is not None
        return optimizer if reads_late(trainer.args.device.type, fused, scaled, stack_switch()) else None

    def _restore_schedule(self, unread: UnreadStep) -> None:
        """Restore the learning-rate schedule from before a skipped step."""
        assert unread.optimizer is not None
        self._trainer.lr_scheduler.load_state_dict(unread.schedule)
        for group, rate in zip(unread.optimizer.param_groups, unread.rates, strict=True):
            group["lr"] = rate

    def _write_examples(self, unread: UnreadStep, figures: tuple[float, float], losses: list[float]) -> Path:
        """Write the examples of a step: their tokens, and their origins as far as these are known."""
        batches = []
        for batch, loss in zip(unread.batches, losses, strict=False):
            examples = documents_of(batch)
            places = [{} for _ in examples] if self.locate is None else self.locate(examples)
            rows = rows_of(self._trainer.train_dataset, examples)
            found = zip(examples, rows, places, strict=True)
            listed = [{"row": row, **place, "input_ids": ids} for ids, row, place in found]
            batches.append({"loss": str(loss), "examples": listed})
        arguments = self._trainer.args
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_{arguments.process_index}" if arguments.world_size > 1 else ""
        file = folder / f"{Path(NONFINITE_NAME).stem}{rank}.json"
        total, norm = map(str, figures)
        write_json(file, {"step": unread.step, "loss": total, "gradient_norm": norm, "micro_batches": batches})
        return file


def rows_of(data: Any, examples: Sequence[Sequence[int]]) -> list[int | None]:
    """Return the row of the training set for each example; a packed row has several."""
    wanted: dict[tuple[int, ...], int | None] = {tuple(example): None for example in examples}
    if not hasattr(data, "__len__") or "input_ids" not in (getattr(data, "column_names", None) or ()):
        return [None for _ in examples]
    for number, row in enumerate(data):
        start, lengths = 0, row.get("seq_lengths") or [len(row["input_ids"])]
        for length in lengths:
            part = tuple(row["input_ids"][start : start + length])
            start += length
            if part in wanted and wanted[part] is None:
                wanted[part] = number
    return [wanted[tuple(example)] for example in examples]


def reads_late(kind: str, fused: bool, scaled: bool, switch: str) -> bool:
    """Return whether a step is taken before its loss and gradient norm are read; this has not run on a GPU yet.

    A fused optimizer can skip a step by a number on the device, unless fp16's gradient scaler decides (`scaled`). The
    value "all" of the switch `PHILORA_STACK` also takes paths that have not run on a GPU yet.
    """
    return kind == "cuda" and fused and not scaled and switch == "all"


def documents_of(batch: Mapping[str, Any]) -> list[list[int]]:
    """Return the token ids of every example of a batch: packed rows are divided, padding is removed."""
    documents: list[list[int]] = []
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for index, row in enumerate(batch["input_ids"]):
        if positions is not None:
            starts = (positions[index] == 0).nonzero().flatten().tolist()
            documents += [row[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
        else:
            documents.append((row if mask is None else row[mask[index].bool()]).tolist())
    return documents
