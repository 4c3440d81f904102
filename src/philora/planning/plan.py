"""The plan of a run, before any weight is loaded: memory by part, the batch that fits, steps, time, and advice.

`plan` is the one way to it: `philora check` shows what it returns, a run follows it. It needs the configuration, the
model without weights and the counts of the data, and measures for a moment how fast this machine multiplies.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from philora.adapters.adapter_files import check_adapter
from philora.adapters.fast_layers import optimize
from philora.adapters.peft_models import apply_slices
from philora.adapters.targets import resolve_for_training
from philora.configuration.sections import Config, ModelConfig
from philora.dataset import DataReport, SplitReport
from philora.decoder_stack.choice import BatchFacts, Choice, DeviceFacts, ModelFacts, stack_for
from philora.decoder_stack.facts import facts_of_device
from philora.decoder_stack.model import facts_for
from philora.generation.decoding import PACKED_SHARE
from philora.generation.static_decoding import BY_GRAPH, answers_on
from philora.kernels.memory import available_bytes
from philora.kernels.quantization import QuantizedWeight, bitsandbytes_is_here, empty_layer, scheme_of
from philora.kernels.switches import graph_switch
from philora.models.loading import bf16_is_fast, resolve_dtype
from philora.models.locate import find_adapter
from philora.planning.footprint import (
    KEPT,
    NOT_EVALUATED,
    PARTS,
    WHOLE_LAYERS,
    Estimate,
    Evaluated,
    Footprint,
    Recomputation,
    footprint,
)
from philora.planning.hardware import hardware_notices, slow_bf16
from philora.runtime.processes import idle_gpus

# Most tokens that `tokens_per_step: auto` puts into one optimizer step, on a CPU and on an accelerator.
TOKENS_PER_STEP = 8192
TOKENS_PER_STEP_ACCELERATOR = 16384
STEPS_PER_EPOCH = 100  # what `tokens_per_step: auto` aims at where the data is small
# `learning_rate: auto`: the usual rate of LoRA for a model of this hidden size, in inverse proportion for others.
LEARNING_RATE, LEARNING_RATE_HIDDEN_SIZE = 2e-4, 3072
# Share of the memory that a plan fills; the rest is for what no formula knows.
FILLED = 0.9
# A product of fewer rows than this reads its weight more than it computes: rather more recomputation than that.
TOKENS_AT_LEAST = 512
# A GPU is busy from so many tokens of a micro-batch on (docs/performance.md); with fewer than the second number the
# launches cost more than computing whole layers again does.
TOKENS_AT_LEAST_ACCELERATOR, TOKENS_BEFORE_WHOLE_LAYERS = 8192, 4096
# Of a step's time, the products of the base (benchmarks/results/training.csv, share_of_limit of work a without
# dropout); attention, adapters, what stands between, and the optimizer are the rest.
PRODUCT_SHARE = 0.58
GRADES: tuple[Recomputation, ...] = ("none", "elementwise", "full", "host")


DEFAULT_OPTIM = "adamw_torch_fused"


class Change(NamedTuple):
    """A setting that would save memory.

    Attributes:
        setting: As `KEY=VALUE` of the command line.
        saves_bytes: Of the peak.
        peak_bytes: What it would be.
        costs: In words.
    """

    setting: str
    saves_bytes: int
    peak_bytes: int
    costs: str


class Rate(NamedTuple):
    """Describe what this machine does at this moment.

    Attributes:
        flops_per_second: Of products of the shape of the model's largest linear layer.
        dequantized_per_second: Weights; None without a quantised base.
        seconds: That measuring took.
    """

    flops_per_second: float
    dequantized_per_second: float | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Describe what a run will do and need.

    Attributes:
        micro_batch_rows: Rows of a micro-batch on every device.
        accumulation: Micro-batches of an optimizer step.
        recomputation: What backward computes again.
        max_length: Tokens of a row at most.
        row_tokens: Tokens of a row: of a pack, or a mean example.
        step_tokens: Tokens of an optimizer step on all devices.
        steps: Optimizer steps; None for a stream without max_steps.
        parameters: Of the base.
        trainable: Parameters that train.
        quantization: Of the base.
        device: Where it computes.
        estimate: Memory on every device.
        available_bytes: Memory that the run may take.
        rate: Of this machine.
        step_seconds: Estimated time of an optimizer step.
        learning_rate: At its peak.
        learning_rate_origin: Where it comes from: a file, the command line, or the rule of `auto`.
        changes: What would save memory, the best first; empty where the run fits.
        decoder_layers: Which way the decoder layers go, and why.
        answers: How the tokens of answers are computed on a GPU, and why; empty on a CPU.
        notices: What the hardware cannot do well, with what to do.
        idle_gpus: GPUs that are visible and that the run does not use.
        deterministic: Whether a repeated or resumed run on a GPU has the same bits.
    """

    micro_batch_rows: int
    accumulation: int
    recomputation: Recomputation
    max_length: int
    row_tokens: int
    step_tokens: int
    steps: int | None
    parameters: int
    trainable: int
    quantization: str
    device: str
    estimate: Estimate
    available_bytes: int
    rate: Rate
    step_seconds: float
    learning_rate: float
    learning_rate_origin: str
    changes: tuple[Change, ...]
    decoder_layers: Choice
    answers: str = ""
    notices: tuple[str, ...] = ()
    idle_gpus: int = 0
    deterministic: bool = True

    @property
    def fits(self) -> bool:
        """Return whether the peak leaves a tenth of the memory free."""
        return self.estimate.peak <= FILLED * self.available_bytes

    @property
    def seconds(self) -> float | None:
        """Return the estimated time of all steps, without evaluation and saving."""
        return None if self.steps is None else self.steps * self.step_seconds

    @property
    def warning(self) -> str | None:
        """Return what to change where the run does not fit, else None."""
        if self.fits:
            return None
        seen, needs = self.available_bytes / 1e9, self.estimate.peak / 1e9
        text = f"the run needs about {needs:.2f} GB at its peak, and {seen:.2f} GB are free (a tenth is left unused). "
        held = self.estimate.peak - self.estimate.files
        if held <= FILLED * self.available_bytes:
            text += f"Without the pages of the model's files it is {held / 1e9:.2f} GB: it runs, and reads them again. "
        offers = [
            f"{change.setting} saves {change.saves_bytes / 1e9:.2f} GB "
            f"(peak {change.peak_bytes / 1e9:.2f} GB; {change.costs})"
            for change in self.changes
        ]
        return text + (f"To save memory: {'; '.join(offers)}." if offers else "Take a smaller model.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        values |= {
            "estimate": self.estimate.to_dict(),
            "rate": self.rate._asdict(),
            "changes": [change._asdict() for change in self.changes],
            "decoder_layers": {"path": self.decoder_layers.path, "reasons": list(self.decoder_layers.reasons)},
            "notices": list(self.notices),
            "fits": self.fits,
            "seconds": self.seconds,
        }
        return values

    def rows(self) -> list[tuple[str, str]]:
        """Return a table for people."""
        estimate = self.estimate
        parts = [(name, getattr(estimate, name)) for name in PARTS]
        phases = [("training", estimate.training), ("loading", estimate.loading), ("evaluation", estimate.evaluation)]
        pages = f", of which {estimate.files / 1e9:.2f} GB pages of its files" if estimate.files else ""
        time_text = "unknown: a stream has no length" if self.seconds is None else duration(self.seconds)
        return [
            ("parameters", f"{self.parameters:,}, {self.trainable:,} trained"),
            ("batch", f"{self.micro_batch_rows} x {self.accumulation} rows of up to {self.row_tokens:,} tokens"),
            *([("devices", f"one of {self.idle_gpus + 1} GPUs")] if self.idle_gpus else []),
            ("recomputation", self.recomputation),
            *((f"  {name}", f"{size / 1e9:.3f} GB") for name, size in parts if size),
            *((name, f"{size / 1e9:.2f} GB") for name, size in phases if size),
            *([("pinned", f"{estimate.pinned / 1e9:.2f} GB of the computer's memory")] if estimate.pinned else []),
            ("peak", f"{estimate.peak / 1e9:.2f} GB{pages}; {self.available_bytes / 1e9:.2f} GB free on {self.device}"),
            *([("answers", self.answers)] if self.answers else []),
            *([("repeatable", _REPEATABLE[self.deterministic])] if self.device.startswith("cuda") else []),
            ("steps", f"{'?' if self.steps is None else self.steps} of {self.step_tokens:,} tokens"),
            ("learning rate", f"{self.learning_rate:.4g} ({self.learning_rate_origin})"),
            ("time", f"about {time_text}, at {self.rate.flops_per_second / 1e9:,.0f} GFLOP/s as measured now"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name.ljust(15)} {value}" for name, value in self.rows())


_REPEATABLE = {
    True: "yes, the same bits when repeated or resumed (training_config.deterministic: false is 1% to 6% faster)",
    False: "no, training_config.deterministic is false",
}


def duration(seconds: float) -> str:
    """Return a length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------- the plan


def weightless(config: Config, skeleton: PreTrainedModel) -> PeftModel:
    """Return the model of a run on the meta device, with its adapter and slices; the skeleton is changed.

    Raises:
        TargetError: A name matches nothing.
        AdapterError: There is no adapter to begin from, or it does not fit.
    """
    lora = LoraConfig(**config.peft_config)
    if config.model.adapter is not None:
        folder = find_adapter(config.model.adapter).path
        check_adapter(skeleton, folder)
        lora = cast(LoraConfig, PeftConfig.from_pretrained(str(folder)))
    resolution = resolve_for_training(skeleton, lora, where=f"{config.source}: peft_config")
    chosen = copy.copy(resolution.config)
    chosen.init_lora_weights, chosen.inference_mode = True, False  # there are no weights to start from
    with torch.device("meta"):
        adapted = peft.get_peft_model(skeleton, chosen, low_cpu_mem_usage=True)
    optimize(adapted)
    apply_slices(adapted, resolution.slices)
    return cast(PeftModel, adapted)


def plan(
    config: Config,
    adapted: PeftModel,
    report: DataReport,
    *,
    max_length: int,
    chosen: Mapping[str, Any] | None = None,
    processes: int = 1,
    sharing: int = 1,
) -> Plan:
    """Decide what the configuration leaves open, and estimate what the run needs.

    Args:
        config: The configuration.
        adapted: What `weightless` made of it.
        report: Counts of the data.
        max_length: Tokens of a row at most, within the model's context.
        chosen: What a resumed run was started with: keys of `training_config`.
        processes: Processes that share a step.
        sharing: Processes that share this machine's memory.
    """
    config = with_learning_rate(config, adapted.get_base_model().config)
    given = {**config.training_config, **(chosen or {})}
    device = _device(given)
    optim = str(given.get("optim") or DEFAULT_OPTIM)
    facts = facts_of_device(torch.device(device))
    stacked = {grade: decoder_layers(config, adapted, facts, grade) for grade in GRADES}
    counted = _footprint(config, adapted, given, device, stacked)
    max_length, tokens_per_step = _lengths(config, report, max_length, chosen, device)
    rows = _row_lengths(report, max_length, bool(given.get("packing", True)))
    memory, answers = available_bytes(device) // sharing, _answers(config, adapted, facts)
    evaluated = _evaluated(config, report, max_length, counted, memory)._replace(by_graph=answers == BY_GRAPH)
    batch = _batch(given, counted, rows, evaluated, memory, tokens_per_step, processes, stacked)
    situation = _Situation(config, adapted, counted, batch, max_length, rows, evaluated)
    notices = hardware_notices(facts, config.model.dtype, torch.version.cuda, bool(given.get("use_cpu")))
    rate = measure_rate(counted, batch.rows * rows.tokens)
    return Plan(
        micro_batch_rows=batch.rows,
        accumulation=batch.accumulation,
        recomputation=batch.recomputation,
        max_length=max_length,
        row_tokens=rows.tokens,
        step_tokens=batch.rows * batch.accumulation * rows.tokens * processes,
        steps=_steps(given, rows.counts, rows.packed, rows.tokens, batch, processes),
        parameters=counted.parameters,
        trainable=counted.trainable,
        quantization=counted.quantization,
        device=device,
        estimate=batch.estimate,
        available_bytes=memory,
        rate=rate,
        step_seconds=_micro_batch_seconds(counted, batch, rows, rate) * batch.accumulation,
        learning_rate=float(given["learning_rate"]),
        learning_rate_origin=config.origins.get("training_config.learning_rate", "default"),
        changes=situation.changes(optim, memory) if batch.estimate.peak > FILLED * memory else (),
        idle_gpus=idle_gpus(config.training_config, config.model.device_map),
        decoder_layers=stacked[batch.recomputation],
        answers=answers,
        deterministic=bool(given.get("deterministic", True)),
        notices=(
            *notices,
            *filter(
                None, [situation.slow_bf16(optim, memory), _fp8_without_effect(config, stacked[batch.recomputation])]
            ),
        ),
    )


def _footprint(
    config: Config, adapted: PeftModel, given: Mapping[str, Any], device: str, stacked: Mapping[Any, Choice]
) -> Footprint:
    """Count the model as the run will compute it."""
    trained_bytes = 2 if given.get("adapter_dtype") == "bfloat16" else 4
    optim = str(given.get("optim") or DEFAULT_OPTIM)
    counted = footprint(adapted, config.model, optim, device, trained_bytes, stack=stacked["none"].path == "stack")
    return replace(counted, graph=counted.stack is not None and device == "cuda" and graph_switch() == "all")


class _RowLengths(NamedTuple):
    """Rows as they are trained on.

    Attributes:
        counts: Of the training data; None where it is streamed.
        packed: Whether conversations are packed.
        tokens: Of a row.
        longest: Tokens of the longest row of a batch.
        document: Tokens of a conversation.
        label_share: Share of the tokens that the loss is a sum over.
    """

    counts: SplitReport | None
    packed: bool
    tokens: int
    longest: int
    document: int
    label_share: float


def _row_lengths(report: DataReport, max_length: int, packed: bool) -> _RowLengths:
    train = None if report.streaming else report.train
    mean = max_length if train is None else max(1, int(train.tokens / max(1, train.rows)))
    document = min(mean, max_length)
    # Rows that are not packed are filled up to the longest of their batch, and some batch has the longest of all.
    longest = max_length if packed or train is None else min(max(train.longest_tokens, mean), max_length)
    label_share = train.labels / train.tokens if train and train.tokens and train.labels else 1.0
    return _RowLengths(train, packed, max_length if packed else document, longest, document, label_share)


def _batch(
    given: Mapping[str, Any],
    counted: Footprint,
    rows: _RowLengths,
    evaluated: Evaluated,
    memory: int,
    tokens_per_step: int | None,
    processes: int,
    stacked: Mapping[Any, Choice],
) -> Batch:
    """Choose what the configuration leaves open of a batch."""
    wanted = {key: None if given.get(key, "auto") == "auto" else given[key] for key in _BATCH}
    return choose(
        counted,
        row_tokens=rows.tokens,
        longest_row_tokens=rows.longest,
        tokens_per_step=tokens_per_step,
        rows=wanted["per_device_train_batch_size"],
        accumulation=wanted["gradient_accumulation_steps"],
        recomputation=recomputation_of(given.get("gradient_checkpointing", "auto")),
        host=stacked["host"].path == "stack",
        memory=memory,
        processes=processes,
        label_share=rows.label_share,
        evaluation=evaluated,
    )


def _micro_batch_seconds(counted: Footprint, batch: Batch, rows: _RowLengths, rate: Rate) -> float:
    """Estimate the time of a micro-batch from the rate of products on this device."""
    flops = counted.flops_per_token(batch.recomputation, rows.label_share, rows.document)
    seconds = batch.rows * rows.tokens * flops / rate.flops_per_second / PRODUCT_SHARE
    if rate.dequantized_per_second is not None:
        times = 3 if batch.recomputation in WHOLE_LAYERS else 2
        seconds += times * counted.linears.weights / rate.dequantized_per_second
    return seconds


def decoder_layers(config: Config, adapted: PeftModel, device: DeviceFacts, recomputation: Recomputation) -> Choice:
    """Return which way the decoder layers of a run go, by the model without weights.

    Args:
        config: The configuration.
        adapted: What `weightless` made of it.
        device: Where the run computes.
        recomputation: What backward computes again.
    """
    facts = facts_for(adapted) or ModelFacts(architecture=type(adapted).__name__)
    given = config.model.quantization
    scheme = scheme_of(getattr(adapted, "config", None)) or (given if isinstance(given, str) else "nf4")
    base = "plain" if scheme == "none" else scheme
    if base == "plain" and config.model.base_products == "fp8":
        base = "fp8"
    dtype = str(resolve_dtype(config.model.dtype)).removeprefix("torch.")
    batch = BatchFacts(keep=KEPT[recomputation])
    return stack_for(replace(facts, dtype=dtype, base=base), batch, device)


def _fp8_without_effect(config: Config, layers: Choice) -> str | None:
    """Return the notice that base products are not in fp8 although the configuration asks for it, or None."""
    if config.model.base_products != "fp8" or layers.path == "stack":
        return None
    reasons = "; ".join(layers.reasons)
    return f"model.base_products=fp8 has no effect: the decoder stack alone computes in fp8, and it is off ({reasons})"


def _answers(config: Config, adapted: PeftModel, device: DeviceFacts) -> str:
    """Return how the tokens of answers are computed on a GPU."""
    facts = facts_for(adapted)
    dtype = str(resolve_dtype(config.model.dtype)).removeprefix("torch.")
    quantized = bool(scheme_of(getattr(adapted, "config", None))) or config.model.quantization != "none"
    return answers_on(device, dtype, quantized, facts is not None and facts.architecture == "Phi3Model")


_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _device(training: Mapping[str, Any]) -> str:
    accelerator = None if training.get("use_cpu") else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def step_tokens(epoch_tokens: int, conversation_tokens: int = 1, device: str = "cpu") -> int:
    """Return the tokens of an optimizer step under `tokens_per_step: auto`.

    A hundredth of one epoch, so that three epochs of small data make about 300 steps and more epochs make more; at
    least one conversation; at most what an accelerator, or a CPU, is kept busy by.

    Args:
        epoch_tokens: Tokens of the training data.
        conversation_tokens: Of a mean conversation.
        device: Where the run computes, `cpu` or the accelerator's name.
    """
    most = TOKENS_PER_STEP if device == "cpu" else TOKENS_PER_STEP_ACCELERATOR
    return min(most, max(1, conversation_tokens, round(epoch_tokens / STEPS_PER_EPOCH)))


def with_learning_rate(config: Config, model_config: PretrainedConfig) -> Config:
    """Return the configuration with the number that `learning_rate: auto` stands for, and the rule as its origin.

    The rate that suits an adapter falls with the model's width: docs/settings.md has what was measured.

    Args:
        config: The configuration.
        model_config: Of the model.
    """
    key = "learning_rate"
    if config.training_config.get(key) != "auto":
        return config
    hidden_size = int(model_config.get_text_config().hidden_size)
    rate = float(f"{LEARNING_RATE * LEARNING_RATE_HIDDEN_SIZE / hidden_size:.4g}")
    rule = f"auto: {LEARNING_RATE:g} * {LEARNING_RATE_HIDDEN_SIZE} / hidden size {hidden_size}"
    return replace(
        config,
        training_config=config.training_config | {key: rate},
        origins={**config.origins, f"training_config.{key}": rule},
    )


def _lengths(
    config: Config, report: DataReport, max_length: int, chosen: Mapping[str, Any] | None, device: str
) -> tuple[int, int | None]:
    """Return the tokens of a row, and of a step where that is not left to the batch."""
    tokens = config.training_config.get("tokens_per_step", "auto")
    if chosen:
        return int(chosen.get("max_length", max_length)), None if tokens == "auto" else tokens
    if tokens == "auto":
        if report.streaming:
            tokens = TOKENS_PER_STEP if device == "cpu" else TOKENS_PER_STEP_ACCELERATOR
        else:
            mean = round(report.train.tokens / max(1, report.train.rows))
            tokens = step_tokens(report.train.tokens, mean, device)
    if tokens is not None and not report.streaming:
        # A pack is one row, and a step has at least one: a pack longer than the step would make larger steps than
        # were asked for. Conversations stay whole.
        longest = max((split.longest_tokens for split in report.splits.values()), default=0)
        max_length = min(max_length, max(tokens, longest, 8))
    return max_length, tokens


def _evaluated(config: Config, report: DataReport, max_length: int, counted: Footprint, memory: int) -> Evaluated:
    """Return what the run evaluates at once before and after training."""
    figures = report.eval
    if figures is None or not figures.rows:
        return NOT_EVALUATED
    longest = min(figures.longest_tokens, max_length)
    settings = config.evaluation
    answers = min(settings.batch_size, settings.generate, figures.rows)
    packed = counted.packed if answers and counted.packed < PACKED_SHARE * (memory - counted.anonymous) else 0
    return Evaluated(max(longest, min(8192, figures.tokens)), answers, longest + settings.max_new_tokens, packed)


def _steps(
    given: Mapping[str, Any], train: SplitReport | None, packing: bool, row_tokens: int, batch: Batch, processes: int
) -> int | None:
    """Count optimizer steps as transformers does."""
    steps = int(given.get("max_steps") or -1)
    if steps > 0:
        return steps
    if train is None:
        return None
    rows = math.ceil(train.tokens / row_tokens) if packing else train.rows
    epochs = float(given.get("num_train_epochs", 3))
    return max(1, math.ceil(math.ceil(rows / batch.rows / processes) / batch.accumulation * epochs))


class Batch(NamedTuple):
    """Rows of a micro-batch, micro-batches of a step, what backward computes again, and the memory of it."""

    rows: int
    accumulation: int
    recomputation: Recomputation
    estimate: Estimate


def choose(
    counted: Footprint,
    *,
    row_tokens: int,
    tokens_per_step: int | None,
    rows: int | None,
    accumulation: int | None,
    recomputation: Recomputation | None,
    memory: int,
    processes: int = 1,
    label_share: float = 1.0,
    evaluation: Evaluated = NOT_EVALUATED,
    longest_row_tokens: int | None = None,
    host: bool = False,
) -> Batch:
    """Fill in what the person left open: the largest micro-batch, with the least recomputation that lets one fit.

    On an accelerator micro-batches of at least `TOKENS_AT_LEAST_ACCELERATOR` tokens come first, within the step.

    Args:
        counted: Of the model.
        row_tokens: Tokens of one row (a pack, or a mean example).
        tokens_per_step: Tokens of one optimizer step; default `TOKENS_PER_STEP`.
        rows: Rows of a micro-batch when given.
        accumulation: Micro-batches of a step when given.
        recomputation: What backward computes again, when given; whole layers from inputs on the device or, where those
            do not fit, in the computer's memory.
        memory: Bytes that may be used; a tenth is left free.
        processes: Processes that share a step. Where it cannot be divided among them evenly it grows to the next
            number of rows that can.
        label_share: Of the tokens, those with a label.
        evaluation: What is evaluated at once.
        longest_row_tokens: Tokens of the longest row, for which there must be memory; default: `row_tokens`.
        host: Whether inputs of layers can be kept in the computer's memory.
    """
    longest = longest_row_tokens or row_tokens
    in_a_step = max(1, round((tokens_per_step or TOKENS_PER_STEP) / row_tokens))
    wanted = max(1, round(math.ceil(in_a_step / processes) / (accumulation or 1)))
    wanted_grades = {None: GRADES, "full": WHOLE_LAYERS}.get(recomputation, (recomputation,))
    grades = [entry for entry in GRADES if entry in wanted_grades and (host or entry != "host")]
    sizes = [rows] if rows is not None else [n for n in range(wanted, 0, -1) if wanted % n == 0 or n == 1]
    options = [(micro, grade) for grade in grades for micro in sizes]
    options.sort(key=lambda option: _rank(option[0] * row_tokens, option[1], sizes[0] * row_tokens, counted.device))
    found = [
        (micro, grade, counted.estimate(micro * longest, grade, label_share=label_share, evaluation=evaluation))
        for micro, grade in options
    ]
    # Evaluation and loading are what they are, whatever the batch.
    least = min(found, key=lambda option: option[2].training)
    micro, grade, estimate = next((entry for entry in found if entry[2].training <= FILLED * memory), least)
    return Batch(micro, accumulation or max(1, round(wanted / micro) if rows is None else 1), grade, estimate)


def _rank(tokens: int, recomputation: Recomputation, most: int, device: str) -> int:
    """Return how early a micro-batch of so many tokens is tried, 0 first; equal ones in the order of the grades.

    Args:
        tokens: Of the micro-batch.
        recomputation: What backward computes again.
        most: Tokens of the largest micro-batch.
        device: `cpu` or the accelerator's name.
    """
    if device == "cpu":
        return int(tokens < min(TOKENS_AT_LEAST, most))
    if tokens >= min(TOKENS_AT_LEAST_ACCELERATOR, most):
        return 2 if recomputation in WHOLE_LAYERS else 0
    if tokens >= min(TOKENS_BEFORE_WHOLE_LAYERS, most):
        return 3 if recomputation in WHOLE_LAYERS else 1
    return 4


def recomputation_of(gradient_checkpointing: bool | str) -> Recomputation | None:
    """Return the grade that `training_config.gradient_checkpointing` stands for; None for auto."""
    named: dict[bool | str, Recomputation] = {
        False: "none", "elementwise": "elementwise", True: "full", "host": "host",
    }  # fmt: skip
    return named.get(gradient_checkpointing)


def gradient_checkpointing_of(recomputation: Recomputation) -> bool | str:
    """Return what `SFTConfig(gradient_checkpointing=...)` takes for a grade."""
    return recomputation if recomputation in ("elementwise", "host") else recomputation == "full"


# ------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class _Situation:
    """A planned run, to estimate what it would need if one thing were different."""

    config: Config
    adapted: PeftModel
    counted: Footprint
    batch: Batch
    max_length: int
    lengths: _RowLengths
    evaluated: Evaluated

    def peak(
        self,
        *,
        counted: Footprint | None = None,
        rows: int | None = None,
        row_tokens: int | None = None,
        grade: Recomputation | None = None,
        evaluated: Evaluated | None = None,
    ) -> int:
        """Return the peak of memory with these values in place of the run's."""
        estimate = (counted or self.counted).estimate(
            (rows or self.batch.rows) * (row_tokens or self.lengths.longest),
            grade or self.batch.recomputation,
            label_share=self.lengths.label_share,
            evaluation=evaluated or self.evaluated,
        )
        return estimate.peak

    def counted_with(self, settings: ModelConfig, optim: str) -> Footprint:
        """Return what would be counted with other settings of the model, or another optimizer."""
        counted = self.counted
        trained, stack = counted.trained_bytes, counted.stack is not None
        return footprint(self.adapted, settings, optim, counted.device, trained, stack=stack)

    def slow_bf16(self, optim: str, memory: int) -> str | None:
        """Return a notice where a CPU has no instructions for the bf16 of the weights."""
        on_cpu = self.counted.device == "cpu"
        if not on_cpu or self.counted.dtype != torch.bfloat16 or bf16_is_fast("cpu"):
            return None
        peak = self.peak(counted=self.counted_with(replace(self.config.model, dtype="float32"), optim))
        return slow_bf16(peak, int(FILLED * memory))

    def changes(self, optim: str, memory: int) -> tuple[Change, ...]:
        """Return changes that each save memory, the cheapest first; those that do not suffice come last."""
        micro, _, grade, estimate = self.batch
        settings = self.config.model
        answers = self.evaluated.answers
        offers: list[tuple[str, str, int]] = []
        if grade == "none":
            setting = "training_config.gradient_checkpointing=elementwise"
            offers.append((setting, "a little time", self.peak(grade="elementwise")))
        if micro > 1:
            setting = f"training_config.per_device_train_batch_size={micro // 2}"
            offers.append((setting, "smaller products", self.peak(rows=micro // 2)))
        if answers > 1:
            fewer = self.peak(evaluated=self.evaluated._replace(answers=answers // 2))
            offers.append((f"evaluation.batch_size={answers // 2}", "slower evaluation", fewer))
        if "8bit" not in optim and bitsandbytes_is_here():
            small = self.counted_with(settings, "adamw_8bit")
            offers.append(("training_config.optim=adamw_8bit", "rounded states", self.peak(counted=small)))
        if grade not in WHOLE_LAYERS:
            setting = "training_config.gradient_checkpointing=true"
            offers.append((setting, "each layer computed twice", self.peak(grade="full")))
        if self.counted.quantization == "none" and bitsandbytes_is_here():
            for scheme in ("int8", "nf4"):
                other = replace(settings, quantization=scheme)
                small = self.counted_with(other, optim)
                offers.append((f"model.quantization={scheme}", "a rounded base", self.peak(counted=small)))
        if self.lengths.packed and self.max_length >= 256:
            half = self.max_length // 2
            offers.append(
                (f"training_config.max_length={half}", "long conversations are cut", self.peak(row_tokens=half))
            )
        found = [Change(setting, estimate.peak - after, after, costs) for setting, costs, after in offers]
        useful = [change for change in found if change.saves_bytes > 0.01 * estimate.peak]
        enough = [change for change in useful if change.peak_bytes <= FILLED * memory]
        rest = [change for change in useful if change.peak_bytes > FILLED * memory]
        return (*enough, *sorted(rest, key=lambda change: -change.saves_bytes))


# ------------------------------------------------------------------------------------------- this machine


_SLOW_SECONDS = 0.25


def measure_rate(counted: Footprint, tokens: int) -> Rate:
    """Measure the rate of products of the model's largest linear layer, with the run's threads.

    Rows are added, from one on, until a product takes 20 ms or has the micro-batch's rows; forward and backward count
    alike. A processor without instructions for the dtype, which is a hundred times slower, is measured in a second too.

    Args:
        counted: Of the model.
        tokens: Tokens of a micro-batch.
    """
    begun = time.perf_counter()
    device, dtype = counted.device, counted.dtype
    shape = counted.linears.out_features, counted.linears.in_features

    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    def seconds_of(work: Callable[[], object]) -> float:
        wait()
        at = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - at

    weight = torch.full(shape, 0.01, dtype=dtype, device=device)
    if device != "cpu":  # a GPU draws more power, and is slower, with numbers that are not all alike
        weight.normal_(generator=torch.Generator(device).manual_seed(0))
    rows = 1
    with torch.no_grad():
        while True:
            x, dy = (torch.full((rows, size), 0.01, dtype=dtype, device=device) for size in reversed(shape))

            def both(x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
                torch.mm(x, weight.t())
                torch.mm(dy, weight)

            seconds = seconds_of(both)  # makes the kernels
            if seconds < _SLOW_SECONDS:
                seconds = seconds_of(both)
            if seconds >= 0.04 or rows >= tokens:
                break
            rows = min(4 * rows, tokens)
        if seconds < _SLOW_SECONDS:
            seconds = statistics.median([seconds, *(seconds_of(both) for _ in range(2))])
    dequantized = _dequantized_per_second(counted, seconds_of) if counted.quantized_matrix else None
    return Rate(4 * rows * shape[0] * shape[1] / seconds, dequantized, time.perf_counter() - begun)


def _dequantized_per_second(counted: Footprint, seconds_of: Callable[[Callable[[], object]], float]) -> float:
    """Measure how many weights a second are dequantised, at a layer of 1024 x 4096."""
    layer = empty_layer(counted.quantization, 4096, 1024, counted.dtype).to(counted.device)

    weight = QuantizedWeight(layer)

    @torch.no_grad()
    def work() -> object:
        return weight.dequantize(counted.dtype)

    seconds_of(work)
    return 4096 * 1024 / statistics.median(seconds_of(work) for _ in range(3))
