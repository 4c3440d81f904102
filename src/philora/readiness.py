"""`philora check`: everything a run needs, looked at before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from philora import models, outlook, planning, processes, requirements
from philora.adapters import Coverage, coverage
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
    plan: planning.Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        covered = asdict(self.coverage) | {"rows": [each._asdict() for each in self.coverage.rows]}
        return {**asdict(self), "coverage": covered, "plan": self.plan.to_dict()}


def preflight(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Preflight:
    """Check configuration, data, template, stop tokens, labels, targets, memory and time, on a model without weights.

    Raises:
        ConfigError, DataError, ModelError, TargetError: As `train` would raise them.
    """
    config = load_config(source, overrides)
    requirements.check(config)
    tokenizer = models.load_tokenizer(config.model, config.tokenizer)
    skeleton = models.load_skeleton(config.model)
    config = planning.with_learning_rate(config, skeleton.config)
    max_length = models.max_length_of(config, skeleton.config)
    stops = models.stop_token_ids(tokenizer, getattr(skeleton.generation_config, "eos_token_id", None))
    adapted = planning.weightless(config, skeleton)  # a wrong target ends here, before the data
    seed = int(config.training_config.get("seed", 42))
    prepared = prepare(config.data, tokenizer, max_length=max_length, seed=seed, stop_token_ids=stops)
    model_config = skeleton.config
    covered = coverage(adapted)
    dtype = str(models.resolve_dtype(config.model.dtype)).removeprefix("torch.")
    plan = planning.plan(config, adapted, prepared.report, max_length=max_length)
    outlook.check(config, plan)
    splits = prepared.report.to_dict()
    return Preflight(
        model=f"{config.model.name_or_path}, {plan.parameters / 1e6:,.1f} M parameters, {dtype}",
        stop_tokens=[str(each) for each in tokenizer.convert_ids_to_tokens(stops)],
        padding_token=str(tokenizer.pad_token),
        data={name: splits[name] for name in ("train", "eval") if splits.get(name)},
        notices=[
            *config.notices,
            *_notices(config, tokenizer, stops, covered),
            *filter(None, [generic_notice(model_config)]),
            *prepared.report.notices,
            *length_notices(model_config, {"train": prepared.train, "eval": prepared.eval}),
            *filter(None, [plan.warning]),
            *outlook.notices(config, plan),
            *(
                f"a run here would be refused: {each}"
                for each in processes.not_here(config.training_config, config.source)
            ),
        ],
        preview=preview(tokenizer, next(iter(prepared.train))),
        coverage=covered,
        plan=plan,
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
