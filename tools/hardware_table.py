"""Write the tables of docs/hardware.md: what the planner says of models, memory and time. Nothing is measured here.

python tools/hardware_table.py
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, Phi3Config

from philora.configuration.config import load_config
from philora.configuration.sections import Config
from philora.decoder_stack.choice import DeviceFacts
from philora.families import PhiModel, find
from philora.planning import plan as planning
from philora.planning.batch import FILLED, GRADES, choose
from philora.planning.footprint import Footprint, footprint

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hardware.md"
BEGIN, END = "<!-- tables: python tools/hardware_table.py -->\n", "<!-- end of tables -->\n"

MODELS = ("phi-3-mini", "phi-4-mini", "phi-3-medium", "phi-4")
BASES = {"bf16": "none", "nf4": "nf4"}
GPUS, LAPTOPS = (8, 12, 16, 24, 32, 40, 48, 80), (8, 16, 32, 64)
ROW_TOKENS = 2048

CHATS = (300, 10_000)
CHAT_TOKENS, LABEL_SHARE, EPOCHS = 350, 0.5, 3
RATES = {"0.2": 2e11, "1": 1e12, "50": 5e13, "200": 2e14}
"""Assumed rates of products, in TFLOP/s, in floating point operations a second."""

MARKS = {"none": "yes", "elementwise": "yes¹", "full": "yes²", "host": "yes³"}
"""What the page explains, by the grade of recomputation."""


class Case(NamedTuple):
    """A model with an adapter of the defaults, as the planner counts it on a device."""

    name: str
    base: str
    counted: Footprint
    host: bool


def config_of(member: PhiModel) -> Phi3Config:
    """Return the configuration of a member at its full size; LongRoPE changes nothing that is counted."""
    return Phi3Config(
        vocab_size=member.vocab_size,
        hidden_size=member.hidden_size,
        intermediate_size=member.intermediate_size,
        num_hidden_layers=member.num_hidden_layers,
        num_attention_heads=member.num_attention_heads,
        num_key_value_heads=member.num_key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=member.tie_word_embeddings,
        partial_rotary_factor=member.partial_rotary_factor,
        pad_token_id=0,
    )


@cache
def case(name: str, base: str, device: str) -> Case:
    """Return a model on a device, counted without weights."""
    member = find(load_config(settings(name, base)).model.name_or_path)
    assert member is not None
    config = load_config(settings(name, base))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config_of(member), dtype=torch.bfloat16)
    adapted = planning.weightless(config, skeleton)
    ways = {grade: way(config, adapted, grade, device) for grade in GRADES}
    counted = footprint(adapted, config.model, "adamw_torch_fused", device, stack=ways["none"] == "stack")
    return Case(name, base, counted, ways["host"] == "stack")


def settings(name: str, base: str) -> dict[str, object]:
    """Return the configuration of a run with the defaults."""
    return {
        "model": {"name_or_path": name, "dtype": "bfloat16", "quantization": BASES[base]},
        "data": {"train": "helpdesk"},
    }


def way(config: Config, adapted: object, grade: str, device: str) -> str:
    """Return how the decoder layers are computed, on a GPU of today or on a CPU."""
    facts = DeviceFacts(kind=device, capability=(9, 0) if device == "cuda" else None, flash=device == "cuda")
    return planning.decoder_layers(config.model, adapted, facts, grade).path  # type: ignore[arg-type]


def cell(case: Case, gigabytes: int) -> str:
    """Return how a row of the defaults fits into so much memory."""
    found = choose(
        case.counted, row_tokens=ROW_TOKENS, tokens_per_step=8192, rows=None, accumulation=None, recomputation=None,
        memory=gigabytes * 10**9, host=case.host,
    )  # fmt: skip
    return MARKS[found.recomputation] if found.estimate.peak <= FILLED * gigabytes * 10**9 else "no"


def fitting(device: str, sizes: tuple[int, ...]) -> list[str]:
    """Return the table of models and memory."""
    lines = ["| model | base | least | " + " | ".join(f"{size} GB" for size in sizes) + " |"]
    lines.append("| --- | --- | --- | " + " | ".join("---" for _ in sizes) + " |")
    for name in MODELS:
        for base in BASES:
            counted = case(name, base, device)
            least = counted.counted.estimate(ROW_TOKENS, "full").peak / FILLED / 1e9
            cells = " | ".join(cell(counted, size) for size in sizes)
            lines.append(f"| {name} | {base} | {least:.1f} GB | {cells} |")
    return lines


def times() -> list[str]:
    """Return the table of how long a training takes at assumed rates."""
    lines = ["| model | conversations | work, PFLOP | " + " | ".join(f"{rate} TFLOP/s" for rate in RATES) + " |"]
    lines.append("| --- | --- | --- | " + " | ".join("---" for _ in RATES) + " |")
    for name in MODELS:
        counted = case(name, "bf16", "cuda").counted
        for chats in CHATS:
            work = EPOCHS * chats * CHAT_TOKENS * counted.flops_per_token("none", LABEL_SHARE, CHAT_TOKENS)
            cells = (planning.rough_duration(work / rate / planning.PRODUCT_SHARE) for rate in RATES.values())
            lines.append(f"| {name} | {chats:,} | {work / 1e15:,.1f} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    """Return the page with its tables as they are computed now."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{tables()}{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Return everything between the marks of the page."""
    parts = ["### On a GPU", fitting("cuda", GPUS), "### On a laptop's processor", fitting("cpu", LAPTOPS)]
    parts += ["### How long", times()]
    return "\n" + "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts) + "\n\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
