"""Makes the golden adapters of the installed version: `python tests/golden/make.py` writes `tests/golden/<version>/`.

Nothing here is drawn at random, since generators may change between releases of PyTorch: every weight is a sine of its
index. What a version wrote stays as it is; a new release gets a folder of its own beside it, so that
`tests/unit/exporting/test_adapter_of_earlier_releases.py` reads the adapters of every release.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

import philora
from philora import lora
from philora.adapters.fast_layers import FastLinear

FUSED = LoraConfig(
    r=2,
    lora_alpha=5,
    target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    rank_pattern={"o_proj": 3},
    alpha_pattern={"down_proj": 3},
    task_type="CAUSAL_LM",
)
SLICES = LoraConfig(
    r=2,
    lora_alpha=4,
    target_modules=["q_proj", "v_proj", "up_proj", "o_proj"],
    use_rslora=True,
    rank_pattern={"up_proj": 1},
    task_type="CAUSAL_LM",
)
TOKENS = torch.tensor([[1, 5, 9, 3, 7, 4], [2, 8, 6, 10, 3, 12]])


def fill(model: nn.Module, wanted: str = "") -> None:
    """Give each parameter with `wanted` in its name the sine of its index, shifted by its place among them."""
    named = sorted((name, each) for name, each in model.named_parameters() if wanted in name)
    with torch.no_grad():
        for place, (name, parameter) in enumerate(named):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(0.37 * index * (1 + place % 5) + place).reshape(parameter.shape)
            parameter.copy_(1 + 0.1 * values if "norm" in name else 0.3 * values)


def base() -> Phi3ForCausalLM:
    """The model that the adapters are of: one layer, grouped-query attention."""
    config = Phi3Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        original_max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Phi3ForCausalLM(config).eval()
    fill(model)
    return model


class Layers(nn.Module):
    """A model of one's own from the layers of `philora.lora`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = lora.Embedding(13, 8, r=2, lora_alpha=3)
        self.merged = lora.MergedLinear(8, 16, r=2, lora_alpha=4, enable_lora=[True, False, True], slices=[8, 4, 4])
        self.conv = lora.Conv2d(1, 2, 3, r=1, lora_alpha=2, padding=1)
        self.head = lora.Linear(32, 5, r=2, lora_alpha=3)
        fill(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: tokens (B, T); returns (B, T, 5)."""
        maps = self.conv(self.merged(self.embed(tokens)).unsqueeze(1))
        return self.head(maps.transpose(1, 2).flatten(2))


def adapted(config: LoraConfig) -> PeftModel:
    """The base with an adapter whose every tensor does something; zeros around slices stay."""
    model = philora.get_peft_model(base(), config).eval()
    fill(model, "lora_")
    with torch.no_grad():
        for layer in model.modules():
            parts = layer.slices.get("default", ()) if isinstance(layer, FastLinear) else ()
            if parts:
                inside = torch.zeros_like(layer.lora_B["default"].weight)
                for each in parts:
                    inside[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = 1
                layer.lora_B["default"].weight.mul_(inside)
    return model


def write(folder: Path) -> None:
    """Write the adapters, and what they compute, into `folder`."""
    expected = {"tokens": TOKENS}
    with torch.no_grad():
        for name, config in (("fused", FUSED), ("slices", SLICES)):
            model = adapted(config)
            model.save_pretrained(str(folder / name))
            (folder / name / "README.md").unlink(missing_ok=True)  # PEFT's card says nothing about the adapter
            expected[f"{name}.logits"] = model(input_ids=TOKENS).logits
        layers = Layers()
        torch.save(lora.lora_state_dict(layers), folder / "layers.pt")
        expected["layers.output"] = layers(TOKENS)
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    target = Path(__file__).parent / philora.__version__
    if target.exists():
        sys.exit(f"{target} exists - expected a version that has none yet. What a release wrote is not written again.")
    target.mkdir()
    write(target)
