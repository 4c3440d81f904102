"""Write the files beside the weights of an export or merge: tokenizer, generation config, stop tokens."""

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
    """Copy the files of a folder that match the patterns.

    Raises:
        ModelError: A file is a link out of the folder, which would publish another file.
    """
    for pattern in patterns:
        for path in source.glob(pattern):
            refuse_leading_out(source, ModelError, [path])
            if path.is_file():
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


class Companions:
    """Tokenizer and generation config of an adapter: its own if its folder has them, else the base's.

    Attributes:
        tokenizer: None if neither has one, or if it cannot be read without remote code.
        generation: None if neither has one.
        stops: Ids that end an answer, beginning with the one that ends a turn.
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
        """Return the stop tokens as text; empty without a tokenizer."""
        return [] if self.tokenizer is None else list(map(str, self.tokenizer.convert_ids_to_tokens(self.stops)))

    def write(self, folder: Path, *, files: bool = True) -> None:
        """Write `stop_tokens.json` and, if the format needs them, the files of tokenizer and generation config."""
        write_json(folder / STOPS_NAME, self.manifest())
        if files:
            copy_files(self._generation_folder, folder, (GENERATION_FILE,))
            copy_files(self._tokenizer_folder, folder, TOKENIZER_FILES)

    def manifest(self) -> dict[str, Any]:
        """Return the tokens that end an answer, for servers that read neither tokenizer nor generation config."""
        texts: list[str | None] = [*self.stop_tokens] or [None] * len(self.stops)
        return {
            "format": 1,
            "stop_tokens": [{"id": token, "text": text} for token, text in zip(self.stops, texts, strict=True)],
            "ends_a_turn": texts[0] if texts else None,
            "padding_token_id": getattr(self.tokenizer, "pad_token_id", None),
        }


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return a folder's tokenizer; None if there is none or, with a warning, if it cannot be read."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = read_tokenizer(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s: the tokenizer cannot be read, so stop tokens are named by id only: %s", folder, error)
        return None
    with contextlib.suppress(ModelError):  # a vocabulary without a token for padding is not a fault here
        set_padding(tokenizer)
    return tokenizer


def _turn_first(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> list[int]:
    """Return the stop tokens, beginning with the one that the chat template writes after an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return stops
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x02"}]
    after = str(tokenizer.apply_chat_template(talk, tokenize=False)).rpartition("\x02")[2]
    positions = {token: after.find(str(tokenizer.convert_ids_to_tokens(token))) for token in stops}
    first = min((token for token in stops if positions[token] >= 0), key=positions.__getitem__, default=None)
    return sorted(stops, key=lambda token: token != first)
