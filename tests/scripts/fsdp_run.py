"""`torchrun --nproc-per-node 2 -m tests.scripts.fsdp_run OUT CONFIG [--resume]`: a run under FSDP2, on the CPU.

accelerate 1.15 leaves its FSDP plugin aside on a CPU and trains by DDP without a word. Here it is told that the
processes are those of an accelerator, which is all that keeps it from sharding; the rest is as on GPUs. OUT gets the
classes of the parameters while the model trains.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import philora
from philora.runtime import processes


class _Classes(TrainerCallback):  # type: ignore[misc]
    """What the parameters are at the end of the first step."""

    found: dict[str, list[str]]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Note the class of each parameter, and of its shard's part."""
        names = [(name, type(each.data).__name__) for name, each in model.named_parameters()]
        self.found = {
            "adapter": sorted({kind for name, kind in names if "lora_" in name}),
            "base": sorted({kind for name, kind in names if "lora_" not in name}),
        }


def main() -> None:
    """Force, train, write."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    processes.shards_on_cpu = lambda: True
    dist.init_process_group("gloo")
    classes = _Classes()
    philora.train(sys.argv[2], resume="--resume" in sys.argv, callbacks=[classes])
    if processes.is_main():
        Path(sys.argv[1]).write_text(json.dumps(classes.found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
