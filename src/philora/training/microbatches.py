"""Divide micro-batches into parts, for a step that does not fit into memory as planned.

The micro-batch is halved and accumulation doubled. The parts are computed one after the other with the normaliser of
the undivided micro-batch, so loss and gradient stay the same, and so does the optimizer step.
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

from philora.compat.trl import SFTTrainerHooks
from philora.dataset.ids import check_batch, vocabulary_of
from philora.errors import RunError, fault
from philora.kernels.layout import KEYWORDS, LABELS
from philora.kernels.memory import out_of_memory
from philora.lora.recomputation import random_state, set_random_state
from philora.training.collation import HostLayout, layout_of_batch, without_layout

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]


class MicroBatchParts(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Store how often micro-batches are halved in the `trainer_state.json` of checkpoints, for resuming.

    Attributes:
        halvings: Halvings in training: 2^halvings parts.
        evaluation_halvings: Halvings in the trainer's evaluation.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self.evaluation_halvings = 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"args": {}, "attributes": dict(vars(self))}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read the state of the checkpoint; a checkpoint of an older version has none."""
        found = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.halvings, self.evaluation_halvings = (found["attributes"][var] for var in vars(self))


def parts(inputs: Inputs, halvings: int) -> list[Inputs]:
    """Return a micro-batch in up to 2^halvings parts; a part that cannot be halved is kept.

    Shapes:
        As `halves`.
    """
    found = [inputs]
    for _ in range(halvings):
        found = [half for entry in found for half in (halves(entry) or (entry,))]
    carries = len(found) > 1 and LABELS[0] in inputs
    return [entry | layout_of_batch(entry) for entry in found] if carries else found


def halves(inputs: Inputs) -> tuple[Inputs, Inputs] | None:
    """Return the two halves of a micro-batch, or None where it is one row of one document, or of an unknown layout.

    Args:
        inputs: A batch of TRL's collators: several rows, or all documents in one row with `position_ids` that restart
            at every document and no mask. Such a row is cut at the document boundary nearest to its middle.

    Shapes:
        input_ids and its like (B, T), halved to (B / 2, T); or (1, T) of any number of documents.
    """
    inputs = without_layout(inputs)
    ids = inputs["input_ids"]
    rows, tokens = ids.shape[:2]
    positions = inputs.get("position_ids")
    others = [entry for name, entry in inputs.items() if isinstance(entry, Tensor) and name not in KEYWORDS]
    if rows > 1:
        if any(other.ndim == 0 or len(other) != rows for other in others) or any(name in inputs for name in KEYWORDS):
            return None
        middle = rows // 2
        first, second = (
            {name: entry[part] if isinstance(entry, Tensor) else entry for name, entry in inputs.items()}
            for part in (slice(0, middle), slice(middle, rows))
        )
        return first, second
    if not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return None
    if any(other.shape[:2] != ids.shape for other in others):
        return None
    starts = (positions[0] == 0).nonzero().flatten()[1:]
    if not len(starts):
        return None
    cut = int(starts[(starts - tokens // 2).abs().argmin()])
    return _documents(inputs, slice(0, cut)), _documents(inputs, slice(cut, tokens))


def _documents(inputs: Inputs, part: slice) -> Inputs:
    """Return some documents of one row. Shapes: all inputs (1, T)."""
    found = {
        name: entry[:, part] if isinstance(entry, Tensor) and name not in KEYWORDS else entry
        for name, entry in inputs.items()
    }
    positions = found["position_ids"]
    if "seq_idx" in found:
        found["seq_idx"] = found["seq_idx"] - found["seq_idx"][:, :1]
    if "cu_seq_lens_q" in found:
        starts = (positions[0] == 0).nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
        longest = int(bounds.diff().max())
        found |= dict(zip(KEYWORDS, (bounds, bounds, longest, longest), strict=True))
    return found


def label_tokens(inputs: Inputs) -> int:
    """Count the tokens with a loss. This waits for a GPU unless the batch has the positions of its labels."""
    if isinstance(rows := inputs.get(LABELS[0]), Tensor):
        return len(rows)
    return int((inputs["labels"][:, 1:] != -100).sum())


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices whose generators a step may use: the CPU, and those of the model's parts."""
    held = {parameter.device for parameter in (*model.parameters(), *model.buffers())}
    return {torch.device("cpu")} | {entry for entry in held if entry.type != "meta"}


def numbers(values: list[Any]) -> list[Any]:
    """Return a list with scalar tensors replaced by their values, which are read together."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return values
    read = iter(torch.stack([tensor.double() for tensor in tensors]).tolist())
    return [
        value if not isinstance(value, Tensor) else next(read) if value.is_floating_point() else int(next(read))
        for value in values
    ]


class _Step(NamedTuple):
    """The initial state of an optimizer step and its micro-batches so far: enough to repeat the step.

    Attributes:
        batches: The micro-batches so far.
        random: States of the generators of the CPU and of the model's devices.
        entries: The number of entries of each of TRL's metrics.
        tokens: TRL's token count; a tensor until it is read.
    """

    batches: list[Inputs]
    random: dict[torch.device, Tensor]
    entries: dict[str, int]
    tokens: Any


class MicroBatchTrainer(SFTTrainerHooks):
    """TRL's trainer, which continues after an out-of-memory error with micro-batches halved for the rest of the run.

    The optimizer step is repeated from its initial gradients, random state and counts, so that its result is as if it
    had been computed in parts from the start. This works in a single process without DeepSpeed or FSDP, because other
    processes would wait for this one, and not with `auto_find_batch_size`, which is transformers' own solution.

    Raises:
        RunError: Memory does not suffice for a single row, or a single document of a packed row.
    """

    current_gradient_accumulation_steps: int
    train_dataset: Any
    data_collator: Any
    _step: _Step | None = None
    _devices: set[torch.device] | None = None  # the model's devices, while it trains

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(MicroBatchParts())
        self.vocabulary = vocabulary_of(self.model)

    def begin_training(self, checkpoint: str | None) -> None:
        """Forget the model's devices: it may have been moved since an earlier training."""
        self._devices = None

    def wrap_collator(self, rows: Any, collate: Any) -> Any:
        """Return a collator that locates documents and labels in its batches.

        The given collator is kept where accelerate divides a batch between processes, where trained prompts precede the
        tokens, and under torch.compile, which would compile again for every layout.
        """
        prompts = getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False)
        dealt = isinstance(rows, torch.utils.data.IterableDataset) or self.accelerator.dispatch_batches
        return collate if prompts or dealt or self.args.torch_compile else HostLayout(collate)

    def _check_ids(self, inputs: Inputs) -> None:
        """Check a batch against the vocabulary if that does not wait for a GPU, or if its rows were not checked before.

        Raises:
            DataError: An id or label is not in the vocabulary.
        """
        if self.args.device.type == "cpu" or not isinstance(self.train_dataset, datasets.Dataset):
            check_batch(inputs, self.vocabulary, f"step {self.state.global_step + 1}, batch")

    @property
    def _micro_batch_parts(self) -> MicroBatchParts:
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, MicroBatchParts))

    def _may_split(self) -> bool:
        alone = self.args.world_size == 1 and self.args.n_gpu <= 1
        others = self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.auto_find_batch_size
        return alone and not others

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """Compute a micro-batch; in parts after an out-of-memory error, earlier or now."""
        self._check_ids(inputs)
        if num_items_in_batch is None or not self._may_split():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if self._step is None:
            entries = {name: len(values) for name, values in self.pending_metrics["train"].items()}
            if self._devices is None:
                self._devices = devices_of(model)
            states = {device: random_state(device) for device in self._devices}
            self._step = _Step([], states, entries, self.counted_tokens)
        step = self._step
        step.batches.append(inputs)
        todo = [inputs]
        try:
            while not isinstance(result := self._in_parts(model, todo, num_items_in_batch), Tensor):
                # The tensors of the attempt are freed: their frames have ended.
                self._halve(result, "halvings", f"step {self.state.global_step + 1}")
                model.zero_grad()
                self._rewind(step)
                todo = step.batches
        except BaseException:
            self._step = None
            raise
        if self.accelerator.sync_gradients:
            self._step = None
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss; logged figures stay on the device until `log` or a checkpoint reads them.

        TRL reads the entropy, the accuracy and the token count of every micro-batch, which waits for the device.
        Another loss than the plain one is computed by TRL.
        """
        if return_outputs or not self._has_plain_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        outputs = model(**(inputs | {"use_cache": False}), fused_lm_head=True)
        rows = inputs.get(LABELS[0])
        count = outputs.label_mask.sum() if rows is None else torch.tensor(len(rows))
        divisor = count if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(divisor).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        with torch.no_grad():
            self._note(mode, inputs, outputs, count)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Read the pending figures, and log as TRL."""
        self.read_metrics()
        super().log(logs, start_time)

    def _has_plain_loss(self) -> bool:
        """Return whether the loss is the mean log-probability of the labels, with nothing added."""
        plain = self.compute_loss_func is None and self.label_smoother is None and self.args.loss_type == "nll"
        parallel = getattr(self.accelerator, "parallelism_config", None)
        return plain and not self.aux_loss_enabled and parallel is None

    def _note(self, mode: str, inputs: Inputs, outputs: Any, count: Tensor) -> None:
        """Add the figures of a micro-batch to TRL's metrics, as tensors. Shapes: count ()."""
        valid = self._gathered(count.to(outputs.entropy.device, non_blocking=True))
        for name, values in (("entropy", outputs.entropy), ("mean_token_accuracy", outputs.is_top1)):
            total = self._gathered(values.sum())
            self.pending_metrics[mode][name].append(torch.where(valid > 0, total / valid, 0.0))
        if mode == "train":
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
            if self.accelerator.num_processes > 1:
                tokens = self._gathered(torch.as_tensor(tokens, device=outputs.entropy.device))
            self.counted_tokens = self.counted_tokens + tokens // self.tensor_parallel_size
        self.pending_metrics[mode]["num_tokens"] = [self.counted_tokens]

    def _gathered(self, value: Tensor) -> Tensor:
        """Return the sum of a number over all processes. Shapes: (); returns ()."""
        if self.accelerator.num_processes == 1:
            return value
        total: Tensor = self.accelerator.gather_for_metrics(value).sum()
        return total

    def read_metrics(self) -> None:
        """Replace tensors that `compute_loss` left on the device by numbers, with one copy per device."""
        for values in self.pending_metrics["train"], self.pending_metrics["eval"]:
            for name, value in values.items():
                values[name] = numbers(value)
        self.counted_tokens = numbers([self.counted_tokens])[0]

    def _in_parts(self, model: nn.Module, batches: list[Inputs], count: Any) -> Tensor | Inputs:
        """Compute forward and backward; return the last loss, or the part that did not fit into memory."""
        steps: int = self.current_gradient_accumulation_steps
        loss = torch.zeros(())
        for inputs in batches:
            pieces = parts(inputs, self._micro_batch_parts.halvings)
            begun = {name: len(values) for name, values in self.pending_metrics["train"].items()}
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
            loss = losses[0]
            if len(pieces) > 1:
                self._as_one("train", begun, [label_tokens(piece) for piece in pieces])
                loss = torch.stack(losses).sum()
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Predict as TRL; in parts after an out-of-memory error, earlier or now."""
        self._check_ids(inputs)
        if not self._may_split() or "labels" not in inputs:
            whole: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return whole
        while True:
            pieces = parts(inputs, self._micro_batch_parts.evaluation_halvings)
            begun = {name: len(values) for name, values in self.pending_metrics["eval"].items()}
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
            for name, values in self.pending_metrics["eval"].items():
                del values[begun.get(name, 0) :]
            self._halve(refused, "evaluation_halvings", "evaluation")
        if len(results) == 1:
            return results[0]
        weights = [label_tokens(piece) for piece in pieces]
        self._as_one("eval", begun, weights)
        along = 0 if len(inputs["input_ids"]) > 1 else 1
        shares = torch.tensor(weights, dtype=torch.float32, device=results[0][0].device)
        loss = (torch.stack([result[0] for result in results]) * shares).sum() / shares.sum().clamp(min=1)
        joined = [
            None if entry[0] is None else torch.cat(entry, along) for entry in list(zip(*results, strict=True))[1:]
        ]
        return loss, joined[0], joined[1]

    def _halve(self, refused: Inputs, which: str, where: str) -> None:
        """Halve micro-batches from now on, free memory, and warn."""
        tokens = refused["input_ids"].numel()
        if halves(refused) is None:
            expected = f"memory for {tokens:,} tokens, which cannot be divided further"
            first = "" if self.args.gradient_checkpointing else "set gradient_checkpointing: true, "
            todo = f"{first}lower max_length, or quantise the base (model.quantization: nf4)"
            newest = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            last = f". {Path(newest).name} is complete" if newest else ""
            raise RunError(fault("out of memory", "in", where, expected, todo[0].upper() + todo[1:] + last))
        state = self._micro_batch_parts
        setattr(state, which, getattr(state, which) + 1)
        count = 2 ** getattr(state, which)
        accumulation = (
            "" if which != "halvings" else f", accumulation {self.args.gradient_accumulation_steps} x {count}"
        )
        logger.warning(
            "out of memory in %s, with %s tokens at a time: from now on each batch is computed in %d parts%s. "
            "Steps, losses and learning rate stay the same.",
            where,
            f"{tokens:,}",
            count,
            accumulation,
        )
        clear_device_cache(garbage_collection=True)

    def _rewind(self, step: _Step) -> None:
        """Restore the initial random state and counts of the step."""
        for device, state in step.random.items():
            set_random_state(device, state)
        for name, values in self.pending_metrics["train"].items():
            del values[step.entries.get(name, 0) :]
        self.counted_tokens = step.tokens

    def _as_one(self, mode: str, begun: dict[str, int], weights: list[int]) -> None:
        """Join TRL's metrics of several parts into those of one micro-batch: means over their labels."""
        for name, values in self.pending_metrics[mode].items():
            new = values[begun.get(name, 0) :]
            if len(new) == len(weights) > 1:
                mean = sum(entry * weight for entry, weight in zip(new, weights, strict=True)) / max(1, sum(weights))
                values[begun.get(name, 0) :] = [mean]
