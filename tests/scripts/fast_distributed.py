"""`torchrun --nproc-per-node 2 fast_distributed.py OUT WAY ...`: the trainings of tests/fast_paths.py, shared out.

By hand each way trains with and without the loss at labels; `trainer` is philora.SFTTrainer, under DDP. OUT gets the
mean losses, the first step's gradients, the calls of the fast functions, the kinds of parameters while nothing runs,
and notices.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from tests.fast_paths import ROWS, adapted, counted, gradients_of, train, train_by_trainer


def ddp(model: Any) -> nn.Module:
    """A copy of the model on each process."""
    return DistributedDataParallel(model)


def layers(model: Any) -> Any:
    """The decoder layers of an adapted model."""
    return model.get_base_model().model.layers


def fsdp2(model: Any) -> nn.Module:
    """PyTorch's own recipe: each layer, then the rest."""
    for layer in layers(model):
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_bf16(model: Any) -> nn.Module:
    """With products and activations in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers(model):
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def checkpointed(wrap: Any) -> Any:
    """The same with gradient checkpointing as the trainer switches it on, before the model is wrapped."""

    def wrapped(model: Any) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return wrap(model)

    return wrapped


def fsdp2_accelerate(model: Any) -> nn.Module:
    """As accelerate lays it out: embedding, norm and head are units of their own."""
    base = model.get_base_model()
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(base.get_input_embeddings())
    fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
    return fully_shard(model)


def fsdp2_recomputed(model: Any) -> nn.Module:
    """FSDP's own activation checkpointing, as accelerate applies it."""
    for index, layer in enumerate(layers(model)):
        layers(model)[index] = fully_shard(checkpoint_wrapper(layer))
    return fully_shard(model)


def fsdp2_leaves(model: Any) -> nn.Module:
    """Every linear layer by itself, those inside an adapted layer too."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(model)


def fsdp1(model: Any) -> nn.Module:
    """Each layer one flat parameter."""
    policy = ModuleWrapPolicy({Phi3DecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_peft(model: Any) -> nn.Module:
    """By the policy that PEFT makes and transformers' trainer takes: every A and B by itself."""
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


WAYS = {
    "ddp": ddp,
    "ddp-checkpointed": checkpointed(ddp),
    "fsdp2": fsdp2,
    "fsdp2-bf16": fsdp2_bf16,
    "fsdp2-checkpointed": checkpointed(fsdp2),
    "fsdp2-accelerate": fsdp2_accelerate,
    "fsdp2-recomputed": fsdp2_recomputed,
    "fsdp2-leaves": fsdp2_leaves,
    "fsdp1": fsdp1,
    "fsdp1-peft": fsdp1_peft,
}


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's gradients, of all processes' parts together."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = gradients_of(model)
    else:
        found = gradients_of(model)
    return {
        name: each.full_tensor() if isinstance(each, DTensor) else each
        for name, each in found.items()
        if "lora_" in name
    }


def by_hand(wrap: Any, label_head: bool) -> dict[str, Any]:
    """Train on this process's share."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = wrap(adapted(label_head))
    kinds = {type(each.data if type(each) is nn.Parameter else each).__name__ for each in model.parameters()}
    call = {"fused_lm_head": True} if label_head else {}
    with counted() as counts:
        losses, gradients = train(
            model,
            accumulation=ROWS // processes,
            rank=rank,
            processes=processes,
            gradients=whole_gradients,
            **call,
        )
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    result = mean / processes
    return {"losses": result.tolist(), "gradients": gradients, "counts": counts, "parameters": kinds}


def by_trainer() -> dict[str, Any]:
    """Train through the trainer, which shares out the rows and the loss by itself."""
    with counted() as counts, tempfile.TemporaryDirectory() as folder:
        losses, gradients = train_by_trainer(folder, ROWS // dist.get_world_size())
    return {"losses": losses, "gradients": gradients, "counts": counts}


def main() -> None:
    """All ways in turn."""
    # accelerate makes the group of the trainer, and takes one that is there
    dist.init_process_group("gloo")
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("philora").addHandler(handler)
    found: dict[tuple[str, bool], Any] = {}
    for way in sys.argv[2:]:
        for label_head in (True,) if way == "trainer" else (False, True):
            try:
                found[way, label_head] = by_trainer() if way == "trainer" else by_hand(WAYS[way], label_head)
            except Exception:  # noqa: BLE001 - the test shows it
                found[way, label_head] = traceback.format_exc()
    if dist.get_rank() == 0:
        torch.save({"found": found, "notices": notices}, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
