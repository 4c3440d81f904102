"""Define layers with a low-rank update for your own models: loralib's names, arguments and checkpoints.

A layer defines the shapes of A and B, how `B A` maps onto the weight (`merge_AB`), and its forward. Merging and all
else that they share is in `base`.

Shapes use: in, out features; r rank; n adapted slices; V vocabulary; k kernel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philora.errors import ConfigError, fault
from philora.lora.base import AdaptedLayer, LoRALayer, ShowsMerged
from philora.lora.functional import autocast_dtype, lora_linear, lora_merged_linear, merged_blocks, without_autocast
from philora.lora.hooks import is_hooked

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"]


class _AnyLinear(ShowsMerged, AdaptedLayer, nn.Linear):
    """Base of `Linear` and `MergedLinear`, whose weight may be stored transposed."""

    fan_in_fan_out = False

    def _oriented(self, weight: Tensor) -> Tensor:
        """Convert between the stored layout and (out, in), either way."""
        return weight.t() if self.fan_in_fan_out else weight

    def _finish(self, fan_in_fan_out: bool) -> None:
        self.reset_parameters()
        if fan_in_fan_out:
            self.base_weight.data = self.base_weight.data.t().contiguous()
            self.fan_in_fan_out = True

    def reset_parameters(self) -> None:
        """Initialise weight and bias as nn.Linear does, A as its weight, B to zero."""
        nn.init.kaiming_uniform_(self._oriented(self.base_weight), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_lora()


class Linear(_AnyLinear):
    """Linear layer with an update: `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        in_features, out_features: As nn.Linear.
        r: Rank; 0 is a plain nn.Linear whose weight trains.
        lora_alpha: The update is multiplied by `lora_alpha / r`.
        lora_dropout: Probability of dropout on the update's input.
        fan_in_fan_out: Whether the weight is stored as (in, out), as GPT-2's.
        merge_weights: Whether `eval()` merges.
        use_rslora: Multiply by `lora_alpha / sqrt(r)` instead.
        **kwargs: `bias`, `device`, `dtype` of nn.Linear; A and B get the same device and dtype.

    Shapes:
        weight (out, in) or (in, out), lora_A (r, in), lora_B (out, r); x (..., in) to (..., out).

    Numerics:
        As `philora.lora.functional.lora_linear`; merging as `merged_weight`.

    Raises:
        ConfigError: A value is out of bounds.

    Source:
        Hu et al. (2021), section 4.1; loralib 0.1.2, `Linear`. rsLoRA: Kalajdzievski (2023), arXiv 2312.03732.

    Example:
        >>> layer = Linear(4, 2, r=1, lora_alpha=2)
        >>> layer.lora_A.shape, layer.lora_B.shape, layer.scaling
        (torch.Size([1, 4]), torch.Size([2, 1]), 2.0)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.adapt((r, in_features), (out_features, r), use_rslora)
        self._finish(fan_in_fan_out)

    def merge_AB(self) -> Tensor:
        """Return the update without its scaling. Shape: that of weight."""
        wide_A, wide_B = self._wide()
        return self._oriented(wide_B @ wide_A)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. Shapes: x (..., in); returns (..., out)."""
        if not self._adds_update():
            return F.linear(x, self._oriented(self.weight), self.bias)
        weight, dropout = self._oriented(self.base_weight), self.lora_dropout
        return lora_linear(x, weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout.p, dropout.training)


class MergedLinear(_AnyLinear):
    """Several linear maps in one weight, such as q, k and v, with an update for every chosen output slice.

    Args:
        in_features: As nn.Linear.
        out_features: Rows of all slices together.
        r: Rank of every adapted slice.
        enable_lora: Which slices are adapted. If none is, the layer is a plain nn.Linear whose weight trains.
        slices: Output rows of every slice, for unequal slices (grouped-query attention); default: equal slices.
        lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, use_rslora, **kwargs: As `Linear`.

    Shapes:
        weight (out, in) or (in, out), lora_A (n·r, in), lora_B (rows of the adapted slices, r);
        x (..., in) to (..., out).

    Raises:
        ConfigError: A value is out of bounds, or the slices do not add up to the output.

    Source:
        loralib 0.1.2, `MergedLinear`, for equal slices; unequal slices extend its layout.

    Example:
        >>> layer = MergedLinear(8, 24, r=2, enable_lora=[True, False, True], slices=[16, 4, 4])
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([4, 8]), torch.Size([20, 2]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        slices: Sequence[int] | None = None,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = [bool(item) for item in enable_lora]
        self.slices = _checked_slices(out_features, len(self.enable_lora), slices)
        adapted = sum(self.enable_lora)
        rows = sum(size for size, enabled in zip(self.slices, self.enable_lora, strict=True) if enabled)
        self.adapt((r * adapted, in_features), (rows, r), use_rslora)
        self._finish(fan_in_fan_out)

    def merge_AB(self) -> Tensor:
        """Return the update without its scaling, zero in slices that are not adapted. Shape: that of weight."""
        wide_A, wide_B = self._wide()
        delta = wide_A.new_zeros(self.out_features, self.in_features)
        for block in merged_blocks(self.slices, self.enable_lora, self.r):
            delta[block.out_start : block.out_stop] = block.of_b(wide_B) @ wide_A[block.rank_start : block.rank_stop]
        return self._oriented(delta)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. Shapes: x (..., in); returns (..., out)."""
        if not self._adds_update():
            return F.linear(x, self._oriented(self.weight), self.bias)
        weight, dropout, layout = self._oriented(self.base_weight), self.lora_dropout, (self.slices, self.enable_lora)
        return lora_merged_linear(
            x, weight, self.bias, self.lora_A, self.lora_B, self.scaling, *layout, dropout.p, dropout.training
        )


def _checked_slices(out_features: int, count: int, slices: Sequence[int] | None) -> list[int]:
    where = "philora.lora.MergedLinear"
    if slices is None:
        if count == 0 or out_features % count:
            expected = f"a number of slices that divides out_features={out_features}"
            raise ConfigError(fault(where, "len(enable_lora)", count, expected, "Give slices for unequal ones"))
        return [out_features // count] * count
    if len(slices) != count or min(slices, default=0) < 1 or sum(slices) != out_features:
        expected = f"{count} positive sizes (one for each of enable_lora) that sum to out_features={out_features}"
        raise ConfigError(fault(where, "slices", list(slices), expected))
    return list(slices)


class Embedding(ShowsMerged, AdaptedLayer, nn.Embedding):
    """Embedding whose rows get `scaling * A^T B^T` added.

    As in loralib, A starts at zero and B is normal, unlike in the other layers. `max_norm` bounds the rows of the base
    table, as in nn.Embedding, before the update is added.

    Args:
        num_embeddings, embedding_dim: As nn.Embedding.
        r, lora_alpha, merge_weights, use_rslora: As `Linear`.
        **kwargs: The other arguments of nn.Embedding; A and B get the same device and dtype.

    Shapes:
        weight (V, out), lora_A (r, V), lora_B (out, r); x (...) of indices to (..., out).

    Raises:
        ConfigError: A value is out of bounds.

    Source:
        loralib 0.1.2, `Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        self.adapt((r, num_embeddings), (embedding_dim, r), use_rslora)
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self._reset_lora()

    def reset_parameters(self) -> None:
        """Initialise the table as nn.Embedding does, A to zero, B normal."""
        nn.init.normal_(self.base_weight)
        if self.padding_idx is not None:
            nn.init.zeros_(self.base_weight[self.padding_idx])
        self._reset_lora()

    def _reset_lora(self) -> None:
        if self._has_update:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        if hasattr(self, "merged"):
            self._settle()

    def merge_AB(self) -> Tensor:
        """Return the update without its scaling. Shape: (V, out)."""
        wide_A, wide_B = self._wide()
        return wide_A.t() @ wide_B.t()

    def _base_for_merging(self) -> Tensor:
        if self.max_norm is None:
            return self.base_weight
        every_row = torch.arange(self.num_embeddings, device=self.base_weight.device)
        return torch.embedding_renorm_(self.base_weight.detach().clone(), every_row, self.max_norm, self.norm_type)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. Shapes: x (...) of indices; returns (..., out)."""
        adds = self._adds_update()
        # Merged rows were bounded before the update was added. They must not be bounded again.
        max_norm = self.max_norm if adds or self._merged_weight is None else None
        table, options = self.base_weight if adds else self.weight, (self.norm_type, self.scale_grad_by_freq)
        rows = F.embedding(x, table, self.padding_idx, max_norm, *options, self.sparse)
        if not adds:
            return rows
        # A's gradient is dense: autograd cannot transpose a sparse one.
        down = F.embedding(x, self.lora_A.t(), self.padding_idx, None, *options).to(rows.dtype)
        return rows + (F.linear(down, self.lora_B.to(rows.dtype)) * self.scaling).to(rows.dtype)


class _Conv1d(ShowsMerged, nn.Conv1d):
    pass


class _Conv2d(ShowsMerged, nn.Conv2d):
    pass


class _Conv3d(ShowsMerged, nn.Conv3d):
    pass


_CONVOLUTIONS: dict[type[nn.Module], type[Any]] = {nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


class ConvLoRA(AdaptedLayer):
    """Convolution, in the submodule `conv`, with an update of its weight.

    Args:
        conv_module: nn.Conv1d, nn.Conv2d or nn.Conv3d.
        in_channels, out_channels: As the convolution.
        kernel_size: As the convolution: one number, or one per dimension.
        r, lora_alpha, lora_dropout, merge_weights, use_rslora: As `Linear`.
        **kwargs: The other arguments of the convolution.

    Shapes:
        With k the kernel sizes, p the product of their first half (rounded down), q that of the rest and m = min(p, q):
        lora_A (r·m, in·q), lora_B (out/groups·p, r·m); B A is read as weight (out, in/groups, *k).
        Conv1d: p = 1; Conv2d of kernel k: p = q = m = k, which is loralib's layout; Conv3d: p = k, q = k².

    Numerics:
        fp32 and float64 without dropout: one convolution with `W + scaling * B A`. Else the sum of two convolutions,
        because a low-precision sum of weights would lose small updates.

    Raises:
        ConfigError: A value is out of bounds.

    Source:
        loralib 0.1.2, `ConvLoRA`, which has the same layout for Conv2d and for kernels of size 1.
    """

    def __init__(
        self,
        conv_module: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        if conv_module not in _CONVOLUTIONS:
            allowed = "one of " + ", ".join(f"nn.{convolution.__name__}" for convolution in _CONVOLUTIONS)
            raise ConfigError(fault("philora.lora.ConvLoRA", "conv_module", conv_module, allowed))
        self.conv = _CONVOLUTIONS[conv_module](in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        kernel = self.conv.kernel_size
        rows_factor, columns_factor = math.prod(kernel[: len(kernel) // 2]), math.prod(kernel[len(kernel) // 2 :])
        rank = r * min(rows_factor, columns_factor)
        self.adapt(
            (rank, in_channels * columns_factor), (out_channels // self.conv.groups * rows_factor, rank), use_rslora
        )
        self.reset_parameters()

    @property
    def _holder(self) -> Any:
        return self.conv

    @property
    def base_weight(self) -> Tensor:
        """Return the convolution's Parameter, in any mode."""
        weight: Tensor = self.conv.base_weight
        return weight

    @property
    def weight(self) -> Tensor:
        """Return the convolution's weight; the merged one while merged."""
        weight: Tensor = self.conv.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Return the convolution's bias."""
        bias: Tensor | None = self.conv.bias
        return bias

    def reset_parameters(self) -> None:
        """Initialise the convolution as PyTorch does, A as nn.Linear's weight, B to zero."""
        self.conv._merged_weight = None  # PyTorch initialises the value of `weight`
        self.conv.reset_parameters()
        self._reset_lora()

    def merge_AB(self) -> Tensor:
        """Return the update without its scaling. Shape: that of weight."""
        wide_A, wide_B = self._wide()
        return (wide_B @ wide_A).view(self.base_weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer. Shapes: as the convolution."""
        conv, dropout = self.conv, self.lora_dropout
        y: Tensor | None
        if not self._adds_update():
            return cast(Tensor, conv(x))
        # Hooks of weight_norm, pruning and the like compute the convolution's weight during its call.
        y = conv(x) if is_hooked(conv) and conv._merged_weight is None else None
        base = self.base_weight
        device = base.device.type
        with without_autocast(device):
            delta = (self.merge_AB() * self.scaling).to(base.dtype)
        exact = base.dtype in (torch.float32, torch.float64) and autocast_dtype(device) is None
        if y is None and exact and not (dropout.p > 0 and dropout.training):
            y = conv._conv_forward(x, base + delta, conv.bias)
        else:
            y = conv._conv_forward(x, base, conv.bias) if y is None else y
            y = y + conv._conv_forward(dropout(x), delta, None)
        return y

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `weight` and `bias` are the convolution's."""
        if name in ("weight", "bias"):
            setattr(self.conv, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; `weight` and `bias` are the convolution's."""
        if name in ("weight", "bias"):
            delattr(self.conv, name)
        else:
            super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # loralib 0.1.2 writes `conv.weight`, its main branch `weight` beside it, older releases `weight` alone.
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                value = state_dict.pop(prefix + name)
                state_dict.setdefault(f"{prefix}conv.{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(ConvLoRA):
    """nn.Conv1d with an update; arguments after the class as `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """nn.Conv2d with an update; arguments after the class as `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """nn.Conv3d with an update; arguments after the class as `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
