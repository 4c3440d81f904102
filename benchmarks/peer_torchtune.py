"""torchtune on the same packs, after its recipe lora_finetune_single_device: its model, mask, loss and compilation.

Runs in an environment with torchtune 0.6.1: `python -m benchmarks.peer_torchtune TASK OUT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.process import Record, Task, run
from benchmarks.work import IGNORED, Document


def batch_of(documents: Sequence[Document], row_tokens: int) -> dict[str, Any]:
    """A pack as torchtune's PackedDataset and its collator make it: padded to the full row, with a block mask."""
    import numpy as np
    import torch
    from torchtune.modules.attention_utils import packed_block_causal_mask

    lengths = [len(item.input_ids) for item in documents]
    padding = row_tokens - sum(lengths)
    tokens = np.concatenate([*(item.input_ids for item in documents), np.zeros(padding, np.int32)])
    labels = np.concatenate([*(item.labels for item in documents), np.full(padding, IGNORED, np.int32)])
    last = lengths[-1]
    positions = np.concatenate([*(np.arange(item) for item in lengths), np.arange(last, last + padding)])
    lengths += [padding] * (padding > 0)
    return {
        "tokens": torch.from_numpy(tokens)[None].long(),
        "labels": torch.from_numpy(labels)[None].long(),
        "input_pos": torch.from_numpy(np.minimum(positions, row_tokens - 1))[None],
        "mask": packed_block_causal_mask([torch.tensor(lengths)]),
    }


def train(task: Task) -> dict[str, Any]:
    """Train as the task says."""
    import torch
    from safetensors.torch import load_file
    from torchtune import training
    from torchtune.models.phi3 import lora_phi3, phi3_hf_to_tune
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    work = task.work
    compiled = task.contestant != "torchtune-eager"
    torch.manual_seed(task.seed)
    with training.set_default_dtype(torch.bfloat16):
        model = lora_phi3(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=work.vocabulary,
            num_layers=work.layers,
            num_heads=work.heads,
            num_kv_heads=work.heads,
            embed_dim=work.hidden,
            intermediate_dim=work.intermediate,
            max_seq_len=4096,
            lora_rank=16,
            lora_alpha=32,
            lora_dropout=0.0,
        )
    set_trainable_params(model, get_adapter_params(model))
    weights = {}
    for path in sorted(Path(task.model).glob("*.safetensors")):
        weights.update(load_file(path))
    found = model.load_state_dict(
        phi3_hf_to_tune(weights, num_heads=work.heads, num_kv_heads=work.heads, dim=work.hidden), strict=False
    )
    missing = [name for name in found.missing_keys if "lora_" not in name]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"weights: missing {missing}, unexpected {found.unexpected_keys}")
    del weights
    loss_function = CEWithChunkedOutputLoss(ignore_index=IGNORED)
    model.set_num_output_chunks(loss_function.num_output_chunks)
    if compiled:
        training.compile_model(model)
        loss_function = training.compile_loss(loss_function)
    parameters = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    no_label = torch.full((1, 1), IGNORED)

    record = Record(task.warmup)
    for step in task.read():
        total_labels, total_loss = 0, 0.0
        for documents in step:
            batch = batch_of(documents, work.row_tokens)
            labels = torch.hstack((batch.pop("labels")[:, 1:], no_label))
            count = int((labels != IGNORED).sum())
            record.batch(count, sum(len(item.input_ids) for item in documents))
            loss = loss_function(model(**batch), labels) * count
            loss.backward()
            total_labels += count
            total_loss += loss.item()
        training.scale_grads(model, torch.tensor(1 / total_labels))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.step(total_loss / total_labels)
    settings = {
        "trainer": "torchtune, loop of lora_finetune_single_device",
        "dropout": 0.0,
        "recomputation": False,
        "autocast": False,
        "weights": "bfloat16",
        "adapters": "/".join(sorted({str(item.dtype).removeprefix("torch.") for item in parameters})),
        "trainable_parameters": sum(item.numel() for item in parameters),
        "attention": "sdpa with a block mask",
        "optimizer": f"AdamW fused lr {task.learning_rate} clip 1.0",
        "rows": "packs, padded",
        "compiled": "layers and loss" if compiled else "nothing",
        "threads": torch.get_num_threads(),
    }
    return record.result(settings, ("torch", "torchtune", "torchao", "numpy"))


if __name__ == "__main__":
    run(train)
