"""Compare a trained adapter with its base on rows that it was not trained on, for `philora evaluate`.

    run or adapter -> the held-out rows that the run kept, without those of the training set
                   -> the base, then the adapter: loss of every row, answers, and a forgetting check
                   -> figures with intervals, wins, ties and losses -> results.json, examples.jsonl

Both models see the same rows and prompts. Every figure can be traced to the lines of `examples.jsonl` that it is
computed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import philora
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import prompts_and_references
from philora.dataset.held_out import HeldOut, held_out, read_held_out, vocabulary_digest
from philora.errors import ConfigError, DataError, RunError, fault, one_per_line
from philora.evaluation import measures
from philora.evaluation.measures import JUDGE, LOSS, PERPLEXITY, Measure, Paired, of_means, paired
from philora.evaluation.scores import Evaluation, RowScores, compare, score_rows
from philora.evaluation.scores import evaluate as evaluate_model
from philora.files.checkpoint import new_folder, write_json, write_text
from philora.generation.batches import GenerationSettings, generate
from philora.generation.inference import Loaded, load
from philora.models import loading as models
from philora.models.run_folder import HELD_OUT_NAME, TrainedRun, recorded_eval_rows

logger = logging.getLogger("philora.evaluate")

ANSWERS = 200
"""Conversations that get an answer by default."""

NAMED = 10
"""Most training rows that a notice names."""

FORGETTING_TOKENS = 64
"""Length limit of an answer in the forgetting check."""

FORGETTING_CORRECT = Measure("forgetting_correct", "General prompts, correct", True, True, measures.mean)


@dataclass(frozen=True)
class Assessment:
    """The result of an evaluation.

    Attributes:
        folder: Where `results.json` and `examples.jsonl` are.
        results: The content of `results.json`.
        figures: Figures of base and adapter on the held-out rows.
        forgetting: Figures on the general prompts and texts; empty if they were left out.
    """

    folder: Path
    results: dict[str, Any]
    figures: list[Paired]
    forgetting: list[Paired]


def evaluate(
    source: str | Path,
    *,
    data: str | Path | None = None,
    base: str | None = None,
    generation: Mapping[str, Any] | None = None,
    answers: int | None = None,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    judge: str | None = None,
    forgetting: bool = True,
    keep_training_rows: bool = False,
    out: str | Path | None = None,
    command: str = "",
) -> Assessment:
    """Compare an adapter with its base.

    Args:
        source: A run folder, a checkpoint, an adapter folder or a hub id.
        data: Rows to score; default: those that the run held out.
        base: Base model; default: the one of the run or the adapter.
        generation: Fields of `GenerationSettings`; by default answers are greedy, with the run's limits.
        answers: Number of conversations to answer, from the first; default: as in the run, else `ANSWERS`; 0 for none.
        limit: Most rows to score, from the first.
        metrics: Some of `rouge`, `bleu` and `chrf`; default: those whose package is installed.
        judge: Command that scores answers, see `judged`.
        forgetting: Score the bundled general prompts and texts as well.
        keep_training_rows: Also score rows of the training set; by default they are left out and named.
        out: Folder for the results; default: `evaluation` in the run folder; `evaluation-checkpoint-N` of a checkpoint.
        command: The command that the results record.

    Raises:
        AdapterError, ModelError: There is no adapter, or its base cannot be loaded.
        DataError: There is no row to score, the data differs from the run's, or records cannot be used.
        ConfigError: A measure is unknown or its package missing, or `out` is missing or not a folder to write to.
        RunError: The judge failed.
    """
    started = time.monotonic()
    _check_judge(judge)
    names = _chosen(metrics)
    loaded = load(source, base=base)
    folder, settings = _folder(loaded, out), _settings(loaded, generation or {})
    found = held_out_of(loaded, data)
    kept = rows_to_score(found, limit, keep_training_rows)
    asked = _asked(loaded, found, kept, answers)
    before, after, general = _both_models(loaded, found, kept, asked, settings, forgetting)
    examples = _examples(found, kept, asked, before, after)
    figures = compare(before, after) + _overlap(names, before, after, examples)
    if judge is not None and after.samples:
        figures.append(_judged(judge, examples))
    kept_knowledge = _forgetting(*general) if general else []
    results = {
        **_conditions(source, data, command, loaded, settings),
        "rows": len(kept),
        "training_rows_left_out": 0 if keep_training_rows else len(found.in_training or ()),
        "training_rows_known": found.in_training is not None,
        **_scores(before, after, figures, kept_knowledge),
        "seconds": round(time.monotonic() - started, 1),
    }
    return Assessment(folder, _write(folder, results, examples), figures, kept_knowledge)


def _chosen(names: Sequence[str] | None) -> list[str]:
    """Return the metrics to compute, and warn of those whose package is missing."""
    chosen, missing = measures.choose(names)
    for name in missing:
        logger.warning("%s is left out: its package is not installed (%s)", name, measures.INSTALL)
    return chosen


def _conditions(
    source: str | Path, data: str | Path | None, command: str, loaded: Loaded, settings: GenerationSettings
) -> dict[str, Any]:
    """Return what was evaluated and with what, as `results.json` has it."""
    return {
        "philora": philora.__version__,
        "versions": _versions(),
        "command": command,
        "source": str(source),
        "adapter": _adapter_in_run(loaded),
        "base": loaded.base,
        "data": str(data) if data is not None else "held out by the run",
        "settings": dataclasses.asdict(settings),
    }


def _scores(
    before: Evaluation, after: Evaluation, figures: Sequence[Paired], forgetting: Sequence[Paired]
) -> dict[str, Any]:
    """Return the scores of both models as `results.json` has them."""
    return {
        "answers": len(after.samples),
        "too_long": after.too_long,
        "before": before.scores.to_dict(),
        "after": after.scores.to_dict(),
        "comparison": [measure.to_dict() for measure in figures],
        "forgetting": [measure.to_dict() for measure in forgetting],
    }


def _asked(loaded: Loaded, found: HeldOut, kept: Sequence[int], answers: int | None) -> list[int]:
    """Return the rows that get an answer."""
    if answers is None:
        answers = loaded.run.evaluation.generate if loaded.run is not None else ANSWERS
    answerable = set(found.answerable)
    return [row for row in kept if row in answerable][:answers]


def _both_models(
    loaded: Loaded,
    found: HeldOut,
    kept: Sequence[int],
    asked: Sequence[int],
    settings: GenerationSettings,
    forgetting: bool,
) -> tuple[Evaluation, Evaluation, list[_General]]:
    """Evaluate the base, then the adapter, on the same rows and prompts; with `forgetting` also on general ones."""
    rows = found.rows.select(kept)
    conversations = [prompts_and_references(found.conversations[row]) for row in asked]
    logger.info("evaluating %d rows, %d answers", len(kept), len(conversations))
    tokenizer, pad = loaded.tokenizer, cast(int, loaded.tokenizer.pad_token_id)
    evaluations, general = [], []
    for name in ("base", "adapter"):
        with loaded.model.disable_adapter() if name == "base" else contextlib.nullcontext():
            evaluation = evaluate_model(loaded.model, tokenizer, rows, conversations, settings, pad_token_id=pad)
            logger.info("%s: loss %.4f, %.0f s", name, evaluation.scores.loss, evaluation.seconds)
            evaluations.append(evaluation)
            if forgetting:
                general.append(_general(loaded))
    before, after = evaluations
    return before, after, general


def _write(folder: Path, results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write results and examples; return the results as they are read back."""
    lines = "".join(json.dumps(example, ensure_ascii=False, allow_nan=False) + "\n" for example in examples)
    with new_folder(folder) as temporary:
        write_json(temporary / "results.json", dict(results))
        write_text(temporary / "examples.jsonl", lines)
    return cast("dict[str, Any]", json.loads((folder / "results.json").read_text("utf-8")))


# -- rows


def _folder(loaded: Loaded, out: str | Path | None) -> Path:
    """Return the folder for the results, and check it before anything is computed."""
    if out is None and loaded.run is None:
        expected = "a folder for the results, because the adapter is not in a run folder"
        raise ConfigError(fault("evaluate", "out", None, expected, "Give --out DIR"))
    if out is None:  # in the run; the report shows the evaluation of the run's final adapter
        name = loaded.source.path.absolute().name
        own = "evaluation" if name == "adapter" else f"evaluation-{name}"
        folder = cast(TrainedRun, loaded.run).folder / own
    else:
        folder = Path(out).expanduser()
    ours: tuple[set[str], ...] = (set(), {"results.json", "examples.jsonl"})
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} in ours):
        expected = "a new or empty folder, or one with an earlier evaluation"
        raise ConfigError(fault("evaluate", "out", str(folder), expected, "Give another --out"))
    return folder


def _adapter_in_run(loaded: Loaded) -> str | None:
    """Return the path of the evaluated adapter in its run folder; None for an adapter without a run."""
    if loaded.run is None:
        return None
    return loaded.source.path.absolute().relative_to(loaded.run.folder.absolute()).as_posix()


def _settings(loaded: Loaded, given: Mapping[str, Any]) -> GenerationSettings:
    own: dict[str, Any] = {}
    if loaded.run is not None:
        limits = loaded.run.evaluation
        own = {"max_new_tokens": limits.max_new_tokens, "batch_size": limits.batch_size}
    return GenerationSettings(**(own | dict(given)))


def held_out_of(loaded: Loaded, data: str | Path | None) -> HeldOut:
    """Return the rows to score: those of a file, else those in the run folder, else those split again from its data.

    Raises:
        DataError: There are none, the run's data is missing or has changed, or a source cannot be used.
        ConfigError: A setting in the needed sections of the run's configuration is not valid.
    """
    run = loaded.run
    if run is None and data is None:
        expected = "rows to score: an adapter outside a run folder has no held-out rows"
        raise DataError(fault("evaluate", "data", None, expected, "Give --data FILE"))
    found = _kept_rows(loaded) if data is None else None
    if found is None:
        found = _rows_of_sources(loaded, data)
    if found.in_training is None:
        logger.warning("whether these rows are in the training set is not known")
    return found


def _kept_rows(loaded: Loaded) -> HeldOut | None:
    """Return the rows of `held_out.jsonl`; None, with a warning, if they must be taken from the data again."""
    run = cast(TrainedRun, loaded.run)
    file, recorded = run.folder / HELD_OUT_NAME, run.record.get("held_out")
    if not file.is_file():
        if run.holds_out:
            logger.warning("%s has no %s: its rows are taken from its data again", run.folder, HELD_OUT_NAME)
        return None
    vocabulary = recorded.get("vocabulary") if isinstance(recorded, Mapping) else None
    if vocabulary is not None and vocabulary != vocabulary_digest(loaded.tokenizer):
        logger.warning("%s was written with another tokenizer: its rows are taken from the data again", file)
        return None
    return read_held_out(file, loaded.tokenizer, _recorded_fingerprint(run.folder))


def _rows_of_sources(loaded: Loaded, data: str | Path | None) -> HeldOut:
    """Read and tokenise the rows of a file, or those that the run held out of its data."""
    other = SourceConfig(path=str(data)) if data is not None else None
    base = loaded.model.get_base_model()
    stops = models.stop_token_ids(loaded.tokenizer, getattr(base.generation_config, "eos_token_id", None))
    run, plain = loaded.run, DataConfig(train=(), eval=None)
    if run is None:
        window = int(getattr(base.config, "max_position_embeddings", 2**20))
        return held_out(plain, loaded.tokenizer, max_length=window, seed=0, stop_token_ids=stops, other=other)
    try:
        of_the_run = run.data()
    except ConfigError as error:
        if other is None:
            expected = f"{HELD_OUT_NAME} in the run folder, or the data that the run held its rows out of"
            missing = fault("evaluate", "data", str(run.folder), expected, "Give rows: --data FILE")
            raise DataError(one_per_line([missing, *(line.strip() for line in str(error).splitlines())])) from error
        of_the_run = plain
    found = held_out(
        of_the_run,
        loaded.tokenizer,
        max_length=_longest_row(run, base.config),
        seed=run.seed,
        stop_token_ids=stops,
        other=other,
        recorded_rows=recorded_eval_rows(run.record),
    )
    recorded = _recorded_fingerprint(run.folder)
    if other is None and None not in (recorded, found.fingerprint) and recorded != found.fingerprint:
        expected = "the data that the run was trained with; it has changed, so the held-out rows are not known"
        todo = "Restore the data, or give other rows: --data FILE"
        raise DataError(fault("evaluate", "data", [entry.path for entry in of_the_run.train], expected, todo))
    return found


def _longest_row(run: TrainedRun, model_config: Any) -> int:
    """Return the row length in tokens as in the run: the setting, within the limits of model and tokenizer."""
    context = int(getattr(model_config, "max_position_embeddings", run.max_length or 2**20))
    limit = min(context, run.tokenizer.model_max_length or context)
    return min(run.max_length or limit, limit)


def _recorded_fingerprint(run: Path) -> str | None:
    """Return the fingerprint of the data in `results.json`; None for a run that has not ended."""
    try:
        data = json.loads((run / "results.json").read_text(encoding="utf-8")).get("data", {})
    except (OSError, ValueError):
        return None
    return data.get("fingerprint") if isinstance(data, dict) else None


def rows_to_score(found: HeldOut, limit: int | None, keep_training_rows: bool) -> list[int]:
    """Return the indices of the rows to score; name rows of the training set in a warning."""
    trained = set(found.in_training or ())
    if trained:
        named = [f"row {row + 1} ({_begins(found.conversations[row])})" for row in sorted(trained)[:NAMED]]
        more = f" and {len(trained) - NAMED} more" if len(trained) > NAMED else ""
        what = "are scored as requested" if keep_training_rows else "are left out"
        logger.warning("rows of the training set %s: %s%s", what, ", ".join(named), more)
    kept = [row for row in range(len(found.rows)) if keep_training_rows or row not in trained][:limit]
    if not kept:
        expected = "at least one row that is not in the training set"
        raise DataError(fault("evaluate", "rows", 0, expected, "Give other rows, or --keep-training-rows"))
    return kept


def _begins(conversation: Sequence[Mapping[str, Any]]) -> str:
    text = " ".join(next((str(entry["content"]) for entry in conversation if entry["role"] == "user"), "").split())
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _examples(
    found: HeldOut, kept: Sequence[int], asked: Sequence[int], before: Evaluation, after: Evaluation
) -> list[dict[str, Any]]:
    """Return an entry for every row: its loss by both models and, if it was asked, their answers."""
    samples = {}
    fitting = [{sample.question: sample for sample in side.samples} for side in (before, after)]
    for row in asked:
        key = repr(prompts_and_references(found.conversations[row]))
        if all(key in side for side in fitting):
            samples[row] = fitting[0][key], fitting[1][key]
    trained = set(found.in_training or ())
    examples = []
    for row, old, new in zip(kept, before.rows, after.rows, strict=True):
        entry: dict[str, Any] = {"row": row + 1, "label_tokens": new.label_tokens}
        if row in trained:
            entry["in_training"] = True
        if row in samples:
            entry |= {"prompt": samples[row][0].prompt, "reference": samples[row][0].reference}
        for name, sums, sample in zip(("base", "adapter"), (old, new), samples.get(row, (None, None)), strict=True):
            count = sums.label_tokens
            entry[name] = {
                "loss": sums.loss / count if count and math.isfinite(sums.loss) else None,
                "token_accuracy": sums.correct / count if count else None,
            }
            if sample is not None:
                entry[name] |= {
                    "answer": sample.answer,
                    "exact_match": float(sample.matched),
                    "tokens": sample.tokens,
                    "stopped": sample.stopped,
                }
        examples.append(entry)
    return examples


def _overlap(
    names: Sequence[str], before: Evaluation, after: Evaluation, examples: Sequence[dict[str, Any]]
) -> list[Paired]:
    """Compute ROUGE, BLEU and chrF of both models' answers, and add them to the examples."""
    references = [sample.reference for sample in after.samples]
    sides = [
        measures.overlap(names, [sample.answer for sample in entry.samples], references) for entry in (before, after)
    ]
    answered: dict[str, list[dict[str, Any]]] = {}  # by question; equal questions are in several rows
    for entry in examples:
        if "prompt" in entry:
            answered.setdefault(repr((entry["prompt"], entry["reference"])), []).append(entry)
    for name, evaluation, side in zip(("base", "adapter"), (before, after), sides, strict=True):
        for index, sample in enumerate(evaluation.samples):
            figures = {measure.field: round(measure.figure(sums[index]), 4) for measure, sums in side}
            for entry in answered[sample.question]:
                entry[name] |= figures
    return [paired(measure, old, new) for (measure, old), (_, new) in zip(*sides, strict=True)]


# -- a judge


def judged(command: str, questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the scores of answers by a command.

    On standard input the command gets a line of JSON for every answer, with `id`, `prompt` (messages), `reference` and
    `answer`. On standard output it writes a line of JSON for every answer, with `id` and `score`, in any order; a
    higher score is better. The lines do not tell which model has answered.

    Args:
        command: The command, split as by a shell but run without one.
        questions: Mappings with the four keys.

    Raises:
        ConfigError: The command cannot be started.
        RunError: It failed, or did not give every answer exactly one finite score.
    """
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    try:
        words = shlex.split(command)
        done = subprocess.run(words, input=lines, capture_output=True, encoding="utf-8", check=False)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(fault("evaluate", "judge", command, f"a command that can be started ({error})")) from error
    if done.returncode:
        expected = f"a command that ends with 0, not {done.returncode}"
        raise RunError(fault("evaluate", "judge", command, expected, f"Its output: {done.stderr.strip()[-300:]}"))
    wanted = {str(question["id"]) for question in questions}
    scores: dict[str, float] = {}
    for number, line in enumerate(done.stdout.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key, score = str(entry["id"]), float(entry["score"])
        except (ValueError, KeyError, TypeError) as error:
            expected = "JSON with an id and a score"
            raise RunError(fault(f"judge's line {number}", "line", line[:80], expected)) from error
        if key not in wanted or key in scores or not math.isfinite(score):
            expected = "the id of an answer that has no score yet, and a finite number"
            raise RunError(fault(f"judge's line {number}", "line", line[:80], expected))
        scores[key] = score
    if len(scores) < len(wanted):
        expected = f"a score for each of {len(wanted)} answers"
        raise RunError(fault("evaluate", "judge", len(scores), expected, f"Without one: {min(wanted - scores.keys())}"))
    return scores


def _check_judge(command: str | None) -> None:
    """Refuse a judge that cannot be started, before any model answers."""
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(fault("evaluate", "judge", command, "a command that can be started"))


def _judged(command: str, examples: Sequence[dict[str, Any]]) -> Paired:
    """Let the judge score the answers of both models in random order, and add the scores to the examples."""
    answered = [entry for entry in examples if "prompt" in entry]
    answers = [(entry, name) for entry in answered for name in ("base", "adapter")]
    order = random.Random(measures.SEED).sample(answers, len(answers))
    questions = [
        {"id": str(place), **{key: entry[key] for key in ("prompt", "reference")}, "answer": entry[name]["answer"]}
        for place, (entry, name) in enumerate(order)
    ]
    scores = judged(command, questions)
    for place, (entry, name) in enumerate(order):
        entry[name]["judge"] = scores[str(place)]
    return paired(JUDGE, *(of_means([entry[name]["judge"] for entry in answered]) for name in ("base", "adapter")))


# -- forgetting


class _General(NamedTuple):
    """A model's results on the bundled general texts and prompts."""

    losses: list[RowScores]
    correct: list[float]


def _bundled(name: str) -> list[dict[str, Any]]:
    text = (resources.files("philora") / "evaluation" / "forgetting" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def is_accepted(answer: str, accept: Sequence[str], case: bool = False) -> bool:
    """Return whether one of the accepted words is in an answer as a separate word.

    Example:
        >>> is_accepted("It is Paris.", ["paris"]), is_accepted("100", ["0"])
        (True, False)
    """
    flags = 0 if case else re.IGNORECASE
    return any(re.search(rf"(?<!\w){re.escape(entry)}(?!\w)", answer, flags) for entry in accept)


def _general(loaded: Loaded) -> _General:
    """Compute the loss on every token of the texts, and the answers to the prompts."""
    tokenizer = loaded.tokenizer
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = []
    for entry in _bundled("texts.jsonl"):
        ids = [*first, *tokenizer(entry["text"], add_special_tokens=False)["input_ids"]]
        rows.append({"input_ids": ids, "labels": ids})
    prompts = _bundled("prompts.jsonl")
    losses = score_rows(loaded.model, rows, pad_token_id=cast(int, tokenizer.pad_token_id))
    conversations = [[{"role": "user", "content": prompt["prompt"]}] for prompt in prompts]
    answers = generate(loaded.model, tokenizer, conversations, GenerationSettings(max_new_tokens=FORGETTING_TOKENS))
    correct = [
        float(is_accepted(answer.text, prompt["accept"], bool(prompt.get("case"))))
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    return _General(losses, correct)


def _forgetting(before: _General, after: _General) -> list[Paired]:
    losses = [
        of_means([row.loss for row in entry.losses], [row.label_tokens for row in entry.losses])
        for entry in (before, after)
    ]
    text_loss = dataclasses.replace(LOSS, field="forgetting_loss", title="Plain text, loss")
    perplexity = dataclasses.replace(PERPLEXITY, field="forgetting_perplexity", title="Plain text, perplexity")
    found = [paired(text_loss, *losses), paired(perplexity, *losses)]
    found.append(paired(FORGETTING_CORRECT, of_means(before.correct), of_means(after.correct)))
    worse = [entry.title for entry in found if entry.verdict == "worse"]
    if worse:
        logger.warning("forgetting: with the adapter the model is worse at %s", ", ".join(worse))
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "rouge-score", "sacrebleu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
