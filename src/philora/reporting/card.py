"""Write the model card of an adapter or a merged model: how it was trained, its results, and how to load it."""

from __future__ import annotations

import html
import json
import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from philora import __version__
from philora.configuration.reader import read_yaml
from philora.errors import ConfigError
from philora.evaluation.measures import Paired
from philora.evaluation.scores import Scores, compare_table, interval_of, shown_figure, stage_table
from philora.files.checkpoint import read_json
from philora.models.loading import local_path
from philora.models.locate import licence
from philora.models.run_folder import SystemTurn, example_messages
from philora.reporting.answers import prompt_of, text_of
from philora.reporting.formatting import SECRETS
from philora.reporting.run_record import paired_figures

logger = logging.getLogger("philora.run")

EXAMPLE_CHARACTERS = 400
"""Most characters of a text in the card's example."""

_TAGS: Final = ("philora", "lora", "sft", "trl")
# The settings that a card shows; config.yaml has all of them.
_TRAINING: Final = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_length", "packing", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "optim", "seed",
)  # fmt: skip
_METRICS: Final = {"loss": "Loss", "token_accuracy": "Token accuracy", "exact_match": "Exact match"}


def model_card(
    folder: str,
    *,
    run: Path | None,
    base: str | None,
    adapter_config: Mapping[str, Any],
    merged: bool = False,
    tokenizer: bool = True,
    system: SystemTurn | None = None,
    example: bool = True,
) -> str:
    """Return the text of a README.md with the Hub's metadata.

    Args:
        folder: The repository or path that the usage code loads.
        run: The run folder, for data, settings and results; without it the card has only the adapter's configuration.
        base: The base as a hub id, `nano` or a folder; only the last part of a folder is shown.
        adapter_config: Content of `adapter_config.json`.
        merged: Whether the adapter is merged into the weights.
        tokenizer: Whether the folder has a tokenizer; without one the usage code loads the base's.
        system: The system turn that the training conversations began with; the usage code starts with it.
        example: Show a held-out question with its answers; False for a published card, since it is part of the data.
    """
    settings = _settings(run)
    results = read_json(run / "results.json") if run is not None else {}
    named = _shown(base)
    title = folder.rstrip("/").rpartition("/")[2] if not Path(folder).is_absolute() else Path(folder).name
    what = "with a LoRA adapter merged into its weights" if merged else "with this LoRA adapter"
    parts = [
        f"# {_plain(title)}",
        f"{_plain(named)} {what}, fine-tuned with [philora](https://pypi.org/project/philora/) {__version__}.",
        _usage(folder, base, merged, tokenizer, system),
        _results(results),
        _example(results) if example else "",
        _data(settings, results),
        _hyperparameters(settings, adapter_config, _trained(run, results)),
        _versions(results),
    ]
    data = ModelCardData(
        base_model=base if base is not None and _on_hub(base) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        license=licence(base),
        tags=[*_TAGS, *(["merged"] if merged else [])],
        datasets=[source for source in _sources(settings) if _on_hub(source)] or None,
        **_evaluated(title, settings, results),
    )
    body = "\n\n".join(part for part in parts if part)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    return str(SECRETS.sub("***", card.content))


def _plain(value: object) -> str:
    """Return a value as one line of Markdown text, with HTML, links, code and table separators escaped."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _settings(run: Path | None) -> dict[str, Any]:
    """Return the sections of a run's configuration; empty, with a warning, if it cannot be read."""
    if run is None or not (run / "config.yaml").is_file():
        return {}
    try:
        given = read_yaml(run / "config.yaml")
    except ConfigError as error:
        logger.warning("the card has no settings: %s", error)
        return {}
    return {name: section for name, section in given.items() if isinstance(section, Mapping)}


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).expanduser().exists() and not name.startswith((".", "/", "~"))


def _shown(name: str | None) -> str:
    """Return a name without the folders of this machine."""
    if name is None:
        return "a base model"
    if name == local_path("nano"):
        return "nano"
    return name if _on_hub(name) else Path(name).name


def _usage(folder: str, base: str | None, merged: bool, tokenizer: bool, system: SystemTurn | None) -> str:
    nano = _shown(base) == "nano"
    name = json.dumps(base if base and _on_hub(base) else f"path/to/{_shown(base)}", ensure_ascii=False)
    name = 'local_path("nano")' if nano else name
    repository = json.dumps(folder, ensure_ascii=False)
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if merged:
        model = f'model = AutoModelForCausalLM.from_pretrained({repository}, dtype="auto")'
    else:
        imports = "from peft import PeftModel\n" + imports
        imports += "\n\nfrom philora.models import local_path" if nano else ""
        model = f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")\n'
        model += f"model = PeftModel.from_pretrained(base, {repository})"
    source = repository if tokenizer or merged else name
    return f"""## Use

```python
{imports}

tokenizer = AutoTokenizer.from_pretrained({source})
{model}

messages = {example_messages(system)}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`generation_config.json` has the tokens at which an answer ends; `stop_tokens.json` has them for servers."""


def _results(results: Mapping[str, Any]) -> str:
    """Return the held-out figures, with intervals and the number of rows if the run recorded them."""
    if not results.get("before") or not results.get("after"):
        return ""
    before, after = Scores.from_dict(results["before"]), Scores.from_dict(results["after"])
    figures = paired_figures(results.get("comparison"))
    columns: tuple[str, ...] = ("", "base", "fine-tuned", "change")
    rows: Sequence[tuple[str, ...]] = compare_table(before, after)
    note = "On held-out data:"
    if results.get("start"):
        columns = ("", "base", "the adapter it started from", "fine-tuned", "change from the start")
        rows = stage_table(before, Scores.from_dict(results["start"]), after)
    elif figures:
        columns = ("", "base", "fine-tuned", "change, 95% interval", "n")
        rows = [_figure_row(figure) for figure in figures]
        note = "On held-out data; n is the number of rows or answers of a figure:"
    head = "|" + "|".join(f" {column} " if column else " " for column in columns) + "|"
    lines = ["## Results", "", note, "", head, "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _figure_row(figure: Paired) -> tuple[str, ...]:
    before, after = (shown_figure(value, figure) for value in (figure.before, figure.after))
    return figure.title, before, after, interval_of(figure).replace("[", "(").replace("]", ")"), f"{figure.examples:,}"


def _example(results: Mapping[str, Any]) -> str:
    """Return one held-out question with the answers of base and adapter."""
    sample = next((item for item in results.get("samples") or [] if isinstance(item, Mapping)), None)
    asked = [message["content"] for message in prompt_of(sample or {}) if message["role"] == "user"]
    if sample is None or not asked:
        return ""
    texts = {"Question": asked[-1], "Base": sample.get("base"), "Fine-tuned": sample.get("adapter")}
    texts["Reference"] = sample.get("reference")
    shorter = {title: textwrap.shorten(text_of(text), EXAMPLE_CHARACTERS) for title, text in texts.items() if text}
    shown = [f"- {title}: {_plain(text)}" for title, text in shorter.items()]
    return "\n".join(["## Example", "", "A question that was held out:", "", *shown])


def _sources(settings: Mapping[str, Any]) -> list[str]:
    train = (settings.get("data") or {}).get("train")
    entries = train if isinstance(train, list) else [train]
    return [str(entry["path"] if isinstance(entry, Mapping) else entry) for entry in entries if entry]


def _data(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    named = ", ".join(_plain(_shown(source)) for source in _sources(settings))
    figures = (results.get("data") or {}).get("train") or {}
    if not named:
        return ""
    titles = {"rows": "conversations", "tokens": "tokens"}
    counted = [f"{int(figures[key]):,} {text}" for key, text in titles.items() if figures.get(key)]
    return f"## Data\n\n{named}" + (f": {', '.join(counted)}." if counted else ".")


def _trained(run: Path | None, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps and epochs of the training; the settings may only limit them."""
    state = read_json(run / "trainer_state.json") if run is not None else {}
    steps = (results.get("throughput") or {}).get("steps") or state.get("global_step")
    found = {"steps, as trained": f"{int(steps):,}"} if steps else {}
    return found | ({"epochs, as trained": f"{float(state['epoch']):.3g}"} if state.get("epoch") else {})


def _hyperparameters(settings: Mapping[str, Any], adapter_config: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """Return the table of settings that repeat the training."""
    training = settings.get("training_config") or {}
    rows = dict(trained)
    left_out = {"num_train_epochs", "max_steps"} if trained else set()
    rows |= {name: training[name] for name in _TRAINING if training.get(name) is not None and name not in left_out}
    model = settings.get("model") or {}
    rows |= {name: model[name] for name in ("dtype", "quantization") if model.get(name) not in (None, "none")}
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save"):
        value = (settings.get("peft_config") or {}).get(name, adapter_config.get(name))
        if value not in (None, False):
            rows[name] = value
    targets = (settings.get("peft_config") or {}).get("target_modules", adapter_config.get("target_modules"))
    if targets:
        rows["target_modules"] = ", ".join(sorted(targets)) if not isinstance(targets, str) else targets
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items()]
    return "\n".join(["## Settings", "", "| | |", "| --- | --- |", *lines])


def _versions(results: Mapping[str, Any]) -> str:
    found = {"philora": results.get("philora", __version__), **(results.get("versions") or {})}
    return "## Versions\n\n" + ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in found.items())


def _evaluated(title: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results as the Hub's metadata."""
    after = results.get("after") or {}
    found = {name: after[name] for name in _METRICS if after.get(name) is not None}
    if not found:
        return {}
    name = ", ".join(_shown(source) for source in _sources(settings)) or "held-out data"
    return {
        "model_name": title,
        "eval_results": [
            EvalResult(
                task_type="text-generation",
                dataset_type="custom",
                dataset_name=f"{name}, held out",
                metric_type=metric,
                metric_name=_METRICS[metric],
                metric_value=value,
            )
            for metric, value in found.items()
        ],
    }
