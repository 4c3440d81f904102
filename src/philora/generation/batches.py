"""Generate answers in batches that equal the answers of one prompt at a time.

    conversations -> chat template -> token ids, longest first -> rows of a batch -> text up to the stop

For Phi-3 models `philora.generation.decoding` computes the batch: when a row has ended, the next prompt takes its slot.
Other models answer by transformers' `generate`, in batches of similar length, padded on the left so that the next token
of every row is in the same column. The batch size changes the speed and, in low precision, the rounding. For Phi-3
models it changes nothing else; for other models it changes nothing else in greedy answers.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from philora.dataset.arrangement import Arrangement
from philora.errors import ConfigError, DataError, ModelError, fault, one_per_line
from philora.families import longrope_switch_tokens
from philora.generation import decoding, static_decoding
from philora.generation.progress import advance
from philora.kernels.memory import out_of_memory
from philora.models import loading as models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """Describe how answers are made.

    Attributes:
        max_new_tokens: Length limit of an answer, in tokens; the model's window may lower it.
        batch_size: Prompts at a time; it is halved automatically where memory does not suffice.
        do_sample: Draw each token at random; False always takes the likeliest token (greedy).
        temperature: Above 0, for sampling; None is the model's own.
        top_p: In (0, 1], for sampling; None is the model's own.
        top_k: At least 1, for sampling; None is the model's own.
        seed: Seed of sampling. A Phi-3 model's answer depends on it and on the prompt's index, not on the batch. The
            caller's random state does not change.
        stop_strings: Texts that end an answer as a stop token does; they are removed from it.
        control_tokens: Read the text of a control token inside a message, such as `<|end|>`, as that token. By default
            it is ordinary text, which cannot end a message or start another.

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
    control_tokens: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "a whole number of at least 1"),
            ("batch_size", self.batch_size >= 1, "a whole number of at least 1"),
            ("temperature", self.temperature is None or 0 < self.temperature < math.inf, "a number above 0"),
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


class NotFiniteError(ModelError):
    """A model computes NaN or infinity, so that it has no next token."""


LEAST_TEMPERATURE = 1e-6
"""Lower temperatures are raised to this one; it too draws only tokens that are almost as likely as the likeliest."""


def stop_token_ids(model_or_generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends an answer: Phi's two if the vocabulary has them, the tokenizer's and the model's."""
    generation_config = getattr(model_or_generation_config, "generation_config", model_or_generation_config)
    return models.stop_token_ids(tokenizer, getattr(generation_config, "eos_token_id", None))


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    settings: GenerationSettings | None = None,
) -> list[Answer]:
    """Generate the assistant's next turn of every conversation.

    Greedy answers equal those of transformers' `generate` on one prompt at a time. Meanwhile the model is in eval mode
    and its cache is used, whatever `config.use_cache` is. Afterwards every module has its earlier training flag.

    Args:
        model: A causal language model of transformers, or a PeftModel around one, with its adapter active or disabled.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Lists of messages with `role` and `content`, up to the assistant's next turn.
        settings: Greedy and up to 256 tokens when None.

    Returns:
        An answer for every conversation, in the order given.

    Raises:
        DataError: A prompt fills the model's window; nothing has been generated.
        ModelError: The tokenizer has no chat template.
    """
    settings = settings or GenerationSettings()
    prompts = prompt_tokens(tokenizer, conversations, control_tokens=settings.control_tokens)
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
    switch = longrope_switch_tokens(model.config)
    answers: dict[int, Answer] = {}
    with evaluating(model), torch.inference_mode(), _seeded(model, settings):
        fast = decoding.covers(model) and _plainly_drawn(model, settings)
        for group in _groups(lengths, settings.max_new_tokens, switch):
            tasks = [_Task(i, prompts[i], answer_limit(lengths[i], window, settings)) for i in group.indices]
            if fast and not group.crosses:
                answers |= _answer_in_rows(model, tokenizer, tasks, settings, len(answers), len(prompts))
                continue
            for start in range(0, len(tasks), settings.batch_size):
                batch = tasks[start : start + settings.batch_size]
                rows = _generate_batch(
                    model, tokenizer, [item.prompt for item in batch], settings, min(item.limit for item in batch)
                )
                answers |= {task.number: row for task, row in zip(batch, rows, strict=True)}
                advance("answers", len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def answer_limit(prompt_tokens: int, window: int | None, settings: GenerationSettings) -> int:
    """Return the length limit of the answer to a prompt, in tokens."""
    return settings.max_new_tokens if window is None else min(settings.max_new_tokens, window - prompt_tokens)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    control_tokens: bool = False,
) -> list[list[int]]:
    """Return the token ids of every conversation as in training, up to and including the header of the next answer.

    Raises:
        DataError: The chat template refuses a conversation.
        ModelError: The tokenizer has no chat template.
    """
    return Arrangement(tokenizer).prompt_ids(conversations, control_tokens=control_tokens) if conversations else []


def window_tokens(model: nn.Module) -> int | None:
    """Return how many positions the model has for prompt and answer together; None if its config does not state it."""
    window = getattr(model.config, "max_position_embeddings", None)
    return int(window) if window else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode inside the block, and restore the training flag of every module after it.

    Gradient checkpointing needs no switch: transformers uses it in training mode only.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:  # from the root down: a submodule may differ from its parent
            if module.training != training:
                module.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's inputs."""
    return next(
        (parameter.device for parameter in model.parameters() if parameter.device.type != "meta"), torch.device("cpu")
    )


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device | None = None) -> Tensor:
    """Return rows of token ids as one padded tensor.

    Shapes:
        Returns (B, longest row).
    """
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [[*gap, *row] if side == "left" else [*row, *gap] for row, gap in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.long, device=device)


@contextlib.contextmanager
def _seeded(model: nn.Module, settings: GenerationSettings) -> Iterator[None]:
    """Seed sampling inside the block and restore the random state after it, so that training is not affected."""
    if not settings.do_sample:
        yield
        return
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed % 2**63)
        yield


class _Task(NamedTuple):
    """A prompt, its index in the list, and the length limit of its answer."""

    number: int
    prompt: list[int]
    limit: int


class _Group(NamedTuple):
    """Prompts that may share a batch, longest first, so that a batch too large for memory fails at once.

    Attributes:
        indices: Their indices.
        crosses: Whether they cross LongRoPE's boundary while they are answered, all at the same token.
    """

    indices: list[int]
    crosses: bool


def _groups(lengths: Sequence[int], new_tokens: int, switch: int | None) -> list[_Group]:
    """Group prompts so that none has rows on both sides of `switch`: LongRoPE's factors follow from the longest row."""
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        length = lengths[index]
        if switch is None or length + new_tokens <= switch:
            group = 0
        elif length > switch:
            group = -1
        else:
            group = length
        groups.setdefault(group, []).append(index)
    return [_Group(indices, crosses=group > 0) for group, indices in groups.items()]


# -- Phi-3 models


def _plainly_drawn(model: Any, settings: GenerationSettings) -> bool:
    """Return whether `GenerationSettings` alone decides how tokens are chosen, not the model's config."""
    own = getattr(model, "generation_config", None)
    neutral: dict[str, tuple[float | None, ...]] = {
        "no_repeat_ngram_size": (None, 0),
        "bad_words_ids": (None,),
        "suppress_tokens": (None,),
    }
    if settings.do_sample:
        neutral |= {"repetition_penalty": (None, 1.0), "min_p": (None,), "typical_p": (None, 1.0)}
        neutral |= {"epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0)}
    return all(getattr(own, name, None) in values for name, values in neutral.items())


class _Row:
    """An unfinished answer, and its random generator, which depends on the seed and the prompt's index."""

    def __init__(self, task: _Task, settings: GenerationSettings) -> None:
        self.task = task
        self.ids: list[int] = []
        self.random = torch.Generator().manual_seed((settings.seed * 1_000_003 + task.number) % 2**63)


def _answer_in_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[_Task],
    settings: GenerationSettings,
    earlier: int,
    total: int,
) -> dict[int, Answer]:
    """Return the answers of a group by `decoding.Decoder`, with half as many rows after every out-of-memory error."""
    rows = min(settings.batch_size, len(tasks))
    answers: dict[int, Answer] = {}
    while len(answers) < len(tasks):
        waiting = [task for task in tasks if task.number not in answers]
        try:
            for index, answer in _in_rows(model, tokenizer, waiting, settings, rows):
                answers[index] = answer
                advance("answers", earlier + len(answers), total)
        except (MemoryError, RuntimeError) as error:
            if rows == 1 or not out_of_memory(error):
                raise
            logger.warning("out of memory with %d prompts at once; continuing with %d", rows, rows // 2)
            rows //= 2
            if device_of(model).type == "cuda":
                torch.cuda.empty_cache()
    return answers


def _in_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, waiting: list[_Task], settings: GenerationSettings, rows: int
) -> Iterator[tuple[int, Answer]]:
    """Yield the index and the answer of every task as it ends.

    Free rows are refilled a quarter of them at a time, because reading a prompt costs about as much as a step. A row
    that is not in use is computed with the others and ignored. Once no prompt is left, the cache is halved whenever
    half of the rows have ended.
    """
    stops = frozenset(stop_token_ids(model, tokenizer))
    ends = _stop_strings(tokenizer, settings)
    sampler = Sampler(model, settings, top_k=50)  # transformers' own default
    decoder = static_decoding.decoder_for(model, rows, max(len(item.prompt) + item.limit for item in waiting))
    working: list[_Row | None] = [None] * rows
    waiting = list(reversed(waiting))  # the longest is taken first, from the end
    while True:
        chosen: Iterable[tuple[int, int]]  # slot, token
        free = [slot for slot, row in enumerate(working) if row is None]
        if waiting and len(free) >= min(len(waiting), -(-rows // 4)):
            slots = free[: len(waiting)]
            for slot in slots:
                working[slot] = _Row(waiting.pop(), settings)
            fresh = [row for slot in slots if (row := working[slot]) is not None]
            logits = decoder.prefill([row.task.prompt for row in fresh], slots)
            chosen = list(zip(slots, sampler(logits, [row.random for row in fresh]), strict=True))
        else:
            if not waiting and len(free) >= len(working) / 2:
                kept = [slot for slot, row in enumerate(working) if row is not None]
                if not kept:
                    return
                decoder.keep(kept)
                working = [working[slot] for slot in kept]
            chosen = _next_tokens(decoder, sampler, working)
        for slot, token in chosen:
            row = working[slot]
            if row is None:
                continue
            row.ids.append(token)
            if token in stops or len(row.ids) >= row.task.limit or ends(row.ids):
                yield row.task.number, _answer(row.ids, tokenizer, stops, settings)
                working[slot] = None


def _next_tokens(
    decoder: decoding.Decoder, sampler: Sampler, working: Sequence[_Row | None]
) -> Iterator[tuple[int, int]]:
    """Yield the slot and the next token of every row, for one step; on a GPU for several steps in succession.

    Rows of `working` that the caller sets to None have ended; their further tokens are to be ignored.
    """
    tokens = [row.ids[-1] if row else 0 for row in working]
    positions = [len(row.task.prompt) + len(row.ids) - 1 if row else 0 for row in working]
    randoms = [row.random if row else None for row in working]
    if not isinstance(decoder, static_decoding.StaticDecoder):
        yield from enumerate(sampler(decoder.step(tokens, positions), randoms))
        return
    steps = min(static_decoding.STEPS, max(row.task.limit - len(row.ids) for row in working if row))
    numbers = None if sampler.greedy else torch.stack([sampler.numbers(randoms) for _ in range(steps)])
    answered = decoder.answer(tokens, positions, steps, sampler.choose, numbers)
    for found, top in zip(answered.tokens.tolist(), answered.tops, strict=True):
        check_finite(top, [row is not None for row in working])
        yield from enumerate(found)


def _stop_strings(tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> Callable[[list[int]], bool]:
    """Return a function that tests whether an answer ends in a stop string; it decodes the end of the answer only."""
    longest = max((len(string.encode()) for string in settings.stop_strings), default=0)

    def ends(ids: list[int]) -> bool:
        # A token has at least one byte; the margin is for tokenizers that trim the first one.
        text = tokenizer.decode(ids[-longest - 4 :], skip_special_tokens=True) if longest else ""
        return any(string in text for string in settings.stop_strings)

    return ends


class Sampler:
    """Choose the next token of every row: the likeliest, or one drawn with the row's own random number.

    Args:
        model: Its generation config gives the values that are None in `settings`.
        settings: The settings of sampling.
        top_k: Used where neither gives one; 0 for no limit.
    """

    def __init__(self, model: Any, settings: GenerationSettings, top_k: int = 0) -> None:
        own = getattr(model, "generation_config", None)

        def value(name: str, default: float) -> float:
            given = getattr(settings, name)
            given = getattr(own, name, None) if given is None else given
            return default if given is None else given

        self.greedy = not settings.do_sample
        self.temperature = value("temperature", 1.0)
        self.top_p = value("top_p", 1.0)
        self.top_k = int(value("top_k", top_k))

    def __call__(self, logits: Tensor, randoms: Sequence[torch.Generator | None]) -> list[int]:
        """Choose a token for every row.

        Raises:
            NotFiniteError: A row in use has NaN or an infinite largest logit.

        Shapes:
            logits (B, V); a generator for every row, None for a row that is not in use.
        """
        check_finite(logits.amax(-1), [random is not None for random in randoms])
        numbers = None if self.greedy else self.numbers(randoms).to(logits.device)
        return [int(value) for value in self.choose(logits, numbers)[0].tolist()]

    def numbers(self, randoms: Sequence[torch.Generator | None]) -> Tensor:
        """Return a number in [0, 1) for every row, 0 for a row that is not in use. Shapes: returns (B), on the CPU."""
        return torch.tensor([0.0 if random is None else float(torch.rand((), generator=random)) for random in randoms])

    def choose(self, logits: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens and the largest logits, without reading anything back from the device.

        Without random numbers the likeliest tokens are taken.

        Shapes:
            logits (B, V), numbers (B); returns (B) twice.
        """
        top, likeliest = logits.max(-1)
        return likeliest if numbers is None else self.draw(logits, numbers), top

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Draw tokens by inverse transform sampling after temperature, top-k and top-p, in transformers' order.

        Shapes:
            logits (B, V), numbers (B) in [0, 1); returns (B).

        Numerics:
            fp32, as transformers' warpers.
        """
        # The largest is subtracted, so that neither a large logit nor a low temperature overflows.
        scores = logits.float()
        scores = (scores - scores.amax(-1, keepdim=True)) / max(self.temperature, LEAST_TEMPERATURE)
        kept = min(self.top_k or scores.shape[-1], scores.shape[-1])
        if kept < scores.shape[-1] or self.top_p < 1:
            scores, tokens = scores.topk(kept, sorted=True)
        else:
            tokens = torch.arange(kept, device=logits.device).expand_as(scores)
        chances = scores.softmax(-1)
        if self.top_p < 1:
            left_out = chances.cumsum(-1) - chances >= self.top_p
            left_out[..., 0] = False  # the likeliest stays, however small top_p is
            chances = chances.masked_fill(left_out, 0.0)
        sums = chances.cumsum(-1)
        place = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)
        last = (chances > 0).sum(-1, keepdim=True) - 1 if self.top_p < 1 else place.new_full((1, 1), kept - 1)
        return tokens.gather(-1, torch.minimum(place, last))[:, 0]


def check_finite(top: Tensor, in_use: Sequence[bool]) -> None:
    """Raise an error if a row has no logits to choose a token by.

    Shapes:
        top (B), the largest logit of every row; NaN where the row has a NaN.

    Raises:
        NotFiniteError: A row in use has NaN, infinity, or nothing above minus infinity.
    """
    bad = ~torch.isfinite(top.float())
    if bool(bad.any()) and any(used for used, fails in zip(in_use, bad.tolist(), strict=True) if fails):
        todo = "Look for NaN and infinity in the base's weights, in the adapter's, and in its lora_alpha"
        raise NotFiniteError(fault("model", "logits", float(top[bad][0]), "finite logits for the next token", todo))


# -- any other model


def _generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    max_new_tokens: int,
) -> list[Answer]:
    """Return the answers of one batch; after an out-of-memory error in two halves."""
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
        temperature = settings.temperature and max(settings.temperature, LEAST_TEMPERATURE)
        chosen = {"temperature": temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        options |= {name: value for name, value in chosen.items() if value is not None}
    else:  # the model's own generation config may set these, which greedy answers ignore
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
            logits_processor=LogitsProcessorList([_refuse_not_finite]),
            **extra,
        )
    except (MemoryError, RuntimeError) as error:
        if len(prompts) == 1 or not out_of_memory(error):
            raise
    else:
        width = max(len(ids) for ids in prompts)
        return [
            _answer(_unpadded(row, stops, filler), tokenizer, stops, settings) for row in output[:, width:].tolist()
        ]
    half = len(prompts) // 2
    logger.warning("out of memory with %d prompts at once; continuing with %d", len(prompts), half)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    parts = (prompts[:half], prompts[half:])
    return [item for part in parts for item in _generate_batch(model, tokenizer, part, settings, max_new_tokens)]


def _refuse_not_finite(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Check the scores as a logits processor of transformers, which raises as `check_finite` and changes nothing."""
    check_finite(scores.amax(-1), [True] * len(scores))
    return scores


def _unpadded(ids: list[int], stops: Collection[int], filler: int) -> list[int]:
    """Return a row up to its stop token, or without padding where a stop string ended it."""
    end = next((position for position, token in enumerate(ids) if token in stops), None)
    if end is not None:
        return ids[: end + 1]
    while len(ids) > 1 and ids[-1] == filler:
        ids = ids[:-1]
    return ids


def _answer(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: Collection[int], settings: GenerationSettings
) -> Answer:
    """Return the answer in generated ids, whose last one may be a stop token."""
    ended = ids[-1] in stops
    text = str(tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
    cuts = [text.index(string) for string in settings.stop_strings if string in text]
    if not cuts:
        return Answer(text, len(ids), stopped=ended)
    return Answer(text[: min(cuts)], len(ids), stopped=True)
