"""Turn conversations into tokens and labels.

Where the assistant turns of a rendering are is proved by `turn_proof`. Most templates put literal text around the
contents, so the proof is made once for a sequence of roles, on contents that cannot be mistaken, and gives a `_Plan`:
the literal pieces between contents. A conversation then needs one rendering: if it equals the pieces and its contents
joined, all places are known; if not (a template that trims or rewrites), this conversation is proved by itself.

Characters become tokens through the offsets of one tokenisation of the complete rendering. Offsets cost a third of
the tokenizer's time, and with templates such as Phi's they add nothing: where an added token is directly before
each answer and the stop token right after it, the added tokens of the plan, found in their order and no other, are the
places. A text with any other added token in it is located by its offsets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from philora.dataset.arrangement import (
    TEMPLATE_ERRORS,
    TOOLS_LEFT_OUT,
    Arrangement,
    split_tools,
    tools_not_shown,
    uncut,
)
from philora.dataset.control_texts import ControlTexts
from philora.dataset.messages import Conversation, Message
from philora.dataset.records import Fault
from philora.dataset.turn_proof import TemplateFault, Turn, TurnProof, common_length
from philora.errors import DataError, fault

Ids: TypeAlias = "npt.NDArray[np.int32]"

IGNORED = -100
"""The label of a token that has no loss."""

Tokenizer: TypeAlias = Any
"""A `transformers.PreTrainedTokenizerBase` backed by the tokenizers library."""

_PLANS_KEPT = 4096
_MARK = re.compile(r"zq\d+qz")
_READ_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a turn that a template may show or not, without a word of the conversation being refused."""


@dataclass(slots=True, eq=False)
class Encoded:
    """Hold one conversation as tokens.

    `spans` are the token ranges with loss, end excluded; `conversation` is what was rendered, with a system turn
    folded into the user's where the template knows none.
    """

    ids: Ids
    spans: list[tuple[int, int]]
    conversation: Conversation
    boundary_mismatch: bool = False
    folded_system: bool = False
    control_tokens: bool = False
    unshown: tuple[str, ...] = ()
    """Keys of turns that have text of which the template shows nothing."""

    @property
    def input_ids(self) -> list[int]:
        """Return the tokens."""
        return [int(index) for index in self.ids]

    @property
    def labels(self) -> list[int]:
        """Return one label a token; -100 where there is no loss."""
        return [int(label) for label in self.label_array()]

    def label_array(self) -> Ids:
        """Return the labels as an array."""
        labels = np.full(len(self.ids), IGNORED, np.int32)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True, slots=True)
class _Plan:
    """Literal text around the contents of one sequence of roles.

    Attributes:
        pieces: one more than there are roles.
        answers: indices of the assistant turns.
        stops: for every answer, where the stop token begins in the piece behind its content.
        controls: the added tokens in the pieces, in order.
        brackets: for every answer, which of `controls` is directly before its first token, and which is its stop
            token; empty when an answer does not follow an added token directly.
    """

    pieces: tuple[str, ...]
    answers: tuple[int, ...]
    stops: tuple[int, ...]
    controls: Ids
    brackets: tuple[tuple[int, int], ...]

    def joined(self, contents: list[str]) -> str:
        """Return the text that the plan predicts."""
        return "".join(chain.from_iterable(zip(self.pieces, [*contents, ""], strict=True)))


@dataclass(frozen=True, slots=True)
class _Chat:
    """Hold a conversation within one call of `encode`: its index, as it is rendered, and whether system was folded."""

    place: int
    conversation: Conversation
    folded: bool
    given: Conversation


class Encoder:
    """Tokenises conversations for one tokenizer, its chat template, and the stop tokens of the model.

    Args:
        tokenizer: a fast tokenizer with a chat template (none is needed for plain text).
        stop_token_ids: any of these ends a turn.

    Raises:
        DataError: the tokenizer is slow, or a stop id is not in its vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.arrangement = Arrangement(tokenizer)
        self.backend = backend_of(tokenizer)
        self.added = {index: str(token.content) for index, token in self.backend.get_added_tokens_decoder().items()}
        self.stops: dict[str, int] = {}
        for index in stop_token_ids:
            text = self.backend.id_to_token(index)
            if text is None:
                raise DataError(fault("tokenizer", "stop_token_ids", index, "ids of the tokenizer's vocabulary"))
            self.stops[self.added.get(index, text)] = index
        if not self.stops:
            raise DataError(fault("tokenizer", "stop_token_ids", [], "at least one id", "Phi's are <|end|> and eos"))
        self._stop_ids = frozenset(self.stops.values())
        self.controls = ControlTexts(self.added.values(), self.stops)
        self.proof = TurnProof(tokenizer, self.arrangement, list(self.stops))
        self._is_added = np.zeros(max([self.backend.get_vocab_size(with_added_tokens=True) - 1, *self.added]) + 1, bool)
        self._is_added[list(self.added)] = True
        self._plans: dict[tuple[str, ...], _Plan | None] = {}
        self._tails: dict[str, list[int]] = {}

    def _plan(self, roles: tuple[str, ...]) -> _Plan | None:
        """Return the literal pieces for a sequence of roles; None if the template does more than joining."""
        if roles in self._plans:
            return self._plans[roles]
        marks = [f"zq{index}qz" for index in range(len(roles))]
        plan: _Plan | None = None
        try:
            marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            text, turns = self.proof.locate(marked)
        except (Fault, TemplateFault):
            turns, text = [], ""
        if _MARK.findall(text) == marks:  # each content once, in its order
            plan = self._plan_of(text, turns, _MARK.split(text), marks)
        if len(self._plans) < _PLANS_KEPT:
            self._plans[roles] = plan
        return plan

    def _plan_of(self, text: str, turns: list[Turn], pieces: list[str], marks: list[str]) -> _Plan | None:
        places = np.cumsum([len(piece) for piece in pieces[:-1]])
        places[1:] += np.cumsum([len(mark) for mark in marks[:-1]])
        if any(turn.start != places[turn.message] for turn in turns):
            return None
        encoding = self.backend.encode(text, add_special_tokens=False)
        listed = encoding.ids  # made anew each time it is asked for
        ids = np.array(listed, np.int32)
        controls = np.flatnonzero(self._is_added[ids])
        order = {int(place): number for number, place in enumerate(controls)}
        brackets: list[tuple[int, int]] = []
        for turn in turns:
            first, after = self._token_span(encoding, listed, turn)
            if first - 1 in order and after - 1 in order:
                brackets.append((order[first - 1], order[after - 1]))
        return _Plan(
            tuple(pieces),
            tuple(turn.message for turn in turns),
            tuple(turn.stop - turn.end for turn in turns),
            ids[controls],
            tuple(brackets) if len(brackets) == len(turns) else (),
        )

    def adapt(self, conversation: Conversation) -> tuple[Conversation, bool]:
        """Return what of a conversation the template can render, and whether a system turn had to be folded."""
        if conversation.tools is None and all(message["role"] != "system" for message in conversation.messages):
            return conversation, False
        found = self.arrangement.arranged(conversation.messages, conversation.tools)
        untrained = frozenset(place for place, before in enumerate(found.places) if before in conversation.untrained)
        return replace(conversation, messages=found.messages, tools=found.tools, untrained=untrained), found.folded

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | Fault]:
        """Tokenise conversations; one that cannot be used gives its fault in its place.

        Raises:
            TemplateFault: the template is inconsistent, or its turns end in no stop token.
        """
        results: list[Encoded | Fault | None] = [None] * len(conversations)
        chats: list[_Chat] = []
        texts: list[int] = []
        for index, conversation in enumerate(conversations):
            if conversation.is_text:
                texts.append(index)
                continue
            try:
                chats.append(_Chat(index, *self.adapt(conversation), given=conversation))
            except Fault as error:
                results[index] = error
        if texts:
            self._encode_texts([conversations[index] for index in texts], texts, results)
        if chats:
            self._encode_chats(chats, results)
        return [result for result in results if result is not None]

    def _encode_texts(
        self, conversations: list[Conversation], places: list[int], results: list[Encoded | Fault | None]
    ) -> None:
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        contents = [conversation.messages[0]["content"] for conversation in conversations]
        encodings = self.backend.encode_batch(contents, add_special_tokens=True)
        for place, conversation, content, encoding in zip(places, conversations, contents, encodings, strict=True):
            ids: list[int] = encoding.ids
            if bos and content.startswith(bos):  # the template writes it too
                ids = self.backend.encode(content, add_special_tokens=False).ids
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
            results[place] = Encoded(np.array(ids, np.int32), [(0, len(ids))], conversation)

    def _encode_chats(self, chats: list[_Chat], results: list[Encoded | Fault | None]) -> None:
        rendered = self._render_all(chats, results)
        direct: list[tuple[_Chat, str, _Plan]] = []
        others: list[tuple[_Chat, str]] = []
        for chat, text in zip(chats, rendered, strict=True):
            if text is None:
                continue
            lost = tools_left_out(text, chat.given)
            if lost is not None:
                results[chat.place] = lost
                continue
            plan = self._plan_for(chat.conversation, text)
            if plan is not None and plan.brackets:
                direct.append((chat, text, plan))
            else:
                others.append((chat, text))
        others += self._encode_by_brackets(direct, results)
        self._encode_by_offsets(others, results)
        for chat, text in zip(chats, rendered, strict=True):
            result = results[chat.place]
            if isinstance(result, Encoded) and text is not None and not chat.given.is_plain:
                result.unshown = _unshown(text, chat.given)

    def _encode_by_brackets(
        self, chats: list[tuple[_Chat, str, _Plan]], results: list[Encoded | Fault | None]
    ) -> list[tuple[_Chat, str]]:
        """Tokenise conversations whose added tokens mark the answers, and return those for which that does not work."""
        encodings = self.backend.encode_batch_fast([chat[1] for chat in chats], add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        ends = np.cumsum([0, *map(len, lists)])
        flat = np.fromiter(chain.from_iterable(lists), np.int32, int(ends[-1]))
        added = np.flatnonzero(self._is_added[flat])
        added_ids = flat[added]
        bounds = np.searchsorted(added, ends).tolist()
        starts = ends.tolist()
        left: list[tuple[_Chat, str]] = []
        for number, (chat, text, plan) in enumerate(chats):
            begin, end = bounds[number], bounds[number + 1]
            if end - begin != len(plan.controls) or (added_ids[begin:end] != plan.controls).any():
                left.append((chat, text))
                continue
            start = starts[number]
            places = (added[begin:end] - start).tolist()
            spans = [(places[before] + 1, places[stop] + 1) for before, stop in plan.brackets]
            if chat.conversation.untrained:
                untrained = chat.conversation.untrained
                spans = [span for span, answer in zip(spans, plan.answers, strict=True) if answer not in untrained]
            ids = flat[start : starts[number + 1]]
            results[chat.place] = Encoded(ids, spans, chat.conversation, folded_system=chat.folded)
        return left

    def _encode_by_offsets(self, chats: list[tuple[_Chat, str]], results: list[Encoded | Fault | None]) -> None:
        located: list[tuple[_Chat, str, list[Turn]]] = []
        for chat, text in chats:
            try:
                located.append((chat, *self._locate(chat.conversation, text)))
            except Fault as error:
                results[chat.place] = error
        encodings = self.backend.encode_batch([item[1] for item in located], add_special_tokens=False)
        for (chat, text, turns), encoding in zip(located, encodings, strict=True):
            ids: list[int] = encoding.ids
            spans: list[tuple[int, int]] = []
            mismatch = False
            for turn in turns:
                first, after = self._token_span(encoding, ids, turn)
                mismatch = mismatch or self._moves_boundary(encoding, ids, text, turn.start, first)
                if turn.message not in chat.conversation.untrained:
                    spans.append((first, after))
            control = any(self.controls.is_in(message["content"]) for message in chat.conversation.messages)
            tokens = np.array(ids, np.int32)
            results[chat.place] = Encoded(tokens, spans, chat.conversation, mismatch, chat.folded, control)

    def _render_all(self, chats: list[_Chat], results: list[Encoded | Fault | None]) -> list[str | None]:
        if self.tokenizer.chat_template is not None and all(chat.conversation.tools is None for chat in chats):
            try:
                messages = [chat.conversation.messages for chat in chats]
                return list(self.tokenizer.apply_chat_template(messages, tokenize=False))
            except TEMPLATE_ERRORS:
                pass  # one of them cannot be rendered: find it
        rendered: list[str | None] = []
        for chat in chats:
            try:
                rendered.append(self.proof.render(chat.conversation.messages, tools=chat.conversation.tools))
            except Fault as error:
                results[chat.place] = error
                rendered.append(None)
        return rendered

    def _plan_for(self, conversation: Conversation, text: str) -> _Plan | None:
        """Return the plan of a conversation's roles, if it predicts this rendering."""
        if not conversation.is_plain:
            return None
        plan = self._plan(tuple([message["role"] for message in conversation.messages]))
        if plan is None or plan.joined([message["content"] for message in conversation.messages]) != text:
            return None
        return plan

    def _locate(self, conversation: Conversation, text: str) -> tuple[str, list[Turn]]:
        """Return the assistant turns of a rendering: by the plan of its roles if it applies, else by the full proof."""
        plan = self._plan_for(conversation, text)
        if plan is None:
            return self.proof.locate(conversation.messages, conversation.tools)
        turns: list[Turn] = []
        position = 0
        for index, message in enumerate(conversation.messages):
            position += len(plan.pieces[index])
            end = position + len(message["content"])
            if index in plan.answers:
                turns.append(Turn(index, position, end, end + plan.stops[len(turns)]))
            position = end
        return text, turns

    def _token_span(self, encoding: Any, ids: list[int], turn: Turn) -> tuple[int, int]:
        """Token range of a turn: from the first token that begins in its content to its stop token, inclusive."""
        first = _first_token_from(encoding, turn.start)
        stop = encoding.char_to_token(turn.stop)
        if stop is None or ids[stop] not in self._stop_ids or stop < first:
            found = encoding.tokens[stop] if stop is not None else None
            expected = f"one of {', '.join(self.stops)} as one token after the answer"
            todo = "The tokenizer does not know this stop token as a token of its own: use the tokenizer of the model"
            raise TemplateFault(fault("tokenizer", "stop token", found, expected, todo))
        return first, stop + 1

    def _moves_boundary(self, encoding: Any, ids: list[int], text: str, start: int, first: int) -> bool:
        """Return whether the prompt tokenised alone is no prefix of these tokens.

        Added tokens cut a text before anything else looks at it, so only what follows the last of them can differ:
        nothing when the prompt ends in one (it may swallow the spaces behind), else a tail that repeats and is
        tokenised once.
        """
        place = first - 1
        while place >= 0 and ids[place] not in self.added:
            place -= 1
        if place >= 0 and place == first - 1:
            return False
        tail_start = (encoding.token_to_chars(place) or (0, 0))[0] if place >= 0 else 0
        tail = text[tail_start:start]
        alone = self._tails.get(tail)
        if alone is None:
            alone = self.backend.encode(tail, add_special_tokens=False).ids
            if len(self._tails) < _PLANS_KEPT:
                self._tails[tail] = alone
        begin = max(place, 0)
        return bool(ids[begin:first] != alone)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[Any] | None = None,
    stop_token_ids: Sequence[int],
) -> Encoded:
    """Return tokens and labels of one conversation.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: role and content, and what else the template reads.
        tools: tool descriptions for the template.
        stop_token_ids: any of these ends an assistant turn.

    Returns:
        The tokens of the complete rendering; labels on every assistant turn with its stop token.

    Raises:
        DataError: the template cannot render this, or cannot be trained with.
    """
    encoder = Encoder(tokenizer, stop_token_ids)
    turns, brought = split_tools(messages)
    result = encoder.encode([Conversation(turns, tools if tools is not None else brought)])[0]
    if isinstance(result, Fault):
        raise DataError(result.at("conversation"))
    return result


def backend_of(tokenizer: Tokenizer) -> Any:
    """Return a copy-safe `tokenizers.Tokenizer` without padding and truncation.

    Raises:
        DataError: the tokenizer is not backed by the tokenizers library, so it knows no offsets.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", True):
        name = type(tokenizer).__name__
        expected = "a fast tokenizer (one with a tokenizer.json)"
        raise DataError(fault("tokenizer", "class", name, expected, "Load it with use_fast"))
    return uncut(backend)


def preview(tokenizer: Tokenizer, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return a row as the model sees it: the text of every token, and whether it has loss.

    Args:
        tokenizer: the tokenizer that made the row.
        row: `input_ids` and `labels`.

    Returns:
        One pair a token. The texts joined are the decoded row; a character of several tokens belongs to the last
        of them, the others have empty text.
    """
    ids = [int(index) for index in row["input_ids"]]
    is_label = [int(label) != IGNORED for label in row["labels"]]

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts = [""] * len(ids)
    # Decoding a window that begins a little earlier keeps the spaces that depend on neighbours.
    begin = settled = 0
    for index in range(len(ids)):
        before, text = decode(ids[begin:settled]), decode(ids[begin : index + 1])
        if len(text) > len(before) and not text.endswith("�"):
            texts[index] = text[len(before) :]
            begin, settled = settled, index + 1
    whole = decode(ids)
    if "".join(texts) != whole:
        texts = _texts_by_prefix(decode, ids, whole)
    return list(zip(texts, is_label, strict=True))


def _texts_by_prefix(decode: Any, ids: list[int], whole: str) -> list[str]:
    """Return the text of every token by decoding longer and longer prefixes: slow and always right."""
    texts: list[str] = []
    done = 0
    for index in range(len(ids)):
        part = decode(ids[: index + 1])
        length = len(whole) if index + 1 == len(ids) else common_length(whole, part, 0)
        texts.append(whole[done : max(done, length)])
        done = max(done, length)
    return texts


def prompts_and_references(conversation: Sequence[Message]) -> tuple[list[Message], str]:
    """Split a conversation for generation: all before the last assistant turn, and that turn's content.

    Raises:
        DataError: there is no assistant turn, or nothing before it.
    """
    for index in range(len(conversation) - 1, 0, -1):
        if conversation[index]["role"] == "assistant":
            return [dict(message) for message in conversation[:index]], str(conversation[index]["content"])
    roles = ", ".join(message["role"] for message in conversation)
    raise DataError(fault("conversation", "roles", roles, "an assistant turn with something before it"))


def _first_token_from(encoding: Any, start: int) -> int:
    """Return the first token that begins at or after a character.

    `char_to_token` searches in native code; the neighbours settle what it leaves open: a token that covers the
    character but begins before it, several tokens of one character, tokens without width.
    """
    count = len(encoding)
    at = encoding.char_to_token(start)
    place = at or 0  # None: this character is in no token (trimmed by the tokenizer)
    while place < count and (encoding.token_to_chars(place) or (0, 0))[0] < start:
        place += 1
    while at is not None and place > 0 and (encoding.token_to_chars(place - 1) or (-1, -1))[0] >= start:
        place -= 1
    return int(place)


def tools_left_out(text: str, conversation: Conversation) -> Fault | None:
    """Return the fault of a rendering that shows not all of the conversation's tool descriptions."""
    messages = () if conversation.is_plain else conversation.messages
    lost = tools_not_shown(text, messages, conversation.tools)
    return Fault("tools", ", ".join(lost), *TOOLS_LEFT_OUT) if lost else None


def _unshown(text: str, conversation: Conversation) -> tuple[str, ...]:
    values = {
        key: [message[key].strip() for message in conversation.messages if isinstance(message.get(key), str)]
        for key in _READ_KEYS
    }
    return tuple(f"{key} of turns" for key, item in values.items() if any(value not in text for value in item))
