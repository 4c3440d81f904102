"""Describe a tokenizer in GGUF's terms, with the fields that llama.cpp needs to make the same tokens.

llama.cpp has its own tokenizers. Fields of the file and, in one case, the model's name choose one and how it treats the
space after a special token. These values are derived here from how the tokenizer behaves. A tokenizer that they cannot
describe is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from philora.errors import ModelError, fault, one_per_line
from philora.models.spare_rows import ADVICE

# How llama.cpp splits text before byte-level BPE, by the name it has there (llama-vocab.cpp); the expressions are
# those of the tokenizers that the names stand for: GPT-2, cl100k (Phi-4), o200k (Phi-4-mini).
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_WORD}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_WORD}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPLITS: Final[Mapping[str, pre_tokenizers.PreTokenizer]] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "dbrx": _split_by(_CL100K),
    "gpt-4o": _split_by(_O200K),
}
_PROBE: Final = (
    "Hello, World! it's I'LL 1234567 3.14 \n\n  two\tspaces  \r\n x=f(a)//b; camelCase HTTPServer don'T "
    "naïve Größe ŁÓDŹ здравей Свят שלום 中文字 العربية हिन्दी ภาษา 😀👍🏽 —“q”… a/b/\nc"
)

# llama.cpp strips the space after special tokens where the model's name has one of these in it, whatever the file has
# (llama_vocab::impl::load); these tokens it leaves out, and it expects them to be there.
STRIPPING_NAMES: Final = ("phi-3", "phi3")
_NOT_STRIPPED: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_EXPECTED: Final = _NOT_STRIPPED | {"</s>"}


@dataclass(frozen=True)
class Vocabulary:
    """The fields of a tokenizer in GGUF.

    Attributes:
        model: `llama` (SentencePiece's BPE) or `gpt2` (byte-level BPE).
        pre: llama.cpp's name for the way text is split first.
        tokens: One per row of the embedding; rows without a token have unused ones.
        types: `gguf.TokenType` of every token.
        scores: For `llama`: pieces with higher scores are merged first.
        merges: For `gpt2`.
        special: Ids by the role that `GGUFWriter.add_ROLE_token_id` writes: bos, eos, eot, unk, pad.
        add_bos: Whether llama.cpp adds the first token of a text; then the chat template does not write it.
        add_space_prefix: Whether a space is added before text that follows a special token.
        strips: Whether the space after special tokens is removed.
        chat_template: The template in Jinja.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool
    strips: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the fields to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    def model_name(self, name: str) -> str:
        """Return a name under which llama.cpp treats the space after special tokens as this tokenizer does."""
        lower = name.lower()
        if self.strips and not any(entry in lower for entry in STRIPPING_NAMES):
            return f"Phi-3 {name}"
        if not self.strips:
            for entry in STRIPPING_NAMES:
                while entry in name.lower():
                    start = name.lower().index(entry)
                    name = f"{name[:start]}Phi_3{name[start + len(entry) :]}"
        return name


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, stops: Sequence[int]) -> Vocabulary:
    """Convert a tokenizer for GGUF.

    Args:
        tokenizer: A fast tokenizer.
        size: Rows of the embedding; rows without a token get unused tokens.
        stops: Ids that end an answer, beginning with the one that ends a turn.

    Raises:
        ModelError: No tokenizer of llama.cpp behaves like it; all reasons are reported at once.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        expected = "a fast tokenizer, with tokenizer.json"
        raise ModelError(fault("export to gguf", "tokenizer", type(tokenizer).__name__, expected))
    described = json.loads(backend.to_str())
    ids = tokenizer.get_vocab()
    added = {added_token["id"]: added_token for added_token in described["added_tokens"]}
    faults: list[str] = []
    if max(ids.values()) >= size:
        expected = f"at most {size} tokens, the rows of the model's embedding"
        faults.append(fault("export to gguf", "tokenizer", max(ids.values()) + 1, expected, ADVICE))
    if described["model"].get("type") not in ("BPE", None):
        faults.append(fault("export to gguf", "tokenizer model", described["model"].get("type"), "BPE"))
        raise ModelError(one_per_line(faults))
    strips = _strips(added.values(), faults)
    tokens, types = _tokens(ids, added, described["model"], size)
    pairs = [
        tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in described["model"]["merges"]
    ]
    scores: list[float] = []
    merges: list[str] = []
    model, pre, space = "gpt2", "default", False
    if described["model"].get("byte_fallback"):
        model = "llama"
        scores = _scores(tokens, types, pairs, faults)
        space = _space_after_special(described, backend, added, faults)
    else:
        merges = [" ".join(pair) for pair in pairs]
        pre = _pre(described, backend, faults)
    special = _special(tokenizer, stops, model)
    if faults:
        raise ModelError(one_per_line(faults))
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        special=special,
        add_bos=_begins_with_bos(tokenizer),
        add_space_prefix=space,
        strips=strips,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], model: str) -> dict[str, int]:
    """Return the ids of the tokens that have a role in GGUF."""
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id in stops or not stops else stops[-1],
        "eot": stops[0] if stops else None,
        "unk": tokenizer.unk_token_id if model == "llama" else None,
        "pad": tokenizer.pad_token_id,
    }
    return {role: int(token) for role, token in special.items() if token is not None}


def _strips(added: Iterable[Mapping[str, Any]], faults: list[str]) -> bool:
    """Return whether special tokens remove the space after them; in llama.cpp all do or none does."""
    added = list(added)
    for flag in ("lstrip", "single_word"):
        named = [entry["content"] for entry in added if entry[flag]]
        if named:
            faults.append(fault("export to gguf", f"tokens with {flag}", named, "none: llama.cpp has no such tokens"))
    stripping = {entry["content"] for entry in added if entry["rstrip"]}
    if not stripping:
        return False
    present = {entry["content"] for entry in added}
    differing = (present - _NOT_STRIPPED) ^ stripping
    if differing or not present >= _EXPECTED:
        expected = f"rstrip on all added tokens but {sorted(_NOT_STRIPPED)}, or on none, as llama.cpp has it"
        faults.append(fault("export to gguf", "tokens with rstrip", sorted(differing or _EXPECTED - present), expected))
    return True


def _tokens(
    ids: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any], size: int
) -> tuple[list[str], list[TokenType]]:
    by_id = {token: text for text, token in ids.items()}
    tokens, types = [], []
    for token in range(size):
        text = by_id.get(token)
        if text is None:
            text, kind = f"[UNUSED_{token}]", TokenType.UNUSED
        elif text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif token in added:
            kind = TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(
    tokens: Sequence[str], types: Sequence[TokenType], pairs: Sequence[tuple[str, ...]], faults: list[str]
) -> list[float]:
    """Return a score for every piece, so that llama.cpp merges pieces in the order of the merges.

    llama.cpp joins any two neighbours that make a piece, the best piece first; the merges have to name them all.
    """
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, place)
    known = {text for text, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL}
    named = set(pairs)
    missing = [
        (piece[:cut], piece[cut:])
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known and (piece[:cut], piece[cut:]) not in named
    ]
    if missing:
        expected = "merges for every two pieces that make a piece, as a SentencePiece model has them"
        faults.append(fault("export to gguf", "merges that are missing", sorted(missing)[:3], expected))
    lowest = float(-len(pairs))
    return [
        float(-rank[text]) if text in rank and kind is TokenType.NORMAL else lowest
        for text, kind in zip(tokens, types, strict=True)
    ]


def _space_after_special(
    described: Mapping[str, Any], backend: Tokenizer, added: Mapping[int, Mapping[str, Any]], faults: list[str]
) -> bool:
    normalizer, split = described["normalizer"], described["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        if step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            continue
        if step["type"] != "Prepend" or step["prepend"] != "▁":
            faults.append(fault("export to gguf", "normalizer", step, "▁ for spaces and nothing else"))
    if split is not None and (split["type"] != "Metaspace" or split.get("replacement") != "▁" or split.get("split")):
        faults.append(fault("export to gguf", "pre_tokenizer", split, "none, or Metaspace without splitting"))
    special = next((entry["content"] for entry in added.values() if entry["special"]), None)
    if special is None:
        return False
    after = backend.encode(f"{special}a", add_special_tokens=False).tokens[1:]
    return bool(after) and after[0].startswith("▁")


def _pre(described: Mapping[str, Any], backend: Tokenizer, faults: list[str]) -> str:
    """Return the name of llama.cpp's pre-tokenizer that splits text as this tokenizer does."""
    if described["normalizer"] is not None:
        faults.append(fault("export to gguf", "normalizer", described["normalizer"], "none before byte-level BPE"))
    if described["model"].get("ignore_merges"):
        faults.append(fault("export to gguf", "ignore_merges", True, "false"))
    own = backend.pre_tokenizer
    if own is not None:
        pieces = own.pre_tokenize_str(_PROBE)
        for name, split in _SPLITS.items():
            if split.pre_tokenize_str(_PROBE) == pieces:
                return name
    expected = "text split as GPT-2, cl100k (Phi-4) or o200k (Phi-4-mini) do"
    faults.append(fault("export to gguf", "pre_tokenizer", described["pre_tokenizer"], expected))
    return "default"


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.chat_template is None:
        ids = tokenizer("a")["input_ids"]
    else:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
