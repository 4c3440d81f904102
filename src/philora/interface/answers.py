"""Answer questions with a trained adapter from Python; the model is loaded once and kept."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from philora.errors import ConfigError, fault, shorten
from philora.generation.batches import GenerationSettings
from philora.generation.batches import generate as generate_answers
from philora.generation.conversation import chat_settings
from philora.generation.inference import Loaded, load, read_prompts, with_system
from philora.interface import notebook
from philora.reporting import display
from philora.runtime import process_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the libraries' warnings about their own future releases, and their progress bars."""
    with warnings.catch_warnings(), process_state.quiet_libraries():
        display.ignore_future_warnings()
        yield


class Answer(str):
    """An answer as text, with the conversation that it ends.

    Attributes:
        messages: The conversation including this answer; `run.chat(text, after=answer)` continues it.
        tokens: Tokens generated, including the stop token.
        stopped: Whether the model ended the answer; False if it was cut at `max_new_tokens`.
    """

    messages: list[dict[str, Any]]
    tokens: int
    stopped: bool

    def __new__(cls, text: str, messages: Sequence[Message], tokens: int, stopped: bool) -> Answer:
        """Make an answer to `messages`."""
        made = super().__new__(cls, text)
        made.messages = [*map(dict, messages), {"role": "assistant", "content": text}]
        made.tokens, made.stopped = tokens, stopped
        return made

    def _repr_html_(self) -> str:
        return notebook.block(self)


class AnsweringModel:
    """A base with an adapter that answers questions.

    The model is loaded with the first question and kept for the next one; `free` releases its memory.

    Attributes:
        source: A run folder, a checkpoint, an adapter folder or a hub id.
    """

    def __init__(self, source: str | Path, base: str | None = None) -> None:
        """Name an adapter and its base, by default the one that the adapter names; load nothing yet."""
        self.source = source
        self._base = base
        self._loaded: Loaded | None = None

    @property
    def model(self) -> Any:
        """Return the base with the adapter, as a PeftModel in eval mode; it is loaded once and kept."""
        return self._load().model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, as in training."""
        return self._load().tokenizer

    def free(self) -> None:
        """Release the memory of the model; the next question loads it again."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def chat(
        self,
        text: str,
        *,
        after: Answer | None = None,
        system: str | None = None,
        adapter: bool = True,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Ask a question.

        Each call starts a new conversation, so that a notebook cell gives the same answer when it runs again;
        `after=answer` continues the conversation of an earlier answer.

        Args:
            text: The question.
            after: The earlier answer to continue from.
            system: System prompt, "" for none; default: the one that nearly all training conversations began with.
            adapter: Whether the adapter answers; False for the base alone.
            max_new_tokens: Length limit of the answer, in tokens.
            temperature: 0 takes the likeliest token; above 0 tokens are drawn at random.
            top_p: In (0, 1]: draw from the likeliest tokens with this probability together; needs a temperature.
            top_k: Draw from this many of the likeliest tokens; needs a temperature.
            seed: Seed of drawing.
            stop: Texts that end an answer.

        Raises:
            ConfigError: A value is out of its bounds, or `system` is given in the middle of a conversation.
            DataError: The conversation fills the model's window.
            AdapterError, ModelError: The model cannot be loaded.
        """
        if after is not None and system is not None:
            todo = "Give it with the first question"
            raise ConfigError(fault("chat", "system", shorten(system), "no system prompt beside after", todo))
        messages = list(after.messages) if after is not None else self._begun(system)
        settings = chat_settings(max_new_tokens, temperature, top_p, top_k, seed, stop)
        return self._answer([[*messages, {"role": "user", "content": text}]], settings, adapter)[0]

    def generate(
        self,
        prompts: str | Path | Sequence[str | Sequence[Message]],
        *,
        adapter: bool = True,
        settings: GenerationSettings | None = None,
        **changed: Any,
    ) -> list[Answer]:
        """Answer many prompts, in batches.

        Args:
            prompts: Texts or conversations, one text, or the Path of a file as for `philora generate --prompts`.
            adapter: Whether the adapter answers; False for the base alone.
            settings: Settings of generation; default: the likeliest tokens, at most 256, 16 answers at a time.
            changed: Values of `GenerationSettings` by name, such as `max_new_tokens=64` or `do_sample=True`.

        Returns:
            An answer for every prompt, in the order given.

        Raises:
            ConfigError: A value is out of its bounds.
            DataError: Prompts cannot be read, or fill the model's window.
            AdapterError, ModelError: The model cannot be loaded.
        """
        given = settings or GenerationSettings(**changed)
        if isinstance(prompts, Path):
            conversations: list[list[dict[str, Any]]] = read_prompts(prompts)
        else:
            asked: Sequence[str | Sequence[Message]] = [prompts] if isinstance(prompts, str) else prompts
            conversations = [
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
                for prompt in asked
            ]
        if (trained := self._load().system) is not None:
            conversations = [with_system(messages, trained.text) for messages in conversations]
        return self._answer(conversations, given, adapter)

    def _begun(self, system: str | None) -> list[dict[str, Any]]:
        """Return the first messages of a new conversation: its system turn, if it has one."""
        if system is None and (trained := self._load().system) is not None:
            system = trained.text
        return [{"role": "system", "content": system}] if system else []

    def _answer(
        self, conversations: Sequence[Sequence[Message]], settings: GenerationSettings, adapter: bool
    ) -> list[Answer]:
        loaded = self._load()
        with quiet(), contextlib.nullcontext() if adapter else loaded.model.disable_adapter():
            found = generate_answers(loaded.model, loaded.tokenizer, conversations, settings)
        return [
            Answer(answer.text, messages, answer.tokens, answer.stopped)
            for messages, answer in zip(conversations, found, strict=True)
        ]

    def _load(self) -> Loaded:
        if self._loaded is None:
            with quiet():
                self._loaded = load(self.source, base=self._base)
        return self._loaded
