"""Hold a conversation with a model: stream answers from the base or from one of its adapters.

    sources -> `load_pool`: one base in memory with all its adapters
            -> `AdapterPool.prompt`: messages -> token ids, checked against the model's window
            -> `AdapterPool.answer` -> `Reply`: one token at every step, text in pieces of complete characters

The terminal, the page and the endpoint use these. The reader of a `Reply` takes its steps, so an answer is stopped by
taking no further step. Several replies take turns on one model, or share a step by `AdapterPool.step`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from philora.adapters.peft_models import load_adapter
from philora.configuration.sections import ModelConfig, TokenizerConfig
from philora.dataset.arrangement import Arrangement, PromptTooLong
from philora.errors import AdapterError, ConfigError, DataError, fault, nearest
from philora.families import longrope_switch_tokens
from philora.generation import decoding, static_decoding
from philora.generation.batches import (
    GenerationSettings,
    Sampler,
    answer_limit,
    device_of,
    stop_token_ids,
    window_tokens,
)
from philora.generation.inference import Loaded, adapter_folder, load
from philora.kernels.memory import out_of_memory
from philora.models.loading import load_tokenizer
from philora.models.locate import AdapterSource, shown_base
from philora.models.run_folder import SystemTurn, TrainedRun

logger = logging.getLogger(__name__)

Message = Mapping[str, str]

_Result = TypeVar("_Result")

USUAL_ROWS = 8
"""Answers in a step that the layout of the weights is made for; any other number works too."""


def chat_settings(
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> GenerationSettings:
    """Return settings for a conversation, where temperature 0 means the greedy answer.

    Raises:
        ConfigError: A value is out of its bounds, or belongs to sampling while the temperature is 0.
    """
    if temperature == 0 and (top_p is not None or top_k is not None):
        name, value = ("top_p", top_p) if top_p is not None else ("top_k", top_k)
        todo = "Give a temperature too, such as 0.7"
        raise ConfigError(fault("chat", name, value, "a temperature above 0 beside it", todo))
    return GenerationSettings(
        max_new_tokens=max_new_tokens,
        do_sample=temperature != 0,
        temperature=temperature or None,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_strings=tuple(stop),
    )


class ContextError(DataError):
    """A prompt fills the model's window, so that no token is left for an answer.

    Attributes:
        tokens: Tokens of the prompt, as far as it was read.
        count: The same as text; "over" a number where the prompt was not read to its end.
        window: Positions of the model for prompt and answer together.
    """

    def __init__(self, tokens: int, window: int, *, exact: bool = True) -> None:
        expected = f"fewer than the model's {window}"
        count = f"{tokens} tokens" if exact else f"over {tokens} tokens"
        super().__init__(fault("conversation", "prompt", count, expected, "Shorten the messages"))
        self.tokens = tokens
        self.count = count
        self.window = window


@dataclass
class Memory:
    """Keys and values of tokens that a model has read, to continue from.

    Attributes:
        ids: The tokens.
        adapter: The adapter that has read them.
        cache: transformers' cache; None before the first token.
    """

    ids: list[int] = field(default_factory=list)
    adapter: str | None = None
    cache: Any = None


class AdapterPool:
    """A base model that answers alone or with any of its adapters; one thread may use it at a time.

    Attributes:
        base: The base's name.
        adapters: Names of the adapters, in the order in which they were given.
        model: The PeftModel that holds them all.
        tokenizer: The tokenizer of the base and all adapters.
        window: Positions of the model; None if its config does not state it.
        control_tokens: Whether the text of a control token inside a message is read as that token.
        systems: The system turn of an adapter's training conversations by the adapter's name, where it has one.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        base: str,
        adapters: Mapping[str, str],
        systems: Mapping[str, SystemTurn] | None = None,
    ) -> None:
        """Take a loaded model; `adapters` maps the names that users give to those in the PeftModel."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.arrangement = Arrangement(tokenizer)
        self.control_tokens = False
        self.base = base
        self.adapters = tuple(adapters)
        self.systems = dict(systems or {})
        self.window = window_tokens(model)
        self.stops = frozenset(stop_token_ids(model.get_base_model(), tokenizer))
        self.device = device_of(model)
        self.longrope_switch = longrope_switch_tokens(model.config)
        self._inside = dict(adapters)
        self._current: str | None = None
        self._batches: dict[str | None, SharedBatch] = {}
        self._packing: decoding.Packing | None = None
        # With LongRoPE the longest row decides the factors of all: rows beyond its boundary are computed alone.
        limits = [item for item in (self.window, self.longrope_switch) if item is not None]
        self._shared_tokens = min(limits) if limits and decoding.covers(model) else 0
        self._by_graph = not static_decoding.against(static_decoding.facts_of(model))
        takes = inspect.signature(model.get_base_model().forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.switch(self.adapters[0])

    def switch(self, adapter: str | None) -> None:
        """Compute with this adapter from now on; None for the base alone."""
        if adapter == self._current:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._inside[adapter], inference_mode=True)
        self._current = adapter

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids up to and including the header of the assistant's turn.

        Raises:
            ContextError: They fill the model's window.
            DataError: The chat template refuses the messages, or a text is not valid Unicode.
            ModelError: There is no chat template.
        """
        for index, message in enumerate(messages):
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                expected = "text that UTF-8 can encode"
                raise DataError(fault(f"messages[{index}]", "content", message["content"], expected)) from error
        window = self.window
        if window is not None and len(messages) >= window:  # a message has at least one token
            raise ContextError(len(messages), window, exact=False)
        try:
            (ids,) = self.arrangement.prompt_ids([messages], control_tokens=self.control_tokens, limit_tokens=window)
        except PromptTooLong as error:
            assert window is not None
            raise ContextError(error.tokens, window, exact=False) from error
        if window is not None and len(ids) >= window:
            raise ContextError(len(ids), window)
        return ids

    def answer(
        self, prompt: Sequence[int], settings: GenerationSettings, adapter: str | None, memory: Memory | None = None
    ) -> Reply:
        """Return the answer to a prompt, which is computed while it is read.

        Args:
            prompt: Token ids from `prompt`.
            settings: Length, sampling and stop strings; `batch_size` is not used. Sampling values that are None are the
                model's own, if it has any.
            adapter: The adapter that answers; None for the base.
            memory: The memory of the last turn (`Reply.memory`); the tokens it shares with the prompt are not computed
                again.
        """
        return Reply(self, prompt, settings, adapter, memory)

    @torch.inference_mode()
    def step(self, adapter: str | None, replies: Sequence[Reply]) -> list[str | BaseException]:
        """Compute a token of each of an adapter's answers; in one forward pass if `decoding.covers` the model.

        The set of answers may change between two steps. The keys and values of an answer that was left out are freed,
        and computed again if it returns. An error in one answer does not affect the others. After an out-of-memory
        error (`philora.kernels.memory.out_of_memory`) an answer is unchanged and can be stepped again.

        Numerics:
            Each row has its own positions and sees its own tokens only. The number of rows changes the order of sums:
            the last digits in fp32, and in bf16 the choice between tokens of almost equal probability.

        Returns:
            For every answer the text that its token completed, or its error.
        """
        shared = [reply for reply in replies if reply.limit_tokens <= self._shared_tokens]
        if not shared:
            self._batches.pop(adapter, None)
        found = self._step_shared(adapter, shared)
        for reply in replies:
            if reply not in found:
                found[reply] = _tried(partial(next, reply))
        return [found[reply] for reply in replies]

    def by_graph(self, reply: Reply) -> bool:
        """Return whether `step` is faster for a single answer too: on a GPU, where a step is one CUDA graph."""
        return self._by_graph and reply.limit_tokens <= self._shared_tokens

    def _step_shared(self, adapter: str | None, replies: Sequence[Reply]) -> dict[Reply, str | BaseException]:
        """Step answers that share a forward pass; if that fails, step them one by one to find which one is at fault."""
        if not replies:
            return {}
        logits = _tried(partial(self._logits_shared, adapter, replies))
        if not isinstance(logits, BaseException):
            rows = zip(replies, logits, strict=True)
            return {item: _tried(partial(item.take, row)) for item, row in rows}
        if len(replies) == 1 or out_of_memory(logits):
            return dict.fromkeys(replies, logits)
        found: dict[Reply, str | BaseException] = {}
        for reply in replies:
            found |= self._step_shared(adapter, [reply])
        return found

    def _logits_shared(self, adapter: str | None, replies: Sequence[Reply]) -> list[Tensor]:
        self.switch(adapter)
        batch = self._batches.pop(adapter, None)  # after an error its cache is not used again
        if batch is None:
            self._packing = self._packing or decoding.Packing(self.model, USUAL_ROWS)
            batch = SharedBatch(static_decoding.decoder_for(self.model, 0, self._shared_tokens, self._packing))
        logits = batch.logits(replies)
        self._batches[adapter] = batch
        return logits

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int], memory: Memory) -> Tensor:
        """Read the tokens that `memory` has not read yet, with its adapter.

        With LongRoPE, keys of up to `longrope_switch` tokens have other factors than keys of more tokens: at the first
        token beyond it everything is read again, as in transformers' `generate`.

        Shapes:
            Returns (V), the logits of the next token, in fp32.
        """
        switch = self.longrope_switch
        if switch is not None and len(memory.ids) <= switch < len(ids):
            memory.ids, memory.cache = [], None
        self.switch(memory.adapter)
        known, cache = len(memory.ids), memory.cache
        memory.ids, memory.cache = [], None  # after an interruption its cache is not used again
        fresh = torch.tensor([list(ids[known:])], device=self.device)
        output = self.model(input_ids=fresh, past_key_values=cache, use_cache=True, **self._last_only)
        memory.cache = getattr(output, "past_key_values", None)
        memory.ids = list(ids) if memory.cache is not None else []
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def recall(self, prompt: Sequence[int], adapter: str | None, memory: Memory | None) -> Memory:
        """Return the part of a memory that is valid for another prompt; an empty memory if no part is."""
        fresh = Memory(adapter=adapter)
        if memory is None or memory.cache is None or memory.adapter != adapter:
            return fresh
        shared = next(
            (place for place, (old, new) in enumerate(zip(memory.ids, prompt, strict=False)) if old != new),
            min(len(memory.ids), len(prompt)),
        )
        shared = min(shared, len(prompt) - 1)  # the last token is read again, for its logits
        switch = self.longrope_switch
        if switch is not None and len(prompt) <= switch < len(memory.ids):
            return fresh
        if shared < len(memory.ids):
            try:
                memory.cache.crop(shared - len(memory.ids))
            except (RuntimeError, AttributeError):  # a sliding window has dropped them, or it is no cache of keys
                return fresh
        return Memory(list(prompt[:shared]), adapter, memory.cache)


def _tried(compute: Callable[[], _Result]) -> _Result | BaseException:
    """Return the result of a function or its error, except a request to stop; a Rust panic is not an Exception."""
    try:
        return compute()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - returned to the reader of its answer
        if out_of_memory(error):
            error.__traceback__ = None  # its frames hold the memory that the next try needs
        return error


class SharedBatch:
    """Answers of one adapter in the rows of a decoder."""

    def __init__(self, decoder: decoding.Decoder) -> None:
        self.decoder = decoder
        self.replies: list[Reply] = []

    def logits(self, replies: Sequence[Reply]) -> list[Tensor]:
        """Return the logits (V) of every answer's next token; new prompts are read, other answers get a step."""
        staying = [reply for reply in self.replies if reply in replies]
        coming = [reply for reply in replies if reply not in staying]
        if coming or len(staying) < len(self.replies):
            self.decoder.keep([self.replies.index(item) for item in staying], len(coming))
            self.replies = staying + coming
        found: dict[Reply, Tensor] = {}
        if staying:  # the rows of new answers are not in use yet
            tokens = [item.ids[-1] for item in staying] + [0] * len(coming)
            places = [len(item.ids) - 1 for item in staying] + [0] * len(coming)
            found |= zip(staying, self.decoder.step(tokens, places), strict=False)
        if coming:
            rows = range(len(staying), len(self.replies))
            found |= zip(coming, self.decoder.prefill([item.ids for item in coming], rows), strict=True)
        return [found[reply] for reply in replies]


class Reply:
    """An answer that is computed while it is read: a step computes one token and returns the text that it completes.

    A piece is empty while a character is incomplete, or while the text may be the start of a stop string.
    The pieces together are `text`.

    Attributes:
        text: The text so far.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens generated so far, including the stop token.
        finish: `stop` if the model or a stop string ended it, `length` if the length limit did; None before the end.
        adapter: The adapter that answers; None for the base.
        ids: The prompt's tokens and those generated so far, without the stop token.
        limit_tokens: The most tokens that `ids` can have.
        memory: What the model has read, for the next turn. It is empty for tokens that `AdapterPool.step` computes, so
            on a GPU, where a single answer uses `step` too, each prompt is read again.
    """

    def __init__(
        self,
        pool: AdapterPool,
        prompt: Sequence[int],
        settings: GenerationSettings,
        adapter: str | None,
        memory: Memory | None = None,
    ) -> None:
        self.text = ""
        self.prompt_tokens = len(prompt)
        self.tokens = 0
        self.finish: Literal["stop", "length"] | None = None
        self.adapter = adapter
        self.ids = list(prompt)
        self.limit_tokens = len(prompt) + answer_limit(len(prompt), pool.window, settings)
        self.memory = pool.recall(prompt, adapter, memory)
        self._pool = pool
        self._settings = settings
        self._sampler = Sampler(pool.model, settings)
        self._random = torch.Generator().manual_seed(settings.seed % 2**63)

    def __iter__(self) -> Reply:
        return self

    def __next__(self) -> str:
        if self.finish is not None:
            raise StopIteration
        if self._pool.by_graph(self):
            (piece,) = self._pool.step(self.adapter, [self])
            if isinstance(piece, BaseException):
                raise piece
            return piece
        return self.take(self._pool.next_logits(self.ids, self.memory))

    def take(self, logits: Tensor) -> str:
        """Choose the next token and return the text that it completes. Shapes: logits (V), of the token after `ids`.

        Raises:
            NotFiniteError: The logits are not finite.
        """
        before = None if self._sampler.greedy else self._random.get_state()
        try:
            (token,) = self._sampler(logits[None], [self._random])
        except BaseException:
            if before is not None:
                self._random.set_state(before)  # a second try draws the same
            raise
        self.tokens += 1
        if token in self._pool.stops:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) >= self.limit_tokens:
                self.finish = "length"
        return self._settled()

    def _settled(self) -> str:
        """Return the text that no further token can change, without what was returned before."""
        text = str(self._pool.tokenizer.decode(self.ids[self.prompt_tokens :], skip_special_tokens=True))
        stops = self._settings.stop_strings
        cuts = [text.index(stop) for stop in stops if stop in text]
        if cuts:
            text, self.finish = text[: min(cuts)], "stop"
        elif self.finish is None:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # bytes of an incomplete character
            held = max((_overlap(text, stop) for stop in stops), default=0)
            text = text[: len(text) - held]
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are a start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Conversation:
    """Turns between a person and a model; the oldest are left out of the prompt when the window is full.

    Attributes:
        messages: All turns, without the system prompt.
        system: The system prompt; None for none.
        settings: Of the answers.
        adapter: Who answers; None: the base.
    """

    def __init__(
        self, pool: AdapterPool, settings: GenerationSettings, adapter: str | None, system: str | None = None
    ) -> None:
        self.pool = pool
        self.settings = settings
        self.adapter = adapter
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self._memory: Memory | None = None

    def ask(self, text: str) -> tuple[Reply, int]:
        """Ask a question.

        `max_new_tokens` of the window are kept free for the answer, or a quarter of the window if that is less.

        Returns:
            The answer to be read, and how many of the oldest messages the model no longer sees because of it. The
            history changes only by `keep`.

        Raises:
            ContextError: The message and the system prompt alone fill the window.
            DataError: The chat template refuses the conversation.
        """
        forgotten = self.forgotten
        message = {"role": "user", "content": text}
        window = self.pool.window
        while True:
            try:
                prompt = self.pool.prompt([*self._head(), *self.messages[forgotten:], message])
                reserve = 1 if window is None else min(self.settings.max_new_tokens, window // 4)
                if window is None or len(prompt) + reserve <= window:
                    break
                if forgotten == len(self.messages):
                    raise ContextError(len(prompt), window - reserve + 1)
            except ContextError:
                if forgotten == len(self.messages):
                    raise
            forgotten += 2  # a question and its answer
        # One seed is given for all of the conversation; every turn draws with another one.
        settings = replace(self.settings, seed=self.settings.seed + len(self.messages))
        reply = self.pool.answer(prompt, settings, self.adapter, self._memory)
        self._memory = None  # the reply changes its cache from now on
        return reply, forgotten - self.forgotten

    def keep(self, text: str, reply: Reply, forgotten: int) -> None:
        """Add a question, and as much of its answer as was read, to the history."""
        self._memory = reply.memory
        if not reply.text:
            return
        self.forgotten += forgotten
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]

    def reset(self) -> None:
        """Start a new conversation with the same system prompt and settings."""
        self.messages, self.forgotten, self._memory = [], 0, None

    def record(self) -> dict[str, list[dict[str, str]]]:
        """Return all of the conversation as a record of training data."""
        return {"messages": [*self._head(), *self.messages]}

    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


# -- loading


def load_pool(sources: Mapping[str, str | Path], base: str | None = None) -> AdapterPool:
    """Load a base model once, with all the adapters given.

    Args:
        sources: Run folders, adapter folders, checkpoints or hub ids, by the names that they get.
        base: Folder or hub id of the base; default: the one that the adapters name. The base of a run is loaded with
            the settings of its configuration.

    Raises:
        AdapterError: An adapter is missing, torn or does not fit, they belong to different bases or have different
            vocabularies or templates, or several of them change the base itself.
        ModelError: The base cannot be loaded, or has no chat template.
        TargetError: An adapter names modules that the base does not have.
    """
    found = {name: adapter_folder(source, base) for name, source in sources.items()}
    first = next(iter(found))
    others = {value.base for value in found.values()} - {found[first].base}
    if others:
        expected, todo = f"the base of the first adapter, {found[first].base}", "Start one server for each base"
        raise AdapterError(fault("adapters", "base", others.pop(), expected, todo))
    _check_untouched_base(found)
    display = shown_base(base or found[first].base or first)
    if display in found:
        expected = f"another name than the base's, {display}"
        raise AdapterError(fault("adapters", "name", display, expected, "Name it: NAME=RUN_OR_ADAPTER"))
    loaded = load(found[first].path, base=base)
    model, inside = loaded.model, {first: "default"}
    for index, (name, item) in enumerate(list(found.items())[1:]):
        _check_tokenizer(item.path, loaded)
        inside[name] = f"further_{index}"
        model = load_adapter(model, item.path, inside[name])
    runs = {name: TrainedRun(item.run) for name, item in found.items() if item.run is not None}
    systems = {name: run.system for name, run in runs.items() if run.system is not None}
    pool = AdapterPool(model, loaded.tokenizer, display, inside, systems)
    with contextlib.suppress(DataError):  # a template may require other roles
        pool.prompt([{"role": "user", "content": "Hello."}])  # fails now if there is no template
    return pool


def load_named(sources: Sequence[str], base: str | None = None) -> AdapterPool:
    """Load a pool from `NAME=SOURCE` arguments; the default name is that of the source.

    Raises:
        AdapterError: A name is given twice or is the base's, or as `load_pool` raises it.
    """
    named: dict[str, str | Path] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if not equals or Path(source).exists():
            name, path = name_of(source), source
        if not name or name in named:
            todo = "Name them: NAME=RUN_OR_ADAPTER"
            raise AdapterError(fault("adapters", "name", name, "a different name for each adapter", todo))
        named[name] = path
    return load_pool(named, base)


def name_of(source: str | Path) -> str:
    """Return the default name of an adapter: that of its run folder, or its hub id."""
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    path = path.resolve()
    return path.parent.name if path.name == "adapter" else path.name


def _check_untouched_base(found: Mapping[str, AdapterSource]) -> None:
    """Refuse several adapters if one of them changes the base; warn of a single one that does.

    When PEFT loads trained biases, or an initialisation that takes the first singular vectors out of the weights, it
    changes the base.
    """
    for name, item in found.items():
        config = PeftConfig.from_pretrained(str(item.path))
        if not isinstance(config, LoraConfig):
            continue
        start = str(config.init_lora_weights)
        changes = [f"bias={config.bias}"] if config.bias != "none" else []
        changes += [f"init_lora_weights={start}"] if start.startswith(("pissa", "olora", "corda")) else []
        changes += ["kasa_config"] if config.kasa_config is not None else []
        if changes and len(found) > 1:
            expected = "an adapter that leaves the base as it is, beside others"
            todo = "Serve it separately, or merge it: philora merge"
            raise AdapterError(fault(name, "adapter_config.json", ", ".join(changes), expected, todo))
        if changes:
            logger.warning("%s: %s changes the base itself, so the base answers with that change too", name, *changes)


def _check_tokenizer(adapter: Path, loaded: Loaded) -> None:
    """Refuse a further adapter whose vocabulary or chat template differs: all share one tokenizer."""
    if not (adapter / "tokenizer_config.json").is_file():
        return
    other = load_tokenizer(ModelConfig(name_or_path=str(adapter)), TokenizerConfig())
    if (other.get_vocab(), other.chat_template) != (loaded.tokenizer.get_vocab(), loaded.tokenizer.chat_template):
        expected = f"the vocabulary and chat template of {loaded.source.path}"
        raise AdapterError(fault("adapters", "tokenizer", str(adapter), expected, "Serve it separately"))


def known(name: str, names: Sequence[str]) -> str:
    """Return a hint: `Did you mean ...?`, or all the names."""
    return nearest(name, names) or f"There are: {', '.join(names)}"
