"""Prepare the model of a trainer: check its targets before weights are loaded, and give it the fast layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, set_seed

from philora.adapters.fast_layers import optimize
from philora.adapters.targets import Resolution, is_lora, resolve_for_training
from philora.decoder_stack.model import configure as configure_stack
from philora.kernels.attention import repeat_bits
from philora.kernels.loss import add_label_head
from philora.models.loading import refuse_adapter

logger = logging.getLogger(__name__)


def resolve_targets(model: str | nn.Module, config: Any, args: Any) -> Resolution | None:
    """Return the modules that the names of a LoraConfig match; None if `config` is not one.

    Raises:
        TargetError: A name matches none.
        ModelError: `model` is the name of an adapter.
    """
    if not is_lora(config):
        return None
    if isinstance(model, str):
        options = getattr(args, "model_init_kwargs", None) or {}
        refuse_adapter(model, options.get("revision"), "SFTTrainer", "model")
    return resolve_for_training(model if isinstance(model, nn.Module) else _skeleton(model, args), config)


def adapted_over_quantised(model: Any, given: dict[str, Any]) -> Any:
    """Return a quantised model with its adapter, because TRL would round an adapter that it makes to bfloat16 at once.

    `peft_config` is removed from the trainer's arguments `given`. Other models are returned unchanged, and so is one
    whose embeddings TRL will enlarge for the tokens of another chat template.
    """
    config, args = given.get("peft_config"), given["args"]
    quantised = isinstance(model, PreTrainedModel) and is_quantised(model)
    if not quantised or not isinstance(config, PeftConfig) or args.chat_template_path is not None:
        return model
    del given["peft_config"]
    set_seed(args.seed)  # as TRL does before it makes an adapter
    return peft.get_peft_model(model, config)


def is_quantised(model: nn.Module) -> bool:
    """Return whether TRL rounds the trained weights of a model because bitsandbytes has quantised it."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def trained_tensors(model: Any) -> dict[int, torch.Tensor]:
    """Return the trained tensors of a model with an adapter by parameter identity, before TRL changes their dtype."""
    if not isinstance(model, PeftModel):
        return {}
    return {id(weight): weight.data for weight in model.parameters() if weight.requires_grad}


def set_adapter_dtype(model: nn.Module, before: Mapping[int, torch.Tensor], wanted: str | None, sharded: bool) -> None:
    """Undo TRL's rounding of trained weights over a quantised base to bfloat16, or round them if requested.

    `before` is from `trained_tensors`, `wanted` is `SFTConfig.adapter_dtype`. FSDP and DeepSpeed (`sharded`) expect a
    single dtype, so TRL's is kept.
    """
    kept = False
    made_by_trl = not before and is_quantised(model)
    for name, parameter in model.named_parameters():
        earlier = before.get(id(parameter))
        if earlier is None and made_by_trl and parameter.requires_grad and "lora_" in name:
            earlier = parameter.data.float()
        if earlier is not None and earlier.dtype != parameter.dtype and wanted != "bfloat16" and not sharded:
            parameter.data, kept = earlier.to(parameter.device), True
        if wanted is not None and parameter.requires_grad and (".lora_A." in name or ".lora_B." in name):
            parameter.data = parameter.data.to(getattr(torch, wanted))
    if kept:
        logger.warning(
            "the adapter stays in float32 over the quantised base, where TRL rounds it to bfloat16; "
            "adapter_dtype: bfloat16 rounds it."
        )


def use_fast_layers(model: nn.Module, args: Any) -> None:
    """Give a model the fast layers, the decoder stack and the loss at labels, as the arguments state."""
    elementwise = getattr(args, "elementwise_recomputation", False)
    optimize(model, recomputation="elementwise" if elementwise else None)
    deterministic = getattr(args, "deterministic", True)
    configure_stack(model, deterministic=deterministic, inputs_on_host=getattr(args, "inputs_on_host", False))
    repeat_bits(model, deterministic)
    add_label_head(model.get_base_model() if isinstance(model, PeftModel) else model)


def name_experts(model: nn.Module) -> None:
    """Set `num_experts` if the configuration has `num_local_experts`: TRL 1.16 reads the former for Phi-3.5-MoE."""
    text = cast(PreTrainedModel, model).config.get_text_config()
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts


def _skeleton(name: str, args: Any) -> nn.Module:
    """Return the model that TRL will load, without weights, so that names are checked before weights are read.

    As in TRL, the class is the one that the model's config names, or the one that its own code provides. That code runs
    only with `trust_remote_code`.
    """
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    trusts = bool(options.get("trust_remote_code", getattr(args, "trust_remote_code", False)))
    revision = {"revision": options["revision"]} if "revision" in options else {}
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusts, **revision)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if own is not None:
            return cast(nn.Module, own(config))
        offered = getattr(config, "auto_map", None) or {}
        kinds = (AutoModelForImageTextToText, AutoModelForCausalLM)
        kind = next((candidate for candidate in kinds if candidate.__name__ in offered), AutoModelForCausalLM)
        return cast(nn.Module, kind.from_config(config, trust_remote_code=trusts))
