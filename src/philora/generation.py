"""Answers from a model: batched generation that gives what one prompt at a time would give.

    conversations -> chat template -> token ids -> batches of similar length, longest first
                  -> left padding, attention mask -> `model.generate` with a cache -> text up to the stop

Prompts are padded on the left, so that the next token of every row stands in the same column. The batch size changes
the speed and, in low precision, the rounding; it changes nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from philora import models
from philora.errors import ConfigError, DataError, ModelError, fault, one_per_line
from philora.families import longrope_switch_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made.

    Attributes:
        max_new_tokens: Longest answer, in tokens; less where the model's window leaves less room.
        batch_size: Prompts at once; halved by itself where memory does not suffice.
        do_sample: Draw each token at random; False always takes the likeliest (greedy).
        temperature: Above 0, for sampling; None is the model's own.
        top_p: In (0, 1], for sampling; None is the model's own.
        top_k: At least 1, for sampling; None is the model's own.
        seed: Of sampling. The random state of the caller stays as it is.
        stop_strings: Texts that end an answer as a stop token does; they are cut from it.

    Raises:
        ConfigError: A value is out of its bounds, or belongs to sampling while `do_sample` is False.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "a whole number of at least 1"),
            ("batch_size", self.batch_size >= 1, "a whole number of at least 1"),
            ("temperature", self.temperature is None or self.temperature > 0, "a number above 0"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number of at least 1"),
            ("stop_strings", all(self.stop_strings), "texts that are not empty"),
        ]
        faults = [fault("generation", name, getattr(self, name), rule) for name, holds, rule in rules if not holds]
        for name in ("temperature", "top_p", "top_k"):
            if getattr(self, name) is not None and not self.do_sample:
                todo = f"Set do_sample to true, or leave {name} out"
                faults.append(fault("generation", name, getattr(self, name), "null without do_sample", todo))
        if faults:
            raise ConfigError(one_per_line(faults))


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: Without special tokens, up to the stop token or stop string.
        tokens: Tokens generated, the stop included.
        stopped: The model ended it by itself; False where `max_new_tokens` or the window cut it.
    """

    text: str
    tokens: int
    stopped: bool


def stop_token_ids(model_or_generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: Phi's two where the vocabulary has them, the tokenizer's, and the model's."""
    generation_config = getattr(model_or_generation_config, "generation_config", model_or_generation_config)
    return models.stop_token_ids(tokenizer, getattr(generation_config, "eos_token_id", None))


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    settings: GenerationSettings | None = None,
) -> list[Answer]:
    """The assistant's next turn of each conversation.

    Greedy answers equal those of `transformers`' own `generate` on one prompt at a time. The model is in eval mode
    meanwhile, its cache is used whatever `config.use_cache` says, and every module's training flag is as it was after.

    Args:
        model: A causal language model of transformers, or a PeftModel around one, with its adapter active or disabled.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Each a list of messages with `role` and `content` that ends where the assistant is to speak.
        settings: Greedy and up to 256 tokens when None.

    Returns:
        One answer for each conversation, in their order.

    Raises:
        DataError: A prompt fills the model's window; nothing has been generated.
        ModelError: The tokenizer has no chat template.
    """
    settings = settings or GenerationSettings()
    prompts = prompt_tokens(tokenizer, conversations)
    window = window_tokens(model)
    faults = [
        fault(
            "conversation", str(index), f"{len(ids)} tokens", f"fewer than the model's {window}", "Shorten the prompt"
        )
        for index, ids in enumerate(prompts)
        if window is not None and len(ids) >= window
    ]
    if faults:
        raise DataError(one_per_line(faults))
    lengths = [len(ids) for ids in prompts]
    answers: dict[int, Answer] = {}
    with evaluating(model), torch.inference_mode(), _seeded(model, settings):
        for batch in _batches(lengths, settings, longrope_switch_tokens(model.config)):
            room = window - lengths[batch[0]] if window is not None else settings.max_new_tokens
            new_tokens = min(settings.max_new_tokens, room)
            rows = _generate_batch(model, tokenizer, [prompts[index] for index in batch], settings, new_tokens)
            answers.update(zip(batch, rows, strict=True))
    return [answers[index] for index in range(len(prompts))]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[int]]:
    """Token ids of each conversation, up to and with the header of the assistant's next turn.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        expected = "a template in the tokenizer, which turns messages into text"
        todo = "Use an instruct model's tokenizer, or set tokenizer.chat_template"
        raise ModelError(fault("tokenizer", "chat_template", None, expected, todo))
    texts = [
        tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    # The template writes the special tokens, <s> of Phi-3 included where it wants one.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def window_tokens(model: nn.Module) -> int | None:
    """Positions the model was made for, prompt and answer together; None where its config does not say."""
    window = getattr(model.config, "max_position_embeddings", None)
    return int(window) if window else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and after it the training flag of every module as it was.

    Gradient checkpointing needs no switch: transformers uses it only in training mode, and its flags stay untouched.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:  # from the root down, so that a part may differ from the whole
            if module.training != training:
                module.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next((each.device for each in model.parameters() if each.device.type != "meta"), torch.device("cpu"))


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device | None = None) -> Tensor:
    """Rows of token ids as one tensor.

    Shapes:
        Returns (B, longest row).
    """
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [[*gap, *row] if side == "left" else [*row, *gap] for row, gap in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long, device=device)


@contextlib.contextmanager
def _seeded(model: nn.Module, settings: GenerationSettings) -> Iterator[None]:
    """The seed of sampling, and after it the random state as it was, so that an evaluation changes no training."""
    if not settings.do_sample:
        yield
        return
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        yield


def _batches(lengths: Sequence[int], settings: GenerationSettings, switch: int | None) -> Iterator[list[int]]:
    """Indices of prompts that are generated together, longest first: a batch too large for memory shows at once.

    With LongRoPE the longest row decides for all rows of a batch, so none holds rows on both sides of `switch`.
    """
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        length = lengths[index]
        if switch is None or length + settings.max_new_tokens <= switch:
            group = 0
        elif length > switch:
            group = -1
        else:  # crosses the switch while it is answered: only with prompts that cross at the same token
            group = length
        groups.setdefault(group, []).append(index)
    for members in groups.values():
        for start in range(0, len(members), settings.batch_size):
            yield members[start : start + settings.batch_size]


def _generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    max_new_tokens: int,
) -> list[Answer]:
    """Answers of one batch, in halves where memory does not suffice for the whole."""
    stops = stop_token_ids(model, tokenizer)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = device_of(model)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": settings.do_sample,
        "num_beams": 1,
        "use_cache": True,
        "eos_token_id": stops or None,
        "pad_token_id": filler,
    }
    if settings.do_sample:
        chosen = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        options |= {name: value for name, value in chosen.items() if value is not None}
    else:  # what a model's own generation config may set, and what has no part in a greedy answer
        options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    extra: dict[str, Any] = {}
    if settings.stop_strings:
        options["stop_strings"] = list(settings.stop_strings)
        extra["tokenizer"] = tokenizer
    try:
        output = model.generate(
            input_ids=pad(prompts, filler, "left", device),
            attention_mask=pad([[1] * len(ids) for ids in prompts], 0, "left", device),
            generation_config=GenerationConfig(**options),
            **extra,
        )
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    else:
        width = max(len(ids) for ids in prompts)
        return [_answer(row, tokenizer, stops, filler, settings) for row in output[:, width:].tolist()]
    half = len(prompts) // 2
    logger.warning("out of memory with %d prompts at once; going on with %d", len(prompts), half)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    parts = (prompts[:half], prompts[half:])
    return [each for part in parts for each in _generate_batch(model, tokenizer, part, settings, max_new_tokens)]


def _answer(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], filler: int, settings: GenerationSettings
) -> Answer:
    """The answer in a row of generated ids, which goes on with padding where a longer row shared its batch."""
    end = next((position for position, token in enumerate(ids) if token in stops), None)
    tokens = len(ids) if end is None else end + 1
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    cuts = [text.index(each) for each in settings.stop_strings if each in text]
    if not cuts:
        return Answer(text, tokens, stopped=end is not None)
    while ids[tokens - 1] == filler:  # a row that a stop string ended has no stop token before its padding
        tokens -= 1
    return Answer(text[: min(cuts)], tokens, stopped=True)
