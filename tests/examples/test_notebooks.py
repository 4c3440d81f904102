"""The notebooks among the examples: the settings of their scripts, no stored output, and every cell runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = ("Phi_3_Inference_Finetuning", "Phi-3-finetune-lora-python", "Phi-3-finetune-qlora-python")
TINY = {"MODEL": "nano", "LIMIT": 40, "MAX_STEPS": 2, "MAX_NEW_TOKENS": 8, "ANSWERS": 2, "OUT": "out"}


def notebook(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def literals(source: str) -> dict[str, Any]:
    """Return the settings that a source assigns, by name."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def with_values(source: str, values: dict[str, Any]) -> str:
    """Return the cell of parameters with other values."""
    return "\n".join(f"{name} = {values.get(name, value)!r}" for name, value in literals(source).items())


def run(name: str, folder: Path, data: str) -> list[Any]:
    """Run a notebook on the bundled model, in a copy of its folder; return its outputs."""
    shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True)
    book = notebook(name)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = with_values(parameters.source, TINY | {"DATA": data})
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(outputs: list[Any], kind: str) -> str:
    """Return what was shown as text or as HTML."""
    parts = [output.get("text", "") if kind == "text" else "" for output in outputs]
    parts += [str(output.get("data", {}).get(f"text/{kind}", "")) for output in outputs]
    return "\n".join(parts)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_the_settings_of_its_script(name):
    source = "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "code")
    script = literals((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    written = literals(source)
    shared = {"TRAINING", "LORA", "QUESTIONS"} & set(script)
    assert "TRAINING" in shared
    assert {name: written[name] for name in shared} == {name: script[name] for name in shared}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_output(name):
    book = notebook(name)
    nbformat.validate(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    assert f"({name}.ipynb)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def check(outputs: list[Any]) -> None:
    """Check what every training notebook shows: a bar, a table of the run with its curve, no warnings of releases."""
    page = shown(outputs, "html")
    assert "<progress" in page
    assert "step 2 of 2" in page
    assert "<table><tr><td" in page
    text = shown(outputs, "text")
    assert "notice: the run makes 2 optimizer steps" in page
    assert "FutureWarning" not in text
    assert "DeprecationWarning" not in text


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="quantised base")
def test_inference_and_fine_tuning(tmp_path):
    outputs = run(NOTEBOOKS[0], tmp_path, "data/conversations.jsonl")
    check(outputs)
    assert shown(outputs, "text").count("C# code") == 2
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("rouge_score"), reason="ROUGE")
def test_code_generation(tmp_path):
    outputs = run(NOTEBOOKS[1], tmp_path, "data/python_code.jsonl")
    check(outputs)
    assert "ROUGE-Lsum" in shown(outputs, "text")
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("rouge_score"), reason="ROUGE")
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="quantised base")
def test_qlora(tmp_path):
    outputs = run(NOTEBOOKS[2], tmp_path, "data/python_code.jsonl")
    check(outputs)
    assert "ROUGE-Lsum" in shown(outputs, "text")


@pytest.mark.slow
def test_a_cell_that_is_run_twice_trains_into_a_second_folder_and_shows_no_warnings_of_libraries(tmp_path):
    rows = [{"prompt": f"Where is order {number}?", "completion": f"Order {number} comes."} for number in range(40)]
    (tmp_path / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["training_config.max_steps=2", "training_config.eval_strategy=no", "evaluation.generate=0"]
    cell = f"import philora\nrun = philora.train('orders.jsonl', {settings}, model='nano')\nrun"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for _ in range(2)])
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, second = (cell.outputs for cell in book.cells)
    assert ">runs/orders<" in shown(first, "html")
    assert ">runs/orders-2<" in shown(second, "html")
    assert "Warning" not in shown([*first, *second], "text")
