"""Evaluate a run's model before and after training, on the same examples."""

from __future__ import annotations

import logging
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from philora.adapters.peft_models import load_adapter
from philora.dataset import prompts_and_references
from philora.evaluation.scores import Evaluation, evaluate, joined
from philora.generation.batches import GenerationSettings
from philora.models import loading as models
from philora.runtime import processes
from philora.training.arguments import SFTConfig
from philora.training.run_context import RunContext

logger = logging.getLogger("philora.run")


class Evaluations(NamedTuple):
    """The evaluations of a run; None if it has no held-out rows.

    Attributes:
        before: The base.
        start: The adapter that the run started from, if any.
        after: The trained adapter.
    """

    before: Evaluation | None
    start: Evaluation | None
    after: Evaluation | None


def on_device(run: RunContext, model: PeftModel, device: torch.device) -> PeftModel:
    """Return a model on this process's device; a quantised or distributed one is not moved."""
    quantised = getattr(model.get_base_model(), "quantization_method", None) is not None
    stays = quantised or run.config.model.device_map is not None
    return model if stays else cast(PeftModel, model.to(device))


def saved_model(run: RunContext, device: torch.device) -> PeftModel:
    """Load the saved adapter of the run on an unsharded base."""
    unset_hf_deepspeed_config()  # otherwise transformers would shard the model
    base = models.load_model(run.config.model, run.tokenizer)
    return on_device(run, load_adapter(base, str(run.folder / "adapter")), device)


def evaluate_run(run: RunContext, when: str, model: PeftModel, arguments: SFTConfig) -> Evaluation | None:
    """Return the losses and answers of a model on the run's held-out rows, which processes share."""
    settings, prepared = run.config.evaluation, run.prepared
    if prepared.eval is None or prepared.eval_conversations is None:
        return None
    rows = prepared.eval
    kept = prepared.eval_conversations[: settings.generate]
    conversations = [prompts_and_references(conversation) for conversation in kept]
    logger.info("evaluating %s: %d rows, %d answers", when, len(rows), len(conversations))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(arguments.bf16)):
        part = evaluate(
            model,
            run.tokenizer,
            rows.select(processes.share(len(rows))),
            [conversations[index] for index in processes.share(len(conversations))],
            GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size),
            pad_token_id=cast(int, run.tokenizer.pad_token_id),
        )
    result = joined(processes.gathered(part))
    loss, accuracy = result.scores.loss, result.scores.token_accuracy
    logger.info("%s: loss %.4f, token accuracy %.3f", when.removesuffix(" training"), loss, accuracy)
    return result
