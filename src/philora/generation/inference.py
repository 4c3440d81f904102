"""A trained adapter, ready to answer: RUN_OR_ADAPTER -> base, adapter and tokenizer, each as in training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from philora.adapters.peft_models import load_adapter
from philora.configuration.sections import ModelConfig, SourceConfig, TokenizerConfig
from philora.dataset.arrangement import with_tools
from philora.dataset.file_bytes import text_lines
from philora.dataset.read import resolve
from philora.dataset.records import Fault
from philora.dataset.shapes import prompt_of
from philora.errors import AdapterError, DataError, ModelError, fault, one_per_line
from philora.files.checkpoint import write_text
from philora.generation.batches import GenerationSettings, generate
from philora.models.loading import load_model, load_tokenizer
from philora.models.locate import AdapterSource, find_adapter, require_base
from philora.models.run_folder import SystemTurn, TrainedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base.

    Attributes:
        model: In eval mode; `model.disable_adapter()` makes it the base.
        tokenizer: As in training.
        source: Where the adapter is.
        run: The run that it belongs to, if any.
        base: Name of the base model, as the person or the run has it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: AdapterSource
    run: TrainedRun | None
    base: str

    @property
    def system(self) -> SystemTurn | None:
        """The system turn that nearly all of the run's training conversations began with."""
        return None if self.run is None else self.run.system


def load(source: str | Path, *, base: str | None = None, dtype: str | None = None) -> Loaded:
    """Load base, adapter and tokenizer for inference.

    The run's configuration decides precision, quantisation and attention, where the adapter lies in a run folder; an
    adapter alone is loaded onto the base it names in that base's own precision. On a GPU, where there is one. Of a
    run's configuration only the sections `model` and `tokenizer` are read.

    Args:
        source: A run folder, a checkpoint in it, an adapter folder or a hub id. Of a run that has not ended the newest
            whole checkpoint is taken, with a notice.
        base: Base model; default: the run's, or the one that the adapter names.
        dtype: Precision of the base; default: the run's.

    Raises:
        AdapterError: There is no adapter, it is a file of loralib's, or nothing says which base it belongs to.
        ConfigError: What is read of the run's configuration has a value that it cannot have.
        ModelError: The base or its tokenizer cannot be found or loaded.
    """
    found = find_adapter(source, base)
    if found.path.is_file():
        todo = "Convert it first: philora export FILE --format peft --base MODEL --out DIR"
        raise AdapterError(fault("adapter", "source", str(source), "a run or a folder in PEFT's format", todo))
    place = require_base(found)
    run = TrainedRun(found.run) if found.run is not None else None
    settings = run.model if run is not None else ModelConfig()
    name = base or (settings.name_or_path if run is not None else place)
    settings = dataclasses.replace(
        settings, name_or_path=place, revision=found.revision, use_cache=True, dtype=dtype or settings.dtype
    )
    try:
        tokenizer = load_tokenizer(
            _tokenizer_of(found, settings), run.tokenizer if run is not None else TokenizerConfig()
        )
        model = load_model(settings, tokenizer)
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(f"{error} If the base is somewhere else, name it: --base MODEL.") from error
    if torch.cuda.is_available() and settings.device_map is None and getattr(model, "hf_quantizer", None) is None:
        model = model.to("cuda")
    adapted = load_adapter(model, found.path)
    return Loaded(adapted.eval(), tokenizer, found, run, name)


def _tokenizer_of(found: AdapterSource, model: ModelConfig) -> ModelConfig:
    """Whose tokenizer: the base's as the run had it, or the one beside an adapter that came alone."""
    if found.run is None and (found.path / "tokenizer_config.json").is_file():
        return dataclasses.replace(model, name_or_path=str(found.path), revision=None)
    return model


def answer_file(
    source: str | Path,
    prompts: str | Path | Sequence[list[dict[str, Any]]],
    settings: GenerationSettings,
    *,
    base: str | None = None,
    adapter: bool = True,
    out: str | Path | None = None,
) -> str:
    """`philora generate`: answers to prompts as JSONL, one line each in the prompts' order.

    Args:
        source: As for `load`.
        prompts: As for `read_prompts`, or conversations.
        settings: How answers are made.
        base: As for `load`.
        adapter: With the adapter; False: the base alone.
        out: File to write, whole or not at all.

    Returns:
        The lines, with `prompt`, `answer`, `tokens` and `stopped`.

    Raises:
        AdapterError, ModelError, DataError: As `load`, `read_prompts` and `generate`.
    """
    conversations = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    loaded = load(source, base=base)
    if loaded.system is not None:
        conversations = [with_system(conversation, loaded.system.text) for conversation in conversations]
        logger.warning("%s, where a prompt has none of its own", loaded.system)
    with contextlib.nullcontext() if adapter else loaded.model.disable_adapter():
        answers = generate(loaded.model, loaded.tokenizer, conversations, settings)
    entries = [
        {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}
        for prompt, answer in zip(conversations, answers, strict=True)
    ]
    lines = "".join(json.dumps(entry, ensure_ascii=False).translate(_CONTROLS) + "\n" for entry in entries)
    if out is not None:
        write_text(Path(out).expanduser(), lines)
    return lines


def with_system(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return a conversation that begins with a system turn: the one given where it has none of its own."""
    own = any(message["role"] == "system" for message in messages)
    return [*([] if own else [{"role": "system", "content": text}]), *map(dict, messages)]


_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""Control characters that JSON lets stand as they are, and that a terminal would obey."""


# -- prompts


def read_prompts(file: str | Path) -> list[list[dict[str, Any]]]:
    """Conversations to answer, each up to where the assistant is to speak.

    A `.txt` file holds one prompt a line. Of JSON, JSONL, CSV and Parquet each record is a conversation in any shape
    that training reads, with or without its last answer, which is left out; or has a `prompt`.

    Raises:
        DataError: The file is missing or empty, or records cannot be used (all of them are named).
    """
    path = Path(file).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        prompts = [[{"role": "user", "content": line.strip()}] for _, line in text_lines(path) if line.strip()]
        if not prompts:
            raise DataError(fault(str(path), "prompts", 0, "at least one line"))
        return prompts
    batches = resolve(SourceConfig(path=str(file)), "eval").open()
    return _prompts(
        str(file), ((record, batch.where(n)) for batch in batches for n, record in enumerate(batch.records))
    )


def prompts_of_lines(content: bytes, where: str) -> list[list[dict[str, Any]]]:
    """Return conversations to answer from text: JSON lines where the first line is a JSON object, else a prompt a line.

    Args:
        content: The text, as UTF-8.
        where: What messages call it.

    Raises:
        DataError: There is none, it is no UTF-8, or lines cannot be used.
    """
    lines = [(line, f"{where}:{number}") for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if lines and lines[0][0].lstrip().startswith(b"{"):
        return _prompts(where, lines)
    try:
        found = [[{"role": "user", "content": line.decode("utf-8-sig").strip()}] for line, _ in lines]
    except UnicodeDecodeError as error:
        raise DataError(fault(where, "prompts", str(error), "text in UTF-8")) from error
    if not found:
        raise DataError(fault(where, "prompts", 0, "at least one line"))
    return found


def _prompts(source: str, records: Iterable[tuple[Any, str]]) -> list[list[dict[str, Any]]]:
    """The conversations of records, each with its place; all that cannot be used are named."""
    prompts, faults = [], []
    unread: Counter[str] = Counter()
    for record, where in records:
        try:
            conversation = prompt_of(record, where)
        except Fault as error:
            faults.append(error.at(where))
            continue
        except DataError as error:  # of `detect`, with its place
            faults.append(str(error))
            continue
        unread.update(conversation.unread)
        prompts.append(with_tools(conversation.messages, conversation.tools))
    if faults:
        raise DataError(one_per_line(faults[:20]))
    if not prompts:
        raise DataError(fault(source, "records", 0, "at least one record"))
    for name, count in unread.items():
        logger.warning("%s: %s is not read (in %d of %d records)", source, name, count, len(prompts))
    return prompts
