"""Write the part of docs/architecture.md that lists packages and files, from their docstrings.

python tools/architecture.py
"""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY / "src" / "philora"
PAGE = REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- packages: python tools/architecture.py -->\n", "<!-- end of packages -->\n"

# From the bottom up: a package imports only what stands before it.
ORDER = (
    "errors", "families", "files", "runtime", "configuration", "native", "lora", "compat", "kernels", "decoder_stack",
    "adapters", "models", "dataset", "exporting", "generation", "evaluation", "planning", "reporting", "training",
    "serving", "interface", "cli", "__main__",
)  # fmt: skip


def summary(path: Path) -> str:
    """Return the first paragraph of a file's docstring, on one line, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).removesuffix(".").removesuffix(":").replace("|", "\\|")


def packages() -> str:
    """Return the packages from the top down, each with its files."""
    lines = []
    for name in reversed(ORDER):
        folder = ROOT / name
        if folder.is_dir():
            lines += ["", f"### `{name}/`", "", f"{summary(folder / '__init__.py')}.", ""]
            lines += ["| file | purpose |", "| --- | --- |"]
            files = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
            lines += [f"| `{path.relative_to(ROOT).as_posix()}` | {summary(path)} |" for path in files]
    return "\n".join([*lines[1:], "", ""])


def main() -> None:
    """Write the page."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{packages()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
