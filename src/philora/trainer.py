"""`SFTConfig` and `SFTTrainer`: TRL's, with older spellings translated, strict targets, slices and the fast layers.

A script for TRL changes its import and nothing else; TRL's defaults stay TRL's.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import trl
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from philora.adapters import apply_slices, optimize, resolve_for_training
from philora.checkpoint import TEMPORARY_PREFIX, disk_full, publish, seal
from philora.config import FIELDS, ONE_RATE_OPTIMIZERS, translate_trainer_keywords, translate_training_arguments
from philora.data import length_notices
from philora.errors import ConfigError, RunError, fault, nearest, one_per_line
from philora.kernels.loss import add_label_head
from philora.lora.state import loraplus_fast_parameters, split_loraplus_groups
from philora.sampling import SharedSampler, can_share, with_empty_rows
from philora.schema import Misfit

logger = logging.getLogger(__name__)


@dataclasses.dataclass(init=False)
class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` that also takes the spellings of older releases, each with one notice, and a rate for LoRA+.

    `gradient_checkpointing="elementwise"`, or `elementwise_recomputation=True`, is the grade between True and False:
    `optimize(model, recomputation="elementwise")`.

    Raises:
        ConfigError: An unknown name, a `loraplus_lr_ratio` that is no number above 0, or one for an optimizer that
            has only one learning rate.

    Example:
        >>> SFTConfig("out", evaluation_strategy="no", warmup_ratio=0.2, loraplus_lr_ratio=16)  # doctest: +SKIP
    """

    loraplus_lr_ratio: float | None = dataclasses.field(
        default=None,
        metadata={"help": "LoRA+: the learning rate of B as a multiple of learning_rate; 16 in the paper."},
    )

    elementwise_recomputation: bool = dataclasses.field(
        default=False,
        metadata={"help": "Compute the outputs of RMSNorm and SwiGLU again in backward; not whole layers."},
    )

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
        ratio = translated.pop("loraplus_lr_ratio", None)
        bound = FIELDS["training_config.loraplus_lr_ratio"].rule
        try:
            self.loraplus_lr_ratio = bound.read(ratio)
        except Misfit:
            faults.append(fault("SFTConfig", "loraplus_lr_ratio", ratio, bound.text))
        checkpointing = translated.get("gradient_checkpointing")
        elementwise = bool(translated.pop("elementwise_recomputation", False)) or checkpointing == "elementwise"
        if isinstance(checkpointing, str) and checkpointing != "elementwise":
            faults.append(fault("SFTConfig", "gradient_checkpointing", checkpointing, "True, False or 'elementwise'"))
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


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` whose LoRA names are checked, whose slices are slices, and whose layers are the fast ones.

    Takes all that TRL's takes, older keywords (`tokenizer`, `max_seq_length`, `dataset_text_field`, `packing`, ...)
    with one notice each, and slices of fused projections in `peft_config.target_modules`. Checkpoints are written to
    a temporary name, synced and renamed, and carry a manifest. With `SFTConfig(loraplus_lr_ratio=...)` the optimizer
    that transformers makes gets groups of their own for B; what is logged as `learning_rate` is A's.

    Raises:
        ConfigError: `loraplus_lr_ratio` is given and no B trains.
        TargetError: A name in `peft_config` matches nothing, or `lm_head` is a target (TRL computes the loss from
            the head's weight, so an adapter there would get no gradient).
        RunError: A checkpoint cannot be written; older ones are untouched.
    """

    _staging: Path | None = None  # where a checkpoint is being written, while it is
    train_dataset: Any
    _shared_lengths: list[int] | None = None  # tokens of each row, where this trainer deals them to processes
    _loraplus_settled = False  # whether an optimizer was split, or it was said that a given one is not

    def __init__(self, model: str | PreTrainedModel | PeftModel, *args: Any, **kwargs: Any) -> None:
        settings, keywords, notices = translate_trainer_keywords(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        given = inspect.signature(trl.SFTTrainer.__init__).bind_partial(self, model, *args, **keywords).arguments
        given.pop("self")
        given.pop("model")
        if settings:
            given["args"] = _with_settings(given.get("args"), model, settings)
        resolution = None
        if isinstance(given.get("peft_config"), LoraConfig):
            skeleton = model if isinstance(model, nn.Module) else _skeleton(model, given.get("args"))
            resolution = resolve_for_training(skeleton, given["peft_config"])
            given["peft_config"] = resolution.config
        super().__init__(model, **given)
        text = self.model.config.get_text_config()
        if self.aux_loss_enabled and not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
            text.num_experts = text.num_local_experts  # TRL 1.16 reads this name; Phi-3.5-MoE has only the other
        elementwise = getattr(self.args, "elementwise_recomputation", False)
        optimize(self.model, recomputation="elementwise" if elementwise else None)
        add_label_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if resolution is not None:
            apply_slices(self.model, resolution.slices)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
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

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else cast(str, super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging folder, seal it, rename it, and only then remove older ones."""
        run = Path(super()._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        staging = run / f"{TEMPORARY_PREFIX}checkpoints"
        best = self.state.best_global_step
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = staging / final.name
                if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
                    self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")
                    self.state.save_to_json(str(written / "trainer_state.json"))
                seal(written, {"step": self.state.global_step})
                publish(written, final)
                rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not disk_full(error):
                raise
            todo = f"Free some space, then go on with --resume ({shutil.disk_usage(run).free:,} bytes are free)"
            raise RunError(fault("checkpoint", "folder", str(final), f"room to write it: {error}", todo)) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)


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


def _skeleton(name: str, args: Any) -> nn.Module:
    """The model that TRL will load, without weights, so that names are checked before gigabytes are read."""
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    chosen = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = AutoConfig.from_pretrained(name, **chosen)
    with torch.device("meta"):
        return cast(nn.Module, AutoModelForCausalLM.from_config(config))
