"""Use quantised bases: bitsandbytes' weights, dequantised when a product needs them, and read one at a time.

A layer of bitsandbytes holds 4 or 8 bits of every weight and the scales of its blocks or rows. The fused function gets
a `QuantizedWeight`, which dequantises the matrix for a product in the product's dtype, in the forward pass and again in
backward.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import transformers.modeling_utils
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from philora.errors import ConfigError, ModelError, fault
from philora.native import library as native
from philora.native.build import available

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

logger = logging.getLogger(__name__)

SCHEMES = ("nf4", "fp4", "int8")
"""Schemes of bitsandbytes, by the names that messages and records use."""


def quantization_config(
    quantization: str | Mapping[str, Any] | None, dtype: torch.dtype, skeleton: PreTrainedModel | None = None
) -> BitsAndBytesConfig | None:
    """Return transformers' configuration for `model.quantization`, or None.

    Args:
        quantization: `none`, `nf4`, `int8`, or a mapping of BitsAndBytesConfig's keys. In a mapping,
            `bnb_4bit_compute_dtype` defaults to `dtype`; bitsandbytes would multiply in fp32.
        dtype: Dtype of the products.
        skeleton: The model without weights; needed for a mapping with `llm_int8_skip_modules`. The output layer and
            tied modules are added to that list, because transformers would quantise them.

    Raises:
        ModelError: bitsandbytes is not installed.
        ConfigError: BitsAndBytesConfig refuses a value.
    """
    if quantization in (None, "none"):
        return None
    require_bitsandbytes("quantization", quantization)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    keys = dict(cast("Mapping[str, Any]", quantization))
    if keys.get("bnb_4bit_compute_dtype") is None:
        keys["bnb_4bit_compute_dtype"] = dtype
    if keys.get("llm_int8_skip_modules") is not None and skeleton is not None:
        skipped = [*keys["llm_int8_skip_modules"], *sorted(get_keys_to_not_convert(skeleton))]
        keys["llm_int8_skip_modules"] = list(dict.fromkeys(skipped))
    kind = keys.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise ConfigError(fault("model.quantization", "bnb_4bit_quant_type", kind, "nf4 or fp4"))
    try:
        return BitsAndBytesConfig(**keys)
    except (TypeError, ValueError, AttributeError) as error:
        expected = "values that transformers.BitsAndBytesConfig takes"
        raise ConfigError(fault("model", "quantization", keys, expected, str(error))) from error


def require_bitsandbytes(name: str, value: object) -> None:
    """Check that bitsandbytes is installed.

    Raises:
        ModelError: It is not installed.
    """
    if bitsandbytes is None:
        todo = "pip install 'philora[quantization]', or set model.quantization: none and give a 16-bit model"
        raise ModelError(fault("model", name, value, "bitsandbytes to be installed for a quantised model", todo))


def bitsandbytes_is_here() -> bool:
    """Return whether bitsandbytes is installed."""
    return bitsandbytes is not None


def empty_layer(scheme: str, in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    """Return a quantised layer (one of `SCHEMES`) with equal weights, to measure the time of dequantising."""
    # Made like the replacement of a plain layer; a layer of bitsandbytes would draw from torch's generator.
    weight = torch.full((out_features, in_features), 0.01, dtype=dtype)
    if scheme == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, device="meta"
        )
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return cast(nn.Module, layer)
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=dtype, quant_type=scheme, compress_statistics=True
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type=scheme, module=layer
    )
    return cast(nn.Module, layer)


def scheme_of(config: Any) -> str | None:
    """Return how the weights of the model with this config are quantised; None if they are not.

    Returns:
        One of `SCHEMES`, or the name of another method (gptq, awq, fp8, ...).
    """
    value_of = config.get if isinstance(config, Mapping) else partial(getattr, config)
    found = value_of("quantization_config", None)
    if found is None:
        return None
    keys = dict(found) if isinstance(found, Mapping) else found.to_dict()
    if keys.get("load_in_8bit"):
        return "int8"
    if keys.get("load_in_4bit"):
        return str(keys.get("bnb_4bit_quant_type", "fp4"))
    method = keys.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def check_folder(config: Any, name: str, quantization: Any = "none") -> str | None:
    """Return the scheme of a model's folder, after checking that it can be trained over.

    Args:
        config: The folder's config, or the content of its file.
        name: The folder's name in messages.
        quantization: The value of `model.quantization`; ignored with a warning if the folder is quantised already.

    Raises:
        ModelError: The scheme is not one of bitsandbytes', or bitsandbytes is not installed.
    """
    scheme = scheme_of(config)
    if scheme is None:
        return None
    if scheme not in SCHEMES:
        expected = f"16-bit weights, or weights that bitsandbytes quantised (nf4, int8); these are {scheme}"
        todo = "Give the model that it was made from, and set model.quantization: nf4 for the same memory"
        raise ModelError(fault("model", "name_or_path", name, expected, todo))
    require_bitsandbytes("name_or_path", name)
    if quantization not in (None, "none", scheme):
        logger.warning("%s is quantised already (%s): model.quantization is ignored", name, scheme)
    return scheme


@contextmanager
def one_weight_at_a_time() -> Iterator[None]:
    """Make transformers read tensors of safetensors files one by one when they are used, without mapping the files.

    transformers quantises one weight after another, but maps all files, so the pages that it has read stay in memory
    until the last weight is done, and count towards a memory limit. Read by `pread`, a weight is freed once it is
    quantised.
    """
    mapped = transformers.modeling_utils.safe_open

    def read(*args: Any, **options: Any) -> Any:
        return mapped(*args, **(options | {"backend": "pread"}))

    transformers.modeling_utils.safe_open = read
    try:
        yield
    finally:
        transformers.modeling_utils.safe_open = mapped


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer is a linear layer whose weight bitsandbytes quantised."""
    if bitsandbytes is None:
        return False
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return True
    return isinstance(layer, bitsandbytes.nn.Linear8bitLt) and layer.weight.dtype == torch.int8


class QuantizedWeight:
    """The weight of a quantised layer, for functions that dequantise it when they need the matrix.

    Attributes:
        shape: (out, in).
        compute_dtype: The dtype in which the layer multiplies; None for that of its input.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.shape = torch.Size((cast(int, layer.out_features), cast(int, layer.in_features)))
        chosen = isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.compute_dtype is not None
        self.compute_dtype: torch.dtype | None = cast(torch.dtype, layer.compute_dtype) if chosen else None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix. Shape: (out, in).

        Without a recorded gradient it may be in memory that the next call in this thread overwrites.
        """
        if not torch.is_grad_enabled() and shares_memory(self._layer, dtype):
            return _in_shared_memory(self._layer)
        return dequantized(self._layer, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x W^T + b`, computed in the layer's dtype.

        Shapes:
            x (..., in), bias (out); returns (..., out) in x's dtype.
        """
        given = x.to(self.compute_dtype or x.dtype)
        bias = None if bias is None else bias.to(given.dtype)
        return nn.functional.linear(given, self.dequantize(given.dtype), bias).to(x.dtype)


_shared = threading.local()


def shares_memory(layer: nn.Module, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Return whether the matrices of a quantised layer are written into one reused buffer.

    This is so for 4-bit weights of bf16 on a CPU with compiled functions. For a new matrix in every product the system
    would clear pages one by one, which takes longer than dequantising.
    """
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    return (
        isinstance(layer, bitsandbytes.nn.Linear4bit)
        and state is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.uint8
        and not getattr(state, "packing_format_for_cpu", False)
        and {dtype, state.dtype} == {torch.bfloat16}
        and state.shape[-1] % state.blocksize == 0  # bitsandbytes treats others differently
        and available()
    )


def _in_shared_memory(layer: nn.Module) -> Tensor:
    """Return the matrix of a layer for which `shares_memory` is true."""
    weight: Any = layer.weight
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes.functional.dequantize_blockwise(scales, state.state2) + state.offset
    needed = state.shape.numel()
    memory: Tensor | None = getattr(_shared, "memory", None)
    if memory is None or memory.numel() < needed:
        with torch.inference_mode(False):  # training uses the buffer that an evaluation has made
            _shared.memory = memory = torch.empty(needed, dtype=torch.bfloat16)
    matrix = memory[:needed].view(state.shape)
    native.from_4bit_(weight.data, state.code, scales.float(), matrix)
    return matrix


def dequantized(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dequantised weight of a layer.

    Args:
        layer: A layer for which `is_quantized` is true.
        dtype: Dtype of the result; default: that of the weight before quantisation (int8: float16, as bitsandbytes).

    Shapes:
        Returns (out, in).

    Numerics:
        4 bits: as bitsandbytes, rounded to the dtype of the weight before quantisation, then to `dtype`. 8 bits: the
        product of integer and scale, rounded once.

    Cost:
        Memory for the matrix.
    """
    weight: Any = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
        matrix = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return cast(Tensor, matrix.to(dtype or matrix.dtype))
    state: Any = layer.state
    scale = state.SCB if state.SCB is not None else weight.SCB
    matrix = weight.data.to(dtype or torch.float16)
    return cast(Tensor, matrix.mul_(scale.unsqueeze(1) * (1 / 127)))


def dequantized_into(layer: nn.Module, out: Tensor) -> Tensor:
    """Write the dequantised weight of a layer into existing memory, and return it. Shapes: out (out, in).

    Args:
        layer: A layer for which `is_quantized` is true.
        out: Memory for the matrix, on the weight's device. With 4 bits, a second matrix is allocated temporarily on a
            CPU, or if `out` has another dtype than the weight before quantisation.
    """
    weight: Any = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
        if out.is_cuda and out.dtype == weight.quant_state.dtype:  # bitsandbytes lacks the operator on a CPU
            bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state, out=out)
            return out
        return out.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    state: Any = layer.state
    scale = state.SCB if state.SCB is not None else weight.SCB
    return torch.mul(weight.data, (scale * (1 / 127)).unsqueeze(1), out=out)


if bitsandbytes is not None:

    class _AsInTraining(bitsandbytes.MatmulLtState):  # type: ignore[misc]
        """State of an 8-bit layer that treats every forward pass as training."""

        is_training = property(lambda self: True, lambda self, value: None)


def keep_layout(model: nn.Module) -> None:
    """Make the layers of bitsandbytes compute the same in evaluation as in training, with the same weights.

    4 bits: on processors with AVX512-BF16 a layer's first forward pass without gradients rearranges the weight and
    rounds its scales to bf16. Later training has other weights, and the layer passes no gradient. This is turned off,
    and undone if it has happened.

    8 bits: on a CPU a layer without an adapter multiplies by the dequantised matrix in training, and rounds its input
    to 8 bits in evaluation. Here it does the former in both. On a GPU it rounds in both, and is not changed.
    """
    if bitsandbytes is None:
        return
    packed = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt) and type(module.state) is bitsandbytes.MatmulLtState:
            module.state.__class__ = _AsInTraining
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            unpack = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)
            module.quant_state = weight.quant_state
            packed += 1
    if packed:
        logger.warning(
            "bitsandbytes had rearranged %d quantised weights for inference and rounded their scales; their layout is "
            "restored. Call philora.optimize before the first forward pass to avoid the rounding.",
            packed,
        )


def parameters_in(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; an element of a 4-bit parameter holds several."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else int(shape.numel())


def dequantize_(model: PreTrainedModel) -> None:
    """Replace every quantised layer by a plain one, which makes the model an ordinary 16-bit model.

    Numerics:
        Weights get the model's dtype.

    Cost:
        The memory of the 16-bit model; a quantised weight is freed when it is replaced.
    """
    keep_layout(model)
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(name, _plain(layer, model.dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _plain(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    transposed = getattr(layer, "source_cls", nn.Linear) is Conv1D
    weight = dequantized(layer, dtype)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        plain = Conv1D(out_features, in_features) if transposed else nn.Linear(in_features, out_features, bias=False)
    plain.weight = nn.Parameter(weight.t().contiguous() if transposed else weight, requires_grad=False)
    plain.bias = cast("nn.Parameter | None", layer.bias)
    return plain.train(layer.training)


def record(model: nn.Module) -> dict[str, Any]:
    """Return the entry of `philora.json` for a quantised base that an adapter was trained over."""
    config = getattr(model, "config", None)
    if scheme_of(config) not in SCHEMES:
        return {}
    found = cast(Any, config).quantization_config
    keys = dict(found) if isinstance(found, Mapping) else found.to_dict()
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    return {"base": {"dtype": dtype, "quantization": keys}}


class Stored(NamedTuple):
    """A base's tensors, of which some are computed when they are used.

    Attributes:
        like: Tensors by their names in the files; placeholders (right shape and dtype, no memory) for computed ones.
        made: Functions that compute the dequantised weights.
    """

    like: dict[str, Tensor]
    made: dict[str, Callable[[], Tensor]]


def stored_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Stored:
    """Return the tensors of a folder that bitsandbytes quantised, with weights of this dtype."""
    four = {name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")}
    eight = {f"{name.removesuffix('SCB')}weight" for name in tensors if name.endswith(".SCB")}
    rows = [name.removesuffix("weight") + end for name in eight for end in ("SCB", "weight_format")]
    beside = (*(f"{name}." for name in four), *rows)
    like: dict[str, Tensor] = {}
    made: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in tensors.items():
        if name in four:
            statistics = {item: value for item, value in tensors.items() if item.startswith(f"{name}.")}
            made[name] = partial(_of_4_bits, tensor, statistics, dtype)
            shape = bitsandbytes.functional.QuantState.from_dict(dict(statistics), torch.device("cpu")).shape
        elif name in eight:
            made[name] = partial(_of_8_bits, tensor, tensors[f"{name.removesuffix('weight')}SCB"], dtype)
            shape = tensor.shape
        else:
            if not name.startswith(beside):  # the others are scales and their like
                like[name] = tensor
            continue
        like[name] = torch.zeros((), dtype=dtype).expand(shape)
    return Stored(like, made)


def rounded_weights(
    tensors: Mapping[str, Tensor], names: Mapping[str, bool], config: BitsAndBytesConfig, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return functions that quantise and dequantise the weights of a 16-bit base, by their names in the files.

    Args:
        tensors: All tensors of the base's files.
        names: The weights to quantise, and whether they are transposed first (transformers' Conv1D).
        config: How they are quantised.
        dtype: Their dtype before quantisation.
    """
    return {name: partial(_quantized_and_back, tensors[name], config, dtype, names[name]) for name in names}


def quantized_names(skeleton: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, bool]:
    """Return the parameters that transformers quantises when it loads a model, and whether it transposes them first."""
    skipped = HfQuantizer.get_modules_to_not_convert(
        skeleton, config.llm_int8_skip_modules, skeleton._keep_in_fp32_modules
    )
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in skeleton.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    }


def _of_4_bits(data: Tensor, statistics: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    state = bitsandbytes.functional.QuantState.from_dict(dict(statistics), torch.device("cpu"))
    return cast(Tensor, bitsandbytes.functional.dequantize_4bit(data, state).to(dtype))


def _of_8_bits(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.to(dtype).mul_(scale.unsqueeze(1) * (1 / 127))


def _quantized_and_back(weight: Tensor, config: BitsAndBytesConfig, dtype: torch.dtype, transposed: bool) -> Tensor:
    given = (weight.t() if transposed else weight).to(dtype)
    if config.load_in_8bit:
        parameter = bitsandbytes.nn.Int8Params(given, requires_grad=False).to("cpu")
        matrix = _of_8_bits(parameter.data, parameter.SCB, dtype)
    else:
        parameter = bitsandbytes.nn.Params4bit(
            given,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        ).to("cpu")
        matrix = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return (matrix.t() if transposed else matrix).to(weight.dtype).contiguous()
