"""Read a GGUF file with llama.cpp and write its tokens and logits; `llama.py` starts this file as a process.

It imports nothing of philora: a build of llama.cpp for another processor may end the process at any instruction.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(folder: Path) -> None:
    """Run the job in `job.json` of a folder, and write `answer.json` and one array for every row there."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        loaded = llama_cpp.Llama(
            job["model"],
            lora_path=job["lora"],
            n_ctx=job["context"],
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,  # a cache in f16 would be the largest difference
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        answer: dict[str, object] = {"refused": str(error)}
    else:
        tokens = [loaded.tokenize(text.encode(), add_bos=job["add_bos"], special=True) for text in job["texts"]]
        for index, row in enumerate(job["rows"]):
            loaded.reset()
            loaded.eval(row)
            np.save(folder / f"{index}.npy", np.asarray(loaded.scores[: len(row)], dtype=np.float32))
        answer = {"tokens": tokens}
        loaded.close()
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
