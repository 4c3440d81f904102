"""Write the table of docs/data.md: how each kind of record file is read, by preparing it.

    python tools/data_kinds.py          # after a kind was added to tests/data_kinds.py, or is read in another way

The text between the marks `<!-- kinds -->` and `<!-- end -->` is replaced; a test compares it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.data_kinds import KINDS, Result, result  # noqa: E402 (the tests lie beside tools)

PAGE = ROOT / "docs" / "data.md"
MARKED = re.compile(r"(<!-- kinds -->\n).*?(<!-- end -->)", re.DOTALL)


def cell(text: str) -> str:
    """Return text escaped for a cell of a Markdown table."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return re.sub(r"<[^>]+>", lambda found: f"`{found[0]}`", text)


def row(name: str, found: Result) -> str:
    """Return the row of a kind: how it is read, what is trained and reported, why it is refused."""
    said = [*found.unread_fields, *found.unread_parts]
    written_out = [item.partition(": ")[2].partition(": ")[2] for item in found.notices if " is written out " in item]
    said += [item.partition(". ")[0].rstrip(".") for item in written_out]
    expected = found.refused.partition(" - expected ")[2].partition(". ")[0].rstrip(".")
    read = f"{found.shape}, {found.records}" if not found.refused else ""
    trained = "; ".join(found.labels)
    return f"| {cell(name)} | {read} | {cell(trained)} | {cell(', '.join(said))} | {cell(expected)} |"


def filled(page: str, results: Mapping[str, Result]) -> str:
    """The page with the table of these results."""
    lines = [
        "| kind | read as, records | the loss is on | reported: not read, or odd | refused: expected |",
        "| --- | --- | --- | --- | --- |",
        *(row(name, results[name]) for name in KINDS),
    ]
    table = "\n".join(lines)
    return MARKED.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def main() -> None:
    """Prepare every kind and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        results = {name: result(kind, Path(folder) / str(number)) for number, (name, kind) in enumerate(KINDS.items())}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
