"""Merging: an adapter becomes part of its base, in memory or from folder to folder.

    merge            layer by layer: base weight and adapter to fp32 -> PEFT's own merge -> rounded once
    merge_to_folder  the same on a model whose weights are the base's memory-mapped files, a shard at a time

Both compare the logits of base and adapter with those of the result.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from philora.adapters import RECORD_NAME, FastLinear, load_adapter
from philora.checkpoint import (
    disk_full,
    indexed_files,
    is_taken,
    read_peft_tensors,
    whole_folder,
    write_json,
    write_text,
)
from philora.config import ModelConfig
from philora.errors import AdapterError, ConfigError, ModelError, RunError, fault, one_per_line
from philora.hub import reachable_or_cached
from philora.models import load_skeleton, local_path
from philora.quantization import (
    check_folder,
    dequantize_,
    is_quantized,
    keep_layout,
    quantized_names,
    require_bitsandbytes,
    rounded_weights,
    scheme_of,
    stored_weights,
)
from philora.sources import find_adapter
from philora.verify import ROUNDED_ONCE, Agreement, agreement, logits_of
from philora.verify import probe as probe_tokens

logger = logging.getLogger(__name__)

UNTIED = "the adapter changes one of the input and output embeddings, which the base shares: they are separate now"

IN_MEMORY = "Merge it in memory: philora.merge(model).save_pretrained(folder)"

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "additional_chat_templates/*.jinja", "spiece.model", "*.tiktoken",
)  # fmt: skip
# Whatever else stands beside the weights of a base and is needed, or required by its licence, beside those of a merge.
COMPANION_FILES = ("*.py", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")
GENERATION_FILE = "generation_config.json"

# Initialisations that take their first A and B out of the base weight: PEFT does so again when such an adapter is
# loaded, so the weight to merge into is what they leave.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


class MergeResult(NamedTuple):
    """A merged model on disk.

    Attributes:
        folder: Where it is.
        agreement: Its logits beside those of base and adapter; None: it was not verified.
        shards: Number of weight files.
        bytes: Their size.
    """

    folder: Path
    agreement: Agreement | None
    shards: int
    bytes: int


# ------------------------------------------------------------------------------------------------ one layer


def merge_layer(layer: BaseTunerLayer, where: str) -> None:
    """Merge one of PEFT's layers, whatever its kind, into its base layer; the layer is used up.

    Args:
        layer: A layer that PEFT put around a base layer.
        where: What a message calls it.

    Numerics:
        Base weight and adapter are held in fp32 (fp64 for fp64 weights) while PEFT merges them; the result is rounded
        once into the dtype of the base. Quantised layers, and those of other methods than LoRA, are left to PEFT.

    Cost:
        Memory for the weight in fp32 and its update (twice, while PEFT scales it), until the layer is done.

    Raises:
        AdapterError: The merged weight is not finite in the dtype of the base.
    """
    if layer.merged:
        return
    names = _merged_parameters(layer)
    if not names:
        layer.merge(safe_merge=True)
        return
    base = layer.get_base_layer()
    before = {name: getattr(base, name) for name in names}
    wide = torch.promote_types(before[names[0]].dtype, torch.float32)
    with torch.no_grad():
        for name, parameter in before.items():
            # A parameter of its own: a weight that is shared (tied embeddings) stays what it was for the others.
            setattr(base, name, nn.Parameter(parameter.to(wide, copy=True), requires_grad=False))
        inside = {id(each) for each in base.parameters()}
        for parameter in layer.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(wide)
        layer.merge()
        for name, parameter in before.items():
            merged = getattr(base, name).detach().to(parameter.dtype)
            setattr(base, name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
            if not _is_finite(merged):
                expected = f"merged values that {str(merged.dtype).removeprefix('torch.')} can hold"
                raise AdapterError(fault("merge", where, name, expected, "Is the adapter broken?"))


def _merged_parameters(layer: BaseTunerLayer) -> list[str]:
    """Parameters of the base layer that merging may change; none for layers that are left to PEFT."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    if not isinstance(layer, LoraLayer | TrainableTokensLayer) or not _is_plain(getattr(base, "weight", None)):
        return []
    return ["weight", "bias"] if _is_plain(getattr(base, "bias", None)) else ["weight"]


def _is_plain(parameter: Any) -> bool:
    """Whether it is a matrix of floats as torch has them; quantised weights are of other classes or of a byte each."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # unlike isfinite on the whole, without a mask of its size
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _mergeable(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """PEFT's layers by the name of their module in the base, once it is clear that all of them can be merged."""
    if not isinstance(model.base_model, BaseTuner):
        kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
        expected = "an adapter of weights, such as LoRA; prompts and prefixes have nothing to add to a weight"
        raise AdapterError(fault("merge", "peft_type", kind, expected))
    layers = {
        name.removeprefix("base_model.model."): each
        for name, each in model.named_modules()
        if isinstance(each, BaseTunerLayer)
    }
    obstacles: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        for obstacle in _obstacles(layer):
            obstacles.setdefault(obstacle, []).append(name)
    if obstacles:
        raise AdapterError(
            one_per_line(
                [
                    fault("merge", names[0] if len(names) == 1 else f"{len(names)} layers", names, expected, todo)
                    for (expected, todo), names in obstacles.items()
                ]
            )
        )
    return layers


def _obstacles(layer: BaseTunerLayer) -> Iterable[tuple[str, str]]:
    """What keeps a layer from being merged: what was expected, and what to do."""
    base, active = layer.get_base_layer(), layer.active_adapters
    variants = [each for name, each in getattr(layer, "lora_variant", {}).items() if name in active]
    if any(isinstance(each, ALoraLinearVariant | ArrowLinearVariant) for each in variants):
        yield "an update that is the same for every token (it is aLoRA's or Arrow's)", "Serve base and adapter"
    if isinstance(layer, LoraLayer):
        if getattr(base, "groups", 1) > 1:
            yield "a convolution of one group", "Serve base and adapter"
        biased = any(layer.lora_bias.get(name) for name in active)
        if biased and getattr(base, "bias", None) is None:
            yield "a base layer with a bias, as lora_bias has one", "Serve base and adapter"
    inside = {id(each) for each in base.parameters()}
    own = [each for each in layer.parameters() if id(each) not in inside and each.numel() and not each.is_meta]
    if not all(_is_finite(each.detach()) for each in own):
        yield "finite adapter weights", "The training diverged: use an earlier checkpoint"


# ---------------------------------------------------------------------------------------------- in memory


def merge(model: PeftModel, probe: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add the active adapter to the base weights and check that the outputs stayed the same.

    Args:
        model: The adapted model; it is used up.
        probe: Inputs for the check; default: random tokens.

    Returns:
        The base model with the merged weights, in its own dtype. Embeddings that the base shares are separate when
        the adapter changes only one of them. A quantised base becomes a 16-bit model: its weights are the dequantised
        ones, over which the adapter was trained.

    Numerics:
        Each update is computed in fp32, whatever the adapter's dtype, and rounded once into the base's dtype.

    Cost:
        Two forward passes, and memory for one weight in fp32 and its update.

    Raises:
        AdapterError: A layer cannot be merged (all such layers at once, before anything changes), or the merged
            model's logits differ from the adapted model's by more than rounding explains.
    """
    layers = _mergeable(model)
    _round_whole_modules(model)
    before, bound = _logits(model, probe), _bound(model)
    stays_tied = _stays_tied(model)
    _dequantise(model, layers.values())
    for name, layer in layers.items():
        with onload_layer(layer):
            merge_layer(layer, name)
    merged = cast(nn.Module, model.unload())
    if isinstance(merged, PreTrainedModel):
        _settle_tie(merged, stays_tied)
    todo = "The merged model is not usable"
    result = agreement("merge", before, _logits(merged, probe), max(bound, _bound(merged)), todo=todo)
    logger.info("merged: %s", result)
    return merged


def _dequantise(model: PeftModel, layers: Iterable[BaseTunerLayer]) -> None:
    """Put plain layers in the place of quantised ones, and PEFT's layer of plain ones around them."""
    base = model.get_base_model()
    over = [each for each in layers if is_quantized(each.get_base_layer())]
    if not isinstance(base, PreTrainedModel) or not over:
        return
    dequantize_(base)
    for layer in over:
        if isinstance(layer, LoraLayer):
            layer.__class__ = FastLinear
            layer.fan_in_fan_out = layer.is_target_conv_1d_layer = isinstance(layer.get_base_layer(), Conv1D)


def _logits(model: nn.Module, probe: Mapping[str, Tensor] | None) -> Tensor:
    if probe is None:
        config: Any = model.config
        return logits_of(model, probe_tokens(config.get_text_config().vocab_size, model.device))
    was_training = model.training
    with torch.no_grad():
        logits: Tensor = model.eval()(**probe).logits
    model.train(was_training)
    return logits.float().cpu()


def _bound(model: nn.Module) -> float:
    """What one more rounding may do to the logits: that of the model's coarsest dtype; unknown ones are quantised."""
    return max(ROUNDED_ONCE.get(each.dtype, ROUNDED_ONCE[torch.bfloat16]) for each in model.parameters())


def _whole_modules(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules of the base, and what `modules_to_save` trained in their place."""
    return [
        (each.original_module, each.modules_to_save[each.active_adapters[0]])
        for each in model.modules()
        if isinstance(each, ModulesToSaveWrapper) and each.active_adapters
    ]


def _round_whole_modules(model: nn.Module) -> None:
    for original, trained in _whole_modules(model):
        for old, new in zip(original.parameters(), trained.parameters(), strict=True):
            new.data = new.data.to(old.dtype)
            new.requires_grad_(old.requires_grad)


def _stays_tied(model: PeftModel) -> bool:
    """Whether the adapter changes shared embeddings alike, if it changes them."""
    if any(getattr(each, "ensure_weight_tying", False) for each in model.peft_config.values()):
        return True
    base = model.get_base_model()
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None


def _settle_tie(model: PreTrainedModel, stays_tied: bool) -> None:
    """Make config and weights agree on whether the embeddings are shared."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or head.weight is embedding.weight:
        return
    if stays_tied:
        model.tie_weights()
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    logger.warning("merge: %s", UNTIED)


# ------------------------------------------------------------------------------------- from folder to folder


def merge_to_folder(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    fresh_base: bool = False,
    max_shard_size: int | str = "2GB",
    verify: bool = True,
) -> MergeResult:
    """Write base and adapter as one model folder, which transformers, vLLM and others load.

    Args:
        source: A run folder, an adapter folder, a checkpoint or a hub id, in PEFT's format.
        out: The folder to write; it must be new or empty.
        base: Folder or hub id of the base; default: the one that the adapter names.
        fresh_base: Of an adapter that was trained over a quantised base: merge it into the weights of `base` as its
            files hold them. By default it is merged into the dequantised weights, over which it was trained.
        max_shard_size: Size of a weight file at most, in bytes or such as "2GB"; a larger tensor has one of its own.
        verify: Compare the logits of the result with those of base and adapter before it gets its name. This loads
            both models, one after the other.

    Returns:
        Where it is, how well it agrees, and how large it is.

    Numerics:
        As `merge`; every other tensor of the base is copied as it is. Names and dtypes are those of the base's files.
        Over a quantised base every quantised weight is written as it was in training: quantised and dequantised.

    Cost:
        Without `verify`: memory for the adapter, the merged tensors of one shard, one weight in fp32 and its update
        (KaSA changes every adapted weight of the base when it is loaded: those as well). With it: one of the models
        at a time, and three forward passes.

    Raises:
        ConfigError: `out` is not empty, or `max_shard_size` is no size.
        ModelError: There is no such base, it is not in whole safetensors files, is quantised by another scheme than
            bitsandbytes', or is quantised and `fresh_base` asks for 16-bit weights.
        AdapterError: There is no such adapter, it does not fit the base or cannot be merged, or the logits differ.
        TargetError: The adapter names modules that the base does not have.
        RunError: The disk is full.

    Example:
        >>> merge_to_folder("runs/helpdesk", "helpdesk-merged")  # doctest: +SKIP
    """
    out = free_folder(out)
    adapter = find_adapter(source, base)
    if not adapter.path.is_dir():
        expected, todo = "an adapter in PEFT's format", "Convert it first"
        raise AdapterError(fault("merge", "source", str(source), expected, todo))
    if adapter.base is None:
        todo = "Name it: base='microsoft/Phi-4-mini-instruct', or a folder"
        raise AdapterError(fault("merge", "base", None, "the model that the adapter belongs to", todo))
    folder = base_folder(adapter.base)
    trained_over = read_trained_over(folder, adapter.base, adapter.path, fresh_base)
    weights = _Weights(folder, adapter.path, trained_over)
    shards = _shards(weights.like, max_shard_size)
    needed = sum(each.nbytes for each in weights.like.values())
    _check_room(out, needed)
    try:
        with whole_folder(out) as temporary:
            total = _write_weights(weights, shards, temporary, needed)
            _write_companions(folder, adapter.path, temporary, untied=weights.untied)
            write_text(temporary / "README.md", _card(out.name, source, adapter.base))
            result = _compare(folder, adapter.path, temporary, trained_over) if verify else None
    except Exception as error:
        if not disk_full(error):
            raise
        todo = "Free some space, or give another folder; nothing was written"
        raise RunError(fault("merge", "out", str(out), f"room for {needed:,} bytes", todo)) from error
    logger.info("%s: %d files, %s", out, len(shards), result or "not verified")
    return MergeResult(out, result, len(shards), total)


def free_folder(out: str | Path) -> Path:
    """The folder to write; raises ConfigError where it holds something."""
    path = Path(out).expanduser().absolute()
    if is_taken(path):
        todo = "Give another folder, or remove this one first"
        raise ConfigError(fault("merge", "out", str(out), "a new or empty folder", todo))
    return path


def _check_room(out: Path, needed: int) -> None:
    existing = next(each for each in out.parents if each.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        expected = f"room for {needed:,} bytes; {free:,} are free"
        raise RunError(fault("merge", "out", str(out), expected, "Free some space, or give another folder"))


# -- the base's files


def base_folder(base: str) -> Path:
    """The folder of a base whose config says that it can be merged into; from the hub, weights come after that check.

    Raises:
        ModelError: There is no such model, or another scheme than bitsandbytes' quantised its weights.
    """
    folder = Path(base)
    if not folder.is_dir():
        small = ["config.json", INDEX_NAME, GENERATION_FILE, *TOKENIZER_FILES, *COMPANION_FILES]
        folder = _download(base, small)
        check_folder(_read_json(folder / "config.json"), base)
        return _download(base, _weight_files(folder))
    check_folder(_read_json(folder / "config.json"), base)
    return folder


def _download(name: str, patterns: list[str]) -> Path:
    try:
        with reachable_or_cached():
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        expected = "the base model's folder, `nano`, or a model on the Hugging Face Hub"
        todo = f"Name the base yourself if it has moved. The hub says: {' '.join(str(error).split())[:200]}"
        raise ModelError(fault("merge", "base", name, expected, todo)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(fault(str(path), "content", str(error), "a JSON file", "Copy the base again")) from error


class _TrainedOver(NamedTuple):
    """The base of an adapter as it was in training.

    Attributes:
        dtype: Of its weights before they were quantised.
        quantization: How they were quantised when they were loaded; None: they are as the files hold them.
    """

    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None


def read_trained_over(folder: Path, base: str, adapter: Path, fresh_base: bool) -> _TrainedOver | None:
    """What the base's config, else the adapter's record, says of the base; None: weights that nothing quantised.

    Raises:
        ModelError: The base's files are quantised and a fresh one was asked for, or bitsandbytes is not installed.
    """
    config = _read_json(folder / "config.json")
    scheme = scheme_of(config)
    if scheme is not None:
        if fresh_base:
            expected = f"a base of 16-bit weights; these are {scheme}"
            todo = "Give the model that it was quantised from: --base PATH"
            raise ModelError(fault("merge", "base", base, expected, todo))
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return _TrainedOver(getattr(torch, dtype), None)
    record = _read_json(adapter / RECORD_NAME).get("base") if (adapter / RECORD_NAME).is_file() else None
    if record is None or fresh_base:
        return None
    require_bitsandbytes("quantization", record["quantization"])
    keys = {key: value for key, value in record["quantization"].items() if not key.startswith(("_", "quant_method"))}
    return _TrainedOver(getattr(torch, record["dtype"]), BitsAndBytesConfig(**keys))


def _weight_files(folder: Path) -> list[str]:
    if not (folder / INDEX_NAME).is_file():
        return ["model.safetensors"]
    return indexed_files(folder / INDEX_NAME)


def _open_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model folder, memory-mapped: their bytes are read when they are used.

    Raises:
        ModelError: A file is missing or torn.
    """
    tensors: dict[str, Tensor] = {}
    faults = []
    for name in _weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except FileNotFoundError:
            todo = "Save it as such: AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)"
            faults.append(fault(str(folder), "file", name, "weights in safetensors files", todo))
        except (SafetensorError, OSError) as error:
            expected = "a whole safetensors file"
            faults.append(fault(str(folder / name), "content", str(error), expected, "Copy the base again"))
    if faults:
        raise ModelError(one_per_line(faults))
    return tensors


class _Weights:
    """The tensors of a merged model by the names of the base's files, each made when it is asked for.

    The model that PEFT's layers are put on has the base's memory-mapped tensors for weights. The mapping is private:
    what is written to it costs memory and never reaches the file.

    Attributes:
        like: A tensor of the same shape and dtype for each, in the order of the base's files.
        untied: Whether embeddings that the base shares became two.
    """

    def __init__(self, folder: Path, adapter: Path, trained_over: _TrainedOver | None = None) -> None:
        """Check everything that can be known before a weight is changed.

        Raises:
            ModelError, AdapterError, TargetError: As `merge_to_folder`.
        """
        self._base = _open_weights(folder)
        self._made: dict[str, Callable[[], Tensor]] = {}
        skeleton = load_skeleton(ModelConfig(name_or_path=str(folder)))
        if trained_over is not None and trained_over.quantization is None:
            self._base, self._made = stored_weights(self._base, trained_over.dtype)
        self._ties = dict(skeleton.all_tied_weights_keys)
        self._file_names, converted = _file_names(skeleton, self._base)
        self._check_base(folder, skeleton, converted)
        if trained_over is not None and trained_over.quantization is not None:
            transposed = quantized_names(skeleton, trained_over.quantization)
            if converted & transposed.keys():
                expected = "weights that the base's files hold by themselves, to quantise them as in training"
                raise AdapterError(fault("merge", "base", sorted(converted & transposed.keys()), expected, IN_MEMORY))
            by_file = {self._file_names[name]: each for name, each in transposed.items()}
            self._made = rounded_weights(self._base, by_file, trained_over.quantization, trained_over.dtype)
        for name in dict(skeleton.named_parameters(remove_duplicate=False)):
            if name not in converted:
                _set_parameter(skeleton, name, self._source(name))
        self._modules = dict(skeleton.named_modules())
        names = {id(module): name for name, module in self._modules.items()}
        known = skeleton.state_dict().keys()

        config, self._initialisation = _without_initialisation(adapter)
        self._adapted = load_adapter(skeleton, adapter, config=config, torch_device="cpu")
        self._layers: dict[str, list[BaseTunerLayer]] = {}
        for layer in _mergeable(self._adapted).values():
            self._layers.setdefault(names[id(layer.get_base_layer())], []).append(layer)
        self._whole = {
            f"{names[id(original)]}.{key}": tensor
            for original, trained in _whole_modules(self._adapted)
            for key, tensor in trained.state_dict().items()
        }
        self._changed = self._whole.keys() | {
            f"{name}.{key}" for name, layers in self._layers.items() for key in _all_merged(layers)
        }
        # Trained biases, and embeddings that PEFT saved because they were resized.
        self._changed |= {_plain_name(key) for key in read_peft_tensors(adapter)} & known

        self.untied = self._untie()
        missing = sorted(self._changed - self._file_names.keys())
        if missing:
            expected = "tensors that the base's files hold by themselves; they hold these in another form"
            raise AdapterError(fault("merge", "base", missing, expected, IN_MEMORY))
        added = {file: name for name, file in self._file_names.items() if file not in self._base}
        self.like = self._base | {file: self._source(name) for file, name in added.items()}
        self._model_names = {file: name for name, file in self._file_names.items()}
        self._ready: dict[str, Tensor] = {}

    def _check_base(self, folder: Path, skeleton: PreTrainedModel, converted: set[str]) -> None:
        """Compare the files with what config.json says."""
        faults = []
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            file = self._file_names.get(name) or self._file_names.get(self._partner(name) or "")
            if file is None and name not in converted:
                faults.append(fault(str(folder), "missing", name, "a tensor for every parameter of config.json"))
            elif file is not None and self._base[file].shape != parameter.shape:
                expected = f"the shape {tuple(parameter.shape)}, by config.json"
                faults.append(fault(str(folder), file, tuple(self._base[file].shape), expected))
        if faults:
            raise ModelError(one_per_line(list(dict.fromkeys(faults))))

    def _partner(self, name: str) -> str | None:
        """The parameter that shares its tensor with `name`."""
        return self._ties.get(name) or next((target for target, each in self._ties.items() if each == name), None)

    def _source(self, name: str) -> Tensor:
        """The base's tensor of a parameter."""
        file = self._file_names.get(name)
        return self._base[file if file in self._base else self._file_names[cast(str, self._partner(name))]]

    def _untie(self) -> bool:
        """Give embeddings that the base's files hold as one a name each, if the adapter makes them differ."""
        touched = {each for pair in self._ties.items() if self._changed.intersection(pair) for each in pair}
        absent = touched - self._file_names.keys()
        if _stays_tied(self._adapted):
            self._changed -= absent
            return False
        self._file_names |= {name: name for name in absent}
        return bool(touched)

    def make(self, file_name: str) -> Tensor:
        """One tensor of the merged model, in the base's dtype. To be asked for once: it is not kept."""
        name = self._model_names.get(file_name)
        if name is None or name not in self._changed:
            return self._made[file_name]() if file_name in self._made else self.like[file_name]
        if name not in self._ready:
            module, _, key = name.rpartition(".")
            if key in _all_merged(self._layers.get(module, [])):
                self._ready |= self._merged(module)
            else:
                self._ready[name] = self._whole.get(name, self._modules[module].state_dict()[key])
        return self._ready.pop(name).to(self.like[file_name].dtype).contiguous()

    def _merged(self, name: str) -> dict[str, Tensor]:
        """Merge the layers of one module; its own weights are the base's again afterwards, which take no memory."""
        module, layers = self._modules[name], self._layers[name]
        before = {key: getattr(module, key) for key in _all_merged(layers)}
        file = self._file_names.get(f"{name}.weight")
        if file in self._made:
            module.weight = nn.Parameter(self._made[file](), requires_grad=False)
        for layer in layers:
            if self._initialisation is not None and isinstance(layer, LoraLayer):
                module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
                _initialise(layer, self._initialisation)
            merge_layer(layer, name)
        merged = {f"{name}.{key}": getattr(module, key).detach() for key in before}
        for key, parameter in before.items():
            setattr(module, key, parameter)
        return merged


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter of that name, without a copy."""
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, nn.Parameter(tensor, requires_grad=False))


def _plain_name(key: str) -> str:
    """The name in the base model of a tensor that an adapter's file holds whole."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _without_initialisation(adapter: Path) -> tuple[PeftConfig, LoraConfig | None]:
    """An adapter's config to load it with; and, if its initialisation changes the base (PiSSA, ...), the one to do so.

    Raises:
        AdapterError: It is not LoRA, or replicates layers.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    where = str(adapter / "adapter_config.json")
    if config.peft_type != PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise AdapterError(fault(where, "peft_type", kind, "LORA", IN_MEMORY))
    if config.layer_replication:
        expected = "the layers that the base has"
        raise AdapterError(
            fault(where, "layer_replication", config.layer_replication, expected, "Serve base and adapter")
        )
    if not str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
        return config, None
    original = copy.copy(config)
    config.init_lora_weights = False
    return config, original


def _initialise(layer: LoraLayer, config: LoraConfig) -> None:
    """Do to a base weight what loading the adapter with its own config does."""
    adapter = layer.active_adapters[0]
    trained = {name: each for name, each in layer.state_dict().items() if not name.startswith("base_layer.")}
    layer.update_layer(adapter, layer.r[adapter], lora_alpha=layer.lora_alpha[adapter], config=config)
    layer.load_state_dict(trained, strict=False, assign=True)  # PEFT has made the new ones in the base's dtype


def _all_merged(layers: Iterable[BaseTunerLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in _merged_parameters(layer)))


def _file_names(skeleton: PreTrainedModel, tensors: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Names in the files by names in the model, as transformers maps them; and names that it makes out of several."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = skeleton.state_dict()
    plain: dict[str, str] = {}
    converted = set()
    for file_name in tensors:
        name, pattern = rename_source_key(file_name, renamings, converters, skeleton.base_model_prefix, known)
        if pattern is None:
            plain[name] = file_name
        else:
            converted.add(name)
    return {name: file_name for name, file_name in plain.items() if name in known}, converted


# -- what is written


def _shards(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """Names of the files and of the tensors in each.

    Raises:
        ConfigError: `max_shard_size` is no size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        expected = "a number of bytes, or a size such as 500MB or 2GB"
        raise ConfigError(fault("merge", "max_shard_size", max_shard_size, expected)) from error
    return split.filename_to_tensors


def _write_weights(weights: _Weights, shards: Mapping[str, list[str]], folder: Path, total_size: int) -> int:
    """Write the files one after the other; returns their size."""
    for file, names in shards.items():
        save_file({name: weights.make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return sum((folder / file).stat().st_size for file in shards)


def _write_companions(base: Path, adapter: Path, folder: Path, *, untied: bool) -> None:
    """Config, generation config and tokenizer."""
    config = _read_json(base / "config.json")
    config.pop("quantization_config", None)
    if untied:
        logger.warning("merge: %s", UNTIED)
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
    copy_files(base, folder, COMPANION_FILES)
    copy_files(adapter if (adapter / GENERATION_FILE).is_file() else base, folder, (GENERATION_FILE,))
    # A tokenizer's files belong together: all of them are the adapter's, or all the base's. Only the SentencePiece
    # model, which some converters ask for and PEFT folders lack, may be added: it is read by nothing else.
    if (adapter / "tokenizer_config.json").is_file():
        copy_files(base, folder, ("tokenizer.model",))
        copy_files(adapter, folder, TOKENIZER_FILES)
    else:
        copy_files(base, folder, TOKENIZER_FILES)


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder whose names fit."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _card(title: str, source: str | Path, base: str) -> str:
    adapter = Path(source).expanduser()
    name = "nano" if base == local_path("nano") else Path(base).name if Path(base).is_dir() else base
    return (
        f"# {title}\n\n"
        f"{name} with the LoRA adapter {adapter.name if adapter.exists() else source} merged into its weights.\n"
        f"Made with philora {version('philora')}; it loads as the base does, without peft.\n"
    )


def load_trained_over(base: Path, trained_over: _TrainedOver | None) -> PreTrainedModel:
    """The base as it was in training."""
    options: dict[str, Any] = {"dtype": "auto"}
    if trained_over is not None:
        options["dtype"] = trained_over.dtype
    if trained_over is not None and trained_over.quantization is not None:
        options["quantization_config"] = trained_over.quantization
    model = AutoModelForCausalLM.from_pretrained(base, **options).eval()
    keep_layout(model)
    return cast(PreTrainedModel, model)


def _compare(base: Path, adapter: Path, merged: Path, trained_over: _TrainedOver | None = None) -> Agreement:
    """Logits of the base, of base and adapter, and of the merged folder; at most one model is in memory at a time."""
    model = load_trained_over(base, trained_over)
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    plain = logits_of(model, tokens)
    model = load_adapter(model, adapter, torch_device="cpu")
    reference, bound = logits_of(model, tokens), _bound(model)
    del model
    gc.collect()  # PEFT's models are cycles
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    result = agreement("merge", reference, logits_of(model, tokens), max(bound, _bound(model)), base=plain)
    if result.relative > result.effect / 2 > 0:
        logger.warning(
            "merge: the check says little, because rounding to %s moves the logits by %.1e and the adapter by %.1e",
            str(model.dtype).removeprefix("torch."),
            result.relative,
            result.effect,
        )
    return result
