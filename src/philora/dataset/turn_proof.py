"""Find every assistant turn in the rendering of a chat template, and verify its position.

For every assistant turn i, the rendering of the turns before it with the generation prompt must be the beginning of
the complete rendering: what follows is what the model has to write, up to and with the first stop token. No marker
string is searched for, so any template that is consistent works and one that is not is refused.

The proof costs a time linear in the turns. The text that a template writes between one answer and the next is
learned once for each order of roles between them, from a rendering with marks. Where it is found again, the answer
begins behind it; prefixes are rendered for the answers number 1, 2, 4, 8, ... and the last, and wherever the text is
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from philora.dataset.arrangement import TEMPLATE_ERRORS, Arrangement, any_of, function_names
from philora.dataset.messages import Message
from philora.dataset.records import Fault
from philora.errors import DataError, fault


@dataclass(frozen=True, slots=True)
class Turn:
    """Locate one assistant turn in a rendering, in characters: content from `start` to `end`, then a stop token."""

    message: int
    start: int
    end: int
    stop: int


class TemplateFault(DataError):
    """Report a chat template that cannot be trained with; no record is to blame."""


class TurnProof:
    """Locate the assistant turns of conversations for one tokenizer, its chat template and its stop tokens.

    Args:
        tokenizer: A tokenizer; where it has no chat template, rendering is refused.
        arrangement: The arrangement of conversations for its template.
        stops: The texts of the stop tokens.
    """

    def __init__(self, tokenizer: Any, arrangement: Arrangement, stops: list[str]) -> None:
        self.tokenizer = tokenizer
        self.arrangement = arrangement
        self.stops = stops
        self._stop_pattern = any_of(stops)
        self._opening: tuple[str, str] | None = None

    def render(self, messages: list[Message], *, tools: list[Any] | None = None, generation: bool = False) -> str:
        """Return the text of the chat template.

        Raises:
            Fault: the template refuses these messages.
            TemplateFault: there is no template.
        """
        if self.tokenizer.chat_template is None:
            expected = "a chat template for records with turns"
            todo = "Use an instruct model, or records with the field text"
            raise TemplateFault(fault("tokenizer", "chat_template", None, expected, todo))
        try:
            return self.arrangement.render(messages, tools=tools, generation=generation)
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise Fault("roles", roles, f"turns that the chat template renders, but it fails: {error}") from error

    def locate(self, messages: list[Message], tools: list[Any] | None = None) -> tuple[str, list[Turn]]:
        """Render a conversation and find each assistant turn in it, as described at the top of this module."""
        text = self.render(messages, tools=tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        headers: dict[Any, tuple[str, ...]] = {}
        turns: list[Turn] = []
        after = first = 0  # the end of the answer before, and the message behind it
        stop_is_proved = True
        for number, index in enumerate(answers, start=1):
            message, between = messages[index], messages[first:index]
            key = (first == 0, tuple([(item["role"], len(item)) for item in between]))
            start = _behind(text, after, headers[key], between) if key in headers else None
            exact = number & (number - 1) == 0 or index == answers[-1]
            if start is None and not stop_is_proved:
                after = self._stop_end(text, messages, turns, tools)
            if index == 0:
                start = self._opening_length(text, message["content"])
            elif start is None or exact:
                start = self._answer_start(text, messages, index, tools)
                if key not in headers:
                    headers[key] = self._header(text[:after], messages, first, index, tools)
            end = _content_end(text, start, message, index)
            stop = self._stop_pattern.search(text, end)
            turns.append(Turn(index, start, end, stop.start() if stop else end))
            stop_is_proved = exact or stop is None
            after = self._stop_end(text, messages, turns, tools) if stop_is_proved or stop is None else stop.end()
            self._check_answer(text, turns[-1], message)
            first = index + 1
        self._check_shown(text, after, messages, first, tools)
        return text, turns

    def _answer_start(self, text: str, messages: list[Message], index: int, tools: list[Any] | None) -> int:
        """Return where an answer begins: after the rendering of the turns before it."""
        prefix = self.render(messages[:index], tools=tools, generation=True)
        if not text.startswith(prefix):
            raise TemplateFault(_inconsistent(text, prefix, index))
        return len(prefix)

    def _header(
        self, before: str, messages: list[Message], first: int, index: int, tools: list[Any] | None
    ) -> tuple[str, ...]:
        """Return the text around the contents of the turns between two answers, the second one's header included."""
        marks = [f"zq{place}qz" for place in range(first, index)]
        marked = [{**item, "content": mark} for item, mark in zip(messages[first:index], marks, strict=True)]
        rest = self.render([*messages[:first], *marked], tools=tools, generation=True)
        rest = rest[len(before) :] if rest.startswith(before) else rest
        pieces: list[str] = []
        for message, mark in zip(messages[first:index], marks, strict=True):
            piece, found, behind = rest.partition(mark)
            if not found and message["content"].strip():
                raise _left_out(messages, first + len(pieces))
            pieces.append(piece if found else "")
            rest = behind if found else rest
        return (*pieces, rest)

    def _stop_end(self, text: str, messages: list[Message], turns: list[Turn], tools: list[Any] | None) -> int:
        """Verify that a stop token follows the last turn found directly, and return its end."""
        turn = turns[-1]
        is_last = turn.message + 1 == len(messages)
        upto = text if is_last else self.render(messages[: turn.message + 1], tools=tools)
        limit = common_length(text, upto, turn.end)
        stop = self._stop_pattern.search(text, turn.end, limit)
        if stop is None:
            seen = text[turn.end : max(limit, turn.end + 20)]
            expected = f"a stop token ({', '.join(self.stops)}) after the answer of turn {turn.message}"
            todo = (
                "A model trained this way never learns to stop: use the template of the model, or add the token that "
                "its template writes there to the stop tokens"
            )
            raise TemplateFault(fault("tokenizer", "chat_template", seen, expected, todo))
        turns[-1] = Turn(turn.message, turn.start, turn.end, stop.start())
        return stop.end()

    def _check_answer(self, text: str, turn: Turn, message: Message) -> None:
        """Refuse an answer of which the template shows nothing, or not its tool calls."""
        shown = text[turn.start : turn.stop]
        calls = message.get("tool_calls")
        lost = [name for name in function_names(calls or ()) if name not in shown]
        if lost or not shown.strip():
            found = f"tool_calls of {', '.join(lost)}" if lost else message["content"]
            todo = (
                "This model's template leaves tool calls out, so an answer without them would be learned: write the "
                "calls into the content, use a model whose template shows them, or remove the record"
            )
            raise Fault(f"turn {turn.message}", found, "an answer that the chat template shows", todo)

    def _check_shown(self, text: str, after: int, messages: list[Message], first: int, tools: list[Any] | None) -> None:
        """Refuse turns behind the last answer that the template leaves out."""
        for index in range(first, len(messages)):
            content = messages[index]["content"].strip()
            if not content or content in text[after:]:
                continue
            mark = f"zq{index}qz"
            marked = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
            if mark not in self.render(marked, tools=tools):
                raise _left_out(messages, index)

    def _opening_length(self, text: str, content: str) -> int:
        """Return where the content of an assistant turn begins that nothing precedes; templates render no list."""
        if self._opening is None:
            probe = [{"role": "user", "content": "zq0qz"}]
            self._opening = (self.render(probe, generation=True), str(self.tokenizer.bos_token or ""))
        prompt, bos = self._opening
        start = text.find(content.strip())
        before = text[: max(start, 0)]
        before = before.removeprefix(bos) if bos else before
        if start < 0 or not prompt.endswith(before):
            raise TemplateFault(_inconsistent(text, prompt, 0))
        return start


def _behind(text: str, position: int, pieces: tuple[str, ...], messages: list[Message]) -> int | None:
    """Return where the text continues after these pieces with the contents between; None where it differs."""
    if not text.startswith(pieces[0], position):
        return None
    position += len(pieces[0])
    for message, piece in zip(messages, pieces[1:], strict=True):
        content = message["content"]
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form, position) and text.startswith(piece, position + len(form)):
                position += len(form) + len(piece)
                break
        else:
            return None
    return position


def _left_out(messages: list[Message], index: int) -> Fault:
    expected = f"a turn that the chat template shows, but it leaves out turns of the role {messages[index]['role']}"
    todo = "Use a model whose template knows this role, write the turn as one of the user, or remove the record"
    return Fault(f"turn {index}", messages[index]["content"], expected, todo)


def _content_end(text: str, start: int, message: Message, index: int) -> int:
    content = message["content"]
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if form and text.startswith(form, start):
            return start + len(form)
    if message.get("tool_calls") or message.get("reasoning_content") or message.get("thinking"):
        # The template arranges these its own way; the answer ends at the first stop token.
        found = text.find(content.strip(), start) if content.strip() else start
        return found + len(content.strip()) if found >= 0 else start
    expected = "the content of this turn directly after the generation prompt"
    todo = (
        "The chat template rewrites this answer: remove what it treats in a special way (such as <think> parts), or "
        "use a template that keeps every answer"
    )
    raise Fault(f"turn {index}", text[start : start + 60], expected, todo)


def common_length(text: str, other: str, start: int) -> int:
    """Length of the common beginning of two texts that agree up to `start`."""
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text[start:], other[start:], strict=False), start)
    return next((place for place, (first, second) in pairs if first != second), min(len(text), len(other)))


def _inconsistent(text: str, prefix: str, index: int) -> str:
    at = common_length(text, prefix, 0)
    around = slice(max(0, at - 20), at + 20)
    expected = (
        f"the turns before turn {index}, rendered with the generation prompt, as the beginning of the conversation"
    )
    todo = (
        "This template renders a turn differently once others follow, so answers cannot be separated from the prompt: "
        "use a template that renders each turn the same wherever it is"
    )
    return fault("tokenizer", "chat_template", f"{text[around]} / {prefix[around]}", expected, todo)
