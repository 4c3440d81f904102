"""Kinds of record files that people have, each tiny, and what becomes of every text in them.

`KINDS` is the table of the tests and of docs/data.md. A kind is written from Python values, so that the texts in its
files are known without any reader of the package; `result` prepares it as a run would, and `lost` names the texts that
are then neither in a row nor said to be unread.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
from pyarrow import parquet
from transformers import AutoTokenizer

import philora
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import IGNORED, prepare
from philora.errors import DataError

MODEL = Path(philora.__file__).parent / "nano" / "model"
TOOLS_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if loop.first and tools %}{{ tools|tojson }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call|tojson }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""A template that shows tool descriptions and tool calls; the bundled model's shows neither."""

NO_TEXT = {"role", "from", "type", "label", "weight", "loss", "ticket_id", "created", "Author", "Conversation"}
"""Fields that say something about a text and are none, also of one row for each message."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


@dataclass(frozen=True)
class File:
    """One file: its records as values, and how they are laid out in bytes.

    `named` are the files of a folder and the lists of a JSON object with the texts in each.
    """

    name: str
    records: list[Any]
    data: bytes


def jsonl(*records: Any, name: str = "data.jsonl", encoding: str = "utf-8", end: str = "\n") -> File:
    text = "".join(json.dumps(each, ensure_ascii=False) + end for each in records)
    data = text.encode(encoding)
    return File(name, list(records), gzip.compress(data) if name.endswith(".gz") else data)


def document(value: Any, records: list[Any], name: str = "data.json", indent: int | None = 2) -> File:
    return File(name, records, json.dumps(value, indent=indent).encode())


def table(*records: dict[str, Any], name: str = "data.csv", encoding: str = "utf-8", end: str = "\n") -> File:
    stream = io.StringIO()
    writer = csv.writer(stream, "excel-tab" if ".tsv" in name else "excel", lineterminator=end)
    writer.writerow(records[0])
    writer.writerows(each.values() for each in records)
    return File(name, list(records), stream.getvalue().encode(encoding))


def packed(file: File, name: str) -> File:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(file.data)
    return File(name, file.records, sink.getvalue().to_pybytes())


def separated(*records: dict[str, Any], delimiter: str = ";", encoding: str = "utf-8-sig", head: str = "") -> File:
    stream = io.StringIO()
    stream.write(head)
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(records[0])
    writer.writerows(each.values() for each in records)
    return File("data.csv", list(records), stream.getvalue().encode(encoding))


def sheet(*records: dict[str, Any], name: str = "data.xlsx", **others: list[dict[str, Any]]) -> File:
    book = openpyxl.Workbook()
    for title, rows in {"Chats": list(records), **others}.items():
        made = book.create_sheet(title)
        for row in ([*rows[0]], *([*each.values()] for each in rows)):
            made.append(row)
    del book["Sheet"]
    sink = io.BytesIO()
    book.save(sink)
    return File(name, [*records, *({f"sheet {title}": rows} for title, rows in others.items())], sink.getvalue())


def arrow(*records: dict[str, Any], name: str = "data.parquet") -> File:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(records)), sink)
    return File(name, list(records), sink.getvalue())


def raw(name: str, data: bytes, *texts: str) -> File:
    return File(name, [{"text": each} for each in texts], data)


@dataclass(frozen=True)
class Kind:
    """A kind of files and what is expected of it.

    Attributes:
        name: As the table calls it.
        files: What stands in the folder; one file alone is given as a file.
        labels: The texts with loss, a row each, without their stop tokens; several of one row stand behind each other.
        said: Words that the notices have to hold.
        refused: Words of the refusal; empty where it is read.
        settings: Of the source, such as `columns` or `split`.
        template: Of the tokenizer, where it is not the bundled one.
        role: What the source is read for.
    """

    name: str
    files: tuple[File, ...]
    labels: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    refused: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    folder: bool = False


Q, A = "What is the way?", "Turn left."
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
DESCRIBED = [{"type": "function", "function": {"name": "weather", "description": "Weather now", "parameters": {}}}]
TOOL_ROW = {
    "messages": [
        user("Rain in Oslo?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "12 degrees"},
        assistant("It is mild."),
    ],
    "tools": DESCRIBED,
}
CHAT = {"messages": [user(Q), assistant(A)]}
OTHER = {"messages": [user("And then?"), assistant("Continue.")]}
THIRD = {"messages": [user("How far?"), assistant("A mile.")]}
PAIR = {"prompt": Q, "completion": A}
ASKED = {"question": Q, "answer": A}


def chat_kinds() -> Iterator[Kind]:
    yield Kind("messages", (jsonl(CHAT),), (A,))
    yield Kind("messages with a system turn", (jsonl({"messages": [system("Be brief."), *CHAT["messages"]]}),), (A,))
    yield Kind("messages, `system` beside them", (jsonl({"system": "Be brief.", **CHAT}),), (A,))
    yield Kind(
        "messages, a different system text beside them",
        (jsonl({"system": "Be long.", "messages": [system("Be brief."), *CHAT["messages"]]}),),
        refused="the same text as the system turn",
    )
    yield Kind("messages with ids", (jsonl({"id": "a1", "source": "web", **CHAT}),), (A,), ("id (1)", "source (1)"))
    turns = [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]
    yield Kind("messages, the role `developer`", (jsonl({"messages": turns}),), (A,))
    turns = [user(Q), assistant("Turn right.", weight=0), user("Sure?"), assistant(A, weight=1)]
    yield Kind("a turn with `weight: 0`", (jsonl({"messages": turns}),), (A,))
    turns = [user(Q), assistant("Turn right.", loss=False), user("Sure?"), assistant(A, loss="true")]
    yield Kind("a turn with `loss: false`", (jsonl({"messages": turns}),), (A,))
    yield Kind(
        "a turn with `weight: 0.5`",
        (jsonl({"messages": [user(Q), assistant(A, weight=0.5)]}),),
        refused="0 (no loss on this turn) or 1",
    )
    yield Kind(
        "`loss: true` on the user's turn",
        (jsonl({"messages": [{**user(Q), "loss": True}, assistant(A)]}),),
        refused="loss on turns of the assistant only",
    )
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the way?"}]
    yield Kind("content in parts", (jsonl({"messages": [{"role": "user", "content": parts}, assistant(A)]}),), (A,))
    parts = [*parts, {"type": "image_url", "image_url": {"url": "a.png"}}]
    yield Kind(
        "content with a picture",
        (jsonl({"messages": [{"role": "user", "content": parts}, assistant(A)]}),),
        refused="parts of type text",
    )
    yield Kind(
        "pictures beside the text",
        (jsonl({"messages": [user("<image> What is it?"), assistant("A cat.")], "images": ["a.png"]}),),
        refused="no pictures, video or sound beside the text",
    )
    yield Kind(
        "turns with a score",
        (jsonl({"messages": [user(Q), assistant(A, score="good")]}),),
        (A,),
        ("score of turns (1)",),
    )
    yield Kind(
        "reasoning in a separate field",
        (jsonl({"messages": [user(Q), assistant(A, reasoning_content="Left or right?")]}),),
        (A,),
        ("reasoning_content of turns (1)",),
    )
    yield Kind("ShareGPT", (jsonl({"conversations": [human(Q), gpt(A)]}),), (A,))
    yield Kind(
        "ShareGPT, `system` beside it",
        (jsonl({"conversations": [human(Q), gpt(A)], "system": "Be brief."}),),
        (A,),
    )
    yield Kind(
        "UltraChat",
        (jsonl({"prompt": Q, "prompt_id": "f0", **CHAT}),),
        (A,),
        ("prompt (1)", "prompt_id (1)"),
    )
    yield Kind(
        "an empty answer",
        (jsonl({"messages": [user(Q), assistant(" ")]}),),
        refused="an answer that is not empty",
    )
    yield from turn_kinds()


def row(ticket: str, role: str, text: str, created: str, **more: str) -> dict[str, Any]:
    return {"ticket_id": ticket, "role": role, "text": text, "created": created, **more}


def turn_kinds() -> Iterator[Kind]:
    rows = [
        row("1", "agent", A, "2026-03-01 10:05:00"),
        row("2", "customer", "Refund?", "2026-03-01 10:01:00"),
        row("1", "customer", Q, "2026-03-01 10:00:00"),
        row("2", "agent", "Done.", "2026-03-01 10:30:00"),
    ]
    yield Kind("one row for each message", (table(*rows),), (A, "Done."))
    yield Kind("the same as JSON Lines", (jsonl(*rows),), (A, "Done."))
    yield Kind("the same as Parquet", (arrow(*rows),), (A, "Done."))
    unordered = [{**rows[2], "created": "Monday"}, {**rows[0], "created": "Tuesday"}]
    yield Kind(
        "one row for each message, times that cannot be sorted",
        (table(*unordered),),
        (A,),
        ("column created (not all of its values are times",),
    )
    subject = [{**each, "subject": "Ways"} for each in (rows[2], rows[0])]
    yield Kind("one row for each message, another column", (table(*subject),), (A,), ("subject (1)",))
    named = [
        {"Conversation": "c", "Author": "Ann", "Words": Q, "state": "open"},
        {"Conversation": "c", "Author": "Shop", "Words": A, "state": ""},
    ]
    columns = {"conversation": "{Conversation}", "role": "{Author}", "content": "{Words}"}
    yield Kind(
        "one row for each message, other names",
        (table(*named),),
        (A,),
        ("state (1)",),
        settings={"columns": columns, "roles": {"Shop": "assistant", "*": "user"}},
    )
    yield Kind(
        "the same, an unknown role",
        (table(*named),),
        refused="messages[0].role='Ann'",
        settings={"columns": columns},
    )
    yield Kind(
        "the same, a missing column",
        (table(*named),),
        refused="(the columns are Conversation, Author, Words, state)",
        settings={"columns": {**columns, "time": "{sent}"}},
    )
    yield Kind(
        "one row for each message, an id missing",
        (table(*rows, row("", "agent", "Who?", "2026-03-01 10:30:00")),),
        refused="the id of the conversation that the row belongs to",
    )
    yield Kind(
        "one row for each message, no id",
        (table({"role": "customer", "text": Q}),),
        refused="a complete conversation in each record",
    )
    yield Kind(
        "one row for each message, never answered", (table(rows[1]),), refused="at least one turn of the assistant"
    )


def tool_kinds() -> Iterator[Kind]:
    calls = '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}'
    yield Kind(
        "OpenAI's tool calls, a template that shows them",
        (jsonl(TOOL_ROW),),
        (f"{calls}It is mild.",),
        template=TOOLS_TEMPLATE,
    )
    yield Kind(
        "OpenAI's tool calls, a template that leaves them out",
        (jsonl({"messages": TOOL_ROW["messages"]}),),
        refused="an answer that the chat template shows",
    )
    yield Kind(
        "tool descriptions, a template that leaves them out",
        (jsonl({**CHAT, "tools": DESCRIBED}),),
        refused="tool descriptions that the chat template shows",
    )
    yield Kind(
        "a tool's result, a template that leaves it out",
        (jsonl({"messages": [user(Q), {"role": "tool", "content": "north"}, assistant(A)]}),),
        refused="it leaves out turns of the role tool",
    )
    yield Kind(
        "functions in the older format",
        (jsonl({"messages": [user(Q), assistant(A, function_call={"name": "weather", "arguments": "{}"})]}),),
        refused="tool calls in the current format",
    )


def pair_kinds() -> Iterator[Kind]:
    yield Kind("prompt and completion", (jsonl(PAIR),), (A,))
    yield Kind(
        "a prompt of several turns",
        (jsonl({"prompt": [user("Hi."), assistant("Hello."), user(Q)], "completion": [assistant(A)]}),),
        (A,),
    )
    yield Kind("question and answer", (jsonl(ASKED),), (A,))
    yield Kind("query and response", (jsonl({"query": Q, "response": A}),), (A,))
    yield Kind("user and assistant", (jsonl({"user": Q, "assistant": A}),), (A,))
    yield Kind("input and output", (jsonl({"input": Q, "output": A}),), (A,))
    yield Kind("Alpaca", (jsonl({"instruction": "Add.", "input": "2, 2", "output": "4"}),), ("4",))
    row = {"instruction": Q, "input": "", "output": A, "system": "Be brief.", "history": [["Hi.", "Hello."]]}
    yield Kind("Alpaca with system and history", (jsonl(row),), (f"Hello.{A}",))
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "closed_qa"}
    yield Kind("dolly", (jsonl(row),), ("Ann.",), ("category (1)",))
    row = {"id": "t1", "system_prompt": "Be brief.", "question": Q, "response": A}
    yield Kind("OpenOrca", (jsonl(row),), (A,), ("id (1)",))
    row = {"question": "Who?", "context": "Ann came.", "answer": "Ann.", "title": "Visits"}
    yield Kind("questions about a text", (jsonl(row),), ("Ann.",), ("title (1)",))
    yield Kind(
        "an answer with its explanation", (jsonl({**ASKED, "explanation": "By map."}),), (A,), ("explanation (1)",)
    )
    yield Kind("KTO, good answers", (jsonl({**PAIR, "label": True}),), (A,))
    yield Kind("KTO, a bad answer", (jsonl({**PAIR, "label": False}),), refused="an answer that is not labelled as bad")
    yield Kind(
        "HH, two texts",
        (jsonl({"chosen": f"Human: {Q} Assistant: {A}", "rejected": "Human: Hi. Assistant: No."}),),
        refused="one answer per record, not a better and a worse one",
    )
    yield Kind(
        "DPO, the chosen answers named",
        (jsonl({"prompt": Q, "chosen": A, "rejected": "No idea."}),),
        (A,),
        ("rejected (1)",),
        settings={"columns": {"user": "{prompt}", "assistant": "{chosen}"}},
    )
    yield Kind(
        "a list under another name",
        (jsonl({"dialog": CHAT["messages"], "topic": "ways"}),),
        (A,),
        ("topic (1)",),
        settings={"columns": {"messages": "{dialog}"}},
    )
    yield Kind(
        "`columns` without braces",
        (table({"Customer message": Q, "Reply": A}),),
        refused="a template with the name of a column in braces (the columns are Customer message, Reply)",
        settings={"columns": {"user": "Customer message", "assistant": "Reply"}},
    )
    yield Kind("names of no shape", (jsonl({"utterance": Q, "reply": A}),), refused="expected messages, conversations")
    yield Kind("plain text", (jsonl({"text": "Once upon a time."}),), ("Once upon a time.",))
    row = {"text": "Once upon a time.", "url": "a.org", "timestamp": "2026"}
    yield Kind("plain text with its origin", (jsonl(row),), ("Once upon a time.",), ("url (1)", "timestamp (1)"))
    yield Kind(
        "a text with a class",
        (jsonl({"text": Q, "category": "billing"}),),
        refused="category may be its answer or its speaker",
    )
    yield Kind(
        "the same, `format: text`",
        (jsonl({"text": Q, "category": "billing"}),),
        (Q,),
        ("category (1)",),
        settings={"format": "text"},
    )
    yield Kind(
        "answers that end in the stop token's text",
        (jsonl({"prompt": Q, "completion": f"{A}<|end|>"}),),
        (f"{A}<|end|>",),
        ("<|end|> is written out at the end of answers in 1 records",),
    )
    yield Kind(
        "another model's stop token",
        (jsonl({"prompt": Q, "completion": f"{A}<|im_end|>"}),),
        (f"{A}<|im_end|>",),
        ("<|im_end|> is written out in 1 records. It belongs to another model",),
    )


def layout_kinds() -> Iterator[Kind]:
    yield Kind("CSV", (table(ASKED),), (A,))
    yield Kind("TSV", (table(ASKED, name="data.tsv"),), (A,))
    yield Kind("CSV, lists of messages in its cells", (table({"messages": json.dumps(CHAT["messages"])}),), (A,))
    yield Kind(
        "CSV with a byte order mark and Windows' line ends", (table(ASKED, encoding="utf-8-sig", end="\r\n"),), (A,)
    )
    yield Kind("CSV with semicolons, as Excel writes it", (separated(ASKED),), (A,))
    yield Kind("CSV with a line `sep=;`", (separated(ASKED, head="sep=;\r\n"),), (A,))
    yield Kind(
        "CSV with tabs in UTF-16, as Excel's Unicode text", (separated(ASKED, delimiter="\t", encoding="utf-16"),), (A,)
    )
    yield Kind("CSV with commas, a semicolon in a name", (table({"question": Q, "answer": A, "a;b": ""}),), (A,))
    yield Kind("Excel", (sheet(ASKED),), (A,))
    yield Kind(
        "Excel, a sheet of each split",
        (sheet({"question": "x", "answer": "y"}, train=[ASKED]),),
        (A,),
        ("sheet Chats",),
    )
    yield Kind(
        "Excel, several sheets", (sheet(ASKED, Notes=[{"note": "by Ann"}]),), refused="expected one of Chats, Notes"
    )
    yield Kind(
        "Excel, one sheet chosen",
        (sheet(ASKED, Notes=[{"note": "by Ann"}]),),
        (A,),
        ("sheet Notes of data.xlsx",),
        settings={"split": "Chats"},
    )
    yield Kind("Excel, incomplete", (raw("data.xlsx", sheet(ASKED).data[:300]),), refused="a complete .xlsx file")
    yield Kind("Excel before 2007", (raw("data.xls", b"\xd0\xcf\x11\xe0"),), refused="save it as .xlsx")
    yield Kind("CSV in UTF-16", (table(ASKED, encoding="utf-16"),), (A,))
    yield Kind(
        "CSV, more cells than columns",
        (raw("data.csv", b"question,answer\na,b,c\n", "c"),),
        refused="2 as in the first line",
    )
    yield Kind(
        "CSV, a quote left open", (raw("data.csv", b'question,answer\na,"b\n', "b"),), refused="expected a line of CSV"
    )
    yield Kind(
        "CSV, two columns of one name",
        (raw("data.csv", b"question,answer,answer\na,b,c\n", "c"),),
        refused="distinct column names",
    )
    yield Kind("JSON Lines in UTF-16", (jsonl(CHAT, encoding="utf-16"),), (A,))
    yield Kind(
        "UTF-16 without a byte order mark",
        (jsonl(CHAT, encoding="utf-16-le"),),
        refused="UTF-16 with a byte order mark",
    )
    yield Kind(
        "windows-1252", (jsonl({**PAIR, "completion": "på sjøen"}, encoding="cp1252"),), refused="expected UTF-8 text"
    )
    yield Kind("JSON Lines with U+2028 and NEL", (jsonl({"prompt": "One\u2028two\x85three", "completion": A}),), (A,))
    yield Kind("JSON Lines, gzip", (jsonl(CHAT, name="data.jsonl.gz"),), (A,))
    yield Kind("JSON Lines, zstd", (packed(jsonl(CHAT), "data.jsonl.zst"),), (A,))
    yield Kind("CSV with semicolons, zstd", (packed(separated(ASKED), "data.csv.zst"),), (A,))
    torn = packed(jsonl(*[CHAT] * 50), "data.jsonl.zst")
    yield Kind(
        "JSON Lines, zstd, incomplete", (File(torn.name, torn.records, torn.data[:-9]),), refused="a complete zstd file"
    )
    yield Kind("JSON Lines, zip", (raw("data.jsonl.zip", b"PK"),), refused="Unpack it")
    yield Kind(
        "JSON Lines, text after a record",
        (raw("data.jsonl", json.dumps(CHAT).encode() + b" more\n", "more"),),
        refused="Extra data",
    )
    yield Kind(
        "JSON, a name twice in an object",
        (raw("data.jsonl", b'{"prompt": "a", "completion": "b", "completion": "c"}\n', "b"),),
        refused="unique names in a JSON object",
    )
    yield Kind("JSON, a list", (document([CHAT, OTHER], [CHAT, OTHER]),), (A, "Continue."))
    both = json.dumps(CHAT, indent=2) + "\n" + json.dumps(OTHER, indent=2) + "\n"
    yield Kind("JSON, objects one after another", (File("data.json", [CHAT, OTHER], both.encode()),), (A, "Continue."))
    yield Kind(
        "JSON, a list in an object",
        (document({"version": "3", "data": [CHAT]}, [CHAT, {"version": "3"}]),),
        (A,),
        ("fields beside the list of data.json (version)",),
    )
    yield Kind(
        "JSON, lists named as splits",
        (document({"test": [OTHER], "train": [CHAT]}, [CHAT, {"list test": OTHER}]),),
        (A,),
        ("list test of data.json (1 records)",),
    )
    yield Kind(
        "JSON, one list chosen",
        (document({"easy": [OTHER], "hard": [CHAT]}, [CHAT, {"list easy": OTHER}]),),
        (A,),
        ("list easy of data.json (1 records)",),
        settings={"split": "hard"},
    )
    yield Kind(
        "JSON, lists of other names",
        (document({"easy": [OTHER], "hard": [CHAT]}, [CHAT, OTHER]),),
        refused="expected one of easy, hard",
    )
    yield Kind("Parquet", (arrow(ASKED),), (A,))
    yield Kind("Parquet, lists of turns", (arrow({"conversations": [human(Q), gpt(A)]}),), (A,))
    yield Kind(
        "a file, `split` given",
        (jsonl(CHAT),),
        refused="null, since this file is one list",
        settings={"split": "train"},
    )


def folder_kinds() -> Iterator[Kind]:
    far = {"question": "Far?", "answer": "A mile."}
    yield Kind(
        "a folder of the Hub's form",
        (arrow(ASKED, name="data/train-00000-of-00001.parquet"), arrow(far, name="data/test-00000-of-00001.parquet")),
        (A,),
        ("split test (data/test-00000-of-00001.parquet)",),
        folder=True,
    )
    files = (jsonl(CHAT, name="train.jsonl"), jsonl(OTHER, name="valid.jsonl"), jsonl(THIRD, name="more.jsonl"))
    yield Kind(
        "a folder with files named as splits",
        files,
        (A,),
        ("split validation (valid.jsonl)", "files in no split (more.jsonl)"),
        folder=True,
    )
    yield Kind(
        "the same, `split` given",
        files,
        ("Continue.",),
        ("split train (train.jsonl)", "files in no split (more.jsonl)"),
        settings={"split": "validation"},
        folder=True,
    )
    yield Kind(
        "a folder with one split's name beside others",
        (jsonl(CHAT, name="test.jsonl"), jsonl(OTHER, name="chats.jsonl")),
        refused="the name of a split",
        folder=True,
    )
    yield Kind(
        "a folder with folders",
        (jsonl(CHAT, name="en/a.jsonl"), table(ASKED, name="no/b.csv")),
        refused="a field 'messages'",
        folder=True,
    )
    yield Kind(
        "a folder with notes",
        (jsonl(CHAT, name="a.jsonl"), jsonl(OTHER, name="sub/b.jsonl"), raw("notes.md", b"by Ann", "by Ann")),
        (A, "Continue."),
        ("files of other kinds (notes.md)",),
        folder=True,
    )
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("easy", "hard"))
    card = f"---\nconfigs:\n{configs}---\n".encode()
    subsets = (jsonl(CHAT, name="easy/a.jsonl"), jsonl(OTHER, name="hard/a.jsonl"), raw("README.md", card))
    yield Kind(
        "a folder with subsets, one given",
        subsets,
        ("Continue.",),
        ("files in no split (easy/a.jsonl)",),
        settings={"subset": "hard"},
        folder=True,
    )
    yield Kind("a folder with subsets", subsets, refused="one of easy, hard", folder=True)
    yield Kind(
        "a folder, `subset` given",
        (jsonl(CHAT, name="a.jsonl"),),
        refused="null, since the folder has no README.md",
        settings={"subset": "hard"},
        folder=True,
    )


KINDS: dict[str, Kind] = {
    kind.name: kind for kinds in (chat_kinds, tool_kinds, pair_kinds, layout_kinds, folder_kinds) for kind in kinds()
}


@dataclass(frozen=True)
class Result:
    """What became of a kind: the shape and its rows, or the refusal."""

    shape: str = ""
    records: int = 0
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    unread_fields: tuple[str, ...] = ()
    unread_parts: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    refused: str = ""


@cache
def tokenizer_with(template: str | None) -> Any:
    made = AutoTokenizer.from_pretrained(MODEL)
    if template is not None:
        made.chat_template = template
    return made


def written(kind: Kind, folder: Path) -> Path:
    """The kind's file or folder on disk."""
    for file in kind.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    return folder if kind.folder else folder / kind.files[0].name


def result(kind: Kind, folder: Path) -> Result:
    """Prepare a kind as a run does."""
    tokenizer = tokenizer_with(kind.template)
    source = SourceConfig(str(written(kind, folder / "data")), **kind.settings)
    data = DataConfig(train=(source,), eval=None, num_proc=1, cache_dir=str(folder / "cache"))
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    try:
        made = prepare(data, tokenizer, max_length=512, seed=0, stop_token_ids=stops)
    except DataError as error:
        return Result(refused=str(error).replace(f"{folder}/data/", "").replace(f"{folder}/data", "data"))
    found = made.report.sources["train"][0]
    labels = []
    for row in made.train:
        ids = [label for label in row["labels"] if label != IGNORED]
        labels.append(_answers(tokenizer, ids))
    return Result(
        found.format,
        found.records,
        tuple(tokenizer.decode(row["input_ids"]) for row in made.train),
        tuple(labels),
        tuple(found.unread_fields),
        tuple(found.unread_parts),
        tuple(each.replace(f"{folder}/data/", "").replace(f"{folder}/data", "data") for each in made.report.notices),
    )


def _answers(tokenizer: Any, ids: list[int]) -> str:
    """Labels as text: the answers of a row without the stop token that ends each."""
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    answers: list[list[int]] = [[]]
    for index, each in enumerate(ids):
        # Two in a row: the first of them was written out in the text.
        if each in stops and not (index + 1 < len(ids) and ids[index + 1] in stops):
            answers.append([])
        else:
            answers[-1].append(each)
    return "".join(tokenizer.decode(each).strip() for each in answers)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a record that is no object and no list, with the names that lead to it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, str(key)))
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, path)
    elif isinstance(value, str) and value.startswith("["):
        yield from leaves(json.loads(value), path)
    else:
        yield path, value


def lost(kind: Kind, found: Result) -> list[str]:
    """Values of the kind's files that are in no row and are not named as unread either."""
    if found.refused:
        return []
    missing = []
    parts = " ".join(found.unread_parts)
    for file in kind.files:
        if kind.folder and file.name in parts:
            continue
        for record in file.records:
            for path, value in leaves(record):
                named = (
                    path[0] in found.unread_fields or f"{path[-1]} of turns" in found.unread_fields or path[0] in parts
                )
                if value in (None, "") or path[-1] in NO_TEXT or named:
                    continue
                if not isinstance(value, str) or not any(value.strip() in text for text in found.texts):
                    missing.append(f"{file.name}: {'.'.join(path)} = {value!r}")
    return missing
