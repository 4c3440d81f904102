"""What the two code-generation samples share: their data, its one split, and the ROUGE score."""

from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from philora.evaluation.measures import choose, overlap
from philora.generation.batches import GenerationSettings, generate
from philora.runtime.hub import check_repo_id, require_token

DATASET = "iamtarun/python_code_instructions_18k_alpaca"  # 18,612 records {instruction, input, output, prompt}
COLUMNS = {"user": "{instruction} Input: {input}", "assistant": "{output}"}


def look_for_needs(push: str | None) -> None:
    """Look for what the end of the sample needs before its start: the ROUGE package, and a token to publish with."""
    choose(["rouge"])
    if push:
        check_repo_id(push, "--push")
        require_token("--push")


def split(source: str, folder: Path, limit: int | None) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl: 5% are held out with seed 1234.

    Fixed: the split is made once and kept in files. The QLoRA sample splits a second time without a seed, and then
    tests on rows that it has trained on.
    """
    rows = (
        load_dataset("json", data_files=source, split="train")
        if Path(source).is_file()
        else load_dataset(source, split="train")
    )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    parts = rows.train_test_split(test_size=0.05, seed=1234)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.to_json(folder / f"{name}.jsonl")
    return folder / "train.jsonl", folder / "test.jsonl"


def rouge_of(model_folder: Path, test: Path, count: int, max_new_tokens: int, batch_size: int) -> dict[str, float]:
    """Let the merged model answer held-out questions, and score its answers against the data's."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", device_map="auto")
    rows = load_dataset("json", data_files=str(test), split="train")
    rows = rows.select(range(min(count, len(rows))))
    chats = [[{"role": "user", "content": COLUMNS["user"].format(**row)}] for row in rows]
    settings = GenerationSettings(
        do_sample=True, temperature=0.3, top_k=50, top_p=0.95, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    answers = [each.text for each in generate(model, tokenizer, chats, settings)]
    for row, text in zip(rows.select(range(min(2, len(rows)))), answers, strict=False):
        print(f"\n> {row['instruction']} {row['input']}\n{text}")
    return rouge(answers, rows["output"])


def rouge(answers: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum: the mean F-measure of each over the answers, in percent.

    Fixed: the QLoRA sample averages low, mid and high of precision, recall and F all together.
    """
    return {each.title: each.figure(sums.sum(axis=0)) for each, sums in overlap(["rouge"], answers, references)}
