"""Write the page of a run: `report.html`, made from the files of the run folder only.

    run folder -> `run_record.read_run` -> `Run` -> `run_view` -> text and coordinates -> template -> one file

`comparison_view` makes a page of several runs: the settings that differ, figures, curves and answers.

The page holds its style, its script and its charts; its content security policy forbids it to load anything and to run
any script but its own. What a run does not have, because it was stopped or nothing was held out, is left out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from philora.errors import ConfigError, fault
from philora.files.checkpoint import write_text
from philora.reporting.comparison_view import comparison_view
from philora.reporting.run_record import Run, read_run
from philora.reporting.run_view import run_view

MOST_RUNS = 8
"""Most runs in a comparison: it has as many colours."""


def write_report(run_folder: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_folder: The folder of a run that has ended, was stopped or is running.
        out: The file to write; default: `report.html` in the run folder.

    Returns:
        The file, which is written atomically.

    Raises:
        DataError: The folder is not that of a run, or `results.json` is not what philora wrote.
    """
    target = Path(run_folder) / "report.html" if out is None else Path(out)
    write_text(target, render(read_run(Path(run_folder))))
    return target


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page that compares several runs.

    Args:
        run_folders: Two to `MOST_RUNS` run folders.
        out: The file to write, atomically.

    Raises:
        ConfigError: There are too few or too many.
        DataError: As `write_report`.
    """
    if not 2 <= len(run_folders) <= MOST_RUNS:
        raise ConfigError(fault("report", "runs", len(run_folders), f"2 to {MOST_RUNS} runs to compare"))
    write_text(Path(out), render_comparison([read_run(Path(folder)) for folder in run_folders]))
    return Path(out)


def render(run: Run) -> str:
    """Return the page of a run as HTML."""
    return _render("report.html.j2", run_view(run))


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page of several runs as HTML."""
    return _render("comparison.html.j2", comparison_view(runs))


def _render(template: str, view: Mapping[str, Any]) -> str:
    script = _template_text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **view, style=Markup(_template_text("report.css")), script=Markup(script), script_digest=digest
    )


def _template_text(name: str) -> str:
    return (resources.files("philora") / "templates" / name).read_text(encoding="utf-8")


__all__ = ["MOST_RUNS", "Run", "read_run", "render", "render_comparison", "write_comparison", "write_report"]
