"""Merge an adapter into its base in memory, layer by layer.

Base weight and adapter go to fp32, PEFT merges them, and the result is rounded once. The logits before and after are
compared. `merged_folder` does the same with the files of a base.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from philora.adapters.embeddings import stay_tied
from philora.adapters.fast_layers import FastLinear
from philora.errors import AdapterError, fault, one_per_line
from philora.kernels.quantization import dequantize_, is_quantized
from philora.models.verify import ROUNDED_ONCE, agreement, logits_of
from philora.models.verify import probe as probe_tokens

logger = logging.getLogger(__name__)

UNTIED = "the adapter changes one of the input and output embeddings, which the base shares: they are separate now"

# Initialisations that subtract their first A and B from the base weight. PEFT does so again when such an adapter is
# loaded, so it is merged into the remaining weight.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def merge_layer(layer: BaseTunerLayer, where: str) -> None:
    """Merge one of PEFT's layers of any kind into its base layer. The layer cannot be used afterwards.

    Numerics:
        Base weight and adapter are in fp32 (fp64 for fp64 weights) while PEFT merges them; the result is rounded once
        to the dtype of the base. Quantised layers, and those of other methods than LoRA, are left to PEFT.

    Cost:
        Memory for the weight in fp32 and its update (twice, while PEFT scales it), for one layer at a time.

    Raises:
        AdapterError: The merged weight is not finite in the dtype of the base.
    """
    if layer.merged:
        return
    names = merged_parameters(layer)
    if not names:
        layer.merge(safe_merge=True)
        return
    base = layer.get_base_layer()
    before = {name: getattr(base, name) for name in names}
    wide = torch.promote_types(before[names[0]].dtype, torch.float32)
    with torch.no_grad():
        for name, parameter in before.items():
            # A new parameter, so that a shared weight (tied embeddings) does not change for other modules.
            setattr(base, name, nn.Parameter(parameter.to(wide, copy=True), requires_grad=False))
        inside = {id(parameter) for parameter in base.parameters()}
        for parameter in layer.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(wide)
        layer.merge()
        for name, parameter in before.items():
            merged = getattr(base, name).detach().to(parameter.dtype)
            setattr(base, name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
            if not _is_finite(merged):
                expected = f"merged values within the range of {str(merged.dtype).removeprefix('torch.')}"
                raise AdapterError(fault("merge", where, name, expected, "Is the adapter broken?"))


def merged_parameters(layer: BaseTunerLayer) -> list[str]:
    """Return the parameters of the base layer that merging can change; none for layers that are left to PEFT."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    if not isinstance(layer, LoraLayer | TrainableTokensLayer) or not _is_plain(getattr(base, "weight", None)):
        return []
    return ["weight", "bias"] if _is_plain(getattr(base, "bias", None)) else ["weight"]


def _is_plain(parameter: Any) -> bool:
    """Return whether a parameter is a plain tensor of floats; quantised weights have other classes."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # without a mask of the tensor's size, which isfinite would need
    return bool(torch.isfinite(low) & torch.isfinite(high))


def mergeable(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Return PEFT's layers by the name of their module in the base, if all of them can be merged."""
    if not isinstance(model.base_model, BaseTuner):
        kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
        expected = "an adapter of weights, such as LoRA; prompts and prefixes have nothing to add to a weight"
        raise AdapterError(fault("merge", "peft_type", kind, expected))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    obstacles: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        for obstacle in _obstacles(layer):
            obstacles.setdefault(obstacle, []).append(name)
    if obstacles:
        faults = [
            fault("merge", names[0] if len(names) == 1 else f"{len(names)} layers", names, expected, todo)
            for (expected, todo), names in obstacles.items()
        ]
        raise AdapterError(one_per_line(faults))
    return layers


def _obstacles(layer: BaseTunerLayer) -> Iterable[tuple[str, str]]:
    """Yield the reasons why a layer cannot be merged: what was expected, and what to do."""
    base, active = layer.get_base_layer(), layer.active_adapters
    variants = [entry for name, entry in getattr(layer, "lora_variant", {}).items() if name in active]
    if any(isinstance(variant, ALoraLinearVariant | ArrowLinearVariant) for variant in variants):
        expected = "an update that is the same for every token, which those of aLoRA and Arrow are not"
        yield expected, "Serve base and adapter"
    if isinstance(layer, LoraLayer):
        if getattr(base, "groups", 1) > 1:
            yield "a convolution of one group", "Serve base and adapter"
        biased = any(layer.lora_bias.get(name) for name in active)
        if biased and getattr(base, "bias", None) is None:
            yield "a base layer with a bias, as lora_bias has one", "Serve base and adapter"
    inside = {id(parameter) for parameter in base.parameters()}
    own = (parameter.detach() for parameter in layer.parameters() if id(parameter) not in inside)
    if not all(_is_finite(entry) for entry in own if entry.numel() and not entry.is_meta):
        yield "finite adapter weights", "The training diverged: use an earlier checkpoint"


def merge(model: PeftModel, probe: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add the active adapter to the base weights, and check that the outputs are the same.

    Args:
        model: The adapted model; it cannot be used afterwards.
        probe: Inputs for the check; default: random tokens.

    Returns:
        The base model with the merged weights, in its own dtype. Tied embeddings become separate if the adapter changes
        only one of them. A quantised base becomes a 16-bit model with the dequantised weights, over which the adapter
        was trained.

    Numerics:
        Updates are computed in fp32, for adapters of any dtype, and rounded once to the base's dtype.

    Cost:
        Two forward passes, and memory for one weight in fp32 and its update.

    Raises:
        AdapterError: A layer cannot be merged (all such layers at once, before anything changes), or the merged
            model's logits differ from the adapted model's by more than rounding explains.
    """
    layers = mergeable(model)
    _round_trained_modules(model)
    before, bound = _logits(model, probe), rounding_bound(model)
    tied = stays_tied(model)
    _dequantise(model, layers.values())
    for name, layer in layers.items():
        with onload_layer(layer):
            merge_layer(layer, name)
    merged = cast(nn.Module, model.unload())
    if isinstance(merged, PreTrainedModel):
        _settle_tie(merged, tied)
    todo = "The merged model is not usable"
    result = agreement("merge", before, _logits(merged, probe), max(bound, rounding_bound(merged)), todo=todo)
    logger.info("merged: %s", result)
    return merged


def _dequantise(model: PeftModel, layers: Iterable[BaseTunerLayer]) -> None:
    """Replace quantised layers by plain ones, and PEFT's layers around them by those for plain layers."""
    base = model.get_base_model()
    over = [layer for layer in layers if is_quantized(layer.get_base_layer())]
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


def rounding_bound(model: nn.Module) -> float:
    """Return the allowed effect on the logits of one more rounding to the model's coarsest dtype."""
    return max(ROUNDED_ONCE.get(parameter.dtype, ROUNDED_ONCE[torch.bfloat16]) for parameter in model.parameters())


def trained_modules(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return modules of the base with the trained modules of `modules_to_save` that replace them."""
    return [
        (module.original_module, module.modules_to_save[module.active_adapters[0]])
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters
    ]


def _round_trained_modules(model: nn.Module) -> None:
    for original, trained in trained_modules(model):
        for old, new in zip(original.parameters(), trained.parameters(), strict=True):
            new.data = new.data.to(old.dtype)
            new.requires_grad_(old.requires_grad)


def stays_tied(model: PeftModel) -> bool:
    """Return whether tied embeddings stay tied: the adapter changes both alike, or neither."""
    if any(getattr(value, "ensure_weight_tying", False) for value in model.peft_config.values()):
        return True
    if stay_tied(model):
        return True
    base = model.get_base_model()
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None


def _settle_tie(model: PreTrainedModel, tied: bool) -> None:
    """Make config and weights agree on whether the embeddings are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or head.weight is embedding.weight:
        return
    if tied:
        model.tie_weights()
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    logger.warning("merge: %s", UNTIED)
