"""litgpt on the same documents, after its finetune/lora.py: its model, loss and precision.

litgpt does not keep the documents of a pack apart, so it gets them one a row, without padding; those of a step
accumulate into one optimizer step. Runs in an environment with litgpt 0.5.13:
`python -m benchmarks.peer_litgpt TASK OUT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.process import Record, Task, run
from benchmarks.work import IGNORED


def train(task: Task) -> dict[str, Any]:
    """Train as the task says."""
    import lightning
    import torch
    from litgpt.config import Config as BaseConfig
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_phi
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    work = task.work
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fabric.seed_everything(task.seed, verbose=False)
    config = Config(
        name="Phi-3-bench",
        block_size=4096,
        vocab_size=work.vocabulary,
        padded_vocab_size=work.vocabulary,
        n_layer=work.layers,
        n_head=work.heads,
        n_embd=work.hidden,
        rotary_percentage=1.0,
        bias=False,
        norm_class_name="RMSNorm",
        intermediate_size=work.intermediate,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        lora_head=False,
    )
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    weights: dict[str, Any] = {}
    for path in sorted(Path(task.model).glob("*.safetensors")):
        weights.update(load_file(path))
    converted: dict[str, Any] = {}
    copy_weights_phi(BaseConfig(name="Phi-3-bench"), {}, converted, weights)
    found = model.load_state_dict(converted, strict=False)
    missing = [name for name in found.missing_keys if "lora_" not in name]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"weights: missing {missing}, unexpected {found.unexpected_keys}")
    del weights, converted
    steps = task.read()
    model.max_seq_length = max(len(item.input_ids) for step in steps for row in step for item in row)
    model = fabric.setup_module(model)
    parameters = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    optimizer = fabric.setup_optimizers(optimizer)
    model.train()

    record = Record(task.warmup)
    for step in steps:
        documents = [item for row in step for item in row]
        labels_of_step = sum(int(item.completion_mask[1:].sum()) for item in documents)
        total_loss = 0.0
        for document in documents:
            tokens = torch.from_numpy(document.input_ids)[None].long()
            targets = torch.from_numpy(document.labels)[None, 1:].long()
            count = int((targets != IGNORED).sum())
            record.batch(count, tokens.numel())
            logits = model(tokens, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, targets)
            fabric.backward(loss * (count / labels_of_step))
            total_loss += loss.item() * count
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.step(total_loss / labels_of_step)
    settings = {
        "trainer": "litgpt, loop of finetune/lora.py",
        "dropout": 0.0,
        "recomputation": False,
        "autocast": False,
        "weights": "bfloat16",
        "adapters": "/".join(sorted({str(item.dtype).removeprefix("torch.") for item in parameters})),
        "trainable_parameters": sum(item.numel() for item in parameters),
        "attention": "sdpa, causal",
        "optimizer": f"AdamW lr {task.learning_rate} clip 1.0",
        "rows": "documents, one after the other",
        "threads": torch.get_num_threads(),
    }
    return record.result(settings, ("torch", "litgpt", "lightning", "numpy"))


if __name__ == "__main__":
    run(train)
