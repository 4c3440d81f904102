"""Write the bundled chat dataset, philora's help desk, from its hand-written source.

The source is `tools/helpdesk/*.yaml`: topics, each with one answer and its questions, and conversations, each a list
of `topic: question` lines. The output is `train.jsonl` and `eval.jsonl` in `src/philora/nano/helpdesk`. The same
source always gives the same bytes.

Usage: python tools/make_helpdesk.py [--check]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools" / "helpdesk"
OUTPUT = ROOT / "src" / "philora" / "nano" / "helpdesk"

SYSTEM = "You are philora's help desk. Answer briefly."
SYSTEM_SHARE = 10  # one record in ten starts with the system turn

Turn = tuple[str, str]  # topic, question


@dataclass(frozen=True)
class Topic:
    """Describe a subject of the help desk: its only answer, and the questions that lead to it."""

    name: str
    answer: str
    train: tuple[str, ...]
    eval: tuple[str, ...]


@dataclass(frozen=True)
class Conversation:
    """Several questions after each other."""

    turns: tuple[Turn, ...]


def lines(block: str) -> tuple[str, ...]:
    """The non-empty lines of a YAML block."""
    return tuple(line.strip() for line in block.splitlines() if line.strip())


def normalise(question: str) -> str:
    """A question without case, punctuation and repeated spaces, for comparisons."""
    return " ".join(re.sub(r"[^\w\s]", " ", question.lower()).split())


def read_topics(source: Path = SOURCE) -> dict[str, Topic]:
    """All topics by name, from every file of the source but the conversations.

    Raises:
        ValueError: a topic name or an answer appears twice.
    """
    topics: dict[str, Topic] = {}
    for path in sorted(source.glob("*.yaml")):
        if path.name == "conversations.yaml":
            continue
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
            topic = Topic(entry["id"], entry["answer"].strip(), lines(entry["train"]), lines(entry["eval"]))
            if topic.name in topics:
                raise ValueError(f"{path.name}: id={topic.name!r} - expected a name not used before.")
            if topic.answer in {other.answer for other in topics.values()}:
                raise ValueError(f"{path.name}: answer={topic.answer!r} - expected an answer not used before.")
            topics[topic.name] = topic
    return topics


def read_conversations(topics: dict[str, Topic], source: Path = SOURCE) -> dict[str, tuple[Conversation, ...]]:
    """The conversations of each split.

    Raises:
        ValueError: a turn names no topic.
    """
    path = source / "conversations.yaml"
    splits: dict[str, tuple[Conversation, ...]] = {"train": (), "eval": ()}
    if not path.exists():
        return splits
    for split, blocks in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        read = []
        for block in blocks:
            turns = []
            for line in lines(block):
                name, _, question = line.partition(": ")
                if name not in topics:
                    raise ValueError(f"{path.name}: {line!r} - expected one of {sorted(topics)} before the colon.")
                turns.append((name, question))
            read.append(Conversation(tuple(turns)))
        splits[split] = tuple(read)
    return splits


def conversations_of(split: str, source: Path = SOURCE) -> list[Conversation]:
    """Single questions and conversations of a split, in the order of their hashes, so that topics are mixed."""
    topics = read_topics(source)
    singles = [
        Conversation(((topic.name, question),))
        for topic in topics.values()
        for question in (topic.train if split == "train" else topic.eval)
    ]
    everything = [*singles, *read_conversations(topics, source)[split]]
    return sorted(everything, key=_digest)


def _digest(conversation: Conversation) -> str:
    text = "\n".join(question for _, question in conversation.turns)
    return hashlib.sha256(text.encode()).hexdigest()


def record(conversation: Conversation, topics: dict[str, Topic], *, with_system: bool) -> dict[str, object]:
    """The record of one conversation, as `data.format: messages` reads it."""
    messages = [{"role": "system", "content": SYSTEM}] if with_system else []
    for name, question in conversation.turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": topics[name].answer})
    return {"messages": messages}


def build(source: Path = SOURCE) -> dict[str, str]:
    """The text of both files by file name."""
    topics = read_topics(source)
    texts = {}
    for split in ("train", "eval"):
        records = [
            record(conversation, topics, with_system=index % SYSTEM_SHARE == SYSTEM_SHARE - 1)
            for index, conversation in enumerate(conversations_of(split, source))
        ]
        texts[f"{split}.jsonl"] = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records)
    return texts


def main() -> int:
    """Write the files, or with --check only compare them."""
    parser = argparse.ArgumentParser(description="Write philora's help desk dataset from tools/helpdesk/*.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the files are out of date")
    check = parser.parse_args().check
    stale = 0
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, text in build().items():
        path = OUTPUT / name
        if check:
            if not path.exists() or path.read_bytes() != text.encode():
                print(f"{path.relative_to(ROOT)} is out of date; run python tools/make_helpdesk.py")
                stale = 1
            continue
        path.write_bytes(text.encode())
        print(f"{path.relative_to(ROOT)}: {text.count(chr(10))} records, {len(text.encode())} bytes")
    return stale


if __name__ == "__main__":
    sys.exit(main())
