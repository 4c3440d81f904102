"""A training step on a CPU in which reading a tensor's value is refused: on a GPU it would wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from philora.kernels import loss
from philora.training import microbatches

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "unique_consecutive")
"""Operators of ATen whose result's value or shape the host has to know."""


class Waits(AssertionError):
    """An operator for which the host would wait."""


class NoReading(TorchDispatchMode):
    """Refuses the operators of `READING` and indexing by a mask."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if masks or name.removesuffix("_numpy") in READING or name.startswith("_unique"):
            raise Waits(f"aten::{name} waits for the device")
        return function(*args, **(kwargs or {}))


class NoLists(TorchFunctionMode):
    """Refuses what reads a tensor without an operator of ATen."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tolist", "numpy", "__array__"):
            raise Waits(f"Tensor.{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting(trainer: Any, monkeypatch: Any) -> Iterator[None]:
    """In this block whole steps of a trainer are computed under `NoReading`, all but the making of batches.

    What philora looks at only where the device is the CPU, the token ids and labels of a batch, is left out.
    """
    monkeypatch.setattr(microbatches.MicroBatchTrainer, "_check_ids", lambda *_: None)
    monkeypatch.setattr(loss, "_check_labels", lambda *_: None)
    modes = NoReading(), NoLists()
    entered = False
    get, look, settle = trainer.get_batch_samples, trainer._maybe_log_save_evaluate, trainer.nonfinite.settle

    def enter() -> None:
        nonlocal entered
        for each in modes:
            each.__enter__()
        entered = True

    def leave() -> None:
        nonlocal entered
        if entered:
            for each in reversed(modes):
                each.__exit__(None, None, None)
            entered = False

    def samples(*args: Any, **kwargs: Any) -> Any:
        leave()
        found = get(*args, **kwargs)
        enter()
        return found

    def settle_step() -> None:
        unread = trainer.nonfinite.unread
        if not entered or unread is None or unread.step > trainer.state.global_step:
            settle()
            return
        leave()  # figures of the step before, which the host has by now
        settle()
        enter()

    def log_and_save(*args: Any, **kwargs: Any) -> Any:
        if trainer.outcome_matters():
            leave()  # it reads the losses then
        return look(*args, **kwargs)

    monkeypatch.setattr(trainer, "get_batch_samples", samples)
    monkeypatch.setattr(trainer.nonfinite, "settle", settle_step)
    monkeypatch.setattr(trainer, "_maybe_log_save_evaluate", log_and_save)
    try:
        yield
    finally:
        leave()
