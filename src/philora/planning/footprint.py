"""Count the memory and operations of a run on the model without weights.

`footprint` visits the modules once, and counts bytes per token and total bytes; `Footprint.estimate` adds them up for a
micro-batch. The formulas are those of philora's fast path. tests/unit/planning/test_footprint.py compares them with the
tensors that autograd keeps. Other paths need about the same.
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
"""What backward computes again: nothing, the outputs of RMSNorm and SwiGLU and dropout's masks, or complete layers;
with `host`, complete layers from inputs in host memory, which only the decoder stack supports."""
WHOLE_LAYERS = ("full", "host")
KEPT: dict[Recomputation, Keep] = {"none": "everything", "elementwise": "elementwise", "full": "input", "host": "host"}
"""The same in the decoder stack's terms."""

# Other memory of a process on a CPU: interpreter, libraries, tokenizer and data before the first step, and then the
# kernels that oneDNN makes for every new shape, most of them in the first dozen steps. Measured on tiny models, with
# the versions of constraints.txt.
RUNTIME_CPU_BYTES = 560_000_000
KERNELS_CPU_BYTES = 100_000_000
# Memory of torch on a GPU besides tensors: cuBLAS's workspaces. The CUDA context is not included.
RUNTIME_GPU_BYTES = 64 * 2**20
# Free memory in glibc's heap between used blocks, as a share of the memory that a step allocates and frees. Measured by
# `benchmarks.memory` over eight steps with `kernels.memory.keep_freed_memory`; it is larger if activations of many
# layers are kept. There is none if large blocks are returned to the system (`return_large_blocks`).
HEAP_SHARE: dict[Recomputation, float] = {"none": 0.7, "elementwise": 0.7, "full": 0.35, "host": 0.35}
# The same for CUDA's allocator, which reserves more than is allocated: 0.13 and 0.15 of a step's allocations in the two
# trainings of results/gpu.csv.
RESERVE_SHARE = 0.15
# Number of fp32 blocks of the size of a chunk of logits, while a GPU computes the scores of its labels.
SCORE_BLOCKS = 3

Role = Literal["attention", "feed-forward", "product", "other"]
# Linear layers by the tensor that they read: the output of a norm, or of SwiGLU.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("qkv_proj", "q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj"), "feed-forward"),
    "down_proj": "product",
}


@dataclass(frozen=True)
class Estimate:
    """Memory of a run by part, in bytes.

    Attributes:
        weights: The base: 16 or 32 bits, or 4 or 8 with embeddings, head and norms in 16.
        adapter: Trained parameters in fp32, their gradients, and copies in the dtype of the products.
        optimizer: States of the optimizer.
        activations: Tensors that backward needs, and its largest temporary ones.
        loss: Hidden states and logits at labels.
        dequantized: The dequantised matrix of one layer, during its product.
        heap: Free blocks that the allocator holds between used ones.
        runtime: Interpreter, libraries, kernels.
        graph: Additional memory of a CUDA graph of the layers.
        loading: Peak while the model is loaded, runtime included.
        evaluation: Peak while the run evaluates, runtime included.
        files: The part of the peak that is pages of mapped files: a base that is neither quantised nor converted.
        pinned: Pinned host memory for inputs of layers, in a run on a GPU. Not part of the peak.
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
        """Return the largest of the run's peaks: in training, loading and evaluation."""
        return max(self.training, self.loading, self.evaluation)

    def to_dict(self) -> dict[str, int]:
        """Return plain values for JSON."""
        return {**asdict(self), "training": self.training, "peak": self.peak}


PARTS = ("weights", "adapter", "optimizer", "activations", "loss", "dequantized", "heap", "runtime", "graph")
"""The parts of a training step's memory."""


class LayerBytes(NamedTuple):
    """Bytes per token that a decoder layer keeps for backward.

    Attributes:
        kept: Bytes kept with and without element-wise recomputation.
        cheap: Bytes that element-wise recomputation does not keep.
        unlabelled_kept: The part of `kept` that the last layer does not keep for a token without a label.
        unlabelled_cheap: The same part of `cheap`.
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
        weights: Number of weights of all layers.
        out_features: Rows of the largest.
        in_features: Columns of the largest.
    """

    weights: int
    out_features: int
    in_features: int


class Evaluated(NamedTuple):
    """Sizes of an evaluation's batches.

    Attributes:
        tokens: Tokens of a batch that is scored.
        answers: Number of answers generated at once.
        answer_tokens: Tokens of an answer with its prompt.
        packed: Bytes of weights that are reordered for generation, or 0.
        by_graph: Whether answers are computed in a CUDA graph, whose cache has a fixed size.
    """

    tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    packed: int = 0
    by_graph: bool = False


NOT_EVALUATED = Evaluated()


@dataclass(frozen=True)
class Footprint:
    """The sizes that memory and time of a run depend on, except its batch.

    Attributes:
        device: `cpu` or the accelerator's name.
        dtype: Dtype of weights and activations.
        quantization: none, nf4, fp4 or int8.
        parameters: Parameters of the base.
        trainable: Parameters that train.
        trained_bytes: Bytes of a trained parameter: 4, or 2 with `training_config.adapter_dtype: bfloat16`.
        weights: Bytes of the base in memory.
        mapped: Whether they are pages of mapped files.
        converted: Bytes of files that are mapped while their weights are converted to another dtype.
        optimizer: Bytes of the optimizer's states.
        layers: Decoder layers.
        hidden: Width.
        vocabulary: Rows of the head.
        attention_width: Query heads times their size.
        key_value_width: Key heads times their size.
        layer: Bytes per token of one layer.
        linears: Linear layers of the decoder layers.
        quantized_matrix: Elements of the largest weight that is dequantised.
        skips_last: Whether the last layer leaves out tokens without a label.
        packed: Bytes of the reordered weights that generation keeps if there is enough memory, or 0.
        stack: Sizes of the decoder layers if the decoder stack computes them.
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
        """Return the bytes of the process during evaluation, without batches and pages of files."""
        runtime = RUNTIME_CPU_BYTES + KERNELS_CPU_BYTES if self.device == "cpu" else RUNTIME_GPU_BYTES
        trained = self.trained_bytes * self.trainable + self.optimizer
        return runtime + trained + (0 if self.mapped else self.weights)

    @property
    def element_bytes(self) -> int:
        """Return the bytes of an activation."""
        return torch.finfo(self.dtype).bits // 8

    def estimate(
        self, tokens: int, recomputation: Recomputation, *, label_share: float = 1.0,
        evaluation: Evaluated = NOT_EVALUATED,
    ) -> Estimate:  # fmt: skip
        """Estimate the memory by part.

        Args:
            tokens: Tokens of a micro-batch.
            recomputation: What backward computes again.
            label_share: Share of the tokens that have a label.
            evaluation: Sizes of the evaluation's batches.
        """
        loss, matrix = self._loss(tokens, label_share), self.quantized_matrix * self.element_bytes
        activations, temporary, copies = self._layers(tokens, recomputation, label_share)
        # The loss exists at the end of the forward pass, the temporaries at the start of the backward pass. They
        # include dequantised matrices, except the shared one of the decoder stack.
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
        """Return the bytes that the layers keep, their largest temporaries, and copies of A and B for the products."""
        size = self.element_bytes
        if self.stack is not None:
            keep = KEPT[recomputation]
            kept = self.stack.activation_bytes(tokens, keep), tokens * self.stack.backward_bytes(keep)
            return (*kept, self.trainable * size)
        labelled = label_share if self.skips_last and recomputation not in WHOLE_LAYERS else 1.0
        # A backward pass of one layer: the gradients of the residual, of its widest output and of that one's input. The
        # last layer's has labelled tokens only, and the loss is freed by then.
        one = self.layer.kept + self.layer.cheap
        backward = 2 * self.layer.widest + 2 * self.hidden * size
        if recomputation in WHOLE_LAYERS:
            temporary = tokens * (one + backward)
        elif recomputation == "elementwise":
            temporary = max(tokens * (labelled * (backward + self.layer.cheap)), tokens * (backward - self.layer.kept))
        else:
            temporary = max(tokens * labelled * backward, tokens * (backward - one))
        # The copies belong to the autograd graph; with recomputation to that of one layer.
        layers = self.layers if recomputation in WHOLE_LAYERS else 1
        copies = 0 if size == self.trained_bytes else self.trainable * size / layers
        return self._activations(tokens, recomputation, labelled), temporary, copies

    def _activations(self, tokens: int, recomputation: Recomputation, labelled: float) -> float:
        """Return the bytes of all layers that backward needs."""
        # The last norm's output; the embeddings' output if something is computed again from it (nothing before it
        # trains, so otherwise it is freed); token ids, labels, positions in int64.
        ends = 1 if recomputation == "none" else 2
        around = tokens * (ends * self.hidden * self.element_bytes + 4 * 8)
        if recomputation in WHOLE_LAYERS:
            return around + tokens * self.layers * self.hidden * self.element_bytes
        cheap = 0 if recomputation == "elementwise" else self.layer.cheap
        dropped = self.layer.unlabelled_kept + (0 if recomputation == "elementwise" else self.layer.unlabelled_cheap)
        # The last layer keeps copies for labelled tokens: the input of its output projection, the outputs of that and
        # of the feed-forward part, and the norm's output, which is not recomputed there.
        read = self.attention_width if self.element_bytes < 4 else 0
        copied = labelled * self.element_bytes * (read + 2 * self.hidden) if labelled < 1 else 0.0
        if recomputation == "elementwise" and labelled < 1:
            copied += labelled * self.element_bytes * self.hidden
        return around + tokens * (self.layers * (self.layer.kept + cheap) - (1 - labelled) * dropped + copied)

    def _loss(self, tokens: int, label_share: float) -> float:
        """Return the bytes of the label head: hidden states, their gradient, and a chunk of logits."""
        labels = tokens * label_share
        chunk = min(labels, max(FEWEST_TOKENS, CHUNK_BYTES // (self.vocabulary * self.element_bytes)))
        blocks = 0 if self.device == "cpu" else 4 * SCORE_BLOCKS  # small on a CPU
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
        """Return the operations of a step per token.

        The base's products forward and for the gradient take 4 N, with full recomputation 6 N. Added are the head at
        labels, twice; causal attention of a document (forward once, backward two and a half times); adapters forward
        once and backward twice.
        """
        base, attended, adapters = (6, 4.5, 8) if recomputation in WHOLE_LAYERS else (4, 3.5, 6)
        head = 4 * label_share * self.hidden * self.vocabulary
        attention = attended * 2 * self.attention_width * document_tokens * self.layers
        return base * self.linears.weights + head + attention + adapters * self.trainable


def footprint(
    model: PeftModel, settings: ModelConfig, optim: str, device: str, trained_bytes: int = 4, *, stack: bool = False
) -> Footprint:
    """Count the sizes of a model without weights.

    Args:
        model: The base on the meta device with its adapter.
        settings: Section `model` of the configuration.
        optim: `training_config.optim`.
        device: The run's device, `cpu` or the accelerator's name.
        trained_bytes: Bytes of a trained parameter.
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
    layers = ((plain_name(f"{name}.weight"), layer) for name, layer in base.named_modules())
    return sum(layer.weight.numel() for name, layer in layers if isinstance(layer, nn.Linear) and name not in quantized)


def _attention_sizes(config: Any) -> tuple[int, int, int]:
    """Return the number of heads, the width of one, and the width of all keys."""
    heads = int(getattr(config, "num_attention_heads", 1))
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return heads, width, int(getattr(config, "num_key_value_heads", None) or heads) * width


def _parameters(
    model: PeftModel, quantized: Mapping[str, Callable[[nn.Parameter], float]], size: int
) -> tuple[list[tuple[int, float]], list[int]]:
    """Return elements and bytes of every parameter of the base, and elements of the quantised ones with a leading 0."""
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
    """Return the decoder stack's sizes. `shape` has layers, query heads, their size, and columns of all keys."""
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
    """Return the name of a parameter in the model without PEFT's layers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _quantized(
    base: PreTrainedModel, wanted: Any, dtype: torch.dtype
) -> tuple[str, dict[str, Callable[[nn.Parameter], float]]]:
    """Return how a base is quantised, and functions for the bytes per weight of every quantised parameter."""
    found = getattr(base.config, "quantization_config", None)
    if found is None:
        asked = quantization_config(wanted, dtype, base)
    else:
        asked = BitsAndBytesConfig.from_dict(dict(found if isinstance(found, Mapping) else found.to_dict()))
    if asked is None:
        return "none", {}
    # Scales: one for 64 weights, in fp32 or, with double quantisation, in a byte with an fp32 scale for 256 of them.
    # int8 has one in fp32 per row.
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
    if name == "adafactor":  # one number per row and per column of a matrix
        return 4 * (sum(shape) if len(shape) > 1 else count)
    states = 1 if name.startswith(("lion", "rmsprop", "adagrad", "sgd")) else 3 if name.startswith("ademamix") else 2
    if "8bit" in name and count >= 4096:  # bytes, with a scale for 256 of them; smaller tensors are in fp32
        return states * (count + 4 * math.ceil(count / 256))
    return states * count * (parameter_bytes if "_torch" in name else 4)


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
    """Yield the linear layers, adapted or not, with their parent modules."""
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
    """Return the bytes per token of one layer, from the classes of its modules."""
    # The outputs of linear layers are kept: by attention (q, k, v), by SwiGLU (gate and up), and as the residual that
    # is the input of the next norm.
    kept = float(size * sum(linear.out_features for linear in linears))
    unlabelled_kept = 0.0 if size < 4 else float(heads * width * size)
    # Attention's output, cos and sin in fp32, and the logarithm of the normaliser per head. In fp32 attention works in
    # tiles and keeps neither that nor its output; the output projection keeps the latter for labelled tokens.
    kept += heads * width * size + 4 * width + (4 * heads if size < 4 else 0)
    fast_norms = [module for module in layer.modules() if isinstance(module, tuple(FAST.values())) and _is_norm(module)]
    for norm in filter(_is_norm, layer.modules()):
        # One number per row; transformers' own norm also keeps its input in fp32, twice.
        kept += 4 if norm in fast_norms else 8 * cast(nn.Parameter, norm.weight).numel()
    for module in layer.modules():
        names = {linear.name for linear in linears if linear.parent is module}
        if {"gate_proj", "up_proj"} <= names:  # silu(gate) as well as gate and up, if SwiGLU is not one node
            kept += next(size * linear.out_features for linear in linears if linear.name == "gate_proj")
    unlabelled_kept += sum(size * linear.out_features for linear in linears if linear.name == "gate_up_proj")
    widest = size * max(linear.out_features for linear in linears)
    more, cheap, unlabelled_more, unlabelled_cheap = _adapted_bytes(linears, size, device, bool(fast_norms))
    return LayerBytes(kept + more, cheap, unlabelled_kept + unlabelled_more, unlabelled_cheap, widest)


def _adapted_bytes(
    linears: Sequence[_Linear], size: int, device: str, fast_norms: bool
) -> tuple[float, float, float, float]:
    """Return the bytes per token that the adapters of a layer add, as the first four of `LayerBytes`."""
    kept = cheap = unlabelled_kept = unlabelled_cheap = 0.0
    read: set[tuple[int, Role, str]] = set()
    for linear in linears:
        if linear.adapter is None:
            continue
        # An adapted layer keeps its input, once for all layers that read it, x A, and dropout's mask.
        role = _ROLES.get(linear.name, "other")
        rank = sum(linear.adapter.r.values())
        p = max((float(getattr(drop, "p", 0.0)) for drop in linear.adapter.lora_dropout.values()), default=0.0)
        mask = linear.in_features / (8 if device == "cpu" and native.available() else 1) if p > 0 else 0
        source = id(linear.parent), role, linear.name if role == "other" else ""
        counted = source in read or linear.name == "o_proj"  # attention's output is counted by the layer
        given = 0 if counted else size * linear.in_features
        read.add(source)
        again = (role in ("attention", "feed-forward") and fast_norms) or (
            role == "product" and isinstance(linear.parent, FastPhi3MLP)
        )
        made_again, held = (given, 0) if again else (0, given)
        kept += rank * size + held
        cheap += mask + made_again
        if linear.name in ("gate_up_proj", "down_proj", "o_proj"):
            unlabelled_kept += rank * size + held
            unlabelled_cheap += mask + made_again
    return kept, cheap, unlabelled_kept, unlabelled_cheap


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)
