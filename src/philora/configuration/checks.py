"""Check settings against each other, and set the defaults that depend on other settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from philora.configuration.fields import FIELDS, LIBRARY, ONE_RATE_OPTIMIZERS
from philora.configuration.reader import Reader
from philora.configuration.sections import plain


def own_defaults(section: str) -> dict[str, Any]:
    """Return philora's own defaults for `training_config` or `peft_config`."""
    prefix = f"{section}."
    return {
        key.removeprefix(prefix): plain(item.default)
        for key, item in FIELDS.items()
        if key.startswith(prefix) and item.default is not LIBRARY
    }


def training_defaults(given: Mapping[str, Any], data: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """Return the defaults of `training_config`, which depend on the settings that are given."""
    preset = own_defaults("training_config")
    preset["output_dir"] = f"runs/{stem}"
    if isinstance(given.get("per_device_train_batch_size"), int) or "gradient_accumulation_steps" in given:
        preset["tokens_per_step"] = None  # the step is the product of the two, as in TRL
    if given.get("fp16"):
        preset["bf16"] = False
    if data.get("eval", 0.05) is None or (given.get("do_eval") is False and "eval_strategy" not in given):
        preset["eval_strategy"] = "no"
    if given.get("early_stopping_patience") is not None:
        preset["load_best_model_at_end"] = True  # without it transformers follows no metric
    if {**preset, **given}.get("load_best_model_at_end"):
        # The best checkpoint must be one that was evaluated, so a setting that is not given follows its counterpart.
        for one, other in (("eval_strategy", "save_strategy"), ("save_strategy", "eval_strategy")):
            if one in given and other not in given and given[one] != "best":
                preset[other] = given[one]
        for one, other in (("eval_steps", "save_steps"), ("save_steps", "eval_steps")):
            if given.get(one) is not None and other not in given:
                preset[other] = given[one]
    return {key: value for key, value in preset.items() if key not in given}


def check_training(
    given: Mapping[str, Any], defaults: Mapping[str, Any], data: Mapping[str, Any], reader: Reader
) -> None:
    """Record faults and notices of settings of `training_config` that do not fit together."""
    values = {**defaults, **given}

    def refuse(key: str, expected: str, todo: str = "") -> None:
        reader.fault(("training_config", key), values[key], expected, todo)

    _check_evaluation(given, values, data, refuse)
    _check_optimizer(values, refuse)
    for one, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if values.get(one) is True and values.get(other) is True:
            refuse(one, f"false, because {other} is true", "Choose one of the two")
    if values["max_length"] is None and values["packing"]:
        refuse("max_length", "a number, because packing fills rows of that length", "Or set packing to false")
    if values.get("dataloader_prefetch_factor") is not None and not values.get("dataloader_num_workers"):
        refuse("dataloader_prefetch_factor", "null, because dataloader_num_workers is 0")
    for key in ("dataset_text_field", "assistant_only_loss", "completion_only_loss"):
        if given.get(key) not in (None, True):
            reader.notices.append(
                f"{reader.place(('training_config', key))}: training_config.{key}={given[key]!r} has no effect: data "
                f"is read as data.format says, and the loss is on the assistant's turns only."
            )
    if isinstance(given.get("tokens_per_step"), int) and "gradient_accumulation_steps" in given:
        reader.notices.append(
            f"{reader.place(('training_config', 'tokens_per_step'))}: training_config.tokens_per_step and "
            f"gradient_accumulation_steps are both given: gradient_accumulation_steps applies."
        )


def _check_evaluation(
    given: Mapping[str, Any], values: Mapping[str, Any], data: Mapping[str, Any], refuse: Callable[..., None]
) -> None:
    """Refuse settings that need an evaluation during training which does not take place, or not at the right steps."""
    evaluates = values["eval_strategy"] != "no"
    turn_on = "Set eval_strategy to steps or epoch"
    if evaluates and data.get("eval", 0.05) is None:
        refuse("eval_strategy", "no, because data.eval is null", "Give data.eval, for example 0.05")
    if given.get("load_best_model_at_end") and not evaluates:
        refuse("load_best_model_at_end", "false, because eval_strategy is no", turn_on)
    elif evaluates and values.get("load_best_model_at_end") and values["save_strategy"] != "best":
        if values["eval_strategy"] != values["save_strategy"]:
            unequal = f"eval_strategy={values['eval_strategy']!r} and save_strategy={values['save_strategy']!r}"
            refuse("load_best_model_at_end", f"{unequal} to be equal", "Set both to steps or both to epoch")
        elif values["eval_strategy"] == "steps" and not _multiple(values["save_steps"], values["eval_steps"]):
            refuse("save_steps", f"a multiple of eval_steps={values['eval_steps']!r}, for load_best_model_at_end")
    if values.get("early_stopping_patience") is not None and not evaluates:
        refuse("early_stopping_patience", "null, because eval_strategy is no", turn_on)
    elif values.get("early_stopping_patience") is not None and not (
        values.get("load_best_model_at_end") or values.get("metric_for_best_model")
    ):
        refuse("early_stopping_patience", "load_best_model_at_end: true beside it, or a metric_for_best_model")
    if values["save_strategy"] == "best" and not evaluates:
        refuse("save_strategy", "evaluation in training for 'best'", turn_on)
    scheduler = values["lr_scheduler_type"]
    if scheduler in ("reduce_lr_on_plateau", "greedy") and not evaluates:
        refuse("lr_scheduler_type", f"evaluation in training for {scheduler!r}", turn_on)


def _check_optimizer(values: Mapping[str, Any], refuse: Callable[..., None]) -> None:
    """Refuse an optimizer that cannot have LoRA+'s two learning rates, or whose package is missing."""
    if values.get("loraplus_lr_ratio") is not None and values.get("optim") in ONE_RATE_OPTIMIZERS:
        expected = f"null, because optim={values['optim']!r} has one learning rate for all"
        refuse("loraplus_lr_ratio", expected, "Choose another optim, such as adamw_torch")
    optim = str(values.get("optim") or "")
    if (optim.startswith("paged_") or "8bit" in optim) and importlib.util.find_spec("bitsandbytes") is None:
        expected = "an optimizer of torch's, because bitsandbytes is not installed"
        refuse("optim", expected, "pip install 'philora[quantization]', or set adamw_torch")


def _multiple(save: float, evaluation: float | None) -> bool:
    if evaluation is None:
        return True
    if (save < 1) != (evaluation < 1):
        return False
    scale = 1_000_000  # the arithmetic of transformers, which avoids binary fractions
    return round(save * scale) % round(evaluation * scale) == 0


def check_lora(given: Mapping[str, Any], reader: Reader) -> None:
    """Record faults of `peft_config` that no single key shows."""

    def refuse(key: str, expected: str, todo: str = "") -> None:
        reader.fault(("peft_config", key), given[key], expected, todo)

    target = given.get("target_modules", "all-linear")
    if target in ([], "") and not given.get("target_parameters"):
        refuse("target_modules", "at least one module", "Use all-linear for every linear layer of the model")
    if isinstance(target, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if given.get(key) is not None:
                refuse(key, f"null, because target_modules={target!r} is one text", "Give target_modules as a list")
    elif given.get("layers_pattern") and given.get("layers_to_transform") is None:
        refuse("layers_pattern", "layers_to_transform beside it")
    if given.get("init_lora_weights") == "loftq" and not given.get("loftq_config"):
        todo = "For example loftq_config: {loftq_bits: 4, loftq_iter: 1}"
        refuse("init_lora_weights", "loftq_config beside 'loftq'", todo)
    if given.get("init_lora_weights") in ("eva", "corda", "lora_ga"):
        expected = "an initialisation that needs no pass over data beforehand, which a run does not make"
        refuse("init_lora_weights", expected, "Use true or pissa, or initialise in Python and train with SFTTrainer")
    if given.get("lora_bias") and given.get("use_dora"):
        refuse("lora_bias", "false, because use_dora is true")
