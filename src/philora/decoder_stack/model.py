"""Give `Phi3Model` the decoder stack: a class that `optimize` sets on existing models.

Only the class changes; parameters, names and state dicts are transformers'. A call that the stack does not cover runs
transformers' forward over philora's modules; the first such call on a GPU logs why.
"""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3Model
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from philora.decoder_stack import graphs
from philora.decoder_stack.choice import Choice, ModelFacts, stack_for
from philora.decoder_stack.facts import facts_of_call, facts_of_device, facts_of_model, known_facts
from philora.decoder_stack.products import Scaling, fp8_scaling
from philora.decoder_stack.trial import disagreement
from philora.kernels.attention import without_marker
from philora.kernels.document_groups import documents_of
from philora.kernels.modules import recomputes_elementwise
from philora.kernels.switches import graph_switch, stack_switch
from philora.lora.functional import autocast_dtype

if TYPE_CHECKING:
    from philora.decoder_stack.layer import Keep
    from philora.decoder_stack.stack import DecoderStack

logger = logging.getLogger(__name__)

_PARAMETERS = tuple(inspect.signature(Phi3Model.forward).parameters)[1:]


@dataclass
class StackSettings:
    """Settings of a model's decoder stack.

    Attributes:
        deterministic: Whether repeated steps give the same bits.
        fp8: Whether the base's products are in fp8 if the device supports it.
        inputs_on_host: Whether inputs of layers are kept in host memory if layers are recomputed.
        counter: Number of forward passes with dropout. With the seed it determines the masks; resuming restores it.
        seed: Seed of the masks; None for PyTorch's initial seed.
    """

    deterministic: bool = True
    fp8: bool = False
    inputs_on_host: bool = False
    counter: int = 0
    seed: int | None = None


class StackedPhi3Model(Phi3Model):  # type: ignore[misc]
    """Phi-3's decoder with one autograd node per layer if `choice.stack_for` allows it."""

    stack_settings = StackSettings()  # replaced by the model's own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the decoder. Arguments and results are transformers'."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not _possible(self.embed_tokens):
            return super().forward(*args, **kwargs)
        inputs, keep = dict(zip(_PARAMETERS, args, strict=False)) | kwargs, keep_of(self)
        inputs["attention_mask"] = without_marker(inputs.get("attention_mask"))
        facts = known_facts(self)
        choice = choose(self, inputs, keep, facts)
        if choice.path != "stack":
            _runners.pop(self, None)  # graphs hold memory
            _warn_without_stack(choice, self)
            return super().forward(*args, **kwargs)
        return _stacked(self, inputs, keep, facts)


StackedPhi3Model.__name__ = Phi3Model.__name__  # as tools show it; pickle goes by the qualified name


def _possible(embedding: nn.Module) -> bool:
    """Return whether the stack can run on the device: a GPU, or a CPU under Triton's interpreter."""
    on_gpu = next(embedding.parameters()).device.type == "cuda"
    return on_gpu or (os.environ.get("TRITON_INTERPRET"), stack_switch()) == ("1", "all")


def keep_of(model: Any) -> Keep:
    """Return what the stack keeps for backward, from the model's settings of recomputation."""
    settings: StackSettings = model.stack_settings
    if model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers):
        return "host" if settings.inputs_on_host else "input"
    return "elementwise" if recomputes_elementwise(model.layers[0]) else "everything"


def choose(model: Any, inputs: dict[str, Any], keep: Keep, facts: ModelFacts) -> Choice:
    """Return how a call of a decoder is computed; on a GPU the stack is first compared with plain PEFT, once."""
    given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if given is None:
        return Choice("modules", ("there is no input",))
    device = facts_of_device(given.device)
    batch = facts_of_call(model, inputs, keep)
    if model.stack_settings.fp8 and facts.base == "plain":
        facts = replace(facts, base="fp8")
    choice = stack_for(facts, batch, device)
    if choice.path == "stack" and given.device.type == "cuda":
        found = disagreement(given.device, facts)
        choice = choice if found is None else stack_for(facts, batch, replace(device, disagreement=found))
    return choice


_warned: set[Choice] = set()


def _warn_without_stack(choice: Choice, model: Any) -> None:
    """Warn once why the stack does not run, for a model on a GPU in training mode."""
    if choice in _warned or not model.training or next(model.parameters()).device.type != "cuda":
        return
    _warned.add(choice)
    fp8 = ", and base products are not in fp8" if model.stack_settings.fp8 else ""
    logger.warning("decoder layers run without the stack of one node a layer%s: %s", fp8, "; ".join(choice.reasons))


_stacks: WeakKeyDictionary[nn.Module, tuple[DecoderStack, ModelFacts]] = WeakKeyDictionary()
_counters: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_runners: WeakKeyDictionary[nn.Module, graphs.GraphRunner] = WeakKeyDictionary()


def _stacked(model: Any, inputs: dict[str, Any], keep: Keep, facts: ModelFacts) -> BaseModelOutputWithPast:
    """Compute a packed batch with the stack. Shapes: ids (B, T); returns (B, T, C)."""
    embeddings = inputs.get("inputs_embeds")
    embeddings = model.embed_tokens(inputs["input_ids"]) if embeddings is None else embeddings
    rows, tokens, width = embeddings.shape
    cos, sin = model.rotary_emb(embeddings, position_ids=inputs["position_ids"])
    half = cos.shape[-1] // 2
    cos, sin = (
        item[..., :half].expand(rows, tokens, half).reshape(-1, half).float().contiguous() for item in (cos, sin)
    )
    # PyTorch has flash attention only in bf16 and fp16. In other dtypes documents are computed one by one, which needs
    # the lengths on the host.
    flash = embeddings.is_cuda and embeddings.dtype in (torch.bfloat16, torch.float16)
    documents = documents_of(inputs["position_ids"], rows, inputs, with_lengths=not flash)
    counter = _next_counter(model, embeddings.device) if model.training else None
    given = graphs.Inputs(embeddings.reshape(-1, width).contiguous(), cos, sin, documents, counter)
    stack, deterministic = stack_of(model, embeddings, facts), model.stack_settings.deterministic
    runner = _runner_of(model, stack, given.x, keep, facts)
    found = None if runner is None else runner(given, keep, deterministic)
    x, h = found or stack(given.x, cos, sin, documents, keep=keep, counter=counter, deterministic=deterministic)
    hidden = model.norm((x + h).view(rows, tokens, width))
    return BaseModelOutputWithPast(last_hidden_state=hidden)


def stack_of(model: Any, embeddings: Tensor, facts: ModelFacts) -> DecoderStack:
    """Return the stack of a model, cached until a part of the model is replaced."""
    from philora.decoder_stack.stack import DecoderStack  # needs Triton

    fp8: Scaling | None = fp8_scaling(embeddings.device, embeddings.dtype) if model.stack_settings.fp8 else None
    stack, made_for = _stacks.get(model, (None, None))
    if stack is not None and made_for is facts and (stack.dtype, stack.fp8) == (embeddings.dtype, fp8):
        return stack
    if stack is None or not stack.is_for(model, embeddings.dtype, fp8):
        stack = None
        _stacks.pop(model, None)  # freed before a new one is made
        _runners.pop(model, None)
        stack = DecoderStack(model, embeddings.dtype, fp8)
    _stacks[model] = stack, facts
    return stack


def _runner_of(model: Any, stack: DecoderStack, x: Tensor, keep: Keep, facts: ModelFacts) -> graphs.GraphRunner | None:
    """Return the runner that computes the stack in CUDA graphs, or None if it is computed without."""
    switch = graph_switch()
    if switch != "all":  # checked in every pass, so before all other facts
        return None
    runner = _runners.get(model)
    if runner is not None and runner.stack is stack and keep != "host" and autocast_dtype(x.device.type) is None:
        return runner
    base = "fp8" if stack.fp8 is not None else facts.base
    autocast = autocast_dtype(x.device.type) is not None
    dtype = str(x.dtype).removeprefix("torch.")
    reasons = graphs.against(graphs.GraphFacts(switch, x.device.type, base, dtype, keep, facts.devices, autocast))
    if reasons:
        _warn_without_graphs(tuple(reasons))
        return None
    _runners.pop(model, None)  # freed before a new one is made
    runner = _runners[model] = graphs.GraphRunner(stack, x.device, base)
    return runner


@cache
def _warn_without_graphs(reasons: tuple[str, ...]) -> None:
    logger.warning("decoder layers run without a CUDA graph: %s", "; ".join(reasons))


def _next_counter(model: Any, device: torch.device) -> Tensor:
    """Return the number of this pass on the device, and count it. It is a new tensor, since backward reads it again."""
    settings: StackSettings = model.stack_settings
    counter = _counters.get(model)
    if counter is None or counter.device != device:
        first = (settings.seed if settings.seed is not None else _own_seed()) + settings.counter
        counter = _counters[model] = torch.tensor([first], dtype=torch.int64, device=device)
    settings.counter += 1
    now = counter.clone()
    counter.add_(1)
    return now


def _own_seed() -> int:
    """Return a seed from PyTorch's, far from the seeds of other processes."""
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return (torch.initial_seed() + rank * 1_000_000_007) % (1 << 31)


def dropout_state(model: nn.Module) -> dict[str, int] | None:
    """Return the state that a run saves to continue dropout's masks; None if no stack has drawn any."""
    for decoder in _decoders(model):
        if decoder.stack_settings.counter:
            settings = decoder.stack_settings
            return {"seed": _own_seed() if settings.seed is None else settings.seed, "counter": settings.counter}
    return None


def set_dropout_state(model: nn.Module, state: dict[str, int]) -> None:
    """Continue dropout's masks from a state of `dropout_state`."""
    for decoder in _decoders(model):
        configure(decoder, seed=int(state["seed"]), counter=int(state["counter"]))
        _counters.pop(decoder, None)


def _decoders(model: nn.Module) -> list[StackedPhi3Model]:
    return [module for module in model.modules() if isinstance(module, StackedPhi3Model)]


def use_decoder_stack(model: nn.Module) -> None:
    """Give every `Phi3Model` inside `model` the class with the stack, in place. Idempotent."""
    for module in model.modules():
        if type(module) is Phi3Model:
            module.__class__ = StackedPhi3Model
            cast(StackedPhi3Model, module).stack_settings = StackSettings()
            # What output_hidden_states records; transformers looks it up by class.
            _CAN_RECORD_REGISTRY[module] = cast(StackedPhi3Model, module)._can_record_outputs


def configure(model: nn.Module, **settings: Any) -> None:
    """Change settings (`StackSettings`) of the decoder stacks inside a model."""
    for decoder in _decoders(model):
        decoder.stack_settings = replace(decoder.stack_settings, **settings)


def facts_for(model: nn.Module) -> Any:
    """Return the facts of the first `Phi3Model` inside a model, or None if there is none."""
    for module in model.modules():
        if isinstance(module, Phi3Model):
            return facts_of_model(cast(Any, module))
    return None
