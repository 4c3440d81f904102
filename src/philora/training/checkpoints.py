"""Write the checkpoints of a trainer atomically, and check that they fit on the disk."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from philora.errors import RunError, fault
from philora.files.checkpoint import (
    TEMPORARY_PREFIX,
    bytes_in,
    disk_full,
    how_to_continue,
    missing_bytes,
    publish,
    rotate,
    seal,
    write_json,
)

_TOKENIZER_BYTES_PER_TOKEN = 100  # tokenizer.json of Phi-3-mini and Phi-4-mini, rounded up
_SMALL_FILES_BYTES = 1 << 20  # states of generators and trainer beside the weights of a checkpoint


class Checkpoints:
    """The checkpoints of a trainer: written to a staging folder, sealed, then renamed, so that each is complete.

    Attributes:
        newest_step: The step of the newest checkpoint; None if there is none.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer: Any = weakref.proxy(trainer)  # a cycle would keep the model in memory
        self.newest_step: int | None = None

    def write(self, model: Any, trial: Any) -> None:
        """Write a checkpoint to a staging folder, seal it, rename it, and only then remove older ones.

        Raises:
            RunError: It does not fit on the disk; older ones are unchanged.
        """
        trainer = self._trainer
        run, step = trainer.output_folder(trial), trainer.state.global_step
        final, staging = run / f"checkpoint-{step}", run / f"{TEMPORARY_PREFIX}checkpoints"
        writes, wait = trainer.args.should_save, trainer.accelerator.wait_for_everyone
        best = trainer.state.best_global_step
        if writes and missing_bytes(run, self._next_bytes(run)):
            raise _no_space(run, final, self._next_bytes(run), "No space left on device")
        try:
            if writes:
                shutil.rmtree(staging, ignore_errors=True)
            wait()
            trainer.staging_folder = staging
            trainer.write_checkpoint(model, trial)
            trainer.staging_folder = None
            written = staging / final.name
            write_json(written / trainer.loop.state_name, trainer.loop.exact_state())
            wait()
            if writes:
                self._publish(written, final, best)
            self.newest_step = step
            wait()
        except Exception as error:
            if not disk_full(error):
                raise
            raise _no_space(run, final, self._next_bytes(run), str(error)) from error
        finally:
            trainer.staging_folder = None
            if writes:
                shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, written: Path, final: Path, best: int | None) -> None:
        """Seal a checkpoint, rename it, and remove older ones."""
        trainer, state, run = self._trainer, self._trainer.state, final.parent
        if best and (best == state.global_step or (run / f"checkpoint-{best}").is_dir()):
            state.best_model_checkpoint = str(run / f"checkpoint-{best}")
            state.save_to_json(str(written / "trainer_state.json"))
        (written / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a card
        seal(written, {"step": state.global_step})
        publish(written, final)
        best_folder = state.best_model_checkpoint
        rotate(run, final, trainer.args.save_total_limit, None if best_folder is None else Path(best_folder))

    def _next_bytes(self, run: Path) -> int:
        """Return the expected size of the next checkpoint: that of the last one, or an estimate."""
        last = run / f"checkpoint-{self.newest_step}"
        return bytes_in(last) if last.is_dir() else checkpoint_bytes(self._trainer.model)


def checkpoint_bytes(model: nn.Module) -> int:
    """Estimate the size of a checkpoint: trained weights in their dtype, two moments in fp32, and the tokenizer.

    Optimizers with smaller states need less space.
    """
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() * (weight.element_size() + 8) for weight in trained)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0)
    return int(total) + vocabulary * _TOKENIZER_BYTES_PER_TOKEN + _SMALL_FILES_BYTES


def _no_space(run: Path, final: Path, size: int, why: str) -> RunError:
    free = shutil.disk_usage(run if run.exists() else run.parent).free
    todo = f"Free some space ({free:,} bytes are free), then {how_to_continue(run)}; older checkpoints are unchanged"
    return RunError(fault("checkpoint", "folder", str(final), f"free space for about {size:,} bytes: {why}", todo))
