"""Facts about the Phi family as data, with their sources; no torch.

The numbers are those of the models' `config.json` on the Hugging Face Hub. They serve planning, messages and tests; a
run reads the configuration of the model that it loads, never this table. What could not be verified is None.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

FUSED: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
}
"""For every model type the fused projections and their slices, in the order of their rows.

Source: transformers/models/phi3/modeling_phi3.py (Phi3Attention.forward, Phi3MLP.forward).
"""

STOP_TOKENS: Final = ("<|end|>", "<|endoftext|>", "<|im_end|>")
"""Tokens that end a turn or a text somewhere in the family; none of them may be the padding token.

Source: the `generation_config.json` and chat templates of the models below.
"""

SHIPPED_TOKENS: Final[Mapping[tuple[str, int], int]] = {("phi3", 32064): 32011}
"""Tokens that a tokenizer ships with, by model type and rows of the embedding; the rows behind them are spare.

Source: Phi-3's special tokens end at 32010 (torchtune/models/phi3/_tokenizer.py), and its embedding has 32,064 rows.
"""


@dataclass(frozen=True)
class PhiModel:
    """One size of the family, with the attribute names of `Phi3Config`.

    Attributes:
        name: A readable name.
        hub_ids: Repositories with these numbers.
        max_position_embeddings: Window in tokens.
        original_max_position_embeddings: Window before LongRoPE; its short factors hold up to here.
        rope_type: "longrope" where the factors switch at `original_max_position_embeddings`.
        rope_factors: How many short and how many long factors `rope_scaling` lists, one for every two rotated columns
            of a head; None without LongRoPE.
        partial_rotary_factor: Part of every head that is rotated.
        sliding_window: Attention window in tokens as `config.json` has it; None: full attention.
        stop_token_ids: Ids of `stop_tokens` in the same order.
        stop_tokens: The token that ends a turn first, then the one that ends a text.
        pad_token: A token of the vocabulary that is no stop token and never occurs in text; None: not verified.
        sources: Where the numbers were read.
    """

    name: str
    hub_ids: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    original_max_position_embeddings: int | None
    rope_type: Literal["default", "longrope"]
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    partial_rotary_factor: float
    stop_tokens: tuple[str, str]
    stop_token_ids: tuple[int, int]
    pad_token: str | None
    sources: tuple[str, ...]
    rope_factors: int | None = None
    model_type: str = "phi3"

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Weights of the linear layers and the embeddings; the norms are left out."""
        attention = self.hidden_size * (2 * self.hidden_size + 2 * self.num_key_value_heads * self.head_dim)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings


_HUB = "https://huggingface.co/microsoft/"
_CONFIG = "/blob/main/config.json"
# Copies of the hub's files that were read: the configurations that .NET's Phi package ships, and litgpt's table.
_DOTNET = "https://github.com/dotnet/machinelearning/tree/main/src/Microsoft.ML.GenAI.Phi/Resource/Config"
_LITGPT = "https://github.com/Lightning-AI/litgpt/blob/main/litgpt/config.py"
_TOKENS_3 = "https://github.com/pytorch/torchtune/blob/main/torchtune/models/phi3/_tokenizer.py"
_TOKENS_4 = "https://github.com/pytorch/torchtune/blob/main/torchtune/models/phi4/_tokenizer.py"
_CARD_SCRIPT = f"{_HUB}Phi-3-mini-4k-instruct/blob/main/sample_finetune.py"

_MINI: Final[dict[str, Any]] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_MEDIUM: Final[dict[str, Any]] = {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
# Phi-3's generation_config.json also lists 32001, <|assistant|>. The card's fine-tuning script pads with <unk>.
_PHI_3: Final[dict[str, Any]] = {
    "vocab_size": 32064,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1.0,
    "stop_tokens": ("<|end|>", "<|endoftext|>"),
    "stop_token_ids": (32007, 32000),
    "pad_token": "<unk>",
}
_PHI_4: Final[dict[str, Any]] = {
    "vocab_size": 100352,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1.0,
    "stop_tokens": ("<|im_end|>", "<|endoftext|>"),
    "stop_token_ids": (100265, 100257),
    "pad_token": "<|dummy_85|>",
    "rope_type": "default",
}

MODELS: Final = (
    PhiModel(
        name="Phi-3-mini-4k",
        hub_ids=("microsoft/Phi-3-mini-4k-instruct",),
        max_position_embeddings=4096,
        rope_type="default",
        sliding_window=2047,
        sources=(f"{_HUB}Phi-3-mini-4k-instruct{_CONFIG}", _DOTNET, _TOKENS_3, _CARD_SCRIPT),
        **_MINI,
        **_PHI_3,
    ),
    PhiModel(
        name="Phi-3-mini-128k",
        hub_ids=("microsoft/Phi-3-mini-128k-instruct",),
        max_position_embeddings=131072,
        rope_type="longrope",  # "su" in older files, which transformers 5.23 refuses
        rope_factors=48,
        sliding_window=262144,
        sources=(f"{_HUB}Phi-3-mini-128k-instruct{_CONFIG}", _DOTNET, _TOKENS_3),
        **_MINI,
        **_PHI_3,
    ),
    PhiModel(
        name="Phi-3-medium-4k",
        hub_ids=("microsoft/Phi-3-medium-4k-instruct",),
        max_position_embeddings=4096,
        rope_type="default",
        sliding_window=2047,
        sources=(f"{_HUB}Phi-3-medium-4k-instruct{_CONFIG}", _DOTNET, _TOKENS_3),
        **_MEDIUM,
        **_PHI_3,
    ),
    PhiModel(
        name="Phi-3-medium-128k",
        hub_ids=("microsoft/Phi-3-medium-128k-instruct",),
        max_position_embeddings=131072,
        rope_type="longrope",
        rope_factors=64,
        sliding_window=131072,
        sources=(f"{_HUB}Phi-3-medium-128k-instruct{_CONFIG}", _DOTNET, _TOKENS_3),
        **_MEDIUM,
        **_PHI_3,
    ),
    PhiModel(
        name="Phi-3.5-mini",
        hub_ids=("microsoft/Phi-3.5-mini-instruct",),
        max_position_embeddings=131072,
        rope_type="longrope",
        rope_factors=48,
        sliding_window=262144,
        sources=(f"{_HUB}Phi-3.5-mini-instruct{_CONFIG}", _TOKENS_3),
        **_MINI,
        **_PHI_3,
    ),
    PhiModel(
        name="Phi-4",
        hub_ids=("microsoft/phi-4",),
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        rope_theta=250000.0,
        sources=(f"{_HUB}phi-4{_CONFIG}", _LITGPT, _TOKENS_4),
        **_MEDIUM,
        **_PHI_4,
    ),
    PhiModel(
        name="Phi-4-reasoning",
        hub_ids=("microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus"),
        max_position_embeddings=32768,
        original_max_position_embeddings=None,
        rope_theta=500000.0,
        sources=(f"{_HUB}Phi-4-reasoning{_CONFIG}", _LITGPT),
        **_MEDIUM,
        **_PHI_4,
    ),
    PhiModel(
        name="Phi-4-mini",
        hub_ids=("microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-reasoning"),
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=200064,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_type="longrope",
        rope_factors=48,
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        stop_tokens=("<|end|>", "<|endoftext|>"),
        stop_token_ids=(200020, 199999),
        pad_token=None,
        sources=(
            f"{_HUB}Phi-4-mini-instruct{_CONFIG}",
            _LITGPT,
            "https://github.com/pytorch/executorch/blob/main/examples/models/phi_4_mini/config/config.json",
        ),
    ),
)
"""The models of the `Phi3ForCausalLM` architecture."""


@dataclass(frozen=True)
class OtherModel:
    """A Phi model of another architecture.

    Attributes:
        name: A readable name.
        hub_ids: Its repositories.
        model_types: `model_type` of its configuration, on the hub and in transformers.
        note: What that means for training here.
    """

    name: str
    hub_ids: tuple[str, ...]
    model_types: tuple[str, ...]
    note: str


_GENERIC = "its linear layers train through the fused LoRA layers, all else runs as transformers has it"

OTHER: Final = (
    OtherModel(
        "Phi-2",
        ("microsoft/phi-2", "microsoft/phi-1_5", "microsoft/phi-1"),
        ("phi",),
        f"PhiForCausalLM, with separate q_proj, k_proj and v_proj and no chat template. {_GENERIC}",
    ),
    OtherModel(
        "Phi-3-small",
        ("microsoft/Phi-3-small-8k-instruct", "microsoft/Phi-3-small-128k-instruct"),
        ("phi3small",),
        "Phi3SmallForCausalLM is not in transformers: it needs trust_remote_code and its own block-sparse attention",
    ),
    OtherModel(
        "Phi-3.5-MoE",
        ("microsoft/Phi-3.5-MoE-instruct",),
        ("phimoe",),
        f"PhimoeForCausalLM, a mixture of experts. {_GENERIC}; the experts, most of its weights, train only where "
        "peft_config.target_parameters names them",
    ),
    OtherModel(
        "Phi-3-vision",
        ("microsoft/Phi-3-vision-128k-instruct", "microsoft/Phi-3.5-vision-instruct"),
        ("phi3_v",),
        "a multimodal model that is not in transformers: it needs trust_remote_code",
    ),
    OtherModel(
        "Phi-4-mini-flash",
        ("microsoft/Phi-4-mini-flash-reasoning",),
        ("phi4flash",),
        "Phi4FlashForCausalLM is not in transformers: it needs trust_remote_code and the packages of its own kernels",
    ),
    OtherModel(
        "Phi-4-multimodal",
        ("microsoft/Phi-4-multimodal-instruct",),
        ("phi4mm", "phi4_multimodal"),
        f"Phi4MultimodalForCausalLM. {_GENERIC}; all-linear also adapts the encoders of images and sound, which text "
        "does not train",
    ),
)
"""Phi models that are not `Phi3ForCausalLM`."""

ALIASES: Final[Mapping[str, str]] = {
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-mini-128k": "microsoft/Phi-3-mini-128k-instruct",
    "phi-3-medium": "microsoft/Phi-3-medium-4k-instruct",
    "phi-3-medium-128k": "microsoft/Phi-3-medium-128k-instruct",
    "phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "phi-4": "microsoft/phi-4",
    "phi-4-reasoning": "microsoft/Phi-4-reasoning",
    "phi-4-reasoning-plus": "microsoft/Phi-4-reasoning-plus",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "phi-4-mini-reasoning": "microsoft/Phi-4-mini-reasoning",
}
"""Short names that are taken wherever a model is named, with the hub ids that they stand for."""


def hub_id(name: str) -> str:
    """Return the hub id that a short name stands for; any other name as it is.

    Example:
        >>> hub_id("Phi-3-mini")
        'microsoft/Phi-3-mini-4k-instruct'
    """
    return ALIASES.get(name.lower(), name)


def _last_name(name_or_path: str) -> str:
    return name_or_path.rstrip("/").rpartition("/")[2].lower()


def find(name_or_path: str) -> PhiModel | None:
    """The model of a hub id, or of a copy or local folder with the same last name; None when it is not of the family.

    Example:
        >>> find("unsloth/Phi-3-mini-4k-instruct").sliding_window
        2047
    """
    last = _last_name(name_or_path)
    return next((model for model in MODELS if last in map(_last_name, model.hub_ids)), None)


def find_other(name_or_model_type: str) -> OtherModel | None:
    """The Phi model of another architecture with this hub id, last name or `model_type`, else None."""
    last = _last_name(name_or_model_type)
    return next((item for item in OTHER if last in (*item.model_types, *map(_last_name, item.hub_ids))), None)


NOT_IN_TRANSFORMERS: Final[Mapping[str, str]] = {
    "phi3small": "train microsoft/Phi-3-mini-4k-instruct or microsoft/Phi-3-medium-4k-instruct in its place",
    "phi3_v": "for text alone, train microsoft/Phi-3.5-mini-instruct, whose language model it has",
    "phi4mm": "for text alone, train microsoft/Phi-4-mini-instruct, whose language model it has; transformers' own "
    "form of it has model_type phi4_multimodal",
    "phi4flash": "train microsoft/Phi-4-mini-reasoning in its place",
}
"""Model types of Phi models whose code is on the Hub alone, and what to do instead."""


def generic_notice(config: object) -> str | None:
    """Return what a person should know who trains a model of another architecture than Phi3ForCausalLM's, else None.

    Example:
        >>> from types import SimpleNamespace
        >>> generic_notice(SimpleNamespace(model_type="phi3")) is None
        True
    """
    model_type = str(getattr(config, "model_type", ""))
    if model_type in FUSED:
        return None
    other = find_other(model_type)
    if other is not None:
        return f"{other.name}: {other.note} (docs/family.md)."
    return f"model_type={model_type!r} is not one of the Phi family: it takes the generic path (docs/family.md)."


def fused_slices(config: object) -> dict[str, dict[str, tuple[int, int]]]:
    """The rows of every slice inside the fused projections of a model.

    Args:
        config: Anything with the attributes of `Phi3Config`; `head_dim` is optional.

    Returns:
        Fused leaf name -> slice name -> (first row, row after the last), in the order of the rows; empty for a model
        type without fused projections.

    Shapes:
        `qkv_proj.weight` is ((H + 2 K) D, hidden_size), `gate_up_proj.weight` is (2 intermediate_size, hidden_size).

    Example:
        >>> fused_slices(find("microsoft/Phi-4-mini-instruct"))["qkv_proj"]
        {'q_proj': (0, 3072), 'k_proj': (3072, 4096), 'v_proj': (4096, 5120)}
    """
    fused = FUSED.get(str(getattr(config, "model_type", "")))
    if not fused:
        return {}
    rows = _rows(config)
    layout: dict[str, dict[str, tuple[int, int]]] = {}
    for leaf, names in fused.items():
        bounds = itertools.pairwise(itertools.accumulate((rows[name] for name in names), initial=0))
        layout[leaf] = dict(zip(names, bounds, strict=True))
    return layout


def _rows(config: Any) -> dict[str, int]:
    heads = int(config.num_attention_heads)
    key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {
        "q_proj": heads * head_dim,
        "k_proj": key_value_heads * head_dim,
        "v_proj": key_value_heads * head_dim,
        "gate_proj": int(config.intermediate_size),
        "up_proj": int(config.intermediate_size),
    }


def tokens_that_ship(config: object) -> int | None:
    """Return how many tokens the model's own tokenizer has; None where that is not known."""
    return SHIPPED_TOKENS.get((str(getattr(config, "model_type", "")), int(getattr(config, "vocab_size", None) or 0)))


def longrope_switch_tokens(config: Any) -> int | None:
    """Length above which a LongRoPE model turns to its long factors; None for a model with one set of frequencies.

    Args:
        config: A model's configuration, as transformers reads it.

    Source: transformers 5.23, `modeling_rope_utils.longrope_frequency_update`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return int(switch) if switch else None


def stop_tokens_in(vocab: Container[str]) -> list[str]:
    """Return those of `STOP_TOKENS` that a vocabulary has, in the order of `STOP_TOKENS`.

    Example:
        >>> stop_tokens_in({"<|endoftext|>": 32000, "<|end|>": 32007, "a": 1})
        ['<|end|>', '<|endoftext|>']
    """
    return [token for token in STOP_TOKENS if token in vocab]
