"""Find control texts, such as stop tokens, that are written out in messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from philora.dataset.arrangement import any_of
from philora.dataset.messages import Conversation

FOREIGN_CONTROLS = (
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<eos>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|EOT|>", "<|return|>", "<|end_of_turn|>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip
"""Control texts of the models that chat data is usually written for: a model without such a token learns letters."""


class ControlTexts:
    """Know the control texts of one tokenizer and of other models, and find them in conversations.

    Args:
        added: The texts of the tokenizer's added tokens.
        stops: The stop tokens of the model, as text and id.
    """

    def __init__(self, added: Iterable[str], stops: Mapping[str, int]) -> None:
        self._added = tuple(dict.fromkeys(filter(None, added)))
        self._stops = tuple(stops)
        self._pattern = any_of(self._added)
        self._starts = {text[0] for text in self._added}
        # Numbers below 1000 end too many answers to be recognised as stop tokens.
        numbers = "|".join(str(index) for index in stops.values() if index >= 1000)
        self._stop_number = re.compile(rf"(?<!\d)(?:{numbers or '(?!)'})\s*\Z")

    def is_in(self, content: str) -> bool:
        """Return whether a text contains one of the tokenizer's own added tokens."""
        return any(start in content for start in self._starts) and bool(self._pattern.search(content))

    def ends_in_stop_number(self, conversation: Conversation) -> bool:
        """Return whether the last turn ends in the number of a stop token, as by `eos_token_id` for `eos_token`."""
        return self._stop_number.search(conversation.messages[-1]["content"][-32:]) is not None

    def spelled(self, conversations: Sequence[Conversation]) -> Counter[str]:
        """Count the conversations in which each control text is written out.

        Returns:
            Counts by kind and text: `end TEXT` for the model's own stop token behind an answer, `own TEXT` for other
            control tokens of its tokenizer, `foreign TEXT` for those of other models, which are letters to this one.
        """
        joined = "\n".join([message["content"] for item in conversations for message in item.messages])
        own = [text for text in self._added if text in joined]
        foreign = [text for text in FOREIGN_CONTROLS if text in joined and text not in self._added]
        found: Counter[str] = Counter()
        for conversation in conversations if own or foreign else ():
            contents = [message["content"] for message in conversation.messages]
            answers = [item["content"].rstrip() for item in conversation.messages if item["role"] == "assistant"]
            ends = [stop for stop in self._stops if any(answer.endswith(stop) for answer in answers)]
            found.update(f"end {text}" for text in ends)
            for kind, texts in (("own", own), ("foreign", foreign)):
                inside = [text for text in texts if text not in ends and any(text in content for content in contents)]
                found.update(f"{kind} {text}" for text in inside)
        return found
