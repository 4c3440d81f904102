"""Check the names in a LoraConfig against the model, and translate slices for PEFT."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from philora.adapters.slices import Slices, slices_named
from philora.compat.peft import ExcludedModule, check_target_module_exists, expand_all_linear
from philora.errors import TargetError, fault, nearest, one_per_line
from philora.families import fused_slices

logger = logging.getLogger(__name__)

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D, BaseTunerLayer)


class MissingTargetError(TargetError, NoMatchingPeftModuleError):  # type: ignore[misc]
    """A name in `target_modules` matches nothing. Also PEFT's error of that case, with PEFT's words first."""


class Resolution(NamedTuple):
    """Hold what a LoraConfig means on a model: the config in PEFT's terms, and slices by their fused module."""

    config: LoraConfig
    slices: dict[str, Slices]

    def for_peft(self, given: LoraConfig) -> LoraConfig:
        """Return the config to give to PEFT, which fills it in.

        This is the caller's own object, as with PEFT. With slices it is a copy: the caller's config keeps the names of
        the slices, so it can be used for another model.
        """
        if self.slices:
            return self.config
        given.target_modules = self.config.target_modules
        return given


def is_lora(config: object) -> bool:
    """Return whether a config is for LoRA itself, not for a method built on it such as AdaLoRA."""
    return isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA


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
        """Return the names that PEFT matches with `target`: equal to it, or ending in it."""
        return [name for name in pool if name == target or name.endswith(f".{target}")]

    def adaptable(self) -> list[str]:
        """Return the short names that a person can target, for messages."""
        leaves = {name.rpartition(".")[2] for name, module in self.modules.items() if _is_adaptable(module)}
        return sorted(leaves | {part for slices in self.rows.values() for part in slices})

    def condensed(self, full_names: Iterable[str]) -> list[str]:
        """Return the modules by the last part of their name where no other module has it, else by their full name."""
        chosen = set(full_names)
        short: set[str] = set()
        for name in chosen:
            leaf = name.rpartition(".")[2]
            short.add(leaf if set(self.matching(leaf, self.modules)) <= chosen else name)
        return sorted(short)


def _is_adaptable(module: nn.Module) -> bool:
    return (isinstance(module, ADAPTABLE) or hasattr(module, "in_features")) and not _is_own_linear(module)


def _is_own_linear(module: nn.Module) -> bool:
    """Return whether a linear layer has a forward of its own, as the router of a mixture of experts."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.")
    return own and isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward


@cache
def _warn_left_out(kinds: tuple[str, ...]) -> None:
    logger.warning("all-linear leaves out %s: LoRA adapts layers that only multiply", ", ".join(kinds))


def as_list(names: str | Iterable[str] | None) -> list[str]:
    """Return names of a setting, which may be one name or none, as a list."""
    return [names] if isinstance(names, str) else sorted(names or [])


def _matches_pattern(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


# Names that PEFT itself adds to modules_to_save for a task, whether or not the model has them.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def resolve(model: nn.Module, peft_config: LoraConfig, where: str = "peft_config") -> Resolution:
    """Check every name of a LoraConfig against a model, and translate slices for PEFT. Neither is changed.

    Args:
        model: The model to be adapted, with weights or on the meta device.
        peft_config: The configuration. `target_modules` may name slices of fused projections.
        where: The configuration's name in messages.

    Returns:
        A copy of the config in PEFT's terms, and the slices of every fused module.

    Raises:
        TargetError: A target, excluded module, pattern key, layer index or module to save matches nothing, a target
            cannot be adapted, slices of one module differ in rank or alpha, or the initialisation does not allow
            slices. All faults are reported at once.
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
    for name in as_list(config.modules_to_save):
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
    """Resolve for TRL's trainer. It computes the loss from the head's weight, so the head cannot have an adapter.

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
                _warn_left_out(tuple(sorted({type(names.modules[name]).__name__ for name in {*expanded} - {*kept}})))
            return kept, []
        real = [name for name in names.modules if re.fullmatch(targets, name)]
        wanted = [name for name in names.fused_of if re.fullmatch(targets, name)]
        if not real and not wanted:
            missing("target_modules", targets, names.adaptable(), "at least one module (as a regular expression)")
        return real, wanted
    real, wanted = [], []
    for target in as_list(targets):
        modules = names.matching(target, names.modules)
        slices = names.matching(target, names.fused_of)
        if not modules and not slices:
            missing("target_modules", target, names.adaptable(), "a module or of a slice of a fused projection")
        real += modules
        wanted += slices
    return real, wanted


def _check_target_parameters(model: nn.Module, config: LoraConfig, missing: Any) -> None:
    parameters = [name for name, _ in model.named_parameters()]
    for target in as_list(config.target_parameters):
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            missing("target_parameters", target, {name.rpartition(".")[2] for name in parameters}, "a parameter")


def _apply_exclusions(
    config: LoraConfig, names: Names, real: list[str], wanted: list[str], missing: Any, faults: list[str], where: str
) -> tuple[list[str], list[str]]:
    """Remove what `exclude_modules` names; a name that matches nothing is a fault."""
    excluded = config.exclude_modules
    if not excluded:
        return real, wanted
    if isinstance(excluded, str):
        hit = {name for name in [*names.modules, *names.fused_of] if re.fullmatch(excluded, name)}
        if not hit:
            missing("exclude_modules", excluded, names.adaptable(), "at least one module (as a regular expression)")
    else:
        hit = set()
        for name in as_list(excluded):
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
            faults.append(fault(where, "exclude_modules", slice_name, "a module that is targeted separately", todo))
    return [name for name in real if name not in hit], [name for name in wanted if name not in hit]


def _check_layers(config: LoraConfig, names: Names, faults: list[str], where: str) -> None:
    layers = config.layers_to_transform
    indexes = [layers] if isinstance(layers, int) else list(layers)
    patterns = as_list(config.layers_pattern) or [r"[^.]*"]
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
    """Replace slices in `config` by their fused modules, with ranks and alphas in its patterns."""
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
            todo = f"Name {leaf} for one matrix of rank r, or its slices for separate ones of rank r"
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
        slices[fused] = slices_named(ordered, names.rows[fused], r)
        stacked = len(ordered)
        rank_pattern.setdefault(leaf, {})[fused] = r * stacked
        alpha_pattern.setdefault(leaf, {})[fused] = alpha * (math.sqrt(stacked) if config.use_rslora else stacked)
    config.target_modules = set(names.condensed([*real, *by_module]))
    if config.exclude_modules and not isinstance(config.exclude_modules, str):
        kept = [entry for entry in as_list(config.exclude_modules) if names.matching(entry, names.modules)]
        config.exclude_modules = kept or None
    # PEFT uses the first key that matches, so the fused modules' keys come before the user's.
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
