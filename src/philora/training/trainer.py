"""`SFTConfig` and `SFTTrainer`: TRL's, with older spellings translated, strict targets, slices and the fast layers.

A script for TRL changes its import and nothing else; TRL's defaults stay TRL's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState, TrainerControl

from philora.adapters.peft_layers import apply_slices, is_lora, keep_zeros_in_steps, optimize, resolve_for_training
from philora.compat.trl import sft_trainer, trl
from philora.configuration.config import (
    FIELDS,
    ONE_RATE_OPTIMIZERS,
    translate_trainer_keywords,
    translate_training_arguments,
)
from philora.configuration.schema import Misfit
from philora.dataset import length_notices
from philora.dataset.ids import check_rows
from philora.dataset.labelled import keep_labelled, refuse_empty
from philora.decoder_stack.model import configure as configure_stack
from philora.decoder_stack.model import dropout_state, set_dropout_state
from philora.errors import ConfigError, RunError, fault, nearest, one_per_line
from philora.files.checkpoint import (
    STATE_NAME,
    TEMPORARY_PREFIX,
    bytes_in,
    disk_full,
    faults_of,
    how_to_go_on,
    missing_bytes,
    publish,
    read_json,
    rotate,
    seal,
    write_json,
)
from philora.kernels.attention import repeat_bits
from philora.kernels.loss import add_label_head
from philora.kernels.switches import stack_switch
from philora.lora.state import loraplus_fast_parameters, split_loraplus_groups
from philora.models.loading import refuse_adapter
from philora.planning.schedule import FEW_STEPS, check_schedule, few_steps
from philora.runtime.signals import Signalled, StopOnSignal
from philora.training.callbacks import StepWatch
from philora.training.microbatches import MicroBatchTrainer
from philora.training.sampling import SharedSampler, can_share, with_empty_rows

logger = logging.getLogger(__name__)

CHOSEN = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_length",
    "bf16",
)
"""Arguments that a run chooses for its machine; a checkpoint keeps them, since the steps depend on them."""
NONFINITE_NAME = "nonfinite_examples.json"
_TOKENIZER_BYTES_PER_TOKEN = 100  # tokenizer.json of Phi-3-mini and Phi-4-mini, rounded up
_SMALL_FILES_BYTES = 1 << 20  # states of generators and trainer beside the weights of a checkpoint


@dataclasses.dataclass(init=False)
class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` that also takes the spellings of older releases, each with one notice, and keys of philora's own.

    `gradient_checkpointing="elementwise"`, or `elementwise_recomputation=True`, is the grade between True and False:
    `optimize(model, recomputation="elementwise")`. `"host"` computes whole layers again, as True does, from inputs that
    the decoder stack keeps in the computer's memory.

    Raises:
        ConfigError: An unknown name, a `loraplus_lr_ratio` that is no number above 0, or one for an optimizer that
            has only one learning rate, a `max_nonfinite_steps` that is no whole number of at least 1, an
            `adapter_dtype` that is neither float32 nor bfloat16, or a `deterministic` that is neither True nor False.

    Example:
        >>> SFTConfig("out", evaluation_strategy="no", warmup_ratio=0.2, loraplus_lr_ratio=16)  # doctest: +SKIP
    """

    loraplus_lr_ratio: float | None = dataclasses.field(
        default=None,
        metadata={"help": "LoRA+: the learning rate of B as a multiple of learning_rate; 16 in the paper."},
    )
    max_nonfinite_steps: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Steps with a loss or gradient that is not finite are skipped; this many in a row end the "
            "training. None: they are taken, as TRL does."
        },
    )

    adapter_dtype: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "float32 or bfloat16: the dtype that A and B are kept in. None: as PEFT makes them, float32, over "
            "quantised bases too, where TRL rounds them to bfloat16."
        },
    )
    deterministic: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Whether the decoder stack on a GPU gives the same bits when a step is repeated or resumed; False "
            "is faster by 1% to 6%. transformers' `full_determinism` is about all of PyTorch."
        },
    )
    elementwise_recomputation: bool = dataclasses.field(
        default=False,
        metadata={"help": "Compute the outputs of RMSNorm and SwiGLU again in backward; not whole layers."},
    )

    inputs_on_host = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        translated, notices = translate_training_arguments(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        known = [each.name for each in dataclasses.fields(self) if each.init]
        if not torch.accelerator.is_available() and "use_cpu" not in translated and not translated.get("fp16"):
            translated["use_cpu"] = True  # transformers refuses bf16 on a CPU that was not named
        unknown = [name for name in translated if name not in known]
        rule = "a field of trl.SFTConfig"
        faults = [fault("SFTConfig", name, translated[name], rule, nearest(name, known)) for name in unknown]
        for name in ("loraplus_lr_ratio", "max_nonfinite_steps", "adapter_dtype", "deterministic"):
            given = translated.pop(name, True if name == "deterministic" else None)
            bound = FIELDS[f"training_config.{name}"].rule
            try:
                setattr(self, name, bound.read(given))
            except Misfit:
                faults.append(fault("SFTConfig", name, given, bound.text))
        checkpointing = translated.get("gradient_checkpointing")
        self.inputs_on_host = checkpointing == "host"
        if self.inputs_on_host:
            checkpointing = translated["gradient_checkpointing"] = True
        elementwise = bool(translated.pop("elementwise_recomputation", False)) or checkpointing == "elementwise"
        if isinstance(checkpointing, str) and checkpointing != "elementwise":
            faults.append(
                fault("SFTConfig", "gradient_checkpointing", checkpointing, "True, False, 'elementwise' or 'host'")
            )
        elif elementwise and checkpointing is True:
            expected = "False, because gradient_checkpointing=True recomputes whole layers"
            faults.append(fault("SFTConfig", "elementwise_recomputation", elementwise, expected))
        if faults:
            raise ConfigError(one_per_line(faults))
        self.elementwise_recomputation = elementwise
        if elementwise:
            translated["gradient_checkpointing"] = False
        super().__init__(*args, **translated)
        if self.loraplus_lr_ratio is not None and self.optim in ONE_RATE_OPTIMIZERS:
            expected = f"None, because optim={self.optim.value!r} has one learning rate for all"
            todo = "Choose another optim, such as adamw_torch"
            raise ConfigError(fault("SFTConfig", "loraplus_lr_ratio", self.loraplus_lr_ratio, expected, todo))


class NonFiniteError(RunError):
    """The loss or the gradient was not finite for too many steps in a row; no weight took any of them."""


class _Unread:
    """A step whose loss and gradient norm the host has not read yet.

    Attributes:
        step: Its number.
        batches: Its micro-batches.
        optimizer: What leaves the step out by itself; None: the step has not been taken yet.
        schedule: State of the schedule of the learning rate before the step.
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
        """Return the loss, the gradient norm and the loss of each micro-batch, as soon as they have been computed."""
        if self._done is not None:
            self._done.synchronize()
        return list(map(float, self._copy.tolist()))


class SFTTrainer(MicroBatchTrainer):
    """`trl.SFTTrainer` whose LoRA names are checked, whose slices are slices, and whose layers are the fast ones.

    Takes all that TRL's takes, older keywords (`tokenizer`, `max_seq_length`, `dataset_text_field`, `packing`, ...)
    with one notice each, and slices of fused projections in `peft_config.target_modules`. Checkpoints are written to
    a temporary name, synced and renamed, and carry a manifest; training that goes on from one counts, logs and stops
    as if it had never been interrupted. With `SFTConfig(loraplus_lr_ratio=...)` the optimizer
    that transformers makes gets groups of their own for B; what is logged as `learning_rate` is A's. A step that does
    not fit into memory is computed in smaller parts (`microbatches`).

    Raises:
        ConfigError: `loraplus_lr_ratio` is given and no B trains.
        TargetError: A name in `peft_config` matches nothing, or `lm_head` is a target (TRL computes the loss from
            the head's weight, so an adapter there would get no gradient).
        DataError: A table has no rows, or no label is left in any of them within `max_length`.
        RunError: A checkpoint cannot be written; older ones are untouched.
        NonFiniteError: `SFTConfig.max_nonfinite_steps` steps in a row were not finite.

    Attributes:
        stop: Where a signal is noted; training then saves and stops after the step.
        places: Says of the token ids of an example where it comes from, for the file of non-finite examples.
    """

    stop: StopOnSignal | None = None
    control: TrainerControl
    places: Callable[[Sequence[Sequence[int]]], Sequence[Mapping[str, Any]]] | None = None

    _staging: Path | None = None  # where a checkpoint is being written, while it is
    train_dataset: Any
    eval_dataset: Any
    _shared_lengths: list[int] | None = None  # tokens of each row, where this trainer deals them to processes
    _loraplus_settled = False  # whether an optimizer was split, or it was said that a given one is not
    _saved_step: int | None = None  # of the newest checkpoint
    _restored: Mapping[str, Any] | None = None  # what a checkpoint kept, until it is taken up
    _finished = False  # whether a checkpoint is the last of its training
    _resumed_from: str | None = None  # the checkpoint
    _looked_at: int | None = None  # the last step after which was logged, evaluated and saved
    _at_epoch_end = False  # whether that is being done for the end of an epoch
    _step_figures: tuple[Any, float | None] = (None, None)  # gradient norm and learning rate of that step
    _unread: _Unread | None = None  # the step whose figures are still to be read
    _filters_losses = False  # whether losses that are not finite are kept out of the log
    _evaluation_due = False  # whether an evaluation of it has not come to its end
    _stopped = False  # whether training ends with it because of a signal
    _earlier_seconds = 0.0  # of training before this process
    _begun = 0.0
    _evaluated: tuple[int, float] | None = None  # examples and seconds of an evaluation, until they are logged
    _epoch_generator: torch.Tensor | None = None  # torch's generator where the epoch began

    def __init__(self, model: str | PreTrainedModel | PeftModel, *args: Any, **kwargs: Any) -> None:
        settings, keywords, notices = translate_trainer_keywords(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        given = inspect.signature(trl.SFTTrainer.__init__).bind_partial(self, model, *args, **keywords).arguments
        given.pop("self")
        given.pop("model")
        if settings or not isinstance(given.get("args"), trl.SFTConfig):
            given["args"] = _with_settings(given.get("args"), model, settings)
        if getattr(given.get("args"), "activation_offloading", False) and not torch.accelerator.is_available():
            logger.warning("activation_offloading is left out: without a GPU activations are in this memory already")
            given["args"] = copy.copy(given["args"])
            given["args"].activation_offloading = False
        given["args"] = _with_batches_beside_the_work(given["args"])
        for name in ("train_dataset", "eval_dataset"):
            table = given.get(name)
            for each, rows in (table if isinstance(table, dict) else {name: table}).items():
                refuse_empty(f"SFTTrainer: {each}", rows)
        resolution = None
        if is_lora(given.get("peft_config")):
            if isinstance(model, str):
                options = getattr(given["args"], "model_init_kwargs", None) or {}
                refuse_adapter(model, options.get("revision"), "SFTTrainer", "model")
            skeleton = model if isinstance(model, nn.Module) else _skeleton(model, given.get("args"))
            resolution = resolve_for_training(skeleton, given["peft_config"])
            given["peft_config"] = resolution.for_peft(given["peft_config"])
        with _as_made(model) as made:
            super().__init__(model, **given)
        self._set_adapter_dtype(made)
        self._watch = StepWatch()
        self._step_batches: list[Any] = []
        self._step_losses: list[torch.Tensor] = []
        if not isinstance(self.model, PeftModel):
            logger.warning(
                "no peft_config is given: all %s parameters train, without LoRA.",
                f"{sum(each.numel() for each in self.model.parameters() if each.requires_grad):,}",
            )
        text = self.model.config.get_text_config()
        if self.aux_loss_enabled and not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
            text.num_experts = text.num_local_experts  # TRL 1.16 reads this name; Phi-3.5-MoE has only the other
        elementwise = getattr(self.args, "elementwise_recomputation", False)
        optimize(self.model, recomputation="elementwise" if elementwise else None)
        deterministic = getattr(self.args, "deterministic", True)
        on_host = getattr(self.args, "inputs_on_host", False)
        configure_stack(self.model, deterministic=deterministic, inputs_on_host=on_host)
        repeat_bits(self.model, deterministic)
        add_label_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if resolution is not None:
            apply_slices(self.model, resolution.slices)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        if self._skip_prepare_dataset:
            self.train_dataset = keep_labelled(self.train_dataset, "SFTTrainer: the train dataset", None)
            several = {name: keep_labelled(rows, f"SFTTrainer: {name}", None) for name, rows in several.items()}
            self.eval_dataset = several if isinstance(self.eval_dataset, dict) else several["eval"]
        named = {"train_dataset": self.train_dataset, **{f"eval_dataset ({k})": each for k, each in several.items()}}
        check_rows(named, self._vocabulary)
        for notice in length_notices(self.model.config, {"train": self.train_dataset, **several}):
            logger.warning("%s", notice)
        if self._shares_rows():
            groups = self.args.gradient_accumulation_steps * self.args.world_size
            self.train_dataset, self._shared_lengths = with_empty_rows(
                self.train_dataset, self._train_batch_size, groups
            )
        ratio = getattr(self.args, "loraplus_lr_ratio", None)
        if ratio is not None and not loraplus_fast_parameters(self.model):
            expected = "an adapter of which some B trains"
            raise ConfigError(fault("SFTTrainer", "loraplus_lr_ratio", ratio, expected, "Give a peft_config"))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As TRL's; rows that have no label are left out with their count, and a table without any is refused."""
        where = f"SFTTrainer: the {dataset_name} dataset"
        refuse_empty(where, dataset)
        given = len(dataset) if hasattr(dataset, "__len__") else None
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return keep_labelled(prepared, where, args.max_length, given)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With several processes the rows that one would take, balanced between them by tokens."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self._shared_lengths is None or rows is None:
            return super()._get_train_sampler(train_dataset)
        return SharedSampler(
            self._shared_lengths,
            len(rows) - len(self._shared_lengths),
            rows=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            processes=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.args.train_sampling_strategy == "random",
            padded=not self.padding_free,
        )

    def get_train_dataloader(self) -> Any:
        """As transformers'; the epoch reaches the order of a resumed run's first epoch too."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        sampler = getattr(shard, "batch_sampler", None)
        if isinstance(sampler, SharedSampler):
            shard.set_epoch = sampler.set_epoch  # transformers looks for it there when batches were skipped
        return loader

    def _shares_rows(self) -> bool:
        """Whether this trainer deals the rows to processes itself; else accelerate does, in the order they come."""
        return (
            self.args.world_size > 1
            and self.args.train_sampling_strategy in ("random", "sequential")
            and not self.args.dataloader_drop_last
            and not self.args.auto_find_batch_size
            and getattr(self.accelerator, "parallelism_config", None) is None
            and not self.accelerator.split_batches
            and not self.accelerator.dispatch_batches
            and can_share(self.train_dataset)
        )

    def _set_adapter_dtype(self, made: Mapping[int, torch.Tensor]) -> None:
        """Undo that TRL rounds what trains over a quantised base to bf16; or round it where that was asked for.

        FSDP and DeepSpeed share out what they expect in one dtype: there it is as TRL has it.
        """
        wanted = getattr(self.args, "adapter_dtype", None)
        kept = False
        for name, parameter in self.model.named_parameters():
            before = made.get(id(parameter))
            others = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if before is not None and before.dtype != parameter.dtype and wanted != "bfloat16" and not others:
                parameter.data, kept = before.to(parameter.device), True
            if wanted is not None and parameter.requires_grad and (".lora_A." in name or ".lora_B." in name):
                parameter.data = parameter.data.to(getattr(torch, wanted))
        if kept:
            logger.warning(
                "the adapter stays in float32 over the quantised base, where TRL rounds it to bfloat16; "
                "adapter_dtype: bfloat16 rounds it."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers', then B in groups of its own where `loraplus_lr_ratio` is given.

        A paged optimizer's states are ordinary memory where the parameters are on a CPU: there is nothing to page to.

        An optimizer that is there already, from the person or from DeepSpeed's configuration, stays as it is.

        Raises:
            ConfigError: The optimizer has not every B in its groups.
        """
        made_here = self.optimizer is None
        optimizer = cast(torch.optim.Optimizer, super().create_optimizer(model))
        if made_here:
            _without_pages(optimizer)
            keep_zeros_in_steps(self.model, optimizer)
        ratio = getattr(self.args, "loraplus_lr_ratio", None)
        if ratio is not None and made_here:
            # Names and parameters of the wrapped model: FSDP may have made new ones.
            split_loraplus_groups(optimizer, loraplus_fast_parameters(self.model if model is None else model), ratio)
        elif ratio is not None and not self._loraplus_settled:
            logger.warning(
                "loraplus_lr_ratio=%s is not applied to the %s that was given; "
                "philora.lora.loraplus_parameter_groups makes groups for an optimizer of one's own.",
                ratio,
                type(optimizer).__name__,
            )
        self._loraplus_settled = True
        return optimizer

    # -- what goes on exactly

    @property
    def training_seconds(self) -> float:
        """Wall time of training, of the processes before this one too."""
        return self._earlier_seconds + time.monotonic() - self._begun

    @property
    def trained_tokens(self) -> int:
        """Tokens that went through training, of the processes before this one too."""
        return int(self._total_train_tokens)

    def _state_name(self) -> str:
        several = self.args.world_size > 1
        return f"{Path(STATE_NAME).stem}_{self.args.process_index}.json" if several else STATE_NAME

    def _exact_state(self) -> dict[str, Any]:
        """What transformers and TRL count in memory only. Every float is written so that it reads back the same."""
        generator = self._epoch_generator
        self.read_metrics()
        return {
            "format": 1,
            "chosen": chosen_of(self.args),
            "tokens": int(self._total_train_tokens),
            "loss_since_log": self._tr_loss.item(),
            "loss_before": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "metrics": {key: list(values) for key, values in self._metrics["train"].items()},
            "training": self.model.training,
            "seconds": self.training_seconds,
            "watch": self._watch.state(),
            "finished_at": self.state.max_steps if self.control.should_training_stop else None,
            "epoch_generator": None if generator is None else bytes(generator.tolist()).hex(),
            "left": self._left(),
            "stack_dropout": dropout_state(self.model),
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As transformers', and a run that would train nothing, or hardly anything, is refused or named.

        Raises:
            ConfigError: The learning rate is 0 at every step.
        """
        if self.lr_scheduler is None and not self.is_deepspeed_enabled:
            settings = {
                key: getattr(self.args, key) for key in ("learning_rate", "warmup_steps", "lr_scheduler_kwargs")
            }
            settings["lr_scheduler_type"] = self.args.lr_scheduler_type
            check_schedule(settings, num_training_steps, "SFTConfig")
            if num_training_steps < FEW_STEPS and self.stop is None:  # `philora.train` has said so before the weights
                logger.warning(few_steps(num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As transformers', and callbacks with a state go on with the one that the checkpoint has."""
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        checkpoint = given.get("resume_from_checkpoint")
        position = cast("tuple[int, int]", super()._init_training_state(*args, **kwargs))
        self._watch, self._begun, self._earlier_seconds, self._restored = StepWatch(), time.monotonic(), 0.0, None
        self._saved_step = self._epoch_generator = None
        self._total_train_tokens, self._looked_at, self._resumed_from = 0, None, checkpoint
        self._finished = self._evaluation_due = self._at_epoch_end = self._stopped = False
        if checkpoint is None:
            return position
        self._saved_step = self.state.global_step
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():  # the folder may have been moved since
            self.state.best_model_checkpoint = str(best)
        kept = self.state.stateful_callbacks
        for each in (*self.callback_handler.callbacks, self.control):
            if not isinstance(each, ExportableState):
                continue
            name = type(each).__name__
            if isinstance(kept.get(name), dict) and each is not self.control:
                for key, value in kept[name].get("attributes", {}).items():
                    setattr(each, key, value)
            kept[name] = each.state()
        state = read_json(Path(checkpoint) / self._state_name())
        if state:
            self._total_train_tokens = int(state["tokens"])
            self._earlier_seconds = float(state["seconds"])
            self._watch.restore(state["watch"])
            if state["epoch_generator"] is not None:
                self._epoch_generator = torch.tensor(list(bytes.fromhex(state["epoch_generator"])), dtype=torch.uint8)
            self._restored = state
            self._finished = state["finished_at"] == self.state.max_steps  # it had been stopped early
        return position

    def _take_up(self, model: Any, trial: Any) -> None:
        """Put back what the training loop sets to zero when it begins; do what the checkpoint's step has left."""
        if self.state.global_step >= self.state.max_steps or self._finished:
            self.control.should_training_stop = True
        state, self._restored = self._restored, None
        if state is not None:
            self._tr_loss.fill_(state["loss_since_log"])
            self._total_loss_scalar = float(state["loss_before"])
            self._globalstep_last_logged = int(state["logged_step"])
            self._initial_global_step = 0
            self._metrics["train"].update({key: list(values) for key, values in state["metrics"].items()})
            self.model.train(bool(state["training"]))
            if state.get("stack_dropout") is not None:
                set_dropout_state(self.model, state["stack_dropout"])
            if state.get("left") is not None:
                self._do_what_is_left(state["left"], model, trial)

    def _do_what_is_left(self, left: Mapping[str, Any], model: Any, trial: Any) -> None:
        """The evaluation that a signal ended, and the end of the epoch where the checkpoint was written before it.

        They begin with the random states of the checkpoint. What they leave is saved in its place: from there the
        training takes the states that it goes on with.
        """
        self._load_rng_state(self._resumed_from)
        entries = len(self.state.log_history)
        self._looked_at = None if left["epoch_end"] else self.state.global_step
        begun = time.time() - (time.monotonic() - self._begun)
        rest = (left["grad_norm"], model, trial, self.state.epoch, None, begun, left["learning_rate"])
        if left["evaluation"]:
            self.control.should_evaluate = True
            self._maybe_log_save_evaluate(self._tr_loss, *rest)
        if left["epoch_end"]:
            self._looked_at = self.state.global_step
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, *rest)
        if len(self.state.log_history) > entries and not self._stopped:
            self._save_checkpoint(model, trial)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', from where the checkpoint was; nothing where its training had been complete."""
        self._take_up(kwargs["model"], kwargs["trial"])
        if self.control.should_training_stop:
            return
        if kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["steps_trained_in_current_epoch"]:
            # A sampler may draw the epoch's order from here; the generators are set to the checkpoint's afterwards.
            if self._epoch_generator is not None:
                torch.random.set_rng_state(self._epoch_generator)
        else:
            if kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["resume_from_checkpoint"] is not None:
                self._load_rng_state(kwargs["resume_from_checkpoint"])
            self._epoch_generator = torch.random.get_rng_state()
        self._filters_losses = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = False  # `training_step` does it
        try:
            super()._run_epoch(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter, self._filters_losses = self._filters_losses, False

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As transformers'; one that a signal ends leaves no trace, and is due when the run goes on."""
        if skip_scheduler and self._restored is not None:
            return {}  # `eval_on_start`, which is behind a run that goes on
        training, put_back = self.model.training, _random_states()
        self._evaluation_due = True
        try:
            metrics = cast("dict[str, float]", super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler))
        except Signalled:
            self._metrics["eval"].clear()
            self.model.train(training)
            put_back()
            raise
        self._evaluation_due = False
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As TRL's; after a signal the evaluation of a training ends here."""
        if self.stop is not None and self.is_in_train:
            self.stop.check_together()
        return super().prediction_step(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """As transformers', over the whole training and not only the part of this process.

        transformers takes the time of the wall clock, which may have been set since training began.
        """
        self._take_up(self.model_wrapped, trial)
        self._settle_step()
        return super()._finalize_training(trial, num_train_samples, time.time() - self.training_seconds)

    def _load_best_model(self) -> None:
        """As transformers'; where the best checkpoint was damaged, the last step's weights stay, with a notice."""
        best = Path(self.state.best_model_checkpoint)
        faults = faults_of(best)
        if faults:
            logger.warning("%s is not loaded, the weights of the last step stay: %s", best, "; ".join(faults))
            self.state.best_model_checkpoint = None  # beside a best one transformers would delete the last one
            return
        super()._load_best_model()

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, epoch: Any, ignored: Any, start_time: Any,
        learning_rate: Any = None,
    ) -> None:  # fmt: skip
        """As transformers', after a step and once more where its epoch ends there.

        After a signal the evaluation ends, the step is saved unless it is, and training stops; what would have
        followed is left to the run that goes on.
        """
        if self._stopped:
            return
        self._at_epoch_end, self._looked_at = self._looked_at == self.state.global_step, self.state.global_step
        self._step_figures = grad_norm, learning_rate
        if self._is_looked_at():
            self._settle_step()
        with contextlib.suppress(Signalled):
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignored, start_time, learning_rate=learning_rate
            )
        if self.stop is not None and self.stop.agreed():
            self._settle_step()
            if self._saved_step != self.state.global_step or self._evaluation_due:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._stopped = self.control.should_training_stop = True

    def _left(self) -> dict[str, Any]:
        """What is still to be done of this step: an evaluation that a signal ended, the end of the epoch."""
        ends = float(self.state.epoch or 0).is_integer() or self.control.should_training_stop
        norm = self._step_figures[0]
        return {
            "evaluation": self._evaluation_due,
            "epoch_end": not self._at_epoch_end and (ends or self.control.should_epoch_stop),
            "grad_norm": None if norm is None else float(norm),
            "learning_rate": self._step_figures[1],
        }

    # -- losses and gradients that are not finite

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As transformers'; the batches of the step are held until it is taken."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._step_losses = samples, []
        return samples, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As TRL's; the loss of each micro-batch, however many parts it was computed in, is noted.

        Where `logging_nan_inf_filter` is on, a loss that is not finite counts as the mean of those before it in the
        log, as in transformers, which would read each one to find out.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss)
        if not self._filters_losses:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean.to(loss.device))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As transformers', called before the optimizer; a step that is not finite is left out.

        Its gradients are dropped, so that the optimizer has nothing to do, and it is reported as skipped, so that the
        schedule of the learning rate stays where it is; the data goes on. With fp16 torch's gradient scaler does the
        same, and lowers its scale. On a GPU, with `PHILORA_STACK=all`, a fused optimizer leaves the step out by itself,
        by a number on the device; the host reads a step's figures when the next one has been computed, and puts the
        schedule back then.

        Raises:
            NonFiniteError: It was one too many in a row.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self._nonfinite_limit() is None or self.is_deepspeed_enabled or not self._step_losses:
            return norm
        self._settle_step()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # each process holds a part of the sum
        losses = torch.stack(self._step_losses).float()
        loss = losses.sum()
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "sum")
        figures = torch.cat([torch.stack([loss, torch.as_tensor(norm).to(loss)]), losses])
        step = self.state.global_step + 1
        self._unread = _Unread(step, figures, self._step_batches, self._optimizer_that_leaves_out())
        if self._unread.optimizer is None:
            self._settle_step()
        else:
            self._unread.schedule = self.lr_scheduler.state_dict()
            self._unread.rates = [each["lr"] for each in self._unread.optimizer.param_groups]
            self._unread.optimizer.found_inf = (~figures[:2].isfinite().all()).float()  # type: ignore[attr-defined]
        return norm

    def _nonfinite_limit(self) -> int | None:
        return getattr(self.args, "max_nonfinite_steps", None)

    def _optimizer_that_leaves_out(self) -> torch.optim.Optimizer | None:
        """Return the optimizer, if a step is to be taken before its figures are read."""
        optimizer = cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))
        fused = bool(optimizer.defaults.get("fused")) and hasattr(optimizer, "_step_supports_amp_scaling")
        scaled = self.accelerator.scaler is not None
        return optimizer if reads_late(self.args.device.type, fused, scaled, stack_switch()) else None

    def _is_looked_at(self) -> bool:
        """Whether something is done after this step that its outcome matters to."""
        control = self.control
        return bool(
            control.should_log
            or control.should_save
            or control.should_evaluate
            or control.should_training_stop
            or control.should_epoch_stop
        )

    def _settle_step(self) -> None:
        """Read the figures of the step that was computed last, and do what follows from them, if that is still to do.

        Raises:
            NonFiniteError: It was one too many in a row that are not finite.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        value, length, *losses = unread.figures()
        scaled = self.accelerator.scaler is not None
        if self._watch.finite(value, 0.0 if scaled else length):
            median = self._watch.spike(value)
            if median is not None and self.args.should_save:
                text = "step %d: the loss jumps to %.4g, where the median of the last steps is %.4g."
                logger.warning(text, unread.step, value, median)
            if not scaled:
                self.optimizer._is_overflow = False
            return
        if unread.optimizer is not None:
            self._put_schedule_back(unread)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            if not scaled:
                self.optimizer._is_overflow = True
        logger.warning(
            "step %d is left out: loss %g, gradient norm %g; %d in a row, %d in all.",
            unread.step, value, length, self._watch.in_a_row, self._watch.total,
        )  # fmt: skip
        limit = self._nonfinite_limit() or 1
        if self._watch.in_a_row >= limit:
            file = self._write_nonfinite(unread, (value, length), losses)
            last = "none was written" if self._saved_step is None else f"the last one is checkpoint-{self._saved_step}"
            expected = f"a finite loss and gradient at least once in {limit} steps"
            todo = f"The examples of step {unread.step} are in {file}. Checkpoints are as they were, {last}"
            where, found = f"step {unread.step}", f"loss {value:g}, gradient norm {length:g}"
            raise NonFiniteError(fault(where, "training_config.max_nonfinite_steps", found, expected, todo))

    def _put_schedule_back(self, unread: _Unread) -> None:
        """Let the schedule of the learning rate be where it was before a step that was left out."""
        assert unread.optimizer is not None
        self.lr_scheduler.load_state_dict(unread.schedule)
        for group, rate in zip(unread.optimizer.param_groups, unread.rates, strict=True):
            group["lr"] = rate

    def _write_nonfinite(self, unread: _Unread, figures: tuple[float, float], losses: list[float]) -> Path:
        """Write which examples the step was made of: their tokens, and where they stand as far as that is known."""
        batches = []
        for batch, each in zip(unread.batches, losses, strict=False):
            examples = documents_of(batch)
            places = [{} for _ in examples] if self.places is None else self.places(examples)
            batches.append(
                {
                    "loss": str(each),
                    "examples": [
                        {"row": row, **place, "input_ids": ids}
                        for ids, row, place in zip(examples, self._rows_of(examples), places, strict=True)
                    ],
                }
            )
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = folder / f"{Path(NONFINITE_NAME).stem}{rank}.json"
        loss, length = map(str, figures)
        write_json(file, {"step": unread.step, "loss": loss, "gradient_norm": length, "micro_batches": batches})
        return file

    def _rows_of(self, examples: Sequence[Sequence[int]]) -> list[int | None]:
        """The row of the training set that each example stands in; a packed row holds several."""
        wanted: dict[tuple[int, ...], int | None] = {tuple(each): None for each in examples}
        data = self.train_dataset
        if not hasattr(data, "__len__") or "input_ids" not in (getattr(data, "column_names", None) or ()):
            return [None for _ in examples]
        for number, row in enumerate(data):
            start, lengths = 0, row.get("seq_lengths") or [len(row["input_ids"])]
            for length in lengths:
                part = tuple(row["input_ids"][start : start + length])
                start += length
                if part in wanted and wanted[part] is None:
                    wanted[part] = number
        return [wanted[tuple(each)] for each in examples]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the number of steps that were left out, once there is one.

        Durations are measured by a clock that nobody sets, where transformers takes them of the wall clock.
        """
        if "loss" in logs and self._watch.total:
            logs["nonfinite_steps"] = self._watch.total
        if self._evaluated is not None:
            (examples, seconds), self._evaluated = self._evaluated, None
            batches = math.ceil(examples / (self.args.eval_batch_size * self.args.world_size))
            for each in [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]:
                logs[f"{each}_runtime"] = round(seconds, 4)
                logs[f"{each}_samples_per_second"] = round(examples / max(seconds, 1e-9), 3)
                logs[f"{each}_steps_per_second"] = round(batches / max(seconds, 1e-9), 3)
        if start_time is not None:
            start_time = time.time() - self.training_seconds
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; how long it took is kept for the log."""
        began = time.monotonic()
        output = super().evaluation_loop(*args, **kwargs)
        self._evaluated = int(output.num_samples), time.monotonic() - began
        return output

    # -- checkpoints

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Put together the weights that processes share, for saving; every process has to call it.

        Under ZeRO-3 those that train, whatever `stage3_gather_16bit_weights_on_model_save` says: it stands for the
        whole model, and an adapter is small. The frozen base is not gathered.

        Returns:
            Tensors by name, in the first process; with ZeRO-3 None in the others.
        """
        if self.is_deepspeed_enabled and isinstance(self.model, PeftModel):
            stage = self.accelerator.deepspeed_config.get("zero_optimization", {}).get("stage")
            if stage == 3:
                gathered = self.model_wrapped._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
                return cast("dict[str, torch.Tensor] | None", gathered)
        return cast("dict[str, torch.Tensor]", self.accelerator.get_state_dict(self.model_wrapped))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else cast(str, super()._get_output_dir(trial))

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write TRL's card only where it is pushed: a folder of checkpoints is no model, and its card names "None"."""
        if self.args.push_to_hub:
            super().create_model_card(*arguments, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging folder, seal it, rename it, and only then remove older ones."""
        run = Path(super()._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staging = run / f"{TEMPORARY_PREFIX}checkpoints"
        best = self.state.best_global_step
        if self.args.should_save:
            self._require_room(run, final)
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            written = staging / final.name
            write_json(written / self._state_name(), self._exact_state())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
                    self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")
                    self.state.save_to_json(str(written / "trainer_state.json"))
                (written / "README.md").unlink(missing_ok=True)  # PEFT's template of a card, which says nothing
                seal(written, {"step": self.state.global_step})
                publish(written, final)
                best_folder = self.state.best_model_checkpoint
                rotate(run, final, self.args.save_total_limit, None if best_folder is None else Path(best_folder))
            self._saved_step = self.state.global_step
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not disk_full(error):
                raise
            raise _no_room(run, final, self._checkpoint_size(run), str(error)) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _checkpoint_size(self, run: Path) -> int:
        """What the next checkpoint takes: as much as the last one, else the estimate."""
        last = run / f"checkpoint-{self._saved_step}"
        return bytes_in(last) if last.is_dir() else checkpoint_bytes(self.model)

    def _require_room(self, run: Path, final: Path) -> None:
        """See to it, before anything is written, that a checkpoint fits beside those that are there."""
        size = self._checkpoint_size(run)
        if missing_bytes(run, size):
            raise _no_room(run, final, size, "No space left on device")


def reads_late(kind: str, fused: bool, scaled: bool, switch: str) -> bool:
    """Return whether a step is taken before its loss and gradient norm are read; no GPU has run that yet.

    Args:
        kind: Of the device.
        fused: Whether the optimizer is a fused one, which can leave a step out by a number on the device.
        scaled: Whether fp16's gradient scaler decides about steps.
        switch: `PHILORA_STACK`; "all" takes what no GPU has run yet.
    """
    return kind == "cuda" and fused and not scaled and switch == "all"


def chosen_of(arguments: SFTConfig) -> dict[str, Any]:
    """What was chosen for this machine and decides how a step rounds: the arguments of `CHOSEN`, and the threads."""
    chosen = {key: getattr(arguments, key) for key in CHOSEN}
    if getattr(arguments, "elementwise_recomputation", False):
        chosen["gradient_checkpointing"] = "elementwise"
    elif getattr(arguments, "inputs_on_host", False):
        chosen["gradient_checkpointing"] = "host"
    return {**chosen, "threads": torch.get_num_threads()}


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of a checkpoint, estimated: what trains, in its dtype, two moments of it in fp32, and the tokenizer.

    Optimizers with smaller states need less.
    """
    trained = sum(each.numel() * (each.element_size() + 8) for each in model.parameters() if each.requires_grad)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0)
    return int(trained) + vocabulary * _TOKENIZER_BYTES_PER_TOKEN + _SMALL_FILES_BYTES


def _random_states() -> Callable[[], None]:
    """What puts the random states back as they are now: Python's, NumPy's, torch's on the CPU and on each GPU."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)

    return put_back


def _no_room(run: Path, final: Path, size: int, why: str) -> RunError:
    free = shutil.disk_usage(run if run.exists() else run.parent).free
    todo = f"Free some space ({free:,} bytes are free), then {how_to_go_on(run)}; older checkpoints are as they were"
    return RunError(fault("checkpoint", "folder", str(final), f"room for about {size:,} bytes: {why}", todo))


def documents_of(batch: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of each example of a batch: packed rows are taken apart, padding is left out."""
    documents: list[list[int]] = []
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for index, row in enumerate(batch["input_ids"]):
        if positions is not None:
            starts = (positions[index] == 0).nonzero().flatten().tolist()
            documents += [row[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
        else:
            documents.append((row if mask is None else row[mask[index].bool()]).tolist())
    return documents


@contextlib.contextmanager
def _as_made(model: str | nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """In this block what trains is noted by the identity of its parameter, as it is before TRL changes its dtype.

    TRL makes the adapter in the middle of its constructor, which is why its `get_peft_model` is replaced meanwhile.
    """
    made: dict[int, torch.Tensor] = {}
    original = sft_trainer.get_peft_model

    def note(adapted: nn.Module) -> nn.Module:
        if isinstance(adapted, PeftModel):
            made.update((id(each), each.data) for each in adapted.parameters() if each.requires_grad)
        return adapted

    if isinstance(model, nn.Module):
        note(model)
    sft_trainer.get_peft_model = lambda *args, **options: note(original(*args, **options))
    try:
        yield made
    finally:
        sft_trainer.get_peft_model = original


def _without_pages(optimizer: torch.optim.Optimizer) -> None:
    """Turn off the paging of bitsandbytes' optimizer for parameters on a CPU, which it has none for; said once."""
    on_cpu = all(each.device.type == "cpu" for group in optimizer.param_groups for each in group["params"])
    if getattr(optimizer, "is_paged", False) and on_cpu:
        optimizer.is_paged = False  # type: ignore[attr-defined]
        logger.warning(
            "%s: paging moves states between a GPU and the machine's memory; on a CPU the same optimizer runs without.",
            type(optimizer).__name__,
        )


def _with_settings(args: Any, model: Any, settings: dict[str, Any]) -> trl.SFTConfig:
    """The trainer's arguments with the values of older keywords, which today are fields of the arguments."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return SFTConfig(f"{Path(name).name}-SFT", **settings)
    if isinstance(args, TrainingArguments) and not isinstance(args, trl.SFTConfig):
        fields = args.to_dict()
        fields["hub_token"] = args.hub_token  # to_dict hides it
        return SFTConfig(**(fields | settings))
    args = copy.copy(args)
    for name, value in settings.items():
        setattr(args, name, value)
    return args


def _with_batches_beside_the_work(args: trl.SFTConfig) -> trl.SFTConfig:
    """Return the arguments with batches copied to a GPU from pinned memory while it computes."""
    if args.device.type != "cuda" or not args.dataloader_pin_memory or args.accelerator_config.non_blocking:
        return args
    args = copy.copy(args)
    args.accelerator_config = dataclasses.replace(args.accelerator_config, non_blocking=True)
    return args


def _skeleton(name: str, args: Any) -> nn.Module:
    """Return the model that TRL will load, without weights, so that names are checked before gigabytes are read.

    As in TRL, the class is the one that the model's config names, else the one that its own code offers. Its own code
    runs only where `trust_remote_code` says so.
    """
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    trusts = bool(options.get("trust_remote_code", getattr(args, "trust_remote_code", False)))
    revision = {"revision": options["revision"]} if "revision" in options else {}
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusts, **revision)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if own is not None:
            return cast(nn.Module, own(config))
        offered = getattr(config, "auto_map", None) or {}
        kinds = (AutoModelForImageTextToText, AutoModelForCausalLM)
        kind = next((each for each in kinds if each.__name__ in offered), AutoModelForCausalLM)
        return cast(nn.Module, kind.from_config(config, trust_remote_code=trusts))
