"""Write the files of a run folder: log, facts, held-out rows, adapter, model card, results and report."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from philora.adapters.adapter_files import RECORD_NAME, sort_names
from philora.configuration import run_paths
from philora.configuration.writing import dump_yaml
from philora.dataset.held_out import vocabulary_digest, write_held_out
from philora.dataset.system_turns import commonest_system_turn
from philora.evaluation.scores import pick_samples
from philora.files import checkpoint
from philora.models import run_folder
from philora.reporting.answers import answer_lines
from philora.reporting.card import model_card
from philora.reporting.report import write_report
from philora.reporting.run_record import ANSWERS_NAME
from philora.training.run_context import RunContext
from philora.training.run_evaluation import Evaluations


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write philora's log lines to a file while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not print tracebacks
    handler.setLevel(logging.INFO)
    root = logging.getLogger("philora")
    level = root.level
    root.setLevel(min(logging.INFO, level or logging.INFO))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


class RunFiles:
    """The files of a run, in the process that writes them.

    Attributes:
        system: The system turn that most conversations start with; set by `begin`.
    """

    def __init__(self, run: RunContext) -> None:
        self._run, self._folder = run, run.folder
        self.system: run_folder.SystemTurn | None = None

    def begin(self, facts: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        """Write the facts of the run's start, its paths, and its held-out rows."""
        run = self._run
        self.system = commonest_system_turn(run.prepared, run.config.data)
        record: dict[str, Any] = {"paths": run_folder.paths_of(run.config, self._folder)}
        file = self._folder / run_folder.HELD_OUT_NAME
        if run.config.data.keep_held_out and (rows := write_held_out(file, run.prepared)):
            record["held_out"] = {"rows": rows, "vocabulary": vocabulary_digest(run.tokenizer)}
        else:
            file.unlink(missing_ok=True)
        if self.system is not None:
            record["system"] = self.system._asdict()
        checkpoint.write_json(self._folder / run_paths.RECORD_NAME, {**facts, **record, "chosen": dict(chosen)})
        checkpoint.write_text(self._folder / "config.yaml", dump_yaml(run.config))  # --resume=force may change it

    def record_first_loss(self, loss: float) -> None:
        """Write the held-out loss before the first step into `run.json`, so that a report can show it at once."""
        file = self._folder / run_paths.RECORD_NAME
        checkpoint.write_json(file, {**checkpoint.read_json(file), "first_loss": loss})

    def save_adapter(self, model: PeftModel, weights: Mapping[str, Any] | None = None) -> None:
        """Write `adapter/` atomically: weights (of a sharded model as gathered), config, slices, tokenizer, card."""
        with checkpoint.atomic_folder(self._folder / "adapter") as folder:
            model.save_pretrained(str(folder), state_dict=weights)
            sort_names(folder / "adapter_config.json")
            if not (folder / RECORD_NAME).exists():
                checkpoint.write_json(folder / RECORD_NAME, {"format": 1, "slices": {}})
            self._run.tokenizer.save_pretrained(str(folder))
            generation = model.get_base_model().generation_config
            if generation is not None:
                generation.save_pretrained(str(folder))
            self._write_card(folder)

    def finish(self, metrics: Mapping[str, Any], evaluations: Evaluations, results: Mapping[str, Any]) -> None:
        """Write the results, the card with them, all answers, and the report."""
        before, after = evaluations.before, evaluations.after
        checkpoint.write_json(self._folder / "train_results.json", dict(metrics))
        evaluated = {f"eval_{key}": value for key, value in (after.scores.to_dict() if after else {}).items()}
        checkpoint.write_json(self._folder / "eval_results.json", evaluated)
        checkpoint.write_json(self._folder / "results.json", dict(results))
        self._write_card(self._folder / "adapter")
        if before and after and self._run.config.data.keep_held_out:
            every_answer = pick_samples(before, after, len(after.samples))
            checkpoint.write_text(self._folder / ANSWERS_NAME, answer_lines(every_answer))
        write_report(self._folder)

    def _write_card(self, folder: Path) -> None:
        """Write the model card of the adapter, with the results if there are any."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = self._run.config.model.name_or_path
        text = model_card("adapter", run=self._folder, base=base, adapter_config=config, system=self.system)
        checkpoint.write_text(folder / "README.md", text)
