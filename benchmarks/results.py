"""Rows and charts of measurements: `benchmarks/results/*.csv` and `*.png`."""

from __future__ import annotations

import csv
import datetime
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.work import Work

RESULTS = Path(__file__).parent / "results"


def commit(repository: Path) -> str:
    """The commit that is measured; `+` where the package has changes that are not committed; empty without git."""

    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(repository), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


def now() -> str:
    """Date and time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append(table: Path, row: Mapping[str, str | int | float]) -> None:
    """Add a row to a table, which is begun where there is none.

    Raises:
        ValueError: The table has other columns.
    """
    new = not table.exists()
    if not new:
        with table.open(newline="", encoding="utf-8") as stream:
            columns = next(csv.reader(stream), [])
        if columns != list(row):
            raise ValueError(f"{table}: columns={columns} - expected {list(row)}. Move the table out of the way.")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def chart(works: Sequence[tuple[Work, Mapping[str, float], float | None]], picture: Path) -> None:
    """Bars of tokens per second, with the ratio to the model card's settings beside each.

    Args:
        works: Of each work: speeds by the contestants' titles, and the speed that ratios are taken to.
        picture: PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    works = [item for item in works if item[1]]
    if not works:
        return
    heights = [0.42 * len(speeds) + 0.9 for _, speeds, _ in works]
    figure, panels = pyplot.subplots(
        len(works), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (work, speeds, card), panel in zip(works, panels[:, 0], strict=True):
        titles = list(speeds)
        colours = ["#1f5fa8" if title.startswith("philora") else "#b4b9c1" for title in titles]
        bars = panel.barh(titles, list(speeds.values()), color=colours, height=0.68)
        marks = [f"{speed:,.0f}" + (f"  ({speed / card:.2f}x)" if card else "") for speed in speeds.values()]
        panel.bar_label(bars, marks, padding=4, fontsize=9, color="#222222")
        panel.invert_yaxis()
        panel.set_xlim(0, 1.22 * max(speeds.values()))
        panel.set_title(f"{work.title}, tokens per second", loc="left", fontsize=10, color="#222222")
        panel.tick_params(length=0, labelsize=9, colors="#222222")
        panel.xaxis.set_visible(False)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.spines["left"].set_color("#888888")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=160, facecolor="white")
    pyplot.close(figure)
