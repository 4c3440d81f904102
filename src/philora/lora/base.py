"""Define the base classes of layers with a low-rank update: loralib's attributes, merging, scaling, switching off.

Merging never writes to the base weight, a Parameter. `eval()` computes `W + scaling * B A` once and stores it beside
the Parameter; until `train()` drops it, the attribute `weight` returns it. So the base has the same bits afterwards in
every dtype, `parameters()` and `state_dict()` hold the unmerged weight in any mode, and a weight shared with another
module (a tied head) does not change. The price is a second copy of every adapted weight in eval mode;
`merge_weights=False` avoids it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from philora.errors import ConfigError, fault
from philora.lora.functional import without_autocast


class LoRALayer:
    """The attributes that loralib keeps on every layer: rank, alpha, dropout and whether the weight is merged.

    Args:
        r: Rank; 0 is a plain layer.
        lora_alpha: The update is multiplied by `lora_alpha / r`.
        lora_dropout: Probability of dropout on the update's input.
        merge_weights: Whether `eval()` merges.

    Raises:
        ConfigError: A value is out of bounds.
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        where = f"philora.lora.{type(self).__name__}"
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ConfigError(fault(where, "r", r, "a whole number of at least 0", "0 makes a plain layer"))
        if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, int | float) or not math.isfinite(lora_alpha):
            raise ConfigError(fault(where, "lora_alpha", lora_alpha, "a finite number", "Common values are r and 2 r"))
        if not 0 <= lora_dropout <= 1:
            raise ConfigError(fault(where, "lora_dropout", lora_dropout, "a probability from 0 to 1"))
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.merged = False
        self.merge_weights = merge_weights


def _registered(module: Any, name: str) -> Tensor | None:
    """Return a module's Parameter of this name, or its buffer, which the parametrization of a frozen one leaves."""
    found: Tensor | None = module.__dict__["_parameters"].get(name)
    return module.__dict__["_buffers"].get(name) if found is None else found


def _asked_by_a_utility() -> bool:
    """Return whether one of torch.nn.utils reads the property that calls this."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("torch.nn.utils.")


def _is_parametrized(module: Any, name: str) -> bool:
    """Return whether torch.nn.utils.parametrize computes the tensor of this name."""
    computed = module._modules.get("parametrizations")
    return computed is not None and name in computed


class ShowsMerged:
    """A module whose `weight` is the merged value if there is one, else its own.

    Its own weight is a Parameter, a plain tensor that a hook sets before every forward pass (`weight_norm`,
    `spectral_norm`, pruning; FSDP), or the value of a parametrization.
    """

    _merged_weight: Tensor | None = None

    @property
    def base_weight(self) -> Tensor:
        """Return the module's own weight, in any mode."""
        held: Tensor | None = self.__dict__.get("weight")
        held = _registered(self, "weight") if held is None else held
        if held is None and _is_parametrized(self, "weight"):
            # The class that parametrize makes overrides our property of this name.
            held = getattr(self, "weight")  # noqa: B009
        if held is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        return held

    @property
    def weight(self) -> Tensor:
        """Return the merged weight while merged, else the base weight. Writes to the merged weight are lost.

        PyTorch's utilities that replace a module's weight get the base weight in any mode.
        """
        if self._merged_weight is None or (not torch.compiler.is_compiling() and _asked_by_a_utility()):
            return self.base_weight
        return self._merged_weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # nn.Module handles Parameters; plain tensors come from FSDP, pruning and the like.
        self.__dict__["weight"] = value

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; with the weight also the value merged from it."""
        if name != "weight":
            super().__delattr__(name)
            return
        self._merged_weight = None
        if "weight" in self.__dict__:
            del self.__dict__["weight"]
        else:
            super().__delattr__(name)


class AdaptedLayer(LoRALayer, nn.Module):
    """The common base of philora's layers: scaling, merging, switching off. It is not used alone."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    disable_adapters = False
    _scaling = 0.0
    _merged_from: tuple[Tensor, ...] = ()

    def adapt(self, shape_a: tuple[int, int], shape_b: tuple[int, int], use_rslora: bool) -> None:
        """Add A and B with the weight's dtype and device, and freeze the weight. Nothing is added for rank 0."""
        if self.r > 0 and 0 not in shape_b:
            self.lora_A = nn.Parameter(self.base_weight.new_zeros(shape_a))
            self.lora_B = nn.Parameter(self.base_weight.new_zeros(shape_b))
            self.base_weight.requires_grad_(False)
            self._scaling = self.lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)
        self.register_load_state_dict_post_hook(_merge_what_was_loaded)  # type: ignore[no-untyped-call]

    @property
    def base_weight(self) -> Tensor:
        """Return the Parameter that the update is added to, in any mode."""
        raise NotImplementedError

    @property
    def _holder(self) -> Any:
        """Return the module that the base weight belongs to."""
        return self

    @property
    def scaling(self) -> float:
        """Return the multiplier of the update. It can be set at any time, also while merged."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value
        self._settle()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the update on or off. When off, the layer computes its base, and A and B get no gradient."""
        self.disable_adapters = not enabled
        self._settle()

    def merge_AB(self) -> Tensor:
        """Return the update without its scaling, in the layout of the weight and at least fp32."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """Return the base weight plus the update, in any mode.

        Numerics:
            Computed in fp32 (float64 if any input is) and rounded once to the base's dtype.
        """
        base = self._base_for_merging()
        # A tensor made in inference mode could not be used outside it. Leaving it turns gradients on.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(base.device.type):
            return self.merge_AB().mul_(self.scaling).add_(base).to(base.dtype).contiguous()

    def _base_for_merging(self) -> Tensor:
        return self.base_weight

    def _wide(self) -> tuple[Tensor, Tensor]:
        """Return A and B in the dtype of merging."""
        dtype = torch.promote_types(self.base_weight.dtype, torch.float32)
        dtype = torch.promote_types(dtype, self.lora_A.dtype)
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    @property
    def _has_update(self) -> bool:
        """Return whether there is an A: registered, plain, or computed by a parametrization."""
        name = "lora_A"
        return _registered(self, name) is not None or name in self.__dict__ or _is_parametrized(self, name)

    @property
    def _can_merge(self) -> bool:
        """Return whether base, A and B are registered tensors, not computed for every forward pass."""
        owners = ((self._holder, "weight"), (self, "lora_A"), (self, "lora_B"))
        return all(_registered(owner, name) is not None for owner, name in owners)

    def _adds_update(self) -> bool:
        """Return whether forward adds the update itself.

        While merged it does so if the base trains (the merged value is a copy without gradient), or if base, A or B is
        not the tensor that was merged (assigned, or replaced by `torch.func.functional_call`).
        """
        if not self._has_update or self.disable_adapters:
            return False
        if not self.merged or (torch.is_grad_enabled() and self.base_weight.requires_grad):
            return True
        base, lora_A, lora_B = self._merged_from
        return base is not self.base_weight or lora_A is not self.lora_A or lora_B is not self.lora_B

    def _settle(self) -> None:
        """Merge the current base, A and B if the mode asks for it, else drop the merged value."""
        self.merged = not self.training and self.merge_weights and not self.disable_adapters
        if self._has_update and not self._can_merge:
            self.merged = False
        if self.merged and self._has_update:
            self._merged_from = (self.base_weight, self.lora_A, self.lora_B)
            self._holder._merged_weight = self.merged_weight()
        else:
            self._merged_from = ()
            self._holder._merged_weight = None

    def train(self, mode: bool = True) -> Self:
        """Set training mode with the unmerged weight, or (`mode=False`) evaluation mode with the merged one."""
        super().train(mode)
        self._settle()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # .to(), .half(), to_empty() and the like change base, A and B, so they are merged again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle()
        return self

    def _reset_lora(self) -> None:
        """Initialise A as nn.Linear's weight and B to zero, so that the update starts at zero."""
        if self._has_update:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        if hasattr(self, "merged"):
            self._settle()

    def extra_repr(self) -> str:
        """Return the base's text with rank and scaling."""
        text = super().extra_repr()
        return f"{text}, r={self.r}, scaling={self.scaling:g}" if self._has_update else text


def _merge_what_was_loaded(module: AdaptedLayer, _: Any) -> None:
    module._settle()
