"""The work that every contestant of the training benchmark is given: the same weights, documents, packs and labels.

`python -m benchmarks.work NAME [--root FOLDER]` writes it once. Reading it needs numpy alone, since the contestants
live in different environments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
"""Part of every folder's name: raise it when what is written changes."""

USER, ASSISTANT, END = 3, 4, 5
"""Token ids of the template: a conversation is USER prompt END ASSISTANT completion END."""
FIRST_WORD = 100

IGNORED = -100


@dataclass(frozen=True)
class Work:
    """A Phi-3 shape with random weights, and conversations in packs.

    Attributes:
        states: Words that the conversations are made of; each is followed by one of four others, so that a model
            learns something within a few steps.
        median_tokens: Of the log-normal lengths, before they are clipped to `longest_tokens`.
        row_tokens: Most tokens of a pack.
    """

    name: str
    title: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32064
    states: int = 256
    documents: int = 512
    median_tokens: int = 245
    sigma: float = 0.8
    longest_tokens: int = 2048
    row_tokens: int = 2048
    seed: int = 2024

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of a layer's four matrices."""
        hidden, intermediate = self.hidden, self.intermediate
        return (3 * hidden, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' matrices, without embedding and head."""
        return self.layers * sum(rows * columns for rows, columns in self.layer_shapes)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    def flops_per_token(self, label_share: float) -> float:
        """Products that LoRA training cannot do without: forward (2) and the gradient of the activations (2).

        Weights are frozen, so their gradients are not needed; only tokens with a label need the head. Attention, the
        adapters and element-wise work are left out, so a contestant cannot reach the limit made of it.
        """
        return 4.0 * self.linear_parameters + 4.0 * self.head_parameters * label_share

    def key(self, *fields: str) -> str:
        """A short hash of some fields, for the name of a folder."""
        values = {name: value for name, value in asdict(self).items() if name in fields}
        return hashlib.sha256(json.dumps([FORMAT, values], sort_keys=True).encode()).hexdigest()[:12]

    def model_folder(self, root: Path) -> Path:
        """Return the folder of the model, which may not exist yet."""
        return root / f"model-{self.key('hidden', 'intermediate', 'layers', 'heads', 'vocabulary', 'seed')}"

    def data_file(self, root: Path) -> Path:
        """Return the file of the packs, which may not exist yet."""
        lengths = ("median_tokens", "sigma", "longest_tokens", "row_tokens")
        return root / f"data-{self.key('vocabulary', 'states', 'documents', 'seed', *lengths)}.npz"


WORKS = {
    "a": Work("a", "Phi-3 architecture, hidden 1024, 12 layers", 1024, 2816, 12, 16),
    "b": Work("b", "Phi-3-mini's layers, hidden 3072, 4 layers", 3072, 8192, 4, 32),
    "quick": Work("quick", "tiny, for smoke tests", 64, 128, 2, 4, 512, 32, 64, 60, 0.8, 256, 256),
}


def default_root() -> Path:
    """A folder of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "philora" / "benchmarks"


# ---------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Document:
    """Hold a tokenised conversation; `completion_mask` is 1 on the answer and the token that ends it."""

    input_ids: npt.NDArray[np.int32]
    completion_mask: npt.NDArray[np.uint8]

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The ids where there is a loss, else IGNORED; not shifted."""
        return np.where(self.completion_mask == 1, self.input_ids, np.int32(IGNORED))


def make_documents(work: Work) -> list[Document]:
    """Conversations of a first-order Markov chain over `work.states` words; half of each is the answer."""
    random = np.random.default_rng(work.seed)
    words = FIRST_WORD + random.permutation(work.vocabulary - FIRST_WORD)[: work.states]
    successors = np.stack([random.permutation(work.states)[:4] for _ in range(work.states)])
    chances = np.cumsum([0.7, 0.2, 0.07])
    lengths = np.clip(
        np.exp(random.normal(np.log(work.median_tokens), work.sigma, work.documents)), 16, work.longest_tokens
    ).astype(int)
    documents = []
    for length in lengths:
        choices = np.searchsorted(chances, random.random(length))
        state = int(random.integers(work.states // 8))  # conversations begin alike
        ids = np.empty(length, np.int32)
        for place in range(length):
            ids[place] = words[state]
            state = successors[state, choices[place]]
        answer = length - length // 2
        ids[0], ids[answer - 2], ids[answer - 1], ids[-1] = USER, END, ASSISTANT, END
        mask = (np.arange(length) >= answer).astype(np.uint8)
        documents.append(Document(ids, mask))
    return documents


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: each document goes to the fullest row that still has room for it.

    Args:
        lengths: Of the documents, each at most `capacity`.
        capacity: Of a row.

    Returns:
        The documents of each row.

    Raises:
        ValueError: A document is longer than a row.
    """
    if max(lengths) > capacity:
        raise ValueError(f"pack: lengths has {max(lengths)} - expected at most the capacity, {capacity}.")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for document in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        at = bisect_left(room, (lengths[document], 0))
        if at == len(room):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = room.pop(at)
        rows[row].append(document)
        insort(room, (free - lengths[document], row))
    return rows


def make_rows(work: Work) -> list[list[Document]]:
    """The packs in the order of training; the few that stayed under nine tenths full are left out."""
    documents = make_documents(work)
    lengths = [len(item.input_ids) for item in documents]
    rows = [
        row for row in pack(lengths, work.row_tokens) if sum(lengths[item] for item in row) >= 0.9 * work.row_tokens
    ]
    order = np.random.default_rng(work.seed + 1).permutation(len(rows))
    return [[documents[item] for item in rows[at]] for at in order]


def write_data(work: Work, path: Path) -> None:
    """Write the packs under a temporary name and rename them."""
    rows = make_rows(work)
    documents = [document for row in rows for document in row]
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    np.savez(
        temporary,
        input_ids=np.concatenate([item.input_ids for item in documents]),
        completion_mask=np.concatenate([item.completion_mask for item in documents]),
        lengths=np.array([len(item.input_ids) for item in documents]),
        documents=np.array([len(row) for row in rows]),
    )
    temporary.rename(path)


def read_rows(path: Path) -> list[list[Document]]:
    """The packs as `write_data` left them: the documents of each row."""
    with np.load(path) as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        ids = np.split(stored["input_ids"], ends)
        masks = np.split(stored["completion_mask"], ends)
        counts = stored["documents"].tolist()
    documents = iter([Document(*pair) for pair in zip(ids, masks, strict=True)])
    return [[next(documents) for _ in range(count)] for count in counts]


# -------------------------------------------------------------------------------------------------------- model


def config_of(work: Work) -> Any:
    """The model's configuration."""
    from transformers import Phi3Config

    return Phi3Config(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )


def write_model(work: Work, folder: Path) -> None:
    """Write the model's folder, with the bundled tokenizer, which the trainers ask for its padding token only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from philora.models.loading import local_path

    model = AutoModelForCausalLM.from_config(config_of(work), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(work.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    model.save_pretrained(str(temporary))
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description="Write model and data of a work, once.")
    parser.add_argument("name", choices=WORKS)
    parser.add_argument("--root", type=Path, default=default_root())
    parser.add_argument("--change", default="{}", help="fields of the work as JSON")
    given = parser.parse_args()
    work = replace(WORKS[given.name], **json.loads(given.change))
    given.root.mkdir(parents=True, exist_ok=True)
    if not work.data_file(given.root).exists():
        write_data(work, work.data_file(given.root))
    if not (work.model_folder(given.root) / "config.json").exists():
        write_model(work, work.model_folder(given.root))


if __name__ == "__main__":
    main()
