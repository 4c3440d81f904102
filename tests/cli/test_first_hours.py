"""Five first hours: from a file as it was exported to an answer, with no YAML written.

Each begins with one file and takes the commands that a person would: `data`, `check`, `train DATA`, and then those that
`train` prints. The model is the bundled toy with few steps, so what it answers is not judged, only that it was trained
and answers in OpenAI's client and in llama.cpp.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import philora

pytestmark = pytest.mark.slow

SHORT = (
    "--model", "nano", "--max-length", "64", "training_config.max_steps=24", "training_config.eval_strategy=no",
    "evaluation.generate=2", "evaluation.max_new_tokens=8",
)  # fmt: skip
CITIES = ("Oslo", "Porto", "Graz", "Turin", "Lyon", "Ghent", "Cork", "Brno")


def chats(count: int = 48) -> list[tuple[str, str]]:
    """Return questions and answers as a small shop has them."""
    return [
        (f"When does parcel {number} to {CITIES[number % 8]} come?", f"Parcel {number} comes tomorrow, to your door.")
        for number in range(count)
    ]


def excel(folder: Path) -> Path:
    """Write what Excel saves as `CSV UTF-8` where the list separator is a semicolon."""
    with (folder / "Support März.csv").open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Question", "Answer", "Agent"])
        rows.writerows((asked, answered, "Jörg") for asked, answered in chats())
    return folder / "Support März.csv"


def one_row_a_message(folder: Path) -> Path:
    """Write a ticket system's table: messages in the order of their time, tickets between each other."""
    talks = list(enumerate(chats(), 1))
    rows = []
    for first, second in zip(talks[::2], talks[1::2], strict=True):
        for turn, role in enumerate(("customer", "agent")):
            for minute, (ticket, talk) in enumerate((first, second)):
                rows.append(
                    [ticket, role, talk[turn], f"2026-03-{1 + first[0] % 28:02}T08:{10 * turn + minute:02}:00Z"]
                )
    with (folder / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["ticket_id", "role", "text", "created"], *rows])
    return folder / "tickets.csv"


def sharegpt(folder: Path) -> Path:
    """Write one JSON array, as the browser extension exported it."""
    talks = [
        {"id": f"x_{number}", "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}
        for number, (asked, answered) in enumerate(chats())
    ]
    (folder / "sharegpt.json").write_text(json.dumps(talks, indent=1), encoding="utf-8")
    return folder / "sharegpt.json"


def messages(folder: Path) -> Path:
    """Write what was made for OpenAI's fine-tuning: JSON lines with one system prompt."""
    lines = (
        {
            "messages": [
                {"role": "system", "content": "You are the parcel desk."},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ]
        }
        for asked, answered in chats()
    )
    (folder / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "training.jsonl"


def parquet(folder: Path) -> Path:
    """Write a folder of shards, as a data team hands it over."""
    shards = folder / "parcels"
    shards.mkdir()
    pairs = chats()
    for number in range(3):
        asked, answered = zip(*pairs[number::3], strict=True)
        table = pa.table({"prompt": list(asked), "response": list(answered)})
        pq.write_table(table, shards / f"part-{number:05}.parquet")
    return shards


HOURS = {
    "Excel with semicolons": (excel, "Question"), "one row for each message": (one_row_a_message, "ticket"),
    "ShareGPT": (sharegpt, "conversations"), "OpenAI's messages": (messages, "messages"),
    "a folder of Parquet": (parquet, "prompt"),
}  # fmt: skip


@pytest.fixture(params=list(HOURS))
def hour(request, tmp_path, monkeypatch):
    """A working folder with the file in it, named as on the command line, and a word of how it was recognised."""
    monkeypatch.chdir(tmp_path)
    write, word = HOURS[request.param]
    return write(tmp_path).name, word


def next_commands(shown: str) -> dict[str, list[str]]:
    """Return the commands that `train` printed last, by their name, in words."""
    found = (shlex.split(line, comments=True) for line in re.findall(r"philora \w.*", shown))
    return {words[1] if "--web" not in words else "page": words[1:] for words in found}


def answer_of_client(run: Path, question: str) -> str:
    with philora.serve(run) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        asked = [{"role": "user", "content": question}]
        made = client.chat.completions.create(model=server.models[0], messages=asked, max_tokens=16)
    return made.choices[0].message.content


def answer_of_llama(folder: Path, question: str) -> str:
    import llama_cpp

    (file,) = folder.glob("*.gguf")
    model = llama_cpp.Llama(str(file), n_ctx=256, verbose=False)
    asked = [{"role": "user", "content": question}]
    return model.create_chat_completion(messages=asked, max_tokens=16, temperature=0)["choices"][0]["message"][
        "content"
    ]


def test_from_a_file_to_an_answer(hour, cli, tmp_path):
    name, word = hour
    question = chats()[0][0]

    looked = cli("data", name)
    assert looked.code == 0, looked.err
    assert word in looked.out
    assert "48 rows" in looked.out

    checked = cli("check", name, *SHORT)
    assert checked.code == 0, checked.err
    assert checked.out.splitlines()[-1].startswith("Ready: ")

    trained = cli("train", name, *SHORT)
    assert trained.code == 0, trained.err
    commands = next_commands(trained.out)
    assert {"chat", "page", "report", "export"} <= set(commands)
    run = philora.load(commands["chat"][1])
    assert run.after.loss < run.before.loss
    assert not list(tmp_path.glob("*.yaml")), "no YAML was written by hand, or is needed"
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["data"]["train"]

    report = cli(*(part for part in commands["report"] if part != "--open"))
    assert report.code == 0, report.err
    exported = cli(*commands["export"])
    assert exported.code == 0, exported.err

    assert answer_of_client(run.folder, question).strip()
    assert run.chat(question, max_new_tokens=16).strip()
    if importlib.util.find_spec("llama_cpp"):
        folder = Path(commands["export"][commands["export"].index("--out") + 1])
        assert answer_of_llama(folder, question).strip()
