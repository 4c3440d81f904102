"""Choose how the decoder layers of a batch are computed, and why: one function of facts, which needs no device.

| path      | what runs                                                                               |
| --------- | --------------------------------------------------------------------------------------- |
| `stack`   | one autograd node per layer, Triton kernels, one attention call (`decoder_stack.layer`) |
| `modules` | transformers' layers with philora's modules (`kernels.modules`)                         |
| `plain`   | transformers' and PEFT's own code                                                       |

`facts_of_*` in `decoder_stack.facts` read the facts from a model, a batch and a device. Cases that have not run on a
GPU yet (`UNTRIED`) are off unless `PHILORA_STACK=all`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from philora.kernels.attention_choice import LARGEST_HEAD_SIZE, LEAST_CAPABILITY

Path = Literal["stack", "modules", "plain"]

UNTRIED = {
    "dropout": "LoRA dropout inside the kernels",
    "float16": "weights in float16",
    "float32": "weights in float32",
    "host": "inputs of layers in the computer's memory",
    "norms": "norms that train",
    "longrope": "LongRoPE's factors",
    "unadapted": "linear layers without an adapter",
    "int8": "an int8 base",
    "fp4": "an fp4 base",
    "autocast": "autocast",
    "devices": "layers on several devices",
}
"""Cases that the stack covers, tested on a CPU, but that no GPU has run yet."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that the choice depends on.

    Attributes:
        architecture: Class name of the decoder.
        dtype: Dtype of the frozen weights, such as "bfloat16"; "mixed" if they differ.
        base: "plain", "nf4", "fp4", "int8", "fp8", or "mixed".
        head_size: Columns of a head.
        activation: Activation of the feed-forward part.
        attention_dropout: Probability in training.
        residual_dropout: Probability in training.
        lora_dropout: The largest probability of an adapter.
        adapters: Reasons why the stack cannot compute the adapters, such as "a variant (DoRA)".
        hooks: Modules of the layers that have hooks or an instance attribute `forward`.
        trains_base: Parameters of the layers that train and are neither adapters nor norms.
        trains_norms: Whether a norm of a layer trains.
        unadapted: Whether some linear layer has no adapter.
        longrope: Whether the rotary factors depend on a document's length.
        sharded: Whether FSDP or DeepSpeed shards the weights.
        devices: Number of devices that have layers.
    """

    architecture: str = "Phi3Model"
    dtype: str = "bfloat16"
    base: str = "plain"
    head_size: int = 96
    activation: str = "silu"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    lora_dropout: float = 0.0
    adapters: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    trains_base: tuple[str, ...] = ()
    trains_norms: bool = False
    unadapted: bool = False
    longrope: bool = False
    sharded: bool = False
    devices: int = 1


@dataclass(frozen=True)
class BatchFacts:
    """Facts of a call of the model that the choice depends on.

    Attributes:
        gradients: Whether a backward pass will follow.
        training: Whether the model is in training mode.
        mask: Whether an attention mask is given: rows with padding.
        positions: Whether positions or bounds of documents are given.
        cache: Whether a cache of keys and values is given or requested.
        outputs: Other requested outputs, such as "output_hidden_states".
        autocast: The dtype of autocast, or None.
        keep: What is kept for backward (`layer.Keep`).
    """

    gradients: bool = True
    training: bool = True
    mask: bool = False
    positions: bool = True
    cache: bool = False
    outputs: tuple[str, ...] = ()
    autocast: str | None = None
    keep: str = "everything"


@dataclass(frozen=True)
class DeviceFacts:
    """Facts of the device and of the installation that the choice depends on.

    Attributes:
        kind: "cuda", "cpu" or another.
        name: The device's name for people.
        capability: CUDA's compute capability, or None.
        memory_bytes: Memory of the device.
        triton: The version of Triton, or None.
        interpreted: Whether Triton's kernels run on a CPU (`TRITON_INTERPRET=1`).
        flash: Whether PyTorch has flash attention for documents of any lengths.
        switch: Value of `PHILORA_STACK`: "0" for off, "all" also for untried cases, else "".
        fused: Whether philora's fast paths are on (`PHILORA_FUSED`).
        disagreement: How the stack differs from plain PEFT, or None.
        problem: Why an existing GPU cannot be used, or None.
    """

    kind: str = "cuda"
    name: str = "a GPU"
    capability: tuple[int, int] | None = (9, 0)
    memory_bytes: int = 0
    triton: str | None = "3.6.0"
    interpreted: bool = False
    flash: bool = True
    switch: str = ""
    fused: bool = True
    disagreement: str | None = None
    problem: str | None = None


class Choice(NamedTuple):
    """The chosen path.

    Attributes:
        path: `stack`, `modules` or `plain`.
        reasons: Why a faster path was not chosen; for `stack`, the model and device.
    """

    path: Path
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path} ({'; '.join(self.reasons)})"


def stack_for(model: ModelFacts, batch: BatchFacts, device: DeviceFacts) -> Choice:
    """Return how the decoder layers of a batch are computed, with all reasons against the stack."""
    if not device.fused:
        return Choice("plain", ("PHILORA_FUSED=0 turns philora's fast paths off",))
    reasons = [*_of_device(device), *_of_model(model), *_of_batch(batch, model)]
    if device.switch != "all" and not device.interpreted:
        untried = [UNTRIED[item] for item in _untried(model, batch)]
        if untried and not reasons:
            reasons.append(f"no GPU has run this yet, PHILORA_STACK=all takes it: {', '.join(untried)}")
    if reasons:
        return Choice("modules", tuple(reasons))
    return Choice("stack", (f"{model.architecture} on {device.name}",))


def _of_device(device: DeviceFacts) -> list[str]:
    if device.switch == "0":
        return ["PHILORA_STACK=0 turns the decoder stack off"]
    if device.triton is None:
        return ["Triton is not installed"]
    if device.interpreted:
        return []
    if device.kind != "cuda":
        return [f"the decoder stack needs a CUDA GPU, this is {device.name}"]
    found = []
    if device.capability is not None and device.capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, item)) for item in (LEAST_CAPABILITY, device.capability))
        found.append(f"{device.name} has compute capability {own}, flash attention needs {least}")
    if not device.flash:
        found.append("this PyTorch has no flash attention for packed rows")
    if device.disagreement is not None:
        found.append(device.disagreement)
    return found


def _of_model(model: ModelFacts) -> list[str]:
    found = list(model.adapters)
    if model.architecture != "Phi3Model":
        found.append(f"the architecture is {model.architecture}, not Phi3Model")
    if model.dtype == "mixed" or model.base == "mixed":
        found.append("weights of the layers differ in dtype or quantisation")
    elif model.dtype not in ("bfloat16", "float16", "float32"):
        found.append(f"weights are {model.dtype}")
    if model.head_size > LARGEST_HEAD_SIZE or model.head_size % 8:
        found.append(f"heads have {model.head_size} columns, flash attention takes multiples of 8 up to 256")
    if model.activation != "silu":
        found.append(f"the activation is {model.activation}, not silu")
    if model.hooks:
        found.append(f"hooks on modules of the layers: {', '.join(model.hooks[:3])}")
    if model.trains_base:
        found.append(f"weights of the layers train: {', '.join(model.trains_base[:3])}")
    if model.sharded:
        found.append("FSDP or DeepSpeed has the weights in shards")
    return found


def _of_batch(batch: BatchFacts, model: ModelFacts) -> list[str]:
    found = []
    if not batch.gradients:
        found.append("no gradient is recorded")
    if batch.mask:
        found.append("rows are padded (attention_mask)")
    if not batch.positions:
        found.append("the batch carries no positions")
    if batch.cache:
        found.append("a cache of keys and values is used")
    if batch.outputs:
        found.append(f"{', '.join(batch.outputs)} asked for")
    if batch.training and (model.attention_dropout or model.residual_dropout):
        found.append("dropout of attention or of the residual stream")
    if batch.autocast not in (None, model.dtype):
        found.append(f"autocast to {batch.autocast} over weights in {model.dtype}")
    return found


def _untried(model: ModelFacts, batch: BatchFacts) -> list[str]:
    """Return the keys of `UNTRIED` that a case needs."""
    rests = {
        "dropout": batch.training and model.lora_dropout > 0,
        "float16": model.dtype == "float16",
        "float32": model.dtype == "float32",
        "host": batch.keep == "host",
        "norms": model.trains_norms,
        "longrope": model.longrope,
        "unadapted": model.unadapted,
        "int8": model.base == "int8",
        "fp4": model.base == "fp4",
        "autocast": batch.autocast is not None,
        "devices": model.devices > 1,
    }
    return [name for name, on in rests.items() if on]
