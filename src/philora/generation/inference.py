"""Load a trained adapter with its base and tokenizer as in training, and answer prompts with it."""

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
        model: The model in eval mode; `model.disable_adapter()` makes it the base.
        tokenizer: The tokenizer as in training.
        source: Where the adapter is.
        run: The run that it belongs to, if any.
        base: Name of the base model, as the user or the run gives it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: AdapterSource
    run: TrainedRun | None
    base: str

    @property
    def system(self) -> SystemTurn | None:
        """Return the system turn that nearly all of the run's training conversations began with."""
        return None if self.run is None else self.run.system


def load(source: str | Path, *, base: str | None = None, dtype: str | None = None) -> Loaded:
    """Load base, adapter and tokenizer for inference.

    For an adapter in a run folder the run's configuration decides precision, quantisation and attention; only its
    sections `model` and `tokenizer` are read. An adapter alone is loaded onto the base that it names, in that base's
    own precision. A GPU is used if there is one.

    Args:
        source: A run folder, a checkpoint in it, an adapter folder or a hub id. For an unfinished run the newest
            complete checkpoint is used, with a notice.
        base: Base model; default: the run's, or the one that the adapter names.
        dtype: Precision of the base; default: the run's.

    Raises:
        AdapterError: There is no adapter, it is a file of loralib's, or its base is not known.
        ConfigError: A setting in these sections of the run's configuration is not valid.
        ModelError: The base or its tokenizer cannot be found or loaded.
    """
    found = adapter_folder(source, base)
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


def adapter_folder(source: str | Path, base: str | None) -> AdapterSource:
    """Find an adapter in PEFT's format.

    Raises:
        AdapterError: There is none, or it is a file of loralib's.
    """
    found = find_adapter(source, base)
    if not found.path.is_dir():
        todo = "Convert it first: philora export FILE --format peft --base MODEL --out DIR"
        raise AdapterError(fault("adapter", "source", str(source), "a run or a folder in PEFT's format", todo))
    return found


def _tokenizer_of(found: AdapterSource, model: ModelConfig) -> ModelConfig:
    """Return where to load the tokenizer from: the run's base, or the folder of an adapter without a run."""
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
    """Answer prompts as JSONL for `philora generate`, one line for every prompt in the order given.

    Args:
        source: As for `load`.
        prompts: As for `read_prompts`, or conversations.
        settings: Settings of generation.
        base: As for `load`.
        adapter: Whether the adapter answers; False for the base alone.
        out: File to write, atomically.

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
    """Return a conversation with a system turn: its own, or the given one if it has none."""
    own = any(message["role"] == "system" for message in messages)
    return [*([] if own else [{"role": "system", "content": text}]), *map(dict, messages)]


_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""Control characters that JSON does not escape and a terminal would obey."""


# -- prompts


def read_prompts(file: str | Path) -> list[list[dict[str, Any]]]:
    """Read conversations to answer from a file, each up to the assistant's next turn.

    A `.txt` file has one prompt a line. A record of JSON, JSONL, CSV or Parquet is a conversation in any shape that
    training reads, or has a `prompt`. A last answer in it is left out.

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
    """Return conversations to answer from UTF-8: JSONL if the first line is a JSON object, else a prompt a line.

    Raises:
        DataError: There is none, it is not UTF-8, or lines cannot be used.
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
    """Return the conversations of records with their locations; name all that cannot be used in one error."""
    prompts, faults = [], []
    unread: Counter[str] = Counter()
    for record, where in records:
        try:
            conversation = prompt_of(record, where)
        except Fault as error:
            faults.append(error.at(where))
            continue
        except DataError as error:  # from `detect`, which names the location
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
