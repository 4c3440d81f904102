"""Make the content of `results.json`: a run's settings, scores, time and memory."""

from __future__ import annotations

import datetime
import logging
import platform
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from peft import PeftModel

import philora
from philora.adapters.statistics import coverage, update_norms
from philora.dataset import PreparedData, preview
from philora.dataset.lengths import sequence_lengths
from philora.evaluation.scores import Evaluation, compare, pick_samples
from philora.models import run_folder
from philora.planning import outlook
from philora.runtime import processes
from philora.training.run_context import RunContext
from philora.training.run_evaluation import Evaluations
from philora.training.trainer import SFTTrainer

logger = logging.getLogger("philora.run")

PREVIEW_TOKENS = 600
"""Most tokens of the example that the report shows with its labels."""


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries of a run."""
    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def results_of(
    run: RunContext,
    trainer: SFTTrainer,
    metrics: dict[str, Any],
    evaluations: Evaluations,
    system: run_folder.SystemTurn | None,
    *,
    model: PeftModel,
    whole: PeftModel,
    peak_bytes: int,
) -> dict[str, Any]:
    """Return the results of a run, and warn of what it did not learn.

    Args:
        run, trainer: The run, and its trainer after training.
        metrics, evaluations: What training and the evaluations returned.
        system: The system turn that most conversations start with.
        model: The model with its adapter.
        whole: The same without shards.
        peak_bytes: The largest peak memory of a process.
    """
    before, start, after = evaluations
    updates = [update._asdict() for update in update_norms(whole)]
    comparison = compare(before, after) if before and after else []
    steps, tokens, seconds = trainer.state.global_step, trainer.trained_tokens, float(metrics["train_runtime"])
    judgement = outlook.judge(comparison, trainer.state.log_history, steps=steps, updates=updates)
    for sentence in judgement.sentences:
        logger.warning("%s", sentence)
    return {
        "philora": philora.__version__,
        "versions": versions(),
        "command": run.command,
        "started": run.started.isoformat(timespec="seconds"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "duration_seconds": round(time.monotonic() - run.began, 1),  # the wall clock may have been set
        **_about_model(run, model),
        "data": run.prepared.report.to_dict() | _data_facts(run.prepared, run.tokenizer),
        "system": None if system is None else system._asdict(),
        "updates": updates,
        "before": before.scores.to_dict() if before else None,
        "start": start.scores.to_dict() if start else None,
        "after": after.scores.to_dict() if after else None,
        "comparison": [measure.to_dict() for measure in comparison],
        "comparison_with_start": _since_the_start(start, after) if start and after else [],
        "judgement": judgement.to_dict(),
        "samples": pick_samples(before, after, run.config.evaluation.samples) if before and after else [],
        "throughput": {
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "steps": steps,
        },
        "processes": processes.count(),
        "plan": run.plan.to_dict(),
        "memory": {"peak_bytes": peak_bytes, "estimated_bytes": run.plan.estimate.to_dict()},
        "train_loss": metrics.get("train_loss"),
    }


def _about_model(run: RunContext, model: PeftModel) -> dict[str, Any]:
    covered = coverage(model)
    return {
        "model": {
            "name": run.config.model.name_or_path,
            "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
            "parameters": covered.total_parameters - covered.trainable_parameters,
        },
        "coverage": {
            "rows": [row._asdict() for row in covered.rows],
            "trainable_parameters": covered.trainable_parameters,
            "total_parameters": covered.total_parameters,
        },
    }


def _data_facts(prepared: PreparedData, tokenizer: Any) -> dict[str, Any]:
    """Return the data's fingerprint, lengths, and one example with its labels."""
    lengths = sequence_lengths(prepared.train)
    counts, edges = np.histogram(lengths, bins=min(24, max(1, len(np.unique(lengths)))))
    example = None if prepared.report.streaming else next(iter(prepared.train), None)
    spread = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {
        "fingerprint": prepared.fingerprint,
        "lengths": {**spread, "median": float(np.median(lengths))} if len(lengths) else None,
        "preview": preview(tokenizer, example)[:PREVIEW_TOKENS] if example is not None else [],
    }


def _since_the_start(start: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Compare a run with the adapter that it started from, and warn of what became worse."""
    measures = compare(start, after)
    worse = [measure.title for measure in measures if measure.verdict == "worse"]
    if worse:
        logger.warning("worse than the adapter that the run started from: %s", ", ".join(worse))
    return [measure.to_dict() for measure in measures]
