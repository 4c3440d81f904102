"""Merge an adapter from folder to folder: a model folder with the adapter in its weights, written shard by shard.

PEFT's layers are added to a model whose weights are the base's memory-mapped files. A tensor is merged when its shard
is written. The logits of the result are compared with those of base and adapter.
"""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, cast

from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from philora.adapters.peft_models import load_adapter
from philora.configuration.sections import ModelConfig
from philora.errors import AdapterError, ConfigError, ModelError, RunError, fault, one_per_line
from philora.exporting.merging import (
    CHANGES_BASE,
    UNTIED,
    merge_layer,
    mergeable,
    merged_parameters,
    rounding_bound,
    stays_tied,
    trained_modules,
)
from philora.files.checkpoint import (
    atomic_folder,
    disk_full,
    is_taken,
    not_writable,
    read_peft_tensors,
    unwritable,
    write_json,
    write_text,
)
from philora.kernels.quantization import quantized_names, rounded_weights, stored_weights
from philora.models.base_files import (
    COMPANION_FILES,
    INDEX_NAME,
    TrainedOver,
    base_folder,
    load_trained_over,
    open_weights,
    read_config_file,
    read_trained_over,
)
from philora.models.loading import load_skeleton
from philora.models.locate import AdapterSource, find_adapter, require_base, shown_base
from philora.models.run_folder import TrainedRun, example_messages
from philora.models.tokenizer_files import GENERATION_FILE, TOKENIZER_FILES, Companions, copy_files
from philora.models.verify import Agreement, agreement, logits_of
from philora.models.verify import probe as probe_tokens

logger = logging.getLogger(__name__)

IN_MEMORY = "Merge it in memory: philora.merge(model).save_pretrained(folder)"


class MergeResult(NamedTuple):
    """A merged model on disk.

    Attributes:
        folder: The written folder.
        agreement: Comparison of its logits with those of base and adapter; None if it was not verified.
        shards: Number of weight files.
        bytes: Size of the weight files.
    """

    folder: Path
    agreement: Agreement | None
    shards: int
    bytes: int


def merge_to_folder(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    fresh_base: bool = False,
    max_shard_size: int | str = "2GB",
    verify: bool = True,
) -> MergeResult:
    """Write base and adapter as one model folder, which transformers, vLLM and others can load.

    Args:
        source: A run folder, an adapter folder, a checkpoint or a hub id, in PEFT's format.
        out: The folder to write; it must be new or empty.
        base: Folder or hub id of the base; default: the one that the adapter names.
        fresh_base: For an adapter that was trained over a quantised base: merge it into the 16-bit weights in the files
            of `base`. By default it is merged into the dequantised weights, over which it was trained.
        max_shard_size: Largest size of a weight file, in bytes or as in "2GB"; a larger tensor gets a separate file.
        verify: Compare the logits of the result with those of base and adapter before it gets its final name. This
            loads both models, one after another.

    Returns:
        The folder, its agreement with base and adapter, and its size.

    Numerics:
        As `merge`; all other tensors of the base are copied. Names and dtypes are those of the base's files. Over a
        quantised base every quantised weight is written as it was in training: quantised and dequantised.

    Cost:
        Without `verify`: memory for the adapter, the merged tensors of one shard, one weight in fp32 and its update
        (KaSA changes all adapted weights of the base when it is loaded, so also for those). With it: one of the models
        at a time, and three forward passes.

    Raises:
        ConfigError: `out` is not empty, or `max_shard_size` is not a size.
        ModelError: There is no such base, its safetensors files are not complete, it is quantised by another scheme
            than bitsandbytes', or it is quantised although `fresh_base` is set.
        AdapterError: There is no such adapter, it does not fit the base or cannot be merged, or the logits differ.
        TargetError: The adapter names modules that the base does not have.
        RunError: The disk is full.

    Example:
        >>> merge_to_folder("runs/helpdesk", "helpdesk-merged")  # doctest: +SKIP
    """
    out = free_folder(out)
    adapter = find_adapter(source, base)
    if not adapter.path.is_dir():
        raise AdapterError(fault("merge", "source", str(source), "an adapter in PEFT's format", "Convert it first"))
    result = _merge(source, out, adapter, fresh_base, max_shard_size, verify)
    logger.info("%s: %d files, %s", out, result.shards, result.agreement or "not verified")
    return result


def _merge(
    source: str | Path, out: Path, adapter: AdapterSource, fresh_base: bool, max_shard_size: int | str, verify: bool
) -> MergeResult:
    base = require_base(adapter)
    folder = base_folder(base, adapter.revision)
    trained_over = read_trained_over(folder, base, adapter.path, fresh_base)
    weights = _Weights(folder, adapter.path, trained_over)
    shards = _shards(weights.like, max_shard_size)
    needed = sum(tensor.nbytes for tensor in weights.like.values())
    _check_free_space(out, needed)
    try:
        with atomic_folder(out) as temporary:
            total = _write_weights(weights, shards, temporary, needed)
            _write_companions(folder, adapter.path, temporary, untied=weights.untied)
            companions = Companions(temporary, temporary, weights.config)
            companions.write(temporary, files=False)
            write_text(temporary / "README.md", _card(out.name, source, base, companions, adapter.run))
            agreement = _compare(folder, adapter.path, temporary, trained_over) if verify else None
    except Exception as error:
        if not disk_full(error):
            raise
        todo = "Free some space, or give another folder; nothing was written"
        raise RunError(fault("merge", "out", str(out), f"free space for {needed:,} bytes", todo)) from error
    return MergeResult(out, agreement, len(shards), total)


def free_folder(out: str | Path) -> Path:
    """Return the folder to write.

    Raises:
        ConfigError: It is not empty, or cannot be created.
    """
    path = Path(out).expanduser().absolute()
    refused = unwritable(path)
    if refused is not None:
        raise ConfigError(not_writable("merge", "out", path, refused))
    if is_taken(path):
        todo = "Give another folder, or remove this one first"
        raise ConfigError(fault("merge", "out", str(out), "a new or empty folder", todo))
    return path


def _check_free_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        expected = f"free space for {needed:,} bytes; {free:,} are free"
        raise RunError(fault("merge", "out", str(out), expected, "Free some space, or give another folder"))


class _Weights:
    """The tensors of a merged model by the names of the base's files, computed when they are used.

    PEFT's layers are added to a model whose weights are the base's memory-mapped tensors. The mapping is private: a
    write to it takes memory, and does not change the file.

    Attributes:
        like: Tensors of the same shapes and dtypes, in the order of the base's files.
        config: The base's configuration.
        untied: Whether tied embeddings of the base became separate.
    """

    def __init__(self, folder: Path, adapter: Path, trained_over: TrainedOver | None = None) -> None:
        """Check all that can be checked before a weight is changed.

        Raises:
            ModelError, AdapterError, TargetError: As `merge_to_folder`.
        """
        self._base = open_weights(folder)
        self._made: dict[str, Callable[[], Tensor]] = {}
        skeleton = load_skeleton(ModelConfig(name_or_path=str(folder)))
        if trained_over is not None and trained_over.quantization is None:
            self._base, self._made = stored_weights(self._base, trained_over.dtype)
        self.config = skeleton.config
        self._ties = dict(skeleton.all_tied_weights_keys)
        self._file_names, converted = _file_names(skeleton, self._base)
        self._check_base(folder, skeleton, converted)
        if trained_over is not None and trained_over.quantization is not None:
            transposed = quantized_names(skeleton, trained_over.quantization)
            if converted & transposed.keys():
                expected = "separate weights in the base's files, to quantise them as in training"
                raise AdapterError(fault("merge", "base", sorted(converted & transposed.keys()), expected, IN_MEMORY))
            by_file = {self._file_names[name]: entry for name, entry in transposed.items()}
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
        for layer in mergeable(self._adapted).values():
            self._layers.setdefault(names[id(layer.get_base_layer())], []).append(layer)
        self._whole = {
            f"{names[id(original)]}.{key}": tensor
            for original, trained in trained_modules(self._adapted)
            for key, tensor in trained.state_dict().items()
        }
        self._changed = self._whole.keys() | {
            f"{name}.{key}" for name, layers in self._layers.items() for key in _all_merged(layers)
        }
        # Trained biases, and embeddings that PEFT saved because they were resized.
        tensors = (key.removeprefix("base_model.model.") for key in read_peft_tensors(adapter))
        self._changed |= {name.replace(".base_layer.", ".") for name in tensors} & known

        self.untied = self._untie()
        missing = sorted(self._changed - self._file_names.keys())
        if missing:
            expected = "tensors that are in the base's files; these are stored in another form"
            raise AdapterError(fault("merge", "base", missing, expected, IN_MEMORY))
        added = {file: name for name, file in self._file_names.items() if file not in self._base}
        self.like = self._base | {file: self._source(name) for file, name in added.items()}
        self._model_names = {file: name for name, file in self._file_names.items()}
        self._ready: dict[str, Tensor] = {}

    def _check_base(self, folder: Path, skeleton: PreTrainedModel, converted: set[str]) -> None:
        """Compare the files with config.json."""
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
        """Return the parameter that shares its tensor with `name`."""
        return self._ties.get(name) or next((target for target, ty in self._ties.items() if ty == name), None)

    def _source(self, name: str) -> Tensor:
        """Return the base's tensor of a parameter."""
        file = self._file_names.get(name)
        return self._base[file if file in self._base else self._file_names[cast(str, self._partner(name))]]

    def _untie(self) -> bool:
        """Store tied embeddings under both names if the adapter makes them differ; return whether it does."""
        touched = {entry for pair in self._ties.items() if self._changed.intersection(pair) for entry in pair}
        absent = touched - self._file_names.keys()
        if stays_tied(self._adapted):
            self._changed -= absent
            return False
        self._file_names |= {name: name for name in absent}
        return bool(touched)

    def make(self, file_name: str) -> Tensor:
        """Return one tensor of the merged model in the base's dtype. It is not cached, so each is computed once."""
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
        """Merge the layers of one module, and restore its own memory-mapped weights afterwards."""
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
    """Set a parameter to a tensor, without a copy."""
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, nn.Parameter(tensor, requires_grad=False))


def _without_initialisation(adapter: Path) -> tuple[PeftConfig, LoraConfig | None]:
    """Return a config for loading the adapter and, if its initialisation changes the base, its original config.

    Raises:
        AdapterError: It is not LoRA, or it replicates layers.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    where = str(adapter / "adapter_config.json")
    if config.peft_type != PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise AdapterError(fault(where, "peft_type", kind, "LORA", IN_MEMORY))
    if config.layer_replication:
        expected = "null, because a merged model has the base's layers"
        todo = "Serve base and adapter"
        raise AdapterError(fault(where, "layer_replication", config.layer_replication, expected, todo))
    if not str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
        return config, None
    original = copy.copy(config)
    config.init_lora_weights = False
    return config, original


def _initialise(layer: LoraLayer, config: LoraConfig) -> None:
    """Change a base weight as if the adapter were loaded with its original config."""
    adapter = layer.active_adapters[0]
    trained = {name: entry for name, entry in layer.state_dict().items() if not name.startswith("base_layer.")}
    layer.update_layer(adapter, layer.r[adapter], lora_alpha=layer.lora_alpha[adapter], config=config)
    layer.load_state_dict(trained, strict=False, assign=True)  # PEFT has made the new ones in the base's dtype


def _all_merged(layers: Iterable[BaseTunerLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in merged_parameters(layer)))


def _file_names(skeleton: PreTrainedModel, tensors: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return names in the files by names in the model, and names that transformers makes from several tensors."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
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


# -- writing


def _shards(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """Return the names of tensors by the name of their file.

    Raises:
        ConfigError: `max_shard_size` is not a size.
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
    """Write the files one after another, and return their size."""
    for file, names in shards.items():
        save_file({name: weights.make(name) for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return sum((folder / file).stat().st_size for file in shards)


def _write_companions(base: Path, adapter: Path, folder: Path, *, untied: bool) -> None:
    """Write config, generation config and tokenizer."""
    config = read_config_file(base / "config.json")
    config.pop("quantization_config", None)
    if untied:
        logger.warning("merge: %s", UNTIED)
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
    copy_files(base, folder, COMPANION_FILES)
    copy_files(adapter if (adapter / GENERATION_FILE).is_file() else base, folder, (GENERATION_FILE,))
    # A tokenizer's files belong together: they are all the adapter's or all the base's. Only the SentencePiece model,
    # which some converters need and PEFT folders lack, is added, since nothing else reads it.
    if (adapter / "tokenizer_config.json").is_file():
        copy_files(base, folder, ("tokenizer.model",))
        copy_files(adapter, folder, TOKENIZER_FILES)
    else:
        copy_files(base, folder, TOKENIZER_FILES)


def _card(title: str, source: str | Path, base: str, companions: Companions, run: Path | None) -> str:
    adapter = Path(source).expanduser()
    text = (
        f"# {title}\n\n"
        f"{shown_base(base)} with the LoRA adapter {adapter.name if adapter.exists() else source} merged into its "
        "weights.\n"
        f"Made with philora {version('philora')}; it loads as the base does, without peft.\n"
    )
    if companions.stop_tokens:
        stops = ", ".join(f"`{stop_token}`" for stop_token in companions.stop_tokens)
        text += f"An answer ends at {stops}; `stop_tokens.json` has them by id.\n"
    if companions.tokenizer is None:
        return text
    chat = companions.tokenizer.chat_template is not None
    question = example_messages(None if run is None else TrainedRun(run).system) if chat else '"Hello"'
    return f"""{text}
```python
from transformers import pipeline

answer = pipeline("text-generation", ".")
print(answer({question}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

```
vllm serve . --served-model-name {title}
```
"""


def _compare(base: Path, adapter: Path, merged: Path, trained_over: TrainedOver | None = None) -> Agreement:
    """Compare logits of base and adapter with those of the merged folder; one model is in memory at a time."""
    model = load_trained_over(base, trained_over)
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    plain = logits_of(model, tokens)
    model = load_adapter(model, adapter, torch_device="cpu")
    reference, bound = logits_of(model, tokens), rounding_bound(model)
    del model
    gc.collect()  # PEFT's models are cycles
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    result = agreement("merge", reference, logits_of(model, tokens), max(bound, rounding_bound(model)), base=plain)
    if result.relative > result.effect / 2 > 0:
        logger.warning(
            "merge: the check is weak, because rounding to %s moves the logits by %.1e and the adapter by %.1e",
            str(model.dtype).removeprefix("torch."),
            result.relative,
            result.effect,
        )
    return result
