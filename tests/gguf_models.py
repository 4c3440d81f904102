"""Members of the family with tokenizers, and a small reader of Go templates, for the tests of GGUF and Ollama."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import trl
from peft import LoraConfig
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import philora
from philora.families import MODELS, PhiModel
from philora.models.loading import local_path
from tests.family import build, small_config

MEMBERS = ("Phi-3-mini-4k", "Phi-3.5-mini", "Phi-3-medium-4k", "Phi-4", "Phi-4-mini")
"""One of each kind: an attention window, LongRoPE, grouped queries, and both of Phi-4's tokenizers; the last ties."""

_TRL = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {
    "phi3": (_TRL / "phi3.jinja").read_text(),
    "phi3.5": (_TRL / "phi3_5.jinja").read_text(),
    "phi4": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|im_start|>system<|im_sep|>' + "
        "message['content'] + '<|im_end|>' }}{% elif message['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "phi4-mini": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "phi4-reasoning": (
        "<|im_start|>system<|im_sep|>You are Phi, a language model trained by Microsoft.<|im_end|>"
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "no system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + (_TRL / "phi3.jinja").read_text()
    ),
}
_CL100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_O200K = "|".join(
    (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
)
# As their authors write them: cl100k and o200k of tiktoken, in the form of a tokenizer.json.
_SPLITS = {"Phi-4": _CL100K, "Phi-4-mini": _O200K}
_SPECIAL = {
    "Phi-4": ["<|dummy_0|>", "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "Phi-4-mini": ["<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"],
}
CORPUS = [
    "How do I resume? Use --resume, then wait for the answer of the system. It's 12345 o'clock.",
    "What is the capital of Norway, and how many people live there? Oslo; about 700,000 people.",
    "def add_one(xs):\n    return [x + 1 for x in xs]\n\n\nprint(add_one([1, 2, 3]))",
    "Wie heißt der höchste Berg? Кога се връщаме? CamelCase, HTTPServer and a/b/c.",
] * 3


def phi_tokenizer(member: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the member's kind: nano's own for Phi-3, small byte-level ones for Phi-4."""
    if member not in _SPLITS and member != "gpt-2":
        return AutoTokenizer.from_pretrained(local_path("nano"))
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=member == "gpt-2")
    split = [pre_tokenizers.Split(Regex(_SPLITS[member]), "isolated")] if member in _SPLITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    special = _SPECIAL.get(member, ["<|endoftext|>"])
    tokenizer.add_special_tokens([AddedToken(each, normalized=False, special=True) for each in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if member in _SPECIAL:
        wrapped.pad_token = {"Phi-4": "<|dummy_0|>", "Phi-4-mini": "<|endofprompt|>"}[member]
        wrapped.chat_template = TEMPLATES[member.lower().replace("phi-4", "phi4")]
    return wrapped


def member_named(name: str) -> PhiModel:
    """The facts of a member."""
    return next(each for each in MODELS if each.name == name)


def save_member(member: str, folder: Path, **changes: Any) -> None:
    """A model of random weights with its tokenizer; LongRoPE's boundary lies at llama.cpp's least context."""
    real = member_named(member)
    tokenizer = phi_tokenizer(member)
    windows = {"max_position_embeddings": 2048}
    if real.rope_type == "longrope":
        windows["original_max_position_embeddings"] = 256
    if real.sliding_window is not None:
        windows["sliding_window"] = 2047
    size = len(tokenizer) + 5  # as real ones: the embedding has more rows than the tokenizer has tokens
    settings = {
        "vocab_size": size,
        **windows,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    build(small_config(real, **(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(base: Path, folder: Path, **changes: Any) -> None:
    """An adapter of random values of every slice; `changes` go to its LoraConfig."""
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"}
    adapted = philora.get_peft_model(model, LoraConfig(**(settings | changes)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_embedding" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        for layer in philora.adapters.slices.lora_layers(adapted).values():
            if "default" not in layer.lora_B:
                continue
            weight = layer.lora_B["default"].weight
            for each in getattr(layer, "slices", {}).get("default", ()) or [None]:
                rows = slice(None) if each is None else slice(each.row_start, each.row_stop)
                ranks = slice(None) if each is None else slice(each.rank_start, each.rank_stop)
                weight[rows, ranks] = torch.randn_like(weight[rows, ranks]) * 0.1
    adapted.save_pretrained(folder)


# -- the part of Go's text/template that a chat template needs, written from its documentation


def go_template(text: str, data: dict[str, Any]) -> str:
    """Execute a template: text, strings, `.Field`, `$name`, range, if, else, eq, printf, trimming (`{{-`)."""
    parts = re.split(r"({{.*?}})", text, flags=re.DOTALL)
    nodes: list[tuple[str, str]] = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            if index and parts[index - 1].endswith("-}}"):
                part = part.lstrip(" \t\r\n")
            if index + 1 < len(parts) and parts[index + 1].startswith("{{-"):
                part = part.rstrip(" \t\r\n")
            nodes.append(("text", part))
        else:
            nodes.append(("action", part[2:-2].removeprefix("-").removesuffix("-").strip()))
    out, rest = _list(nodes, _Dot(data, {}))
    assert not rest, rest[:2]
    return out


class _Dot:
    """What `.` is, and the variables; a dot of nothing is for finding where a body ends, and changes none."""

    def __init__(self, value: Any, variables: dict[str, Any]) -> None:
        self.value, self.variables = value, variables

    def skipped(self) -> _Dot:
        return _Dot(None, dict(self.variables))


def _list(nodes: list[tuple[str, str]], dot: _Dot) -> tuple[str, list[tuple[str, str]]]:
    out = ""
    while nodes:
        kind, value = nodes[0]
        if kind == "text":
            out, nodes = out + value, nodes[1:]
        elif value == "end" or value.startswith("else"):
            break
        elif value.startswith("range "):
            body, items = nodes[1:], _value(value[6:], dot)
            rest = _list(body, dot.skipped())[1]
            for each in items or []:
                out += _list(body, _Dot(each, dot.variables))[0]
            assert rest[0][1] == "end"
            nodes = rest[1:]
        elif value.startswith("if "):
            piece, nodes = _if(nodes, dot)
            out += piece
        elif assigned := re.match(r"(\$\w+) :?= (.*)", value, re.DOTALL):
            assert (assigned[1] in dot.variables) == (":=" not in value), value
            dot.variables[assigned[1]] = _value(assigned[2], dot)
            nodes = nodes[1:]
        else:
            out, nodes = out + str(_value(value, dot)), nodes[1:]
    return out, nodes


def _if(nodes: list[tuple[str, str]], dot: _Dot) -> tuple[str, list[tuple[str, str]]]:
    condition = nodes[0][1].removeprefix("else ").removeprefix("if ")
    chosen = bool(_value(condition, dot))
    body, rest = _list(nodes[1:], dot if chosen else dot.skipped())
    after = dot.skipped() if chosen else dot
    other = ""
    if rest[0][1].startswith("else if "):
        other, rest = _if(rest, after)
        return (body if chosen else other), rest
    if rest[0][1] == "else":
        other, rest = _list(rest[1:], after)
    assert rest[0][1] == "end", rest[0]
    return (body if chosen else other), rest[1:]


def _value(expression: str, dot: _Dot) -> Any:
    if expression.startswith("eq "):
        left, right = expression[3:].split(" ", 1)
        return _value(left, dot) == _value(right, dot)
    if expression.startswith("printf "):
        form, *values = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', expression[7:])
        return json.loads(form) % tuple(_value(each, dot) for each in values)
    if expression.startswith('"'):
        return json.loads(expression)
    if expression.startswith("$"):
        return dot.variables[expression]
    assert re.fullmatch(r"\.\w+", expression), expression
    return "" if dot.value is None else dot.value[expression[1:]]
