"""Arrange a conversation as a prompt: in the same way for training, evaluation, chat, serving and exports.

    messages -> `arranged`: system turns at the beginning become one; if the template would drop it, it begins the
                next user turn
             -> `render`: the chat template's text
             -> `prompt_ids`: token ids, in which the control tokens are the template's own

A control token's text inside a message, such as `<|end|>`, is text: whoever writes a message cannot end it or begin
another role's turn. The template is rendered with a stand-in for every such text, and the result is tokenised by a copy
of the tokenizer that knows its control tokens under names that nobody can guess; so the template's tokens are found,
and everything else is tokenised as it would be in any other place.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer as Backend

from philora.errors import DataError, ModelError, fault

Message = dict[str, Any]

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError, AttributeError)
"""What a chat template may raise for messages that it does not take."""

_ORDERS_KEPT = 4096
_PART_CHARACTERS = 1 << 16
_CUT_TOKENS = 32


class PromptTooLong(DataError):
    """Report a prompt with more tokens than allowed; how many more is not known.

    Attributes:
        tokens: How many were found before the rest was left unread.
    """

    def __init__(self, tokens: int, limit_tokens: int) -> None:
        expected = f"at most {limit_tokens}"
        super().__init__(fault("conversation", "prompt", f"over {tokens} tokens", expected, "Shorten the messages"))
        self.tokens = tokens


class Arranged(NamedTuple):
    """Messages as the template can render them.

    Attributes:
        messages: With system turns folded into user turns where the template would drop them.
        tools: Tool descriptions for the template's `tools`; None if a message has them, or there are none.
        places: For each of `messages`, which one it was before; None for one that is new.
        folded: Whether a system turn was folded.
    """

    messages: list[Message]
    tools: list[Any] | None
    places: list[int | None]
    folded: bool


def function_names(described: Sequence[Any]) -> list[str]:
    """Return the names of functions in tool calls or descriptions, with or without an object `function` around them."""
    inner = [item.get("function") or item for item in described if isinstance(item, Mapping)]
    return [str(item["name"]) for item in inner if isinstance(item, Mapping) and item.get("name")]


def with_tools(messages: list[Message], tools: list[Any] | None) -> list[Message]:
    """Return messages that carry their tool descriptions, as a list in the `tools` of the first turn.

    (As text, in the `tools` of a system turn, they are what Phi-4-mini's template reads.)
    """
    return messages if tools is None else [{**messages[0], "tools": tools}, *messages[1:]]


def split_tools(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[Any] | None]:
    """Return the messages and the tool descriptions that `with_tools` put together."""
    turns = [dict(message) for message in messages]
    tools = turns[0].pop("tools") if turns and isinstance(turns[0].get("tools"), list) else None
    return turns, tools


def tools_not_shown(text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[str]:
    """Return the names of described tools that a rendering does not show."""
    described: list[Any] = list(tools or ())
    for message in messages:
        own = message.get("tools")
        if isinstance(own, str):
            try:
                own = json.loads(own)
            except ValueError:
                own = [{"name": own}]
        described += own if isinstance(own, list) else []
    return [name for name in function_names(described) if name not in text]


TOOLS_LEFT_OUT = (
    "tool descriptions that the chat template shows",
    "This model's template leaves them out: describe the tools in the text of the system turn, use a model whose "
    "template shows them, or remove the field",
)
"""What is expected, and what to do, where a template leaves tool descriptions out."""


def join_leading_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose system turns at the beginning are one, joined by blank lines; tools of two stay apart."""
    found = list(messages)
    while len(found) > 1 and found[0]["role"] == found[1]["role"] == "system":
        if "tools" in found[0] and "tools" in found[1]:
            break
        text = "\n\n".join(filter(str.strip, (str(found[0]["content"]), str(found[1]["content"]))))
        found[:2] = [{**found[1], **found[0], "content": text}]
    return found


def fold_system(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[int | None]]:
    """Put system turns at the beginning of the user turn that follows, or of the first when none does.

    Returns:
        The messages, and for every its place before; None for a user turn that had to be made.
    """
    folded: list[Message] = []
    places: list[int | None] = []
    waiting = ""
    for place, message in enumerate(messages):
        if message["role"] == "system":
            waiting = f"{waiting}\n\n{message['content']}" if waiting else str(message["content"])
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": f"{waiting}\n\n{message['content']}"}
            waiting = ""
        folded.append(dict(message))
        places.append(place)
    if waiting:
        first = next((place for place, message in enumerate(folded) if message["role"] == "user"), None)
        if first is None:
            folded.insert(0, {"role": "user", "content": waiting})
            places.insert(0, None)
        else:
            folded[first]["content"] = f"{waiting}\n\n{folded[first]['content']}"
    return folded, places


class Arrangement:
    """Describe what one tokenizer's chat template makes of conversations.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._kept_orders: dict[tuple[str, ...], bool] = {}
        self._reads_tools: bool | None = None

    # -- messages to text

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list[Any] | None = None, generation: bool = False
    ) -> str:
        """Return the text of the chat template.

        Raises:
            ModelError: There is no template.
            jinja2.TemplateError, TypeError, KeyError, AttributeError: The template refuses the messages.
        """
        self._check_template()
        text: str = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools, tokenize=False, add_generation_prompt=generation
        )
        return text

    def _check_template(self) -> None:
        if self.tokenizer.chat_template is None:
            expected = "a template in the tokenizer, which turns messages into text"
            todo = "Use an instruct model's tokenizer, or set tokenizer.chat_template"
            raise ModelError(fault("tokenizer", "chat_template", None, expected, todo))

    def arranged(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> Arranged:
        """Return what of a conversation the template can render.

        Several system turns at the beginning become one, as a system prompt in use is one text.
        A system turn that the template drops, or refuses, becomes the beginning of a user turn. Tool descriptions that
        the template does not read as `tools` go where Phi-4-mini's looks: the `tools` of the system turn.
        """
        found = join_leading_system([dict(message) for message in messages])
        joined = len(messages) - len(found)
        places: list[int | None] = [place for place in range(len(messages)) if not 0 < place <= joined]
        if tools is not None and not self._reads_tool_argument():
            described = json.dumps(tools, ensure_ascii=False)
            if found[0]["role"] == "system":
                found[0] = {"tools": described, **found[0]}
            else:
                found.insert(0, {"role": "system", "content": "", "tools": described})
                places.insert(0, None)
            tools = None
        if all(item["role"] != "system" for item in found) or self._keeps_system(found, tools):
            return Arranged(found, tools, places, folded=False)
        folded, sources = fold_system(found)
        return Arranged(folded, tools, [None if source is None else places[source] for source in sources], folded=True)

    def _keeps_system(self, messages: list[Message], tools: list[Any] | None) -> bool:
        """Return whether the template renders every system turn, and one at the beginning of any conversation.

        Of plain messages their roles decide, tried once each.
        """
        usual = [{"role": "system", "content": ""}, {"role": "user", "content": ""}]
        if len(messages) != 2 and not self._keeps_system(usual, None):
            return False
        plain = tools is None and all(len(message) == 2 for message in messages)
        roles = tuple([message["role"] for message in messages])
        if not plain or roles not in self._kept_orders:
            # Contents that no template writes by itself, so that none of them is found by chance.
            marked = [plain or message["role"] == "system" for message in messages]
            marks = {place: f"zq{place}qz" for place, is_marked in enumerate(marked) if is_marked}
            probe = [{**item, "content": marks.get(place, item["content"])} for place, item in enumerate(messages)]
            try:
                text = self.render(probe, tools=tools)
            except TEMPLATE_ERRORS:
                text = ""
            kept = all(mark in text for place, mark in marks.items() if messages[place]["role"] == "system")
            if not plain or len(self._kept_orders) >= _ORDERS_KEPT:
                return kept
            self._kept_orders[roles] = kept
        return self._kept_orders[roles]

    def _reads_tool_argument(self) -> bool:
        if self._reads_tools is None:
            described = [{"type": "function", "function": {"name": "zq1qz", "description": "", "parameters": {}}}]
            try:
                self._reads_tools = "zq1qz" in self.render([{"role": "user", "content": "zq0qz"}], tools=described)
            except TEMPLATE_ERRORS:
                self._reads_tools = False
        return self._reads_tools

    # -- text to tokens

    def prompt_ids(
        self,
        conversations: Iterable[Sequence[Mapping[str, Any]]],
        *,
        control_tokens: bool = False,
        limit_tokens: int | None = None,
    ) -> list[list[int]]:
        """Return the token ids of every conversation, up to and with the header of the assistant's next turn.

        Args:
            conversations: Messages with `role` and `content`.
            control_tokens: Read a control token's text inside a message as that token, as training reads its data.
            limit_tokens: A text that surely has more tokens than this is not tokenised to its end.

        Raises:
            ModelError: There is no chat template.
            DataError: The template refuses a conversation or leaves out its tools, or a message holds a control
                token's text that this tokenizer cannot encode as text.
            PromptTooLong: A prompt has more than `limit_tokens`.
        """
        self._check_template()
        ids: list[list[int]] = []
        for conversation in conversations:
            messages, tools = self.arranged(*split_tools(conversation))[:2]
            try:
                text = self.render(messages, tools=tools, generation=True)
            except TEMPLATE_ERRORS as error:
                expected = "messages that the model's chat template accepts"
                roles = [message["role"] for message in messages]
                raise DataError(fault("conversation", "roles", roles, expected, f"It says: {error}")) from error
            if lost := tools_not_shown(text, messages, tools):
                raise DataError(fault("conversation", "tools", ", ".join(lost), *TOOLS_LEFT_OUT))
            if limit_tokens is not None:
                self._check_length(text, limit_tokens)
            forged = not control_tokens and any(self._has_control(message) for message in (*messages, {"tools": tools}))
            ids.append(self._ids_without_forgery(messages, tools) if forged else self._ids(text))
        return ids

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens, <s> of Phi-3 included where it wants one.
        if self._backend is None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return _encode(self._backend, text)

    @cached_property
    def _backend(self) -> Any:
        """Return the tokenizer of the tokenizers library, without padding and truncation; None if there is none."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else uncut(backend)

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {str(text): int(index) for text, index in self.tokenizer.get_added_vocab().items() if text}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return any_of(self._control_ids)

    def _has_control(self, value: Any) -> bool:
        """Return whether a message, or anything in one, holds a control token's text, before or after normalisation."""
        if isinstance(value, Mapping):
            return any(self._has_control(item) for name, item in value.items() if name != "role")
        if isinstance(value, list | tuple):
            return any(self._has_control(item) for item in value)
        if not isinstance(value, str) or not self._control_ids:
            return False
        if self._control_pattern.search(value):
            return True
        normalizer = getattr(self._backend, "normalizer", None)
        return normalizer is not None and bool(self._control_pattern.search(normalizer.normalize_str(value)))

    def _check_length(self, text: str, limit_tokens: int) -> None:
        """Read a long text in parts, until there are too many tokens: a cut between two parts adds at most a few."""
        part_characters = max(_PART_CHARACTERS, 4 * limit_tokens)
        if len(text) <= part_characters:
            return
        tokens = 0
        for cuts, begin in enumerate(range(0, len(text), part_characters)):
            tokens += len(self._ids(text[begin : begin + part_characters]))
            if tokens > limit_tokens + cuts * _CUT_TOKENS:
                raise PromptTooLong(tokens, limit_tokens)

    def _ids_without_forgery(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the ids of a prompt; control tokens written out in its messages are tokenised as plain text."""
        renamed = self._renamed
        if renamed is None:
            expected = "messages without control tokens, which this kind of tokenizer cannot encode as text"
            found = self._control_pattern.search(json.dumps(messages, ensure_ascii=False))
            raise DataError(fault("conversation", "content", found.group() if found else "", expected))
        stand_ins: list[str] = []

        def mask(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: item if name == "role" else mask(item) for name, item in value.items()}
            if isinstance(value, list | tuple):
                return [mask(item) for item in value]
            return self._control_pattern.sub(stand_in, value) if isinstance(value, str) else value

        def stand_in(match: re.Match[str]) -> str:
            stand_ins.append(match.group())
            return renamed.stand_in(len(stand_ins) - 1)

        described = None if tools is None else [mask(tool) for tool in tools]
        text = self.render([mask(message) for message in messages], tools=described, generation=True)
        written = self._control_pattern.findall(text)
        text = self._control_pattern.sub(lambda match: renamed.names[match.group()], text)
        text = renamed.stand_in_pattern.sub(lambda match: stand_ins[int(match.group(1))], text)
        ids = [renamed.ids.get(item, item) for item in _encode(renamed.backend, text)]
        unknown = self.tokenizer.unk_token_id
        controls = set(self._control_ids.values()) - {unknown}
        if [item for item in ids if item in controls] != [
            self._control_ids[item] for item in written if self._control_ids[item] in controls
        ]:
            expected = "messages without control tokens, which this tokenizer cannot encode as text"
            raise DataError(fault("conversation", "content", stand_ins[:3], expected, "Leave them out"))
        return ids

    @cached_property
    def _renamed(self) -> _Renamed | None:
        return None if self._backend is None else _Renamed(self._backend, self._control_ids)


class _Renamed:
    """Return a copy of a tokenizer that knows its added tokens under random names.

    Attributes:
        backend: The copy.
        names: What each added token is called in it.
        ids: The copy's ids of added tokens to the original's.
        stand_in_pattern: Finds what `stand_in` gives.
    """

    def __init__(self, backend: Any, control_ids: Mapping[str, int]) -> None:
        secret = secrets.token_hex(16)
        content = json.loads(backend.to_str())
        self.names = {text: f"zq{secret}t{number}qz" for number, text in enumerate(control_ids)}
        content["added_tokens"] = [
            {**token, "content": self.names[token["content"]]}
            for token in content["added_tokens"]
            if token["content"] in self.names
        ]
        content["post_processor"] = None  # it names tokens, and nothing is added to what the template writes
        self.backend = Backend.from_str(json.dumps(content))
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.ids = {ids[name]: control_ids[text] for text, name in self.names.items()}
        self.stand_in_pattern = re.compile(rf"zq{secret}s(\d+)qz")
        self._secret = secret

    def stand_in(self, number: int) -> str:
        """Return the placeholder of a part of a message while the template is rendered."""
        return f"zq{self._secret}s{number}qz"


def _encode(backend: Any, text: str) -> list[int]:
    # As a batch: the library lets other threads run meanwhile.
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def uncut(backend: Backend) -> Backend:
    """Return a tokenizer without padding and truncation: a copy, if it has them."""
    if backend.truncation is not None or backend.padding is not None:
        backend = Backend.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of the texts, the longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
