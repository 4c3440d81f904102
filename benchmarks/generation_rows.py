"""Measure how fast a number of rows is answered, on a GPU or a CPU: `benchmarks.generation` with `--rows`.

Contestants, each greedy: transformers' `generate` over the adapter merged into the weights, and philora over the same
and over base and adapter. All answer the same prompts together. Two lengths are timed: the tokens of the long answers
over their time is what a person waits for; the difference of the two is the speed of a step, without the prompt and
without the recording of a CUDA graph. On a GPU the command fails where philora answered without a graph. Rows go to
results/generation_gpu.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

TARGETS = {("mini", 1): 250.0, ("mini", 64): 9000.0}
"""Tokens a second of a step that philora is to reach on an H200, by the work and the number of rows."""


class Round(NamedTuple):
    """Hold a round of a contestant.

    Attributes:
        texts: Of the long answers.
        tokens: Of the long answers.
        seconds: They took.
        step_tokens: What the long answers have more than the short ones.
        step_seconds: And how much longer they took; not above zero where noise is larger.
    """

    texts: list[str]
    tokens: int
    seconds: float
    step_tokens: int
    step_seconds: float

    @property
    def step_speed(self) -> float:
        """Tokens a second of a step, or 0 where the difference of two lengths is no time."""
        return self.step_tokens / self.step_seconds if self.step_seconds > 0 else 0.0


class Graphs:
    """Decoders that recorded their step, and those that could not."""

    recorded = 0
    failed = 0

    def __str__(self) -> str:
        if self.recorded and not self.failed:
            return "a CUDA graph"
        return f"no CUDA graph in {self.failed} of {self.recorded + self.failed} answers" if self.failed else "no graph"


@contextmanager
def recordings() -> Iterator[Graphs]:
    """Count the outcomes of recordings of a step within the block."""
    from philora.generation.static_decoding import StaticDecoder

    found, record = Graphs(), StaticDecoder._record

    def noted(decoder: Any) -> None:
        record(decoder)
        if decoder._recorded is None:
            found.failed += 1
        else:
            found.recorded += 1

    StaticDecoder._record = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        StaticDecoder._record = record  # type: ignore[method-assign]


Answerer = Callable[[list[list[dict[str, str]]], int], tuple[list[str], int]]
"""From conversations and the number of new tokens: the answers, and how many tokens they have."""


def by_transformers(model: Any, tokenizer: Any) -> Answerer:
    """Transformers' own generation, all rows together, padded on the left."""
    import torch

    from philora.models.loading import stop_token_ids

    stops = set(stop_token_ids(tokenizer, model.generation_config.eos_token_id))

    def run(questions: list[list[dict[str, str]]], new_tokens: int) -> tuple[list[str], int]:
        rendered = tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=new_tokens,
                do_sample=False, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        texts, tokens = [], 0
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((at for at, token in enumerate(ids) if token in stops), None)
            tokens += len(ids) if end is None else end + 1
            texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
        return texts, tokens

    return run


def by_philora(model: Any, tokenizer: Any) -> Answerer:
    """philora's batched generation with one batch."""
    from philora.generation.batches import GenerationSettings, generate

    def run(questions: list[list[dict[str, str]]], new_tokens: int) -> tuple[list[str], int]:
        settings = GenerationSettings(max_new_tokens=new_tokens, batch_size=len(questions))
        found = generate(model, tokenizer, questions, settings)
        return [item.text for item in found], sum(item.tokens for item in found)

    return run


def timed(run: Answerer, questions: list[list[dict[str, str]]], new_tokens: int) -> Round:
    """Time long answers, and answers of a quarter of their length. Both end with text, so that nothing is pending."""
    spent, found = [], []
    for length in (new_tokens, max(1, new_tokens // 4)):
        begun = time.perf_counter()
        found.append(run(questions, length))
        spent.append(time.perf_counter() - begun)
    (texts, tokens), (_, fewer) = found
    return Round(texts, tokens, spent[0], tokens - fewer, spent[0] - spent[1])


def with_adapter(model: Any) -> Any:
    """Return a model with LoRA of rank 16 on all linear layers whose update is not zero; the same each time."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 2e-3)
    return adapted.eval()


def models(work: str, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """The tokenizer, a model with an adapter, and one that it is merged into.

    Args:
        work: `nano`, or `mini` for Phi-3-mini's shape with random weights made on the device.
        device: cuda or cpu.
        dtype: Of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks import gpu
    from philora.configuration.sections import ModelConfig, TokenizerConfig
    from philora.models import loading

    tokenizer = loading.load_tokenizer(ModelConfig(name_or_path="nano"), TokenizerConfig(padding_side="left"))

    def adapted() -> Any:
        if work == "mini":
            model = gpu.make_model(gpu.MINI, "bf16", "sdpa", gpu.Settings(gpu.MINI, device, 1, 1, seconds=0.0))
            model = model.to(getattr(torch, dtype))
        else:
            model = AutoModelForCausalLM.from_pretrained(loading.local_path(work), dtype=getattr(torch, dtype))
            model = model.to(device)
        loading.set_stops(model, tokenizer)
        return with_adapter(model)

    return tokenizer, adapted(), adapted().merge_and_unload().eval()


def contestants(work: str, device: str, dtype: str) -> dict[str, Answerer]:
    """Return the work of every contestant; the first is the reference."""
    from philora.adapters.fast_layers import optimize

    tokenizer, adapted, merged = models(work, device, dtype)
    optimize(adapted)
    return {
        "transformers, merged": by_transformers(merged, tokenizer),
        "philora, merged": by_philora(merged, tokenizer),
        "philora, adapter": by_philora(adapted, tokenizer),
    }


def measure(
    work: str,
    device: str,
    dtype: str,
    rows: list[int],
    new_tokens: int,
    rounds: int,
    prompts: Callable[[int], list[list[dict[str, str]]]],
    console: Console,
) -> tuple[list[dict[str, str | int | float]], list[str]]:
    """Time all contestants at each number of rows.

    Returns:
        Columns of the table's rows, and what went wrong.
    """
    runs, found, faults = contestants(work, device, dtype), [], []
    for count in rows:
        questions = prompts(count)
        questions = [questions[at % len(questions)] for at in range(count)]
        table = Table("contestant", "tokens/s", "of a step", "target", "", "path", "same answers", box=None)
        table.title = f"{work}, {count} rows, {new_tokens} new tokens"
        speeds: dict[str, float] = {}
        reference: list[str] = []
        for name, run in runs.items():
            with recordings() as graphs:
                run(questions, 4)  # kernels are chosen and compiled
                done = [timed(run, questions, new_tokens) for _ in range(rounds)]
            speeds[name] = median(item.tokens / item.seconds for item in done)
            step = median(item.step_speed for item in done)
            reference = reference or done[0].texts
            same = sum(a == b for a, b in zip(done[0].texts, reference, strict=True))
            ours = name.startswith("philora")
            path, ratio = str(graphs) if ours else "", speeds[name] / next(iter(speeds.values()))
            target = TARGETS.get((work, count), 0.0) if ours else 0.0
            if ours and device == "cuda" and path != "a CUDA graph":
                faults.append(f"{name}, {count} rows: {path}")
            table.add_row(
                name, f"{speeds[name]:,.0f}", f"{step:,.0f}", f"{target:,.0f}" if target else "", f"{ratio:.2f}x",
                path, f"{same}/{count}",
            )  # fmt: skip
            found.append(
                {
                    "work": work,
                    "dtype": dtype,
                    "contestant": name,
                    "rows": count,
                    "new_tokens": new_tokens,
                    "rounds": rounds,
                    "path": path,
                    "tokens": done[0].tokens,
                    "tokens_per_second": round(speeds[name], 1),
                    "step_tokens_per_second": round(step, 1),
                    "target_tokens_per_second": target or "",
                    "relative_to_transformers": round(ratio, 3),
                    "answers_as_transformers": round(same / count, 4),
                }
            )
        console.print(table)
    return found, faults
