"""Plan a run before any weight is loaded: memory by part, the batch that fits, steps, time, and advice.

`philora check` shows the result of `plan`, and a run follows it. It needs the configuration, the model without weights
and the counts of the data, and measures the speed of this machine (`rate`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
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
from philora.configuration.sections import Config, EvaluationConfig, ModelConfig
from philora.dataset import DataReport, SplitReport
from philora.decoder_stack.choice import BatchFacts, Choice, DeviceFacts, ModelFacts, stack_for
from philora.decoder_stack.facts import facts_of_device
from philora.decoder_stack.model import facts_for
from philora.generation.decoding import PACKED_SHARE
from philora.generation.static_decoding import BY_GRAPH, answers_on
from philora.kernels.memory import available_bytes
from philora.kernels.quantization import bitsandbytes_is_here, scheme_of
from philora.kernels.switches import graph_switch
from philora.models.loading import bf16_is_fast, resolve_dtype
from philora.models.locate import find_adapter
from philora.planning.batch import (
    FILLED,
    GRADES,
    TOKENS_PER_STEP,
    TOKENS_PER_STEP_ACCELERATOR,
    Batch,
    choose,
    recomputation_of,
    step_tokens,
)
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
from philora.planning.rate import Rate, measure_rate
from philora.runtime.processes import idle_gpus

# `learning_rate: auto`: LoRA's usual rate for a model of this hidden size; for others it is inversely proportional.
LEARNING_RATE, LEARNING_RATE_HIDDEN_SIZE = 2e-4, 3072
# Share of the base's products in the time of a step (benchmarks/results/training.csv, share_of_limit of work a without
# dropout). The rest is attention, adapters, element-wise work and the optimizer.
PRODUCT_SHARE = 0.58
DEFAULT_OPTIM = "adamw_torch_fused"


class Change(NamedTuple):
    """A setting that would save memory.

    Attributes:
        setting: `KEY=VALUE` for the command line.
        saves_bytes: Reduction of the peak.
        peak_bytes: The peak with the setting.
        costs: Its disadvantage, in words.
    """

    setting: str
    saves_bytes: int
    peak_bytes: int
    costs: str


@dataclass(frozen=True)
class Plan:
    """Hold what a run will do and need.

    Attributes:
        micro_batch_rows: Rows of a micro-batch on every device.
        accumulation: Micro-batches of an optimizer step.
        recomputation: What backward computes again.
        max_length: Tokens of a row at most.
        row_tokens: Tokens of a row: a pack, or a mean example.
        step_tokens: Tokens of an optimizer step on all devices.
        steps: Optimizer steps; None for a stream without max_steps.
        parameters: Parameters of the base.
        trainable: Parameters that train.
        quantization: Quantisation of the base.
        device: The run's device.
        estimate: Memory on every device.
        available_bytes: Memory that is available to the run.
        rate: Speed of this machine.
        step_seconds: Estimated time of an optimizer step.
        learning_rate: The highest learning rate.
        learning_rate_origin: Its origin: a file, the command line, or the rule of `auto`.
        changes: Settings that would save memory, the best first; empty if the run fits.
        decoder_layers: How the decoder layers are computed, and why.
        answers: How the tokens of answers are computed on a GPU, and why; empty on a CPU.
        notices: Limits of the hardware, with advice.
        idle_gpus: Visible GPUs that the run does not use.
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
        """Return advice if the run does not fit, else None."""
        if self.fits:
            return None
        seen, needs = self.available_bytes / 1e9, self.estimate.peak / 1e9
        text = f"the run needs about {needs:.2f} GB at its peak, and {seen:.2f} GB are free (a tenth is left unused). "
        held = self.estimate.peak - self.estimate.files
        if held <= FILLED * self.available_bytes:
            pages = "Without the pages of the model's files it needs"
            text += f"{pages} {held / 1e9:.2f} GB: it runs, but reads them again. "
        offers = [
            f"{change.setting} saves {change.saves_bytes / 1e9:.2f} GB "
            f"(peak {change.peak_bytes / 1e9:.2f} GB; {change.costs})"
            for change in self.changes
        ]
        return text + (f"To save memory: {'; '.join(offers)}." if offers else "Take a smaller model.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {
            "estimate": self.estimate.to_dict(),
            "rate": self.rate._asdict(),
            "changes": [change._asdict() for change in self.changes],
            "decoder_layers": {"path": self.decoder_layers.path, "reasons": list(self.decoder_layers.reasons)},
            "notices": list(self.notices),
            "fits": self.fits,
            "seconds": self.seconds,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return a table for people."""
        estimate = self.estimate
        parts = [(name, getattr(estimate, name)) for name in PARTS]
        phases = [("training", estimate.training), ("loading", estimate.loading), ("evaluation", estimate.evaluation)]
        pages = f", of which {estimate.files / 1e9:.2f} GB pages of its files" if estimate.files else ""
        time_text = "unknown: a stream has no length" if self.seconds is None else rough_duration(self.seconds)
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


def rough_duration(seconds: float) -> str:
    """Return an estimated time for people: in seconds, minutes or hours, without false precision."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def weightless(config: Config, skeleton: PreTrainedModel) -> PeftModel:
    """Return the model of a run on the meta device, with its adapter and slices; the skeleton is changed.

    Raises:
        TargetError: A name matches nothing.
        AdapterError: The adapter to continue from does not exist or does not fit.
    """
    lora = config.lora_config()
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
    config: Config, adapted: PeftModel, report: DataReport, *, max_length: int,
    chosen: Mapping[str, Any] | None = None, processes: int = 1, sharing: int = 1,
) -> Plan:  # fmt: skip
    """Choose the settings that the configuration leaves to `auto`, and estimate what the run needs.

    Args:
        config: The configuration.
        adapted: The model from `weightless`.
        report: Counts of the data.
        max_length: Tokens of a row at most, within the model's context.
        chosen: Keys of `training_config` with which a resumed run was started.
        processes: Processes that share a step.
        sharing: Processes that share this machine's memory.
    """
    config = with_learning_rate(config, adapted.get_base_model().config)
    given = {**config.training_config, **(chosen or {})}
    device, optim = _device(given), str(given.get("optim") or DEFAULT_OPTIM)
    facts = facts_of_device(torch.device(device))
    stacked = {grade: decoder_layers(config.model, adapted, facts, grade) for grade in GRADES}
    counted = _footprint(config.model, adapted, given, device, stacked)
    max_length, tokens_per_step = _lengths(config.training_config, report, max_length, chosen, device)
    rows = _row_lengths(report, max_length, bool(given.get("packing", True)))
    memory, answers = available_bytes(device) // sharing, _answers(config.model, adapted, facts)
    evaluated = _evaluated(config.evaluation, report, max_length, counted, memory)._replace(
        by_graph=answers == BY_GRAPH
    )
    batch = _batch(given, counted, rows, evaluated, memory, tokens_per_step, processes, stacked)
    situation = _Situation(config, adapted, counted, batch, max_length, rows, evaluated)
    layers = stacked[batch.recomputation]
    hardware = hardware_notices(facts, config.model.dtype, torch.version.cuda, bool(given.get("use_cpu")))
    others = situation.slow_bf16(optim, memory), _fp8_without_effect(config.model, layers)
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
        decoder_layers=layers,
        answers=answers,
        deterministic=bool(given.get("deterministic", True)),
        notices=(*hardware, *filter(None, others)),
    )


def _footprint(
    settings: ModelConfig, adapted: PeftModel, given: Mapping[str, Any], device: str, stacked: Mapping[Any, Choice]
) -> Footprint:
    """Count the model as the run will compute it."""
    trained_bytes = 2 if given.get("adapter_dtype") == "bfloat16" else 4
    optim = str(given.get("optim") or DEFAULT_OPTIM)
    counted = footprint(adapted, settings, optim, device, trained_bytes, stack=stacked["none"].path == "stack")
    return replace(counted, graph=counted.stack is not None and device == "cuda" and graph_switch() == "all")


class _RowLengths(NamedTuple):
    """Lengths of the training rows.

    Attributes:
        counts: Counts of the training data; None if it is streamed.
        packed: Whether conversations are packed.
        tokens: Tokens of a row.
        longest: Tokens of the longest row of a batch.
        document: Tokens of a conversation.
        label_share: Share of the tokens that have a label.
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
    # Rows that are not packed are padded to the longest of their batch, and some batch has the longest of all.
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
    """Choose the batch, with the settings that the configuration gives."""
    wanted = {key: value for key, value in given.items() if value != "auto"}
    return choose(
        counted,
        row_tokens=rows.tokens,
        longest_row_tokens=rows.longest,
        tokens_per_step=tokens_per_step,
        rows=wanted.get("per_device_train_batch_size"),
        accumulation=wanted.get("gradient_accumulation_steps"),
        recomputation=recomputation_of(given.get("gradient_checkpointing", "auto")),
        host=stacked["host"].path == "stack",
        memory=memory,
        processes=processes,
        label_share=rows.label_share,
        evaluation=evaluated,
    )


def _micro_batch_seconds(counted: Footprint, batch: Batch, rows: _RowLengths, rate: Rate) -> float:
    """Return the estimated time of a micro-batch, from the rate of products on this device."""
    flops = counted.flops_per_token(batch.recomputation, rows.label_share, rows.document)
    seconds = batch.rows * rows.tokens * flops / rate.flops_per_second / PRODUCT_SHARE
    if rate.dequantized_per_second is not None:
        times = 3 if batch.recomputation in WHOLE_LAYERS else 2
        seconds += times * counted.linears.weights / rate.dequantized_per_second
    return seconds


def decoder_layers(
    settings: ModelConfig, adapted: PeftModel, device: DeviceFacts, recomputation: Recomputation
) -> Choice:
    """Return how the decoder layers of a run are computed, from the model of `weightless`."""
    facts = facts_for(adapted) or ModelFacts(architecture=type(adapted).__name__)
    base = base_kind(settings, adapted)
    dtype = str(resolve_dtype(settings.dtype)).removeprefix("torch.")
    batch = BatchFacts(keep=KEPT[recomputation])
    return stack_for(replace(facts, dtype=dtype, base=base), batch, device)


def base_kind(settings: ModelConfig, adapted: PeftModel) -> str:
    """Return the kind of the base's weights and products: "plain", "fp8", "nf4" or "int8"; by the configuration."""
    given = settings.quantization
    scheme = scheme_of(getattr(adapted, "config", None)) or (given if isinstance(given, str) else "nf4")
    if scheme != "none":
        return scheme
    return "fp8" if settings.base_products == "fp8" else "plain"


def _fp8_without_effect(settings: ModelConfig, layers: Choice) -> str | None:
    """Return the notice that base products are not in fp8 although the configuration asks for it, or None."""
    if settings.base_products != "fp8" or layers.path == "stack":
        return None
    reasons = "; ".join(layers.reasons)
    return f"model.base_products=fp8 has no effect: only the decoder stack computes in fp8, and it is off ({reasons})"


def _answers(settings: ModelConfig, adapted: PeftModel, device: DeviceFacts) -> str:
    """Return how the tokens of answers are computed on a GPU."""
    facts = facts_for(adapted)
    dtype = str(resolve_dtype(settings.dtype)).removeprefix("torch.")
    quantized = bool(scheme_of(getattr(adapted, "config", None))) or settings.quantization != "none"
    return answers_on(device, dtype, quantized, facts is not None and facts.architecture == "Phi3Model")


def _device(training: Mapping[str, Any]) -> str:
    accelerator = None if training.get("use_cpu") else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def with_learning_rate(config: Config, model_config: PretrainedConfig) -> Config:
    """Return the configuration with the value of `learning_rate: auto`, and the rule as its origin.

    The best rate for an adapter falls with the model's width: docs/settings.md has the measurements.
    """
    if config.training_config.get("learning_rate") != "auto":
        return config
    hidden_size = int(model_config.get_text_config().hidden_size)
    rate = float(f"{LEARNING_RATE * LEARNING_RATE_HIDDEN_SIZE / hidden_size:.4g}")
    rule = f"auto: {LEARNING_RATE:g} * {LEARNING_RATE_HIDDEN_SIZE} / hidden size {hidden_size}"
    origins = {**config.origins, "training_config.learning_rate": rule}
    return replace(config, training_config=config.training_config | {"learning_rate": rate}, origins=origins)


def _lengths(
    training: Mapping[str, Any], report: DataReport, max_length: int, chosen: Mapping[str, Any] | None, device: str
) -> tuple[int, int | None]:
    """Return the tokens of a row, and of a step, the latter None if it follows from the batch."""
    tokens = training.get("tokens_per_step", "auto")
    if chosen:
        return int(chosen.get("max_length", max_length)), None if tokens == "auto" else tokens
    if tokens == "auto":
        if report.streaming:
            tokens = TOKENS_PER_STEP if device == "cpu" else TOKENS_PER_STEP_ACCELERATOR
        else:
            mean = round(report.train.tokens / max(1, report.train.rows))
            tokens = step_tokens(report.train.tokens, mean, device)
    if tokens is not None and not report.streaming:
        # A pack is one row, and a step has at least one row: a pack longer than the step would make steps too large.
        # Conversations are not cut.
        longest = max((split.longest_tokens for split in report.splits.values()), default=0)
        max_length = min(max_length, max(tokens, longest, 8))
    return max_length, tokens


def _evaluated(
    settings: EvaluationConfig, report: DataReport, max_length: int, counted: Footprint, memory: int
) -> Evaluated:
    """Return the sizes of the batches in the evaluations before and after training."""
    figures = report.eval
    if figures is None or not figures.rows:
        return NOT_EVALUATED
    longest = min(figures.longest_tokens, max_length)
    answers = min(settings.batch_size, settings.generate, figures.rows)
    packed = counted.packed if answers and counted.packed < PACKED_SHARE * (memory - counted.anonymous) else 0
    return Evaluated(max(longest, min(8192, figures.tokens)), answers, longest + settings.max_new_tokens, packed)


def _steps(
    given: Mapping[str, Any], train: SplitReport | None, packing: bool, row_tokens: int, batch: Batch, processes: int
) -> int | None:
    """Return the number of optimizer steps, counted as in transformers."""
    steps = int(given.get("max_steps") or -1)
    if steps > 0:
        return steps
    if train is None:
        return None
    rows = math.ceil(train.tokens / row_tokens) if packing else train.rows
    epochs = float(given.get("num_train_epochs", 3))
    return max(1, math.ceil(math.ceil(rows / batch.rows / processes) / batch.accumulation * epochs))


@dataclass(frozen=True)
class _Situation:
    """A planned run, for estimates with one setting changed."""

    config: Config
    adapted: PeftModel
    counted: Footprint
    batch: Batch
    max_length: int
    lengths: _RowLengths
    evaluated: Evaluated

    def peak(
        self, *, rows: int | None = None, row_tokens: int | None = None, grade: Recomputation | None = None,
        evaluated: Evaluated | None = None, counted: Footprint | None = None,
    ) -> int:  # fmt: skip
        """Return the peak of memory with these values instead of the run's."""
        tokens = (rows or self.batch.rows) * (row_tokens or self.lengths.longest)
        share, evaluation = self.lengths.label_share, evaluated or self.evaluated
        sizes, grade = counted or self.counted, grade or self.batch.recomputation
        return sizes.estimate(tokens, grade, label_share=share, evaluation=evaluation).peak

    def peak_with(self, settings: ModelConfig, optim: str) -> int:
        """Return the peak with other settings of the model, or another optimizer."""
        own = self.counted
        stack = own.stack is not None
        return self.peak(counted=footprint(self.adapted, settings, optim, own.device, own.trained_bytes, stack=stack))

    def slow_bf16(self, optim: str, memory: int) -> str | None:
        """Return a notice if the weights are in bf16 and the CPU has no instructions for it."""
        on_cpu = self.counted.device == "cpu"
        if not on_cpu or self.counted.dtype != torch.bfloat16 or bf16_is_fast("cpu"):
            return None
        return slow_bf16(self.peak_with(replace(self.config.model, dtype="float32"), optim), int(FILLED * memory))

    def changes(self, optim: str, memory: int) -> tuple[Change, ...]:
        """Return settings that would save memory, the cheapest first; those that do not suffice come last."""
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
            small = self.peak_with(settings, "adamw_8bit")
            offers.append(("training_config.optim=adamw_8bit", "rounded states", small))
        if grade not in WHOLE_LAYERS:
            setting = "training_config.gradient_checkpointing=true"
            offers.append((setting, "each layer computed twice", self.peak(grade="full")))
        if self.counted.quantization == "none" and bitsandbytes_is_here():
            for scheme in ("int8", "nf4"):
                small = self.peak_with(replace(settings, quantization=scheme), optim)
                offers.append((f"model.quantization={scheme}", "a rounded base", small))
        if self.lengths.packed and self.max_length >= 256:
            half = self.max_length // 2
            setting = f"training_config.max_length={half}"
            offers.append((setting, "long conversations are cut", self.peak(row_tokens=half)))
        found = [Change(setting, estimate.peak - after, after, costs) for setting, costs, after in offers]
        useful = [change for change in found if change.saves_bytes > 0.01 * estimate.peak]
        enough = [change for change in useful if change.peak_bytes <= FILLED * memory]
        rest = [change for change in useful if change.peak_bytes > FILLED * memory]
        return (*enough, *sorted(rest, key=lambda change: -change.saves_bytes))
