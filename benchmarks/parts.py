"""Each fast part beside its plain form, and where the time of a step goes: rows of benchmarks/results/parts.csv.

`python -m benchmarks.parts [--rounds N] [--threads N] [--write]`

Forward and backward in bf16 on 2,048 tokens, at the shapes of the 187 M-parameter work of the training benchmark. In
every round three forms run right after each other: the fast one, the fast one without the compiled functions
(`PHILORA_NATIVE=0`), and the plain one; a row's ratio is the median over the rounds of their times'.
The shares of a step are self times by `torch.profiler`. The copy says what main memory gives.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Phi3Config, Phi3ForCausalLM

import philora
from benchmarks.machine import clock, describe
from benchmarks.process import REPOSITORY
from benchmarks.results import RESULTS, append, commit, now
from benchmarks.work import WORKS, Work
from philora.kernels.attention import document_attention
from philora.kernels.document_groups import groups_of
from philora.kernels.elementwise import rms_norm, swiglu
from philora.kernels.layout import PackedLayout
from philora.kernels.loss import label_scores
from philora.kernels.memory import keep_freed_memory
from philora.lora.functional import fused, lora_linear, lora_linear_reference
from tests.references import label_scores_reference, rms_norm_reference, swiglu_reference

TOKENS = 2048
Run = Callable[[], object]


def with_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """A call of the function with the gradient of its first input, from a fixed random gradient."""
    first = inputs[0].clone().requires_grad_()
    grad = torch.randn_like(function(first, *inputs[1:]))
    return lambda: torch.autograd.grad(function(first, *inputs[1:]), first, grad)


def attention(length: int, heads: int, width: int) -> tuple[Run, Run]:
    """Tiles and PyTorch's kernel on documents of one length."""
    shape = (TOKENS // length, heads, length, width)
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    grad = torch.randn(shape).bfloat16()
    layout = groups_of(PackedLayout.of_lengths([length] * shape[0]), shape[0])

    def tiles() -> object:
        output = document_attention(q, k, v, layout).transpose(1, 2)
        return torch.autograd.grad(output, (q, k, v), grad)

    def kernel() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    return tiles, kernel


def lora(work: Work, x: Tensor, p: float) -> tuple[Run, Run]:
    """The q, k, v projection with an update of rank 16, and the same in plain PyTorch."""
    weight = torch.randn(3 * work.hidden, work.hidden).bfloat16()
    a, b = torch.randn(16, work.hidden), torch.randn(3 * work.hidden, 16)
    both = [
        with_gradient(lambda x, item=item: item(x, weight, None, a, b, 2.0, p, training=True), x)
        for item in (lora_linear, lora_linear_reference)
    ]
    return both[0], both[1]


def parts(work: Work) -> dict[str, tuple[Run, Run]]:
    """The fast and the plain form of each part."""
    width = work.hidden // work.heads
    x = torch.randn(TOKENS, work.hidden).bfloat16()
    weight = torch.ones(work.hidden).bfloat16()
    gate_up = torch.randn(TOKENS, 2 * work.intermediate).bfloat16()
    head = (torch.randn(work.vocabulary, work.hidden) * 0.02).bfloat16()
    labels = torch.randint(0, work.vocabulary, (TOKENS // 2,))
    scores = [
        with_gradient(lambda h, w, item=item: item(h, w, None, labels).log_probs, x[: TOKENS // 2], head)
        for item in (label_scores, label_scores_reference)
    ]
    return {
        **{f"attention, documents of {n}": attention(n, work.heads, width) for n in (32, 128, 512, 2048)},
        "scores of 1024 labels": (scores[0], scores[1]),
        "RMSNorm": (with_gradient(rms_norm, x, weight, 1e-5), with_gradient(rms_norm_reference, x, weight, 1e-5)),
        "SwiGLU": (with_gradient(swiglu, gate_up), with_gradient(swiglu_reference, gate_up)),
        **{f"LoRA, dropout {p}": lora(work, x, p) for p in (0.0, 0.05)},
    }


def step_of(work: Work) -> Run:
    """Forward and backward of the model on one pack of documents of 256 tokens, half of them labelled."""
    sizes = {"hidden_size": work.hidden, "intermediate_size": work.intermediate, "num_hidden_layers": work.layers}
    heads = {"num_attention_heads": work.heads, "num_key_value_heads": work.heads, "vocab_size": work.vocabulary}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads, sliding_window=None, pad_token_id=0)).bfloat16()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = philora.get_peft_model(model, config).train().get_base_model()
    ids = torch.randint(100, 300, (1, TOKENS))
    positions = (torch.arange(TOKENS) % 256)[None]

    def step() -> object:
        hidden = base.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, 1::2]
        loss = -label_scores(hidden, base.lm_head.weight, None, ids[0, 1::2]).log_probs.mean()
        loss.backward()
        return loss

    return step


def shares(step: Run) -> dict[str, float]:
    """Parts of a step's time."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    total = sum(item.self_cpu_time_total for item in events)

    def share(*names: str) -> float:
        return sum(item.self_cpu_time_total for item in events if item.key in names) / total

    # A node's total holds what it calls, its products of scores included (they are bmm and baddbmm, not mm).
    names = ("TiledAttention", "TiledAttentionBackward")
    inside = sum(item.cpu_time_total for item in events if item.key in names) / total
    found = {
        "step, products": share("aten::mm"),
        "step, attention": inside,
        "step, products added in place": share("aten::addmm_", "aten::addmm"),
        "step, SwiGLU": share("_SwiGLU", "_SwiGLUBackward"),
        "step, RMSNorm": share("_RMSNorm", "_RMSNormBackward"),
        "step, sums": share("aten::add", "aten::add_"),
    }
    return found | {"step, all else": 1 - sum(found.values())}


def copy_of_512_mib() -> Run:
    """Main memory's rate: 1 GiB read and written."""
    source = torch.ones(512 << 18)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    work, timed = WORKS["a"], clock("cpu")
    facts = describe("cpu", ("torch", "transformers", "peft"))
    common = {"commit": commit(REPOSITORY), "date": now(), "threads": given.threads, "rounds": given.rounds}
    rows = []

    def measured(part: str, fast: Run, plain: Run, rounds: int) -> None:
        def uncompiled() -> None:
            os.environ["PHILORA_NATIVE"] = "0"
            try:
                fast()
            finally:
                del os.environ["PHILORA_NATIVE"]

        forms = fast, uncompiled, plain
        for form in forms:
            form()
        times = [[timed(form) for form in forms] for _ in range(rounds)]
        figures = dict(
            zip(("fast_ms", "uncompiled_ms", "plain_ms"), map(median, zip(*times, strict=True)), strict=True)
        )
        ratio = median(item[2] / item[0] for item in times)
        ratios = {"plain_over_fast": round(ratio, 2), "share_of_step": ""}
        rows.append({**common, "part": part, **{k: round(v, 2) for k, v in figures.items()}, **ratios, **facts})

    for name, (fast, plain) in parts(work).items():
        measured(name, fast, plain, given.rounds)
    copy = copy_of_512_mib()
    measured("copy of 512 MiB", copy, copy, given.rounds)
    step = step_of(work)

    def plain_step() -> None:
        with fused(False):
            step()

    measured("step", step, plain_step, 3)
    for name, share in shares(step).items():
        figures = dict.fromkeys(("fast_ms", "uncompiled_ms", "plain_ms", "plain_over_fast"), "")
        rows.append({**common, "part": name, **figures, "share_of_step": round(share, 3), **facts})
    for row in rows:
        print(
            *(
                row[name]
                for name in ("part", "fast_ms", "uncompiled_ms", "plain_ms", "plain_over_fast", "share_of_step")
            ),
            sep="  ",
        )
        if given.write:
            append(RESULTS / "parts.csv", row)


if __name__ == "__main__":
    main()
