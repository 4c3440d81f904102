"""Write Ollama's Modelfile: the file, the template that makes a prompt of messages, the stop tokens.

Ollama writes prompts by a template of Go's `text/template`, not by the tokenizer's. It is derived here from what the
tokenizer's template does: text before and after the content of every role, and text that asks for an answer. Where the
tokenizer's template drops system turns, they begin the next user turn, as in training. What the two give is compared on
conversations, with system turns and without, before anything is written.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from philora.dataset.arrangement import Arrangement, fold_system, join_leading_system
from philora.errors import ModelError, fault
from philora.families import longrope_switch_tokens
from philora.files.checkpoint import write_text
from philora.models.run_folder import SystemTurn
from philora.models.tokenizer_files import Companions

logger = logging.getLogger(__name__)

_FOLDED = "\n\n"
"""Text between a folded system turn and the user's; a template that keeps system turns writes a role there."""
_MARKS = ("\x02one\x03", "\x02two\x03", "\x02three\x03")


class Markup(NamedTuple):
    """Describe what a chat template writes around contents.

    Attributes:
        opening: Before everything.
        before: Text before the content, by role; `system` is missing where its turns are folded into the user's.
        after: Text after the content, by role.
        asking: What asks for an answer.
    """

    opening: str
    before: dict[str, str]
    after: dict[str, str]
    asking: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that asks for an answer to the messages.

        Ollama joins messages of one role that follow each other by blank lines before it renders a template.
        """
        joined = join_leading_system([dict(message) for message in messages])
        arranged = joined if "system" in self.before else fold_system(joined)[0]
        body = "".join(self.before[entry["role"]] + entry["content"] + self.after[entry["role"]] for entry in arranged)
        return self.opening + body + self.asking

    def go(self) -> str:
        """Return the same in Go's `text/template`, for Ollama's `.Messages`."""
        folds = "system" not in self.before
        branches = _FOLD_SYSTEM if folds else ""
        for role in self.before:
            branches += f'{{{{- {"else " if branches else ""}if eq .Role "{role}" }}}}'
            content = _FOLDED_CONTENT if folds and role == "user" else "{{ .Content }}"
            branches += f"{_literal(self.before[role])}{content}{_literal(self.after[role])}\n"
        opening = ('{{- $system := "" }}' if folds else "") + _literal(self.opening)
        return f"{opening}{{{{- range .Messages }}}}\n{branches}{{{{- end }}}}\n{{{{- end }}}}{_literal(self.asking)}"


_FOLD_SYSTEM = (
    '{{- if eq .Role "system" }}'
    '{{- if $system }}{{ $system = printf "%s\\n\\n%s" $system .Content }}{{ else }}{{ $system = .Content }}{{ end }}\n'
)
_FOLDED_CONTENT = '{{ if $system }}{{ $system }}{{ "\\n\\n" }}{{ $system = "" }}{{ end }}{{ .Content }}'


def _literal(text: str) -> str:
    """Return a string of Go's: an escaped one keeps its line breaks where the template trims spaces."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def markup(tokenizer: PreTrainedTokenizerBase, *, writes_bos: bool = True) -> Markup:
    """Derive what a tokenizer's chat template writes.

    Args:
        tokenizer: With a chat template.
        writes_bos: False leaves out the token that begins a text, where the reader adds it by itself.

    Raises:
        ModelError: There is no template, or it does more than write text around contents.
    """
    where = "export to ollama"
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(fault(where, "chat_template", None, "a tokenizer with one chat template"))

    arrangement = Arrangement(tokenizer)

    def prompt(messages: Sequence[Mapping[str, str]]) -> str:
        text = arrangement.render(arrangement.arranged(messages).messages, generation=True)
        bos = tokenizer.bos_token or ""
        return text if writes_bos or not bos else text.removeprefix(str(bos))

    found = _derive(prompt, [str(entry) for entry in tokenizer.get_added_vocab()])
    for messages in _trials():
        if prompt(messages) != found.render(messages):
            expected = "a template that writes the same text around every content of a role"
            todo = "Export to gguf and write TEMPLATE yourself: Ollama's documentation, template.md"
            raise ModelError(fault(where, "chat_template", tokenizer.chat_template, expected, todo))
    return found


def _derive(prompt: Any, special: Sequence[str]) -> Markup:
    one, two, three = _MARKS

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    def between(text: str, left: str, right: str) -> str:
        return text.partition(left)[2].partition(right)[0]

    talk = prompt([message("user", one), message("assistant", two), message("user", three)])
    first, last = talk.partition(one)[0], talk.partition(three)[2]
    to_answer, to_question = between(talk, one, two), between(talk, two, three)
    before_user = _from_special(_common_suffix(first, to_question), special)
    after_answer = to_question.removesuffix(before_user)
    # A question ends as an answer does, or where what asks for an answer begins.
    after_user = after_answer
    if not (to_answer.startswith(after_user) and last.startswith(after_user)):
        after_user = _common_prefix(to_answer, last)
        asking = _from_special(after_user, special)
        after_user = after_user.removesuffix(asking) if asking != after_user else after_user
    before = {"user": before_user, "assistant": to_answer.removeprefix(after_user)}
    after = {"user": after_user, "assistant": after_answer}
    opening = first.removesuffix(before_user)
    ordered = prompt([message("system", one), message("user", two)])
    if between(ordered, one, two) != _FOLDED:
        before = {"system": ordered.partition(one)[0].removeprefix(opening), **before}
        after["system"] = between(ordered, one, two).removesuffix(before_user)
    return Markup(opening, before, after, last.removeprefix(after_user))


def _trials() -> list[list[dict[str, str]]]:
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because:\n1. so"}
    again = {**question, "content": "é 1\n"}
    talks = [[question], [question, answer, question], [question, answer, question, answer, again]]
    system, later = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "In French."}
    talks += [[system, *talk] for talk in talks]
    return [*talks, [question, answer, later, again], [system, later, question, answer, system, again]]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]


def _common_prefix(a: str, b: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(entry for entry, _ in same)


def _from_special(text: str, special: Sequence[str]) -> str:
    """Return the part of a text from its first special token on; all of it if there is none."""
    starts = [text.index(entry) for entry in special if entry in text]
    return text[min(starts) :] if starts else text


def write_modelfile(
    folder: Path, files: Sequence[str], companions: Companions, config: Any, *, adds_bos: bool,
    system: SystemTurn | None = None,
) -> None:  # fmt: skip
    """Write a Modelfile beside GGUF files: those of the model, or of the base and the adapter.

    `adds_bos`: the file makes its reader add the first token of a text. `system` is for conversations without one.
    """
    assert companions.tokenizer is not None
    template = markup(companions.tokenizer, writes_bos=not adds_bos).go()
    lines = [f"FROM ./{files[0]}"]
    if len(files) > 1:
        lines.append(f"ADAPTER ./{files[1]}")
    lines.append(f'TEMPLATE """{template}"""')
    if system is not None:
        lines += _system(system.text)
    lines += [f"PARAMETER stop {json.dumps(stop_token, ensure_ascii=False)}" for stop_token in companions.stop_tokens]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(companions, config).items()]
    write_text(folder / "Modelfile", "\n".join(lines) + "\n")


def _system(text: str) -> list[str]:
    """Return the instruction SYSTEM; none, with a warning, for a text that a Modelfile cannot hold.

    Source: Ollama's parser/parser.go, where quotes end at the first line that ends in three of them.
    """
    before_the_last = re.split(r"[\r\n]", text)[:-1]
    if any(entry.rstrip().endswith('"""') for entry in before_the_last):
        logger.warning("the Modelfile has no SYSTEM: the system prompt has a line that ends in three quotation marks")
        return []
    return [f'SYSTEM """{text}"""']


def context_tokens(config: Any) -> int:
    """Return the largest context that llama.cpp computes as in training: that of LongRoPE's short factors."""
    context = int(config.max_position_embeddings)
    return min(context, longrope_switch_tokens(config) or context)


def _parameters(companions: Companions, config: Any) -> dict[str, float]:
    """Return sampling as in the generation config, and a context that llama.cpp computes as in training."""
    generation = companions.generation
    parameters: dict[str, float] = {"num_ctx": context_tokens(config), "repeat_penalty": 1.0}
    sampled = generation is not None and generation.do_sample
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(generation, name, None) if sampled else None
        if value is not None:
            parameters[name] = value
    if not sampled:
        parameters["temperature"] = 0
    return parameters
