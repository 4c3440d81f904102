"""`philora check`: everything a run needs, looked at before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from philora import models, planning
from philora.adapters import Coverage, apply_slices, coverage, optimize, resolve_for_training
from philora.config import Config, load_config
from philora.data import length_notices, prepare, preview
from philora.families import generic_notice


@dataclass(frozen=True)
class Preflight:
    """What `philora check` shows."""

    model: str
    stop_tokens: list[str]
    padding_token: str
    data: dict[str, dict[str, Any]]
    notices: list[str]
    preview: list[tuple[str, bool]]
    coverage: Coverage
    estimate: dict[str, int]


def preflight(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Preflight:
    """Check configuration, data, template, stop tokens, labels, targets and memory, on a model without weights.

    Raises:
        ConfigError, DataError, ModelError, TargetError: As `train` would raise them.
    """
    config = load_config(source, overrides)
    tokenizer = models.load_tokenizer(config.model, config.tokenizer)
    skeleton = models.load_skeleton(config.model)
    max_length = models.max_length_of(config, skeleton.config)
    stops = models.stop_token_ids(tokenizer, getattr(skeleton.generation_config, "eos_token_id", None))
    lora = LoraConfig(**config.peft_config)
    resolution = resolve_for_training(skeleton, lora, where=f"{config.source}: peft_config")
    seed = int(config.training_config.get("seed", 42))
    prepared = prepare(config.data, tokenizer, max_length=max_length, seed=seed, stop_token_ids=stops)
    model_config = skeleton.config
    with torch.device("meta"):
        adapted = peft.get_peft_model(skeleton, resolution.config, low_cpu_mem_usage=True)
    optimize(adapted)
    apply_slices(adapted, resolution.slices)
    covered = coverage(adapted)
    dtype = models.resolve_dtype(config.model.dtype)
    given = config.training_config
    rows = given.get("per_device_train_batch_size", "auto")
    plan = planning.choose(
        model_config,
        covered.total_parameters - covered.trainable_parameters,
        covered.trainable_parameters,
        row_tokens=max_length,
        tokens_per_step=None,
        rows=None if rows == "auto" else int(rows),
        accumulation=None,
        recomputation=planning.recomputation_of(given.get("gradient_checkpointing", "auto")),
        element_bytes=torch.finfo(dtype).bits // 8,
        memory=planning.available_bytes(),
    )
    splits = prepared.report.to_dict()
    count = covered.total_parameters - covered.trainable_parameters
    return Preflight(
        model=f"{config.model.name_or_path}, {count / 1e6:,.1f} M parameters, {str(dtype).removeprefix('torch.')}",
        stop_tokens=[str(each) for each in tokenizer.convert_ids_to_tokens(stops)],
        padding_token=str(tokenizer.pad_token),
        data={name: splits[name] for name in ("train", "eval") if splits.get(name)},
        notices=[
            *config.notices,
            *_notices(config, tokenizer, stops, covered),
            *filter(None, [generic_notice(model_config)]),
            *prepared.report.notices,
            *length_notices(model_config, {"train": prepared.train, "eval": prepared.eval}),
        ],
        preview=preview(tokenizer, next(iter(prepared.train))),
        coverage=covered,
        estimate=plan.estimate.to_dict(),
    )


def _notices(
    config: Config, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], covered: Coverage
) -> Iterator[str]:
    """What scripts for other libraries do by accident, where this run does something else."""
    origins = config.origins
    sections = {
        section: any(key.startswith(section) and origin != "default" for key, origin in origins.items())
        for section in ("training_config.", "peft_config.")
    }
    if sections["training_config."] and not sections["peft_config."] and config.model.adapter is None:
        yield (
            f"peft_config is not given. Without one a script of TRL or transformers trains every weight of the model; "
            f"philora trains LoRA with r={config.peft_config['r']} on {config.peft_config['target_modules']}: "
            f"{covered.trainable_parameters:,} of {covered.total_parameters:,} parameters."
        )
    brought = str(tokenizer.init_kwargs.get("pad_token"))
    if brought != tokenizer.pad_token and tokenizer.get_vocab().get(brought) in stops:
        yield (
            f"the model's tokenizer pads with {brought}, which is a stop token: {tokenizer.pad_token} takes its place, "
            f"so that the end of an answer keeps its label."
        )
    slices = {row.slice: row.module.rpartition(".")[2] for row in covered.rows if row.slice}
    if slices:
        whole = {row.module.rpartition(".")[2]: row for row in covered.rows if not row.slice}
        alone = sum(row.parameters for row in covered.rows if not row.slice)
        yield (
            f"{', '.join(slices)} are slices of {' and '.join(dict.fromkeys(slices.values()))}, and each gets a rank "
            f"of its own: {covered.trainable_parameters:,} parameters train. PEFT by itself would "
            + (f"silently adapt {' and '.join(whole)} only: {alone:,}." if whole else "find none of these names.")
        )
