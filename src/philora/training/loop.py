"""Resume exactly: restore what the training loop keeps in memory only, and finish work that a signal interrupted."""

from __future__ import annotations

import contextlib
import logging
import random
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState

from philora.compat.transformers import EpochStart, StepEnd
from philora.decoder_stack.model import dropout_state, set_dropout_state
from philora.files.checkpoint import STATE_NAME, faults_of, read_json
from philora.runtime.signals import Signalled
from philora.training.arguments import chosen_of
from philora.training.callbacks import StepWatch

logger = logging.getLogger(__name__)


class ResumableLoop:
    """The training loop of a trainer; after resuming it counts, logs and stops as if it had not been interrupted.

    Attributes:
        stopped: Whether training ends with the current step because of a signal.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer: Any = weakref.proxy(trainer)  # a cycle would keep the model in memory
        self._reset(None)

    def _reset(self, checkpoint: str | None) -> None:
        self.stopped = False
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        self._checkpoint = checkpoint
        self._kept: Mapping[str, Any] | None = None  # the state in the checkpoint, until it is restored
        self._was_finished = False  # whether the checkpoint is the last of its training
        self._last_ended_step: int | None = None  # the last step that was logged, evaluated or saved
        self._at_epoch_end = False  # whether that was for the end of an epoch
        self._gradient_norm: Any = None  # of that step
        self._learning_rate: float | None = None
        self._evaluation_due = False  # whether an evaluation was interrupted
        self._epoch_generator: torch.Tensor | None = None  # torch's generator at the start of the epoch

    @property
    def seconds(self) -> float:
        """Return the wall time of training, including earlier processes."""
        return self._earlier_seconds + time.monotonic() - self._began

    # -- checkpoints

    @property
    def state_name(self) -> str:
        """Return the name of the file with this process's state."""
        arguments = self._trainer.args
        return f"{Path(STATE_NAME).stem}_{arguments.process_index}.json" if arguments.world_size > 1 else STATE_NAME

    def exact_state(self) -> dict[str, Any]:
        """Return the state that transformers and TRL keep in memory only; every float reads back equal."""
        trainer, generator = self._trainer, self._epoch_generator
        trainer.read_metrics()
        return {
            "format": 1,
            "chosen": chosen_of(trainer.args),
            "tokens": trainer.trained_tokens,
            "loss_since_log": trainer.loss_since_log.item(),
            "loss_before": trainer.logged_loss,
            "logged_step": trainer.last_logged_step,
            "metrics": {key: list(values) for key, values in trainer.pending_metrics["train"].items()},
            "training": trainer.model.training,
            "seconds": self.seconds,
            "watch": trainer.nonfinite.watch.state(),
            "finished_at": trainer.state.max_steps if trainer.control.should_training_stop else None,
            "epoch_generator": None if generator is None else bytes(generator.tolist()).hex(),
            "left": self.pending_work(),
            "stack_dropout": dropout_state(trainer.model),
        }

    def pending_work(self) -> dict[str, Any]:
        """Return the unfinished work of this step: an interrupted evaluation, the end of the epoch."""
        control = self._trainer.control
        ends = float(self._trainer.state.epoch or 0).is_integer() or control.should_training_stop
        return {
            "evaluation": self._evaluation_due,
            "epoch_end": not self._at_epoch_end and (ends or control.should_epoch_stop),
            "grad_norm": None if self._gradient_norm is None else float(self._gradient_norm),
            "learning_rate": self._learning_rate,
        }

    # -- resuming

    def begin(self, checkpoint: str | None) -> None:
        """Read the state of a checkpoint, if there is one, after transformers has read its own."""
        trainer = self._trainer
        self._reset(checkpoint)
        trainer.nonfinite.watch, trainer.checkpoints.newest_step, trainer.counted_tokens = StepWatch(), None, 0
        if checkpoint is None:
            return
        trainer.checkpoints.newest_step = trainer.state.global_step
        best = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}"
        if trainer.state.best_global_step and best.is_dir():  # the run folder may have moved
            trainer.state.best_model_checkpoint = str(best)
        self._restore_callbacks()
        state = read_json(Path(checkpoint) / self.state_name)
        if state:
            trainer.counted_tokens = int(state["tokens"])
            self._earlier_seconds = float(state["seconds"])
            trainer.nonfinite.watch.restore(state["watch"])
            if state["epoch_generator"] is not None:
                self._epoch_generator = torch.tensor(list(bytes.fromhex(state["epoch_generator"])), dtype=torch.uint8)
            self._kept = state
            self._was_finished = state["finished_at"] == trainer.state.max_steps  # also if it stopped early

    def _restore_callbacks(self) -> None:
        """Restore the state of callbacks from the checkpoint."""
        trainer = self._trainer
        kept = trainer.state.stateful_callbacks
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            if isinstance(kept.get(name), dict) and callback is not trainer.control:
                for key, value in kept[name].get("attributes", {}).items():
                    setattr(callback, key, value)
            kept[name] = callback.state()

    def _restore_loop_state(self, model: Any, trial: Any) -> None:
        """Restore what the loop sets to zero at its start, and finish the checkpoint's step."""
        trainer = self._trainer
        if trainer.state.global_step >= trainer.state.max_steps or self._was_finished:
            trainer.control.should_training_stop = True
        state, self._kept = self._kept, None
        if state is None:
            return
        trainer.restore_counters(state["loss_since_log"], float(state["loss_before"]), int(state["logged_step"]))
        trainer.pending_metrics["train"].update({key: list(values) for key, values in state["metrics"].items()})
        trainer.model.train(bool(state["training"]))
        if state.get("stack_dropout") is not None:
            set_dropout_state(trainer.model, state["stack_dropout"])
        if state.get("left") is not None:
            self._finish_pending_work(state["left"], model, trial)

    def _finish_pending_work(self, pending: Mapping[str, Any], model: Any, trial: Any) -> None:
        """Repeat an interrupted evaluation, and end the epoch if the checkpoint was written before its end.

        This starts with the random states of the checkpoint. The result is saved over it, with the random states that
        training continues with.
        """
        trainer = self._trainer
        trainer.load_random_state(self._checkpoint)
        entries, step = len(trainer.state.log_history), trainer.state.global_step
        self._last_ended_step = None if pending["epoch_end"] else step
        begun = time.time() - (time.monotonic() - self._began)
        end = StepEnd(pending["grad_norm"], pending["learning_rate"], model, trial)
        if pending["evaluation"]:
            trainer.control.should_evaluate = True
            trainer.log_evaluate_save(end, trainer.state.epoch, begun)
        if pending["epoch_end"]:
            self._last_ended_step = step
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
            trainer.log_evaluate_save(end, trainer.state.epoch, begun)
        if len(trainer.state.log_history) > entries and not self.stopped:
            trainer.make_checkpoint(model, trial)

    # -- the parts of the loop

    def run_epoch(self, start: EpochStart, run: Callable[[], None]) -> None:
        """Run an epoch from the checkpoint's position; do nothing if its training was complete."""
        trainer = self._trainer
        self._restore_loop_state(start.model, start.trial)
        if trainer.control.should_training_stop:
            return
        if start.inside:
            # A sampler may draw the epoch's order from here; the checkpoint's random states are set afterwards.
            if self._epoch_generator is not None:
                torch.random.set_rng_state(self._epoch_generator)
        else:
            if start.checkpoint is not None:
                trainer.load_random_state(start.checkpoint)
            self._epoch_generator = torch.random.get_rng_state()
        steps, arguments = trainer.nonfinite, trainer.args
        steps.filters_losses = arguments.logging_nan_inf_filter
        arguments.logging_nan_inf_filter = False  # `NonFiniteSteps` does it
        try:
            run()
        finally:
            arguments.logging_nan_inf_filter, steps.filters_losses = steps.filters_losses, False

    def end_step(self, end: StepEnd, log_evaluate_save: Callable[[], None]) -> None:
        """Log, evaluate and save after a step, and once more if its epoch ends there.

        After a signal the evaluation ends, the step is saved unless it is already, and training stops. The rest is done
        after resuming.
        """
        if self.stopped:
            return
        trainer, step = self._trainer, self._trainer.state.global_step
        self._at_epoch_end, self._last_ended_step = self._last_ended_step == step, step
        self._gradient_norm, self._learning_rate = end.gradient_norm, end.learning_rate
        if trainer.outcome_matters():
            trainer.nonfinite.settle()
        with contextlib.suppress(Signalled):
            log_evaluate_save()
        if trainer.stop is not None and trainer.stop.agreed():
            trainer.nonfinite.settle()
            if trainer.checkpoints.newest_step != step or self._evaluation_due:
                trainer.make_checkpoint(end.model, end.trial)
                trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
            self.stopped = trainer.control.should_training_stop = True

    def run_evaluation(self, at_start: bool, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run an evaluation; one that a signal interrupts changes nothing and is repeated after resuming."""
        if at_start and self._kept is not None:
            return {}  # `eval_on_start` ran before the checkpoint
        trainer = self._trainer
        training, restore_random_states = trainer.model.training, _random_states()
        self._evaluation_due = True
        try:
            metrics = run()
        except Signalled:
            trainer.pending_metrics["eval"].clear()
            trainer.model.train(training)
            restore_random_states()
            raise
        self._evaluation_due = False
        return metrics

    def end_training(self, trial: Any, finish: Callable[[float], Any]) -> Any:
        """End the training with the time of all processes that took part in it.

        transformers uses the wall clock, which may have been set during training.
        """
        self._restore_loop_state(self._trainer.model_wrapped, trial)
        self._trainer.nonfinite.settle()
        return finish(time.time() - self.seconds)

    def can_load_best_model(self) -> bool:
        """Return whether the best checkpoint is complete; if not, warn that the last step's weights are kept."""
        state = self._trainer.state
        best = Path(state.best_model_checkpoint)
        faults = faults_of(best)
        if faults:
            logger.warning("%s is not loaded, the weights of the last step are kept: %s", best, "; ".join(faults))
            state.best_model_checkpoint = None  # otherwise transformers would delete the last checkpoint
        return not faults


def _random_states() -> Callable[[], None]:
    """Return a function that restores the current random states: Python's, NumPy's, torch's on the CPU and each GPU."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)

    return restore
