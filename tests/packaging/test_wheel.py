"""A wheel, in an environment that holds nothing else, in a folder outside the checkout, runs the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DATA = {
    "philora/native/library.c", "philora/py.typed", "philora/nano/demo.yaml", "philora/nano/helpdesk/train.jsonl",
    "philora/nano/helpdesk/eval.jsonl", "philora/nano/model/model.safetensors", "philora/nano/model/tokenizer.json",
    "philora/nano/model/chat_template.jinja", "philora/templates/report.html.j2", "philora/templates/report.css",
    "philora/serving/web/chat.html", "philora/serving/web/chat.js", "philora/evaluation/forgetting/prompts.jsonl",
}  # fmt: skip


def shell(*command: object, cwd: Path, **environment: str) -> str:
    """Run with nothing of this checkout on the path; what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PHILORA_CACHE")}
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source distribution, and an environment that the wheel alone was installed into."""
    folder = tmp_path_factory.mktemp("elsewhere")
    try:
        shell(sys.executable, "-m", "venv", folder / "builder", cwd=folder)
        shell(folder / "builder/bin/python", "-m", "pip", "install", "-q", "build", cwd=folder)
    except AssertionError as error:
        pytest.skip(f"no registry: {error}")
    shell(folder / "builder/bin/python", "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    shell(sys.executable, "-m", "venv", folder / "empty", cwd=folder)
    wheel = next((folder / "dist").glob("*.whl"))
    shell(folder / "empty/bin/python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_the_files_of_both_distributions(place):
    with zipfile.ZipFile(next((place / "dist").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert names >= DATA
    assert any(each.endswith("licenses/LICENSE") for each in names)
    assert {each.partition("/")[0] for each in names if ".dist-info" not in each} == {"philora"}
    with tarfile.open(next((place / "dist").glob("*.tar.gz"))) as archive:
        inside = {each.partition("/")[2] for each in archive.getnames()}
    assert inside >= {f"src/{each}" for each in DATA} | {"LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile"}


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_environment(place):
    philora = place / "empty/bin/philora"
    away = {"HF_HUB_OFFLINE": "1", "HOME": str(place / "home"), "PATH": "/usr/bin:/bin"}
    where = shell(place / "empty/bin/python", "-c", "import philora; print(philora.__file__)", cwd=place, **away)
    assert Path(where.strip()).is_relative_to(place / "empty")
    shown = shell(philora, "demo", "training_config.max_steps=20", "evaluation.generate=8", cwd=place, **away)
    assert "matches the reference" in shown or "differs" in shown
    results = json.loads((place / "runs/demo/results.json").read_text(encoding="utf-8"))
    assert results["after"]["loss"] < results["before"]["loss"]
    assert (place / "runs/demo/report.html").stat().st_size > 10_000
    # What needs an extra says so; everything else works with what the wheel brought.
    assert "verified" in shell(philora, "export", "runs/demo", "--out", "peft", cwd=place, **away)
    assert "largest difference" in shell(philora, "merge", "runs/demo", "--out", "merged", cwd=place, **away)
    shell(philora, "push", "runs/demo", "me/demo", "--dry-run", cwd=place, **away)
    shell(philora, "evaluate", "runs/demo", "--limit", "8", "--answers", "2", cwd=place, **away)
    for command in (("export", "runs/demo", "--format", "gguf", "--out", "x"), ("serve", "runs/demo", "--port", "0")):
        with pytest.raises(AssertionError, match=r"Install (it|them): pip install 'philora\[(gguf|serve)\]'"):
            shell(philora, *command, cwd=place, **away)
