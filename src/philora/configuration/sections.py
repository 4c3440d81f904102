"""Define the sections of a configuration as dataclasses, whose fields have a rule and a description."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from philora.configuration import schema
from philora.configuration.schema import FLAG, NULL, TEXT, Misfit, Rule, exactly, mapping_of, number, one_of, union
from philora.errors import nearest

if TYPE_CHECKING:
    from peft import LoraConfig

AUTO: Final = exactly("auto")
COUNT: Final = number(least=1, whole=True)
REQUIRED: Final = dataclasses.MISSING
COUNT_OR_NULL: Final = union(COUNT, NULL)
_TEXT_OR_NULL: Final = union(TEXT, NULL)

HELPDESK: Final = "helpdesk"
"""As `data.train` or `data.eval`: the chat dataset that is bundled with philora."""

DATA_FORMATS: Final = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "turns")
TURN_COLUMNS: Final = ("conversation", "role", "content", "time")
"""Keys of `columns` that describe one row for every message; `time` may be left out."""
COLUMN_ROLES: Final = ("system", "user", "assistant", "prompt", "completion", "text", "messages", *TURN_COLUMNS)
TURN_ROLES: Final = ("system", "user", "assistant", "tool")
_ATTENTION: Final = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _dtype(value: Any) -> str:
    # A Python caller may pass torch.bfloat16 itself, as the model card's script does.
    name = str(value).removeprefix("torch.")
    return str(one_of("auto", "float32", "bfloat16", "float16").read(name))


def _attention(value: Any) -> str:
    name = str(TEXT.read(value))
    if name not in _ATTENTION and nearest(name, _ATTENTION):
        raise Misfit
    return name


def _setting(default: Any, rule: Rule, doc: str) -> Any:
    """Return a dataclass field that carries its rule and its line of documentation."""
    return dataclasses.field(default=default, metadata={"rule": rule, "doc": doc})


@dataclass(frozen=True)
class SourceConfig:
    """One source of training or evaluation data."""

    path: str = _setting(REQUIRED, TEXT, "file, folder or hub id; `helpdesk` is the bundled chat set")
    subset: str | None = _setting(
        None, _TEXT_OR_NULL, "subset (configuration) of a hub dataset, or of a folder with a dataset card"
    )
    split: str | None = _setting(
        None, _TEXT_OR_NULL, "split to read, such as `train_sft`, or one of several lists of a JSON object"
    )
    limit: int | None = _setting(None, COUNT_OR_NULL, "read this many records at most")
    columns: Mapping[str, str] | None = _setting(
        None,
        union(mapping_of(schema.ANYTHING), NULL),
        "templates that make system, user, assistant, prompt, completion, text or messages of the dataset's columns; "
        "with one row for each message: conversation, role, content and time",
    )
    weight: float = _setting(
        1.0, number(above=0), "how often each row is used in an epoch; a fraction draws a sample by the seed"
    )
    streaming: bool = _setting(False, FLAG, "stream a hub dataset instead of downloading it first")
    format: str | None = _setting(
        None, union(one_of(*DATA_FORMATS), NULL), "shape of this source's records; null: as `data.format`"
    )
    roles: Mapping[str, str] | None = _setting(
        None,
        union(mapping_of(one_of(*TURN_ROLES)), NULL),
        "with one row for each message: the roles of the values of the role column, such as `{Ann: assistant}`; `*` "
        "stands for all others",
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
    """Changes to the model's tokenizer; null keeps the tokenizer's own value."""

    model_max_length: int | None = _setting(None, union(number(least=8, whole=True), NULL), "window in tokens")
    padding_side: str | None = _setting(None, union(one_of("left", "right"), NULL), "side that is padded")
    pad_token: str | None = _setting(
        None, _TEXT_OR_NULL, "padding token; null: a token that does not stop generation is chosen"
    )


@dataclass(frozen=True)
class DataConfig:
    """The data and how it is read."""

    train: tuple[SourceConfig, ...] = _setting(
        REQUIRED,
        Rule("a file, a folder, a hub id, a mapping with a path, or a list of these", lambda value: value),
        "what to train on; `helpdesk` is the bundled chat set",
    )
    eval: tuple[SourceConfig, ...] | float | None = _setting(
        0.05,
        Rule(
            "the same as data.train, a fraction of it above 0 and below 1, a number of rows, or null",
            lambda value: value,
            null=True,
        ),
        "held-out data: a source; or a number or fraction of the rows of `train`, drawn by the seed. A fraction is "
        "raised to 32 rows if they are at most a fifth of all",
    )
    format: str = _setting("auto", one_of(*DATA_FORMATS), "shape of the records")
    overlong: str = _setting(
        "truncate", one_of("truncate", "drop"), "what happens to an example longer than `max_length`"
    )
    invalid: str = _setting(
        "error", one_of("error", "drop"), "what happens to a record that cannot be used; drop: left out and listed"
    )
    num_proc: int | None = _setting(None, COUNT_OR_NULL, "processes that tokenise; null: all cores")
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
    max_new_tokens: int = _setting(256, COUNT, "length limit of a generated answer, in tokens")
    batch_size: int = _setting(16, COUNT, "answers generated at a time")
    samples: int = _setting(3, number(least=0, whole=True), "answers shown in the table and the report")


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        training_config: Keywords of `trl.SFTConfig` and philora's own; values may be "auto" where philora chooses.
        peft_config: Keywords of `peft.LoraConfig`.
        source: The file, or "python".
        origins: For every key its origin: "default", the file, "command line" or "python".
        notices: Texts for the user, such as older spellings that were translated.
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

    def lora_config(self) -> LoraConfig:
        """Return `peft_config` as PEFT's class."""
        from peft import LoraConfig

        return LoraConfig(**self.peft_config)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in the shape of the YAML file; `load_config` of it gives an equal Config."""
        sections: dict[str, Any] = {
            name: {field.name: plain(getattr(getattr(self, name), field.name)) for field in dataclasses.fields(kind)}
            for name, kind in SECTIONS.items()
        }
        sections["training_config"] = plain(self.training_config)
        sections["peft_config"] = plain(self.peft_config)
        return sections


SECTIONS: Final[dict[str, type]] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}


def plain(value: Any) -> Any:
    """Return a value in types that YAML has."""
    if isinstance(value, SourceConfig):
        given = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name == "path" or getattr(value, field.name) != field.default
        }
        return given["path"] if len(given) == 1 else given
    if isinstance(value, tuple) and value and all(isinstance(item, SourceConfig) for item in value):
        return plain(value[0]) if len(value) == 1 else [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
