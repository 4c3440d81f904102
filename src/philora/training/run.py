"""A run from configuration to report: data, model, adapter, training, evaluation before and after, the run folder.

config -> data (errors end here, before any weight) -> targets on a weightless model -> weights -> adapter
       -> evaluate the base -> SFTTrainer -> adapter/ -> evaluate again -> results.json, report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import philora
from philora.adapters.peft_layers import (
    RECORD_NAME,
    check_adapter,
    coverage,
    get_peft_model,
    load_adapter,
    resolve_for_training,
    sort_names,
    update_norms,
)
from philora.configuration.config import Config, dump_yaml, load_config
from philora.dataset import PreparedData, places_of, prepare, preview, prompts_and_references
from philora.dataset.held_out import vocabulary_digest, write_held_out
from philora.dataset.ids import check_rows, vocabulary_of
from philora.dataset.lengths import sequence_lengths
from philora.dataset.system_turns import commonest_system_turn
from philora.decoder_stack.model import configure as configure_stack
from philora.errors import ConfigError, PhiloraError, RunError, fault, one_per_line
from philora.evaluation.scores import Evaluation, compare, evaluate, joined, pick_samples
from philora.families import generic_notice
from philora.files import checkpoint
from philora.generation.batches import GenerationSettings
from philora.kernels.attention import onednn_products
from philora.kernels.memory import out_of_memory
from philora.models import loading as models
from philora.models import run_folder
from philora.models.locate import find_adapter
from philora.models.spare_rows import notice, untrained_tokens
from philora.native import library as native
from philora.planning import outlook
from philora.planning import plan as planning
from philora.reporting import display, pushing
from philora.reporting.answers import answer_lines
from philora.reporting.card import model_card
from philora.reporting.formatting import SECRETS
from philora.reporting.report import write_report
from philora.reporting.run_record import ANSWERS_NAME
from philora.runtime import process_state, processes
from philora.runtime.signals import Interrupted, StopOnSignal
from philora.training import readiness
from philora.training import resume as resuming
from philora.training.callbacks import MetricsFile, peak_memory_bytes
from philora.training.trainer import CHOSEN, SFTConfig, SFTTrainer, checkpoint_bytes, chosen_of

logger = logging.getLogger("philora.run")

PREVIEW_TOKENS = 600
"""Of the example that the report shows with its labels."""

CURVE_POINTS = 100
"""Points of a curve in the report, where a run has as many steps."""


@dataclass(frozen=True)
class RunResult:
    """Where a run is and what came of it; `results` is the content of `results.json`."""

    folder: Path
    results: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format."""
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
    """Fine-tune as a configuration says, show how it goes, and leave a run folder.

    Args:
        source: A YAML file, the same as a dict, or a Config.
        overrides: `KEY=VALUE` strings that go over it.
        resume: Go on from the newest whole checkpoint of the run folder; "force" also when the configuration changed.
        callbacks: Further callbacks of transformers' Trainer.
        command: What the report names as the command; default: the process's own.
        quiet: Show nothing but warnings; default: what `philora train` shows, as `training_config.log_level` says.

    Returns:
        The run folder and its results.

    Raises:
        ConfigError, DataError, ModelError, TargetError, AdapterError: Something is wrong with what was given;
            nothing has been written.
        Interrupted: A signal stopped the run; what it had trained is in a checkpoint.
        RunError: The run failed; what exists in its folder is whole.
        Elsewhere: Another process of the run failed and says why.

    Under torchrun or accelerate every process calls this; the first one writes, and all return the same.
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
        stop.saved = lambda: checkpoint.newest_whole(folder / "checkpoints").folder is not None
        if continued is not None:
            config = continued.config
        processes.on_main(lambda: readiness.require(config))
        for notice in filter(
            None, [*config.notices, processes.idle_gpus_notice(config.training_config, config.model.device_map)]
        ):
            logger.warning("%s", notice)

        tokenizer = models.load_tokenizer(config.model, config.tokenizer)
        skeleton = models.load_skeleton(config.model)
        config = planning.with_learning_rate(config, skeleton.config)
        generic = generic_notice(skeleton.config)
        if generic is not None:
            logger.warning("%s", generic)
        if config.model.adapter is None:
            resolve_for_training(skeleton, _lora_config(config), where=f"{config.source}: peft_config")
        else:
            check_adapter(skeleton, find_adapter(config.model.adapter).path)
        seed = int(config.training_config.get("seed", 42))
        max_length = models.max_length_of(config, skeleton.config)
        stops = models.stop_token_ids(tokenizer, getattr(skeleton.generation_config, "eos_token_id", None))
        with processes.main_first():
            prepared = prepare(
                config.data,
                tokenizer,
                max_length=max_length,
                seed=seed,
                stop_token_ids=stops,
                held_out_rows=run_folder.recorded_eval_rows(continued.facts) if continued is not None else None,
            )
        check_rows({"data.train": prepared.train, "data.eval": prepared.eval}, vocabulary_of(skeleton))
        facts = processes.on_main(lambda: resuming.facts_of(config, skeleton.config, prepared))
        chosen: Mapping[str, Any] = {}
        if continued is not None:
            processes.on_main(lambda: resuming.check_facts(continued, facts, folder))
            chosen = processes.on_main(lambda: continued.chosen)
        stop.check()

        plan = _plan(config, skeleton, prepared, max_length, chosen)
        outlook.check(config, plan)
        run = _Run(config, folder, tokenizer, prepared, plan, command, callbacks, stop)
        processes.on_main(run.aim)
        try:
            processes.on_main(lambda: _hold(claim, config, continued, held))
            held.enter_context(resuming.threads(chosen.get("threads")))
            run.load(chosen)
            claim.kept = True
            return run.go(None if continued is None else continued.checkpoint, facts)
        except PhiloraError:
            raise
        except Exception as error:
            if processes.lost(error):
                expected = "every process to go on, but another one has ended"
                then = checkpoint.how_to_go_on(folder / "checkpoints")
                todo = f"Look for its message, or for what ended it (memory, a signal); then {then}"
                raise RunError(fault("run", "processes", processes.count(), expected, todo)) from error
            if out_of_memory(error):
                todo = "Lower max_length or the batch sizes, or quantise the base (model.quantization: nf4)"
                what = " ".join(str(error).split())[:300] or type(error).__name__
                raise RunError(fault("run", "memory", what, "room for the model and its batches", todo)) from error
            if not checkpoint.disk_full(error):
                raise
            then, free = checkpoint.how_to_go_on(folder / "checkpoints"), checkpoint.free_bytes(folder)
            todo = f"Free some space ({free:,} bytes are free), then {then}"
            raise RunError(fault("run", "output_dir", str(folder), f"room to write to it: {error}", todo)) from error


def _open(
    claim: resuming.Claim, config: Config, resume: bool | str, held: contextlib.ExitStack
) -> resuming.Continued | None:
    """Keep others out of the run folder: a new one, or with `resume` that of a run, of which it says where it is."""
    if resume:
        return resuming.open_to_go_on(claim.folder, config, force=resume == "force", held=held)
    claim.take(config, held)
    return None


def _hold(
    claim: resuming.Claim, config: Config, continued: resuming.Continued | None, held: contextlib.ExitStack
) -> None:
    """Write into the run folder for the first time: its configuration, its log."""
    if continued is None:
        claim.begin(config)
    held.enter_context(_log_file(claim.folder / "train.log"))
    if continued is not None:
        resuming.keep_passed_over(continued)


def _check_processes(config: Config) -> None:
    """Join the other processes of the run, if there are any.

    Raises:
        ConfigError: The configuration asks for what several processes, or a CPU, cannot do.
        RunError: The others did not come.
    """
    given = config.training_config
    cpu = bool(given.get("use_cpu", False)) or not torch.accelerator.is_available()
    faults = processes.not_here(given, config.source)
    if processes.count() > 1 and config.model.device_map is not None:
        expected = "null with several processes: each has the whole model, or shards it by training_config.fsdp"
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
    """The plan of the run; every process follows the first one's, whose free memory and rate are its own."""
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


def _lora_config(config: Config) -> LoraConfig:
    return LoraConfig(**config.peft_config)


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Send philora's and transformers' log lines to `path` as well."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not end in tracebacks
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


class _Run:
    """One run: what was loaded for it, and the steps from the base's evaluation to the report."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        prepared: PreparedData,
        plan: planning.Plan,
        command: str,
        callbacks: list[TrainerCallback],
        stop: StopOnSignal,
    ) -> None:
        self.config, self.folder, self.tokenizer, self.prepared = config, folder, tokenizer, prepared
        self.plan = plan
        self.command, self.callbacks, self.stop = command, callbacks, stop
        self.target: pushing.Target | None = None
        self.system: run_folder.SystemTurn | None = None
        self.started, self.since = datetime.datetime.now(datetime.UTC), time.monotonic()
        self.model: PeftModel
        self.arguments: SFTConfig

    # -- before training

    def load(self, chosen: Mapping[str, Any]) -> None:
        """Weights, adapter and the resolved arguments; writes nothing.

        Args:
            chosen: What the run goes on with, by the names in `trainer.CHOSEN`; what is missing is chosen now.

        Raises:
            RunError: What the run will write does not fit on the disk.
        """
        config = self.config
        set_seed(int(config.training_config.get("seed", 42)))
        base = models.load_model(config.model, self.tokenizer)
        weight = base.get_input_embeddings().weight
        untrained = untrained_tokens(self.tokenizer, len(weight), base.config, weight)
        spare = notice(untrained, len(weight), config.peft_config)
        if spare is not None:
            logger.warning("%s", spare)
        if config.model.adapter is not None:
            self.model = load_adapter(base, find_adapter(config.model.adapter).path, is_trainable=True)
        else:
            self.model = get_peft_model(base, _lora_config(config))
        configure_stack(self.model, fp8=config.model.base_products == "fp8")
        self.arguments = self._resolve_arguments(base, chosen)
        readiness.require_room(self.folder, checkpoint_bytes(self.model), self.arguments.save_total_limit)
        self.stop.check()

    def _resolve_arguments(self, base: Any, chosen: Mapping[str, Any]) -> SFTConfig:
        """TRL's arguments: every `auto` decided, everything written below the run folder."""
        decided: dict[str, Any] = {key: chosen[key] for key in CHOSEN if key in chosen}
        given = self.config.training_config | decided
        plan = self.plan
        if (eval_rows := given.get("per_device_eval_batch_size", "auto")) == "auto":
            eval_rows = plan.micro_batch_rows
        if (bf16 := given.get("bf16", "auto")) == "auto":
            bf16 = self._needs_autocast(base.dtype)
        decided |= {
            "output_dir": str(self.folder / "checkpoints"),
            "max_length": plan.max_length,
            "packing": bool(given.get("packing", True)),
            "per_device_train_batch_size": plan.micro_batch_rows,
            "per_device_eval_batch_size": eval_rows,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_checkpointing": planning.gradient_checkpointing_of(plan.recomputation),
            "bf16": bf16,
            "warmup_steps": outlook.warmup_steps(self.config, plan),
            "logging_steps": logging_steps(self.config, plan.steps),
        }
        if not any(hasattr(base.config, name) for name in ("num_experts", "num_local_experts")):
            # Each step gives every parameter its gradient.
            decided["ddp_find_unused_parameters"] = given.get("ddp_find_unused_parameters", False)
        if self.prepared.eval is None:
            decided["eval_strategy"] = "no"
        arguments = readiness.arguments(self.config, **decided)
        if arguments.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, which TRL refuses
            arguments._n_gpu = 1
        return arguments

    def _needs_autocast(self, dtype: torch.dtype) -> bool:
        """Whether bf16 weights meet whole modules that train: those are kept in fp32, which needs autocast.

        Without them weights and activations are bf16 throughout and autocast would only cost time.
        """
        whole = [p for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name]
        if dtype is torch.bfloat16:
            for parameter in whole:
                parameter.data = parameter.data.float()
        return bool(whole) and dtype is torch.bfloat16

    # -- the run

    def go(self, resume_from: Path | None, facts: Mapping[str, Any]) -> RunResult:
        """Evaluate the base, train, save, evaluate again, write everything down."""
        if processes.is_main():
            self.system = commonest_system_turn(self.prepared, self.config.data)
            resuming.write_facts(self.folder, {**facts, **self._record()}, chosen_of(self.arguments))
            checkpoint.write_text(self.folder / "config.yaml", dump_yaml(self.config))  # may have been forced
        logger.info("%s", coverage(self.model))
        each = f" in each of {processes.count()} processes" if processes.count() > 1 else ""
        logger.info("the plan%s:\n%s", each, self.plan)
        for text in (*self.plan.notices, *filter(None, [self.plan.warning]), *outlook.notices(self.config, self.plan)):
            logger.warning("%s", text)
        if self.model.device.type == "cpu":
            logger.info("between the products: %s", native.describe())
        with self._placed(self.model).disable_adapter():
            before = self._evaluate("before training", self.model)
        begins_with = self.config.model.adapter
        start = None if begins_with is None else self._evaluate("the adapter it begins with", self.model)
        trainer = self._trainer()
        with self.stop.finishing():
            output = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
            if processes.is_main():
                state = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n"
                checkpoint.write_text(self.folder / "trainer_state.json", state)
        if self.stop.stopped_by is not None:
            step = trainer.state.global_step
            saved = f"checkpoint-{step} is saved in {self.folder}"
            self.stop.doing = f"after step {step} of {trainer.state.max_steps}; {saved}"
            raise self.stop.interrupted()
        self.stop.doing = "after training"
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        # All processes take part in putting the shards together; one writes.
        weights = trainer.whole_weights() if sharded else None
        processes.on_main(functools.partial(self._save_adapter, weights))
        del weights
        whole = self._saved() if sharded else self.model
        after = self._evaluate("after training", whole)
        self.stop.check()
        peak = max(processes.gathered(peak_memory_bytes()))
        return processes.on_main(lambda: self._finish(trainer, output, before, start, after, peak, whole))

    def _record(self) -> dict[str, Any]:
        """What the users of the run need besides: where its paths lead. Its held-out rows are written with it."""
        record: dict[str, Any] = {"paths": run_folder.paths_of(self.config, self.folder)}
        file = self.folder / run_folder.HELD_OUT_NAME
        if self.config.data.keep_held_out and (rows := write_held_out(file, self.prepared)):
            record["held_out"] = {"rows": rows, "vocabulary": vocabulary_digest(self.tokenizer)}
        else:
            file.unlink(missing_ok=True)
        if self.system is not None:
            record["system"] = self.system._asdict()
        return record

    def _trainer(self) -> SFTTrainer:
        callbacks: list[TrainerCallback] = [MetricsFile(self.folder / "metrics.jsonl"), *self.callbacks]
        patience = self.config.training_config.get("early_stopping_patience")
        if patience:
            callbacks.append(EarlyStoppingCallback(int(patience)))
        trainer = SFTTrainer(
            self.model,
            args=self.arguments,
            train_dataset=self.prepared.train,
            eval_dataset=self.prepared.eval,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
        trainer.stop, trainer.places = self.stop, self._places
        trainer.remove_callback(PrinterCallback)  # `display` shows the progress
        trainer.remove_callback(ProgressCallback)
        # TRL and the callbacks of transformers see the metrics after our file has added to them.
        handler = trainer.callback_handler
        handler.callbacks.sort(key=lambda each: not isinstance(each, MetricsFile))
        return trainer

    def _places(self, examples: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Of each example, by its tokens: its row of the prepared data, its conversation, its file and line."""
        rows: dict[int, int] = {}
        if not self.prepared.report.streaming:
            for number, row in enumerate(self.prepared.train):
                for place, ids in enumerate(examples):
                    if place not in rows and row["input_ids"][: len(ids)] == list(ids):
                        rows[place] = number
        conversations = self.prepared.train_conversations
        texts = {place: conversations.stored(number) for place, number in rows.items()}
        sources = places_of(self.config.data, set(texts.values())) if texts else {}
        return [
            {
                "source": sources.get(texts[place]),
                "prepared_row": rows[place],
                "conversation": conversations[rows[place]],
            }
            if place in rows
            else {}
            for place in range(len(examples))
        ]

    def _save_adapter(self, weights: Mapping[str, Any] | None = None) -> None:
        """Write `adapter/` whole: weights, config, slices, tokenizer, generation config, card."""
        with checkpoint.whole_folder(self.folder / "adapter") as folder:
            self.model.save_pretrained(str(folder), state_dict=weights)
            sort_names(folder / "adapter_config.json")
            if not (folder / RECORD_NAME).exists():
                checkpoint.write_json(folder / RECORD_NAME, {"format": 1, "slices": {}})
            self.tokenizer.save_pretrained(str(folder))
            generation = self.model.get_base_model().generation_config
            if generation is not None:
                generation.save_pretrained(str(folder))
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        """The card of the adapter, with the results when they are there."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = self.config.model.name_or_path
        text = model_card("adapter", run=self.folder, base=base, adapter_config=config, system=self.system)
        checkpoint.write_text(folder / "README.md", text)

    def aim(self) -> None:
        """See to it that the adapter can be pushed when it is done; in the process that will do it."""
        self.target = pushing.target_of(self.config)

    def _push(self) -> None:
        if self.target is None:
            return
        repo_id, private, token = self.target
        try:
            url = pushing.push(self.folder, repo_id, private=private, token=token).url
        except PhiloraError as error:
            todo = f"The run is whole in {self.folder}; push it with: philora push {self.folder} {repo_id}"
            raise RunError(f"{error} {todo}") from None
        logger.info("pushed: %s", url)

    # -- evaluation and what is written at the end

    def _saved(self) -> PeftModel:
        """The adapter as it was saved, on a base that is whole in each process."""
        unset_hf_deepspeed_config()  # with it transformers would shard what it loads
        base = models.load_model(self.config.model, self.tokenizer)
        return self._placed(load_adapter(base, str(self.folder / "adapter")))

    def _placed(self, model: PeftModel) -> PeftModel:
        """On this process's device, unless it was put where it stays; the trainer moves it only when it trains."""
        quantised = getattr(model.get_base_model(), "quantization_method", None) is not None
        stays = quantised or self.config.model.device_map is not None
        return model if stays else cast(PeftModel, model.to(self.arguments.device))

    def _evaluate(self, when: str, model: PeftModel) -> Evaluation | None:
        settings = self.config.evaluation
        if self.prepared.eval is None or self.prepared.eval_conversations is None:
            return None
        rows = self.prepared.eval
        conversations = [prompts_and_references(each) for each in self.prepared.eval_conversations[: settings.generate]]
        logger.info("evaluating %s: %d rows, %d answers", when, len(rows), len(conversations))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(self.arguments.bf16)):
            part = evaluate(
                model,
                self.tokenizer,
                rows.select(processes.share(len(rows))),
                [conversations[each] for each in processes.share(len(conversations))],
                GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size),
                pad_token_id=cast(int, self.tokenizer.pad_token_id),
            )
        result = joined(processes.gathered(part))
        scores = result.scores
        name = when.removesuffix(" training")
        logger.info("%s: loss %.4f, token accuracy %.3f", name, scores.loss, scores.token_accuracy)
        return result

    def _data_facts(self) -> dict[str, Any]:
        """What tells the data again and shows it: fingerprint, lengths, and one example with its labels."""
        lengths = sequence_lengths(self.prepared.train)
        counts, edges = np.histogram(lengths, bins=min(24, max(1, len(np.unique(lengths)))))
        example = None if self.prepared.report.streaming else next(iter(self.prepared.train), None)
        return {
            "fingerprint": self.prepared.fingerprint,
            "lengths": {
                "edges": edges.tolist(),
                "counts": counts.tolist(),
                "median": float(np.median(lengths)),
            }
            if len(lengths)
            else None,
            "preview": preview(self.tokenizer, example)[:PREVIEW_TOKENS] if example is not None else [],
        }

    def _finish(
        self,
        trainer: SFTTrainer,
        output: Any,
        before: Evaluation | None,
        start: Evaluation | None,  # with the adapter that the run began with, if it began with one
        after: Evaluation | None,
        peak_bytes: int,
        whole: PeftModel,  # what was trained, with nothing of it sharded
    ) -> RunResult:
        metrics = dict(output.metrics)
        tokens, seconds = trainer.trained_tokens, float(metrics["train_runtime"])
        covered, updates = coverage(self.model), [each._asdict() for each in update_norms(whole)]
        comparison = compare(before, after) if before and after else []
        steps = trainer.state.global_step
        judgement = outlook.judge(comparison, trainer.state.log_history, steps=steps, updates=updates)
        for sentence in judgement.sentences:
            logger.warning("%s", sentence)
        results: dict[str, Any] = {
            "philora": philora.__version__,
            "versions": versions(),
            "command": self.command,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "duration_seconds": round(time.monotonic() - self.since, 1),  # the clock may be set meanwhile
            "model": {
                "name": self.config.model.name_or_path,
                "dtype": str(self.model.get_base_model().dtype).removeprefix("torch."),
                "parameters": covered.total_parameters - covered.trainable_parameters,
            },
            "coverage": {
                "rows": [row._asdict() for row in covered.rows],
                "trainable_parameters": covered.trainable_parameters,
                "total_parameters": covered.total_parameters,
            },
            "data": self.prepared.report.to_dict() | self._data_facts(),
            "system": None if self.system is None else self.system._asdict(),
            "updates": updates,
            "before": before.scores.to_dict() if before else None,
            "start": start.scores.to_dict() if start else None,
            "after": after.scores.to_dict() if after else None,
            "comparison": [each.to_dict() for each in comparison],
            "comparison_with_start": _since_the_start(start, after) if start and after else [],
            "judgement": judgement.to_dict(),
            "samples": pick_samples(before, after, self.config.evaluation.samples) if before and after else [],
            "throughput": {
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
                "steps": steps,
            },
            "processes": processes.count(),
            "plan": self.plan.to_dict(),
            "memory": {"peak_bytes": peak_bytes, "estimated_bytes": self.plan.estimate.to_dict()},
            "train_loss": metrics.get("train_loss"),
        }
        checkpoint.write_json(self.folder / "train_results.json", metrics)
        evaluated = {f"eval_{key}": value for key, value in (after.scores.to_dict() if after else {}).items()}
        checkpoint.write_json(self.folder / "eval_results.json", evaluated)
        checkpoint.write_json(self.folder / "results.json", results)
        self._write_card(self.folder / "adapter")
        if before and after and self.config.data.keep_held_out:
            every_answer = pick_samples(before, after, len(after.samples))
            checkpoint.write_text(self.folder / ANSWERS_NAME, answer_lines(every_answer))
        write_report(self.folder)
        logger.info("the run is complete: %s", self.folder)
        self._push()
        return RunResult(self.folder, results)


def logging_steps(config: Config, steps: int | None) -> float:
    """Return the steps between log lines: few enough for a curve of `CURVE_POINTS`, where nobody asked for a number."""
    given: float = config.training_config["logging_steps"]
    if config.origins.get("training_config.logging_steps", "default") != "default" or steps is None:
        return given
    return min(given, max(1, steps // CURVE_POINTS))


def _since_the_start(start: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Compare a run with the adapter that it began with, and warn of what got worse."""
    figures = compare(start, after)
    worse = [each.title for each in figures if each.verdict == "worse"]
    if worse:
        logger.warning("worse than the adapter that the run began with: %s", ", ".join(worse))
    return [each.to_dict() for each in figures]


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    names = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


__all__ = ["Interrupted", "RunResult", "train", "versions"]
