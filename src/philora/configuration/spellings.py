"""Translate older names of settings into those of the installed TRL and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from philora.configuration import schema
from philora.configuration.schema import Misfit, number
from philora.errors import ConfigError, fault, one_per_line

_RENAMED: Final = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "use_liger": "use_liger_kernel",
    "torchdynamo": "torch_compile_backend",
    "xpu_backend": "ddp_backend",
}
_DROPPED: Final = {
    "overwrite_output_dir": "a run is never overwritten: continue it with --resume, or give another output_dir",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR to place TensorBoard's files",
    "save_safetensors": "weights are always saved as safetensors",
    "fp16_backend": "torch's own mixed precision is the only one left",
    "half_precision_backend": "torch's own mixed precision is the only one left",
    "fp16_opt_level": "it belonged to Apex, which is no longer used",
    "jit_mode_eval": "transformers no longer has it",
    "use_ipex": "transformers no longer has it",
    "use_mps_device": "Apple's GPU is used when it is there",
    "past_index": "transformers no longer has it",
    "tpu_num_cores": "transformers no longer has it",
    "tpu_metrics_debug": "transformers no longer has it",
    "ray_scope": "transformers no longer has it",
    "mp_parameters": "transformers no longer has it",
    "use_legacy_prediction_loop": "transformers no longer has it",
    "push_to_hub_organization": "write the organisation into hub_model_id",
    "include_tokens_per_second": "philora always reports tokens per second",
    "dataset_batch_size": "TRL no longer has it",
    "num_of_sequences": "TRL no longer has it",
    "chars_per_token": "TRL no longer has it",
    "infinite": "TRL no longer has it",
}
# Keys whose value changes with the name: older key -> (today's key, today's value or None when nothing is to be set).
_CONVERTED: Final[Mapping[str, Callable[[Any], tuple[str, Any]]]] = {
    "group_by_length": lambda value: ("train_sampling_strategy", "group_by_length" if value else None),
    "adafactor": lambda value: ("optim", "adafactor" if value else None),
    "include_inputs_for_metrics": lambda value: ("include_for_metrics", ["inputs"] if value else None),
}
# Values that were renamed under a key that stayed.
_RENAMED_VALUES: Final = {
    ("packing_strategy", "bfd-requeue"): "bfd_split",
    ("optim", "adamw_hf"): "adamw_torch",
}


@dataclass
class Translation:
    """Keys in today's spelling, with notices and faults for the user.

    `came_from` maps today's key to the older one that it was read from. A fault is (key, value, expected, todo).
    """

    result: dict[str, Any]
    notices: list[tuple[str, str]]
    faults: list[tuple[str, Any, str, str]]
    came_from: dict[str, str]


def to_current_names(given: Mapping[str, Any]) -> Translation:
    """Translate the keys of a `training_config` to those of the installed TRL."""
    known = schema.training_fields()
    out = Translation({}, [], [], {})

    def move(old: str, new: str, value: Any) -> None:
        same = new in given and type(given[new]) is type(value) and given[new] == value
        if new in given and not same and given[new] is not None:
            todo = f"Remove {old}, the older spelling of {new}"
            out.faults.append((old, given[old], f"the same as {new}={given[new]!r}", todo))
            return
        out.result[new] = value
        out.came_from[new] = old
        out.notices.append((old, f"{old}={given[old]!r} is an older spelling: read as {new}={value!r}."))

    for key, value in given.items():
        if key in known or not isinstance(key, str):
            if isinstance(value, str) and (key, value) in _RENAMED_VALUES:
                today = _RENAMED_VALUES[key, value]
                out.notices.append((key, f"{key}={value!r} is an older spelling: read as {key}={today!r}."))
                value = today
            elif key == "model_init_kwargs" and isinstance(value, Mapping) and "torch_dtype" in value:
                value, notices, faults = rename_torch_dtype(value)
                out.notices += [(key, f"{key}.{text}") for text in notices]
                out.faults += [(f"{key}.{name}", older, rule, todo) for name, older, rule, todo in faults]
            out.result.setdefault(key, value)
        elif key == "warmup_ratio":
            _translate_warmup(value, given, out, move)
        elif key in _RENAMED:
            move(key, _RENAMED[key], value)
        elif key in _CONVERTED:
            new, today = _CONVERTED[key](value)
            if today is None or value is None:
                out.notices.append((key, f"{key}={value!r} is an older spelling of the default: ignored."))
            else:
                move(key, new, today)
        elif key in _DROPPED:
            out.notices.append((key, f"{key}={value!r} is left out: {_DROPPED[key]}."))
        else:
            out.result[key] = value
    return out


def _translate_warmup(value: Any, given: Mapping[str, Any], out: Translation, move: Any) -> None:
    """Translate the older `warmup_ratio` to `warmup_steps`, where a value below 1 is a fraction of the run."""
    if value is None:
        out.notices.append(("warmup_ratio", "warmup_ratio=None is an older spelling: left out."))
        return
    try:
        ratio = number(least=0, below=1).read(value)
    except Misfit:
        out.faults.append(("warmup_ratio", value, "a number of at least 0 and below 1", ""))
        return
    steps = given.get("warmup_steps")
    if ratio == 0 and steps:
        out.notices.append(("warmup_ratio", f"warmup_ratio={value!r} is left out: warmup_steps={steps!r} holds."))
    elif steps == 0 and ratio:  # the older defaults, which a dumped configuration carries, mean "not given"
        out.result["warmup_steps"] = ratio
        out.came_from["warmup_steps"] = "warmup_ratio"
        text = f"warmup_ratio={value!r} is an older spelling: read as warmup_steps={ratio!r}, a fraction of the run."
        out.notices.append(("warmup_ratio", text))
    else:
        move("warmup_ratio", "warmup_steps", ratio)


def rename_torch_dtype(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[tuple[str, Any, str, str]]]:
    """Rename `torch_dtype` to `dtype` in a mapping for a model; return the mapping, notices and faults."""
    result = {key: value for key, value in given.items() if key != "torch_dtype"}
    older = given["torch_dtype"]
    if result.get("dtype", older) not in (older, None):
        todo = "Remove torch_dtype, the older spelling of dtype"
        return result, [], [("torch_dtype", older, f"the same as dtype={result['dtype']!r}", todo)]
    result["dtype"] = older
    return result, [f"torch_dtype={older!r} is an older spelling: read as dtype={older!r}."], []


def translate_training_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put keywords of SFTConfig or TrainingArguments into the spelling of the installed version.

    Keys of the installed version do not change. Unknown keys do not either; the class refuses them.

    Args:
        given: Keywords, as for `SFTConfig(**given)`.

    Returns:
        The keywords in today's spelling, and a notice for every older one.

    Raises:
        ConfigError: An older and today's spelling of one setting are both given and differ.

    Example:
        >>> translate_training_arguments({"no_cuda": True})
        ({'use_cpu': True}, ['no_cuda=True is an older spelling: read as use_cpu=True.'])
    """
    out = to_current_names(given)
    if out.faults:
        raise ConfigError(one_per_line([fault("SFTConfig", *item) for item in out.faults]))
    return out.result, [text for _, text in out.notices]


_CONFIG_KEYWORDS: Final = (
    "max_seq_length",
    "dataset_text_field",
    "packing",
    "eval_packing",
    "dataset_num_proc",
    "dataset_batch_size",
    "dataset_kwargs",
    "model_init_kwargs",
    "neftune_noise_alpha",
    "num_of_sequences",
    "chars_per_token",
    "infinite",
)


def translate_trainer_keywords(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Divide keywords of SFTTrainer into those that SFTConfig takes today and those that the trainer takes.

    Args:
        given: Keywords, as for `SFTTrainer(**given)`.

    Returns:
        Keywords for SFTConfig, keywords for the trainer, and a notice for every one that moved.

    Raises:
        ConfigError: `tokenizer` and `processing_class` are both given and differ.

    Example:
        >>> translate_trainer_keywords({"model": "nano", "max_seq_length": 512})[:2]
        ({'max_length': 512}, {'model': 'nano'})
    """
    for_config: dict[str, Any] = {}
    for_trainer: dict[str, Any] = {}
    notices: list[str] = []
    for key, value in given.items():
        if key == "tokenizer":
            if given.get("processing_class") not in (None, value):
                todo = "Remove tokenizer, the older spelling of processing_class"
                raise ConfigError(fault("SFTTrainer", key, value, "the same as processing_class", todo))
            for_trainer["processing_class"] = value
            notices.append("tokenizer is an older keyword of SFTTrainer: read as processing_class.")
        elif key == "processing_class":
            for_trainer.setdefault(key, value)
        elif key not in _CONFIG_KEYWORDS:
            for_trainer[key] = value
        elif value is None:
            notices.append(f"{key}=None is an older keyword of SFTTrainer: left out.")
        elif key in _DROPPED:
            notices.append(f"{key}={value!r} is an older keyword of SFTTrainer and is left out: {_DROPPED[key]}.")
        else:
            today, _ = translate_training_arguments({key: value})
            for_config |= today
            said = f"{key}={value!r} is an older keyword of SFTTrainer: read as SFTConfig"
            notices += [f"{said}({name}={read!r})." for name, read in today.items()]
    return for_config, for_trainer, notices
