"""Describe a data source before training: shape, counts, lengths, languages, repeats, odd rows, private details."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from philora.configuration.config import load_config
from philora.configuration.sections import Config, DataConfig
from philora.dataset.conversations import Conversations
from philora.dataset.data_report import SourceReport, SplitReport
from philora.dataset.languages import language_shares
from philora.dataset.lengths import row_lengths
from philora.dataset.messages import Message
from philora.dataset.near import near_duplicates
from philora.dataset.prepare import PreparedData, places_of, prepare
from philora.dataset.template import IGNORED, preview
from philora.errors import DataError, fault
from philora.models import loading as models

_NO_LIMIT = 1 << 30
_EXAMPLES = 3
_PLACES = 5
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")


@dataclass
class Spread:
    """Describe how a number is spread over the rows."""

    least: int
    median: int
    most_of_95_percent: int
    most: int

    @classmethod
    def of(cls, values: npt.NDArray[np.int64]) -> Spread:
        """Return the spread of at least one value."""
        low, middle, high, top = np.quantile(values, (0, 0.5, 0.95, 1), method="higher").tolist()
        return cls(low, middle, high, top)

    def __str__(self) -> str:
        return f"{self.least:,} to {self.most:,}, median {self.median:,}, 95% up to {self.most_of_95_percent:,}"


@dataclass
class SplitDescription:
    """Describe one split.

    Attributes:
        counts: As a run without a limit of tokens counts them.
        tokens: Of a row.
        answer_tokens: Tokens with loss of a row.
        turns: Of a conversation, without the system turn.
        system_turns: The commonest system text, with the share of rows that have it; None: there is none.
        languages: ISO 639-1 codes with their shares, as `language_shares` finds them.
    """

    counts: SplitReport
    tokens: Spread
    answer_tokens: Spread
    turns: Spread
    system_turns: tuple[str, float] | None = None
    languages: dict[str, float] = field(default_factory=dict)


@dataclass
class Finding:
    """A remark about rows of the training set; `places` are the locations of the first ones."""

    what: str
    rows: int
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" ({', '.join(self.places)}{', ...' if self.rows > len(self.places) else ''})" if self.places else ""
        return f"{self.what}: {self.rows:,} rows{where}"


@dataclass
class DataDescription:
    """Describe what `philora data` shows.

    Attributes:
        tokenizer: The model whose tokens are counted.
        sources: What was read from where, as which shape.
        splits: `train`, and `eval` where there is one.
        near_duplicates: Rows of `eval` that are nearly the same as one of `train`; without `eval` rows of `train` that
            are nearly the same as an earlier one. Equal ones are counted as duplicates.
        findings: Empty, odd and private parts of rows; nothing is changed.
        notices: The notices of `train`.
        examples: The first rows in pieces, each with whether the loss is on it.
    """

    tokenizer: str
    sources: dict[str, list[SourceReport]]
    splits: dict[str, SplitDescription]
    near_duplicates: int
    findings: list[Finding]
    notices: list[str]
    examples: list[list[tuple[str, bool]]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def describe_data(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> DataDescription:
    """Read data as `train` would, and describe it; records that cannot be used are counted, not refused.

    Args:
        source: A data file, a folder or an id of the Hub; or a configuration, as a YAML file, a mapping or a `Config`.
        overrides: Settings as on the command line, such as `data.eval=0.1` or `model.name_or_path=...`.

    Returns:
        Counts, lengths in tokens of the configured model, findings with their places, and examples with their labels.

    Raises:
        ConfigError, DataError: As `train` would raise them, but for single records.

    Example:
        >>> describe_data("helpdesk").splits["train"].turns.median
        2
    """
    is_data = isinstance(source, str | Path) and Path(source).suffix.lower() not in (".yaml", ".yml")
    given: Any = {"data": {"train": {"path": str(source)}, "eval": None}} if is_data else source
    config = load_config(given, overrides)
    if any(item.streaming for item in config.data.train):
        expected = "false: a stream is never read completely"
        raise DataError(fault("data", "streaming", True, expected, "Give a limit and leave streaming out"))
    tokenizer = models.load_tokenizer(config.model, config.tokenizer)
    stops = models.stop_token_ids(tokenizer, None)
    seed = int(config.training_config.get("seed", 42))
    with tempfile.TemporaryDirectory() as folder:
        data = dataclasses.replace(config.data, invalid="drop", overlong="truncate", cache_dir=folder)
        prepared = prepare(data, tokenizer, max_length=_NO_LIMIT, seed=seed, stop_token_ids=stops)
        splits = {"train": _described(prepared.train, prepared.train_conversations, prepared.report.train)}
        if prepared.eval is not None and prepared.all_eval_conversations is not None and prepared.report.eval:
            splits["eval"] = _described(prepared.eval, prepared.all_eval_conversations, prepared.report.eval)
        return DataDescription(
            config.model.name_or_path,
            prepared.report.sources,
            splits,
            _near(prepared),
            _findings(data, prepared.train_conversations),
            prepared.report.notices,
            [preview(tokenizer, prepared.train[place]) for place in range(min(_EXAMPLES, len(prepared.train)))],
        )


def _described(rows: Any, conversations: Conversations, counts: SplitReport) -> SplitDescription:
    labels = np.array([sum(label != IGNORED for label in row["labels"][1:]) for row in rows], np.int64)
    turns = np.zeros(len(conversations), np.int64)
    systems: Counter[str] = Counter()
    texts: list[str] = []
    for place, messages in enumerate(conversations):
        turns[place] = sum(message["role"] != "system" for message in messages)
        systems.update(message["content"] for message in messages[:1] if message["role"] == "system")
        texts.append(_text(messages))
    commonest = next(((text, count / len(conversations)) for text, count in systems.most_common(1)), None)
    tokens = Spread.of(row_lengths(rows))
    return SplitDescription(counts, tokens, Spread.of(labels), Spread.of(turns), commonest, language_shares(texts))


def _near(prepared: PreparedData) -> int:
    """Return how many rows are nearly, and not wholly, the same as another."""
    train = list(dict.fromkeys(map(_text, prepared.train_conversations)))
    if prepared.all_eval_conversations is None:
        return len(near_duplicates(train))
    known = set(train)
    held_out = [text for text in map(_text, prepared.all_eval_conversations) if text not in known]
    return len(near_duplicates(held_out, train))


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(str(message["content"]) for message in messages if message["role"] != "system")


def _findings(data: DataConfig, conversations: Conversations) -> list[Finding]:
    found: dict[str, list[int]] = {what: [] for what in _LOOKED_FOR}
    for place, messages in enumerate(conversations):
        for what, is_there in _LOOKED_FOR.items():
            if is_there(messages):
                found[what].append(place)
    shown = {place: conversations.stored(place) for some in found.values() for place in some[:_PLACES]}
    places = places_of(data, set(shown.values())) if shown else {}
    return [
        Finding(what, len(some), [places[shown[place]] for place in some[:_PLACES] if shown[place] in places])
        for what, some in found.items()
        if some
    ]


def _has_empty_question(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "user" and not str(message["content"]).strip() for message in messages)


def _repeats_question(messages: Sequence[Message]) -> bool:
    pairs = itertools.pairwise(messages)
    return any(b["role"] == "assistant" and a["content"].strip() == b["content"].strip() != "" for a, b in pairs)


def _begins_with_answer(messages: Sequence[Message]) -> bool:
    return next((message["role"] for message in messages if message["role"] != "system"), "") == "assistant"


def _has_email(messages: Sequence[Message]) -> bool:
    return any(_EMAIL.search(str(message["content"])) for message in messages)


def _has_card_number(messages: Sequence[Message]) -> bool:
    return any(_is_card(found[0]) for message in messages for found in _CARD.finditer(str(message["content"])))


def _is_card(text: str) -> bool:
    """Return whether the digits have the check digit of card numbers (Luhn, ISO/IEC 7812), and are not all the same."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_LOOKED_FOR: dict[str, Callable[[Sequence[Message]], bool]] = {
    "a question is empty": _has_empty_question,
    "an answer repeats what it answers": _repeats_question,
    "the first turn is an answer": _begins_with_answer,
    "an e-mail address": _has_email,
    "a card number": _has_card_number,
}
