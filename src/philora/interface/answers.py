"""Answers of a trained adapter from Python: the model is loaded once and kept for the next question."""

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
    """Keep away what the libraries tell each other: warnings of releases to come, and their progress bars."""
    with warnings.catch_warnings(), process_state.quiet_libraries():
        display.ignore_future_warnings()
        yield


class Answer(str):
    """An answer: text, with the conversation that it ends.

    Attributes:
        messages: The conversation, this answer included; `run.chat(text, after=answer)` continues it.
        tokens: Tokens generated, the stop token included.
        stopped: The model ended the answer; False where it was cut at `max_new_tokens`.
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

    The model is loaded when it is first asked something, and kept for the next question; `free` releases its memory.

    Attributes:
        source: A run folder, a checkpoint, an adapter folder or a hub id.
    """

    def __init__(self, source: str | Path, base: str | None = None) -> None:
        """Describe an adapter, by default on the base that it names."""
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

        Each call is a conversation of its own, so that a cell gives the same answer when it is run again;
        `after=answer` continues the conversation of an earlier answer.

        Args:
            text: What the person says.
            after: The answer that this is said after.
            system: System prompt; default: the one that nearly all training conversations began with; "": none.
            adapter: Ask the adapter; False: the base alone.
            max_new_tokens: Length of the answer at most.
            temperature: 0 takes the likeliest token; above 0 tokens are drawn.
            top_p: Of drawing, in (0, 1]; it needs a temperature above 0.
            top_k: Of drawing, at least 1; likewise.
            seed: Of drawing.
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
            prompts: Texts or conversations; one text; or the Path of a file, as `philora generate --prompts` reads it.
            adapter: With the adapter; False: the base alone.
            settings: How answers are made; default: the likeliest tokens, 256 at most, 16 answers at a time.
            changed: Values of `GenerationSettings` by name, such as `max_new_tokens=64` or `do_sample=True`.

        Returns:
            One answer for every prompt, in their order.

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
        loaded = self._load()
        if loaded.system is not None:
            trained = loaded.system
            conversations = [with_system(messages, trained.text) for messages in conversations]
        return self._answer(conversations, given, adapter)

    def _begun(self, system: str | None) -> list[dict[str, Any]]:
        """The system turn of a new conversation."""
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
