"""The configuration of a run: defaults, bounds, older spellings, and where each value came from.

A configuration is a YAML file, or the same dict in Python, with `KEY=VALUE` overrides on top. `load_config` checks
all of it before anything heavy is imported and reports every fault at once; what it returns is complete for
philora's own keys. Keys of TRL and PEFT that nobody names are left to TRL and PEFT, whose defaults are not copied.

Nothing here imports torch, transformers, TRL or PEFT: `philora.configuration.schema` reads their keys from their
source.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from philora.configuration import schema, yaml_text
from philora.configuration.schema import (
    FLAG,
    NULL,
    STEPS,
    TEXT,
    Misfit,
    Rule,
    exactly,
    mapping_of,
    number,
    one_of,
    union,
)
from philora.errors import ConfigError, fault, nearest, one_per_line
from philora.families import ALIASES, hub_id

_AUTO: Final = exactly("auto")
_COUNT: Final = number(least=1, whole=True)
_COUNT_OR_NULL: Final = union(_COUNT, NULL)
_TEXT_OR_NULL: Final = union(TEXT, NULL)

HELPDESK: Final = "helpdesk"
"""As `data.train` or `data.eval`: the chat dataset that is bundled with philora."""

DATA_FORMATS: Final = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "turns")
TURN_COLUMNS: Final = ("conversation", "role", "content", "time")
COLUMN_ROLES: Final = ("system", "user", "assistant", "prompt", "completion", "text", "messages", *TURN_COLUMNS)
TURN_ROLES: Final = ("system", "user", "assistant", "tool")
_DATA_SUFFIXES: Final = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".gz", ".zst")
_ATTENTION: Final = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
OWN_TRAINING_KEYS: Final = (
    "tokens_per_step",
    "early_stopping_patience",
    "loraplus_lr_ratio",
    "max_nonfinite_steps",
    "adapter_dtype",
    "deterministic",
)
"""Keys of `training_config` that are philora's own, not TRL's."""
ONE_RATE_OPTIMIZERS: Final = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
"""Values of `optim` that step inside the backward pass with one learning rate, so that LoRA+ cannot have two."""
_SECRETS: Final = ("training_config.hub_token",)


def _dtype(value: Any) -> str:
    # A Python caller may pass torch.bfloat16 itself, as the model card's script does.
    name = str(value).removeprefix("torch.")
    return str(one_of("auto", "float32", "bfloat16", "float16").read(name))


def _attention(value: Any) -> str:
    name = str(TEXT.read(value))
    if name not in _ATTENTION and nearest(name, _ATTENTION):
        raise Misfit
    return name


def _init_lora_weights(value: Any) -> bool | str:
    words = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica")
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value)):
        return value
    return str(one_of(*words).read(value))


def _task_type(value: Any) -> str:
    # A Python caller may pass PEFT's enumeration.
    return str(exactly("CAUSAL_LM").read(getattr(value, "value", value)))


def _template(value: Any) -> str:
    text = str(TEXT.read(value))
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise Misfit(f"{str(error).capitalize()}; a brace that is meant as text is doubled: {{{{ or }}}}") from None
    for _, column, specification, conversion in parts:
        if column is not None and (not column.strip() or specification or conversion):
            raise Misfit("Write a column's name between the braces, and {{ or }} for a brace that is meant as text")
    return text


def _setting(default: Any, rule: Rule, doc: str) -> Any:
    """A dataclass field that carries its rule and its line of documentation."""
    return dataclasses.field(default=default, metadata={"rule": rule, "doc": doc})


@dataclass(frozen=True)
class SourceConfig:
    """One source of training or evaluation data."""

    path: str = dataclasses.field(
        metadata={"rule": TEXT, "doc": "file, folder or hub id; `helpdesk` is the bundled chat set"}
    )
    subset: str | None = _setting(
        None, _TEXT_OR_NULL, "subset (configuration) of a hub dataset, or of a folder with a dataset card"
    )
    split: str | None = _setting(
        None, _TEXT_OR_NULL, "split to read, such as `train_sft`; of a JSON object with several lists, one of them"
    )
    limit: int | None = _setting(None, _COUNT_OR_NULL, "read this many records at most")
    columns: Mapping[str, str] | None = _setting(
        None,
        union(mapping_of(schema.ANYTHING), NULL),
        "templates from the dataset's columns to system, user, assistant, prompt, completion, text or messages; of "
        "one row for each message to conversation, role, content and time",
    )
    weight: float = _setting(
        1.0, number(above=0), "times that each row is taken in an epoch; a fraction takes a seeded sample"
    )
    streaming: bool = _setting(False, FLAG, "stream a hub dataset instead of downloading it first")
    format: str | None = _setting(
        None, union(one_of(*DATA_FORMATS), NULL), "shape of this source's records; null: as `data.format`"
    )
    roles: Mapping[str, str] | None = _setting(
        None,
        union(mapping_of(one_of(*TURN_ROLES)), NULL),
        "of one row for each message: what values of the role's column mean, such as `{Ann: assistant}`; `*` means all "
        "others",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is loaded."""

    name_or_path: str = _setting(
        "nano", TEXT, "hub id, short name such as `phi-3-mini`, local folder, or `nano` for the bundled model"
    )
    adapter: str | None = _setting(None, _TEXT_OR_NULL, "adapter to start from: folder or hub id")
    use_cache: bool = _setting(False, FLAG, "key/value cache in training forward passes")
    dtype: str = _setting(
        "auto",
        Rule("one of auto, float32, bfloat16, float16", _dtype, ("auto", "float32", "bfloat16", "float16")),
        "dtype of the base weights; auto: bfloat16 where the hardware has it, else float32",
    )
    attn_implementation: str = _setting(
        "auto",
        Rule("one of " + ", ".join(_ATTENTION) + ", or the name of another implementation", _attention, _ATTENTION),
        "attention implementation; auto: the fastest that is exact here",
    )
    quantization: str | Mapping[str, Any] = _setting(
        "none",
        union(
            one_of("none", "nf4", "int8"),
            Rule("a mapping of BitsAndBytesConfig's keys", mapping_of(schema.ANYTHING).read),
        ),
        "quantised base: none, nf4 (with double quantisation), int8, or a BitsAndBytesConfig as a mapping",
    )
    base_products: str | None = _setting(
        None,
        union(one_of("auto", "int8", "fp8"), NULL),
        "how the frozen weights' products are computed in training: null or auto: in their dtype; fp8: on a CUDA GPU",
    )
    revision: str | None = _setting(None, _TEXT_OR_NULL, "branch, tag or commit on the hub")
    trust_remote_code: bool = _setting(False, FLAG, "run Python code that the model's repository ships")
    device_map: str | Mapping[str, Any] | None = _setting(
        None, union(TEXT, mapping_of(schema.ANYTHING), NULL), "device map of transformers; null: one device"
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """Changes to the model's tokenizer; null leaves what the model brings."""

    model_max_length: int | None = _setting(None, union(number(least=8, whole=True), NULL), "window in tokens")
    padding_side: str | None = _setting(None, union(one_of("left", "right"), NULL), "side that is padded")
    pad_token: str | None = _setting(None, _TEXT_OR_NULL, "padding token; null: one that is no stop token is chosen")


@dataclass(frozen=True)
class DataConfig:
    """The data and how it is read."""

    train: tuple[SourceConfig, ...] = dataclasses.field(
        metadata={
            "rule": Rule("a file, a folder, a hub id, a mapping with a path, or a list of these", lambda value: value),
            "doc": "what to train on; `helpdesk` is the bundled chat set",
        }
    )
    eval: tuple[SourceConfig, ...] | float | None = _setting(
        0.05,
        Rule(
            "the same as data.train, a fraction of it above 0 and below 1, a number of rows, or null",
            lambda value: value,
            null=True,
        ),
        "held-out data: a source, or what is held out of `train` with the seed: a number of rows, or a fraction, which "
        "is at least 32 rows where they are no more than a fifth",
    )
    format: str = _setting("auto", one_of(*DATA_FORMATS), "shape of the records")
    overlong: str = _setting(
        "truncate", one_of("truncate", "drop"), "what happens to an example longer than `max_length`"
    )
    invalid: str = _setting(
        "error", one_of("error", "drop"), "what happens to a record that cannot be used; drop: left out and listed"
    )
    num_proc: int | None = _setting(None, _COUNT_OR_NULL, "processes that tokenise; null: all cores")
    cache_dir: str | None = _setting(None, _TEXT_OR_NULL, "folder of the token cache; null: the user's cache folder")
    keep_held_out: bool = _setting(
        True,
        FLAG,
        "write the held-out rows to `held_out.jsonl` in the run folder, so that `evaluate` needs no data file; "
        "false: for data that must not be copied",
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation before and after training."""

    generate: int = _setting(
        64, number(least=0, whole=True), "held-out conversations that get a generated answer; 0: none"
    )
    max_new_tokens: int = _setting(256, _COUNT, "length limit of a generated answer, in tokens")
    batch_size: int = _setting(16, _COUNT, "answers generated at a time")
    samples: int = _setting(3, number(least=0, whole=True), "answers shown in the table and the report")


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        training_config: Keywords of `trl.SFTConfig` and philora's own; values may be "auto" where philora chooses.
        peft_config: Keywords of `peft.LoraConfig`.
        source: The file, or "python".
        origins: For each key its origin: "default", the file, "command line" or "python".
        notices: What the reader should be told, such as older spellings that were translated.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    evaluation: EvaluationConfig
    training_config: dict[str, Any]
    peft_config: dict[str, Any]
    source: str = dataclasses.field(default="python", compare=False)
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    notices: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in the shape of the YAML file; `load_config` of it gives an equal Config."""
        sections: dict[str, Any] = {
            name: {field.name: _plain(getattr(getattr(self, name), field.name)) for field in dataclasses.fields(kind)}
            for name, kind in _SECTIONS.items()
        }
        sections["training_config"] = _plain(self.training_config)
        sections["peft_config"] = _plain(self.peft_config)
        return sections


_SECTIONS: Final[dict[str, type]] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, SourceConfig):
        given = {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name == "path" or getattr(value, field.name) != field.default
        }
        return given["path"] if len(given) == 1 else given
    if isinstance(value, tuple) and value and all(isinstance(each, SourceConfig) for each in value):
        return _plain(value[0]) if len(value) == 1 else [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


@dataclass(frozen=True)
class Field:
    """One key that philora states a default or a bound for.

    Attributes:
        key: Dotted path.
        default: The value when the key is not given, or `LIBRARY` where TRL's or PEFT's default holds.
        rule: The bound.
        doc: One line of documentation.
    """

    key: str
    default: Any
    rule: Rule
    doc: str


LIBRARY: Final = schema.UNKNOWN
"""As a default in `FIELDS`: the key is not set, and TRL's or PEFT's own default holds."""

_REQUIRED: Final = dataclasses.MISSING
_SMALL_BETA: Final = number(least=0, below=1)
_RATIO_OR_STEPS: Final = dataclasses.replace(
    union(number(least=0, below=1), _COUNT),
    text="a fraction of the run of at least 0 and below 1, or a whole number of steps of at least 1",
)

_LIBRARY_FIELDS: Final = (
    Field("training_config.output_dir", "runs/<name of the config file>", TEXT, "run folder"),
    Field("training_config.num_train_epochs", 3, number(above=0), "passes over the training data"),
    Field(
        "training_config.max_steps",
        LIBRARY,
        dataclasses.replace(union(_COUNT, exactly(-1)), text="a whole number of at least 1, or -1 for no limit"),
        "optimizer steps; when given it replaces num_train_epochs",
    ),
    Field(
        "training_config.learning_rate",
        "auto",
        union(number(above=0), _AUTO),
        "peak learning rate; auto: 2e-4 * 3072 / the model's hidden size",
    ),
    Field(
        "training_config.lr_scheduler_type",
        "cosine",
        Rule("", lambda value: value),  # the words come from the installed transformers
        "shape of the learning rate over the run",
    ),
    Field(
        "training_config.loraplus_lr_ratio",
        None,
        union(number(above=0), NULL),
        "LoRA+: B's learning rate as a multiple of learning_rate (philora's own key), 16 in the paper; null: the same",
    ),
    Field(
        "training_config.adapter_dtype",
        None,
        union(one_of("float32", "bfloat16"), NULL),
        "dtype of A and B (philora's own key); null: as PEFT makes them, float32, over quantised bases too",
    ),
    Field(
        "training_config.deterministic",
        True,
        FLAG,
        "whether the decoder stack on a GPU gives the same bits when repeated or resumed (philora's own key)",
    ),
    Field("training_config.warmup_steps", 0.03, _RATIO_OR_STEPS, "warm-up: fraction of the run, or optimizer steps"),
    Field("training_config.weight_decay", LIBRARY, number(least=0), "decoupled weight decay"),
    Field("training_config.adam_beta1", LIBRARY, _SMALL_BETA, "decay of Adam's first moment"),
    Field("training_config.adam_beta2", LIBRARY, _SMALL_BETA, "decay of Adam's second moment"),
    Field("training_config.adam_epsilon", LIBRARY, number(above=0), "Adam's denominator offset"),
    Field("training_config.max_grad_norm", LIBRARY, number(least=0), "gradient clipping norm; 0: no clipping"),
    Field("training_config.label_smoothing_factor", LIBRARY, _SMALL_BETA, "label smoothing"),
    Field(
        "training_config.neftune_noise_alpha",
        LIBRARY,
        union(number(above=0), NULL),
        "noise on the embeddings (NEFTune); null: none",
    ),
    Field(
        "training_config.per_device_train_batch_size",
        "auto",
        union(_COUNT, _AUTO),
        "rows of a micro-batch; auto: from the memory estimate",
    ),
    Field(
        "training_config.per_device_eval_batch_size",
        "auto",
        union(_COUNT, _AUTO),
        "rows of an evaluation batch; auto: from the memory estimate",
    ),
    Field(
        "training_config.gradient_accumulation_steps",
        LIBRARY,
        _COUNT,
        "micro-batches of an optimizer step; not given: as tokens_per_step needs",
    ),
    Field(
        "training_config.tokens_per_step",
        "auto",
        union(_COUNT, _AUTO, NULL),
        "tokens of an optimizer step on all devices together, reached by accumulation (philora's own key); "
        "null, and so where one of the two is given: batch size times gradient_accumulation_steps",
    ),
    Field(
        "training_config.gradient_checkpointing",
        "auto",
        union(FLAG, exactly("elementwise"), _AUTO),
        "activations computed again in backward to save memory: none (false), the outputs of RMSNorm and SwiGLU "
        "(elementwise), whole layers (true); auto: the least that the memory estimate asks for",
    ),
    Field(
        "training_config.gradient_checkpointing_kwargs",
        {"use_reentrant": False},
        union(mapping_of(schema.ANYTHING), NULL),
        "keywords of torch's checkpointing",
    ),
    Field(
        "training_config.bf16",
        "auto",
        union(FLAG, _AUTO, NULL),
        "bfloat16 autocast; auto: only where bf16 weights meet whole modules that train (modules_to_save)",
    ),
    Field("training_config.max_length", 2048, union(number(least=8, whole=True), NULL), "row length in tokens"),
    Field("training_config.packing", True, FLAG, "pack several examples into a row, isolated from each other"),
    Field(
        "training_config.pad_to_multiple_of",
        LIBRARY,
        union(_COUNT, _AUTO, NULL),
        "pad rows to a multiple of this many tokens",
    ),
    Field("training_config.dataset_num_proc", LIBRARY, _COUNT_OR_NULL, "processes that TRL tokenises with"),
    Field(
        "training_config.logging_steps",
        10,
        STEPS,
        "steps between log lines; where it is not set, fewer in a short run, for a curve of 100 points",
    ),
    Field("training_config.eval_strategy", "steps", Rule("", lambda value: value), "when to evaluate in training"),
    Field("training_config.eval_steps", 0.1, union(STEPS, NULL), "steps between evaluations"),
    Field("training_config.eval_delay", LIBRARY, number(least=0), "steps or epochs before the first evaluation"),
    Field("training_config.eval_accumulation_steps", LIBRARY, _COUNT_OR_NULL, "evaluation steps kept on the device"),
    Field("training_config.save_strategy", "steps", Rule("", lambda value: value), "when to save a checkpoint"),
    Field("training_config.save_steps", 0.1, STEPS, "steps between checkpoints"),
    Field(
        "training_config.early_stopping_patience",
        None,
        _COUNT_OR_NULL,
        "stop after this many evaluations without improvement (philora's own key); null: never",
    ),
    Field(
        "training_config.max_nonfinite_steps",
        5,
        _COUNT_OR_NULL,
        "steps whose loss or gradient is not finite are skipped; this many in a row end the run (philora's own key); "
        "null: they are taken",
    ),
    Field("training_config.save_total_limit", 2, _COUNT_OR_NULL, "checkpoints kept; null: all"),
    Field("training_config.seed", 42, number(least=0, whole=True), "seed of data order, dropout and initialisation"),
    Field("training_config.data_seed", LIBRARY, union(number(least=0, whole=True), NULL), "seed of the data order"),
    Field("training_config.report_to", "none", Rule("", lambda value: value), "trackers, such as tensorboard or wandb"),
    Field(
        "training_config.dataloader_num_workers", LIBRARY, number(least=0, whole=True), "processes that load batches"
    ),
    Field("training_config.dataloader_prefetch_factor", LIBRARY, _COUNT_OR_NULL, "batches loaded ahead by a worker"),
    Field("training_config.torch_empty_cache_steps", LIBRARY, _COUNT_OR_NULL, "steps between emptying torch's cache"),
    Field("training_config.ddp_timeout", LIBRARY, _COUNT, "seconds before a collective gives up"),
    Field(
        "training_config.fsdp",
        LIBRARY,
        union(FLAG, TEXT, NULL),
        "shard the model over several processes on GPUs, as fsdp_config says",
    ),
    Field(
        "training_config.include_num_input_tokens_seen",
        LIBRARY,
        union(one_of("all", "non_padding", "no"), FLAG),
        "count the tokens seen",
    ),
    Field("peft_config.r", 16, _COUNT, "rank of the adapters"),
    Field("peft_config.lora_alpha", 32, number(above=0), "numerator of the multiplier: alpha/r, or alpha/sqrt(r)"),
    Field("peft_config.lora_dropout", 0.05, _SMALL_BETA, "dropout on the input of the adapters"),
    Field("peft_config.bias", "none", Rule("", lambda value: value), "which biases train"),
    Field("peft_config.task_type", "CAUSAL_LM", Rule("CAUSAL_LM", _task_type, ("CAUSAL_LM",)), "PEFT's task"),
    Field("peft_config.peft_type", LIBRARY, union(one_of("LORA"), NULL), "PEFT's method; the configuration is LoRA's"),
    Field("peft_config.inference_mode", LIBRARY, exactly(False), "true would freeze the adapters"),
    Field(
        "peft_config.target_modules",
        "all-linear",
        Rule("", lambda value: value),
        "modules to adapt; also q_proj, k_proj, v_proj, gate_proj and up_proj as slices of Phi's fused modules",
    ),
    Field(
        "peft_config.init_lora_weights",
        LIBRARY,
        Rule(
            "true, false, gaussian, eva, olora, pissa, pissa_niter_N, corda, loftq, lora_ga, orthogonal or mica",
            _init_lora_weights,
            ("gaussian", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal"),
        ),
        "how A and B start",
    ),
    Field("peft_config.rank_pattern", LIBRARY, union(mapping_of(_COUNT), NULL), "ranks of single modules"),
    Field("peft_config.alpha_pattern", LIBRARY, union(mapping_of(number(above=0)), NULL), "alphas of single modules"),
    Field("peft_config.qalora_group_size", LIBRARY, _COUNT, "group size of QA-LoRA"),
)


def _own_fields() -> Iterable[Field]:
    for section, kind in _SECTIONS.items():
        for each in dataclasses.fields(kind):
            yield Field(f"{section}.{each.name}", each.default, each.metadata["rule"], each.metadata["doc"])


FIELDS: Final[Mapping[str, Field]] = {each.key: each for each in (*_own_fields(), *_LIBRARY_FIELDS)}
"""Every key that philora states a default or a bound for, in the order of the documentation."""


def _rule_of(section: str, key: str) -> Rule | None:
    """The rule of a key of a library section, or None where the installed library has no such key."""
    own = FIELDS.get(f"{section}.{key}")
    library = (schema.training_fields() if section == "training_config" else schema.lora_fields()).get(key)
    if own is not None and own.rule.text:
        return own.rule if library is not None or key in OWN_TRAINING_KEYS else None
    return None if library is None else library.rule


# --- older spellings ------------------------------------------------------------------------------------------------

_RENAMED: Final = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
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
class _Translation:
    """Keys in today's spelling, with what to tell the reader.

    `came_from` maps today's key to the older one that it was read from. A fault is (key, value, expected, todo).
    """

    result: dict[str, Any]
    notices: list[tuple[str, str]]
    faults: list[tuple[str, Any, str, str]]
    came_from: dict[str, str]


def _translate(given: Mapping[str, Any]) -> _Translation:
    known = schema.training_fields()
    out = _Translation({}, [], [], {})

    def move(old: str, new: str, value: Any) -> None:
        same = new in given and type(given[new]) is type(value) and given[new] == value
        if new in given and not same and given[new] is not None:
            out.faults.append(
                (old, given[old], f"the same as {new}={given[new]!r}", f"Remove {old}, the older spelling of {new}")
            )
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
                value, notices, faults = _rename_torch_dtype(value)
                out.notices += [(key, f"{key}.{text}") for text in notices]
                out.faults += [(f"{key}.{name}", older, rule, todo) for name, older, rule, todo in faults]
            out.result.setdefault(key, value)
        elif key == "warmup_ratio":
            _translate_warmup(value, given, out, move)
        elif key in _RENAMED and _RENAMED[key] in known:
            move(key, _RENAMED[key], value)
        elif key in _CONVERTED:
            new, today = _CONVERTED[key](value)
            if today is None or value is None:
                out.notices.append((key, f"{key}={value!r} is an older spelling of what holds by default: left out."))
            else:
                move(key, new, today)
        elif key in _DROPPED:
            out.notices.append((key, f"{key}={value!r} is left out: {_DROPPED[key]}."))
        else:
            out.result[key] = value
    return out


def _translate_warmup(value: Any, given: Mapping[str, Any], out: _Translation, move: Any) -> None:
    """Older `warmup_ratio` to today's `warmup_steps`, where a value below 1 is a fraction of the run."""
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


def _rename_torch_dtype(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[tuple[str, Any, str, str]]]:
    """`torch_dtype`, the older spelling of `dtype`, in a mapping for a model."""
    result = {key: value for key, value in given.items() if key != "torch_dtype"}
    older = given["torch_dtype"]
    if result.get("dtype", older) not in (older, None):
        todo = "Remove torch_dtype, the older spelling of dtype"
        return result, [], [("torch_dtype", older, f"the same as dtype={result['dtype']!r}", todo)]
    result["dtype"] = older
    return result, [f"torch_dtype={older!r} is an older spelling: read as dtype={older!r}."], []


def translate_training_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put keywords of SFTConfig or TrainingArguments into the spelling of the installed version.

    Keys that the installed version has are left as they are; so are unknown ones, for the class to refuse.

    Args:
        given: Keywords, as for `SFTConfig(**given)`.

    Returns:
        The keywords in today's spelling, and one notice for each older one.

    Raises:
        ConfigError: An older and today's spelling of one thing are both given and differ.

    Example:
        >>> translate_training_arguments({"no_cuda": True})
        ({'use_cpu': True}, ['no_cuda=True is an older spelling: read as use_cpu=True.'])
    """
    out = _translate(given)
    if out.faults:
        raise ConfigError(one_per_line([fault("SFTConfig", *each) for each in out.faults]))
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
    """Sort older keywords of SFTTrainer into those that SFTConfig takes today and those that the trainer takes.

    Args:
        given: Keywords, as for `SFTTrainer(**given)`.

    Returns:
        Keywords for SFTConfig, keywords for the trainer, and one notice for each that moved.

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
            for name, read in today.items():
                notices.append(
                    f"{key}={value!r} is an older keyword of SFTTrainer: read as SFTConfig({name}={read!r})."
                )
    return for_config, for_trainer, notices


# --- reading --------------------------------------------------------------------------------------------------------

_Path = tuple[str, ...]


def _fault(where: str, name: str, value: object, expected: str, todo: str = "") -> str:
    """`errors.fault`, without a full stop behind the question of `nearest`."""
    text = fault(where, name, value, expected, todo)
    return text[:-1] if text.endswith("?.") else text


class _Reader:
    """Collects what was given, where each key stands, and every fault."""

    def __init__(self, where: str, origin: str) -> None:
        self.where = where
        self.origin = origin
        self.given: dict[str, Any] = {}
        self.places: dict[_Path, str] = {}
        self.origins: dict[_Path, str] = {}
        self.faults: list[str] = []
        self.notices: list[str] = []

    def place(self, path: _Path) -> str:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.where)

    def origin_of(self, path: _Path) -> str:
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.origin)

    def fault(self, path: _Path, value: Any, expected: str, todo: str = "") -> None:
        self.faults.append(_fault(self.place(path), ".".join(path), value, expected, todo))

    def is_section(self, section: str) -> bool:
        """Whether a section is absent or a mapping; another kind of value has a fault of its own."""
        return self.given.get(section) is None or isinstance(self.given[section], Mapping)

    def read(self, path: _Path, value: Any, rule: Rule) -> Any:
        """The value as the rule reads it; a misfit is recorded, and None returned."""
        try:
            return rule.read(value)
        except Misfit as misfit:
            hint = misfit.hint
            if not hint and isinstance(value, str):
                hint = "YAML writes null, not None" if value == "None" and rule.null else nearest(value, rule.choices)
            self.fault(path, value, rule.text, hint)
            return None

    # -- older spellings, layer by layer, so that an override in one spelling replaces a file's value in another

    def translate(self) -> None:
        """Put the given mapping into today's spelling."""
        training = self.given.get("training_config")
        if isinstance(training, Mapping):
            out = _translate(training)
            for today, older in out.came_from.items():
                self.places["training_config", today] = self.place(("training_config", older))
            for key, text in out.notices:
                self.notices.append(f"{self.place(('training_config', key))}: training_config.{text}")
            for key, *rest in out.faults:
                self.fault(("training_config", *key.split(".")), *rest)
            for newer, own in (
                ("activation_checkpointing", "gradient_checkpointing"),
                ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
            ):
                self._join(out.result, newer, own)
            self.given["training_config"] = out.result
        model = self.given.get("model")
        if isinstance(model, Mapping) and "torch_dtype" in model:
            self.places["model", "dtype"] = self.place(("model", "torch_dtype"))
            result, notices, faults = _rename_torch_dtype(model)
            self.notices += [f"{self.place(('model', 'torch_dtype'))}: model.{text}" for text in notices]
            for key, *rest in faults:
                self.fault(("model", key), *rest)
            self.given["model"] = result

    def _join(self, training: dict[str, Any], newer: str, own: str) -> None:
        """transformers has two names for recomputation; philora keeps the one that all supported versions have."""
        if newer not in training:
            return
        value = training.pop(newer)
        path = ("training_config", newer)
        if value is None:
            return
        if own in training and training[own] != value:
            self.fault(
                path, value, f"the same as {own}={training[own]!r}", "Remove one of the two, which are one setting"
            )
        training[own] = value
        self.places["training_config", own] = self.place(path)
        self.notices.append(f"{self.place(path)}: training_config.{newer}={value!r} is read as {own}={value!r}.")

    # -- overrides

    def override(self, text: str) -> None:
        """Apply one `KEY=VALUE`."""
        key, equals, written = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self.faults.append(
                _fault("command line", "override", text, "KEY=VALUE", "For example training_config.learning_rate=1e-4")
            )
            return
        try:
            value = yaml_text.parse(written)[1] if written.strip() else None
        except yaml_text.NOT_YAML as error:
            problem = getattr(error, "problem", None) or "not YAML"
            self.faults.append(
                _fault("command line", key, written, "a YAML value", f"{str(problem).capitalize()}; quote the value")
            )
            return
        path = tuple(key.split("."))
        layer = _Reader("command line", "command line")
        layer.given = _nested(path, value)
        layer.translate()
        self.notices += layer.notices
        self.faults += layer.faults
        # What translation dropped leaves an empty section, and then there is nothing to apply.
        for leaf_path, leaf in _leaves(layer.given, len(path)):
            self._set(leaf_path, leaf)

    def _set(self, path: _Path, value: Any) -> None:
        target = self.given
        for depth, name in enumerate(path[:-1], 1):
            inner = target.get(name)
            if isinstance(inner, str) and path[:depth] in (("data", "train"), ("data", "eval")):
                inner = {"path": inner}
            if inner is None:
                inner = {}
            if not isinstance(inner, Mapping):
                self.places[path] = "command line"
                self.fault(path, value, f"{'.'.join(path[:depth])} to be a mapping", "Give the whole value instead")
                return
            target[name] = inner = dict(inner)
            target = inner
        target[path[-1]] = value
        self.places[path] = self.origins[path] = self.origins[path[:2]] = "command line"


def _nested(path: _Path, value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return dict(value)


def _leaves(given: Mapping[str, Any], depth: int, prefix: _Path = ()) -> Iterable[tuple[_Path, Any]]:
    """What stands `depth` levels down a mapping; nearer where the mapping ends before."""
    for key, value in given.items():
        path = (*prefix, key)
        if depth > 1 and isinstance(value, Mapping):
            yield from _leaves(value, depth - 1, path)
        else:
            yield path, value


_MOST_BYTES = 1 << 20


def _read_yaml(file: Path, reader: _Reader) -> None:
    """Fill the reader from a file, with the line of each key; raises where the file is no YAML mapping."""
    where = reader.where
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(fault(where, "bytes", file.stat().st_size, f"at most {_MOST_BYTES:,}", "Is it the data?"))
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = error.object[error.start : error.start + 1]
        raise ConfigError(
            fault(f"{where}:{line}", "encoding", found, "UTF-8 text", "Save the file as UTF-8")
        ) from error
    except OSError as error:
        raise ConfigError(fault(where, "file", str(file), "a readable file", str(error.strerror))) from error
    try:
        node, value = yaml_text.parse(content)
        if node is not None:
            _note_lines(node, (), reader, set())
            reader.given = value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        text = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{at}: {text} - expected YAML. Check the line and the one above it.") from error
    except yaml_text.NOT_YAML as error:
        at = f":{content.count(chr(10), 0, error.position) + 1}" if isinstance(error, yaml.reader.ReaderError) else ""
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{where}{at}: {reason} - expected YAML. Remove what is not text.") from error
    if node is None or reader.given is None:
        raise ConfigError(
            f"{where}: the file is empty - expected a configuration with at least data.train. See `philora demo`."
        )
    if not isinstance(reader.given, dict):
        raise ConfigError(
            fault(where, "the file", reader.given, "a mapping with sections such as data and training_config")
        )


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, with nothing in it checked or translated.

    Raises:
        ConfigError: The file cannot be read, or holds no mapping.
    """
    reader = _Reader(str(file), str(file))
    _read_yaml(file, reader)
    return reader.given


def _note_lines(node: yaml.Node, path: _Path, reader: _Reader, seen: set[int]) -> None:
    """Record the line of every key, and a fault for each key that stands twice in one mapping."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode) and path:
        for index, each in enumerate(node.value):
            inner = (*path[:-1], f"{path[-1]}[{index}]")
            reader.places.setdefault(inner, f"{reader.where}:{each.start_mark.line + 1}")
            _note_lines(each, inner, reader, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        inner, line = (*path, key.value), key.start_mark.line + 1
        if key.value in first:
            reader.faults.append(
                f"{reader.where}:{line}: {'.'.join(inner)} stands twice, first in line {first[key.value]} - "
                f"expected each key once. Remove one of the two."
            )
        first.setdefault(key.value, line)
        reader.places.setdefault(inner, f"{reader.where}:{line}")
        _note_lines(value, inner, reader, seen)


DATA_SUFFIXES: Final = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".xlsx", ".txt", ".arrow")

_LONGEST_SETTINGS_BYTES: Final = 1_000_000


def holds_data(name: str) -> bool:
    """Return whether a name is that of data where a configuration is asked for: a file of records, or a folder of them.

    JSON is a configuration where it is one object with a section of a configuration, else data.
    """
    file = Path(name).expanduser()
    if not _exists(file):
        return False
    if file.is_dir():
        if (file / "config.yaml").is_file():
            return False
        return any(each.suffix.lower() in _DATA_SUFFIXES for depth in ("*", "*/*") for each in file.glob(depth))
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in DATA_SUFFIXES
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size < _LONGEST_SETTINGS_BYTES else None
    except (OSError, ValueError):
        return True
    sections = (*_SECTIONS, "training_config", "peft_config")
    return not (isinstance(content, Mapping) and any(isinstance(content.get(each), Mapping) for each in sections))


def unused_folder(folder: Path) -> Path:
    """Return a folder that holds nothing: the one given, or the first with a number behind its name."""
    found, number = folder, 1
    while found.exists() and (found.is_file() or any(found.iterdir())):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def newest_folder(folder: Path) -> Path:
    """Return the folder with the highest number behind its name that is there; the one given where none is."""
    numbers = [each.name.removeprefix(f"{folder.name}-") for each in folder.parent.glob("*") if each.is_dir()]
    highest = max((int(each) for each in numbers if each.isdecimal()), default=1)
    return folder.with_name(f"{folder.name}-{highest}") if highest > 1 else folder


def _open(source: str | Path | Mapping[str, Any] | Config) -> tuple[_Reader, str, str]:
    """The reader of a source, the source's name, and the name that the run folder gets."""
    if isinstance(source, Config):
        reader = _Reader("config", "python")
        given = source.to_dict()
        for key, origin in source.origins.items():
            section, _, name = key.partition(".")
            inner = given.get(section, {})
            default = FIELDS[key].default if key in FIELDS else LIBRARY
            if origin == "default" and name in inner and inner[name] == default:
                del inner[name]
            else:
                reader.origins[section, name] = origin
        reader.given = given
        reader.notices = list(source.notices)
        return reader, source.source, Path(source.source).stem
    if isinstance(source, Mapping):
        reader = _Reader("config", "python")
        reader.given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
        return reader, "python", "philora"
    file = Path(source).expanduser()
    folder = file if file.is_dir() and (file / "config.yaml").is_file() else None
    if folder is not None:
        file /= "config.yaml"
    reader = _Reader(str(file), str(file))
    if file.exists() and not file.is_file() and not file.is_dir():
        expected = "a YAML file; this is a pipe or a device, which can be read once, and a run reads its settings again"
        raise ConfigError(_fault(str(source), "config", str(source), expected, "Write it to a file first"))
    if not file.is_file():
        expected = "a YAML file, or the folder of a run" if file.is_dir() else "an existing file"
        raise ConfigError(_fault(str(source), "config", str(source), expected, _nearest_file(file)))
    if file.suffix.lower() in DATA_SUFFIXES:
        expected = "a YAML file of settings, not the conversations themselves"
        todo = f"Write one: philora init {file.name}; or train by the same choices: philora train {file.name}"
        raise ConfigError(_fault(str(source), "config", str(source), expected, todo))
    _read_yaml(file, reader)
    training = reader.given.get("training_config")
    if folder is not None and isinstance(training, Mapping) and "output_dir" in training:
        reader.given["training_config"] = {**training, "output_dir": str(folder)}  # where the run is now
    return reader, str(file), file.stem


def _exists(file: Path) -> bool:
    """Whether a path leads to something; one that no file can have, such as one that is too long, does not."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def _nearest_file(file: Path) -> str:
    """A hint with the file in the same folder whose name is nearest, or that the folder does not exist."""
    folder = file.parent
    try:
        names = sorted(each.name for each in folder.iterdir())
    except OSError:
        return f"The folder {str(folder)!r} does not exist" if not _exists(folder) else ""
    return nearest(file.name, names)


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read, translate and check a configuration; nothing is loaded or written.

    Args:
        source: A YAML file, the folder of a run, a mapping of the same shape, or a Config.
        overrides: `KEY=VALUE` texts, such as "training_config.learning_rate=1e-4"; the value is read as YAML.

    Returns:
        The configuration, complete for philora's own keys.

    Raises:
        ConfigError: One line for each fault: all of them, not only the first.

    Example:
        >>> load_config({"data": {"train": "helpdesk"}}, ["peft_config.r=8"]).peft_config["r"]
        8
    """
    reader, name, stem = _open(source)
    reader.translate()
    for text in overrides:
        reader.override(text)
    unusable = [*_unusable_texts(reader.given, (), reader)]
    if unusable:
        raise ConfigError(one_per_line(unusable))
    config = _build(reader, name, stem)
    if reader.faults:
        raise ConfigError(one_per_line(list(dict.fromkeys(reader.faults))))
    return config


_HOLD_PATHS: Final = ("path", "train", "eval", "name_or_path", "adapter", "output_dir", "cache_dir")


def _unusable_texts(value: Any, path: _Path, reader: _Reader) -> Iterator[str]:
    """A fault for each text that no file can hold, and for each path in the home folder of nobody."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _unusable_texts(each, (*path, str(key)), reader)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _unusable_texts(each, path, reader)
    text = ".".join(path) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        return
    where, name = reader.place(path), ".".join(path)
    try:
        text.encode("utf-8")
        if text.startswith("~") and path[-1:] and path[-1] in _HOLD_PATHS:
            Path(text).expanduser()
    except UnicodeEncodeError as error:
        yield _fault(where, name, text, "text that UTF-8 can hold", f"Character {error.start + 1} is half of a pair")
    except RuntimeError:
        expected = "a path whose home folder is known here"
        yield _fault(where, name, text, expected, "Write the whole path, or set the variable HOME")


def _build(reader: _Reader, source: str, stem: str) -> Config:
    origins: dict[str, str] = {}
    sections = (*_SECTIONS, "training_config", "peft_config")
    for key, value in reader.given.items():
        if key not in sections:
            reader.fault((str(key),), value, "one of " + ", ".join(sections), _home(str(key), sections))
    parts = {}
    for section in sections:
        value = reader.given.get(section)
        if not reader.is_section(section):
            first = next(iter(dataclasses.fields(_SECTIONS[section]))).name if section in _SECTIONS else "key"
            reader.fault((section,), value, "a mapping", f"Write {section}: {{{first}: ...}}")
            value = None
        parts[section] = dict(value or {})
    own = {section: _read_own(section, parts[section], reader, origins) for section in _SECTIONS}
    training = _read_library("training_config", parts["training_config"], reader)
    lora = _read_library("peft_config", parts["peft_config"], reader)
    defaults = _training_defaults(training, own["data"], stem)
    _check_training(training, defaults, own["data"], reader)
    _check_lora(lora, reader)
    for section, values, preset in (
        ("training_config", training, defaults),
        ("peft_config", lora, _preset("peft_config")),
    ):
        for key in (*preset, *values):
            given = key in values
            origins[f"{section}.{key}"] = reader.origin_of((section, key)) if given else "default"
    if reader.faults:
        # Only so that there is something to return; load_config raises.
        own["data"].setdefault("train", ())
    if own["model"].get("trust_remote_code"):
        path = ("model", "trust_remote_code")
        reader.notices.append(
            f"{reader.place(path)}: model.trust_remote_code=True runs code from the model's repository. The Phi-3 "
            f"family does not need it, and the code that it ships breaks generation on today's transformers."
        )
    return Config(
        model=ModelConfig(**own["model"]),
        tokenizer=TokenizerConfig(**own["tokenizer"]),
        data=DataConfig(**own["data"]),
        evaluation=EvaluationConfig(**own["evaluation"]),
        training_config=_in_order("training_config", defaults | training),
        peft_config=_in_order("peft_config", _preset("peft_config") | lora),
        source=source,
        origins=origins,
        notices=tuple(dict.fromkeys(reader.notices)),
    )


def _in_order(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The keys of the table in its order, then the others in the order given."""
    names = [key.partition(".")[2] for key in FIELDS if key.startswith(f"{section}.")]
    return {key: values[key] for key in (*(name for name in names if name in values), *values)}


def _home(key: str, sections: Iterable[str]) -> str:
    """Where an unknown key may belong: the section that has it, or the nearest name."""
    for section, names in _names().items():
        if key in names and section in sections:
            return f"It belongs in {section}: write {section}.{key}"
    return nearest(key, sections)


def _names() -> dict[str, set[str]]:
    """The keys of each section."""
    own = {section: {each.name for each in dataclasses.fields(kind)} for section, kind in _SECTIONS.items()}
    return own | {
        "training_config": {*schema.training_fields(), *OWN_TRAINING_KEYS},
        "peft_config": set(schema.lora_fields()),
    }


def _unknown(section: str, key: Any, value: Any, names: Iterable[str], reader: _Reader) -> None:
    names = list(names)
    todo = nearest(str(key), names)
    if not todo:
        others = [each for each in _names() if each != section]
        todo = _home(str(key), others) if any(key in _names()[each] for each in others) else ""
    library = {"training_config": "trl.SFTConfig", "peft_config": "peft.LoraConfig"}.get(section)
    expected = f"a key of {library}" if library else "one of " + ", ".join(names)
    reader.fault((*section.split("."), str(key)), value, expected, todo)


def _read_own(section: str, given: dict[str, Any], reader: _Reader, origins: dict[str, str]) -> dict[str, Any]:
    """The values of one of philora's own sections; faults are recorded and left out."""
    kind = _SECTIONS[section]
    fields = {each.name: each for each in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            _unknown(section, key, value, fields, reader)
            continue
        before = len(reader.faults)
        path = (section, key)
        if path in (("data", "train"), ("data", "eval")):
            read = _read_data(path, value, reader)
        else:
            read = reader.read(path, value, fields[key].metadata["rule"])
        if len(reader.faults) == before:
            values[key] = read
    for name, each in fields.items():
        origins[f"{section}.{name}"] = reader.origin_of((section, name)) if name in given else "default"
        if each.default is _REQUIRED and name not in given and reader.is_section(section):
            reader.faults.append(
                f"{reader.place((section,))}: {section}.{name} is missing - expected {each.metadata['rule'].text}. "
                f"For the bundled chat set write {section}: {{{name}: {HELPDESK}}}."
            )
    if section == "model":
        _check_model(values, reader)
    return values


def _check_model(values: dict[str, Any], reader: _Reader) -> None:
    for key in ("name_or_path", "adapter"):
        path = values.get(key)
        if isinstance(path, str) and path.startswith(("./", "../", "/", "~")):
            values[key] = str(Path(path).expanduser())
            if not _exists(Path(values[key])):
                reader.fault(("model", key), path, "an existing folder or a hub id", _nearest_file(Path(values[key])))
    name = values.get("name_or_path")
    if isinstance(name, str) and not _exists(Path(name)):
        values["name_or_path"] = hub_id(name)
        if "/" not in values["name_or_path"] and name.lower().startswith("phi"):
            expected = f"a hub id, a folder, nano, or one of {', '.join(ALIASES)}"
            reader.fault(("model", "name_or_path"), name, expected, nearest(name.lower(), ALIASES))
    quantization = values.get("quantization")
    if isinstance(quantization, Mapping):
        known = schema.quantization_fields()
        _read_nested(("model", "quantization"), quantization, known, "BitsAndBytesConfig", reader)
        if quantization.get("load_in_4bit") is True and quantization.get("load_in_8bit") is True:
            reader.fault(("model", "quantization", "load_in_8bit"), True, "only one of load_in_4bit and load_in_8bit")
        elif set(quantization) <= set(known) and not (
            quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
        ):
            reader.fault(
                ("model", "quantization"), dict(quantization), "load_in_4bit: true or load_in_8bit: true in it"
            )


def _read_nested(
    path: _Path, given: Mapping[str, Any], known: Mapping[str, schema.LibraryField], owner: str, reader: _Reader
) -> None:
    for key, value in given.items():
        if key not in known:
            reader.fault((*path, str(key)), value, f"a key of {owner}", nearest(str(key), known))
        else:
            reader.read((*path, key), value, known[key].rule)


def _read_library(section: str, given: dict[str, Any], reader: _Reader) -> dict[str, Any]:
    """The values of `training_config` or `peft_config`; faults are recorded and left out."""
    values: dict[str, Any] = {}
    known = schema.training_fields() if section == "training_config" else schema.lora_fields()
    for key, value in given.items():
        rule = _rule_of(section, key)
        if rule is None:
            _unknown(section, key, value, _names()[section], reader)
            continue
        before = len(reader.faults)
        read = reader.read((section, key), value, rule)
        nested = known[key].nested if key in known else None
        if nested is not None and isinstance(read, Mapping):
            _read_nested((section, key), read, schema.lora_nested_fields(nested), nested, reader)
        if len(reader.faults) == before:
            values[key] = read
    return values


# --- data sources ---------------------------------------------------------------------------------------------------


def _read_data(path: _Path, value: Any, reader: _Reader) -> tuple[SourceConfig, ...] | float | None:
    rule: Rule = FIELDS[".".join(path)].rule
    if path == ("data", "eval") and (value is None or isinstance(value, (int, float, bool))):
        if value is None:
            return None
        part = union(number(above=0, below=1), number(least=1, whole=True))
        read = reader.read(path, value, Rule(rule.text, part.read))
        return 0.0 if read is None else read
    if isinstance(value, (str, Mapping, SourceConfig, os.PathLike)):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        reader.fault(path, value, rule.text)
        return ()
    paths = [path] if len(value) == 1 else [(*path[:-1], f"{path[-1]}[{index}]") for index in range(len(value))]
    sources = [_read_source(inner, each, reader) for inner, each in zip(paths, value, strict=True)]
    return tuple(each for each in sources if each is not None)


def _read_source(path: _Path, value: Any, reader: _Reader) -> SourceConfig | None:
    if isinstance(value, SourceConfig):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, (str, os.PathLike)):
        value = {"path": value}
    if not isinstance(value, Mapping):
        reader.fault(path, value, "a path, or a mapping with a path")
        return None
    fields = {each.name: each for each in dataclasses.fields(SourceConfig)}
    values: dict[str, Any] = {}
    before = len(reader.faults)
    for key, each in value.items():
        if key not in fields:
            _unknown(".".join(path), key, each, fields, reader)
        else:
            values[key] = reader.read((*path, key), each, fields[key].metadata["rule"])
    if "path" not in value:
        reader.fault(path, dict(value), "a path in it", "Add path: with a file, a folder or a hub id")
    elif isinstance(values["path"], str):
        values["path"] = _local(path, values["path"], reader)
    if isinstance(values.get("columns"), Mapping):
        _check_columns((*path, "columns"), values["columns"], reader)
    return None if len(reader.faults) > before else SourceConfig(**values)


_TEMPLATE: Final = Rule("a template such as '{instruction}'", _template)


def _check_columns(path: _Path, columns: Mapping[str, Any], reader: _Reader) -> None:
    for key, value in columns.items():
        read = reader.read((*path, key), value, _TEMPLATE)
        if key in COLUMN_ROLES[1:] and isinstance(read, str) and "{" not in read:
            hint = f"Write '{{{read}}}' if that is the column's name"
            reader.fault((*path, key), value, "a template with the name of a column in braces", hint)
        if key not in COLUMN_ROLES:
            reader.fault((*path, key), value, "one of " + ", ".join(COLUMN_ROLES), nearest(key, COLUMN_ROLES))
    if "messages" in columns and not set(columns) - {"messages", "system"}:
        return
    if set(TURN_COLUMNS[:3]) <= set(columns) <= set(TURN_COLUMNS):
        return
    if "text" in columns and len(columns) == 1:
        return
    for needed in ({"user", "assistant"}, {"prompt", "completion"}):
        if needed <= set(columns) and not {"text", "messages"} & set(columns):
            return
    expected = (
        "user and assistant, prompt and completion, text alone, messages (with or without system), or of one row for "
        "each message conversation, role and content (with or without time)"
    )
    reader.fault(path, dict(columns), expected)


def _local(path: _Path, text: str, reader: _Reader) -> str:
    """A data path as it will be opened; a fault when it is plainly a local one that does not exist.

    A relative path is looked for from the working folder, then beside the configuration file.
    """
    if text == HELPDESK or "://" in text or any(sign in text for sign in "*?["):
        return text
    file = Path(text).expanduser()
    if _exists(file):
        return str(file) if text.startswith("~") else text
    beside = Path(reader.where).parent / file
    if reader.where != "config" and not file.is_absolute() and _exists(beside):
        return str(beside.resolve())
    looks_local = (
        text.startswith(("./", "../", "/", "~", ".\\"))
        or file.suffix.lower() in _DATA_SUFFIXES
        or text.count("/") > 1
        or text.endswith("/")
    )
    if looks_local:
        # The line of the path inside the source, when the source is a mapping.
        place = (*path, "path") if (*path, "path") in reader.places else path
        todo = _nearest_file(file) or f"It was looked for from {Path.cwd()}"
        reader.fault(place, text, "an existing file or folder, or a hub id", todo)
    return text


# --- defaults and checks across keys --------------------------------------------------------------------------------


def _preset(section: str) -> dict[str, Any]:
    """philora's own defaults for a library section."""
    prefix = f"{section}."
    return {
        key.removeprefix(prefix): _plain(each.default)
        for key, each in FIELDS.items()
        if key.startswith(prefix) and each.default is not LIBRARY
    }


def _training_defaults(given: Mapping[str, Any], data: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The defaults of `training_config` that follow from what is given elsewhere."""
    preset = _preset("training_config")
    preset["output_dir"] = f"runs/{stem}"
    if isinstance(given.get("per_device_train_batch_size"), int) or "gradient_accumulation_steps" in given:
        preset["tokens_per_step"] = None  # who names either means their product, as in TRL
    if given.get("fp16"):
        preset["bf16"] = False
    if data.get("eval", 0.05) is None or (given.get("do_eval") is False and "eval_strategy" not in given):
        preset["eval_strategy"] = "no"
    if given.get("early_stopping_patience") is not None:
        preset["load_best_model_at_end"] = True  # without it transformers follows no metric
    if {**preset, **given}.get("load_best_model_at_end"):
        # The best checkpoint can only be one that was evaluated, so what is not given follows what is.
        for one, other in (("eval_strategy", "save_strategy"), ("save_strategy", "eval_strategy")):
            if one in given and other not in given and given[one] != "best":
                preset[other] = given[one]
        for one, other in (("eval_steps", "save_steps"), ("save_steps", "eval_steps")):
            if given.get(one) is not None and other not in given:
                preset[other] = given[one]
    return {key: value for key, value in preset.items() if key not in given}


def _check_training(
    given: Mapping[str, Any], defaults: Mapping[str, Any], data: Mapping[str, Any], reader: _Reader
) -> None:
    """What no single key shows, and what the trainer would refuse only after the model is loaded."""
    values = {**defaults, **given}

    def refuse(key: str, expected: str, todo: str = "") -> None:
        reader.fault(("training_config", key), values[key], expected, todo)

    evaluates = values["eval_strategy"] != "no"
    if evaluates and data.get("eval", 0.05) is None:
        refuse("eval_strategy", "no, because data.eval is null", "Give data.eval, for example 0.05")
    if given.get("load_best_model_at_end") and not evaluates:
        refuse("load_best_model_at_end", "false, because eval_strategy is no", "Set eval_strategy to steps or epoch")
    elif evaluates and values.get("load_best_model_at_end") and values["save_strategy"] != "best":
        if values["eval_strategy"] != values["save_strategy"]:
            refuse(
                "load_best_model_at_end",
                f"eval_strategy={values['eval_strategy']!r} and save_strategy={values['save_strategy']!r} to be equal",
                "Set both to steps or both to epoch",
            )
        elif values["eval_strategy"] == "steps" and not _multiple(values["save_steps"], values["eval_steps"]):
            refuse("save_steps", f"a multiple of eval_steps={values['eval_steps']!r}, for load_best_model_at_end")
    if values.get("early_stopping_patience") is not None and not evaluates:
        refuse("early_stopping_patience", "null, because eval_strategy is no", "Set eval_strategy to steps or epoch")
    elif values.get("early_stopping_patience") is not None and not (
        values.get("load_best_model_at_end") or values.get("metric_for_best_model")
    ):
        refuse("early_stopping_patience", "load_best_model_at_end: true beside it, or a metric_for_best_model")
    if values.get("loraplus_lr_ratio") is not None and values.get("optim") in ONE_RATE_OPTIMIZERS:
        expected = f"null, because optim={values['optim']!r} has one learning rate for all"
        refuse("loraplus_lr_ratio", expected, "Choose another optim, such as adamw_torch")
    optim = str(values.get("optim") or "")
    if (optim.startswith("paged_") or "8bit" in optim) and importlib.util.find_spec("bitsandbytes") is None:
        expected = "an optimizer of torch's, because bitsandbytes is not installed"
        refuse("optim", expected, "pip install 'philora[quantization]', or set adamw_torch")
    if values["save_strategy"] == "best" and not evaluates:
        refuse("save_strategy", "evaluation in training for 'best'", "Set eval_strategy to steps or epoch")
    scheduler = values["lr_scheduler_type"]
    if scheduler in ("reduce_lr_on_plateau", "greedy") and not evaluates:
        refuse("lr_scheduler_type", f"evaluation in training for {scheduler!r}", "Set eval_strategy to steps or epoch")
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
            f"gradient_accumulation_steps are both given: gradient_accumulation_steps holds."
        )


def _multiple(save: float, evaluation: float | None) -> bool:
    if evaluation is None:
        return True
    if (save < 1) != (evaluation < 1):
        return False
    scale = 1_000_000  # the arithmetic of transformers, which avoids binary fractions
    return round(save * scale) % round(evaluation * scale) == 0


def _check_lora(given: Mapping[str, Any], reader: _Reader) -> None:
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
        refuse(
            "init_lora_weights",
            "loftq_config beside 'loftq'",
            "For example loftq_config: {loftq_bits: 4, loftq_iter: 1}",
        )
    if given.get("init_lora_weights") in ("eva", "corda", "lora_ga"):
        expected = "an initialisation that needs no pass over data beforehand, which a run does not make"
        refuse("init_lora_weights", expected, "Use true or pissa, or initialise in Python and train with SFTTrainer")
    if given.get("lora_bias") and given.get("use_dora"):
        refuse("lora_bias", "false, because use_dora is true")


# --- writing --------------------------------------------------------------------------------------------------------


def dump_yaml(config: Config) -> str:
    """The effective configuration as YAML, loadable again. Tokens of the hub are left out."""
    return yaml_text.dump(without_secrets(config.to_dict()), sort_keys=False, allow_unicode=True, width=120)


def without_secrets(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A configuration in the shape of the file, without tokens of the hub."""
    return {
        section: {name: value for name, value in values.items() if f"{section}.{name}" not in _SECRETS}
        for section, values in sections.items()
    }


def explain(config: Config) -> list[tuple[str, Any, str]]:
    """Every key with its value and its origin, in the order of the file; tokens of the hub are hidden."""
    rows = []
    for section, values in config.to_dict().items():
        for name, value in values.items():
            key = f"{section}.{name}"
            shown = "***" if key in _SECRETS and value else value
            rows.append((key, shown, config.origins.get(key, "default")))
    return rows


def reference() -> str:
    """The keys that philora states a default or a bound for, as a Markdown table."""
    lines = ["| key | default | allowed | what it is |", "| --- | --- | --- | --- |"]
    rows = []
    for each in FIELDS.values():
        rows.append(each)
        if each.key == "data.train":
            rows += [
                Field(f"data.train.{inner.name}", inner.default, inner.metadata["rule"], inner.metadata["doc"])
                for inner in dataclasses.fields(SourceConfig)
            ]
    for each in rows:
        section, _, name = each.key.partition(".")
        rule = (_rule_of(section, name) or each.rule) if section in ("training_config", "peft_config") else each.rule
        default = _shown_default(each, section, name)
        cells = (f"`{each.key}`", default, rule.text, each.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "`training_config` takes every key of the installed `trl.SFTConfig` and `peft_config` every key of the "
        "installed `peft.LoraConfig`; those that are not in the table have the library's default and are checked "
        "against its annotations.",
    ]
    return "\n".join(lines) + "\n"


def _shown_default(each: Field, section: str, name: str) -> str:
    if each.default is _REQUIRED:
        return "required"
    if each.default is not LIBRARY:
        return f"`{_one_line(each.default)}`"
    training = section == "training_config"
    value = (schema.training_fields() if training else schema.lora_fields())[name].default
    shown = "chosen at run time" if value is schema.UNKNOWN else f"`{_one_line(value)}`"
    return f"{'TRL' if training else 'PEFT'}'s: {shown}"


def _one_line(value: Any) -> str:
    return yaml_text.dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
