"""Count what was found in the data, and write notices about it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from philora.dataset.row_choice import wanted_rows

logger = logging.getLogger("philora.dataset")


@dataclass
class SourceReport:
    """Describe what was read from one source."""

    name: str
    format: str
    records: int
    weight: float = 1.0
    unread_fields: dict[str, int] = field(default_factory=dict)
    """Fields of records and keys of turns that nothing reads, with the records that have them."""
    unread_parts: list[str] = field(default_factory=list)
    """Files, splits and lists of the source that are not read."""
    spelled: dict[str, int] = field(default_factory=dict)
    """Control texts written out in messages, as `ControlTexts.spelled` names them, with the records that have them."""
    recognised: str = ""
    """How the shape was recognised."""
    examples: list[str] = field(default_factory=list)
    """The first conversations, each in one line."""
    invalid: int = 0
    """Records that cannot be used and were left out."""
    invalid_records: list[str] = field(default_factory=list)
    """The faults of the first ones, with their locations."""

    def __str__(self) -> str:
        return f"{self.name}: {self.records:,} records, read as {self.format} ({self.recognised})"


@dataclass
class SplitReport:
    """Count the rows of one split as it is trained or evaluated on, with weights applied."""

    rows: int = 0
    tokens: int = 0
    labels: int = 0
    longest_tokens: int = 0
    """The longest conversation before truncation."""
    truncated: int = 0
    dropped: int = 0
    """Records without a row: over the limit of tokens, or without a label after truncation."""
    dropped_overlong: int = 0
    dropped_unlabelled: int = 0
    duplicates: int = 0
    """Rows beyond the first of every group of equal conversations; they are kept."""
    two_user_turns: int = 0
    folded_system: int = 0
    """System turns that the template drops, kept at the beginning of the user's turn."""
    boundary_mismatches: int = 0
    """Rows whose prompt, tokenised alone, is no prefix of the row."""
    control_tokens: int = 0
    """Rows whose messages spell out control tokens of the tokenizer."""
    stop_numbers: int = 0
    """Rows that end in the number of a stop token, written as text."""
    turns_as_text: int = 0
    """Rows of plain text with turns of user and assistant written in it."""


@dataclass
class DataReport:
    """Describe what was found in the data, and what was done with it."""

    splits: dict[str, SplitReport] = field(default_factory=dict)
    sources: dict[str, list[SourceReport]] = field(default_factory=dict)
    in_both: int = 0
    """Evaluation rows that are also in the training set."""
    notices: list[str] = field(default_factory=list)
    streaming: bool = False
    """The training set is read while training: its counts are not known."""

    @property
    def train(self) -> SplitReport:
        """Return the training split."""
        return self.splits["train"]

    @property
    def eval(self) -> SplitReport | None:
        """Return the evaluation split, if there is one."""
        return self.splits.get("eval")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; every split is under its name."""
        values = asdict(self)
        return {**values.pop("splits"), **values}


def notice_share(report: DataReport, part: float, rows: int, held_out: int) -> None:
    """Log that more rows than the fraction are held out; note it where fewer are, because equal rows stay together."""
    wanted = wanted_rows(part, rows)
    if part < 1 and wanted > max(1, round(part * rows)):
        logger.info(
            "eval: %d of %d rows are held out; a share of %g would be too few for reliable scores", wanted, rows, part
        )
    if held_out != wanted:
        add_notice(
            report,
            f"eval: {held_out:,} of {rows:,} rows are held out, not {wanted:,} as data.eval={part:g} asks: equal "
            "conversations stay on one side, and there are many of them. Remove duplicates, or give data.eval a file.",
        )


def notice_source(report: DataReport, role: str, source: SourceReport) -> None:
    """Name what of a source is not read or left out, and the control texts in it."""
    if source.invalid:
        more = f" (the first {len(source.invalid_records)})" if source.invalid > len(source.invalid_records) else ""
        listed = "".join(f"\n  {record}" for record in source.invalid_records)
        count = f"{source.invalid:,} of {source.records:,} records"
        add_notice(report, f"{role}: {count} of {source.name} cannot be used and are left out{more}:{listed}")
    if source.unread_parts:
        add_notice(report, f"{role}: of {source.name} is not read: {'; '.join(source.unread_parts)}.")
    if source.unread_fields:
        fields = ", ".join(f"{name} ({count:,})" for name, count in source.unread_fields.items())
        add_notice(
            report,
            f"{role}: fields of {source.name} that are not read, with the number of records: {fields}. If the model "
            "needs their content, map them with columns; otherwise ignore this notice.",
        )
    texts = {
        "end": "{text} is written out at the end of answers in {count:,} records, and the chat template writes it as "
        "well, so it is trained twice. Remove it from the data",
        "own": "{text} is written out inside messages of {count:,} records and becomes the control token. Remove it, "
        "unless that is intended",
        "foreign": "{text} is written out in {count:,} records. It belongs to another model; this one has no such "
        "token and learns it as letters. Remove it: the chat template separates the turns",
    }
    for key, records in source.spelled.items():
        kind, _, text = key.partition(" ")
        add_notice(report, f"{role}: {source.name}: {texts[kind].format(text=text, count=records)}.")


def notice_splits(report: DataReport, max_length: int) -> None:
    """Add a notice for everything in the data that a person should know."""
    for role, sources in report.sources.items():
        for source in sources:
            notice_source(report, role, source)
    for name, split in report.splits.items():
        found = [
            (
                split.truncated,
                f"{split.truncated} conversations are longer than {max_length} tokens and were cut there "
                f"(the longest has {split.longest_tokens})",
            ),
            (
                split.dropped_overlong,
                f"{split.dropped_overlong} conversations are longer than {max_length} tokens and were left out",
            ),
            (
                split.dropped_unlabelled,
                f"{split.dropped_unlabelled} conversations have no answer within {max_length} tokens and were left out",
            ),
            (split.duplicates, f"{split.duplicates} rows are exact duplicates of others; they are kept"),
            (split.two_user_turns, f"{split.two_user_turns} rows have two user turns in a row"),
            (
                split.folded_system,
                f"the chat template drops system turns: in {split.folded_system} rows the system text now begins the "
                "user's turn",
            ),
            (
                split.boundary_mismatches,
                f"in {split.boundary_mismatches} rows the prompt ends in other tokens than the prompt tokenised alone: "
                "generation starts from tokens that training did not see",
            ),
            (
                split.stop_numbers if 2 * split.stop_numbers > split.rows else 0,  # else it may be part of the answer
                f"{split.stop_numbers} rows end in the number of a stop token, written as text: the model would learn "
                "to write digits. Leave it out: the chat template ends each turn with the token itself",
            ),
            (
                split.turns_as_text,
                f"{split.turns_as_text} rows are plain text with turns of user and assistant written in it: the loss "
                "is on the user's words too, and the markup may differ from the chat template's. Give the turns as "
                "messages",
            ),
        ]
        for count, text in found:
            if count:
                add_notice(report, f"{name}: {text}.")
    if report.in_both:
        add_notice(report, f"{report.in_both} rows of eval are also in train: its scores will be too good.")


def add_notice(report: DataReport, text: str) -> None:
    """Keep a notice in the report, and log it."""
    report.notices.append(text)
    logger.warning("%s", text)
