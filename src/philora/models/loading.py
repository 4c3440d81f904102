"""Load a model and its tokenizer: a hub id, a local folder, or `nano`, the bundled model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, find_adapter_config_file
from transformers.utils.hub import has_file as hub_has_file

from philora.configuration.sections import Config, ModelConfig, TokenizerConfig
from philora.errors import ConfigError, ModelError, fault, one_per_line
from philora.families import NOT_IN_TRANSFORMERS, hub_id, stop_tokens_in
from philora.files.checkpoint import indexed_files
from philora.kernels.memory import return_large_blocks
from philora.kernels.quantization import (
    check_folder,
    keep_layout,
    one_weight_at_a_time,
    quantization_config,
    require_bitsandbytes,
)
from philora.runtime.hub import reach
from philora.runtime.untrusted import check_tokenizer, panics_as_errors

logger = logging.getLogger(__name__)

_MOST_STOP_TOKENS = 1000

# Tokens that can be used for padding because nothing else uses them, in order of preference.
PADDING_CANDIDATES = (
    "<pad>",
    "<|pad|>",
    "<unk>",
    "<|unk|>",
    "<|placeholder1|>",
    "<|dummy_0|>",
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|fim_pad|>",  # Qwen 2.5 and 3, whose own padding token ends a text
    "<|endofprompt|>",  # Phi-4-mini: of its vocabulary, in none of its templates
)
_ADDED_PADDING = "<|pad|>"


def local_path(name: str) -> str:
    """Return a model's location: the bundled folder for `nano`, a hub id for a short name, else the name."""
    if name == "nano":
        return str(resources.files("philora") / "nano" / "model")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else hub_id(name)


def bf16_is_fast(device: str | None = None) -> bool:
    """Return whether bfloat16 matrices are multiplied in hardware (CUDA from Ampere on, AVX512-BF16, AMX, ...).

    `device` is `cpu`, or None for the fastest device of this machine.
    """
    if device != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu" and torch.backends.mps.is_available():
        return True
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a name in the configuration; `auto` is bfloat16 if that is fast, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if bf16_is_fast() else torch.float32
    return cast(torch.dtype, getattr(torch, dtype))


def _explain(name: str, error: Exception, what: str) -> ModelError:
    """Return one message for the many errors of loading from the hub or a folder."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and "longrope" in text:  # transformers 5.23, where the type is "su"
        expected = "`longrope` as rope_scaling.type in its config.json, not the older name `su`"
        todo = "Download the model again, or change the word in the folder's config.json"
        return ModelError(fault("model", "name_or_path", name, expected, todo))
    if Path(name).expanduser().is_dir():
        expected = f"a folder with {what}"
        reason = text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
        return ModelError(fault("model", "name_or_path", name, expected, f"transformers says: {reason[:300]}"))
    phrases = ("couldn't connect", "offline", "Connection", "resolve", "internet", "Max retries")
    if any(phrase in text for phrase in phrases):
        expected = "a local folder, `nano`, or a hub id that is in the local cache (there is no connection to the hub)"
        todo = "Connect and try again, or download the model on a machine with a network and give its folder"
    else:
        expected = "a local folder, `nano`, or a model on the Hugging Face Hub that you can read"
        todo = f"Check the spelling and your login (`hf auth login`). The hub says: {text[:200]}"
    return ModelError(fault("model", "name_or_path", name, expected, todo))


# Errors that transformers raises if a tokenizer, config or model cannot be loaded.
_UNREADABLE = (
    OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, AssertionError, RuntimeError,
    ArithmeticError,
)  # fmt: skip


def _config_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the raw content of a model's config.json; empty if there is none."""
    try:
        options = {"revision": model.revision, **reach()}
        keys, _ = PreTrainedConfig.get_config_dict(local_path(model.name_or_path), **options)
    except _UNREADABLE:  # loading it explains the error
        return {}
    return dict(keys)


def _refuse_unknown(model: ModelConfig, keys: Mapping[str, Any]) -> None:
    """Refuse a Phi model whose code is not in transformers, unless remote code is trusted.

    Raises:
        ModelError: It is such a model.
    """
    kind = str(keys.get("model_type", ""))
    if kind not in NOT_IN_TRANSFORMERS or model.trust_remote_code:
        return
    expected = f"a model whose code is in transformers; that of model_type={kind} is only on the Hub (docs/family.md)"
    instead = NOT_IN_TRANSFORMERS[kind]
    todo = f"{instead[0].upper()}{instead[1:]}. model.trust_remote_code: true runs that code, which is not tested here"
    raise ModelError(fault("model", "name_or_path", model.name_or_path, expected, todo))


def load_tokenizer(model: ModelConfig, settings: TokenizerConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token that does not stop generation.

    Raises:
        ModelError: It cannot be found or loaded, or no token can serve as padding.
    """
    path = local_path(model.name_or_path)
    keys = _config_keys(model)
    _refuse_unknown(model, keys)
    try:
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        tokenizer = read_tokenizer(path, **options, **reach())
    except Exception as error:  # with a damaged file transformers may raise any class
        refuse_adapter(model.name_or_path, model.revision)
        raise _explain(model.name_or_path, error, "a tokenizer") from error
    if settings.model_max_length:
        tokenizer.model_max_length = settings.model_max_length
    if settings.padding_side:
        tokenizer.padding_side = settings.padding_side
    text = keys.get("text_config")
    rows = keys.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    set_padding(tokenizer, settings.pad_token, rows if isinstance(rows, int) else 0)
    return tokenizer


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from its files without changes, and check it.

    Raises:
        OSError, ValueError, KeyError: It cannot be found or read, it fails on ordinary text, or its chat template takes
            too much memory or time.
    """
    with panics_as_errors("tokenizer.json"):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, **options))
    check_tokenizer(tokenizer)
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_stops: Any = None) -> list[int]:
    """Return the ids that end an answer: the family's in the vocabulary, the tokenizer's own, and the model's.

    Raises:
        ModelError: The model has an impossible number of them.
    """
    if isinstance(model_stops, (list, tuple)) and len(model_stops) > _MOST_STOP_TOKENS:
        expected, value = f"at most {_MOST_STOP_TOKENS} tokens", f"a list of {len(model_stops):,} numbers"
        raise ModelError(fault("model", "eos_token_id", value, expected, "Look at its generation_config.json"))
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in stop_tokens_in(vocabulary)]
    ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids += [model_stops] if isinstance(model_stops, int) else list(model_stops or [])
    return [token for token in dict.fromkeys(ids) if 0 <= token < 1 << 31]  # in some configurations -1 means none


def set_padding(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None, rows: int = 0) -> None:
    """Set a padding token that is not a stop token; otherwise the end of an answer would never be learned.

    Args:
        tokenizer: The tokenizer; changed in place.
        wanted: The requested token.
        rows: Rows of the model's embedding. If the vocabulary has no token for padding, as that of Phi-1.5 and Phi-2,
            and the embedding has more rows, `<|pad|>` gets the next row. Padding is masked, so the row is never used.

    Raises:
        ModelError: `wanted` is not in the vocabulary or is a stop token, or no token can be used for padding.
    """
    vocabulary = tokenizer.get_vocab()
    stops = set(stop_token_ids(tokenizer))
    if wanted is not None:
        if wanted not in vocabulary or vocabulary[wanted] in stops:
            expected = "a token of the vocabulary that does not stop generation: padding is never learned"
            known = ", ".join(token for token in PADDING_CANDIDATES if token in vocabulary)
            raise ModelError(fault("tokenizer", "pad_token", wanted, expected, f"Such as: {known}" if known else ""))
        tokenizer.pad_token = wanted
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return
    for token in PADDING_CANDIDATES:
        if token in vocabulary and vocabulary[token] not in stops:
            if tokenizer.pad_token is not None:
                logger.info("padding token: %s in place of %s, which is a stop token", token, tokenizer.pad_token)
            tokenizer.pad_token = token
            return
    if max(vocabulary.values(), default=rows) + 1 < rows:
        tokenizer.add_special_tokens({"pad_token": _ADDED_PADDING})
        if tokenizer.pad_token_id < rows:
            logger.info("padding token: %s, in a spare row of the embedding", _ADDED_PADDING)
            return
    expected = "a padding token that is no stop token; the vocabulary has none of the usual ones"
    raise ModelError(fault("tokenizer", "pad_token", tokenizer.pad_token, expected, "Name one: tokenizer.pad_token"))


def load_skeleton(model: ModelConfig) -> PreTrainedModel:
    """Return the model without weights (meta device), to check names and sizes before weights are read.

    Raises:
        ModelError: The configuration cannot be found or loaded, or the weights have a form that cannot be trained over.
    """
    return _skeleton(model, _load_config(model))


def refuse_adapter(name: str, revision: str | None = None, where: str = "model", key: str = "name_or_path") -> None:
    """Refuse a base that is or contains an adapter, which transformers would apply to the base without a message.

    `where` and `key` name the setting in the message.

    Raises:
        ModelError: There is an `adapter_config.json`.
    """
    folder = Path(local_path(name))
    if folder.is_dir():
        run = folder / "adapter" / "adapter_config.json"
        found: Path | None = next((file for file in (folder / "adapter_config.json", run) if file.is_file()), None)
        if found == run and (folder / "config.json").is_file():
            return  # a base with a subfolder `adapter`, which is not read
        has_base = (folder / "config.json").is_file()
    else:
        try:
            path = find_adapter_config_file(name, revision=revision, **reach())
        except (OSError, ValueError):  # no such repository, or no access: loading it reports that
            return
        found = None if path is None else Path(path)
        has_base = found is not None and (found.parent / "config.json").is_file()
    if found is None:
        return
    if has_base:
        expected = "a base model without an adapter; its adapter_config.json would be applied without a message"
        todo = "Move adapter_config.json and adapter_model.safetensors to another folder"
        raise ModelError(fault(where, key, name, expected, todo))
    try:
        base = json.loads(found.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    kind = "the run of an adapter" if folder.is_dir() and found.parent != folder else "an adapter"
    expected = f"a base model; this is {kind}"
    todo = f"Its base is {base}. An adapter to continue from is given as model.adapter"
    raise ModelError(fault(where, key, name, expected, todo if base else "Give the model that it was trained on"))


def _load_config(model: ModelConfig) -> Any:
    """Return the model's config, after checking that its weights can be trained over."""
    refuse_adapter(model.name_or_path, model.revision)
    _refuse_unknown(model, _config_keys(model))
    path = local_path(model.name_or_path)
    _check_shards(Path(path))
    try:
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        config = AutoConfig.from_pretrained(path, **options, **reach())
    except Exception as error:  # with a damaged file transformers may raise any class
        raise _explain(model.name_or_path, error, "a causal language model") from error
    _check_sizes(config, model.name_or_path)
    scheme = check_folder(config, model.name_or_path, model.quantization)
    if scheme is None and model.quantization not in (None, "none"):
        require_bitsandbytes("quantization", model.quantization)
    _check_base_products(model, scheme is not None or model.quantization not in (None, "none"))
    return config


def has_file(model: ModelConfig, names: Sequence[str]) -> bool:
    """Return whether a model on the Hub, or without a network in the cache, has one of these files."""
    try:
        where = {"revision": model.revision, **reach()}
        return any(hub_has_file(model.name_or_path, name, **where) for name in names)
    except (OSError, ValueError):
        return False


def _check_base_products(model: ModelConfig, quantized: bool) -> None:
    """Check that the base's products can be computed as configured.

    A GPU without fp8 is not a fault: its products stay in the weights' dtype, with a warning.

    Raises:
        ModelError: fp8 without a CUDA GPU or over a quantised base; int8, which is not there yet.
    """
    asked = model.base_products
    if asked in (None, "auto"):
        return
    expected, todo = "", "Leave model.base_products out"
    if asked == "int8":
        expected = "null, auto or fp8, because int8 products on a CPU are not a part of this version"
    elif not torch.cuda.is_available():
        expected = "null or auto on this machine, because fp8 products need a CUDA GPU"
    elif quantized:
        expected = "null or auto over a quantised base, whose weights are dequantised to 16 bits for each product"
        todo = "Leave it out, or set model.quantization: none"
    if expected:
        raise ModelError(fault("model", "base_products", asked, expected, todo))


def _check_shards(folder: Path) -> None:
    """Check that the shards which transformers will read exist in the folder. A hub id has no local files yet.

    Raises:
        ModelError: The index names other files.
    """
    # In the order in which transformers looks for them; only the first is read.
    for weights in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / weights).is_file():
            return
        if (index := folder / f"{weights}.index.json").is_file():
            indexed_files(index)
            return


# Far above any model. With a larger size, even creating the model without weights would not end.
_LARGEST: Final = {
    "num_hidden_layers": 2_000, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "max_position_embeddings": 1 << 30,
}  # fmt: skip


def _check_sizes(config: Any, name: str) -> None:
    """Check the sizes in a model's configuration.

    Raises:
        ModelError: A size is impossible.
    """
    text = config.get_text_config()
    faults = [
        fault(f"model {name}: config.json", key, value, f"a whole number from 1 to {most:,}", "Copy the model again")
        for key, most in _LARGEST.items()
        if isinstance(value := getattr(text, key, None), int | float | str)
        and not (type(value) is int and 1 <= value <= most)
    ]
    if faults:
        raise ModelError(one_per_line(faults))


def _skeleton(model: ModelConfig, config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        return cast(PreTrainedModel, made)
    except Exception as error:  # values that do not fit together may raise any class
        raise _explain(model.name_or_path, error, "a causal language model") from error


def load_model(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Load the base model with its weights, and a generation config with all stop tokens and the padding token.

    With `model.quantization` the weights are read and quantised one after another. A folder whose weights bitsandbytes
    has quantised is loaded without change.

    Raises:
        ModelError: The model cannot be found or loaded, is quantised by another scheme than bitsandbytes', or needs a
            package that is not installed.
        ConfigError: A key of `model.quantization` has an invalid value.
    """
    path = local_path(model.name_or_path)
    config = _load_config(model)
    dtype = resolve_dtype(model.dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
    reading: AbstractContextManager[None] = nullcontext()
    quantized_already = getattr(config, "quantization_config", None) is not None
    if quantized_already or model.quantization not in (None, "none"):
        return_large_blocks()  # the 16-bit weights are freed once they are quantised
    if not quantized_already and model.quantization not in (None, "none"):
        skeleton = _skeleton(model, config) if isinstance(model.quantization, Mapping) else None
        options["quantization_config"] = quantization_config(model.quantization, dtype, skeleton)
        reading = one_weight_at_a_time()
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    if model.device_map is not None:
        options["device_map"] = model.device_map
    try:
        given = {key: value for key, value in options.items() if value is not None}
        with reading:
            loaded = AutoModelForCausalLM.from_pretrained(path, **given, **reach())
    except ImportError as error:
        expected = "an attention implementation whose package is installed"
        todo = f"Set model.attn_implementation: sdpa. transformers says: {str(error)[:200]}"
        raise ModelError(fault("model", "attn_implementation", model.attn_implementation, expected, todo)) from error
    except _UNREADABLE as error:
        raise _explain(model.name_or_path, error, "a causal language model") from error
    loaded.config.use_cache = model.use_cache
    keep_layout(loaded)
    if tokenizer is not None:
        set_stops(loaded, tokenizer)
    return cast(PreTrainedModel, loaded)


def set_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the generation config stop at every stop token, and pad with the tokenizer's padding token."""
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id = stop_token_ids(tokenizer, generation.eos_token_id)
        generation.pad_token_id = tokenizer.pad_token_id
        if not generation.do_sample:  # a greedy config with sampling values cannot be saved
            generation.temperature = generation.top_p = generation.top_k = None
    model.config.pad_token_id = tokenizer.pad_token_id


def max_length_of(config: Config, model_config: Any) -> int:
    """Return the tokens of a row: as configured, within the model's context and the tokenizer's limit."""
    given = config.training_config["max_length"]
    context = int(getattr(model_config, "max_position_embeddings", given or 2**20))
    limit = min(context, config.tokenizer.model_max_length or context)
    wanted = limit if given is None else int(given)
    if wanted > limit and config.origins.get("training_config.max_length", "default") != "default":
        expected = f"at most {limit}, the context of the model"
        raise ConfigError(fault(config.source, "training_config.max_length", wanted, expected, f"Set {limit} or less"))
    return min(wanted, limit)
