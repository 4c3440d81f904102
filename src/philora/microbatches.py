"""Micro-batches in parts, for a step that does not fit into memory as it was planned.

The parts of a micro-batch are computed one after the other with the normaliser of the whole, so the loss and the
gradient are those of the whole: the micro-batch is halved and accumulation doubled, while an optimizer step stays what
it was.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from philora.compat.trl import trl
from philora.data.ids import check_batch, vocabulary_of
from philora.errors import RunError, fault
from philora.kernels.memory import out_of_memory
from philora.lora.recomputation import random_state, set_random_state

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class MicroBatchParts(TrainerCallback, ExportableState):  # type: ignore[misc]
    """How often micro-batches are halved, kept in the checkpoints' `trainer_state.json` and read from there on resume.

    Attributes:
        halvings: In training: 2^halvings parts.
        evaluation_halvings: In the trainer's evaluation.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self.evaluation_halvings = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over what the checkpoint says; one of an older version says nothing."""
        found = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.halvings, self.evaluation_halvings = (found["attributes"][each] for each in vars(self))


def parts(inputs: Inputs, halvings: int) -> list[Inputs]:
    """A micro-batch in up to 2^halvings parts; what cannot be halved stays whole.

    Shapes:
        As `halves`.
    """
    found = [inputs]
    for _ in range(halvings):
        found = [half for each in found for half in (halves(each) or (each,))]
    return found


def halves(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
    """The two halves of a micro-batch, or None where it is one row of one document, or of an unknown layout.

    Args:
        inputs: As TRL's collators make them: rows beside each other, or all documents in one row with `position_ids`
            that start again at each and no mask; that is cut between the two documents nearest to its middle.

    Shapes:
        input_ids and its like (B, T), halved to (B / 2, T); or (1, T) of any number of documents.
    """
    ids = inputs["input_ids"]
    rows, tokens = ids.shape[:2]
    positions = inputs.get("position_ids")
    others = [each for name, each in inputs.items() if isinstance(each, Tensor) and name not in _LENGTHS]
    if rows > 1:
        if any(each.ndim == 0 or len(each) != rows for each in others) or any(name in inputs for name in _LENGTHS):
            return None
        middle = rows // 2
        first, second = (
            {name: each[part] if isinstance(each, Tensor) else each for name, each in inputs.items()}
            for part in (slice(0, middle), slice(middle, rows))
        )
        return first, second
    if not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return None
    if any(each.shape[:2] != ids.shape for each in others):
        return None
    starts = (positions[0] == 0).nonzero().flatten()[1:]
    if not len(starts):
        return None
    cut = int(starts[(starts - tokens // 2).abs().argmin()])
    return _documents(inputs, slice(0, cut)), _documents(inputs, slice(cut, tokens))


def _documents(inputs: Inputs, part: slice) -> Inputs:
    """Some documents of one row. Shapes: all of (1, T)."""
    found = {
        name: each[:, part] if isinstance(each, Tensor) and name not in _LENGTHS else each
        for name, each in inputs.items()
    }
    positions = found["position_ids"]
    if "seq_idx" in found:
        found["seq_idx"] = found["seq_idx"] - found["seq_idx"][:, :1]
    if "cu_seq_lens_q" in found:
        starts = (positions[0] == 0).nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
        longest = int(bounds.diff().max())
        found |= dict(zip(_LENGTHS, (bounds, bounds, longest, longest), strict=True))
    return found


def label_tokens(inputs: Inputs) -> int:
    """Tokens of a micro-batch that the loss is a sum over."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices whose generators a step of the model may draw from: the CPU, and each that holds a part of it."""
    held = {each.device for each in (*model.parameters(), *model.buffers())}
    return {torch.device("cpu")} | {each for each in held if each.type != "meta"}


class _Step(NamedTuple):
    """What an optimizer step began with, and its micro-batches so far: enough to begin it again.

    Attributes:
        batches: The micro-batches.
        random: States of the generators of the CPU and of each device that the model is on.
        entries: Entries of each of TRL's metrics.
        tokens: TRL's count of tokens.
    """

    batches: list[Inputs]
    random: dict[torch.device, Tensor]
    entries: dict[str, int]
    tokens: int


class MicroBatchTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which goes on after out-of-memory: micro-batches are halved for the rest of the run.

    The optimizer step begins again with the gradients, the random state and the counts that it began with, so that it
    ends as if it had been computed in parts from the start. In one process without DeepSpeed or FSDP: elsewhere the
    other processes would wait for this one. Not with `auto_find_batch_size`, which is transformers' answer.

    Raises:
        RunError: Memory does not suffice for one row, or one document of a packed row.
    """

    current_gradient_accumulation_steps: int
    train_dataset: Any
    _step: _Step | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(MicroBatchParts())
        self._vocabulary = vocabulary_of(self.model)

    def _check_ids(self, inputs: Inputs) -> None:
        """Hold a batch against the vocabulary, where that takes no waiting for a GPU or its rows were not looked at.

        Raises:
            DataError: An id or label is none of the vocabulary's.
        """
        if self.args.device.type == "cpu" or not isinstance(self.train_dataset, datasets.Dataset):
            check_batch(inputs, self._vocabulary, f"step {self.state.global_step + 1}, batch")

    @property
    def _micro_batch_parts(self) -> MicroBatchParts:
        callbacks = self.callback_handler.callbacks
        return next(each for each in callbacks if isinstance(each, MicroBatchParts))

    def _may_split(self) -> bool:
        alone = self.args.world_size == 1 and self.args.n_gpu <= 1
        others = self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.auto_find_batch_size
        return alone and not others

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """As transformers'; in parts where memory did not suffice before, or does not now."""
        self._check_ids(inputs)
        if num_items_in_batch is None or not self._may_split():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if self._step is None:
            entries = {name: len(values) for name, values in self._metrics["train"].items()}
            states = {each: random_state(each) for each in devices_of(model)}
            self._step = _Step([], states, entries, self._total_train_tokens)
        step = self._step
        step.batches.append(inputs)
        todo = [inputs]
        try:
            while not isinstance(result := self._in_parts(model, todo, num_items_in_batch), Tensor):
                # Nothing of the attempt is left here: its tensors were those of frames that have ended.
                self._make_room(result, "halvings", f"step {self.state.global_step + 1}")
                model.zero_grad()
                self._rewind(step)
                todo = step.batches
        except BaseException:
            self._step = None
            raise
        if self.accelerator.sync_gradients:
            self._step = None
        return result

    def _in_parts(self, model: nn.Module, batches: list[Inputs], count: Any) -> Tensor | Inputs:
        """Forward and backward of micro-batches; the last one's loss, or the part that there was no memory for."""
        steps: int = self.current_gradient_accumulation_steps
        loss = torch.zeros(())
        for inputs in batches:
            pieces = parts(inputs, self._micro_batch_parts.halvings)
            begun = {name: len(values) for name, values in self._metrics["train"].items()}
            losses = []
            try:
                self.current_gradient_accumulation_steps = steps * len(pieces)
                for piece in pieces:
                    losses.append(super().training_step(model, piece, count))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                return piece
            finally:
                self.current_gradient_accumulation_steps = steps
            self._as_one("train", begun, [label_tokens(piece) for piece in pieces])
            loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As TRL's; in parts where memory did not suffice before, or does not now."""
        self._check_ids(inputs)
        if not self._may_split() or "labels" not in inputs:
            whole: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return whole
        while True:
            pieces = parts(inputs, self._micro_batch_parts.evaluation_halvings)
            begun = {name: len(values) for name, values in self._metrics["eval"].items()}
            results: list[tuple[Any, Any, Any]] = []
            refused = None
            try:
                for piece in pieces:
                    results.append(super().prediction_step(model, piece, prediction_loss_only, ignore_keys))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                refused = piece
            if refused is None:
                break
            results.clear()
            for name, values in self._metrics["eval"].items():
                del values[begun.get(name, 0) :]
            self._make_room(refused, "evaluation_halvings", "evaluation")
        if len(results) == 1:
            return results[0]
        weights = [label_tokens(piece) for piece in pieces]
        self._as_one("eval", begun, weights)
        along = 0 if len(inputs["input_ids"]) > 1 else 1
        shares = torch.tensor(weights, dtype=torch.float32, device=results[0][0].device)
        loss = (torch.stack([each[0] for each in results]) * shares).sum() / shares.sum().clamp(min=1)
        joined = [None if each[0] is None else torch.cat(each, along) for each in list(zip(*results, strict=True))[1:]]
        return loss, joined[0], joined[1]

    def _make_room(self, refused: Inputs, which: str, where: str) -> None:
        """Halve micro-batches from here on and free what can be freed; says so."""
        tokens = refused["input_ids"].numel()
        if halves(refused) is None:
            expected = f"memory for {tokens:,} tokens, which cannot be divided further"
            first = "" if self.args.gradient_checkpointing else "set gradient_checkpointing: true, "
            todo = f"{first}lower max_length, or quantise the base (model.quantization: nf4)"
            newest = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            last = f". {Path(newest).name} is whole" if newest else ""
            raise RunError(fault("out of memory", "in", where, expected, todo[0].upper() + todo[1:] + last))
        state = self._micro_batch_parts
        setattr(state, which, getattr(state, which) + 1)
        count = 2 ** getattr(state, which)
        accumulation = (
            "" if which != "halvings" else f", accumulation {self.args.gradient_accumulation_steps} x {count}"
        )
        logger.warning(
            "out of memory in %s, with %s tokens at once: from here on each batch is computed in %d parts%s. "
            "Steps, losses and learning rate are those of the whole.",
            where,
            f"{tokens:,}",
            count,
            accumulation,
        )
        clear_device_cache(garbage_collection=True)

    def _rewind(self, step: _Step) -> None:
        """Random state and counts as the step began with them."""
        for device, state in step.random.items():
            set_random_state(device, state)
        for name, values in self._metrics["train"].items():
            del values[step.entries.get(name, 0) :]
        self._total_train_tokens = step.tokens

    def _as_one(self, mode: str, begun: dict[str, int], weights: list[int]) -> None:
        """Let TRL's metrics of several parts count as those of one micro-batch: means over their labels."""
        for name, values in self._metrics[mode].items():
            new = values[begun.get(name, 0) :]
            if len(new) == len(weights) > 1:
                mean = sum(each * weight for each, weight in zip(new, weights, strict=True)) / max(1, sum(weights))
                values[begun.get(name, 0) :] = [mean]
