"""Score a model on held-out data: loss, perplexity, token accuracy, and answers that equal the reference.

`score` uses labels, `evaluate` also generates answers. Both use the model in its current state: the base is evaluated
by the same calls with the adapter disabled, on the same rows and prompts, so that the two can be compared.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from philora.evaluation.measures import (
    EXACT_MATCH,
    LOSS,
    PERPLEXITY,
    TOKEN_ACCURACY,
    Measure,
    Paired,
    exp_or_inf,
    of_means,
    paired,
)
from philora.families import longrope_switch_tokens
from philora.generation.batches import (
    Answer,
    GenerationSettings,
    NotFiniteError,
    device_of,
    evaluating,
    generate,
    pad,
    prompt_tokens,
    window_tokens,
)
from philora.generation.progress import advance
from philora.kernels.memory import out_of_memory, return_freed_memory

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token without a loss, as in PyTorch."""

CHUNK_ELEMENTS = 2**25
"""Logits at a time in `score`: 128 MiB in fp32."""

Message = dict[str, Any]


class TokenScores(NamedTuple):
    """Scores of the labels: means over the labelled tokens."""

    loss: float
    perplexity: float
    token_accuracy: float
    label_tokens: int


class RowScores(NamedTuple):
    """Scores of the labels of one row: sums over its labelled tokens."""

    loss: float
    correct: int
    label_tokens: int


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one held-out set.

    Attributes:
        loss: Mean cross-entropy over the labelled tokens, in nats.
        perplexity: exp(loss).
        token_accuracy: Share of labelled tokens that the model ranks first, given the true ones before them.
        label_tokens: Tokens that the three are means of.
        exact_match: Share of answers that equal their reference; None if none was generated.
        exact_match_count: Number of answers that equal their reference.
        answers: Number of generated answers.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    label_tokens: int
    exact_match: float | None = None
    exact_match_count: int = 0
    answers: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """Return plain values for JSON."""
        return {name: _finite(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Read what `to_dict` wrote; what is missing or null becomes NaN, or 0 for a count."""
        empty = cls(loss=math.nan, perplexity=math.nan, token_accuracy=math.nan, label_tokens=0)
        known = {entry.name for entry in fields(cls)}
        return cls(**(asdict(empty) | {k: v for k, v in values.items() if k in known and v is not None}))


@dataclass(frozen=True)
class Sample:
    """A prompt, its reference, and a model's answer.

    Attributes:
        prompt: The messages up to the assistant's turn.
        reference: The assistant's turn in the data.
        answer: The assistant's turn by the model.
        matched: `exact_match` of the two.
        stopped: Whether the model ended its answer by itself.
        tokens: Tokens generated.
    """

    prompt: list[Message]
    reference: str
    answer: str
    matched: bool
    stopped: bool
    tokens: int

    @property
    def question(self) -> str:
        """Return what identifies the question: equal questions have the same."""
        return repr((self.prompt, self.reference))


@dataclass(frozen=True)
class Evaluation:
    """Scores, the answers they were computed from, and the time.

    Attributes:
        scores: The scores.
        samples: Answers in the order of the conversations, without those that are too long.
        seconds: Wall time.
        too_long: Conversations left out because their prompt fills the model's window.
        rows: The sums of every row of the data for loss and token accuracy.
    """

    scores: Scores
    samples: list[Sample]
    seconds: float
    too_long: int = 0
    rows: list[RowScores] = field(default_factory=list)


METRICS = (LOSS, PERPLEXITY, TOKEN_ACCURACY, EXACT_MATCH)
"""Scores of every run, before and after training."""


class Comparison(NamedTuple):
    """A row of the before/after table, as text."""

    metric: str
    before: str
    after: str
    change: str


def score(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, batch_tokens: int = 8192
) -> TokenScores:
    """Compute loss, perplexity and token accuracy of a model on tokenised rows.

    Every labelled token counts once, whatever batch it is in. The output layer is applied in chunks and at labelled
    positions only, so that not all logits exist at the same time.

    Args:
        model: A causal language model of transformers, or a PeftModel around one.
        rows: `input_ids` and `labels` (-100 for no loss) of equal length, such as a `datasets.Dataset`. A row
            with `seq_lengths` is a pack, whose sequences are scored separately.
        pad_token_id: Pads rows of unequal length; it is masked, so any id works.
        batch_tokens: Most positions of a batch, including padding; a longer row is a batch by itself.

    Returns:
        Means over all labelled tokens; NaN if there is none.

    Numerics:
        The model computes in its own dtype; logits are cast to fp32 before the softmax, and the tokens' losses are
        added in double precision.

    Cost:
        Peak memory besides the model: a batch of hidden states and about three times `CHUNK_ELEMENTS` logits in fp32.
    """
    return summary(score_rows(model, rows, pad_token_id=pad_token_id, batch_tokens=batch_tokens))


def summary(rows: Sequence[RowScores]) -> TokenScores:
    """Return means over all labelled tokens; NaN if there is none."""
    count = sum(row.label_tokens for row in rows)
    if count == 0:
        return TokenScores(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(row.loss for row in rows) / count
    return TokenScores(mean, exp_or_inf(mean), sum(row.correct for row in rows) / count, count)


def score_rows(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, batch_tokens: int = 8192
) -> list[RowScores]:
    """Compute the sums behind `score` for every row; arguments, numerics and cost are those of `score`.

    A batch that does not fit into memory is halved, and so are later ones of its size.
    """
    sequences = list(_sequences(rows))
    device = device_of(model)
    sums = [RowScores(0.0, 0, 0)] * len(rows)
    most = math.inf  # the most positions that are known to fit into memory
    scored = 0
    with evaluating(model), torch.inference_mode():
        logits_of = _label_logits(model, rows, sequences, device)
        for batch in _token_batches(sequences, batch_tokens, longrope_switch_tokens(model.config)):
            pending = [batch]
            while pending:
                part = pending.pop()
                pieces = [_read(rows, entry) for entry in part]
                positions = len(part) * max(len(ids) for ids, _ in pieces)
                found = None
                if positions <= most or len(part) == 1:
                    found = _score_batch(logits_of, pieces, pad_token_id, device)
                    if found is None:
                        most = positions // 2
                        logger.warning("out of memory with %d positions at once; continuing with %d", positions, most)
                        clear_device_cache(garbage_collection=True)
                if found is None:
                    half = len(part) // 2
                    pending += [part[half:], part[:half]]
                    continue
                for piece, scores in zip(part, found, strict=True):
                    sums[piece.row] = RowScores(*map(operator.add, sums[piece.row], scores))
                scored += len(part)
                advance("rows scored", scored, len(sequences))
    return sums


def _score_batch(
    logits_of: Any, pieces: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int, device: torch.device
) -> list[tuple[float, int, int]] | None:
    """Return loss, correct tokens and labelled tokens of every sequence; None if several do not fit into memory."""
    try:
        input_ids = pad([ids for ids, _ in pieces], pad_token_id, "right", device)
        labels = pad([labels for _, labels in pieces], IGNORED, "right", device)
        mask = pad([[1] * len(ids) for ids, _ in pieces], 0, "right", device)
        wanted = labels[:, 1:] != IGNORED
        targets = labels[:, 1:][wanted]
        owners = wanted.nonzero()[:, 0]
        loss = torch.zeros(len(pieces), dtype=torch.float64, device=device)
        correct = torch.zeros(len(pieces), dtype=torch.int64, device=device)
        start = 0
        for logits in logits_of(input_ids, mask, wanted) if len(targets) else ():
            target, owner = (entry[start : start + len(logits)] for entry in (targets, owners))
            loss.index_add_(0, owner, cross_entropy(logits, target, reduction="none").double())
            correct.index_add_(0, owner, (logits.argmax(dim=-1) == target).long())
            start += len(logits)
        return list(zip(loss.tolist(), correct.tolist(), wanted.sum(1).tolist(), strict=True))
    except Exception as error:
        if len(pieces) == 1 or not out_of_memory(error):
            raise
        return None


def exact_match(answer: str, reference: str) -> bool:
    """Return whether an answer equals the reference.

    White space at the ends is ignored, and a run of white space counts as one space. Letter case and punctuation must
    be equal.

    Example:
        >>> exact_match(" Run  philora demo.\\n", "Run philora demo.")
        True
        >>> exact_match("run philora demo", "Run philora demo.")
        False
    """
    return answer.split() == reference.split()


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    conversations: Sequence[tuple[Sequence[Mapping[str, Any]], str]],
    settings: GenerationSettings | None = None,
    *,
    pad_token_id: int,
    batch_tokens: int = 8192,
) -> Evaluation:
    """Score the rows and answer the conversations.

    Args:
        model: A causal language model of transformers, or a PeftModel around one in its current state: with its
            adapter, or inside `model.disable_adapter()` for the base.
        tokenizer: Its tokenizer; with a chat template if there are conversations.
        conversations: Pairs of the messages up to an assistant's turn, and that turn's text.
        settings: As for `generate`.
        rows, pad_token_id, batch_tokens: As for `score`.

    Returns:
        The scores and a sample for every conversation whose prompt fits the model's window.

    Raises:
        ModelError: There are conversations, but the tokenizer has no chat template.
    """
    started = time.perf_counter()
    # Training, scoring and answering allocate different sizes, which do not fit into each other's freed blocks.
    return_freed_memory()
    row_scores = score_rows(model, rows, pad_token_id=pad_token_id, batch_tokens=batch_tokens)
    return_freed_memory()
    window = window_tokens(model)
    # Prompts are the start of training rows, in which a control token inside a message is that token.
    settings = replace(settings or GenerationSettings(), control_tokens=True)
    prompts = prompt_tokens(tokenizer, [prompt for prompt, _ in conversations], control_tokens=True)
    lengths = [len(ids) for ids in prompts]
    fitting = [pair for pair, length in zip(conversations, lengths, strict=True) if window is None or length < window]
    try:
        answers = generate(model, tokenizer, [prompt for prompt, _ in fitting], settings)
    except NotFiniteError as error:  # a model that computes NaN gets empty answers, so that its evaluation shows it
        logger.warning("no answers: %s", error)
        answers = [Answer("", 0, stopped=False) for _ in fitting]
    return_freed_memory()
    samples = [_sample(prompt, reference, answer) for (prompt, reference), answer in zip(fitting, answers, strict=True)]
    seconds = time.perf_counter() - started
    too_long = len(conversations) - len(fitting)
    return Evaluation(_scores(row_scores, samples), samples, seconds, too_long, row_scores)


def _scores(rows: Sequence[RowScores], samples: Sequence[Sample]) -> Scores:
    matches = sum(sample.matched for sample in samples)
    share = matches / len(samples) if samples else None
    return Scores(*summary(rows), exact_match=share, exact_match_count=matches, answers=len(samples))


def compare(before: Evaluation, after: Evaluation) -> list[Paired]:
    """Return the figures of `METRICS` with intervals, of both models on the same rows and conversations.

    Raises:
        ValueError: They had different prompts.
    """
    compared = []
    if before.rows and after.rows:
        sums = [
            {
                LOSS: of_means([row.loss for row in entry.rows], [row.label_tokens for row in entry.rows]),
                TOKEN_ACCURACY: of_means([row.correct for row in entry.rows], [row.label_tokens for row in entry.rows]),
            }
            for entry in (before, after)
        ]
        labelled = np.array([row.label_tokens > 0 for row in after.rows])
        for measure, kind in ((LOSS, LOSS), (PERPLEXITY, LOSS), (TOKEN_ACCURACY, TOKEN_ACCURACY)):
            compared.append(paired(measure, *(entry[kind][labelled] for entry in sums)))
    if before.samples and after.samples:
        if [sample.question for sample in before.samples] != [sample.question for sample in after.samples]:
            raise ValueError("compare: samples - expected the same prompts before and after.")
        matched = [of_means([float(sample.matched) for sample in entry.samples]) for entry in (before, after)]
        compared.append(paired(EXACT_MATCH, *matched))
    return compared


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Join the evaluations of several parts of a held-out set, in the order of the data.

    Numerics:
        Means are weighted by labelled tokens in double precision: they equal those of one evaluation of all, except for
        the order of the sums. `seconds` is that of the longest part.
    """
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part.rows]
    samples = [sample for part in parts for sample in part.samples]
    seconds, too_long = max(part.seconds for part in parts), sum(part.too_long for part in parts)
    return Evaluation(_scores(rows, samples), samples, seconds, too_long, rows)


def compare_table(before: Scores, after: Scores) -> list[Comparison]:
    """Return the before/after table as text: metric, before, after and change.

    A figure that neither side has has no row; one that a single side lacks is a dash.
    """
    table = []
    for metric in METRICS:
        old, new = (_number(getattr(entry, metric.field)) for entry in (before, after))
        if old is None and new is None:
            continue
        before_text, after_text = shown_figure(old, metric), shown_figure(new, metric)
        table.append(Comparison(metric.title, before_text, after_text, _change(old, new, metric)))
    return table


class StageComparison(NamedTuple):
    """A row of the table of a run that started from an adapter; the change is from the start to the result."""

    metric: str
    base: str
    start: str
    after: str
    change: str


def stage_table(base: Scores, start: Scores, after: Scores) -> list[StageComparison]:
    """Return the table of a run that started from an adapter: base, start and result, as text."""
    bases = {row.metric: row.before for row in compare_table(base, after)}
    return [
        StageComparison(row.metric, bases.get(row.metric, "–"), row.before, row.after, row.change)
        for row in compare_table(start, after)
    ]


def shown_figure(value: float | None, measure: Measure | Paired) -> str:
    """Format a figure, or a dash if there is none."""
    if value is None or math.isnan(value):
        return "–"
    if measure.percent:
        return f"{100 * value:.1f}%"
    return f"{value:.{measure.digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def change_of(figure: Paired) -> str:
    """Format the difference; that of shares in percentage points."""
    return _change(_number(figure.before), _number(figure.after), figure)


def ends_of(figure: Paired, between: str = " to ") -> str:
    """Format the ends of the difference's 95% interval, without a unit; empty if there is none."""
    if figure.low is None or figure.high is None:
        return ""
    size = max(abs(figure.before), abs(figure.after))
    return between.join(_signed(entry, figure, size).removesuffix(" pp") for entry in (figure.low, figure.high))


def interval_of(figure: Paired) -> str:
    """Format the difference with its 95% interval in brackets."""
    ends = ends_of(figure, ", ")
    return f"{change_of(figure)} [{ends}]" if ends else change_of(figure)


def better(metric: Measure, before: float | None, after: float | None) -> bool | None:
    """Return whether a figure improved; None if it is equal or a side lacks it."""
    before, after = _number(before), _number(after)
    if before is None or after is None or before == after:
        return None
    return (after > before) == metric.higher_is_better


def pick_samples(before: Evaluation, after: Evaluation, n: int = 3) -> list[dict[str, Any]]:
    """Choose a few instructive prompts with the answers of base and adapter.

    The first is a conversation of several turns, if there is one. Then follow an answer that became right and one that
    is wrong, so that the page does not show successes only; then further answers that became right, that changed, and
    the rest. Between equals the order of the data decides, so the same evaluations give the same samples.

    Returns:
        At most `n`, in the form of `results.json`.
    """
    others = {sample.question: sample for sample in before.samples}
    pairs = [(others[sample.question], sample) for sample in after.samples if sample.question in others]

    def rank(pair: tuple[Sample, Sample]) -> int:
        base, adapter = pair
        if adapter.matched and not base.matched:
            return 0
        return 1 if base.answer != adapter.answer else 2

    ranked = sorted(pairs, key=rank)  # stable: the data's order decides between equals
    first = [
        next((pair for pair in ranked if _user_turns(pair[1]) > 1), None),
        next((pair for pair in ranked if _user_turns(pair[1]) == 1 and pair[1].matched), None),
        next((pair for pair in ranked if _user_turns(pair[1]) == 1 and not pair[1].matched), None),
    ]
    chosen: list[tuple[Sample, Sample]] = []
    for pair in [*(entry for entry in first if entry is not None), *ranked]:
        if pair not in chosen and len(chosen) < n:
            chosen.append(pair)
    return [
        {
            "prompt": adapter.prompt,
            "reference": adapter.reference,
            "base": base.answer,
            "adapter": adapter.answer,
            "base_matched": base.matched,
            "adapter_matched": adapter.matched,
        }
        for base, adapter in chosen
    ]


class _Piece(NamedTuple):
    """A sequence of a dataset: its row and its position in the row."""

    row: int
    start: int
    stop: int


def _sequences(rows: Sequence[Mapping[str, Any]]) -> Iterator[_Piece]:
    """Yield every sequence of at least two tokens: a row is one, a pack has one for every length."""
    for index, row in enumerate(rows):
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            if length > 1:
                yield _Piece(index, start, start + length)
            start += length


def _read(rows: Sequence[Mapping[str, Any]], piece: _Piece) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of one sequence."""
    row = rows[piece.row]
    return row["input_ids"][piece.start : piece.stop], row["labels"][piece.start : piece.stop]


def _token_batches(sequences: Sequence[_Piece], batch_tokens: int, switch: int | None) -> Iterator[list[_Piece]]:
    """Yield batches of sequences of similar length, longest first, up to `batch_tokens` with padding."""
    batch: list[_Piece] = []
    width = 0
    for piece in sorted(sequences, key=lambda piece: (piece.start - piece.stop, piece)):
        length = piece.stop - piece.start
        crosses = switch is not None and length <= switch < width
        if batch and ((len(batch) + 1) * width > batch_tokens or crosses):
            yield batch
            batch = []
        if not batch:
            width = length
        batch.append(piece)
    if batch:
        yield batch


def _hidden_states(causal: Any, input_ids: Tensor, mask: Tensor) -> Any:
    return causal.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state


def _from_hidden(causal: Any, input_ids: Tensor, mask: Tensor, wanted: Tensor) -> Iterator[Tensor]:
    """Yield logits at labelled positions by the output layer, from the decoder's hidden states and in chunks.

    Shapes:
        input_ids and mask (B, T), wanted (B, T-1); yields (positions, V).
    """
    head = causal.get_output_embeddings()
    hidden = _hidden_states(causal, input_ids, mask)[:, :-1][wanted]
    for chunk in hidden.split(max(1, CHUNK_ELEMENTS // int(getattr(head, "out_features", 2**16)))):
        yield head(chunk).float()


def _from_model(model: Any, input_ids: Tensor, mask: Tensor, wanted: Tensor) -> Iterator[Tensor]:
    """Yield the logits by the model's forward, in a chunk for every row, for models that change the head's output."""
    for row in range(len(input_ids)):
        logits = model(input_ids=input_ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
        # Prompt learning puts virtual tokens before the row; the row's own are the last.
        yield logits[0, -input_ids.shape[1] : -1][wanted[row]].float()


def _label_logits(
    model: Any, rows: Sequence[Mapping[str, Any]], sequences: Sequence[_Piece], device: torch.device
) -> functools.partial[Iterator[Tensor]]:
    """Return the cheaper way to the logits if it gives the model's own logits on a few tokens.

    Some models scale or cap their logits after the output layer, and some adapters add virtual tokens. They are found
    by this comparison, without a list of them.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not sequences or not hasattr(causal, "get_decoder") or causal.get_output_embeddings() is None:
        return functools.partial(_from_model, model)
    ids = _read(rows, sequences[0])[0][:8]
    input_ids = torch.tensor([ids], dtype=torch.long, device=device)
    mask = torch.ones_like(input_ids)
    own = model(input_ids=input_ids, attention_mask=mask).logits
    logits = causal.get_output_embeddings()(_hidden_states(causal, input_ids, mask))
    same = torch.equal(logits.float(), own.float())
    return functools.partial(_from_hidden, causal) if same else functools.partial(_from_model, model)


def _sample(prompt: Sequence[Mapping[str, Any]], reference: str, answer: Answer) -> Sample:
    matched = exact_match(answer.text, reference)
    messages = [dict(entry) for entry in prompt]
    return Sample(messages, reference, answer.text, matched, stopped=answer.stopped, tokens=answer.tokens)


def _user_turns(sample: Sample) -> int:
    return sum(entry.get("role") == "user" for entry in sample.prompt)


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def _number(value: float | None) -> float | None:
    """Return a figure, or None if it is missing (NaN, from a null in `results.json`)."""
    return None if value is None or math.isnan(value) else value


def _change(before: float | None, after: float | None, metric: Measure | Paired) -> str:
    """Format the difference with its sign and the digits of its figures; that of shares in percentage points."""
    if before is None or after is None:
        return "–"
    return _signed(after - before, metric, max(abs(before), abs(after)))


def _signed(change: float, metric: Measure | Paired, size: float) -> str:
    """Format a difference between figures of about the given size."""
    if math.isnan(change):  # infinite before and after
        return "–"
    if metric.percent:
        return f"{100 * change:+.1f} pp".replace("-", "−")
    digits = metric.digits if max(size, abs(change)) < 1000 else 0
    return f"{change:+,.{digits}f}".replace("-", "−")
