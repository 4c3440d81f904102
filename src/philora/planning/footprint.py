"""Memory and operations of a run, counted on the model without weights.

`footprint` walks the modules once and notes bytes a token and bytes in all; `Footprint.estimate` adds them up for a
micro-batch. Each term says what it counts. The formulas are those of philora's fast path, which
tests/unit/planning/test_footprint.py compares with the tensors that autograd really keeps; what another path keeps is
near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.models.phi3.modeling_phi3 import Phi3Model
from transformers.pytorch_utils import Conv1D

from philora.configuration.sections import ModelConfig
from philora.decoder_stack.memory import StackSizes
from philora.generation.decoding import packs
from philora.generation.static_decoding import cache_tokens, filled_up
from philora.kernels.loss import CHUNK_BYTES, FEWEST_TOKENS
from philora.kernels.modules import FAST, FastPhi3MLP
from philora.kernels.quantization import quantization_config, quantized_names, scheme_of
from philora.models.loading import resolve_dtype
from philora.native import build as native

if TYPE_CHECKING:
    from philora.decoder_stack.layer import Keep  # needs Triton

Recomputation = Literal["none", "elementwise", "full", "host"]
"""What backward computes again: nothing, the outputs of RMSNorm and SwiGLU and dropout's masks, or whole layers; with
`host`, whole layers from inputs that are kept in the computer's memory, which the decoder stack alone can."""
WHOLE_LAYERS = ("full", "host")
KEPT: dict[Recomputation, Keep] = {"none": "everything", "elementwise": "elementwise", "full": "input", "host": "host"}
"""The same in the decoder stack's words."""

# On a CPU, what a process holds besides: interpreter, libraries, tokenizer and data before the first step, and then the
# kernels that oneDNN makes for every shape that comes along, most of them in the first dozen of steps. Measured on
# models that are next to nothing, with the versions of constraints.txt.
RUNTIME_CPU_BYTES = 560_000_000
KERNELS_CPU_BYTES = 100_000_000
# What torch allocates on a GPU besides tensors: cuBLAS's workspaces. The context is not torch's.
RUNTIME_GPU_BYTES = 64 * 2**20
# Of the memory that a step allocates and frees, what glibc's heap holds besides, between blocks that stay: measured by
# `benchmarks.memory` over eight steps with `kernels.memory.keep_freed_memory`, more where many layers' activations
# stand side by side. Where large blocks go back to the system (`return_large_blocks`) there is none.
HEAP_SHARE: dict[Recomputation, float] = {"none": 0.7, "elementwise": 0.7, "full": 0.35, "host": 0.35}
# The same of CUDA's allocator: what it reserves beyond what is allocated, 0.13 and 0.15 of what a step allocates in the
# two trainings of results/gpu.csv.
RESERVE_SHARE = 0.15
# Blocks of fp32 that are as large as a chunk of logits, while the scores of its labels are computed on a GPU.
SCORE_BLOCKS = 3

Role = Literal["attention", "feed-forward", "product", "other"]
# Linear layers that read the same tensor, and what that tensor is: the output of a norm, or of SwiGLU.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("qkv_proj", "q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj"), "feed-forward"),
    "down_proj": "product",
}


@dataclass(frozen=True)
class Estimate:
    """Memory of a run by part, in bytes.

    Attributes:
        weights: The base as it is held: 16 or 32 bits, or 4 or 8 with embeddings, head and norms in 16.
        adapter: What trains in fp32, its gradient, and its copy in the dtype of the products.
        optimizer: States of the optimizer.
        activations: What backward needs, and the largest that it makes while all of it is there.
        loss: Hidden states and logits at labels.
        dequantized: The one matrix of a quantised layer that is there while its product runs.
        heap: Freed blocks that the allocator holds between others.
        runtime: Interpreter, libraries, kernels.
        graph: What a CUDA graph of the layers holds besides.
        loading: Peak while the model is loaded, runtime included.
        evaluation: Peak while the run evaluates, runtime included.
        files: Of the peak, pages of mapped files: the weights of a base that is neither quantised nor converted.
        pinned: Of the computer's memory beside a GPU's, pinned: inputs of layers. No part of the peak.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    loss: int
    dequantized: int
    heap: int
    runtime: int
    loading: int
    evaluation: int
    files: int
    graph: int = 0
    pinned: int = 0

    @property
    def training(self) -> int:
        """Return the peak of a training step: the sum of the parts."""
        return sum(value for name, value in asdict(self).items() if name in PARTS)

    @property
    def peak(self) -> int:
        """Return the largest memory of the run: while it trains, loads or evaluates."""
        return max(self.training, self.loading, self.evaluation)

    def to_dict(self) -> dict[str, int]:
        """Return plain values for JSON."""
        return {**asdict(self), "training": self.training, "peak": self.peak}


PARTS = ("weights", "adapter", "optimizer", "activations", "loss", "dequantized", "heap", "runtime", "graph")
"""The parts of a training step's memory."""


class LayerBytes(NamedTuple):
    """Describe what a decoder layer keeps for backward of a token, in bytes.

    Attributes:
        kept: What both grades keep.
        cheap: What element-wise recomputation makes again.
        unlabelled_kept: Of `kept`, what the last layer leaves out for a token without a label (less than zero: adds).
        unlabelled_cheap: The same of `cheap`.
        widest: The largest output of a linear layer.
    """

    kept: float
    cheap: float
    unlabelled_kept: float
    unlabelled_cheap: float
    widest: float


class Linears(NamedTuple):
    """Weights of the linear layers of all decoder layers, and the shape of the largest.

    Attributes:
        weights: How many, all together.
        out_features: Of the largest.
        in_features: Of the largest.
    """

    weights: int
    out_features: int
    in_features: int


class Evaluated(NamedTuple):
    """Describe what an evaluation has in memory at once.

    Attributes:
        tokens: Of a batch that is scored.
        answers: Made at once.
        answer_tokens: Of each, with its prompt.
        packed: Bytes of weights that are reordered for them, or 0.
        by_graph: Whether they are computed in a CUDA graph, whose cache has a fixed size.
    """

    tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    packed: int = 0
    by_graph: bool = False


NOT_EVALUATED = Evaluated()


@dataclass(frozen=True)
class Footprint:
    """Describe what memory and time of a run depend on besides its batch.

    Attributes:
        device: `cpu` or the accelerator's name.
        dtype: Of weights and activations.
        quantization: none, nf4, fp4 or int8.
        parameters: Of the base.
        trainable: Parameters that train.
        trained_bytes: Of one of them: 4, or 2 with `training_config.adapter_dtype: bfloat16`.
        weights: Bytes of the base as it is held.
        mapped: Whether they are pages of mapped files.
        converted: Bytes of files that are mapped while weights are made from them in another dtype.
        optimizer: Bytes of the optimizer's states.
        layers: Decoder layers.
        hidden: Width.
        vocabulary: Rows of the head.
        attention_width: Query heads times their size.
        key_value_width: Key heads times their size.
        layer: Bytes a token of one layer.
        linears: Of the decoder layers.
        quantized_matrix: Elements of the largest weight that is dequantised.
        skips_last: Whether the last layer leaves out tokens without a label.
        packed: Bytes of the reordered weights that generation holds where there is room; 0 where it makes none.
        stack: Sizes of the decoder layers where the decoder stack computes them.
        graph: Whether it does so in a CUDA graph.
    """

    device: str
    dtype: torch.dtype
    quantization: str
    parameters: int
    trainable: int
    trained_bytes: int
    weights: int
    mapped: bool
    converted: int
    optimizer: int
    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    key_value_width: int
    layer: LayerBytes
    linears: Linears
    quantized_matrix: int
    skips_last: bool
    packed: int
    stack: StackSizes | None = None
    graph: bool = False

    @property
    def anonymous(self) -> int:
        """Return the bytes that the process holds while it evaluates, without batches and pages of files."""
        runtime = RUNTIME_CPU_BYTES + KERNELS_CPU_BYTES if self.device == "cpu" else RUNTIME_GPU_BYTES
        trained = self.trained_bytes * self.trainable + self.optimizer
        return runtime + trained + (0 if self.mapped else self.weights)

    @property
    def element_bytes(self) -> int:
        """Return the bytes of an activation."""
        return torch.finfo(self.dtype).bits // 8

    def estimate(
        self,
        tokens: int,
        recomputation: Recomputation,
        *,
        label_share: float = 1.0,
        evaluation: Evaluated = NOT_EVALUATED,
    ) -> Estimate:
        """Estimate the memory by part.

        Args:
            tokens: Tokens of a micro-batch.
            recomputation: What backward computes again.
            label_share: Of the tokens, those with a label.
            evaluation: What is evaluated at once.
        """
        loss, matrix = self._loss(tokens, label_share), self.quantized_matrix * self.element_bytes
        activations, temporary, copies = self._layers(tokens, recomputation, label_share)
        # The end of the forward pass has the loss, the beginning of the backward pass the temporaries; of these
        # dequantised matrices are a part, but for the one that the decoder stack keeps for all.
        activations += max(temporary - loss - (0 if self.stack else matrix), 0)
        on_cpu = self.device == "cpu"
        runtime = RUNTIME_CPU_BYTES if on_cpu else RUNTIME_GPU_BYTES
        kernels = KERNELS_CPU_BYTES if on_cpu else 0
        weights = self.weights + (self.stack.fp8_bytes if self.stack else 0)
        return Estimate(
            weights=weights,
            adapter=round(2 * self.trained_bytes * self.trainable + copies),
            optimizer=self.optimizer,
            activations=round(activations),
            loss=round(loss),
            dequantized=matrix,
            heap=round(self._heap_share(recomputation) * (activations + loss + matrix)),
            runtime=runtime + kernels,
            loading=self.weights + self.trained_bytes * self.trainable + runtime + max(self.converted, matrix),
            evaluation=self._evaluation(evaluation, label_share) + runtime + kernels if any(evaluation) else 0,
            files=self.weights if self.mapped else 0,
            graph=self.stack.graph_bytes if self.stack and self.graph else 0,
            pinned=self.stack.pinned_bytes(tokens, KEPT[recomputation]) if self.stack else 0,
        )

    def _heap_share(self, recomputation: Recomputation) -> float:
        if self.device != "cpu":
            return RESERVE_SHARE
        shares = self.quantization in ("nf4", "fp4") and self.dtype == torch.bfloat16 and native.available()
        return HEAP_SHARE[recomputation] if self.quantization == "none" or shares else 0

    def _layers(self, tokens: int, recomputation: Recomputation, label_share: float) -> tuple[float, float, float]:
        """Return what the layers keep, the most that backward has besides, and copies of A and B for the products."""
        size = self.element_bytes
        if self.stack is not None:
            keep = KEPT[recomputation]
            kept = self.stack.activation_bytes(tokens, keep), tokens * self.stack.backward_bytes(keep)
            return (*kept, self.trainable * size)
        labelled = label_share if self.skips_last and recomputation not in WHOLE_LAYERS else 1.0
        # A full backward pass of one layer: the residual's gradient, that of its widest output and of what went into
        # it. The last layer's has labelled tokens alone, and the loss is over by then.
        one = self.layer.kept + self.layer.cheap
        backward = 2 * self.layer.widest + 2 * self.hidden * size
        if recomputation in WHOLE_LAYERS:
            temporary = tokens * (one + backward)
        elif recomputation == "elementwise":
            temporary = max(tokens * (labelled * (backward + self.layer.cheap)), tokens * (backward - self.layer.kept))
        else:
            temporary = max(tokens * labelled * backward, tokens * (backward - one))
        # The copies belong to the graph: with recomputation to that of one layer.
        layers = self.layers if recomputation in WHOLE_LAYERS else 1
        copies = 0 if size == self.trained_bytes else self.trainable * size / layers
        return self._activations(tokens, recomputation, labelled), temporary, copies

    def _activations(self, tokens: int, recomputation: Recomputation, labelled: float) -> float:
        """Return the bytes that backward needs of all layers."""
        # The last norm's output; the embeddings' output where something is computed again from it (nothing before it
        # trains, so that otherwise nobody needs it); token ids, labels, positions in int64.
        ends = 1 if recomputation == "none" else 2
        around = tokens * (ends * self.hidden * self.element_bytes + 4 * 8)
        if recomputation in WHOLE_LAYERS:
            return around + tokens * self.layers * self.hidden * self.element_bytes
        cheap = 0 if recomputation == "elementwise" else self.layer.cheap
        dropped = self.layer.unlabelled_kept + (0 if recomputation == "elementwise" else self.layer.unlabelled_cheap)
        # Of labelled tokens the last layer keeps copies: what its output projection reads of attention's output, the
        # outputs of that and of the feed-forward part, and the norm's output, which is not made again there.
        read = self.attention_width if self.element_bytes < 4 else 0
        copied = labelled * self.element_bytes * (read + 2 * self.hidden) if labelled < 1 else 0.0
        if recomputation == "elementwise" and labelled < 1:
            copied += labelled * self.element_bytes * self.hidden
        return around + tokens * (self.layers * (self.layer.kept + cheap) - (1 - labelled) * dropped + copied)

    def _loss(self, tokens: int, label_share: float) -> float:
        """Return the bytes of the label head: hidden states, their gradient, and a chunk of logits."""
        labels = tokens * label_share
        chunk = min(labels, max(FEWEST_TOKENS, CHUNK_BYTES // (self.vocabulary * self.element_bytes)))
        blocks = 0 if self.device == "cpu" else 4 * SCORE_BLOCKS  # on a CPU they are small
        return labels * 3 * self.hidden * self.element_bytes + chunk * self.vocabulary * (self.element_bytes + blocks)

    def _evaluation(self, evaluated: Evaluated, label_share: float) -> int:
        """Return the bytes of scoring a batch, or of answers with a cache of keys and values."""
        tokens, answers, answer_tokens, packed, by_graph = evaluated
        size = self.element_bytes
        # One layer at a time: residual, norm, output of the widest product, half of it after SwiGLU, and the mask.
        wide = (3 * self.hidden * size + 1.5 * self.layer.widest) * max(tokens, answers * answer_tokens)
        # `score` takes fp32 logits of labels 2^25 at a time, about three times over.
        logits = 3 * 4 * min(2**25, tokens * label_share * self.vocabulary)
        # Keys and values of all layers, and of one more while a token is added.
        cached = answers * answer_tokens
        if by_graph and answers:
            cached = filled_up(answers) * cache_tokens(answer_tokens, answer_tokens)
        cache = cached * 2 * self.key_value_width * size * (self.layers + 1)
        trained = self.trained_bytes * self.trainable + self.optimizer
        held = self.weights + trained + self.quantized_matrix * size
        return round(held + max(wide + logits if tokens else 0, cache + packed + (wide if answers else 0)))

    # -- time

    def flops_per_token(self, recomputation: Recomputation, label_share: float, document_tokens: float) -> float:
        """Count the operations of a token's step: products of the base forward and for the gradient.

        4 N, with full recomputation 6 N; the head at labels, twice; causal attention of a document (forward once,
        backward two and a half times); adapters forward and twice backward.
        """
        again = recomputation in WHOLE_LAYERS
        passes = 6 if again else 4
        head = 4 * label_share * self.hidden * self.vocabulary
        attention = (4.5 if again else 3.5) * 2 * self.attention_width * document_tokens * self.layers
        adapters = (8 if again else 6) * self.trainable
        return passes * self.linears.weights + head + attention + adapters


def footprint(
    model: PeftModel,
    settings: ModelConfig,
    optim: str,
    device: str,
    trained_bytes: int = 4,
    *,
    stack: bool = False,
) -> Footprint:
    """Count a model that has no weights.

    Args:
        model: The base on the meta device with its adapter.
        settings: `model` of the configuration.
        optim: `training_config.optim`.
        device: Where the run computes, `cpu` or the accelerator's name.
        trained_bytes: Of a parameter that trains.
        stack: Whether the decoder stack computes the layers.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    config = base.config.get_text_config()
    dtype = resolve_dtype(settings.dtype)
    scheme, quantized = _quantized(base, settings.quantization, dtype)
    size = torch.finfo(dtype).bits // 8
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    counts, matrices = _parameters(model, quantized, size)
    packed = _plain_weights(base, quantized) * size if packs(model, device, dtype) else 0
    stored = getattr(config, "dtype", None) or dtype
    in_files = scheme_of(base.config) is not None or (scheme == "none" and stored == dtype)
    converts = scheme == "none" and stored != dtype
    parameters = sum(count for count, _ in counts)
    heads, width, key_value = _attention_sizes(config)
    layers = decoder_layers(base)
    linears = list(_linears(layers[0]))
    largest = max(linears, key=lambda linear: linear.out_features * linear.in_features)
    every = sum(one.out_features * one.in_features for layer in layers for one in _linears(layer))
    fp8, shape = scheme == "none" and settings.base_products == "fp8", (len(layers), heads, width, key_value)
    return Footprint(
        device=device,
        dtype=dtype,
        quantization=scheme,
        parameters=parameters,
        trainable=sum(weight.numel() for weight in trained),
        trained_bytes=trained_bytes,
        weights=math.ceil(sum(held for _, held in counts)),
        mapped=device == "cpu" and in_files,
        converted=parameters * torch.finfo(stored).bits // 8 if converts else 0,
        optimizer=sum(optimizer_bytes(optim, weight.shape, trained_bytes) for weight in trained),
        layers=len(layers),
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        attention_width=heads * width,
        key_value_width=key_value,
        layer=_layer_bytes(layers[0], linears, size, heads, width, device),
        linears=Linears(every, largest.out_features, largest.in_features),
        quantized_matrix=max(matrices),
        skips_last=isinstance(base.base_model, Phi3Model),
        packed=packed,
        stack=_stack_sizes(config, linears, shape, size, fp8, every) if stack else None,
    )


def _plain_weights(base: nn.Module, quantized: Any) -> int:
    """Return the number of weights in linear layers that are not quantised."""
    return sum(
        layer.weight.numel()
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and plain_name(f"{name}.weight") not in quantized
    )


def _attention_sizes(config: Any) -> tuple[int, int, int]:
    """Return the number of heads, the width of one, and the width of all keys."""
    heads = int(getattr(config, "num_attention_heads", 1))
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return heads, width, int(getattr(config, "num_key_value_heads", None) or heads) * width


def _parameters(
    model: PeftModel, quantized: Mapping[str, Callable[[nn.Parameter], float]], size: int
) -> tuple[list[tuple[int, float]], list[int]]:
    """Return of every parameter of the base its elements and bytes; and 0 with the elements of the quantised ones."""
    counts: dict[int, tuple[int, float]] = {}
    matrices = [0]
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        held = float(size)
        if plain_name(name) in quantized:
            held = quantized[plain_name(name)](parameter)
            matrices.append(parameter.numel())
        counts[id(parameter)] = parameter.numel(), parameter.numel() * held
    return list(counts.values()), matrices


def _stack_sizes(
    config: Any, linears: Sequence[_Linear], shape: tuple[int, int, int, int], size: int, fp8: bool, weights: int
) -> StackSizes:
    """Return the sizes for the decoder stack; `shape`: layers, query heads, their size, columns of all keys."""
    layers, heads, width, key_value = shape
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    return StackSizes(
        layers=layers,
        hidden=int(config.hidden_size),
        feed_forward=int(config.intermediate_size),
        query=heads * width,
        key_value=key_value,
        heads=heads,
        ranks=sum(sum(adapter.r.values()) for adapter in adapters),
        element_bytes=size,
        dropout=any(getattr(drop, "p", 0.0) > 0 for adapter in adapters for drop in adapter.lora_dropout.values()),
        fp8=fp8,
        weights=weights,
    )


def plain_name(name: str) -> str:
    """Return the name that a parameter has without PEFT's layers around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _quantized(
    base: PreTrainedModel, wanted: Any, dtype: torch.dtype
) -> tuple[str, dict[str, Callable[[nn.Parameter], float]]]:
    """Return how a base is quantised, and bytes a weight of every parameter that is."""
    found = getattr(base.config, "quantization_config", None)
    if found is not None:
        keys = found if isinstance(found, Mapping) else found.to_dict()
        asked = BitsAndBytesConfig.from_dict(dict(keys))
    else:
        asked = quantization_config(wanted, dtype, base)
    if asked is None:
        return "none", {}
    # Scales: one for 64 weights, in fp32 or, quantised once more, in a byte and one in fp32 for 256 of them; int8 has
    # one in fp32 a row.
    if asked.load_in_8bit:
        scheme, held = "int8", lambda weight: 1 + 4 / weight.shape[-1]
    else:
        scales = 1 / 64 + 4 / (64 * 256) if asked.bnb_4bit_use_double_quant else 4 / 64
        scheme, held = asked.bnb_4bit_quant_type, lambda weight: 0.5 + scales
    plain = {plain_name(name) for name in quantized_names(base, asked)}
    return scheme, dict.fromkeys(plain, held)


def optimizer_bytes(optim: str, shape: torch.Size, parameter_bytes: int = 4) -> int:
    """Return the bytes of an optimizer's states for a parameter, by its name in `training_config.optim`.

    Source: the optimizers' state dicts in torch 2.13, transformers 5.23 and bitsandbytes 0.50.
    """
    name = str(getattr(optim, "value", optim)).removeprefix("paged_")
    count = shape.numel()
    if name == "sgd" or "lomo" in name:
        return 0
    if name == "adafactor":  # one number a row and a column of a matrix
        return 4 * (sum(shape) if len(shape) > 1 else count)
    states = 1 if name.startswith(("lion", "rmsprop", "adagrad", "sgd")) else 3 if name.startswith("ademamix") else 2
    if "8bit" in name and count >= 4096:  # bytes and a scale for 256 of them; smaller tensors have fp32
        return states * (count + 4 * math.ceil(count / 256))
    return states * count * (parameter_bytes if "_torch" in name else 4)


# ---------------------------------------------------------------------------------------------- a decoder layer


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers: the longest of the model's module lists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList([model]))


class _Linear(NamedTuple):
    name: str
    parent: nn.Module
    in_features: int
    out_features: int
    adapter: LoraLayer | None


def _linears(layer: nn.Module) -> Iterator[_Linear]:
    """Return the linear layers, adapted or not, with the module that each is a part of."""
    inside: set[int] = set()
    for name, module in layer.named_modules():
        adapter = module if isinstance(module, LoraLayer) else None
        plain = adapter.get_base_layer() if adapter is not None else module
        if id(module) in inside or not isinstance(plain, nn.Linear | Conv1D):
            continue
        if adapter is not None:
            inside |= {id(entry) for entry in module.modules()}
        first, second = plain.weight.shape
        sizes = (first, second) if isinstance(plain, Conv1D) else (second, first)
        yield _Linear(name.rpartition(".")[2], layer.get_submodule(name.rpartition(".")[0]), *sizes, adapter)


def _layer_bytes(
    layer: nn.Module, linears: Sequence[_Linear], size: int, heads: int, width: int, device: str
) -> LayerBytes:
    """Return the bytes of a token in one layer, from what its modules are."""
    # What a linear layer returns is kept: by attention (q, k, v), by SwiGLU (gate and up), and as the residual after
    # it, which is the input of the next norm.
    kept = float(size * sum(linear.out_features for linear in linears))
    cheap = unlabelled_cheap = 0.0
    unlabelled_kept = 0.0 if size < 4 else float(heads * width * size)
    # Attention's output, cos and sin in fp32, and of each head the logarithm of the normaliser. In fp32 attention works
    # in tiles and keeps neither that nor its output, which the output projection keeps, of labelled tokens alone.
    kept += heads * width * size + 4 * width + (4 * heads if size < 4 else 0)
    fast_norms = [module for module in layer.modules() if isinstance(module, tuple(FAST.values())) and _is_norm(module)]
    for norm in filter(_is_norm, layer.modules()):
        # One number a row; transformers' own norm also keeps its input in fp32, twice.
        kept += 4 if norm in fast_norms else 8 * cast(nn.Parameter, norm.weight).numel()
    for module in layer.modules():
        names = {linear.name for linear in linears if linear.parent is module}
        if {"gate_proj", "up_proj"} <= names:  # silu(gate) beside gate and up, where SwiGLU is not one node
            kept += next(size * linear.out_features for linear in linears if linear.name == "gate_proj")
    read: set[tuple[int, Role, str]] = set()
    for linear in linears:
        in_feed_forward = linear.name in ("gate_up_proj", "down_proj")
        if in_feed_forward:
            unlabelled_kept += size * linear.out_features * (linear.name == "gate_up_proj")
        if linear.adapter is None:
            continue
        # An adapted layer keeps what it reads, once for all that read it, x A, and dropout's mask.
        role = _ROLES.get(linear.name, "other")
        rank = sum(linear.adapter.r.values())
        p = max((float(getattr(drop, "p", 0.0)) for drop in linear.adapter.lora_dropout.values()), default=0.0)
        mask = linear.in_features / (8 if device == "cpu" and native.available() else 1) if p > 0 else 0
        kept += rank * size
        cheap += mask
        source = id(linear.parent), role, linear.name if role == "other" else ""
        given = size * linear.in_features
        if source in read or linear.name == "o_proj":  # attention's output is counted above
            given = 0
        read.add(source)
        again = (role in ("attention", "feed-forward") and bool(fast_norms)) or (
            role == "product" and isinstance(linear.parent, FastPhi3MLP)
        )
        if again:
            cheap += given
        else:
            kept += given
        if in_feed_forward or linear.name == "o_proj":
            unlabelled_cheap += mask + (given if again else 0)
            unlabelled_kept += rank * size + (0 if again else given)
    return LayerBytes(
        kept, cheap, unlabelled_kept, unlabelled_cheap, size * max(linear.out_features for linear in linears)
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)
