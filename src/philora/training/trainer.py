"""Define `SFTTrainer`: TRL's, with strict targets, slices, the fast layers, atomic checkpoints and exact resuming.

A script for TRL changes its import and nothing else. The defaults are TRL's.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerControl

from philora.adapters.peft_models import apply_slices
from philora.compat.accelerate import zero3_weights
from philora.compat.transformers import EpochStart, StepEnd
from philora.compat.trl import trl
from philora.configuration.spellings import translate_trainer_keywords
from philora.dataset import length_notices
from philora.dataset.ids import check_rows
from philora.dataset.labelled import keep_labelled, refuse_empty
from philora.planning.schedule import FEW_STEPS, check_schedule, few_steps
from philora.runtime.signals import StopOnSignal
from philora.training.arguments import SFTConfig, complete_arguments
from philora.training.checkpoints import Checkpoints
from philora.training.loop import ResumableLoop
from philora.training.microbatches import MicroBatchTrainer
from philora.training.nonfinite import NonFiniteSteps
from philora.training.optimizer import finish_optimizer, require_fast_parameters
from philora.training.sampling import SharedRows, SharedSampler, shares_rows
from philora.training.trained_model import (
    adapted_over_quantised,
    name_experts,
    resolve_targets,
    set_adapter_dtype,
    trained_tensors,
    use_fast_layers,
)

logger = logging.getLogger(__name__)


class SFTTrainer(MicroBatchTrainer):
    """`trl.SFTTrainer` with checked names of LoRA targets, slices of fused projections, and the fast layers.

    It takes TRL's arguments, older keywords (`tokenizer`, `max_seq_length`, `dataset_text_field`, `packing`, ...) with
    a notice for each, and slices of fused projections in `peft_config.target_modules`. Checkpoints are written
    atomically and have a manifest. Training that resumes from one counts, logs and stops as if it had not been
    interrupted. With `SFTConfig(loraplus_lr_ratio=...)` B gets separate groups in the optimizer that transformers
    makes; the logged `learning_rate` is A's. A step that does not fit into memory is computed in smaller parts.

    Raises:
        ConfigError: `loraplus_lr_ratio` is given and no B trains.
        TargetError: A name in `peft_config` matches nothing, or `lm_head` is a target (TRL computes the loss from
            the head's weight, so an adapter there would get no gradient).
        DataError: A table has no rows, or none of its rows has a label within `max_length`.
        RunError: A checkpoint cannot be written; older ones are unchanged.
        NonFiniteError: `SFTConfig.max_nonfinite_steps` steps in a row were not finite.

    Attributes:
        stop: Records a signal, after which training saves and stops at the end of the step.
        nonfinite: Handles steps whose loss or gradient is not finite.
        checkpoints: Writes checkpoints.
        loop: Resumes the training loop exactly.
    """

    stop: StopOnSignal | None = None
    control: TrainerControl
    eval_dataset: Any
    _shared_rows: SharedRows | None = None
    _loraplus_settled = False  # whether an optimizer was split, or a warning was logged that a given one is not
    _evaluated: tuple[int, float] | None = None  # examples and seconds of an evaluation, until they are logged

    def __init__(self, model: str | PreTrainedModel | PeftModel, *args: Any, **kwargs: Any) -> None:
        settings, keywords, notices = translate_trainer_keywords(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        given = inspect.signature(trl.SFTTrainer.__init__).bind_partial(self, model, *args, **keywords).arguments
        del given["self"], given["model"]
        given["args"] = complete_arguments(given.get("args"), model, settings)
        for table in ("train_dataset", "eval_dataset"):
            for name, rows in _by_name(table, given.get(table)).items():
                refuse_empty(f"SFTTrainer: {name}", rows)
        resolution = resolve_targets(model, given.get("peft_config"), given["args"])
        if resolution is not None:
            given["peft_config"] = resolution.for_peft(given["peft_config"])
        model = adapted_over_quantised(model, given)
        before = trained_tensors(model)
        super().__init__(model, **given)
        dtype = getattr(self.args, "adapter_dtype", None)
        set_adapter_dtype(self.model, before, dtype, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.nonfinite, self.checkpoints, self.loop = NonFiniteSteps(self), Checkpoints(self), ResumableLoop(self)
        if not isinstance(self.model, PeftModel):
            trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
            logger.warning("no peft_config is given: all %s parameters train, without LoRA.", f"{trained:,}")
        if self.aux_loss_enabled:
            name_experts(self.model)
        use_fast_layers(self.model, self.args)
        if resolution is not None:
            apply_slices(self.model, resolution.slices)
        self._check_rows()
        if shares_rows(self.args, self.accelerator, self.train_dataset):
            self._shared_rows = SharedRows(self.train_dataset, self.micro_batch_rows, self.args)
            self.train_dataset = self._shared_rows.rows
        require_fast_parameters(self.model, self._loraplus_ratio)

    # -- rows

    def _check_rows(self) -> None:
        """Remove rows without labels, check all ids against the vocabulary, and warn of lengths."""
        tables = _by_name("eval", self.eval_dataset)
        if self.rows_are_prepared:
            self.train_dataset = keep_labelled(self.train_dataset, "SFTTrainer: the train dataset", None)
            tables = {name: keep_labelled(rows, f"SFTTrainer: {name}", None) for name, rows in tables.items()}
            self.eval_dataset = tables if isinstance(self.eval_dataset, dict) else tables["eval"]
        evaluated = {f"eval_dataset ({name})": rows for name, rows in tables.items()}
        check_rows({"train_dataset": self.train_dataset, **evaluated}, self.vocabulary)
        for notice in length_notices(self.model.config, {"train": self.train_dataset, **tables}):
            logger.warning("%s", notice)

    def prepare_rows(
        self, dataset: Any, name: str, max_length: int | None, joined: bool, prepare: Callable[[], Any]
    ) -> Any:
        """Prepare as TRL; remove and count rows without a label, and refuse a table without any other."""
        where = f"SFTTrainer: the {name} dataset"
        refuse_empty(where, dataset)
        given = len(dataset) if hasattr(dataset, "__len__") else None
        if joined:  # neither cut off at max_length nor as many as were given
            return keep_labelled(prepare(), where, None)
        return keep_labelled(prepare(), where, max_length, given)

    def make_train_sampler(self, rows: Any) -> SharedSampler | None:
        """Return a sampler for several processes, which balances the rows of a single process by tokens."""
        return None if self._shared_rows is None else self._shared_rows.sampler(rows, padded=not self.padding_free)

    def get_train_dataloader(self) -> Any:
        """Return transformers' loader; the first epoch of a resumed run also gets the order of its epoch."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        sampler = getattr(shard, "batch_sampler", None)
        if isinstance(sampler, SharedSampler):
            shard.set_epoch = sampler.set_epoch  # transformers calls it there when batches are skipped
        return loader

    # -- optimizer and schedule

    @property
    def _loraplus_ratio(self) -> float | None:
        return getattr(self.args, "loraplus_lr_ratio", None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, with B in separate groups if `loraplus_lr_ratio` is given.

        An optimizer that was given, or that DeepSpeed's configuration has, is not changed.

        Raises:
            ConfigError: The optimizer's groups do not contain every B.
        """
        made_here, ratio = self.optimizer is None, self._loraplus_ratio
        optimizer = cast(torch.optim.Optimizer, super().create_optimizer(model))
        if made_here:
            finish_optimizer(optimizer, self.model, self.model if model is None else model, ratio)
        elif ratio is not None and not self._loraplus_settled:
            text = (
                "loraplus_lr_ratio=%s is not applied to the %s that was given; "
                "philora.lora.loraplus_parameter_groups makes groups for such an optimizer."
            )
            logger.warning(text, ratio, type(optimizer).__name__)
        self._loraplus_settled = True
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return transformers' scheduler; refuse a run that would not train, and warn of one with few steps.

        Raises:
            ConfigError: The learning rate is 0 at every step.
        """
        if self.lr_scheduler is None and not self.is_deepspeed_enabled:
            names = ("learning_rate", "warmup_steps", "lr_scheduler_kwargs", "lr_scheduler_type")
            check_schedule({name: getattr(self.args, name) for name in names}, num_training_steps, "SFTConfig")
            if num_training_steps < FEW_STEPS and self.stop is None:  # `philora.train` warns before it loads weights
                logger.warning(few_steps(num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    # -- the training loop

    def begin_training(self, checkpoint: str | None) -> None:
        """Restore the parts of a checkpoint that transformers does not."""
        super().begin_training(checkpoint)
        self.loop.begin(checkpoint)

    def run_epoch(self, start: EpochStart, run: Callable[[], None]) -> None:
        """Run an epoch from the checkpoint's position."""
        self.loop.run_epoch(start, run)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return transformers' batches of a step, and keep them until it is taken."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        self.nonfinite.begin_step(samples)
        return samples, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute a micro-batch, in as many parts as memory needs, and record its loss."""
        return self.nonfinite.loss_for_log(super().training_step(model, inputs, num_items_in_batch))

    def take_gradient_norm(self, norm: Any) -> Any:
        """Skip a step that is not finite.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        return self.nonfinite.check(norm)

    def end_step(self, end: StepEnd, log_evaluate_save: Callable[[], None]) -> None:
        """Log, evaluate and save; stop after a signal."""
        self.loop.end_step(end, log_evaluate_save)

    def outcome_matters(self) -> bool:
        """Return whether the outcome of this step is needed now: to log, save, evaluate or stop."""
        outcomes = ("log", "save", "evaluate", "training_stop", "epoch_stop")
        return any(getattr(self.control, f"should_{outcome}") for outcome in outcomes)

    def run_evaluation(self, at_start: bool, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Evaluate; an evaluation that a signal interrupts is repeated after resuming."""
        return self.loop.run_evaluation(at_start, run)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Predict as TRL; after a signal, end an evaluation during training."""
        if self.stop is not None and self.is_in_train:
            self.stop.check_together()
        return super().prediction_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as transformers, and keep the time for the log."""
        began = time.monotonic()
        output = super().evaluation_loop(*args, **kwargs)
        self._evaluated = int(output.num_samples), time.monotonic() - began
        return output

    def end_training(self, trial: Any, finish: Callable[[float], Any], start_time: float) -> Any:
        """End as transformers, with the time of the complete training."""
        return self.loop.end_training(trial, finish)

    def can_load_best_model(self) -> bool:
        """Return whether the best checkpoint is complete."""
        return self.loop.can_load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL, with the number of skipped steps if there are any.

        Durations are measured by the monotonic clock instead of transformers' wall clock.
        """
        if "loss" in logs and self.nonfinite.watch.total:
            logs["nonfinite_steps"] = self.nonfinite.watch.total
        if self._evaluated is not None:
            (examples, seconds), self._evaluated = self._evaluated, None
            batches = math.ceil(examples / (self.args.eval_batch_size * self.args.world_size))
            for name in [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]:
                logs[f"{name}_runtime"] = round(seconds, 4)
                logs[f"{name}_samples_per_second"] = round(examples / max(seconds, 1e-9), 3)
                logs[f"{name}_steps_per_second"] = round(batches / max(seconds, 1e-9), 3)
        if start_time is not None:
            start_time = time.time() - self.loop.seconds
        super().log(logs, start_time)

    @property
    def trained_tokens(self) -> int:
        """Return the number of tokens of the training, including earlier processes."""
        return int(self.counted_tokens)

    # -- weights on disk

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint atomically."""
        self.checkpoints.write(model, trial)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write TRL's card only if it is pushed: a folder of checkpoints is not a model, and its card names "None"."""
        if self.args.push_to_hub:
            super().create_model_card(*arguments, **options)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Gather sharded weights for saving; every process has to call this.

        Under ZeRO-3 the trained weights are gathered, whatever `stage3_gather_16bit_weights_on_model_save` is, which is
        about the complete model. The frozen base is not gathered.

        Returns:
            Tensors by name, in the first process; with ZeRO-3 None in the others.
        """
        if self.is_deepspeed_enabled and isinstance(self.model, PeftModel):
            stage = self.accelerator.deepspeed_config.get("zero_optimization", {}).get("stage")
            if stage == 3:
                return zero3_weights(self.model_wrapped)
        return cast("dict[str, torch.Tensor]", self.accelerator.get_state_dict(self.model_wrapped))


def _by_name(name: str, tables: Any) -> dict[str, Any]:
    return tables if isinstance(tables, dict) else {name: tables}


__all__ = ["SFTConfig", "SFTTrainer"]
