"""Define `SFTConfig`: TRL's, with translations of older spellings and philora's own keys."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from philora.compat.trl import trl
from philora.configuration.fields import FIELDS, ONE_RATE_OPTIMIZERS
from philora.configuration.schema import Misfit
from philora.configuration.spellings import translate_training_arguments
from philora.errors import ConfigError, fault, nearest, one_per_line

logger = logging.getLogger(__name__)

CHOSEN = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_length",
    "bf16",
)
"""Arguments that a run chooses for its machine; a checkpoint stores them, because the steps depend on them."""

OWN_SETTINGS = ("loraplus_lr_ratio", "max_nonfinite_steps", "adapter_dtype", "deterministic")
"""philora's own fields of `SFTConfig` that a configuration may set."""


def _own(default: Any, text: str) -> Any:
    """Return a field with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(init=False)
class SFTConfig(trl.SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` that also takes the spellings of older releases, with a notice for each, and philora's own keys.

    `gradient_checkpointing="elementwise"`, or `elementwise_recomputation=True`, is between True and False: the same
    as `optimize(model, recomputation="elementwise")`. `"host"` recomputes complete layers as True does, from inputs
    that the decoder stack keeps in host memory.

    Raises:
        ConfigError: A name is unknown; `loraplus_lr_ratio` is not a number above 0, or the optimizer has only one
            learning rate; `max_nonfinite_steps` is not an integer of at least 1; `adapter_dtype` is neither float32 nor
            bfloat16; or `deterministic` is neither True nor False.

    Example:
        >>> SFTConfig("out", evaluation_strategy="no", warmup_ratio=0.2, loraplus_lr_ratio=16)  # doctest: +SKIP
    """

    loraplus_lr_ratio: float | None = _own(
        None, "LoRA+: the learning rate of B as a multiple of learning_rate; 16 in the paper."
    )
    max_nonfinite_steps: int | None = _own(
        None,
        "Steps with a loss or gradient that is not finite are skipped; this many in a row end the training. None: they "
        "are taken, as TRL does.",
    )
    adapter_dtype: str | None = _own(
        None,
        "float32 or bfloat16: the dtype that A and B are kept in. None: as PEFT makes them, float32, over quantised "
        "bases too, where TRL rounds them to bfloat16.",
    )
    deterministic: bool = _own(
        True,
        "Whether the decoder stack on a GPU gives the same bits when a step is repeated or resumed; False is faster by "
        "1% to 6%. transformers' `full_determinism` is about all of PyTorch.",
    )
    elementwise_recomputation: bool = _own(
        False, "Recompute the outputs of RMSNorm and SwiGLU in backward, not complete layers."
    )

    inputs_on_host = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given, notices = translate_training_arguments(kwargs)
        for notice in notices:
            logger.warning("%s", notice)
        names = [field.name for field in dataclasses.fields(self) if field.init]
        if not torch.accelerator.is_available() and "use_cpu" not in given and not given.get("fp16"):
            given["use_cpu"] = True  # transformers refuses bf16 on a CPU that was not named
        unknown = [name for name in given if name not in names]
        rule = "a field of trl.SFTConfig"
        faults = [fault("SFTConfig", name, given[name], rule, nearest(name, names)) for name in unknown]
        faults += [*self._take_own_settings(given), *self._take_checkpointing(given)]
        if faults:
            raise ConfigError(one_per_line(faults))
        super().__init__(*args, **given)
        if self.loraplus_lr_ratio is not None and self.optim in ONE_RATE_OPTIMIZERS:
            expected = f"None, because optim={self.optim.value!r} has one learning rate for all"
            todo = "Choose another optim, such as adamw_torch"
            raise ConfigError(fault("SFTConfig", "loraplus_lr_ratio", self.loraplus_lr_ratio, expected, todo))

    def _take_own_settings(self, given: dict[str, Any]) -> list[str]:
        """Move philora's own settings from `given` to attributes; return a message for every wrong one."""
        faults = []
        for name in OWN_SETTINGS:
            value = given.pop(name, True if name == "deterministic" else None)
            bound = FIELDS[f"training_config.{name}"].rule
            try:
                setattr(self, name, bound.read(value))
            except Misfit:
                faults.append(fault("SFTConfig", name, value, bound.text))
        return faults

    def _take_checkpointing(self, given: dict[str, Any]) -> list[str]:
        """Read which results are recomputed, leave TRL's part in `given`, and return messages for wrong values."""
        checkpointing = given.get("gradient_checkpointing")
        elementwise = bool(given.pop("elementwise_recomputation", False)) or checkpointing == "elementwise"
        self.inputs_on_host = checkpointing == "host"
        if self.inputs_on_host:
            checkpointing = given["gradient_checkpointing"] = True
        self.elementwise_recomputation = elementwise
        if elementwise:
            given["gradient_checkpointing"] = False
        if isinstance(checkpointing, str) and checkpointing != "elementwise":
            expected = "True, False, 'elementwise' or 'host'"
            return [fault("SFTConfig", "gradient_checkpointing", checkpointing, expected)]
        if elementwise and checkpointing is True:
            expected = "False, because gradient_checkpointing=True recomputes complete layers"
            return [fault("SFTConfig", "elementwise_recomputation", elementwise, expected)]
        return []


def chosen_of(arguments: SFTConfig) -> dict[str, Any]:
    """Return the choices for this machine that affect rounding: the arguments of `CHOSEN`, and the threads."""
    chosen = {key: getattr(arguments, key) for key in CHOSEN}
    if getattr(arguments, "elementwise_recomputation", False):
        chosen["gradient_checkpointing"] = "elementwise"
    elif getattr(arguments, "inputs_on_host", False):
        chosen["gradient_checkpointing"] = "host"
    return {**chosen, "threads": torch.get_num_threads()}


def complete_arguments(args: Any, model: Any, settings: dict[str, Any]) -> trl.SFTConfig:
    """Return the arguments of a trainer, complete and translated.

    Args:
        args: The given `args`: TRL's, transformers' or None.
        model: The model, or its name.
        settings: Values of older keywords, which are now fields of the arguments.
    """
    if settings or not isinstance(args, trl.SFTConfig):
        args = _with_settings(args, model, settings)
    if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
        logger.warning("activation_offloading is ignored: without a GPU activations are in host memory already")
        args = copy.copy(args)
        args.activation_offloading = False
    return _with_batches_beside_the_work(args)


def _with_settings(args: Any, model: Any, settings: dict[str, Any]) -> trl.SFTConfig:
    """Return the arguments with the values of older keywords."""
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
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
    """Return the arguments with batches copied from pinned memory to a GPU while it computes."""
    if args.device.type != "cuda" or not args.dataloader_pin_memory or args.accelerator_config.non_blocking:
        return args
    args = copy.copy(args)
    args.accelerator_config = dataclasses.replace(args.accelerator_config, non_blocking=True)
    return args
