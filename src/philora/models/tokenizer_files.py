"""Write what goes beside the weights of every export and merge: tokenizer, generation config, stop tokens."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from philora.errors import ModelError
from philora.files.checkpoint import write_json
from philora.files.links import refuse_leading_out
from philora.models.loading import read_tokenizer, set_padding, stop_token_ids

logger = logging.getLogger(__name__)

STOPS_NAME = "stop_tokens.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "additional_chat_templates/*.jinja", "spiece.model", "*.tiktoken",
)  # fmt: skip


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder whose names fit.

    Raises:
        ModelError: One of them is a link to a file outside the folder, whose content would be published.
    """
    for pattern in patterns:
        for path in source.glob(pattern):
            refuse_leading_out(source, ModelError, [path])
            if path.is_file():
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


class Companions:
    """Return tokenizer and generation config of an adapter: its own where its folder has them, else the base's.

    Attributes:
        tokenizer: None where neither has one, or it cannot be read without code of its own.
        generation: None where neither has one.
        stops: Ids that end an answer, the one of a turn first.
    """

    def __init__(self, adapter: Path, base: Path, config: Any) -> None:
        self._tokenizer_folder = adapter if (adapter / "tokenizer_config.json").is_file() else base
        self._generation_folder = adapter if (adapter / GENERATION_FILE).is_file() else base
        self.tokenizer = _tokenizer(self._tokenizer_folder)
        self.generation: GenerationConfig | None = None
        if (self._generation_folder / GENERATION_FILE).is_file():
            self.generation = GenerationConfig.from_pretrained(str(self._generation_folder))
        named = getattr(self.generation, "eos_token_id", None) or getattr(config, "eos_token_id", None)
        if self.tokenizer is not None:
            self.stops = _turn_first(self.tokenizer, stop_token_ids(self.tokenizer, named))
        else:
            self.stops = [named] if isinstance(named, int) else list(named or [])

    @property
    def stop_tokens(self) -> list[str]:
        """The stop tokens as text; empty without a tokenizer."""
        return (
            [] if self.tokenizer is None else [str(token) for token in self.tokenizer.convert_ids_to_tokens(self.stops)]
        )

    def write(self, folder: Path, *, files: bool = True) -> None:
        """Write `stop_tokens.json`, and the tokenizer's and generation config's files where the format needs them."""
        write_json(folder / STOPS_NAME, self.manifest())
        if files:
            copy_files(self._generation_folder, folder, (GENERATION_FILE,))
            copy_files(self._tokenizer_folder, folder, TOKENIZER_FILES)

    def manifest(self) -> dict[str, Any]:
        """Return which tokens end an answer: what a server has to be told that reads neither of the other files."""
        texts: list[str | None] = [*self.stop_tokens] or [None] * len(self.stops)
        return {
            "format": 1,
            "stop_tokens": [{"id": token, "text": text} for token, text in zip(self.stops, texts, strict=True)],
            "ends_a_turn": texts[0] if texts else None,
            "padding_token_id": getattr(self.tokenizer, "pad_token_id", None),
        }


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """A folder's tokenizer; None where it has none, and, with a notice, where it cannot be read."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = read_tokenizer(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s: the tokenizer cannot be read, so stop tokens are named by id only: %s", folder, error)
        return None
    with contextlib.suppress(ModelError):  # a vocabulary may hold nothing to pad with, which is no fault here
        set_padding(tokenizer)
    return tokenizer


def _turn_first(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> list[int]:
    """The stop tokens with that first which the chat template writes after an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return stops
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x02"}]
    after = str(tokenizer.apply_chat_template(talk, tokenize=False)).rpartition("\x02")[2]
    places = {token: after.find(str(tokenizer.convert_ids_to_tokens(token))) for token in stops}
    written = [token for token in stops if places[token] >= 0]
    return sorted(written, key=places.__getitem__)[:1] + [
        token for token in stops if token != min(written, key=places.__getitem__, default=None)
    ]
