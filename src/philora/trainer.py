"""`SFTConfig` and `SFTTrainer`: TRL's, with older spellings translated, strict targets, slices and the fast layers.

A script for TRL changes its import and nothing else; TRL's defaults stay TRL's.
"""

from __future__ import annotations

import copy
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
from philora.config import translate_trainer_keywords, translate_training_arguments
from philora.errors import ConfigError, RunError, fault, nearest, one_per_line
from philora.kernels.loss import add_label_head

logger = logging.getLogger(__name__)


class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` that also takes the spellings of older releases, each with one notice.

    Example:
        >>> SFTConfig("out", evaluation_strategy="no", warmup_ratio=0.2)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        translated, notices = translate_training_arguments(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        known = inspect.signature(trl.SFTConfig.__init__).parameters
        if not torch.accelerator.is_available() and "use_cpu" not in translated and not translated.get("fp16"):
            translated["use_cpu"] = True  # transformers refuses bf16 on a CPU that was not named
        unknown = [name for name in translated if name not in known]
        if unknown:
            rule = "a field of trl.SFTConfig"
            faults = [fault("SFTConfig", name, translated[name], rule, nearest(name, known)) for name in unknown]
            raise ConfigError(one_per_line(faults))
        super().__init__(*args, **translated)


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` whose LoRA names are checked, whose slices are slices, and whose layers are the fast ones.

    Takes all that TRL's takes, older keywords (`tokenizer`, `max_seq_length`, `dataset_text_field`, `packing`, ...)
    with one notice each, and slices of fused projections in `peft_config.target_modules`. Checkpoints are written to
    a temporary name, synced and renamed, and carry a manifest.

    Raises:
        TargetError: A name in `peft_config` matches nothing, or `lm_head` is a target (TRL computes the loss from
            the head's weight, so an adapter there would get no gradient).
        RunError: A checkpoint cannot be written; older ones are untouched.
    """

    _staging: Path | None = None  # where a checkpoint is being written, while it is

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
        optimize(self.model)
        add_label_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if resolution is not None:
            apply_slices(self.model, resolution.slices)

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
