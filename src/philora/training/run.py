"""Run a training from configuration to report: data, model, adapter, training, evaluations, the run folder.

config -> data (errors are found here, before any weight) -> targets on a model without weights -> weights -> adapter
       -> evaluate the base -> SFTTrainer -> adapter/ -> evaluate again -> results.json, report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from philora.adapters.adapter_files import check_adapter
from philora.adapters.peft_models import get_peft_model, load_adapter
from philora.adapters.statistics import coverage
from philora.adapters.targets import resolve_for_training
from philora.configuration.config import load_config
from philora.configuration.sections import Config
from philora.dataset import PreparedData, places_of, prepare
from philora.dataset.held_out import held_out_bytes
from philora.dataset.ids import check_rows, vocabulary_of
from philora.decoder_stack.model import configure as configure_stack
from philora.errors import ConfigError, PhiloraError, RunError, fault, one_per_line
from philora.families import generic_notice
from philora.files import checkpoint
from philora.kernels.memory import out_of_memory
from philora.kernels.tiled_attention import onednn_products
from philora.models import loading as models
from philora.models import run_folder
from philora.models.locate import find_adapter
from philora.models.spare_rows import notice, untrained_tokens
from philora.native import build as native
from philora.planning import outlook
from philora.planning import plan as planning
from philora.reporting import display, pushing
from philora.reporting.formatting import SECRETS
from philora.runtime import process_state, processes
from philora.runtime.signals import Interrupted, StopOnSignal
from philora.training import readiness
from philora.training import resume as resuming
from philora.training.arguments import SFTConfig, chosen_of
from philora.training.callbacks import MetricsFile, peak_memory_bytes
from philora.training.checkpoints import checkpoint_bytes
from philora.training.run_arguments import resolve_arguments
from philora.training.run_context import RunContext
from philora.training.run_evaluation import Evaluations, evaluate_run, on_device, saved_model
from philora.training.run_files import RunFiles, log_file
from philora.training.run_results import results_of, versions
from philora.training.trainer import SFTTrainer

logger = logging.getLogger("philora.run")


@dataclass(frozen=True)
class RunResult:
    """The folder of a run and its results, the content of `results.json`."""

    folder: Path
    results: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """Return the adapter in PEFT's format."""
        return self.folder / "adapter"


def train(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    resume: bool | str = False,
    callbacks: Sequence[TrainerCallback] = (),
    command: str | None = None,
    quiet: bool = False,
) -> RunResult:
    """Fine-tune as a configuration states, show the progress, and write a run folder.

    Args:
        source: A YAML file, a dict of the same shape, or a Config.
        overrides: `KEY=VALUE` strings that replace its values.
        resume: Resume from the newest complete checkpoint of the run folder; "force": even if the configuration
            changed.
        callbacks: Further callbacks of transformers' Trainer.
        command: The command that the report shows; default: that of this process.
        quiet: Show warnings only; default: what `philora train` shows, by `training_config.log_level`.

    Returns:
        The run folder and its results.

    Raises:
        ConfigError, DataError, ModelError, TargetError, AdapterError: An argument or its content is wrong;
            nothing has been written.
        Interrupted: A signal stopped the run; its progress is saved in a checkpoint.
        RunError: The run failed; every file in its folder is complete.
        Elsewhere: Another process of the run failed and reports the reason.

    Under torchrun or accelerate every process calls this. The first one writes, and all return the same result.
    """
    command = SECRETS.sub("***", command or " ".join(sys.argv))
    with (
        process_state.run(),
        process_state.quiet_libraries(bars=not quiet and sys.stderr.isatty() and processes.is_main()),
        onednn_products(),
        StopOnSignal("before training", command) as stop,
    ):
        config = load_config(source, overrides)
        _check_processes(config)
        with warnings.catch_warnings():
            display.ignore_future_warnings()
            if quiet:
                return _train(config, resume, list(callbacks), command, stop)
            with display.shown(str(config.training_config.get("log_level", "info"))) as bar:
                result = _train(config, resume, [bar, *callbacks], command, stop)
            if processes.is_main():
                display.show_result(result.folder, result.results)
            return result


def _train(
    config: Config, resume: bool | str, callbacks: list[TrainerCallback], command: str, stop: StopOnSignal
) -> RunResult:
    folder = Path(config.training_config["output_dir"]).expanduser()
    with contextlib.ExitStack() as held:
        claim = resuming.Claim(folder)
        continued = processes.on_main(lambda: _open(claim, config, resume, held))
        stop.saved = lambda: checkpoint.newest_complete(folder / "checkpoints").folder is not None
        if continued is not None:
            config = continued.config
        processes.on_main(lambda: readiness.require(config))
        idle = processes.idle_gpus_notice(config.training_config, config.model.device_map)
        for text in filter(None, [*config.notices, idle]):
            logger.warning("%s", text)

        tokenizer = models.load_tokenizer(config.model, config.tokenizer)
        skeleton = models.load_skeleton(config.model)
        config = planning.with_learning_rate(config, skeleton.config)
        if (generic := generic_notice(skeleton.config)) is not None:
            logger.warning("%s", generic)
        _check_targets(config, skeleton)
        max_length = models.max_length_of(config, skeleton.config)
        prepared = _prepare(config, tokenizer, skeleton, max_length, continued)
        facts = processes.on_main(lambda: resuming.facts_of(config, prepared))
        chosen: Mapping[str, Any] = {}
        if continued is not None:
            processes.on_main(lambda: resuming.check_facts(continued, facts, folder))
            chosen = processes.on_main(lambda: continued.chosen)
        stop.check()

        plan = _plan(config, skeleton, prepared, max_length, chosen)
        outlook.check(config, plan)
        run = _Run(RunContext(config, folder, tokenizer, prepared, plan, command, callbacks, stop))
        processes.on_main(run.check_push)
        with _explained(folder):
            processes.on_main(lambda: _begin_folder(claim, config, continued, held))
            held.enter_context(resuming.threads(chosen.get("threads")))
            run.load(chosen)
            claim.kept = True
            return run.train(None if continued is None else continued.checkpoint, facts)


def _check_targets(config: Config, skeleton: Any) -> None:
    """Raise an error if a target of the adapter matches nothing in the model."""
    if config.model.adapter is None:
        resolve_for_training(skeleton, config.lora_config(), where=f"{config.source}: peft_config")
    else:
        check_adapter(skeleton, find_adapter(config.model.adapter).path)


def _prepare(
    config: Config, tokenizer: Any, skeleton: Any, max_length: int, continued: resuming.Continued | None
) -> PreparedData:
    """Return the rows of the run; a resumed run holds out the same rows as before."""
    stops = models.stop_token_ids(tokenizer, getattr(skeleton.generation_config, "eos_token_id", None))
    with processes.main_first():
        prepared = prepare(
            config.data,
            tokenizer,
            max_length=max_length,
            seed=int(config.training_config.get("seed", 42)),
            stop_token_ids=stops,
            held_out_rows=None if continued is None else run_folder.recorded_eval_rows(continued.facts),
        )
    check_rows({"data.train": prepared.train, "data.eval": prepared.eval}, vocabulary_of(skeleton))
    return prepared


def _open(
    claim: resuming.Claim, config: Config, resume: bool | str, held: contextlib.ExitStack
) -> resuming.Continued | None:
    """Lock the run folder; with `resume` return the run to continue."""
    if resume:
        return resuming.open_to_resume(claim.folder, config, force=resume == "force", held=held)
    claim.take(config.source, held)
    return None


def _begin_folder(
    claim: resuming.Claim, config: Config, continued: resuming.Continued | None, held: contextlib.ExitStack
) -> None:
    """Write to the run folder for the first time: its configuration and its log."""
    if continued is None:
        claim.begin(config)
    held.enter_context(log_file(claim.folder / "train.log"))
    if continued is not None:
        resuming.keep_passed_over(continued)


def _check_processes(config: Config) -> None:
    """Join the other processes of the run, if there are any.

    Raises:
        ConfigError: The configuration asks for what several processes, or a CPU, do not support.
        RunError: The other processes did not join in time.
    """
    given = config.training_config
    cpu = bool(given.get("use_cpu", False)) or not torch.accelerator.is_available()
    faults = processes.not_here(given, config.source)
    if processes.count() > 1 and config.model.device_map is not None:
        expected = "null with several processes: each has the complete model, or shards it by training_config.fsdp"
        faults.append(fault(config.source, "model.device_map", config.model.device_map, expected))
    if given.get("fsdp") and processes.count() == 1 and not faults:
        expected = "several processes"
        todo = "Start it with torchrun --nproc-per-node N -m philora train CONFIG"
        faults.append(fault(config.source, "training_config.fsdp", given["fsdp"], expected, todo))
    if faults:
        raise ConfigError(one_per_line(faults))
    if processes.left_alone():
        logger.warning(
            "one process trains: accelerate launch --cpu starts several by mpirun only (--mpirun_hostfile). "
            "Use torchrun --nproc-per-node N -m philora train CONFIG, or accelerate launch --multi_gpu, on a CPU too."
        )
    processes.join(float(given.get("ddp_timeout", 1800)), cpu)


def _plan(
    config: Config, skeleton: Any, prepared: PreparedData, max_length: int, chosen: Mapping[str, Any]
) -> planning.Plan:
    """Return the plan of the run; all processes use that of the first, since free memory and speed may differ."""
    return processes.on_main(
        lambda: planning.plan(
            config,
            planning.weightless(config, skeleton),
            prepared.report,
            max_length=max_length,
            chosen=chosen,
            processes=processes.count(),
            sharing=1 if torch.accelerator.is_available() else processes.local_count(),
        )
    )


def _locate_examples(prepared: PreparedData, data: Any, examples: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the origin of every example by its tokens: its prepared row, its conversation, its file and line."""
    rows: dict[int, int] = {}
    if not prepared.report.streaming:
        for number, row in enumerate(prepared.train):
            for index, ids in enumerate(examples):
                if index not in rows and row["input_ids"][: len(ids)] == list(ids):
                    rows[index] = number
    conversations = prepared.train_conversations
    texts = {index: conversations.stored(number) for index, number in rows.items()}
    sources = places_of(data, set(texts.values())) if texts else {}
    return [
        {"source": sources.get(texts[index]), "prepared_row": rows[index], "conversation": conversations[rows[index]]}
        if index in rows
        else {}
        for index in range(len(examples))
    ]


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Explain a lost process, an out-of-memory error and a full disk; other errors pass unchanged.

    Raises:
        RunError: The failure in this block, with what to do.
    """
    try:
        yield
    except PhiloraError:
        raise
    except Exception as error:
        then = checkpoint.how_to_continue(folder / "checkpoints")
        if processes.lost(error):
            expected = "every process to continue, but another one has ended"
            todo = f"Look for its message, or for what ended it (memory, a signal); then {then}"
            message = fault("run", "processes", processes.count(), expected, todo)
        elif out_of_memory(error):
            todo = "Lower max_length or the batch sizes, or quantise the base (model.quantization: nf4)"
            found = " ".join(str(error).split())[:300] or type(error).__name__
            message = fault("run", "memory", found, "memory for the model and its batches", todo)
        elif checkpoint.disk_full(error):
            todo = f"Free some space ({checkpoint.free_bytes(folder):,} bytes are free), then {then}"
            message = fault("run", "output_dir", str(folder), f"free space to write to it: {error}", todo)
        else:
            raise
        raise RunError(message) from error


class _Run:
    """One run, from its weights to its report."""

    def __init__(self, context: RunContext) -> None:
        self.context, self.files = context, RunFiles(context)
        self.target: pushing.Target | None = None
        self.model: PeftModel
        self.arguments: SFTConfig

    def check_push(self) -> None:
        """Check that the adapter can be pushed at the end; in the process that will push it."""
        self.target = pushing.target_of(self.context.config)

    def load(self, chosen: Mapping[str, Any]) -> None:
        """Load weights and adapter, and decide the arguments, by choices to resume with, without writing anything.

        Raises:
            RunError: The files of the run do not fit on the disk.
        """
        run, config = self.context, self.context.config
        set_seed(int(config.training_config.get("seed", 42)))
        base = models.load_model(config.model, run.tokenizer)
        weight = base.get_input_embeddings().weight
        untrained = untrained_tokens(run.tokenizer, len(weight), base.config, weight)
        if (spare := notice(untrained, len(weight), config.peft_config)) is not None:
            logger.warning("%s", spare)
        if config.model.adapter is not None:
            self.model = load_adapter(base, find_adapter(config.model.adapter).path, is_trainable=True)
        else:
            self.model = get_peft_model(base, config.lora_config())
        configure_stack(self.model, fp8=config.model.base_products == "fp8")
        self.arguments = resolve_arguments(run, self.model, chosen)
        rows_bytes = held_out_bytes(run.prepared) if config.data.keep_held_out else 0
        readiness.require_space(run.folder, checkpoint_bytes(self.model), self.arguments.save_total_limit, rows_bytes)
        run.stop.check()

    def train(self, resume_from: Path | None, facts: Mapping[str, Any]) -> RunResult:
        """Evaluate the base, train, save, evaluate again, and write the results."""
        run = self.context
        if processes.is_main():
            self.files.begin(facts, chosen_of(self.arguments))
        self._announce()
        with on_device(run, self.model, self.arguments.device).disable_adapter():
            before = self._evaluate("before training", self.model)
        begins_with = run.config.model.adapter
        start = None if begins_with is None else self._evaluate("the adapter it starts from", self.model)
        if (first := start or before) is not None and processes.is_main():
            self.files.record_first_loss(first.scores.loss)
        trainer = self._trainer()
        metrics = self._run_trainer(trainer, resume_from)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        # All processes gather the shards; one writes.
        weights = trainer.whole_weights() if sharded else None
        processes.on_main(functools.partial(self.files.save_adapter, self.model, weights))
        del weights
        whole = saved_model(run, self.arguments.device) if sharded else self.model
        evaluations = Evaluations(before, start, self._evaluate("after training", whole))
        run.stop.check()
        peak = max(processes.gathered(peak_memory_bytes()))
        return processes.on_main(lambda: self._finish(trainer, metrics, evaluations, peak, whole))

    def _announce(self) -> None:
        """Log the coverage, the plan and its warnings."""
        run = self.context
        logger.info("%s", coverage(self.model))
        shared = f" in each of {processes.count()} processes" if processes.count() > 1 else ""
        logger.info("the plan%s:\n%s", shared, run.plan)
        expected = outlook.notices(run.config, run.plan)
        for text in (*run.plan.notices, *filter(None, [run.plan.warning]), *expected):
            logger.warning("%s", text)
        if self.model.device.type == "cpu":
            logger.info("element-wise functions: %s", native.describe())

    def _evaluate(self, when: str, model: PeftModel) -> Any:
        return evaluate_run(self.context, when, model, self.arguments)

    def _run_trainer(self, trainer: SFTTrainer, resume_from: Path | None) -> dict[str, Any]:
        """Train, and return the metrics.

        Raises:
            Interrupted: A signal stopped the training.
        """
        run = self.context
        with run.stop.finishing():
            output = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
            if processes.is_main():
                state = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n"
                checkpoint.write_text(run.folder / "trainer_state.json", state)
        if run.stop.stopped_by is not None:
            step = trainer.state.global_step
            saved = f"checkpoint-{step} is saved in {run.folder}"
            run.stop.doing = f"after step {step} of {trainer.state.max_steps}; {saved}"
            raise run.stop.interrupted()
        run.stop.doing = "after training"
        return dict(output.metrics)

    def _trainer(self) -> SFTTrainer:
        run = self.context
        callbacks: list[TrainerCallback] = [MetricsFile(run.folder / "metrics.jsonl"), *run.callbacks]
        patience = run.config.training_config.get("early_stopping_patience")
        if patience:
            callbacks.append(EarlyStoppingCallback(int(patience)))
        trainer = SFTTrainer(
            self.model,
            args=self.arguments,
            train_dataset=run.prepared.train,
            eval_dataset=run.prepared.eval,
            processing_class=run.tokenizer,
            callbacks=callbacks,
        )
        trainer.stop = run.stop
        trainer.nonfinite.locate = functools.partial(_locate_examples, run.prepared, run.config.data)
        trainer.remove_callback(PrinterCallback)  # `display` shows the progress
        trainer.remove_callback(ProgressCallback)
        # MetricsFile comes first, so that the other callbacks see its additions to the metrics.
        trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, MetricsFile))
        return trainer

    def _finish(
        self,
        trainer: SFTTrainer,
        metrics: dict[str, Any],
        evaluations: Evaluations,
        peak_bytes: int,
        whole: PeftModel,  # the trained model without shards
    ) -> RunResult:
        run, files = self.context, self.files
        results = results_of(
            run, trainer, metrics, evaluations, files.system, model=self.model, whole=whole, peak_bytes=peak_bytes
        )
        files.finish(metrics, evaluations, results)
        logger.info("the run is complete: %s", run.folder)
        self._push()
        return RunResult(run.folder, results)

    def _push(self) -> None:
        if self.target is None:
            return
        folder = self.context.folder
        repo_id, private, token = self.target
        try:
            url = pushing.push(folder, repo_id, private=private, token=token).url
        except PhiloraError as error:
            todo = f"The run is complete in {folder}; push it with: philora push {folder} {repo_id}"
            raise RunError(f"{error} {todo}") from None
        logger.info("pushed: %s", url)


__all__ = ["Interrupted", "RunResult", "train", "versions"]
