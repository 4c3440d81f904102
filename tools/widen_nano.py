"""Make a model of twice the hidden size that computes what nano computes, for benchmarks of settings by width.

    python tools/widen_nano.py --out DIR             # hidden size 512
    python tools/widen_nano.py --out DIR --from DIR  # twice that of another folder

Every hidden unit, attention head and feed-forward unit stands twice, and what reads a pair takes half of each, as in
Net2Net (Chen and others, 2015). A little noise, in proportion to each weight, makes the two of a pair differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Phi3ForCausalLM

NANO = Path(__file__).resolve().parent.parent / "src" / "philora" / "nano" / "model"
NOISE = 0.02  # standard deviation, as a share of each weight


def _rows(weight: Tensor, head: int) -> Tensor:
    """Return the weight with each block of `head` rows twice."""
    return torch.cat([torch.cat([block, block]) for block in weight.split(head)])


def _columns(weight: Tensor, block: int) -> Tensor:
    """Return the weight with each block of columns twice, and half of it in each."""
    return _rows(weight.T, block).T / 2


def widen(model: Phi3ForCausalLM, seed: int = 0) -> Phi3ForCausalLM:
    """Return a model of twice the width that computes nearly the same."""
    old = model.config
    settings = old.to_dict()
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        settings[name] *= 2
    wide = Phi3ForCausalLM(type(old)(**settings))
    generator = torch.Generator().manual_seed(seed)
    head = old.hidden_size // old.num_attention_heads
    weights = {}
    for name, weight in model.float().state_dict().items():
        if weight.ndim == 1:
            new = _rows(weight, 1)
        elif "embed_tokens" in name:
            new = _rows(weight.T, 1).T
        elif "lm_head" in name:
            new = _columns(weight, 1)
        elif "qkv_proj" in name:
            # Query heads stay beside the key and value head that they share: both are doubled block by block.
            query = old.hidden_size
            key = old.num_key_value_heads * head
            group = head * old.num_attention_heads // old.num_key_value_heads
            parts = weight.split([query, key, key])
            new = _columns(torch.cat([_rows(parts[0], group), _rows(parts[1], head), _rows(parts[2], head)]), 1)
        elif "o_proj" in name:
            group = head * old.num_attention_heads // old.num_key_value_heads
            new = _columns(_rows(weight, 1), group)
        elif "gate_up_proj" in name:
            new = _columns(torch.cat([_rows(item, 1) for item in weight.chunk(2)]), 1)
        else:
            new = _columns(_rows(weight, 1), 1)
        noise = 1 + NOISE * torch.randn(new.shape, generator=generator) if new.ndim == 2 else 1
        weights[name] = (new * noise).contiguous()
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    return wide.to(torch.bfloat16)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--from", dest="source", type=Path, default=NANO, help="folder to widen (default: nano)")
    options = parser.parse_args()
    model = Phi3ForCausalLM.from_pretrained(options.source)
    wide = widen(model)
    wide.save_pretrained(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    tokenizer.save_pretrained(options.out)
    ids = tokenizer("Why is the sky blue?", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (model.float()(ids).logits - wide.float()(ids).logits).abs().max()
    print(f"{options.out}: hidden size {wide.config.hidden_size}, largest difference of logits {difference:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
