"""A trained adapter, ready to answer: RUN_OR_ADAPTER -> base, adapter and tokenizer, each as in training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from philora.adapters import load_adapter
from philora.checkpoint import write_text
from philora.config import Config, ModelConfig, SourceConfig, TokenizerConfig, load_config
from philora.data.read import Fault, parse_line, resolve
from philora.data.shapes import TEXT_ROLE, detect
from philora.errors import AdapterError, DataError, fault, one_per_line
from philora.generation import GenerationSettings, generate
from philora.models import load_model, load_tokenizer
from philora.sources import AdapterSource, find_adapter


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base.

    Attributes:
        model: In eval mode; `model.disable_adapter()` makes it the base.
        tokenizer: As in training.
        source: Where the adapter is.
        run: The run folder it belongs to, if any.
        config: The configuration of that run, if any.
        base: Name of the base model.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: AdapterSource
    run: Path | None
    config: Config | None
    base: str


def load(source: str | Path, *, base: str | None = None, dtype: str | None = None) -> Loaded:
    """Load base, adapter and tokenizer for inference.

    The run's configuration decides precision, quantisation and attention, where the adapter lies in a run folder; an
    adapter alone is loaded onto the base it names in that base's own precision. On a GPU, where there is one.

    Args:
        source: A run folder, a checkpoint in it, an adapter folder or a hub id.
        base: Base model; default: the run's, or the one that the adapter names.
        dtype: Precision of the base; default: the run's.

    Raises:
        AdapterError: There is no adapter, it is a file of loralib's, or nothing says which base it belongs to.
        ModelError: The base or its tokenizer cannot be loaded.
    """
    found = find_adapter(source, base)
    if found.path.is_file():
        todo = "Convert it first: philora export FILE --format peft --base MODEL --out DIR"
        raise AdapterError(fault("adapter", "source", str(source), "a run or a folder in PEFT's format", todo))
    run = run_of(found.path)
    config = load_config(run / "config.yaml") if run is not None else None
    settings = config.model if config is not None else ModelConfig()
    name = base or (config.model.name_or_path if config is not None else found.base)
    if name is None:
        expected = "the name of the base model, which the adapter does not say"
        raise AdapterError(fault(str(found.path), "base_model_name_or_path", None, expected, "Give --base MODEL"))
    settings = dataclasses.replace(settings, name_or_path=name, use_cache=True, dtype=dtype or settings.dtype)
    tokenizer = load_tokenizer(_tokenizer_of(found.path, settings, config), _tokenizer_settings(config))
    model = load_model(settings, tokenizer)
    if torch.cuda.is_available() and settings.device_map is None and getattr(model, "hf_quantizer", None) is None:
        model = model.to("cuda")
    adapted = load_adapter(model, found.path)
    return Loaded(adapted.eval(), tokenizer, found, run, config, name)


def run_of(adapter: Path) -> Path | None:
    """The run folder that an `adapter/` or a checkpoint stands in."""
    for folder in (adapter.parent, adapter.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def _tokenizer_of(adapter: Path, model: ModelConfig, config: Config | None) -> ModelConfig:
    """Whose tokenizer: the base's as the run had it, or the one beside an adapter that came alone."""
    if config is None and (adapter / "tokenizer_config.json").is_file():
        return dataclasses.replace(model, name_or_path=str(adapter), revision=None)
    return model


def _tokenizer_settings(config: Config | None) -> TokenizerConfig:
    return config.tokenizer if config is not None else TokenizerConfig()


def answer_file(
    source: str | Path,
    prompts: str | Path,
    settings: GenerationSettings,
    *,
    base: str | None = None,
    adapter: bool = True,
    out: str | Path | None = None,
) -> str:
    """`philora generate`: answers to a file of prompts as JSONL, one line each in the prompts' order.

    Args:
        source: As for `load`.
        prompts: As for `read_prompts`.
        settings: How answers are made.
        base: As for `load`.
        adapter: With the adapter; False: the base alone.
        out: File to write, whole or not at all.

    Returns:
        The lines, with `prompt`, `answer`, `tokens` and `stopped`.

    Raises:
        AdapterError, ModelError, DataError: As `load`, `read_prompts` and `generate`.
    """
    conversations = read_prompts(prompts)
    loaded = load(source, base=base)
    with contextlib.nullcontext() if adapter else loaded.model.disable_adapter():
        answers = generate(loaded.model, loaded.tokenizer, conversations, settings)
    entries = [
        {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}
        for prompt, answer in zip(conversations, answers, strict=True)
    ]
    lines = "".join(json.dumps(each, ensure_ascii=False).translate(_CONTROLS) + "\n" for each in entries)
    if out is not None:
        write_text(Path(out).expanduser(), lines)
    return lines


_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""Control characters that JSON lets stand as they are, and that a terminal would obey."""


# -- prompts

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Fields of a question and its answer, where a record has no list of messages."""


def read_prompts(file: str | Path) -> list[list[dict[str, Any]]]:
    """Conversations to answer, each up to where the assistant is to speak.

    A `.txt` file holds one prompt a line. Of JSON, JSONL, CSV and Parquet each record is a conversation in any shape
    that training reads, with or without its last answer, which is left out; or has a `prompt`.

    Raises:
        DataError: The file is missing or empty, or records cannot be used (all of them are named).
    """
    path = Path(file).expanduser()
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
        if not prompts:
            raise DataError(fault(str(path), "prompts", 0, "at least one line"))
        return prompts
    prompts, faults = [], []
    for batch in resolve(SourceConfig(path=str(file)), "eval").open():
        for index, record in enumerate(batch.records):
            try:
                prompts.append(_prompt(record, batch.where(index)))
            except Fault as error:
                faults.append(error.at(batch.where(index)))
            except DataError as error:  # of `detect`, with its place
                faults.append(str(error))
    if faults:
        raise DataError(one_per_line(faults[:20]))
    if not prompts:
        raise DataError(fault(str(path), "records", 0, "at least one record"))
    return prompts


def _prompt(record: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a record up to its last user turn or tool result, by the readers of training data.

    Those want an answer at the end, so one without it gets an empty one's stand-in, which goes again.
    """
    fields = parse_line(record) if isinstance(record, bytes) else record
    if not isinstance(fields, dict):
        raise Fault("record", fields, "an object with named fields")
    completed = dict(fields)
    for name in ("messages", "conversations", "conversation"):
        if isinstance(fields.get(name), list) and fields[name]:
            completed[name] = [*fields[name], {"role": "assistant", "content": "-"}]
    for asked, answer in PAIRS:
        if fields.get(asked) is not None and fields.get(answer) is None:
            completed[answer] = "-"
    messages = detect([completed], where).read(completed).messages
    if messages[0]["role"] == TEXT_ROLE:
        raise Fault("record", "text", "messages, conversations, instruction, or a prompt")
    while messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [dict(each) for each in messages]
