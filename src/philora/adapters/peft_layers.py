"""LoRA adapters on Hugging Face models: PEFT's, with strict names, slices of fused projections, and a fast forward.

    names in a LoraConfig -> `resolve` -> a LoraConfig that PEFT understands, and the slices it stands for
                          -> PEFT injects its layers -> `optimize` swaps their class for `FastLinear`

A slice adapter (`q_proj`, `v_proj`, `gate_proj`, ...) *is* a PEFT adapter of the fused module: the slices' A stacked,
their B on the diagonal of a matrix that is zero elsewhere, rank R = r x slices, and alpha raised so that the
multiplier stays what it was. What makes it a slice adapter is that the zeros get no gradient.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import peft
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, PeftType
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from philora.adapters.embeddings import Whole
from philora.compat.peft import ExcludedModule, check_target_module_exists, expand_all_linear
from philora.decoder_stack.facts import not_one_adapter
from philora.decoder_stack.model import use_decoder_stack
from philora.errors import AdapterError, ConfigError, PhiloraError, TargetError, fault, nearest, one_per_line
from philora.families import fused_slices
from philora.files.checkpoint import read_peft_tensors, write_json
from philora.kernels import attention
from philora.kernels.memory import keep_freed_memory, return_large_blocks
from philora.kernels.modules import recompute_elementwise, use_fast_modules
from philora.kernels.quantization import QuantizedWeight, is_quantized, keep_layout, parameters_in, shares_memory
from philora.kernels.quantization import record as quantization_record
from philora.kernels.rotary import use_document_rotary
from philora.lora.functional import fused_enabled, lora_linear, lora_sliced_linear, records
from philora.lora.hooks import all_are_hooked, is_hooked, is_of, is_patched
from philora.runtime.hub import download_adapter, parse_hub_path

logger = logging.getLogger(__name__)

RECORD_NAME = "philora.json"
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D, BaseTunerLayer)


class MissingTargetError(TargetError, NoMatchingPeftModuleError):  # type: ignore[misc]
    """A name in `target_modules` matches nothing; PEFT's error of that case, too, and it begins with PEFT's words."""


class Slice(NamedTuple):
    """One slice of a fused projection: its name, its rows of the output, its columns of B (rows of A)."""

    name: str
    row_start: int
    row_stop: int
    rank_start: int
    rank_stop: int


Slices = tuple[Slice, ...]


class Resolution(NamedTuple):
    """Describe what a LoraConfig means on a model: PEFT's form of it, and slices by their fused module."""

    config: LoraConfig
    slices: dict[str, Slices]

    def for_peft(self, given: LoraConfig) -> LoraConfig:
        """Return the config that PEFT gets, which it fills in.

        It is the caller's own object, as with PEFT. Only slices have a copy: the caller's config keeps their names,
        so that it means the same on the next model.
        """
        if self.slices:
            return self.config
        given.target_modules = self.config.target_modules
        return given


def is_lora(config: object) -> bool:
    """Return whether a config is LoRA's and of no method built on it, such as AdaLoRA, whose layers differ."""
    return isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA


# ---------------------------------------------------------------------------------------------------- names


@dataclass
class Names:
    """Everything in a model that a LoraConfig can name: its modules, and the slices of its fused projections."""

    modules: dict[str, nn.Module]
    rows: dict[str, dict[str, tuple[int, int]]]  # full name of a fused module -> slice -> rows
    fused_of: dict[str, tuple[str, str]] = field(init=False)  # full name of a slice -> (fused module, slice)

    def __post_init__(self) -> None:
        self.fused_of = {
            f"{fused.rpartition('.')[0]}.{part}".lstrip("."): (fused, part)
            for fused, slices in self.rows.items()
            for part in slices
        }

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Return the names of a model."""
        modules = {name: module for name, module in model.named_modules() if name}
        layout = fused_slices(getattr(model, "config", None))
        rows = {}
        for name, module in modules.items():
            slices = layout.get(name.rpartition(".")[2])
            if slices and getattr(module, "out_features", None) == max(stop for _, stop in slices.values()):
                rows[name] = dict(slices)
        return cls(modules, rows)

    def matching(self, target: str, pool: Iterable[str]) -> list[str]:
        """Return names that PEFT takes `target` of a list for: the name itself or its last parts."""
        return [name for name in pool if name == target or name.endswith(f".{target}")]

    def adaptable(self) -> list[str]:
        """Return the short names that a person can target, for messages."""
        leaves = {name.rpartition(".")[2] for name, module in self.modules.items() if _is_adaptable(module)}
        return sorted(leaves | {part for slices in self.rows.values() for part in slices})

    def condensed(self, full_names: Iterable[str]) -> list[str]:
        """Return the same modules by their last name part, wherever that part names no other module."""
        chosen = set(full_names)
        short: set[str] = set()
        for name in chosen:
            leaf = name.rpartition(".")[2]
            short.add(leaf if set(self.matching(leaf, self.modules)) <= chosen else name)
        return sorted(short)


def _is_adaptable(module: nn.Module) -> bool:
    return (isinstance(module, ADAPTABLE) or hasattr(module, "in_features")) and not _is_own_linear(module)


def _is_own_linear(module: nn.Module) -> bool:
    """Return whether a linear layer belongs to one architecture and does more than a product, as a router of experts
    does.
    """
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.")
    return own and isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward


@cache
def _say_left_out(kinds: tuple[str, ...]) -> None:
    logger.warning("all-linear leaves out %s: LoRA adapts layers that give a product and no more", ", ".join(kinds))


def _as_list(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or [])


def _matches_pattern(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


# Names that PEFT puts into modules_to_save by itself for a task, whichever of them the model has.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def resolve(model: nn.Module, peft_config: LoraConfig, where: str = "peft_config") -> Resolution:
    """Check every name of a LoraConfig against a model, and turn slices into PEFT's terms. Changes neither.

    Args:
        model: The model to be adapted, with weights or on the meta device.
        peft_config: What is wanted. `target_modules` may name slices of fused projections.
        where: What the messages call the configuration.

    Returns:
        A copy of the config in PEFT's terms, and the slices of every fused module.

    Raises:
        TargetError: A target, excluded module, pattern key, layer index or module to save matches nothing, a target
            cannot be adapted, slices of one module differ in rank or alpha, or the initialisation does not allow
            slices. All faults at once.
    """
    names = Names.of(model)
    faults: list[str] = []
    config = copy.deepcopy(peft_config)

    not_found: list[str] = []

    def missing(key: str, name: str, pool: Iterable[str], what: str) -> None:
        if key == "target_modules":
            not_found.append(name)
        known = sorted(set(pool))
        todo = nearest(name, known) or f"Known: {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
        faults.append(fault(where, key, name, f"the name of {what}", todo))

    real, wanted = _resolve_targets(model, config, names, missing, faults, where)
    real, wanted = _apply_exclusions(config, names, real, wanted, missing, faults, where)

    for name in real:
        if not _is_adaptable(names.modules[name]):
            kind = type(names.modules[name]).__name__
            expected = "a linear, embedding or convolution layer"
            faults.append(fault(where, "target_modules", name, expected, f"It is a {kind}"))
    heads = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    for name in _as_list(config.modules_to_save):
        if name not in heads and not names.matching(name, names.modules):
            missing("modules_to_save", name, (module.rpartition(".")[2] for module in names.modules), "a module")
    if config.layers_to_transform is not None:
        _check_layers(config, names, faults, where)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(_matches_pattern(pattern, name) for name in [*real, *wanted]):
                missing(key, pattern, (entry.rpartition(".")[2] for entry in [*real, *wanted]), "a targeted module")

    slices = _resolve_slices(config, names, real, wanted, faults, where)
    text = one_per_line(list(dict.fromkeys(faults)))
    if not_found:
        said = peft_config.target_modules if isinstance(peft_config.target_modules, str) else set(not_found)
        words = f"Target modules {said} not found in the base model. Please check the target modules and try again."
        raise MissingTargetError(f"{words}\n{text}")
    if faults:
        raise TargetError(text)
    return Resolution(config, slices)


def resolve_for_training(model: nn.Module, peft_config: LoraConfig, where: str = "peft_config") -> Resolution:
    """Resolve for TRL's trainer: it computes the loss from the head's weight, so no adapter can be there.

    Raises:
        TargetError: As `resolve`, and when the output head is a target.
    """
    resolution = resolve(model, peft_config, where)
    targets = resolution.config.target_modules
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    everything = isinstance(targets, str) and targets.lower() == "all-linear"  # PEFT leaves the head out of it
    for name, module in model.named_modules():
        if module is head and targets is not None and not everything:
            matched = check_target_module_exists(resolution.config, name)
            if matched and not isinstance(matched, ExcludedModule):
                expected = "no adapter on the output head: the loss is computed from its weight, so it would not train"
                todo = f"Train the head itself with modules_to_save: [{name}], or leave it out"
                raise TargetError(fault(where, "target_modules", name, expected, todo))
    return resolution


def _resolve_targets(
    model: nn.Module, config: LoraConfig, names: Names, missing: Any, faults: list[str], where: str
) -> tuple[list[str], list[str]]:
    """Return the full names of the modules and of the slices that `target_modules` names."""
    targets = config.target_modules
    if targets is None:
        if config.target_parameters:
            _check_target_parameters(model, config, missing)
            return [], []
        model_type = BaseTuner.get_model_config(model).get("model_type")
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None:
            todo = f"Give 'all-linear' or names out of: {', '.join(names.adaptable())}"
            faults.append(fault(where, "target_modules", None, "names of modules", todo))
            return [], []
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            probe = copy.copy(config)
            expanded = sorted(cast("set[str]", expand_all_linear(probe, model).target_modules))
            kept = [name for name in expanded if not _is_own_linear(names.modules[name])]
            if kept != expanded:
                config.target_modules = set(names.condensed(kept))
                _say_left_out(tuple(sorted({type(names.modules[name]).__name__ for name in {*expanded} - {*kept}})))
            return kept, []
        real = [name for name in names.modules if re.fullmatch(targets, name)]
        wanted = [name for name in names.fused_of if re.fullmatch(targets, name)]
        if not real and not wanted:
            missing("target_modules", targets, names.adaptable(), "at least one module (as a regular expression)")
        return real, wanted
    real, wanted = [], []
    for target in _as_list(targets):
        modules = names.matching(target, names.modules)
        slices = names.matching(target, names.fused_of)
        if not modules and not slices:
            missing("target_modules", target, names.adaptable(), "a module or of a slice of a fused projection")
        real += modules
        wanted += slices
    return real, wanted


def _check_target_parameters(model: nn.Module, config: LoraConfig, missing: Any) -> None:
    parameters = [name for name, _ in model.named_parameters()]
    for target in _as_list(config.target_parameters):
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            missing("target_parameters", target, {name.rpartition(".")[2] for name in parameters}, "a parameter")


def _apply_exclusions(
    config: LoraConfig, names: Names, real: list[str], wanted: list[str], missing: Any, faults: list[str], where: str
) -> tuple[list[str], list[str]]:
    """Take out what `exclude_modules` names; a name that stands for nothing is a fault."""
    excluded = config.exclude_modules
    if not excluded:
        return real, wanted
    if isinstance(excluded, str):
        hit = {name for name in [*names.modules, *names.fused_of] if re.fullmatch(excluded, name)}
        if not hit:
            missing("exclude_modules", excluded, names.adaptable(), "at least one module (as a regular expression)")
    else:
        hit = set()
        for name in _as_list(excluded):
            found = names.matching(name, [*names.modules, *names.fused_of])
            if not found:
                missing("exclude_modules", name, names.adaptable(), "a module")
            hit.update(found)
    for name in sorted(hit & set(names.fused_of) - set(wanted)):
        fused, slice_name = names.fused_of[name]
        if fused in real and fused not in hit:
            leaf = fused.rpartition(".")[2]
            others = [entry for entry in names.rows[fused] if entry != slice_name]
            todo = f"{leaf} is targeted as one matrix; target {' and '.join(others)} in its place"
            faults.append(fault(where, "exclude_modules", slice_name, "a module that is targeted by itself", todo))
    return [name for name in real if name not in hit], [name for name in wanted if name not in hit]


def _check_layers(config: LoraConfig, names: Names, faults: list[str], where: str) -> None:
    layers = config.layers_to_transform
    indexes = [layers] if isinstance(layers, int) else list(layers)
    patterns = _as_list(config.layers_pattern) or [r"[^.]*"]
    found = {
        int(match["index"])
        for name in names.modules
        for pattern in patterns
        if (match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name))
    }
    for index in indexes:
        if index not in found:
            expected = f"a layer index from 0 to {max(found)}" if found else "a model with numbered layers"
            faults.append(fault(where, "layers_to_transform", index, expected))


def _resolve_slices(
    config: LoraConfig, names: Names, real: list[str], wanted: list[str], faults: list[str], where: str
) -> dict[str, Slices]:
    """Replace slices by their fused modules in `config`; ranks and alphas through its patterns."""
    by_module: dict[str, list[str]] = {}
    for name in wanted:
        fused, slice_name = names.fused_of[name]
        by_module.setdefault(fused, []).append(slice_name)
    if not by_module:
        return {}
    if config.init_lora_weights not in (True, False, "gaussian"):
        todo = "Use init_lora_weights=True, or target the fused modules themselves"
        faults.append(fault(where, "init_lora_weights", config.init_lora_weights, "True for slices", todo))
    slices: dict[str, Slices] = {}
    rank_pattern: dict[str, dict[str, int]] = {}
    alpha_pattern: dict[str, dict[str, float]] = {}
    for fused, chosen in by_module.items():
        leaf = fused.rpartition(".")[2]
        ordered = [entry for entry in names.rows[fused] if entry in chosen]
        if fused in real:
            todo = f"Name {leaf} for one matrix of rank r, or its slices for a rank r of each"
            faults.append(fault(where, "target_modules", [leaf, *ordered], f"{leaf} or its slices, not both", todo))
            continue
        parent = fused.rpartition(".")[0]
        values: dict[str, dict[str, float]] = {}
        for key, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
            pattern = getattr(config, key)
            full = {entry: f"{parent}.{entry}".lstrip(".") for entry in ordered}
            values[key] = {entry: pattern.get(get_pattern_key(pattern, full[entry]), default) for entry in ordered}
            if len(set(values[key].values())) > 1:
                expected = f"one value for all slices of {leaf}, which share one A and one B on disk"
                faults.append(fault(where, key, values[key], expected, "Give them the same value"))
        r, alpha = int(values["rank_pattern"][ordered[0]]), values["alpha_pattern"][ordered[0]]
        slices[fused] = tuple(
            Slice(entry, *names.rows[fused][entry], index * r, (index + 1) * r) for index, entry in enumerate(ordered)
        )
        stacked = len(ordered)
        rank_pattern.setdefault(leaf, {})[fused] = r * stacked
        alpha_pattern.setdefault(leaf, {})[fused] = alpha * (math.sqrt(stacked) if config.use_rslora else stacked)
    config.target_modules = set(names.condensed([*real, *by_module]))
    if config.exclude_modules and not isinstance(config.exclude_modules, str):
        kept = [entry for entry in _as_list(config.exclude_modules) if names.matching(entry, names.modules)]
        config.exclude_modules = kept or None
    # The first key that matches counts for PEFT, so the fused modules' own stand before the person's.
    config.rank_pattern = _pattern_keys(rank_pattern) | _without_slices(config.rank_pattern, real)
    config.alpha_pattern = _pattern_keys(alpha_pattern) | _without_slices(config.alpha_pattern, real)
    return slices


def _pattern_keys(by_leaf: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for leaf, values in by_leaf.items():
        keys.update({leaf: next(iter(values.values()))} if len(set(values.values())) == 1 else values)
    return keys


def _without_slices(pattern: Mapping[str, Any], real: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in pattern.items() if any(_matches_pattern(key, name) for name in real)}


# --------------------------------------------------------------------------------------------------- layers


class _FastForward:
    """The forward of PEFT's LoRA layers of a linear layer, as one autograd node where the case is the plain one."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: dict[str, Any]
    lora_bias: dict[str, bool]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    recomputes = False  # whether dropout's mask is drawn again in backward

    @property
    def slices(self) -> dict[str, Slices]:
        """Return the slices of every adapter that has some. They are kept at its B, with which they come and go."""
        return {name: up.slice_layout for name, up in self.lora_B.items() if hasattr(up, "slice_layout")}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute PEFT's forward. Shapes: x (..., in); returns (..., out)."""
        why = "arguments" if args or kwargs else not_plain(cast(LoraLayer, self))
        if why is not None:
            if why == _SHARDED_ALONE:
                _say_sharded_alone()
            if self.disable_adapters and not (self.merged or args or kwargs) and _evaluates_quantized(self.base_layer):
                # bitsandbytes would round the activations to 8 bits here, and in training it would not.
                return QuantizedWeight(self.base_layer).product(x, self.base_layer.bias)
            _keep_zeros(cast(LoraLayer, self))
            return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        adapter = next(active_adapter for active_adapter in self.active_adapters if active_adapter in self.lora_A)
        base, dropout = self.base_layer, self.lora_dropout[adapter]
        up = self.lora_B[adapter]
        adapters = (self.lora_A[adapter].weight, up.weight)
        p = float(getattr(dropout, "p", 0.0))
        scaling = float(self.scaling[adapter])
        if is_fx_symbolic_tracing():  # PEFT's own forward branches on the dtype of x, which is not known there
            return cast(Tensor, base(x) + up(self.lora_A[adapter](dropout(x))) * scaling)
        slices = getattr(up, "slice_layout", None)
        weight, bias, dtype = base.weight, base.bias, x.dtype
        if type(base) is not nn.Linear:
            weight = QuantizedWeight(base)
            x = x.to(weight.compute_dtype or dtype)
            bias = None if bias is None else bias.to(x.dtype)
        if slices:
            blocks = [part[1:] for part in slices]
            y = lora_sliced_linear(x, weight, bias, *adapters, blocks, scaling, p, dropout.training, self.recomputes)
        else:
            y = lora_linear(x, weight, bias, *adapters, scaling, p, dropout.training, self.recomputes)
        return y if type(base) is nn.Linear else y.to(dtype)

    def _plain_adapter(self) -> str | None:
        """Name of the one adapter that the fused function can compute, or None."""
        layer = cast(LoraLayer, self)
        return (
            None
            if not_plain(layer)
            else next(active_adapter for active_adapter in layer.active_adapters if active_adapter in layer.lora_A)
        )


_SHARDED_ALONE = "FSDP shards its parts by themselves"


def not_plain(layer: LoraLayer) -> str | None:
    """Return why a LoRA layer needs PEFT's own forward; None where it is the plain case.

    Plain is what one function of the weights computes alike: one active adapter without a variant (DoRA, ...), not
    merged, not disabled, no bias of B, a scaling that is a number, and nobody who takes part in the calls of the inner
    modules, which the function does not make: hooks, a replaced forward, parametrizations, weights of other classes.

    Args:
        layer: PEFT's layer of a linear layer, or one that replaces it.
    """
    why = not_one_adapter(layer)
    if why is not None:
        return why
    adapter: str = next(active_adapter for active_adapter in layer.active_adapters if active_adapter in layer.lora_A)
    if type(layer.scaling[adapter]) not in (float, int):
        return "its scaling is no plain number"
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not _is_plain_base(base) or type(down) is not nn.Linear or type(up) is not nn.Linear:
        sharded = any(isinstance(entry, FSDPModule | FullyShardedDataParallel) for entry in (base, down, up))
        return _SHARDED_ALONE if sharded else "its parts are no plain linear layers"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return "its dropout is another module"
    if is_fx_symbolic_tracing():
        return None  # it replaces every module's call, and hands over stand-ins for weights
    weights = (down.weight, up.weight, base.weight) if type(base) is nn.Linear else (down.weight, up.weight)
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights) or cast(Any, down).bias is not None:
        return "its weights are of a class of their own, or A has a bias"
    if is_hooked(base) or is_hooked(down) or is_hooked(up) or is_hooked(dropout):
        return "its parts have hooks"
    if torch.compiler.is_compiling():
        return None  # torch.compile looks after what is patched
    if all_are_hooked():
        return "there are hooks for all modules"
    if is_patched() or not is_of(PeftLinear.forward, peft_layer.__file__):
        return "a forward of PyTorch's or PEFT's was replaced"
    return None


@cache
def _say_sharded_alone() -> None:
    """Warn once that layers run PEFT's forward, because a weight is whole only while its own module runs."""
    logger.warning(
        "FSDP shards linear layers inside LoRA layers by themselves, so those run PEFT's own forward. "
        "Wrap whole decoder layers to have the fused one."
    )


def _evaluates_quantized(layer: nn.Module) -> bool:
    return not torch.is_grad_enabled() and not is_hooked(layer) and not all_are_hooked() and is_quantized(layer)


def _is_plain_base(layer: nn.Module) -> bool:
    """Return whether its weight is there whenever it is read; FSDP's modules are of classes of their own."""
    return type(layer) is nn.Linear or (is_quantized(layer) and not isinstance(layer, FSDPModule))


class FastLinear(_FastForward, PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer of a `torch.nn.Linear`, computed as one autograd node where the case is the plain one.

    `not_plain` returns what is not plain; that runs PEFT's own forward. `optimize` sets the class of existing layers;
    nothing else about them changes, so state dicts, saving and PEFT's methods stay PEFT's, and it goes by the name of
    PEFT's class in `print(model)` and wherever a tool reads it.
    """


FAST: dict[type[nn.Module], type[nn.Module]] = {PeftLinear: FastLinear}
"""PEFT's LoRA layers and the classes that replace them."""

if is_bnb_4bit_available():
    from peft.tuners.lora import Linear4bit, Linear8bitLt

    class FastLinear4bit(_FastForward, Linear4bit):  # type: ignore[misc]
        """As `FastLinear`, over bitsandbytes' 4-bit layer."""

    class FastLinear8bitLt(_FastForward, Linear8bitLt):  # type: ignore[misc]
        """As `FastLinear`, over bitsandbytes' 8-bit layer: activations are not rounded to 8 bits."""

    FAST |= {Linear4bit: FastLinear4bit, Linear8bitLt: FastLinear8bitLt}

for _plain, _fast in FAST.items():
    _fast.__name__ = _plain.__name__  # pickle and `repr` of the class go by the qualified name, which stays


def optimize(model: nn.Module, recomputation: Literal["none", "elementwise"] | None = None) -> nn.Module:
    """Use the fast paths in a model that somebody else made, in place.

    Swaps the class of each of PEFT's LoRA layers over a `torch.nn.Linear`, or over a quantised layer of bitsandbytes,
    for `FastLinear` or its like, transformers' `sdpa` attention for the one that treats the documents of a packed row
    on their own, and Phi-3's attention and feed-forward modules and the family's RMSNorm for those of
    `kernels.modules`. LongRoPE's factors are chosen for each document by itself (`kernels.rotary`). On a GPU the layers
    of packed training batches become one autograd node each (`decoder_stack`). Quantised weights keep their layout
    (`quantization.keep_layout`). Idempotent; where none is found the model stays as it is. In a run of philora's with a
    model on a CPU the process keeps freed memory, or gives large blocks back where products over a quantised base
    allocate a matrix each (`kernels.memory`); elsewhere the process stays as it is.

    Args:
        model: A PeftModel, or any model; packed rows are recognised by `position_ids` that start again.
        recomputation: "elementwise": what is cheap to compute again is not kept for backward: the outputs of RMSNorm
            and SwiGLU, and dropout's masks; losses and gradients are the same bits. "none": it is kept. None: as it was
            (at first "none"). Whole layers are recomputed by `model.gradient_checkpointing_enable()`.

    Returns:
        The same model.

    Raises:
        ConfigError: Another `recomputation`.
    """
    if recomputation not in (None, "none", "elementwise"):
        todo = "model.gradient_checkpointing_enable() recomputes whole layers"
        raise ConfigError(fault("optimize", "recomputation", recomputation, "none or elementwise", todo))
    for module in model.modules():
        fast = FAST.get(type(module))
        if fast is not None and _is_plain_base(cast(LoraLayer, module).base_layer):
            module.__class__ = fast
    keep_layout(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if (
        isinstance(base, PreTrainedModel)
        and base.config.model_type in attention.MODEL_TYPES
        and base.config._attn_implementation == "sdpa"
    ):
        attention.register()
        base.set_attn_implementation(attention.NAME)
    use_fast_modules(model)
    use_decoder_stack(model)
    use_document_rotary(model)
    if recomputation is not None:
        _set_recomputation(model, recomputation == "elementwise")
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        matrices_come_and_go = any(is_quantized(module) and not shares_memory(module) for module in model.modules())
        return_large_blocks() if matrices_come_and_go else keep_freed_memory()
    return model


def _set_recomputation(model: nn.Module, on: bool) -> None:
    """Let the fast modules and layers keep less for backward, or as usual; warn of what that does not cover."""
    parts = recompute_elementwise(model, on)
    kept = 0
    for layer in model.modules():
        if isinstance(layer, _FastForward):
            layer.recomputes = on
        kept += isinstance(layer, LoraLayer) and not (isinstance(layer, _FastForward) and layer._plain_adapter())
    if not on:
        return
    todo = "gradient_checkpointing=True (full) recomputes whole layers of any model"
    if not fused_enabled():
        logger.warning("element-wise recomputation is a part of the fused path, which is off: all is kept. %s.", todo)
    elif not parts:
        logger.warning("element-wise recomputation: no RMSNorm or SwiGLU of this model has a fast form. %s.", todo)
    elif "SwiGLU" not in parts:
        logger.warning("element-wise recomputation covers %s of this model alone. %s.", " and ".join(parts), todo)
    if kept and fused_enabled():
        logger.warning("element-wise recomputation: %d LoRA layers run PEFT's forward and keep their inputs", kept)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA layers by the name that their module has in the base model; AdaLoRA's are no such layers."""
    return {
        name: low_rank_layer
        for name, low_rank_layer in _low_rank_layers(model).items()
        if not isinstance(low_rank_layer, AdaLoraLayer)
    }


def _low_rank_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return LoRA's layers and AdaLoRA's, whose A and B are parameters and no modules, by their name in the base."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def apply_slices(model: PeftModel, slices: Mapping[str, Slices], adapter_name: str = "default") -> None:
    """Tell the layers of an adapter which slices they hold; what is outside them is zero and stays zero.

    Args:
        model: A PeftModel whose adapter has the ranks that `resolve` gave it.
        slices: By full name of the fused module in the base model.
        adapter_name: The adapter.
    """
    for name, layer in lora_layers(model).items():
        if name not in slices or adapter_name not in layer.lora_A:
            continue
        up = layer.lora_B[adapter_name]
        up.slice_layout = slices[name]
        with torch.no_grad():
            up.weight.mul_(_inside(up.weight, slices[name]))
        _keep_zeros(layer)
        if not isinstance(layer, _FastForward):  # PEFT's own forward runs there
            layer.register_forward_pre_hook(_keep_zeros)
    if slices or quantization_record(model.get_base_model()):
        _remember_slices(model, slices, adapter_name)


class _ZeroOutside:
    """Hook of a sliced B: its gradient outside the slices is zero."""

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.inside.to(grad)


def _keep_zeros(layer: LoraLayer, *_: Any) -> None:
    """Ensure that every sliced B that trains has its hook, before PEFT's own forward runs (DoRA, ...).

    A B that did not train yet could not have one, and copying or pickling a layer drops it.
    """
    if records():
        return
    for up in layer.lora_B.values():
        if not hasattr(up, "slice_layout") or not up.weight.requires_grad:
            continue
        if not any(
            isinstance(backward_hook, _ZeroOutside) for backward_hook in (up.weight._backward_hooks or {}).values()
        ):
            up.weight.register_hook(_ZeroOutside(_inside(up.weight, up.slice_layout)))


def keep_zeros_in_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back the zeros outside the slices after every step of an optimizer with 8-bit states.

    bitsandbytes reads a state of zero back as a very small number where its block holds larger ones, and so moves
    elements that have no gradient. Other optimizers leave them alone.
    """
    if getattr(getattr(optimizer, "args", None), "optim_bits", None) != 8:
        return
    sliced = [
        up for layer in lora_layers(model).values() for up in layer.lora_B.values() if hasattr(up, "slice_layout")
    ]
    masks = {id(up): _inside(up.weight, up.slice_layout) for up in sliced}

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for up in sliced:
            up.weight.mul_(masks[id(up)].to(up.weight.device))

    if sliced:
        optimizer.register_step_post_hook(put_back)


def _inside(weight: Tensor, slices: Slices) -> Tensor:
    """Return the mask of the blocks of B. Shape: that of `weight`, (out, R)."""
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for part in slices:
        mask[part.row_start : part.row_stop, part.rank_start : part.rank_stop] = True
    return mask


# ---------------------------------------------------------------------------------- models, saving, loading


class _RecordsSlices:
    """Part of a PeftModel whose `save_pretrained` also writes which slices its adapters hold, over what base."""

    philora_slices: dict[str, dict[str, Slices]]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT; the adapter's slices are forgotten with it."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.philora_slices.pop(adapter_name, None)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT, and beside each adapter `philora.json`: its slices, and how its base is quantised."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        for adapter, slices in self.philora_slices.items():
            if kwargs.get("selected_adapters") and adapter not in kwargs["selected_adapters"]:
                continue
            folder = Path(save_directory) if adapter == "default" else Path(save_directory, adapter)
            if folder.is_dir():
                sort_names(folder / "adapter_config.json")
                base = self.get_base_model()  # type: ignore[attr-defined]
                write_json(folder / RECORD_NAME, slice_record(slices) | quantization_record(base))


def sort_names(config: Path) -> None:
    """Sort the lists of names in `adapter_config.json`, which PEFT keeps as sets in an order of the process."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(content.get(key), list):
            content[key] = sorted(content[key], key=str)
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")  # as PEFT writes it


class SlicedPeftModel(_RecordsSlices, PeftModel):  # type: ignore[misc]
    """`peft.PeftModel` that records slices when it is saved."""


class SlicedPeftModelForCausalLM(_RecordsSlices, PeftModelForCausalLM):  # type: ignore[misc]
    """`peft.PeftModelForCausalLM` that records slices when it is saved."""


SlicedPeftModel.__name__ = PeftModel.__name__
SlicedPeftModelForCausalLM.__name__ = PeftModelForCausalLM.__name__


def _remember_slices(model: PeftModel, slices: Mapping[str, Slices], adapter_name: str) -> None:
    recording = {PeftModel: SlicedPeftModel, PeftModelForCausalLM: SlicedPeftModelForCausalLM}.get(type(model))
    if recording is not None:
        model.__class__ = recording
        model.philora_slices = {}
    if isinstance(model, _RecordsSlices):
        model.philora_slices[adapter_name] = dict(slices)


def slice_record(slices: Mapping[str, Slices]) -> dict[str, Any]:
    """Return the slices for `philora.json`: names in the order of their blocks, and the rank of each."""
    return {
        "format": 1,
        "slices": {
            module: {"names": [part.name for part in parts], "r": parts[0].rank_stop - parts[0].rank_start}
            for module, parts in slices.items()
        },
    }


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Make PEFT's model, with strict names, slices and the fast layers.

    Args:
        model: The base model; changed in place, as by PEFT.
        peft_config: Any PEFT config. For LoRA, every name must match something, and `target_modules` may name
            slices of fused projections (`q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`). PEFT fills it in, as
            it always does; a config with slices stays as it is.
        adapter_name: Name of the adapter.
        **kwargs: PEFT's further arguments. Methods other than LoRA, and `mixed=True`, go to PEFT as they are.

    Returns:
        The PeftModel; adapters are fp32 unless `autocast_adapter_dtype=False` is given.

    Raises:
        TargetError: A name matches nothing; see `resolve`. The model is unchanged then.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))  # doctest: +SKIP
    """
    if not is_lora(peft_config) or kwargs.get("mixed"):
        return cast(PeftModel, peft.get_peft_model(model, peft_config, adapter_name, **kwargs))
    given = cast(LoraConfig, peft_config)
    resolution = resolve(model, given)
    adapted = peft.get_peft_model(model, resolution.for_peft(given), adapter_name, **kwargs)
    optimize(adapted)
    apply_slices(adapted, resolution.slices, adapter_name)
    return cast(PeftModel, adapted)


def load_adapter(
    model: nn.Module, source: str | Path, adapter_name: str = "default", *, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """Put a saved PEFT adapter onto a base model, reporting every tensor that does not fit before anything changes.

    Args:
        model: The base model, or a PeftModel that gets one adapter more; the one that was active stays so.
        source: A folder in PEFT's format, or a hub id, with a subfolder and a revision if need be:
            `OWNER/NAME/SUB/FOLDER@REVISION`.
        adapter_name: The name it gets.
        is_trainable: Whether training continues from it.
        **kwargs: Further arguments of `PeftModel.from_pretrained`.

    Returns:
        The PeftModel with the fast layers on. Slices are taken from `philora.json`, else read from the zeros of B;
        blocks that are no longer zero make it a fused adapter, with a notice.

    Raises:
        AdapterError: The folder is no adapter, a file is torn, or tensors are missing, unexpected or mis-shaped.
        TargetError: The adapter names modules that the model does not have.
    """
    folder = _named_place(source)
    recorded: Mapping[str, Any] | None = None
    whole: Whole | None = None
    if folder.is_dir():
        plain = _without_adapters(model) if isinstance(model, PeftModel) else model
        config, tensors = check_adapter(plain, folder)
        with _reading(folder):
            whole = Whole(model, config, tensors, folder)
        _say_changed_base(model, whole, folder)
        recorded = _recorded_slices(folder, Names.of(plain))
    elif folder.exists():
        raise AdapterError(fault("load_adapter", "source", str(source), "a folder", "Give the folder that holds it"))
    with _reading(folder):
        before = {} if whole is None else whole.copies(model)
        place = folder if folder.is_dir() else source
        adapted = _with_adapter(model, place, adapter_name, is_trainable, **kwargs)
        if whole is not None:
            whole.put(adapted, adapter_name, before)
            adapted.changed_base = [*getattr(adapted, "changed_base", ()), *whole.under_lora]
    optimize(adapted)
    apply_slices(adapted, _saved_slices(adapted, recorded, folder, adapter_name), adapter_name)
    return cast(PeftModel, adapted)


def check_adapter(model: nn.Module, folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Check that a saved adapter fits a model, by its configuration and the header of its weights; return both.

    Args:
        model: The base; its weights are not looked at.
        folder: In PEFT's format.

    Raises:
        AdapterError, TargetError: As `load_adapter`.
    """
    tensors = read_peft_tensors(folder)
    with _reading(folder):
        config = PeftConfig.from_pretrained(str(folder))
        if is_lora(config):
            _check_harmless(config, folder)
            resolve(model, config, where=str(folder / "adapter_config.json"))
        _check_tensors(model, config, tensors, folder)
    return config, tensors


def _named_place(source: str | Path) -> Path:
    """Return the folder of an adapter, downloaded if a folder or revision of the Hub is named; PEFT loads plain ids."""
    place = None if Path(source).exists() else parse_hub_path(str(source))
    if place is None or not (place.subfolder or place.revision):
        return Path(source)
    try:
        return download_adapter(place)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        expected, said = "an adapter on the Hugging Face Hub", " ".join(str(error).split())[:200]
        raise AdapterError(fault("load_adapter", "source", str(source), expected, f"The hub says: {said}")) from error


def _say_changed_base(model: nn.Module, whole: Whole, folder: Path) -> None:
    """Refuse an adapter that changes a base which others compute with; warn of one that comes alone.

    Raises:
        AdapterError: The model has an adapter already, and this one or that one changes the base itself.
    """
    changed = [*getattr(model, "changed_base", ()), *whole.under_lora]
    if changed and isinstance(model, PeftModel):
        expected = "the base's own weights under LoRA, beside another adapter"
        raise AdapterError(fault(str(folder), "embeddings", changed, expected, "Use it by itself, or merge it"))
    if changed:
        logger.warning(
            "%s holds whole weights of %s under its LoRA update, other than the base's: they take the base's place, "
            "so what is computed without the adapter has them too.",
            folder,
            ", ".join(changed),
        )


def _with_adapter(
    model: nn.Module, source: str | Path, adapter_name: str, is_trainable: bool, **kwargs: Any
) -> PeftModel:
    """Return the model with one more adapter of PEFT's."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(source), adapter_name, is_trainable=is_trainable, **kwargs)
        return model
    loaded = PeftModel.from_pretrained(model, str(source), adapter_name, is_trainable=is_trainable, **kwargs)
    return cast(PeftModel, loaded)


def _without_adapters(model: PeftModel) -> nn.Module:
    """Return the base of a PeftModel as it was before its first adapter, without weights."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        expected = "a model of transformers, where an adapter is there already"
        raise AdapterError(fault("load_adapter", "model", type(base).__name__, expected, "Load it with PEFT"))
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config))
    return cast(nn.Module, skeleton)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Name the file in errors that PEFT raises over the values of a folder."""
    try:
        yield
    except (PhiloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not folder.is_dir():  # a hub id: its own errors say more
            raise
        where = str(folder / "adapter_config.json")
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        expected = "an adapter that PEFT can put on this model"
        raise AdapterError(fault(where, "content", found, expected, "Was it changed by hand?")) from error


_MOST_LAYERS = 4096
_MOST_ITERATIONS = 1000


def _check_harmless(config: LoraConfig, folder: Path) -> None:
    """Refuse what in a file from outside would import a module, multiply layers without end, or match for ever.

    Raises:
        AdapterError: All of it at once.
    """
    where, faults = str(folder / "adapter_config.json"), []
    if config.megatron_config is not None:
        expected = "null, because PEFT would import the module that megatron_core names"
        faults.append(fault(where, "megatron_config", config.megatron_config, expected))
    layers = sum(max(0, int(stop) - int(start)) for start, stop in config.layer_replication or ())
    if layers > _MOST_LAYERS:
        faults.append(fault(where, "layer_replication", config.layer_replication, f"at most {_MOST_LAYERS} layers"))
    chosen = config.layers_to_transform
    if isinstance(chosen, (list, tuple)) and len(chosen) > _MOST_LAYERS:  # PEFT looks each module up in the list
        value = f"a list of {len(chosen):,} numbers"
        faults.append(fault(where, "layers_to_transform", value, f"at most {_MOST_LAYERS} layers"))
    iterations = re.fullmatch(r"pissa_niter_(\d+)", str(config.init_lora_weights))
    if iterations is not None and (len(iterations[1]) > 4 or int(iterations[1]) > _MOST_ITERATIONS):
        expected = f"at most {_MOST_ITERATIONS} iterations"
        faults.append(fault(where, "init_lora_weights", config.init_lora_weights, expected))
    for key, values in (("lora_alpha", {"": config.lora_alpha}), ("alpha_pattern", config.alpha_pattern or {})):
        for value in values.values():
            if isinstance(value, float) and not math.isfinite(value):
                faults.append(fault(where, key, value, "a finite number"))
    patterns = {
        "target_modules": [config.target_modules],
        "exclude_modules": [config.exclude_modules],
        "layers_pattern": _as_list(config.layers_pattern),
        "rank_pattern": list(config.rank_pattern or ()),
        "alpha_pattern": list(config.alpha_pattern or ()),
    }
    for key, several in patterns.items():
        for pattern in several:
            if isinstance(pattern, str) and not _is_quick(pattern):
                expected = "a regular expression without a repeated repeat, with at most 4 that have no end"
                faults.append(fault(where, key, pattern, expected, "List the names of the modules"))
    if faults:
        raise AdapterError(one_per_line(faults))


def _is_quick(pattern: str) -> bool:
    """Return whether Python's `re`, which backtracks, ends soon on names of modules."""
    if len(pattern) > 10_000:
        return False
    inside = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # escaped characters and classes are one place each
    without_end = len(re.findall(r"[*+]|\{\d*,\}", inside))
    repeated_group = re.search(r"\)(?:[*+]|\{)", inside)
    return without_end <= 4 and repeated_group is None


def _recorded_slices(folder: Path, names: Names) -> dict[str, Any] | None:
    """Return the slices in `philora.json`, checked against the model; None where there are none.

    Raises:
        AdapterError: It is damaged, or has values that cannot be.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")).get("slices", {})
        for module, entry in recorded.items():
            known = all(isinstance(name, str) and name in names.rows.get(module, {name: ()}) for name in entry["names"])
            if not (known and entry["names"] and isinstance(entry["names"], list) and 1 <= int(entry["r"]) < 2**31):
                raise ValueError(f"slices of {module}: {entry}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        expected = "slices of fused modules, as philora writes them"
        todo = "Copy it again; without it the slices are read from the zeros of B"
        raise AdapterError(fault(str(path), "content", f"{type(error).__name__}: {error}", expected, todo)) from error
    return cast("dict[str, Any]", recorded)


def _check_tensors(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare a file's tensors with what the adapter has on a copy of the model without weights."""
    if not isinstance(model, PreTrainedModel):
        return  # PEFT's own checks remain
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # else PEFT warns wherever the base has another place than in training
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
        adapted = peft.get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    faults = []
    for name in sorted(expected.keys() - tensors.keys()):
        faults.append(fault(str(folder), "missing", name, "a tensor for every adapted module"))
    embeddings = (
        "embed_tokens.weight",
        "lm_head.weight",
        "embed_tokens.base_layer.weight",
        "lm_head.base_layer.weight",
    )
    for name in sorted(tensors.keys() - expected.keys()):
        # PEFT also saves whole embeddings when they are targets; MonteCLoRA makes its samplers only where weights are.
        if not name.endswith(embeddings) and ".lora_monteclora_sampler." not in name:
            faults.append(fault(str(folder), "unexpected", name, "only tensors of modules that the model has"))
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            shape = tuple(tensors[name].shape)
            faults.append(fault(str(folder), name, shape, f"the shape {tuple(expected[name].shape)}"))
    if faults:
        raise AdapterError(one_per_line(faults))


def _saved_slices(
    model: PeftModel, recorded: Mapping[str, Any] | None, folder: Path, adapter_name: str
) -> dict[str, Slices]:
    """Return the slices of an adapter just loaded: as recorded, else as its zeros show; none without zeros."""
    names = Names.of(model.get_base_model())
    found: dict[str, Slices] = {}
    changed: list[str] = []
    for name, layer in lora_layers(model).items():
        if name not in names.rows or adapter_name not in layer.lora_A:
            continue
        weight = layer.lora_B[adapter_name].weight.detach()
        rows = names.rows[name]
        if recorded is not None:
            if name not in recorded:
                continue
            r, chosen = int(recorded[name]["r"]), [str(entry) for entry in recorded[name]["names"]]
        else:
            seen = ranked_by_zeros(weight, rows)
            if seen is None:
                continue
            r, chosen = seen
        parts = tuple(Slice(entry, *rows[entry], i * r, (i + 1) * r) for i, entry in enumerate(chosen))
        if parts[-1].rank_stop != weight.shape[1] or bool(weight[~_inside(weight, parts)].any()):
            changed.append(name)
        else:
            found[name] = parts
    if changed:
        logger.warning(
            "%s: the blocks outside the slices are no longer zero in %d modules (%s, ...); "
            "it is read as an adapter of the fused modules.",
            folder,
            len(changed),
            changed[0],
        )
    return found


def ranked_by_zeros(weight: Tensor, rows: Mapping[str, tuple[int, int]]) -> tuple[int, list[str]] | None:
    """Return rank and names of the slices that make up B, or None when B is not of that form."""
    for count in range(1, len(rows) + 1):
        r, rest = divmod(weight.shape[1], count)
        chosen = None if rest else _slices_by_zeros(weight, rows, r)
        if chosen is not None:
            return r, chosen
    return None


def _slices_by_zeros(weight: Tensor, rows: Mapping[str, tuple[int, int]], r: int) -> list[str] | None:
    """Return the slices whose blocks of width r make up B, or None when B is not of that form."""
    blocks = weight.shape[1] // r
    if weight.shape[1] % r:
        return None
    chosen = []
    for block in range(blocks):
        part = weight[:, block * r : (block + 1) * r]
        filled = [name for name, (start, stop) in rows.items() if bool(part[start:stop].any())]
        if len(filled) != 1:
            return None
        chosen.append(filled[0])
    return chosen if chosen == [row for row in rows if row in chosen] else None


# ------------------------------------------------------------------------------------------ coverage


class CoverageRow(NamedTuple):
    """Modules of one kind that are adapted alike; `*` stands for the layer number."""

    module: str
    slice: str
    r: int
    scaling: float
    modules: int
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """Describe what an adapter covers. `print` it for a table."""

    rows: tuple[CoverageRow, ...]
    other_trainable: tuple[tuple[str, int], ...]
    frozen_linears: tuple[tuple[str, int], ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        head = ("module", "slice", "r", "scaling", "modules", "parameters")
        body = [(r.module, r.slice or "whole", str(r.r), f"{r.scaling:g}", str(r.modules), f"{r.parameters:,}")
                for r in self.rows]  # fmt: skip
        body += [(name, "trained whole", "-", "-", "1", f"{count:,}") for name, count in self.other_trainable]
        body += [(name, "not adapted", "-", "-", str(count), "-") for name, count in self.frozen_linears]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *body]
        ]
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        lines.append(f"trainable: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%)")
        return "\n".join(line.rstrip() for line in lines)


def coverage(model: nn.Module) -> Coverage:
    """Return which modules and slices have an adapter, of which rank, and how many parameters train."""
    rows: dict[tuple[str, str, int, float], list[int]] = {}
    layers = _low_rank_layers(model)
    adapted_parameters: set[int] = set()
    for name, layer in layers.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        adapted_parameters.update(id(parameter) for key, parameter in layer.named_parameters() if "lora_" in key)
        for adapter in layer.active_adapters:
            extra = 0
            if isinstance(layer, AdaLoraLayer) and adapter in layer.lora_A:
                down, up, extra = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter].numel()
            elif adapter in layer.lora_A:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            elif adapter in layer.lora_embedding_A:
                down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                continue
            slices = getattr(layer.lora_B[adapter], "slice_layout", ()) if adapter in layer.lora_B else ()
            scaling = float(layer.scaling[adapter])
            if not slices:
                rows.setdefault((pattern, "", layer.r[adapter], scaling), []).append(down.numel() + up.numel() + extra)
            for entry in slices:
                r = entry.rank_stop - entry.rank_start
                count = r * (down.shape[1] + entry.row_stop - entry.row_start)
                rows.setdefault((pattern, entry.name, r, scaling), []).append(count)
    table = tuple(CoverageRow(*key, len(counts), sum(counts)) for key, counts in rows.items())
    others = tuple(
        (re.sub(r"^base_model\.model\.|\.modules_to_save\.[^.]+", "", name), parameter.numel())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapted_parameters
    )
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    frozen: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in inside:
            pattern = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
            if "modules_to_save" in name or "original_module" in name:
                continue
            frozen[pattern] = frozen.get(pattern, 0) + 1
    trainable = sum(row.parameters for row in table) + sum(count for _, count in others)
    total = sum(parameters_in(parameter) for parameter in model.parameters())
    return Coverage(table, others, tuple(frozen.items()), trainable, total)


class UpdateNorm(NamedTuple):
    """Describe how far an adapter moves one module.

    Attributes:
        module: Its name in the base model.
        slice: Of a fused module; empty for the whole of it.
        norm: Frobenius norm of scaling·B·A.
        relative: The same over the norm of the base weight's rows; None over a quantised weight.
    """

    module: str
    slice: str
    norm: float
    relative: float | None


def update_norms(model: nn.Module) -> list[UpdateNorm]:
    """Return the size of every update of the active adapters on linear layers, in the order of the modules.

    Numerics:
        fp32; ‖B A‖² is the sum over (BᵀB) ∘ (A Aᵀ), so no (out, in) matrix is made.
    """
    found = []
    for name, layer in lora_layers(model).items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A or not hasattr(layer.lora_A[adapter], "weight"):
                continue
            down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            if down.ndim != 2 or type(layer.lora_A[adapter]) is not nn.Linear:  # convolutions, and what FSDP shards
                continue
            whole = ("", slice(None), slice(None))
            layout = [
                (entry.name, slice(entry.row_start, entry.row_stop), slice(entry.rank_start, entry.rank_stop))
                for entry in getattr(layer.lora_B[adapter], "slice_layout", ())
            ]
            for title, rows, ranks in layout or [whole]:
                a, b = down[ranks].float(), up[rows, ranks].float()
                norm = abs(float(layer.scaling[adapter])) * float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
                size = 0.0
                if type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2:
                    size = float(torch.linalg.vector_norm(weight.detach()[rows], dtype=torch.float32))
                found.append(UpdateNorm(name, title, norm, norm / size if size else None))
    return found
