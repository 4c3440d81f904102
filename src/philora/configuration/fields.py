"""List every key with a default or bound of philora's, and give the rule of every key of TRL and PEFT."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from philora.configuration import schema
from philora.configuration.schema import FLAG, NULL, STEPS, TEXT, Rule, exactly, mapping_of, number, one_of, union
from philora.configuration.sections import AUTO, COUNT, COUNT_OR_NULL, SECTIONS

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


def _init_lora_weights(value: Any) -> bool | str:
    words = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica")
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value)):
        return value
    return str(one_of(*words).read(value))


def _task_type(value: Any) -> str:
    # A Python caller may pass PEFT's enumeration.
    return str(exactly("CAUSAL_LM").read(getattr(value, "value", value)))


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

_LIBRARY_RULE: Final = Rule("", lambda value: value)  # `rule_of` returns the rule of the installed library
_SMALL_BETA: Final = number(least=0, below=1)
_RATIO_OR_STEPS: Final = dataclasses.replace(
    union(number(least=0, below=1), COUNT),
    text="a fraction of the run of at least 0 and below 1, or a whole number of steps of at least 1",
)

_LIBRARY_FIELDS: Final = (
    Field("training_config.output_dir", "runs/<name of the config file>", TEXT, "run folder"),
    Field("training_config.num_train_epochs", 3, number(above=0), "passes over the training data"),
    Field(
        "training_config.max_steps",
        LIBRARY,
        dataclasses.replace(union(COUNT, exactly(-1)), text="a whole number of at least 1, or -1 for no limit"),
        "optimizer steps; when given it replaces num_train_epochs",
    ),
    Field(
        "training_config.learning_rate",
        "auto",
        union(number(above=0), AUTO),
        "peak learning rate; auto: 2e-4 * 3072 / the model's hidden size",
    ),
    Field("training_config.lr_scheduler_type", "cosine", _LIBRARY_RULE, "shape of the learning rate over the run"),
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
        union(COUNT, AUTO),
        "rows of a micro-batch; auto: from the memory estimate",
    ),
    Field(
        "training_config.per_device_eval_batch_size",
        "auto",
        union(COUNT, AUTO),
        "rows of an evaluation batch; auto: from the memory estimate",
    ),
    Field(
        "training_config.gradient_accumulation_steps",
        LIBRARY,
        COUNT,
        "micro-batches of an optimizer step; not given: as tokens_per_step needs",
    ),
    Field(
        "training_config.tokens_per_step",
        "auto",
        union(COUNT, AUTO, NULL),
        "tokens of an optimizer step on all devices together, reached by accumulation (philora's own key); "
        "null, or if one of the two is given: batch size times gradient_accumulation_steps",
    ),
    Field(
        "training_config.gradient_checkpointing",
        "auto",
        union(FLAG, exactly("elementwise"), AUTO),
        "activations recomputed in backward to save memory: none (false), the outputs of RMSNorm and SwiGLU "
        "(elementwise), complete layers (true); auto: the least that the memory estimate needs",
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
        union(FLAG, AUTO, NULL),
        "bfloat16 autocast; auto: only for a bf16 model with fully trained modules (modules_to_save)",
    ),
    Field("training_config.max_length", 2048, union(number(least=8, whole=True), NULL), "row length in tokens"),
    Field("training_config.packing", True, FLAG, "pack several examples into a row, isolated from each other"),
    Field(
        "training_config.pad_to_multiple_of",
        LIBRARY,
        union(COUNT, AUTO, NULL),
        "pad rows to a multiple of this many tokens",
    ),
    Field("training_config.dataset_num_proc", LIBRARY, COUNT_OR_NULL, "processes that TRL tokenises with"),
    Field(
        "training_config.logging_steps",
        10,
        STEPS,
        "steps between log lines; if it is not set, short runs log more often, for a curve of 100 points",
    ),
    Field("training_config.eval_strategy", "steps", _LIBRARY_RULE, "when to evaluate in training"),
    Field("training_config.eval_steps", 0.1, union(STEPS, NULL), "steps between evaluations"),
    Field("training_config.eval_delay", LIBRARY, number(least=0), "steps or epochs before the first evaluation"),
    Field("training_config.eval_accumulation_steps", LIBRARY, COUNT_OR_NULL, "evaluation steps kept on the device"),
    Field("training_config.save_strategy", "steps", _LIBRARY_RULE, "when to save a checkpoint"),
    Field("training_config.save_steps", 0.1, STEPS, "steps between checkpoints"),
    Field(
        "training_config.early_stopping_patience",
        None,
        COUNT_OR_NULL,
        "stop after this many evaluations without improvement (philora's own key); null: never",
    ),
    Field(
        "training_config.max_nonfinite_steps",
        5,
        COUNT_OR_NULL,
        "steps whose loss or gradient is not finite are skipped; this many in a row end the run (philora's own key); "
        "null: no step is skipped",
    ),
    Field("training_config.save_total_limit", 2, COUNT_OR_NULL, "checkpoints kept; null: all"),
    Field("training_config.seed", 42, number(least=0, whole=True), "seed of data order, dropout and initialisation"),
    Field("training_config.data_seed", LIBRARY, union(number(least=0, whole=True), NULL), "seed of the data order"),
    Field("training_config.report_to", "none", _LIBRARY_RULE, "trackers, such as tensorboard or wandb"),
    Field(
        "training_config.dataloader_num_workers", LIBRARY, number(least=0, whole=True), "processes that load batches"
    ),
    Field("training_config.dataloader_prefetch_factor", LIBRARY, COUNT_OR_NULL, "batches loaded ahead by a worker"),
    Field("training_config.torch_empty_cache_steps", LIBRARY, COUNT_OR_NULL, "steps between emptying torch's cache"),
    Field("training_config.ddp_timeout", LIBRARY, COUNT, "seconds before a collective gives up"),
    Field(
        "training_config.fsdp",
        LIBRARY,
        union(FLAG, TEXT, NULL),
        "shard the model over several processes on GPUs, with the options of fsdp_config",
    ),
    Field(
        "training_config.include_num_input_tokens_seen",
        LIBRARY,
        union(one_of("all", "non_padding", "no"), FLAG),
        "count the tokens seen",
    ),
    Field("peft_config.r", 16, COUNT, "rank of the adapters"),
    Field("peft_config.lora_alpha", 32, number(above=0), "numerator of the multiplier: alpha/r, or alpha/sqrt(r)"),
    Field("peft_config.lora_dropout", 0.05, _SMALL_BETA, "dropout on the input of the adapters"),
    Field("peft_config.bias", "none", _LIBRARY_RULE, "which biases train"),
    Field("peft_config.task_type", "CAUSAL_LM", Rule("CAUSAL_LM", _task_type, ("CAUSAL_LM",)), "PEFT's task"),
    Field("peft_config.peft_type", LIBRARY, union(one_of("LORA"), NULL), "PEFT's method; the configuration is LoRA's"),
    Field("peft_config.inference_mode", LIBRARY, exactly(False), "true would freeze the adapters"),
    Field(
        "peft_config.target_modules",
        "all-linear",
        _LIBRARY_RULE,
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
        "initialisation of A and B",
    ),
    Field("peft_config.rank_pattern", LIBRARY, union(mapping_of(COUNT), NULL), "ranks of single modules"),
    Field("peft_config.alpha_pattern", LIBRARY, union(mapping_of(number(above=0)), NULL), "alphas of single modules"),
    Field("peft_config.qalora_group_size", LIBRARY, COUNT, "group size of QA-LoRA"),
)


def own_fields(section: str, kind: type) -> Iterable[Field]:
    """Yield the fields of one of philora's own sections."""
    for field in dataclasses.fields(kind):
        yield Field(f"{section}.{field.name}", field.default, field.metadata["rule"], field.metadata["doc"])


_OWN_FIELDS: Final = [field for section, kind in SECTIONS.items() for field in own_fields(section, kind)]
FIELDS: Final[Mapping[str, Field]] = {field.key: field for field in (*_OWN_FIELDS, *_LIBRARY_FIELDS)}
"""Every key that philora states a default or a bound for, in the order of the documentation."""


def rule_of(section: str, key: str) -> Rule | None:
    """Return the rule of a key of a library section, or None if the installed library has no such key."""
    own = FIELDS.get(f"{section}.{key}")
    library = (schema.training_fields() if section == "training_config" else schema.lora_fields()).get(key)
    if own is not None and own.rule.text:
        return own.rule if library is not None or key in OWN_TRAINING_KEYS else None
    return None if library is None else library.rule
