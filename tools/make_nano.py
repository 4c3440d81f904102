"""Make philora's bundled base model "nano": a small Phi-3-architecture model, its tokenizer and its model card.

    python tools/make_nano.py --out src/philora/nano/model   # everything, about half an hour on two cores
    python tools/make_nano.py --out DIR --minutes 3          # a quick one
    python tools/make_nano.py --out DIR --tokenizer-only     # tokenizer and configuration files only
    python tools/make_nano.py --out DIR --width 512          # another hidden size, for benchmarks/rates.py

The corpus (`nano_corpus.py`, `corpus/`) and the tokenizer are deterministic. The weights are reproducible in kind, not
to the bit, since the number of optimizer steps follows from the minutes and the machine. Needs `sentencepiece` beside
philora's own dependencies.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from nano_corpus import CORPUS_DIR, SEED, Corpus, is_telling, ngrams
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM
from transformers.convert_slow_tokenizer import generate_merges

ROOT = Path(__file__).resolve().parent.parent
HELPDESK_DIR = ROOT / "src" / "philora" / "nano" / "helpdesk"

VOCABULARY_TOKENS = 4096
CONTEXT_TOKENS = 2048
WIDTH = 256  # hidden size of the bundled model
# Phi-3's own, in its order, after the base vocabulary.
ADDED_TOKENS = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]
BASE_TOKENS = VOCABULARY_TOKENS - len(ADDED_TOKENS)
# The text of Microsoft's public template of Phi-3; TRL recognises the model by it, so not one byte may change.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The tokenizer is trained on these files only, so that text added to the corpus later leaves every token id as it is.
TOKENIZER_FILES = ["words_common.txt", "words_technical.txt", "words_names.txt", "words_starts.txt", "prose_1.txt"]


def tokenizer_text(corpus_dir: Path = CORPUS_DIR) -> list[str]:
    """Return the lines that the tokenizer learns from: words alone, after punctuation and capitalised, and prose."""
    lines: list[str] = []
    common, technical, names, starts, prose = (
        (corpus_dir / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES
    )
    for position, word in enumerate(common.split()):
        lines += [f"a {word}"] * (12 if position < 330 else 6)
    for word in technical.split():
        lines += [f"a {word}"] * 9 + [f"({word}"] * 4 + [f"a {word.capitalize()}", f"({word.capitalize()}"]
    for word in names.split():
        lines += [f"a {word}"] * 9 + [f"({word}"] * 3
    for word in technical.split()[:300]:
        lines += [f"a --{word} `{word}`. `{word}`, `{word}`", f"{word}_a {word}.a {word}: a"]
    for word in starts.split():
        lines += [f"a {word}"] * 12 + [f"({word}"] * 4
    lines += prose.splitlines() * 3
    return [line for line in lines if line]


def train_sentencepiece(lines: list[str]) -> bytes:
    """Train a SentencePiece BPE model with byte fallback, with Llama's settings, and return its file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=BASE_TOKENS,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        required_chars="".join(chr(code) for code in range(33, 127)),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(out: Path, sentencepiece_file: bytes) -> None:
    """Write the tokenizer's files: SentencePiece's own and those of transformers."""
    (out / "tokenizer.model").write_bytes(sentencepiece_file)
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = generate_merges(vocabulary, dict(pieces))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # As in Phi-3's file: a space goes before each stretch of text, so a word is the same token at the start of a turn.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    # As in Phi-3, the chat tokens swallow the line end that the template writes after them.
    base = [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>")]
    base.append(AddedToken("</s>", normalized=False, special=False, rstrip=True))
    added = [AddedToken(name, normalized=False, special=True, rstrip=name != "<|endoftext|>") for name in ADDED_TOKENS]
    for token in base + added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.save(str(out / "tokenizer.json"))

    def entry(token: AddedToken) -> dict[str, Any]:
        return {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": token.rstrip,
            "single_word": False,
            "special": token.special,
        }

    def plain(name: str) -> dict[str, Any]:
        return {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    _write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {str(tokenizer.token_to_id(t.content)): entry(t) for t in base + added},
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "legacy": False,
            "model_max_length": CONTEXT_TOKENS,
            "pad_token": "<unk>",
            "padding_side": "left",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    _write_json(
        out / "special_tokens_map.json",
        {
            "bos_token": plain("<s>"),
            "eos_token": plain("<|endoftext|>"),
            "pad_token": plain("<unk>"),
            "unk_token": plain("<unk>"),
        },
    )
    _write_json(out / "added_tokens.json", {name: tokenizer.token_to_id(name) for name in ADDED_TOKENS})
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(width: int = WIDTH) -> Phi3Config:
    """Return the configuration: Phi-3's architecture, small, with two query heads to each key/value head.

    Args:
        width: Hidden size, a multiple of 64; a head keeps 32 dimensions, and the other sizes follow in proportion.
    """
    eos = BASE_TOKENS + ADDED_TOKENS.index("<|endoftext|>")
    return Phi3Config(
        vocab_size=VOCABULARY_TOKENS,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=CONTEXT_TOKENS,
        original_max_position_embeddings=CONTEXT_TOKENS,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=0,
        dtype="bfloat16",
    )


def generation_config() -> GenerationConfig:
    """Return the generation settings: greedy, stopping at <|endoftext|> and <|end|>."""
    stops = [BASE_TOKENS + ADDED_TOKENS.index(name) for name in ("<|endoftext|>", "<|end|>")]
    return GenerationConfig(bos_token_id=1, eos_token_id=stops, pad_token_id=0)


def overlaps_helpdesk(helpdesk_dir: Path = HELPDESK_DIR, documents: int = 20_000) -> list[str]:
    """Return the six-word sequences that the corpus shares with the help desk dataset; there should be none.

    Sequences of function words ("is there a way to set") are left out: both ask questions in English.

    Args:
        helpdesk_dir: Folder of `*.jsonl` files with `messages`.
        documents: How many generated documents are looked at beside everything written by hand.
    """
    known: set[tuple[str, ...]] = set()
    for path in sorted(helpdesk_dir.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line).get("messages", []):
                known |= ngrams(message["content"])
    corpus = Corpus()
    texts = [*corpus.passages]
    texts += [text for shapes, answer in corpus.questions for text in (*shapes, answer)]
    texts += [text for dialogue in corpus.dialogues for _, text in dialogue]
    if known:
        stream = corpus.documents()
        for _ in range(documents):
            # Turns are compared one by one: a sequence across two of them is nobody's sentence.
            texts += next(stream).replace("<|endoftext|>", "<|end|>").split("<|end|>")
    return sorted({" ".join(gram) for text in texts for gram in ngrams(text) & known if is_telling(gram)})


def rows(corpus: Corpus, tokenizer: Tokenizer, row_tokens: int) -> Iterator[tuple[list[int], list[float]]]:
    """Yield rows of whole documents with the loss weight of each token; what does not fit waits for the next row.

    In chats the assistant's tokens weigh most: what an invented user asks next cannot be known.
    """
    assistant, end, user, system, stop = (
        tokenizer.token_to_id(f"<|{name}|>") for name in ("assistant", "end", "user", "system", "endoftext")
    )
    waiting: list[tuple[list[int], list[float]]] = []
    for document in corpus.documents():
        ids = tokenizer.encode(document, add_special_tokens=False).ids[:row_tokens]
        is_chat = ids[0] in (user, system)
        weights, talking = [], False
        for token in ids:
            weights.append(1.0 if talking or not is_chat or token == stop else 0.25)
            talking = token == assistant or (talking and token != end)
        waiting.append((ids, weights))
        if len(waiting) < 48:
            continue
        row: list[int] = []
        row_weights: list[float] = []
        for index in range(len(waiting)):
            if len(row) + len(waiting[index][0]) <= row_tokens:
                row += waiting[index][0]
                row_weights += waiting[index][1]
                waiting[index] = ([], [])
        waiting = [entry for entry in waiting if entry[0]]
        padding = row_tokens - len(row)
        yield row + [0] * padding, row_weights + [0.0] * padding


def pretrain(
    config: Phi3Config,
    tokenizer: Tokenizer,
    *,
    minutes: float,
    row_tokens: int = 512,
    batch_rows: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Phi3ForCausalLM, dict[str, float]]:
    """Train from random weights for a time, with compute in `dtype` over fp32 weights.

    Matrices inside the layers are trained by Muon, embeddings, head and norms by AdamW; learning rates rise over the
    first 2 percent of the time and fall to zero along a cosine.

    Returns:
        The model in bf16, and what was measured: steps, tokens, loss, seconds.
    """
    torch.manual_seed(SEED)
    model = Phi3ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    master = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():  # the weights only: rotary frequencies stay fp32, as when the model is loaded
        parameter.data = parameter.data.to(dtype)
    compute = dict(model.named_parameters())
    hidden = [p for n, p in master.items() if p.ndim == 2 and "layers" in n]
    tables = [p for n, p in master.items() if p.ndim == 2 and "layers" not in n]
    norms = [p for n, p in master.items() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=0.015, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
            lr=2e-3,
            betas=(0.9, 0.95),
            eps=1e-9,
            fused=True,
        ),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    source = rows(Corpus(), tokenizer, row_tokens)
    start = time.monotonic()
    steps, smooth = 0, math.nan
    forward = model.model
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        batch = [next(source) for _ in range(batch_rows)]
        ids = torch.tensor([row for row, _ in batch])
        # A weight is the chance that a token counts: the same on average, and the head is computed for fewer tokens.
        weights = torch.tensor([weight for _, weight in batch])[:, 1:]
        counted = (torch.rand(weights.shape) < weights).flatten().nonzero().squeeze(1)
        # Few different shapes: oneDNN keeps a compiled kernel, and memory, for each that it has seen.
        counted = counted[torch.randperm(len(counted))[: max(1, len(counted) // 256) * 256]]
        states = forward(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)[counted]
        loss = F.cross_entropy(model.lm_head(states).float(), ids[:, 1:].flatten()[counted])
        loss.backward()
        for name, parameter in compute.items():
            master[name].grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
        scale = min(1.0, (progress + 1e-3) / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(compute.values()), [master[name] for name in compute])
        steps += 1
        smooth = loss.item() if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss.item()
        if steps % 50 == 0:
            seconds = time.monotonic() - start
            print(
                f"step {steps}  {seconds / 60:.1f} min  loss {smooth:.3f}  "
                f"{steps * batch_rows * row_tokens / seconds:.0f} tokens/s",
                flush=True,
            )
    seconds = time.monotonic() - start
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model, {
        "steps": steps,
        "tokens": steps * batch_rows * row_tokens,
        "loss": round(smooth, 3),
        "seconds": round(seconds),
    }


def write_card(out: Path, config: Phi3Config, parameters: int, measured: dict[str, float]) -> None:
    """Write the model card."""
    card = (
        (CORPUS_DIR / "model_card.md")
        .read_text(encoding="utf-8")
        .format(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            intermediate=config.intermediate_size,
            context=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            **{key: int(value) if key != "loss" else value for key, value in measured.items()},
        )
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def show_samples(model: Phi3ForCausalLM, out: Path) -> None:
    """Print a few greedy answers, in and out of context."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    corpus = Corpus(seed=7)
    for maker in (corpus.recall, corpus.context, corpus.known_answer, corpus.real_question):
        prompt, _, answer = (
            maker().removesuffix("<|endoftext|>").rstrip().removesuffix("<|end|>").rpartition("<|assistant|>\n")
        )
        batch = tokenizer(prompt + "<|assistant|>\n", return_tensors="pt", add_special_tokens=False)
        output = model.generate(**batch, max_new_tokens=60, do_sample=False)
        answered = tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
        print(f"{prompt[-300:]}\n  expected: {answer}\n  answered: {answered}\n")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=28.0, help="time of the pretraining (default 28)")
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")), help="cores to use (default 2)"
    )
    parser.add_argument("--width", type=int, default=WIDTH, help=f"hidden size, a multiple of 64 (default {WIDTH})")
    parser.add_argument(
        "--float32", action="store_true", help="compute in float32, for a CPU without instructions for bfloat16"
    )
    parser.add_argument("--tokenizer-only", action="store_true", help="write tokenizer and configuration, no weights")
    options = parser.parse_args()
    if options.width % 64 or options.width < 64:
        parser.error(f"--width={options.width} - expected a multiple of 64, because a head has 32 dimensions.")
    torch.set_num_threads(options.threads)
    random.seed(SEED)
    shared = overlaps_helpdesk()
    if shared:
        print(
            f"{CORPUS_DIR}: shared_sequences={len(shared)} - expected none with {HELPDESK_DIR}. First: {shared[:10]}",
            file=sys.stderr,
        )
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.out, train_sentencepiece(tokenizer_text()))
    config = model_config(options.width)
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(options.out)
    generation_config().save_pretrained(options.out)
    if options.tokenizer_only:
        return 0
    model, measured = pretrain(
        config,
        Tokenizer.from_file(str(options.out / "tokenizer.json")),
        minutes=options.minutes,
        dtype=torch.float32 if options.float32 else torch.bfloat16,
    )
    model.generation_config = generation_config()
    model.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)
    write_card(options.out, config, sum(parameter.numel() for parameter in model.parameters()), measured)
    print(json.dumps(measured))
    show_samples(model, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
