"""Give private methods and counters of transformers' Trainer public names; no other file uses them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers

from philora.compat.private_names import PrivateName, require

_NO_HOOK = "callbacks cannot wrap this part of the loop or prevent it"
_NO_COUNTER = "the loop sets it to zero at its start, and TrainerState has no field for it"

PRIVATE = (
    PrivateName("transformers.Trainer._init_training_state", "restores counters from a checkpoint", _NO_HOOK),
    PrivateName("transformers.Trainer._run_epoch", "resumes inside an epoch", _NO_HOOK),
    PrivateName("transformers.Trainer._maybe_log_save_evaluate", "stops and saves after a signal", _NO_HOOK),
    PrivateName("transformers.Trainer._evaluate", "repeats an evaluation that a signal ended", _NO_HOOK),
    PrivateName("transformers.Trainer._finalize_training", "reports the time of the complete training", _NO_HOOK),
    PrivateName("transformers.Trainer._load_best_model", "skips a damaged checkpoint", _NO_HOOK),
    PrivateName("transformers.Trainer._save_checkpoint", "writes checkpoints atomically", "on_save comes afterwards"),
    PrivateName("transformers.Trainer._get_output_dir", "writes checkpoints into a staging folder", _NO_HOOK),
    PrivateName("transformers.Trainer._get_grad_norm", "skips steps that are not finite", "callbacks get no norm"),
    PrivateName("transformers.Trainer._get_train_sampler", "balances processes by tokens", "no argument takes one"),
    PrivateName("transformers.Trainer._get_dataloader", "batches carry their layout", "TRL makes its collator late"),
    PrivateName("transformers.Trainer._load_rng_state", "resumes with the random states", "train() alone calls it"),
    PrivateName("transformers.Trainer._tr_loss", "resumes the logged loss", _NO_COUNTER),
    PrivateName("transformers.Trainer._total_loss_scalar", "resumes the mean loss", _NO_COUNTER),
    PrivateName("transformers.Trainer._globalstep_last_logged", "resumes the logged loss", _NO_COUNTER),
    PrivateName("transformers.Trainer._initial_global_step", "reports the complete training", _NO_COUNTER),
    PrivateName("transformers.Trainer._train_batch_size", "rows of a micro-batch over all devices", _NO_COUNTER),
    PrivateName(
        "transformers.trainer_pt_utils.BatchRebalanceSampler._yield_global_batch",
        "deals a step's rows to processes",
        "__iter__ repeats rows in the last step",
    ),
    PrivateName(
        "transformers.trainer_pt_utils.BatchRebalanceSampler._assign",
        "deals packed rows by tokens",
        "no argument for it",
    ),
    PrivateName(
        "transformers.models.phi3.modeling_phi3.Phi3Model",
        "models, their attention, feed-forward, norms and rotary embeddings get fast classes by `__class__`, in "
        "kernels and decoder_stack; `forward` gets the loss at labels, in kernels/loss.py",
        "the kernels hub takes layers from the Hub only",
    ),
    PrivateName(
        "transformers.utils.output_capturing._CAN_RECORD_REGISTRY",
        "output_hidden_states with the decoder stack: transformers looks up by class what a model records",
        "none",
    ),
    PrivateName("transformers.TrainingArguments._n_gpu", "one GPU a process", "n_gpu is read-only"),
    PrivateName(
        "transformers.PreTrainedConfig._attn_implementation",
        "which attention runs",
        "set_attn_implementation sets it; nothing public returns it",
    ),
    PrivateName(
        "transformers.PreTrainedModel._keep_in_fp32_modules", "which weights stay fp32", "no public list of them"
    ),
    PrivateName(
        "transformers.PreTrainedModel._can_record_outputs",
        "outputs of the fast model are recorded",
        "no public registration",
    ),
)


def use_one_gpu(arguments: Any) -> None:
    """Let a trainer use one GPU if several are visible to this process."""
    arguments._n_gpu = 1


class EpochStart(NamedTuple):
    """The start of an epoch of the training loop.

    Attributes:
        model: The model as the loop trains it, wrapped.
        trial: Of a hyperparameter search, or None.
        checkpoint: The folder that the training resumes from, in its first epoch; otherwise None.
        inside: Whether some of the epoch's steps are done already.
    """

    model: Any
    trial: Any
    checkpoint: str | None
    inside: bool


class StepEnd(NamedTuple):
    """The end of a step, or of an epoch after its last step.

    Attributes:
        gradient_norm: The gradient norm of the step, if it has one.
        learning_rate: The learning rate of the step.
        model: The model as the loop trains it, wrapped.
        trial: Of a hyperparameter search, or None.
    """

    gradient_norm: Any
    learning_rate: float | None
    model: Any
    trial: Any


class TrainerHooks(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with public hooks around its private methods, and public names for its counters.

    A hook gets the wrapped part as a function and decides when to call it; by default at once.

    Attributes:
        staging_folder: While it is set, checkpoints are written to it instead of the output folder.
    """

    data_collator: Any
    staging_folder: Path | None = None

    # -- hooks

    def begin_training(self, checkpoint: str | None) -> None:
        """Run after the loop's state was created, or read from `checkpoint`."""

    def run_epoch(self, start: EpochStart, run: Callable[[], None]) -> None:
        """Run an epoch."""
        run()

    def end_step(self, end: StepEnd, log_evaluate_save: Callable[[], None]) -> None:
        """Run after every step, and once more at the end of an epoch."""
        log_evaluate_save()

    def run_evaluation(self, at_start: bool, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run an evaluation of the training loop; `at_start`: the one before the first step."""
        return run()

    def end_training(self, trial: Any, finish: Callable[[float], Any], start_time: float) -> Any:
        """Run at the end; `finish` takes the start time of the training."""
        return finish(start_time)

    def can_load_best_model(self) -> bool:
        """Return whether the best checkpoint is loaded at the end."""
        return True

    def take_gradient_norm(self, norm: Any) -> Any:
        """Run before every step of the optimizer, and return the gradient norm."""
        return norm

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, by `write_checkpoint`."""
        self.write_checkpoint(model, trial)

    def make_train_sampler(self, rows: Any) -> Any:
        """Return a sampler for the training rows, or None for transformers' own."""
        return None

    def wrap_collator(self, rows: Any, collate: Any) -> Any:
        """Return the collator for rows."""
        return collate

    # -- functions for hooks

    def output_folder(self, trial: Any) -> Path:
        """Return the final folder of checkpoints."""
        return Path(super()._get_output_dir(trial))

    def write_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint as transformers does, into `staging_folder` if it is set."""
        super()._save_checkpoint(model, trial)

    def make_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint now, as the training loop does."""
        self._save_checkpoint(model, trial)

    def load_random_state(self, checkpoint: str | None) -> None:
        """Set the random states that a checkpoint holds."""
        self._load_rng_state(checkpoint)

    def log_evaluate_save(self, end: StepEnd, epoch: Any, start_time: float) -> None:
        """Log, evaluate and save after a step, as `control` states."""
        self._maybe_log_save_evaluate(
            self._tr_loss, end.gradient_norm, end.model, end.trial, epoch, None, start_time, end.learning_rate
        )

    @property
    def loss_since_log(self) -> torch.Tensor:
        """Return the sum of the losses since the last log entry. Shapes: returns ()."""
        return cast(torch.Tensor, self._tr_loss)

    @property
    def last_logged_step(self) -> int:
        """Return the step of the last log entry."""
        return int(self._globalstep_last_logged)

    @property
    def logged_loss(self) -> float:
        """Return the sum of the losses that have been logged."""
        return float(self._total_loss_scalar)

    @property
    def micro_batch_rows(self) -> int:
        """Return the rows of a micro-batch over all devices of this process."""
        return int(self._train_batch_size)

    def restore_counters(self, loss_since_log: float, logged_loss: float, last_logged_step: int) -> None:
        """Restore the counters that the loop has set to zero, so that they cover the complete training."""
        self._tr_loss.fill_(loss_since_log)
        self._total_loss_scalar, self._globalstep_last_logged = logged_loss, last_logged_step
        self._initial_global_step = 0

    # -- the private methods

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        position = cast("tuple[int, int]", super()._init_training_state(*args, **kwargs))
        self.begin_training(given.get("resume_from_checkpoint"))
        return position

    def _run_epoch(self, **given: Any) -> None:
        first = given["epoch"] == given["epochs_trained"]
        start = EpochStart(
            given["model"],
            given["trial"],
            given["resume_from_checkpoint"] if first else None,
            first and bool(given["steps_trained_in_current_epoch"]),
        )
        self.run_epoch(start, functools.partial(super()._run_epoch, **given))

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, ignored: Any, start_time: Any,
        learning_rate: Any = None,
    ) -> None:  # fmt: skip
        rest = (tr_loss, grad_norm, model, trial, epoch, ignored, start_time, learning_rate)
        end = StepEnd(grad_norm, learning_rate, model, trial)
        self.end_step(end, functools.partial(super()._maybe_log_save_evaluate, *rest))

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        run = functools.partial(super()._evaluate, trial, ignore_keys_for_eval, skip_scheduler)
        return self.run_evaluation(skip_scheduler, run)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        finish = functools.partial(super()._finalize_training, trial, num_train_samples)
        return self.end_training(trial, finish, start_time)

    def _load_best_model(self) -> None:
        if self.can_load_best_model():
            super()._load_best_model()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.take_gradient_norm(super()._get_grad_norm(model, grad_norm))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging_folder or self.output_folder(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = None if rows is None else self.make_train_sampler(rows)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        collate = self.data_collator
        self.data_collator = self.wrap_collator(dataset, collate)
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collate


require(entry for entry in PRIVATE if "Trainer." in entry.name)
